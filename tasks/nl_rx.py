r"""NL-RX-SYNTH: a description of lines of text to the regular expression (arXiv 1608.03000).

    Description: lines with a number before a character
    Regex: ([0-9]).*(.).*

Rows come from a local folder; there is no hub copy (see `load`). An answer is right if it denotes
the same set of strings as the gold one, however it is written: both become finite automata, and
automata-lib compares these. It cannot read this dialect (no library does), so the parser is ours.
From the loosest operator to the tightest:

    a|b   a&b (both match)   ab   a? a* a+ a{3} a{3,} a{3,5}   ~a (any string that a does not match)

and below them [a-z0-9], [^a-z], `.` (any character, newline too), (a), () for the empty string. So
`~(a)*` is `(~a)*`, and `\x` is the letter x: in this data, `\b` is a b and no border of a word.
Anything else is a letter, `^` and `$` too: strings match as a whole. The symbols `&` and `~` are
those of dk.brics.automaton, and so is the order. The authors' tool, which we take to be built on
it, is not to be had, so this is our reading. It differs from brics where brics reads what no one
means: an operator with nothing beside it is an error here, and `#`, `@`, `"` and `<` are letters.

About one gold regex in six matches nothing at all, `([0-9])&([a-z])` for one. Hence the constant
answer that `extra_scores` reports, and the score on the rows that are neither so nor match all.
"""
import hashlib
import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

from automata.fa.dfa import DFA
from automata.fa.nfa import NFA

from tasks.common import Example, load_rows

N_VALIDATION = 256
SOURCE = ("datasets/synth_train.jsonl and datasets/synth_test.jsonl of galilai-group/llm-jepa on "
          "GitHub")

# What a prediction may cost: beyond it is wrong, unless it is the gold regex to the letter. Gold
# regexes have up to 54 characters and cost milliseconds, the dearest ones a second.
MAX_LENGTH = 200        # characters
MAX_WORK = 2_000_000    # states visited and copied, for at most a few seconds

# the paper states 4 shots; the lengths are ours: gold regexes have at most 32 tokens, and each pass
# reveals one
PROTOCOL = dict(n_shot=4, gen_length=64, block_length=64, steps=64)


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Rows of train, validation (the last 256 of train) or test, in file order.

    data_dir holds {split}.jsonl[.gz] or synth_{split}.jsonl, rows of {text, regex} or of messages.
    Raises ValueError or FileNotFoundError in one sentence if rows cannot be had or lack a field.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"nl_rx has no split {split!r}; choose from train, validation, test")
    if variant:
        raise ValueError(f"nl_rx has no variant {variant!r}; leave it empty")
    if not data_dir:
        raise ValueError(f"nl_rx is not on the hub: put {SOURCE} into a folder and give it as "
                         f"--data_dir")
    source = "test" if split == "test" else "train"
    theirs = (Path(data_dir) / f"synth_{source}.jsonl").is_file()
    rows = [text_and_regex(row, f"nl_rx {source}, row {number}") for number, row in
            enumerate(load_rows(f"synth_{source}" if theirs else source, data_dir, ""), 1)]
    if source == "train":
        if len(rows) <= N_VALIDATION:
            raise ValueError(f"nl_rx train has {len(rows)} rows; more than {N_VALIDATION} are "
                             f"needed, for that many are held out")
        rows = rows[-N_VALIDATION:] if split == "validation" else rows[:-N_VALIDATION]
    return to_examples(rows, split)


def text_and_regex(row: dict, where: str) -> tuple[str, str]:
    """From {"text", "regex"}, or from llm-jepa's {"messages": [{"role", "content"}, ...]}."""
    if isinstance(row.get("messages"), list):
        said = {message.get("role"): message.get("content") for message in row["messages"]
                if isinstance(message, dict)}
        row = {"text": said.get("user"), "regex": said.get("assistant")}
    pair = row.get("text"), row.get("regex")
    if not all(isinstance(text, str) and text.strip() for text in pair):
        raise ValueError(f"{where}: 'text' and 'regex' must be texts, or 'messages' must have a "
                         f"user's and an assistant's")
    return pair[0].strip(), pair[1].strip()


def to_examples(rows: list[tuple[str, str]], split: str) -> list[Example]:
    """An id is a hash of the pair, with a count where the pair occurs again in its split."""
    examples, seen = [], Counter()
    for text, regex in rows:
        key = hashlib.blake2b(f"{text}\n{regex}".encode(), digest_size=6).hexdigest()
        seen[key] += 1
        again = f"-{seen[key]}" if seen[key] > 1 else ""
        examples.append(Example(f"Description: {text}\nRegex:", f" {regex}",
                                {"id": f"nl_rx/{split}/{key}{again}", "gold": regex}))
    return examples


def extract(completion: str) -> str | None:
    """The predicted regex, or None: what the model wrote before it began another `Description:`.

    Of that, what is between code fences, if it has some; of that, the first line with text that
    does not end in a colon (`Here it is:`); of that, what is in `backticks`, or else all but a
    leading `Regex:` or `Answer:`. No gold regex has a colon or a backtick.
    """
    text = completion.split("\nDescription:")[0]
    fenced = re.search(r"```[^\n`]*\n(.*?)```", text, re.S)
    lines = [line.strip() for line in (fenced[1] if fenced else text).split("\n")]
    lines = [line for line in lines if line and not re.fullmatch(r"```\w*|.*:", line)]
    if not lines:
        return None
    quoted = re.search("`([^`]+)`", lines[0])
    line = quoted[1] if quoted else re.sub("^(regex|answer): ?", "", lines[0], flags=re.I)
    return line.strip() or None


def score(completion: str, example: Example) -> bool:
    """Whether prediction and gold match the same strings: "func match" in the paper's words."""
    prediction, gold = extract(completion), example.meta["gold"]
    return prediction is not None and (prediction == gold or same_language(prediction, gold))


def exact(completion: str, example: Example) -> bool:
    """LLM-JEPA's metric: the same text."""
    return extract(completion) == example.meta["gold"]


def extra_scores(examples: list[Example], completions: list[str]) -> dict[str, float]:
    """Shares that stand beside func match, in 0..1.

    constant_baseline is what `([0-9])&([a-z])` scores as the answer to every question: on train,
    no constant scores more. proper_match leaves out the rows whose gold regex matches nothing, as
    that one does, or everything.
    """
    pairs = list(zip(completions, examples, strict=True))
    hits = {"exact_match": [exact(*pair) for pair in pairs],
            "proper_match": [score(*pair) for pair in pairs if is_proper(pair[1])],
            "constant_baseline": [language_kind(e.meta["gold"]) == "empty" for e in examples]}
    return {name: sum(rows) / len(rows) for name, rows in hits.items() if rows}


def is_proper(example: Example) -> bool:
    """Whether the gold regex matches some strings and some not."""
    return language_kind(example.meta["gold"]) == "proper"


# ----------------------------------------------------------------------------------------------
# languages


@lru_cache(maxsize=1 << 14)
def same_language(a: str, b: str) -> bool:
    """False also for what is no regex, or for one that costs too much."""
    try:
        symbols = alphabet(a, b)
        return automaton(a, symbols) == automaton(b, symbols)
    except ValueError:
        return False


@lru_cache(maxsize=1 << 14)
def language_kind(regex: str) -> str:
    """empty, all or proper; proper as well for what is no regex, or for one that costs too much."""
    try:
        dfa = automaton(regex, alphabet(regex))
    except ValueError:
        return "proper"
    if dfa.isempty():
        return "empty"
    return "all" if dfa == DFA.universal_language(dfa.input_symbols) else "proper"


def alphabet(*regexes: str) -> str:
    """One character for all those that no set in the regexes tells apart, in ascending order."""
    sets = {step for regex in regexes for step in parse(regex) if isinstance(step, tuple)}
    cuts = {0} | {cut for _, ranges in sets for lo, hi in ranges for cut in (lo, hi + 1)}
    kinds = {}
    for code in sorted(cuts - {0x110000}):      # all up to the next cut are in the same sets
        kinds.setdefault(tuple(contains(chars, code) for chars in sets), chr(code))
    return "".join(kinds.values())


def contains(chars: tuple, code: int) -> bool:
    negated, ranges = chars
    return negated != any(lo <= code <= hi for lo, hi in ranges)


# ----------------------------------------------------------------------------------------------
# regex -> steps

TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\)|\{[0-9]+(?:,[0-9]*)?\}|.", re.S)
RANK = {"(": 0, "|": 1, "&": 2, "": 3, "~": 4}      # "" puts two things side by side
REPEATS = {"?": (0, 1), "*": (0, None), "+": (1, None)}


@lru_cache(maxsize=1 << 14)
def parse(regex: str) -> list:
    """The regex in postfix order, so that a(b|c)* reads a b c | * "" without any parentheses.

    A step is a set of characters as (negated, ranges), or an operator: "|", "&", "", "~", "()" for
    the empty string, or [low, high] repetitions. Raises ValueError for what is no regex.
    """
    if len(regex) > MAX_LENGTH:
        raise ValueError(f"a regex may have {MAX_LENGTH} characters, and this has {len(regex)}")
    steps, waiting = [], []     # waiting: operators whose right side is not complete
    complete = False        # whether an operand ends here, for | & ) and repetitions to follow
    for token in TOKEN.findall(regex):
        repeats = token in REPEATS or token[0] == "{" and len(token) > 1
        if complete and not repeats and token not in ("|", "&", ")"):
            release(waiting, RANK[""], steps)
            waiting.append("")
        elif not complete and (repeats or token in ("|", "&", ")")):
            raise ValueError(f"{regex!r} has a {token!r} with nothing before it")
        if token in ("(", "~"):
            waiting.append(token)
        elif token in ("|", "&"):
            release(waiting, RANK[token], steps)
            waiting.append(token)
        elif token == ")":
            release(waiting, RANK["|"], steps)
            if not waiting:
                raise ValueError(f"{regex!r} closes a parenthesis that it did not open")
            waiting.pop()
        elif repeats:
            steps.append(repetition(token))
        else:
            steps.append(token if token == "()" else characters(token))
        complete = token not in ("(", "~", "|", "&")
        if complete and not repeats:
            release(waiting, RANK["~"], steps)
    release(waiting, RANK["|"], steps)
    if waiting or not complete:
        raise ValueError(f"{regex!r} ends too early")
    return steps


def release(waiting: list, rank: int, steps: list):
    """Moves to steps what binds at least as tightly as `rank`."""
    while waiting and RANK[waiting[-1]] >= rank:
        steps.append(waiting.pop())


def repetition(token: str) -> list:
    """{3}, {3,}, {3,5}, ?, * or + -> [low, high], high None for any number."""
    low, comma, high = token[1:-1].partition(",")
    if token in REPEATS:
        return list(REPEATS[token])
    low, high = int(low), int(high) if high else None if comma else int(low)
    if high is not None and high < low:
        raise ValueError(f"{token} repeats at least {low} and at most {high} times")
    return [low, high]


def characters(token: str) -> tuple:
    """A letter, an escaped one, `.` or a class -> (negated, ranges of code points)."""
    if token == ".":
        return True, ()
    if token[0] != "[" or len(token) == 1:
        if token in ("[", "{", "\\"):
            raise ValueError(f"{token!r} is not closed, or has nothing behind it")
        return False, ((ord(token[-1]), ord(token[-1])),)
    negated = token[1] == "^"
    items = re.findall(r"(\\?.)(?:-(\\?.))?", token[1 + negated:-1], re.S)
    ranges = tuple((ord(lo[-1]), ord((hi or lo)[-1])) for lo, hi in items)
    if not ranges or any(lo > hi for lo, hi in ranges):
        raise ValueError(f"{token} is no set of characters")
    return negated, ranges


# ----------------------------------------------------------------------------------------------
# steps -> automaton


@lru_cache(maxsize=1 << 12)
def automaton(regex: str, symbols: str) -> DFA:
    """The smallest deterministic one. Raises ValueError for no regex, or beyond MAX_WORK."""
    left = MAX_WORK

    def spend(work: int):
        nonlocal left
        left -= work
        if left < 0:
            raise ValueError(f"{regex!r} takes too much work")

    def copied(nfa: NFA) -> NFA:        # copying takes longer than visiting
        spend(5 * (len(nfa.states) + sum(len(moves) for moves in nfa.transitions.values())))
        return nfa

    stack = []                          # of automata that are not deterministic
    for step in parse(regex):
        if isinstance(step, tuple):
            stack.append(one_of({c for c in symbols if contains(step, ord(c))}, symbols))
        elif step == "()":
            stack.append(one_of((), symbols).option())
        elif isinstance(step, list):
            low, high = step
            part = NFA.from_dfa(minimal(stack.pop(), spend))    # as small as can be, then copied
            whole = one_of((), symbols).option()
            for _ in range(low):
                whole = copied(whole.concatenate(part))
            for _ in range(low, high or 0):
                whole = copied(whole.concatenate(part.option()))
            stack.append(whole.concatenate(part.kleene_star()) if high is None else whole)
        elif step == "~":
            stack.append(NFA.from_dfa(minimal(stack.pop(), spend).complement()))
        elif step == "&":
            b, a = minimal(stack.pop(), spend), minimal(stack.pop(), spend)
            spend(20 * len(a.states) * len(b.states) * len(symbols))
            stack.append(NFA.from_dfa(a.intersection(b)))
        else:
            b, a = stack.pop(), stack.pop()
            stack.append(copied(a.union(b) if step == "|" else a.concatenate(b)))
    return minimal(stack.pop(), spend)


def one_of(letters, symbols: str) -> NFA:
    return NFA(states={0, 1}, input_symbols=set(symbols), initial_state=0, final_states={1},
               transitions={0: {c: {1} for c in letters}})


def minimal(nfa: NFA, spend) -> DFA:
    """The subset construction, where a state is the set of states that the NFA may be in.

    automata-lib has it too, but not with an end: it may make 2 ** len(nfa.states) of them.
    """
    nfa = nfa.eliminate_lambda()
    start = frozenset([nfa.initial_state])
    todo, moves = [start], {}
    while todo:
        here = todo.pop()
        if here not in moves:
            spend((1 + len(here)) * len(nfa.input_symbols))
            moves[here] = {c: frozenset().union(*(nfa.transitions.get(state, {}).get(c, ())
                                                  for state in here)) for c in nfa.input_symbols}
            todo += moves[here].values()
    final = {states for states in moves if states & nfa.final_states}
    return DFA(states=set(moves), input_symbols=nfa.input_symbols, transitions=moves,
               initial_state=start, final_states=final).minify()

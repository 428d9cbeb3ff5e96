r"""NL-RX-SYNTH: a description of lines of text to the regular expression (arXiv 1608.03000).

    Description: lines with a number before a character
    Regex: ([0-9]).*(.).*

Rows come from a local folder or, without one, from GitHub: LLM-JEPA's two files (see `fetched`).
An answer is right if it denotes the same set of strings as the gold one, however it is written:
both become finite automata, and automata-lib compares these. It cannot read this dialect (no
library does), so the parser is ours. From the loosest operator to the tightest:

    a|b   a&b (both match)   ab   a? a* a+ a{3} a{3,} a{3,5}   ~a (any string that a does not match)

and below them [a-z0-9], [^a-z], `.` (any character, newline too), (a), () for the empty string. So
`~(a)*` is `(~a)*`, and `\x` is the letter x: in this data `\b` is the letter b, not a word border.
Anything else is a letter, `^` and `$` too, because a regex matches whole strings. The symbols `&`
and `~` and the order are those of dk.brics.automaton, on which we take the authors' tool to be
built. That tool is not public, so this is our reading. It differs from brics in two points: an
operator with nothing beside it is an error here, as in `(a|)`, and `#`, `@`, `"` and `<` are
letters. `a{,3}` is an error in both, and `a*?` is `(a*)?`.

About one gold regex in six matches nothing at all, for example `([0-9])&([a-z])`. Hence
`extra_scores` reports the score of that constant answer, and the score on the rows whose gold regex
matches some strings but not all.
"""
import hashlib
import re
from functools import lru_cache
from pathlib import Path

from automata.fa.dfa import DFA
from automata.fa.nfa import NFA

from tasks.common import Example, check_choice, hold_out, ids_of, load_rows, rows_file, rows_name
from tasks.files import cache_folder, fetch, read_jsonl

# LLM-JEPA's files. The row counts are those of its commit 6d7d0d1, and so is the sha256 of train's
# pairs, "text\nregex\n" each. For test we know no checksum.
URL = "https://raw.githubusercontent.com/galilai-group/llm-jepa/main/datasets/synth_{}.jsonl"
N_ROWS = {"train": 8_000, "test": 2_000}
SHA256 = {"train": "e159a1b2835a0bd223339dabdbb242c70c08026bb32b4660164628a0f0c9484c"}

# Limits on a prediction. Beyond them it is wrong, unless it is the gold regex to the letter. Gold
# regexes have up to 54 characters and take milliseconds, the slowest ones a second.
MAX_LENGTH = 200        # characters
MAX_WORK = 2_000_000    # states visited and copied: a few seconds at most

# the paper states 4 shots; the lengths are ours: gold regexes have at most 32 tokens, and each pass
# reveals one
PROTOCOL = dict(n_shot=4, gen_length=64, block_length=64, steps=64)


def load(split: str, data_dir: str = "", variant: str = "") -> list[Example]:
    """Return the rows of train, validation (the last 256 of train) or test, in file order.

    data_dir has {split}.jsonl[.gz] or synth_{split}.jsonl, rows of {text, regex} or of messages.
    Raises ValueError or FileNotFoundError in one sentence if rows or their fields are missing.
    """
    check_choice("nl_rx", split, variant)
    source = "test" if split == "test" else "train"
    folder = Path(data_dir) if data_dir else fetched(source)
    is_raw = rows_file(f"synth_{source}", str(folder)) is not None
    try:
        name = f"synth_{source}" if is_raw else source
        rows = load_rows(name, str(folder), "")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; nl_rx's rows are at {URL.format(source)}, and are "
                                f"fetched from there if --data_dir is empty") from None
    pairs = pairs_of(rows, rows_name(name, str(folder), ""))
    return to_examples(hold_out("nl_rx", pairs, split) if source == "train" else pairs, split)


def fetched(source: str) -> Path:
    """Return the cache folder with synth_{source}.jsonl, which is downloaded on the first call.

    A file with other rows than we know is refused. Raises FileNotFoundError without a network.
    """
    url, folder = URL.format(source), cache_folder("nl_rx")
    path = folder / f"synth_{source}.jsonl"

    def check(path: Path):
        pairs = pairs_of(read_jsonl(path), "its data")
        lines = "".join(f"{text}\n{regex}\n" for text, regex in pairs)
        digest = hashlib.sha256(lines.encode()).hexdigest()
        if len(pairs) != N_ROWS[source] or digest != SHA256.get(source, digest):
            raise ValueError(f"{len(pairs):,} rows with sha256 {digest}")

    if path.is_file():
        try:
            check(path)
        except ValueError as error:
            raise ValueError(f"{path} is not the file that was fetched ({error}); remove it, and "
                             f"it is fetched again") from None
        return folder
    try:
        fetch(url, path, check)
    except ValueError as error:
        raise ValueError(f"{url} is not the file that this task was made with ({error}); to use it "
                         f"all the same, save it in a folder and give that as --data_dir") from None
    except OSError as error:
        reason = str(error).strip() or type(error).__name__
        raise FileNotFoundError(f"nl_rx's rows are at {url}, which cannot be fetched ({reason}); "
                                f"give a folder with train.jsonl.gz and test.jsonl.gz as "
                                f"--data_dir") from None
    return folder


def pairs_of(rows: list[dict], name: str) -> list[tuple[str, str]]:
    """Return (text, regex) of each row. Raises ValueError that names the row without them.

    A row is {"text", "regex"}, or as in LLM-JEPA's files {"messages": [{"role", "content"}, ...]}
    with a system's prompt, the text as the user's message and the regex as the assistant's.
    """
    pairs = []
    for number, row in enumerate(rows, 1):
        if isinstance(row.get("messages"), list):
            said = {message.get("role"): message.get("content") for message in row["messages"]
                    if isinstance(message, dict) and isinstance(message.get("role"), str)}
            row = {"text": said.get("user"), "regex": said.get("assistant")}
        pair = row.get("text"), row.get("regex")
        if not all(isinstance(text, str) and text.strip() for text in pair):
            raise ValueError(f"{name}, row {number}: 'text' and 'regex' must be texts, or "
                             f"'messages' must have a user's and an assistant's")
        pairs.append((pair[0].strip(), pair[1].strip()))
    return pairs


def to_examples(pairs: list[tuple[str, str]], split: str) -> list[Example]:
    examples = []
    for (text, regex), key in zip(pairs, ids_of([f"{text}\n{regex}" for text, regex in pairs])):
        meta = {"id": f"nl_rx/{split}/{key}", "gold": regex}
        examples.append(Example(prompt(text), f" {regex}", meta))
    return examples


def prompt(text: str) -> str:
    return f"Description: {text.strip()}\nRegex:"


def extract(completion: str) -> str | None:
    """Return the predicted regex, or None.

    That is the text before another `Description:`; within it the first code fence, if there is one;
    within that the first line that has text and does not end in a colon (`Here it is:`); within
    that the part in `backticks`, or else the line without a leading `Regex:` or `Answer:`. No gold
    regex has a colon or a backtick.
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
    """Return whether prediction and gold match the same strings ("func match" in the paper)."""
    prediction, gold = extract(completion), example.meta["gold"]
    return prediction is not None and (prediction == gold or same_language(prediction, gold))


def exact(completion: str, example: Example) -> bool:
    """Return whether prediction and gold are the same text, which is LLM-JEPA's metric."""
    return extract(completion) == example.meta["gold"]


def extra_scores(examples: list[Example], completions: list[str]) -> dict[str, float]:
    """Return the shares that are printed beside func match, in 0..1.

    constant_baseline is the score of `([0-9])&([a-z])` as the answer to every question; no constant
    scores more on train. proper_match is func match on the rows whose gold regex matches some
    strings but not all.
    """
    pairs = list(zip(completions, examples, strict=True))
    hits = {
        "exact_match": [exact(*pair) for pair in pairs],
        "proper_match": [score(*pair) for pair in pairs if is_proper(pair[1])],
        "constant_baseline": [language_kind(e.meta["gold"]) == "empty" for e in examples],
    }
    return {name: sum(rows) / len(rows) for name, rows in hits.items() if rows}


def is_proper(example: Example) -> bool:
    """Return whether the gold regex matches some strings but not all."""
    return language_kind(example.meta["gold"]) == "proper"


# ----------------------------------------------------------------------------------------------
# languages


@lru_cache(maxsize=1 << 14)
def same_language(a: str, b: str) -> bool:
    """Return whether two regexes match the same strings; False if one is invalid or too costly."""
    try:
        symbols = alphabet(a, b)
        return automaton(a, symbols) == automaton(b, symbols)
    except ValueError:
        return False


@lru_cache(maxsize=1 << 14)
def language_kind(regex: str) -> str:
    """Return empty, all or proper; proper also for a regex that is invalid or too costly."""
    try:
        dfa = automaton(regex, alphabet(regex))
    except ValueError:
        return "proper"
    if dfa.isempty():
        return "empty"
    return "all" if dfa == DFA.universal_language(dfa.input_symbols) else "proper"


def alphabet(*regexes: str) -> str:
    """Return one character for each class of characters that the regexes do not tell apart."""
    sets = {step for regex in regexes for step in parse(regex) if isinstance(step, tuple)}
    cuts = {0} | {cut for _, ranges in sets for lo, hi in ranges for cut in (lo, hi + 1)}
    kinds = {}
    for code in sorted(cuts - {0x110000}):      # all codes up to the next cut are in the same sets
        kinds.setdefault(tuple(contains(chars, code) for chars in sets), chr(code))
    return "".join(kinds.values())


def contains(chars: tuple, code: int) -> bool:
    """Return whether a code point is in a set of characters (negated, ranges)."""
    negated, ranges = chars
    return negated != any(lo <= code <= hi for lo, hi in ranges)


# ----------------------------------------------------------------------------------------------
# regex -> steps

TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\)|\{[0-9]+(?:,[0-9]*)?\}|.", re.S)
RANK = {"(": 0, "|": 1, "&": 2, "": 3, "~": 4}      # how tightly each binds; "" concatenates
REPEATS = {"?": (0, 1), "*": (0, None), "+": (1, None)}


@lru_cache(maxsize=1 << 14)
def parse(regex: str) -> list:
    """Return the regex in postfix order (shunting-yard): a(b|c)* becomes a b c | * "".

    A step is a set of characters as (negated, ranges), or an operator: "|", "&", "" (concatenate),
    "~", "()" for the empty string, [low, high] repetitions. Raises ValueError for an invalid regex.
    """
    if len(regex) > MAX_LENGTH:
        raise ValueError(f"a regex may have {MAX_LENGTH} characters, and this has {len(regex)}")
    steps, waiting = [], []     # waiting: operators whose right operand is not complete yet
    complete = False            # an operand ends here, so | & ) or a repetition may follow
    for token in TOKEN.findall(regex):
        repeats = token in REPEATS or token[0] == "{" and len(token) > 1
        if complete and not repeats and token not in ("|", "&", ")"):
            release(waiting, RANK[""], steps)
            waiting.append("")
        elif not complete and (repeats or token in ("|", "&", ")")):
            raise ValueError(f"{regex!r} has {token!r} with nothing before it")
        if token in ("(", "~"):
            waiting.append(token)
        elif token in ("|", "&"):
            release(waiting, RANK[token], steps)
            waiting.append(token)
        elif token == ")":
            release(waiting, RANK["|"], steps)
            if not waiting:
                raise ValueError(f"{regex!r} closes a parenthesis that it has not opened")
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
    """Move the waiting operators that bind at least as tightly as `rank` to the steps."""
    while waiting and RANK[waiting[-1]] >= rank:
        steps.append(waiting.pop())


def repetition(token: str) -> list:
    """{3}, {3,}, {3,5}, ?, * or + -> [low, high]; high is None for any number."""
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
            raise ValueError(f"{token!r} is not closed, or has nothing after it")
        return False, ((ord(token[-1]), ord(token[-1])),)
    negated = token[1] == "^"
    items = re.findall(r"(\\?.)(?:-(\\?.))?", token[1 + negated:-1], re.S)
    ranges = tuple((ord(lo[-1]), ord((hi or lo)[-1])) for lo, hi in items)
    if not ranges or any(lo > hi for lo, hi in ranges):
        raise ValueError(f"{token} is not a set of characters")
    return negated, ranges


# ----------------------------------------------------------------------------------------------
# steps -> automaton


@lru_cache(maxsize=1 << 12)
def automaton(regex: str, symbols: str) -> DFA:
    """Return the smallest deterministic automaton of a regex over the symbols.

    Raises ValueError for an invalid regex, or when the work exceeds MAX_WORK.
    """
    left = MAX_WORK

    def spend(work: int):
        nonlocal left
        left -= work
        if left < 0:
            raise ValueError(f"{regex!r} takes too much work")

    def copied(nfa: NFA) -> NFA:        # copying takes longer than visiting
        spend(5 * (len(nfa.states) + sum(len(moves) for moves in nfa.transitions.values())))
        return nfa

    stack = []                          # of nondeterministic automata
    for step in parse(regex):
        if isinstance(step, tuple):
            stack.append(one_of({c for c in symbols if contains(step, ord(c))}, symbols))
        elif step == "()":
            stack.append(one_of((), symbols).option())
        elif isinstance(step, list):
            low, high = step
            part = NFA.from_dfa(minimal(stack.pop(), spend))    # minimal, because it is copied
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
    """Return the automaton of the strings that are one of these letters."""
    return NFA(states={0, 1}, input_symbols=set(symbols), initial_state=0, final_states={1},
               transitions={0: {c: {1} for c in letters}})


def minimal(nfa: NFA, spend) -> DFA:
    """Return the minimal DFA by the subset construction; a state is a set of the NFA's states.

    automata-lib has this too, but without a bound: there may be 2 ** len(nfa.states) sets.
    """
    nfa = nfa.eliminate_lambda()
    start = frozenset([nfa.initial_state])
    todo, moves = [start], {}
    while todo:
        here = todo.pop()
        if here not in moves:
            spend((1 + len(here)) * len(nfa.input_symbols))
            moves[here] = {}
            for c in nfa.input_symbols:
                reached = (nfa.transitions.get(state, {}).get(c, ()) for state in here)
                moves[here][c] = frozenset().union(*reached)
            todo += moves[here].values()
    final = {states for states in moves if states & nfa.final_states}
    return DFA(states=set(moves), input_symbols=nfa.input_symbols, transitions=moves,
               initial_state=start, final_states=final).minify()

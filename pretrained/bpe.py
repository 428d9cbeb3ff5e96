"""Byte-pair vocabularies: read what LLaDA, Dream, Qwen, Llama 3 and SmolLM2 publish, for tiktoken.

A folder has HuggingFace's tokenizer.json, or vocab.json and merges.txt with files of added tokens.
A vocabulary that is read here gives the same ids as the `tokenizers` library. A file that asks for
something else than we implement is an error: an almost right vocabulary would make an almost right
model, and nobody would notice.
"""
import json
from heapq import heappop, heappush
from typing import NamedTuple

# tokenizer.json is enough; without it the next four are needed
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
         "special_tokens_map.json", "chat_template.jinja")

# how Qwen2's tokenizer, which Dream uses too, splits text (transformers, models/qwen2)
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# how ByteLevel splits by itself, for GPT-2 (tokenizers, pre_tokenizers/byte_level.rs)
GPT2_PATTERN = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+"
                r"| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
# the same after Digits, which SmolLM2 and StarCoder2 have before it: each digit is a word of its
# own, and blanks before a digit are at an end, as before the end of the text
DIGITS_PATTERN = (r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+"
                  r"| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+")
QWEN_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")

# the first that a vocabulary has; the settings of a tokenizer may name another mask
ENDS = ("<|endoftext|>", "<|end_of_text|>")
MASKS = ("<|mdm_mask|>", "<|mask|>", "<|MASK|>", "<[MASK]>")

# GPT-2 writes each byte as one character: the printable ones of Latin-1 as themselves, the other 68
# in their order as the characters from 256 on.
PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTE_OF = {chr(i): i for i in PRINTABLE}
BYTE_OF |= {chr(256 + n): i for n, i in enumerate(sorted(set(range(256)) - PRINTABLE))}

# The bytes that a vocabulary may lack, and the characters that need them: control characters, bytes
# that UTF-8 never has, and the first bytes of the planes 4 to 11, in which there is no character.
# SmolLM2's lacks 21 of them. The library would leave such a byte out of the text without a word.
RARE = {i: chr(i) for i in {*range(32), 127} - {*b"\t\n\r"}}
RARE |= dict.fromkeys((0xc0, 0xc1, *range(0xf5, 256)), "")
RARE |= {0xf1: "\U00040000-\U0007ffff", 0xf2: "\U00080000-\U000bffff"}

LONGEST = 4096          # bytes of a token; published ones have a few hundred


class BPE(NamedTuple):
    pattern: str            # splits a text into words; merges happen within a word
    nfc: bool               # text is brought to Unicode's composed form first
    pieces: list[bytes]     # the bytes of each id; empty for added tokens and for gaps
    ranked: list[int]       # the ids that text can become, in the order of tiktoken's ranks
    added: dict[str, int]   # tokens that no merge makes, such as the mask
    bos: tuple[int, ...] = ()   # the ids that come before every text


def read_tokenizer_json(spec: dict) -> BPE:
    """Return the vocabulary of a tokenizer.json.

    Raises ValueError (or KeyError, TypeError, AttributeError for damage that no check foresees) if
    the file asks for something that is not implemented here.
    """
    normalizer = steps_of(spec["normalizer"], "normalizers")
    refuse_if([step["type"] for step in normalizer] not in ([], ["NFC"]),
              f"its normalizer is {normalizer}; only NFC or none is implemented")
    regex = regex_of(steps_of(spec["pre_tokenizer"], "pretokenizers"))
    bos = ids_before(steps_of(spec["post_processor"], "processors"))
    decoder = [step["type"] for step in steps_of(spec["decoder"], "decoders")]
    refuse_if(decoder != ["ByteLevel"], f"its decoder is {decoder}; only ByteLevel is implemented")

    model = dict(spec["model"])
    vocab, merges, kind = model.pop("vocab"), model.pop("merges"), model.pop("type", "BPE")
    ignore_merges = bool(model.pop("ignore_merges", False))
    refuse_if(kind != "BPE", f"its model is {kind}; only BPE is implemented")
    for option, value in model.items():     # unk: a text with an unknown byte is refused
        refuse_if(value and option not in ("unk_token", "fuse_unk"),
                  f"it asks for {option}, which is not implemented")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    # the text between two matches is a word as well; tiktoken alone would drop it
    pattern = rf"(?:{regex})|(?:(?!{regex})[\s\S])+"
    return assemble(pattern, bool(normalizer), vocab, merges, spec["added_tokens"], ignore_merges,
                    bos)


def regex_of(steps: list[dict]) -> str:
    """Return the regex that splits a text into words as the steps of a pre_tokenizer do."""
    last = steps[-1] if steps else {}
    if last.get("type") == "ByteLevel" and not last["add_prefix_space"]:
        kinds, first = [step["type"] for step in steps[:-1]], steps[0]
        own_regex = last.get("use_regex", True)
        if own_regex and not kinds:
            return GPT2_PATTERN
        if own_regex and kinds == ["Digits"] and first["individual_digits"]:
            return DIGITS_PATTERN
        if (not own_regex and kinds == ["Split"] and first["behavior"] == "Isolated"
                and not first["invert"] and "Regex" in first["pattern"]):
            regex = first["pattern"]["Regex"]
            refuse_if(not isinstance(regex, str),
                      f"its Split is by {regex!r}, which is not a regex")
            return regex
    raise ValueError(f"its pre_tokenizer is {steps}; only ByteLevel with its own regex, alone or "
                     f"after individual Digits, and a Split by regex, then plain ByteLevel, are "
                     f"implemented")


def ids_before(steps: list[dict]) -> tuple[int, ...]:
    """Return the ids that a post_processor puts before a text, such as <|begin_of_text|>'s."""
    bos = []
    for step in steps:
        if step["type"] == "ByteLevel":
            continue
        refuse_if(step["type"] != "TemplateProcessing",
                  f"its post_processor is {step['type']}; only ByteLevel and TemplateProcessing "
                  f"are implemented")
        *before, _ = parts = step["single"] or [None]
        refuse_if([list(part or ()) for part in parts] != [["SpecialToken"]] * len(before)
                  + [["Sequence"]],
                  f"its post_processor TemplateProcessing makes {step['single']} of a text; only "
                  f"tokens before the text are implemented")
        names = [part["SpecialToken"]["id"] for part in before]
        for name in names:
            refuse_if(name not in step["special_tokens"],
                      f"its post_processor does not say which ids {name!r} has")
        bos = sum((step["special_tokens"][name]["ids"] for name in names), []) + bos
    return tuple(bos)


def settings_of(files: dict[str, bytes]) -> dict:
    """Return the mask_token (a text or None) and the chat_template (likewise) of the files."""
    found = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):       # the latter counts
        try:
            config = json.loads(files.get(file, b"{}"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its {file} is not JSON: {error}") from None
        refuse_if(not isinstance(config, dict), f"its {file} is not a JSON object")
        found |= {key: value for key, value in config.items() if value}
    mask, template = found.get("mask_token"), found.get("chat_template")
    if isinstance(mask, dict):
        mask = mask.get("content")
    if isinstance(template, list):          # several, each with a name
        template = {each["name"]: each["template"] for each in template}.get("default")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode()
    for name, value in (("mask_token", mask), ("chat_template", template)):
        refuse_if(not isinstance(value, str | None), f"its {name} is {value!r}; a text would fit")
    return {"mask_token": mask, "chat_template": template}


def steps_of(component, plural: str) -> list[dict]:
    """Return a part of the pipeline as the list of its steps."""
    if component is None:
        return []
    return component[plural] if component["type"] == "Sequence" else [component]


def read_vocab_and_merges(files: dict[str, bytes]) -> BPE:
    """Return the vocabulary in the files of Qwen2's slow tokenizer: {name: content}."""
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    kind = config.get("tokenizer_class")
    refuse_if(kind not in QWEN_CLASSES, f"tokenizer_config.json says {kind}; only those of Qwen2 "
                                        f"and Dream are implemented")
    lines = files["merges.txt"].decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    added = json.loads(files.get("added_tokens.json", b"{}"))
    tokens = [{"content": text, "id": i} for text, i in added.items()]
    tokens += [{**token, "id": int(i)}
               for i, token in config.get("added_tokens_decoder", {}).items()]
    return assemble(QWEN_PATTERN, True, json.loads(files["vocab.json"]), merges, tokens)


def assemble(pattern: str, nfc: bool, vocab: dict, merges: list, tokens: list[dict],
             ignore_merges: bool = False, bos: tuple[int, ...] = ()) -> BPE:
    """Check that vocabulary, merges and added tokens fit together, and return them as a BPE.

    ignore_merges: a word that is in the vocabulary becomes that token without merges.
    """
    added = {}
    for token in tokens:
        text, i = token["content"], token["id"]
        for flag in ("single_word", "lstrip", "rstrip", "normalized"):
            # GPT-2's is normalized, which means nothing if no normalizer changes the text
            refuse_if(token.get(flag) and (nfc or flag != "normalized"),
                      f"its added token {text!r} is {flag}")
        refuse_if(not text, "it has an added token without text")
        refuse_if(added.setdefault(text, i) != i or vocab.get(text, i) != i,
                  f"its token {text!r} has two ids")
    every = vocab | added
    refuse_if(not all(type(i) is int and 0 <= i < 1 << 24 for i in every.values()),
              "its ids must be whole numbers from 0 to 2**24")
    refuse_if(len(set(every.values())) < len(every), "two of its tokens share an id")
    whole_words = {}
    if ignore_merges:
        whole_words = {piece: i for text, i in vocab.items() if (piece := to_bytes(text))}
    ranked = ranked_ids(vocab, merges, whole_words)
    overlap = set(ranked) & set(added.values())
    refuse_if(overlap, f"its added tokens {sorted(overlap)} are also made by merges or are words")
    refuse_if(not set(bos) <= set(added.values()),
              f"its post_processor begins a text with the ids {list(bos)}, and not all of them are "
              f"added tokens")
    pieces = [b""] * (1 + max(vocab.values()))
    for text, i in vocab.items():
        if text not in added:
            # the second is a token that no merge makes: decoded, but never encoded
            pieces[i] = to_bytes(text) or text.encode()
    return BPE(pattern, nfc, pieces, ranked, added, bos)


def ranked_ids(vocab: dict, merges: list, whole_words: dict[bytes, int]) -> list[int]:
    """Return the ids of the bytes, then of the tokens that text can become, in tiktoken's order.

    whole_words is {bytes: id}: a word that is one of these becomes that token in any case.

    The `tokenizers` library has an ordered list of pairs: of all neighbours in a word it merges the
    pair that is listed first, and again until no listed pair is left. tiktoken has an ordered list
    of tokens: it merges the neighbours whose joined bytes are the token of lowest rank.

    What happens within the bytes of a token that ends up as two neighbours in some word is what
    happens if BPE gets these bytes alone, because no merge crosses their borders until then. So the
    two neighbours of a token are the same in every word: those that are left if BPE on the token's
    own bytes stops at two parts. If this very pair is listed, the token gets its index as rank.
    If it is not, or if more than two parts are left, no merge ever makes the token, and it has no
    rank. At every step the two then see the same pairs in the same order. Many listed merges never
    fire: files that were converted from tiktoken's own format list every way to cut a token in two.

    tiktoken, like the library with ignore_merges, looks first whether a word as a whole is a token.
    A token of whole_words that no merge makes gets a rank after all others. It is never made within
    a longer word if more than two parts are left of it. If two are left, tiktoken would join them
    and the library would not: an error.
    """
    missing = [byte for char, byte in BYTE_OF.items() if char not in vocab and byte not in RARE]
    refuse_if(missing, f"it has no token for the bytes {missing}")
    pairs, made = {}, {}
    for n, pair in enumerate(merges):
        refuse_if(len(pair) != 2, f"its merge {n} is {pair}, not two tokens")
        refuse_if(not all(token and token in vocab for token in pair),
                  f"its merge {n} joins {pair}, and its vocabulary lacks one of them")
        token = "".join(pair)
        refuse_if(token not in vocab, f"its merge {n} makes {token!r}, which its vocabulary lacks")
        left, right = map(to_bytes, pair)
        refuse_if(left is None or right is None,
                  f"its merge {n} joins {pair}, and not every character of them stands for a byte")
        pairs[left, right] = n              # of a pair that is listed twice the library takes the
        made[left + right] = vocab[token]   # second place
    ranks, unmade = {}, []
    for piece, i in (made | whole_words).items():
        refuse_if(len(piece) > LONGEST, f"its token {i} has {len(piece)} bytes; at most {LONGEST} "
                                        f"are read")
        parts = tuple(merged(piece, pairs, least=2))
        if parts in pairs:
            ranks[i] = pairs[parts]
        elif piece in whole_words and len(parts) > 1:
            refuse_if(len(parts) == 2, f"it asks for ignore_merges, and its merges leave its token "
                                       f"{i} in the two parts {parts} without joining them")
            unmade.append(i)
    ids = sorted(vocab[char] for char in BYTE_OF if char in vocab)
    return ids + sorted(ranks, key=ranks.get) + unmade


def merged(word: bytes, pairs: dict[tuple[bytes, bytes], int], least: int = 1) -> list[bytes]:
    """Return the parts of a word after BPE: merge the leftmost pair of lowest rank, and again.

    It stops at `least` parts. The pairs are in a heap, so that the time is nearly linear in the
    length of the word.
    """
    n = len(word)
    end = [*range(1, n + 1), 0]         # where the part that begins here ends; 0: none begins here
    begin = [*range(-1, n)]             # where the part that ends here begins
    heap = []

    def look(i, j, k):
        """Put the neighbours word[i:j] and word[j:k] into the heap if they are listed."""
        if (rank := pairs.get((word[i:j], word[j:k]))) is not None:
            heappush(heap, (rank, i, j, k))
    for i in range(n - 1):
        look(i, i + 1, i + 2)
    left = n
    while heap and left > least:
        _, i, j, k = heappop(heap)
        if end[i] != j or end[j] != k:  # one of the two is part of another pair by now
            continue
        end[i], end[j], begin[k] = k, 0, i
        left -= 1
        if i:
            look(begin[i], i, k)
        if k < n:
            look(i, k, end[k])
    return [word[i:end[i]] for i in range(n) if end[i]]


def to_bytes(token: str) -> bytes | None:
    """Return the bytes that a token's characters stand for; None if one stands for none."""
    try:
        return bytes([BYTE_OF[char] for char in token])
    except KeyError:
        return None


def refuse_if(wrong, sentence: str):
    if wrong:
        raise ValueError(sentence)

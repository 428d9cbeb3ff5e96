"""Byte-pair vocabularies as LLaDA, Dream and Qwen publish them, in terms of tiktoken.

A folder holds HuggingFace's tokenizer.json, or vocab.json and merges.txt with the added tokens
beside them. What is read here encodes as the `tokenizers` library does, token for token. What a
file asks for and we do not do is an error: with a vocabulary that is almost right a model is
almost right, and nothing would tell.
"""
import json
from typing import NamedTuple

# tokenizer.json alone says everything; where it is missing, the next four do
FILES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer_config.json",
         "special_tokens_map.json", "chat_template.jinja")

# how Qwen2Tokenizer splits text, and Dream's with it (transformers, models/qwen2)
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast", "DreamTokenizer")

# GPT-2 writes each byte as a character: a printable one of Latin-1 as itself, the other 68, in
# order, as the characters from 256 on
PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
BYTE_OF = {chr(i): i for i in PRINTABLE}
BYTE_OF |= {chr(256 + n): i for n, i in enumerate(sorted(set(range(256)) - PRINTABLE))}


class BPE(NamedTuple):
    pattern: str            # splits a text into words; pairs are merged within each
    nfc: bool               # whether text is brought to Unicode's composed form before that
    pieces: list[bytes]     # what an id decodes to; empty for added tokens and for gaps
    ranked: list[int]       # the ids that text can become: the bytes, then what each merge makes
    added: dict[str, int]   # tokens beside the merges, such as the mask


def read_tokenizer_json(spec: dict) -> BPE:
    """Raises ValueError for a file that is damaged or asks for what we do not do."""
    normalizer = steps_of(spec["normalizer"], "normalizers")
    refuse_if([step["type"] for step in normalizer] not in ([], ["NFC"]),
              f"its normalizer is {normalizer}, and we do NFC or nothing")
    splits = steps_of(spec["pre_tokenizer"], "pretokenizers")
    refuse_if([step["type"] for step in splits] != ["Split", "ByteLevel"]
              or splits[0]["behavior"] != "Isolated" or splits[0]["invert"]
              or "Regex" not in splits[0]["pattern"]
              or splits[1]["add_prefix_space"] or splits[1]["use_regex"],
              f"its pre_tokenizer is {splits}, and we do a Split by regex, then plain ByteLevel")
    for step in steps_of(spec["post_processor"], "processors"):
        adds_nothing = step["type"] == "ByteLevel" or (
            step["type"] == "TemplateProcessing"
            and [list(part) for part in step["single"]] == [["Sequence"]])
        refuse_if(not adds_nothing, f"its post_processor {step['type']} adds tokens")
    decoder = [step["type"] for step in steps_of(spec["decoder"], "decoders")]
    refuse_if(decoder != ["ByteLevel"], f"its decoder is {decoder}, and we do ByteLevel")

    model = dict(spec["model"])
    vocab, merges, kind = model.pop("vocab"), model.pop("merges"), model.pop("type")
    refuse_if(kind != "BPE", f"its model is {kind}, and we do BPE")
    for option, value in model.items():     # no byte is unknown, so what those say never matters
        refuse_if(value and option not in ("unk_token", "fuse_unk"), f"it asks for {option}")
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    regex = splits[0]["pattern"]["Regex"]
    # what lies between two matches is a word as well; tiktoken would drop it
    pattern = rf"(?:{regex})|(?:(?!{regex})[\s\S])+"
    return assemble(pattern, bool(normalizer), vocab, merges, spec["added_tokens"])


def steps_of(component, plural: str) -> list[dict]:
    """A part of the pipeline as the list of its steps."""
    if component is None:
        return []
    return component[plural] if component["type"] == "Sequence" else [component]


def read_vocab_and_merges(files: dict[str, bytes]) -> BPE:
    """The same, from the files of Qwen2's slow tokenizer: {name: content}."""
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    kind = config.get("tokenizer_class")
    refuse_if(kind not in QWEN_CLASSES, f"tokenizer_config.json says {kind}, and we know how Qwen2 "
                                        f"and Dream split text")
    lines = files["merges.txt"].decode().replace("\r\n", "\n").split("\n")
    merges = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    added = json.loads(files.get("added_tokens.json", b"{}"))
    tokens = [{"content": text, "id": i} for text, i in added.items()]
    tokens += [{**token, "id": int(i)}
               for i, token in config.get("added_tokens_decoder", {}).items()]
    return assemble(QWEN_PATTERN, True, json.loads(files["vocab.json"]), merges, tokens)


def assemble(pattern: str, nfc: bool, vocab: dict, merges: list, tokens: list[dict]) -> BPE:
    added = {}
    for token in tokens:
        text, i = token["content"], token["id"]
        for flag in ("single_word", "lstrip", "rstrip", "normalized"):
            refuse_if(token.get(flag), f"its added token {text!r} is {flag}")
        refuse_if(not text, "it has an added token without text")
        refuse_if(added.setdefault(text, i) != i or vocab.get(text, i) != i,
                  f"its token {text!r} has two ids")
    every = vocab | added
    refuse_if(not all(type(i) is int and 0 <= i < 1 << 24 for i in every.values()),
              "its ids must be whole numbers from 0 to 2**24")
    refuse_if(len(set(every.values())) < len(every), "two of its tokens share an id")
    ranked = ranked_ids(vocab, merges)
    overlap = set(ranked) & set(added.values())
    refuse_if(overlap, f"its added tokens {sorted(overlap)} are made by merges too")
    pieces = [b""] * (1 + max(vocab.values()))
    for text, i in vocab.items():
        if text not in added:
            pieces[i] = to_bytes(text) or text.encode()     # the second: never made by a merge
    return BPE(pattern, nfc, pieces, ranked, added)


def ranked_ids(vocab: dict, merges: list) -> list[int]:
    """The ids of the 256 bytes and of what the merges make, in that order.

    The library merges listed pairs; tiktoken takes any neighbours that spell a token, lowest rank
    first, and a word that is a token at once. Both do the same if a token's rank is that of the
    pair which its own bytes end as, merged by the merges before. No other pair that spells it ever
    stands side by side; files made from tiktoken's list such pairs too, and lose nothing by it.
    """
    missing = [byte for char, byte in BYTE_OF.items() if char not in vocab]
    refuse_if(missing, f"it has no token for the bytes {missing}")
    ranks = {bytes([byte]): 0 for byte in range(256)}
    ids, listed, idle = sorted(vocab[char] for char in BYTE_OF), set(ranks), []
    for n, pair in enumerate(merges):
        refuse_if(len(pair) != 2, f"its merge {n} is {pair}, not two tokens")
        parts = [to_bytes(token) for token in pair]
        refuse_if(not all(part in listed for part in parts),
                  f"its merge {n} joins {pair}, of which no earlier merge makes both")
        made, token = b"".join(parts), "".join(pair)
        refuse_if(token not in vocab, f"its merge {n} makes {token!r}, which its vocabulary lacks")
        listed.add(made)
        if not all(part in ranks for part in parts):
            idle.append((n, pair, parts))
        elif made not in ranks and merged(made, ranks) == parts:
            ranks[made] = n
            ids.append(vocab[token])
    for n, pair, parts in idle:
        refuse_if(all(part in ranks for part in parts),
                  f"its merge {n} joins {pair}, of which a later merge makes one")
    return ids


def merged(word: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """Byte-pair encoding in full: join the neighbours of lowest rank, leftmost first, and again."""
    parts = [word[i:i + 1] for i in range(len(word))]
    while True:
        found = [(ranks[left + right], i) for i, (left, right) in enumerate(zip(parts, parts[1:]))
                 if left + right in ranks]
        if not found:
            return parts
        i = min(found)[1]
        parts[i:i + 2] = [parts[i] + parts[i + 1]]


def to_bytes(token: str) -> bytes | None:
    """The bytes that a token's characters write; None if one of them writes none."""
    try:
        return bytes([BYTE_OF[char] for char in token])
    except KeyError:
        return None


def refuse_if(wrong, sentence: str):
    if wrong:
        raise ValueError(sentence)

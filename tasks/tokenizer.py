"""Tokenizers, tiktoken Encodings built offline: `bytes` (any text) and `toy` (one token a word).

Text is always text: whatever a user writes, `<|endoftext|>` included, is encoded as ordinary
characters, so that the mask id and the end-of-text id can only come from us.
"""
import base64
import json
import re
from pathlib import Path

import tiktoken

from tasks import toy

FILE_NAME = "tokenizer.json"
BYTES = [bytes([i]) for i in range(256)]

# A word keeps the blank before it, and the one behind it if a number follows: numbers are then
# always the same token, wherever they stand. What fits nothing falls through to single bytes.
TOY_PATTERN = r"\n?[A-Z][a-z]+:|\n#### | ?[A-Za-z]+(?: (?=[0-9]))?|[0-9]{1,2}|[^A-Za-z0-9]"


class Tokenizer:
    """A tiktoken Encoding of `pieces` (token n is pieces[n]), then end-of-text, then mask."""

    def __init__(self, name: str, pattern: str, pieces: list[bytes]):
        self.name, self.pattern, self.pieces = name, pattern, pieces
        self.eos_id, self.mask_id = len(pieces), len(pieces) + 1
        self.n_vocab = len(pieces) + 2
        self.encoding = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks={piece: n for n, piece in enumerate(pieces)},
            special_tokens={"<|endoftext|>": self.eos_id, "<|mask|>": self.mask_id})

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids) -> str:
        """Text up to, and without, the first end-of-text; bytes that are no UTF-8 become U+FFFD."""
        ids = [int(i) for i in ids]
        ids = ids[:ids.index(self.eos_id)] if self.eos_id in ids else ids
        return self.encoding.decode([i for i in ids if i != self.mask_id], errors="replace")

    def show(self, ids) -> str:
        """Text in which masks are visible, for people to watch; end-of-text is a middle dot."""
        drawn = {self.mask_id: "\u2591", self.eos_id: "\u00b7"}
        return "".join(drawn.get(i) or self.encoding.decode([i], errors="replace") for i in ids)

    def check_fits(self, config):
        """Raises ValueError if a model of this config cannot have learnt this vocabulary."""
        ids, wanted = (config.mask_id, config.eos_id), (self.mask_id, self.eos_id)
        if ids != wanted or config.vocab_size < self.n_vocab:
            raise ValueError(f"the tokenizer {self.name!r} has {self.n_vocab} tokens with mask and "
                             f"end-of-text at {wanted}; the model has room for {config.vocab_size} "
                             f"and looks for them at {ids}")

    def __eq__(self, other):
        return (self.pattern, self.pieces) == (other.pattern, other.pieces)

    def save(self, folder):
        """All it takes: a checkpoint keeps its vocabulary whatever becomes of the code."""
        pieces = [base64.b64encode(piece).decode() for piece in self.pieces]
        (Path(folder) / FILE_NAME).write_text(
            json.dumps({"name": self.name, "pattern": self.pattern, "pieces": pieces}))


def byte_tokenizer() -> Tokenizer:
    return Tokenizer("bytes", r"[\s\S]", BYTES)


def toy_tokenizer() -> Tokenizer:
    """The 256 bytes, the numbers 0..99, every word of the toy problems and base corpus."""
    texts = toy.all_texts() + ["Question:", "\nAnswer:", "Story:", "\nSum:", "Sums:", "\n#### "]
    words = {piece.encode() for text in texts for piece in re.findall(TOY_PATTERN, text)}
    numbers = {str(n).encode() for n in range(100)}
    return Tokenizer("toy", TOY_PATTERN, BYTES + sorted((words | numbers) - set(BYTES)))


def load_tokenizer(name_or_dir: str) -> Tokenizer:
    """`bytes`, `toy`, or the folder of a checkpoint. Raises one sentence on what would fit."""
    if name_or_dir == "bytes":
        return byte_tokenizer()
    if name_or_dir == "toy":
        return toy_tokenizer()
    path = Path(name_or_dir) / FILE_NAME
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer {path}; use bytes, toy or the folder of a "
                                f"checkpoint")
    try:
        spec = json.loads(path.read_text())
        pieces = [base64.b64decode(piece) for piece in spec["pieces"]]
        return Tokenizer(spec["name"], spec["pattern"], pieces)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a tokenizer file of this project ({error})") from None

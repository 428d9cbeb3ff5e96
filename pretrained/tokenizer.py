"""Tokenizers, all on tiktoken: `bytes`, `toy` and `words` (one token a word), LLaDA, Dream, Qwen.

Text is always text. Whatever a user writes, `<|endoftext|>` included, is encoded as ordinary
characters, so the ids of mask and end-of-text can only come from our code.
"""
import base64
import json
import os
import re
import textwrap
import unicodedata
from collections import Counter
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

import tiktoken

from pretrained import bpe
from pretrained.a2d import adapt
from pretrained.chat_format import answer_ids, chat_ids, llada_headers
from pretrained.config import CONFIG
from tasks import toy
from tasks.files import check_is_content, naming

FILE_NAME = "tokenizer.json"
BYTES = [bytes([i]) for i in range(256)]

# A word includes the blank before it, and also the one after it if a number follows. So a number is
# always the same token, wherever it stands. Everything else becomes single bytes.
TOY_PATTERN = r"\n?[A-Z][a-z]+:|\n#### | ?[A-Za-z]+(?: (?=[0-9]))?|[0-9]{1,2}|[^A-Za-z0-9]"

# `[a-z]`, in brackets, is one word too.
WORD_PATTERN = r"\n?[A-Z][a-z]+:|\[[^\]\s]{1,20}\]| ?[A-Za-z]+|[^A-Za-z]"

# Every character of Latin-1, and one of each kind that Unicode knows, among others of other kinds.
KINDS = [chr(i) for i in range(256)] + list(
    "\u01c5\u02b0\u0301\u0378\u0663\u0903\u2007\u200d\u2013\u2018\u2019\u2028\u2029\u203f\u20ac"
    "\u20dd\u2160\u221a\u2603\u3000\u4e2d\ue000\uac01\ufb01\ufeff\U0001d7d8\U0001f469")
PROBE = "Question: I'll add 3 + 14.\n\nAnswer:  17\r\n#### 17" + "".join(
    f"{c}{c}a{c} {c}1{c}\n{c}" for c in KINDS)
LONG = 500_000                  # characters; tiktoken panics at a word of about a million


class Tokenizer:
    """Text to ids and back. Attributes, besides those of its vocabulary (bpe.BPE):

    eos_id      end-of-text, which also fills short answers
    mask_id     the mask_token of the published settings, or the first of bpe.MASKS
    eot_id      the end of a turn of a chat, or None
    bos         the ids that go before a plain prompt
    never       the ids that must not be sampled, because no text has them
    n_vocab     the highest id + 1
    chat        whether prompts are turns of a chat
    template    the chat template in Jinja that came with a published tokenizer, or None
    """

    def __init__(self, name: str, vocabulary: bpe.BPE, files: dict[str, bytes] | None = None):
        """files: {name: content} of a published tokenizer, which `save` writes unchanged."""
        self.name, self.files, self.chat = name, files, False
        self.vocabulary = vocabulary
        self.pattern, self.nfc, self.pieces, self.ranked, self.added, bos = vocabulary
        check_pattern(self.pattern)
        self.encoding = tiktoken.Encoding(
            name, pat_str=self.pattern, special_tokens={},
            mergeable_ranks={self.pieces[i]: rank for rank, i in enumerate(self.ranked)})
        self.ids_are_ranks = self.ranked == list(range(len(self.ranked)))

        def first(*texts):
            return next((self.added[text] for text in texts if text in self.added), None)
        self.eos_id = first(*bpe.ENDS)
        settings = bpe.settings_of(files or {})
        self.template = settings["chat_template"]
        self.mask_id = first(settings["mask_token"], *bpe.MASKS)
        self.eot_id = first("<|eot_id|>", "<|im_end|>")
        if self.eos_id is None or self.mask_id is None:
            raise ValueError(f"it has no {' or '.join(bpe.ENDS)}, or no mask: the mask_token of "
                             f"tokenizer_config.json or one of {', '.join(bpe.MASKS)}")
        if self.eos_id == self.mask_id:
            raise ValueError("its mask_token is the end-of-text too; another token must be one")
        # Dream's state i scores token i+1, so nothing scores the first token: it must be given
        self.bos = list(bos) or [self.added[text] for text in ("<|beginoftext|>",)
                                 if text in self.added]
        self.n_vocab = max(len(self.pieces), 1 + max(self.added.values()))
        sampled = {i for i, piece in enumerate(self.pieces) if piece} | {self.eos_id, self.eot_id}
        self.never = [i for i in range(self.n_vocab) if i not in sampled]
        # longest first: where two added tokens match, the longer one counts, as in the library
        texts = sorted(self.added, key=len, reverse=True)
        self.finder = re.compile("(" + "|".join(map(re.escape, texts)) + ")")
        bytes_ = {self.pieces[i] for i in self.ranked}
        rare = "".join(chars for i, chars in bpe.RARE.items() if bytes([i]) not in bytes_)
        self.unknown = re.compile(f"[{rare}]" if rare else r"(?!)")
        probe = self.unknown.sub("", PROBE)
        if self.decode(self.encode(probe)) != self.normalize(probe):
            raise ValueError("a text does not come back from its ids")

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Text -> ids. With specials, the names of added tokens in the text become those tokens.

        The ids are those of the `tokenizers` library, with these exceptions. The library always
        turns names that are not flagged special, such as Qwen's <think>, into tokens, and looks for
        names that are flagged normalized after the others. Its NFC is that of Unicode 9, which
        orders a few newer combining marks in another way, and its Digits may know the 13 numerals
        that Unicode 17 has added. It drops a byte that has no token; here that is a ValueError.
        """
        if specials:                    # names are found before NFC, in the text as it is
            ids = []
            for n, part in enumerate(self.finder.split(text)):              # text, name, text, ...
                ids += [self.added[part]] if n % 2 else self.encode(part)
            return ids
        text = self.normalize(text)
        if found := self.unknown.search(text):
            raise ValueError(f"the tokenizer {self.name!r} has no token for {found[0]!r}, which is "
                             f"character {found.start()} of the text {text[:40]!r}; take it out")
        ranks = encode_ordinary(self.encoding, text)
        return ranks if self.ids_are_ranks else [self.ranked[rank] for rank in ranks]

    def normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.nfc else text

    def decode(self, ids) -> str:
        """Return the text before the first end of text or turn; invalid UTF-8 becomes U+FFFD."""
        ids, added = [int(i) for i in ids], set(self.added.values())
        end = next((n for n, i in enumerate(ids) if i in (self.eos_id, self.eot_id)), None)
        data = b"".join(self.pieces[i] for i in ids[:end] if i not in added)
        return data.decode(errors="replace")

    def show(self, ids) -> str:
        """Return the text for people to read: masks are drawn, end-of-text is a middle dot."""
        drawn = {i: text.encode() for text, i in self.added.items()}
        drawn |= {self.mask_id: "\u2591".encode(), self.eos_id: "\u00b7".encode()}
        return b"".join(drawn.get(i) or self.pieces[i] for i in ids).decode(errors="replace")

    def prompt_ids(self, text: str) -> list[int]:
        """Return the ids before an answer: a chat with the text as user's message, or the text."""
        if self.chat:
            return chat_ids(self, [{"role": "user", "content": text}])
        return self.bos + self.encode(text)

    def answer_ids(self, text: str) -> list[int]:
        """Return the ids of an answer, without the end-of-text that fills the row."""
        return answer_ids(self, text) if self.chat else self.encode(text)

    def check_fits(self, config):
        """Raise ValueError unless a model of this config can have learnt this vocabulary."""
        ids, wanted = (config.mask_id, config.eos_id), (self.mask_id, self.eos_id)
        if ids != wanted or config.vocab_size < self.n_vocab:
            raise ValueError(f"the tokenizer {self.name!r} has {self.n_vocab} tokens with mask and "
                             f"end-of-text at {wanted}; the model has room for {config.vocab_size} "
                             f"and expects these two at {ids}")

    def __eq__(self, other):
        return self.vocabulary == other.vocabulary

    def save(self, folder):
        """Write all that loading needs: a checkpoint keeps its vocabulary if the code changes."""
        pieces = [base64.b64encode(piece).decode() for piece in self.pieces]
        ours = {"name": self.name, "pattern": self.pattern, "pieces": pieces}
        for name, content in (self.files or {FILE_NAME: json.dumps(ours).encode()}).items():
            with naming(path := Path(folder) / name):
                path.write_bytes(content)


def encode_ordinary(encoding, text: str) -> list[int]:
    """Text -> tiktoken's ranks. Raises ValueError where tiktoken, written in Rust, panics."""
    try:
        with quiet_stderr() if len(text) > LONG else nullcontext():
            return encoding.encode_ordinary(text)
    except BaseException as error:      # a panic is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"tiktoken cannot split a text of {len(text):,} characters into words; "
                         f"one of a million blanks or letters is too long for it: {error}"
                         ) from None


@contextmanager
def quiet_stderr():
    """Drop what is written to file descriptor 2: a panic prints its stack there by itself."""
    try:
        saved = os.dup(2)
    except OSError:                     # stderr is closed
        yield
        return
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@cache
def check_pattern(pattern: str):
    """Raise ValueError unless the pattern cuts all kinds of characters into words, none empty.

    The tokens are the 256 bytes, and one of no bytes: without it tiktoken panics at an empty word.
    """
    ranks = {piece: n for n, piece in enumerate([*BYTES, b""])}
    bytewise = tiktoken.Encoding("", pat_str=pattern, special_tokens={}, mergeable_ranks=ranks)
    with quiet_stderr():
        for text in (PROBE, "", *KINDS):
            ids = encode_ordinary(bytewise, text)
            if len(BYTES) in ids or bytes(ids) != text.encode():
                problem = ("finds empty words" if len(BYTES) in ids
                           else "leaves out a part of a text")
                raise ValueError(f"its pattern {pattern[:100]!r} {problem}")


def our_tokenizer(name: str, pattern: str, pieces: list[bytes]) -> Tokenizer:
    """Return a tokenizer in which token n is pieces[n]; then come end-of-text and mask."""
    n = len(pieces)
    added = {"<|endoftext|>": n, "<|mask|>": n + 1}
    return Tokenizer(name, bpe.BPE(pattern, False, pieces, list(range(n)), added))


def byte_tokenizer() -> Tokenizer:
    return our_tokenizer("bytes", r"[\s\S]", BYTES)


def toy_tokenizer() -> Tokenizer:
    """Return the toy's: 256 bytes, the numbers 0..99, every word of its problems and corpus."""
    texts = toy.all_texts() + ["Question:", "\nAnswer:", "Story:", "\nSum:", "Sums:", "\n#### "]
    words = {piece.encode() for text in texts for piece in re.findall(TOY_PATTERN, text)}
    numbers = {str(n).encode() for n in range(100)}
    return our_tokenizer("toy", TOY_PATTERN, BYTES + sorted((words | numbers) - set(BYTES)))


def word_tokenizer(examples, n_words: int = 2000) -> Tokenizer:
    """Return 256 bytes and a task's commonest words, to train on the task from scratch."""
    texts = (text for example in examples for text in (example.prompt, example.answer))
    counts = Counter(piece.encode() for text in texts for piece in re.findall(WORD_PATTERN, text))
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return our_tokenizer("words", WORD_PATTERN,
                         BYTES + [word for word in words if len(word) > 1][:n_words])


def load_tokenizer(name_or_dir: str, chat: bool = False, rows=(), mask_token="") -> Tokenizer:
    """Return `bytes`, `toy`, `words` (of the rows), or that of a checkpoint's or model's folder.

    chat: prompts are turns of a chat. mask_token: of an autoregressive model (pretrained/a2d.py).
    Raises ValueError or FileNotFoundError in one sentence.
    """
    if not name_or_dir:
        raise ValueError("a tokenizer has no name; choose bytes, toy, words or the folder of a "
                         "checkpoint")
    known = {"bytes": byte_tokenizer, "toy": toy_tokenizer, "words": lambda: word_tokenizer(rows)}
    tok = known[name_or_dir]() if name_or_dir in known else read_folder(
        Path(name_or_dir), chat, mask_token)
    tok.chat = chat
    if tok.mask_id in (tok.eot_id, *tok.prompt_ids("")):    # prompt_ids raises if it has no chat
        raise ValueError(f"the mask of {name_or_dir}, id {tok.mask_id}, is a token of its prompts "
                         f"or ends a turn; choose another --mask_token")
    return tok


def read_folder(folder: Path, chat: bool, mask_token: str) -> Tokenizer:
    """Return the tokenizer in a folder, in our format or a published one."""
    files = {name: (folder / name).read_bytes()
             for name in bpe.FILES if (folder / name).is_file()}
    if (folder / CONFIG).is_file():     # an autoregressive model gets a mask
        files |= adapt(folder, mask_token)[1]
    one_file = FILE_NAME in files
    if not one_file and not {"vocab.json", "merges.txt"} <= set(files):
        wrong = f"there is no tokenizer in {folder} ({FILE_NAME}, or vocab.json and merges.txt)"
        if folder.is_dir():             # weights were found there
            raise FileNotFoundError(f"{wrong}; the folder of a checkpoint or a model has one")
        wrong = f"{folder} is a file" if folder.is_file() else wrong
        raise FileNotFoundError(f"{wrong}; choose bytes, toy, words or the folder of a checkpoint")
    path = folder / (FILE_NAME if one_file else "vocab.json")
    try:
        spec = json.loads(files[FILE_NAME]) if one_file else {}
        if not isinstance(spec, dict):
            raise ValueError("it is not a JSON object")
        if "pieces" in spec:
            return read_ours(spec)
        vocabulary = bpe.read_tokenizer_json(spec) if one_file else bpe.read_vocab_and_merges(files)
        if chat:
            vocabulary.added.update(llada_headers(vocabulary.added))
        return Tokenizer(str(folder), vocabulary, files)
    except KeyError as error:
        problem = f"it has no {error}"
    except RecursionError:
        problem = "it is nested too deeply"
    except (ValueError, TypeError, AttributeError) as error:
        problem = textwrap.shorten(str(error), 1000, placeholder=" ...")
    check_is_content(path)
    raise ValueError(f"{path} is not a tokenizer that can be read here: {problem}")


def read_ours(spec: dict) -> Tokenizer:
    """Return the tokenizer that `save` wrote. Raises ValueError unless its pieces all differ, with
    the 256 bytes first. Words are in no order that could be checked."""
    name, pattern = spec["name"], spec["pattern"]
    if not isinstance(name, str) or not isinstance(pattern, str):
        raise ValueError("its name and its pattern must be texts")
    try:
        pieces = [base64.b64decode(piece, validate=True) for piece in spec["pieces"]]
    except (ValueError, TypeError) as error:
        raise ValueError(f"its pieces are not a list of base64 texts: {error}") from None
    if pieces[:len(BYTES)] != BYTES:
        raise ValueError("its first 256 pieces are not the 256 bytes in their order")
    for piece, n in Counter(pieces).items():
        if n > 1 or not piece:
            raise ValueError(f"its piece {piece!r} is empty or stands twice")
    return our_tokenizer(name, pattern, pieces)

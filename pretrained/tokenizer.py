"""Tokenizers on tiktoken: `bytes` (any text), `toy` and `words` (a token a word), LLaDA's, Dream's,
Qwen's.

Text is always text: whatever a user writes, `<|endoftext|>` included, is encoded as ordinary
characters, so that the mask id and the end-of-text id can only come from us.
"""
import base64
import json
import re
import unicodedata
from collections import Counter
from pathlib import Path

import tiktoken

from pretrained import bpe
from pretrained.chat_format import answer_ids, chat_ids, llada_headers
from tasks import toy

FILE_NAME = "tokenizer.json"
BYTES = [bytes([i]) for i in range(256)]

# A word keeps the blank before it, and the one behind it if a number follows: numbers are then
# always the same token, wherever they stand. What fits nothing falls through to single bytes.
TOY_PATTERN = r"\n?[A-Z][a-z]+:|\n#### | ?[A-Za-z]+(?: (?=[0-9]))?|[0-9]{1,2}|[^A-Za-z0-9]"

WORD_PATTERN = r"\n?[A-Z][a-z]+:|\[[^\]\s]{1,20}\]| ?[A-Za-z]+|[^A-Za-z]"   # [a-z] is one, too


class Tokenizer:
    """Text to ids and back. Attributes, besides those of a vocabulary (bpe.BPE):

    eos_id, which also fills short answers; mask_id; eot_id, the end of a turn of a chat, or None;
    bos, the ids that go before a plain prompt; never, the ids that no text is made of and that
    must not be sampled; n_vocab, the highest id + 1; chat, whether prompts are turns of a chat.
    """

    def __init__(self, name: str, vocabulary: bpe.BPE, files: dict[str, bytes] | None = None):
        """files: {name: content} of a published tokenizer, to be saved as they are."""
        self.name, self.files, self.chat = name, files, False
        self.vocabulary = vocabulary
        self.pattern, self.nfc, self.pieces, self.ranked, self.added = vocabulary
        self.encoding = tiktoken.Encoding(
            name, pat_str=self.pattern, special_tokens={},
            mergeable_ranks={self.pieces[i]: rank for rank, i in enumerate(self.ranked)})
        self.ids_are_ranks = self.ranked == list(range(len(self.ranked)))

        def first(*texts):
            return next((self.added[text] for text in texts if text in self.added), None)
        self.eos_id = first("<|endoftext|>")
        self.mask_id = first("<|mdm_mask|>", "<|mask|>")
        self.eot_id = first("<|eot_id|>", "<|im_end|>")
        if self.eos_id is None or self.mask_id is None:
            raise ValueError("it has no <|endoftext|>, or no mask: <|mdm_mask|> or <|mask|>")
        # Dream's state i scores token i+1, so that nothing scores the first: it must be given
        self.bos = [self.added["<|beginoftext|>"]] if "<|beginoftext|>" in self.added else []
        self.n_vocab = max(len(self.pieces), 1 + max(self.added.values()))
        sampled = {i for i, piece in enumerate(self.pieces) if piece} | {self.eos_id, self.eot_id}
        self.never = [i for i in range(self.n_vocab) if i not in sampled]
        # longest first: where two added tokens begin, the longer is meant, as in the library
        texts = sorted(self.added, key=len, reverse=True)
        self.finder = re.compile("(" + "|".join(map(re.escape, texts)) + ")")

    def encode(self, text: str, specials: bool = False) -> list[int]:
        """Text -> ids; with specials, the names of added tokens in it stand for those tokens.

        As in the `tokenizers` library, but that it takes names not flagged special, like Qwen's
        <think>, for tokens always; and that its NFC is Unicode 9's: a few newer combining marks,
        where they stand next to others, come in another order.
        """
        if specials:                    # found on the text as it is; each part between is a text
            parts = self.finder.split(text)                                 # text, name, text, ...
            return [i for n, part in enumerate(parts)
                    for i in ([self.added[part]] if n % 2 else self.encode(part))]
        if self.nfc:
            text = unicodedata.normalize("NFC", text)
        ranks = self.encoding.encode_ordinary(text)
        return ranks if self.ids_are_ranks else [self.ranked[rank] for rank in ranks]

    def decode(self, ids) -> str:
        """Text before the first end of text or turn; bytes that are no UTF-8 become U+FFFD."""
        ids, added = [int(i) for i in ids], set(self.added.values())
        end = next((n for n, i in enumerate(ids) if i in (self.eos_id, self.eot_id)), None)
        data = b"".join(self.pieces[i] for i in ids[:end] if i not in added)
        return data.decode(errors="replace")

    def show(self, ids) -> str:
        """Text in which masks are visible, for people to watch; end-of-text is a middle dot."""
        drawn = {i: text.encode() for text, i in self.added.items()}
        drawn |= {self.mask_id: "\u2591".encode(), self.eos_id: "\u00b7".encode()}
        return b"".join(drawn.get(i) or self.pieces[i] for i in ids).decode(errors="replace")

    def prompt_ids(self, text: str) -> list[int]:
        """What goes before an answer to text: the chat so far, or the text itself."""
        if self.chat:
            return chat_ids(self, [{"role": "user", "content": text}])
        return self.bos + self.encode(text)

    def answer_ids(self, text: str) -> list[int]:
        """An answer, up to where end-of-text fills the row."""
        return answer_ids(self, text) if self.chat else self.encode(text)

    def check_fits(self, config):
        """Raises ValueError if a model of this config cannot have learnt this vocabulary."""
        ids, wanted = (config.mask_id, config.eos_id), (self.mask_id, self.eos_id)
        if ids != wanted or config.vocab_size < self.n_vocab:
            raise ValueError(f"the tokenizer {self.name!r} has {self.n_vocab} tokens with mask and "
                             f"end-of-text at {wanted}; the model has room for {config.vocab_size} "
                             f"and looks for them at {ids}")

    def __eq__(self, other):
        return self.vocabulary == other.vocabulary

    def save(self, folder):
        """All it takes: a checkpoint keeps its vocabulary whatever becomes of the code."""
        pieces = [base64.b64encode(piece).decode() for piece in self.pieces]
        ours = {"name": self.name, "pattern": self.pattern, "pieces": pieces}
        for name, content in (self.files or {FILE_NAME: json.dumps(ours).encode()}).items():
            (Path(folder) / name).write_bytes(content)


def our_tokenizer(name: str, pattern: str, pieces: list[bytes]) -> Tokenizer:
    """Token n is pieces[n]; then come end-of-text and mask."""
    n = len(pieces)
    added = {"<|endoftext|>": n, "<|mask|>": n + 1}
    return Tokenizer(name, bpe.BPE(pattern, False, pieces, list(range(n)), added))


def byte_tokenizer() -> Tokenizer:
    return our_tokenizer("bytes", r"[\s\S]", BYTES)


def toy_tokenizer() -> Tokenizer:
    """The 256 bytes, the numbers 0..99, every word of the toy problems and base corpus."""
    texts = toy.all_texts() + ["Question:", "\nAnswer:", "Story:", "\nSum:", "Sums:", "\n#### "]
    words = {piece.encode() for text in texts for piece in re.findall(TOY_PATTERN, text)}
    numbers = {str(n).encode() for n in range(100)}
    return our_tokenizer("toy", TOY_PATTERN, BYTES + sorted((words | numbers) - set(BYTES)))


def word_tokenizer(examples, n_words: int = 2000) -> Tokenizer:
    """The 256 bytes and the commonest words of a task's rows, to train from scratch on it."""
    texts = (text for example in examples for text in (example.prompt, example.answer))
    counts = Counter(piece.encode() for text in texts for piece in re.findall(WORD_PATTERN, text))
    words = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]
    return our_tokenizer("words", WORD_PATTERN,
                         BYTES + [word for word in words if len(word) > 1][:n_words])


def load_tokenizer(name_or_dir: str, chat: bool = False, rows=()) -> Tokenizer:
    """`bytes`, `toy`, `words` (of the rows), or the folder of a checkpoint or published model.

    chat: prompts are turns of a chat (see Tokenizer). Raises one sentence on what would fit.
    """
    known = {"bytes": byte_tokenizer, "toy": toy_tokenizer, "words": lambda: word_tokenizer(rows)}
    tok = known[name_or_dir]() if name_or_dir in known else read_folder(Path(name_or_dir), chat)
    tok.chat = chat
    tok.prompt_ids("")                  # raises if there is no chat format
    return tok


def read_folder(folder: Path, chat: bool) -> Tokenizer:
    files = {name: (folder / name).read_bytes()
             for name in bpe.FILES if (folder / name).is_file()}
    one_file = FILE_NAME in files
    if folder == Path() or not one_file and not {"vocab.json", "merges.txt"} <= set(files):
        raise FileNotFoundError(f"there is no tokenizer in {str(folder)!r}; use bytes, toy or the "
                                f"folder of a checkpoint")
    try:
        spec = json.loads(files[FILE_NAME]) if one_file else {}
        if "pieces" in spec:
            pieces = [base64.b64decode(piece) for piece in spec["pieces"]]
            return our_tokenizer(spec["name"], spec["pattern"], pieces)
        vocabulary = bpe.read_tokenizer_json(spec) if one_file else bpe.read_vocab_and_merges(files)
        if chat:
            vocabulary.added.update(llada_headers(vocabulary.added))
        return Tokenizer(str(folder), vocabulary, files)
    except KeyError as error:
        problem = f"it has no {error}"
    except (ValueError, TypeError, AttributeError) as error:
        problem = " ".join(str(error).split())
    path = folder / (FILE_NAME if one_file else "vocab.json")
    raise ValueError(f"{path} is no tokenizer that we can read: {problem}")

"""Autoregressive to diffusion: read an ordinary Llama or Qwen as a masked-diffusion model.

The tensors stay what they are. Attention looks both ways, and one token becomes [MASK]: the one
that a setting or the tokenizer names, else one that is called a mask or is reserved, else a new
one, whose row of the embedding is the mean of all rows unless the embedding has a spare one. State
i scores token i, as in dllm's a2d models; `shift` keeps the base's way, state i scores token i+1.
The model cannot fill masks before it is trained. Its checkpoints say a2d-llama, a2d-qwen2 or
a2d-qwen3, which are the names that dllm (github.com/ZHZisZZ/dllm) gives to its own conversions.
"""
import json
import os
import re

from pretrained.bpe import MASKS
from pretrained.config import CONFIG, added_tokens, named_mask, read_config
from tasks.files import read_json

CLASSES = {"llama": "A2DLlamaLMHeadModel", "qwen2": "A2DQwen2LMHeadModel",
           "qwen3": "A2DQwen3LMHeadModel"}
RESERVED = r"<\|?(reserved|unused|extra)\w*\|?>|\[unused\w*\]"
NEW = "<|mask|>"                # dllm adds a token of this name, too


def is_autoregressive(published: dict) -> bool:
    """Return whether config.json describes a model that is made a diffusion model here."""
    return str(published.get("model_type")) in CLASSES      # a file may have anything there


def adapt(folder, mask_token: str = "", shift: bool = False):
    """Return config.json's content as a diffusion model's, {name: bytes} of the tokenizer's files
    that change, and a sentence for the user. Of a diffusion model: its content, {}, "".

    Raises ValueError, one sentence, if there is no such token, or if the model has its own mask.
    """
    published = read_config(folder)
    if not is_autoregressive(published):
        if mask_token or shift:
            raise ValueError(f"mask_token and shift are for autoregressive weights; {folder} holds "
                             f"a model of type {published.get('model_type')!r}, which has its own: "
                             f"leave them out (--mask_token= --shift=False)")
        return published, {}, ""
    n_ids, added = ids_of_tokenizer(folder), added_tokens(folder)
    if mask_token and mask_token not in added:
        raise ValueError(f"mask_token={mask_token!r} is not one of the tokens that {folder} adds "
                         f"to its vocabulary, such as {', '.join([*added][:8]) or 'none'}; without "
                         f"mask_token a new one is added")
    named = named_mask(folder, added).get("mask_token")
    candidates = [mask_token, *(text for text, i in added.items() if i == named), *MASKS,
                  *(text for text in added if re.fullmatch(RESERVED, text))]
    token = next((text for text in candidates if text in added), "")
    mask_id, n_rows = added.get(token, n_ids), published.get("vocab_size")
    if type(n_rows) is not int or mask_id > n_rows:
        raise ValueError(f"{folder}/{CONFIG} has vocab_size = {json.dumps(n_rows)}; its tokenizer "
                         f"has {n_ids} tokens")
    kind = published["model_type"]
    published = {**published, "model_type": f"a2d-{kind}", "architectures": [CLASSES[kind]],
                 "mask_token_id": mask_id, "vocab_size": max(n_rows, mask_id + 1)}
    if shift:
        published["shift"] = True
    said = (f"{folder} is autoregressive ({kind}); it is read as a2d-{kind}: attention looks both "
            f"ways, [MASK] is {token or f'{NEW}, which is new,'} with id {mask_id}, and a state "
            f"scores {'the next' if shift else 'its own'} token; it has to be trained on masks")
    return published, files_with_mask(folder, token or NEW, mask_id, is_new=not token), said


def ids_of_tokenizer(folder) -> int:
    """Return the number of ids of the tokenizer in a folder: the highest + 1."""
    path = os.path.join(folder, "tokenizer.json")
    if os.path.lexists(path):
        model = read_json(path).get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
    elif os.path.lexists(path := os.path.join(folder, "vocab.json")):
        vocab = read_json(path)
    else:
        raise FileNotFoundError(f"there is no tokenizer in {folder} (tokenizer.json, or vocab.json "
                                f"and merges.txt), and without one no token can become the mask")
    ids = [*vocab.values(), *added_tokens(folder).values()] if isinstance(vocab, dict) else []
    if not ids or not all(type(i) is int for i in ids):
        raise ValueError(f"{path} has no vocabulary of texts and ids")
    return 1 + max(ids)


def files_with_mask(folder, token: str, mask_id: int, is_new: bool) -> dict[str, bytes]:
    """Return the tokenizer's files that have to say which token is the mask, as {name: bytes}."""
    def read(name):
        path = os.path.join(folder, name)
        return read_json(path) if os.path.lexists(path) else {}
    settings = {**read("tokenizer_config.json"), "mask_token": token}
    found = {"tokenizer_config.json": settings}
    if is_new:
        entry = dict(content=token, lstrip=False, normalized=False, rstrip=False,
                     single_word=False, special=True)
        if "added_tokens_decoder" in settings:
            settings["added_tokens_decoder"][str(mask_id)] = entry
        if whole := read("tokenizer.json"):
            whole["added_tokens"] = [*(whole.get("added_tokens") or []), {"id": mask_id, **entry}]
            found["tokenizer.json"] = whole
        else:
            found["added_tokens.json"] = {**read("added_tokens.json"), token: mask_id}
    return {name: json.dumps(content, ensure_ascii=False, indent=2).encode()
            for name, content in found.items()}

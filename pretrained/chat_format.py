"""Chat formats: messages are plain text; only this file places the special ids around them.

LLaDA's turn  [start_header] role [end_header] "\\n\\n" content [eot]; [startoftext] opens the chat
Llama 3's     the same; [begin_of_text] opens the chat
ChatML's      [im_start] "role\\n" content [im_end] "\\n"      (Dream, Qwen, SmolLM2)

They are those of the tokenizers' published templates, with two exceptions. LLaDA's template ends in
a header of the assistant even if the assistant has spoken last (GSAI-ML/LLaDA-8B-Instruct,
tokenizer_config.json). Llama 3.2's template tells the model the day of the call; a prompt here is
the same every day, and has the date that the template falls back to.

The format is known by the added tokens. What differs between models of one format is read from the
template that is published with the tokenizer, where there is one: a default system message stands
in it as a constant, and so does the empty block of thoughts.
"""
import re

HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
OPENINGS = ("<|startoftext|>", "<|begin_of_text|>")

# a constant of a template, in either quotes, that is a whole turn of the system
DEFAULT_SYSTEM = re.compile(
    r"""(['"])<\|im_start\|>system(?:\n|\\n)((?:\\.|(?!\1).)+?)<\|im_end\|>""", re.DOTALL)
# Llama 3.1 and 3.2 have this before the system's message, in any chat
CUTOFF, TODAY = "Cutting Knowledge Date: December 2023\n", "Today Date: 26 Jul 2024\n\n"


def chat_ids(tok, messages: list[dict]) -> list[int]:
    """Messages {"role", "content"} that end with a user's -> ids up to the assistant's answer.

    Raises ValueError if the tokenizer has no chat format or the last message is not a user's.
    """
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("a chat must end with a message of the user, for the model to answer")
    if has_headers(tok):
        ids, close = [opening(tok)], [tok.eot_id]
        messages = [{**message, "content": message["content"].strip()} for message in messages]
    elif "<|im_start|>" in tok.added and tok.eot_id is not None:
        ids, close = [], [tok.eot_id, *tok.encode("\n")]
    else:
        raise ValueError(f"the tokenizer {tok.name!r} has no chat format; those of LLaDA (loaded "
                         f"with --chat), Llama 3, Dream, Qwen and SmolLM2 have one")
    for message in with_system(tok, messages):
        ids += open_turn(tok, message["role"], message["content"]) + close
    return ids + open_turn(tok, "assistant") + empty_think_block(tok)


def answer_ids(tok, text: str) -> list[int]:
    """Return the ids of an assistant's answer and its end of turn."""
    return [*tok.encode(text.strip()), tok.eot_id]


def open_turn(tok, role: str, content: str = "") -> list[int]:
    """Return the ids of a turn without its end."""
    if has_headers(tok):
        start, end, _ = (tok.added[text] for text in HEADERS)
        return [start, *tok.encode(role), end, *tok.encode("\n\n" + content)]
    return [tok.added["<|im_start|>"], *tok.encode(f"{role}\n{content}")]


def with_system(tok, messages: list[dict]) -> list[dict]:
    """Return the messages with the system's that the published template puts before them."""
    given = [message["content"] for message in messages[:1] if message["role"] == "system"]
    if has_headers(tok):
        if not mentions(tok, CUTOFF):
            return messages
        content = CUTOFF + TODAY + "".join(given)
        return [{"role": "system", "content": content}, *messages[len(given):]]
    content = default_system(tok)
    if given or content is None:
        return messages
    return [{"role": "system", "content": content}, *messages]


def default_system(tok) -> str | None:
    """Return the message of the system that ChatML's template has where a chat has none, or None.

    Without a template only Dream's is known (Dream-v0-Instruct-7B, tokenizer_config.json).
    """
    if tok.template is None:
        return "You are a helpful assistant." if "<|beginoftext|>" in tok.added else None
    found = DEFAULT_SYSTEM.search(tok.template)
    return unescaped(found[2]) if found else None


def empty_think_block(tok) -> list[int]:
    """Return the ids of Qwen3's empty `<think></think>`, or [].

    Qwen3's template inserts it before an answer with enable_thinking=False, and dllm's
    Qwen3-diffusion was tuned on answers that follow it. A template without this block, or a
    vocabulary without these tokens, has none.
    """
    if not {"<think>", "</think>"} <= set(tok.added):
        return []
    if tok.template is not None and not mentions(tok, "<think>\n\n</think>\n\n"):
        return []
    blank = tok.encode("\n\n")
    return [tok.added["<think>"], *blank, tok.added["</think>"], *blank]


def mentions(tok, text: str) -> bool:
    """Return whether the template has this text, as it is or with its line ends as \\n."""
    return any(form in (tok.template or "") for form in (text, text.replace("\n", "\\n")))


def unescaped(constant: str) -> str:
    """Return the text that a constant of a Jinja template stands for."""
    return constant.encode("ascii", "backslashreplace").decode("unicode-escape")


def has_headers(tok) -> bool:
    return set(HEADERS) <= set(tok.added) and opening(tok) is not None


def opening(tok) -> int | None:
    """Return the id of the token that opens a chat whose turns have headers."""
    return next((tok.added[text] for text in OPENINGS if text in tok.added), None)


def llada_headers(added: dict[str, int]) -> dict[str, int]:
    """Return the header tokens that LLaDA-Base lacks for a chat, with Instruct's ids: {text: id}.

    Base's tokens end at 126345; Instruct's next ones are 126346..126348, in this order
    (tokenizer.json of both). The embeddings have the same number of rows, so there is room.
    """
    missing = [text for text in HEADERS if text not in added and "<|mdm_mask|>" in added]
    return {text: 1 + max(added.values()) + n for n, text in enumerate(missing)}

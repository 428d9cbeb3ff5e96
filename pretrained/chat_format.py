"""Chat formats: messages are plain text; only this file places the special ids around them.

LLaDA's turn  [start_header] role [end_header] "\\n\\n" content [eot]; [startoftext] opens the chat
ChatML's      [im_start] "role\\n" content [im_end] "\\n"             (Dream, Qwen)

They are those of the tokenizers' published templates, with one exception: LLaDA's template ends in
a header of the assistant even if the assistant has spoken last (GSAI-ML/LLaDA-8B-Instruct,
tokenizer_config.json).
"""
LLADA_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def chat_ids(tok, messages: list[dict]) -> list[int]:
    """Messages {"role", "content"} that end with a user's -> ids up to the assistant's answer.

    Raises ValueError if the tokenizer has no chat format or the last message is not a user's.
    """
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("a chat must end with a message of the user, for the model to answer")
    if is_llada(tok):
        ids, close = [tok.added["<|startoftext|>"]], [tok.eot_id]
    elif "<|im_start|>" in tok.added and tok.eot_id is not None:
        ids, close = [], [tok.eot_id, *tok.encode("\n")]
        # Dream-v0-Instruct-7B's template has this default message; Qwen3's has none
        if "<|beginoftext|>" in tok.added and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    else:
        raise ValueError(f"the tokenizer {tok.name!r} has no chat format; those of LLaDA (loaded "
                         f"with --chat), Dream and Qwen have one")
    for message in messages:
        ids += open_turn(tok, message["role"], message["content"]) + close
    return ids + open_turn(tok, "assistant") + empty_think_block(tok)


def answer_ids(tok, text: str) -> list[int]:
    """Return the ids of an assistant's answer and its end of turn."""
    return [*tok.encode(text.strip()), tok.eot_id]


def open_turn(tok, role: str, content: str = "") -> list[int]:
    """Return the ids of a turn without its end."""
    if is_llada(tok):
        start, end, _ = (tok.added[text] for text in LLADA_HEADERS)
        return [start, *tok.encode(role), end, *tok.encode("\n\n" + content.strip())]
    return [tok.added["<|im_start|>"], *tok.encode(f"{role}\n{content}")]


def empty_think_block(tok) -> list[int]:
    """Return the ids of Qwen3's empty `<think></think>`; [] for a tokenizer without these tokens.

    Qwen3's template inserts it before an answer with enable_thinking=False, and dllm's
    Qwen3-diffusion was tuned on answers that follow it.
    """
    if not {"<think>", "</think>"} <= set(tok.added):
        return []
    blank = tok.encode("\n\n")
    return [tok.added["<think>"], *blank, tok.added["</think>"], *blank]


def is_llada(tok) -> bool:
    return set(LLADA_HEADERS) | {"<|startoftext|>"} <= set(tok.added)


def llada_headers(added: dict[str, int]) -> dict[str, int]:
    """Return the header tokens that LLaDA-Base lacks for a chat, with Instruct's ids: {text: id}.

    Base's tokens end at 126345; Instruct's next ones are 126346..126348, in this order
    (tokenizer.json of both). The embeddings have the same number of rows, so there is room.
    """
    missing = [text for text in LLADA_HEADERS if text not in added and "<|mdm_mask|>" in added]
    return {text: 1 + max(added.values()) + n for n, text in enumerate(missing)}

"""Chat formats: what is said is text, and the ids around it are ours alone to place.

LLaDA's turn  [start_header] role [end_header] "\\n\\n" content [eot]; [startoftext] opens the chat
ChatML's      [im_start] "role\\n" content [im_end] "\\n"             (Dream, Qwen)

As the tokenizers' published templates have them, but for LLaDA's, which ends in a header of the
assistant even where the assistant has spoken (GSAI-ML/LLaDA-8B-Instruct, tokenizer_config.json).
"""
LLADA_HEADERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def chat_ids(tok, messages: list[dict]) -> list[int]:
    """Messages {"role", "content"} up to a user's -> ids up to where the assistant's answer begins.

    Raises ValueError for a tokenizer without a chat format, or if the last word is not a user's.
    """
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("a chat must end with a message of the user, for the model to answer")
    if is_llada(tok):
        ids, close = [tok.added["<|startoftext|>"]], [tok.eot_id]
    elif "<|im_start|>" in tok.added and tok.eot_id is not None:
        ids, close = [], [tok.eot_id, *tok.encode("\n")]
        # Dream-v0-Instruct-7B's template opens so where no one else does; Qwen3's has no default
        if "<|beginoftext|>" in tok.added and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": "You are a helpful assistant."}, *messages]
    else:
        raise ValueError(f"the tokenizer {tok.name!r} has no chat format; those of LLaDA (loaded "
                         f"with chat=True), Dream and Qwen have one")
    for message in messages:
        ids += open_turn(tok, message["role"], message["content"]) + close
    return ids + open_turn(tok, "assistant") + thought(tok)


def answer_ids(tok, text: str) -> list[int]:
    """What the assistant says, with its end of turn."""
    return [*tok.encode(text.strip()), tok.eot_id]


def open_turn(tok, role: str, content: str = "") -> list[int]:
    if is_llada(tok):
        start, end, _ = (tok.added[text] for text in LLADA_HEADERS)
        return [start, *tok.encode(role), end, *tok.encode("\n\n" + content.strip())]
    return [tok.added["<|im_start|>"], *tok.encode(f"{role}\n{content}")]


def thought(tok) -> list[int]:
    """Nothing, thought: what Qwen3's template puts before an answer with enable_thinking=False,
    and what dllm's Qwen3-diffusion was tuned to answer behind."""
    if not {"<think>", "</think>"} <= set(tok.added):
        return []
    blank = tok.encode("\n\n")
    return [tok.added["<think>"], *blank, tok.added["</think>"], *blank]


def is_llada(tok) -> bool:
    return set(LLADA_HEADERS) | {"<|startoftext|>"} <= set(tok.added)


def llada_headers(added: dict[str, int]) -> dict[str, int]:
    """What LLaDA's added tokens lack for a chat, for Base ends where Instruct goes on with these.

    Base's tokens end at 126345 and Instruct's are 126346..126348, in this order (their files
    tokenizer.json); the models have the same rows of the embedding, with room for them.
    """
    missing = [text for text in LLADA_HEADERS if text not in added and "<|mdm_mask|>" in added]
    return {text: 1 + max(added.values()) + n for n, text in enumerate(missing)}

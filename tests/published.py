"""Folders as LLaDA, Dream and Qwen3 publish them: tiny random weights, tokenizers learnt here."""
import json

import torch
from safetensors.torch import save_file

from helpers import ROOT
from pretrained import bpe
from tasks.files import write_json

WEIGHTS, CONFIG, INDEX = "model.safetensors", "config.json", "model.safetensors.index.json"

# config.json as published, at full size
LLADA = dict(
    activation_type="silu", alibi=False, alibi_bias_max=8.0, architectures=["LLaDAModelLM"],
    attention_dropout=0.0, attention_layer_norm=False, attention_layer_norm_with_affine=True,
    bias_for_layer_norm=False, block_group_size=1, block_type="llama", d_model=4096,
    embedding_size=126464, eos_token_id=126081, flash_attention=False, include_bias=False,
    include_qkv_bias=False, init_device="meta", input_emb_norm=False, layer_norm_type="rms",
    layer_norm_with_affine=True, mask_token_id=126336, max_sequence_length=4096,
    mlp_hidden_size=12288, mlp_ratio=4, model_type="llada", multi_query_attention=None, n_heads=32,
    n_kv_heads=32, n_layers=32, pad_token_id=126081, rms_norm_eps=1e-05, rope=True,
    rope_full_precision=True, rope_theta=500000.0, scale_logits=False, torch_dtype="bfloat16",
    vocab_size=126464, weight_tying=False)
DREAM = dict(
    architectures=["DreamModel"], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643,
    hidden_act="silu", hidden_size=3584, intermediate_size=18944, mask_token_id=151666,
    max_position_embeddings=131072, max_window_layers=28, model_type="Dream",
    num_attention_heads=28, num_hidden_layers=28, num_key_value_heads=4, pad_token_id=151643,
    rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000.0, sliding_window=None,
    tie_word_embeddings=False, torch_dtype="bfloat16", use_sliding_window=False, vocab_size=152064)
QWEN3 = dict(
    architectures=["A2DQwen3LMHeadModel"], attention_bias=False, dtype="bfloat16",
    bos_token_id=151643, eos_token_id=151645, head_dim=128, hidden_act="silu", hidden_size=1024,
    intermediate_size=3072, layer_types=["full_attention"] * 28, max_position_embeddings=40960,
    model_type="a2d-qwen3", num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8,
    rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000, sliding_window=None,
    tie_word_embeddings=True, use_sliding_window=False, vocab_size=151936)
PUBLISHED = {"llada": LLADA, "Dream": DREAM, "a2d-qwen3": QWEN3}
TINY = {    # the same with sizes for a test
    "llada": dict(LLADA, d_model=32, n_heads=4, n_kv_heads=None, n_layers=3, mlp_hidden_size=48,
                  embedding_size=40, vocab_size=38, max_sequence_length=64, mask_token_id=37,
                  eos_token_id=36, pad_token_id=36),
    "Dream": dict(DREAM, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
                  num_hidden_layers=3, intermediate_size=48, vocab_size=40, mask_token_id=37,
                  eos_token_id=36, pad_token_id=36),
    "a2d-qwen3": dict(QWEN3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2,
                      head_dim=12, num_hidden_layers=3, intermediate_size=48, vocab_size=40,
                      eos_token_id=35, max_position_embeddings=64),
}
QWEN_TOKENS = {"<|endoftext|>": 36, "<|im_end|>": 35, "<|mask|>": 37}


def shapes(family, config):
    """Return {published name: shape}, spelled out apart from the code under test."""
    if family == "llada":
        C, V, hidden = config["d_model"], config["embedding_size"], config["mlp_hidden_size"]
        found = {"model.transformer.wte.weight": (V, C), "model.transformer.ln_f.weight": (C,),
                 "model.transformer.ff_out.weight": (V, C)}
        for i in range(config["n_layers"]):
            layer = {"attn_norm": (C,), "ff_norm": (C,), "ff_proj": (hidden, C),
                     "up_proj": (hidden, C), "ff_out": (C, hidden), "attn_out": (C, C),
                     "q_proj": (C, C), "k_proj": (C, C), "v_proj": (C, C)}
            found |= {f"model.transformer.blocks.{i}.{n}.weight": s for n, s in layer.items()}
        return found
    C, V, hidden = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    D = config.get("head_dim") or C // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * D, config["num_key_value_heads"] * D
    found = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (V, C)
    for i in range(config["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (C,), "post_attention_layernorm.weight": (C,),
                 "mlp.gate_proj.weight": (hidden, C), "mlp.up_proj.weight": (hidden, C),
                 "mlp.down_proj.weight": (C, hidden), "self_attn.o_proj.weight": (C, q),
                 "self_attn.q_proj.weight": (q, C), "self_attn.k_proj.weight": (kv, C),
                 "self_attn.v_proj.weight": (kv, C)}
        if family == "Dream":
            layer |= {"self_attn.q_proj.bias": (q,), "self_attn.k_proj.bias": (kv,),
                      "self_attn.v_proj.bias": (kv,)}
        else:
            layer |= {"self_attn.q_norm.weight": (D,), "self_attn.k_norm.weight": (D,)}
        found |= {f"model.layers.{i}.{n}": s for n, s in layer.items()}
    return found


def generate(folder, family, parts=1, dtype=torch.bfloat16, **changes):
    """Write a random tiny checkpoint as published -> {published name: tensor}.

    With several parts, neighbouring tensors of a block lie in different files.
    """
    folder.mkdir(exist_ok=True)
    config, generator = {**TINY[family], **changes}, torch.Generator().manual_seed(3)
    tensors = {name: torch.randn(shape, generator=generator).to(dtype)
               for name, shape in shapes(family, config).items()}
    write_weights(folder, tensors, parts)
    (folder / CONFIG).write_text(json.dumps(config))
    if family == "a2d-qwen3":
        added = {str(i): {"content": text, "special": True} for text, i in QWEN_TOKENS.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    return tensors


def write_weights(folder, tensors, parts=1):
    """Write model.safetensors, or several parts and their index."""
    for old in folder.glob("model*.safetensors*"):
        old.unlink()
    if parts == 1:
        return save_file(tensors, folder / WEIGHTS)
    files = [f"model-{k + 1:05}-of-{parts:05}.safetensors" for k in range(parts)]
    weight_map = {name: files[i * 7 % parts] for i, name in enumerate(tensors)}
    for file in files:
        save_file({n: p for n, p in tensors.items() if weight_map[n] == file}, folder / file)
    total = sum(p.nbytes for p in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total},
                                            "weight_map": weight_map}))


# ---- tokenizers ----

LLADA_PATTERN = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
                 r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+")
HEADERS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
LLADA_BASE = ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|reserved_token_0|>",
              "<|reserved_token_1|>", "<|mdm_mask|>", "<|reserved_token_2|>", "<role>", "</role>",
              "<|arithmetic_start|>", "<|number_end|>"]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<tool_call>"]
SMOL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>",
        "<empty_output>"]
ADDED = {"llada": LLADA_BASE + HEADERS, "base": LLADA_BASE,
         "dream": QWEN + ["<|beginoftext|>", "<|mask|>"], "qwen": QWEN + ["<|mask|>"],
         "gpt2": ["<|endoftext|>", "<|mask|>", "<|a|>", "<|b|>", "<|c|>"], "smol": SMOL,
         "llama3": ["<|begin_of_text|>", "<|end_of_text|>", *HEADERS, "<|MASK|>"]}
# how text is split; None and DIGITS leave it to ByteLevel's own regex
DIGITS = "digits"
LLAMA3_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = {"llada": LLADA_PATTERN, "base": LLADA_PATTERN, "dream": bpe.QWEN_PATTERN,
            "qwen": bpe.QWEN_PATTERN, "gpt2": None, "smol": DIGITS, "llama3": LLAMA3_PATTERN}
# tokens of Llama 3 that stand for a whole word; no merges make them
WHOLE = [" unmistakably", " denoising", "zqzq", "\u4e16\u754c\u4f60\u597d",
         " \u043c\u0438\u0440\u0430"]

UGLY = [
    "", " ", "\n", "\r\n", "\r", "\t", "\n\n\n  \n\t x", " \t\n\r  x", "     x", "x     ",
    " " * 300, "a" * 300, "hello world", "Hello  World ", "A B",
    "I'll I'LL don't DON'T we\u2019re y'all '' 'S '\u017f can\u02bct \u2018so\u2019 `x` \uff07s",
    "caf\u00e9 \u03a9 \u4e2d\u6587", "cafe\u0301 A\u030a", "e\u0301" * 50,
    "a\u0327\u0301 a\u0301\u0327", "\u1100\u1161\u11a8 \uac01 \u1112\u1161",
    "\u212b \u2126 \u00c5 \ufb01 \ufb05 \u00df \u1e9e",
    "\U0001f469\U0001f3fd\u200d\U0001f4bb\U0001f642", "\U0001f1e9\U0001f1ea",
    "\U0001f469\u200d\U0001f680", "\x00\x01\x1b[2J\x7f\x85\xa0\xad", "0123456789 3.14 1,000",
    "\u0663\u0664 \u0967\u0968 \u2160\u2161 \u00bd \u00b2 \uff11\uff12 \U0001d7d8",
    "\u2028\u2029\u3000\u2003\u200b\u2060\ufeff", "\ufffd\uffff", "\u0e01\u0e33 \u05d0\u05b8",
    "x=1;y=2\r\n\tif (x!=y) { return \"z\"; }\n\n\n", "####\n\n<<3+4=7>>",
    "<|endoftext|>", "a<|endoftext|>b", "<|mdm_mask|><|mask|>", "<|<|endoftext|>|>",
    "<role>x</role>", "<|endoftext|>\u0338", "e<|endoftext|>\u0301", "[CLS] [gMASK]",
    "<|im_start|>user\nhi<|im_end|>\n", "<|reserved_token_0|", "<tool_call>",
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|>",
]
TEACHING = UGLY + [path.read_text() for path in sorted(ROOT.glob("*.py"))] + [
    words * 9 for words in (
        "\u4e2d\u6587\u5b57 \u4f60\u597d \u4e16\u754c ",
        "caf\u00e9 na\u00efve \u00fcber stra\u00dfe ",
        "\u043f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440 ",
        "\U0001f600\U0001f469\u200d\U0001f680 ")]


def learn(pattern, added, size=700, nfc=True, converted=False):
    """Return a vocabulary that the library learns in the steps of LLaDA's and Qwen's files.

    pattern: None is ByteLevel's own, DIGITS the same after single digits. converted: the merges are
    those of `as_converted`.
    """
    import tokenizers                   # which not every environment has
    pre = tokenizers.pre_tokenizers
    lib = tokenizers.Tokenizer(tokenizers.models.BPE())
    if nfc:
        lib.normalizer = tokenizers.normalizers.NFC()
    own_regex = pattern in (None, DIGITS)
    steps = [pre.ByteLevel(add_prefix_space=False, use_regex=own_regex)]
    if pattern == DIGITS:
        steps.insert(0, pre.Digits(individual_digits=True))
    elif not own_regex:
        steps.insert(0, pre.Split(tokenizers.Regex(pattern), "isolated"))
    lib.pre_tokenizer = pre.Sequence(steps) if steps[1:] else steps[0]
    lib.decoder = tokenizers.decoders.ByteLevel()
    lib.post_processor = tokenizers.processors.ByteLevel()
    lib.train_from_iterator(TEACHING, tokenizers.trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=sorted(pre.ByteLevel.alphabet())))
    lib = as_converted(lib) if converted else lib
    lib.add_tokens([tokenizers.AddedToken(text, special=True, normalized=False) for text in added])
    return lib


def learn_family(family, size=700):
    """Return a vocabulary that the library learns in the steps of the family's files."""
    import tokenizers
    lib = learn(PATTERNS[family], ADDED[family], size, nfc=family not in ("gpt2", "smol", "llama3"),
                converted=family == "llama3")
    if family == "llama3":
        bos = ADDED[family][0]
        template = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, lib.token_to_id(bos))])
        lib.post_processor = tokenizers.processors.Sequence([lib.post_processor, template])
    return lib


def as_converted(lib):
    """Return it as if converted from tiktoken: whole words first, every way to cut a token in two.

    Five words are added that no merges make.
    """
    import tokenizers
    char_of = {byte: char for char, byte in bpe.BYTE_OF.items()}
    spec = json.loads(lib.to_str())
    vocab = spec["model"]["vocab"]
    for word in WHOLE:
        vocab["".join(char_of[byte] for byte in word.encode())] = len(vocab)
    merges = []
    for token in vocab:                 # in the order of their ids
        cuts = [(token[:k], token[k:]) for k in range(1, len(token))]
        cuts = [pair for pair in cuts if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(cuts, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    spec["model"].update(merges=merges, ignore_merges=True)
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def write_tokenizers(root):
    """Write {family: a folder with its tokenizer} under root -> root."""
    for family, added in ADDED.items():
        folder = root / family
        folder.mkdir()
        lib = learn_family(family)
        lib.save(str(folder / "tokenizer.json"))
        if family == "smol":
            write_json(folder / "tokenizer_config.json", {"mask_token": "<empty_output>"})
        if family == "dream":           # the slow kind has no tokenizer.json; kept for the library
            (folder / "tokenizer.json").rename(root / "dream.json")
            lib.model.save(str(folder))
            flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
            ids = {text: lib.token_to_id(text) for text in added}
            decoder = {str(i): {"content": text, "special": True, **flags}
                       for text, i in ids.items()}
            write_json(folder / "tokenizer_config.json",
                       {"tokenizer_class": "DreamTokenizer", "added_tokens_decoder": decoder})
            write_json(folder / "added_tokens.json", ids)
    return root

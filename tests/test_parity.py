"""Laws of the network against independent implementations: transformers' Llama, Qwen2 and Qwen3.

LLaDA is Llama's block, Dream is Qwen2's and Qwen3-diffusion is Qwen3's, but for the mask: here they
get an explicit one that is open in both directions. Tiny random models are written to disk under
the published names by this file's own mapping, loaded by from_pretrained and compared in fp32.
"""
import json

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import model as ours
from model import DLLM

transformers = pytest.importorskip("transformers", reason="the independent reference; installed "
                                   "by tests/requirements.txt")

ATOL = 2e-5
MASK_ID, EOS_ID, V, LONGEST = 94, 93, 96, 640

LAYER = "model.layers.{}."

# transformers' arguments, the published config.json, and the name that each tensor has there
FAMILIES = {
    "llada": (
        transformers.LlamaConfig, transformers.LlamaForCausalLM,
        dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, intermediate_size=112,
             rms_norm_eps=1e-5, tie_word_embeddings=False, rope_theta=500_000.0),
        dict(model_type="llada", d_model=64, n_heads=4, n_kv_heads=None, n_layers=3, mlp_ratio=4,
             mlp_hidden_size=112, vocab_size=V, embedding_size=None, weight_tying=False,
             max_sequence_length=LONGEST, rms_norm_eps=1e-5, rope_theta=500000.0, alibi=False,
             activation_type="silu", layer_norm_type="rms", include_bias=False,
             mask_token_id=MASK_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID),
        [(LAYER + "self_attn.o_proj", "model.transformer.blocks.{}.attn_out"),
         (LAYER + "self_attn.q_proj", "model.transformer.blocks.{}.q_proj"),
         (LAYER + "self_attn.k_proj", "model.transformer.blocks.{}.k_proj"),
         (LAYER + "self_attn.v_proj", "model.transformer.blocks.{}.v_proj"),
         (LAYER + "input_layernorm", "model.transformer.blocks.{}.attn_norm"),
         (LAYER + "post_attention_layernorm", "model.transformer.blocks.{}.ff_norm"),
         (LAYER + "mlp.gate_proj", "model.transformer.blocks.{}.ff_proj"),
         (LAYER + "mlp.up_proj", "model.transformer.blocks.{}.up_proj"),
         (LAYER + "mlp.down_proj", "model.transformer.blocks.{}.ff_out"),
         ("model.embed_tokens", "model.transformer.wte"),
         ("model.norm", "model.transformer.ln_f"),
         ("lm_head", "model.transformer.ff_out")]),
    "Dream": (
        transformers.Qwen2Config, transformers.Qwen2ForCausalLM,
        dict(hidden_size=56, num_attention_heads=7, num_key_value_heads=1, intermediate_size=96,
             rms_norm_eps=1e-6, tie_word_embeddings=False, rope_theta=1_000_000.0),
        dict(model_type="Dream", hidden_size=56, num_attention_heads=7, num_key_value_heads=1,
             num_hidden_layers=3, intermediate_size=96, vocab_size=V, rms_norm_eps=1e-6,
             rope_theta=1000000.0, rope_scaling=None, max_position_embeddings=131072,
             hidden_act="silu", tie_word_embeddings=False, use_sliding_window=False,
             sliding_window=None, mask_token_id=MASK_ID, eos_token_id=EOS_ID,
             pad_token_id=EOS_ID), []),
    "a2d-qwen3": (
        transformers.Qwen3Config, transformers.Qwen3ForCausalLM,
        dict(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
             intermediate_size=96, rms_norm_eps=1e-6, tie_word_embeddings=True,
             rope_theta=1_000_000.0),
        dict(model_type="a2d-qwen3", hidden_size=48, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, num_hidden_layers=3, intermediate_size=96, vocab_size=V,
             rms_norm_eps=1e-6, max_position_embeddings=LONGEST, hidden_act="silu",
             rope_parameters={"rope_theta": 1000000.0, "rope_type": "default"},
             attention_bias=False, tie_word_embeddings=True, use_sliding_window=False,
             eos_token_id=7, mask_token_id=MASK_ID, pad_token_id=EOS_ID), []),
}
SHIFTED = {"Dream"}
every_family = pytest.mark.parametrize("family", FAMILIES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """{family: (transformers' model, the folder with its weights under the published names)}."""
    made = {}
    for family, (config_class, model_class, sizes, published, names) in FAMILIES.items():
        theta = sizes["rope_theta"]
        config = config_class(**sizes, vocab_size=V, num_hidden_layers=3,
                              max_position_embeddings=LONGEST, attn_implementation="eager",
                              rope_parameters={"rope_type": "default", "rope_theta": theta})
        reference = model_class(config).eval().requires_grad_(False)
        generator = seeded(1)
        for name, p in reference.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            # what is one or zero at first must not be: it could go unused unseen. A small
            # embedding, as in trained models, lets eps count; wide matrices let attention choose.
            embedding = 0.08 if config.tie_word_embeddings else 0.02
            scale = (embedding if "embed" in name else 0.5 if name.endswith("bias")
                     else 1.2 * p.shape[-1] ** -0.5)
            p.copy_(1 + 0.4 * noise if "norm" in name else scale * noise)
        folder = tmp_path_factory.mktemp(family)
        tensors = {name: p.clone() for name, p in reference.named_parameters()}
        for theirs, name in names:
            for i in range(3) if "{}" in theirs else [0]:
                for leaf in (".weight", ".bias"):
                    if theirs.format(i) + leaf in tensors:
                        tensors[name.format(i) + leaf] = tensors.pop(theirs.format(i) + leaf)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(published))
        made[family] = reference, folder
    return made


def reference_logits(reference, family, ids, is_real=None):
    """Of transformers' model with a mask open both ways; shifted where the family shifts."""
    B, T = ids.shape
    is_real = torch.ones(B, T, dtype=torch.bool) if is_real is None else is_real
    closed = torch.zeros(B, 1, T, T).masked_fill(~is_real[:, None, None, :],
                                                 torch.finfo(torch.float32).min)
    logits = reference(input_ids=ids, attention_mask=closed, use_cache=False,
                       position_ids=torch.arange(T).expand(B, T)).logits
    if family in SHIFTED:               # the score of token i stands at i - 1; token 0 has none
        logits = torch.cat([torch.full_like(logits[:, :1], torch.nan), logits[:, :-1]], dim=1)
    return logits


INPUTS = {
    "plain": lambda: (torch.randint(93, (2, 11), generator=seeded(2)), None),
    "masked": lambda: (torch.where(torch.rand(3, 20, generator=seeded(3)) < 0.6, MASK_ID,
                                   torch.randint(93, (3, 20), generator=seeded(4))), None),
    "long": lambda: (torch.randint(95, (1, LONGEST), generator=seeded(5)), None),
    "padded right": lambda: (torch.randint(95, (3, 16), generator=seeded(6)),
                             torch.arange(16) < torch.tensor([[16], [9], [2]])),
    "padded left": lambda: (torch.randint(95, (3, 16), generator=seeded(7)),
                            torch.arange(16) >= torch.tensor([[0], [7], [14]])),
}


@torch.no_grad()
def largest_difference(model, expected, family, ids, is_real=None):
    """Over the real positions that the family scores."""
    difference = (model(ids, is_real) - expected).abs()
    counts = torch.ones_like(ids, dtype=torch.bool) if is_real is None else is_real.clone()
    if family in SHIFTED:               # scored from the state before, which must be real as well
        counts[:, 1:] &= counts[:, :-1].clone()
        counts[:, 0] = False
    return difference[counts].max().item()


@every_family
def test_the_reference_looks_both_ways_and_its_logits_are_wide(family, references):
    reference, _ = references[family]
    ids, _ = INPUTS["plain"]()
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 1) % 93
    first = slice(1, 2) if family in SHIFTED else slice(0, 1)
    one, other = (reference_logits(reference, family, x)[:, first] for x in (ids, changed))
    assert (one - other).abs().amax(dim=(1, 2)).min() > 1e-3
    assert 0.3 < one.std() < 10         # at such a size 2e-5 is close to what fp32 resolves


@every_family
@pytest.mark.parametrize("kind", INPUTS)
def test_logits_equal_the_references(family, kind, references):
    reference, folder = references[family]
    ids, is_real = INPUTS[kind]()
    expected = reference_logits(reference, family, ids, is_real)
    model = DLLM.from_pretrained(str(folder))
    assert largest_difference(model, expected, family, ids, is_real) < ATOL


@every_family
def test_hidden_states_equal_the_references(family, references):
    reference, folder = references[family]
    ids, _ = INPUTS["masked"]()
    T = ids.shape[1]
    with torch.no_grad():
        states = reference.model(input_ids=ids, attention_mask=torch.zeros(3, 1, T, T),
                                 use_cache=False).last_hidden_state
        h = DLLM.from_pretrained(str(folder)).encode(ids)
    torch.testing.assert_close(h, states, atol=ATOL, rtol=0)


# ---- the comparison notices what could be wrong ----


def interleaved(x, cos, sin):
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


def swap_gate_and_up(model):
    for block in model.blocks:
        block.gate_proj, block.up_proj = block.up_proj, block.gate_proj


def another_eps(model):
    for module in model.modules():
        if isinstance(module, ours.RMSNorm):
            module.eps = {1e-5: 1e-6, 1e-6: 1e-5}[module.eps]


def no_qk_norm(model):
    for block in model.blocks:
        block.q_norm = block.k_norm = nn.Identity()


def no_bias(model):
    for block in model.blocks:
        block.q_proj.bias = block.k_proj.bias = block.v_proj.bias = None


def set_config(**changes):
    def change(model):
        for name, value in changes.items():
            setattr(model.config, name, value)
    return change


attention = F.scaled_dot_product_attention          # as it is before anything is patched


def causal(q, k, v, attn_mask=None, enable_gqa=False):
    return attention(q, k, v, is_causal=True, enable_gqa=enable_gqa)


def neighbouring_groups(q, k, v, attn_mask=None, enable_gqa=False):
    """Query head h served by key head h mod n_kv_head, instead of by its group's."""
    n = q.shape[1] // k.shape[1]
    return attention(q, k.repeat(1, n, 1, 1), v.repeat(1, n, 1, 1))


ATTENTION = (F, "scaled_dot_product_attention")
WRONG = {   # what is wrong, in which families it can be: change of the model, patch of a function
    "interleaved rope": (FAMILIES, None, ((ours, "rotate"), interleaved)),
    "gate and up swapped": (FAMILIES, swap_gate_and_up, None),
    "another eps": (FAMILIES, another_eps, None),
    "another theta": (FAMILIES, set_config(rope_theta=10_000.0), None),
    "causal": (FAMILIES, None, (ATTENTION, causal)),
    "other groups": (["a2d-qwen3"], None, (ATTENTION, neighbouring_groups)),
    "no qk-norm": (["a2d-qwen3"], no_qk_norm, None),
    "no bias": (["Dream"], no_bias, None),
    "no shift": (["Dream"], set_config(shift=False), None),
    "a shift": (["llada", "a2d-qwen3"], set_config(shift=True), None),
}


@pytest.mark.parametrize("family, wrong", [(family, wrong) for wrong, (families, _, _) in
                                           WRONG.items() for family in families])
def test_a_wrong_network_is_told_apart(family, wrong, references, monkeypatch):
    reference, folder = references[family]
    model = DLLM.from_pretrained(str(folder))
    ids, _ = INPUTS["masked"]()
    expected = reference_logits(reference, family, ids)
    assert largest_difference(model, expected, family, ids) < ATOL
    _, change, patch = WRONG[wrong]
    if change:
        change(model)
    if patch:
        place, function = patch
        monkeypatch.setattr(*place, function)
    assert largest_difference(model, expected, family, ids) > 10 * ATOL

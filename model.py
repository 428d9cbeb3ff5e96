"""The masked-diffusion language model: network, corruption, loss.

A masked-diffusion model reads a text in which some tokens are replaced by [MASK], and predicts all
of these at once. It is an ordinary transformer with two differences: attention looks both ways, and
position i predicts token i instead of i+1 (Dream has kept the shift).

    corrupt   xt_i = [MASK] with probability t, else x0_i           forward_process
    learn     -log p(x0_i | xt), averaged over the masked i         diffusion_loss
    generate  start from all [MASK] and reveal a few at a time      sample.py

One class covers LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487), Llama and Qwen. Their
differences are fields of `ModelConfig`; their names for weights are in pretrained/weights.py.
Sizes in comments: B rows, T tokens, C width, V vocabulary, H heads, D width of a head.
"""
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from pretrained import weights
from pretrained.config import MODEL_TYPE, check_sizes
from pretrained.device import index_of, stream, takes_masked_groups, to_device

NLL_CHUNK = 1024                 # tokens whose logits exist at once: 0.5 GB in fp32 at V = 126k


@dataclass
class ModelConfig:
    """The shape of a model; the defaults are LLaDA-8B's."""
    vocab_size: int              # rows of the embedding; may exceed the tokenizer's vocabulary
    mask_id: int                 # the id of [MASK]
    eos_id: int                  # end of text; it also fills short answers
    block_size: int = 4096       # longest sequence, in tokens
    n_layer: int = 32
    n_head: int = 32
    n_kv_head: int = 32          # if fewer than n_head, each serves a group of query heads (GQA)
    n_embd: int = 4096
    n_hidden: int = 12288        # width of the MLP
    norm_eps: float = 1e-5
    rope_theta: float = 500_000.0
    qkv_bias: bool = False
    shift: bool = False          # Dream: state i predicts token i+1, as in its autoregressive base
    head_dim: int = 0            # width of a head; 0: n_embd / n_head
    qk_norm: bool = False        # Qwen3: RMSNorm of every query and key before RoPE
    tied_head: bool = False      # the head's weight is the embedding's
    rope_factor: float = 1.0     # Llama 3.1: slow rotations are this much slower; 1: plain rope
    rope_original: int = 8192    # and for texts of this length plain rope had been trained

    def __post_init__(self):
        check_sizes(self)               # pretrained/config.py


PRESETS = {
    # learns word problems in minutes on two CPU cores; the tokenizer gives vocabulary and ids
    "tiny": dict(n_layer=4, n_head=4, n_kv_head=4, n_embd=128, n_hidden=352),
    "llada-8b": dict(vocab_size=126464, mask_id=126336, eos_id=126081),  # 8,015,581,184 parameters
    # 7,615,616,512 parameters; its config file says 131072 positions, its authors say 2048
    "dream-7b": dict(vocab_size=152064, mask_id=151666, eos_id=151643, block_size=2048, n_layer=28,
                     n_head=28, n_kv_head=4, n_embd=3584, n_hidden=18944, norm_eps=1e-6,
                     rope_theta=1_000_000.0, qkv_bias=True, shift=True),
}


# ----------------------------------------------------------------------------------------------
# the network


class Linear(nn.Linear):
    """Multiply in the dtype of the input; the weights stay as stored (fp32 in training)."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the mean square and the division are in fp32 for every input dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return x32.to(x.dtype) * self.weight.to(x.dtype)


def rope_table(T: int, config: ModelConfig, device):
    """Return cos and sin of position * frequency, each (T, D/2), in fp32. Llama 3.1 divides the
    frequency theta^(-2j/D) by rope_factor if it turns less than once in rope_original tokens, not
    at all from 4 turns on, in between in part."""
    D = config.head_dim or config.n_embd // config.n_head
    freq = 1 / config.rope_theta ** (torch.arange(0, D, 2, device=device).float() / D)      # (D/2,)
    if config.rope_factor != 1:
        turns = config.rope_original * freq / (2 * math.pi)
        kept = ((turns - 1) / (4 - 1)).clamp(0, 1)
        freq = freq * (kept + (1 - kept) / config.rope_factor)
    angle = torch.arange(T, device=device, dtype=torch.float32)[:, None] * freq
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Apply rotate-half RoPE: dimension j pairs with j + D/2. x (B, H, T, D); in fp32, as LLaDA."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


# A layout says how the rows of a batch lie in memory and which tokens attend to each other. On a
# first reading take Padded, whose enter and leave do nothing. A third is in sampling/cache.py.
class Padded:
    """The layout of rows padded to one length: a token attends to the real tokens of its row.
    is_real (B, T) is False on padding, on any device; None: all tokens are real."""

    def __init__(self, is_real, device):
        self.attend = None if is_real is None else to_device(is_real[:, None, None, :], device)
        self.folds = is_real is not None and not takes_masked_groups(device)

    def enter(self, xt, cos, sin):
        return xt, cos, sin

    def leave(self, x):
        return x

    def attention(self, q, k, v, is_gqa: bool):         # a flag: shapes are symbols when compiled
        if is_gqa and self.folds:       # the queries of a group end to end: they see the same keys
            folded = q.reshape(*k.shape[:2], -1, k.shape[3])
            return self.attention(folded, k, v, False).reshape(q.shape)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.attend,   # not causal
                                              enable_gqa=is_gqa)


class Packed:
    """The layout without padding: the N real tokens of all rows, end to end, as one row.

    Apart from attention a transformer works token by token, so only `attention` has to know where
    a row ends. Outside of the blocks nothing changes: `leave` returns (B, T, C).
    """

    def __init__(self, is_real, device):
        self.shape, self.lengths = is_real.shape, is_real.sum(dim=1).tolist()
        self.index = index_of(is_real, device)
        ends = torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)   # (B + 1,)
        self.ends, self.longest = to_device(ends, device), max(self.lengths)

    def enter(self, xt, cos, sin):
        """(B, T) ids, (T, D/2) angles -> (1, N), (N, D/2): a token keeps its position's angle."""
        return xt[self.index][None], cos[self.index[1]], sin[self.index[1]]

    def leave(self, x):
        """(1, N, C) -> (B, T, C), zeros on padding."""
        return x.new_zeros(*self.shape, x.shape[-1]).index_put(self.index, x[0])

    def attention(self, q, k, v, is_gqa: bool):
        """q (1, H, N, D), k and v with H or fewer heads -> (1, H, N, D), each row by itself."""
        half = q.is_cuda and q.dtype != torch.float32       # the kernel has half precision only
        return self.varlen(q, k, v, is_gqa) if half else self.row_by_row(q, k, v, is_gqa)

    def row_by_row(self, q, k, v, is_gqa: bool):        # not compiled: see training/setup.py
        by_row = zip(*(x.split(self.lengths, dim=2) for x in (q, k, v)))
        return torch.cat([F.scaled_dot_product_attention(*row, enable_gqa=is_gqa)
                          for row in by_row], dim=2)

    def varlen(self, q, k, v, is_gqa: bool):
        from torch.nn.attention.varlen import varlen_attn       # loads the compiler: a second
        if is_gqa:                  # repeat each key and value: torch 2.11 has no enable_gqa here
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        y = varlen_attn(*(x[0].transpose(0, 1) for x in (q, k, v)),             # (N, H, D)
                        self.ends, self.ends, self.longest, self.longest)
        return y.transpose(0, 1)[None]


class Block(nn.Module):
    """One transformer layer: x += attention(norm(x)), then x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, D = config.n_embd, config.head_dim or config.n_embd // config.n_head
        self.head_dim, self.is_gqa = D, config.n_kv_head != config.n_head
        self.attn_norm = RMSNorm(C, config.norm_eps)
        self.q_proj = Linear(C, config.n_head * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, config.n_kv_head * D, bias=config.qkv_bias)
        self.q_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(D, config.norm_eps) if config.qk_norm else nn.Identity()
        self.o_proj = Linear(config.n_head * D, C, bias=False)
        self.mlp_norm = RMSNorm(C, config.norm_eps)
        self.gate_proj = Linear(C, config.n_hidden, bias=False)
        self.up_proj = Linear(C, config.n_hidden, bias=False)
        self.down_proj = Linear(config.n_hidden, C, bias=False)

    def forward(self, x, cos, sin, layout):
        B, T, _ = x.shape
        y = self.attn_norm(x)
        q, k, v = (proj(y).view(B, T, -1, self.head_dim).transpose(1, 2)    # (B, H, T, D)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = layout.attention(q, k, v, self.is_gqa)
        x = x + self.o_proj(y.transpose(1, 2).reshape(B, T, -1))
        y = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))


def recomputed(function, *inputs):
    """Call function with activation checkpointing: recomputed in backward instead of stored."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class DLLM(nn.Module):
    """A bidirectional transformer over partly masked text.

    `encode` and `unembed` are apart, so that one forward pass gives both logits and embeddings,
    and a pass that needs no logits (the JEPA target) does not pay for the head.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.compute_dtype = torch.float32      # of the activations; bf16 on GPUs that have it
        self.pack = False                       # True: no computation on padding, see Packed
        self.checkpoint_activations = "none"    # selective (every 2nd block) or full: less memory
        zeros = torch.zeros(config.vocab_size, config.n_embd)   # init_weights or a file fills them
        self.embed = nn.Embedding.from_pretrained(zeros, freeze=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, config.norm_eps)
        self.head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        # kept for `save`: the config.json and the tokenizer's files that the model came with
        self.published, self.small_files = {"model_type": MODEL_TYPE, **asdict(config)}, {}

    def tie(self):
        if self.config.tied_head:
            self.head.weight = self.embed.weight    # one parameter with two uses, stored once

    def encode(self, xt, is_real=None, layout=None):
        """(B, T) ids -> (B, T, C) states after the final norm; attention is bidirectional.

        is_real (B, T) is False on padding: nothing attends to it, so its content changes nothing.
        layout: Padded or Packed, by `self.pack`, unless given (sampling/cache.py).
        Inputs on the CPU are copied without a synchronisation; packing synchronises if is_real is
        on the GPU. Raises ValueError when T exceeds block_size.
        """
        T, device = xt.shape[1], self.embed.weight.device
        if T > self.config.block_size:
            raise ValueError(f"a sequence of {T} tokens is longer than "
                             f"block_size={self.config.block_size}")
        if layout is None:
            layout = (Packed if self.pack and is_real is not None else Padded)(is_real, device)
        return self.run(to_device(xt, device), layout)

    def run(self, xt, layout):
        """(B, T) ids on the device -> encode's states. Apart from encode because FSDP wraps it, and
        would wait for every input that is still on the CPU."""
        xt, cos, sin = layout.enter(xt, *rope_table(xt.shape[1], self.config, xt.device))
        x = self.embed(xt).to(self.compute_dtype)
        every = {"none": 0, "selective": 2, "full": 1}[self.checkpoint_activations]
        for i, block in enumerate(self.blocks):
            if every and i % every == 0:
                x = recomputed(block, x, cos, sin, layout)
            else:
                x = block(x, cos, sin, layout)
        return layout.leave(self.norm(x))

    def unembed(self, h, where=None):
        """(B, T, C) -> fp32 logits (B, T, V); the logits at position i predict the token at i.

        `where` picks positions, and the others cost nothing: (B, T) bool with N True -> (N, V), or
        a pair of index tensors (rows, columns) as in h[rows, columns] -> their shape + (V,).
        """
        return self.head(self.states_predicting(h, where)).float()

    def nll(self, h, x0, where):
        """Return -log p of the clean token at N places: (N,) fp32. h (B, T, C); `where` as above.

        Works in chunks whose logits are recomputed in backward: N x V logits never exist at once.
        """
        def nll_of(h, tokens):
            return F.cross_entropy(self.head(h).float(), tokens, reduction="none")
        where = index_of(where, h.device)
        h, tokens = self.states_predicting(h, where), to_device(x0, h.device)[where]  # (N, C), (N,)
        if len(tokens) <= NLL_CHUNK:
            return nll_of(h, tokens)
        chunks = zip(h.split(NLL_CHUNK), tokens.split(NLL_CHUNK))
        return torch.cat([recomputed(nll_of, *chunk) for chunk in chunks])

    def states_predicting(self, h, where=None):
        """Pick the states that predict the tokens at `where`: those there, or Dream's before."""
        if self.config.shift:                   # nothing predicts the token at position 0
            h = torch.cat([h[:, :1], h[:, :-1]], dim=1)
        return h if where is None else h[index_of(where, h.device)]

    def forward(self, xt, is_real=None):
        """(B, T) ids -> fp32 logits (B, T, V)."""
        return self.unembed(self.encode(xt, is_real))

    @torch.no_grad()
    def init_weights(self, generator):
        """Initialise from scratch: normal, std 1/sqrt(fan-in), divided by sqrt(2 layers) for the
        two matrices that write to the residual stream, much as LLaDA. The embedding's 0.5 and the
        head's 0.02 are ours: tiny models learn arithmetic faster with a wide embedding."""
        def normal_(p, std):
            p.copy_(torch.randn(p.shape, generator=generator, device=generator.device) * std)
        normal_(self.embed.weight, 0.5)
        normal_(self.head.weight, 0.02)
        for block in self.blocks:
            for name, module in block.named_children():
                if isinstance(module, Linear):
                    depth = 2 * len(self.blocks) if name in ("o_proj", "down_proj") else 1
                    normal_(module.weight, (module.in_features * depth) ** -0.5)
                    if module.bias is not None:
                        module.bias.zero_()
        return self

    # ---- in and out of files: pretrained/weights.py ------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=torch.float32, revision: str = "", device="cpu"):
        """Load a folder, or a hub name at its branch, tag or commit; errors as from_checkpoint."""
        return cls.from_checkpoint(weights.find_weights(name_or_dir, revision), dtype, device)

    @classmethod
    def from_checkpoint(cls, folder, dtype=torch.float32, device="cpu", **a2d):
        """Load a folder of any family, or an out_dir's newest checkpoint; a2d: see on_meta.
        Raises ValueError or FileNotFoundError, one sentence, when it does not fit."""
        model = cls.on_meta(folder, **a2d)
        weights.load_model(model, folder, dtype, device)
        return model

    @classmethod
    def on_meta(cls, folder, **a2d):
        """Build it as shapes without memory; a2d: mask_token and shift (pretrained/a2d.py)."""
        return weights.describe_model(folder, lambda fields: cls(ModelConfig(**fields)), **a2d)

    def save(self, folder, dtype=None):
        """Write into a folder that exists, as the model's family publishes it; None: own dtype.
        When the model is sharded every rank calls it, and all but one with folder None."""
        weights.save_model(self, folder, dtype)


# ----------------------------------------------------------------------------------------------
# corruption and loss


def row_generators(seed: int, step: int, example_ids, device="cpu") -> list[torch.Generator]:
    """Make one generator a row, of (seed, step, example id) alone: a row gets the same masks on one
    process or eight, in a batch of 64 or 4 x 16, and after a restart."""
    return [stream(seed, step, example_id, device=device) for example_id in example_ids]


def uniform(shape, generator, device, dtype=torch.float32):
    """Draw U[0, 1) of the shape, from one generator, or row b from generator[b].

    A row's numbers do not depend on its length: the first T are the same however many are drawn.
    """
    if isinstance(generator, torch.Generator):
        u = torch.rand(shape, generator=generator, device=generator.device, dtype=dtype)
    else:
        u = torch.stack([torch.rand(shape[1:], generator=g, device=g.device, dtype=dtype)
                         for g in generator])
    return u.to(device)


def forward_process(x0, t, maskable, mask_id: int, generator, at_least_one: bool = False):
    """Replace each maskable token by [MASK] with probability t -> xt (B, T), is_masked (B, T).

    x0 (B, T) ids, t (B,) in [0, 1], maskable (B, T) bool. `at_least_one` masks one token in rows
    where chance masked none; the paper's mean over masked tokens would be 0 / 0 there, and it does
    not say what it does about short answers at t = 0.2.
    """
    u = uniform(x0.shape, generator, x0.device)                             # (B, T)
    u = u.masked_fill(~maskable, 2.0)                                       # above any t
    is_masked = u < t[:, None]
    if at_least_one:
        is_masked = is_masked | (u == u.amin(dim=1, keepdim=True)) & maskable
    return torch.where(is_masked, mask_id, x0), is_masked


def diffusion_loss(nll, is_masked, maskable, t, form: str = "masked_mean"):
    """Reduce the cross-entropies (N,) of the N masked tokens, in the order of is_masked -> ().

    is_masked, maskable (B, T); t (B,). Each row's sum over its masked tokens is divided by

    masked_mean   their number           the paper (arXiv 2606.00091)
    llada_sft     t * answer length      the expected number; with t ~ U(0, 1) it bounds the
                                         log-likelihood per answer token (arXiv 2502.09992, eq. 5)
    unweighted    0.5 * answer length    its average over t ~ U(0, 1): a masked token weighs the
                                         same in every row, so heavily masked rows weigh more

    and then rows are averaged. Raises ValueError for another form."""
    n_answer = maskable.sum(dim=1)                                          # (B,)
    divisors = {"masked_mean": is_masked.sum(dim=1), "llada_sft": t * n_answer,
                "unweighted": 0.5 * n_answer}
    if form not in divisors:
        raise ValueError(f"there is no loss form {form!r}; choose {', '.join(divisors)}")
    weight = (1 / divisors[form])[:, None].expand(is_masked.shape)[is_masked]      # (N,)
    return nll @ to_device(weight, nll.device) / len(is_masked)

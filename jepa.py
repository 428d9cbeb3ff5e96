"""What DLLM-JEPA adds to the fine-tuning of a masked-diffusion model (arXiv 2606.00091).

Two views of one clean row x0 are made by masking it lightly and heavily. The online model reads
the light one and predicts, besides the masked tokens, the *embedding* that a slow copy of itself
gives the heavy one:

    context view, t_ctx = 0.2        target view, t_tgt = 0.7
            |                                |
    online model (gradient)          EMA copy, fp32, no head (no gradient)
            |        \\                       |
            |         pool -> z_ctx          pool -> z_tgt
            |                  |             |
      masked tokens        predictor -> z_hat
            |                        |       |
       L_diffusion    +   lambda * (1 - cos(z_tgt, z_hat))

One pass with gradient (3F) and one without (F): 4F a step, against 3F for plain diffusion
fine-tuning and 6F for LLM-JEPA, which back-propagates through both views. Only the online model is
kept. What the paper does not do, to find out why it works, is in controls.py.
"""
import copy
import random

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from model import Linear, diffusion_loss, forward_process, uniform
from pretrained.device import to_device

TARGET_TOKENS = 1 << 14          # in one pass of the target, at most: 2 GB of activations at 8 B


class DLLMJEPA(nn.Module):
    """The joint objective as one module, whose forward is the step (so DDP wraps it as it is).

    Defaults are the paper's where it states them; n_pred_layer and lambda_jepa are chosen per task
    there, from {1..5} and {0.5, 1, 2}.
    """

    def __init__(self, model, lambda_jepa: float = 1.0, t_ctx: float = 0.2, t_tgt: float = 0.7,
                 n_pred_layer: int = 2, ema_decay: float = 0.996, mask_scope: str = "response",
                 diffusion_t: str = "context", loss_form: str = "masked_mean", seed: int = 0,
                 jepa_rate: float = 1.0):
        super().__init__()
        self.model = model
        self.lambda_jepa, self.ema_decay = lambda_jepa, ema_decay
        self.t_ctx, self.t_tgt, self.mask_scope = t_ctx, t_tgt, mask_scope
        self.diffusion_t, self.loss_form = diffusion_t, loss_form
        self.seed, self.jepa_rate = seed, jepa_rate
        if lambda_jepa > 0:
            self.predictor = Predictor(model.config.n_embd, n_pred_layer, seed)
            self.target = make_target(model)

    def forward(self, x0, maskable, is_real, generator, step: int = 0, z_tgt=None):
        """(B, T) ids and masks -> loss (), parts {name: ()}; one pass with gradient, one without.

        maskable: the answer. is_real: all but padding. generator: one, or a list of one per row
        (`row_generators`). The context masks are drawn first: with lambda = 0 they are the same.
        `step` matters for jepa_rate < 1. z_tgt (B, C): of these rows, by `embed_targets`, where
        several micro-batches share a pass. On the CPU the batch costs no wait for a GPU: it is
        there that masks are drawn and masked tokens found, and the model moves what it needs.
        """
        maskable, is_content = self.scope(x0, maskable, is_real)
        t_ctx, xt_ctx, is_masked_ctx = self.mask_context(x0, maskable, generator)
        if z_tgt is None:                       # first: its memory is free again for the next pass
            [z_tgt] = self.embed_targets([(x0, maskable, is_real, generator, step)])

        h = self.model.encode(xt_ctx, is_real)                              # the pass with gradient
        nll = self.model.nll(h, x0, is_masked_ctx)                          # (N,)
        diffusion = diffusion_loss(nll, is_masked_ctx, maskable, t_ctx, self.loss_form)
        self.seen = {"t": t_ctx, "is_masked": is_masked_ctx, "nll": nll.detach()}  # diagnostics.py
        if self.lambda_jepa == 0:               # plain diffusion fine-tuning, to the last bit
            return diffusion, {"diffusion": diffusion.detach()}
        if z_tgt is None:                       # zero gradients: DDP waits for every parameter's
            zero = 0 * self.predictor(h.new_zeros(1, h.shape[-1], dtype=torch.float32)).sum()
            return diffusion + zero, {"diffusion": diffusion.detach()}
        mean = average(self.states(h), self.embedded(is_masked_ctx, maskable, is_content))
        z_hat = self.predictor(layer_norm(mean))                            # of z_ctx (B, C)
        jepa = cosine_distance(z_hat, z_tgt)
        self.seen |= {"mean": mean.detach(), "z_hat": z_hat.detach(), "z_tgt": z_tgt}
        return diffusion + self.lambda_jepa / self.jepa_rate * jepa, {
            "diffusion": diffusion.detach(), "jepa": jepa.detach()}

    @torch.no_grad()
    def embed_targets(self, batches, n_at_once: int = 0):
        """Inputs of `forward`, of micro-batches of one step -> the z_tgt (B, C) of each.

        n_at_once of them, 0: all, share a pass of the target, which stays as it is until the
        optimizer's step. If the step has no JEPA term there is no pass, and None for each.
        """
        if not self.has_jepa(step=batches[0][-1]):
            return [None] * len(batches)
        n = n_at_once or len(batches)
        passes = [self.target_pass(batches[i:i + n]) for i in range(0, len(batches), n)]
        return [z_tgt for one in passes for z_tgt in one]

    @torch.no_grad()
    def target_pass(self, batches):
        """The same in one pass, over rows as long as the longest of all: model.pack spares the
        padding."""
        rows = []
        for x0, maskable, is_real, generator, _ in batches:
            maskable, is_content = self.scope(x0, maskable, is_real)
            xt_tgt, is_masked_tgt = self.mask_target(x0, maskable, generator)
            rows += zip(xt_tgt, is_real, self.embedded(is_masked_tgt, maskable, is_content))
        xt_tgt, is_real, where = (pad_sequence(x, batch_first=True) for x in zip(*rows))
        z_tgt = pool(self.target.encode(xt_tgt, is_real), where)            # (B of all, C)
        return z_tgt.split([len(x0) for x0, *_ in batches])

    def scope(self, x0, maskable, is_real):
        """-> what may be masked, and what is embedded if it is not: (B, T) each."""
        if self.mask_scope == "all":            # all but the first token: Dream cannot predict it,
            maskable = is_real.clone()          # and something stays visible to pool over
            maskable[:, 0] = False
        # end-of-text that fills short answers is trained, but as an embedding it is padding
        return maskable, is_real & (x0 != self.model.config.eos_id)

    def has_jepa(self, step: int) -> bool:
        """Whether this step pays for the JEPA term: on a share jepa_rate of them, with lambda /
        jepa_rate, so that the expected gradient is that of every step. Ranks and micro-batches
        agree, for it depends on (seed, step) alone."""
        rng = random.Random(f"jepa {self.seed} {step}")
        return self.lambda_jepa > 0 and rng.random() < self.jepa_rate

    def mask_context(self, x0, maskable, generator):
        """-> t_ctx (B,), and the context view xt_ctx, is_masked_ctx (B, T)."""
        t_ctx = self.draw_t_ctx(x0, generator)
        return t_ctx, *forward_process(x0, t_ctx, maskable, self.model.config.mask_id, generator,
                                       at_least_one=self.loss_form == "masked_mean")

    def draw_t_ctx(self, x0, generator):
        """The context rate of each row (B,): t_ctx, or with diffusion_t="uniform" U(0, 1)."""
        if self.diffusion_t == "context":
            return torch.full((x0.shape[0],), self.t_ctx, device=x0.device)
        u = uniform((x0.shape[0], 1), generator, x0.device)[:, 0]
        return 1e-3 + (1 - 1e-3) * u            # LLaDA's floor: 1 / t stays below 1000

    def mask_target(self, x0, maskable, generator):
        """-> the target view xt_tgt, is_masked_tgt (B, T), whose masks are drawn anew."""
        t_tgt = torch.full((len(x0),), self.t_tgt, device=x0.device)
        return forward_process(x0, t_tgt, maskable, self.model.config.mask_id,
                               for_target(generator))

    def embedded(self, is_masked, maskable, is_content):
        """The positions of a view, (B, T) each, whose states are its embedding: what it shows."""
        return is_content & ~is_masked

    def states(self, h):
        """The states (B, T, C) of the context view that are embedded: the last, which score tokens
        too."""
        return h

    @torch.no_grad()
    def update_target(self, full=torch.Tensor.float):
        """After each optimizer step. full: parameter -> its fp32 value, which lean.py splits."""
        if self.lambda_jepa > 0:
            ema_update(self.target, self.model, self.ema_decay, full)


def for_target(generator):
    """Generators for the target view, seeded from those of the context view. To go on with the same
    ones would let its masks depend on how many numbers the first view took, that is, on padding."""
    if isinstance(generator, torch.Generator):
        return generator
    return [torch.Generator(g.device).manual_seed(g.initial_seed() ^ 1) for g in generator]


def pool(h, where):
    """h (B, T, C) -> z (B, C): mean of the states where (B, T) says, then a bare LayerNorm.

    In fp32. A row where nothing is chosen gives the zero vector.
    """
    return layer_norm(average(h, where))


def average(h, where):
    """(B, T, C), (B, T) -> (B, C) in fp32."""
    where = to_device(where[..., None], h.device)                           # (B, T, 1)
    return (h.float() * where).sum(dim=1) / where.sum(dim=1).clamp(min=1)


def layer_norm(mean):
    return F.layer_norm(mean, mean.shape[-1:])


def cosine_distance(z_hat, z_tgt):
    """1 - cos, averaged over rows, in fp32: (B, C), (B, C) -> ()."""
    return (1 - F.cosine_similarity(z_hat.float(), z_tgt.float(), dim=-1)).mean()


class Predictor(nn.Module):
    """z_ctx (B, C) -> z_hat (B, C): k transformer blocks over a sequence of one, and a LayerNorm.

    Over one position softmax is 1 whatever query and key say, so attention *is* its value path and
    only that is kept; else a block is the usual pre-norm one with a 4C GELU MLP. k = 0 is the
    paper's "no predictor". It states depth and width; MLP width, final norm and init are ours.
    """

    def __init__(self, width: int, n_layer: int, seed: int = 0):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn_norm": nn.LayerNorm(width), "v_proj": Linear(width, width),
                           "o_proj": Linear(width, width), "mlp_norm": nn.LayerNorm(width),
                           "up_proj": Linear(width, 4 * width),
                           "down_proj": Linear(4 * width, width)})
            for _ in range(n_layer))
        self.norm = nn.LayerNorm(width) if n_layer else nn.Identity()
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, z):
        for block in self.blocks:
            z = z + block["o_proj"](block["v_proj"](block["attn_norm"](z)))
            z = z + block["down_proj"](F.gelu(block["up_proj"](block["mlp_norm"](z))))
        return self.norm(z)


def make_target(model):
    """A frozen copy: fp32 of what is trained (bf16 could not hold the small steps of the EMA); a
    frozen parameter, such as the base under LoRA, is the model's own."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    target = copy.deepcopy(model, memo={id(model.head): None, **shared})    # all but the head
    for p in target.parameters():
        if id(p) not in shared:
            p.data = p.data.float()
    return target.requires_grad_(False)


@torch.no_grad()
def ema_update(target, model, decay: float, full=torch.Tensor.float):
    """target <- decay * target + (1 - decay) * model, in fp32, paired by name; the shared stay."""
    online = dict(model.named_parameters())
    pairs = [(p, online[name]) for name, p in target.named_parameters() if p is not online[name]]
    for i in range(0, len(pairs), 16):          # few launches, and few fp32 copies if it is bf16
        ps, news = zip(*pairs[i:i + 16])
        torch._foreach_lerp_(ps, [full(p) for p in news], 1 - decay)

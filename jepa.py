"""The DLLM-JEPA objective for fine-tuning a masked-diffusion model (arXiv 2606.00091).

A joint-embedding predictive architecture (JEPA) predicts, from one view of an input, the embedding
of another view. Here the two views of a clean row x0 come from masking it lightly and heavily. The
online model reads the light view. It predicts the masked tokens, as in any masked-diffusion model,
and also the embedding that a slowly moving copy of itself, the target, gives to the heavy view:

    context view, t_ctx = 0.2        target view, t_tgt = 0.7
            |                                |
    online model (gradient)          EMA copy, fp32, no head (no gradient)
            |        \\                       |
            |         pool -> z_ctx          pool -> z_tgt
            |                  |             |
      masked tokens        predictor -> z_hat
            |                        |       |
       L_diffusion    +   lambda * (1 - cos(z_tgt, z_hat))

A forward pass costs F, and one with gradient 3F. A step is 4F; plain diffusion fine-tuning is 3F,
and LLM-JEPA, with gradient through both views, 6F. After training only the online model is kept.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear, diffusion_loss, forward_process, uniform
from pretrained.device import stream, to_device


class DLLMJEPA(nn.Module):
    """The joint objective as one module, so that DDP can wrap it. The paper tunes lambda_jepa in
    {0.5, 1, 2} and n_pred_layer in 1..5 for each task; it does not state mask_scope. The methods
    after `forward` are its parts: training/controls.py replaces some to see what does the work."""

    def __init__(self, model, lambda_jepa: float = 1.0, t_ctx: float = 0.2, t_tgt: float = 0.7,
                 n_pred_layer: int = 2, ema_decay: float = 0.996, mask_scope: str = "response",
                 diffusion_t: str = "context", loss_form: str = "masked_mean", seed: int = 0):
        super().__init__()
        self.model, self.lambda_jepa, self.ema_decay = model, lambda_jepa, ema_decay
        self.t_ctx, self.t_tgt, self.diffusion_t = t_ctx, t_tgt, diffusion_t
        self.mask_scope, self.loss_form, self.distance = mask_scope, loss_form, cosine_distance
        self.fp32_of = torch.Tensor.float       # weight -> fp32, for the EMA; lean.py replaces it
        self.trace = {}                         # tensors of the last forward, for the log
        if lambda_jepa > 0:
            self.predictor = Predictor(model.config.n_embd, n_pred_layer, seed)
            self.target = make_target(model)

    def forward(self, x0, maskable, is_real, generator, z_tgt=None):
        """(B, T) ids and bool masks -> loss (), parts {name: ()}.

        maskable: the answer. is_real: all but padding. generator: one for all rows, or a list of
        one a row (`row_generators`). z_tgt (B, C): from `embed_targets`; None: computed here. Keep
        the batch on the CPU: masks are drawn without a GPU synchronisation, the model copies it.
        """
        maskable, is_content = self.scope(x0, maskable, is_real)
        t_ctx, xt_ctx, is_masked_ctx = self.context_view(x0, maskable, generator)
        if z_tgt is None and self.lambda_jepa > 0:      # before activations are stored
            [z_tgt] = self.embed_targets([(x0, maskable, is_real, generator)])

        h = self.model.encode(xt_ctx, is_real)          # (B, T, C), the pass with gradient
        diffusion = self.diffusion_term(h, x0, is_masked_ctx, maskable, t_ctx)
        if self.lambda_jepa == 0:                       # exactly plain diffusion fine-tuning
            return diffusion, {"diffusion": diffusion.detach()}

        mean = self.summary(h, is_masked_ctx, maskable, is_content)         # (B, C)
        z_ctx = layer_norm(mean)
        z_hat = self.predictor(z_ctx)
        jepa = self.distance(z_hat, z_tgt)
        self.trace |= {"mean": mean.detach(), "z_hat": z_hat.detach(), "z_tgt": z_tgt}
        loss = diffusion + self.lambda_jepa * jepa
        return loss, {"diffusion": diffusion.detach(), "jepa": jepa.detach()}

    def scope(self, x0, maskable, is_real):
        """Return (B, T) bools: what may be masked, and what may be pooled: not end-of-text."""
        if self.mask_scope == "all":            # all but the first token: Dream cannot predict it,
            maskable = is_real.clone()          # and one token must stay visible to be pooled
            maskable[:, 0] = False
        return maskable, is_real & (x0 != self.model.config.eos_id)

    def context_view(self, x0, maskable, generator):
        """Mask lightly -> t_ctx (B,), xt_ctx (B, T), is_masked_ctx (B, T)."""
        t_ctx = self.context_rate(x0, generator)
        xt_ctx, is_masked_ctx = forward_process(x0, t_ctx, maskable, self.model.config.mask_id,
                                                generator, self.loss_form == "masked_mean")
        return t_ctx, xt_ctx, is_masked_ctx

    def context_rate(self, x0, generator):
        """The masking rate of each row (B,): t_ctx, or with diffusion_t="uniform" U(0, 1)."""
        if self.diffusion_t == "context":
            return torch.full((len(x0),), self.t_ctx, device=x0.device)
        u = uniform((len(x0), 1), generator, x0.device)[:, 0]
        return 1e-3 + (1 - 1e-3) * u            # LLaDA's floor: 1 / t stays below 1000

    def diffusion_term(self, h, x0, is_masked, maskable, t):
        """Return the diffusion loss () of a view's masked tokens; begins a new trace."""
        nll = self.model.nll(h, x0, is_masked)                              # (N,)
        self.trace = {"t": t, "is_masked": is_masked, "nll": nll.detach()}
        return diffusion_loss(nll, is_masked, maskable, t, self.loss_form)

    def summary(self, h, is_masked, maskable, is_content):
        """Average a view's states over its visible content: (B, T, C) -> (B, C)."""
        return average(h, is_content & ~is_masked)

    def embed_targets(self, batches):
        """Inputs of `forward`, for each micro-batch -> its z_tgt (B, C); None without the term."""
        return [self.embed_target(*batch) if self.lambda_jepa else None for batch in batches]

    @torch.no_grad()
    def embed_target(self, x0, maskable, is_real, generator):
        """Mask heavily, and encode without gradient -> z_tgt (B, C)."""
        maskable, is_content = self.scope(x0, maskable, is_real)
        xt_tgt, is_masked_tgt = self.target_view(x0, maskable, generator)
        h = self.target.encode(xt_tgt, is_real)
        return layer_norm(self.summary(h, is_masked_tgt, maskable, is_content))

    def target_view(self, x0, maskable, generator):
        """Mask at t_tgt, independently of the context view -> xt_tgt, is_masked_tgt (B, T)."""
        if isinstance(generator, list):     # reseed: what the context view drew depends on padding
            generator = [torch.Generator(g.device).manual_seed(g.initial_seed() ^ 1)
                         for g in generator]
        t_tgt = torch.full((len(x0),), self.t_tgt, device=x0.device)
        return forward_process(x0, t_tgt, maskable, self.model.config.mask_id, generator)

    @torch.no_grad()
    def update_target(self):        # after each optimizer step
        if self.lambda_jepa > 0:
            ema_update(self.target, self.model, self.ema_decay, self.fp32_of)


def pool(h, where):
    """h (B, T, C) -> z (B, C): LayerNorm of the mean state at `where` (B, T); zeros if none."""
    return layer_norm(average(h, where))


def average(h, where):
    """(B, T, C), (B, T) -> (B, C), the mean over the chosen positions in fp32."""
    where = to_device(where[..., None], h.device)                           # (B, T, 1)
    return (h.float() * where).sum(dim=1) / where.sum(dim=1).clamp(min=1)


def layer_norm(mean):
    return F.layer_norm(mean, mean.shape[-1:])          # without weights (paper silent)


class Predictor(nn.Module):
    """z_ctx (B, C) -> z_hat (B, C): k transformer blocks over a sequence of one, and a LayerNorm.

    With one position softmax is 1, so attention is its value path and only that is built; else a
    block is the usual pre-norm block. k = 0 is the paper's "no predictor". It states the depth;
    the MLP's width 4C, the final norm and the init are ours.
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
        generator = stream(seed, "predictor")
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=module.in_features ** -0.5, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, z):
        for block in self.blocks:
            z = z + block["o_proj"](block["v_proj"](block["attn_norm"](z)))
            z = z + block["down_proj"](F.gelu(block["up_proj"](block["mlp_norm"](z))))
        return self.norm(z)


def cosine_distance(z_hat, z_tgt):
    """1 - cos, averaged over rows, in fp32: (B, C), (B, C) -> ()."""
    return (1 - F.cosine_similarity(z_hat.float(), z_tgt.float(), dim=-1)).mean()


def make_target(model):
    """Copy the model without its head, frozen, in fp32: bf16 could not hold the EMA's small steps.
    A parameter that is frozen already, such as the base under LoRA, is shared."""
    shared = {id(p): p for p in model.parameters() if not p.requires_grad}
    memo = {id(model.head): None, **shared}     # deepcopy takes these instead of copies
    target = copy.deepcopy(model, memo)
    for p in target.parameters():
        if id(p) not in shared:
            p.data = p.data.float()
    return target.requires_grad_(False)


@torch.no_grad()
def ema_update(target, model, decay: float, fp32_of=torch.Tensor.float):
    """target <- decay * target + (1 - decay) * model, in fp32, paired by name."""
    online = dict(model.named_parameters())
    pairs = [(p, online[name]) for name, p in target.named_parameters() if p is not online[name]]
    for i in range(0, len(pairs), 16):          # few kernel launches, and few fp32 copies at once
        targets, news = zip(*pairs[i:i + 16])
        torch._foreach_lerp_(targets, [fp32_of(p) for p in news], 1 - decay)

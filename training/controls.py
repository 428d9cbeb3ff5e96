"""Controls: variants of the objective that tell which part of DLLM-JEPA does the work.

The paper's method is jepa.py. With the default settings nothing here is called. All variants get
the same batches, and at equal rates the same masks: they depend on (seed, step, example id) alone.

    target      the vector that z_hat has to match
      ema         the EMA copy's embedding of the heavy view (paper)
      online      the online model's own, without gradient: the EMA with decay 0
      frozen      the embedding by the weights before training: the EMA with decay 1
      shuffled    the EMA's, of another row: each row of the batch gets that of the row before it
      mean        the mean of the EMA's over the batch, the same for each row
      random      a fixed random vector for each example; no network computes it
                If shuffled does as well as ema, what helps is not a prediction about the example.
    masks       independent (paper), or nested: both views use the same u, so that the lighter
                masks are among the heavier; with t_ctx = t_tgt the views are one text
    pool        the positions that are averaged: visible (paper), answer_visible (those that may be
                masked), masked (each view's own), all_real (visible or not)
    pool_layer  after how many blocks; the final norm is applied to them as well
    pred_width  a bottleneck of this width around the predictor;  pred_lr = 0 freezes the predictor
    ema_dtype   bfloat16 shows that such a target stalls
    objective   the term that is added to the diffusion loss
      jepa            1 - cos(z_tgt, predictor(z_ctx)) (paper); with n_pred_layer = 0 it is the
                      consistency of the two embeddings
      consistency     of the two views' predictions, as in Mean Teacher: KL(p_tgt || p_ctx) at
                      tokens masked in both; the online head reads the EMA's states; no predictor
      two_gradients   LLM-JEPA (arXiv 2509.14252): the views are prompt and answer, clean and each
                      seen alone; both pass the online model with gradient: 6F, no copy. LLM-JEPA
                      embeds the last token, we the mean; its predictor is k extra tokens, ours g.
                      It takes the cosine of raw states, we of layer-normed ones. Its loss dropout
                      leaves the term out of some steps and does not rescale lambda; we have none
      infonce         each z_hat has to tell its own target from those of all rows of the batch: the
                      cross-entropy of cos(z_hat_i, z_tgt_j) / tau over j. It is below log B only
                      if z_hat knows which row it is, for which the prompt, clean in both views,
                      is enough. Minus the same with target="shuffled" it shows whether a set-up
                      sees pairs. Its gradient is several times that of jepa at the same lambda
      blockwise       no term, lambda is 0: other masks for the diffusion loss (Blockwise SFT,
                      arXiv 2508.19529). One block of the answer, of `active_block` tokens, is
                      masked at rate t and has the loss; all before it is clean, all after it is
                      masked. Theirs: 32 tokens, t ~ U(0, 1) (our diffusion_t="uniform"), the mean
                      over masked tokens. They draw each block of a row at most once, we draw with
                      replacement; their decoding has blocks of the same size (`--block_length` of
                      eval_gsm8k.py). Our end-of-text that fills an answer is part of it
    anchor      lambda * |theta - base|^2 in the loss, the paper's other baseline (1e-4; that the
                square is summed and not averaged is our guess)

"Batch" is the batch of an optimizer step, over all ranks and micro-batches, so the number of
processes changes no target.
"""
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from jepa import DLLMJEPA, Predictor, average, cosine_distance, layer_norm, pool
from model import Linear, Padded, forward_process, row_generators, uniform
from pretrained.device import stream, to_device
from training.ranks import gather_batch, local_part, scatter_batch, sum_over_ranks


@dataclass
class ControlConfig:
    """Settings of training/controls.py; the defaults are the paper's method."""
    objective: Literal["jepa", "consistency", "two_gradients", "infonce",
                       "blockwise"] = "jepa"  # the paper's, or a control's
    target: Literal["ema", "online", "frozen", "shuffled", "mean", "random"] = "ema"  # of z_hat
    masks: Literal["independent", "nested"] = "independent"  # nested: the lighter in the heavier
    pool: Literal["visible", "answer_visible", "masked", "all_real"] = "visible"  # what is averaged
    pool_layer: int = 0                 # embed after this many blocks; 0: after the last
    pred_width: int = 0                 # bottleneck around the predictor; 0: none
    pred_lr: float = 1.0                # learning rate of the predictor, in units of lr; 0: frozen
    ema_dtype: Literal["float32", "bfloat16"] = "float32"  # of the target; bfloat16 stalls
    tau: float = 0.1                    # temperature of infonce (SimCLR's, arXiv 2002.05709)
    active_block: int = 32              # tokens of a block of blockwise (arXiv 2508.19529)
    anchor: float = 0.0                 # weight of |theta - base|^2 (the paper's baseline: 1e-4)


# the paper's value of each, and which of them the other objectives do not use
PAPER = {"objective": "jepa", "target": "ema", "masks": "independent", "pool": "visible",
         "pool_layer": 0, "pred_width": 0, "pred_lr": 1.0, "ema_dtype": "float32"}
UNUSED = {"jepa": (), "infonce": (),
          "consistency": ("pool", "pool_layer", "pred_width", "pred_lr"),
          "two_gradients": ("target", "masks", "pool", "pool_layer", "ema_dtype"),
          "blockwise": tuple(name for name in PAPER if name != "objective")}


def check_controls(cfg):
    """Raise ValueError, one sentence, where settings exclude each other."""
    for name in UNUSED[cfg.objective]:
        if getattr(cfg, name) != PAPER[name]:
            raise ValueError(f"objective={cfg.objective!r} does not use {name}="
                             f"{getattr(cfg, name)!r}; leave it at {PAPER[name]!r}")
    if cfg.objective == "consistency" and cfg.target not in ("ema", "online", "frozen"):
        raise ValueError(f"target={cfg.target!r} is a vector, and objective='consistency' compares "
                         f"tokens; choose ema, online or frozen")
    for name in ("pred_width", "pred_lr"):
        if getattr(cfg, name) != PAPER[name] and not cfg.n_pred_layer:
            raise ValueError(f"{name}={getattr(cfg, name):g} needs a predictor, and n_pred_layer=0 "
                             f"builds none")
    if cfg.target == "random" and cfg.masks != "independent":
        raise ValueError(f"target='random' has no second view to be masked: it does not use "
                         f"masks={cfg.masks!r}")
    for name, value in (("target", "shuffled"), ("objective", "infonce")):
        if getattr(cfg, name) == value and cfg.batch_size < 2:
            raise ValueError(f"{name}={value!r} takes other rows of the batch: batch_size must be "
                             f"at least 2")
    if cfg.objective == "infonce" and cfg.target == "mean":
        raise ValueError("objective='infonce' tells the targets of rows apart, and target='mean' "
                         "gives all rows one; choose another target")
    if cfg.tau != ControlConfig.tau and cfg.objective != "infonce":
        raise ValueError(f"objective={cfg.objective!r} does not use tau={cfg.tau:g}; leave it at "
                         f"{ControlConfig.tau:g}")
    if cfg.objective == "blockwise" and cfg.mask_scope == "all":
        raise ValueError("objective='blockwise' cuts the answer into blocks, and mask_scope='all' "
                         "masks the prompt, too; mask_scope='response' would fit")
    if cfg.objective == "blockwise" and cfg.lambda_jepa:
        raise ValueError(f"objective='blockwise' has no JEPA term, and lambda_jepa="
                         f"{cfg.lambda_jepa:g} weighs one; lambda_jepa=0 would fit")
    if cfg.anchor and (cfg.lora_rank or cfg.optimizer == "lean"):
        raise ValueError(f"anchor={cfg.anchor:g} pulls at all weights in fp32: it needs "
                         f"lora_rank=0 and optimizer='adamw'")
    if cfg.anchor and not cfg.init_from:
        raise ValueError(f"anchor={cfg.anchor:g} pulls to the weights that init_from names; give "
                         f"one")


def has_control(cfg) -> bool:
    """Return whether any setting differs from the paper's method."""
    has_another = any(getattr(cfg, name) != PAPER[name] for name in PAPER)
    return cfg.objective == "blockwise" or cfg.lambda_jepa > 0 and has_another


def make_control(model, cfg: ControlConfig, paper: dict):
    """Make the variant that the settings ask for. paper: the arguments of DLLMJEPA.

    Raises ValueError if the model has fewer blocks than pool_layer."""
    if cfg.pool_layer > len(model.blocks):
        raise ValueError(f"pool_layer={cfg.pool_layer} is more than the model's "
                         f"{len(model.blocks)} blocks")
    decay = {"online": 0.0, "frozen": 1.0}.get(cfg.target, paper["ema_decay"])
    paper = paper | {"ema_decay": decay}
    if cfg.objective == "consistency":
        paper = paper | {"n_pred_layer": 0}
    kind = {"jepa": Control, "consistency": Consistency, "two_gradients": TwoGradients,
            "infonce": InfoNCE, "blockwise": Blockwise}
    return kind[cfg.objective](model, cfg, **paper)


class Control(DLLMJEPA):
    """The paper's objective with another target, masks, pool, layer or predictor."""

    def __init__(self, model, cfg: ControlConfig, seed: int = 0, **paper):
        super().__init__(model, seed=seed, **paper)
        self.kind, self.masks, self.where, self.seed = cfg.target, cfg.masks, cfg.pool, seed
        self.pool_layer = cfg.pool_layer % len(model.blocks)    # 0: the last, whose states are h
        self.ema_dtype = getattr(torch, cfg.ema_dtype)
        for name, p in self.target.named_parameters():
            if model.get_parameter(name).requires_grad:     # else the base of LoRA, which is shared
                p.data = p.data.to(self.ema_dtype)
        if cfg.pred_width:
            self.predictor = Bottleneck(model.config.n_embd, cfg.pred_width,
                                        len(self.predictor.blocks), seed)
        self.predictor.requires_grad_(cfg.pred_lr > 0)
        self.early = None       # with pool_layer: the online states of that block
        if self.pool_layer:
            self.target.blocks = self.target.blocks[:self.pool_layer]
            model.blocks[self.pool_layer - 1].register_forward_hook(
                lambda block, inputs, x: self.keep(x, layout=inputs[-1]))

    def keep(self, x, layout):
        self.early = layout.leave(self.model.norm(x))                      # (B, T, C)

    def summary(self, h, is_masked, maskable, is_content):
        where = {"visible": ~is_masked, "answer_visible": maskable & ~is_masked,
                 "masked": is_masked, "all_real": is_content}[self.where]
        h, self.early = (h if self.early is None else self.early), None     # or its graph stays
        return average(h, is_content & where)

    def target_view(self, x0, maskable, generator):
        if self.masks == "independent":
            return super().target_view(x0, maskable, generator)
        same = [torch.Generator(g.device).manual_seed(g.initial_seed()) for g in generator]
        self.context_rate(x0, same)             # what the context view draws before its masks
        t_tgt = torch.full((len(x0),), self.t_tgt, device=x0.device)
        return forward_process(x0, t_tgt, maskable, self.model.config.mask_id, same,
                               self.loss_form == "masked_mean")

    def embed_target(self, *batch):
        self.early = None                       # of a held-out loss, or recomputed in backward
        return super().embed_target(*batch)

    @torch.no_grad()
    def embed_targets(self, batches):
        if self.kind == "random":
            return [self.random_target(*batch[:3]) for batch in batches]
        targets = super().embed_targets(batches)
        if self.kind not in ("shuffled", "mean"):
            return targets
        whole = gather_batch(targets)                                       # (B of the step, C)
        if self.kind == "shuffled":
            whole = whole.roll(1, dims=0)
        else:
            whole = whole.mean(dim=0).expand_as(whole)
        return scatter_batch(whole, len(targets))

    def random_target(self, x0, maskable, is_real):
        """Draw vectors (B, C) as pool might give, by seed and content of the row, at any step."""
        _, is_content = self.scope(x0, maskable, is_real)
        content = [ids[where].tolist() for ids, where in zip(x0, is_content)]
        z = torch.stack([torch.randn(self.model.config.n_embd, generator=generator)
                         for generator in row_generators(self.seed, 0, content)])
        return layer_norm(to_device(z, self.model.embed.weight.device))

    def update_target(self):
        fp32_of, self.fp32_of = self.fp32_of, lambda p: fp32_of(p).to(self.ema_dtype)
        super().update_target()
        self.fp32_of = fp32_of


class Bottleneck(nn.Module):
    """The predictor between two matrices: C -> width -> C, narrow as I-JEPA's is."""

    def __init__(self, C: int, width: int, n_layer: int, seed: int = 0):
        super().__init__()
        self.down, self.up = Linear(C, width), Linear(width, C)
        self.inner = Predictor(width, n_layer, seed)
        generator = stream(seed, "bottleneck")
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=linear.in_features ** -0.5, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, z):
        return self.up(self.inner(self.down(z)))


class Consistency(Control):
    """The two views agree on tokens instead of embeddings."""

    def embed_targets(self, batches):
        return [None] * len(batches)            # it needs all states, not z: computed in forward

    def forward(self, x0, maskable, is_real, generator, z_tgt=None):
        maskable, is_content = self.scope(x0, maskable, is_real)
        t_ctx, xt_ctx, is_masked_ctx = self.context_view(x0, maskable, generator)
        xt_tgt, is_masked_tgt = self.target_view(x0, maskable, generator)
        with torch.no_grad():
            h_tgt = self.target.encode(xt_tgt, is_real)
        h = self.model.encode(xt_ctx, is_real)
        diffusion = self.diffusion_term(h, x0, is_masked_ctx, maskable, t_ctx)

        both = is_masked_ctx & is_masked_tgt    # if there are none, the sum is 0, with a gradient
        with torch.no_grad():
            p_tgt = self.model.unembed(h_tgt, both).softmax(dim=-1)         # (N, V)
        log_p_ctx = self.model.unembed(h, both).log_softmax(dim=-1)
        kl = F.kl_div(log_p_ctx, p_tgt, reduction="sum") / max(1, len(p_tgt))

        mean = average(h.detach(), is_content & ~is_masked_ctx)
        self.trace |= {"mean": mean, "z_hat": layer_norm(mean),
                       "z_tgt": pool(h_tgt, is_content & ~is_masked_tgt)}
        loss = diffusion + self.lambda_jepa * kl
        return loss, {"diffusion": diffusion.detach(), "consistency": kl.detach()}


class TwoGradients(Control):
    """LLM-JEPA's objective: the diffusion loss as ever, and the prompt predicts the answer, with
    gradient on both sides and no copy; only the diffusion loss keeps embeddings from collapsing."""

    def __init__(self, model, cfg: ControlConfig, **paper):
        super().__init__(model, cfg, **paper)
        del self.target

    def embed_targets(self, batches):
        return [None] * len(batches)            # both views have a gradient: computed in forward

    def update_target(self):
        pass

    def forward(self, x0, maskable, is_real, generator, z_tgt=None):
        is_answer = maskable
        maskable, is_content = self.scope(x0, maskable, is_real)
        t_ctx, xt_ctx, is_masked_ctx = self.context_view(x0, maskable, generator)

        # one pass over 2B rows; in the clean ones prompt and answer do not attend to each other
        device = self.model.embed.weight.device
        layout = Padded(None, device)
        attend = torch.cat([is_real[:, None].expand(*x0.shape, -1),
                            is_real[:, None] & (is_answer[:, None] == is_answer[..., None])])
        layout.attend = to_device(attend[:, None], device)                  # (2B, 1, T, T)
        h, h_apart = self.model.encode(torch.cat([xt_ctx, x0]), layout=layout).chunk(2)
        diffusion = self.diffusion_term(h, x0, is_masked_ctx, maskable, t_ctx)

        mean = average(h_apart, is_content & ~is_answer)                    # of the prompts (B, C)
        z_hat = self.predictor(layer_norm(mean))
        z_answer = pool(h_apart, is_content & is_answer)
        jepa = cosine_distance(z_hat, z_answer)
        self.trace |= {"mean": mean.detach(), "z_hat": z_hat.detach(), "z_tgt": z_answer.detach()}
        loss = diffusion + self.lambda_jepa * jepa
        return loss, {"diffusion": diffusion.detach(), "jepa": jepa.detach()}


class InfoNCE(Control):
    """Each row's prediction is nearer to its own target than to those of the other rows."""

    def __init__(self, model, cfg: ControlConfig, **paper):
        super().__init__(model, cfg, **paper)
        self.tau, self.every_target, self.distance = cfg.tau, None, self.infonce

    def embed_targets(self, batches):
        targets = super().embed_targets(batches)
        self.every_target = gather_batch(targets)                           # (B of the step, C)
        return targets

    def infonce(self, z_hat, z_tgt):
        """(B, C), (B, C) -> (): cross-entropy of a row's own target among those of the step."""
        # apart, because its column in `every` depends on the rank and the micro-batch
        own = F.cosine_similarity(z_hat.float(), z_tgt, dim=-1)             # (B,)
        every = F.normalize(z_hat.float(), dim=-1) @ F.normalize(self.every_target, dim=-1).T
        return ((every / self.tau).logsumexp(dim=-1) - own / self.tau).mean()


class Blockwise(DLLMJEPA):
    """Plain fine-tuning on one block of each answer: clean before it, all masked after it.
    `generator` has to be a list, one a row."""

    def __init__(self, model, cfg: ControlConfig, **paper):
        super().__init__(model, **paper)
        self.length, self.is_active = cfg.active_block, None

    def context_view(self, x0, maskable, generator):
        block = (maskable.cumsum(dim=1) - 1) // self.length                 # (B, T)
        n_blocks = block.amax(dim=1, keepdim=True) + 1                      # (B, 1)
        # a stream apart: in the block the masks stay those of plain
        apart = [torch.Generator(g.device).manual_seed(g.initial_seed() ^ 2) for g in generator]
        active = (uniform((len(x0), 1), apart, x0.device) * n_blocks).long()
        self.is_active = maskable & (block == active)
        t_ctx, xt_ctx, is_masked_ctx = super().context_view(x0, self.is_active, generator)
        is_after = maskable & (block > active)
        return t_ctx, xt_ctx.masked_fill(is_after, self.model.config.mask_id), is_masked_ctx

    def diffusion_term(self, h, x0, is_masked, maskable, t):
        # divided by the length of the block, not of the answer
        return super().diffusion_term(h, x0, is_masked, self.is_active, t)


class Anchor:
    """strength * |theta - base|^2 as part of the loss, by its gradient 2 * strength * (theta -
    base). params: of the model, {name: parameter}; base: {name: fp32 tensor}."""

    def __init__(self, params: dict, base: dict, strength: float):
        self.params, self.strength = list(params.values()), strength
        self.base = [base[name] for name in params]

    @torch.no_grad()
    def pull(self, measure: bool) -> dict:
        """Add it to the gradients of backward. measure: return {"anchor_ratio": |its gradient| /
        |the task's|}. Adam scales a weight's gradients alike, so where the task has none, as in
        the embedding rows of unused words, even a small pull moves at full speed."""
        squares = 0
        for i in range(0, len(self.params), 16):    # few kernel launches, few differences at once
            params = [local_part(p.detach()) for p in self.params[i:i + 16]]
            grads = [local_part(p.grad) for p in self.params[i:i + 16]]
            away = torch._foreach_sub(params, self.base[i:i + 16])
            if measure:
                squares = squares + torch.stack([
                    torch.stack(torch._foreach_norm(x)).square().sum() for x in (away, grads)])
            torch._foreach_add_(grads, away, alpha=2 * self.strength)
        if not measure:
            return {}
        away, task = sum_over_ranks(squares)        # ranks with equal parts do not change the ratio
        return {"anchor_ratio": 2 * self.strength * (away / task).sqrt()}

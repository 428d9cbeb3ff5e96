"""What the paper does not do, or only names: arms that tell which part of DLLM-JEPA does the work.

The paper's method is jepa.py, and with the default settings nothing here is called. All arms meet
the same batches and masks, for those depend on (seed, step, example id) alone.

    target      what z_hat has to be like
      ema         the EMA copy's embedding of the heavy view (paper)
      online      the online model's own, without gradient: the EMA with decay 0
      frozen      the embedding of the weights before training: the EMA with decay 1
      shuffled    the EMA's, of another row: each row of the batch gets that of the row before it
      mean        the mean of the EMA's over the rows of the batch, the same for each
      random      a fixed random vector for each example: no network is asked
                If shuffled does as well as ema, what helps is not a prediction about the example.
    masks       independent (paper), or nested: both views use the same u, the lighter masks are
                among the heavier, and with t_ctx = t_tgt the views are one text
    pool        which positions are embedded: visible (paper), answer_visible (those in scope),
                masked (each view's own), all_real (visible or not)
    pool_layer  after how many blocks; the final norm comes behind them all the same
    pred_width  of a bottleneck around the predictor;  pred_lr = 0 freezes it
    ema_dtype   bfloat16 shows that such a target stalls
    objective   what is added to the diffusion loss
      jepa            1 - cos(z_tgt, predictor(z_ctx)) (paper); with n_pred_layer = 0 it is the
                      consistency of the two embeddings
      consistency     of what the two views say, as in Mean Teacher: KL(p_tgt || p_ctx) at tokens
                      masked in both, the EMA's states read by the online head; no predictor
      two_gradients   LLM-JEPA (arXiv 2509.14252): prompt and answer, clean and each seen alone, are
                      the views; both pass the online model with gradient: 6F, no copy. LLM-JEPA
                      embeds a last token, we the mean; its predictor is k extra tokens, ours g
    anchor      lambda * |theta - base|^2 in the loss, the paper's other baseline (1e-4; that the
                square is summed and not averaged is our guess)

"Batch" is the batch of an optimizer step, over all ranks and micro-batches: the number of processes
changes no target. Shuffled and mean need no more of it than B vectors.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from jepa import DLLMJEPA, Predictor, average, cosine_distance, layer_norm, pool
from model import DLLM, Linear, Padded, diffusion_loss, forward_process, row_generators
from pretrained.device import to_device
from pretrained.weights import find_weights, read_model
from training.diagnostics import local, summed, this_ranks, whole_batch
from training.sharding import is_sharded, rows_here

# the paper's value of each, and what each of the other objectives makes no use of
PAPER = {"objective": "jepa", "target": "ema", "masks": "independent", "pool": "visible",
         "pool_layer": 0, "pred_width": 0, "pred_lr": 1.0, "ema_dtype": "float32"}
UNUSED = {"jepa": (), "consistency": ("pool", "pool_layer", "pred_width", "pred_lr"),
          "two_gradients": ("target", "masks", "pool", "pool_layer", "ema_dtype")}


def check_controls(cfg):
    """ValueError, one sentence, where settings exclude each other."""
    for name in ("pool_layer", "pred_width", "pred_lr", "anchor"):
        if not getattr(cfg, name) >= 0:
            raise ValueError(f"{name}={getattr(cfg, name)} must not be negative")
    for name in UNUSED[cfg.objective]:
        if getattr(cfg, name) != PAPER[name]:
            raise ValueError(f"objective={cfg.objective!r} makes no use of {name}="
                             f"{getattr(cfg, name)!r}; leave it at {PAPER[name]!r}")
    if cfg.objective == "consistency" and cfg.target not in ("ema", "online", "frozen"):
        raise ValueError(f"target={cfg.target!r} is a vector, and objective='consistency' compares "
                         f"tokens; choose ema, online or frozen")
    for name in ("pred_width", "pred_lr"):
        if getattr(cfg, name) != PAPER[name] and not cfg.n_pred_layer:
            raise ValueError(f"{name}={getattr(cfg, name):g} is of a predictor, and n_pred_layer=0 "
                             f"is none")
    if cfg.target == "random" and cfg.masks != "independent":
        raise ValueError(f"target='random' has no second view to be masked: it makes no use of "
                         f"masks={cfg.masks!r}")
    if cfg.target == "shuffled" and cfg.batch_size < 2:
        raise ValueError("target='shuffled' takes another row of the batch: batch_size must be at "
                         "least 2")
    if cfg.anchor and (cfg.lora_rank or cfg.optimizer == "lean"):
        raise ValueError(f"anchor={cfg.anchor:g} pulls at all weights in fp32: it needs "
                         f"lora_rank=0 and optimizer='adamw'")
    if cfg.anchor and not cfg.init_from and not cfg.compare:
        raise ValueError(f"anchor={cfg.anchor:g} pulls to the weights that init_from names; give "
                         f"one")


def has_control(cfg) -> bool:
    return cfg.lambda_jepa > 0 and any(getattr(cfg, name) != PAPER[name] for name in PAPER)


def make_control(model, cfg, paper: dict):
    """The arm that the settings ask for. paper: what DLLMJEPA is called with. Raises ValueError."""
    if cfg.pool_layer > len(model.blocks):
        raise ValueError(f"pool_layer={cfg.pool_layer} is more than the model's "
                         f"{len(model.blocks)} blocks")
    paper = paper | {"ema_decay": {"online": 0.0, "frozen": 1.0}.get(cfg.target, cfg.ema_decay)}
    if cfg.objective == "consistency":
        paper = paper | {"n_pred_layer": 0}
    kind = {"jepa": Control, "consistency": Consistency, "two_gradients": TwoGradients}
    return kind[cfg.objective](model, cfg, **paper)


class Control(DLLMJEPA):
    """The paper's objective with another target, masks, pool, layer or predictor."""

    def __init__(self, model, cfg, **paper):
        super().__init__(model, **paper)
        self.kind, self.masks, self.pool = cfg.target, cfg.masks, cfg.pool
        self.pool_layer = cfg.pool_layer % len(model.blocks)    # 0: the last, whose states are h
        self.ema_dtype = getattr(torch, cfg.ema_dtype)
        for name, p in self.target.named_parameters():
            if model.get_parameter(name).requires_grad:     # else the base of LoRA, which is shared
                p.data = p.data.to(self.ema_dtype)
        if cfg.pred_width:
            self.predictor = Bottleneck(model.config.n_embd, cfg.pred_width,
                                        len(self.predictor.blocks), self.seed)
        self.predictor.requires_grad_(cfg.pred_lr > 0)
        if self.pool_layer:
            self.target.blocks = self.target.blocks[:self.pool_layer]
            model.blocks[self.pool_layer - 1].register_forward_hook(
                lambda block, inputs, x: self.keep(x, rows=inputs[-1]))

    def keep(self, x, rows):
        self.kept = rows.unpack(self.model.norm(x))                         # (B, T, C)

    def states(self, h):
        return self.__dict__.pop("kept") if self.pool_layer else h  # or its graph outlives the step

    def embedded(self, is_masked, maskable, is_content):
        return is_content & {"visible": ~is_masked, "answer_visible": maskable & ~is_masked,
                             "masked": is_masked, "all_real": is_content}[self.pool]

    def mask_target(self, x0, maskable, generator):
        if self.masks == "independent":
            return super().mask_target(x0, maskable, generator)
        again = [torch.Generator(g.device).manual_seed(g.initial_seed()) for g in generator]
        self.draw_t_ctx(x0, again)              # before them, as in the context view
        t_tgt = torch.full((len(x0),), self.t_tgt, device=x0.device)
        return forward_process(x0, t_tgt, maskable, self.model.config.mask_id, again,
                               at_least_one=self.loss_form == "masked_mean")

    @torch.no_grad()
    def embed_targets(self, batches, n_at_once: int = 0):
        if self.kind == "random" and self.has_jepa(step=batches[0][-1]):
            return [self.random_targets(*batch[:3]) for batch in batches]
        z_tgt = super().embed_targets(batches, n_at_once)
        if z_tgt[0] is None or self.kind not in ("shuffled", "mean"):
            return z_tgt
        whole = whole_batch(list(z_tgt))                                    # (B of the step, C)
        whole = (whole.roll(1, dims=0) if self.kind == "shuffled"
                 else whole.mean(dim=0).expand_as(whole))
        return this_ranks(whole, len(z_tgt))

    def random_targets(self, x0, maskable, is_real):
        """A vector (B, C) as pool might give, by seed and content of the row, whatever its step."""
        _, is_content = self.scope(x0, maskable, is_real)
        content = [ids[where].tolist() for ids, where in zip(x0, is_content)]
        z = torch.stack([torch.randn(self.model.config.n_embd, generator=generator)
                         for generator in row_generators(self.seed, 0, content)])
        return layer_norm(to_device(z, self.model.embed.weight.device))

    def update_target(self, full=torch.Tensor.float):
        super().update_target(lambda p: full(p).to(self.ema_dtype))


class Bottleneck(nn.Module):
    """The predictor between two matrices: C -> width -> C, as I-JEPA's is narrower than its
    encoder."""

    def __init__(self, C: int, width: int, n_layer: int, seed: int = 0):
        super().__init__()
        self.down, self.up = Linear(C, width), Linear(width, C)
        self.inner = Predictor(width, n_layer, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=linear.in_features ** -0.5, generator=generator)
            nn.init.zeros_(linear.bias)

    def forward(self, z):
        return self.up(self.inner(self.down(z)))


class Consistency(Control):
    """The two views agree on tokens instead of embeddings."""

    def embed_targets(self, batches, n_at_once: int = 0):
        return [None] * len(batches)            # all tokens' states: a pass within forward

    def forward(self, x0, maskable, is_real, generator, step: int = 0, z_tgt=None):
        if not self.has_jepa(step):
            return super().forward(x0, maskable, is_real, generator, step)
        maskable, is_content = self.scope(x0, maskable, is_real)
        t_ctx, xt_ctx, is_masked_ctx = self.mask_context(x0, maskable, generator)
        xt_tgt, is_masked_tgt = self.mask_target(x0, maskable, generator)
        with torch.no_grad():
            h_tgt = self.target.encode(xt_tgt, is_real)
        h = self.model.encode(xt_ctx, is_real)
        nll = self.model.nll(h, x0, is_masked_ctx)
        diffusion = diffusion_loss(nll, is_masked_ctx, maskable, t_ctx, self.loss_form)

        both = is_masked_ctx & is_masked_tgt    # where there is none, the sum is 0, with a gradient
        with torch.no_grad():
            p_tgt = self.model.unembed(h_tgt, both).softmax(dim=-1)         # (N, V)
        log_p_ctx = self.model.unembed(h, both).log_softmax(dim=-1)
        kl = F.kl_div(log_p_ctx, p_tgt, reduction="sum") / max(1, len(p_tgt))

        mean = average(h.detach(), is_content & ~is_masked_ctx)
        self.seen = {"t": t_ctx, "is_masked": is_masked_ctx, "nll": nll.detach(), "mean": mean,
                     "z_hat": layer_norm(mean), "z_tgt": pool(h_tgt, is_content & ~is_masked_tgt)}
        return diffusion + self.lambda_jepa / self.jepa_rate * kl, {
            "diffusion": diffusion.detach(), "consistency": kl.detach()}


class TwoGradients(Control):
    """LLM-JEPA's objective: the diffusion loss as ever, and prompt predicts answer, with gradient
    on both sides and no copy; that the embeddings do not collapse is left to the diffusion loss."""

    def __init__(self, model, cfg, **paper):
        super().__init__(model, cfg, **paper)
        del self.target

    def embed_targets(self, batches, n_at_once: int = 0):
        return [None] * len(batches)

    def update_target(self, full=torch.Tensor.float):
        pass

    def forward(self, x0, maskable, is_real, generator, step: int = 0, z_tgt=None):
        if not self.has_jepa(step):
            return super().forward(x0, maskable, is_real, generator, step)
        is_answer = maskable
        maskable, is_content = self.scope(x0, maskable, is_real)
        t_ctx, xt_ctx, is_masked_ctx = self.mask_context(x0, maskable, generator)

        # one pass over 2B rows; in the clean ones prompt and answer do not see each other
        rows = Padded(None, self.model.embed.weight.device)
        sees = torch.cat([is_real[:, None].expand(*x0.shape, -1),
                          is_real[:, None] & (is_answer[:, None] == is_answer[..., None])])
        rows.attend = to_device(sees[:, None], self.model.embed.weight.device)  # (2B, 1, T, T)
        h, h_apart = self.model.encode(torch.cat([xt_ctx, x0]), rows=rows).chunk(2)
        nll = self.model.nll(h, x0, is_masked_ctx)
        diffusion = diffusion_loss(nll, is_masked_ctx, maskable, t_ctx, self.loss_form)

        mean = average(h_apart, is_content & ~is_answer)                    # of the prompts (B, C)
        z_hat = self.predictor(layer_norm(mean))
        z_answer = pool(h_apart, is_content & is_answer)
        jepa = cosine_distance(z_hat, z_answer)
        self.seen = {"t": t_ctx, "is_masked": is_masked_ctx, "nll": nll.detach(),
                     "mean": mean.detach(), "z_hat": z_hat.detach(), "z_tgt": z_answer.detach()}
        return diffusion + self.lambda_jepa / self.jepa_rate * jepa, {
            "diffusion": diffusion.detach(), "jepa": jepa.detach()}


# ----------------------------------------------------------------------------------------------
# the base that a run began from


def base_weights(model, cfg, anew: bool):
    """(name, fp32 tensor) of each weight, or of this rank's part of it, as the run began.

    anew: the model has gone on since (it was resumed), so they are read or drawn once more.
    """
    if not anew:
        for name, p in model.named_parameters():
            yield name, local(p).detach().float().clone()
        return
    rows = {name: rows_here(p) if is_sharded(model) else slice(None)
            for name, p in model.named_parameters()}
    if cfg.init_from:
        yield from read_model(find_weights(cfg.init_from, cfg.revision), model, torch.float32,
                              model.embed.weight.device, rows)
    else:
        fresh = DLLM(model.config).init_weights(torch.Generator().manual_seed(cfg.seed))
        for name, p in fresh.named_parameters():
            yield name, p.detach()[rows[name]].to(model.embed.weight.device)


class Anchor:
    """strength * |theta - base|^2 as part of the loss, by its gradient, 2 * strength * (theta -
    base). params: of the model, {name: parameter}; base: {name: fp32 tensor}."""

    def __init__(self, params: dict, base: dict, strength: float):
        self.params, self.strength = list(params.values()), strength
        self.base = [base[name] for name in params]

    @torch.no_grad()
    def pull(self, measure: bool) -> dict:
        """Adds it to the gradients that backward has left. measure: -> {"anchor_ratio": |its
        gradient| / |the task's|}. Adam scales a weight's gradients alike, so where the task has
        none, as in the rows of words that it never uses, even a small one pulls at full speed."""
        squares = 0
        for i in range(0, len(self.params), 16):        # few launches, and few differences at once
            params = [local(p.detach()) for p in self.params[i:i + 16]]
            grads = [local(p.grad) for p in self.params[i:i + 16]]
            away = torch._foreach_sub(params, self.base[i:i + 16])
            if measure:
                squares = squares + torch.stack([
                    torch.stack(torch._foreach_norm(x)).square().sum() for x in (away, grads)])
            torch._foreach_add_(grads, away, alpha=2 * self.strength)
        if not measure:
            return {}
        away, task = summed(squares)                    # equal ranks: the ratio stays
        return {"anchor_ratio": 2 * self.strength * (away / task).sqrt()}

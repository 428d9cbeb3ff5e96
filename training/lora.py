"""LoRA (arXiv 2106.09685): the base is frozen, and small adapters beside its matrices are trained.

    y = W x + (alpha / r) * b a x       W frozen;  a (r, in) random,  b (out, r) zero at the start

An 8B base in bf16 is 16 GB and needs neither gradients nor moments; the adapters, in fp32, are
about 1 % of it. JEPA's target then costs little memory: it shares the base, and its adapters are an
EMA of the online ones. That is not the EMA of the merged weights, because the mean of products is
not the product of means. The two differ by the covariance of b and a within the EMA's memory,

    EMA(b a) - EMA(b) EMA(a) = EMA((b - EMA(b)) (a - EMA(a)))

which is of second order in how far they moved; the lag that an EMA is made for is of first order.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import Linear
from pretrained.device import stream
from pretrained.weights import catalogue, published_name, read_tensors


class LoRALinear(Linear):
    """A Linear with its weight and bias frozen under their old names, plus lora_b @ lora_a."""

    def __init__(self, base, rank: int, scale: float, generator):
        super().__init__(base.in_features, base.out_features, bias=False, device="meta")
        self.weight, self.bias, self.scale = base.weight, base.bias, scale
        # the init of the LoRA paper's code, so that learning rates found elsewhere carry over
        a = torch.rand(rank, self.in_features, generator=generator) * 2 - 1
        device = base.weight.device
        self.lora_a = nn.Parameter((a * self.in_features ** -0.5).to(device))
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank, device=device))

    def forward(self, x):
        low = F.linear(x, self.lora_a.to(x.dtype)) * self.scale             # (..., r)
        return super().forward(x) + F.linear(low, self.lora_b.to(x.dtype))

    @torch.no_grad()
    def merged(self):
        """Return one Linear that computes the same: summed in fp32, rounded to the base's dtype."""
        linear = Linear(self.in_features, self.out_features, bias=False, device="meta")
        weight = self.weight.float() + self.scale * (self.lora_b @ self.lora_a)
        linear.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


def add_lora(model, rank: int, alpha: float, targets, seed: int):
    """Freeze the model and put an adapter beside each target, a Linear of Block, in each layer.

    Until the first step the model computes the same to the bit. Raises ValueError for an unknown
    target.
    """
    known = [name for name, module in model.blocks[0].named_children()
             if isinstance(module, Linear)]
    for name in targets:
        if name not in known:
            raise ValueError(f"lora_targets has {name!r}; there are {', '.join(known)}")
    model.requires_grad_(False)
    generator = stream(seed, "lora")
    for block in model.blocks:
        for name in targets:
            setattr(block, name, LoRALinear(getattr(block, name), rank, alpha / rank, generator))


def merge(model):
    """Return the model without adapters, on the CPU, frozen; it computes the same to round-off.

    Parameters without an adapter are shared if the model is on the CPU already. A model that has
    no adapter is returned as it is.
    """
    if not any(isinstance(module, LoRALinear) for module in model.modules()):
        return model
    on_cpu = {id(p): nn.Parameter(p.detach().cpu(), requires_grad=False)
              for p in model.parameters()}
    plain = copy.deepcopy(model, memo=on_cpu)
    for block in plain.blocks:
        for name, module in list(block.named_children()):
            if isinstance(module, LoRALinear):
                setattr(block, name, module.merged())
    return plain


def check_base(model, folder):
    """Raise ValueError unless base and adapters, merged, give the checkpoint in the folder; one
    matrix is compared. Adapters resumed on another base would be wrong without any sign of it."""
    name, linear = next((name, module) for name, module in model.named_modules()
                        if isinstance(module, LoRALinear))
    name = published_name(f"{name}.weight", model.published["model_type"])
    [(_, stored)] = read_tensors({name: catalogue(folder)[name]}, device=linear.weight.device)
    ours = linear.merged().weight.to(stored.dtype)
    rtol = 2 * torch.finfo(stored.dtype).eps                # other devices may round differently
    if not torch.allclose(ours, stored, rtol, atol=1e-6):
        raise ValueError(f"{folder} is not this base with its adapters; to resume, init_from and "
                         f"lora_alpha must be what they were")

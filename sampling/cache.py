"""Keep keys and values between forward passes, so that a pass computes a few tokens only.

A pass of the sampler reveals a few tokens and computes all of them again. With a cache only the
first pass of a block does: it stores the keys and values of every layer and token. The later passes
compute the tokens of the block and reuse what is stored (Fast-dLLM, arXiv 2505.22618):

    prefix   compute the block and what follows it, reuse what precedes it
    dual     compute the block, reuse what precedes and what follows it

For an autoregressive model this would be exact. Here every state depends on every token, so the
stored keys and values go stale as the block fills; the next block's first pass renews them, in
place, so that a CUDA graph finds them (sampling/graph.py).
`Cache` takes the place of `Padded` in DLLM.encode.

Fast-dLLM's sampler for Dream differs from ours: its first pass always reveals the block's first
token, because no later pass has the state before it, which scores it. We compute that state too.
"""
import torch

from model import Padded


class Cache:
    """Keys and values (B, H, T, D) of every layer."""

    def __init__(self, is_real, device):
        self.padded = Padded(is_real, device)
        self.layers, self.n_layers_read, self.columns = [], 0, None

    def compute(self, columns=None):
        """Compute these columns (B, L) in the next pass and reuse the other tokens' entries; None:
        compute all."""
        self.columns, self.n_layers_read = columns, 0

    def enter(self, xt, cos, sin):
        """(B, T) ids -> (B, L) ids, and the angles at their positions, (B, 1, L, D / 2)."""
        if self.columns is None:
            return xt, cos, sin
        return xt.gather(1, self.columns), cos[self.columns][:, None], sin[self.columns][:, None]

    def leave(self, x):
        return x

    def attention(self, q, k, v, is_gqa: bool):
        """q, k, v (B, H, L, D) of the computed columns -> (B, H, L, D); attends to all T tokens."""
        if self.n_layers_read == len(self.layers):      # the first pass of all
            self.layers.append((k, v))
        stored = self.layers[self.n_layers_read]
        self.n_layers_read += 1
        for old, new in zip(stored, (k, v)):
            if self.columns is None:
                old.copy_(new)
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                old[rows, :, self.columns] = new.transpose(1, 2)            # (B, L, H, D)
        return self.padded.attention(q, *stored, is_gqa)

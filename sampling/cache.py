"""Keys and values that are kept between passes, so that a pass may read a few tokens alone.

A sampler's pass changes a few tokens and reads all of them again. With a cache only the first pass
of a block does: it keeps the keys and values of every layer and token, and those that follow
compute the tokens of the block alone, against what was kept (Fast-dLLM, arXiv 2505.22618):

    prefix   the block and what follows it are computed, what precedes it is kept
    dual     the block is computed, what precedes and what follows it is kept

In an autoregressive model that would be exact. Here every state depends on every token, so what was
kept goes stale as the block fills, and is refreshed as the next block begins. `Cache` takes the
place of `Padded` in DLLM.encode.
"""
import torch

from model import Padded


class Cache:
    """Keys and values of B rows of T tokens, every layer's (B, H, T, D)."""

    def __init__(self, is_real, device):
        self.padded = Padded(is_real, device)
        self.layers, self.n_layers_read, self.columns = [], 0, None

    def compute(self, columns):
        """The next pass computes columns (B, L); of the other tokens it takes what is kept."""
        self.columns, self.n_layers_read = columns, 0
        self.rows = torch.arange(len(columns), device=columns.device)[:, None]

    def pack(self, xt, cos, sin):
        """(B, T) ids -> (B, L) of them, and the angles of where they stand (B, 1, L, D / 2)."""
        if self.columns is None:
            return xt, cos, sin
        return xt.gather(1, self.columns), cos[self.columns][:, None], sin[self.columns][:, None]

    def unpack(self, x):
        return x

    @torch.compiler.disable             # it counts the layers
    def attention(self, q, k, v):
        """q (B, H, L, D), k and v of the same columns -> (B, H, L, D), each to all T tokens."""
        if self.columns is None:
            self.layers.append((k, v))
            return self.padded.attention(q, k, v)
        kept = self.layers[self.n_layers_read]
        self.n_layers_read += 1
        for old, new in zip(kept, (k, v)):
            old[self.rows, :, self.columns] = new.transpose(1, 2)           # (B, L, H, D)
        return self.padded.attention(q, *kept)

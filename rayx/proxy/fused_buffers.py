"""The memory of `rayx.proxy.fused`: made once for slices of a size, written over at every step.

Legend: N tokens of a slice, B its sequences, T context, D width. "d" before a name is the loss's
gradient by it.
"""

from __future__ import annotations

from functools import partial

import torch

from rayx.spec import ModelShape


class LayerBuffers:
    """What the backward pass needs of one layer."""

    def __init__(self, shape: ModelShape, sequences: int, dtype: torch.dtype) -> None:
        new = partial(torch.empty, dtype=dtype)
        length, width, heads = shape.context, shape.width, shape.heads
        tokens = sequences * length
        self.x_ND, self.rate_N1 = new(tokens, width), new(tokens, 1)
        self.turned = new(2, sequences, heads, 2, width // heads // 2, length)
        self.q, self.k = self.turned.view(2, sequences * heads, width // heads, length).unbind()
        self.v_BDT, self.mixed_BDT = (new(sequences, width, length) for _ in range(2))
        self.v, self.mixed = (x.view(self.q.shape) for x in (self.v_BDT, self.mixed_BDT))
        self.weights = new(sequences * heads, length, length)  # queries, keys; not normalised
        self.sums = new(sequences * heads, length, 1)
        self.ffn_x_ND, self.ffn_rate_N1 = new(tokens, width), new(tokens, 1)
        self.gate_up = new(tokens, 2 * shape.ffn_width)
        self.gate, self.up = self.gate_up.chunk(2, dim=1)
        self.silu, self.hidden = (new(tokens, shape.ffn_width) for _ in range(2))


class Buffers:
    """Room for a slice of so many sequences."""

    def __init__(self, shape: ModelShape, sequences: int, dtype: torch.dtype) -> None:
        new = partial(torch.empty, dtype=dtype)
        length, width, heads = shape.context, shape.width, shape.heads
        tokens = sequences * length
        self.layers = [LayerBuffers(shape, sequences, dtype) for _ in range(shape.layers)]
        self.x, self.normed, self.scaled, self.dx, self.dnormed, self.scratch = (
            new(tokens, width) for _ in range(6)
        )
        # Sums over so few numbers are slow in torch; a product with a column of 1/D gives the mean.
        self.mean_D1 = torch.full((width, 1), 1 / width, dtype=dtype)
        self.rate_N1, self.column_N1, self.loss_N1 = (new(tokens, 1) for _ in range(3))
        self.qk_BDT = new(sequences, 2 * width, length)
        self.halves = self.qk_BDT.view(sequences, 2, heads, 2, width // heads // 2, length)
        self.dv_BDT, self.dmixed_BDT = (new(sequences, width, length) for _ in range(2))
        by_head = (sequences * heads, width // heads, length)
        self.dv, self.dmixed, self.product = (
            self.dv_BDT.view(by_head), self.dmixed_BDT.view(by_head), new(by_head),
        )  # fmt: skip
        self.d_turned = new(self.layers[0].turned.shape)
        self.dq, self.dk = self.d_turned.view(2, *by_head).unbind()
        self.dweights = new(sequences * heads, length, length)
        self.delta = new(sequences * heads, 1, length)
        self.d_gate_up = new(tokens, 2 * shape.ffn_width)
        self.d_gate, self.d_up = self.d_gate_up.chunk(2, dim=1)
        self.d_hidden = new(tokens, shape.ffn_width)

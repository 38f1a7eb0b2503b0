"""Where an operator reads a tensor of all experts: in memory, or from files slice by slice.

Legend: K experts, N elements of a tensor, S elements of a slice, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

MASK_BLOCK = 1 << 16  # elements that one draw of DARE's mask covers; slices are multiples of it
SLICE = 1 << 23  # elements of all experts together that are read at once

# (experts_KS, base_S, weights_CK, first element of the slice) -> merged_CS
Combine = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class Source(Protocol):
    """One tensor of all experts and of their base, flattened, in the dtype of the arithmetic."""

    name: str
    experts: int  # K
    numel: int  # N

    def expert(self, k: int, start: int, stop: int) -> Tensor:
        """Return elements of one expert, shape (S,)."""
        ...

    def base(self, start: int, stop: int) -> Tensor:
        """Return the same elements of the base."""
        ...


class Stacked:
    """A tensor of all experts in memory, as a `Source`."""

    def __init__(self, name: str, experts_KN: Tensor, base_N: Tensor | None) -> None:
        self.name, self.experts_KN, self.base_N = name, experts_KN, base_N
        self.experts, self.numel = experts_KN.shape

    def expert(self, k: int, start: int, stop: int) -> Tensor:
        """Return elements of one expert."""
        return self.experts_KN[k, start:stop]

    def base(self, start: int, stop: int) -> Tensor:
        """Return elements of the base; zeros where there is none, for operators without one."""
        if self.base_N is None:
            return self.experts_KN.new_zeros(stop - start)
        return self.base_N[start:stop]


def work_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def slices(source: Source) -> list[tuple[int, int]]:
    size = max(MASK_BLOCK, SLICE // source.experts // MASK_BLOCK * MASK_BLOCK)
    return [(at, min(at + size, source.numel)) for at in range(0, source.numel, size)]


def gram(source: Source) -> np.ndarray:
    """Return the inner products of the experts, shape (K, K), summed in float64."""
    gram_KK = np.zeros((source.experts, source.experts))
    for start, stop in slices(source):
        rows = [source.expert(k, start, stop).double() for k in range(source.experts)]
        experts_KS = torch.stack(rows)
        gram_KK += (experts_KS @ experts_KS.T).cpu().numpy()
    return gram_KK

"""R&B, its balance step: weights from the products of the domains' last-layer gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.policies.mirror import ascend, check, floored, tells_apart
from rayx.policy import OVER, Block, Blocks, Gradients, Setting
from rayx.recipe import require


@dataclass(frozen=True, slots=True, kw_only=True)
class RB:
    """Weights overwritten by a softmax: p <- softmax(sharpness G p / |G p|), G_ij = <g_i, g_j>.

    Attributes:
        sharpness: lambda, > 0; entries of G p / |G p| are about K^-1/2.
        every_steps: Steps between updates.
        sequences: Of each of the K batches of a measurement.
        over: Parameters that count, see rayx.policy.Gradients.
        floor: Least weight, as a share of the uniform one.

    Source: R&B, arXiv:2505.00358 (from notes on the paper; its regrouping of domains is left out).
    Differs: gradients are those of fresh batches, once every `every_steps` steps, not accumulated
        while training: mean gradients G_ij as published, from fewer texts.
    """

    name: ClassVar[str] = "rb"
    sharpness: float = 1.0
    every_steps: int = 100
    sequences: int = 8
    over: str = "last"
    floor: float = 1e-3

    def __post_init__(self) -> None:
        counts = ("every_steps", "sequences")
        check(self, counts=counts, positive=("sharpness",), shares=("floor",))
        require(self.over in OVER, "RB.over", self.over, f"one of {', '.join(OVER)}")

    def blocks(self, setting: Setting) -> Blocks:
        """Yield blocks of `every_steps` steps."""
        weights_K = setting.prior_K
        ones_K = np.ones(len(weights_K))
        signal = Gradients(sources=setting.each, sequences=self.sequences, over=self.over)
        for step in range(self.every_steps, setting.steps, self.every_steps):
            products_KK = yield Block(weights_K, self.every_steps, signal)
            along_K = products_KK @ weights_K
            if tells_apart(along_K, self.name, step):
                score_K = along_K / np.linalg.norm(along_K)
                weights_K = floored(ascend(ones_K, score_K, self.sharpness), self.floor)
        yield Block(weights_K, setting.steps)

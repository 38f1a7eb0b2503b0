"""DoReMi: weight goes to domains where the run is furthest behind a reference model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.policies.mirror import ascend, blend, check, tells_apart
from rayx.policy import Block, Blocks, Excess, Setting
from rayx.recipe import require
from rayx.spec import Parent


@dataclass(frozen=True, slots=True, kw_only=True)
class DoReMi:
    """Mirror ascent on excess losses (group distributionally robust optimisation).

    p_j <- p_j exp(eta excess_j) / sum, then p <- (1 - smoothing) p + smoothing / K.

    Attributes:
        reference: State of a run that was trained on a fixed mixture.
        eta: Of one update, per nat.
        smoothing: Share of the uniform mixture in every p.
        every_steps: Steps between updates.
        sequences: Of each of the K batches of a measurement.

    Source: Xie et al. 2023, arXiv:2305.10429, algorithm 1; released code.
    Differs: domains are sampled by p, not uniformly with the loss weighted; an update every
        `every_steps` steps, not every step. The published weights are the average over a run, for
        a second one: `Record.mixture`.
    """

    name: ClassVar[str] = "doremi"
    reference: Parent
    eta: float = 1.0
    smoothing: float = 1e-3
    every_steps: int = 100
    sequences: int = 8

    def __post_init__(self) -> None:
        check(self, counts=("every_steps", "sequences"), positive=("eta",), shares=("smoothing",))
        ok = isinstance(self.reference, Parent)
        require(ok, "DoReMi.reference", self.reference, "a Parent: a run and its steps")

    def blocks(self, setting: Setting) -> Blocks:
        """Yield blocks of `every_steps` steps."""
        weights_K = setting.prior_K
        uniform_K = np.full(len(weights_K), 1.0 / len(weights_K))
        signal = Excess(reference=self.reference, sources=setting.each, sequences=self.sequences)
        for step in range(self.every_steps, setting.steps, self.every_steps):
            excess_K = yield Block(weights_K, self.every_steps, signal)
            if tells_apart(excess_K, self.name, step):
                weights_K = blend(ascend(weights_K, excess_K, self.eta), uniform_K, self.smoothing)
        yield Block(weights_K, setting.steps)

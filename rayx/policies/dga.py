"""DGA, dynamic gradient alignment: more of the domains whose gradient points as a specific set's.

Source: Fan, Grangier and Ablin 2024, arXiv:2410.02498, algorithm 1, distribution reweighting; read
    in notes on the paper.
Differs: plus eta, where the printed algorithm is said to have minus: one step of SGD on a mixture
    changes L_spe by -lr sum_i alpha_i a_i, so that weights must rise with a; scores are cosines, or
    inner products over a running scale (derived); a floor (derived).

Legend: K domains, N sources (the domains, or the basis), P probes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.mixture import Mixture
from rayx.policies.mirror import (
    ascend,
    blend,
    check,
    floored,
    running_scale,
    scores,
    tells_apart,
)
from rayx.policy import Block, Blocks, Gradients, Probe, Setting
from rayx.recipe import require


@dataclass(frozen=True, slots=True, kw_only=True)
class DGA:
    """Mirror ascent on the alignment of gradients; every `every_steps` steps

        a_i = <grad L(x_i), grad L(x_spe)>
        new_i ~ alpha_i exp(eta a_i)
        alpha <- (1 - ema) alpha + ema new      (ema = 0: alpha <- new)

    One measurement costs (N + P) sequences / (every_steps batch) of the training between two.

    Attributes:
        specific: The specific set: its text, with equal weight.
        eta: Step, > 0, on cosines or on inner products in units of their spread.
        ema: Share of the new weights, in [0, 1]; 0 takes them as they are, the paper has .1.
        floor: Least weight of a source.
        every_steps: Optimizer steps between measurements.
        sequences: Of a batch that a gradient is measured on.
        cosine: Whether scores are cosines.
        over: Parameters that count, see rayx.policy.Gradients.
        basis: Mixtures h_j of the domains; weights w over them stand for one weight a domain,
            alpha = sum_j w_j h_j, for thousands of domains. w starts equal, not from the prior.
    """

    name: ClassVar[str] = "dga"
    specific: tuple[Probe, ...]
    eta: float = 5.0
    ema: float = 0.0
    floor: float = 1e-4
    every_steps: int = 100
    sequences: int = 8
    cosine: bool = True
    over: str = "all"
    basis: tuple[Mixture, ...] = ()

    def __post_init__(self) -> None:
        ok = isinstance(self.specific, tuple) and all(isinstance(p, Probe) for p in self.specific)
        require(ok and bool(self.specific), "DGA.specific", self.specific, "a tuple of Probes")
        check(self, counts=("every_steps",), positive=("eta",), shares=("ema", "floor"))
        require(isinstance(self.cosine, bool), "DGA.cosine", self.cosine, "True or False")
        ok = isinstance(self.basis, tuple) and all(isinstance(m, Mixture) for m in self.basis)
        require(ok and len(self.basis) != 1, "DGA.basis", self.basis, "two Mixtures or more, or ()")
        self._signal(self.basis or (Mixture({"any": 1}),))  # checks the rest

    def _signal(self, sources: tuple[Mixture, ...]) -> Gradients:
        return Gradients(
            sources=sources, probes=self.specific, sequences=self.sequences, over=self.over
        )

    def blocks(self, setting: Setting) -> Blocks:
        """Yield the mixture of the next `every_steps` steps.

        Raises:
            SpecError: The floor leaves no choice, or the basis has a domain that the prior lacks.
        """
        sources = self.basis or setting.each
        count = len(sources)
        require(self.floor * count < 1, "DGA.floor", self.floor, f"below 1/{count}, of {count}")
        for mixture in sources:
            mixture.check(setting.domains, "the prior of the run")
        basis_NK = np.stack([mixture.to_array(setting.domains) for mixture in sources])
        weights_N = np.full(count, 1.0 / count) if self.basis else setting.prior_K
        # The specific set's gradient is the mean of its probes'.
        mean_P = np.full(len(self.specific), 1.0 / len(self.specific))
        fold = np.zeros((count + 1, count + len(self.specific)))
        fold[:count, :count], fold[count, count:] = np.eye(count), mean_P
        scale, step, signal = None, 0, self._signal(sources)
        while True:
            products = yield Block(weights_N @ basis_NK, self.every_steps, signal)
            step += self.every_steps
            folded = fold @ products @ fold.T
            if not tells_apart(folded[:count, count], "DGA", step):
                continue
            score_N = scores(folded, self.cosine)[:count, count]
            if not self.cosine:
                scale = running_scale(scale, score_N)
                score_N = score_N / scale
            new_N = ascend(weights_N, score_N, self.eta)
            weights_N = floored(blend(weights_N, new_N, self.ema or 1.0), self.floor * count)

"""DoGE: weight goes to domains whose gradient points where all losses fall."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.mixture import Mixture
from rayx.policies.mirror import ascend, check, floored, tells_apart
from rayx.policy import PARTS, Block, Blocks, Gradients, Setting
from rayx.recipe import require

CLIP = 5.0  # of a score, as published; the lower end is 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DoGE:
    """Mirror ascent on inner products of gradients.

    score_j = clip(<g_j, sum_i t_i g_i'> / mean_k |g_k|, 0, 5), p_j <- p_j exp(eta score_j) / sum:
    g_j the gradient of training text of domain j, g_i' of the probe of domain i, both clipped to
    norm 1, t the probe's weight.

    Attributes:
        eta: Of one update: every_steps * lr / mu in the paper's terms, .5 (mu .1) to 5 (mu .01).
        every_steps: Steps between updates.
        sequences: Of each of the 2 K batches of a measurement.
        target: Domain -> weight of its loss; None for 1 each.
        part: Of the probes.
        floor: Least weight, as a share of the uniform one.

    Source: Fan, Pagliardini and Jaggi 2024, arXiv:2310.15393; released code.
    Differs: domains are sampled by p, not uniformly with the loss weighted; an update every
        `every_steps` steps. The published weights are the average over a run, for a second one:
        `Record.mixture`.
    """

    name: ClassVar[str] = "doge"
    eta: float = 1.0
    every_steps: int = 100
    sequences: int = 8
    target: Mixture | None = None
    part: str = "first"
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check(self, counts=("every_steps", "sequences"), positive=("eta",), shares=("floor",))
        require(self.part in PARTS, "DoGE.part", self.part, f"one of {', '.join(PARTS)}")
        ok = self.target is None or isinstance(self.target, Mixture)
        require(ok, "DoGE.target", self.target, "a Mixture or None")

    def blocks(self, setting: Setting) -> Blocks:
        """Yield blocks of `every_steps` steps."""
        domains, weights_K = setting.domains, setting.prior_K
        target = self.target or Mixture.uniform(domains)
        target_K = len(domains) * target.to_array(domains)
        signal = Gradients(
            sources=setting.each,
            probes=setting.probes(self.part),
            sequences=self.sequences,
        )
        for step in range(self.every_steps, setting.steps, self.every_steps):
            products_NN = yield Block(weights_K, self.every_steps, signal)
            score_K = scores(products_NN, target_K)
            if tells_apart(score_K, self.name, step):
                weights_K = floored(ascend(weights_K, score_K, self.eta), self.floor)
        yield Block(weights_K, setting.steps)


def scores(products_NN: np.ndarray, target_K: np.ndarray) -> np.ndarray:
    """Return each domain's score, shape (K,), in [0, 5]: see `DoGE`.

    Args:
        products_NN: Inner products of K training gradients and K probe gradients, (2 K, 2 K).
        target_K: Weight of each probe's loss, shape (K,).
    """
    num = len(target_K)
    norm_N = np.sqrt(np.maximum(np.diag(products_NN), 0.0))
    clip_N = 1.0 / np.maximum(norm_N, 1.0)
    along_K = clip_N[:num] * (products_NN[:num, num:] @ (clip_N[num:] * target_K))
    mean = (clip_N * norm_N)[:num].mean()
    return np.clip(along_K / mean, 0.0, CLIP) if mean > 0 else np.zeros(num)

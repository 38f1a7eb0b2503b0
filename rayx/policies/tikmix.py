"""TiKMiX: mixtures from the influence of each domain on each target, set while a run trains.

`TiKMiXD` measures the influence now and then and solves for the weights; `InfluenceSurvey` only
measures, for `rayx.methods.tikmix`. `dynamic_weights` is the solver of both.

Legend: P targets, K domains, S sources, M mixtures.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from rayx.errors import ChoiceError
from rayx.mixture import Mixture
from rayx.policies.mirror import FLAT
from rayx.policy import Block, Blocks, Influence, Probe, Setting
from rayx.recipe import is_number, require

log = logging.getLogger(__name__)

TOLERANCE = 1e-7  # of the Pareto bounds, in units of normalised influence
SMALL = 1e-12  # keeps the logarithm of a share and the slope of a deviation finite


def check_influence(
    influence_PS: np.ndarray, targets: Sequence[str], sources: Sequence[str]
) -> None:
    """Raise ChoiceError where an influence is not finite, naming target and source."""
    for p, s in np.argwhere(~np.isfinite(influence_PS))[:1]:
        raise ChoiceError(
            f"The influence of {sources[s]} on target {targets[p]} is {influence_PS[p, s]}; "
            "expected a finite number. Raise the damping, or lower the learning rate."
        )


def scales(influence_PK: np.ndarray) -> np.ndarray:
    """Return what each target's influences are divided by: max_j |S_pj|, 1 for a row of zeros.

    Source: TiKMiX, arXiv:2508.17677, P^_i = P_i / (max_j S_ij + 1e-8).
    Differs: the absolute value, for where all domains harm a target the sign would turn; no 1e-8,
        which has a unit.
    """
    scale_P = np.abs(influence_PK).max(axis=1)
    return np.where(scale_P > 0, scale_P, 1.0)


def penalty(
    mixed_MP: np.ndarray, weights_MK: np.ndarray, alpha: float, beta: float, gamma: float
) -> np.ndarray:
    """Return what TiKMiX minimises, alpha std(P^) - beta sum(P^) - gamma H(w), shape (M,).

    Args:
        mixed_MP: P^, normalised influence of each mixture on each target.
        weights_MK: w, >= 0, sum 1; H is the entropy in nats.
        alpha: Price of unequal gains, >= 0.
        beta: Worth of a gain, >= 0.
        gamma: Worth of diversity, >= 0.

    Source: TiKMiX, arXiv:2508.17677.
    """
    safe_MK = np.maximum(weights_MK, SMALL)
    entropy_M = -(weights_MK * np.log(safe_MK)).sum(axis=1)
    return alpha * mixed_MP.std(axis=1) - beta * mixed_MP.sum(axis=1) - gamma * entropy_M


# Small systems: on a busy machine threads of BLAS wait for each other (.02 s became 1 s).
@threadpool_limits.wrap(limits=1)
def dynamic_weights(
    influence_PK: np.ndarray,
    prior_K: np.ndarray,
    alpha: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
) -> np.ndarray:
    """Return TiKMiX-D's mixture: argmin `penalty` with S w >= S prior, w on the simplex.

    A convex problem, solved by SLSQP from uniform. The prior always keeps the bounds; it is
    returned where nothing that keeps them is better, and where no target tells domains apart (there
    the penalty is entropy alone, and would move to uniform without any evidence).

    Args:
        influence_PK: S, shape (P, K), higher is better, any unit a row.
        prior_K: The weights now, shape (K,), >= 0, sum > 0.
        alpha: As for `penalty`.
        beta: As for `penalty`.
        gamma: As for `penalty`.

    Returns:
        Weights, shape (K,), >= 0, sum 1; no target gets less influence than from the prior, to 1e-7
        of its largest influence.

    Raises:
        ChoiceError: An influence is not finite.

    Source: TiKMiX, arXiv:2508.17677 (TiKMiX-D).
    """
    influence_PK = np.asarray(influence_PK, dtype=np.float64)
    num_targets, num_domains = influence_PK.shape
    check_influence(influence_PK, [f"{p}" for p in range(num_targets)],
                    [f"domain {k}" for k in range(num_domains)])  # fmt: skip
    prior_K = np.asarray(prior_K, dtype=np.float64) / np.sum(prior_K)
    scaled_PK = influence_PK / scales(influence_PK)[:, None]
    if np.ptp(scaled_PK, axis=1).max() <= FLAT:
        log.warning("TiKMiX: no target's influence differs between domains; the weights stay.")
        return prior_K

    def value(weights_K: np.ndarray) -> float:
        mixed_P = scaled_PK @ weights_K
        return float(penalty(mixed_P[None], weights_K[None], alpha, beta, gamma)[0])

    def slope(weights_K: np.ndarray) -> np.ndarray:
        mixed_P = scaled_PK @ weights_K
        away_P = mixed_P - mixed_P.mean()
        std_P = away_P / (num_targets * max(mixed_P.std(), SMALL))
        entropy_K = np.log(np.maximum(weights_K, SMALL)) + 1.0
        return scaled_PK.T @ (alpha * std_P - beta) + gamma * entropy_K

    ones_K = np.ones(num_domains)
    for start_K in (ones_K / num_domains, prior_K):  # the second where the first leads nowhere
        found = minimize(
            value,
            start_K,
            jac=slope,
            method="SLSQP",
            bounds=[(0.0, 1.0)] * num_domains,
            constraints=[
                {"type": "eq", "fun": lambda w_K: w_K.sum() - 1.0, "jac": lambda _: ones_K},
                {
                    "type": "ineq",
                    "fun": lambda w_K: scaled_PK @ (w_K - prior_K),
                    "jac": lambda _: scaled_PK,
                },
            ],
            options={"maxiter": 500, "ftol": 1e-10},
        )
        weights_K = np.maximum(found.x, 0.0) / np.maximum(found.x, 0.0).sum()
        kept = (scaled_PK @ (weights_K - prior_K)).min() >= -TOLERANCE
        if kept and value(weights_K) < value(prior_K) - TOLERANCE:
            return weights_K
    return prior_K


@dataclass(frozen=True, slots=True, kw_only=True)
class _Measurement:
    """How influence is measured.

    Attributes:
        targets: What is influenced; empty for the domains.
        part: Of the targets' text, see Probe.
        probe_sequences: Of a target.
        sequences: Of a source.
        curvature: See Influence.
        damping: See Influence.
    """

    targets: tuple[str, ...] = ()
    part: str = "first"
    probe_sequences: int = 64
    sequences: int = 32
    curvature: str = "diagonal"
    damping: float = 0.1

    def __post_init__(self) -> None:
        self.signal((Mixture({"any": 1}),), self.targets or ("any",))  # its own checks

    def signal(self, sources: tuple[Mixture, ...], targets: Sequence[str]) -> Influence:
        """Return the signal of these sources on these targets."""
        probes = [Probe(target=t, part=self.part, sequences=self.probe_sequences) for t in targets]
        return Influence(
            sources=sources,
            probes=tuple(probes),
            sequences=self.sequences,
            curvature=self.curvature,
            damping=self.damping,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TiKMiXD(_Measurement):
    """TiKMiX-D online: at each share of the run, influence of each domain, then new weights.

    Attributes:
        every_share: Steps between measurements, as a share of the run, in (0, 1). The prior holds
            until the first.
        alpha: Price of unequal gains, see `penalty`.
        beta: Worth of a gain.
        gamma: Worth of diversity.

    Source: TiKMiX, arXiv:2508.17677 (setup: re-mixed every fifth of the run).
    """

    name: ClassVar[str] = "tikmix-d"
    every_share: float = 0.2
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _Measurement.__post_init__(self)
        ok = is_number(self.every_share) and 0 < self.every_share < 1
        require(ok, "TiKMiXD.every_share", self.every_share, "a share in (0, 1)")
        for name in ("alpha", "beta", "gamma"):
            value = getattr(self, name)
            require(is_number(value) and value >= 0, f"TiKMiXD.{name}", value, "a number >= 0")

    def blocks(self, setting: Setting) -> Blocks:
        targets = self.targets or setting.domains
        signal = self.signal(setting.each, targets)
        weights_K = setting.prior_K
        every = max(1, round(self.every_share * setting.steps))
        for _ in range(every, setting.steps - every // 2, every):  # not just before the end
            influence_PK = yield Block(weights_K, every, signal)
            check_influence(influence_PK, targets, setting.domains)
            weights_K = dynamic_weights(influence_PK, weights_K, self.alpha, self.beta, self.gamma)
        yield Block(weights_K, every)


@dataclass(frozen=True, slots=True, kw_only=True)
class InfluenceSurvey(_Measurement):
    """Train on the prior and measure influence once; the last decision of the record holds it.

    Attributes:
        sources: Whose influence; empty for each domain alone.
        at_share: When, as a share of the run, in (0, 1).
    """

    name: ClassVar[str] = "influence-survey"
    sources: tuple[Mixture, ...] = ()
    at_share: float = 0.8

    def __post_init__(self) -> None:
        _Measurement.__post_init__(self)
        ok = all(isinstance(source, Mixture) for source in self.sources)
        require(ok, "InfluenceSurvey.sources", self.sources, "a tuple of Mixtures")
        ok = is_number(self.at_share) and 0 < self.at_share < 1
        require(ok, "InfluenceSurvey.at_share", self.at_share, "a share in (0, 1)")

    def blocks(self, setting: Setting) -> Blocks:
        signal = self.signal(self.sources or setting.each, self.targets or setting.domains)
        steps = min(setting.steps - 1, max(1, round(self.at_share * setting.steps)))
        yield Block(setting.prior_K, steps, signal)
        yield Block(setting.prior_K, setting.steps - steps)

"""Omega searches: which weights of distribution vectors DEM tries, in rounds.

Shapes: K sources, C candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayx.fit.linear import loo_ridge
from rayx.spec import require

MOST = 4096  # candidates of a grid
POOL = 4096  # candidates that the regressor predicts
JITTER = 0.4  # sd of the logarithm of omega around the best, divided by the number of the round
APART = 0.05  # L1 distance of two candidates of a round, as a share of their sum


@dataclass(frozen=True, slots=True, kw_only=True)
class OmegaSearch:
    """Which omegas are tried.

    Args:
        how: `grid`: all combinations; `random`: as many different draws as `rounds` add up to, or
            as there are; `guided`: the
            first round is drawn, later ones lie near the best and are predicted to be best by a
            quadratic of omega, fitted to all so far.
        values: What each omega is taken from, or source -> its own values. One value is fixed; a
            range is np.linspace.
        scales: Draws are divided by their sum and multiplied by one of these, and the first
            candidates are equal omegas that sum to each; () leaves draws as they are.
        rounds: Candidates of each round.
        seed: Of the draws.
    """

    how: str = "guided"
    values: tuple[float, ...] | Mapping[str, tuple[float, ...]] = (0.0, 0.25, 0.5, 0.75, 1.0)
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    rounds: tuple[int, ...] = (24, 12, 12)
    seed: int = 0

    def __post_init__(self) -> None:
        ways = ("grid", "random", "guided")
        require(self.how in ways, "OmegaSearch.how", self.how, f"one of {', '.join(ways)}")
        own = self.values.values() if isinstance(self.values, Mapping) else [self.values]
        good = all(values and min(values) >= 0 for values in own) and any(map(any, own))
        require(good, "OmegaSearch.values", self.values, "numbers >= 0, not all 0")
        require(all(scale > 0 for scale in self.scales), "OmegaSearch.scales", self.scales, "> 0")
        counts = bool(self.rounds) and min(self.rounds) > 0
        require(counts, "OmegaSearch.rounds", self.rounds, "counts > 0")

    def first(self, sources: tuple[str, ...]) -> np.ndarray:
        """Return the first round, shape (C, K), >= 0.

        Raises:
            SpecError: A source has no values, or the grid has too many points.
        """
        if isinstance(self.values, Mapping):
            missing = sorted(set(sources) - set(self.values))
            require(not missing, "Sources without OmegaSearch.values", missing, "none")
        own = [self.values[s] if isinstance(self.values, Mapping) else self.values for s in sources]
        if self.how == "grid":
            num = int(np.prod([len(values) for values in own]))
            require(num <= MOST, "The number of omegas in the grid", num,
                    f"at most {MOST}; take fewer values, or a random search")  # fmt: skip
            omega_CK = np.array(list(itertools.product(*own)))
            return omega_CK[omega_CK.any(axis=1)]
        num = self.rounds[0] if self.how == "guided" else sum(self.rounds)
        rng = np.random.default_rng(self.seed)
        flat_CK = np.outer(self.scales, np.ones(len(own)) / len(own)).reshape(-1, len(own))
        found = {tuple(np.round(omega_K, 9)): omega_K for omega_K in flat_CK[:num]}
        for _ in range(100 * num):  # few values may have fewer combinations
            if len(found) == num:
                break
            omega_K = np.array([rng.choice(values) for values in own])
            if omega_K.any():
                if self.scales:
                    omega_K = omega_K / omega_K.sum() * rng.choice(self.scales)
                found.setdefault(tuple(np.round(omega_K, 9)), omega_K)
        return np.array(list(found.values()))

    def later(self, number: int, omega_CK: np.ndarray, loss_C: np.ndarray) -> np.ndarray:
        """Return round `number` (1 is the second) of a guided search, shape (C, K).

        Args:
            number: Later rounds lie nearer to the best.
            omega_CK: Candidates so far.
            loss_C: Their losses; infinite where a candidate failed, which not all did.
        """
        rng = np.random.default_rng((self.seed, number))
        omega_CK, loss_C = omega_CK[np.isfinite(loss_C)], loss_C[np.isfinite(loss_C)]
        _, predict = loo_ridge(_quadratic, omega_CK, loss_C)
        best_CK = omega_CK[np.argsort(loss_C, kind="stable")[: max(1, len(loss_C) // 4)]]
        pool_CK = best_CK[rng.integers(0, len(best_CK), POOL)]
        spread = JITTER / number
        pool_CK = pool_CK * np.exp(rng.normal(0.0, spread, pool_CK.shape))
        pool_CK *= np.exp(rng.normal(0.0, spread / 2, (POOL, 1)))  # all together: their sum
        chosen: list[np.ndarray] = []
        for omega_K in pool_CK[np.argsort(predict(pool_CK), kind="stable")]:
            apart = [np.abs(omega_K - other_K).sum() / omega_K.sum() for other_K in chosen]
            if min(apart, default=1.0) > APART:
                chosen.append(omega_K)
            if len(chosen) == self.rounds[number]:
                break
        return np.array(chosen)


def _quadratic(omega_CK: np.ndarray) -> np.ndarray:
    """Return omega and all products omega_i omega_j, i <= j."""
    i, j = np.triu_indices(omega_CK.shape[1])
    return np.hstack([omega_CK, omega_CK[:, i] * omega_CK[:, j]])

"""LLD by inverting a sweep: proxies from the base say which mixture has the target's losses.

Source: derived; beyond Kishino et al. 2026, arXiv:2603.16622, see `rayx.methods.lld`.

Legend: K domains, R runs, T targets of a profile, M mixtures, S seeds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayx.errors import SpecError
from rayx.fit.inverse_power import InversePower
from rayx.fit.regressor import PointRegressor
from rayx.methods.lld import Estimate, divergence, minimise_on_simplex, prior_array
from rayx.mixture import Mixture
from rayx.recipe import require
from rayx.record import Record
from rayx.spec import TrainSpec

DRAWS = 2048  # mixtures among which a search over the simplex begins
STARTS = 4
SHRINKAGE = 0.05  # of the noise's covariance towards equal variances
LEAST_RUNS = 8


@dataclass(kw_only=True)
class SweepInversion:
    """Laws of the losses of a sweep from the base, turned round: profile of losses -> mixture.

    pi = argmin (f(pi) - l)^T (S + s^2 1 1^T)^-1 (f(pi) - l) + 2 ridge KL(pi || prior): f_t a law of
    target t's loss fitted on the sweep, l the target model's losses, S the covariance of a run's
    noise, s the standard deviation over the sweep of the mean loss. So a target may be better or
    worse than the proxies on everything alike, longer trained say. By default the noise is what the
    laws leave out of fold.

    Args:
        weights_RK: Mixtures of the sweep's runs.
        losses_RT: Their losses, nats or bits, > 0, all on the texts that the target is read on.
        domains: Names of the K domains.
        regressor: The law; its `folds` must not be 0.
        covariance_TT: Of a run's losses between seeds, where it is known (`between_seeds`).

    Raises:
        SpecError: Fewer than 8 runs, fewer than two targets, or shapes that differ.
        FitError: A loss is not positive or not finite.

    Source: derived.
    """

    weights_RK: np.ndarray
    losses_RT: np.ndarray
    domains: Sequence[str]
    regressor: PointRegressor = dataclasses.field(default_factory=InversePower)
    covariance_TT: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.weights_RK = np.asarray(self.weights_RK, float)
        self.losses_RT = losses_RT = np.asarray(self.losses_RT, float)
        runs, targets = losses_RT.shape
        require(self.weights_RK.shape == (runs, len(self.domains)), "Shape of the mixtures",
                self.weights_RK.shape, f"{(runs, len(self.domains))} (runs, domains)")  # fmt: skip
        require(runs >= LEAST_RUNS, "The number of runs of the sweep", runs,
                f"at least {LEAST_RUNS}: a law of each target is fitted to them")  # fmt: skip
        require(targets > 1, "The number of targets of a profile", targets, "at least 2")
        self.laws_ = [
            dataclasses.replace(self.regressor).fit(self.weights_RK, losses_RT[:, t])
            for t in range(targets)
        ]
        fits = [law.cross_fit_ for law in self.laws_]
        require(all(fits), "regressor.folds", 0, "2 or more: the rest of a law is its noise")
        self.residual_RT = losses_RT - np.stack([fit.oof_R for fit in fits if fit], axis=1)
        covariance_TT = self.covariance_TT
        if covariance_TT is None:
            covariance_TT = self.residual_RT.T @ self.residual_RT / runs
        mean = float(np.trace(covariance_TT)) / targets
        covariance_TT = (1 - SHRINKAGE) * covariance_TT + SHRINKAGE * mean * np.eye(targets)
        self.metric_TT = np.linalg.inv(covariance_TT + losses_RT.mean(1).var())

    def profile(self, weights_MK: np.ndarray) -> np.ndarray:
        """Return the losses predicted for mixtures, shape (M, T)."""
        return np.stack([law.predict(weights_MK) for law in self.laws_], axis=1)

    def estimate(
        self,
        losses_T: np.ndarray,
        prior: Mapping[str, float] | None = None,
        ridge: float = 0.0,
    ) -> Estimate:
        """Return the mixture whose predicted losses are nearest those of the target model.

        Args:
            losses_T: The target model's, on the sweep's texts and in its unit.
            prior: Weights pi_0; uniform by default.
            ridge: >= 0.

        Raises:
            SpecError: Shapes differ, or a loss is not finite.
        """
        losses_T = np.asarray(losses_T, float)
        expected = self.losses_RT.shape[1:]
        require(losses_T.shape == expected, "Shape of the target's losses", losses_T.shape,
                f"{expected}, one a target of the sweep")  # fmt: skip
        require(bool(np.isfinite(losses_T).all()), "The target's losses", losses_T.tolist(),
                "finite numbers")  # fmt: skip
        require(ridge >= 0, "ridge", ridge, "a number >= 0")
        prior_K = prior_array(prior, self.domains)

        def misfit(pi_MK: np.ndarray) -> np.ndarray:
            gap_MT = self.profile(pi_MK) - losses_T
            return np.einsum("mt,tu,mu->m", gap_MT, self.metric_TT, gap_MT)

        def cost(pi_MK: np.ndarray) -> np.ndarray:
            return misfit(pi_MK) + 2.0 * ridge * divergence(pi_MK, prior_K)

        drawn = np.random.default_rng(0).dirichlet(np.ones(len(prior_K)), DRAWS)
        drawn = np.concatenate([drawn, self.weights_RK, prior_K[None]])
        starts = drawn[np.argsort(cost(drawn), kind="stable")[:STARTS]]
        pi_K = minimise_on_simplex(cost, starts)[0]
        return Estimate(
            mixture=Mixture.from_array(pi_K, self.domains),
            aligned=True,
            cosine=float("nan"),
            misfit=float(misfit(pi_K[None])[0]),
        )


def sweep_records(records: Iterable[Record]) -> list[Record]:
    """Return the runs of a store that one inversion can use: the most that differ in little.

    Trained to the end on one mixture each, and equal in all but mixture and seeds.

    Raises:
        SpecError: There is no such run.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        spec = record.spec
        if record.failure or not isinstance(spec, TrainSpec) or len(spec.schedule.phases) > 1:
            continue
        if spec.policy is None and spec.distillation is None:
            groups.setdefault(spec.pack_key, []).append(record)
    if not groups:
        raise SpecError(
            "The store has no finished run on a fixed mixture; a sweep of proxies from the base is "
            "inverted. Train one, e.g. `rayx run experiments/quickstart.py`."
        )
    return max(groups.values(), key=len)


def between_seeds(losses_MST: np.ndarray) -> np.ndarray:
    """Return the covariance of a run's losses between seeds, pooled over mixtures, shape (T, T).

    Args:
        losses_MST: Losses of S >= 2 seeds of each of M mixtures.
    """
    mixtures, seeds, targets = losses_MST.shape
    require(seeds > 1, "The number of seeds of a mixture", seeds, "at least 2")
    gap = (losses_MST - losses_MST.mean(1, keepdims=True)).reshape(-1, targets)
    return gap.T @ gap / (mixtures * (seeds - 1))

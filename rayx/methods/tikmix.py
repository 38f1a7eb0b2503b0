"""TiKMiX: a mixture from group influences, measured in one short run in place of many proxies.

D solves for the weights, taking the influence of a mixture to be the weighted sum of its domains'.
M measures the influence of many mixed sets, fits it, and searches; its measurement is a second
short run.

Source: TiKMiX, arXiv:2508.17677 (D, M; no code was published).
Differs: M's search minimises the same `penalty` as D, without Pareto bounds, and its regressor is
    judged by cross-validation. Influences are divided by the largest over single domains in both.

Legend: P targets, K domains, C candidates, M mixtures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import qmc

from rayx.errors import SpecError, StoreError
from rayx.fit import FittedTable, Table, fit_table
from rayx.fit.scores import spearman
from rayx.mixture import Mixture, Schedule
from rayx.policies.tikmix import (
    InfluenceSurvey,
    check_influence,
    dynamic_weights,
    penalty,
    scales,
)
from rayx.recipe import require
from rayx.spec import Parent, TrainSpec
from rayx.store import Store

MAX_BATCHES = 1_000  # of Latin hypercubes, before the bounds are called too narrow


def latin_mixtures(
    prior_K: np.ndarray, num: int, *, seed: int, spread: tuple[float, float] = (0.2, 5.0)
) -> np.ndarray:
    """Draw mixtures around a prior: a Latin hypercube between multiples of it, normalised.

    u_k in [low prior_k, min(1, high prior_k)], w = u / sum(u); a w outside of these intervals is
    rejected, and another hypercube drawn for what is missing.

    Args:
        prior_K: Shape (K,), > 0, sum 1.
        num: Mixtures wanted.
        seed: Seed of the hypercubes.
        spread: Multiples of the prior, low < 1 < high.

    Returns:
        Shape (num, K), rows sum to 1.

    Raises:
        SpecError: A bound is out of range, or the intervals leave hardly a mixture.

    Source: TiKMiX, arXiv:2508.17677 (candidates of TiKMiX-M); the intervals are derived.
    """
    low, high = spread
    require(0 <= low < 1 < high, "spread", spread, "two multiples of the prior, low < 1 < high")
    low_K, high_K = low * prior_K, np.minimum(1.0, high * prior_K)
    sampler = qmc.LatinHypercube(len(prior_K), rng=np.random.default_rng(seed))
    found: list[np.ndarray] = []
    for _ in range(MAX_BATCHES):
        drawn_MK = low_K + sampler.random(num) * (high_K - low_K)
        drawn_MK /= drawn_MK.sum(axis=1, keepdims=True)
        found += [*drawn_MK[((drawn_MK >= low_K) & (drawn_MK <= high_K)).all(axis=1)]]
        if len(found) >= num:
            return np.stack(found[:num])
    raise SpecError(
        f"Only {len(found)} of {num} candidates lie within {low:g} to {high:g} times the prior. "
        "Widen the spread or ask for fewer."
    )


def search(
    value: Callable[[np.ndarray], np.ndarray],
    start_K: np.ndarray,
    *,
    seed: int,
    strengths: Sequence[float] = tuple(np.geomspace(3.0, 3_000.0, 10)),
    draws: int = 2_000,
    top_k: int = 20,
) -> np.ndarray:
    """Return the mixture that a narrowing random search finds: TiKMiX-M's.

    w_0 = start; w_t is the mean of the `top_k` best of w_(t-1) and draws from
    Dirichlet(a_t w_(t-1)), a_t growing evenly in the logarithm.

    Args:
        value: Mixtures, shape (M, K), to values, shape (M,); lower is better.
        start_K: The first centre, shape (K,), sum 1.
        seed: Seed of the draws.
        strengths: a_t, small for wide draws.
        draws: Of each round.
        top_k: How many are averaged.

    Source: TiKMiX, arXiv:2508.17677 (iterative search); the constants are derived.
    """
    rng = np.random.default_rng(seed)
    best_K = np.asarray(start_K, dtype=np.float64)
    for strength in strengths:
        # A domain that has come near to 0 can come back.
        drawn_MK = rng.dirichlet(np.maximum(strength * best_K, 1e-2), draws)
        pool_MK = np.vstack([best_K, drawn_MK])
        best_K = pool_MK[np.argsort(value(pool_MK), kind="stable")[:top_k]].mean(axis=0)
    return best_K


@dataclass(frozen=True, kw_only=True)
class TiKMiX:
    """TiKMiX-D and -M from one short run each.

    Attributes:
        proxy: The short run; its mixture is the prior. It has no policy.
        survey: How influence is measured in it, and on what targets; its sources are replaced.
        num_candidates: Mixed sets that M measures, >= 8.
        spread: Multiples of the prior between which they lie.
        alpha: Price of unequal gains, see `rayx.policies.tikmix.penalty`.
        beta: Worth of a gain.
        gamma: Worth of diversity.
        regressor: M's, by name.
        seed: Draws candidates and search.
    """

    proxy: TrainSpec
    survey: InfluenceSurvey = dataclasses.field(default_factory=InfluenceSurvey)
    num_candidates: int = 64
    spread: tuple[float, float] = (0.2, 5.0)
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 1.0
    regressor: str = "lightgbm"
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.proxy.policy is None, "TiKMiX.proxy.policy", self.proxy.policy, "None")
        require(self.num_candidates >= 8, "TiKMiX.num_candidates", self.num_candidates,
                "at least 8, for a fit")  # fmt: skip

    @property
    def domains(self) -> tuple[str, ...]:
        """The K domains of the prior."""
        return tuple(self.proxy.mixture)

    @property
    def targets(self) -> tuple[str, ...]:
        """The P targets."""
        return self.survey.targets or self.domains

    @property
    def prior_K(self) -> np.ndarray:
        """Weights of the prior."""
        return self.proxy.mixture.to_array(self.domains)

    def candidates(self) -> list[Mixture]:
        """Return the mixed sets that M measures."""
        drawn_CK = latin_mixtures(
            self.prior_K, self.num_candidates, seed=self.seed, spread=self.spread
        )
        return [Mixture.from_array(weights_K, self.domains) for weights_K in drawn_CK]

    def single(self) -> TrainSpec:
        """Return D's run: the influence of each domain alone is measured in it."""
        return self._surveyed([Mixture({domain: 1}) for domain in self.domains])

    def mixed(self) -> TrainSpec:
        """Return M's run: that of each domain, which sets the scale, and of the candidates."""
        alone = [Mixture({domain: 1}) for domain in self.domains]
        return self._surveyed([*alone, *self.candidates()])

    def _surveyed(self, sources: Sequence[Mixture]) -> TrainSpec:
        survey = dataclasses.replace(self.survey, targets=self.targets, sources=tuple(sources))
        return dataclasses.replace(self.proxy, policy=survey)

    def specs(self) -> list[TrainSpec]:
        """Return both runs."""
        return [self.single(), self.mixed()]

    def influence(self, store: Store, spec: TrainSpec) -> np.ndarray:
        """Return what a run measured, influence of each source on each target, shape (P, S).

        Raises:
            StoreError: The run is not on record, or failed before it measured.
            ChoiceError: A value is not finite.
        """
        record = store.get(spec.run_id)
        measured = [d.signal for d in record.decisions if d.signal is not None]
        if not measured:
            why = record.failure.message if record.failure else "its policy measured nothing"
            raise StoreError(f"Run {spec.run_id} has no influence on record: {why}.")
        influence_PS = np.array(measured[-1], dtype=np.float64)
        sources = getattr(spec.policy, "sources", ())
        check_influence(influence_PS, self.targets, [f"{dict(source)}" for source in sources])
        return influence_PS

    def dynamic(self, store: Store) -> Mixture:
        """Return TiKMiX-D's mixture."""
        influence_PK = self.influence(store, self.single())
        weights_K = dynamic_weights(influence_PK, self.prior_K, self.alpha, self.beta, self.gamma)
        return Mixture.from_array(weights_K, self.domains)

    def fitted(self, store: Store) -> FittedTable:
        """Fit minus the normalised influence of the mixed sets; its `cv` is the validation."""
        influence_PS = self.influence(store, self.mixed())
        count = len(self.domains)
        scaled_PS = influence_PS / scales(influence_PS[:, :count])[:, None]
        candidates = self.candidates()
        table = Table(
            run_ids=tuple(f"set {c}" for c in range(len(candidates))),
            domains=self.domains,
            targets=self.targets,
            weights_RK=np.stack([mixture.to_array(self.domains) for mixture in candidates]),
            losses_RM=-scaled_PS[:, count:].T,
        )
        return fit_table(table, self.regressor, seed=self.seed)

    def additivity(self, store: Store) -> float:
        """Return how well sums of domains' influences tell that of mixed sets: Spearman over sets.

        The mean over targets of the correlation of S w with what was measured. Gradients of a union
        add up, so what is missing to 1 is sampling; D rests on this, M measures it again.
        """
        influence_PS = self.influence(store, self.mixed())
        count = len(self.domains)
        weights_CK = np.stack([mixture.to_array(self.domains) for mixture in self.candidates()])
        summed_PC = influence_PS[:, :count] @ weights_CK.T
        pairs = zip(summed_PC, influence_PS[:, count:], strict=True)
        return float(np.mean([spearman(summed_C, set_C) for summed_C, set_C in pairs]))

    def modelled(self, fitted: FittedTable) -> Mixture:
        """Return TiKMiX-M's mixture, given the models of `fitted`."""

        def value(weights_MK: np.ndarray) -> np.ndarray:
            mixed_MP = -fitted.predict(weights_MK)
            return penalty(mixed_MP, weights_MK, self.alpha, self.beta, self.gamma)

        weights_K = search(value, self.prior_K, seed=self.seed)
        return Mixture.from_array(weights_K, self.domains)

    def branches(self, tokens: int) -> list[TrainSpec]:
        """Return what influence forecasts: from where it was measured, a run on each domain alone.

        Args:
            tokens: Of a branch; its rate falls to 0, for a high rate hides what was learnt.
        """
        single = self.single()
        at_step = round(self.survey.at_share * single.steps)
        decay = dataclasses.replace(single.optimizer, warmup_share=0.0, decay_share=1.0)
        return [
            dataclasses.replace(
                single,
                policy=None,
                parent=Parent(single, at_step),
                optimizer=decay,
                schedule=Schedule.constant(Mixture({domain: 1}), tokens),
            )
            for domain in self.domains
        ]

    def forecast(self, store: Store, branches: Sequence[TrainSpec]) -> dict[str, float]:
        """Return target -> Spearman over domains of influence with minus the loss of `branches`."""
        influence_PK = self.influence(store, self.single())
        losses = [store.get(spec.run_id).losses for spec in branches]
        return {
            target: spearman(influence_K, -np.array([loss[target].nats for loss in losses]))
            for target, influence_K in zip(self.targets, influence_PK, strict=True)
        }

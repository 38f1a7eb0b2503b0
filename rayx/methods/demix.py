"""DeMix: search over merges of a few experts, then train only the mixture that was found.

Rounds of candidates (64, 32, 16): the first drawn around the prior, the later ones from those that
a regressor, fitted on all records so far, predicts to be best; the choice is the average of the
best predicted of a large pool. A candidate is a merge of the experts, so that a search costs the
experts and one evaluation a candidate. With `trained_tokens` candidates are trained instead: that
is RegMix on the same region, to compare with.

Source: DeMix, arXiv:2602.00747 (rounds, half of an expert's text general, Dirichlet strengths .5 to
    5 at temperature .7, average of the predicted best 128).
Differs: losses in place of rank percentiles of benchmarks; weights are mapped through the experts'
    own mixtures; the regressor is chosen by cross-validation (`auto`) in place of LightGBM alone;
    later rounds draw at random from the predicted best tenth of the pool, at a distance from each
    other, in place of its very top; the pool fills the experts' hull, and no more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayx.candidates import regmix_mixtures
from rayx.choice.choosers import Solution
from rayx.choice.problem import Problem, simulate
from rayx.choose import Choice, Constraints, Simulate, choose
from rayx.fit import FittedTable, Table, fit_once
from rayx.merging import Spec
from rayx.methods.merge_proxy import MergeProxy, cost_tokens
from rayx.mixture import Mixture
from rayx.propose import next_mixtures
from rayx.spec import TrainSpec, require
from rayx.store import Store
from rayx.verify import CHOICE


@dataclass(frozen=True, kw_only=True)
class DeMix:
    """A search for a mixture among merges.

    Args:
        proxies: The trunk and its branches.
        prior: Domain with an expert -> tokens or share, > 0; candidates lie around it.
        objective: Target -> weight of its loss (bits per byte), > 0.
        general_share: Of the experts' text.
        expert_tokens: Length of the experts, by default that of a branch.
        rounds: Candidates of each round; the first at least 8, for a fit.
        caps: Domain -> largest share in the final run.
        regressor: `auto` or a regressor's name.
        top_k: How many of the best predicted are averaged.
        pool: How many are predicted.
        seed: Draws candidates and pool.
        trained_tokens: Train candidates as branches of this length in place of merging experts.
    """

    proxies: MergeProxy
    prior: Mapping[str, float]
    objective: Mapping[str, float]
    general_share: float = 0.5
    expert_tokens: int | None = None
    rounds: tuple[int, ...] = (64, 32, 16)
    caps: Mapping[str, float] = dataclasses.field(default_factory=dict)
    regressor: str = "auto"
    top_k: int = 128
    pool: int = 100_000
    seed: int = 0
    trained_tokens: int | None = None

    def __post_init__(self) -> None:
        expected = f"those with an expert: {', '.join(sorted(self.proxies.domains))}"
        same = set(self.prior) == set(self.proxies.domains)
        require(same, "Domains of DeMix.prior", sorted(self.prior), expected)
        counts = bool(self.rounds) and min(self.rounds) > 0
        require(counts, "DeMix.rounds", self.rounds, "counts > 0 of candidates")

    @property
    def constraints(self) -> Constraints:
        """What may be chosen: the experts' hull, under the caps."""
        hull = self.proxies.hull(self.general_share)
        return Constraints.by_name(
            hull.domains,
            floors=dict(zip(hull.domains, hull.floors_K, strict=True)),
            caps={
                d: min(float(cap), self.caps.get(d, 1.0))
                for d, cap in zip(hull.domains, hull.caps_K, strict=True)
            },
        )

    def candidates(self, mixtures: Sequence[Mixture]) -> list[Spec]:
        """Return what stands for these mixtures: merges, or branches if candidates are trained."""
        if self.trained_tokens is not None:
            return [self.proxies.branch(mixture, self.trained_tokens) for mixture in mixtures]
        return [*self.proxies.standins(mixtures, self.general_share, self.expert_tokens)]

    def drawn(self, num: int, seed: int) -> list[Mixture]:
        """Return mixtures of the experts' hull, around the prior and under the caps."""
        general, share = self.proxies.general, self.general_share
        caps = {
            d: min(1.0, max(0.0, (cap - share * general.get(d, 0.0)) / (1 - share)))
            for d, cap in self.caps.items()
        }
        dirichlet = {"temperature": 0.7, "strengths": (0.5, 5.0)}
        own = regmix_mixtures(self.prior, num, seed=seed, caps=caps, **dirichlet)
        return [self.proxies.component(mixture, share) for mixture in own]

    def specs(self) -> list[Spec]:
        """Return the first round."""
        return self.candidates(self.drawn(self.rounds[0], self.seed))

    def proposed(self, store: Store) -> list[Spec]:
        """Return the candidates of all rounds up to the first that is not all on record.

        A function of the records and the seed: an interrupted search proposes the same again.
        """
        specs = self.specs()
        for number, size in enumerate(self.rounds[1:], start=1):
            ended = store.status()
            if not all(spec.run_id in ended for spec in specs):
                break
            mixtures = next_mixtures(
                self._fit(store, specs),
                self.objective,
                self._prior(),
                self.constraints,
                num=size,
                seed=1_000 * number + self.seed,
                acquisition="top",
            )
            specs += self.candidates(mixtures)
        return specs

    def decide(self, store: Store) -> tuple[FittedTable, Choice]:
        """Fit all rounds and choose; domains on their floor show as `binding` in the choice."""
        fitted = self._fit(store, self.proposed(store))
        pool = InHull(num_candidates=self.pool, top_k=self.top_k)
        choice = choose(
            fitted, self.objective, self._prior(), self.constraints, seed=self.seed, method=pool
        )
        return fitted, choice

    def cost_tokens(self, store: Store) -> float:
        """Return what the search cost; see `rayx.methods.merge_proxy.cost_tokens`."""
        return cost_tokens(store, self.proposed(store))

    def arms(self, choice: Choice) -> dict[str, Mixture]:
        """Return what a verification trains: the choice, and uniform and proportional in reach."""
        baselines = {n: Mixture(choice.baselines[n].weights) for n in ("uniform", "proportional")}
        return {CHOICE: Mixture(choice.weights)} | baselines

    def follow_up(
        self, arms: Mapping[str, Mixture], seeds: Sequence[int]
    ) -> dict[str, list[TrainSpec]]:
        """Return arm -> a branch a seed, for `rayx.verify.compare`; a seed's arms share a trunk."""
        runs: dict[str, list[TrainSpec]] = {arm: [] for arm in arms}
        for seed in seeds:
            template = dataclasses.replace(self.proxies.template, seed=seed, data_seed=seed)
            proxies = dataclasses.replace(self.proxies, template=template)
            for arm, mixture in arms.items():
                runs[arm].append(proxies.branch(mixture))
        return runs

    def _prior(self) -> dict[str, float]:
        """The prior as a mixture of all domains in the hull."""
        prior = self.proxies.component(Mixture(self.prior), self.general_share)
        return {d: prior.get(d, 0.0) for d in self.constraints.domains}

    def _fit(self, store: Store, specs: Sequence[Spec]) -> FittedTable:
        wanted = {spec.run_id for spec in specs}
        runs = store.runs()
        columns = [f"weight/{d}" for d in self.constraints.domains]
        # Of the domains only those that can be mixed, in the constraints' order.
        others = [c for c in runs.columns if not c.startswith("weight/")]
        rows = runs.loc[runs["run_id"].isin(wanted), [*others, *columns]]
        return fit_once(Table.from_frame(rows), self.regressor, self.seed)


@dataclass(frozen=True, kw_only=True)
class InHull(Simulate):
    """`Simulate` with half of its candidates inside an experts' hull and half on its border.

    w = floors + (1 - sum of floors) a for the first half, a drawn as by `Simulate`: these are merge
    weights. Those of `Simulate` itself, brought to the floors, are mostly on them.
    """

    def solve(self, problem: Problem, seed: int) -> Solution:
        return super().solve(_HullProblem(**vars(problem)), seed)


@dataclass(frozen=True, kw_only=True)
class _HullProblem(Problem):
    def candidates(self, num_mixtures: int, rng: np.random.Generator) -> np.ndarray:
        floors_K = self.constraints.floors_K
        above_K = np.maximum(self.prior_K - floors_K, 0.0)
        own_MK = simulate(above_K / above_K.sum(), num_mixtures // 2, rng)
        inside_MK = self.constraints.nearest(floors_K + (1.0 - floors_K.sum()) * own_MK)
        border_MK = super().candidates(num_mixtures - len(inside_MK), rng)
        return np.concatenate([inside_MK, border_MK])

"""CLIMB: clusters of unlabelled text, proxies in shrinking rounds, the optimum of their predictor.

The loop is RegMix's (rayx/methods/regmix.py); what differs is in this file: the first round is
drawn around the clusters' shares, each later one is a random choice among the best tenth of a pool
as ranked by the predictor so far. The choice is the predictor's optimum, taken as the mean of the
best candidates; as published, with `chooser=PoolOptimum()`, as the single best of the pool. The
clusters come from `rayx corpus cluster`; any corpus will do.

Source: Diao et al. 2025, arXiv:2504.13161 (section 3).
Differs: losses in place of benchmark accuracy; a predictor for each target in place of one for
    their mean, chosen by cross-validation (`auto`; theirs is `regressor="climb"`); mixtures keep to
    the final run's token supply; the mean of the best candidates in place of the best, whose
    prediction is mostly the luckiest; a seed for each proxy. Derived, since the paper is silent:
    the pool of 20,000, the best tenth, the concentration of the first round, and that mixtures lie
    apart.

Shapes: M mixtures, K domains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rayx.candidates import regmix_mixtures, sobol_mixtures
from rayx.choice.choosers import Solution
from rayx.choice.problem import Problem
from rayx.choose import Choice
from rayx.errors import ChoiceError, SpecError
from rayx.methods.regmix import RegMix
from rayx.mixture import Mixture
from rayx.propose import MIN_DISTANCE, candidate_pool
from rayx.recipe import require
from rayx.spec import TrainSpec
from rayx.verify import CHOICE

ROUNDS = (64, 32, 16)
# Less a fold of ten for the residuals and a fifth for early stopping, two leaves of 5 rows remain.
MIN_FIRST_ROUND = 16
MIN_LATER_ROUND = 2
SEEDS = 100_000  # apart are the seeds of two searches' proxies; a verification's are below
ALL = 1e9  # no limit on a domain's share but its cap


@dataclass(frozen=True, kw_only=True)
class PoolOptimum:
    """CLIMB's way to choose: the candidate with the least predicted objective.

    Trees are constant on boxes, so candidates can be tied; the mean of those at the optimum is
    taken, which lies in the same box (boxes are convex).

    Attributes:
        top_k: Candidates averaged beside the tied ones; 1 is the optimum as published.

    Source: Diao et al. 2025, arXiv:2504.13161.
    """

    top_k: int = 1

    def solve(self, problem: Problem, seed: int) -> Solution:
        pool_MK = candidate_pool(problem, np.random.default_rng(seed))
        if not len(pool_MK):
            raise ChoiceError(
                "No mixture of the pool is predicted to keep the limits on losses; raise a limit."
            )
        value_M = problem.outlook.value(pool_MK)
        order_M = np.argsort(value_M, kind="stable")
        worst = value_M[order_M[min(self.top_k, len(order_M)) - 1]]
        best_MK = pool_MK[value_M <= worst]
        weights_K = problem.constraints.nearest(best_MK.mean(0, keepdims=True))[0]
        if problem.outlook.value(weights_K[None])[0] > worst:
            weights_K = pool_MK[order_M[0]]
        return Solution(
            weights_K=weights_K,
            around_MK=pool_MK[order_M[:100]],
            method={"name": "pool optimum", **vars(self), "averaged": len(best_MK)},
        )


@dataclass(frozen=True, kw_only=True)
class Climb(RegMix):
    """CLIMB on one corpus; the attributes are RegMix's but for these.

    Attributes:
        sizes: Proxies of each round, >= 16 in the first and >= 2 in each later one; `num_proxies`
            and `rounds` follow.
        concentration: The first round is drawn from Dirichlet(concentration K share_k), share_k the
            domain's share of the tokens, > 0.
        own_seeds: Whether each proxy has a seed of its own. With one seed for all, as RegMix's have
            here, rounds close in on mixtures that were lucky with it.

    Raises:
        SpecError: A size is out of range, there are fewer than 2 domains, or the caps leave fewer
            distinct mixtures than proxies.
    """

    sizes: tuple[int, ...] = ROUNDS
    concentration: float = 0.3
    own_seeds: bool = True
    num_proxies: int = field(init=False, default=0)
    rounds: int = field(init=False, default=0)
    acquisition: str = "top"
    regressor: str = "auto"

    def __post_init__(self) -> None:
        sizes = tuple(self.sizes)
        require(bool(sizes), "Climb.sizes", sizes, f"the proxies of each round, e.g. {ROUNDS}")
        least = [MIN_FIRST_ROUND, *[MIN_LATER_ROUND] * (len(sizes) - 1)]
        for number, (size, fewest) in enumerate(zip(sizes, least, strict=True), start=1):
            counted = isinstance(size, int) and not isinstance(size, bool) and size >= fewest
            require(counted, f"Climb.sizes of round {number}", size, f"at least {fewest} proxies")
        domains = tuple(self.supply)
        require(len(domains) >= 2, "Climb.domains", domains, "at least 2, to mix")
        require(self.concentration > 0, "Climb.concentration", self.concentration, "more than 0")
        object.__setattr__(self, "num_proxies", sum(sizes))
        object.__setattr__(self, "rounds", len(sizes))
        apart = _mixtures_apart(domains, self.num_proxies, self.caps)
        if apart < self.num_proxies:
            raise SpecError(
                f"Climb.sizes ask for {self.num_proxies} proxies; {len(domains)} domains under "
                f"their caps leave about {apart} mixtures at distance {MIN_DISTANCE} from each "
                "other. Ask for fewer, cut the text into more clusters or raise max_epochs."
            )

    def _first(self, num: int) -> list[Mixture]:
        concentration = self.concentration * len(self.supply)
        return regmix_mixtures(
            self.supply,
            num,
            seed=self.seed,
            caps=self.caps,
            temperature=1.0,
            strengths=(concentration, concentration),
            num_strengths=1,
            max_prior_ratio=ALL,
        )

    def _sizes(self) -> list[int]:
        return list(self.sizes)

    def _proxies(self, mixtures: Sequence[Mixture], before: int = 0) -> list[TrainSpec]:
        specs = super()._proxies(mixtures, before)
        if not self.own_seeds:
            return specs
        seeds = range(SEEDS * (self.seed + 1) + before, SEEDS * (self.seed + 2))
        return [
            dataclasses.replace(spec, seed=seed, data_seed=seed)
            for spec, seed in zip(specs, seeds, strict=False)
        ]

    def arms(self, choice: Choice) -> dict[str, Mixture]:
        """Return the arms of the verification; the best proxy is the best of all rounds."""
        best = Mixture(choice.baselines["best_seen"].weights)
        return {CHOICE: Mixture(choice.weights), **self.baselines(), "best_proxy": best}


def _mixtures_apart(domains: tuple[str, ...], num: int, caps: dict[str, float]) -> int:
    """How many of evenly spread mixtures under the caps lie apart, counted up to `num`."""
    kept: list[np.ndarray] = []
    for draws in (num, 8 * num):  # in all but the tightest simplex the first draws will do
        kept = []
        for mixture in sobol_mixtures(domains, draws, 0, caps):
            weights_K = mixture.to_array(domains)
            if not kept or np.abs(np.stack(kept) - weights_K).sum(1).min() >= MIN_DISTANCE:
                kept.append(weights_K)
            if len(kept) == num:
                return num
    return len(kept)

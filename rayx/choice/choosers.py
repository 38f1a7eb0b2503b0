"""Ways to choose: simulate and average, or solve the convex program.

A chooser takes a `Problem` and returns a `Solution`. To add one, write a class with `solve` and add
it to `CHOOSERS`.

Shapes: M mixtures, K domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from rayx.choice.descent import Function, duality_gap, minimum
from rayx.choice.problem import Problem
from rayx.errors import ChoiceError

# Share of the best candidates that break a limit from which on the limit decides.
BINDING_SHARE = 0.5
CONVEX = {"mean", "loglinear", "inversepower"}  # regressors whose prediction is convex in w


@dataclass(frozen=True, kw_only=True)
class Solution:
    """What a chooser found.

    Attributes:
        weights_K: The choice.
        around_MK: Mixtures about as good; where they differ, the choice is undecided.
        binding_limits: Targets whose limit keeps the objective from being lower.
        method: How it was found, with the numbers that vouch for it.
        warnings: What should make one distrust it, in words.
    """

    weights_K: np.ndarray
    around_MK: np.ndarray
    binding_limits: tuple[str, ...] = ()
    method: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


class Chooser(Protocol):
    """A way to choose."""

    def solve(self, problem: Problem, seed: int) -> Solution: ...


@dataclass(frozen=True, kw_only=True)
class Simulate:
    """RegMix's way: predict many feasible mixtures around the prior and average the best.

    An argmin would follow the regressor into whatever corner its error makes look good; the average
    does not, and it stays feasible because the constraints are a convex set.

    Attributes:
        num_candidates: Mixtures simulated.
        top_k: Candidates averaged.

    Source: Liu et al. 2024, arXiv:2407.01492, section 3.3 and the released code.
    Differs: half of the candidates are around the tempered prior, as RegMix draws its proxies;
        mixtures outside of the constraints are moved inside instead of rejected.
    """

    num_candidates: int = 100_000
    top_k: int = 100

    def solve(self, problem: Problem, seed: int) -> Solution:
        if not 1 <= self.top_k <= self.num_candidates:
            raise ChoiceError(
                f"top_k is {self.top_k}; expected 1 to num_candidates ({self.num_candidates})."
            )
        rng = np.random.default_rng(seed)
        candidates_MK = problem.candidates(self.num_candidates, rng)
        value_M = problem.outlook.value(candidates_MK)
        binding: tuple[str, ...] = ()
        if problem.limits:
            best_MK = candidates_MK[np.argsort(value_M, kind="stable")[: self.top_k]]
            binding = tuple(
                target
                for target, limit in problem.limits.items()
                if (problem.outlook.loss(target, best_MK) > limit).mean() >= BINDING_SHARE
            )
            keeps_M = problem.excess(candidates_MK) <= 0
            if keeps_M.sum() < self.top_k:
                # Few or none keep the limits: look between them and the one that does so best.
                anchor_K = problem.anchor(candidates_MK)
                share_M1 = rng.random((len(candidates_MK), 1)) ** 2
                candidates_MK = anchor_K + share_M1 * (candidates_MK - anchor_K)
                candidates_MK[0] = anchor_K
                value_M = problem.outlook.value(candidates_MK)
                keeps_M = problem.excess(candidates_MK) <= 0
            candidates_MK, value_M = candidates_MK[keeps_M], value_M[keeps_M]
        order_M = np.argsort(value_M, kind="stable")[: self.top_k]
        top_MK = candidates_MK[order_M]
        weights_K = problem.constraints.nearest(top_MK.mean(0, keepdims=True))[0]
        warnings = []
        worse = problem.outlook.value(weights_K[None])[0] > value_M[order_M[-1]]
        if worse or problem.excess(weights_K[None])[0] > 0:
            warnings.append(
                f"the best {len(top_MK)} candidates lie apart: their average is predicted to be "
                f"worse than each of them, so the best single one was taken"
            )
            weights_K = top_MK[0]
        return Solution(
            weights_K=weights_K,
            around_MK=top_MK,
            binding_limits=binding,
            method={"name": "simulate", **vars(self)},
            warnings=tuple(warnings),
        )


@dataclass(frozen=True, kw_only=True)
class Convex:
    """Olmix's way: min_x sum_t a_t L_t(x) + kl_strength KL(x || prior) over the constraints.

    With log-linear or inverse-power models and no supply the program is convex, and a duality gap
    certifies the optimum. With other models it is the best of several local searches, and says so.

    Attributes:
        kl_strength: Price of leaving the prior, in the unit of the losses, >= 0.
        num_starts: Local searches where the models are not convex.
        num_candidates: Mixtures simulated to find the starts.

    Source: Olmix, arXiv:2602.12237: the exact proposer and its default strength of .05.
    Differs: the losses are not rescaled, as there, so that the strength is in bits per byte where
        they are; groups, floors and limits are constraints too; SLSQP with numeric gradients in
        place of a cone solver, so that any model can be used.
    """

    kl_strength: float = 0.05
    num_starts: int = 12
    num_candidates: int = 5_000

    def solve(self, problem: Problem, seed: int) -> Solution:
        if not 0.0 <= self.kl_strength < np.inf:
            raise ChoiceError(
                f"kl_strength is {self.kl_strength}; expected a finite number >= 0, e.g. 0.05."
            )
        outlook, constraints = problem.outlook, problem.constraints
        log_prior_K = np.log(np.maximum(problem.prior_K, 1e-12))

        def priced(value: Function) -> Function:
            def total(weights_MK: np.ndarray) -> np.ndarray:
                log_MK = np.log(np.maximum(weights_MK, 1e-12))
                kl_M = (weights_MK * (log_MK - log_prior_K)).sum(1)
                return value(weights_MK) + self.kl_strength * kl_M

            return total

        cost = priced(outlook.value)
        names = {
            name for t in outlook.objective for name in outlook.fitted.regressors[t].split("+")
        }
        convex = outlook.supply is None and all(
            name.lower().replace("-", "") in CONVEX for name in names
        )
        candidates_MK = problem.candidates(self.num_candidates, np.random.default_rng(seed))
        starts_MK = candidates_MK[np.argsort(cost(candidates_MK), kind="stable")]
        starts_MK = np.concatenate([constraints.nearest(problem.prior_K[None]), starts_MK])
        if problem.limits:
            anchor_K = problem.anchor(candidates_MK)
            starts_MK = np.concatenate([anchor_K[None], starts_MK])
        starts_MK = starts_MK[: 2 if convex else self.num_starts]
        kept = problem.limit_functions(tightened=1e-7)
        found_MK = np.concatenate([minimum(cost, starts_MK, constraints, kept), starts_MK])
        found_MK = found_MK[problem.excess(found_MK) <= 0]
        weights_K = found_MK[np.argmin(cost(found_MK))]
        # What the models without a fold each would have chosen: how settled the optimum is.
        around_MK = np.concatenate(
            [minimum(priced(fold), weights_K[None], constraints) for fold in outlook.folds()]
        )
        method: dict[str, Any] = {"name": "convex", "kl_strength": self.kl_strength}
        warnings = []
        if convex and not problem.limits:
            gap = duality_gap(cost, weights_K, constraints)
            method["duality_gap"] = gap
            if gap > 1e-3 * max(1e-3, float(np.ptp(outlook.value(candidates_MK)))):
                warnings.append(f"the solver stopped early: the optimum may be {gap:.2g} lower")
        elif not convex:
            why = "repetition is priced" if outlook.supply else ", ".join(sorted(names))
            warnings.append(
                f"the program is not convex ({why}): this is the best of {len(starts_MK)} local "
                f"searches, and there may be a better mixture"
            )
        at_limit = {
            target: limit - float(outlook.loss(target, weights_K[None])[0])
            for target, limit in problem.limits.items()
        }
        return Solution(
            weights_K=weights_K,
            around_MK=around_MK,
            binding_limits=tuple(target for target, room in at_limit.items() if room < 1e-5),
            method=method | {"convex": convex},
            warnings=tuple(warnings),
        )


CHOOSERS: dict[str, type[Simulate] | type[Convex]] = {"simulate": Simulate, "convex": Convex}

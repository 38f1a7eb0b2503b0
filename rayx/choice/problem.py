"""What is to be chosen: objective, prior, constraints and limits, checked; and candidates for it.

Shapes: M mixtures, K domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayx.choice.descent import Function, minimum
from rayx.choice.outlook import Outlook, Supply
from rayx.constraints import Constraints
from rayx.errors import ChoiceError, did_you_mean
from rayx.fit.fitted import FittedTable, normalised_objective

STRENGTHS = np.logspace(np.log10(0.1), np.log10(5.0), 15)
TEMPER = 0.5


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is to be chosen.

    Attributes:
        outlook: What a mixture is predicted to reach.
        prior_K: Where candidates lie; sums to 1.
        constraints: Which mixtures may be chosen.
        limits: Target -> largest predicted loss.
    """

    outlook: Outlook
    prior_K: np.ndarray
    constraints: Constraints
    limits: Mapping[str, float]

    def excess(self, weights_MK: np.ndarray) -> np.ndarray:
        """By how much a predicted loss is over its limit, the worst of all limits, shape (M,)."""
        over = [self.outlook.loss(target, weights_MK) - v for target, v in self.limits.items()]
        return np.max([np.full(len(weights_MK), -np.inf), *over], axis=0)

    def limit_functions(self, tightened: float = 0.0) -> list[Function]:
        """Functions of mixtures that are >= 0 where a limit is kept with some room."""
        return [
            lambda w_MK, t=target, v=limit: v - tightened - self.outlook.loss(t, w_MK)
            for target, limit in self.limits.items()
        ]

    def candidates(self, num_mixtures: int, rng: np.random.Generator) -> np.ndarray:
        """Simulate mixtures that may be chosen, limits apart, shape (M, K)."""
        return self.constraints.nearest(simulate(self.prior_K, num_mixtures, rng))

    def anchor(self, candidates_MK: np.ndarray) -> np.ndarray:
        """The mixture that keeps the limits by most, found from the best candidates, shape (K,).

        Raises:
            ChoiceError: No mixture is predicted to keep them; with the best attainable losses.
        """
        best_K = self._least_excess(candidates_MK)
        if self.excess(best_K[None])[0] <= 0:
            return best_K
        parts = []
        for target, limit in self.limits.items():
            alone = Problem(
                outlook=self.outlook,
                prior_K=self.prior_K,
                constraints=self.constraints,
                limits={target: limit},
            )
            alone_K = alone._least_excess(candidates_MK)
            least = float(self.outlook.loss(target, alone_K[None])[0])
            found = float(self.outlook.loss(target, best_K[None])[0])
            together = f", {found:.4f} together with the others" if len(self.limits) > 1 else ""
            parts.append(f"{target} at most {limit:.4f} (least attainable {least:.4f}{together})")
        raise ChoiceError(
            f"No mixture that may be chosen is predicted to keep {' and '.join(parts)}. Raise a "
            f"limit, or loosen the constraints."
        )

    def _least_excess(self, candidates_MK: np.ndarray) -> np.ndarray:
        order_M = np.argsort(self.excess(candidates_MK), kind="stable")
        starts_MK = candidates_MK[order_M[:3]]
        found_MK = minimum(self.excess, starts_MK, self.constraints)
        both_MK = np.concatenate([starts_MK, found_MK])
        return both_MK[np.argmin(self.excess(both_MK))]


def prepare(
    fitted: FittedTable,
    objective: Mapping[str, float],
    prior: Mapping[str, float],
    constraints: Constraints | None = None,
    *,
    limits: Mapping[str, float] | None = None,
    tolerances: Mapping[str, float] | None = None,
    supply: Supply | None = None,
) -> Problem:
    """Check the arguments of a choice and return them as a `Problem`; see `choose`."""
    table = fitted.table
    outlook = Outlook(
        fitted=fitted, objective=normalised_objective(objective, table.targets), supply=supply
    )
    prior_K = _checked_prior(prior, table.domains)
    constraints = constraints or Constraints.none(table.domains)
    if constraints.domains != table.domains:
        raise ChoiceError(
            f"The constraints are for domains {', '.join(constraints.domains)}; the table has "
            f"{', '.join(table.domains)}, in this order."
        )
    proportional_1K = constraints.nearest(prior_K[None])
    largest: dict[str, float] = {}
    for given, relative in ((limits, False), (tolerances, True)):
        for target, number in (given or {}).items():
            if target not in table.targets:
                raise ChoiceError(
                    f"A limit is on target {target!r}; there are {', '.join(table.targets)}."
                    f"{did_you_mean(target, table.targets)}"
                )
            if not np.isfinite(number):
                raise ChoiceError(f"The limit on {target!r} is {number}; expected a number.")
            # Rounding of the prediction must not make proportional itself break the limit.
            base = float(outlook.loss(target, proportional_1K)[0]) + 1e-9 if relative else 0.0
            largest[target] = min(base + number, largest.get(target, np.inf))
    return Problem(outlook=outlook, prior_K=prior_K, constraints=constraints, limits=largest)


def _checked_prior(prior: Mapping[str, float], domains: tuple[str, ...]) -> np.ndarray:
    for domain in prior:
        if domain not in domains:
            raise ChoiceError(
                f"The prior has domain {domain!r}; the table has {', '.join(domains)}."
                f"{did_you_mean(domain, domains)}"
            )
    for domain in domains:
        if domain not in prior:
            raise ChoiceError(f"The prior has no domain {domain!r}; give it a weight, 0 if unused.")
    prior_K = np.array([float(prior[domain]) for domain in domains])
    if not np.isfinite(prior_K).all() or (prior_K < 0).any() or prior_K.sum() <= 0:
        raise ChoiceError(f"The prior is {dict(prior)}; expected weights >= 0 that are not all 0.")
    return prior_K / prior_K.sum()


def simulate(prior_K: np.ndarray, num_mixtures: int, rng: np.random.Generator) -> np.ndarray:
    """Draw mixtures from Dirichlet(strength * centre), strengths log-spaced from .1 to 5.

    The centre is the prior for one half of them and the tempered prior, proportional to
    prior^0.5, for the other.

    Source: sail-sg/regmix, mixture_config/synthesize_mixture.py.
    """
    tempered_K = prior_K**TEMPER / (prior_K**TEMPER).sum()
    concentrations = [
        np.maximum(strength * centre_K, 1e-9)
        for strength in STRENGTHS
        for centre_K in (prior_K, tempered_K)
    ]
    counts = np.diff(np.linspace(0, num_mixtures, len(concentrations) + 1).astype(int))
    return np.concatenate(
        [
            rng.dirichlet(concentration_K, count)
            for concentration_K, count in zip(concentrations, counts, strict=True)
        ]
    )

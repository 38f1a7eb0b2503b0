"""Stage 5, critical mixture ratio: the most domain data that general ability can bear.

Losses are changes since continued pretraining began, so they may be negative, and laws are fitted
to the changes themselves, not to their logs.

Shapes: S starts, R runs (rows of a law); C ratios tried, T token counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.optimize import brentq

from rayx.errors import FitError
from rayx.fit.laws.law import Inputs, Law, Parameter, Theta


@dataclass(kw_only=True)
class PowerChange(Law):
    """y(D) = a D^s + b, all three of either sign: a domain loss's change, or the critical ratio.

    Source: Gu et al. 2024, arXiv:2407.17467, the laws of the domain loss and of R_CMR(T).
    """

    name: ClassVar[str] = "power_change"
    inputs: ClassVar[tuple[str, ...]] = ("tokens",)
    on_log: ClassVar[bool] = False

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("a", start=(-1.0, 1.0), low=-math.inf),
            Parameter("s", start=(-0.5, 0.5), low=-3.0, high=3.0),
            Parameter("b", start=(0.0,), low=-math.inf),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        tokens_R = inputs["tokens"]
        power_SR = tokens_R ** theta["s"]
        return theta["a"] * power_SR + theta["b"], {
            "a": power_SR,
            "s": theta["a"] * power_SR * np.log(tokens_R),
            "b": np.ones_like(power_SR),
        }

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        return {
            "a": theta["a"] * unit["loss"] * unit["tokens"] ** -theta["s"],
            "s": theta["s"],
            "b": theta["b"] * unit["loss"],
        }


@dataclass(kw_only=True)
class TwoPowerChange(Law):
    """y(D) = a D^s + c D^(s + gap) + b, gap > 0: a general loss that rises and then recovers.

    Source: Gu et al. 2024, arXiv:2407.17467, the law of the general loss.
    Differs: the exponents are ordered (gap > 0), so that the two terms cannot change places.
    """

    name: ClassVar[str] = "two_power_change"
    inputs: ClassVar[tuple[str, ...]] = ("tokens",)
    on_log: ClassVar[bool] = False

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("a", start=(-1.0, 1.0), low=-math.inf),
            Parameter("s", start=(-1.0, -0.3), low=-3.0, high=3.0),
            Parameter("c", start=(-1.0, 1.0), low=-math.inf),
            Parameter("gap", start=(0.3, 1.0)),
            Parameter("b", start=(0.0,), low=-math.inf),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        tokens_R = inputs["tokens"]
        first_SR = tokens_R ** theta["s"]
        second_SR = tokens_R ** (theta["s"] + theta["gap"])
        by_gap_SR = theta["c"] * second_SR * np.log(tokens_R)
        return theta["a"] * first_SR + theta["c"] * second_SR + theta["b"], {
            "a": first_SR,
            "s": theta["a"] * first_SR * np.log(tokens_R) + by_gap_SR,
            "c": second_SR,
            "gap": by_gap_SR,
            "b": np.ones_like(first_SR),
        }

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        second = theta["s"] + theta["gap"]
        return {
            **theta,
            "a": theta["a"] * unit["loss"] * unit["tokens"] ** -theta["s"],
            "c": theta["c"] * unit["loss"] * unit["tokens"] ** -second,
            "b": theta["b"] * unit["loss"],
        }


@dataclass(frozen=True)
class CriticalRatio:
    """The critical mixture ratio over a budget of tokens.

    Args:
        tokens_T: Budgets at which it was found.
        ratio_T: Largest feasible domain ratio at each; nan where every ratio tried or none is
            feasible, so that the truth lies outside of them.
        law: R_CMR(D) = a D^s + b, fitted to the finite ones; predicts other budgets.
    """

    tokens_T: np.ndarray
    ratio_T: np.ndarray
    law: PowerChange


def critical_ratio(
    tokens_T: np.ndarray,
    ratio_C: np.ndarray,
    general_change_CT: np.ndarray,
    domain_change_CT: np.ndarray,
    *,
    limit: float = 0.05,
) -> CriticalRatio:
    """Largest domain ratio whose general loss rises by at most `limit`, over budgets of tokens.

    For each ratio the two laws smooth the changes over tokens; a ratio is feasible at D when the
    general change is at most `limit` and the domain loss still falls. Between the ratios tried,
    the general change is interpolated monotonically (PCHIP).

    Args:
        tokens_T: Tokens of continued pretraining, > 0, at least 6.
        ratio_C: Domain ratios tried, increasing, in (0, 1).
        general_change_CT: General loss minus the general loss before.
        domain_change_CT: The same for the domain's loss.
        limit: Rise of the general loss that is allowed, > 0.

    Raises:
        FitError: Ratios do not increase, or fewer than 4 budgets have a critical ratio between the
            ratios tried.

    Source: Gu et al. 2024, arXiv:2407.17467, the critical mixture ratio.
    Differs: PCHIP between the ratios, where the paper does not say how it interpolates.
    """
    if not (np.diff(ratio_C) > 0.0).all():
        raise FitError(
            f"ratio_C is {ratio_C}; expected ratios that increase: sort the rows by ratio"
        )
    general_CT = np.array(
        [TwoPowerChange().fit(tokens_T, y).predict(tokens_T) for y in general_change_CT]
    )
    falling_CT = np.array(
        [falls(PowerChange().fit(tokens_T, y), tokens_T) for y in domain_change_CT]
    )

    ratio_T = np.full(len(tokens_T), np.nan)
    for t in range(len(tokens_T)):
        excess_C = general_CT[:, t] - limit
        feasible_C = (excess_C <= 0.0) & falling_CT[:, t]
        last = int(np.flatnonzero(feasible_C).max(initial=-1))
        if 0 <= last < len(ratio_C) - 1:
            ratio_T[t] = ratio_C[last]
            if excess_C[last + 1] > 0.0:
                curve = PchipInterpolator(ratio_C, excess_C)
                ratio_T[t] = brentq(curve, ratio_C[last], ratio_C[last + 1])
    found_T = np.isfinite(ratio_T)
    if found_T.sum() < 4:
        raise FitError(
            f"Only {found_T.sum()} of {len(tokens_T)} budgets have a critical ratio between "
            f"{ratio_C[0]:g} and {ratio_C[-1]:g}; 4 are needed. Try ratios further "
            f"{'down' if (general_CT[0] > limit).all() else 'up'}, or another limit than {limit:g}."
        )
    law = PowerChange().fit(tokens_T[found_T], ratio_T[found_T])
    return CriticalRatio(tokens_T=tokens_T, ratio_T=ratio_T, law=law)


def falls(law: PowerChange, tokens_T: np.ndarray) -> np.ndarray:
    """Whether a fitted change falls at each count of tokens."""
    return law.predict(tokens_T * 1.01) < law.predict(tokens_T)

"""Stage 5, nested laws: from small runs cut short to the mixture law of a large, long run.

Three laws in turn: each run's curve is carried to the target's tokens, each mixture's sizes to the
target's params, and the mixture law is fitted to the losses found there.

Shapes: S starts, R rows (points of curves), G mixtures, K domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.errors import FitError
from rayx.fit.laws.law import Inputs, Law, Parameter, Theta
from rayx.fit.laws.mixture import Exponential

FEWEST = 5  # points for the three parameters of a power law


class PowerFall(Law):
    """L(x) = E + A / x^alpha in the one input that a subclass names."""

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("E", start=(0.3, 0.6, 0.9)),
            Parameter("A", start=(0.1, 0.4)),
            Parameter("alpha", start=(0.2, 0.5, 1.0)),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        (scale,) = self.inputs
        power_SR = inputs[scale] ** -theta["alpha"]
        return theta["E"] + theta["A"] * power_SR, {
            "E": np.ones_like(power_SR),
            "A": power_SR,
            "alpha": -theta["A"] * power_SR * np.log(inputs[scale]),
        }

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        (scale,) = self.inputs
        return {
            "E": theta["E"] * unit["loss"],
            "A": theta["A"] * unit["loss"] * unit[scale] ** theta["alpha"],
            "alpha": theta["alpha"],
        }


@dataclass(kw_only=True)
class TokenLaw(PowerFall):
    """L(D) = E + A / D^alpha, along one run (Ye et al. 2024, arXiv:2403.16952, the step law)."""

    name: ClassVar[str] = "tokens"
    inputs: ClassVar[tuple[str, ...]] = ("tokens",)


@dataclass(kw_only=True)
class SizeLaw(PowerFall):
    """L(N) = E + A / N^alpha, at one mixture (Ye et al. 2024, arXiv:2403.16952, the size law)."""

    name: ClassVar[str] = "size"
    inputs: ClassVar[tuple[str, ...]] = ("params",)


def nested_mixture_law(
    weights_RK: np.ndarray,
    params_R: np.ndarray,
    tokens_R: np.ndarray,
    loss_R: np.ndarray,
    *,
    params: float,
    tokens: float,
) -> Exponential:
    """Fit the mixture law of a target scale from the curves of small, short runs.

    Step law L(D) = E + B / D^beta for each (mixture, size), read at `tokens`; size law
    L(N) = E + A / N^alpha for each mixture, read at `params`; then L(w) = c + exp(sum_j t_j w_j).

    Args:
        weights_RK: Mixture of each row; rows of one run are its evaluations at several tokens.
        params_R: Size of each row's run, > 0.
        tokens_R: Tokens trained on at the row's evaluation, > 0.
        loss_R: Loss there, > 0.
        params: The target's size.
        tokens: The target's tokens.

    Returns:
        The law at the target's scale; `predict` takes mixtures that were never run.

    Raises:
        FitError: A run has fewer than 5 evaluations, or a mixture fewer than 5 sizes.

    Source: Ye et al. 2024, arXiv:2403.16952, the nested use of scaling laws.
    Differs: tokens in place of steps; at least 5 sizes, where the paper has 4.
    """
    runs, run_R = np.unique(np.column_stack([weights_RK, params_R]), axis=0, return_inverse=True)
    run_R = run_R.reshape(-1)
    at_tokens = [
        read(TokenLaw(), tokens_R[run_R == run], loss_R[run_R == run], tokens, f"run {runs[run]}")
        for run in range(len(runs))
    ]
    mixtures_GK, mixture_U = np.unique(runs[:, :-1], axis=0, return_inverse=True)
    mixture_U = mixture_U.reshape(-1)
    at_params = [
        read(
            SizeLaw(),
            runs[mixture_U == g, -1],
            np.array(at_tokens)[mixture_U == g],
            params,
            f"mixture {mixtures_GK[g]}",
        )
        for g in range(len(mixtures_GK))
    ]
    return Exponential().fit(mixtures_GK, np.array(at_params))


def read(law: Law, scale_R: np.ndarray, loss_R: np.ndarray, at: float, of: str) -> float:
    """Fit a law of one input and read it at one value."""
    if len(scale_R) < FEWEST:
        raise FitError(
            f"The {law.name} law of {of} has {len(scale_R)} points in {law.inputs[0]}; expected at "
            f"least {FEWEST}. Evaluate more often, or add sizes."
        )
    return float(law.fit(scale_R, loss_R).predict(np.array([at]))[0])

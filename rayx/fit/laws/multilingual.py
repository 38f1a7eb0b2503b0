"""Stage 5, multilingual law: a language's share of the mixture as a share of the parameters.

Shapes: S starts, R runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import xlogy

from rayx.fit.laws.law import Inputs, Law, Parameter, Theta
from rayx.fit.laws.mixture import refuse_zero_ratio


@dataclass(kw_only=True)
class Multilingual(Law):
    """L(N, p) = E + B / (f(p) N)^alpha, with f(p) = p + c1 p^c2 (1 - p)^c3.

    Of a model trained with share p of a language, a fraction f(p) of the parameters works for that
    language: exponent and floor do not depend on the mixture, and f(1) = 1.

    Source: Fernandes et al. 2023, arXiv:2302.09650, the joint law; the form of f is written from
        memory, not from the text.
    """

    name: ClassVar[str] = "multilingual"
    inputs: ClassVar[tuple[str, ...]] = ("params", "ratio")

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("E", start=(0.3, 0.7)),
            Parameter("B", start=(0.1, 0.4)),
            Parameter("alpha", start=(0.2, 0.5)),
            Parameter("c1", start=(0.1, 0.5)),
            Parameter("c2", start=(0.3, 0.8)),
            Parameter("c3", start=(0.5, 1.5)),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        params_R, ratio_R = inputs["params"], inputs["ratio"]
        rest_SR = (1.0 - ratio_R) ** theta["c3"]
        bonus_SR = ratio_R ** theta["c2"] * rest_SR
        fraction_SR = ratio_R + theta["c1"] * bonus_SR
        size_SR = (fraction_SR * params_R) ** -theta["alpha"]
        by_fraction_SR = -theta["alpha"] * theta["B"] * size_SR / fraction_SR
        by_c1_SR = by_fraction_SR * bonus_SR
        return theta["E"] + theta["B"] * size_SR, {
            "E": np.ones_like(size_SR),
            "B": size_SR,
            "alpha": -theta["B"] * size_SR * np.log(fraction_SR * params_R),
            "c1": by_c1_SR,
            "c2": by_c1_SR * theta["c1"] * np.log(ratio_R),
            "c3": by_fraction_SR * theta["c1"] * xlogy(bonus_SR, 1.0 - ratio_R),
        }

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        return {
            **theta,
            "E": theta["E"] * unit["loss"],
            "B": theta["B"] * unit["loss"] * unit["params"] ** theta["alpha"],
        }

    def check(self, inputs: Inputs) -> None:
        refuse_zero_ratio(self.name, inputs["ratio"])


def effective_fraction(
    scale_P: np.ndarray | float, scale_alone: float, alpha: float
) -> np.ndarray | float:
    """Fraction of the parameters that works for a language: f = (B_1 / B_p)^(1 / alpha).

    Args:
        scale_P: B_p of L(N) = E + B_p / N^alpha, fitted at each share p, > 0.
        scale_alone: B_1 of the language alone (p = 1), > 0.
        alpha: The exponent that all of them share, > 0.

    Source: Fernandes et al. 2023, arXiv:2302.09650, effective number of parameters.
    """
    return (scale_alone / scale_P) ** (1.0 / alpha)

"""Laws: loss in model size and tokens.

Shapes: see `law.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.fit.laws.law import Inputs, Law, Parameter, Theta, Unit

FLOOR = (0.3, 0.6, 0.9)  # starts of E, of the typical loss
EXCESS = (0.05, 0.2)  # starts of A and B: the share of a term at typical scale
EXPONENT = (0.2, 0.4, 0.6)  # starts of exponents


@dataclass(kw_only=True)
class Chinchilla(Law):
    """L(N, D) = E + A / N^alpha + B / D^beta.

    E in the unit of the loss, N parameters, D tokens; all five parameters > 0.

    Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 2; free_scale=True is the refit of
        Besiroglu et al. 2024, arXiv:2404.10102.
    """

    name: ClassVar[str] = "chinchilla"
    inputs: ClassVar[tuple[str, ...]] = ("params", "tokens")

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("E", FLOOR),
            Parameter("A", EXCESS),
            Parameter("B", EXCESS),
            Parameter("alpha", EXPONENT),
            Parameter("beta", EXPONENT),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        log_params_R, log_tokens_R = np.log(inputs["params"]), np.log(inputs["tokens"])
        by_size_SR = np.exp(-theta["alpha"] * log_params_R)
        by_tokens_SR = np.exp(-theta["beta"] * log_tokens_R)
        size_SR, tokens_SR = theta["A"] * by_size_SR, theta["B"] * by_tokens_SR
        loss_SR = theta["E"] + size_SR + tokens_SR
        return loss_SR, {
            "E": np.ones_like(loss_SR),
            "A": by_size_SR,
            "B": by_tokens_SR,
            "alpha": -size_SR * log_params_R,
            "beta": -tokens_SR * log_tokens_R,
        }

    def natural(self, theta: Theta, unit: Unit) -> dict[str, np.ndarray]:
        return {
            **theta,
            "E": theta["E"] * unit["loss"],
            "A": theta["A"] * unit["loss"] * unit["params"] ** theta["alpha"],
            "B": theta["B"] * unit["loss"] * unit["tokens"] ** theta["beta"],
        }

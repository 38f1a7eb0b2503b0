"""Stage 5, law of repetition: what a token is worth when it is seen again.

Shapes: S starts, R runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.fit.laws.law import Inputs, Law, Parameter, Theta
from rayx.units import effective_tokens


@dataclass(kw_only=True)
class Repetition(Law):
    """L(N, D, U) = E + A / N^alpha + B / D'^beta, with D' = U + U R* (1 - exp(-R / R*)).

    U = min(unique_tokens, tokens) are fresh and R = D / U - 1 times they come back; at one epoch
    and less the law is Chinchilla's.

    Source: Muennighoff et al. 2023, arXiv:2305.16264, section 3.1 (R* = 15.39 there).
    Differs: parameters are not discounted in the way of data (the paper's N' and R_N*).
    """

    name: ClassVar[str] = "repetition"
    inputs: ClassVar[tuple[str, ...]] = ("params", "tokens", "unique_tokens")

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("E", start=(0.4, 0.8)),
            Parameter("A", start=(0.1, 0.3)),
            Parameter("alpha", start=(0.2, 0.5)),
            Parameter("B", start=(0.1, 0.3)),
            Parameter("beta", start=(0.2, 0.5)),
            Parameter("R_star", start=(3.0, 15.0)),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        params_R, tokens_R, unique_R = (inputs[name] for name in self.inputs)
        once_R = np.minimum(tokens_R, unique_R)
        decay_SR = (tokens_R - once_R) / once_R / theta["R_star"]
        worth_SR = effective_tokens(tokens_R, unique_R, theta["R_star"])
        size_SR = params_R ** -theta["alpha"]
        data_SR = worth_SR ** -theta["beta"]
        by_worth_SR = -theta["beta"] * theta["B"] * data_SR / worth_SR
        return theta["E"] + theta["A"] * size_SR + theta["B"] * data_SR, {
            "E": np.ones_like(data_SR),
            "A": size_SR,
            "alpha": -theta["A"] * size_SR * np.log(params_R),
            "B": data_SR,
            "beta": -theta["B"] * data_SR * np.log(worth_SR),
            "R_star": by_worth_SR * once_R * (1.0 - (1.0 + decay_SR) * np.exp(-decay_SR)),
        }

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        return {
            **theta,
            "E": theta["E"] * unit["loss"],
            "A": theta["A"] * unit["loss"] * unit["params"] ** theta["alpha"],
            "B": theta["B"] * unit["loss"] * unit["tokens"] ** theta["beta"],
        }

"""Laws of a split in which the model's size matters for where to split.

In the forms of `specialisation.py` size is a term of its own, so the best split is the same for all
sizes. Here it is not.

Shapes: see `law.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.fit.laws.chinchilla import EXCESS, EXPONENT
from rayx.fit.laws.law import Inputs, Law, Parameter, Theta, Unit
from rayx.fit.laws.specialisation import TURN, plain_parameters

INPUTS = ("params", "tokens", "spec_tokens")


@dataclass(kw_only=True)
class SplitProportional(Law):
    """L = E + (A / N^alpha + B / D^beta) (1 + D' / D1)^-gamma.

    Specialisation takes a share of all that is above the floor, so that larger models, with less
    above it, gain less. At D' = 0 the Chinchilla law.

    Source: derived.
    """

    name: ClassVar[str] = "split_proportional"
    inputs: ClassVar[tuple[str, ...]] = INPUTS

    def parameters(self) -> tuple[Parameter, ...]:
        return plain_parameters(Parameter("D1", TURN), Parameter("gamma", EXPONENT))

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        params_R, tokens_R = inputs["params"], inputs["tokens"]
        ratio_SR = inputs["spec_tokens"] / theta["D1"]
        share_SR = (1.0 + ratio_SR) ** -theta["gamma"]
        by_a_SR = params_R ** -theta["alpha"] * share_SR
        by_b_SR = tokens_R ** -theta["beta"] * share_SR
        excess_SR = theta["A"] * by_a_SR + theta["B"] * by_b_SR
        return theta["E"] + excess_SR, {
            "E": np.ones_like(excess_SR),
            "A": by_a_SR,
            "alpha": -theta["A"] * by_a_SR * np.log(params_R),
            "B": by_b_SR,
            "beta": -theta["B"] * by_b_SR * np.log(tokens_R),
            "D1": theta["gamma"] * excess_SR * ratio_SR / (1.0 + ratio_SR) / theta["D1"],
            "gamma": -excess_SR * np.log1p(ratio_SR),
        }

    def natural(self, theta: Theta, unit: Unit) -> dict[str, np.ndarray]:
        return {
            **theta,
            "E": theta["E"] * unit["loss"],
            "A": theta["A"] * unit["loss"] * unit["params"] ** theta["alpha"],
            "B": theta["B"] * unit["loss"] * unit["tokens"] ** theta["beta"],
            "D1": theta["D1"] * unit["tokens"],
        }


@dataclass(kw_only=True)
class SplitCoupled(Law):
    """L = E + (A / N^alpha + B / D^beta (1 + D' / (D1 D^delta N^nu))^-gamma)^b.

    Two things that runs on real text show and the other forms lack: a larger model is worth the
    more, the more tokens it sees (b < 1), and the tokens of the domain that it takes to leave the
    general model behind grow with what went into it (delta, nu > 0). At D' = 0 the law of Kaplan
    with a floor; with b = 1 and delta = nu = 0 `split_interaction`.

    Source: the outer power: Kaplan et al. 2020, arXiv:2001.08361, eq. 1.5; the rest is derived.
    """

    name: ClassVar[str] = "split_coupled"
    inputs: ClassVar[tuple[str, ...]] = INPUTS

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("E", (0.1, 0.5)),
            Parameter("A", EXCESS),
            Parameter("alpha", EXPONENT),
            Parameter("B", EXCESS),
            Parameter("beta", EXPONENT),
            Parameter("D1", TURN),
            Parameter("gamma", EXPONENT),
            Parameter("delta", (0.0, 0.5), low=-math.inf),
            Parameter("nu", (0.0, 0.3), low=-math.inf),
            Parameter("b", (0.3, 0.8), high=1.0),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        log_params_R, log_tokens_R = np.log(inputs["params"]), np.log(inputs["tokens"])
        turn_SR = theta["D1"] * np.exp(theta["delta"] * log_tokens_R + theta["nu"] * log_params_R)
        ratio_SR = inputs["spec_tokens"] / turn_SR
        by_a_SR = np.exp(-theta["alpha"] * log_params_R)
        by_b_SR = np.exp(-theta["beta"] * log_tokens_R) * (1.0 + ratio_SR) ** -theta["gamma"]
        size_SR, data_SR = theta["A"] * by_a_SR, theta["B"] * by_b_SR
        sum_SR = size_SR + data_SR
        excess_SR = sum_SR ** theta["b"]
        by_sum_SR = theta["b"] * excess_SR / sum_SR
        by_turn_SR = by_sum_SR * theta["gamma"] * data_SR * ratio_SR / (1.0 + ratio_SR)
        return theta["E"] + excess_SR, {
            "E": np.ones_like(excess_SR),
            "A": by_sum_SR * by_a_SR,
            "alpha": -by_sum_SR * size_SR * log_params_R,
            "B": by_sum_SR * by_b_SR,
            "beta": -by_sum_SR * data_SR * log_tokens_R,
            "D1": by_turn_SR / theta["D1"],
            "gamma": -by_sum_SR * data_SR * np.log1p(ratio_SR),
            "delta": by_turn_SR * log_tokens_R,
            "nu": by_turn_SR * log_params_R,
            "b": excess_SR * np.log(sum_SR),
        }

    def natural(self, theta: Theta, unit: Unit) -> dict[str, np.ndarray]:
        scale = unit["loss"] ** (1.0 / theta["b"])
        return {
            **theta,
            "E": theta["E"] * unit["loss"],
            "A": theta["A"] * scale * unit["params"] ** theta["alpha"],
            "B": theta["B"] * scale * unit["tokens"] ** theta["beta"],
            "D1": theta["D1"]
            * unit["tokens"] ** (1.0 - theta["delta"])
            * unit["params"] ** -theta["nu"],
        }

"""Laws of a split in which the model's size matters for where to split.

In the forms of `specialisation.py` size is a term of its own, so the best split is the same for all
sizes. Here it is not: larger models get more out of the general tokens.

Shapes: see `law.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.fit.laws.chinchilla import EXCESS, EXPONENT, FLOOR
from rayx.fit.laws.law import Inputs, Law, Parameter, Theta, Unit
from rayx.fit.laws.specialisation import TURN

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
        return (
            Parameter("E", FLOOR),
            Parameter("A", EXCESS),
            Parameter("alpha", EXPONENT),
            Parameter("B", EXCESS),
            Parameter("beta", EXPONENT),
            Parameter("D1", TURN),
            Parameter("gamma", EXPONENT),
        )

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
class SplitTransfer(Law):
    """L = E + A / N^alpha + B / (rho D^kappa N^nu + D')^beta.

    General tokens are worth rho D^kappa N^nu tokens of the domain: more to larger models. At D' = 0
    B rho^-beta N^(-nu beta) D^(-kappa beta) beside the term in N.

    Source: the effective data transferred of Hernandez et al. 2021, arXiv:2102.01293, eq. 1.2;
        its place in the law is derived.
    """

    name: ClassVar[str] = "split_transfer"
    inputs: ClassVar[tuple[str, ...]] = INPUTS

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("E", FLOOR),
            Parameter("A", EXCESS),
            Parameter("alpha", EXPONENT),
            Parameter("B", EXCESS),
            Parameter("beta", EXPONENT),
            Parameter("rho", (0.05, 0.5)),
            Parameter("kappa", (0.5, 0.9)),
            Parameter("nu", (0.1, 0.4)),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        params_R, tokens_R = inputs["params"], inputs["tokens"]
        by_size_SR = params_R ** -theta["alpha"]
        by_rho_SR = tokens_R ** theta["kappa"] * params_R ** theta["nu"]
        effective_SR = theta["rho"] * by_rho_SR + inputs["spec_tokens"]
        by_b_SR = effective_SR ** -theta["beta"]
        data_SR = theta["B"] * by_b_SR
        by_log_general_SR = -theta["beta"] * data_SR * theta["rho"] * by_rho_SR / effective_SR
        return theta["E"] + theta["A"] * by_size_SR + data_SR, {
            "E": np.ones_like(data_SR),
            "A": by_size_SR,
            "alpha": -theta["A"] * by_size_SR * np.log(params_R),
            "B": by_b_SR,
            "beta": -data_SR * np.log(effective_SR),
            "rho": by_log_general_SR / theta["rho"],
            "kappa": by_log_general_SR * np.log(tokens_R),
            "nu": by_log_general_SR * np.log(params_R),
        }

    def natural(self, theta: Theta, unit: Unit) -> dict[str, np.ndarray]:
        return {
            **theta,
            "E": theta["E"] * unit["loss"],
            "A": theta["A"] * unit["loss"] * unit["params"] ** theta["alpha"],
            "B": theta["B"] * unit["loss"] * unit["tokens"] ** theta["beta"],
            "rho": theta["rho"]
            * unit["tokens"] ** (1.0 - theta["kappa"])
            * unit["params"] ** -theta["nu"],
        }

"""Laws of a split: loss on a domain after D tokens of all data and D' tokens of the domain.

Four candidate forms; which one holds is decided by extrapolation (`choose_law`), not by the error
on the runs fitted. Without specialisation (D' = 0) each of them is a plain law in N and D.

Shapes: see `law.py`.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.fit.laws.chinchilla import EXCESS, EXPONENT, FLOOR
from rayx.fit.laws.law import Inputs, Law, Parameter, Theta, Unit

TURN = (0.01, 0.3)  # starts of D0 and D1, of the typical D


@dataclass(kw_only=True)
class SplitLaw(Law):
    """L(N, D, D') = E + A / N^alpha + data term; N parameters, D > 0 and D' >= 0 tokens."""

    inputs: ClassVar[tuple[str, ...]] = ("params", "tokens", "spec_tokens")

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        log_params_R = np.log(inputs["params"])
        by_size_SR = np.exp(-theta["alpha"] * log_params_R)
        data_SR, derivatives = self.data_term(theta, inputs["tokens"], inputs["spec_tokens"])
        size_SR = theta["A"] * by_size_SR
        return theta["E"] + size_SR + data_SR, {
            "E": np.ones_like(data_SR),
            "A": by_size_SR,
            "alpha": -size_SR * log_params_R,
            **derivatives,
        }

    @abstractmethod
    def data_term(
        self, theta: Theta, tokens_R: np.ndarray, spec_R: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """What the tokens leave of the loss, (S, R), and its derivatives."""

    def natural(self, theta: Theta, unit: Unit) -> dict[str, np.ndarray]:
        return {
            **theta,
            "E": theta["E"] * unit["loss"],
            "A": theta["A"] * unit["loss"] * unit["params"] ** theta["alpha"],
            "B": theta["B"] * unit["loss"] * unit["tokens"] ** theta["beta"],
        }


def plain_parameters(*more: Parameter) -> tuple[Parameter, ...]:
    """The parameters of E + A / N^alpha + B / D^beta, and more."""
    return (
        Parameter("E", FLOOR),
        Parameter("A", EXCESS),
        Parameter("alpha", EXPONENT),
        Parameter("B", EXCESS),
        Parameter("beta", EXPONENT),
        *more,
    )


@dataclass(kw_only=True)
class SplitAdditive(SplitLaw):
    """L = E + A / N^alpha + B / D^beta + C / (D' + D0)^gamma.

    At D' = 0 a Chinchilla law with floor E + C / D0^gamma.

    Source: derived.
    """

    name: ClassVar[str] = "split_additive"

    def parameters(self) -> tuple[Parameter, ...]:
        return plain_parameters(
            Parameter("C", EXCESS), Parameter("D0", TURN), Parameter("gamma", EXPONENT)
        )

    def data_term(
        self, theta: Theta, tokens_R: np.ndarray, spec_R: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        by_tokens_SR = tokens_R ** -theta["beta"]
        total_SR = spec_R + theta["D0"]
        by_spec_SR = total_SR ** -theta["gamma"]
        spec_SR = theta["C"] * by_spec_SR
        return theta["B"] * by_tokens_SR + spec_SR, {
            "B": by_tokens_SR,
            "beta": -theta["B"] * by_tokens_SR * np.log(tokens_R),
            "C": by_spec_SR,
            "D0": -theta["gamma"] * spec_SR / total_SR,
            "gamma": -spec_SR * np.log(total_SR),
        }

    def natural(self, theta: Theta, unit: Unit) -> dict[str, np.ndarray]:
        return {
            **super().natural(theta, unit),
            "C": theta["C"] * unit["loss"] * unit["tokens"] ** theta["gamma"],
            "D0": theta["D0"] * unit["tokens"],
        }


@dataclass(kw_only=True)
class SplitInteraction(SplitLaw):
    """L = E + A / N^alpha + B / D^beta (1 + D' / D1)^-gamma.

    At D' = 0 the Chinchilla law.

    Source: derived.
    """

    name: ClassVar[str] = "split_interaction"

    def parameters(self) -> tuple[Parameter, ...]:
        return plain_parameters(Parameter("D1", TURN), Parameter("gamma", EXPONENT))

    def data_term(
        self, theta: Theta, tokens_R: np.ndarray, spec_R: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return _two_stage(theta, tokens_R, spec_R, theta["gamma"])

    def natural(self, theta: Theta, unit: Unit) -> dict[str, np.ndarray]:
        return {**super().natural(theta, unit), "D1": theta["D1"] * unit["tokens"]}


@dataclass(kw_only=True)
class SplitEffective(SplitLaw):
    """L = E + A / N^alpha + B / (rho D^kappa + D')^beta.

    Tokens of all data count as rho D^kappa tokens of the domain. At D' = 0 a Chinchilla law with
    B rho^-beta / D^(kappa beta).

    Source: derived, after the effective data of Hernandez et al. 2021, arXiv:2102.01293.
    """

    name: ClassVar[str] = "split_effective"

    def parameters(self) -> tuple[Parameter, ...]:
        return plain_parameters(Parameter("rho", (0.05, 0.5)), Parameter("kappa", (0.5, 0.9)))

    def data_term(
        self, theta: Theta, tokens_R: np.ndarray, spec_R: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        by_rho_SR = tokens_R ** theta["kappa"]
        effective_SR = theta["rho"] * by_rho_SR + spec_R
        by_b_SR = effective_SR ** -theta["beta"]
        data_SR = theta["B"] * by_b_SR
        by_effective_SR = -theta["beta"] * data_SR / effective_SR
        return data_SR, {
            "B": by_b_SR,
            "beta": -data_SR * np.log(effective_SR),
            "rho": by_effective_SR * by_rho_SR,
            "kappa": by_effective_SR * theta["rho"] * by_rho_SR * np.log(tokens_R),
        }

    def natural(self, theta: Theta, unit: Unit) -> dict[str, np.ndarray]:
        rho = theta["rho"] * unit["tokens"] ** (1.0 - theta["kappa"])
        return {**super().natural(theta, unit), "rho": rho}


@dataclass(kw_only=True)
class SplitTwoStage(SplitLaw):
    """L = E + A / N^alpha + B / D^beta (1 + D' / D1)^-(gamma - epsilon ln D).

    The exponent of the second stage falls with the tokens of the first where epsilon > 0. At D' = 0
    the Chinchilla law.

    Source: derived, after the behaviour in Liew and Kato 2025, arXiv:2510.06548.
    Differs: 1 + D' / D1 in place of D', which is not finite at D' = 0.
    """

    name: ClassVar[str] = "split_two_stage"

    def parameters(self) -> tuple[Parameter, ...]:
        return plain_parameters(
            Parameter("D1", TURN),
            Parameter("gamma", EXPONENT, low=-math.inf),
            Parameter("epsilon", (0.0, 0.05), low=-math.inf),
        )

    def data_term(
        self, theta: Theta, tokens_R: np.ndarray, spec_R: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        exponent_SR = theta["gamma"] - theta["epsilon"] * np.log(tokens_R)
        data_SR, derivatives = _two_stage(theta, tokens_R, spec_R, exponent_SR)
        by_epsilon_SR = -derivatives["gamma"] * np.log(tokens_R)
        return data_SR, {**derivatives, "epsilon": by_epsilon_SR}

    def natural(self, theta: Theta, unit: Unit) -> dict[str, np.ndarray]:
        return {
            **super().natural(theta, unit),
            "D1": theta["D1"] * unit["tokens"],
            "gamma": theta["gamma"] + theta["epsilon"] * np.log(unit["tokens"]),
        }


def _two_stage(
    theta: Theta, tokens_R: np.ndarray, spec_R: np.ndarray, exponent: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """B / D^beta (1 + D' / D1)^-exponent; "gamma" is its derivative by the exponent."""
    ratio_SR = spec_R / theta["D1"]
    by_b_SR = tokens_R ** -theta["beta"] * (1.0 + ratio_SR) ** -exponent
    data_SR = theta["B"] * by_b_SR
    return data_SR, {
        "B": by_b_SR,
        "beta": -data_SR * np.log(tokens_R),
        "D1": exponent * data_SR * ratio_SR / (1.0 + ratio_SR) / theta["D1"],
        "gamma": -data_SR * np.log1p(ratio_SR),
    }

"""Stage 5, laws of the mixture: loss as a function of domain weights, alone or with N and D.

Ye's exponential law, BiMix, and the additive and the joint law of Shukor. Each is fitted for one
loss at a time (one domain's, or a mean). What a law says of scale differs, and that matters more
than its error: under the additive law the best mixture is the same at every N and D, under the
joint law it moves.

Shapes: S starts, R runs, K domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.special import xlogy

from rayx.errors import FitError
from rayx.fit.laws.law import Inputs, Law, Parameter, Theta


@dataclass(kw_only=True)
class Exponential(Law):
    """L(w) = c + exp(sum_j t_j w_j), at one scale.

    t_j is the log of what is left above the floor c when all data are of domain j.

    Source: Ye et al. 2024, arXiv:2403.16952, the data mixing law.
    Differs: the paper's k exp(sum_j t_j w_j) has one parameter too many, since the weights sum to
        1 and a factor k is the same as log k added to every t_j; k is 1 here.
    """

    name: ClassVar[str] = "exponential"
    inputs: ClassVar[tuple[str, ...]] = ("weights",)

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("c", start=(0.4, 0.8)),
            Parameter("t", start=(-1.0,), low=-math.inf, per_domain=True),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        weights_RK = inputs["weights"]
        excess_SR = np.exp(theta["t"][:, 0] @ weights_RK.T)
        return theta["c"] + excess_SR, {
            "c": np.ones_like(excess_SR),
            "t": excess_SR[..., None] * weights_RK,
        }

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        return {"c": theta["c"] * unit["loss"], "t": theta["t"] + np.log(unit["loss"])}


@dataclass(kw_only=True)
class BiMix(Law):
    """L(r, D) = (B / D^beta + C) / r^alpha, with r the domain's own share of the D tokens.

    Source: Ge et al. 2024, arXiv:2405.14908; the form is written from memory, not from the text.
    Differs: the paper's leading factor A is 1 here, since A B and A C are all that the loss shows.
    """

    name: ClassVar[str] = "bimix"
    inputs: ClassVar[tuple[str, ...]] = ("tokens", "ratio")

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("alpha", start=(0.03, 0.15)),
            Parameter("B", start=(0.1, 0.4)),
            Parameter("beta", start=(0.2, 0.5)),
            Parameter("C", start=(0.6,)),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        tokens_R, ratio_R = inputs["tokens"], inputs["ratio"]
        share_SR = ratio_R ** -theta["alpha"]
        data_SR = tokens_R ** -theta["beta"]
        loss_SR = share_SR * (theta["B"] * data_SR + theta["C"])
        return loss_SR, {
            "alpha": -loss_SR * np.log(ratio_R),
            "B": share_SR * data_SR,
            "beta": -share_SR * theta["B"] * data_SR * np.log(tokens_R),
            "C": share_SR,
        }

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        return {
            **theta,
            "B": theta["B"] * unit["loss"] * unit["tokens"] ** theta["beta"],
            "C": theta["C"] * unit["loss"],
        }

    def check(self, inputs: Inputs) -> None:
        refuse_zero_ratio(self.name, inputs["ratio"])


@dataclass(kw_only=True)
class AdditiveMixture(Law):
    """L(w, N, D) = E + 1 / sum_j C_j w_j^gamma_j + A / N^alpha + B / D^beta.

    The mixture's term stands alone, so the best mixture does not depend on N or D.

    Source: Shukor et al. 2025, arXiv:2507.09404, the additive law.
    Differs: gamma_j is bounded by 2.
    """

    name: ClassVar[str] = "additive_mixture"
    inputs: ClassVar[tuple[str, ...]] = ("params", "tokens", "weights")

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            *MIXTURE_TERM,
            Parameter("A", start=(0.1,)),
            Parameter("alpha", start=(0.2, 0.5)),
            Parameter("B", start=(0.1,)),
            Parameter("beta", start=(0.2, 0.5)),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        params_R, tokens_R = inputs["params"], inputs["tokens"]
        term_SR, derivatives = mixture_term(theta, inputs["weights"])
        size_SR = params_R ** -theta["alpha"]
        data_SR = tokens_R ** -theta["beta"]
        return term_SR + theta["A"] * size_SR + theta["B"] * data_SR, {
            **derivatives,
            "A": size_SR,
            "alpha": -theta["A"] * size_SR * np.log(params_R),
            "B": data_SR,
            "beta": -theta["B"] * data_SR * np.log(tokens_R),
        }

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        return {
            **theta,
            "E": theta["E"] * unit["loss"],
            "C": theta["C"] / unit["loss"],
            "A": theta["A"] * unit["loss"] * unit["params"] ** theta["alpha"],
            "B": theta["B"] * unit["loss"] * unit["tokens"] ** theta["beta"],
        }


@dataclass(kw_only=True)
class JointMixture(Law):
    """L(w, N, D) = E + 1 / sum_j C_j w_j^gamma_j + A(w) / N^alpha + B(w) / D^beta.

    A(w) = (sum_j A_j w_j)^a and B(w) = (sum_j B_j w_j)^b: some data ask for more parameters, some
    for more tokens, so the best mixture moves with scale.

    Source: Shukor et al. 2025, arXiv:2507.09404, the joint law; the form of A(w) and B(w) is
        written from memory, not from the text.
    Differs: gamma_j is bounded by 2, and a and b by 3.
    """

    name: ClassVar[str] = "joint_mixture"
    inputs: ClassVar[tuple[str, ...]] = ("params", "tokens", "weights")

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            *MIXTURE_TERM,
            Parameter("A", start=(0.1,), per_domain=True),
            Parameter("a", start=(1.0,), high=3.0),
            Parameter("alpha", start=(0.2, 0.5)),
            Parameter("B", start=(0.1,), per_domain=True),
            Parameter("b", start=(1.0,), high=3.0),
            Parameter("beta", start=(0.2, 0.5)),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        loss_SR, derivatives = mixture_term(theta, inputs["weights"])
        for factor, power, exponent, scale in (
            ("A", "a", "alpha", "params"),
            ("B", "b", "beta", "tokens"),
        ):
            weights_RK, scale_R = inputs["weights"], inputs[scale]
            sum_SR = theta[factor][:, 0] @ weights_RK.T
            term_SR = sum_SR ** theta[power] * scale_R ** -theta[exponent]
            loss_SR = loss_SR + term_SR
            by_sum_SR = theta[power] * term_SR / sum_SR
            derivatives |= {
                factor: by_sum_SR[..., None] * weights_RK,
                power: term_SR * np.log(sum_SR),
                exponent: -term_SR * np.log(scale_R),
            }
        return loss_SR, derivatives

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        size = (unit["loss"] * unit["params"] ** theta["alpha"]) ** (1.0 / theta["a"])
        data = (unit["loss"] * unit["tokens"] ** theta["beta"]) ** (1.0 / theta["b"])
        return {
            **theta,
            "E": theta["E"] * unit["loss"],
            "C": theta["C"] / unit["loss"],
            "A": theta["A"] * size[..., None],
            "B": theta["B"] * data[..., None],
        }


MIXTURE_TERM = (
    Parameter("E", start=(0.3, 0.6)),
    Parameter("C", start=(2.0,), per_domain=True),
    Parameter("gamma", start=(0.2, 0.5), high=2.0, per_domain=True),
)


def mixture_term(theta: Theta, weights_RK: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """E + 1 / sum_j C_j w_j^gamma_j and its derivatives; an absent domain adds nothing."""
    power_SRK = weights_RK ** theta["gamma"]
    inverse_SR = 1.0 / np.einsum("sk,srk->sr", theta["C"][:, 0], power_SRK)
    by_sum_SR1 = -(inverse_SR**2)[..., None]
    return theta["E"] + inverse_SR, {
        "E": np.ones_like(inverse_SR),
        "C": by_sum_SR1 * power_SRK,
        "gamma": by_sum_SR1 * theta["C"] * xlogy(power_SRK, weights_RK),
    }


def refuse_zero_ratio(law: str, ratio_R: np.ndarray) -> None:
    """Raise FitError for a share that is not in (0, 1], where a power of it has no value."""
    bad_R = ~((ratio_R > 0.0) & (ratio_R <= 1.0))
    if bad_R.any():
        row = int(np.argmax(bad_R))
        raise FitError(
            f"Law {law!r}: ratio of row {row} is {ratio_R[row]:g}; expected a share in (0, 1], "
            "since the law is infinite without data of the domain. Leave such runs out."
        )

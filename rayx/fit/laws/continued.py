"""Stage 5, laws of continued pretraining: how much domain data to mix into general data.

The D-CPT law, its cross-domain form, and the three questions that the paper answers with it. A law
is fitted per loss: for the domain's loss `ratio` is the domain's share of the tokens, for the
general loss it is the general data's share.

Shapes: S starts, R runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import xlogy

from rayx.errors import ChoiceError, FitError
from rayx.fit.laws.law import Inputs, Law, Parameter, Theta

DCPT_PARAMETERS = (
    Parameter("E", start=(0.3, 0.6)),
    Parameter("A", start=(0.1,)),
    Parameter("alpha", start=(0.2, 0.5)),
    Parameter("B", start=(0.1,)),
    Parameter("beta", start=(0.2, 0.5)),
    Parameter("eta", start=(0.2, 1.0)),
    Parameter("C", start=(0.1,)),
    Parameter("gamma", start=(0.3, 1.0)),
    Parameter("epsilon", start=(0.02, 0.2)),
)


@dataclass(kw_only=True)
class DCPT(Law):
    """L(N, D, r) = E + A / N^alpha + B r^eta / D^beta + C / (r + epsilon)^gamma.

    r is the share, in [0, 1], of the corpus whose loss is predicted. The paper asks for a law that
    falls in r; the formula does not enforce it (with eta < 1 it rises near r = 0).

    Source: Que et al. 2024, arXiv:2406.01375, the D-CPT law.
    """

    name: ClassVar[str] = "dcpt"
    inputs: ClassVar[tuple[str, ...]] = ("params", "tokens", "ratio")

    def parameters(self) -> tuple[Parameter, ...]:
        return DCPT_PARAMETERS

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return dcpt_loss(theta, inputs)

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        return dcpt_natural(theta, unit)

    def check(self, inputs: Inputs) -> None:
        refuse_ratio_above_one(self.name, inputs["ratio"])


@dataclass(kw_only=True)
class CrossDomainDCPT(Law):
    """The D-CPT law over several domains: L(N, D, r, K) = L(N, D, r) + F / K^mu.

    K = 1 / k1 + w k2 says how well the domain is learned, from a short trial: k1 is the initial
    validation loss, k2 the loss's decline over the first steps.

    Source: Que et al. 2024, arXiv:2406.01375, the cross-domain D-CPT law.
    Differs: the paper's K = w1 / k1 + w2 k2 has one parameter too many, since a common factor of
        w1 and w2 is one of F; w1 is 1 here.
    """

    name: ClassVar[str] = "cross_domain_dcpt"
    inputs: ClassVar[tuple[str, ...]] = ("params", "tokens", "ratio", "initial_loss", "decline")

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            *DCPT_PARAMETERS,
            Parameter("F", start=(0.05,)),
            Parameter("mu", start=(0.5, 1.5)),
            Parameter("w", start=(0.3, 3.0)),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        loss_SR, derivatives = dcpt_loss(theta, inputs)
        learned_SR = 1.0 / inputs["initial_loss"] + theta["w"] * inputs["decline"]
        power_SR = learned_SR ** -theta["mu"]
        return loss_SR + theta["F"] * power_SR, {
            **derivatives,
            "F": power_SR,
            "mu": -theta["F"] * power_SR * np.log(learned_SR),
            "w": -theta["mu"] * theta["F"] * power_SR / learned_SR * inputs["decline"],
        }

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        return {**dcpt_natural(theta, unit), "F": theta["F"] * unit["loss"]}

    def check(self, inputs: Inputs) -> None:
        refuse_ratio_above_one(self.name, inputs["ratio"])
        if not (inputs["initial_loss"] > 0.0).all():
            row = int(np.argmin(inputs["initial_loss"]))
            raise FitError(
                f"Law {self.name!r}: initial_loss of row {row} is "
                f"{inputs['initial_loss'][row]:g}; expected a loss > 0"
            )


def dcpt_loss(theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Value and derivatives of the D-CPT law; r^eta is 0 at r = 0."""
    params_R, tokens_R, ratio_R = inputs["params"], inputs["tokens"], inputs["ratio"]
    size_SR = params_R ** -theta["alpha"]
    share_SR = ratio_R ** theta["eta"]
    data_SR = share_SR * tokens_R ** -theta["beta"]
    shifted_SR = ratio_R + theta["epsilon"]
    lack_SR = shifted_SR ** -theta["gamma"]
    loss_SR = theta["E"] + theta["A"] * size_SR + theta["B"] * data_SR + theta["C"] * lack_SR
    return loss_SR, {
        "E": np.ones_like(loss_SR),
        "A": size_SR,
        "alpha": -theta["A"] * size_SR * np.log(params_R),
        "B": data_SR,
        "beta": -theta["B"] * data_SR * np.log(tokens_R),
        "eta": theta["B"] * xlogy(data_SR, ratio_R),
        "C": lack_SR,
        "gamma": -theta["C"] * lack_SR * np.log(shifted_SR),
        "epsilon": -theta["C"] * theta["gamma"] * lack_SR / shifted_SR,
    }


def dcpt_natural(theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
    return {
        **theta,
        "E": theta["E"] * unit["loss"],
        "A": theta["A"] * unit["loss"] * unit["params"] ** theta["alpha"],
        "B": theta["B"] * unit["loss"] * unit["tokens"] ** theta["beta"],
        "C": theta["C"] * unit["loss"],
    }


def refuse_ratio_above_one(law: str, ratio_R: np.ndarray) -> None:
    if (ratio_R > 1.0).any():
        row = int(np.argmax(ratio_R))
        raise FitError(
            f"Law {law!r}: ratio of row {row} is {ratio_R[row]:g}; expected a share of the tokens, "
            "0 to 1 (not a percentage)"
        )


LossOfRatio = Callable[[np.ndarray], np.ndarray]  # domain ratios -> losses
GRID = 1001


def ratio_within_tolerance(
    domain_loss: LossOfRatio, general_loss: LossOfRatio, limit: float
) -> float:
    """Domain ratio of the lowest domain loss among those that keep the general loss.

    min over r in [0, 1] of domain_loss(r), subject to general_loss(r) <= limit; by a grid, then
    bisection where the limit binds and bounded minimisation where it does not.

    Args:
        domain_loss: Domain loss at an array of domain ratios.
        general_loss: General loss at an array of domain ratios (not of general ratios).
        limit: Highest general loss allowed, (1 + T) times the loss before; the paper takes T = 3%.

    Raises:
        ChoiceError: No ratio keeps the limit.

    Source: Que et al. 2024, arXiv:2406.01375, usage 1.
    """
    ratio_G = np.linspace(0.0, 1.0, GRID)
    general_G = general_loss(ratio_G)
    allowed_G = general_G <= limit
    if not allowed_G.any():
        best = int(np.argmin(general_G))
        raise ChoiceError(
            f"No domain ratio keeps the general loss at {limit:.4f}: the lowest is "
            f"{general_G[best]:.4f}, at ratio {ratio_G[best]:.3f}. Raise the tolerance."
        )
    best = int(np.argmin(np.where(allowed_G, domain_loss(ratio_G), np.inf)))
    low, high = (
        boundary(general_loss, limit, ratio_G[best], ratio_G[min(max(best + side, 0), GRID - 1)])
        for side in (-1, 1)
    )
    return lowest(domain_loss, np.array([low, ratio_G[best], high]))


def ratio_of_limited_data(law: DCPT, params: float, domain_tokens: float, tokens: float) -> float:
    """Domain ratio of the lowest domain loss when no domain token is used twice.

    min over r in [0, 1] of L(N, D, r) with D = min(tokens, D_d / r): a lower ratio stretches the
    D_d domain tokens over more general ones, until the budget ends.

    Args:
        law: Law of the domain's loss, fitted.
        params: N, > 0.
        domain_tokens: D_d, > 0.
        tokens: Budget of all tokens, > 0. Without one the law may ask for a ratio of 0 and no end
            of general tokens.

    Source: Que et al. 2024, arXiv:2406.01375, usage 2.
    Differs: the budget.
    """

    def loss(ratio_R: np.ndarray) -> np.ndarray:
        most_R = domain_tokens / np.maximum(ratio_R, domain_tokens / tokens)
        return law.predict(np.full(ratio_R.shape, params), most_R, ratio_R)

    ratio_G = np.union1d(np.linspace(0.0, 1.0, GRID), min(1.0, domain_tokens / tokens))
    best = int(np.argmin(loss(ratio_G)))
    return lowest(loss, ratio_G[np.clip([best - 1, best, best + 1], 0, len(ratio_G) - 1)])


def optimal_size_at_ratio(law: DCPT, flops: float, ratio: float) -> tuple[float, float]:
    """Params and tokens of the lowest loss at C = 6 N D FLOPs and a given ratio.

    A alpha N^-alpha = B r^eta beta D^-beta at the optimum, so
    N = ((alpha A) / (beta B r^eta) (C / 6)^beta)^(1 / (alpha + beta)).

    Args:
        law: Law, fitted.
        flops: C, > 0.
        ratio: Share r of the corpus whose loss is predicted, in (0, 1]; at 0 tokens are worth
            nothing to the law.

    Raises:
        ChoiceError: ratio is not in (0, 1].

    Source: Que et al. 2024, arXiv:2406.01375, usage 3; the closed form is derived.
    """
    if not 0.0 < ratio <= 1.0:
        raise ChoiceError(f"ratio is {ratio:g}; expected a share in (0, 1]")
    p = law.params_
    scale = p["B"] * ratio ** p["eta"]
    balance = p["alpha"] * p["A"] / (p["beta"] * scale)
    log_params = np.log(balance) + p["beta"] * np.log(flops / 6.0)
    params = float(np.exp(log_params / (p["alpha"] + p["beta"])))
    return params, flops / 6.0 / params


def boundary(loss: LossOfRatio, limit: float, inside: float, outside: float) -> float:
    """The point nearest `outside`, on the way from `inside`, where the loss keeps the limit."""
    if loss(np.array([outside]))[0] <= limit:
        return outside
    for _ in range(50):
        middle = 0.5 * (inside + outside)
        if loss(np.array([middle]))[0] <= limit:
            inside = middle
        else:
            outside = middle
    return inside


def lowest(loss: LossOfRatio, near_3: np.ndarray) -> float:
    """The ratio of the lowest loss between the first and the last of three neighbours."""
    found = minimize_scalar(
        lambda ratio: float(loss(np.array([ratio]))[0]),
        bounds=(near_3[0], near_3[2]),
        method="bounded",
        options={"xatol": 1e-9},
    )
    ratio_4 = np.append(near_3, found.x)
    return float(ratio_4[np.argmin(loss(ratio_4))])

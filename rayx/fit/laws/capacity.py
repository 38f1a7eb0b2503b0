"""Stage 5, law of capacity: domains that compete for a model's parameters and for its tokens.

Every domain's loss follows from one set of parameters, so all of a run's losses are fitted
together: a row is one domain's loss of one run, and `target` says which domain's.

Shapes: S starts, R rows, U runs (rows of equal params and weights), K domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.errors import FitError
from rayx.fit.laws.law import Inputs, Law, Parameter, Theta

NEWTON_STEPS = 50  # 6 are usual


@dataclass(kw_only=True)
class Capacity(Law):
    """L_i(w, N, D) = c_i x_i^(-b_i) + A_i (D w_i)^(-a_i) + E_i, with x the capacity of each domain.

    x minimises sum_j w_j c_j x_j^(-b_j) under sum_j x_j = N + (K - 1) H and x_j >= H: of N
    parameters H serve every domain, the rest go to one domain each.

    Args of `fit`: params N, tokens D, target i (0 to K - 1), weights, loss.

    Source: Dai and Zheng 2026, arXiv:2606.08167, and the formula in the authors' repository.
    Differs: where N < H every x_j is N; the published fit has no such runs. Exponents are bounded
        by 2, there by 1.
    """

    name: ClassVar[str] = "capacity"
    inputs: ClassVar[tuple[str, ...]] = ("params", "tokens", "target", "weights")

    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("E", start=(0.3, 0.6), per_domain=True),
            Parameter("c", start=(0.3,), per_domain=True),
            Parameter("b", start=(0.2, 0.5), high=2.0, per_domain=True),
            Parameter("H", start=(0.03, 0.2)),
            Parameter("A", start=(0.1,), per_domain=True),
            Parameter("a", start=(0.2, 0.5), high=2.0, per_domain=True),
        )

    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        weights_RK, target_R = inputs["weights"], inputs["target"].astype(int)
        chosen_RK = (target_R[:, None] == np.arange(weights_RK.shape[1])).astype(float)
        shape = (len(theta["H"]), *chosen_RK.shape)

        def at_target(values_SRK: np.ndarray) -> np.ndarray:
            return np.einsum("srk,rk->sr", np.broadcast_to(values_SRK, shape), chosen_RK)

        shares = allocate(theta, inputs["params"], weights_RK)
        log_size_SRK = np.log(shares.size_SRK)
        b_SR = at_target(theta["b"])
        capacity_SR = at_target(theta["c"]) * np.exp(-b_SR * at_target(log_size_SRK))
        own_tokens_R1 = (inputs["tokens"] * (weights_RK * chosen_RK).sum(-1))[:, None]
        noise_SRK = chosen_RK * own_tokens_R1 ** -theta["a"]
        loss_SR = at_target(theta["E"] + theta["A"] * noise_SRK) + capacity_SR

        # What the target gains in size through c or b of a domain, the others pay by their share.
        by_log_size_SR = -b_SR * capacity_SR
        gain_SR = by_log_size_SR * at_target(shares.response_SRK)
        gain_SRK = gain_SR[..., None] * (chosen_RK - shares.payment_SRK)
        direct_SRK = capacity_SR[..., None] * chosen_RK
        return loss_SR, {
            "E": np.broadcast_to(chosen_RK, noise_SRK.shape),
            "c": (direct_SRK + gain_SRK) / theta["c"],
            "b": gain_SRK / theta["b"] - (direct_SRK + gain_SRK) * log_size_SRK,
            "H": by_log_size_SR * at_target(shares.by_floor_SRK),
            "A": noise_SRK,
            "a": -theta["A"] * noise_SRK * np.log(own_tokens_R1),
        }

    def natural(self, theta: Theta, unit: Mapping[str, float]) -> dict[str, np.ndarray]:
        return {
            "E": theta["E"] * unit["loss"],
            "c": theta["c"] * unit["loss"] * unit["params"] ** theta["b"],
            "b": theta["b"],
            "H": theta["H"] * unit["params"],
            "A": theta["A"] * unit["loss"] * unit["tokens"] ** theta["a"],
            "a": theta["a"],
        }

    def check(self, inputs: Inputs) -> None:
        target_R, weights_RK = inputs["target"], inputs["weights"]
        num_domains = weights_RK.shape[1]
        bad_R = ~np.isin(target_R, np.arange(num_domains))
        if bad_R.any():
            row = int(np.argmax(bad_R))
            raise FitError(
                f"Law {self.name!r}: target of row {row} is {target_R[row]:g}; expected the number "
                f"of a domain, 0 to {num_domains - 1}"
            )
        own_R = weights_RK[np.arange(len(target_R)), target_R.astype(int)]
        if (own_R == 0.0).any():
            row = int(np.argmax(own_R == 0.0))
            raise FitError(
                f"Law {self.name!r}: row {row} is the loss of domain {target_R[row]:g}, whose "
                "weight is 0; the law is infinite there. Leave such rows out."
            )


@dataclass(frozen=True)
class Allocation:
    """How a model's parameters are shared between domains, and how that answers a change.

    Args:
        size_SRK: Parameters x_j that serve each domain.
        response_SRK: d log x_j / d log of what the domain asks, at a fixed multiplier.
        payment_SRK: Share of each domain in paying for another's growth; sums to 1.
        by_floor_SRK: d log x_j / d H.
    """

    size_SRK: np.ndarray
    response_SRK: np.ndarray
    payment_SRK: np.ndarray
    by_floor_SRK: np.ndarray


def allocate(theta: Theta, params_R: np.ndarray, weights_RK: np.ndarray) -> Allocation:
    """Minimise sum_j w_j c_j x_j^(-b_j) under sum_j x_j = N + (K - 1) H, x_j >= H.

    log x_j = max(log H, (log(w_j c_j b_j) - u) / (1 + b_j)), u the log of the multiplier, found by
    Newton steps; derivatives by the implicit function theorem.

    Source: Dai and Zheng 2026, arXiv:2606.08167; the derivatives are derived.
    """
    # The rows of a run differ in the target only.
    keys, row_R = np.unique(np.column_stack([params_R, weights_RK]), axis=0, return_inverse=True)
    params_U, weights_UK = keys[:, 0], keys[:, 1:]
    num_domains = weights_UK.shape[1]
    floor_SU = np.minimum(theta["H"], params_U)
    budget_SU = params_U + (num_domains - 1) * floor_SU
    steepness_SUK = 1.0 + theta["b"]
    with np.errstate(divide="ignore"):  # an absent domain asks for nothing
        asked_SUK = np.log(weights_UK * theta["c"] * theta["b"])

    log_floor_SU1 = np.log(floor_SU)[..., None]

    def log_size(u_SU: np.ndarray) -> np.ndarray:
        return np.maximum((asked_SUK - u_SU[..., None]) / steepness_SUK, log_floor_SU1)

    # The log of what is spent is convex and nearly linear in u: Newton from where one domain alone
    # spends the whole budget never passes the root.
    log_budget_SU, ones_K = np.log(budget_SU), np.ones(num_domains)
    u_SU = (asked_SUK - steepness_SUK * log_budget_SU[..., None]).max(-1)
    for _ in range(NEWTON_STEPS):
        log_size_SUK = log_size(u_SU)
        size_SUK = np.exp(log_size_SUK)
        spent_SU = size_SUK @ ones_K
        slope_SU = (size_SUK * (log_size_SUK > log_floor_SU1) / steepness_SUK) @ ones_K
        excess_SU = np.maximum(np.log(spent_SU) - log_budget_SU, 0.0)
        # Without a slope all domains are at the floor, and the excess is rounding.
        step_SU = excess_SU * spent_SU / np.where(slope_SU > 0.0, slope_SU, np.inf)
        u_SU = u_SU + step_SU
        if not (step_SU > 1e-12).any():
            break
    log_size_SUK = log_size(u_SU)
    size_SUK, free_SUK = np.exp(log_size_SUK), log_size_SUK > log_floor_SU1

    response_SUK = free_SUK / steepness_SUK
    weight_SUK = size_SUK * response_SUK
    total_SU1 = weight_SUK.sum(-1, keepdims=True)
    total_SU1 = np.where(total_SU1 > 0.0, total_SU1, 1.0)  # all at the floor: nobody pays
    held_SU1 = (~free_SUK).sum(-1, keepdims=True) - (num_domains - 1)
    by_floor_SUK = np.where(
        free_SUK, -response_SUK * held_SU1 / total_SU1, 1.0 / floor_SU[..., None]
    )
    by_floor_SUK = by_floor_SUK * (theta["H"] < params_U)[..., None]
    row_R = row_R.reshape(-1)
    return Allocation(
        size_SRK=size_SUK[:, row_R],
        response_SRK=response_SUK[:, row_R],
        payment_SRK=(weight_SUK / total_SU1)[:, row_R],
        by_floor_SRK=by_floor_SUK[:, row_R],
    )

"""Stage 5, regression: robust least squares with analytic Jacobians, many problems at once.

Levenberg-Marquardt with iteratively re-weighted residuals. A batch holds the starts of one fit,
so that a multi-start costs a few batched matrix products instead of a loop.

Shapes: S starts, R runs, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # theta_SP -> f_SR, jacobian_SRP


def minimise(
    model: Model,
    start_SP: np.ndarray,
    target_R: np.ndarray,
    *,
    ridge_P: np.ndarray,
    scale: float,
    max_iterations: int = 200,
) -> np.ndarray:
    """Minimise a soft-L1 loss with a ridge towards each start, and return the best parameters.

    cost = sum_R scale^2 * rho((f - target)^2 / scale^2) + sum_P ridge * (theta - start)^2,
    rho(z) = 2 (sqrt(1 + z) - 1).

    Args:
        model: Returns predictions and Jacobian for a batch of parameters.
        start_SP: Starts; each is also the centre of its ridge.
        target_R: Values to be met.
        ridge_P: Strength of the ridge for each parameter, >= 0.
        scale: Residual at which the loss turns from square to linear, > 0.
        max_iterations: Upper limit; the fit usually stops by itself after 20 to 60.

    Returns:
        theta_P, the start's result with the least sum of residuals and ridge.

    Source: Triggs et al. 2000, Bundle Adjustment, section 4.3 (re-weighted Gauss-Newton).
    """

    def evaluate(theta_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        predicted_SR, jacobian_SRP = model(theta_SP)
        residual_SR = predicted_SR - target_R
        root_SR = np.sqrt(1.0 + (residual_SR / scale) ** 2)
        shift_SP = theta_SP - start_SP
        cost_S = 2.0 * scale**2 * (root_SR - 1.0).sum(1) + (ridge_P * shift_SP**2).sum(1)
        weighted_SRP = jacobian_SRP / root_SR[:, :, None]
        gradient_SP = np.einsum("srp,sr->sp", weighted_SRP, residual_SR) + ridge_P * shift_SP
        hessian_SPP = weighted_SRP.transpose(0, 2, 1) @ jacobian_SRP
        return np.where(np.isfinite(cost_S), cost_S, np.inf), gradient_SP, hessian_SPP

    diagonal = np.arange(start_SP.shape[1])
    theta_SP = start_SP.copy()
    damping_S = np.full(len(theta_SP), 1e-2)
    settled_S = np.zeros(len(theta_SP), dtype=int)
    cost_S, gradient_SP, hessian_SPP = evaluate(theta_SP)
    for _ in range(max_iterations):
        system_SPP = hessian_SPP.copy()
        curvature_SP = hessian_SPP[:, diagonal, diagonal] + 1e-9
        system_SPP[:, diagonal, diagonal] += ridge_P + damping_S[:, None] * curvature_SP + 1e-12
        step_SP = np.linalg.solve(system_SPP, gradient_SP[:, :, None])[:, :, 0]
        # A step of more than 2 in a logarithm is beyond what the linear model can promise.
        step_SP = np.clip(step_SP, -2.0, 2.0)
        with np.errstate(all="ignore"):
            new_cost_S, new_gradient_SP, new_hessian_SPP = evaluate(theta_SP - step_SP)
        better_S = new_cost_S < cost_S
        small_S = np.abs(cost_S - new_cost_S) < 1e-7 * cost_S + 1e-16
        settled_S = np.where(small_S, settled_S + 1, 0)
        theta_SP = np.where(better_S[:, None], theta_SP - step_SP, theta_SP)
        cost_S = np.where(better_S, new_cost_S, cost_S)
        gradient_SP = np.where(better_S[:, None], new_gradient_SP, gradient_SP)
        hessian_SPP = np.where(better_S[:, None, None], new_hessian_SPP, hessian_SPP)
        damping_S = np.clip(np.where(better_S, damping_S / 4.0, damping_S * 4.0), 1e-10, 1e10)
        if ((settled_S >= 2) | (damping_S >= 1e10)).all():
            break
    return theta_SP[int(np.argmin(cost_S))]

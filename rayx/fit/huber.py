"""Robust fits of small laws to their exact optimum, many problems in one batch.

With a Huber threshold far below the noise nearly all residuals are in its linear zone: re-weighted
least squares then creeps, and Newton steps alone jump. Here the threshold is lowered by steps from
the size of the residuals (least squares) to its value, and each step solves with Newton's matrix
plus a damping that leads over to the re-weighted one, which always descends.

Shapes: S problems (starts, or bootstrap replicates with their own row weights), R runs, P
parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Model = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # u_SP -> value_SR, jacobian_SPR

LARGEST_STEP = 2.0  # in a logarithm: more is beyond what the linear model can promise
LARGEST_PARAMETER = 35.0  # exp(35) in scaled units: as good as infinite
LOWER = 0.25  # factor from one threshold to the next
CHUNK = 3_000_000  # elements of a Jacobian held at once


def huber(residual_SR: np.ndarray, delta_S1: np.ndarray) -> np.ndarray:
    """r^2 / 2 for |r| <= delta, delta (|r| - delta / 2) beyond; shape (S, R)."""
    size_SR = np.minimum(np.abs(residual_SR), delta_S1)
    return size_SR * (np.abs(residual_SR) - 0.5 * size_SR)


def minimise(
    model: Model,
    start_SP: np.ndarray,
    target_R: np.ndarray,
    row_weights_SR: np.ndarray,
    delta_S: np.ndarray,
    *,
    from_delta: float | None = None,
    max_iterations: int = 60,
    tolerance: float = 1e-13,
) -> tuple[np.ndarray, np.ndarray]:
    """Minimise sum_R weight * huber_delta(model(u) - target) for each problem.

    Args:
        model: Values and Jacobian of a batch of parameter vectors; where they are not finite the
            step is refused.
        start_SP: Start of each problem.
        target_R: Values to be met, alike for all problems.
        row_weights_SR: Weight of each row, >= 0; shape (S, R), or (1, R) for all alike.
        delta_S: Threshold of each problem, > 0.
        from_delta: First threshold; by default the root mean square of each start's residuals.
        max_iterations: Upper limit at each threshold.
        tolerance: Relative decrease of the cost that counts as none, at the last threshold.

    Returns:
        u_SP and cost_S; the cost is infinite where no finite value was met.

    Source: Huber 1964; lowering the threshold: Madsen and Nielsen 1993, SIAM J. Optim. 3(2).
    """
    rows = max(1, CHUNK // (len(target_R) * start_SP.shape[1]))
    parts = [
        _minimise(
            model,
            start_SP[at : at + rows],
            target_R,
            row_weights_SR if len(row_weights_SR) == 1 else row_weights_SR[at : at + rows],
            delta_S[at : at + rows, None],
            from_delta,
            max_iterations,
            tolerance,
        )
        for at in range(0, len(start_SP), rows)
    ]
    return np.concatenate([u for u, _ in parts]), np.concatenate([cost for _, cost in parts])


def _minimise(model, u_SP, target_R, weights_SR, final_S1, first, max_iterations, tolerance):
    u_SP = np.clip(u_SP, -LARGEST_PARAMETER, LARGEST_PARAMETER)
    weights_SR = np.broadcast_to(weights_SR, (len(u_SP), len(target_R)))
    if first is None:
        with np.errstate(all="ignore"):
            residual_SR = model(u_SP)[0] - target_R
            size_S1 = np.sqrt((weights_SR * residual_SR**2).sum(1) / weights_SR.sum(1))[:, None]
        delta_S1 = np.maximum(np.where(np.isfinite(size_S1), size_S1, 1.0), final_S1)
    else:
        delta_S1 = np.maximum(first, final_S1)
    while True:
        last = bool((delta_S1 <= final_S1).all())
        u_SP, cost_S = _at_threshold(
            model,
            u_SP,
            target_R,
            weights_SR,
            delta_S1,
            max_iterations if last else max_iterations // 4,
            tolerance if last else 1e-4,
        )
        if last:
            return u_SP, cost_S
        delta_S1 = np.maximum(LOWER * delta_S1, final_S1)


def _at_threshold(model, u_SP, target_R, weights_SR, delta_S1, max_iterations, tolerance):
    """Damped Newton steps at one threshold; problems that have settled leave the batch."""
    num_parameters = u_SP.shape[1]
    diagonal = np.arange(num_parameters)
    result_SP, result_S = u_SP.copy(), np.full(len(u_SP), np.inf)

    def evaluate(u_SP, weights_SR, delta_S1):
        with np.errstate(all="ignore"):
            value_SR, jacobian_SPR = model(u_SP)
            residual_SR = value_SR - target_R
            cost_S = (weights_SR * huber(residual_SR, delta_S1)).sum(1)
            finite_S = np.isfinite(cost_S) & np.isfinite(jacobian_SPR).all((1, 2))
        return np.where(finite_S, cost_S, np.inf), residual_SR, jacobian_SPR

    open_S = np.arange(len(u_SP))
    cost_S, residual_SR, jacobian_SPR = evaluate(u_SP, weights_SR, delta_S1)
    result_S[:] = cost_S
    damping_S = np.full(len(u_SP), 1.0)
    settled_S = np.zeros(len(u_SP), dtype=int)
    for _ in range(max_iterations):
        keep_S = (settled_S < 2) & (damping_S < 1e12) & np.isfinite(cost_S)
        if not keep_S.any():
            break
        if not keep_S.all():
            open_S, u_SP, weights_SR, delta_S1 = (
                a[keep_S] for a in (open_S, u_SP, weights_SR, delta_S1)
            )
            cost_S, residual_SR, jacobian_SPR, damping_S, settled_S = (
                a[keep_S] for a in (cost_S, residual_SR, jacobian_SPR, damping_S, settled_S)
            )
        size_SR = np.abs(residual_SR)
        slope_SR = weights_SR * np.clip(residual_SR, -delta_S1, delta_S1)
        gradient_SP = (jacobian_SPR @ slope_SR[:, :, None])[:, :, 0]
        majorant_SR = delta_S1 / np.maximum(size_SR, delta_S1)
        curvature_SR = weights_SR * ((size_SR <= delta_S1) + damping_S[:, None] * majorant_SR)
        hessian_SPP = (jacobian_SPR * curvature_SR[:, None, :]) @ jacobian_SPR.transpose(0, 2, 1)
        trace_SP = hessian_SPP[:, diagonal, diagonal]
        # Beyond 1 the damping also shortens steps in directions that the rows leave open.
        extra_SP = (1e-12 + 1e-2 * np.maximum(damping_S[:, None] - 1.0, 0.0)) * trace_SP
        hessian_SPP[:, diagonal, diagonal] += extra_SP + 1e-14 * trace_SP.max(1, keepdims=True)
        hessian_SPP[:, diagonal, diagonal] += 1e-300
        step_SP = np.linalg.solve(hessian_SPP, gradient_SP[:, :, None])[:, :, 0]
        length_S = np.abs(step_SP).max(1)
        step_SP *= np.minimum(1.0, LARGEST_STEP / np.maximum(length_S, 1e-300))[:, None]
        trial_SP = np.clip(u_SP - step_SP, -LARGEST_PARAMETER, LARGEST_PARAMETER)
        new_cost_S, new_residual_SR, new_jacobian_SPR = evaluate(trial_SP, weights_SR, delta_S1)
        better_S = new_cost_S < cost_S
        small_S = np.abs(cost_S - new_cost_S) <= tolerance * cost_S
        settled_S = np.where(small_S, settled_S + 1, 0)
        u_SP = np.where(better_S[:, None], trial_SP, u_SP)
        residual_SR = np.where(better_S[:, None], new_residual_SR, residual_SR)
        jacobian_SPR = np.where(better_S[:, None, None], new_jacobian_SPR, jacobian_SPR)
        cost_S = np.where(better_S, new_cost_S, cost_S)
        damping_S = np.where(better_S, damping_S / 5.0, damping_S * 4.0)
        damping_S = np.clip(damping_S, 1e-9, 1e13)
        result_SP[open_S], result_S[open_S] = u_SP, cost_S
    return result_SP, result_S

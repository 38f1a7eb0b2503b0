"""Stage 5, regression: a Gaussian process on the logarithms of the weights.

Written out because scikit-learn's needs minutes at 512 runs and 17 domains: its gradient builds
an (R, R, K) array per step; here the gradient of all length scales is one matrix product.

Shapes: R runs, K domains, M mixtures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy.linalg import cho_solve
from scipy.optimize import minimize

from rayx.fit.regressor import PointRegressor, Predictor


@dataclass
class GaussianProcess(PointRegressor):
    """log L(w) ~ GP(mean, s^2 k + noise), Matern 5/2 on x = log(w + offset), a scale per domain.

    k(r) = (1 + sqrt(5) r + 5 r^2 / 3) exp(-sqrt(5) r), r^2 = sum_k (x_k - x'_k)^2 / l_k^2.
    Signal, noise and length scales maximise the marginal likelihood under weak normal priors.

    Args:
        offset: Added to each weight, > 0.
        tuning_rows: Rows that the marginal likelihood sees, drawn at random; the posterior uses
            all rows.
        max_iterations: Limit of the optimiser.
        folds: See PointRegressor.
        seed: See PointRegressor.

    Raises:
        FitError: A loss is not positive.

    Source: Rasmussen and Williams 2006, Gaussian Processes for Machine Learning, eqs. 4.17, 5.9.
    Differs: priors on the logarithms of the length scales and of the noise, so that few runs do not
        end in a corner; the uncertainty is that of the out-of-fold residuals.
    """

    offset: float = 3e-3
    tuning_rows: int = 200
    max_iterations: int = 60
    needs_positive: ClassVar[bool] = True

    def fit_point(self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Predictor:
        x_RK = np.log(weights_RK + self.offset)
        log_loss_R = np.log(loss_R)
        mean, sd = float(log_loss_R.mean()), float(log_loss_R.std())
        if sd < 1e-12:
            return lambda weights_MK: np.full(len(weights_MK), np.exp(mean))
        y_R = (log_loss_R - mean) / sd
        rows = np.random.default_rng(self.seed).permutation(len(y_R))[: self.tuning_rows]
        # A domain of ordinary influence changes the loss over a few times the spread of its log.
        centre = np.r_[0.0, np.log(0.05), np.full(x_RK.shape[1], np.log(3.0 * x_RK.std(0).mean()))]
        found = minimize(
            _objective,
            centre,
            args=(x_RK[rows], y_R[rows], centre),
            jac=True,
            method="L-BFGS-B",
            bounds=[(value - 6.0, value + 6.0) for value in centre],
            options={"maxiter": self.max_iterations},
        ).x
        signal, noise, scale_K = np.exp(found[0]), np.exp(found[1]), np.exp(found[2:])
        covariance_RR = signal * _matern(_distance(x_RK / scale_K, x_RK / scale_K))[0]
        covariance_RR[np.diag_indices(len(y_R))] += noise
        alpha_R = cho_solve((np.linalg.cholesky(covariance_RR), True), y_R)

        def predict(weights_MK: np.ndarray) -> np.ndarray:
            x_MK = np.log(weights_MK + self.offset) / scale_K
            chunks = np.array_split(x_MK, max(1, len(x_MK) // 4096))
            y_M = np.concatenate(
                [signal * _matern(_distance(x, x_RK / scale_K))[0] @ alpha_R for x in chunks]
            )
            return np.exp(mean + sd * y_M)

        return predict


def _objective(
    theta: np.ndarray, x_RK: np.ndarray, y_R: np.ndarray, centre: np.ndarray
) -> tuple[float, np.ndarray]:
    """Negative log marginal likelihood with the prior, and its gradient in log parameters."""
    signal, noise, scale_K = np.exp(theta[0]), np.exp(theta[1]), np.exp(theta[2:])
    scaled_RK = x_RK / scale_K
    correlation_RR, slope_RR = _matern(_distance(scaled_RK, scaled_RK))
    covariance_RR = signal * correlation_RR
    covariance_RR[np.diag_indices(len(y_R))] += noise + 1e-8
    cholesky_RR = np.linalg.cholesky(covariance_RR)
    alpha_R = cho_solve((cholesky_RR, True), y_R)
    w_RR = cho_solve((cholesky_RR, True), np.eye(len(y_R))) - np.outer(alpha_R, alpha_R)
    # d covariance / d log l_k = signal * slope * (x_k - x'_k)^2 / l_k^2, for all k at once:
    v_RR = signal * w_RR * slope_RR
    by_scale_K = (scaled_RK**2 * v_RR.sum(1)[:, None]).sum(0) - (
        scaled_RK * (v_RR @ scaled_RK)
    ).sum(0)
    gradient = np.r_[
        0.5 * signal * (w_RR * correlation_RR).sum(), 0.5 * noise * np.trace(w_RR), by_scale_K
    ]
    prior_sd = np.r_[2.0, 2.0, np.full(len(scale_K), 1.5)]
    shift = (theta - centre) / prior_sd
    value = 0.5 * y_R @ alpha_R + np.log(np.diag(cholesky_RR)).sum() + 0.5 * (shift**2).sum()
    return float(value), gradient + shift / prior_sd


def _distance(a_MK: np.ndarray, b_RK: np.ndarray) -> np.ndarray:
    """Euclidean distances, shape (M, R)."""
    squared_MR = (a_MK**2).sum(1)[:, None] + (b_RK**2).sum(1) - 2.0 * a_MK @ b_RK.T
    return np.sqrt(np.maximum(squared_MR, 0.0))


def _matern(distance_MR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Matern 5/2 correlation, and minus twice its slope in the squared distance."""
    scaled_MR = np.sqrt(5.0) * distance_MR
    decay_MR = np.exp(-scaled_MR)
    slope_MR = 5.0 / 3.0 * (1.0 + scaled_MR) * decay_MR
    return (1.0 + scaled_MR + scaled_MR**2 / 3.0) * decay_MR, slope_MR

"""Stage 5, regression: the mean, and ridge regression on two kinds of features.

Shapes: R runs, K domains, M mixtures, Q features, G ridge strengths.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rayx.fit.regressor import PointRegressor, Predictor


@dataclass
class Mean(PointRegressor):
    """L(w) = mean of the losses: what every other regressor must beat.

    Args:
        folds: See PointRegressor.
        seed: See PointRegressor.
    """

    def fit_point(self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Predictor:
        mean = float(loss_R.mean())
        return lambda weights_MK: np.full(len(weights_MK), mean)


@dataclass
class Ridge(PointRegressor):
    """L(w) = b0 + b . features(w), least squares with a ridge on b.

    The features (the weights or their logarithms) and the strength of the ridge are those with the
    least leave-one-out error, computed exactly.

    Args:
        offset: Added to a weight before its logarithm, > 0.
        folds: See PointRegressor.
        seed: See PointRegressor.

    Source: Allen 1974, Technometrics 16(1), PRESS: the error of a left-out row is r_i / (1 - h_ii).
    Differs: all features are standardised.
    """

    offset: float = 1e-3

    def fit_point(self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Predictor:
        candidates: list[Callable[[np.ndarray], np.ndarray]] = [
            lambda weights_RK: weights_RK,
            lambda weights_RK: np.log(weights_RK + self.offset),
        ]
        fits = [loo_ridge(features, weights_RK, loss_R) for features in candidates]
        return min(fits, key=lambda fit: fit[0])[1]


def loo_ridge(
    features: Callable[[np.ndarray], np.ndarray], weights_RK: np.ndarray, loss_R: np.ndarray
) -> tuple[float, Predictor]:
    """Best ridge strength by leave-one-out: (mean squared error left out, predictor)."""
    features_RQ = features(weights_RK)
    centre_Q, mean = features_RQ.mean(0), float(loss_R.mean())
    sd_Q = features_RQ.std(0)
    sd_Q = np.where(sd_Q > 1e-12, sd_Q, np.inf)  # a constant column says nothing
    u_RQ, s_Q, vt_QQ = np.linalg.svd((features_RQ - centre_Q) / sd_Q, full_matrices=False)
    strengths_G = len(loss_R) * np.logspace(-5, 2, 22)
    shrink_GQ = s_Q**2 / (s_Q**2 + strengths_G[:, None])
    projected_Q = u_RQ.T @ (loss_R - mean)
    residual_GR = loss_R - mean - (shrink_GQ * projected_Q) @ u_RQ.T
    leverage_GR = 1.0 / len(loss_R) + shrink_GQ @ (u_RQ**2).T
    error_G = ((residual_GR / np.maximum(1.0 - leverage_GR, 1e-9)) ** 2).mean(1)
    best = int(np.argmin(error_G))
    slope_Q = vt_QQ.T @ (projected_Q * s_Q / (s_Q**2 + strengths_G[best])) / sd_Q

    def predict(weights_MK: np.ndarray) -> np.ndarray:
        return mean + (features(weights_MK) - centre_Q) @ slope_Q

    return float(error_G[best]), predict

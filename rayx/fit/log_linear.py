"""Stage 5, regression: a constant plus the exponential of a linear function of the mixture.

Shapes: R runs, K domains, M mixtures, S starts, P = K + 1 parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.fit import levenberg
from rayx.fit.regressor import PointRegressor, Predictor

FLOOR_SHARES = (0.05, 0.5, 0.8, 0.95)  # starts: c as a share of the least loss


@dataclass
class LogLinear(PointRegressor):
    """L(w) = c + exp(t . w), c > 0, fitted on log loss.

    The weights sum to 1, so that a constant inside the exponential is part of t. Robust (soft L1),
    analytic Jacobian, several starts.

    Args:
        scale: Turn of the loss from square to linear, in log units, > 0.
        ridge: Strength of the pull of t towards its start.
        folds: See PointRegressor.
        seed: See PointRegressor.

    Raises:
        FitError: A loss is not positive.

    Source: Ye et al. 2024, arXiv:2403.16952, the exponential law; Olmix, arXiv:2602.12237, fits the
        same form per task.
    Differs: fitted on log loss with soft L1; the starts are linear fits of log(L - c) for several c
        instead of random draws, so that all domains are treated alike.
    """

    scale: float = 0.02
    ridge: float = 1e-5
    needs_positive: ClassVar[bool] = True

    def fit_point(self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Predictor:
        num_domains = weights_RK.shape[1]
        gram_KK = weights_RK.T @ weights_RK + 1e-3 * np.eye(num_domains)
        starts = []
        for share in FLOOR_SHARES:
            floor = share * loss_R.min()
            excess_R = np.log(loss_R - floor)
            t_K = excess_R.mean() + np.linalg.solve(
                gram_KK, weights_RK.T @ (excess_R - excess_R.mean())
            )
            starts.append(np.r_[np.log(floor), t_K])
        theta_P = levenberg.minimise(
            lambda theta_SP: _log_loss(theta_SP, weights_RK),
            np.array(starts),
            np.log(loss_R),
            ridge_P=np.r_[0.0, np.full(num_domains, self.ridge)],
            scale=self.scale,
        )
        return lambda weights_MK: np.exp(_log_loss(theta_P[None], weights_MK)[0][0])


def _log_loss(theta_SP: np.ndarray, weights_RK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    exponent_SR = theta_SP[:, 1:] @ weights_RK.T
    value_SR = np.logaddexp(theta_SP[:, :1], exponent_SR)
    share_SR = np.exp(exponent_SR - value_SR)
    by_t_SRK = share_SR[:, :, None] * weights_RK
    return value_SR, np.concatenate([(1.0 - share_SR)[:, :, None], by_t_SRK], axis=2)

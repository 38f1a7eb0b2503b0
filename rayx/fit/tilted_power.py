"""Stage 5, regression: the inverse-power law with an outer power and a tilt.

Two departures from the additive law, found on RegMix's training rows: what the domains give adds up
to less than in proportion, and a domain can be worse (or better) than nothing by a constant factor.
They take a quarter off the law's squared error, at 64 runs as at 384.

Shapes: R runs, K domains, M mixtures, S batch, P = 3 K + 2 parameters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.fit import levenberg
from rayx.fit.regressor import PointRegressor, Predictor

# One start: E as a share of the least loss, gamma of all domains, beta. On RegMix's training rows
# two starts and 200 steps gave the same errors in eight times the time.
FLOOR_SHARE, GAMMA, OUTER_POWER = 0.5, 0.15, 0.5
MAX_ITERATIONS = 60


@dataclass
class TiltedPower(PointRegressor):
    """log L(w) = log(E + S(w)^-beta) + b . w,  S(w) = sum_j C_j (w_j + offset)^gamma_j.

    E, C_j and beta > 0 through exp, gamma_j in (0, 1) through the logistic function; fitted on log
    loss, robust (soft L1), analytic Jacobian, a start that treats all domains alike.

    Args:
        offset: Added to each weight, so that an absent domain stays finite, > 0.
        scale: Turn of the loss from square to linear, in log units, > 0.
        ridge: Strength of the pull of log C_j and logit gamma_j towards their start.
        outer_ridge: Strength of the pull of log beta towards log(1/2).
        tilt_ridge: Strength of the pull of b_j towards 0.
        folds: See PointRegressor.
        seed: See PointRegressor.

    Raises:
        FitError: A loss is not positive.

    Source: derived; beta = 1 and b = 0 give the additive law of Shukor et al. 2025,
        arXiv:2507.09404, as in InversePower.
    """

    offset: float = 1e-4
    scale: float = 0.02
    ridge: float = 3e-5
    outer_ridge: float = 1e-4
    tilt_ridge: float = 3e-2
    needs_positive: ClassVar[bool] = True

    def fit_point(self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Predictor:
        log_weights_RK = np.log(weights_RK + self.offset)
        theta_P = levenberg.minimise(
            lambda theta_SP: log_loss(theta_SP, weights_RK, log_weights_RK),
            start(log_weights_RK, loss_R)[None],
            np.log(loss_R),
            ridge_P=self.ridges(weights_RK.shape[1]),
            scale=self.scale,
            max_iterations=MAX_ITERATIONS,
        )
        # Beyond the losses seen by more than their whole range the law is not evidence.
        low, high = np.log(loss_R.min()), np.log(loss_R.max())
        margin = high - low

        def predict(weights_MK: np.ndarray) -> np.ndarray:
            log_weights_MK = np.log(weights_MK + self.offset)
            log_loss_M = log_loss(theta_P[None], weights_MK, log_weights_MK, False)[0][0]
            return np.exp(np.clip(log_loss_M, low - margin, high + margin))

        return predict

    def ridges(self, num_domains: int) -> np.ndarray:
        """Strength of the pull of each parameter towards its start, shape (P,)."""
        return np.r_[
            0.0,
            np.full(2 * num_domains, self.ridge),
            self.outer_ridge,
            np.full(num_domains, self.tilt_ridge),
        ]


def start(log_weights_RK: np.ndarray, loss_R: np.ndarray) -> np.ndarray:
    """Parameters that treat all domains alike and give the mean of the losses, shape (P,)."""
    num_domains = log_weights_RK.shape[1]
    floor = FLOOR_SHARE * loss_R.min()
    log_sum_R = np.log(np.exp(GAMMA * log_weights_RK).sum(1))
    log_c = -1.0 - np.mean(np.log(loss_R - floor) / OUTER_POWER + log_sum_R)
    return np.r_[
        np.log(floor),
        np.full(num_domains, log_c),
        np.full(num_domains, np.log(GAMMA / (1.0 - GAMMA))),
        np.log(OUTER_POWER),
        np.zeros(num_domains),
    ]


def log_loss(
    theta_SP: np.ndarray,
    weights_RK: np.ndarray,
    log_weights_RK: np.ndarray,
    jacobian: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Value and Jacobian of the law's log loss, shapes (S, R) and (S, R, P)."""
    num_domains = log_weights_RK.shape[1]
    floor_S1 = np.exp(theta_SP[:, :1])
    log_c_SK = theta_SP[:, 1 : 1 + num_domains]
    gamma_SK = 1.0 / (1.0 + np.exp(-theta_SP[:, 1 + num_domains : 1 + 2 * num_domains]))
    beta_S1 = np.exp(theta_SP[:, 1 + 2 * num_domains, None])
    tilt_SK = theta_SP[:, 2 + 2 * num_domains :]
    terms_SRK = np.exp(log_c_SK[:, None, :] + gamma_SK[:, None, :] * log_weights_RK)
    sum_SR = terms_SRK.sum(2)
    excess_SR = sum_SR**-beta_S1
    value_SR = np.log(floor_S1 + excess_SR) + tilt_SK @ weights_RK.T
    if not jacobian:
        return value_SR, np.empty((0, 0, 0))
    share_SR = excess_SR / (floor_S1 + excess_SR)
    by_c_SRK = (-beta_S1 * share_SR / sum_SR)[:, :, None] * terms_SRK
    by_gamma_SRK = by_c_SRK * log_weights_RK * (gamma_SK * (1.0 - gamma_SK))[:, None, :]
    by_beta_SR = -beta_S1 * share_SR * np.log(sum_SR)
    by_tilt_SRK = np.broadcast_to(weights_RK, terms_SRK.shape)
    return value_SR, np.concatenate(
        [
            (1.0 - share_SR)[:, :, None],
            by_c_SRK,
            by_gamma_SRK,
            by_beta_SR[:, :, None],
            by_tilt_SRK,
        ],
        axis=2,
    )

"""Stage 5, regression: the factor between the losses of merged and of trained proxies.

A merged candidate stands for the run on its mixture, but its loss is not that run's: experts that
agree less merge worse. For one target the two kinds are tied by

    log L_train(w) = z0 + shift + slope (log L_merge(w) - z0) + tilt . (x(w) - x0) + noise

with slope > 0, x(w) the shares of w and its spread 1 - sum_j w_j^2 (what is lost by merging depends
on the mixture), z0 and x0 means over the merged rows. All of it is found together with the law h of
the merged losses: a trained row at a mixture that was also merged is compared with that merged
loss, and one at any other mixture with h there, so that no pair is needed. The slope is drawn to 1
and the tilt to 0, which leaves a shift where the trained rows say little.

Shapes: M merged rows, T trained rows, K domains, R = M + T, S starts, X = K + 1 of the tilt,
P = 3 K + 2 parameters of the law, 2 + X of the factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayx.fit import levenberg, tilted_power
from rayx.fit.tilted_power import TiltedPower

SLOPE_SD = 0.5  # of log slope, before anything is seen
SAME = 1e-4  # largest difference of any share at which two mixtures are one
PRIOR_ROWS = 4.0  # rows that draw each kind's residual variance to the common one
# Standard deviations of the tilt, and of the noise, that are compared; in units of the residuals.
TILTS, NOISES = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0), (0.2, 0.35, 0.5, 0.7, 1.0)
LOOSE = 10.0  # what a shift may be, in units of the residuals
FITS = 3  # the first without a tilt, all rows alike
NO_TILT = 1e6  # ridge that holds the tilt at 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Factor:
    """What was found for one target; losses enter by their natural logarithm.

    Attributes:
        centre: z0.
        shift: log L_train - log L_merge where L_merge = exp(z0) and x = x0.
        slope: > 0.
        tilt_X: Coefficients of x(w), all 0 where none showed.
        centre_X: x0.
        shift_se: Standard error of the shift.
        slope_se: Standard error of the slope.
        residual_sd: Of log L_train around what a merged loss says of it.
    """

    centre: float
    shift: float
    slope: float
    tilt_X: np.ndarray
    centre_X: np.ndarray
    shift_se: float
    slope_se: float
    residual_sd: float

    def translate(self, weights_MK: np.ndarray, loss_M: np.ndarray) -> np.ndarray:
        """Return the losses of merged mixtures on the trained scale."""
        apart_M = np.log(loss_M) - self.centre
        level = self.centre + self.shift
        return np.exp(level + self.slope * apart_M + self.tilts(weights_MK))

    def tilts(self, weights_MK: np.ndarray) -> np.ndarray:
        """Return the part of the factor that depends on the mixture, in log loss."""
        return (features(weights_MK) - self.centre_X) @ self.tilt_X


def features(weights_MK: np.ndarray) -> np.ndarray:
    """Return x(w), shape (M, X)."""
    return np.column_stack([weights_MK, 1.0 - (weights_MK**2).sum(1)])


def partners(trained_TK: np.ndarray, merged_MK: np.ndarray) -> np.ndarray:
    """Say which merged rows are of the mixture of each trained row, shape (T, M)."""
    same_TM = np.ones((len(trained_TK), len(merged_MK)), dtype=bool)
    for trained_T, merged_M in zip(trained_TK.T, merged_MK.T, strict=True):
        same_TM &= np.abs(trained_T[:, None] - merged_M) <= SAME
    return same_TM


def estimate(
    merged_MK: np.ndarray, merged_M: np.ndarray, trained_TK: np.ndarray, trained_T: np.ndarray
) -> Factor:
    """Find the factor of one target by a joint fit of all rows.

    Minimises, over the law h and the factor f(z, w) = z0 + shift + slope (z - z0) + tilt (x - x0),
    the soft-L1 loss of the residuals

        log L_m - h(w_m)              merged rows,
        log L_t - f(h(w_t), w_t)      trained rows without a partner,
        log L_t - f(log L_m(t), w_t)  trained rows with one,

    each divided by its group's standard deviation, plus ridges on h, (log slope / SLOPE_SD)^2 and
    |tilt / sd|^2. The deviations are found from the residuals of the fit before, as is that of the
    tilt: the likeliest one for the trained rows' residuals.

    Args:
        merged_MK: Mixtures of the merged rows, M >= 2.
        merged_M: Their losses, > 0.
        trained_TK: Mixtures of the trained rows, T >= 1.
        trained_T: Their losses, > 0.

    Source: derived; a parametric law for the true covariate is as in Carroll et al. 2006,
        Measurement Error in Nonlinear Models, chapter 8; standard errors are Gauss-Newton's.
    """
    rows = _Rows(merged_MK, np.log(merged_M), trained_TK, np.log(trained_T))
    regressor = TiltedPower()
    num_merged, num_domains = merged_MK.shape
    num_tilts = rows.tilt_TX.shape[1]
    target_R = np.concatenate([rows.merged_M, rows.trained_T])
    log_weights_MK = np.log(merged_MK + regressor.offset)
    gap = float(np.mean(rows.trained_T) - rows.centre)
    start_P = np.r_[tilted_power.start(log_weights_MK, merged_M), gap, 0.0, np.zeros(num_tilts)]
    base, scale_R, tilt_ridge = regressor.scale, np.ones(len(target_R)), NO_TILT
    theta_P, sd_G, jacobian_RP, ridge_P = start_P, np.full(3, base), np.empty((0, 0)), start_P
    for fits_left in range(FITS - 1, -1, -1):
        ridge_P = np.r_[regressor.ridges(num_domains), 0.0, (base / SLOPE_SD) ** 2]
        ridge_P = np.r_[ridge_P, np.full(num_tilts, tilt_ridge)]
        theta_P = levenberg.minimise(
            lambda theta_SP: _scaled(rows.model(theta_SP), scale_R),  # noqa: B023
            start_P[None],
            target_R * scale_R,
            ridge_P=ridge_P,
            scale=regressor.scale,
            max_iterations=tilted_power.MAX_ITERATIONS,
        )
        value_SR, jacobian_SRP = rows.model(theta_P[None])
        residual_R = target_R - value_SR[0]
        sd_G = rows.deviations(residual_R, 3 * num_domains + 2)
        if fits_left:
            base = float(sd_G[0])
            untilted_T = residual_R[num_merged:] + rows.tilt_TX @ theta_P[-num_tilts:]
            tilt_sd = _tilt_sd(rows.tilt_TX, untilted_T)
            tilt_ridge = (base / tilt_sd) ** 2 if tilt_sd else NO_TILT
            scale_R = base / (sd_G @ rows.groups_GR)
        jacobian_RP = jacobian_SRP[0] * scale_R[:, None]
    cover_PP = np.linalg.inv(jacobian_RP.T @ jacobian_RP + np.diag(ridge_P + 1e-15))
    of_factor = slice(3 * num_domains + 2, None)
    shift, log_slope, *tilt = theta_P[of_factor]
    shift_se, log_slope_se, *_ = base * np.sqrt(np.diag(cover_PP)[of_factor])
    # Pairs, where there are any, say what a merged loss is worth without the law.
    told = 2 if rows.groups_GR[2].sum() >= 2 else 1
    return Factor(
        centre=rows.centre,
        shift=float(shift),
        slope=float(np.exp(log_slope)),
        tilt_X=np.array(tilt) if tilt_ridge < NO_TILT else np.zeros(num_tilts),
        centre_X=rows.centre_X,
        shift_se=float(shift_se),
        slope_se=float(np.exp(log_slope) * log_slope_se),
        residual_sd=float(sd_G[told]),
    )


class _Rows:
    """The rows of one target in log loss, who is paired, and what the model says of them."""

    def __init__(
        self,
        merged_MK: np.ndarray,
        merged_M: np.ndarray,
        trained_TK: np.ndarray,
        trained_T: np.ndarray,
    ) -> None:
        self.merged_M, self.trained_T = merged_M, trained_T
        self.centre = float(merged_M.mean())
        self.centre_X = features(merged_MK).mean(0)
        self.tilt_TX = features(trained_TK) - self.centre_X
        same_TM = partners(trained_TK, merged_MK)
        self.paired_T = same_TM.any(1)
        # Several merged rows of one mixture count as their mean.
        self.partner_T = same_TM @ (merged_M - self.centre) / np.maximum(same_TM.sum(1), 1)
        self.weights_RK = np.concatenate([merged_MK, trained_TK])
        self.log_weights_RK = np.log(self.weights_RK + TiltedPower.offset)
        none_M, none_T = np.zeros(len(merged_M), bool), np.zeros(len(trained_T), bool)
        self.groups_GR = np.stack(
            [
                np.r_[~none_M, none_T],
                np.r_[none_M, ~self.paired_T],
                np.r_[none_M, self.paired_T],
            ]
        )

    def model(self, theta_SP: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Value and Jacobian of all rows' log loss, shapes (S, R) and (S, R, P)."""
        num_law, num_merged = 3 * self.weights_RK.shape[1] + 2, len(self.merged_M)
        value_SR, by_law_SRP = tilted_power.log_loss(
            theta_SP[:, :num_law], self.weights_RK, self.log_weights_RK
        )
        trained = slice(num_merged, None)
        shift_S1, slope_S1 = theta_SP[:, num_law, None], np.exp(theta_SP[:, num_law + 1, None])
        apart_ST = np.where(self.paired_T, self.partner_T, value_SR[:, trained] - self.centre)
        tilt_ST = theta_SP[:, num_law + 2 :] @ self.tilt_TX.T
        value_SR[:, trained] = self.centre + shift_S1 + slope_S1 * apart_ST + tilt_ST
        by_law_SRP[:, trained] *= np.where(self.paired_T, 0.0, slope_S1)[:, :, None]
        by_factor_SRP = np.zeros((*value_SR.shape, 2 + self.tilt_TX.shape[1]))
        by_factor_SRP[:, trained, 0] = 1.0
        by_factor_SRP[:, trained, 1] = slope_S1 * apart_ST
        by_factor_SRP[:, trained, 2:] = self.tilt_TX
        return value_SR, np.concatenate([by_law_SRP, by_factor_SRP], axis=2)

    def deviations(self, residual_R: np.ndarray, num_law: int) -> np.ndarray:
        """Standard deviation of each group, drawn to the common one, shape (G,), > 0."""
        count_G = self.groups_GR.sum(1)
        used_G = np.array([min(num_law, len(self.merged_M) / 2), 2.0, 2.0])  # degrees of freedom
        free_G = np.maximum(count_G - used_G, 0.0)
        square_G = self.groups_GR @ residual_R**2
        common = max(float(square_G.sum() / max(free_G.sum(), 1.0)), 1e-12)
        return np.sqrt((square_G + PRIOR_ROWS * common) / (free_G + PRIOR_ROWS))


def _scaled(
    found: tuple[np.ndarray, np.ndarray], scale_R: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    return found[0] * scale_R, found[1] * scale_R[:, None]


def _tilt_sd(tilt_TX: np.ndarray, residual_T: np.ndarray) -> float:
    """The likeliest standard deviation of the tilt's coefficients, 0 where none shows."""
    unit = max(float(np.sqrt(np.mean(residual_T**2))), 1e-6)
    residual_T = residual_T / unit
    cross_TT, shift_TT = tilt_TX @ tilt_TX.T, np.full((len(residual_T),) * 2, LOOSE**2)
    best, likeliest = -np.inf, 0.0
    for tilt in TILTS:
        for noise in NOISES:
            cover_TT = noise**2 * np.eye(len(residual_T)) + tilt**2 * cross_TT + shift_TT
            quadratic = residual_T @ np.linalg.solve(cover_TT, residual_T)
            likelihood = -np.linalg.slogdet(cover_TT)[1] - quadratic
            if likelihood > best + 1e-9:
                best, likeliest = likelihood, tilt * unit
    return likeliest

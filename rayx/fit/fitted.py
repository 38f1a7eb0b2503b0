"""Stage 5, regression: one fitted model per target, and what it says about a weighted objective.

Intervals for one more run, noise included, rest on the out-of-fold residuals: those of each target
for its own interval, those of the weighted sum for an objective (targets err together, so their
variances do not simply add). Of a table that joins trained and merged rows only the trained rows'
residuals count: the interval is that of a trained run. The interval for the expected difference of
two mixtures, which noise does not widen, rests on how far the folds' models disagree about it.

Shapes: R runs, K domains, M mixtures to predict, T targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import pandas as pd
from scipy import stats
from scipy.spatial.distance import cdist

from rayx.errors import FitError, did_you_mean
from rayx.fit.regressor import CrossFit, checked_weights
from rayx.fit.scores import signal_floor
from rayx.fit.table import Table

MIN_JOINT_ROWS = 8
MAX_PAIRS = 200_000


@dataclass(frozen=True, eq=False)
class FittedTable:
    """The models of a table's targets.

    Attributes:
        table: What was fitted.
        models: For each target its chosen model; fitted on the rows that have that target.
        regressors: For each target the name of what was chosen, "a+b" for an average.
        cv: One row per target and regressor that was not given up early: target, regressor,
            spearman, r2, mse, chosen.
        no_signal: Targets that no regressor predicts better than their mean does.
        warnings: What should make one distrust the fit, in words.
    """

    table: Table
    models: Mapping[str, CrossFit]
    regressors: Mapping[str, str]
    cv: pd.DataFrame
    no_signal: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def oof_RT(self) -> np.ndarray:
        """Predictions by models that did not see the row, shape (R, T); NaN where no loss is."""
        oof_RT = np.full(self.table.losses_RM.shape, np.nan)
        for t, target in enumerate(self.table.targets):
            oof_RT[np.isfinite(self.table.losses_RM[:, t]), t] = self.models[target].oof_R
        return oof_RT

    @property
    def _told_RT(self) -> np.ndarray:
        """Cells that errors are measured on: all losses, or those of the trained rows."""
        seen_RT = np.isfinite(self.table.losses_RM)
        if self.table.merged_R is None:
            return seen_RT
        trained_RT = seen_RT & ~self.table.merged_R[:, None]
        return np.where(trained_RT.sum(0) >= MIN_JOINT_ROWS, trained_RT, seen_RT)

    @property
    def _error_T(self) -> np.ndarray:
        """Root mean square of loss - oof over the rows that tell it, shape (T,), > 0."""
        error_T = np.array([self.models[target].residual_sd for target in self.table.targets])
        if self.table.merged_R is None:
            return error_T
        residuals_RT = np.where(self._told_RT, self.table.losses_RM - self.oof_RT, 0.0)
        told_T = np.sqrt((residuals_RT**2).sum(0) / self._told_RT.sum(0))
        return np.maximum(told_T, 1e-9 * error_T)

    @overload
    def predict(self, weights_MK: np.ndarray, std: Literal[False] = False) -> np.ndarray: ...
    @overload
    def predict(
        self, weights_MK: np.ndarray, std: Literal[True]
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def predict(
        self, weights_MK: np.ndarray, std: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Predict all targets, shape (M, T); with `std` also their standard deviations."""
        weights_MK = self._checked(weights_MK)
        models = [self.models[target] for target in self.table.targets]
        losses_MT = np.stack([model.predict_all(weights_MK) for model in models], axis=1)
        if not std:
            return losses_MT
        std_MT = np.stack([model.std(weights_MK) for model in models], axis=1)
        return losses_MT, std_MT * (self._error_T / [model.residual_sd for model in models])

    def interval(self, weights_MK: np.ndarray, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Interval for the losses of one more run of each mixture: (low_MT, high_MT).

        prediction +- q std / rms(loss - oof), q the `level` quantile of |loss - oof|.

        Source: Papadopoulos et al. 2002 (normalised conformal prediction).
        Differs: residuals of cross-validation instead of a split, so coverage is close to, not
            guaranteed at, the level.
        """
        losses_MT, std_MT = self.predict(weights_MK, std=True)
        residuals_RT = self.table.losses_RM - self.oof_RT
        half_MT = np.empty_like(losses_MT)
        for t, error in enumerate(self._error_T):
            residual_R = residuals_RT[self._told_RT[:, t], t]
            half_MT[:, t] = _quantile(np.abs(residual_R), level) * std_MT[:, t] / error
        return losses_MT - half_MT, losses_MT + half_MT

    @overload
    def objective(
        self, weights_MK: np.ndarray, targets: Mapping[str, float], std: Literal[False] = False
    ) -> np.ndarray: ...
    @overload
    def objective(
        self, weights_MK: np.ndarray, targets: Mapping[str, float], std: Literal[True]
    ) -> tuple[np.ndarray, np.ndarray]: ...
    def objective(
        self, weights_MK: np.ndarray, targets: Mapping[str, float], std: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Predict sum_t a_t L_t(w), the weights a normalised to sum to 1.

        Args:
            weights_MK: Mixtures.
            targets: Target -> weight, > 0.
            std: Also return the standard deviation, from residuals of the weighted sum.

        Raises:
            FitError: An unknown target, or a weight that is not positive.
        """
        weights_MK = self._checked(weights_MK)
        shares = normalised_objective(targets, self.table.targets)
        value_M = np.zeros(len(weights_MK))
        for target, share in shares.items():
            value_M += share * self.models[target].predict_all(weights_MK)
        if not std:
            return value_M
        sd = float(np.sqrt(np.mean(self._objective_residuals(shares) ** 2)))
        return value_M, sd * self._inflation(weights_MK, shares)

    def objective_interval(
        self, weights_MK: np.ndarray, targets: Mapping[str, float], level: float = 0.9
    ) -> tuple[np.ndarray, np.ndarray]:
        """Interval for the objective of one more run of each mixture: (low_M, high_M)."""
        shares = normalised_objective(targets, self.table.targets)
        value_M = self.objective(weights_MK, shares)
        reach = _quantile(np.abs(self._objective_residuals(shares)), level)
        half_M = reach * self._inflation(weights_MK, shares)
        return value_M - half_M, value_M + half_M

    def difference(
        self,
        weights_K: np.ndarray,
        other_K: np.ndarray,
        targets: Mapping[str, float],
        level: float = 0.9,
        one_run_each: bool = False,
    ) -> tuple[float, float, float]:
        """Objective of one mixture less that of another: (difference, low, high).

        The interval is that of the expected difference, which many runs of both would show: it
        holds the error of the models and no noise of a run. With `one_run_each` it is that of the
        difference of two single runs.

        difference +- t sd,  sd^2 = (F - 1) / F * sum_f (difference_f - mean)^2 + 2 d misfit^2,
        over the folds' models, t the quantile of Student's t with F - 1 degrees of freedom.
        misfit^2 is what of the squared out-of-fold residuals nearest rows have in common, and so is
        no noise; d the distance of the two mixtures in units of the mean over rows, at most 1. For
        two runs it is the quantile of |residual_i - residual_j| over pairs of rows.

        Source: Efron and Stein 1981, Ann. Statist. 9(3), the jackknife; Rice 1984, Ann. Statist.
            12(4), noise from differences of neighbours.
        Differs: the two variances are added. A target without signal counts as misfit the largest
            signal that would have been missed.
        """
        shares = normalised_objective(targets, self.table.targets)
        both_MK = self._checked(np.stack([weights_K, other_K]))
        value, other = self.objective(both_MK, shares)
        residual_R = self._objective_residuals(shares)
        i, j = np.triu_indices(len(residual_R), k=1)
        step = max(1, len(i) // MAX_PAIRS)
        gaps = np.abs(residual_R[i[::step]] - residual_R[j[::step]])
        half = _quantile(gaps, level) * float(self._inflation(both_MK, shares).max())
        if not one_run_each:  # never wider than with noise on top
            half = min(half, self._expected_half(both_MK, shares, level))
        return float(value - other), float(value - other - half), float(value - other + half)

    def _expected_half(
        self, both_MK: np.ndarray, shares: Mapping[str, float], level: float
    ) -> float:
        """Half the width of the interval of the expected difference of two mixtures."""
        by_folds: dict[int, np.ndarray] = {}  # targets with the same folds err together
        missed = 0.0
        for target, share in shares.items():
            model = self.models[target]
            gaps_F = np.array([-np.diff(predict(both_MK))[0] for predict in model.predict_folds])
            by_folds[len(gaps_F)] = by_folds.get(len(gaps_F), 0.0) + share * gaps_F
            if target in self.no_signal:
                missed += share * model.residual_sd * min(1.0, signal_floor(len(model.oof_R)))
        # Targets with other folds: as if their errors were all one error.
        sd = sum(float(np.sqrt((n - 1) * gaps_F.var())) for n, gaps_F in by_folds.items())
        reach = float(stats.t.ppf(0.5 + level / 2.0, min(by_folds) - 1))
        distance_RR = cdist(self.table.weights_RK, self.table.weights_RK, "cityblock")
        usual = max(float(distance_RR.mean()), 1e-12)
        apart = min(1.0, float(np.abs(both_MK[0] - both_MK[1]).sum()) / usual)
        misfit = self._misfit_variance(shares, distance_RR) + missed**2
        return float(reach * np.sqrt(sd**2 + 2.0 * misfit * apart))

    def _misfit_variance(self, shares: Mapping[str, float], distance_RR: np.ndarray) -> float:
        """What of the mean squared out-of-fold residual of the objective is not noise, >= 0."""
        residual_R = self._objective_residuals(shares)
        seen_R = self._joint_rows(shares)
        if len(residual_R) != seen_R.sum():  # no rows have all the targets: nothing to compare
            return 0.0
        between_RR = distance_RR[np.ix_(seen_R, seen_R)] + np.diag(np.full(seen_R.sum(), np.inf))
        noise = np.mean((residual_R - residual_R[between_RR.argmin(1)]) ** 2) / 2.0
        return max(0.0, float(np.mean(residual_R**2) - noise))

    def _joint_rows(self, shares: Mapping[str, float]) -> np.ndarray:
        """Which rows tell the errors of all targets of the objective, shape (R,)."""
        columns = [self.table.targets.index(target) for target in shares]
        return np.all(self._told_RT[:, columns], axis=1)

    def _objective_residuals(self, shares: Mapping[str, float]) -> np.ndarray:
        """Out-of-fold residuals of the weighted sum, on rows that have all its targets."""
        columns = [self.table.targets.index(target) for target in shares]
        residuals_RT = (self.table.losses_RM - self.oof_RT)[:, columns]
        share_T = np.array(list(shares.values()))
        joint_R = self._joint_rows(shares)
        if joint_R.sum() >= MIN_JOINT_ROWS:
            return residuals_RT[joint_R] @ share_T
        # Too few rows have all targets: as if the errors of the targets were all one error.
        sd_T = self._error_T[columns]
        scaled_RT = residuals_RT / sd_T
        return scaled_RT[self._told_RT[:, columns]] * float(share_T @ sd_T)

    def _inflation(self, weights_MK: np.ndarray, shares: Mapping[str, float]) -> np.ndarray:
        """Standard deviation of a run in units of the out-of-fold residuals', shape (M,), > 0."""
        wide_M, usual = np.zeros(len(weights_MK)), 0.0
        for target, share in shares.items():
            wide_M += (share * self.models[target].std(weights_MK)) ** 2
            usual += (share * self.models[target].residual_sd) ** 2
        return np.sqrt(wide_M / usual)

    def _checked(self, weights_MK: np.ndarray) -> np.ndarray:
        weights_MK = checked_weights(weights_MK)
        if weights_MK.shape[1] != len(self.table.domains):
            raise FitError(
                f"The mixtures have {weights_MK.shape[1]} domains; "
                f"the table has {len(self.table.domains)}."
            )
        return weights_MK


def _quantile(gaps: np.ndarray, level: float) -> float:
    """The quantile below which a further gap lies with probability `level`, on average."""
    if not 0.0 < level < 1.0:
        raise FitError(f"The level of an interval is {level}; expected between 0 and 1.")
    return float(np.quantile(gaps, level, method="weibull"))


def normalised_objective(
    objective: Mapping[str, float], targets: Sequence[str]
) -> dict[str, float]:
    """Return the objective with weights that add up to 1.

    Raises:
        FitError: It is empty, names a target that is not among `targets`, or a weight is not a
            finite number > 0.
    """
    if not objective:
        raise FitError(f"The objective names no target; there are {', '.join(targets)}.")
    for target, weight in objective.items():
        if target not in targets:
            raise FitError(
                f"The objective has target {target!r}; there are {', '.join(targets)}."
                f"{did_you_mean(target, targets)}"
            )
        if not (np.isfinite(weight) and weight > 0):
            raise FitError(
                f"The objective's weight of {target!r} is {weight}; expected more than 0."
            )
    return {target: weight / sum(objective.values()) for target, weight in objective.items()}

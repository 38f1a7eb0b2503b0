"""Stage 5, regression: what a regressor is, and how each one gets its uncertainty.

A regressor maps mixture weights to one loss. It follows scikit-learn: hyper-parameters are
constructor arguments stored verbatim, `fit` returns self, learned values end in `_`. To add one,
subclass `PointRegressor` and write `fit_point`; fitting the folds, the out-of-fold residuals and
`predict(..., std=True)` come with it.

The standard deviation is that of the out-of-fold residuals, less what they owe to the rows that a
fold's model misses, so it holds the noise of a run and the error of the model alike. Where the
folds' models disagree more than they do on nearly all rows that they were fitted to (far from the
data), it grows by that disagreement. Rows with the same mixture (replicates with another seed)
always share a fold.

Shapes: R runs, K domains, M mixtures to predict, F folds, T targets.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar, overload

import numpy as np

from rayx.errors import FitError

Predictor = Callable[[np.ndarray], np.ndarray]  # weights_MK -> loss_M
PointFit = Callable[[np.ndarray, np.ndarray], Predictor]  # weights_RK, loss_R -> Predictor
Self = TypeVar("Self", bound="PointRegressor")
MIN_ROWS = 4
USUAL = 0.95  # share of the training rows on which the folds' disagreement is as usual


class Regressor(Protocol):
    """Mixture -> loss at one scale, with uncertainty."""

    def fit(self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Regressor: ...

    def predict(self, weights_MK: np.ndarray, std: bool = False) -> Any: ...


@dataclass(frozen=True, eq=False)
class CrossFit:
    """One model of all rows, the models of the folds, and the predictions for rows left out.

    Attributes:
        predict_all: The model of all rows.
        predict_folds: Model f was fitted without the rows of fold f.
        oof_R: For each row the prediction of the model that did not see it.
        residual_sd: Root mean square of loss - oof, > 0.
        run_sd: The same for the model of all rows: what one more run among the rows would show.
        usual_spread: Jackknife variance below which 95% of the training rows lie.
    """

    predict_all: Predictor
    predict_folds: tuple[Predictor, ...]
    oof_R: np.ndarray
    residual_sd: float
    run_sd: float
    usual_spread: float

    def std(self, weights_MK: np.ndarray) -> np.ndarray:
        """Standard deviation of a run's loss around the prediction, shape (M,), > 0."""
        excess_M = jackknife_variance(self.predict_folds, weights_MK) - self.usual_spread
        return np.sqrt(self.run_sd**2 + np.maximum(excess_M, 0.0))


def jackknife_variance(predictors: Sequence[Predictor], weights_MK: np.ndarray) -> np.ndarray:
    """Variance of the full model's prediction by the delete-a-group jackknife, shape (M,).

    (F - 1) / F * sum_f (prediction_f - mean prediction)^2.

    Source: Efron and Stein 1981, Ann. Statist. 9(3), eq. 1.1 (with groups for single rows).
    """
    predictions_FM = np.stack([predict(weights_MK) for predict in predictors])
    return (len(predictors) - 1) * predictions_FM.var(axis=0)


def make_folds(weights_RK: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Assign each row to a fold, rows of one mixture to the same one.

    Args:
        weights_RK: Mixture weights.
        num_folds: Folds wanted; fewer are made if there are fewer distinct mixtures.
        seed: Seed of the assignment.

    Returns:
        Fold of each row, shape (R,), integers 0 ... F - 1, every fold non-empty.
    """
    first_seen: dict[tuple[float, ...], int] = {}
    group_R = np.array(
        [first_seen.setdefault(tuple(row), len(first_seen)) for row in np.round(weights_RK, 9)]
    )
    if len(first_seen) < 2:  # one mixture only: nothing to learn, and nothing to leak
        group_R = np.arange(len(weights_RK))
    num_groups = int(group_R.max()) + 1
    order = np.random.default_rng(seed).permutation(num_groups)
    return (order % min(num_folds, num_groups))[group_R]


def fit_folds(
    fit_point: PointFit,
    weights_RK: np.ndarray,
    loss_R: np.ndarray,
    fold_R: np.ndarray,
    folds: Sequence[int],
) -> list[Predictor]:
    """Fit once without each of the folds given."""
    return [fit_point(weights_RK[fold_R != fold], loss_R[fold_R != fold]) for fold in folds]


def held_out(
    predictors: Sequence[Predictor], weights_RK: np.ndarray, fold_R: np.ndarray
) -> np.ndarray:
    """Predict each row by the model of its fold, shape (R,); NaN in folds that have none yet."""
    oof_R = np.full(len(fold_R), np.nan)
    for fold, predict in enumerate(predictors):
        oof_R[fold_R == fold] = predict(weights_RK[fold_R == fold])
    return oof_R


def cross_fit(
    fit_point: PointFit,
    weights_RK: np.ndarray,
    loss_R: np.ndarray,
    fold_R: np.ndarray,
    first: Sequence[Predictor] = (),
) -> CrossFit:
    """Fit on all rows and once without each fold; `first` are the first folds' models, if any."""
    rest = range(len(first), int(fold_R.max()) + 1)
    predictors = [*first, *fit_folds(fit_point, weights_RK, loss_R, fold_R, rest)]
    oof_R = held_out(predictors, weights_RK, fold_R)
    return assemble(fit_point(weights_RK, loss_R), predictors, oof_R, weights_RK, loss_R)


def assemble(
    predict_all: Predictor,
    predictors: Sequence[Predictor],
    oof_R: np.ndarray,
    weights_RK: np.ndarray,
    loss_R: np.ndarray,
) -> CrossFit:
    """Make a CrossFit from fitted models, measuring residuals and spread.

    residual^2 = noise^2 + F / (F - 1) * variance of the model of all rows, since a fold's model
    has F - 1 folds of F; so run_sd^2 = residual_sd^2 - spread / (F - 1).

    Source: derived; the variance of a mean goes with 1 / rows.
    """
    # A constant target leaves no residual; the floor keeps divisions by std finite.
    floor = 1e-9 * max(1.0, float(np.abs(loss_R).max()))
    residual_sd = max(float(np.sqrt(np.mean((loss_R - oof_R) ** 2))), floor)
    spread_R = jackknife_variance(predictors, weights_RK)
    missing = 1.0 / (len(predictors) - 1)
    # The model's variance cannot be more than all that the residual is.
    least_share = 1.0 - 1.0 / len(predictors)
    run_share = max(1.0 - missing * float(spread_R.mean()) / residual_sd**2, least_share)
    return CrossFit(
        predict_all,
        tuple(predictors),
        oof_R,
        residual_sd,
        residual_sd * float(np.sqrt(run_share)),
        float(np.quantile(spread_R, USUAL)),
    )


def averaged(
    members: Sequence[CrossFit],
    shares: Sequence[float] | np.ndarray,
    weights_RK: np.ndarray,
    loss_R: np.ndarray,
) -> CrossFit:
    """The average of fits that have the same folds, each with its share of the sum."""

    def weighted(predictors: Sequence[Predictor]) -> Predictor:
        return lambda weights_MK: sum(
            (
                share * predict(weights_MK)
                for share, predict in zip(shares, predictors, strict=True)
            ),
            np.zeros(len(weights_MK)),
        )

    return assemble(
        weighted([member.predict_all for member in members]),
        [
            weighted(predictors)
            for predictors in zip(*(member.predict_folds for member in members), strict=True)
        ],
        np.asarray(shares) @ np.stack([member.oof_R for member in members]),
        weights_RK,
        loss_R,
    )


def point_fit(regressor: Regressor) -> PointFit:
    """The bare fit of a regressor, without the folds that its own `fit` adds."""
    if isinstance(regressor, PointRegressor):
        return regressor.fit_point
    return lambda weights_RK, loss_R: copy.deepcopy(regressor).fit(weights_RK, loss_R).predict


@dataclass
class PointRegressor(ABC):
    """Base of rayx's regressors: subclasses write `fit_point` only.

    Args:
        folds: Folds of the cross-validation that gives `predict(..., std=True)`; 0 skips it.
        seed: Seed of the folds and of whatever else is drawn.
    """

    folds: int = 5
    seed: int = 0
    needs_positive: ClassVar[bool] = False  # True if the fit takes the logarithm of the loss

    @abstractmethod
    def fit_point(self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Predictor:
        """Fit checked rows and return the prediction function; no state is kept on self."""

    def fit(self: Self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Self:
        """Fit on all rows, and without each fold for the uncertainty.

        Args:
            weights_RK: Mixture weights, shape (R, K), finite, >= 0.
            loss_R: Losses, shape (R,), finite; > 0 if the regressor works on log loss.

        Raises:
            FitError: Shapes do not agree, a value is not finite, or there are too few rows.
        """
        weights_RK = checked_weights(weights_RK)
        loss_R = checked_loss(loss_R, len(weights_RK), self)
        if self.folds == 1 or self.folds < 0:
            raise FitError(f"folds is {self.folds}; expected 0 (no uncertainty) or at least 2.")
        self.num_domains_ = weights_RK.shape[1]
        self.cross_fit_: CrossFit | None = None
        if self.folds:
            fold_R = make_folds(weights_RK, self.folds, self.seed)
            self.cross_fit_ = cross_fit(self.fit_point, weights_RK, loss_R, fold_R)
            self.predict_ = self.cross_fit_.predict_all
        else:
            self.predict_ = self.fit_point(weights_RK, loss_R)
        return self

    @overload
    def predict(self, weights_MK: np.ndarray, std: Literal[False] = False) -> np.ndarray: ...
    @overload
    def predict(
        self, weights_MK: np.ndarray, std: Literal[True]
    ) -> tuple[np.ndarray, np.ndarray]: ...
    @overload
    def predict(
        self, weights_MK: np.ndarray, std: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]: ...
    def predict(
        self, weights_MK: np.ndarray, std: bool = False
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Predict the loss of mixtures.

        Args:
            weights_MK: Mixture weights, shape (M, K), domains in the order of `fit`.
            std: Also return the standard deviation of a run's loss around the prediction.

        Returns:
            loss_M, or (loss_M, std_M), in the unit of the losses fitted.

        Raises:
            FitError: Not fitted, another number of domains, or `std` with folds=0.
        """
        if not hasattr(self, "predict_"):
            raise FitError(f"{type(self).__name__} is not fitted; call fit(weights, loss) first.")
        weights_MK = checked_weights(weights_MK)
        if weights_MK.shape[1] != self.num_domains_:
            raise FitError(
                f"The mixtures have {weights_MK.shape[1]} domains; "
                f"the regressor was fitted on {self.num_domains_}."
            )
        loss_M = self.predict_(weights_MK)
        if not std:
            return loss_M
        if self.cross_fit_ is None:
            raise FitError("std=True needs cross-validation; the regressor was made with folds=0.")
        return loss_M, self.cross_fit_.std(weights_MK)


def checked_weights(weights_MK: np.ndarray) -> np.ndarray:
    """Return the weights as a float array of two dimensions, or say what is wrong with them."""
    weights_MK = np.asarray(weights_MK, dtype=float)
    if weights_MK.ndim != 2:
        raise FitError(
            f"Weights have shape {weights_MK.shape}; expected two dimensions (mixtures, domains)."
        )
    if not np.isfinite(weights_MK).all():
        raise FitError(f"Weights of row {_first_row(~np.isfinite(weights_MK))} are not finite.")
    if (weights_MK < 0).any():
        raise FitError(f"Weights of row {_first_row(weights_MK < 0)} are negative.")
    return weights_MK


def checked_loss(loss_R: np.ndarray, num_rows: int, regressor: Regressor) -> np.ndarray:
    """Return the losses as a float array, or say what is wrong with them."""
    loss_R = np.asarray(loss_R, dtype=float)
    if loss_R.shape != (num_rows,):
        raise FitError(f"Losses have shape {loss_R.shape}; expected ({num_rows},), one a mixture.")
    if num_rows < MIN_ROWS:
        raise FitError(f"{num_rows} rows are too few to fit; expected at least {MIN_ROWS}.")
    if not np.isfinite(loss_R).all():
        raise FitError(f"Loss of row {_first_row(~np.isfinite(loss_R))} is not finite; drop it.")
    if getattr(regressor, "needs_positive", False) and (loss_R <= 0).any():
        row = _first_row(loss_R <= 0)
        raise FitError(
            f"{type(regressor).__name__} works on log loss, and the loss of row {row} is "
            f"{loss_R[row]:g}. Use Ridge or LightGBM, or shift the target above 0."
        )
    return loss_R


def _first_row(bad: np.ndarray) -> int:
    return int(np.argwhere(bad)[0, 0])

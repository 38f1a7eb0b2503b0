"""Stage 5, regression: fit a table, choosing the regressor of each target by cross-validation.

Every candidate is fitted K + 1 times per target: without each fold, then on all rows. What a
candidate tunes itself (leaf size, rounds, ridge strength, length scales) it tunes inside the rows
that it is given, so the comparison is nested. The folds' models are kept: they are the uncertainty.

Limits: the error of the winner is the least of several, so it is a little too good at few rows.

Shapes: R runs, K domains, T targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from rayx.errors import FitError, did_you_mean
from rayx.fit.boosted_trees import LightGBM
from rayx.fit.fitted import FittedTable
from rayx.fit.gaussian_process import GaussianProcess
from rayx.fit.inverse_power import InversePower
from rayx.fit.linear import Mean, Ridge
from rayx.fit.log_linear import LogLinear
from rayx.fit.regressor import (
    CrossFit,
    Predictor,
    Regressor,
    assemble,
    checked_loss,
    cross_fit,
    make_folds,
    point_fit,
)
from rayx.fit.scheffe import Scheffe
from rayx.fit.table import MIN_ROWS, Table
from rayx.fit.tilted_power import TiltedPower

Progress = Callable[[int, int, str], None]  # fits done, fits in all, "target: regressor"

NUM_FOLDS = 5
BLEND_SIZES = (2, 3)
# An average must beat the best single regressor by this share of its error to be chosen.
BLEND_GAIN = 0.02
# CV Spearman times sqrt(rows - 1) is about standard normal without signal; 2.6 is 1 in 200.
SIGNAL_Z = 2.6


def regressors(seed: int = 0) -> dict[str, Regressor]:
    """The regressors that have a name on the command line; all take part in "auto"."""
    return {
        "mean": Mean(seed=seed),
        "ridge": Ridge(seed=seed),
        "scheffe": Scheffe(seed=seed),
        "loglinear": LogLinear(seed=seed),
        "inverse-power": InversePower(seed=seed),
        "tilted-power": TiltedPower(seed=seed),
        "gp": GaussianProcess(seed=seed),
        "lightgbm": LightGBM(seed=seed),
    }


def fit_table(
    table: Table,
    regressor: str | Regressor = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> FittedTable:
    """Fit every target of a table.

    Args:
        table: Runs at one scale.
        regressor: "auto", a name of `regressors()`, or an unfitted regressor.
        seed: Seed of the folds and of the named regressors.
        progress: Called after each cross-validated fit with (done, total, what).

    Returns:
        The models with their cross-validation. A target without signal gets its mean as the model
        and is listed in `no_signal`.

    Raises:
        FitError: An unknown name, too few rows for a target, or a loss of 0 or less for a regressor
            that was asked for by name and works on log loss.
    """
    candidates = _candidates(regressor, seed)
    warnings = list(table.warnings)
    models: dict[str, CrossFit] = {}
    chosen: dict[str, str] = {}
    rows: list[dict] = []
    no_signal = []
    for t, target in enumerate(table.targets):
        seen_R = np.isfinite(table.losses_RM[:, t])
        weights_RK, loss_R = table.weights_RK[seen_R], table.losses_RM[seen_R, t]
        if len(loss_R) < MIN_ROWS:
            raise FitError(
                f"Target {target!r} has {len(loss_R)} losses; expected at least {MIN_ROWS}."
            )
        fold_R = make_folds(weights_RK, NUM_FOLDS, seed)
        fits: dict[str, CrossFit] = {}
        for c, (name, candidate) in enumerate(candidates.items()):
            if regressor == "auto" and _needs_positive(candidate) and (loss_R <= 0).any():
                warnings.append(f"{target}: {name} left out, it needs losses above 0")
            else:
                try:
                    checked_loss(loss_R, len(loss_R), candidate)
                except FitError as error:
                    raise FitError(f"Target {target!r}: {error}") from None
                fits[name] = cross_fit(point_fit(candidate), weights_RK, loss_R, fold_R)
            if progress is not None:
                progress(
                    t * len(candidates) + c + 1,
                    len(candidates) * len(table.targets),
                    f"{target}: {name}",
                )
        name = min(fits, key=lambda name: fits[name].residual_sd)
        if regressor == "auto":
            fits |= _blends(fits, weights_RK, loss_R)
            best = min(fits, key=lambda name: fits[name].residual_sd)
            if fits[best].residual_sd ** 2 < (1.0 - BLEND_GAIN) * fits[name].residual_sd ** 2:
                name = best
        scores = {tried: cv_scores(fits[tried].oof_R, loss_R) for tried in fits}
        if not has_signal(scores[name], len(loss_R)):
            no_signal.append(target)
            name = "mean"
            if name not in fits:
                fits[name] = cross_fit(Mean(seed=seed).fit_point, weights_RK, loss_R, fold_R)
                scores[name] = cv_scores(fits[name].oof_R, loss_R)
        models[target], chosen[target] = fits[name], name
        rows += [
            {"target": target, "regressor": tried, **scores[tried], "chosen": tried == name}
            for tried in fits
        ]
    if no_signal:
        warnings.append(
            f"no signal: the mixture does not predict {', '.join(no_signal)} better than the mean "
            f"of the runs does"
        )
    return FittedTable(
        table=table,
        models=models,
        regressors=chosen,
        cv=pd.DataFrame(rows),
        no_signal=tuple(no_signal),
        warnings=tuple(warnings),
    )


def cv_scores(predicted_R: np.ndarray, loss_R: np.ndarray) -> dict[str, float]:
    """Spearman, R2 against the mean of the losses, and mean squared error."""
    mse = float(np.mean((predicted_R - loss_R) ** 2))
    variance = float(loss_R.var())
    # Losses that are constant to rounding leave nothing to explain.
    constant = variance <= 1e-18 * float(np.mean(loss_R**2))
    r2 = 0.0 if constant else 1.0 - mse / variance
    return {"spearman": spearman(predicted_R, loss_R), "r2": r2, "mse": mse}


def spearman(a_R: np.ndarray, b_R: np.ndarray) -> float:
    """Rank correlation; 0 if either side is constant, since it then ranks nothing."""
    if np.ptp(a_R) == 0 or np.ptp(b_R) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(a_R), rankdata(b_R))[0, 1])


def has_signal(scores: Mapping[str, float], num_rows: int) -> bool:
    """Whether cross-validation beats the mean by more than chance."""
    return scores["r2"] > 0 and scores["spearman"] * math.sqrt(num_rows - 1) > SIGNAL_Z


def _candidates(regressor: str | Regressor, seed: int) -> dict[str, Regressor]:
    named = regressors(seed)
    if not isinstance(regressor, str):
        return {type(regressor).__name__: regressor}
    if regressor == "auto":
        return named
    if regressor not in named:
        known = ["auto", *named]
        raise FitError(
            f"There is no regressor {regressor!r}; expected one of {', '.join(known)}."
            f"{did_you_mean(regressor, known)}"
        )
    return {regressor: named[regressor]}


def _needs_positive(regressor: Regressor) -> bool:
    return getattr(regressor, "needs_positive", False)


def _blends(
    fits: Mapping[str, CrossFit], weights_RK: np.ndarray, loss_R: np.ndarray
) -> dict[str, CrossFit]:
    """Plain averages of the best two and the best three regressors."""
    ranked = sorted(fits, key=lambda name: fits[name].residual_sd)
    blends = {}
    for size in BLEND_SIZES:
        members = [fits[name] for name in ranked[:size]]
        if len(members) == size:
            blends["+".join(ranked[:size])] = assemble(
                _average([member.predict_all for member in members]),
                [
                    _average(predictors)
                    for predictors in zip(
                        *(member.predict_folds for member in members), strict=True
                    )
                ],
                np.mean([member.oof_R for member in members], axis=0),
                weights_RK,
                loss_R,
            )
    return blends


def _average(predictors: Sequence[Predictor]) -> Predictor:
    return lambda weights_MK: np.mean([predict(weights_MK) for predict in predictors], axis=0)

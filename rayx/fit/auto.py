"""Stage 5, regression: fit a table; "auto" averages regressors by cross-validation.

Every candidate is fitted F + 1 times per target: without each fold, then on all rows. What a
candidate tunes itself (leaf size, rounds, ridge strength, length scales) it tunes inside the rows
that it is given, so the comparison is nested. The folds' models are kept: they are the uncertainty.
Which candidates are averaged, all targets decide together (stacking.py); those far behind on the
first folds are not fitted on the others.

Limits: the shares come from the same out-of-fold residuals as the errors that are reported, which
are therefore a little too good at few rows.

Shapes: R runs, K domains, C candidates, T targets.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from rayx.errors import FitError, did_you_mean
from rayx.fit.boosted_trees import ClimbTrees, LightGBM
from rayx.fit.fitted import FittedTable
from rayx.fit.gaussian_process import GaussianProcess
from rayx.fit.inverse_power import InversePower
from rayx.fit.linear import Mean, Ridge
from rayx.fit.log_linear import LogLinear
from rayx.fit.race import Job, rows_of, survivors
from rayx.fit.regressor import CrossFit, Regressor, averaged
from rayx.fit.scheffe import Scheffe
from rayx.fit.scores import cv_scores, has_signal, no_signal_words
from rayx.fit.stacking import stacked_shares
from rayx.fit.table import MIN_ROWS, Table
from rayx.fit.tilted_power import TiltedPower

Progress = Callable[[int, int, str], None]  # fits done, fits in all, "target: regressor"


def regressors(seed: int = 0) -> dict[str, Regressor]:
    """The regressors that take part in "auto"; they have a name on the command line."""
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


MOST_REMEMBERED = 8
_remembered: dict[tuple, FittedTable] = {}


# Many small systems: on a busy machine threads of BLAS wait for each other (4 s became 65 s).
@threadpool_limits.wrap(limits=1)
def fit_table(
    table: Table,
    regressor: str | Regressor = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> FittedTable:
    """Fit every target of a table.

    Args:
        table: Runs at one scale.
        regressor: "auto", a name of `regressors()`, "climb", or an unfitted regressor.
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
    for target, seen_R in zip(table.targets, np.isfinite(table.losses_RM).T, strict=True):
        if seen_R.sum() < MIN_ROWS:
            raise FitError(
                f"Target {target!r} has {seen_R.sum()} losses; expected at least {MIN_ROWS}."
            )
    pairs = [(target, name) for target in table.targets for name in candidates]
    total = len(pairs) * (2 if regressor == "auto" else 1)
    done = 0

    def advance(what: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, what)

    jobs: dict[tuple[str, str], Job] = {}
    for target, name in pairs:
        job = Job.of(table, target, candidates[name], seed)
        if regressor == "auto" and _needs_positive(candidates[name]) and (job.loss_R <= 0).any():
            warnings.append(f"{target}: {name} left out, it needs losses above 0")
        else:
            job.check(target)
            jobs[target, name] = job
            if regressor == "auto":
                job.start()
        if regressor == "auto":
            advance(f"{target}: {name}, first folds")
    kept = survivors(jobs) if regressor == "auto" else set(candidates)
    fits: dict[str, dict[str, CrossFit]] = {target: {} for target in table.targets}
    for target, name in pairs:
        if name in kept and (target, name) in jobs:
            fits[target][name] = jobs[target, name].finish()
        advance(f"{target}: {name}")
    chosen = dict.fromkeys(table.targets, next(iter(candidates)))
    if regressor == "auto":
        chosen = _add_averages(table, fits)

    rows: list[dict] = []
    no_signal = []
    for target in table.targets:
        loss_R = rows_of(table, target)[1]
        scores = {name: cv_scores(fit.oof_R, loss_R) for name, fit in fits[target].items()}
        found = scores[chosen[target]]
        if not has_signal(found, len(loss_R)):
            no_signal.append(target)
            warnings.append(no_signal_words(target, chosen[target], found, len(loss_R)))
            chosen[target] = "mean"
            if "mean" not in scores:
                mean = Job.of(table, target, Mean(seed=seed), seed).finish()
                fits[target]["mean"], scores["mean"] = mean, cv_scores(mean.oof_R, loss_R)
        rows += [
            {"target": target, "regressor": name, **scores[name], "chosen": name == chosen[target]}
            for name in fits[target]
        ]
    return FittedTable(
        table=table,
        models={target: fits[target][chosen[target]] for target in table.targets},
        regressors=chosen,
        cv=pd.DataFrame(rows),
        no_signal=tuple(no_signal),
        warnings=tuple(warnings),
    )


def fit_once(table: Table, regressor: str, seed: int) -> FittedTable:
    """Return what `fit_table` gives, remembered: what decides round by round asks again and again.

    The last MOST_REMEMBERED fits are kept.
    """
    arrays = (table.weights_RK, table.losses_RM, table.merged_R)
    key = (regressor, seed, table.run_ids, table.domains, table.targets, table.warnings,
           *(None if array is None else array.tobytes() for array in arrays))  # fmt: skip
    if key not in _remembered:
        while len(_remembered) >= MOST_REMEMBERED:
            del _remembered[next(iter(_remembered))]
        _remembered[key] = fit_table(table, regressor, seed=seed)
    return _remembered[key]


def _candidates(regressor: str | Regressor, seed: int) -> dict[str, Regressor]:
    named = regressors(seed)
    if not isinstance(regressor, str):
        return {type(regressor).__name__: regressor}
    if regressor == "auto":
        return named
    named["climb"] = ClimbTrees(seed=seed)  # as published: by name only
    if regressor not in named:
        known = ["auto", *named]
        raise FitError(
            f"There is no regressor {regressor!r}; expected one of {', '.join(known)}."
            f"{did_you_mean(regressor, known)}"
        )
    return {regressor: named[regressor]}


def _needs_positive(regressor: Regressor) -> bool:
    return getattr(regressor, "needs_positive", False)


def _add_averages(table: Table, fits: dict[str, dict[str, CrossFit]]) -> dict[str, str]:
    """Add to each target's fits the average that its peers and it prefer; return their names.

    Peers are the targets with the same candidates: those with a loss of 0 or less have fewer.
    """
    residuals = {
        target: np.stack([rows_of(table, target)[1] - fit.oof_R for fit in by_name.values()], 1)
        for target, by_name in fits.items()
    }
    chosen = {}
    for candidates in dict.fromkeys(tuple(by_name) for by_name in fits.values()):
        peers = [target for target, by_name in fits.items() if tuple(by_name) == candidates]
        shares = stacked_shares({target: residuals[target] for target in peers})
        for target in peers:
            order = [c for c in np.argsort(-shares[target], kind="stable") if shares[target][c] > 0]
            chosen[target] = "+".join(candidates[c] for c in order)
            if len(order) > 1:
                weights_RK, loss_R = rows_of(table, target)
                fits[target][chosen[target]] = averaged(
                    [fits[target][candidates[c]] for c in order],
                    shares[target][order],
                    weights_RK,
                    loss_R,
                )
    return {target: chosen[target] for target in table.targets}

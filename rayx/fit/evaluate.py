"""Stage 5, regression: how good is a fit on runs that it has not seen, and `rayx fit`'s answer."""

from __future__ import annotations

import time

import numpy as np

from rayx.fit.auto import Progress, fit_table
from rayx.fit.fitted import FittedTable
from rayx.fit.regressor import Regressor
from rayx.fit.scores import spearman
from rayx.fit.table import Table


def score(fitted: FittedTable, test_table: Table) -> dict[str, dict[str, float]]:
    """Score predictions on a test table.

    Returns:
        For each target: spearman; mse, in squared units of the loss; top1_regret, the test loss of
        the mixture predicted best less the least test loss.

    Raises:
        FitError: The test table has other domains or targets.
    """
    test_table = test_table.aligned_to(fitted.table)
    predicted_RT = fitted.predict(test_table.weights_RK)
    scores = {}
    for t, target in enumerate(test_table.targets):
        seen_R = np.isfinite(test_table.losses_RM[:, t])
        predicted_R, loss_R = predicted_RT[seen_R, t], test_table.losses_RM[seen_R, t]
        scores[target] = {
            "spearman": spearman(predicted_R, loss_R),
            "mse": float(np.mean((predicted_R - loss_R) ** 2)),
            "top1_regret": float(loss_R[np.argmin(predicted_R)] - loss_R.min()),
        }
    return scores


def evaluate_fit(
    table: Table,
    test_table: Table | None = None,
    regressor: str | Regressor = "auto",
    seed: int = 0,
    progress: Progress | None = None,
) -> dict:
    """Fit a table and report; the object that `rayx fit --json` prints.

    Args:
        table: Runs to fit.
        test_table: Runs that no fit sees, with the same domains and targets.
        regressor: As for `fit_table`.
        seed: As for `fit_table`.
        progress: As for `fit_table`.

    Returns:
        {"rows": {"train", "test"}, "targets": {name: {"regressor", "cv": {"spearman", "r2"},
        "test": {"spearman", "mse", "top1_regret"}}}, "mean": {"test_spearman", "test_mse"},
        "seconds"}. Without a test table no "test", and "mean" is {"cv_spearman", "cv_r2"}.

    Raises:
        FitError: As `fit_table`; or the test table has other domains or targets.
    """
    started = time.perf_counter()
    if test_table is not None:
        test_table = test_table.aligned_to(table)  # before the time of the fit is spent
    fitted = fit_table(table, regressor, seed, progress)
    chosen = fitted.cv[fitted.cv["chosen"]].set_index("target")
    targets: dict[str, dict] = {
        target: {
            "regressor": fitted.regressors[target],
            "cv": {key: float(chosen.loc[target, key]) for key in ("spearman", "r2")},
        }
        for target in table.targets
    }
    if test_table is None:
        mean = {
            f"cv_{key}": float(np.mean([entry["cv"][key] for entry in targets.values()]))
            for key in ("spearman", "r2")
        }
    else:
        for target, scores in score(fitted, test_table).items():
            targets[target]["test"] = scores
        mean = {
            f"test_{key}": float(np.mean([entry["test"][key] for entry in targets.values()]))
            for key in ("spearman", "mse")
        }
    return {
        "rows": {"train": len(table), "test": 0 if test_table is None else len(test_table)},
        "targets": targets,
        "mean": mean,
        "seconds": time.perf_counter() - started,
    }

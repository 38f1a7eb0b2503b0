"""Stage 5, regression: cross-validating candidates without wasting time on those far behind.

Every candidate is fitted without each of the first folds; those whose error there is not near the
best one's are given up. In a sparse table that saves most of the time of gradient boosting.

Shapes: R runs, K domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from rayx.errors import FitError
from rayx.fit.regressor import (
    CrossFit,
    Predictor,
    Regressor,
    checked_loss,
    cross_fit,
    fit_folds,
    held_out,
    make_folds,
    point_fit,
)
from rayx.fit.table import Table

# With few rows a fold's model must miss few of them, and fits are quick.
FEW_ROWS, FOLDS_OF_FEW, FOLDS_OF_MANY = 150, 10, 5
# A candidate whose squared error on the first folds is more than RACE_RATIO times the best one's
# would get next to no share; one that leads by SPECIALIST_RATIO for some target stays.
RACE_FOLDS, RACE_RATIO, SPECIALIST_RATIO = 2, 2.5, 1.5


def rows_of(table: Table, target: str) -> tuple[np.ndarray, np.ndarray]:
    """Weights and losses of the rows that have the target."""
    loss_R = table.losses_RM[:, table.targets.index(target)]
    seen_R = np.isfinite(loss_R)
    return table.weights_RK[seen_R], loss_R[seen_R]


@dataclass
class Job:
    """One candidate on the rows of one target, fitted in two goes."""

    candidate: Regressor
    weights_RK: np.ndarray
    loss_R: np.ndarray
    fold_R: np.ndarray
    first: list[Predictor] = field(default_factory=list)

    @classmethod
    def of(cls, table: Table, target: str, candidate: Regressor, seed: int) -> Job:
        weights_RK, loss_R = rows_of(table, target)
        num_folds = FOLDS_OF_FEW if len(loss_R) <= FEW_ROWS else FOLDS_OF_MANY
        return cls(candidate, weights_RK, loss_R, make_folds(weights_RK, num_folds, seed))

    def check(self, target: str) -> None:
        try:
            checked_loss(self.loss_R, len(self.loss_R), self.candidate)
        except FitError as error:
            raise FitError(f"Target {target!r}: {error}") from None

    def start(self) -> None:
        """Fit without each of the first folds."""
        folds = range(min(RACE_FOLDS, int(self.fold_R.max()) + 1))
        self.first = fit_folds(
            point_fit(self.candidate), self.weights_RK, self.loss_R, self.fold_R, folds
        )

    def finish(self) -> CrossFit:
        """Fit without each of the other folds, and on all rows."""
        fit_point = point_fit(self.candidate)
        return cross_fit(fit_point, self.weights_RK, self.loss_R, self.fold_R, self.first)

    def first_error(self) -> float:
        """Mean squared error on the rows of the first folds."""
        return float(
            np.nanmean((held_out(self.first, self.weights_RK, self.fold_R) - self.loss_R) ** 2)
        )


def survivors(jobs: Mapping[tuple[str, str], Job]) -> set[str]:
    """Candidates worth the other folds: near the best over targets, or far ahead for one."""
    log_ratios: dict[str, list[float]] = {}
    specialists = set()
    for target in dict.fromkeys(target for target, _ in jobs):
        errors = {name: job.first_error() for (of, name), job in jobs.items() if of == target}
        least, second = (max(error, 1e-300) for error in sorted([*errors.values(), math.inf])[:2])
        for name, error in errors.items():
            log_ratios.setdefault(name, []).append(math.log(max(error, least) / least))
            if error <= least and second > SPECIALIST_RATIO * least:
                specialists.add(name)
    near = {name for name, of in log_ratios.items() if np.mean(of) < math.log(RACE_RATIO)}
    return near | specialists | {"mean"}

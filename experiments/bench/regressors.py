"""How many runs does a regressor need, and are its intervals right?

    python experiments/bench/regressors.py FOLDER --rows 64,128,512 --regressors auto,lightgbm

FOLDER holds RegMix's released train_mixture_1m.csv, train_pile_loss_1m.csv and the two test files.
For each number of training rows, drawn at random, it prints the mean test Spearman over targets,
the share of test losses inside the nominal 90% interval, and the time of a fit. No test row is used
in fitting, nor in choosing what the fits are made of. `load` and `curve` are for other benchmarks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rayx.fit import Table, fit_table, score


def drawn(table: Table, rows: int, seed: int) -> Table:
    """Return `rows` random rows of a table, all of them in order where it has no more."""
    if rows >= len(table):
        return table
    at = np.random.default_rng(seed).choice(len(table), rows, replace=False)
    return dataclasses.replace(
        table,
        run_ids=tuple(table.run_ids[i] for i in at),
        weights_RK=table.weights_RK[at],
        losses_RM=table.losses_RM[at],
    )


@dataclass(frozen=True)
class Point:
    """One point of the curve; a value per draw.

    Attributes:
        rows: Training rows.
        regressor: As for `fit_table`.
        spearman: Test Spearman, mean over targets.
        coverage: Share of test losses inside the nominal 90% interval, over all targets.
        seconds: Wall-clock time of the fit of all targets.
    """

    rows: int
    regressor: str
    spearman: list[float]
    coverage: list[float]
    seconds: list[float]

    def __str__(self) -> str:
        many = len(self.spearman) > 1
        sd = f" sd {np.std(self.spearman, ddof=1):.4f}" if many else ""
        return (
            f"{self.rows:4} rows  {self.regressor:14} "
            f"Spearman {np.mean(self.spearman):.4f}{sd} "
            f"(least {min(self.spearman):.4f}, {len(self.spearman)} draws)  "
            f"90% interval covers {np.mean(self.coverage):.3f} "
            f"({min(self.coverage):.3f} to {max(self.coverage):.3f})  "
            f"{np.mean(self.seconds):.0f} s a fit"
        )


def load(folder: Path) -> tuple[Table, Table]:
    """RegMix's training and test tables."""
    train, test = (
        Table.from_csv(folder / f"{part}_mixture_1m.csv", folder / f"{part}_pile_loss_1m.csv")
        for part in ("train", "test")
    )
    return train, test.aligned_to(train)


def measure(
    train: Table, test: Table, rows: int, regressor: str, draws: int, level: float = 0.9
) -> Point:
    """Fit draws of `rows` training rows and score each on all test rows."""
    point = Point(rows, regressor, [], [], [])
    for seed in range(draws if rows < len(train) else 1):
        started = time.perf_counter()
        fitted = fit_table(drawn(train, rows, seed), regressor, seed=seed)
        point.seconds.append(time.perf_counter() - started)
        scores = score(fitted, test).values()
        point.spearman.append(float(np.mean([entry["spearman"] for entry in scores])))
        low_RT, high_RT = fitted.interval(test.weights_RK, level)
        inside = (low_RT <= test.losses_RM) & (test.losses_RM <= high_RT)
        point.coverage.append(float(inside.mean()))
    return point


def curve(
    train: Table,
    test: Table,
    rows: Sequence[int],
    regressors: Sequence[str] = ("auto",),
    draws: int = 10,
    seen: Callable[[Point], None] = lambda point: None,
) -> list[Point]:
    """Measure every regressor at every number of rows; `seen` is called after each."""
    points = []
    for num_rows in rows:
        for regressor in regressors:
            points.append(measure(train, test, num_rows, regressor, draws))
            seen(points[-1])
    return points


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How many runs does a regressor need?")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default="32,64,128,256,512")
    parser.add_argument("--draws", type=int, default=10)
    parser.add_argument("--regressors", default="auto")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    points = curve(
        *load(arguments.folder),
        [int(rows) for rows in arguments.rows.split(",")],
        arguments.regressors.split(","),
        arguments.draws,
        (lambda point: None) if arguments.json else (lambda point: print(point, flush=True)),
    )
    if arguments.json:
        print(json.dumps([dataclasses.asdict(point) for point in points]))


if __name__ == "__main__":
    main()

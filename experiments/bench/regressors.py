"""How many runs does a regressor need, and are its intervals right?

    python experiments/bench/regressors.py FOLDER --rows 128,512 --regressors auto,lightgbm

FOLDER holds RegMix's released train_mixture_1m.csv, train_pile_loss_1m.csv and the two test files.
For each number of training rows, drawn at random, it prints the mean test Spearman over targets and
the share of test losses inside the nominal 90% interval. No test row is used in fitting.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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


def measure(train: Table, test: Table, rows: int, regressor: str, seed: int) -> dict[str, float]:
    """Fit one draw; return its mean test Spearman and the coverage of its 90% intervals."""
    fitted = fit_table(drawn(train, rows, seed), regressor, seed=seed)
    spearman = np.mean([entry["spearman"] for entry in score(fitted, test).values()])
    low_RT, high_RT = fitted.interval(test.weights_RK, level=0.9)
    inside = (low_RT <= test.losses_RM) & (test.losses_RM <= high_RT)
    return {"spearman": float(spearman), "coverage": float(inside.mean())}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="How many runs does a regressor need?")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", default="128,512")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--regressors", default="auto,lightgbm")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    train, test = (
        Table.from_csv(
            arguments.folder / f"{part}_mixture_1m.csv",
            arguments.folder / f"{part}_pile_loss_1m.csv",
        )
        for part in ("train", "test")
    )
    results = []
    for rows in map(int, arguments.rows.split(",")):
        for regressor in arguments.regressors.split(","):
            draws = arguments.draws if rows < len(train) else 1
            found = [measure(train, test, rows, regressor, seed) for seed in range(draws)]
            spearman, coverage = ([f[key] for f in found] for key in ("spearman", "coverage"))
            results.append(
                {"rows": rows, "regressor": regressor, "spearman": spearman, "coverage": coverage}
            )
            if not arguments.json:
                listed = " ".join(f"{value:.4f}" for value in spearman)
                print(
                    f"{rows:4} rows  {regressor:14} Spearman {np.mean(spearman):.4f} ({listed})  "
                    f"90% interval covers {np.mean(coverage):.3f}",
                    flush=True,
                )
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()

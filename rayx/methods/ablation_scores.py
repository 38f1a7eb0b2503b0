"""How well approximations of data ablations follow what was trained.

Correlations over subsets, target by target, with the target's domain inside and outside the subset;
over all targets; among subsets of equal size alone, for size explains much; and the regret of the
subset that an approximation likes best.

Source: Na et al. 2024, arXiv:2410.15661 (correlation of perplexities over subsets).
Differs: all but the correlations by target.

Shapes: R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from rayx.fit.scores import spearman
from rayx.methods.ablation import APPROXIMATIONS

SCORES = ["pearson", "spearman", "pearson_same_size"]
POOLED, AVERAGE = "pooled", "average"  # in place of a target
MIN_SUBSETS = 4  # fewer have no correlation worth the name


def correlations(
    table: pd.DataFrame, approximations: Sequence[str] = APPROXIMATIONS
) -> pd.DataFrame:
    """Return how well each approximation follows the trained perplexity over subsets.

    Args:
        table: As `Ablation.table` returns it; of several seeds, one below the other.
        approximations: Its columns that are compared with `trained`.

    Returns:
        A row for each seed, truth, side (`inside`, `outside`, or `any`), target and approximation:
        subsets (how many), pearson, spearman, and pearson_same_size, that of the differences from
        the mean over subsets of equal size. Two targets are made of all: "pooled" takes their log
        perplexities together, each less its target's mean, for how hard a text is needs no telling;
        "average" takes the mean over targets of log perplexity. Fewer than 4 subsets give no row.
    """
    names, rows = ["trained", *approximations], []

    def add(key: tuple, part: pd.DataFrame, value: pd.DataFrame, of_size: list[str]) -> None:
        same = value - value.groupby([part[name] for name in of_size]).transform("mean")
        for name in approximations:
            both = value[name].to_numpy(), value["trained"].to_numpy()
            scores = pearson(*both), spearman(*both), pearson(same[name], same["trained"])
            rows.append((*key, name, len(part), *scores))

    sides = pd.concat([table, table.assign(side="any")], ignore_index=True)
    for key, side in _parts(sides, ["seed", "truth", "side"]):
        for target, part in _parts(side, ["target"]):
            if len(part) >= MIN_SUBSETS:
                add((*key, *target), part, part.loc[:, names], ["size"])
        logs = np.log(side.loc[:, names])
        add((*key, POOLED), side, logs - logs.groupby(side["target"]).transform("mean"),
            ["size", "target"])  # fmt: skip
        if key[-1] == "any":
            logs = logs.assign(subset=side["subset"], size=side["size"])
            average = cast(pd.DataFrame, logs.groupby("subset").mean())
            add((*key, AVERAGE), average, average.loc[:, names], ["size"])
    keys = ["seed", "truth", "side", "target", "approximation", "subsets"]
    return pd.DataFrame(rows, columns=[*keys, *SCORES])


def regrets(table: pd.DataFrame, approximations: Sequence[str] = APPROXIMATIONS) -> pd.DataFrame:
    """Return what it costs to take the subset that an approximation likes best.

    regret = log perplexity trained on that subset less the lowest of all, in nats per token.

    Args:
        table: As for `correlations`.
        approximations: Its columns; `random` is added, the mean over all subsets.

    Returns:
        A row for each truth and side, a column each: means over seeds and targets.
    """
    rows = []
    for key, part in _parts(table, ["truth", "side", "seed", "target"]):
        trained_R = np.log(part["trained"].to_numpy())
        picks = [trained_R[part[name].to_numpy().argmin()] for name in approximations]
        rows.append((*key[:2], *(np.array([*picks, trained_R.mean()]) - trained_R.min())))
    names = [*approximations, "random"]
    frame = pd.DataFrame(rows, columns=["truth", "side", *names])
    return cast(pd.DataFrame, frame.groupby(["truth", "side"], as_index=False).mean())


def _parts(table: pd.DataFrame, by: list[str]) -> list[tuple[tuple, pd.DataFrame]]:
    return [(cast(tuple, key), part) for key, part in table.groupby(by)]


def pearson(a_R: ArrayLike, b_R: ArrayLike) -> float:
    """Return Pearson's correlation; 0 if either side is constant to rounding."""
    a_R, b_R = np.asarray(a_R, float), np.asarray(b_R, float)
    if min(np.ptp(a_R), np.ptp(b_R)) < 1e-12:
        return 0.0
    return float(np.corrcoef(a_R, b_R)[0, 1])

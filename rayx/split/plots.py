"""Figures of splits: loss over the trunk's share, and how the best split moves with scale.

In the manner of `plots.py`: `(data, axes) -> None`, data in pandas, titles that say the finding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from rayx.errors import SpecError
from rayx.fit.laws import Law
from rayx.plots import ACCENT, GRID, INK, MUTED, PALETTE, dress, short_count
from rayx.split import SplitChoice, split_share_curve


def loss_over_share(
    curve: pd.DataFrame, measured: pd.DataFrame, axes: Axes, title: str, chosen: float | None = None
) -> None:
    """Draw predicted loss over the trunk's share of the budget, and what was measured.

    Args:
        curve: `share`, `loss`, `low`, `high`.
        measured: `share`, `loss`, one row a seed; may be empty.
        axes: Where to draw.
        title: The finding.
        chosen: Share of the chosen split.
    """
    axes.fill_between(curve["share"], curve["low"], curve["high"], color=ACCENT, alpha=0.15, lw=0)
    axes.plot(curve["share"], curve["loss"], color=ACCENT, lw=1.8, label="law")
    if chosen is not None:
        axes.axvline(chosen, color=GRID, lw=1.4, zorder=0)
    if len(measured):
        axes.plot(
            measured["share"], measured["loss"], "o", color=PALETTE[1], ms=4.5, mew=0, alpha=0.75,
            label="measured, one a seed",
        )  # fmt: skip
        axes.legend(frameon=False, fontsize=9)
    dress(axes, title, "share of the budget before the split (1: no split)", "bits per byte")


def fraction_over_budget(data: pd.DataFrame, axes: Axes, title: str) -> None:
    """Draw the optimal share of the trunk over the budget, a line a model size, with intervals.

    Args:
        data: `params`, `budget_tokens`, `fraction`, `fraction_low`, `fraction_high`.
        axes: Where to draw.
        title: The finding.
    """
    for place, (params, rows) in enumerate(data.groupby("params")):
        color = PALETTE[place % len(PALETTE)]
        budget = rows["budget_tokens"]
        axes.fill_between(
            budget, rows["fraction_low"], rows["fraction_high"], color=color, alpha=0.13, lw=0
        )
        name = f"{short_count(float(str(params)))} params"
        axes.plot(budget, rows["fraction"], color=color, lw=1.8, label=name)
    axes.set_xscale("log")
    axes.set_ylim(0.0, 1.02)
    axes.legend(frameon=False, fontsize=9)
    dress(axes, title, "tokens of trunk and branches together", "optimal share of the trunk")


def split_from_over_size(data: pd.DataFrame, axes: Axes, title: str) -> None:
    """Draw the tokens from which splitting pays over the model size, with intervals.

    Args:
        data: One row a size: `params`, `split_from_tokens`, `split_from_low`, `split_from_high`.
        axes: Where to draw.
        title: The finding.
    """
    rows = data[np.isfinite(data["split_from_tokens"])]
    value = rows["split_from_tokens"]
    top = np.where(np.isfinite(rows["split_from_high"]), rows["split_from_high"], 1e2 * value)
    axes.errorbar(
        rows["params"], value, yerr=[value - rows["split_from_low"], top - value], fmt="o",
        color=ACCENT, ecolor=MUTED, ms=5, lw=1.2,
    )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: short_count(value))
        axis.set_minor_formatter(lambda value, _: short_count(value))
        axis.set_minor_locator(LogLocator(subs=(2.0, 4.0)))
    dress(axes, title, "parameters", "trunk tokens from which splitting pays")


def split_figure(
    law: Law, choice: SplitChoice, curves: pd.DataFrame, verification: Mapping[str, Any] | None
) -> Figure:
    """Draw the three figures of a choice beside each other.

    Args:
        law: Fitted, with a bootstrap.
        choice: Where to split.
        curves: As `rayx.split.split_curves` returns them.
        verification: As OptimalSplit.verify returns it, or None.
    """
    figure = Figure(figsize=(13.5, 4.4), layout="constrained")
    first, second, third = figure.subplots(1, 3)
    measured = pd.DataFrame(
        [
            {"share": arm["trunk_tokens"] / choice.budget_tokens, "loss": loss}
            for arm in (verification["arms"].values() if verification else ())
            for loss in arm["loss_bpb"]
        ],
        columns=["share", "loss"],
    )
    saved = choice.no_split - choice.predicted
    loss_over_share(
        split_share_curve(law, choice),
        measured,
        first,
        f"{short_count(choice.params)} params, {short_count(choice.budget_tokens)} tokens: "
        f"split at {choice.fraction:.0%}, predicted {saved:.3f} below no split",
        choice.fraction,
    )
    fraction_over_budget(curves, second, "The optimal share of the trunk over the budget")
    sizes = curves.drop_duplicates("params")
    first_pays, last_pays = sizes["split_from_tokens"].iloc[[0, -1]]
    later = "Larger models should split later" if last_pays > first_pays else "When splitting pays"
    split_from_over_size(sizes, third, later)
    for axes in (first, second, third):
        axes.title.set_color(INK)
    return figure


def write_split_figure(path: str, *arguments: Any) -> None:
    """Write `split_figure(*arguments)` to a file.

    Raises:
        SpecError: The file cannot be written.
    """
    try:
        split_figure(*arguments).savefig(path, dpi=144)
    except (OSError, ValueError) as error:
        raise SpecError(f"Cannot write {path!r}: {error}. Give another --plot.") from error

"""Figures of laws: predicted against measured, and the loss beyond the runs with its band.

In the manner of `plots.py`: `(data, axes) -> None`, data in pandas, titles that say the finding.
`law_figure` makes the data of both from a fitted law.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter

from rayx.errors import SpecError
from rayx.fit.laws import Extrapolation, Law
from rayx.plots import ACCENT, GRID, MUTED, PALETTE, dress

CURVES = 5  # model sizes that get a curve
BEYOND = 10.0  # how many times the largest run the curves go on
INTERVAL = 0.95
AXES = {
    "tokens": "training tokens",
    "params": "parameters",
    "compute": "training compute 6 N D (FLOPs)",
}


def predicted_measured(data: pd.DataFrame, axes: Axes, title: str) -> None:
    """Draw the law's losses against what was measured.

    Args:
        data: One row a run: `measured`, `predicted`, in the unit of the losses fitted.
        axes: Where to draw.
        title: The finding.
    """
    both = data[["measured", "predicted"]].to_numpy()
    pad = 0.04 * float(np.ptp(both)) or 0.05
    span = [float(both.min()) - pad, float(both.max()) + pad]
    axes.plot(span, span, color=MUTED, lw=1.0, ls=(0, (4, 3)), zorder=1)
    axes.plot(data["measured"], data["predicted"], "o", color=ACCENT, ms=3.6, mew=0, alpha=0.65)
    axes.set(xlim=span, ylim=span)
    dress(axes, title, f"measured loss, n = {len(data)}", "loss of the law")


def loss_over_scale(
    points: pd.DataFrame, curves: pd.DataFrame, axes: Axes, xlabel: str, title: str
) -> None:
    """Draw measured losses and the law's curves, with bands where the law has intervals.

    Args:
        points: Runs: `size`, `loss`.
        curves: `curve` (its name), `size`, `loss`, and optionally `low`, `high`.
        axes: Where to draw; both axes logarithmic where all values are positive.
        xlabel: What size is.
        title: The finding.
    """
    axes.plot(points["size"], points["loss"], "o", color=MUTED, ms=2.8, mew=0, alpha=0.5, zorder=1)
    last = float(points["size"].max())
    for place, (name, curve) in enumerate(curves.groupby("curve", sort=False)):
        color = PALETTE[place % len(PALETTE)]
        if "low" in curve:
            axes.fill_between(
                curve["size"], curve["low"], curve["high"], color=color, alpha=0.18, lw=0
            )
        inside = curve["size"] <= last
        axes.plot(curve["size"][inside], curve["loss"][inside], color=color, lw=1.8, label=name)
        axes.plot(curve["size"], curve["loss"], color=color, lw=1.2, ls=(0, (3, 2)))
    axes.set_xscale("log")
    if (points["loss"] > 0).all() and (curves["loss"] > 0).all():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.axvline(last, color=GRID, lw=1.2, zorder=0)
    dress(axes, title, xlabel, "loss")
    if curves["curve"].nunique() > 1:
        axes.legend(frameon=False, fontsize=9)


def scale_curves(law: Law, columns: dict[str, np.ndarray]) -> tuple[str, pd.DataFrame] | None:
    """Return what the size is, and the law's curves over it; None for a law at one scale.

    A curve a model size over tokens to ten times the most seen; other inputs at their median.
    """
    along = "tokens" if "tokens" in columns else "params" if "params" in columns else None
    if along is None:
        return None
    both = along == "tokens" and "params" in columns
    sizes = np.unique(columns["params"]) if both else np.array([np.nan])
    picked = sizes[np.unique(np.linspace(0, len(sizes) - 1, CURVES).astype(int))]
    grid_M = np.geomspace(columns[along].min(), BEYOND * columns[along].max(), 60)
    frames = []
    for params in picked:
        inputs = []
        for name in law.inputs:
            if name == along:
                inputs.append(grid_M)
            elif name == "params":
                inputs.append(np.full(len(grid_M), params))
            else:
                middle = np.median(columns[name], axis=0)
                middle = middle / middle.sum() if name == "weights" else middle
                inputs.append(np.broadcast_to(middle, (len(grid_M), *np.shape(middle))))
        frame = pd.DataFrame({"size": 6.0 * params * grid_M if both else grid_M})
        frame["curve"] = f"{params:.3g} params" if both else law.name
        frame["loss"] = law.predict(*inputs)
        if law.bootstrap:
            _, frame["low"], frame["high"] = law.predict(*inputs, interval=INTERVAL)
        frames.append(frame)
    return "compute" if both else along, pd.concat(frames, ignore_index=True)


def law_figure(
    law: Law, arrays: Sequence[np.ndarray], found: Extrapolation | None = None
) -> Figure:
    """Draw both figures of a fitted law beside each other.

    Args:
        law: Fitted.
        arrays: The law's inputs in order, then the loss.
        found: Its extrapolation check, told in the title.
    """
    *inputs, loss_R = (np.asarray(array, dtype=float) for array in arrays)
    columns = dict(zip(law.inputs, inputs, strict=True))
    curves = scale_curves(law, columns)
    figure = Figure(figsize=(9.6 if curves else 4.8, 4.2), layout="constrained")
    first, *rest = np.atleast_1d(figure.subplots(1, 2 if curves else 1))
    data = pd.DataFrame({"measured": loss_R, "predicted": law.predict(*inputs)})
    error = float(np.median(np.abs(law.residual_R_)))
    predicted_measured(data, first, f"{law.name}: median error {error:.2%} in {law.rows_} runs")
    if curves:
        kind, frame = curves
        size_R = columns["tokens" if kind == "compute" else kind]
        size_R = 6.0 * columns["params"] * size_R if kind == "compute" else size_R
        points = pd.DataFrame({"size": size_R, "loss": loss_R})
        title = "Beyond the runs (dashed)"
        if found:
            title = f"Without the {found.rows} largest runs: off by {found.error:.2%}"
        loss_over_scale(points, frame, rest[0], AXES[kind], title)
    return figure


def write_law_figure(
    law: Law, arrays: Sequence[np.ndarray], path: str, found: Extrapolation | None = None
) -> None:
    """Write `law_figure` to a file.

    Raises:
        SpecError: The file cannot be written.
    """
    try:
        law_figure(law, arrays, found).savefig(path, dpi=144)
    except (OSError, ValueError) as error:
        raise SpecError(f"Cannot write {path!r}: {error}. Give another --plot.") from error

"""Figures of LLD: paths of training in the space of log-likelihoods, and the distance left."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rayx.plots import INK, MUTED, PALETTE, dress, label, short_count
from rayx.report.studies import png

BASE, TARGET = "base", "target"


def trajectory_figure(places: pd.DataFrame, distances: pd.DataFrame) -> bytes:
    """Draw, for each base, the paths from it to a target, and the distance over tokens; a PNG.

    Args:
        places: A row a state: `base` (the panel), `arm` (BASE and TARGET mark the two ends),
            `tokens`, `x`, `y`, and `share`, of the variance that the panel's plane shows.
        distances: `base`, `arm`, `seed`, `tokens`, `kl` (bits per byte), every seed a row.
    """
    bases = list(dict.fromkeys(places["base"]))
    arms = [a for a in dict.fromkeys(places["arm"]) if a not in (BASE, TARGET)]
    colors = {arm: PALETTE[i % len(PALETTE)] for i, arm in enumerate(arms)}
    figure = Figure(figsize=(9.6, 4.1 * len(bases)), layout="constrained")
    for row, base in zip(figure.subplots(len(bases), 2, squeeze=False), bases, strict=True):
        _plane(pd.DataFrame(places[places["base"] == base]), row[0], str(base), colors)
        _distances(pd.DataFrame(distances[distances["base"] == base]), row[1], str(base), colors)
    return png(figure)


def _plane(data: pd.DataFrame, axes: Axes, base: str, colors: dict[str, str]) -> None:
    start, end = (data[data["arm"] == name].iloc[0] for name in (BASE, TARGET))
    for arm, color in colors.items():
        path = pd.DataFrame(data[data["arm"] == arm]).sort_values("tokens")
        x, y = [start["x"], *path["x"]], [start["y"], *path["y"]]
        axes.plot(x, y, "-o", color=color, lw=1.6, ms=3.5, label=label(arm))
    axes.plot(start["x"], start["y"], "s", color=INK, ms=7, mfc="none")
    axes.plot(end["x"], end["y"], "*", color=INK, ms=13)
    axes.annotate("target", (end["x"], end["y"]), (6, 4), textcoords="offset points", color=INK)
    axes.annotate("base", (start["x"], start["y"]), (6, 4), textcoords="offset points", color=INK)
    shown = 100 * float(data["share"].iloc[0])
    dress(axes, f"{base.capitalize()} base: paths to the target, {shown:.0f}% of the variance",
          "first component (nats a text)", "second component (nats a text)")  # fmt: skip
    axes.legend(frameon=False, fontsize=9)


def _distances(data: pd.DataFrame, axes: Axes, base: str, colors: dict[str, str]) -> None:
    last = data[data["tokens"] == data["tokens"].max()].groupby("arm")["kl"].mean()
    for arm, color in colors.items():
        own = data[data["arm"] == arm]
        axes.plot(own["tokens"], own["kl"], "o", color=color, ms=3, mew=0, alpha=0.5)
        mean = own.groupby("tokens")["kl"].mean()
        axes.plot(mean.index.to_numpy(), mean.to_numpy(), color=color, lw=1.8)
    others = last[[arm for arm in colors if arm in last.index]]
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    axes.axhline(float(others.min()), color=MUTED, lw=0.8, ls=(0, (4, 3)))
    dress(axes, f"Nearest the target at the end: {others.idxmin()}", "training tokens",
          "divergence from the target (bits per byte)")  # fmt: skip

"""Figures of studies that end in no choice: PNG bytes from tables of results."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from rayx.plots import INK, MUTED, PALETTE, dress


def png(figure: Figure) -> bytes:
    """Return a figure as PNG."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=144)
        return file.getvalue()


def phonebook_figure(data: pd.DataFrame, name_bits: float) -> bytes:
    """Draw the bits of a fact over the share of tokens before the split, a curve an overlap.

    Args:
        data: One row a seed: `overlap`, `split` (shares), `bits`.
        name_bits: Bits of the name alone; what a perfect memory leaves.
    """
    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = figure.subplots()
    best = []
    means = data.pivot_table(index="split", columns="overlap", values="bits")
    percent = 100 * means.index.to_numpy(dtype=float)
    for place, (color, overlap) in enumerate(zip(PALETTE, means.columns, strict=False)):
        part, mean = data[data["overlap"] == overlap], means.iloc[:, place].to_numpy()
        lowest = int(np.argmin(mean))
        best.append((percent[lowest], 100 * overlap))
        axes.plot(100 * part["split"], part["bits"], "o", color=color, ms=3.5, mew=0, alpha=0.6)
        axes.plot(percent, mean, color=color, lw=1.8, label=f"{100 * overlap:.0f}%")
        axes.plot(percent[lowest], mean[lowest], "D", color=color, ms=7, mfc="none")
    axes.axhline(name_bits, color=MUTED, lw=1.0, ls=(0, (4, 3)))
    axes.annotate("every number known", (0, name_bits), (2, 3), textcoords="offset points",
                  color=MUTED, fontsize=9)  # fmt: skip
    axes.set_ylim(bottom=name_bits - 0.6)
    finding = ", ".join(f"{split:.0f}% at overlap {overlap:.0f}%" for split, overlap in best)
    dress(axes, f"Best split: {finding}", "tokens before the split (% of the budget)",
          "bits a fact (lower is better)")  # fmt: skip
    axes.legend(title="overlap", frameon=False)
    return png(figure)


def cpt_figure(
    predicted: pd.DataFrame,
    measured: pd.DataFrame,
    limit: float,
    seeds: Sequence[Mapping[str, Any]],
) -> bytes:
    """Draw both losses of the larger model over the domain's ratio: laws and measurements.

    Args:
        predicted: `ratio`, `domain_loss`, `general_loss` of the laws, ratios increasing.
        measured: The same of the runs.
        limit: Highest general loss that is allowed.
        seeds: As `rayx.methods.cpt_verify.verify` returns them.
    """
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    usage = [seed["within"] for seed in seeds]
    choice = usage[0]["predicted_ratio"]
    best = [u["measured_ratio"] for u in usage]
    for axes, name in zip(figure.subplots(1, 2), ("domain_loss", "general_loss"), strict=True):
        axes.plot(100 * predicted["ratio"], predicted[name], color=PALETTE[0], lw=1.8,
                  label="law, from smaller models")  # fmt: skip
        axes.plot(100 * measured["ratio"], measured[name], "o", color=PALETTE[0], ms=4, mew=0,
                  alpha=0.7, label="measured")  # fmt: skip
        axes.axvline(100 * choice, color=INK, lw=1.2, label="predicted ratio")
        for ratio, name_of in zip(best, ["best ratio, by seed"] + [None] * len(best), strict=False):
            axes.axvline(100 * ratio, color=MUTED, lw=0.9, ls=(0, (2, 2)), label=name_of)
        what = "Domain" if name == "domain_loss" else "General"
        law = np.interp(measured["ratio"], predicted["ratio"], predicted[name])
        error = np.abs(law / measured[name] - 1).mean()
        title = f"{what} loss: the law is off by {100 * error:.1f}%"
        dress(axes, title, "share of the domain (%)", "loss (bits per byte)")
        if name == "general_loss":
            axes.axhline(limit, color=PALETTE[1], lw=1.0, ls=(0, (4, 3)), label="limit")
        axes.legend(frameon=False, fontsize=9)
    found = f"{100 * min(best):.0f}-{100 * max(best):.0f}%"
    figure.suptitle(f"Best share within the limit: predicted {100 * choice:.0f}%, measured {found}",
                    x=0.01, ha="left", color=INK)  # fmt: skip
    return png(figure)

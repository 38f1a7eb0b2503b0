"""Figures: one function per figure, `(data, axes) -> None`.

The data is a pandas table (write it beside the figure as CSV), the axes are matplotlib's. Nothing
here reads a file, fits a model or touches pyplot's state; the caller makes the figure and saves it.
Titles say the finding; raw points and intervals are always drawn. Ink, muted ink and grid are three
fixed colours, so that a page can replace them by its own in light and dark.

Domains keep one colour each, fixed by the order in which the corpus names them.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from matplotlib.transforms import offset_copy
from scipy.stats import spearmanr, t

INK, MUTED, GRID = "#1b1c1e", "#6b7078", "#dcdfe4"
# Okabe and Ito 2008, without black (ink) and with yellow darkened to show on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b8a200")
MORE, LESS = "#d55e00", "#0072b2"  # a loss that rises, one that falls
ACCENT = PALETTE[0]
STYLE = {
    "font.size": 11.0,
    "axes.titlesize": 12.0,
    "axes.labelsize": 10.5,
    "xtick.labelsize": 10.0,
    "ytick.labelsize": 10.0,
    "legend.fontsize": 10.0,
    "axes.linewidth": 0.8,
}
Z95 = 1.96  # normal 95% interval in standard deviations


def label(name: str, width: int = 22) -> str:
    """Return a name that matplotlib draws as it is: no mathtext, no control signs, not too long."""
    name = "".join(c if c.isprintable() else "?" for c in str(name))
    name = name if len(name) <= width else name[: width - 1] + "\u2026"
    return name.replace("$", r"\$")


def arm_name(arm: str) -> str:
    """Return the name of an arm or baseline in words."""
    return {"best_random": "best seen", "best_seen": "best seen"}.get(arm, arm)


def arm_color(arm: str) -> str:
    """Return the colour of an arm of the verification, the same in every figure."""
    return {"choice": PALETTE[1], "uniform": PALETTE[0], "proportional": PALETTE[2]}.get(
        arm, PALETTE[3]
    )


def domain_colors(domains: Sequence[str]) -> dict[str, str]:
    """Return domain -> colour by the order given; colours repeat after seven."""
    return {d: PALETTE[i % len(PALETTE)] for i, d in enumerate(domains)}


def dress(axes: Axes, title: str, xlabel: str, ylabel: str) -> None:
    """Give axes their title (the finding, wrapped), labels with units, and the quiet look."""
    place = axes.get_subplotspec()
    columns = place.get_gridspec().ncols if place is not None else 1
    width = axes.get_figure().get_figwidth() / columns  # type: ignore[union-attr]
    chars = max(24, int(width * 72 / 7.2))
    plain = re.sub(r"(?<!\\)\$", r"\$", title)  # a dollar in a name is no formula
    wrapped = "\n".join(textwrap.wrap(plain, chars))
    axes.set_title(wrapped, loc="left", color=INK, fontsize=STYLE["axes.titlesize"])
    axes.set_xlabel(xlabel, color=MUTED, fontsize=STYLE["axes.labelsize"])
    axes.set_ylabel(ylabel, color=MUTED, fontsize=STYLE["axes.labelsize"])
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=STYLE["xtick.labelsize"], length=3)
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(MUTED)


def legend(axes: Axes, handles: Sequence, names: Sequence[str], **where) -> None:
    """Draw a legend without a frame."""
    # A leading underscore would hide the entry.
    names = [" " + n if n.startswith("_") else n for n in names]
    axes.legend(
        handles, names, frameon=False, labelcolor=INK, fontsize=STYLE["legend.fontsize"], **where
    )


def mixture_bars(data: pd.DataFrame, axes: Axes, title: str = "Mixture chosen") -> None:
    """Draw the chosen share of each domain as a bar, other mixtures as marks, caps as ticks.

    Args:
        data: One row a domain (index: name, corpus order); column `choice`, any of `uniform`,
            `proportional`, `best_seen`, and `cap`; shares in [0, 1], NaN where unknown.
        axes: Where to draw.
        title: The finding.
    """
    domains = list(data.index)
    rows = np.arange(len(domains))
    shares = 100 * data
    color = domain_colors(domains)
    limit = 1.15 * np.nanmax(shares.drop(columns="cap", errors="ignore").to_numpy())
    if "choice" in data:
        axes.barh(rows, shares["choice"], height=0.62, color=[color[d] for d in domains])
        for row, share in enumerate(shares["choice"]):
            axes.text(limit * 1.01, row, f"{share:.1f}%", color=INK, va="center", fontsize=10)
    handles, names = [], []
    marks = {"uniform": "o", "proportional": "D", "best_seen": "^"}
    for name, marker in marks.items():
        if name in data:
            (line,) = axes.plot(
                shares[name], rows, marker, mfc="none", mec=INK, mew=1.1, ms=5.5, ls="none"
            )
            handles.append(line)
            names.append(arm_name(name))
    if "cap" in data and (capped := shares["cap"] <= limit).any():
        axes.vlines(shares["cap"][capped], rows[capped] - 0.42, rows[capped] + 0.42, color=INK)
        handles.append(Line2D([], [], color=INK, marker="|", ls="none", ms=10, mew=1.5))
        names.append("cap")
    axes.set_yticks(rows, [label(d, 14) for d in domains])
    axes.set_ylim(len(domains) - 0.4, -0.6)
    axes.set_xlim(0, limit)
    dress(axes, title, "share of training tokens (%)", "")
    axes.grid(False, axis="y")
    if handles:
        # Under the axis label, whatever the figure's height.
        under = offset_copy(axes.transAxes, axes.get_figure(root=True), y=-34, units="points")
        where = {"loc": "upper center", "bbox_to_anchor": (0.4, 0), "bbox_transform": under}
        legend(axes, handles, names, ncols=4, columnspacing=1.0, handletextpad=0.2, **where)


def predicted_measured(data: pd.DataFrame, axes: Axes, name: str = "objective") -> None:
    """Draw predictions for held-out runs against what was measured, with R2 and Spearman.

    Args:
        data: One row a run: `measured_bpb`, `predicted_bpb` (out of fold: the run was held out),
            and optionally `std_bpb` of the prediction.
        axes: Where to draw.
        name: Target, or `objective`.
    """
    data = data.dropna(subset=["measured_bpb", "predicted_bpb"])
    x, y = data["measured_bpb"].to_numpy(), data["predicted_bpb"].to_numpy()
    varies = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    rank = float(np.asarray(spearmanr(x, y))[0]) if varies else float("nan")
    r2 = 1 - float(np.mean((x - y) ** 2) / np.var(x)) if varies else float("nan")
    both = np.concatenate([x, y])
    span = [both.min(), both.max()] if len(both) else [0.0, 1.0]
    pad = 0.05 * (span[1] - span[0]) or 0.05
    span = [span[0] - pad, span[1] + pad]
    axes.plot(span, span, color=MUTED, lw=1.0, ls=(0, (4, 3)), zorder=1)
    if "std_bpb" in data and data["std_bpb"].notna().any():
        half = Z95 * float(data["std_bpb"].median())
        axes.fill_between(span, np.array(span) - half, np.array(span) + half, color=ACCENT,
                          alpha=0.12, lw=0, zorder=0)  # fmt: skip
    axes.plot(x, y, "o", color=ACCENT, ms=3.6, mew=0, alpha=0.65)
    axes.set(xlim=span, ylim=span)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    finding = f"{label(name)}: R\u00b2 {r2:.2f}, Spearman {rank:.2f}"
    dress(axes, finding, f"measured (bits per byte), n = {len(x)}", "predicted, held out (bpb)")


def merged_trained(data: pd.DataFrame, axes: Axes, name: str) -> None:
    """Draw losses of merged candidates against those of runs on the same mixtures.

    Args:
        data: One row a mixture: `trained_bpb`, `merged_bpb`.
        axes: Where to draw.
        name: Target, or what was averaged.
    """
    x, y = data["trained_bpb"].to_numpy(), data["merged_bpb"].to_numpy()
    varies = len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    rank = float(np.asarray(spearmanr(x, y))[0]) if varies else float("nan")
    axes.plot(x, y, "o", color=ACCENT, ms=4.0, mew=0, alpha=0.7)
    span = [max(x.min(), y.min()), min(x.max(), y.max())]
    if span[0] < span[1]:  # far from each other the two kinds share no losses to be equal at
        axes.plot(span, span, color=MUTED, lw=1.0, ls=(0, (4, 3)), zorder=1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
    finding = f"{label(name)}: Spearman {rank:.2f}, gap {np.mean(y - x):+.3f} bpb"
    dress(axes, finding, f"trained (bits per byte), n = {len(x)}", "merged (bpb)")


def response_curve(
    curve: pd.DataFrame, axes: Axes, name: str, points: pd.DataFrame, color: str = ACCENT
) -> None:
    """Draw how the loss changes as one domain's share moves, the others kept in proportion.

    Args:
        curve: `share`; `objective`, `std` (predicted change from the chosen mixture and its
            standard deviation, bpb); every other column is a target's predicted change.
        axes: Where to draw.
        name: The domain.
        points: Runs: `share`, `objective` (measured, minus the choice's prediction, bpb).
        color: The domain's.
    """
    share = 100 * curve["share"].to_numpy()
    mean, half = curve["objective"].to_numpy(), Z95 * curve["std"].to_numpy()
    axes.plot(100 * points["share"], points["objective"], "o", color=MUTED, ms=2.6, mew=0,
              alpha=0.45, zorder=1)  # fmt: skip
    for target in curve.columns.difference(["share", "objective", "std"], sort=False):
        axes.plot(share, curve[target], color=MUTED, lw=0.8, alpha=0.8, zorder=2)
    axes.fill_between(share, mean - half, mean + half, color=color, alpha=0.22, lw=0, zorder=2)
    axes.plot(share, mean, color=color, lw=2.2, zorder=3)
    best = int(np.argmin(mean))
    axes.axhline(0, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    # A narrow search space can make a share's optimum its edge; the title then says so.
    edge = " (edge)" if best in (0, len(share) - 1) else ""
    finding = f"{label(name)}: lowest at {share[best]:.0f}%{edge}"
    dress(axes, finding, "share of this domain (%)", "change of loss (bpb)")


def interaction(data: pd.DataFrame, axes: Axes, step: float = 0.05) -> None:
    """Draw the change of each target's predicted loss when a domain's share grows by `step`.

    Args:
        data: Rows domains, columns targets: change of the loss, bpb; negative is better.
        axes: Where to draw.
        step: Added to the domain's share; the others shrink in proportion.
    """
    values = 1000 * data.to_numpy(dtype=float)
    most = np.nanmax(np.abs(values)) or 1.0
    # Opacity shows the size, so that zero is the page's own background, light or dark.
    for (row, column), value in np.ndenumerate(values):
        alpha = 0.0 if np.isnan(value) else 0.6 * abs(value) / most
        face = (MORE if value > 0 else LESS, alpha)
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fc=face, ec=GRID, lw=0.5))
        if values.shape[1] <= 16 and not np.isnan(value):
            axes.text(column, row, f"{value:+.0f}" if abs(value) >= 0.5 else "0", ha="center",
                      va="center", fontsize=8, color=INK)  # fmt: skip
    axes.set(xlim=(-0.5, values.shape[1] - 0.5), ylim=(values.shape[0] - 0.5, -0.5))
    axes.set_yticks(range(values.shape[0]), [label(d, 14) for d in data.index])
    axes.set_xticks(range(values.shape[1]), [label(t, 14) for t in data.columns])
    row, column = divmod(int(np.nanargmin(values)), values.shape[1])
    domain, target = label(data.index[row], 14), label(data.columns[column], 14)
    title = f"+{100 * step:.0f} points of {domain} help {target} most"
    title = title if values[row, column] < 0 else "No domain is predicted to help"
    dress(axes, title, "target (change of its loss, millibits per byte)", "")
    axes.tick_params(axis="x", rotation=40, length=0)
    for tick in axes.get_xticklabels():
        tick.set(ha="right", rotation_mode="anchor")
    axes.grid(False)


def loss_curves(data: pd.DataFrame, axes: Axes, title: str) -> None:
    """Draw loss over tokens: every run thin, the arms of the verification bold.

    Args:
        data: `run_id`, `tokens`, `loss_bpb`, `arm` (empty for a proxy).
        axes: Where to draw.
        title: The finding.
    """
    handles = {}
    for _, run in data.sort_values("tokens").groupby(["arm", "run_id"]):
        arm = str(run["arm"].iloc[0])
        bold = arm != ""
        (line,) = axes.plot(
            run["tokens"], run["loss_bpb"], lw=2.0 if bold else 0.6, alpha=1.0 if bold else 0.35,
            color=arm_color(arm) if bold else MUTED, zorder=3 if bold else 1,
            marker="o" if run["tokens"].nunique() == 1 else "", ms=3,
        )  # fmt: skip
        handles.setdefault(arm_name(arm) or "proxies", line)
    dress(axes, title, "training tokens", "loss (bits per byte)")
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(value)))
    if handles:
        legend(axes, list(handles.values()), [label(n) for n in handles], loc="upper right")


def verification(data: pd.DataFrame, axes: Axes, title: str, seed_sd_bpb: float) -> None:
    """Draw each arm's objective by seed, its mean and 95% interval, and the noise of a seed.

    Args:
        data: One row a run: `arm`, `objective_bpb`.
        axes: Where to draw.
        title: The finding.
        seed_sd_bpb: Standard deviation between seeds of one mixture; a band around the choice.
    """
    arms = list(dict.fromkeys(data["arm"]))
    reach = t.ppf(0.975, max(1, len(data) - len(arms)))  # the noise is pooled over arms
    values_of = {a: data.loc[data["arm"] == a, "objective_bpb"].to_numpy() for a in arms}
    if "choice" in arms and np.isfinite(seed_sd_bpb):
        middle = values_of["choice"].mean()
        axes.axvspan(middle - seed_sd_bpb, middle + seed_sd_bpb, color=PALETTE[1], alpha=0.14, lw=0)
    for row, (arm, values) in enumerate(values_of.items()):
        color = arm_color(arm)
        axes.plot(values, np.full(len(values), row + 0.2), "o", color=color, ms=4, mew=0, alpha=0.7)
        half = reach * np.nan_to_num(seed_sd_bpb) / np.sqrt(len(values))
        axes.errorbar(values.mean(), row - 0.1, xerr=half, fmt="D", color=color, ms=5.5, capsize=3)
    axes.set_yticks(range(len(arms)), [label(arm_name(a), 14) for a in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    dress(axes, title, "objective (bits per byte; lower is better)", "")
    axes.grid(False, axis="y")


def short_count(value: float) -> str:
    """Return a number as people say it: 1.2M, 300k."""
    for unit, sign in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.3g}{sign}"
    return f"{value:.3g}"

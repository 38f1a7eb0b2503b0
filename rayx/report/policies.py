"""The section of a report on policies: the weights that they set, and what their signals took."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rayx import plots
from rayx.report.evidence import Evidence
from rayx.report.page import Html, figure, paragraph, table
from rayx.report.svg import draw

HEADING = "Policies"
MOST_PANELS = 6
MOST_NAMED = 6  # domains in a legend


def section(evidence: Evidence) -> Html:
    """Weights over time, one panel a policy, and a table of averages and cost."""
    text = (
        "A policy sets the mixture while a run trains. Bold: the mean over its runs, thin: each "
        "run. These runs are left out of every fit, for their loss depends on the path."
    )
    decided = evidence.store.decisions()
    runs = evidence.steered
    decided = decided.join(runs.set_index("run_id")["tokens"].rename("end"), on="run_id")
    panels = []
    for i, (policy, of) in enumerate(list(decided.groupby("policy"))[:MOST_PANELS]):
        title = f"{policy}: {_moved(of)}"
        svg = draw(lambda a: weights_over_time(of, a, title), f"policy{i}", title, height=260)  # noqa: B023
        panels.append(figure(svg, f"{of['run_id'].nunique()} runs."))
    return Html(
        paragraph(text, "note") + f'<div class="panels">{"".join(panels)}</div>' + _numbers(runs)
    )


def weights_over_time(data: pd.DataFrame, axes: Axes, title: str) -> None:
    """Draw the weights that a policy set, each domain a line of steps, runs thin, their mean bold.

    Args:
        data: `run_id`, `tokens`, `domain`, `weight`, and `end`, the run's tokens.
        axes: Where to draw.
        title: The finding.
    """
    colors = plots.domain_colors(sorted(data["domain"].unique()))
    marks = np.unique(np.append(data["tokens"], data["end"]))
    last: dict[str, float] = {}
    for domain, color in colors.items():
        lines = []
        for _, run in data.groupby("run_id"):
            # A domain of weight 0 has no row.
            steps = np.array(sorted(set(run["tokens"])))
            of = run.loc[run["domain"] == domain].drop_duplicates("tokens", keep="last")
            weight = of.set_index("tokens")["weight"].reindex(steps, fill_value=0.0).to_numpy()
            lines.append(weight[np.searchsorted(steps, marks, side="right") - 1])
            axes.step(marks, lines[-1], where="post", lw=0.6, alpha=0.35, color=color)
        mean = np.mean(lines, axis=0)
        axes.step(marks, mean, where="post", lw=1.8, color=color, label=plots.label(domain))
        last[plots.label(domain)] = float(mean[-1])
    plots.dress(axes, title, "training tokens", "weight")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plots.short_count(value)))
    handles, names = axes.get_legend_handles_labels()
    ends = sorted(zip(names, handles, strict=True), key=lambda entry: -last[entry[0]])[:MOST_NAMED]
    plots.legend(axes, [h for _, h in ends], [n for n, _ in ends], loc="best")


def _moved(of: pd.DataFrame) -> str:
    """Say which domain gained most."""
    first = of.loc[of["tokens"] == 0].groupby("domain")["weight"].mean()
    ends = of.groupby("run_id")["tokens"].transform("max")
    final = of.loc[of["tokens"] == ends].groupby("domain")["weight"].mean()
    gain = final.sub(first, fill_value=0.0)
    domain = str(gain.idxmax())
    if gain.max() < 0.01:
        return "weights hardly move"
    return f"{plots.label(domain)} rises from {first.get(domain, 0.0):.2f} to {final[domain]:.2f}"


def _numbers(runs: pd.DataFrame) -> Html:
    losses = [c for c in runs if str(c).startswith("loss/")]
    rows = []
    for policy, of in runs.groupby("policy"):
        mean = of[losses].mean(axis=1)
        spread = f" ± {mean.std():.4f}" if len(of) > 1 else ""
        time, work = (of[f"signal_{what}"].sum() / of[what].sum() for what in ("seconds", "flops"))
        rows.append(
            [
                policy,
                len(of),
                f"{mean.mean():.4f}{spread}",
                f"{100 * time:.1f}%",
                f"{100 * work:.1f}%",
            ]
        )
    head = ["policy", "runs", "mean loss (bpb)", "signals, of the time", "of the FLOPs"]
    return table("Runs of each policy; ± is the standard deviation over runs", head, rows)

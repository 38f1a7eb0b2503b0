"""The section of a report on policies: the weights that they set, and what their signals took."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rayx import plots
from rayx.policy import Probe
from rayx.report.evidence import Evidence
from rayx.report.page import Html, figure, paragraph, table
from rayx.report.svg import draw
from rayx.spec import Parent, TrainSpec

HEADING = "Policies"
MOST_PANELS = 6
MOST_NAMED = 6  # domains in a legend


def section(evidence: Evidence) -> Html:
    """Weights over time, one panel a policy and its settings, and a table of losses and cost."""
    runs = evidence.steered
    groups = sorted((of for _, of in runs.groupby("policy_id")), key=len, reverse=True)
    shown = groups[:MOST_PANELS]
    text = (
        "A policy sets the mixture while a run trains. Bold: the mean over its runs, thin: each "
        "run. These runs are left out of every fit, for their loss depends on the path."
    )
    if len(groups) > len(shown):
        text += f" {len(shown)} of {len(groups)} settings are drawn, those with most runs."
    names = [settings(evidence, of) for of in groups]
    decided = evidence.store.decisions()
    decided = decided.join(runs.set_index("run_id")["tokens"].rename("end"), on="run_id")
    panels = []
    for i, of in enumerate(shown):
        data = decided.loc[decided["run_id"].isin(of["run_id"])]
        title = f"{of['policy'].iloc[0]}: {_moved(data)}"
        svg = draw(lambda a: weights_over_time(data, a, title), f"policy{i}", title, height=260)  # noqa: B023
        panels.append(figure(svg, f"{names[i]}; {len(of)} runs."))
    return Html(
        paragraph(text, "note")
        + f'<div class="panels">{"".join(panels)}</div>'
        + _numbers(groups, names)
    )


def settings(evidence: Evidence, runs: pd.DataFrame) -> str:
    """Say in words what policy these runs have, where it is not as usual, and where it starts."""
    spec = evidence.store.get(str(runs["run_id"].iloc[0])).spec
    assert isinstance(spec, TrainSpec) and spec.policy is not None, "steered runs have a policy"
    policy: Any = spec.policy
    own = [
        f"{f.name} {_short(getattr(policy, f.name))}"
        for f in dataclasses.fields(policy)
        if getattr(policy, f.name) != f.default
    ]
    prior = spec.mixture
    start = f"uniform over {len(prior)} domains"
    if max(prior.values()) - min(prior.values()) > 1e-5:
        most = sorted(prior, key=lambda domain: -prior[domain])[:2]
        start = ", ".join(f"{domain} {prior[domain]:.2f}" for domain in most)
        start += f" and {len(prior) - 2} more" if len(prior) > 2 else ""
    return f"{policy.name} ({', '.join([*own, f'from {start}'])})"


def _short(value: Any) -> str:
    if isinstance(value, Probe):
        return f"{value.target} ({value.part})"
    if isinstance(value, Parent):
        return f"run {value.spec.run_id}"
    if isinstance(value, tuple) and value and isinstance(value[0], Probe):
        return " + ".join(map(_short, value))
    if isinstance(value, tuple):
        return f"of {len(value)}"
    return f"{value:g}" if isinstance(value, float) else str(value)


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


def _numbers(groups: list[pd.DataFrame], names: list[str]) -> Html:
    rows = []
    for of, name in zip(groups, names, strict=True):
        mean = of[[c for c in of if str(c).startswith("loss/")]].mean(axis=1)
        spread = f" ± {mean.std():.4f}" if len(of) > 1 else ""
        time, work = (of[f"signal_{what}"].sum() / of[what].sum() for what in ("seconds", "flops"))
        rows.append(
            [
                name,
                len(of),
                f"{mean.mean():.4f}{spread}",
                f"{100 * time:.1f}%",
                f"{100 * work:.1f}%",
            ]
        )
    head = ["policy", "runs", "mean loss (bpb)", "signals, of the time", "of the FLOPs"]
    return table("Runs of each policy; ± is the standard deviation over runs", head, rows)

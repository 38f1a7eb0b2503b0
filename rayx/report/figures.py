"""The figures of a report, each as the HTML of a section."""

from __future__ import annotations

import numpy as np
import pandas as pd

from rayx import plots
from rayx.report.evidence import STEP, Evidence, listed
from rayx.report.page import Html, figure
from rayx.report.svg import WIDTH, draw


def mixture(evidence: Evidence) -> Html:
    """Bars of the choice, with the baselines and caps as marks."""
    data = evidence.mixtures()
    change = (data["choice"] - data["proportional"]).sort_values()
    up = [plots.label(d) for d in change.index[::-1] if change[d] >= 0.01]
    down = [plots.label(d) for d in change.index if change[d] <= -0.01]
    title = "As the tokens there are"
    if up and down:
        title = f"More {listed(up, 2)}; less {listed(down, 2)}"
    svg = draw(
        lambda axes: plots.mixture_bars(data, axes, title),
        "mixture",
        "Share of training tokens by domain in the chosen mixture: "
        + ", ".join(f"{d} {100 * s:.1f}%" for d, s in data["choice"].items()),
        height=95 + 26 * len(data),
    )
    fitted = evidence.fitted
    runs = f" Chosen on {len(fitted.table)} runs." if fitted else ""
    return figure(svg, f"Bars: the choice. Title: against the proportional mixture.{runs}")


def verification(evidence: Evidence) -> Html:
    """Objective of each arm by seed."""
    assert evidence.verification is not None
    arms = evidence.verification["arms"]
    rows = [
        {"arm": arm, "objective_bpb": value}
        for arm, entry in arms.items()
        for value in entry["objective_bpb"]
    ]
    sd = evidence.verification["seed_sd_bpb"]
    mean = {arm: float(np.mean(entry["objective_bpb"])) for arm, entry in arms.items()}
    best = min(mean, key=lambda arm: mean[arm])
    title = f"{plots.arm_name(best).capitalize()} is lowest of {len(arms)} arms"
    svg = draw(
        lambda axes: plots.verification(
            pd.DataFrame(rows), axes, title, float("nan") if sd is None else sd
        ),
        "verification",
        "Mean objective in bits per byte: "
        + ", ".join(f"{plots.arm_name(a)} {m:.4f}" for a, m in mean.items()),
        height=90 + 38 * len(arms),
    )
    noise = "one seed, so no interval" if sd is None else f"band: noise of one seed ({sd:.4f} bpb)"
    return figure(svg, f"Points: seeds. Diamonds: mean with 95% interval; {noise}.")


def held_out(evidence: Evidence) -> Html:
    """Predicted against measured, the objective first."""
    panels = []
    for i, (name, data) in enumerate(evidence.held_out().items()):
        alt = f"Predicted against measured loss of {name}, {len(data)} held-out runs"
        panels.append(
            figure(draw(lambda a: plots.predicted_measured(data, a, name), f"fit{i}", alt, 300))  # noqa: B023
        )
    return Html(f'<div class="panels">{"".join(panels)}</div>')


def responses(evidence: Evidence) -> Html:
    """One panel a domain, all on one vertical scale."""
    data = evidence.responses()
    colors = plots.domain_colors(evidence.domains)
    values = np.concatenate([curve["objective"] for curve, _ in data.values()])
    measured = next(iter(data.values()))[1]["objective"].dropna().to_numpy()
    seen = np.quantile(measured, [0.0, 0.95]) if len(measured) else values
    low, high = min(values.min(), seen.min()), max(values.max(), seen.max())
    pad = 0.08 * (high - low) or 0.01

    def panel(i: int, domain: str) -> Html:
        curve, points = data[domain]

        def plot(axes) -> None:
            plots.response_curve(curve, axes, domain, points, colors[domain])
            axes.set_ylim(low - pad, high + pad)

        best = curve["share"].iloc[int(curve["objective"].argmin())]
        alt = f"Predicted change of loss over the share of {domain}; lowest at {100 * best:.0f}%"
        return figure(draw(plot, f"response{i}", alt, height=220))

    panels = "".join(panel(i, domain) for i, domain in enumerate(evidence.domains))
    return Html(f'<div class="panels">{panels}</div>')


def interactions(evidence: Evidence) -> Html:
    """Heat map of domains by targets."""
    data = evidence.interactions()
    width = max(WIDTH, 130 + 38 * data.shape[1])
    svg = draw(
        lambda axes: plots.interaction(data, axes, STEP),
        "interaction",
        "Change of each target's predicted loss as each domain grows; the table of the fit has "
        "the numbers",
        height=125 + 25 * data.shape[0],
        width=width,
    )
    shown = figure(svg, "", scroll_width=width if width > WIDTH else 0.0)
    return shown if width > 1.6 * WIDTH else Html(f'<div class="alone">{shown}</div>')


def curves(evidence: Evidence) -> Html:
    """Objective over tokens, one panel for each scale (the four with most runs)."""
    groups = [group for _, group in evidence.curves().groupby(["params", "end"])]
    groups.sort(key=lambda group: -group["run_id"].nunique())
    panels = []
    for i, group in enumerate(groups[:4]):
        ends = group.sort_values("tokens").groupby("run_id").tail(1)
        low, high = ends["loss_bpb"].min(), ends["loss_bpb"].max()
        count = len(ends)
        title = f"{count} runs end between {low:.3f} and {high:.3f} bpb"
        mean = {arm: of["loss_bpb"].mean() for arm, of in ends.groupby("arm") if arm}
        if len(mean) > 1:
            best = str(min(mean, key=lambda arm: mean[arm]))
            title = f"{plots.arm_name(best).capitalize()} ends lowest"
        svg = draw(lambda a: plots.loss_curves(group, a, title), f"curve{i}", title, height=260)  # noqa: B023
        params, tokens = group["params"].iloc[0], group["end"].iloc[0]
        scale = f"{plots.short_count(params)} parameters, {plots.short_count(tokens)} tokens"
        panels.append(figure(svg, f"{count} runs of {scale}."))
    return Html(f'<div class="panels">{"".join(panels)}</div>')

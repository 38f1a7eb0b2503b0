"""The section of a report on merged candidates: how far they can be believed, at what cost."""

from __future__ import annotations

import numpy as np
import pandas as pd

from rayx import plots
from rayx.fit import AVERAGE, Belief
from rayx.plots import short_count
from rayx.report.evidence import Evidence, listed
from rayx.report.page import Html, esc, figure, missing, paragraph, table
from rayx.report.svg import draw

HEADING = "How far merged proxies can be believed"
SAME_RANKS, SIMILAR_RANKS = 0.9, 0.7  # Spearman from which they rank as, or much as, trained ones
MOST_PANELS = 9
UNJUDGED = (
    "Nothing trained at the scale of the merged candidates says how far they can be believed: "
    "train a few of their mixtures, 8 or more."
)


def section(evidence: Evidence) -> Html:
    """The verdict in words, the numbers by target, the losses, and the cost."""
    joint = evidence.joint
    if joint is None or not joint.beliefs:
        return Html(missing(UNJUDGED) + cost(evidence))
    parts = []
    for group in dict.fromkeys(belief.group for belief in joint.beliefs):
        beliefs = [belief for belief in joint.beliefs if belief.group == group]
        name = "" if group == "merged" else f"{group}: "
        parts.append(f'<p class="lead">{esc(name + verdict(beliefs))}</p>')
        parts.append(_numbers(beliefs))
        parts.append(_figures(joint.points.loc[joint.points["group"] == group], group))
    return Html("".join(parts) + cost(evidence))


def verdict(beliefs: list[Belief]) -> str:
    """Say in words what the trained runs say of a group of merged candidates."""
    average = beliefs[-1]
    targets = beliefs[:-1]
    mean = average.spearman
    if np.isfinite(mean):
        how = "Merged proxies do not rank mixtures as trained ones do"
        if mean >= SIMILAR_RANKS:
            how = "Merged proxies rank mixtures much as trained ones do"
        if mean >= SAME_RANKS:
            how = "Merged proxies rank mixtures as trained ones do"
        over = f"{average.pairs} pairs" if average.basis == "pairs" else "trained mixtures, by law"
        interval = ""
        if np.isfinite(average.spearman_low):
            interval = f" ({_span(average.spearman_low, average.spearman_high)})"
        height = "high" if average.gap_bpb > 0 else "low"
        text = f"{how}: \u03c1 {mean:.3f}{interval} over {over}, average loss. "
        text += f"Their losses are {abs(average.gap_bpb):.3f} bpb too {height}"
    else:
        text = "Too few trained runs to compare the ranks of merged proxies with"
    kept = sum(belief.kept for belief in targets)
    if not any(belief.judged for belief in targets):
        return f"{text}; they are in the fit unchecked, for fewer than 8 trained runs are there."
    if not kept:
        return (
            f"{text}. They are left out of the fit: with them no held-out loss is predicted better."
        )
    text += f"; translated, they are kept for {kept} of {len(targets)} targets"
    out = [belief.target for belief in targets if not belief.kept]
    text += f" (not {listed(out)})" if out else ""
    if average.judged:
        text += (
            f". With them the average loss of held-out trained runs is predicted within "
            f"{average.joint_bpb:.4f} bpb (mean error) instead of {average.alone_bpb:.4f}"
        )
    return f"{text}."


def _numbers(beliefs: list[Belief]) -> Html:
    rows = []
    for belief in beliefs:
        kept = "yes" if belief.kept else "no"
        kept += "" if belief.judged or belief.target == AVERAGE else ", unchecked"
        rows.append(
            [
                belief.target if belief.target != AVERAGE else Html("<b>average loss</b>"),
                belief.pairs,
                _number(belief.spearman, 3),
                _span(belief.spearman_low, belief.spearman_high),
                _number(belief.gap_bpb, 3, sign=True),
                _with_error(belief.slope, belief.slope_se),
                _number(belief.tilt_bpb, 4),
                _number(belief.residual_bpb, 4),
                _number(belief.noise_bpb, 4),
                _change(belief.alone_spearman, belief.joint_spearman, 3),
                _change(belief.alone_bpb, belief.joint_bpb, 4),
                "–" if belief.target == AVERAGE else kept,
            ]
        )
    head = ["target", "pairs", "Spearman", "95% interval", "gap", "slope", "tilt", "residual"]
    head += ["noise of a run", "held-out Spearman", "held-out error", "in the fit"]
    first = beliefs[-1]
    caption = f"{first.merged} merged beside {first.trained} trained candidates; losses in bpb"
    compared = (
        "Merged losses are compared with trained ones of the same mixture"
        if any(belief.basis == "pairs" for belief in beliefs)
        else "Few mixtures are there in both kinds: what a law of the merged losses says of the "
        "trained mixtures is compared with their losses"
    )
    note = (
        f"{compared}. Gap: merged less trained. Log losses are translated by a shift, the slope "
        "(± s.e.) and a tilt, whose size is the standard deviation over merged candidates of what "
        "depends on the mixture; residual: what remains of trained losses. Held out: predictions "
        "for trained runs by a law of the other trained runs alone → with the merged ones added, "
        "their own partner left out."
    )
    return Html(table(caption, head, rows) + paragraph(note, "note"))


def _figures(points: pd.DataFrame, group: str) -> Html:
    panels = []
    names = [AVERAGE, *(name for name in points["target"].unique() if name != AVERAGE)]
    for i, name in enumerate(names[:MOST_PANELS]):
        data = points.loc[points["target"] == name]
        if len(data) < 2:
            continue
        shown = "average loss" if name == AVERAGE else str(name)
        alt = f"Merged against trained loss of {shown}, {len(data)} mixtures"
        svg = draw(lambda a: plots.merged_trained(data, a, shown), f"merged{group}{i}", alt, 300)  # noqa: B023
        panels.append(figure(svg))
    return Html(f'<div class="panels">{"".join(panels)}</div>') if panels else Html("")


def cost(evidence: Evidence) -> Html:
    """What trained and merged candidates took, the merged ones' experts included."""
    runs, merged = evidence.runs, evidence.merged
    experts = runs["run_id"].isin(evidence.experts)
    at_scale = runs["run_id"].isin(evidence.beside_merged)
    groups = {
        "trained candidates": runs[at_scale & ~experts & (runs["kind"] != "merge")],
        "experts of the merged ones": runs[experts],
        "merged candidates": merged,
    }
    rows = []
    for name, group in groups.items():
        tokens = float(group.loc[group["kind"] != "merge", "tokens"].sum())
        flops = float(group["flops"].sum())
        each = f"{flops / len(group):.2e}" if len(group) else "–"
        rows.append([name, len(group), short_count(tokens), f"{flops:.2e}", each])
    head = ["what", "runs", "tokens trained on", "FLOPs", "FLOPs a run"]
    caption = "Cost at the scale of the merged candidates; trunks, which both kinds share, left out"
    both = groups["experts of the merged ones"], groups["merged candidates"]
    one_merged = sum(float(group["flops"].sum()) for group in both) / max(1, len(merged))
    trained = groups["trained candidates"]
    words = Html("")
    if len(trained) and one_merged > 0 and len(both[0]):
        ratio = float(trained["flops"].mean()) / one_merged
        words = paragraph(
            f"A merged candidate took {one_merged:.2e} FLOPs, its share of the experts included; "
            f"a trained one {ratio:.3g} times that."
        )
    return Html(table(caption, head, rows) + words)


def _number(value: float, digits: int, sign: bool = False) -> str:
    if not np.isfinite(value):
        return "–"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def _span(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}" if np.isfinite(low) else "–"


def _with_error(value: float, error: float) -> str:
    return f"{value:.2f} ± {error:.2f}" if np.isfinite(value) else "–"


def _change(before: float, after: float, digits: int) -> str:
    if not np.isfinite(before):
        return "–"
    return f"{before:.{digits}f} → {after:.{digits}f}"

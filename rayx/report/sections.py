"""The sections of a report in order; one without evidence says what is missing."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import t

from rayx.errors import UNREADABLE
from rayx.mixture import epochs
from rayx.plots import PALETTE, arm_name, short_count
from rayx.report import figures, merged, policies, records
from rayx.report.evidence import NOT_FITTED, STEP, Evidence
from rayx.report.page import Html, document, esc, missing, paragraph, swatch, table, tiles

log = logging.getLogger(__name__)

NOT_CHOSEN = "No mixture has been chosen from these records yet."
NOT_VERIFIED = (
    "The choice has not been verified: no arms were trained beside the baselines at a larger scale."
)


def page(evidence: Evidence, title: str) -> str:
    """Return the whole page."""
    sections: list[tuple[str, str, Callable[[Evidence], Html]]] = [
        ("verdict", "Verdict", verdict),
        ("warnings", "Warnings", warnings),
        ("mixture", "Mixture chosen", mixture),
        ("verification", "Verification", verification),
        ("fit", "Predicted against measured", fit),
        ("response", "Response to each domain", response),
        ("interaction", "Which domain helps which target", interaction),
        ("curves", "Loss curves", records.curves),
        ("regressors", "Regressors compared", records.regressors),
        ("cost", "Cost", records.cost),
        ("failures", "Failures", records.failures),
        ("provenance", "Provenance", records.provenance),
    ]
    if len(evidence.merged):
        place = [key for key, _, _ in sections].index("response")
        sections.insert(place, ("merged", merged.HEADING, merged.section))
    if len(evidence.steered):
        place = [key for key, _, _ in sections].index("curves")
        sections.insert(place, ("policies", policies.HEADING, policies.section))
    return document(title, [(k, name, _drawn(k, draw, evidence)) for k, name, draw in sections])


def _drawn(key: str, draw: Callable[[Evidence], Html], evidence: Evidence) -> Html:
    """Return a section; a choice or verification that was tampered with costs only its parts."""
    try:
        return draw(evidence)
    except UNREADABLE as error:
        log.warning("report, section %s: the store holds what cannot be drawn", key, exc_info=True)
        return missing(f"The store holds what cannot be drawn here: {error!r}")


def verdict(evidence: Evidence) -> Html:
    """What was chosen, what it gains, and whether verification agrees."""
    choice, checked = evidence.choice, evidence.verification
    ok, bad = len(evidence.runs) - len(evidence.failed), len(evidence.failed)
    counted = [("Runs", f"{ok} done", f"{bad} failed" if bad else "none failed")]
    if choice is None:
        head = "No mixture chosen yet"
        state = f"{len(evidence.fitted.table)} runs are fitted." if evidence.fitted else NOT_FITTED
        return Html(f"<h1>{head}</h1>{paragraph(state, 'lead')}{tiles(counted)}")
    order = sorted(choice.weights, key=lambda d: -choice.weights[d])
    shown = order[:4] if len(order) > 5 else order
    parts = [f"{100 * choice.weights[d]:.0f}% {d}" for d in shown]
    if len(order) > len(shown):
        rest = sum(choice.weights[d] for d in order[len(shown) :])
        parts.append(f"{100 * rest:.0f}% of {len(order) - len(shown)} more")
    head = f"Train on {', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    if not choice.signal:
        head = "No signal: keep the proportional mixture"
    name, low, high, gain = "", 0.0, 0.0, 0.0
    entries = [
        (
            "Predicted objective",
            f"{choice.predicted:.4f} bpb",
            f"{choice.level:.0%} interval {choice.interval[0]:.4f} to {choice.interval[1]:.4f}",
        )
    ]
    lead = f"The objective is {evidence.objective_words()}, in bits per byte (bpb)."
    for name in ("proportional", "uniform"):
        if baseline := choice.baselines.get(name):
            gain, (low, high) = baseline.regret, baseline.regret_interval
            below = f"bpb; {choice.level:.0%} interval {low:+.4f} to {high:+.4f}"
            entries.append((f"Predicted gain over {name}", f"{gain:+.4f}", below))
            break
    if checked and name in checked["comparisons"]:
        result = checked["comparisons"][name]
        error = "" if result["stderr_bpb"] is None else f" ± {result['stderr_bpb']:.4f} (s.e.)"
        sd = checked["seed_sd_bpb"]
        noise = "noise unknown: one seed" if sd is None else f"noise of one seed {sd:.4f}"
        measured = Html(f"{-result['difference_bpb']:+.4f}")
        entries.append((f"Measured gain over {name}", measured, f"bpb{error}; {noise}"))
    status, kind = confirmation(evidence)
    said = f" {checked['verdict']}" if checked else ""
    lead_html = (
        f'<p class="lead"><strong class="{kind}">{esc(status)}.</strong>{esc(said)} {esc(lead)}</p>'
    )
    return Html(f"<h1>{esc(head)}</h1>{lead_html}{tiles(entries + counted)}")


def confirmation(evidence: Evidence) -> tuple[str, str]:
    """Return the outcome of the verification in words, and its class on the page.

    A difference counts when it is outside its 95% t interval over seeds.
    """
    if not evidence.verification:
        return "Not verified", "bad"
    results = evidence.verification["comparisons"].values()
    errors = [
        t.ppf(0.975, r["seeds"] - 1) * r["stderr_bpb"] if r["stderr_bpb"] is not None else np.inf
        for r in results
    ]
    differences = [r["difference_bpb"] for r in results]
    won = sum(d < -e for d, e in zip(differences, errors, strict=True))
    lost = sum(d > e for d, e in zip(differences, errors, strict=True))
    if results and won == len(differences):
        return "Confirmed: a clear win over every baseline", "good"
    if lost:
        return f"Not confirmed: clearly worse than {lost} of {len(differences)} baselines", "bad"
    if won:
        return f"Partly confirmed: a clear win over {won} of {len(differences)} baselines", "good"
    return "Not confirmed: every difference is within the noise", "bad"


def warnings(evidence: Evidence) -> Html:
    """Everything that should make one distrust the result."""
    found = [*(evidence.choice.warnings if evidence.choice else ())]
    found += evidence.fitted.warnings if evidence.fitted else ()
    runs, bad = evidence.runs, len(evidence.failed)
    if bad and not any("failed" in text for text in found):  # the table's own count says it
        found.append(f"{bad} of {len(runs)} runs failed")
    if lost := len(evidence.store.status()) - len(runs):
        found.append(f"{lost} records could not be read and are left out")
    if "corpus" in runs and runs["corpus"].nunique() > 1:
        found.append(f"the store holds runs on {runs['corpus'].nunique()} different corpora")
    if not found:
        return paragraph("None.")
    items = "".join(f"<li>{esc(text)}</li>" for text in dict.fromkeys(found))
    return Html(f'<ul class="warnings">{items}</ul>')


def mixture(evidence: Evidence) -> Html:
    """Bars, and the table of shares, epochs of supply and caps."""
    if evidence.choice is None:
        return missing(NOT_CHOSEN)
    data, plan = evidence.mixtures(), evidence.plan or {}
    supply = plan.get("domain_tokens")
    budget = sum(phase["tokens"] for phase in plan.get("schedule", []))
    passes = plan.get("epochs", {})
    if supply and not passes:
        passes = epochs(evidence.choice.weights, budget, supply)
    others = [c for c in data if c not in ("choice", "cap")]
    head = ["domain", "choice", "undecided by", *map(arm_name, others)]
    head += ["cap"] * ("cap" in data) + ["supply (tokens)", "epochs"] * bool(supply)
    rows = []
    for i, domain in enumerate(data.index):
        row: list[object] = [Html(swatch(i % len(PALETTE)) + esc(domain))]
        row += [Html(f"<b>{percent(data['choice'][domain])}</b>")]
        row += [f"± {percent(evidence.choice.spread[domain])}"]
        row += [percent(data[c][domain]) for c in others]
        row += [percent(data["cap"][domain])] if "cap" in data else []
        if supply:
            row += [short_count(supply[domain]), f"{passes.get(domain, 0.0):.2f}"]
        rows.append(row)
    caption = "Shares of training tokens"
    if supply:
        caption += f"; epochs for {short_count(budget)} tokens of final training"
    note = paragraph(
        "“Undecided by” is the standard deviation over the best candidates: large means that the "
        "prediction hardly cares.",
        "note",
    )
    side = f"{figures.mixture(evidence)}<div>{baselines(evidence)}</div>"
    named = [[axis, value, percent(share)] for axis, found in plan.get("labels", {}).items()
             for value, share in found.items()]  # fmt: skip
    labels = table("Labels of the chosen text", ["label", "value", "share"], named) * bool(named)
    return Html(f'<div class="pair">{side}</div>{table(caption, head, rows)}{note}{labels}')


def baselines(evidence: Evidence) -> Html:
    """Predicted objective of the choice and of what it is compared with."""
    choice = evidence.choice
    assert choice is not None
    low, high = choice.interval
    rows = [["choice", f"{choice.predicted:.4f}", "", f"run: {low:.4f} to {high:.4f}"]]
    for name, baseline in choice.baselines.items():
        low, high = baseline.regret_interval
        value, gain = f"{baseline.predicted:.4f}", f"{baseline.regret:+.4f}"
        rows.append([arm_name(name), value, gain, f"{low:+.4f} to {high:+.4f}"])
    head = ["mixture", "objective", "gain of the choice", f"{choice.level:.0%} interval"]
    far = f"The nearest run is at L1 distance {choice.distance:.3f}; runs lie "
    far += f"{choice.usual_distance:.3f} from each other. Its interval is that of one more "
    far += "run; those of gains are of the expected gain, without a run's noise."
    return Html(table("Predicted at proxy scale (bpb)", head, rows) + paragraph(far, "note"))


def verification(evidence: Evidence) -> Html:
    """Arms by seed, and what the choice gained over each."""
    checked = evidence.verification
    if not checked:
        return missing(NOT_VERIFIED)
    rows = []
    for arm, result in checked["comparisons"].items():
        error = result["stderr_bpb"]
        predicted = (
            evidence.choice.baselines.get("best_seen" if arm == "best_random" else arm)
            if evidence.choice
            else None
        )
        rows.append(
            [
                arm_name(arm),
                f"{-result['difference_bpb']:+.4f}",
                "–" if error is None else f"± {error:.4f}",
                f"{result['seeds_won']} of {result['seeds']}",
                f"{predicted.regret:+.4f}" if predicted else "–",
            ]
        )
    head = ["against", "gain (bpb)", "s.e.", "seeds won", "predicted by proxies"]
    gains = table("Gain of the choice, paired by seed; positive is better", head, rows)
    targets = list(checked["arms"]["choice"]["targets"])
    by_target = table(
        "Mean loss by target (bpb)",
        ["target", *map(arm_name, checked["arms"])],
        [
            [
                target,
                *(f"{np.mean(arm['targets'][target]):.4f}" for arm in checked["arms"].values()),
            ]
            for target in targets
        ],
    )
    scale = (
        f"Each arm was trained with {short_count(checked['params'])} parameters on "
        f"{short_count(checked['tokens'])} tokens, from the same seeds."
    )
    return Html(
        f"{paragraph(scale)}"
        f'<div class="pair">{figures.verification(evidence)}<div>{gains}{by_target}</div></div>'
    )


def fit(evidence: Evidence) -> Html:
    """Held-out predictions."""
    if not evidence.fitted:
        return missing(NOT_FITTED)
    fitted = evidence.fitted.table
    runs = len(fitted) if fitted.merged_R is None else int((~fitted.merged_R).sum())
    text = (
        f"Each of the {runs} points is a run that the prediction did not see (cross-validation). "
        "The band is the 95% interval of one run; the dashed line is a perfect prediction."
    )
    return Html(paragraph(text, "note") + figures.held_out(evidence))


def response(evidence: Evidence) -> Html:
    """How the prediction moves with each domain."""
    if not evidence.fitted:
        return missing(NOT_FITTED)
    start = "the chosen mixture" if evidence.choice else "the mean mixture of the runs"
    thin = " thin lines are the targets;" if len(evidence.objective) > 1 else ""
    text = (
        f"Predicted change of the objective from {start} as one domain's share moves and the "
        f"others keep their proportions. Band: 95% interval of one run;{thin} grey points are "
        "the measured runs, whose other shares differ (the worst may lie above the frame)."
    )
    return Html(paragraph(text, "note") + figures.responses(evidence))


def interaction(evidence: Evidence) -> Html:
    """The heat map."""
    if not evidence.fitted:
        return missing(NOT_FITTED)
    start = "the chosen mixture" if evidence.choice else "the mean mixture of the runs"
    text = (
        f"Change of each target's predicted loss, in thousandths of a bit per byte, when a domain "
        f"gets {100 * STEP:.0f} points more than in {start} and the others shrink in proportion. "
        "Blue falls (better), orange rises."
    )
    return Html(paragraph(text, "note") + figures.interactions(evidence))


def percent(share: Any) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.1f}%" if np.isfinite(share) else "–"

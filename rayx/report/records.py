"""The sections of a report about the runs themselves: curves, regressors, cost, failures."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd

from rayx import __version__
from rayx.plots import short_count
from rayx.report import figures
from rayx.report.evidence import NOT_FITTED, Evidence
from rayx.report.page import Html, esc, missing, paragraph, table


def curves(evidence: Evidence) -> Html:
    """Loss over tokens."""
    if evidence.curves().empty:
        return missing("No finished run has evaluations to draw.")
    text = (
        f"The objective ({evidence.objective_words()}) at every evaluation of every finished run."
    )
    return Html(paragraph(text, "note") + figures.curves(evidence))


def regressors(evidence: Evidence) -> Html:
    """Cross-validation of every regressor on every target."""
    if not evidence.fitted:
        return missing(NOT_FITTED)
    cv = evidence.fitted.cv
    tried = list(dict.fromkeys(cv["regressor"]))
    tried = [r for r in tried if "+" not in r]  # averages show where one was chosen
    rows = []
    for target, group in cv.groupby("target", sort=False):
        by_name = group.drop_duplicates("regressor").set_index("regressor")
        best = by_name[by_name["chosen"].astype(bool)]
        row: list[object] = [target]
        if len(best):
            used = best.iloc[0]
            row += [best.index[0], score(used["spearman"]), score(used["r2"])]
            row += [f"{np.sqrt(used['mse']):.4f}"]
        else:
            row += ["none: no signal", "–", "–", "–"]
        for name in tried:
            value = score(by_name["spearman"][name]) if name in by_name.index else "–"
            row.append(Html(f"<b>{esc(value)}</b>") if name in best.index else value)
        rows.append(row)
    head = ["target", "used", "Spearman", "R²", "error (bpb)", *tried]
    caption = "On held-out runs; the last columns are the Spearman correlation of each one tried"
    return table(caption, head, rows, (1,))


def cost(evidence: Evidence) -> Html:
    """What the runs took, by scale."""
    runs = evidence.runs
    if runs.empty:
        return missing("No run has ended yet.")
    rows = []
    for _, group in runs.groupby(["params", "tokens"]):
        params, tokens = group["params"].iloc[0], group["tokens"].iloc[0]
        rows.append([f"{short_count(params)} params, {short_count(tokens)} tokens", *spent(group)])
    if len(rows) > 1:
        rows.append(["all", *spent(runs)])
    head = ["scale", "runs", "tokens", "FLOPs", "run-seconds", "elapsed", "runs/hour", "device"]
    return table(
        "Failed runs count too; elapsed is from the first start to the last end", head, rows, (7,)
    )


def spent(runs: pd.DataFrame) -> list[str]:
    """Return runs, tokens, FLOPs, seconds, elapsed, rate and devices as words."""
    started = pd.to_datetime(runs["started"], utc=True, errors="coerce", format="ISO8601")
    finished = pd.to_datetime(runs["finished"], utc=True, errors="coerce", format="ISO8601")
    elapsed = (finished.max() - started.min()).total_seconds()
    known = np.isfinite(elapsed) and elapsed > 0
    devices = Counter(runs["device"].astype(str))
    return [
        str(len(runs)),
        # The tokens of a merged candidate are those of the run that it stands for.
        short_count(float(runs.loc[runs["kind"] != "merge", "tokens"].sum())),
        f"{runs['flops'].sum():.2e}",
        f"{runs['seconds'].sum():,.0f}",
        duration(elapsed) if known else "–",
        f"{len(runs) / elapsed * 3600:,.0f}" if known else "–",
        ", ".join(f"{device} ({count})" for device, count in devices.most_common()),
    ]


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def failures(evidence: Evidence) -> Html:
    """Every message once, with how often and where."""
    failed = evidence.failed
    if failed.empty:
        return paragraph(f"None of {len(evidence.runs)} runs failed.")
    rows = []
    for message, count in failed["failure"].value_counts().items():
        ids = list(failed.loc[failed["failure"] == message, "run_id"])
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        rows.append([count, message, ", ".join(ids[:5]) + more])
    share = f"{len(failed)} of {len(evidence.runs)} runs failed."
    return Html(
        paragraph(f"{share} They are left out of everything that was fitted.")
        + table("By message", ["runs", "message", "run ids"], rows, (1, 2))
    )


def provenance(evidence: Evidence) -> Html:
    """Where all this comes from."""
    runs, plan = evidence.runs, (evidence.plan or {}).get("provenance", {})
    used = evidence.fitted.table.run_ids if evidence.fitted else ()
    rows: list[tuple[str, str]] = [("store", evidence.store.url)]
    if len(runs):
        rows += [("corpus", ", ".join(sorted(set(runs["corpus"]))))]
        rows += [("code", ", ".join(sorted({c or "unknown" for c in runs["commit"]})))]
        record = evidence.store.get(used[0] if used else str(runs["run_id"].iloc[0]))
        software = ", ".join(f"{name} {v}" for name, v in sorted(record.versions.items()))
        rows += [("versions", f"{software} (of run {record.run_id})")]
        rows += [("records", f"{runs['started'].min()} to {runs['finished'].max()}")]
    rows += [
        ("runs", f"{len(runs)} recorded, {len(evidence.failed)} failed, {len(used)} fitted"),
        ("objective", json.dumps(evidence.objective, ensure_ascii=False)),
        ("report", f"rayx {__version__}"),
    ]
    rows += [(f"plan: {key}", str(plan[key])) for key in ("runs", "created") if key in plan]
    return table("Everything on this page comes from these records", ["what", "value"], rows, (1,))


def score(value: Any) -> str:
    """Return a correlation or R2."""
    return f"{value:.3f}" if np.isfinite(value) else "–"

"""Verification: was the choice right? The proof at a larger scale than the proxies'.

Each arm (the choice and what it must beat) is trained from the same seeds, so differences are
paired by seed; the spread over seeds within an arm is the noise that a gain must exceed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rayx.errors import StoreError
from rayx.mixture import Mixture, Schedule
from rayx.spec import TrainSpec
from rayx.store import Store

CHOICE = "choice"


def verification_specs(
    template: TrainSpec, arms: Mapping[str, Mixture], seeds: Sequence[int]
) -> dict[str, list[TrainSpec]]:
    """Return arm -> one spec a seed.

    Args:
        template: Scale, tokens and optimizer of the verification; its mixture is replaced.
        arms: Name -> mixture; equal mixtures share their runs.
        seeds: Seeds of initialisation and data order, the same for every arm.
    """
    return {
        arm: [
            dataclasses.replace(
                template,
                schedule=Schedule.constant(mixture, template.schedule.tokens),
                seed=seed,
                data_seed=seed,
            )
            for seed in seeds
        ]
        for arm, mixture in arms.items()
    }


def objective_bpb(losses: Mapping[str, float], objective: Mapping[str, float]) -> float:
    """Return the weighted mean of the targets' losses in bits per byte."""
    return sum(w * losses[t] for t, w in objective.items()) / sum(objective.values())


def compare(
    store: Store, arms: Mapping[str, Sequence[TrainSpec]], objective: Mapping[str, float]
) -> dict[str, Any]:
    """Compare the arms' measured losses.

    Args:
        store: Holds the records of all the specs.
        arms: As `verification_specs` made them; one must be named `choice`.
        objective: Target -> weight.

    Returns:
        Plain data: `objective`, `params`, `tokens`, `arms` (mixture, run_ids, objective_bpb and
        targets, one value a seed), `seed_sd_bpb` (pooled over arms), `comparisons` (baseline ->
        difference_bpb of the choice, its stderr_bpb, seeds_won, seeds) and a `verdict`.

    Raises:
        StoreError: A run has no result.
    """
    result: dict[str, Any] = {}
    for arm, specs in arms.items():
        records = [store.get(spec.run_id) for spec in specs]
        for record in records:
            if record.failure:
                raise StoreError(
                    f"Run {record.run_id} of arm {arm!r} failed: {record.failure.message}. "
                    "Run again with --retry-failed."
                )
        losses = [{t: loss.bpb for t, loss in r.losses.items()} for r in records]
        result[arm] = {
            "mixture": dict(specs[0].schedule.average()),
            "run_ids": [r.run_id for r in records],
            "objective_bpb": [objective_bpb(by_target, objective) for by_target in losses],
            "targets": {t: [by_target[t] for by_target in losses] for t in losses[0]},
        }
    template = arms[CHOICE][0]
    seeds = len(arms[CHOICE])
    seed_sd = math.nan
    if seeds > 1:
        variances = [np.var(values["objective_bpb"], ddof=1) for values in result.values()]
        seed_sd = math.sqrt(float(np.mean(variances)))
    comparisons = {}
    for arm, values in result.items():
        if arm == CHOICE:
            continue
        differences = np.array(result[CHOICE]["objective_bpb"]) - values["objective_bpb"]
        comparisons[arm] = {
            "difference_bpb": float(differences.mean()),
            "stderr_bpb": float(differences.std(ddof=1) / math.sqrt(seeds)) if seeds > 1 else None,
            "seeds_won": int((differences < 0).sum()),
            "seeds": seeds,
        }
    return {
        "objective": dict(objective),
        "params": template.model.params,
        "tokens": template.tokens,
        "arms": result,
        "seed_sd_bpb": None if math.isnan(seed_sd) else seed_sd,
        "comparisons": comparisons,
        "verdict": verdict(comparisons, seed_sd),
    }


def verdict(comparisons: Mapping[str, Mapping[str, Any]], seed_sd_bpb: float) -> str:
    """Return the outcome in one sentence, losses as plainly as wins."""
    parts = {True: [], False: []}
    for arm, c in comparisons.items():
        error = "" if c["stderr_bpb"] is None else f" ± {c['stderr_bpb']:.4f}"
        text = (
            f"{arm.replace('_', ' ')} by {abs(c['difference_bpb']):.4f}{error} bpb "
            f"({c['seeds_won']} of {c['seeds']} seeds)"
        )
        parts[c["difference_bpb"] < 0].append(text)
    sentences = []
    if parts[True]:
        sentences.append("the choice beat " + ", ".join(parts[True]))
    if parts[False]:
        sentences.append("it lost to " + ", ".join(parts[False]))
    text = "; ".join(sentences) or "there was nothing to compare with"
    noise = "" if math.isnan(seed_sd_bpb) else f"; seed noise is {seed_sd_bpb:.4f} bpb"
    return f"{text[0].upper()}{text[1:]}{noise}."

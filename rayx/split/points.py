"""Points of a split law: from the records of trunks and experts to (N, D, D', loss) rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from rayx.errors import FitError
from rayx.record import Record
from rayx.spec import TrainSpec


def split_points(records: Iterable[Record], domains: Sequence[str] | None = None) -> pd.DataFrame:
    """Return one row per model size, trunk and branch length, and seed.

    A run belongs here if its path is one mixture (no split) or one mixture and then one domain (an
    expert), and its rate was decayed: a trunk's undecayed loss compares with nothing.

    Args:
        records: Of any runs; those that are neither are left out.
        domains: Whose experts to average over; by default all that have one.

    Returns:
        Columns params, tokens (D), spec_tokens (D'), seed, loss (mean over domains of bits per
        byte), loss/<domain>. Rows that lack an expert are left out.

    Raises:
        FitError: There is no complete row, or the runs have several corpora or general mixtures.
    """
    losses: dict[tuple, dict[str, float]] = {}
    whole: dict[tuple, dict[str, float]] = {}
    kinds = set()
    for record in records:
        spec = record.spec
        if not isinstance(spec, TrainSpec):
            continue
        stages = _stages(spec)
        if record.status != "ok" or spec.optimizer.decay_share == 0.0 or len(stages) > 2:
            continue
        own = {target: loss.bpb for target, loss in record.losses.items()}
        key = (spec.model.params, stages[0][1], spec.seed)
        if len(stages) == 1:
            whole[(*key, 0)] = own
        elif len(stages[1][0]) == 1 and (domain := next(iter(stages[1][0]))) in own:
            losses.setdefault((*key, stages[1][1]), {})[domain] = own[domain]
        else:
            continue
        kinds.add((spec.corpus, spec.path[0].schedule.phases[0].mixture))
    if len(kinds) > 1:
        raise FitError(
            f"The runs have {len(kinds)} corpora or general mixtures; a split law is of one. "
            "Give the records of one study."
        )
    wanted = sorted({d for own in losses.values() for d in own}) if domains is None else domains
    rows = []
    for key, own in (losses | whole).items():
        if wanted and all(domain in own for domain in wanted):
            by_domain = {f"loss/{domain}": own[domain] for domain in wanted}
            rows.append(
                dict(zip(("params", "tokens", "seed", "spec_tokens"), key, strict=True))
                | {"loss": float(np.mean(list(by_domain.values())))}
                | by_domain
            )
    if not rows:
        raise FitError(
            "No trunk and branch lengths have an expert for every domain; expected runs as "
            "rayx.methods.optimal_split makes them."
        )
    order = ["params", "tokens", "spec_tokens", "seed"]
    return pd.DataFrame(rows).sort_values(order, ignore_index=True)


def _stages(spec: TrainSpec) -> list[tuple[dict[str, int], int]]:
    """The mixtures of the whole path in order, each with its tokens; equal neighbours are one."""
    stages: list[tuple[dict[str, int], int]] = []
    for ancestor, child in zip(spec.path, (*spec.path[1:], None), strict=True):
        steps = child.parent.steps if child is not None and child.parent else ancestor.steps
        left = steps * ancestor.batch_tokens
        for phase in ancestor.schedule.phases:
            taken = min(left, phase.tokens)
            left -= taken
            mixture = phase.mixture.millionths
            if stages and stages[-1][0] == mixture:
                stages[-1] = (mixture, stages[-1][1] + taken)
            elif taken:
                stages.append((mixture, taken))
    return stages

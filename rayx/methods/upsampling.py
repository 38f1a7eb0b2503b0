"""Domain upsampling at the end of training: which mixture for the last tokens, and for how many?

One trunk on the base mixture at a constant rate; from it branches, one for each final mixture and
each share of the tokens that it gets, all with the same decay and the same tokens in all. The best
by held-out text is the choice. The same trunk makes a data ablation cheap: leave one domain out of
the final phase only, and see which targets miss it.

Source: Blakeney et al. 2024, arXiv:2406.03476 (abstract: the final 5 to 30% of training, best at
    10-20%; ablation by removing a dataset from the final phase).
Differs: losses in place of benchmarks; WSD in place of a decay over the whole run, so that the
    trunk can be shared; several final mixtures.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rayx.corpus import Corpus
from rayx.errors import StoreError
from rayx.merging import Spec
from rayx.methods.dem import mean_loss
from rayx.mixture import Mixture, Phase, Schedule
from rayx.plan import Plan, provenance
from rayx.recipe import require
from rayx.schedules import on_trunk, schedule_epochs, switch_points, upsample_at_end, without
from rayx.spec import TrainSpec
from rayx.store import Store

BASE = "base"  # the name of no upsampling
Arm = tuple[str, float]  # name of the final mixture, its share of the tokens


@dataclass(frozen=True, kw_only=True)
class UpsamplingChoice:
    """What was chosen.

    Attributes:
        final: Name of the final mixture; BASE where none is better than the base to the end.
        share: Its share of the tokens; 0 for the base.
        schedule: The phases.
        switch: Where the mixture changes, as a share of the tokens; None for the base.
        loss: Objective on the text that chose, bits per byte.
        losses: Final mixture -> share, as text -> objective; infinite for a run that failed.
    """

    final: str
    share: float
    schedule: Schedule
    switch: float | None
    loss: float
    losses: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; the objective of a failed run is null."""
        losses = {
            final: {share: loss if math.isfinite(loss) else None for share, loss in row.items()}
            for final, row in self.losses.items()
        }
        exact = {"schedule": self.schedule.to_json(), "losses": losses}
        return dataclasses.asdict(self) | exact


@dataclass(frozen=True, kw_only=True)
class Upsampling:
    """What the last tokens of a run are tried on.

    Args:
        template: The whole run: its tokens, a WSD rate, and the evaluation that chooses. Report on
            another part of the text.
        base: Mixture before the final phase.
        finals: Name -> mixture of the final phase.
        objective: Target -> weight of its loss.
        shares: Of the tokens, for the final phase, in [0, 1); 0 is the base to the end.
    """

    template: TrainSpec
    base: Mixture
    finals: Mapping[str, Mixture]
    objective: Mapping[str, float]
    shares: tuple[float, ...] = (0.0, 0.05, 0.1, 0.2, 0.3)

    def __post_init__(self) -> None:
        names = tuple(self.finals)
        require(bool(names) and BASE not in names, "The names in Upsampling.finals", names,
                f"at least one, and not {BASE!r}, which is no upsampling")  # fmt: skip
        require(bool(self.objective), "Upsampling.objective", self.objective, "a target or more")
        for share in self.shares:
            require(0 <= share < 1, "A share in Upsampling.shares", share, "a number in [0, 1)")

    def schedule(self, final: str, share: float) -> Schedule:
        """Return the phases of an arm."""
        mixture = self.finals.get(final, self.base)
        return upsample_at_end(self.base, mixture, self.template.schedule.tokens, share)

    def runs(self) -> dict[Arm, TrainSpec]:
        """Return every arm's run, the base once; all are branches of one trunk."""
        arms: list[Arm] = [(BASE, 0.0)] if 0.0 in self.shares else []
        arms += [(final, share) for final in self.finals for share in self.shares if share > 0]
        return {arm: on_trunk(self.template, self.schedule(*arm)) for arm in arms}

    def decide(self, store: Store) -> UpsamplingChoice:
        """Return the arm with the least objective on the text of the template's evaluation.

        Raises:
            StoreError: A run has no record, or all failed.
        """
        loss: dict[Arm, float] = {
            arm: mean_loss(store.get(run.run_id).losses, self.objective)
            for arm, run in self.runs().items()
        }
        final, share = best = min(loss, key=lambda arm: loss[arm])
        if not math.isfinite(loss[best]):
            raise StoreError("All runs of the upsampling study failed; try a smaller rate.")
        schedule = self.schedule(final, share)
        table: dict[str, dict[str, float]] = {}
        for (name, part), value in loss.items():
            table.setdefault(name, {})[f"{part:g}"] = value
        return UpsamplingChoice(
            final=final,
            share=share,
            schedule=schedule,
            switch=next(iter(switch_points(schedule)), None),
            loss=loss[best],
            losses=table,
        )

    def ablations(self, final: str, share: float, whole: bool = False) -> dict[str, TrainSpec]:
        """Return domain -> the arm's run with that domain left out of the final phase.

        Args:
            final: A final mixture of two domains or more.
            share: Its share of the tokens, > 0.
            whole: Leave it out of the whole run: what the cheap ablation stands for.

        Raises:
            SpecError: The arm has no final phase, or one of a single domain.
        """
        ok = final in self.finals and share > 0
        require(ok, "The arm to ablate", (final, share),
                f"one of {', '.join(self.finals)} with a share > 0")  # fmt: skip
        *before, last = self.schedule(final, share).phases
        found = {}
        for domain in last.mixture:
            phases = [Phase(without(last.mixture, domain), last.tokens)]
            kept = [
                Phase(without(p.mixture, domain), p.tokens) if whole and domain in p.mixture else p
                for p in before
            ]
            found[domain] = on_trunk(self.template, Schedule((*kept, *phases)))
        return found

    def plan(self, choice: UpsamplingChoice, corpus: Corpus, store: Store) -> Plan:
        """Make the choice executable: a schedule with its switch point."""
        return Plan(
            schedule=choice.schedule,
            epochs=schedule_epochs(choice.schedule, corpus.tokens),
            domain_tokens={d: corpus.tokens[d] for d in corpus.domains},
            labels=corpus.mixture_labels(choice.schedule.average()),
            caps={},
            corpus=corpus.fingerprint,
            choice=choice.to_json(),
            provenance=provenance(store, [run.run_id for run in self.runs().values()]),
        )


def effects(store: Store, full: Spec, dropped: Mapping[str, Spec]) -> pd.DataFrame:
    """Return what leaving each domain out does to each target, bits per byte; > 0: it is missed.

    Args:
        store: Holds the records.
        full: The run, or its state on other text, with all domains.
        dropped: Domain -> the same without it.

    Returns:
        One row a domain and target: dropped, target, effect; nan where a run failed.
    """
    losses = store.get(full.run_id).losses
    rows = []
    for domain, spec in dropped.items():
        own = store.get(spec.run_id).losses
        for target, loss in losses.items():
            effect = own[target].bpb - loss.bpb if own else np.nan
            rows.append({"dropped": domain, "target": target, "effect": effect})
    return pd.DataFrame(rows)

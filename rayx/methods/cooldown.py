"""Cooldown: balanced sampling first, proportional sampling after, on a corpus of unequal domains.

Arms of equal tokens: proportional (tau 1), temperature sampling at a higher tau, uniform, the same
temperature by weights of the loss (scalarisation), and Cooldown (high tau, then 1) with two
controls that read as much of each domain: its reverse, and its average all along. What a small
domain gains from being read often, and what a large one loses, is said by groups of domains of low,
middle and high resources.

Source: Li et al. 2024, arXiv:2410.04579 (tau 5 for the first half, then 1; scalarisation).
Differs: losses in place of BLEU; the controls and uniform are added; schedules that begin alike
    share a trunk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from rayx.merging import Spec
from rayx.mixture import Schedule
from rayx.policies.scalarised import Scalarised
from rayx.recipe import require
from rayx.schedules import cooldown, on_trunk, schedule_epochs
from rayx.spec import TrainSpec
from rayx.store import Store

PROPORTIONAL, UNIFORM, COOLDOWN, REVERSED = "proportional", "uniform", "cooldown", "reversed"
SCALARISED, AVERAGE = "scalarised", "average"
GROUPS = ("high", "mid", "low")  # thirds of the domains, the largest first


@dataclass(frozen=True, kw_only=True)
class Cooldown:
    """The arms on one corpus.

    Args:
        template: The whole run: its tokens, a WSD rate, evaluation and seeds.
        tokens_by_domain: Domain -> training tokens that there are; three domains or more.
        tau: The high temperature, > 1.
        share: Of the tokens, for the first phase, in (0, 1).
        max_epochs: Most passes over a domain that an arm may take.
    """

    template: TrainSpec
    tokens_by_domain: Mapping[str, int]
    tau: float = 5.0
    share: float = 0.5
    max_epochs: float = float("inf")

    def __post_init__(self) -> None:
        require(self.tau > 1, "Cooldown.tau", self.tau, "a number > 1")
        require(0 < self.share < 1, "Cooldown.share", self.share, "a number in (0, 1)")
        found = tuple(self.tokens_by_domain)
        expected = f"at least {len(GROUPS)}, for groups {', '.join(GROUPS)}"
        require(len(found) >= len(GROUPS), "The domains of Cooldown", found, expected)

    def schedules(self) -> dict[str, Schedule]:
        """Return arm -> its phases.

        Raises:
            SpecError: An arm reads a domain more often than `max_epochs`.
        """
        two = self.share, 1.0 - self.share
        arms = {
            PROPORTIONAL: ((1.0,), (1.0,)),
            f"temperature {self.tau:g}": ((self.tau,), (1.0,)),
            UNIFORM: ((float("inf"),), (1.0,)),
            COOLDOWN: ((self.tau, 1.0), two),
            REVERSED: ((1.0, self.tau), two[::-1]),
        }
        tokens = self.template.schedule.tokens
        found = {a: cooldown(self.tokens_by_domain, tokens, *parts) for a, parts in arms.items()}
        found[AVERAGE] = Schedule.constant(found[COOLDOWN].average(), tokens)
        for schedule in found.values():
            schedule_epochs(schedule, self.tokens_by_domain, self.max_epochs)
        return found

    def runs(self) -> dict[str, TrainSpec]:
        """Return arm -> its run; those that begin at one temperature share a trunk."""
        schedules = self.schedules()
        found = {arm: on_trunk(self.template, schedule) for arm, schedule in schedules.items()}
        policy = Scalarised(taus=(self.tau,))
        found[f"{SCALARISED} {self.tau:g}"] = replace(
            self.template, schedule=schedules[PROPORTIONAL], policy=policy
        )
        return found

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return group -> its domains, as equal in number as can be."""
        ranked = sorted(self.tokens_by_domain, key=lambda d: -self.tokens_by_domain[d])
        parts = np.array_split(np.array(ranked, dtype=object), len(GROUPS))
        return {name: tuple(part) for name, part in zip(GROUPS, parts, strict=True)}

    def table(self, store: Store, arms: Mapping[str, Spec]) -> pd.DataFrame:
        """Return a row an arm: arm, loss (mean over domains), each group's and each domain's.

        Losses are bits per byte; nan where a run failed.

        Args:
            store: Holds the records.
            arms: Name -> run, or its state on other text.
        """
        rows = []
        for arm, spec in arms.items():
            losses = store.get(spec.run_id).losses
            bpb = {d: losses[d].bpb if losses else np.nan for d in self.tokens_by_domain}
            parts = {g: np.mean([bpb[d] for d in own]) for g, own in self.groups().items()}
            rows.append({"arm": arm, "loss": np.mean(list(bpb.values())), **parts, **bpb})
        return pd.DataFrame(rows)

"""Continued pretraining on a new domain: what keeps the old ones, and what does it cost?

Ways against forgetting, at equal tokens: replay of the old text, a lower rate, and training on the
base's own predictions beside the text (self-distillation), with or without Mix-CPT's logit swap.
Each arm is a point (general loss, domain loss); what counts is which arms no other dominates, and
how far each is from what replay alone reaches at the same general loss.

Source: Mix-CPT, Jiang et al. 2024, arXiv:2407.10804 (abstract only: a logit swap self-distillation
    constraint against forgetting); the comparison: derived.

Shapes: A arms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from rayx.errors import StoreError
from rayx.mixture import Mixture, Schedule
from rayx.recipe import is_number, require
from rayx.spec import Distillation, Parent, TrainSpec
from rayx.store import Store

REPLAY = "replay"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A way to continue.

    Attributes:
        ratio: The new domain's share of the tokens, in (0, 1]; the rest is replay.
        lr_share: Peak rate, as a share of the base's.
        share: Weight of the base's predictions in the loss, in [0, 1].
        swap: Whether the logits are swapped, see rayx.spec.Distillation.
        replay_only: Whether only replayed text is distilled.
    """

    ratio: float = 1.0
    lr_share: float = 1.0
    share: float = 0.0
    swap: bool = False
    replay_only: bool = False

    def __post_init__(self) -> None:
        for name in ("ratio", "lr_share"):
            value = getattr(self, name)
            ok = is_number(value) and 0 < value <= 1
            require(ok, f"Arm.{name}", value, "a share in (0, 1]")
        ok = is_number(self.share) and 0 <= self.share <= 1
        require(ok, "Arm.share", self.share, "a share in [0, 1]")
        require(self.share > 0 or not self.swap, "Arm.swap", self.swap, "False without a teacher")
        ok = not self.replay_only or (self.share > 0 and self.ratio < 1)
        require(ok, "Arm.replay_only", self.replay_only, "False without a teacher or replay")

    @property
    def family(self) -> str:
        """What it varies: `plain`, `replay`, `rate`, `distilled`, `swapped` or `both`."""
        if self.share and self.ratio < 1:
            return "both"
        if self.share:
            return "swapped" if self.swap else "distilled"
        if self.ratio < 1:
            return REPLAY
        return "rate" if self.lr_share < 1 else "plain"

    @property
    def name(self) -> str:
        """What it is, in words."""
        parts = [f"{1 - self.ratio:.0%} replay"] if self.ratio < 1 else []
        if self.lr_share < 1:
            parts.append(f"rate x {self.lr_share:g}")
        if self.share:
            parts.append(f"{'swapped' if self.swap else 'distilled'} {self.share:g}")
        if self.replay_only:
            parts.append("on replay")
        return ", ".join(parts) or "plain"


@dataclass(frozen=True, kw_only=True)
class MixCpt:
    """Continued pretraining of one base, by arms of equal tokens.

    Args:
        base: A finished run on the old domains alone.
        domain: The new one.
        tokens: Of each arm.
    """

    base: TrainSpec
    domain: str
    tokens: int

    def __post_init__(self) -> None:
        old = list(self.base.mixture)
        require(self.domain not in old, "MixCpt.domain", self.domain, f"none of the base's, {old}")

    def run(self, arm: Arm) -> TrainSpec:
        """Return the run of an arm: its own warm-up and decay, moments of the base."""
        end, old = Parent(self.base, self.base.steps), self.base.mixture
        mixture = {d: (1.0 - arm.ratio) * w for d, w in old.items()} | {self.domain: arm.ratio}
        optimizer, teacher = self.base.optimizer, None
        if arm.share:
            taught = tuple(old) if arm.replay_only else ()
            teacher = Distillation(teacher=end, share=arm.share, swap=arm.swap, domains=taught)
        return dataclasses.replace(
            self.base,
            schedule=Schedule.constant(Mixture(mixture), self.tokens),
            optimizer=dataclasses.replace(optimizer, lr=arm.lr_share * optimizer.lr),
            parent=end,
            distillation=teacher,
        )

    def outcomes(self, store: Store, arms: Sequence[Arm]) -> pd.DataFrame:
        """Return a row an arm: arm, family, seed, domain_loss, general_loss, gain, forgetting.

        Losses in bits per byte, the general one the mean over the base's domains; gain is the fall
        of the domain's loss since the base, forgetting the rise of the general one.

        Raises:
            StoreError: A run failed.
        """
        base_domain, base_general = self._losses(store, self.base)
        rows = []
        for arm in arms:
            domain, general = self._losses(store, self.run(arm))
            found = {"domain_loss": domain, "general_loss": general}
            change = {"gain": base_domain - domain, "forgetting": general - base_general}
            names = {"arm": arm.name, "family": arm.family, "seed": self.base.seed}
            rows.append(names | found | change)
        return pd.DataFrame(rows)

    def _losses(self, store: Store, run: TrainSpec) -> tuple[float, float]:
        losses = store.get(run.run_id).losses
        if not losses:
            raise StoreError(f"Run {run.run_id} failed; run again with --retry-failed.")
        general = [losses[d].bpb for d in self.base.mixture]
        return losses[self.domain].bpb, float(np.mean(general))


def on_front(outcomes: pd.DataFrame) -> np.ndarray:
    """Return which rows no other dominates in (domain_loss, general_loss), shape (A,), bool."""
    loss_A2 = outcomes[["domain_loss", "general_loss"]].to_numpy(float)
    no_worse_AA = (loss_A2[:, None] <= loss_A2[None]).all(axis=2)  # [a, b]: a no worse than b
    better_AA = (loss_A2[:, None] < loss_A2[None]).any(axis=2)
    return np.logical_not((no_worse_AA & better_AA).any(axis=0))


def less_replay(outcomes: pd.DataFrame) -> np.ndarray:
    """Return each row's domain loss less that of replay alone at the same general loss, shape (A,).

    Replay alone: a monotone cubic through the plain arm and all replay ratios of these rows;
    straight lines would lie above a convex curve and flatter the others. NaN where the general loss
    is outside them. Below 0 an arm is better than any share of replay.

    Source: derived; the cubic: Fritsch and Butland 1984 (scipy's PCHIP).
    """
    own = outcomes["family"].isin(["plain", REPLAY])
    line = outcomes.loc[own].sort_values("general_loss").drop_duplicates("general_loss")
    curve = PchipInterpolator(
        line["general_loss"].to_numpy(float), line["domain_loss"].to_numpy(float), extrapolate=False
    )
    return outcomes["domain_loss"].to_numpy(float) - curve(outcomes["general_loss"].to_numpy(float))


def best_within(outcomes: pd.DataFrame, forgetting: float) -> dict[str, str]:
    """Return family -> its arm of the largest gain that forgets at most so much, plain included.

    A family without such an arm has the one that forgets least.
    """
    chosen = {}
    plain = outcomes.loc[outcomes["family"] == "plain"]
    for family, own in outcomes.groupby("family"):
        rows = own if family == "plain" else pd.concat([own, plain])
        allowed = rows.loc[rows["forgetting"] <= forgetting]
        best = allowed.sort_values("gain").tail(1)
        if best.empty:
            best = rows.sort_values("forgetting").head(1)
        chosen[str(family)] = str(best["arm"].iloc[0])
    return chosen

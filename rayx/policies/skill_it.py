"""Skill-It: weight goes to domains that teach what is not yet learnt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.policies.mirror import ascend, check, floored, tells_apart
from rayx.policy import PARTS, Block, Blocks, Drops, Losses, Setting
from rayx.recipe import is_number, require


@dataclass(frozen=True, slots=True, kw_only=True)
class SkillIt:
    """Weights from a fixed matrix of what teaches what, and from the latest losses.

    p_j = prior_j exp(eta sum_i A_ij (L_i of the last `window` updates, summed)) / sum. A_ij is the
    relative fall of target i's loss after training on domain j alone, at least 0 and 1 at most.

    Attributes:
        skills: A, one row a target, one column a domain; both in the order of the run's schedule's
            domains. None to measure it in the run itself, after `start_share` of the steps, with
            `learn_steps` steps on each domain that do not move the run.
        eta: Per nat.
        window: Updates whose losses are summed.
        every_steps: Steps between updates.
        start_share: Share of the steps before A is measured, on the prior: a run that has just
            begun learns the same from every domain.
        learn_steps: Steps on each domain.
        part: Of the probes.
        sequences: Of each probe.
        floor: Least weight, as a share of the uniform one.

    Source: Chen et al. 2023, arXiv:2307.14430; released code (all losses 1 before the first).
    Differs: A may be measured in the run, not in runs of its own; it is then divided by its largest
        entry, for the published ones are 0, .5 and 1.
    """

    name: ClassVar[str] = "skill-it"
    skills: tuple[tuple[float, ...], ...] | None = None
    eta: float = 0.2
    window: int = 3
    every_steps: int = 100
    start_share: float = 0.1
    learn_steps: int = 10
    part: str = "first"
    sequences: int = 16
    floor: float = 1e-3

    def __post_init__(self) -> None:
        counts = ("window", "every_steps", "learn_steps", "sequences")
        check(self, counts=counts, positive=("eta",), shares=("start_share", "floor"))
        require(self.part in PARTS, "SkillIt.part", self.part, f"one of {', '.join(PARTS)}")
        rows = self.skills
        square = rows is None or (
            isinstance(rows, tuple)
            and all(isinstance(r, tuple) and len(r) == len(rows) for r in rows)
            and all(is_number(a) and a >= 0 for r in rows for a in r)
        )
        require(square, "SkillIt.skills", rows, "None, or a square of numbers >= 0 as tuples")

    def blocks(self, setting: Setting) -> Blocks:
        """Yield blocks of `every_steps` steps."""
        probes, prior_K = setting.probes(self.part, self.sequences), setting.prior_K
        losses, known, step = Losses(probes=probes), [], 0
        if self.skills is None:
            step = round(self.start_share * setting.steps)
            known = [(yield Block(prior_K, step, losses))]
            drops = Drops(
                sources=setting.each,
                probes=probes,
                steps=self.learn_steps,
                batch_sequences=setting.batch_sequences,
            )
            skills_KK = relative((yield Block(prior_K, 0, drops)), known[0])
        else:
            skills_KK = np.array(self.skills)
            expected = f"{len(prior_K)}, one a domain of the run"
            require(
                len(self.skills) == len(prior_K), "Rows of SkillIt.skills", self.skills, expected
            )
        weights_K = prior_K
        while True:
            recent_K = np.sum(known[-self.window :], axis=0) if known else np.ones(len(prior_K))
            score_K = recent_K @ skills_KK
            if tells_apart(score_K, self.name, step):
                weights_K = floored(ascend(prior_K, score_K, self.eta), self.floor)
            known.append((yield Block(weights_K, self.every_steps, losses)))
            step += self.every_steps


def relative(drop_KK: np.ndarray, before_K: np.ndarray) -> np.ndarray:
    """Return A_ij = max(0, fall of loss i after domain j / loss i) over the largest, (K, K)."""
    share_KK = np.maximum(0.0, drop_KK / before_K[:, None])
    largest = share_KK.max()
    return share_KK / largest if largest > 0 else share_KK

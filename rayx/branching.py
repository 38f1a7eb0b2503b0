"""Branching: runs that share a trunk.

Under a WSD schedule the rate is constant until the decay, so one trunk trained at a constant rate
serves every run that differs later: each leaves it where its own decay begins or where its mixture
changes, whichever comes first. The branch is equal, to the bit, to the same run trained in one go.
"""

from __future__ import annotations

import dataclasses

from rayx.errors import SpecError
from rayx.mixture import Mixture, Phase, Schedule
from rayx.spec import LrSchedule, Parent, TrainSpec


def make_trunk(template: TrainSpec, mixture: Mixture, tokens: int) -> TrainSpec:
    """Return the run that branches leave: `mixture` at a constant rate after the warm-up.

    Args:
        template: Model, optimizer, corpus and seeds; its warm-up is kept in steps.
        mixture: What the trunk is trained on.
        tokens: Its length; no branch can leave it later.
    """
    schedule = Schedule.constant(mixture, tokens)
    steps = round(tokens / template.batch_tokens)
    warmup = round(template.optimizer.warmup_share * template.steps)
    optimizer = dataclasses.replace(
        template.optimizer,
        lr_schedule=LrSchedule.WSD,
        warmup_share=min(1.0, warmup / max(1, steps)),
        decay_share=0.0,
    )
    return dataclasses.replace(
        template,
        schedule=schedule,
        optimizer=optimizer,
        evaluation=dataclasses.replace(template.evaluation, points=1),
    )


def make_branch(
    trunk: TrainSpec,
    trunk_tokens: int,
    phases: tuple[Phase, ...],
    decay_share: float,
) -> TrainSpec:
    """Return a run of `trunk_tokens` on the trunk's mixture and then `phases`, WSD over all of it.

    The rate falls linearly over the last decay_share of trunk_tokens + the phases' tokens. Where
    that begins before the phases do, the branch itself goes on with the trunk's mixture first.

    Args:
        trunk: As `make_trunk` makes it.
        trunk_tokens: Tokens before the phases, rounded to steps; 0 for a run without a trunk.
        phases: What follows; empty for the trunk's mixture to the end.
        decay_share: In (0, 1).

    Raises:
        SpecError: The branch would leave during the warm-up or after the trunk's end, or is empty.
    """
    batch = trunk.batch_tokens
    if not 0.0 < decay_share < 1.0:
        raise SpecError(f"decay_share is {decay_share}; expected a share in (0, 1).")
    before = round(trunk_tokens / batch)
    steps = [max(1, round(phase.tokens / batch)) for phase in phases]
    total = before + sum(steps)
    if total == 0:
        raise SpecError(f"A branch of {trunk_tokens} trunk tokens and no phases trains nothing.")
    decay = max(1, round(decay_share * total))
    leave = min(before, total - decay)
    warmup = round(trunk.optimizer.warmup_share * trunk.steps)
    tail = [Phase(phase.mixture, n * batch) for phase, n in zip(phases, steps, strict=True)]
    if before > leave:
        tail.insert(0, Phase(trunk.schedule.phases[0].mixture, (before - leave) * batch))
    if leave and not warmup <= leave <= trunk.steps:
        raise SpecError(
            f"A branch would leave its trunk after {leave * batch:,} tokens; expected "
            f"{warmup * batch:,} (the warm-up) to {trunk.steps * batch:,} (its end)."
        )
    length = total - leave
    optimizer = dataclasses.replace(
        trunk.optimizer,
        warmup_share=0.0 if leave else warmup / length,
        decay_share=decay / length,
    )
    return dataclasses.replace(
        trunk,
        schedule=Schedule(tuple(tail)),
        optimizer=optimizer,
        parent=Parent(trunk, leave) if leave else None,
    )

"""What a sweep will take, from a short calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from rayx.corpus import Corpus
from rayx.merging import MergeSpec, Spec
from rayx.spec import ModelShape, TrainSpec
from rayx.sweep.calibrate import gpu_pack_size, timed
from rayx.sweep.packs import with_ancestors
from rayx.sweep.run import Placement
from rayx.sweep.trial import TrainPack

CALIBRATION_SECONDS = 1.0  # of steps


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a sweep will take."""

    runs: int
    tokens: int
    flops: float
    seconds: float  # of one process, packs one after another


def estimate(
    specs: Sequence[Spec], corpus: Corpus, train_pack: TrainPack, placement: Placement
) -> Estimate:
    """Estimate a sweep's cost from a short calibration here, for each shape of run.

    Differences of short runs give the time of a step (over about a second of steps), of one
    evaluation and of the set-up. A merged candidate takes one evaluation of its experts' shape.
    """
    device = "cuda" if placement.gpus else "cpu"
    seconds = 0.0
    groups: dict[str, list[TrainSpec]] = {}
    every = with_ancestors(specs)
    trained = [spec for spec in every if isinstance(spec, TrainSpec)]
    evaluation_seconds: dict[ModelShape, float] = {}  # of one sequence a target
    for spec in trained:
        groups.setdefault(spec.pack_key, []).append(spec)
    for group in groups.values():
        together = 1
        if placement.gpus:
            together = placement.pack_size or gpu_pack_size(group, corpus, train_pack)
        pack, spec = group[:together], group[0]
        seconds_of = partial(timed, train_pack, pack, corpus, device)
        seconds_of(1)  # warms caches
        base = seconds_of(2)
        more = max(4, min(100, round(CALIBRATION_SECONDS / max(1e-3, (seconds_of(6) - base) / 4))))
        step = max(0.0, seconds_of(2 + more) - base) / more
        evaluation = max(0.0, seconds_of(2, spec.evaluation.sequences) - base)
        whole = base + step * (spec.steps - 2) + evaluation * spec.evaluation.points
        seconds += whole * len(group) / len(pack)
        evaluation_seconds[spec.model] = evaluation / spec.evaluation.sequences
    for spec in every:
        if isinstance(spec, MergeSpec):
            seconds += evaluation_seconds[spec.model] * spec.evaluation.sequences
    tokens, flops = sum(s.tokens for s in trained), sum(s.flops for s in trained)
    return Estimate(len(every), tokens, flops, seconds)

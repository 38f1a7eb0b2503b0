"""How many runs a trial trains, where nobody says."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import ray

from rayx.corpus import Corpus
from rayx.mixture import Schedule
from rayx.spec import Evaluation, TrainSpec
from rayx.store import Store
from rayx.sweep.cluster import connect
from rayx.sweep.trial import TrainPack

if TYPE_CHECKING:
    from rayx.sweep.run import Placement

log = logging.getLogger(__name__)

TRIAL_SECONDS = 0.25  # that a trial costs beside its runs
TRIAL_SHARE = 0.015  # of the time of its runs, at most
CORE_FLOPS = 5e10  # per second of training, of a core of 2023
SHAPE_PACKS = 16  # packs of a shape, at least, for processes to share evenly
ROUND_PACK_SIZE = 16  # on a GPU, of a shape that only a later round has
GROWTH = 2
WORTH = 1.1  # times as fast a larger pack has to be for a still larger one to be tried
CALIBRATION_STEPS = 12
CALIBRATION_SECONDS = 120.0  # after which no larger pack is tried


class PackSizes:
    """How many runs a trial trains, for runs of one shape: the same whenever they are asked for.

    What was measured on a GPU is kept in the store.

    Attributes:
        busy: Trials of this sweep hold the GPUs, so that nothing can be measured.
    """

    def __init__(
        self, placement: Placement, corpus: Corpus, store: Store, train_pack: TrainPack
    ) -> None:
        self.placement, self.corpus = placement, corpus
        self.store, self.train_pack = store, train_pack
        self.busy = False

    def __call__(self, specs: Sequence[TrainSpec]) -> int:
        """Return the size for these runs, all that there are of their pack_key."""
        if not self.placement.gpus:
            return cpu_pack_size(specs)
        key = hashlib.sha256(specs[0].pack_key.encode()).hexdigest()[:12]
        name = f"calibration/{key}.json"
        known = self.store.facts(name)
        if known is None:
            known = {"pack_size": ROUND_PACK_SIZE if self.busy else self._measured(specs)}
            self.store.write_json(name, known)
        return known["pack_size"]

    def _measured(self, specs: Sequence[TrainSpec]) -> int:
        """Measure on a node that has what a trial asks for."""
        connect(self.placement)
        task = ray.remote(gpu_pack_size).options(
            num_cpus=self.placement.cpus, num_gpus=self.placement.gpus
        )
        size = ray.get(task.remote(specs, self.corpus, self.train_pack))
        log.info("%d runs a trial go fastest on a GPU", size)
        return size


def cpu_pack_size(specs: Sequence[TrainSpec]) -> int:
    """Return how many of these runs of one shape a trial trains on a CPU, one after another.

    So many that the trial's own cost does not count, while packs stay small enough to be shared
    evenly. A function of the specs alone: a sweep that is run again has the same packs.
    """
    run_seconds = specs[0].flops / CORE_FLOPS
    worth = TRIAL_SECONDS / TRIAL_SHARE / run_seconds
    return max(1, min(round(worth), len(specs) // SHAPE_PACKS))


def gpu_pack_size(specs: Sequence[TrainSpec], corpus: Corpus, train_pack: TrainPack) -> int:
    """Return how many of these runs of one shape train fastest together on the GPU here.

    Packs of 1, 2, 4, 8 ... are timed over a few steps until a larger one is hardly faster or memory
    is full; half of what just fits is taken at most.
    """

    def seconds(size: int) -> float:
        pack = specs[:size]
        few, more = (timed(train_pack, pack, corpus, "cuda", n) for n in (2, CALIBRATION_STEPS))
        return max(1e-6, more - few)

    timed(train_pack, specs[:1], corpus, "cuda", 1)  # warms up
    return fastest_size(seconds, len(specs))


def fastest_size(seconds: Callable[[int], float], largest: int) -> int:
    """Return the size of the pack that does most runs in a second.

    Args:
        seconds: Returns the time of a pack of a size; raises torch's OutOfMemoryError.
        largest: Size beyond which there are no runs.
    """
    began, rates, size = time.monotonic(), {}, 1
    while size <= largest and time.monotonic() - began < CALIBRATION_SECONDS:
        try:
            rates[size] = size / seconds(size)
        except RuntimeError as error:  # torch is not imported here
            if type(error).__name__ != "OutOfMemoryError":
                raise
            rates.pop(size // GROWTH, None)  # it just fits, perhaps
            break
        if rates[size] < WORTH * rates.get(size // GROWTH, 0.0):
            break
        size *= GROWTH
    return max(rates, key=lambda tried: rates[tried], default=1)


def timed(
    train_pack: TrainPack,
    specs: Sequence[TrainSpec],
    corpus: Corpus,
    device: str,
    steps: int,
    sequences: int = 1,
) -> float:
    """Return the seconds of so few steps of a pack, with one evaluation, without any policy."""
    short = [
        dataclasses.replace(
            spec,
            schedule=Schedule.constant(spec.schedule.average(), steps * spec.batch_tokens),
            evaluation=Evaluation(points=1, sequences=sequences),
            parent=None,
            policy=None,
            distillation=None,
        )
        for spec in specs
    ]
    facts: dict[str, Any] = {"pack_id": "", "commit": "", "device": device}
    began = time.perf_counter()
    train_pack(short, corpus, **facts, on_progress=lambda tokens: None)
    return time.perf_counter() - began

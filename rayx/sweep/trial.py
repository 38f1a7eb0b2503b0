"""A trial: one pack, done inside a Tune actor that is used again for the next.

Ray Train's local mode (ScalingConfig(num_workers=0)) runs the one training loop in the actor's own
process, which costs 0.1-0.2 s a pack where a fresh worker group costs 30 s. Merged candidates are
only evaluated: their experts lie in Ray's object store, once a node, for all its trials.
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from types import MappingProxyType
from typing import Any, Protocol

import ray
from ray import train, tune
from ray.exceptions import RayError, RayTaskError
from ray.train.torch import TorchTrainer

from rayx.corpus import Corpus
from rayx.errors import StoreError, UnreachableError
from rayx.merging import MergeSpec, Spec
from rayx.record import Failure, Record
from rayx.spec import Parent, TrainSpec
from rayx.store import Store, open_store

BEAT_SECONDS = 2.0
SETS_HELD = 4  # expert sets that the shelf keeps in Ray's object store


class TrainPack(Protocol):
    """The training loop that a sweep is given (`rayx.proxy.train_pack`)."""

    def __call__(
        self,
        specs: Sequence[TrainSpec],
        corpus: Corpus,
        *,
        pack_id: str,
        commit: str,
        device: str,
        on_progress: Callable[[int], None],
        store: Store | None = None,
        keep: Mapping[str, Sequence[int]] = MappingProxyType({}),
    ) -> list[Record]: ...


class Merges(Protocol):
    """What loads and evaluates merged candidates (`rayx.proxy.merge.candidates.Merges`)."""

    def load(self, specs: Sequence[MergeSpec], store: Store) -> Any:
        """Return the experts of specs of one expert set: arrays that Ray shares without a copy."""
        ...

    def evaluate(
        self,
        specs: Sequence[MergeSpec],
        experts: Any,
        corpus: Corpus,
        *,
        pack_id: str,
        commit: str,
        device: str,
    ) -> Iterator[Record]:
        """Yield the record of each candidate as soon as it is evaluated."""
        ...


class Shelf:
    """An actor that reads expert sets from the store and holds them in Ray's object store."""

    def __init__(self, store_url: str, merges: Merges) -> None:
        self.store = open_store(store_url)
        self.merges = merges
        self.held: dict[str, Any] = {}

    def experts(self, specs: Sequence[MergeSpec]) -> list[Any]:
        """Return the reference of an expert set, in a list so that Ray does not follow it."""
        key = ",".join(parent.checkpoint for parent in specs[0].parents)
        if key not in self.held:
            self.held[key] = ray.put(self.merges.load(specs, self.store))
            if len(self.held) > SETS_HELD:
                del self.held[next(iter(self.held))]
        return [self.held[key]]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a trial needs beside its pack; none of it can change a result."""

    store_url: str
    corpus_url: str
    train_pack: TrainPack
    merges: Merges | None
    shelf: Any  # handle of a Shelf
    commit: str


class PackTrial(tune.Trainable):
    """Trains, or evaluates, what is missing of one pack and writes the records."""

    def setup(  # pyright: ignore[reportIncompatibleMethodOverride]: from with_parameters
        self, config: dict[str, Any], surroundings: Surroundings
    ) -> None:
        """Open the store and the corpus once for all packs of this actor."""
        self.surroundings = surroundings
        self.store = open_store(surroundings.store_url)
        self.corpus: Corpus | None = None
        self.node = ray.get_runtime_context().get_node_id()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take the next pack in the same process."""
        return True

    def step(self) -> dict[str, Any]:
        """Do one pack to the end.

        An exception in a run becomes its failure record, so that it burns no try and takes no
        other run with it. The death of the process, or an exception elsewhere, is left to `Tries`,
        which knows from the heartbeat what was in progress and where.
        """
        pack_id, self.keep = self.config["pack"], self.config["runs"]
        specs = [
            spec
            for spec in self.store.get_pack(pack_id)
            if spec.run_id in self.keep and not self._is_done(spec)
        ]
        merged = [spec for spec in specs if isinstance(spec, MergeSpec)]
        trained = [spec for spec in specs if isinstance(spec, TrainSpec)]
        if merged:
            for group in [[spec] for spec in merged] if self.config["alone"] else [merged]:
                self._evaluate_all(pack_id, group)
        if trained:
            trainer = TorchTrainer(
                lambda: self._train_all(pack_id, trained),
                scaling_config=train.ScalingConfig(num_workers=0),
            )
            trainer.fit()
        with contextlib.suppress(FileNotFoundError):
            self.store.remove(f"heartbeats/{pack_id}.json")
        return {"runs": len(specs), "done": True}

    def _is_done(self, spec: Spec) -> bool:
        """Whether an earlier try of this pack got through with the run."""
        wanted = []
        if isinstance(spec, TrainSpec):
            wanted = [Parent(spec, step).checkpoint for step in self.keep[spec.run_id]]
        return all(map(self.store.exists, (f"records/{spec.run_id}.json", *wanted)))

    def _train_all(self, pack_id: str, specs: list[TrainSpec]) -> None:
        device = "cuda" if ray.get_gpu_ids() else "cpu"
        if device == "cuda" and not self.config["alone"]:
            self._train(pack_id, specs, device)
        else:
            # On a CPU a batch of 2, 4, 8 runs went at 1.0, 0.97, 0.75 times the speed of the same
            # runs in turn (width 64, one core), and in turn each is on record as soon as it ends.
            for spec in specs:
                if not self._is_done(spec):  # another driver at the same sweep may have done it
                    self._train(pack_id, [spec], device)

    def _train(self, pack_id: str, specs: list[TrainSpec], device: str) -> None:
        self._beat(pack_id, specs, 0)
        try:
            records = self.surroundings.train_pack(
                specs,
                self._corpus(),
                pack_id=pack_id,
                commit=self.surroundings.commit,
                device=device,
                on_progress=lambda tokens: self._beat(pack_id, specs, tokens),
                store=self.store,
                keep=self.keep,
            )
        except UnreachableError:  # no fault of the run: its pack is tried again
            raise
        except Exception as error:  # the worker's edge: whatever it is, it goes on record
            if len(specs) > 1:
                # One run may have broken its pack: alone, only the culprit fails.
                for spec in specs:
                    self._train(pack_id, [spec], device)
                return
            failure = failure_of(error)
            records = [failed_record(specs[0], failure, pack_id, self.surroundings.commit)]
        for record in records:
            # A parent that was trained again for its checkpoint keeps the record that it has.
            if not self.store.exists(f"records/{record.run_id}.json"):
                self.store.put(record)

    def _evaluate_all(self, pack_id: str, specs: Sequence[MergeSpec]) -> None:
        ended: set[str] = set()
        self._beat(pack_id, specs, 0)
        beaten = time.monotonic()
        try:
            merges = self.surroundings.merges
            assert merges is not None, "run_sweep refuses merged candidates without it"
            records = merges.evaluate(
                specs,
                self._experts(merges, specs),
                self._corpus(),
                pack_id=pack_id,
                commit=self.surroundings.commit,
                device="cuda" if ray.get_gpu_ids() else "cpu",
            )
            for record in records:
                if not self.store.exists(f"records/{record.run_id}.json"):
                    self.store.put(record)
                ended.add(record.run_id)
                if time.monotonic() - beaten > BEAT_SECONDS:
                    beaten = time.monotonic()
                    self._beat(pack_id, specs, 0)
        except UnreachableError:
            raise
        except Exception as error:  # as in _train
            left = [spec for spec in specs if spec.run_id not in ended]
            if len(specs) > 1:
                for spec in left:
                    self._evaluate_all(pack_id, [spec])
                return
            failure = failure_of(error)
            self.store.put(failed_record(left[0], failure, pack_id, self.surroundings.commit))

    def _experts(self, merges: Merges, specs: Sequence[MergeSpec]) -> Any:
        """Return the pack's experts from this node's object store, or else from the store."""
        try:
            return ray.get(ray.get(self.surroundings.shelf.experts.remote(specs[:1]))[0])
        except RayTaskError as error:  # what `load` raised
            raise error.as_instanceof_cause() from None
        except RayError:  # the shelf's node has gone
            return merges.load(specs, self.store)

    def _corpus(self) -> Corpus:
        if self.corpus is None:
            self.corpus = Corpus.load(self.surroundings.corpus_url)
        return self.corpus

    def _beat(self, pack_id: str, specs: Sequence[Spec], tokens: int) -> None:
        # A heartbeat that cannot be written must not cost the pack; its records will be.
        run_ids = [spec.run_id for spec in specs]
        with contextlib.suppress(StoreError):
            self.store.beat(
                f"heartbeats/{pack_id}", runs=run_ids, tokens_per_run=tokens, node=self.node
            )


def failure_of(error: Exception) -> Failure:
    """Return what a run's exception says."""
    return Failure(
        type=type(error).__name__,
        message=str(error) or type(error).__name__,
        traceback="".join(traceback.format_exception(error)),
    )


def failed_record(spec: Spec, failure: Failure, pack_id: str, commit: str) -> Record:
    """Return the record of a run that raised, or that was given up."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Record(
        spec=spec,
        curve=(),
        epochs={},
        tokens=0,
        flops=0.0,
        seconds=0.0,
        pack_id=pack_id,
        pack_runs=1,
        device="",
        versions={},
        commit=commit,
        started=now,
        finished=now,
        failure=failure,
    )

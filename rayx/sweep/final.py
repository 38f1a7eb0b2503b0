"""The final run: a few large runs, one after the other, each on all workers of one Train group.

With no workers the loop runs in this process (Ray Train's local mode), else in a worker group that
is started once, for a start takes half a minute. The group is started again where a worker dies,
and goes on from the state that rank 0 wrote last; so does the same call after the driver died.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ray import train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from rayx.corpus import Corpus
from rayx.errors import RayxError, SpecError, StoreError, SweepError
from rayx.record import Record
from rayx.spec import Parent, TrainSpec
from rayx.store import Store, open_store
from rayx.sweep.cluster import capacity, needs, reach
from rayx.sweep.packs import with_ancestors
from rayx.sweep.run import Placement, absolute, check, git_commit
from rayx.sweep.watcher import Watcher

log = logging.getLogger(__name__)

PARTS = 2  # of a batch, so that one worker rounds as two do
TRIES = 3  # of a group whose worker dies, beyond the first
# A group starts faster without what it does not need, and dead workers are seen at once.
ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "600",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Workers:
    """What trains the final run; none of it can change a result beyond rounding.

    Attributes:
        count: Worker processes; 0 for this process.
        cpus: Of a worker.
        gpu: Whether each worker has a GPU.
        shard: Spread parameters, gradients and moments over the workers (FSDP2).
        address: Of a Ray cluster; None: RAY_ADDRESS, else a Ray of our own.
    """

    count: int = 0
    cpus: float = 1.0
    gpu: bool = False
    shard: bool = False
    address: str | None = None

    def __post_init__(self) -> None:
        if self.count < 0 or self.cpus <= 0:
            raise SweepError(
                f"The final run asks for {self.count} workers of {self.cpus} CPUs; expected "
                "workers >= 0 and CPUs > 0."
            )
        if self.shard and not self.count:
            raise SweepError("Sharding needs worker processes; give --workers 1 or more.")

    @property
    def device(self) -> str:
        """Device of each worker."""
        return "cuda" if self.gpu else "cpu"


class TrainRun(Protocol):
    """The training loop (`rayx.proxy.train_pack`) as workers call it, all of them together."""

    def __call__(
        self,
        specs: Sequence[TrainSpec],
        corpus: Corpus,
        *,
        pack_id: str,
        commit: str,
        device: str,
        on_progress: Callable[[int], None],
        store: Store,
        keep: Mapping[str, Sequence[int]],
        shard: bool,
        parts: int,
        state_seconds: float | None,
    ) -> list[Record]: ...


def kept_steps(specs: Sequence[TrainSpec]) -> dict[str, list[int]]:
    """Return run_id -> steps after which a checkpoint is kept: branch points, and final models."""
    steps: dict[str, set[int]] = {spec.run_id: {spec.steps} for spec in specs}
    for spec in with_ancestors(specs):
        for parent in spec.parents:
            steps.setdefault(parent.spec.run_id, set()).add(parent.steps)
    return {run_id: sorted(found) for run_id, found in steps.items()}


def check_final(specs: Sequence[TrainSpec], corpus: Corpus, workers: Workers) -> None:
    """Refuse runs that cannot be trained on this corpus, or not by these workers.

    Raises:
        SpecError: The corpus lacks something, the batch does not divide by the workers, or several
            of them would have to share a policy or a teacher.
    """
    check(specs, corpus, None)
    for spec in with_ancestors(specs):
        assert isinstance(spec, TrainSpec), "final runs are trained"
        spec.optimizer.worker_sequences(max(1, workers.count))
        if workers.count > 1 and (spec.policy or spec.distillation):
            what = "policy" if spec.policy else "teacher"
            raise SpecError(
                f"Run {spec.run_id} has a {what}, which {workers.count} workers cannot share; "
                "train it with --workers 1."
            )


def train_final(
    specs: Sequence[TrainSpec],
    corpus: Corpus,
    store: Store,
    train_run: TrainRun,
    *,
    workers: Workers | None = None,
    retry_failed: bool = False,
    state_seconds: float | None = None,
) -> dict[str, str]:
    """Train runs one after the other, parents first, and keep the final models' checkpoints.

    Called again it goes on where it was interrupted, also with another number of workers.

    Args:
        specs: The final runs.
        corpus: What they train on; all nodes must see its path.
        store: Where records and checkpoints go; all nodes must see its path.
        train_run: The training loop, `rayx.proxy.train_pack`.
        workers: What trains them; by default this process.
        retry_failed: Also train again what has failed.
        state_seconds: Between the states from which a run that died goes on; None: its default.

    Returns:
        run_id -> `ok` or `failed` for the runs and their ancestors; those that a failed parent
        left without a start are missing.

    Raises:
        SpecError: A run cannot be trained; nothing was started.
        SweepError: The cluster cannot hold the workers, or they died again and again.
    """
    workers = workers or Workers()
    check_final(specs, corpus, workers)
    every = [spec for spec in with_ancestors(specs) if isinstance(spec, TrainSpec)]
    keep = kept_steps(specs)
    status = store.status()
    todo, failed = [], set()
    for spec in every:
        checkpoints = [Parent(spec, step).checkpoint for step in keep[spec.run_id]]
        known = None if retry_failed else status.get(spec.run_id)
        if known == "failed" or any(parent.spec.run_id in failed for parent in spec.parents):
            failed.add(spec.run_id)
        elif known != "ok" or not all(map(store.exists, checkpoints)):
            todo.append(spec)
    if todo:
        loop = _Loop(
            todo=todo,
            keep=keep,
            workers=workers,
            store_url=absolute(store.url),
            corpus_url=absolute(corpus.url),
            train_run=train_run,
            commit=git_commit(),
            state_seconds=state_seconds,
        )
        _work(loop, every, store, corpus)
    status = store.status()
    return {spec.run_id: status[spec.run_id] for spec in every if spec.run_id in status}


def _work(loop: _Loop, every: Sequence[TrainSpec], store: Store, corpus: Corpus) -> None:
    workers = loop.workers
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # the watcher says what goes on
    if workers.count:
        _connect(workers)
    tokens = {spec.run_id: spec.tokens for spec in every}
    sweep_id = hashlib.sha256(",".join(sorted(tokens)).encode()).hexdigest()[:12]
    todo = {spec.run_id for spec in loop.todo}
    before = sum(count for run_id, count in tokens.items() if run_id not in todo)
    facts = {"tokens": tokens, "tokens_before": before, "started": time.time()}
    store.write_json(f"sweeps/{sweep_id}.json", {**facts, "corpus": corpus.url})
    # A fresh name an attempt: an old one would be restored instead of started.
    folder = f"{store.root}/train/{uuid.uuid4().hex[:12]}"
    trainer = TorchTrainer(
        loop,
        scaling_config=ScalingConfig(
            num_workers=workers.count,
            use_gpu=workers.gpu and workers.count > 0,
            resources_per_worker={"CPU": workers.cpus, **({"GPU": 1} if workers.gpu else {})},
        ),
        run_config=RunConfig(
            name="final",
            storage_path=folder,
            storage_filesystem=store.filesystem,
            failure_config=FailureConfig(max_failures=TRIES),
        ),
    )
    watcher = Watcher(store, sweep_id)
    watcher.start()
    try:
        trainer.fit()
    except WorkerGroupError as error:
        raise _failure(error) from error
    except TrainingFailedError as error:
        raise SweepError(f"The final run stopped: {error}. Run it again to go on.") from error
    finally:
        watcher.stop()
        store.beat(f"drivers/{sweep_id}", state="stopped")
        store.compact()
        if workers.count:
            with contextlib.suppress(FileNotFoundError):
                store.filesystem.delete_dir(folder)


def _failure(error: WorkerGroupError) -> RayxError:
    """Return what ended the run for good, from whichever worker says it best."""
    causes = [getattr(e, "_base_exc", e) for e in error.worker_failures.values()]
    for cause in causes:
        if isinstance(cause, RayxError):
            return cause
    ranks = ", ".join(map(str, error.worker_failures))
    return SweepError(
        f"Workers {ranks} failed, the last of {TRIES + 1} tries with: {causes[0]!r}. What was "
        "trained up to the last state is kept: run it again to go on (out of memory is the usual "
        "cause; more workers with --shard help)."
    )


def _connect(workers: Workers) -> None:
    """Connect to Ray, or start one, and see that it can hold the group.

    Raises:
        SweepError: The cluster cannot be reached, or is too small.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    reach(workers.address, dashboard=True)  # which Train's cleaner asks again and again
    worker = Placement(cpus=workers.cpus, gpus=float(workers.gpu))
    room = capacity(worker)
    if room < workers.count:
        raise SweepError(
            f"{workers.count} workers of {needs(worker)} were asked for, and the cluster has room "
            f"for {room}. Ask for fewer workers, or fewer CPUs of each."
        )


@dataclass(frozen=True)
class _Loop:
    """What every worker runs: all runs that are left, in step with the others."""

    todo: list[TrainSpec]
    keep: dict[str, list[int]]
    workers: Workers
    store_url: str
    corpus_url: str
    train_run: TrainRun
    commit: str
    state_seconds: float | None
    __name__: str = field(default="final", repr=False)

    def __call__(self) -> None:
        store, corpus = open_store(self.store_url), Corpus.load(self.corpus_url)
        rank = train.get_context().get_world_rank() if self.workers.count else 0
        for spec in self.todo:
            # All ranks find the same: none can end this run before all have begun it.
            if self._done(store, spec):
                continue

            def beat(tokens: int, spec: TrainSpec = spec) -> None:
                try:
                    store.beat(
                        f"heartbeats/{spec.run_id}", runs=[spec.run_id], tokens_per_run=tokens
                    )
                except StoreError as error:  # the run is worth more than its heartbeat
                    log.warning("heartbeat: %s", error)

            record = self.train_run(
                [spec],
                corpus,
                pack_id=spec.run_id,
                commit=self.commit,
                device=self.workers.device,
                on_progress=beat,
                store=store,
                keep=self.keep,
                shard=self.workers.shard,
                parts=PARTS if spec.optimizer.batch_sequences % PARTS == 0 else 1,
                state_seconds=self.state_seconds,
            )[0]
            if rank == 0:
                # A parent that was trained again for its checkpoint keeps the record that it has.
                if not store.exists(f"records/{spec.run_id}.json"):
                    store.put(record)
                if store.exists(f"heartbeats/{spec.run_id}.json"):
                    store.remove(f"heartbeats/{spec.run_id}.json")
            if record.failure:
                return  # its branches have nothing to start from

    def _done(self, store: Store, spec: TrainSpec) -> bool:
        checkpoints = [Parent(spec, step).checkpoint for step in self.keep[spec.run_id]]
        return all(map(store.exists, (f"records/{spec.run_id}.json", *checkpoints)))

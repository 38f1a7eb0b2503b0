"""Run a sweep: what is missing in the store is trained on Ray, pack by pack."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import tune

from rayx.corpus import Corpus
from rayx.errors import SpecError, SweepError
from rayx.mixture import Schedule, epochs
from rayx.progress import duration, progress, progress_line
from rayx.spec import Evaluation, TrainSpec
from rayx.store import Store
from rayx.sweep.packs import PackSearcher, form_packs
from rayx.sweep.trial import PackTrial, Surroundings, TrainPack
from rayx.sweep.watcher import Watcher

log = logging.getLogger(__name__)

CALIBRATION_SECONDS = 1.0  # of steps, in an estimate
TRIES = 3  # of a pack whose process dies, beyond the first


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and how a sweep runs; none of it can change a result beyond rounding."""

    address: str | None = None  # of a Ray cluster; None: RAY_ADDRESS, else a Ray of our own
    pack_size: int = 2  # runs of a trial; give more on a GPU, where they train together
    cpus: float = 1.0  # of a trial
    gpus: float = 0.0  # of a trial
    elastic: bool = False  # an autoscaler may still bring nodes that fit

    def __post_init__(self) -> None:
        if self.pack_size < 1:
            raise SweepError(f"pack_size is {self.pack_size}; expected an integer >= 1.")
        if self.cpus <= 0 or self.gpus < 0:
            raise SweepError(
                f"A trial asks for {self.cpus} CPUs and {self.gpus} GPUs; expected CPUs > 0 and "
                "GPUs >= 0."
            )


def check(specs: Sequence[TrainSpec], corpus: Corpus, max_epochs: float | None) -> None:
    """Refuse specs that cannot be trained on this corpus.

    Raises:
        SpecError: No specs, another corpus, an unknown domain, a vocabulary smaller than the
            tokenizer's, or more than `max_epochs` passes over a domain.
    """
    if not specs:
        raise SpecError("The sweep has no specs; the experiment's specs() returned none.")
    for spec in specs:
        who = f"Run {spec.run_id}"
        if spec.corpus != corpus.fingerprint:
            raise SpecError(
                f"{who} is for corpus {spec.corpus}, but {corpus.url} holds {corpus.fingerprint}. "
                "Make the specs from the corpus that is given."
            )
        if spec.model.vocab_size < corpus.vocab_size:
            raise SpecError(
                f"{who} has a vocabulary of {spec.model.vocab_size}, the corpus' tokenizer one of "
                f"{corpus.vocab_size}. Set ModelShape.vocab_size to at least that."
            )
        average = spec.schedule.average()
        average.check(corpus.domains, f"corpus {corpus.url}")
        if max_epochs is None:
            continue
        for domain, passes in epochs(average, spec.tokens, corpus.tokens).items():
            if passes > max_epochs * 1.01:  # whole batches may round a cap up a little
                raise SpecError(
                    f"{who} passes {passes:.2f} times over domain {domain!r} "
                    f"({corpus.tokens[domain]:,} tokens); at most {max_epochs} are allowed. Cap "
                    "its weight (supply_caps), train on fewer tokens, or raise max_epochs."
                )


def run_sweep(
    specs: Sequence[TrainSpec],
    corpus: Corpus,
    store: Store,
    train_pack: TrainPack,
    *,
    placement: Placement | None = None,
    max_epochs: float | None = None,
    retry_failed: bool = False,
) -> dict[str, str]:
    """Train the specs that have no record yet.

    Running it again runs only what is missing. A driver that is killed loses nothing that was
    recorded; a worker that dies costs at most its pack, which is started again.

    Args:
        specs: The runs wanted; equal ones are run once.
        corpus: What they train on; all nodes must see its path.
        store: Where records go; all nodes must see its path.
        train_pack: The training loop, `rayx.proxy.train_pack`.
        placement: The cluster and the size of a trial.
        max_epochs: Refuse specs that pass over a domain more often.
        retry_failed: Also run again what has failed.

    Returns:
        run_id -> `ok` or `failed` for every spec.

    Raises:
        SpecError: A spec cannot be trained; nothing was started.
        SweepError: The cluster cannot hold a trial, or packs died again and again.
    """
    placement = placement or Placement()
    specs = list({spec.run_id: spec for spec in specs}.values())
    check(specs, corpus, max_epochs)
    # Reading the records, not only listing them, finds damaged ones: those runs are redone.
    ended = {record.run_id: record.status for record in store.records()}
    if retry_failed:
        ended = {run_id: status for run_id, status in ended.items() if status == "ok"}
    missing = frozenset(spec.run_id for spec in specs) - ended.keys()
    if missing:
        for run_id in missing & set(store.names("records")):
            store.remove(f"records/{run_id}.json")  # damaged, or it would be read above
        packs = {
            pack_id: members
            for pack_id, members in form_packs(specs, placement.pack_size).items()
            if any(spec.run_id in missing for spec in members)
        }
        for pack_id, members in packs.items():
            store.put_pack(pack_id, members)
        log.info("%d of %d runs to do, in %d packs", len(missing), len(specs), len(packs))
        _train(specs, missing, list(packs), corpus, store, train_pack, placement)
    status = store.status()
    lost = [spec.run_id for spec in specs if spec.run_id not in status]
    if lost:
        raise SweepError(
            f"{len(lost)} of {len(specs)} runs have no record (first: {lost[0]}): the sweep was "
            f"interrupted, or their processes died {TRIES + 1} times each (see Ray's logs; out of "
            "memory is the usual cause, then a smaller pack_size helps). Run again to go on."
        )
    return {spec.run_id: status[spec.run_id] for spec in specs}


def _train(
    specs: list[TrainSpec],
    missing: frozenset[str],
    packs: list[str],
    corpus: Corpus,
    store: Store,
    train_pack: TrainPack,
    placement: Placement,
) -> None:
    connect(placement)
    sweep_id = hashlib.sha256(",".join(sorted(s.run_id for s in specs)).encode()).hexdigest()[:12]
    tokens = {spec.run_id: spec.tokens for spec in specs}
    store.write_json(
        f"sweeps/{sweep_id}.json",
        {
            "tokens": tokens,
            "tokens_before": sum(n for run_id, n in tokens.items() if run_id not in missing),
            "started": time.time(),
            "corpus": corpus.url,
        },
    )
    watcher = Watcher(store, sweep_id)
    watcher.start()
    surroundings = Surroundings(
        absolute(store.url), absolute(corpus.url), train_pack, git_commit(), missing
    )
    trainable = tune.with_resources(
        tune.with_parameters(PackTrial, surroundings=surroundings),
        {"cpu": placement.cpus, "gpu": placement.gpus},
    )
    # Results are read from our store alone, so Tune's own files are thrown away.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    try:
        with tempfile.TemporaryDirectory(prefix="rayx-tune-") as scratch:
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=PackSearcher(packs), num_samples=-1, reuse_actors=True
                ),
                run_config=tune.RunConfig(
                    storage_path=scratch,
                    name="sweep",
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=TRIES),
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            ).fit()
    finally:
        watcher.stop()
        store.beat(f"drivers/{sweep_id}", state="stopped")
        store.compact()
        state = progress(store, sweep_id)
        log.info("%s in %s", progress_line(state), duration(state["seconds"]))


def connect(placement: Placement) -> None:
    """Connect to Ray, or start one that lives as long as this process.

    Raises:
        SweepError: The cluster cannot be reached, or no node can hold a trial.
    """
    if not ray.is_initialized():
        address = placement.address or os.environ.get("RAY_ADDRESS")
        try:
            if address:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            else:
                # No worker group starts in local mode, so nothing polls the dashboard.
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SweepError(
                f"Cannot connect to Ray at {address!r}: {error}. Check the address, and that "
                "RAY_AUTH_MODE=token is set where the cluster asks for a token."
            ) from error
    wanted = {"CPU": placement.cpus, "GPU": placement.gpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not placement.elastic and not any(
        all(node.get(kind, 0) >= amount for kind, amount in wanted.items()) for node in nodes
    ):
        offers = "; ".join(f"{n.get('CPU', 0):g} CPU, {n.get('GPU', 0):g} GPU" for n in nodes)
        raise SweepError(
            f"A trial needs {placement.cpus:g} CPU and {placement.gpus:g} GPU on one node; the "
            f"nodes offer {offers}. Ask for less, or use --elastic where an autoscaler brings more."
        )


def git_commit() -> str:
    """Return the commit of the working directory, with `+dirty` where it was changed, or ''."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+dirty" if changed else "")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a sweep will take."""

    runs: int
    tokens: int
    flops: float
    seconds: float  # of one process, packs one after another


def estimate(
    specs: Sequence[TrainSpec], corpus: Corpus, train_pack: TrainPack, placement: Placement
) -> Estimate:
    """Estimate a sweep's cost from a short calibration here, for each shape of run.

    Differences of short runs give the time of a step (over about a second of steps), of one
    evaluation and of the set-up.
    """
    together = placement.pack_size if placement.gpus else 1
    device = "cuda" if placement.gpus else "cpu"
    seconds = 0.0
    groups: dict[str, list[TrainSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.pack_key, []).append(spec)
    for group in groups.values():
        pack, spec = group[:together], group[0]

        def timed(steps: int, sequences: int = 1, pack: list[TrainSpec] = pack) -> float:
            short = [
                dataclasses.replace(
                    s,
                    schedule=Schedule.constant(s.schedule.average(), steps * s.batch_tokens),
                    evaluation=Evaluation(points=1, sequences=sequences),
                )
                for s in pack
            ]
            began = time.perf_counter()
            train_pack(
                short, corpus, pack_id="", commit="", device=device, on_progress=lambda tokens: None
            )
            return time.perf_counter() - began

        timed(1)  # warms caches
        base = timed(2)
        more = max(4, min(100, round(CALIBRATION_SECONDS / max(1e-3, (timed(6) - base) / 4))))
        step = max(0.0, timed(2 + more) - base) / more
        evaluation = max(0.0, timed(2, spec.evaluation.sequences) - base)
        whole = base + step * (spec.steps - 2) + evaluation * spec.evaluation.points
        seconds += whole * len(group) / len(pack)
    return Estimate(len(specs), sum(s.tokens for s in specs), sum(s.flops for s in specs), seconds)


def absolute(url: str) -> str:
    """Return a path that means the same in any process; URLs stay as they are."""
    return url if "://" in url else str(Path(url).resolve())

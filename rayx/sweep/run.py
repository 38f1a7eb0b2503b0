"""Run a sweep: what is missing in the store is trained on Ray, pack by pack."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import tune

from rayx.corpus import Corpus
from rayx.errors import SpecError, SweepError
from rayx.merging import MergeSpec, Spec
from rayx.progress import ALIVE_SECONDS, duration, progress, progress_line
from rayx.spec import TrainSpec
from rayx.steering import check_policy
from rayx.store import Store
from rayx.sweep.calibrate import PackSizes
from rayx.sweep.cluster import MAX_AHEAD, Room, connect, needs
from rayx.sweep.loggers import RunLoggers
from rayx.sweep.packs import Pack, PackSearcher, missing_packs, with_ancestors
from rayx.sweep.scheduler import InTurn
from rayx.sweep.secrets import forward_no_credentials
from rayx.sweep.trial import Merges, PackTrial, Shelf, Surroundings, TrainPack
from rayx.sweep.tries import Attention, Tries
from rayx.sweep.watcher import Watcher

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where and how a sweep runs; none of it can change a result beyond rounding."""

    address: str | None = None  # of a Ray cluster; None: RAY_ADDRESS, else a Ray of our own
    pack_size: int | None = None  # runs of a trial; None: found, see rayx.sweep.calibrate
    cpus: float = 1.0  # of a trial
    gpus: float = 0.0  # of a trial
    elastic: bool = False  # an autoscaler may still bring nodes that fit

    def __post_init__(self) -> None:
        if self.pack_size is not None and self.pack_size < 1:
            raise SweepError(f"pack_size is {self.pack_size}; expected an integer >= 1.")
        if self.cpus <= 0 or self.gpus < 0:
            raise SweepError(
                f"A trial asks for {self.cpus} CPUs and {self.gpus} GPUs; expected CPUs > 0 and "
                "GPUs >= 0."
            )


def check(specs: Sequence[Spec], corpus: Corpus, max_epochs: float | None) -> None:
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
        corpus.check_mixture(spec.mixture)
        if isinstance(spec, TrainSpec):
            check_policy(spec, corpus)
        if max_epochs is None:
            continue
        for domain, tokens in spec.domain_tokens.items():
            passes = tokens / corpus.tokens[domain]
            if passes > max_epochs * 1.01:  # whole batches may round a cap up a little
                raise SpecError(
                    f"{who} passes {passes:.2f} times over domain {domain!r} "
                    f"({corpus.tokens[domain]:,} tokens); at most {max_epochs} are allowed. Cap "
                    "its weight (supply_caps), train on fewer tokens, or raise max_epochs."
                )


def run_sweep(
    specs: Sequence[Spec],
    corpus: Corpus,
    store: Store,
    train_pack: TrainPack,
    *,
    merges: Merges | None = None,
    placement: Placement | None = None,
    max_epochs: float | None = None,
    retry_failed: bool = False,
    propose: Callable[[], Sequence[Spec]] = lambda: (),
    keep_checkpoints: bool = False,
    log_to: Sequence[str] = (),
) -> dict[str, str]:
    """Train, or merge and evaluate, the specs that have no record yet.

    Running it again runs only what is missing. A driver that is killed loses nothing that was
    recorded; a worker that dies costs at most its pack, which is started again. Parents are trained
    before their branches and experts before their merges, also those that nobody asked for, and
    each starts as soon as its checkpoints are there. When the sweep has ended, the checkpoints that
    it needed are dropped.

    Args:
        specs: What is wanted, trained or merged; equal ones are run once.
        corpus: What they train on; all nodes must see its path.
        store: Where records go; all nodes must see its path.
        train_pack: The training loop, `rayx.proxy.train_pack`.
        merges: Loads and evaluates merged candidates, `rayx.proxy.merge.candidates.Merges()`.
        placement: The cluster and the size of a trial.
        max_epochs: Refuse specs that pass over a domain more often.
        retry_failed: Also run again what has failed.
        propose: Called when all runs known so far have ended (a round); returns the runs of the
            next round, or none to end. A function of the records and a seed gives the same rounds
            however often the sweep is interrupted.
        keep_checkpoints: Leave them for `drop_checkpoints`; trunks are then not trained again.
        log_to: Experiment trackers that each run is shown to, see `rayx.sweep.loggers`.

    Returns:
        run_id -> `ok` or `failed` for every spec, those proposed included.

    Raises:
        SpecError: A spec cannot be trained; nothing was started.
        SweepError: The cluster can never hold a trial, or the sweep was interrupted.
    """
    sweep = _Sweep(corpus, store, placement or Placement(), max_epochs, merges, train_pack)

    def next_round() -> list[Pack]:
        """Return what is missing of the next round; rounds that are all on record are passed."""
        while new := [spec for spec in propose() if spec.run_id not in sweep.asked]:
            if packs := sweep.add(new, retry_failed):
                return packs
        return []

    loggers = RunLoggers(log_to, store)
    try:
        packs = sweep.add(specs, retry_failed) or next_round()
        if packs:
            _work(sweep, packs, train_pack, next_round, loggers)
    finally:
        loggers.close(sweep.asked)
    status = store.status()
    lost = [run_id for run_id in sweep.asked if run_id not in status]
    if lost:
        raise SweepError(
            f"{len(lost)} of {len(sweep.asked)} runs have no record (first: {lost[0]}): the sweep "
            "was interrupted. Run again to go on."
        )
    if not keep_checkpoints:
        drop_checkpoints(list(sweep.asked.values()), store)
    return {run_id: status[run_id] for run_id in sweep.asked}


def drop_checkpoints(specs: Sequence[Spec], store: Store) -> None:
    """Remove the checkpoints that these specs and their ancestors start from."""
    for name in {p.checkpoint for spec in with_ancestors(specs) for p in spec.parents}:
        if store.exists(name):
            store.remove(name)


class _Sweep:
    """What is asked for so far, and the packs that it takes."""

    def __init__(
        self,
        corpus: Corpus,
        store: Store,
        placement: Placement,
        max_epochs: float | None,
        merges: Merges | None,
        train_pack: TrainPack,
    ) -> None:
        self.corpus, self.store, self.placement = corpus, store, placement
        self.max_epochs, self.merges = max_epochs, merges
        self.sizes = PackSizes(placement, corpus, store, train_pack)
        self.asked: dict[str, Spec] = {}
        self.sweep_id = ""

    def add(self, specs: Sequence[Spec], retry_failed: bool) -> list[Pack]:
        """Ask for further runs; return the packs of those that have no record."""
        new = {spec.run_id: spec for spec in specs}
        check(list(new.values()), self.corpus, self.max_epochs)
        if self.merges is None and any(isinstance(spec, MergeSpec) for spec in specs):
            raise SpecError("The sweep has merged candidates; give run_sweep `merges`.")
        self.asked |= new
        # Reading the records, not only listing them, finds damaged ones: those runs are redone.
        wanted = {spec.run_id for spec in with_ancestors(list(new.values()))}
        found = self.store.records(sorted(wanted & self.store.status().keys()))
        ended = {record.run_id: record.status for record in found}
        if retry_failed:
            ended = {run_id: status for run_id, status in ended.items() if status == "ok"}
        size = self.placement.pack_size or self.sizes
        packs = missing_packs(list(new.values()), size, ended, self.store.exists)
        runs = {run_id for pack in packs for run_id in pack.runs}
        for run_id in (runs - ended.keys()) & set(self.store.names("records")):
            self.store.remove(f"records/{run_id}.json")  # damaged, or it would be read above
        for pack in packs:
            self.store.put_pack(pack.pack_id, pack.specs)
        if packs:
            parents = len(runs - new.keys())
            log.info(
                "%d of %d runs to do and %d parents, in %d packs",
                len(runs) - parents, len(new), parents, len(packs),
            )  # fmt: skip
            self._announce(runs)
        return packs

    def _work_tokens(self, spec: Spec) -> int:
        """Return what a spec costs in tokens of training: a forward pass is a third of a step."""
        if isinstance(spec, TrainSpec):
            return spec.tokens
        return len(self.corpus.targets) * spec.evaluation.sequences * spec.model.context // 3

    def _announce(self, missing: Iterable[str]) -> None:
        """Write what is asked for, and how much of it was done before."""
        every = with_ancestors(list(self.asked.values()))
        tokens = {spec.run_id: self._work_tokens(spec) for spec in every}
        known = self.store.facts(f"sweeps/{self.sweep_id}.json") if self.sweep_id else None
        if known is None:
            ids = ",".join(sorted(tokens))
            self.sweep_id = hashlib.sha256(ids.encode()).hexdigest()[:12]
            before = sum(tokens.values()) - sum(tokens[run_id] for run_id in missing)
            known = {"tokens_before": before, "started": time.time(), "corpus": self.corpus.url}
        self.store.write_json(f"sweeps/{self.sweep_id}.json", {**known, "tokens": tokens})


def _work(
    sweep: _Sweep,
    packs: list[Pack],
    train_pack: TrainPack,
    more: Callable[[], list[Pack]],
    loggers: RunLoggers,
) -> None:
    store, placement = sweep.store, sweep.placement
    forward_no_credentials()
    connect(placement)
    sweep.sizes.busy = True
    other = store.facts(f"drivers/{sweep.sweep_id}.json") or {}
    if other.get("state") == "running" and time.time() - other["time"] < ALIVE_SECONDS:
        log.warning("another driver is at this sweep, or was just now: the last packs come first")
        packs = packs[::-1]  # so that the two meet once, where else they would do all twice
    watcher = Watcher(store, sweep.sweep_id)
    watcher.start()
    url = absolute(store.url)
    shelf = sweep.merges and ray.remote(num_cpus=0)(Shelf).remote(url, sweep.merges)
    surroundings = Surroundings(
        url, absolute(sweep.corpus.url), train_pack, sweep.merges, shelf, git_commit()
    )
    trainable = tune.with_resources(
        tune.with_parameters(PackTrial, surroundings=surroundings),
        {"cpu": placement.cpus, "gpu": placement.gpus},
    )
    # Results are read from our store alone, so Tune's own files are thrown away.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(MAX_AHEAD)  # the searcher asks for fewer
    # Ours says what is missing, also where an autoscaler may bring it.
    os.environ["TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S"] = "1e9"
    os.environ["TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S_AUTOSCALER"] = "1e9"
    tries = Tries(store, surroundings.commit)
    searcher = PackSearcher(packs, store.exists, more, Room(placement), tries.died)
    try:
        with tempfile.TemporaryDirectory(prefix="rayx-tune-") as scratch:
            tune.Tuner(
                trainable,
                tune_config=tune.TuneConfig(
                    search_alg=searcher,
                    scheduler=InTurn(),
                    num_samples=-1,
                    reuse_actors=True,
                ),
                run_config=tune.RunConfig(
                    storage_path=scratch,
                    name="sweep",
                    verbose=0,
                    callbacks=[loggers, Attention(searcher, needs(placement))],
                    checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                ),
            ).fit()
    finally:
        watcher.stop()
        store.beat(f"drivers/{sweep.sweep_id}", state="stopped")
        store.compact()
        state = progress(store, sweep.sweep_id)
        log.info("%s in %s", progress_line(state), duration(state["seconds"]))


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


def absolute(url: str) -> str:
    """Return a path that means the same in any process; URLs stay as they are."""
    return url if "://" in url else str(Path(url).resolve())

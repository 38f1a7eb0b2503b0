"""Packs whose try died: which are tried again, and when one is given up."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from pathlib import Path
from typing import Any

import ray
from ray import tune

from rayx.errors import StoreError
from rayx.record import Failure
from rayx.store import Store
from rayx.sweep.packs import Pack, PackSearcher
from rayx.sweep.trial import failed_record

log = logging.getLogger(__name__)

TRIES = 3  # of a pack whose process dies, beyond the first
NODE_LOSSES = 20  # of a pack, so that one that kills its machine does not go on for ever
IDLE_SECONDS = 60.0  # without a running trial, until that is said, and said again
NODE_DIED = "its node has died"  # Ray's words on an actor that went with its node
UNKNOWN = "is temporarily unavailable"  # its words where it lost sight of an actor a second ago
VERDICT_SECONDS = 20.0  # in which Ray finds out that a node has gone


class Tries:
    """Decides on each death: a node that went is nobody's fault, a process that died may be.

    Spot machines come and go, so their loss is not counted (up to NODE_LOSSES). A pack that dies
    more than TRIES times on nodes that live on is given up: the runs in progress when it last died
    become failures, the others go on. Runs that trained as one batch are first tried alone.
    """

    def __init__(self, store: Store, commit: str) -> None:
        self._store, self._commit = store, commit
        self._deaths: dict[str, list[str | None]] = {}  # pack_id -> node of each, None: unknown
        self._losses: dict[str, int] = {}  # pack_id -> nodes that went

    def died(self, pack: Pack, why: str) -> Pack | None:
        """Return the pack to try again, without what was given up; None if nothing is left.

        Args:
            pack: What the try was to do.
            why: Ray's or Python's words on it.
        """
        beat = self._last_beat(pack.pack_id)
        deaths = self._deaths.setdefault(pack.pack_id, [])
        if NODE_DIED in why:
            self._losses[pack.pack_id] = self._losses.get(pack.pack_id, 0) + 1
        else:
            deaths.append(beat.get("node"))
        counted = _on_living_nodes(deaths)
        if counted > TRIES and UNKNOWN in why:
            deadline = time.monotonic() + VERDICT_SECONDS
            while _on_living_nodes(deaths[-1:]) and time.monotonic() < deadline:
                time.sleep(0.5)
            counted = _on_living_nodes(deaths)
        lost = self._losses.get(pack.pack_id, 0) + len(deaths) - counted
        log.info("pack %s died (%d, %d nodes lost)", pack.pack_id, counted, lost)
        if counted <= TRIES and lost <= NODE_LOSSES:
            return pack
        self._deaths.pop(pack.pack_id)
        self._losses.pop(pack.pack_id, None)
        running = [run_id for run_id in beat.get("runs", pack.runs) if run_id in pack.runs]
        if len(running) > 1 and beat and not pack.alone:
            return dataclasses.replace(pack, alone=True)
        self._give_up(pack, running, counted, lost, why)
        left = {run_id: steps for run_id, steps in pack.runs.items() if run_id not in running}
        return dataclasses.replace(pack, runs=left) if left else None

    def _last_beat(self, pack_id: str) -> dict[str, Any]:
        """Return and remove the heartbeat of a try, so that the next one's is its own."""
        name = f"heartbeats/{pack_id}.json"
        with contextlib.suppress(StoreError, OSError):
            beat = self._store.facts(name)
            if beat is not None:
                self._store.remove(name)
                return beat
        return {}

    def _give_up(self, pack: Pack, runs: list[str], died: int, lost: int, why: str) -> None:
        message = (
            f"Its process died {died} times, and {lost} nodes went with it. Out of memory is the "
            "usual cause, then a smaller pack_size helps; Ray's logs know more."
        )
        failure = Failure(type="ProcessDied", message=message, traceback=why)
        ended = self._store.status()
        for spec in pack.specs:
            if spec.run_id in runs and ended.get(spec.run_id) != "ok":
                log.warning("run %s is given up: %s", spec.run_id, message)
                self._store.put(failed_record(spec, failure, pack.pack_id, self._commit))


def _on_living_nodes(deaths: list[str | None]) -> int:
    """Return how many of the nodes are alive, or not known."""
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return sum(node is None or node in alive for node in deaths)


class Attention(tune.Callback):
    """Tells the searcher why a trial died, and people that nothing runs."""

    def __init__(self, searcher: PackSearcher, needs: str) -> None:
        self._searcher, self._needs = searcher, needs
        self._running: set[str] = set()
        self._last: Any = None  # the trial that ended last
        self._idle_since = self._said = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Note that something runs."""
        self._running.add(trial.trial_id)

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Note that it has ended."""
        self._ended(trial, trials)

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Hand on what Tune wrote about the error; a searcher hears only that there was one."""
        self._ended(trial, trials)
        why = Path(trial.error_file).read_text() if trial.error_file else ""
        self._searcher.on_trial_death(trial.trial_id, why)

    def on_step_begin(self, iteration: int, trials: list, **info: Any) -> None:
        """Say now and then that nothing runs: a node may never come."""
        now = time.monotonic()
        if not self._running and now - max(self._idle_since, self._said) > IDLE_SECONDS:
            self._said = now
            seconds = now - self._idle_since
            log.warning("no trial for %.0f s: each needs %s on one node", seconds, self._needs)

    def _ended(self, trial: Any, trials: list) -> None:
        self._running.discard(trial.trial_id)
        self._idle_since = time.monotonic()
        # Results are in the store. Tune's own keep growing: statistics of each metric, and, when
        # all is done, a look at each trial of its list, which must not be empty then.
        trial.run_metadata.metric_analysis, trial.run_metadata.metric_n_steps = {}, {}
        if self._last in trials:
            trials.remove(self._last)
        self._last = trial

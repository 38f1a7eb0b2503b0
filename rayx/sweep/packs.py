"""Which runs train together and what they need, and the Searcher that hands packs to Tune."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.search import Searcher

from rayx.spec import TrainSpec


@dataclass(frozen=True, slots=True)
class Pack:
    """Runs of one pack_key that one trial trains.

    Attributes:
        pack_id: Hash of the run_ids of all its specs.
        specs: All its runs.
        runs: run_id -> steps after which to keep a checkpoint; of the runs to train, not of those
            that are on record already.
        needs: Checkpoints that must be in the store before it starts.
    """

    pack_id: str
    specs: tuple[TrainSpec, ...]
    runs: Mapping[str, Sequence[int]]
    needs: tuple[str, ...]


def form_packs(specs: Sequence[TrainSpec], pack_size: int) -> dict[str, list[TrainSpec]]:
    """Group runs of equal pack_key, in the order given, `pack_size` at a time.

    Packs depend on the specs alone, never on what is already done: a sweep that is run again
    trains a missing run in the same company, and so to the same bits.

    Returns:
        pack_id (hash of its run_ids) -> specs.
    """
    groups: dict[str, list[TrainSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.pack_key, []).append(spec)
    packs = {}
    for group in groups.values():
        for start in range(0, len(group), pack_size):
            members = group[start : start + pack_size]
            ids = ",".join(spec.run_id for spec in members)
            packs[hashlib.sha256(ids.encode()).hexdigest()[:12]] = members
    return packs


def with_ancestors(specs: Sequence[TrainSpec]) -> list[TrainSpec]:
    """Return the specs and all their ancestors once each, every parent before its branches."""
    found = {ancestor.run_id: ancestor for spec in specs for ancestor in spec.path}
    return sorted(found.values(), key=lambda spec: len(spec.path))


def missing_packs(
    specs: Sequence[TrainSpec],
    pack_size: int,
    ended: Mapping[str, str],
    exists: Callable[[str], bool],
) -> list[Pack]:
    """Return the packs with something to do, parents before branches.

    A run is to be trained if it has no record, or if it is the parent of one that is to be trained
    and its checkpoint is gone; a parent that failed is not tried again.

    Args:
        specs: The runs asked for.
        pack_size: Runs of a pack.
        ended: run_id -> `ok` or `failed` of the runs on record.
        exists: Whether the store has a checkpoint.
    """
    every = with_ancestors(specs)
    asked = {spec.run_id for spec in specs}
    runs: dict[str, set[int]] = {run_id: set() for run_id in asked - ended.keys()}
    for spec in reversed(every):
        parent = spec.parent
        if spec.run_id not in runs or parent is None or exists(parent.checkpoint):
            continue
        if ended.get(parent.spec.run_id) != "failed":
            runs.setdefault(parent.spec.run_id, set()).add(parent.steps)
    packs = []
    for pack_id, members in form_packs(every, pack_size).items():
        chosen = [spec for spec in members if spec.run_id in runs]
        if chosen:
            needs = {spec.parent.checkpoint for spec in chosen if spec.parent}
            keep = {spec.run_id: sorted(runs[spec.run_id]) for spec in chosen}
            packs.append(Pack(pack_id, tuple(members), keep, tuple(sorted(needs))))
    return packs


class PackSearcher(Searcher):
    """Suggests packs one by one, branches once their parents' checkpoints are there.

    Tune copies configs into names and state files, so specs stay in the store. What is done is
    also known from the store alone: `save` and `restore` carry nothing.

    Args:
        packs: The packs in the order in which to train them.
        exists: Whether the store has a checkpoint.
        more: Called when all packs have ended; returns the packs of the next round, or none.
    """

    def __init__(
        self,
        packs: Sequence[Pack],
        exists: Callable[[str], bool] = lambda checkpoint: True,
        more: Callable[[], Sequence[Pack]] = lambda: (),
    ) -> None:
        super().__init__(metric="runs", mode="max")
        self._waiting = list(packs)
        self._exists = exists
        self._more = more
        self._seen: set[str] = set()  # checkpoints that were there once
        self._running: set[str] = set()  # trials

    def suggest(  # pyright: ignore[reportIncompatibleMethodOverride]: Tune takes FINISHED, a str
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        """Return the next pack; None while running trials may still make one ready; or FINISHED."""
        if not self._waiting and not self._running:
            self._waiting = list(self._more())
            if not self._waiting:
                return Searcher.FINISHED
        ready = next((pack for pack in self._waiting if self._ready(pack)), None)
        if ready is None and not self._running:
            ready = self._waiting[0]  # its parent failed: the trial puts that on record
        if ready is None:
            return None
        self._waiting.remove(ready)
        self._running.add(trial_id)
        return {"pack": ready.pack_id, "runs": {run: list(s) for run, s in ready.runs.items()}}

    def _ready(self, pack: Pack) -> bool:
        for checkpoint in pack.needs:
            if checkpoint not in self._seen:
                if not self._exists(checkpoint):
                    return False
                self._seen.add(checkpoint)
        return True

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Forget the trial. Tune may call this twice for one."""
        self._running.discard(trial_id)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec):
        """Accept Tune's search space, which is empty here."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store knows what is done."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the store knows what is done."""

"""Which specs go together and what they need, and the Searcher that hands packs to Tune."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune.search import Searcher

from rayx.merging import Spec
from rayx.spec import TrainSpec

PackSize = int | Callable[[Sequence[TrainSpec]], int]
MERGES_PER_PACK = 16  # merged candidates of a trial: enough to make its start negligible


@dataclass(frozen=True, slots=True)
class Pack:
    """Specs of one pack_key that one trial trains, or evaluates where they are merged.

    Attributes:
        pack_id: Hash of the run_ids of all its specs.
        specs: All of them.
        runs: run_id -> steps after which to keep a checkpoint; of those with something to do, not
            of those that are on record already.
        needs: Checkpoints that must be in the store before it starts.
        alone: Its runs are done one by one, since as one batch they died.
    """

    pack_id: str
    specs: tuple[Spec, ...]
    runs: Mapping[str, Sequence[int]]
    needs: tuple[str, ...]
    alone: bool = False


def form_packs(specs: Sequence[Spec], pack_size: PackSize) -> dict[str, list[Spec]]:
    """Group specs of equal pack_key, in the order given, so many at a time.

    Packs depend on the specs alone, never on what is already done: a sweep that is run again
    trains a missing run in the same company, and so to the same bits.

    Args:
        specs: Runs and merged candidates.
        pack_size: Trained runs of a pack, or what gives it for those of one pack_key; merged
            candidates come MERGES_PER_PACK at a time.

    Returns:
        pack_id (hash of its run_ids) -> specs.
    """
    groups: dict[str, list[Spec]] = {}
    for spec in specs:
        groups.setdefault(spec.pack_key, []).append(spec)
    packs = {}
    for group in groups.values():
        trained = [spec for spec in group if isinstance(spec, TrainSpec)]
        size = MERGES_PER_PACK
        if trained:  # all of a pack_key are, or none
            size = pack_size if isinstance(pack_size, int) else pack_size(trained)
        for start in range(0, len(group), size):
            members = group[start : start + size]
            ids = ",".join(spec.run_id for spec in members)
            packs[hashlib.sha256(ids.encode()).hexdigest()[:12]] = members
    return packs


def with_ancestors(specs: Sequence[Spec]) -> list[Spec]:
    """Return the specs and all their ancestors once each, every parent before its children."""
    found: dict[str, Spec] = {}
    depth: dict[str, int] = {}
    known: dict[int, str] = {}  # specs share parents as objects, and hashing one takes long

    def visit(spec: Spec) -> int:
        run_id = known.get(id(spec)) or known.setdefault(id(spec), spec.run_id)
        if run_id not in depth:
            depth[run_id] = 1 + max((visit(parent.spec) for parent in spec.parents), default=0)
            found[run_id] = spec
        return depth[run_id]

    for spec in specs:
        visit(spec)
    return sorted(found.values(), key=lambda spec: depth[known.get(id(spec)) or spec.run_id])


def missing_packs(
    specs: Sequence[Spec],
    pack_size: PackSize,
    ended: Mapping[str, str],
    exists: Callable[[str], bool],
) -> list[Pack]:
    """Return the packs with something to do, parents before children.

    A spec has something to do if it has no record, or if it is the parent of one that has and its
    checkpoint is gone; a parent that failed is not tried again.

    Args:
        specs: What is asked for.
        pack_size: As in `form_packs`.
        ended: run_id -> `ok` or `failed` of the runs on record.
        exists: Whether the store has a checkpoint.
    """
    every = with_ancestors(specs)
    asked = {spec.run_id for spec in specs}
    runs: dict[str, set[int]] = {run_id: set() for run_id in asked - ended.keys()}
    looked: set[str] = set()  # checkpoints
    for spec in reversed(every):
        if spec.run_id not in runs:
            continue
        for parent in spec.parents:
            if parent.checkpoint in looked:
                continue
            looked.add(parent.checkpoint)
            parent_id = parent.spec.run_id
            if not exists(parent.checkpoint) and ended.get(parent_id) != "failed":
                runs.setdefault(parent_id, set()).add(parent.steps)
    packs = []
    for pack_id, members in form_packs(every, pack_size).items():
        chosen = {spec.run_id: spec for spec in members if spec.run_id in runs}
        if chosen:
            needs = {parent.checkpoint for spec in chosen.values() for parent in spec.parents}
            keep = {run_id: sorted(runs[run_id]) for run_id in chosen}
            packs.append(Pack(pack_id, tuple(members), keep, tuple(sorted(needs))))
    return packs


class PackSearcher(Searcher):
    """Suggests packs one by one, branches and merges once their parents' checkpoints are there.

    Tune copies configs into names and state files, so specs stay in the store. What is done is
    also known from the store alone: `save` and `restore` carry nothing.

    Args:
        packs: The packs in the order in which to do them.
        exists: Whether the store has a checkpoint.
        more: Called when all packs have ended; returns the packs of the next round, or none.
        room: Returns how many trials may be in hand, running or waiting for a node.
        died: Called with a pack whose try died, and why; returns what of it to try again, or None.
    """

    def __init__(
        self,
        packs: Sequence[Pack],
        exists: Callable[[str], bool] = lambda checkpoint: True,
        more: Callable[[], Sequence[Pack]] = lambda: (),
        room: Callable[[], int] = lambda: sys.maxsize,
        died: Callable[[Pack, str], Pack | None] = lambda pack, why: None,
    ) -> None:
        super().__init__(metric="runs", mode="max")
        self._waiting = list(packs)
        self._exists = exists
        self._more = more
        self._room = room
        self._died = died
        self._seen: set[str] = set()  # checkpoints that were there once
        self._running: dict[str, Pack] = {}  # by trial

    def suggest(  # pyright: ignore[reportIncompatibleMethodOverride]: Tune takes FINISHED, a str
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        """Return the next pack; None while none is ready or there is no room; or FINISHED."""
        if self._running and len(self._running) >= self._room():
            return None
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
        self._running[trial_id] = ready
        runs = {run: list(steps) for run, steps in ready.runs.items()}
        return {"pack": ready.pack_id, "runs": runs, "alone": ready.alone}

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
        """Forget a trial that got through. Tune may call this twice for one."""
        if not error:
            self._running.pop(trial_id, None)

    def on_trial_death(self, trial_id: str, why: str) -> None:
        """Take back the pack of a trial that died: it comes first, with a trial of its own."""
        pack = self._running.pop(trial_id, None)
        left = self._died(pack, why) if pack else None
        if left:
            self._waiting.insert(0, left)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec):
        """Accept Tune's search space, which is empty here."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store knows what is done."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the store knows what is done."""

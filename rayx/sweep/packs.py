"""Which runs train together, and the Searcher that hands their packs to Ray Tune."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from ray.tune.search import Searcher

from rayx.spec import TrainSpec


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


class PackSearcher(Searcher):
    """Suggests packs one by one; a config is a pack id and nothing else.

    Tune copies configs into names and state files, so specs stay in the store. What is done is
    also known from the store alone: `save` and `restore` carry nothing.

    Args:
        packs: Pack ids in the order in which to train them.
        on_complete: Called with a pack's id when its trial ends; may return further pack ids.
    """

    def __init__(
        self,
        packs: Sequence[str],
        on_complete: Callable[[str], Sequence[str]] = lambda pack_id: (),
    ) -> None:
        super().__init__(metric="runs", mode="max")
        self._waiting = deque(packs)
        self._on_complete = on_complete
        self._trials: dict[str, str] = {}

    def suggest(  # pyright: ignore[reportIncompatibleMethodOverride]: Tune takes FINISHED, a str
        self, trial_id: str
    ) -> dict[str, Any] | str | None:
        """Return the next pack; None while running trials may still add some; or FINISHED."""
        if self._waiting:
            self._trials[trial_id] = self._waiting.popleft()
            return {"pack": self._trials[trial_id]}
        return None if self._trials else Searcher.FINISHED

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Queue what follows from the finished pack. Tune may call this twice for a trial."""
        pack = self._trials.pop(trial_id, None)
        if pack is not None:
            self._waiting.extend(self._on_complete(pack))

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec):
        """Accept Tune's search space, which is empty here."""
        return True

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the store knows what is done."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore: the store knows what is done."""

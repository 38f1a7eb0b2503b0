"""Which waiting trial takes a process that has become free."""

from __future__ import annotations

from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler


class InTurn(FIFOScheduler):
    """First come, first served, but never to a trial whose own process is starting.

    Tune's own rule gives a free process to the oldest waiting trial and ends the process that was
    starting for it. Where packs take less time than a start, processes on further CPUs and new
    nodes never get to work. It also looks through all trials that there ever were, at each step.
    """

    def __init__(self) -> None:
        super().__init__()
        self._waiting: list[Trial] = []

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Note a trial; Tune adds them in the order in which they were suggested."""
        self._waiting.append(trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Return the oldest trial that no process is starting for."""
        controller = tune_controller._tune_controller  # Tune lends no public way to ask
        self._waiting = [trial for trial in self._waiting if trial.status == Trial.PENDING]
        for trial in self._waiting:
            actor = controller._trial_to_actor.get(trial)
            if actor is None or not controller._actor_manager.is_actor_started(actor):
                return trial
        return None

"""Ray Tune's own TensorBoard, MLflow and W&B callbacks, turned on by name.

A trial of a sweep is a pack, and its metrics are in the store. So each run is played to the
callback as if it were a trial, from its record, as soon as its pack has ended: the spec's columns
are its config, each evaluation point is a result. What was played is noted in the store, so a run
is played once however often the sweep is interrupted.

A logger never costs the sweep: it works in a thread of its own, and what it raises is logged once.

Where logs go: `logs/` in a local store, unless MLFLOW_TRACKING_URI or WANDB_DIR says otherwise.
Projects are named by MLFLOW_EXPERIMENT_NAME and WANDB_PROJECT, or else after the store.
"""

from __future__ import annotations

import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pyarrow import fs
from ray import tune
from ray.tune.logger import LoggerCallback

from rayx.errors import StoreError, SweepError, did_you_mean
from rayx.record import Record
from rayx.store import Store

log = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0  # that the end of a sweep waits for a logger to play one more run


def _tensorboard(folder: Path | None, project: str) -> LoggerCallback:
    from ray.tune.logger import TBXLoggerCallback

    if folder is None:
        raise SweepError(
            "--log-to tensorboard writes event files into a local store; this store is not local. "
            "Give a local --store, or log to mlflow or wandb."
        )
    return TBXLoggerCallback()


def _mlflow(folder: Path | None, project: str) -> LoggerCallback:
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None and folder is None:
        raise SweepError(
            "--log-to mlflow has no place for its logs, since the store is not local. Set "
            "MLFLOW_TRACKING_URI."
        )
    if uri is None and folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        uri = f"sqlite:///{folder}/mlflow.db"
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", project)
    return MLflowLoggerCallback(tracking_uri=uri, experiment_name=name)


def _wandb(folder: Path | None, project: str) -> LoggerCallback:
    from ray.air.integrations.wandb import WandbLoggerCallback

    place = os.environ.get("WANDB_DIR") or folder
    if place is not None:
        Path(place).mkdir(parents=True, exist_ok=True)
    # Its actors run in Ray's workers, which do not see this process' environment.
    return WandbLoggerCallback(
        project=os.environ.get("WANDB_PROJECT", project),
        dir=None if place is None else str(place),
        mode=os.environ.get("WANDB_MODE"),
    )


# name -> (the library it needs, what makes the callback)
LOGGERS: dict[str, tuple[str, Callable[[Path | None, str], LoggerCallback]]] = {
    "tensorboard": ("tensorboardX", _tensorboard),
    "mlflow": ("mlflow", _mlflow),
    "wandb": ("wandb", _wandb),
}


@dataclass(eq=False)
class _Trial:
    """A run in the place of a Tune trial: what LoggerCallbacks ask of one."""

    trial_id: str
    config: dict[str, Any]
    experiment_dir_name: str
    local_path: str

    @property
    def evaluated_params(self) -> dict[str, Any]:
        return self.config

    def init_local_path(self) -> None:
        Path(self.local_path).mkdir(parents=True, exist_ok=True)

    def __str__(self) -> str:
        return self.trial_id


class RunLoggers(tune.Callback):
    """Plays runs to loggers, in a thread that `close` ends.

    Args:
        names: Of LOGGERS.
        store: Where the records are.

    Raises:
        SweepError: A name is unknown, its library is not installed, or it is not set up.
    """

    def __init__(self, names: Sequence[str], store: Store) -> None:
        self.store = store
        local = isinstance(store.filesystem, fs.LocalFileSystem)
        self._folder = Path(store.root) / "logs" if local else None
        self._project = Path(store.root).name
        self._loggers: dict[str, LoggerCallback] = {}
        self._warned: set[str] = set()
        self._played: dict[str, dict[str, str]] = {}  # logger -> run_id -> status
        self._waiting: queue.Queue[list[str] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="rayx-loggers")
        self._tries = 0
        for name in dict.fromkeys(names):
            self._loggers[name] = _make(name, self._folder, self._project)
            known = store.facts(f"logs/{name}.json")
            self._played[name] = known if isinstance(known, dict) else {}
        if self._loggers:
            self._thread.start()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks into a file that is thrown away; threads cannot be

    def close(self, run_ids: Iterable[str]) -> None:
        """End when these are played too, or when a logger hangs: the next sweep plays the rest."""
        self._waiting.put(list(run_ids))
        self._waiting.put(None)
        before = -1
        while self._thread.is_alive() and before < self._tries:
            before = self._tries
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            log.warning("a logger hangs; run the sweep again to log the runs that are left")

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Play the runs of a pack that ended."""
        self._waiting.put(list(trial.config["runs"]))

    def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        """Play those runs of a pack that ended before its process died for good."""
        self._waiting.put(list(trial.config["runs"]))

    def _work(self) -> None:
        noted = time.monotonic()
        while (run_ids := self._waiting.get()) is not None:
            status = self.store.status()
            for record in self.store.records(r for r in run_ids if r in status):
                for name in self._loggers:
                    if self._played[name].get(record.run_id) != record.status:
                        self._play(name, record)
            if time.monotonic() - noted > 1.0:
                noted = time.monotonic()
                self._note()
        self._note()

    def _play(self, name: str, record: Record) -> None:
        place = self._folder or Path(tempfile.gettempdir()) / "rayx-logs" / self._project
        trial: Any = _Trial(
            record.run_id, _config(record), self._project, str(place / name / record.run_id)
        )
        logger = self._loggers[name]
        self._tries += 1
        try:
            trial.init_local_path()
            logger.log_trial_start(trial)
            for number, result in enumerate(_results(record)):
                logger.log_trial_result(number, trial, result)
            logger.log_trial_end(trial, failed=record.failure is not None)
            logger.on_experiment_end([trial])  # W&B: its two processes a run end here
            self._played[name][record.run_id] = record.status
        except Exception as error:  # whatever a logger raises must not cost the sweep
            if name not in self._warned:
                self._warned.add(name)
                log.warning("--log-to %s: run %s: %s; going on", name, record.run_id, error)

    def _note(self) -> None:
        try:
            for name, played in self._played.items():
                self.store.write_json(f"logs/{name}.json", played)
        except StoreError as error:
            log.warning("%s", error)


def _make(name: str, folder: Path | None, project: str) -> LoggerCallback:
    if name not in LOGGERS:
        raise SweepError(
            f"--log-to {name!r} is unknown; expected one of {', '.join(LOGGERS)}."
            f"{did_you_mean(name, tuple(LOGGERS))}"
        )
    library, make = LOGGERS[name]
    if find_spec(library) is None:
        raise SweepError(
            f"--log-to {name} needs {library}, which is not installed: pip install {library}"
        )
    try:
        logger = make(folder and folder / name, project)
        logger.setup()
    except SweepError:
        raise
    except Exception as error:  # no key, no server, no permission: said before anything starts
        raise SweepError(f"--log-to {name} cannot be set up: {error}") from error
    return logger


def _config(record: Record) -> dict[str, Any]:
    columns = {**record.spec.columns(), "status": record.status, "device": record.device}
    return {_name(key): value for key, value in columns.items() if value is not None}


def _results(record: Record) -> Iterable[dict[str, Any]]:
    """Return one Tune result an evaluation point."""
    for point in record.curve:
        losses = {_name(f"loss/{target}"): loss.bpb for target, loss in point.losses.items()}
        yield {"training_iteration": point.step, "tokens": point.tokens, **losses}


def _name(text: str) -> str:
    """Return a name that all three accept: MLflow refuses some signs in a domain's name."""
    return re.sub(r"[^\w\-. :/]", "_", text)

"""Experiment trackers: each run of a real sweep is shown once, as a trial of its own."""

from __future__ import annotations

import logging
import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboardX.proto.event_pb2 import Event

import rayx
from rayx.errors import SweepError
from rayx.experiment import load_experiment
from rayx.proxy import train_pack
from rayx.store import Store
from rayx.sweep import Placement, loggers, run_sweep
from rayx.sweep.loggers import RunLoggers
from tests.samples import SPEC, record, train_spec
from tests.test_cli import EXPERIMENT


def events(folder: Path) -> list[Event]:
    """Read TensorBoard's event files: length, its checksum, the event, its checksum."""
    found = []
    for file in sorted(folder.glob("events.out.tfevents.*")):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    found = {}
    for event in events(folder):
        for value in event.summary.value:
            if value.HasField("simple_value"):
                found[value.tag.removeprefix("ray/tune/"), event.step] = value.simple_value
    return found


@pytest.fixture
def store(tmp_path) -> Store:
    return rayx.open(tmp_path / "store", create=True)


def play(store: Store, *names: str, times: int = 1) -> None:
    """What a sweep does: a pack ends, then the sweep."""
    for _ in range(times):
        playing = RunLoggers(names, store)
        pack = SimpleNamespace(config={"pack": "p", "runs": {SPEC.run_id: []}})
        playing.on_trial_complete(0, [], pack)
        playing.close(store.status())


@pytest.mark.ray
def test_sweep_shows_every_run_to_tensorboard_as_it_is_on_record(ray_cluster, tiny_corpus, store):
    file = Path(store.root).parent / "study.py"
    file.write_text(EXPERIMENT.format(corpus=tiny_corpus.url).replace("points=1", "points=2"))
    study = load_experiment(file)
    specs = study.specs(study.Parameters(runs=3), tiny_corpus)
    store.put(train_pack(specs[:1], tiny_corpus)[0])  # on record before anyone logged
    run_sweep(
        specs, tiny_corpus, store, train_pack, log_to=["tensorboard"], placement=Placement(cpus=2)
    )
    folder = Path(store.root) / "logs" / "tensorboard"
    assert {f.name for f in folder.iterdir()} == {spec.run_id for spec in specs}
    for found in store.records():
        shown = scalars(folder / found.run_id)
        expected = {("tokens", point.step): point.tokens for point in found.curve}
        for point in found.curve:
            expected |= {(f"loss/{t}", point.step): x.bpb for t, x in point.losses.items()}
        assert shown == pytest.approx(expected, rel=1e-6) and len(found.curve) == 2
        text = b"".join(e.SerializeToString() for e in events(folder / found.run_id))
        assert b"weight/code" in text and b"lr" in text  # the hyperparameters


def test_run_is_shown_once_and_again_only_when_a_failure_was_made_good(store):
    folder = Path(store.root) / "logs" / "tensorboard" / SPEC.run_id
    store.put(record(failed=True))
    play(store, "tensorboard")
    assert not scalars(folder)
    store.put(record())
    play(store, "tensorboard", times=3)
    seen = [value.tag for event in events(folder) for value in event.summary.value]
    assert seen.count("ray/tune/loss/web") == 2  # points of the curve
    assert scalars(folder)["loss/web", 32] == pytest.approx(1.0)


class Broken(loggers.LoggerCallback):
    def log_trial_result(self, iteration, trial, result):
        raise OSError("the server is gone")


def test_logger_that_breaks_is_named_once_and_costs_no_other(store, caplog, monkeypatch):
    monkeypatch.setitem(loggers.LOGGERS, "broken", ("json", lambda folder, project: Broken()))
    for seed in range(3):
        store.put(record(train_spec(seed=seed)))
    with caplog.at_level(logging.WARNING):
        play(store, "broken", "tensorboard")
    assert [m for m in caplog.messages if "broken" in m] == [
        f"--log-to broken: run {SPEC.run_id}: the server is gone; going on"
    ]
    assert len(list((Path(store.root) / "logs" / "tensorboard").iterdir())) == 3


class Hanging(loggers.LoggerCallback):
    def log_trial_start(self, trial):
        loggers.time.sleep(30)


def test_logger_that_hangs_does_not_hold_up_the_end_of_a_sweep(store, caplog, monkeypatch):
    monkeypatch.setitem(loggers.LOGGERS, "hanging", ("json", lambda folder, project: Hanging()))
    monkeypatch.setattr(loggers, "CLOSE_SECONDS", 0.05)
    store.put(record())
    play(store, "hanging")
    assert "a logger hangs; run the sweep again" in caplog.text


@pytest.mark.parametrize(
    ("name", "url", "words"),
    [
        ("tensorbord", "", "'tensorbord' is unknown.*tensorboard"),
        ("absent", "", "needs no_such_library.*pip install no_such_library"),
        ("refusing", "", "cannot be set up: no key"),
        ("tensorboard", "s3", "store is not local"),
    ],
)
def test_logger_that_cannot_work_is_refused_before_anything_starts(
    store, monkeypatch, name, url, words
):
    def refuse(folder, project):
        raise ValueError("no key")

    monkeypatch.setitem(loggers.LOGGERS, "absent", ("no_such_library", refuse))
    monkeypatch.setitem(loggers.LOGGERS, "refusing", ("json", refuse))
    if url:
        import fsspec
        from pyarrow import fs

        objects = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
        store = Store(objects, "bucket/loggers", "memory://")
    with pytest.raises(SweepError, match=words):
        run_sweep([SPEC], None, store, None, log_to=[name])  # pyright: ignore[reportArgumentType]


def test_mlflow_has_the_runs_with_their_parameters_and_curves(store):
    mlflow = pytest.importorskip("mlflow", reason="pip install mlflow")
    store.put(record())
    play(store, "mlflow", times=2)
    client = mlflow.MlflowClient(f"sqlite:///{store.root}/logs/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("store")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == SPEC.run_id and run.data.params["weight/web"] == "0.7"
    points = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss/web")]
    assert points == [(16, 2.0), (32, 1.0)]


@pytest.mark.ray
def test_wandb_writes_a_run_offline(ray_cluster, store, monkeypatch):
    pytest.importorskip("wandb", reason="pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    store.put(record())
    play(store, "wandb", times=2)
    offline = Path(store.root) / "logs" / "wandb" / "wandb"
    assert len(list(offline.glob(f"offline-run-*-{SPEC.run_id}"))) == 1

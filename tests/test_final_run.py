"""The final run: any number of workers, the same losses; what dies goes on; what cannot is said."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import rayx
from rayx import Mixture, Phase, Probe, Schedule
from rayx.errors import SpecError, SweepError
from rayx.policies import DGA
from rayx.proxy import set_threads, train_pack
from rayx.proxy.checkpoint import read_checkpoint
from rayx.spec import Parent
from rayx.sweep.final import Workers, check_final, train_final
from tests.final_world import STUDY, interrupt, plan, runs, template, train_all, with_trunks
from tests.final_world import train_in_two_processes as in_two
from tests.test_cli import run_main
from tests.test_job import free_ports

CLOSE = 1e-4  # nats; shards are summed in another order, of the same data


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a worker."""
    set_threads(1)


@pytest.fixture(scope="module")
def stores(tiny_corpus, tmp_path_factory):
    """Name -> store: what one process and two processes trained."""
    folder = tmp_path_factory.mktemp("final")
    (port,) = free_ports(1)
    in_two(tiny_corpus, str(folder), port)
    alone = {}
    for name, branches in (("alone", False), ("alone-branches", True)):
        alone[name] = rayx.open(folder / name, create=True)
        train_all(runs(tiny_corpus, branches), tiny_corpus, alone[name])
    return alone | {f.name: rayx.open(f) for f in folder.iterdir() if f.name not in alone}


def same(one, other) -> bool:
    """Whether two records agree to the bit in all that is not time."""
    return all(getattr(one, n) == getattr(other, n) for n in ("spec", "curve", "epochs", "flops"))


def far(one, other) -> float:
    """The largest difference of two runs' losses, in nats, along their curves."""
    assert [p.step for p in one.curve] == [p.step for p in other.curve]
    return max(
        abs(a.losses[t].nats - b.losses[t].nats)
        for a, b in zip(one.curve, other.curve, strict=True)
        for t in a.losses
    )


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("branches", [False, True], ids=["phases", "branches"])
def test_two_workers_reach_the_losses_of_one_and_without_shards_its_bits(
    kind, branches, tiny_corpus, stores
):
    suffix = "-branches" if branches else ""
    one, two = stores["alone" + suffix], stores[kind + suffix]
    specs = runs(tiny_corpus, branches)
    assert len(specs) == (3 if branches else 1)
    for spec in specs:
        first, second = one.get(spec.run_id), two.get(spec.run_id)
        assert same(first, second) if kind == "ddp" else far(first, second) < CLOSE
        assert first.epochs == second.epochs
        ends = [read_checkpoint(s, Parent(spec, spec.steps)) for s in (one, two)]
        assert ends[0].drawn == ends[1].drawn
        for name, tensor in ends[0].parameters.items():
            difference = (tensor - ends[1].parameters[name]).abs().max()
            assert difference == 0 if kind == "ddp" else difference < 1e-3
            assert tensor.shape == ends[1].first[name].shape == ends[1].second[name].shape


def test_interrupted_run_goes_on_to_the_same_bits_with_as_many_workers(tiny_corpus, stores):
    (spec,) = runs(tiny_corpus, False)
    assert same(stores["resumed"].get(spec.run_id), stores["ddp"].get(spec.run_id))


def test_run_of_two_workers_goes_on_with_one(tiny_corpus, stores):
    (spec,) = runs(tiny_corpus, False)
    store, beats = stores["resumed-alone"], []
    assert len(list(Path(store.url, "unfinished").glob("*.safetensors"))) == 1
    patch = pytest.MonkeyPatch()
    patch.setattr("rayx.proxy.train.BEAT_SECONDS", 0.0)
    record = train_pack([spec], tiny_corpus, store=store, on_progress=beats.append, parts=2)[0]
    patch.undo()
    assert beats[0] == 16 * spec.batch_tokens
    assert same(record, stores["alone"].get(spec.run_id))


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run the real entry point in a folder of its own; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: (run_main(*arguments), *capsys.readouterr())


@pytest.fixture
def study(tiny_corpus, tmp_path) -> Path:
    file = tmp_path / "study.py"
    file.write_text(STUDY.format(corpus=tiny_corpus.url))
    return file


def written(folder: Path, made) -> Path:
    file = folder / "plan.json"
    file.write_text(json.dumps(made.to_json()))
    return file


def test_train_carries_a_plan_of_experts_out_and_then_has_nothing_to_do(
    cli,
    study,
    tiny_corpus,
    tmp_path,
    stores,
):
    file = written(tmp_path, plan(tiny_corpus, branches=True))
    code, out, err = cli("train", file, study, "--store", "s")
    assert code == 0, err
    store = rayx.open("s")
    for spec in runs(tiny_corpus, True):
        assert same(store.get(spec.run_id), stores["alone-branches"].get(spec.run_id))
    assert "each expert on its own domain, mean, reached" in out and "predicted 2.0000" in out
    models = dict(line.split(": ") for line in out.splitlines() if ".safetensors" in line)
    assert set(models) == {"code", "news"} and all(Path(p).is_file() for p in models.values())
    before = {f: f.stat().st_mtime_ns for f in Path("s/records").iterdir()}
    assert cli("train", file, study, "--store", "s")[1] == out
    assert before == {f: f.stat().st_mtime_ns for f in Path("s/records").iterdir()}
    code, evaluated, _ = cli("evaluate", f"code={models['code']}", "--corpus", tiny_corpus.url)
    assert code == 0 and "code" in evaluated


def test_final_run_goes_on_where_it_died(tiny_corpus, tmp_path, stores):
    store = rayx.open(tmp_path / "s", create=True)
    trunk, first, second = runs(tiny_corpus, True)
    train_final([first], tiny_corpus, store, train_pack)
    interrupt(second, 11, tiny_corpus, store)
    ended = train_final([first, second], tiny_corpus, store, train_pack)
    assert ended == dict.fromkeys((trunk.run_id, first.run_id, second.run_id), "ok")
    for spec in (trunk, first, second):
        assert same(store.get(spec.run_id), stores["alone-branches"].get(spec.run_id))


def test_failed_trunk_is_named_and_its_branches_are_not_begun(
    cli,
    study,
    tiny_corpus,
    tmp_path,
):
    file = written(tmp_path, plan(tiny_corpus, branches=True))
    for _ in range(2):
        code, out, err = cli("train", file, study, "--store", "s", "--set", "lr=10")
        assert code == 1 and "failed: " in err and "not trained: code, news" in err
    assert len(rayx.open("s").status()) == 1


def test_dry_run_counts_and_trains_nothing(cli, study, tiny_corpus, tmp_path):
    file = written(tmp_path, plan(tiny_corpus, branches=True))
    code, out, _ = cli("train", file, study, "--store", "s", "--dry-run")
    trunk, *branches = runs(tiny_corpus, True)
    tokens = trunk.tokens + sum(b.tokens for b in branches)
    assert code == 0 and f"3 runs, {tokens:,} tokens" in out and not Path("s").exists()
    assert all(f"{trunk.run_id} at {b.parent.steps}" in out for b in branches)
    passes = branches[0].domain_tokens["code"] / tiny_corpus.tokens["code"]
    assert f"epochs of code: code {passes:.2g}, law" in out


def test_plan_is_refused_on_a_corpus_that_cannot_carry_it(
    cli,
    study,
    tiny_corpus,
    tmp_path,
):
    good = plan(tiny_corpus, branches=False)
    other = dataclasses.replace(good, corpus="0123456789abcdef")
    code, _, err = cli("train", written(tmp_path, other), study, "--dry-run")
    assert code == 2 and "--other-corpus" in err
    assert cli("train", written(tmp_path, other), study, "--dry-run", "--other-corpus")[0] == 0
    strange = Schedule.constant(Mixture({"code": 1, "cobol": 1}), 10_000)
    code, _, err = cli(
        "train", written(tmp_path, dataclasses.replace(good, schedule=strange)), study
    )
    assert code == 2 and "'cobol', which is not in corpus" in err
    supply = tiny_corpus.tokens["news"]
    often = Schedule((Phase(Mixture({"news": 1}), 3 * supply), *good.schedule.phases))
    code, _, err = cli("train", written(tmp_path, dataclasses.replace(good, schedule=often)), study)
    assert code == 2 and "times over domain 'news'" in err and "the plan says 2.00" in err


def test_workers_that_cannot_share_a_run_are_refused_before_anything_starts(tiny_corpus):
    (spec,) = runs(tiny_corpus, False)
    with pytest.raises(SpecError, match="number of workers.*3.*1, 2, 4, 8"):
        check_final([spec], tiny_corpus, Workers(count=3))
    steered = dataclasses.replace(
        template(tiny_corpus),
        schedule=Schedule.constant(Mixture({"code": 1, "law": 1}), 5_000),
        policy=DGA(specific=(Probe(target="news", part="train", sequences=4),)),
    )
    check_final([steered], tiny_corpus, Workers(count=1))
    with pytest.raises(SpecError, match="has a policy, which 2 workers cannot share"):
        check_final([steered], tiny_corpus, Workers(count=2))
    with pytest.raises(SweepError, match="--workers 1 or more"):
        Workers(shard=True)
    with pytest.raises(SweepError, match="-1 workers"):
        Workers(count=-1)
    with pytest.raises(SpecError, match="Sharding needs worker processes"):
        train_pack([spec], tiny_corpus, shard=True)


def test_group_that_the_cluster_cannot_hold_is_refused_at_once(ray_cluster, tiny_corpus, tmp_path):
    store = rayx.open(tmp_path / "s", create=True)
    with pytest.raises(SweepError, match="room for 2"):
        train_final(
            runs(tiny_corpus, False), tiny_corpus, store, train_pack, workers=Workers(count=4)
        )


def workers_of(mark: str) -> list[int]:
    """Return the pids of Ray Train's workers that have `mark` in their environment."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.info["cmdline"] or [])
            if "RayTrainWorker" in title and process.environ().get("RAYX_TEST") == mark:
                found.append(process.pid)
    return sorted(found)


def until(what, seconds: float = 120.0):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("shard", [False, True], ids=["ddp", "fsdp"])
def test_real_group_outlives_a_worker_and_its_driver(shard, study, tiny_corpus, tmp_path):
    made = plan(tiny_corpus, branches=True, steps=600)
    file = written(tmp_path, made)
    rayx_command = str(Path(sys.executable).with_name("rayx"))
    root = str(Path(__file__).parents[1])
    rate = 0.003  # at 0.01, 600 steps turn a change of 1e-7 in the start into 1% of the loss

    def start(store: str, mark: str) -> subprocess.Popen:
        command = [rayx_command, "train", file, study, "--store", store, "--workers", "2"]
        command += [
            "--set",
            f"lr={rate}",
            "--state-seconds",
            "0.5",
            *(["--shard"] if shard else []),
        ]
        environment = {**os.environ, "RAYX_TEST": mark, "PYTHONPATH": root}
        with open(tmp_path / f"{mark}.log", "w") as log:
            return subprocess.Popen(
                [*map(str, command)], env=environment, cwd=tmp_path, stdout=log, stderr=log
            )

    assert start("calm", "calm").wait(280) == 0, (tmp_path / "calm.log").read_text()
    states = tmp_path / "stormy" / "unfinished"

    def written_at() -> float:
        return max((f.stat().st_mtime for f in states.glob("*.safetensors")), default=0.0)

    driver = start("stormy", "storm")
    until(written_at)
    victims = workers_of("storm")
    assert len(victims) == 2
    os.kill(victims[1], signal.SIGKILL)
    fresh = until(lambda: set(workers_of("storm")) - set(victims))
    assert driver.poll() is None and fresh
    seen = written_at()
    until(lambda: written_at() > seen)
    driver.kill()
    driver.wait(60)
    until(lambda: not workers_of("storm"))
    assert start("stormy", "after").wait(280) == 0, (tmp_path / "after.log").read_text()
    calm, stormy = rayx.open(tmp_path / "calm"), rayx.open(tmp_path / "stormy")
    alone = rayx.open(tmp_path / "alone", create=True)
    specs = with_trunks(made.specs(template(tiny_corpus, rate)).values())
    train_all(specs, tiny_corpus, alone)
    for spec in specs:
        assert same(calm.get(spec.run_id), stormy.get(spec.run_id))
        if not shard:
            assert same(alone.get(spec.run_id), calm.get(spec.run_id))
        for domain in spec.schedule.phases[-1].mixture:
            one, two = (s.get(spec.run_id).losses[domain].nats for s in (alone, calm))
            assert two == pytest.approx(one, rel=1e-3)

"""The sweep on real Ray: nothing done twice, nothing lost, whatever dies."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import fs

import rayx
from rayx import Evaluation, Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.errors import SpecError, SweepError
from rayx.progress import progress
from rayx.proxy import train_pack
from rayx.spec import Parent
from rayx.sweep import Placement, estimate, run_sweep
from rayx.sweep.packs import Pack, PackSearcher, form_packs, missing_packs
from tests.samples import record

pytestmark = pytest.mark.ray
ONE_AT_A_TIME = Placement(cpus=2)  # one process to start, where that is enough


def small_specs(corpus, count: int, steps: int = 6) -> list[TrainSpec]:
    return [
        TrainSpec(
            corpus=corpus.fingerprint,
            model=ModelShape(
                layers=1, width=16, heads=2, ffn_width=32, vocab_size=corpus.vocab_size, context=16
            ),
            schedule=Schedule.constant(Mixture({"code": 1 + i, "law": 9}), steps * 4 * 16),
            optimizer=Optimizer(lr=1e-2, batch_sequences=4),
            evaluation=Evaluation(points=1, sequences=8),
        )
        for i in range(count)
    ]


@dataclasses.dataclass(frozen=True)
class Scripted:
    """A training loop that notes each run in a file, and misbehaves for the runs named."""

    log: str
    raises: frozenset[str] = frozenset()
    kills_once: frozenset[str] = frozenset()
    kills: frozenset[str] = frozenset()

    def __call__(self, specs, corpus, *, pack_id, commit, device, on_progress, store, keep):
        for spec in specs:
            with open(self.log, "a") as file:
                file.write(f"{spec.run_id} {os.getpid()}\n")
            died = Path(self.log + spec.run_id)
            if spec.run_id in self.kills or (spec.run_id in self.kills_once and not died.exists()):
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if spec.run_id in self.raises:
                raise ValueError(f"no luck with {spec.run_id}")
        return [record(spec) for spec in specs]

    def calls(self) -> list[str]:
        return [line.split()[0] for line in Path(self.log).read_text().splitlines()]


@pytest.fixture
def store(tmp_path):
    return rayx.open(tmp_path / "store", create=True)


@pytest.fixture
def script(tmp_path):
    (tmp_path / "log").touch()
    return Scripted(str(tmp_path / "log"))


def test_form_packs_is_stable_when_a_sweep_grows(tiny_corpus):
    specs = small_specs(tiny_corpus, 10)
    eight, ten = form_packs(specs[:8], 4), form_packs(specs, 4)
    assert list(eight) == list(ten)[:2] and [len(p) for p in ten.values()] == [4, 4, 2]
    longer = small_specs(tiny_corpus, 2, steps=7)
    mixed = form_packs([specs[0], longer[0], specs[1], longer[1]], 4)
    assert [[s.steps for s in p] for p in mixed.values()] == [[6, 6], [7, 7]]


def pack(name: str, *needs: str) -> Pack:
    return Pack(name, (), {f"{name}-run": [3]}, needs)


def test_searcher_asks_for_a_round_when_the_last_one_has_ended_and_then_finishes():
    rounds = [[pack("b")], []]
    searcher = PackSearcher([pack("a")], more=lambda: rounds.pop(0))
    assert searcher.suggest("t1") == {"pack": "a", "runs": {"a-run": [3]}, "alone": False}
    assert searcher.suggest("t2") is None  # "a" is still running
    searcher.on_trial_complete("t1", {"runs": 1})
    searcher.on_trial_complete("t1", {"runs": 1})
    assert searcher.suggest("t2")["pack"] == "b"
    searcher.on_trial_complete("t2", error=True)
    searcher.on_trial_death("t2", "why")
    assert searcher.suggest("t3") == PackSearcher.FINISHED


def test_searcher_holds_branches_back_until_their_checkpoint_is_there():
    there = set()
    packs = [pack("trunk"), pack("branch", "c1"), pack("other"), pack("orphan", "c2")]
    searcher = PackSearcher(packs, there.__contains__)
    assert [searcher.suggest(t)["pack"] for t in ("t1", "t2")] == ["trunk", "other"]
    assert searcher.suggest("t3") is None
    there.add("c1")  # the trunk goes on, but has passed the branch point
    assert searcher.suggest("t3")["pack"] == "branch"
    for trial in ("t1", "t2", "t3"):
        assert searcher.suggest("t4") is None
        searcher.on_trial_complete(trial)
    # Nothing runs that could make c2: the branch is handed out, to fail on record.
    assert searcher.suggest("t4")["pack"] == "orphan"


def branches_of(trunk: TrainSpec, at: int, count: int) -> list[TrainSpec]:
    return [
        dataclasses.replace(
            trunk,
            schedule=Schedule.constant(Mixture({"news": 1 + i, "law": 1}), 3 * trunk.batch_tokens),
            parent=Parent(trunk, at),
        )
        for i in range(count)
    ]


def test_missing_packs_train_a_parent_again_only_for_a_checkpoint_that_is_needed(tiny_corpus):
    (trunk,) = small_specs(tiny_corpus, 1)
    early, late = branches_of(trunk, 2, 1), branches_of(trunk, 4, 1)
    specs = [*late, *early]

    def runs(ended, there=()):
        packs = missing_packs(specs, 2, ended, {p.parent.checkpoint for p in there}.__contains__)
        return {run: list(steps) for p in packs for run, steps in p.runs.items()}

    ids = [s.run_id for s in (trunk, *early, *late)]
    assert runs({}) == {ids[0]: [2, 4], ids[1]: [], ids[2]: []}
    assert list(runs({}))[0] == ids[0]  # parents first
    assert runs({ids[0]: "ok", ids[1]: "ok"}) == {ids[0]: [4], ids[2]: []}
    assert runs({ids[0]: "ok", ids[1]: "ok"}, there=late) == {ids[2]: []}
    assert runs({ids[0]: "failed"}) == {ids[1]: [], ids[2]: []}
    assert runs(dict.fromkeys(ids, "ok")) == {}


def test_sweep_trains_trunks_nobody_asked_for_and_drops_their_checkpoints(
    ray_cluster, tiny_corpus, store
):
    (trunk,) = small_specs(tiny_corpus, 1)
    specs = branches_of(trunk, 2, 2) + branches_of(trunk, 6, 2)
    wild = dataclasses.replace(trunk, optimizer=dataclasses.replace(trunk.optimizer, lr=10.0))
    orphans = branches_of(wild, 6, 2)
    status = run_sweep([*specs, *orphans], tiny_corpus, store, train_pack, placement=ONE_AT_A_TIME)
    assert [status[s.run_id] for s in (*specs, *orphans)] == ["ok"] * 4 + ["failed"] * 2
    assert f"run {wild.run_id}, which this one needs, failed" in (
        store.get(orphans[0].run_id).failure.message
    )
    assert store.get(trunk.run_id).status == "ok"
    assert not store.filesystem.get_file_info(
        fs.FileSelector(f"{store.root}/checkpoints", allow_not_found=True)
    )
    further = branches_of(trunk, 4, 1)
    before = store.get(trunk.run_id)
    assert run_sweep(further, tiny_corpus, store, train_pack) == {further[0].run_id: "ok"}
    assert store.get(trunk.run_id) == before  # trained again, its record left alone


def test_rounds_are_proposed_from_the_records_of_the_last_and_come_out_the_same_again(
    ray_cluster, tiny_corpus, store, script
):
    pool = small_specs(tiny_corpus, 9)

    def proposer():
        """Return a proposer of two rounds, two runs each: those next to the best so far."""
        asked = [spec.run_id for spec in pool[:3]]

        def propose():
            if len(asked) == 7:
                return []
            best = min(asked, key=value)
            rest = [s for s in pool if s.run_id not in asked]
            chosen = sorted(rest, key=lambda s: s.run_id > best)[:2]
            asked.extend(s.run_id for s in chosen)
            return chosen

        return propose

    def value(run_id: str) -> float:
        # Scripted losses are all alike, so the id decides.
        return store.get(run_id).losses["web"].bpb + int(run_id, 16) / 16**12

    first = run_sweep(
        pool[:3], tiny_corpus, store, script, propose=proposer(), placement=ONE_AT_A_TIME
    )
    assert set(first.values()) == {"ok"} and len(first) == 7 == len(script.calls())
    lost = [run for run in first if run not in {s.run_id for s in pool[:3]}][:1]
    store.remove(f"records/{lost[0]}.json")
    again = run_sweep(pool[:3], tiny_corpus, store, script, propose=proposer())
    assert again == first and script.calls()[7:] == lost
    state = progress(store)
    assert (state["total"], state["ok"]) == (7, 7)


def test_real_sweep_trains_every_run_and_running_again_trains_none(
    ray_cluster, tiny_corpus, store, script
):
    specs = small_specs(tiny_corpus, 5)
    placement = Placement(pack_size=2)
    assert set(run_sweep(specs, tiny_corpus, store, train_pack, placement=placement).values()) == {
        "ok"
    }
    runs = store.runs()
    alone = {s.run_id: train_pack([s], tiny_corpus)[0] for s in specs}
    for row in runs.to_dict("records"):
        assert row["loss/law"] == pytest.approx(alone[row["run_id"]].losses["law"].bpb, rel=1e-4)
        assert row["device"].endswith("1 threads")
    run_sweep(specs, tiny_corpus, store, script, placement=placement)
    assert script.calls() == []
    more = small_specs(tiny_corpus, 7)
    run_sweep(more, tiny_corpus, store, script, placement=placement)
    assert sorted(script.calls()) == sorted(s.run_id for s in more[5:])
    state = progress(store)
    assert (state["total"], state["ok"], state["alive"], state["running"]) == (7, 7, False, 0)
    assert store.names("heartbeats") == []


def test_a_run_that_raises_fails_alone_and_is_retried_only_when_asked(
    ray_cluster, tiny_corpus, store, script
):
    specs = small_specs(tiny_corpus, 4)
    bad = specs[1].run_id
    broken = dataclasses.replace(script, raises=frozenset({bad}))
    status = run_sweep(specs, tiny_corpus, store, broken, placement=ONE_AT_A_TIME)
    assert status == {s.run_id: "failed" if s.run_id == bad else "ok" for s in specs}
    failure = store.get(bad).failure
    assert failure.type == "ValueError" and failure.message == f"no luck with {bad}"
    assert "in __call__" in failure.traceback
    before = len(script.calls())
    assert run_sweep(specs, tiny_corpus, store, script)[bad] == "failed"
    assert len(script.calls()) == before
    assert run_sweep(specs, tiny_corpus, store, script, retry_failed=True)[bad] == "ok"
    assert script.calls()[before:] == [bad]


def test_a_killed_worker_costs_at_most_its_pack_and_a_run_that_always_kills_is_named(
    ray_cluster, tiny_corpus, store, script, monkeypatch
):
    monkeypatch.setattr("rayx.sweep.tries.TRIES", 1)  # starting a process is what takes long
    specs = small_specs(tiny_corpus, 8)
    victim, killer = specs[2].run_id, specs[6].run_id
    deadly = dataclasses.replace(script, kills_once=frozenset({victim}), kills=frozenset({killer}))
    status = run_sweep(specs, tiny_corpus, store, deadly, placement=Placement(pack_size=4))
    assert status == {s.run_id: "failed" if s.run_id == killer else "ok" for s in specs}
    failure = store.get(killer).failure
    assert failure.type == "ProcessDied" and "died 2 times" in failure.message
    assert "connection error" in failure.traceback  # Ray's words
    calls = script.calls()
    repeated = {s.run_id: calls.count(s.run_id) for s in specs if calls.count(s.run_id) > 1}
    assert repeated == {victim: 2, killer: 2} and len(calls) == 10
    assert store.names("heartbeats") == []


def test_a_damaged_record_is_redone(ray_cluster, tiny_corpus, store, script, caplog):
    specs = small_specs(tiny_corpus, 2)
    for spec in specs:
        store.put(record(spec))
    store.compact()
    file = Path(store.root) / "records" / f"{specs[0].run_id}.json"
    file.write_bytes(file.read_bytes()[:100])
    assert set(run_sweep(specs, tiny_corpus, store, script).values()) == {"ok"}
    assert script.calls() == [specs[0].run_id]
    assert "is damaged" in caplog.text
    assert store.get(specs[0].run_id).status == "ok"


DRIVER = """
import sys, logging
logging.basicConfig(level=20)
import rayx
from rayx.corpus import Corpus
from rayx.proxy import train_pack
from rayx.sweep import Placement, run_sweep
from tests.test_sweep import small_specs
corpus = Corpus.load(sys.argv[1])
specs = small_specs(corpus, int(sys.argv[3]), steps=int(sys.argv[4]))
run_sweep(specs, corpus, rayx.open(sys.argv[2], create=True), train_pack,
          placement=Placement(pack_size=4))
"""


def drive(corpus, store: Path, count: int, steps: int) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, corpus.url, str(store), str(count), str(steps)],
        cwd=Path(__file__).parents[1],
        env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
        start_new_session=True,
    )


def kill_and_resume(corpus, tmp_path, count: int, steps: int) -> tuple[dict, dict, int]:
    """Return records of a disturbed and an undisturbed sweep, and the runs done at the kill."""
    disturbed, quiet = tmp_path / "disturbed", tmp_path / "quiet"
    driver = drive(corpus, disturbed, count, steps)
    while len(list((disturbed / "records").glob("*.json"))) < count // 3:
        assert driver.poll() is None
        time.sleep(0.05)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    time.sleep(3)  # Ray's processes end with their driver; runs that they finish still count
    before = {f.name: f.read_bytes() for f in (disturbed / "records").glob("*.json")}
    assert count // 3 <= len(before) < count
    specs = small_specs(corpus, count, steps)
    for store in (disturbed, quiet):
        opened = rayx.open(store, create=True)
        run_sweep(specs, corpus, opened, train_pack, placement=Placement(pack_size=4))
    for name, content in before.items():
        assert (disturbed / "records" / name).read_bytes() == content  # neither lost nor redone
    records = []
    for store in (disturbed, quiet):
        files = (store / "records").glob("*.json")
        records.append({f.stem: json.loads(f.read_text()) for f in files})
    return records[0], records[1], len(before)


def assert_equal_results(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    for run_id, one in first.items():
        other = second[run_id]
        for field in ("spec", "epochs", "tokens", "flops", "pack_id", "pack_runs", "failure"):
            assert one[field] == other[field]
        assert one["curve"] == other["curve"]  # to the bit


# In the default suite tests/test_sweep_merges.py kills a driver between trained runs of a pack.
@pytest.mark.slow
def test_driver_killed_in_a_sweep_of_64_real_proxies(ray_cluster, tiny_corpus, tmp_path):
    disturbed, quiet, before = kill_and_resume(tiny_corpus, tmp_path, 64, steps=150)
    assert len(disturbed) == 64 and before >= 21
    assert_equal_results(disturbed, quiet)


def test_store_can_be_read_from_another_process_during_a_sweep(tiny_corpus, tmp_path):
    driver = drive(tiny_corpus, tmp_path / "store", 4, 300)
    seen = set()
    while driver.poll() is None:
        try:
            opened = rayx.open(tmp_path / "store")
        except rayx.RayxError:
            continue
        state = progress(opened)
        count = opened.sql("select count(*) as n from runs")["n"][0]
        if state["alive"]:
            seen.add(int(count))
        time.sleep(0.2)
    assert driver.returncode == 0
    assert any(0 < count < 4 for count in seen), seen
    assert progress(rayx.open(tmp_path / "store"))["alive"] is False


def test_estimate_counts_and_times(tiny_corpus):
    specs = small_specs(tiny_corpus, 10, steps=40)
    cost = estimate(specs, tiny_corpus, train_pack, Placement())
    began = time.perf_counter()
    for spec in specs:
        train_pack([spec], tiny_corpus)
    actual = time.perf_counter() - began
    assert cost.runs == 10 and cost.tokens == 10 * 40 * 64
    assert cost.flops == pytest.approx(6 * specs[0].model.matmul_params * cost.tokens)
    assert actual / 3 < cost.seconds < actual * 3


def test_bad_sweeps_are_refused_before_anything_starts(ray_cluster, tiny_corpus, store, script):
    specs = small_specs(tiny_corpus, 2)

    def refused(match, specs=specs, error=SpecError, **arguments):
        with pytest.raises(error, match=match):
            run_sweep(specs, tiny_corpus, store, script, **arguments)
        assert script.calls() == [] and store.names("packs") == []

    one = specs[0]
    model = dataclasses.replace(one.model, vocab_size=100)
    refused("no specs", specs=[])
    refused("is for corpus beef", specs=[dataclasses.replace(one, corpus="beef")])
    refused("vocabulary of 100", specs=[dataclasses.replace(one, model=model)])
    wrong = Schedule.constant(Mixture({"lav": 1}), one.schedule.tokens)
    refused("'lav'.*Did you mean 'law'", specs=[dataclasses.replace(one, schedule=wrong)])
    long = Schedule.constant(Mixture({"news": 1}), 4 * tiny_corpus.tokens["news"])
    refused(
        "passes 4.* times over domain 'news'.*at most 2",
        specs=[dataclasses.replace(one, schedule=long)],
        max_epochs=2,
    )
    with pytest.raises(SweepError, match="pack_size is 0"):
        Placement(pack_size=0)
    with pytest.raises(SweepError, match="expected CPUs > 0"):
        Placement(cpus=0)


def test_a_trial_that_no_node_can_hold_is_refused_at_once(ray_cluster, tiny_corpus, store, script):
    specs = small_specs(tiny_corpus, 1)
    with pytest.raises(SweepError, match="needs 1 CPU and 1 GPU.*offer 2 CPU, 0 GPU"):
        run_sweep(specs, tiny_corpus, store, script, placement=Placement(gpus=1))
    assert script.calls() == []

"""Nodes that come and go, packs that die, and trials that no node can hold."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
from ray.core.generated import autoscaler_pb2

import rayx
from rayx.errors import SweepError
from rayx.sweep import Placement, cluster, run_sweep, tries
from rayx.sweep.cluster import AHEAD, MAX_AHEAD, Room, connect
from rayx.sweep.packs import Pack, PackSearcher
from rayx.sweep.tries import NODE_DIED, NODE_LOSSES, TRIES, UNKNOWN, Tries
from tests.samples import record, train_spec
from tests.test_sweep import small_specs

BENCH = Path(__file__).parents[1] / "experiments" / "bench"


@pytest.fixture
def store(tmp_path):
    return rayx.open(tmp_path / "store", create=True)


@pytest.fixture
def nodes(monkeypatch):
    """Nodes as Ray lists them, for a test to change."""
    alive = [{"NodeID": name, "Alive": True, "Resources": {"CPU": 4.0}} for name in "abc"]
    monkeypatch.setattr(ray, "nodes", lambda: alive)
    return alive


SPECS = tuple(train_spec(web=1 + i) for i in range(3))
PACK = Pack("pack", SPECS, {spec.run_id: () for spec in SPECS}, ())


def beat(store, *specs, node="a"):
    runs = [spec.run_id for spec in specs]
    store.beat("heartbeats/pack", runs=runs, tokens_per_run=0, node=node)


def die(judge, store, *specs, node="a", pack=PACK, why="worker process has died"):
    beat(store, *specs, node=node)
    return judge.died(pack, why)


def test_a_process_that_dies_each_time_costs_only_its_run_and_only_after_all_tries(store, nodes):
    judge = Tries(store, "commit")
    for _ in range(TRIES):
        assert die(judge, store, SPECS[1]) == PACK
    assert store.status() == {} and store.names("heartbeats") == []
    left = die(judge, store, SPECS[1], why="exit type OOM")
    assert left is not None and list(left.runs) == [SPECS[0].run_id, SPECS[2].run_id]
    assert store.status() == {SPECS[1].run_id: "failed"}
    failure = store.get(SPECS[1].run_id).failure
    assert f"died {TRIES + 1} times" in failure.message and failure.traceback == "exit type OOM"
    assert die(judge, store, SPECS[0], pack=left) == left  # what is left has tries of its own


def test_lost_nodes_burn_no_try_whether_ray_says_so_or_the_node_is_gone(store, nodes):
    judge = Tries(store, "commit")
    for _ in range(NODE_LOSSES // 2):
        assert die(judge, store, SPECS[0], node="b", why=f"The actor died: {NODE_DIED}.") == PACK
    for _ in range(TRIES):
        assert die(judge, store, SPECS[0], node="a") == PACK
    nodes[0]["Alive"] = False  # the machine went after its processes had died
    for _ in range(TRIES):
        assert die(judge, store, SPECS[0], node="c") == PACK
    assert store.status() == {}


def test_before_a_pack_is_given_up_ray_has_time_to_find_that_its_node_is_gone(
    store, nodes, monkeypatch
):
    judge = Tries(store, "commit")
    for _ in range(TRIES):
        assert die(judge, store, SPECS[0]) == PACK
    looks, living = [], ray.nodes
    monkeypatch.setattr(ray, "nodes", lambda: looks.append(1) or living()[len(looks) > 3 :])
    assert die(judge, store, SPECS[0], why=f"The actor {UNKNOWN}: Socket closed") == PACK
    assert len(looks) > 3 and store.status() == {}


def test_a_pack_that_takes_its_machine_down_each_time_ends(store, nodes):
    judge = Tries(store, "commit")
    for _ in range(NODE_LOSSES):
        assert die(judge, store, SPECS[0], why=NODE_DIED) == PACK
    left = die(judge, store, SPECS[0], why=NODE_DIED)
    assert left is not None and len(left.runs) == 2
    assert f"{NODE_LOSSES + 1} nodes" in store.get(SPECS[0].run_id).failure.message


def test_a_batch_that_dies_is_done_one_by_one_before_anything_is_given_up(store, nodes):
    judge = Tries(store, "commit")
    for _ in range(TRIES):
        assert die(judge, store, *SPECS) == PACK
    alone = die(judge, store, *SPECS)
    assert alone == dataclasses.replace(PACK, alone=True) and store.status() == {}


def test_a_pack_that_dies_before_it_begins_is_given_up_whole_but_no_record_is_touched(store, nodes):
    store.put(record(SPECS[0]))
    judge = Tries(store, "commit")
    for _ in range(TRIES):
        assert judge.died(PACK, "ModuleNotFoundError: no module") == PACK
    assert judge.died(PACK, "ModuleNotFoundError: no module") is None
    expected = ["ok", "failed", "failed"]
    assert [store.status()[spec.run_id] for spec in SPECS] == expected


def test_searcher_keeps_to_the_room_and_hands_out_first_what_died():
    packs = [dataclasses.replace(PACK, pack_id=name) for name in "abcd"]
    room, dead = [2], []

    def died(pack, why):
        dead.append((pack.pack_id, why))
        return pack

    searcher = PackSearcher(packs, room=lambda: room[0], died=died)

    def handed(trial: str) -> str | None:
        config = searcher.suggest(trial)
        return config["pack"] if isinstance(config, dict) else config

    assert [handed("t1"), handed("t2")] == ["a", "b"]
    assert handed("t3") is None  # no room
    room[0] = 3  # a node came
    assert handed("t3") == "c"
    searcher.on_trial_complete("t1", error=True)
    searcher.on_trial_death("t1", "why")
    searcher.on_trial_death("t1", "why")  # twice for one
    assert handed("t4") == "a" and dead == [("a", "why")]
    room[0] = 0  # all nodes went: what is in hand stays, nothing is added
    assert handed("t5") is None


def test_room_follows_the_nodes_and_asks_an_autoscaler_for_as_much_again(nodes, monkeypatch):
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.0)
    fixed, elastic = Room(Placement()), Room(Placement(elastic=True, cpus=2))
    assert fixed() == 12 + 1 and elastic() == 6 + AHEAD
    nodes.append({"NodeID": "d", "Alive": True, "Resources": {"CPU": 100.0}})
    assert fixed() == 112 + 1 and elastic() == 56 + 56
    nodes[3]["Resources"]["CPU"] = 1e5
    assert elastic() == 50_006 + MAX_AHEAD
    for node in nodes:
        node["Alive"] = False
    assert elastic() == AHEAD
    gpus = Room(Placement(gpus=0.5))
    nodes.append({"NodeID": "e", "Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}})
    assert gpus() == 4 + 1


@pytest.mark.ray
def test_a_trial_that_no_node_type_can_hold_is_refused_with_elastic_too(
    ray_cluster, monkeypatch, tmp_path, caplog
):
    """The autoscaler's answer is put in its place; a real one is in the slow test."""
    bootstrap = tmp_path / "bootstrap.yaml"
    monkeypatch.setattr(cluster, "BOOTSTRAP", str(bootstrap))
    groups = []
    place = ray.util.placement_group
    monkeypatch.setattr(
        ray.util, "placement_group", lambda b: groups.append(place(b)) or groups[-1]
    )

    def infeasible():
        state = autoscaler_pb2.AutoscalingState()  # pyright: ignore[reportAttributeAccessIssue]
        request = state.infeasible_gang_resource_requests.add()
        request.details = f"{groups[-1].id.hex()}:PACK|PENDING"
        return state

    monkeypatch.setattr(cluster, "_autoscaling_state", infeasible)
    impossible = Placement(gpus=4, elastic=True)
    with pytest.raises(SweepError, match="needs 1 CPU and 4 GPU on one node, and the autoscaler"):
        connect(impossible)
    types = {"small": {"resources": {"CPU": 16}}, "gpu": {"resources": {"CPU": 8, "GPU": 1}}}
    bootstrap.write_text(json.dumps({"available_node_types": types}))
    with pytest.raises(SweepError, match=r"it has small \(16 CPU, 0 GPU\); gpu \(8 CPU, 1 GPU\)"):
        connect(impossible)
    connect(Placement(cpus=2, elastic=True))  # fits now: nobody is asked
    monkeypatch.setattr(cluster, "AUTOSCALER_SECONDS", 0.3)
    connect(Placement(gpus=1, elastic=True))  # there is such a type, but all machines are taken
    assert "No node can hold a trial (1 CPU and 1 GPU)" in caplog.text


def slow_pack(log, specs, corpus, seconds=0.15, **arguments):
    with open(log, "a") as file:
        file.write("".join(f"{os.getpid()} {spec.run_id}\n" for spec in specs))
    time.sleep(seconds)
    return [record(spec) for spec in specs]


@pytest.mark.ray
def test_packs_shorter_than_a_process_start_use_all_cpus(ray_cluster, tiny_corpus, store, tmp_path):
    specs = small_specs(tiny_corpus, 30)
    work = functools.partial(slow_pack, str(tmp_path / "log"))
    run_sweep(specs, tiny_corpus, store, work, placement=Placement(pack_size=1))
    pids = (tmp_path / "log").read_text().split()[::2]
    assert len(pids) == 30 and len(set(pids)) == 2
    assert min(pids.count(pid) for pid in set(pids)) >= 5


def test_people_are_told_again_and_again_that_nothing_runs(monkeypatch, caplog):
    monkeypatch.setattr(tries, "IDLE_SECONDS", 0.0)
    attention = tries.Attention(PackSearcher([]), "1 CPU and 8 GPU")
    for _ in range(2):
        time.sleep(0.01)
        attention.on_step_begin(0, [])
    assert caplog.text.count("no trial for 0 s: each needs 1 CPU and 8 GPU on one node") == 2


# Slow: clusters of several nodes ----------------------------------------------------------------

DRIVER = """
import functools, logging, os, sys, time
logging.basicConfig(level=20)
import ray, rayx
from rayx.corpus import Corpus
from rayx.sweep import Placement, run_sweep, tries
from tests.test_sweep import small_specs

tries.TRIES = 0  # one death that counts would end it
log = sys.argv[3]

def pack(specs, corpus, **arguments):
    from rayx.proxy import train, train_pack
    train.RESUME_SECONDS = 0.5
    resumed = train.read_unfinished
    def noted(store, specs):
        state = resumed(store, specs)
        with open(log, "a") as file:
            steps = state.steps if state else 0
            file.write(f"{ray.get_runtime_context().get_node_id()} {steps}\\n")
        return state
    train.read_unfinished = noted
    try:
        return train_pack(specs, corpus, **arguments)
    finally:
        train.read_unfinished = resumed

corpus = Corpus.load(sys.argv[1])
run_sweep(small_specs(corpus, 1, steps=int(sys.argv[4])), corpus,
          rayx.open(sys.argv[2], create=True), pack, placement=Placement(elastic=True))
"""


@pytest.fixture
def local_nodes(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("clusters.nodes")


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_killed_in_a_long_pack_costs_half_a_second_and_no_try(
    local_nodes, tiny_corpus, tmp_path
):
    env, port = local_nodes.environment(), local_nodes.free_port()
    log, store = tmp_path / "log", tmp_path / "store"
    log.touch()
    head = ["--head", f"--port={port}", "--num-cpus=0", "--include-dashboard=false",
            f"--temp-dir={local_nodes.short_folder()}",
            f"--ray-client-server-port={local_nodes.free_port()}"]  # fmt: skip
    worker = [f"--address=127.0.0.1:{port}", "--num-cpus=1"]
    nodes = [local_nodes.Node("head", head, env, tmp_path / "nodes.log")]
    nodes += [local_nodes.Node(f"node{i}", worker, env, tmp_path / "nodes.log") for i in range(2)]
    driver = None
    try:
        nodes[0].start()
        local_nodes.wait_for_port(port)
        nodes[1].start()
        time.sleep(8)
        arguments = [tiny_corpus.url, str(store), str(log), "6000"]
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, *arguments],
            env={**env, "RAY_ADDRESS": f"127.0.0.1:{port}"}, cwd=BENCH.parents[1],
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not list((store / "unfinished").glob("*")):
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        nodes[2].start()  # the spare one comes while the sweep runs
        nodes[1].kill()
        assert driver.wait(timeout=240) == 0
    finally:
        if driver is not None:
            local_nodes.kill_tree(driver)
        for node in nodes:
            node.kill()
    tries_made = [line.split() for line in log.read_text().splitlines()]
    assert len(tries_made) == 2 and tries_made[0][1] == "0" and int(tries_made[1][1]) > 0
    assert tries_made[0][0] != tries_made[1][0]
    assert list(rayx.open(store).status().values()) == ["ok"]
    assert not list((store / "unfinished").glob("*"))


TWIN = """
import functools, sys
import rayx
from rayx.corpus import Corpus
from rayx.sweep import Placement, run_sweep
from tests.test_elastic import slow_pack
from tests.test_sweep import small_specs
corpus = Corpus.load(sys.argv[1])
run_sweep(small_specs(corpus, 120), corpus, rayx.open(sys.argv[2], create=True),
          functools.partial(slow_pack, sys.argv[3], seconds=0.8),  # longer than a driver's start
          placement=Placement(pack_size=2))
"""


@pytest.mark.slow
@pytest.mark.ray
def test_two_drivers_at_one_sweep_share_it(tiny_corpus, tmp_path):
    (tmp_path / "log").touch()
    arguments = [tiny_corpus.url, str(tmp_path / "store"), str(tmp_path / "log")]

    def drive() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", TWIN, *arguments],
            env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"},
            cwd=BENCH.parents[1],
        )

    first = drive()
    while not list((tmp_path / "store" / "drivers").glob("*.json")):
        assert first.poll() is None
        time.sleep(0.1)
    second = drive()
    assert first.wait(timeout=240) == 0 and second.wait(timeout=240) == 0
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    runs = [run_id for _, run_id in lines]
    assert rayx.open(tmp_path / "store").status() == dict.fromkeys(runs, "ok")
    assert len(set(runs)) == 120
    assert len(runs) - 120 <= 20  # where they met, and where the second had begun
    assert len({pid for pid, _ in lines}) > 2


def bench(name: str, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), *arguments, "--json"],
        capture_output=True, text=True, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.ray
def test_nodes_come_for_an_elastic_sweep_and_go_when_it_is_done(tmp_path):
    plot = tmp_path / "plot.png"
    arguments = ("--packs", "16", "--nodes", "3", "--steps", "600", "--plot", str(plot))
    result = bench("autoscaling", *arguments)
    assert result["ok"] == result["runs"] == 32
    assert result["most_nodes"] >= 2 and len(result["runs_by_node"]) >= 2
    assert result["timeline"][0][1] == result["timeline"][-1][1] == 0  # the head alone
    assert "needs 1 CPU and 8 GPU on one node, and the autoscaler" in result["refusal"]
    assert plot.stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.ray
def test_chaos_in_small_loses_nothing():
    result = bench("chaos", "--packs", "12", "--kills", "5", "--seed", "1", "--steps", "800")
    assert len(result["kills"]) == 5 and set(result["kills_by_kind"]) == {
        "worker", "node", "driver", "server", "cluster",
    }  # fmt: skip
    assert result["records"] == result["runs"] == result["curves_equal"] == 24
    assert result["finished_runs_lost"] == result["finished_runs_changed"] == 0
    assert result["duplicates"] == 0 and result["failures"] == [] and result["choice_equal"]


def test_the_schedule_of_kills_is_a_function_of_its_seed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    chaos = importlib.import_module("clusters.harness")
    what = list(chaos.SHARES)
    first = chaos.schedule(3, 24, 400, what)
    assert first == chaos.schedule(3, 24, 400, what) != chaos.schedule(4, 24, 400, what)
    assert len(first) == 24 and {kill.what for kill in first} == set(what)
    assert [k.after_records for k in first] == sorted(k.after_records for k in first)

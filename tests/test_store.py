"""The store: what is recorded stays, what is damaged is named, and nothing is ever seen half."""

import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import fsspec
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal
from pyarrow import fs

import rayx
from rayx.errors import StoreError
from rayx.mixture import Mixture, Schedule
from rayx.progress import ALIVE_SECONDS, STALLED_SECONDS, progress, state_line
from rayx.record import Loss
from rayx.store import Store, open_store
from rayx.sweep.watcher import Watcher
from tests.samples import SPEC, record, train_spec, two_phases

HERE = Path(__file__).parent


@pytest.fixture(params=["path", "file-url", "objects"])
def store(request, tmp_path) -> Store:
    """A new store on each kind of file system: a folder, a file:// URL, an object store."""
    if request.param == "path":
        return open_store(tmp_path / "store", create=True)
    if request.param == "file-url":
        return open_store((tmp_path / "store").as_uri(), create=True)
    # fsspec's memory, through pyarrow's general adapter, writes objects as s3:// does.
    objects = fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem("memory")))
    return Store(objects, f"bucket-{uuid.uuid4().hex}/store", "memory://")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def local(folder) -> Store:
    return open_store(folder, create=True)


def other_record(seed: int, failed: bool = False):
    """Runs that differ in mixture, schedule and domains, so that columns come and go."""
    schedule = [
        SPEC.schedule,
        two_phases(),
        Schedule.constant(Mixture({"code": 1, f"d{seed % 3}": 2}), 16_384),
    ][seed % 3]
    return record(train_spec(seed=seed, schedule=schedule), loss=2.0 + seed, failed=failed)


# Records --------------------------------------------------------------------------------------


def test_record_is_read_back_equal(store):
    store.put(record())
    assert store.get(SPEC.run_id) == record()
    assert store.records() == [record()]
    assert store.status() == {SPEC.run_id: "ok"}


def test_empty_store_answers_everything(store):
    assert store.status() == {} and store.records() == []
    assert store.runs().empty and store.evals().empty
    assert progress(store)["total"] == 0
    assert store.sql("select count(*) as n from runs")["n"].tolist() == [0]
    assert store.compact() == 0
    assert store.runs().empty and store.evals().empty


def test_failure_never_replaces_a_finished_run(store):
    store.put(record())
    store.put(record(failed=True))
    assert store.status() == {SPEC.run_id: "ok"}
    assert store.get(SPEC.run_id) == record()
    assert store.runs()["status"].tolist() == ["ok"]


def test_record_replaces_a_failure(store):
    store.put(record(failed=True))
    assert store.status() == {SPEC.run_id: "failed"}
    assert store.runs()["failure"].tolist() == ["loss is nan at step 3"]
    store.put(record())
    assert store.status() == {SPEC.run_id: "ok"}
    assert store.runs()["loss/web"].tolist() == [1.0]


def test_record_replaces_a_failure_that_was_compacted(store):
    store.put(record(failed=True))
    store.compact()
    store.put(record())
    assert store.runs()["status"].tolist() == ["ok"]
    assert store.runs()["loss/web"].tolist() == [1.0]
    assert len(store.evals()) == 2


def test_unknown_run_is_an_error_in_words(store):
    with pytest.raises(StoreError, match=r"no record of run 'abc'"):
        store.get("abc")


def test_nan_is_refused_and_leaves_nothing(store):
    broken = dataclasses.replace(record(), seconds=float("nan"))
    with pytest.raises((StoreError, ValueError), match="JSON"):
        store.put(broken)
    assert store.status() == {}


def test_pack_is_read_back_equal(store):
    specs = [train_spec(seed=s) for s in range(3)]
    store.put_pack("pack0", specs)
    assert store.get_pack("pack0") == specs


# Damage ---------------------------------------------------------------------------------------

DAMAGE = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "garbage": lambda text: "\x00\xff not json",
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "another format": lambda text: text.replace('"format": 1', '"format": 99'),
    "without its losses": lambda text: text.replace('"curve"', '"curvy"'),
    "an edited seed": lambda text: text.replace('"seed": 0', '"seed": 5'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_record_is_named_and_left_out(local, folder, caplog, kind):
    local.put(other_record(1))
    local.put(record())
    path = folder / "records" / f"{SPEC.run_id}.json"
    path.write_text(DAMAGE[kind](path.read_text()))
    with pytest.raises(StoreError, match=f"{SPEC.run_id}.*(damaged|edited)"):
        local.get(SPEC.run_id)
    with caplog.at_level(logging.WARNING):
        assert local.runs()["run_id"].tolist() == [other_record(1).run_id]
    assert [SPEC.run_id in line for line in caplog.messages] == [True]
    assert "run the sweep again" in caplog.text
    assert set(local.evals()["run_id"]) == {other_record(1).run_id}
    assert local.compact() == 1
    assert local.sql("select count(*) as n from runs")["n"].tolist() == [1]


def test_renamed_record_is_named_and_left_out(local, folder, caplog):
    local.put(record())
    (folder / "records" / f"{SPEC.run_id}.json").rename(folder / "records" / "0123456789ab.json")
    assert local.records() == []
    assert f"0123456789ab.json holds run {SPEC.run_id}" in caplog.text


def test_record_that_is_not_text_or_not_a_file_is_named_and_left_out(local, folder, caplog):
    local.put(record())
    (folder / "records" / "aaaaaaaaaaaa.json").write_bytes(b"\xff\xfe\x00\x01")
    (folder / "records" / "bbbbbbbbbbbb.json").mkdir()
    (folder / "records" / "not a run.json").write_text("{}")
    assert local.records() == [record()]
    assert "aaaaaaaaaaaa" in caplog.text and "not a run" in caplog.text
    assert set(local.status()) == {SPEC.run_id, "aaaaaaaaaaaa", "not a run"}


def test_files_of_others_and_half_written_files_are_not_seen(local, folder):
    local.put(record())
    (folder / "records" / ".0a1b2c").write_text('{"half": ')
    (folder / "records" / ".hidden.json").write_text("{")
    (folder / "records" / "notes.txt").write_text("hello")
    assert local.status() == {SPEC.run_id: "ok"}


# Nothing is seen half -------------------------------------------------------------------------


def test_reader_sees_old_or_new_content_never_a_part(local):
    contents = [b"a" * 300_000, b"b" * 1_000_000]
    stop = threading.Event()

    def write() -> None:
        i = 0
        while not stop.is_set():
            local.write_bytes("plans/big.json", contents[i % 2])
            i += 1

    local.write_bytes("plans/big.json", contents[0])
    writer = threading.Thread(target=write)
    writer.start()
    try:
        seen = {local.read_bytes("plans/big.json") for _ in range(300)}
    finally:
        stop.set()
        writer.join()
    assert seen <= set(contents)


def test_listing_survives_a_folder_that_comes_and_goes(local, folder):
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            (folder / "records").mkdir()
            (folder / "records").rmdir()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        assert all(local.status() == {} for _ in range(20_000))
    finally:
        stop.set()
        thread.join()


WRITER = """
import dataclasses, itertools, sys
sys.path.insert(0, {here!r})
from tests.samples import record, train_spec
import rayx
store = rayx.open({url!r})
for seed in itertools.islice(itertools.count(), {count}):
    run = record(train_spec(seed=seed), failed={failed})
    store.put(dataclasses.replace(run, curve=run.curve * 20))
"""


def start_writer(url: Path, count: int | None, failed: bool = False) -> subprocess.Popen:
    code = WRITER.format(here=str(HERE), url=str(url), count=count, failed=failed)
    return subprocess.Popen([sys.executable, "-c", code])


def test_reader_beside_a_writer_never_sees_a_broken_record(local, folder, caplog):
    writer = start_writer(folder, 500)
    counts = [0]
    while writer.poll() is None:
        run_ids = list(local.status())
        counts.append(len(run_ids))
        sample = run_ids[:: 1 + len(run_ids) // 20]
        assert len(local.records(sample)) == len(sample)
    assert writer.returncode == 0
    assert not caplog.messages
    assert counts == sorted(counts) and len(set(counts)) > 2
    assert len(local.status()) == 500
    assert len(local.records()) == 500


def test_killed_writer_leaves_whole_records_only(local, folder, caplog):
    writer = start_writer(folder, None)
    try:
        deadline = time.monotonic() + 60
        while len(local.status()) < 30 and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    assert len(local.records()) == len(local.status()) >= 30
    assert not caplog.messages


def test_two_writers_of_the_same_runs_agree(local, folder):
    writers = [start_writer(folder, 20), start_writer(folder, 20, failed=True)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert list(local.status().values()) == ["ok"] * 20
    assert len(local.runs()) == 20


# Compaction -----------------------------------------------------------------------------------


def tables(store: Store) -> tuple[pd.DataFrame, pd.DataFrame]:
    return store.runs(), store.evals()


@pytest.mark.parametrize("compact_after", [(), (0,), (1, 4), (2, 3, 9), range(10)])
def test_tables_do_not_depend_on_when_they_were_compacted(store, tmp_path, compact_after):
    plain = open_store(tmp_path / "plain", create=True)
    for seed in range(10):
        run = other_record(seed, failed=seed in (2, 5))
        store.put(run)
        plain.put(run)
        if seed in compact_after:
            store.compact()
    for got, expected in zip(tables(store), tables(plain), strict=True):
        assert_frame_equal(got, expected, check_like=True)
    assert len(store.runs()) == 10 and len(store.evals()) == 16


def test_row_goes_when_its_record_goes(store):
    for seed in range(3):
        store.put(other_record(seed))
    store.compact()
    gone = other_record(1).run_id
    store.remove(f"records/{gone}.json")
    assert len(store.runs()) == 2 and gone not in set(store.runs()["run_id"])
    assert gone not in set(store.evals()["run_id"])
    store.compact()
    assert len(store.runs()) == 2


def test_compaction_spares_the_reading_of_old_records(local, folder):
    for seed in range(3):
        local.put(other_record(seed))
    local.compact()
    for path in (folder / "records").iterdir():
        path.write_text("not read again")
    assert len(local.runs()) == 3 and len(local.evals()) == 6


def test_domains_that_a_run_lacks_have_weight_zero_and_targets_no_loss(store):
    store.put(other_record(0))
    math_run = other_record(1)
    curve = tuple(
        dataclasses.replace(p, losses={"math": Loss(1.0, 0.5, 0.1)}) for p in math_run.curve
    )
    store.put(dataclasses.replace(math_run, curve=curve))
    runs = store.runs().set_index("run_id")
    assert runs.loc[other_record(0).run_id, "weight/math"] == 0.0
    assert runs.loc[other_record(0).run_id, "epochs/math"] == 0.0
    assert runs.loc[math_run.run_id, "weight/math"] == 0.5
    assert runs["loss/math"].isna().sum() == runs["loss/web"].isna().sum() == 1


# Names ----------------------------------------------------------------------------------------

OUTSIDE = [
    "../outside.json",
    "records/../../outside.json",
    "/etc/outside.json",
    "records//x.json",
    "records/.hidden.json",
    ".",
    "..",
    "",
    "records/a\x00b.json",
    "records/a b.json",
    "records/a\n.json",
    "records\\x.json",
    "~/x.json",
    "records/" + "x" * 200,
    "s3://bucket/x",
]


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_cannot_leave_the_store(store, name):
    for use in (
        lambda: store.write_json(name, {}),
        lambda: store.read_json(name),
        lambda: store.remove(name),
        lambda: store.names(name),
        lambda: store.get(f"../{name}"),
        lambda: store.put_pack(name + "\x00", []),
    ):
        with pytest.raises(StoreError, match="cannot be used in a store|damaged"):
            use()


def test_writing_over_a_link_does_not_follow_it(local, folder, tmp_path):
    target = tmp_path / "precious.json"
    target.write_text("mine")
    (folder / "records").mkdir()
    (folder / "records" / f"{SPEC.run_id}.json").symlink_to(target)
    local.put(record())
    assert target.read_text() == "mine"
    assert local.get(SPEC.run_id) == record()


# SQL ------------------------------------------------------------------------------------------


def test_sql_answers_over_runs_and_evals(store):
    for seed in range(3):
        store.put(other_record(seed))
    assert store.sql("select count(*) as n from runs")["n"].tolist() == [3]
    best = store.sql('select run_id, "loss/web" as l from runs order by l limit 1')
    assert best["run_id"].tolist() == [other_record(0).run_id] and best["l"].tolist() == [1.0]
    joined = store.sql(
        "with last as (select run_id, min(loss_bpb) as l from evals group by run_id) "
        "select count(*) as n from last join runs using (run_id) where status = 'ok'"
    )
    assert joined["n"].tolist() == [3]


secret = pd.DataFrame({"secret": [1]})  # a frame of the caller's, which SQL must not find


@pytest.mark.parametrize(
    "query",
    [
        "select * from read_csv('/etc/passwd')",
        "select * from read_text('/etc/passwd')",
        "select * from '/etc/passwd'",
        "select * from read_blob('/etc/hostname')",
        "select * from glob('/etc/*')",
        "copy runs to '/tmp/rayx-should-not-exist.csv'",
        "attach '/tmp/rayx-should-not-exist.db' as other",
        "install httpfs",
        "load httpfs",
        "pragma database_list",
        "set enable_external_access = true",
        "create table t as select 1",
        "insert into runs select * from runs",
        "delete from runs",
        "drop view runs",
        "select 1; select 2",
        "select 1; drop view runs",
        "export database '/tmp/rayx-should-not-exist'",
        "call pragma_version()",
        "",
        "-- nothing",
        "select * from secret",
        "select * from frame",
    ],
)
def test_sql_is_one_select_over_the_two_tables_only(local, query):
    local.put(record())
    with pytest.raises(StoreError, match=r"Query"):
        local.sql(query)
    assert not list(Path("/tmp").glob("rayx-should-not-exist*"))
    assert len(local.runs()) == 1


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("drop table runs", "'drop table runs' is not one SELECT"),
        ("select los from evals", "loss_bpb"),  # DuckDB names the candidates
        ("select * from run", "runs"),
        ("select weight/web from runs", "weight/web"),
        ("selec 1", "selec"),
    ],
)
def test_sql_errors_help(local, query, words):
    local.put(record())
    with pytest.raises(StoreError, match=words):
        local.sql(query)


# Opening --------------------------------------------------------------------------------------


def test_open_needs_a_store_unless_it_may_create_one(folder):
    with pytest.raises(StoreError, match=r"No store at .*store\.json is missing.*--store"):
        open_store(folder)
    assert not folder.exists()
    created = open_store(folder, create=True)
    created.put(record())
    assert open_store(folder, create=True).status() == {SPEC.run_id: "ok"}
    assert rayx.open(str(folder)).status() == {SPEC.run_id: "ok"}
    assert repr(str(folder)) in repr(rayx.open(str(folder)))


def test_open_by_url_and_by_path_is_the_same_store(folder):
    open_store(folder.as_uri(), create=True).put(record())
    assert open_store(folder).records() == [record()]


@pytest.mark.parametrize(
    ("marker", "words"),
    [
        ('{"format": 99}', "format 99; this rayx reads 1"),
        ("{}", "format None"),
        ("[]", "cannot be read"),
        ("half a fi", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_open_of_another_or_broken_format_is_refused(folder, marker, words):
    folder.mkdir()
    (folder / "store.json").write_text(marker)
    for create in (False, True):
        with pytest.raises(StoreError, match=words):
            open_store(folder, create=create)
    assert (folder / "store.json").read_text() == marker


@pytest.mark.parametrize("create", [False, True])
def test_open_of_a_file_is_refused(tmp_path, create):
    (tmp_path / "file").write_text("hello")
    with pytest.raises(StoreError, match="file"):
        open_store(tmp_path / "file", create=create)
    assert (tmp_path / "file").read_text() == "hello"


@pytest.mark.parametrize("url", ["carrier-pigeon://coop/1", "http://example.org/store", "://x"])
def test_open_of_an_unknown_scheme_says_what_is_known(url):
    with pytest.raises(StoreError, match=r"local path, s3:// or gs://"):
        open_store(url)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_store_that_may_not_be_written_says_so(folder, local):
    folder.chmod(0o500)
    try:
        with pytest.raises(StoreError, match="permission"):
            local.put(record())
    finally:
        folder.chmod(0o700)


def test_store_that_cannot_be_written_says_so(folder, local):
    (folder / "records").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match=r"Cannot write records/.*permission and space"):
        local.put(record())


def test_store_is_read_without_ray_or_torch(folder, local):
    local.put(record())
    local.compact()
    code = (
        "import sys, rayx\n"
        f"store = rayx.open({str(folder)!r})\n"
        "assert len(store.runs()) == 1 and len(store.evals()) == 2\n"
        "assert store.sql('select count(*) as n from runs')['n'][0] == 1\n"
        "from rayx.progress import progress\n"
        "assert progress(store)['total'] == 0\n"
        "print({'ray', 'torch', 'lightgbm', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# Progress -------------------------------------------------------------------------------------


def sweep(store: Store, name: str, specs: list, started: float, tokens_before: int = 0) -> None:
    store.write_json(
        f"sweeps/{name}.json",
        {
            "tokens": {spec.run_id: spec.tokens for spec in specs},
            "tokens_before": tokens_before,
            "started": started,
            "corpus": "corpus",
        },
    )


def beat_at(store: Store, name: str, at: float, **facts) -> None:
    store.write_json(f"{name}.json", {**facts, "time": at})


def test_progress_counts_done_failed_and_running(store):
    now = time.time()
    specs = [train_spec(seed=s) for s in range(6)]
    sweep(store, "one", specs, started=now - 60, tokens_before=7)
    beat_at(store, "drivers/one", now, state="running")
    store.put(record(specs[0]))
    store.put(record(specs[1], failed=True))
    store.put(record(train_spec(seed=99)))  # of another sweep, not counted
    live = [specs[1].run_id, specs[2].run_id, specs[3].run_id]
    beat_at(store, "heartbeats/live", now, runs=live, tokens_per_run=1000)
    old = now - ALIVE_SECONDS - 1
    beat_at(store, "heartbeats/stale", old, runs=[specs[4].run_id], tokens_per_run=5000)
    state = progress(store)
    assert state.pop("seconds") == pytest.approx(60, abs=1)
    assert state.pop("seen") == now
    assert state == {
        "total": 6,
        "ok": 1,
        "failed": 1,
        "running": 2,
        "tokens": 2 * SPEC.tokens + 2 * 1000,
        "tokens_total": 6 * SPEC.tokens,
        "alive": True,
        "state": "starting",  # its driver has not seen a pack move
        "new_tokens": 2 * SPEC.tokens + 2 * 1000 - 7,
    }


@pytest.mark.parametrize(
    ("age", "driver", "alive", "state"),
    [
        (0, {"state": "running", "moved": None}, True, "starting"),
        (0, {"state": "running", "moved": -1.0}, True, "running"),
        (0, {"state": "running", "moved": -STALLED_SECONDS - 1}, True, "stalled"),
        (0, {"state": "stopped"}, False, "stopped"),
        (3600, {"state": "stopped"}, False, "stopped"),
        (ALIVE_SECONDS + 1, {"state": "running", "moved": 0.0}, False, "dead"),
        (ALIVE_SECONDS - 5, {"state": "running", "moved": 0.0}, True, "running"),
        (-ALIVE_SECONDS + 5, {"state": "running", "moved": 0.0}, True, "running"),  # clocks differ
        (-3600, {"state": "running", "moved": 0.0}, False, "dead"),  # a clock that is wrong
        (None, {}, True, "starting"),  # no heartbeat yet
    ],
)
def test_progress_tells_a_live_driver_from_a_dead_one(store, age, driver, alive, state):
    now = time.time()
    sweep(store, "one", [SPEC], started=now)
    if age is not None:
        if driver.get("moved") is not None:
            driver = driver | {"moved": now - age + driver["moved"]}
        beat_at(store, "drivers/one", now - age, **driver)
    assert (progress(store)["alive"], progress(store)["state"]) == (alive, state)
    store.put(record())
    assert progress(store)["state"] == (state if alive else "finished")


def test_the_heartbeat_goes_on_while_a_look_at_the_store_takes_long(local, monkeypatch):
    monkeypatch.setattr("rayx.sweep.watcher.BEAT_SECONDS", 0.02)
    held = threading.Event()

    def slow(store, sweep_id):
        held.wait(10)
        raise OSError("the store is away")

    monkeypatch.setattr("rayx.sweep.watcher.progress", slow)
    sweep(local, "one", [SPEC], started=time.time())
    watcher = Watcher(local, "one")
    watcher.start()
    times = set()
    deadline = time.monotonic() + 5
    while len(times) < 3 and time.monotonic() < deadline:
        times |= {(local.facts("drivers/one.json") or {}).get("time")} - {None}
    held.set()
    watcher.stop()
    assert len(times) >= 3
    last = local.facts("drivers/one.json")
    time.sleep(0.1)
    assert local.facts("drivers/one.json") == last  # none comes after the stop


def test_state_in_words(local):
    sweep(local, "one", [SPEC], started=time.time() - 4000)
    beat_at(local, "drivers/one", time.time() - 3600, state="running", moved=None)
    assert state_line(progress(local)) == (
        "dead: last sign of life 1h00m ago; run it again to go on"
    )


def test_damaged_records_are_counted(local, folder):
    for seed in range(3):
        local.put(other_record(seed))
    local.compact()
    assert local.parts.damaged_records() == []
    local.put(other_record(3))
    (folder / "records" / f"{other_record(3).run_id}.json").write_text("half")
    assert local.parts.damaged_records() == [other_record(3).run_id]


def test_progress_of_two_sweeps_counts_shared_runs_once(store):
    now = time.time()
    specs = [train_spec(seed=s) for s in range(3)]
    sweep(store, "one", specs[:2], started=now - 500)
    sweep(store, "two", specs[1:], started=now - 100, tokens_before=5)
    beat_at(store, "drivers/one", now - 450, state="stopped")
    beat_at(store, "drivers/two", now, state="running")
    alone = progress(store, "one")
    assert (alone["total"], alone["alive"]) == (2, False)
    state = progress(store)
    assert state["total"] == 3 and state["new_tokens"] == -5 and state["alive"]
    assert state["seconds"] == pytest.approx(100, abs=1)


def test_progress_survives_broken_and_vanishing_heartbeats(local, folder):
    sweep(local, "one", [SPEC], started=time.time())
    local.beat("heartbeats/pack0", runs=[SPEC.run_id], tokens_per_run=10)
    (folder / "heartbeats" / "broken.json").write_text('{"runs": ')
    (folder / "drivers").mkdir()
    (folder / "drivers" / "one.json").write_text("")
    (folder / "sweeps" / "broken.json").write_text("[")
    state = progress(local)
    assert state["total"] == 1 and state["running"] == 1


def test_progress_survives_a_pack_that_ends_while_it_is_read(local):
    class Listing(Store):
        def names(self, folder: str) -> list[str]:
            return [*super().names(folder), *(["ended"] if folder == "heartbeats" else [])]

    sweep(local, "one", [SPEC], started=time.time())
    assert progress(Listing(local.filesystem, local.root, local.url))["running"] == 0


def test_heartbeat_holds_its_facts_and_the_time(store):
    store.beat("drivers/one", state="running")
    beat = store.read_json("drivers/one.json")
    assert beat["state"] == "running" and abs(beat["time"] - time.time()) < 5
    assert json.loads(store.read_bytes("drivers/one.json")) == beat

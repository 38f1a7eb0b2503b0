"""Stores and corpora on s3://, on a server that is slow, busy, cuts connections, says no and dies.

The contract holds on a folder, on the server of `tests/s3_server.py`, and on moto's, which is the
reference that keeps ours honest.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import rayx
import rayx.remote
from rayx.corpus import Corpus, build_corpus, transfer
from rayx.errors import CorpusError, StoreError, UnreachableError
from rayx.files import Files
from rayx.remote import locate
from rayx.store import open_store
from tests.s3_server import CREDENTIALS, S3Server
from tests.samples import SPEC, record, train_spec

ROOT = Path(__file__).parents[1]
FAULTS = {
    "busy": {"busy": 0.5},
    "cut puts": {"cut_put": 0.5},
    "cut gets": {"cut_get": 0.5},
    "lost answers": {"lost": 0.5},
    "slow": {"seconds": 0.02},
}


@pytest.fixture(scope="module", autouse=True)
def credentials():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def one_server(tmp_path_factory):
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def server(one_server):
    one_server.faults()
    yield one_server
    if one_server.process is None:
        one_server.start()
    one_server.faults()


@pytest.fixture(scope="module")
def moto_port():
    server = pytest.importorskip("moto.server", reason="moto is not installed: pip install .[dev]")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    moto = server.ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    moto.start()
    port = moto.get_host_and_port()[1]
    made = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
    urllib.request.urlopen(made, timeout=10).close()
    yield port
    moto.stop()


@pytest.fixture(params=["folder", "server", "moto"])
def url(request, tmp_path):
    """An empty place for a store on each kind of storage."""
    name = f"store-{random.getrandbits(48):x}"
    if request.param == "folder":
        return str(tmp_path / name)
    if request.param == "server":
        return request.getfixturevalue("server").url(name)
    port = request.getfixturevalue("moto_port")
    return f"s3://bucket/{name}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


@pytest.fixture
def impatient(monkeypatch):
    """Every fault gets to our own loop, which does not wait long."""
    monkeypatch.setattr(rayx.remote, "SDK_TRIES", 1)
    monkeypatch.setattr(rayx.remote, "PAUSES", (0.01, 0.1))


@pytest.fixture
def files(server, impatient) -> Files:
    place = server.url(f"files-{random.getrandbits(48):x}")
    return Files(*locate(place), place)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("RAYX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# The contract ----------------------------------------------------------------------------------


def test_files_are_read_back_replaced_listed_and_removed(url):
    files = Files(*locate(url), url)
    large = os.urandom(12_000_000)  # an upload in parts
    for name, data in (("a/x.json", b"1"), ("a/large.json", large), ("a/empty.json", b"")):
        files.write_bytes(name, data)
        assert files.read_bytes(name) == data and files.exists(name)
    files.write_bytes("a/large.json", b"short")
    files.write_bytes("a/x.json", b"longer than before")
    assert files.read_bytes("a/large.json") == b"short"
    assert files.read_bytes("a/x.json") == b"longer than before"
    files.write_bytes("a/deep/y.json", b"1")
    files.write_bytes("ab/z.json", b"1")
    files.write_bytes("a/other.txt", b"1")
    assert files.names("a") == ["empty", "large", "x"]
    files.remove("a/x.json")
    files.remove("ab/z.json")
    assert files.names("a") == ["empty", "large"]
    assert files.names("ab") == files.names("none") == []
    assert not files.exists("a/x.json") and not files.exists("a/deep") and not files.exists("b")
    for use in (files.read_bytes, files.remove, files.read_json):
        with pytest.raises(FileNotFoundError):
            use("a/x.json")
    with pytest.raises(ValueError, match="at most 3"):
        files.read_bytes("a/large.json", 3)


def test_store_is_the_same_wherever_it_is(url, tmp_path):
    with pytest.raises(StoreError, match="store.json is missing"):
        rayx.open(url)
    store, plain = open_store(url, create=True), open_store(tmp_path / "plain", create=True)
    for seed in range(4):
        run = record(train_spec(seed=seed), loss=2.0 + seed, failed=seed == 2)
        for one in (store, plain):
            one.put(run)
            if seed == 1:
                one.compact()
    again = rayx.open(url)
    assert again.status() == plain.status() and again.records() == plain.records()
    assert again.runs().equals(plain.runs()) and again.evals().equals(plain.evals())
    count = "select status, count(*) as n from runs group by status order by n"
    assert again.sql(count)["n"].tolist() == [1, 3]


def test_more_names_than_one_answer_holds(server):
    place = server.url("many")
    names = [f"{number:05d}" for number in range(2_345)]
    for name in names:  # as its disk has them, which is faster than as many requests
        (server.folder / "data" / "bucket" / f"many%2Frecords%2F{name}%2Ejson").write_bytes(b"1")
    server.kill()
    server.start()
    files = Files(*locate(place), place)
    began = time.perf_counter()
    assert files.names("records") == names
    assert time.perf_counter() - began < 5
    assert server.state()["seen"] == {"GET": 3, "well": 3}


# Trouble ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", FAULTS)
def test_trouble_that_passes_is_waited_out(files, server, fault):
    server.faults(**FAULTS[fault])
    for number in range(9):
        data = os.urandom(1_000 * number)
        files.write_bytes(f"a/{number}.json", data)
        assert files.read_bytes(f"a/{number}.json") == data
        assert files.names("a")[-1] == str(number) and files.exists(f"a/{number}.json")
    files.remove("a/0.json")
    assert files.names("a") == list("12345678")
    if fault != "slow":
        assert server.state()["seen"][next(iter(FAULTS[fault]))] > 3


@pytest.mark.parametrize("fault", ["cut_put", "lost", "busy"])
def test_upload_in_parts_that_breaks_is_seen_whole_or_not_at_all(files, server, fault):
    """Where the first request fails, pyarrow by itself leaves an empty object."""
    data = [random.Random(n).randbytes(11_000_000 + n) for n in range(2)]
    seen: list[bool] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.wait(0.02):
            if files.exists("a/x"):
                seen.append(files.read_bytes("a/x") in data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for times, content in enumerate(data, 1):
            server.faults(**{fault: 1.0}, times=times)
            files.write_bytes("a/x", content)
    finally:
        server.faults()
        stop.set()
        reader.join()
    assert files.read_bytes("a/x") == data[-1] and seen and all(seen)


def test_object_that_is_replaced_while_it_is_read_never_comes_in_part(files):
    contents = [b"a" * 100_000, b"b" * 300_000]
    files.write_bytes("a/x", contents[0])
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            files.write_bytes("a/x", contents[number % 2])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(files.read_bytes("a/x") in contents for _ in range(60))
    finally:
        stop.set()
        writer.join()


def test_concurrent_writers_of_one_name_leave_one_whole(files):
    contents = [bytes([n]) * (100_000 + n) for n in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda content: files.write_bytes("a/x", content), contents))
    assert files.read_bytes("a/x") in contents


def test_writer_that_is_killed_in_a_put_leaves_nothing(server, files):
    code = (
        "import sys; from rayx.files import Files; from rayx.remote import locate\n"
        "files = Files(*locate(sys.argv[1]), ''); data = bytes(60_000_000)\n"
        "print('go', flush=True); files.write_bytes('a/x.json', data)"
    )
    server.faults(seconds=0.2)  # of each request: some ten of them a put
    for seconds in (0.1, 0.4):
        writer = subprocess.Popen(
            [sys.executable, "-c", code, files.url], stdout=subprocess.PIPE, cwd=ROOT
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(seconds)
        writer.kill()
        writer.wait()
    server.faults()
    assert files.names("a") == [] and not files.exists("a/x.json")


def test_server_that_dies_and_comes_back_loses_no_record(server, files):
    store = open_store(files.url, create=True)
    store.put(record(train_spec(seed=1)))
    server.kill()
    back = threading.Timer(1.0, server.start)
    back.start()
    store.put(record())
    back.join()
    assert store.records() == sorted(
        [record(), record(train_spec(seed=1))], key=lambda record: record.run_id
    )


def test_server_that_stays_away_is_given_up_with_its_name(server, files, monkeypatch):
    monkeypatch.setattr(rayx.remote, "RETRY_SECONDS", 0.3)
    store = open_store(files.url, create=True)
    store.put(record())
    server.kill()
    for use in (store.put, lambda _: store.records(), lambda _: store.status()):
        with pytest.raises(UnreachableError, match=r"s3://bucket.*NETWORK_CONNECTION.*network"):
            use(record())
    server.start()
    assert store.records() == [record()]


def test_heartbeat_is_tried_once(server, files):
    store = open_store(files.url, create=True)
    server.faults(busy=1.0)
    with pytest.raises(UnreachableError):
        store.beat("heartbeats/pack")
    assert server.state()["seen"] == {"PUT": 1, "busy": 1}


@pytest.mark.slow  # 7 s: a second of silence takes the SDK three to see
def test_hanging_server_is_asked_again(server, monkeypatch, impatient):
    monkeypatch.setattr(rayx.remote, "SILENT_SECONDS", 1.0)
    files = Files(*locate(server.url("hang")), server.url("hang"))
    server.faults(seconds=60)
    threading.Timer(0.3, server.faults).start()
    files.write_json("x.json", 1)
    assert files.read_json("x.json") == 1


def test_no_permission_is_said_at_once(server, files):
    store = open_store(files.url, create=True)
    server.faults(deny=["PUT", "POST"])
    with pytest.raises(UnreachableError, match=r"(?s)records/.*Permission s3:PutObject.*AWS_ACC"):
        store.put(record())
    assert server.state()["seen"] == {"PUT": 1, "deny": 1}
    server.faults(deny=["GET", "HEAD", "DELETE"])
    for use, action in (
        (lambda: rayx.open(files.url), "s3:GetObject"),
        (lambda: store.status(), "s3:ListBucket"),
    ):
        with pytest.raises(UnreachableError, match=f"Permission {action}"):
            use()


def test_bucket_that_is_not_there_is_named(server):
    place = server.url("x").replace("bucket", "missing")
    with pytest.raises(StoreError, match="No store"):
        rayx.open(place)
    with pytest.raises(UnreachableError, match="NO_SUCH_BUCKET.*Make the bucket"):
        open_store(place, create=True)


def test_record_that_cannot_be_reached_is_never_taken_for_damaged(server, files):
    """Else a sweep would remove it and do the run again."""
    store = open_store(files.url, create=True)
    store.put(record())
    server.faults(deny=["HEAD"])
    for use in (lambda: store.get(SPEC.run_id), store.records, store.runs):
        with pytest.raises(UnreachableError, match="s3:GetObject"):
            use()
    server.faults()
    assert store.records() == [record()]


# Corpora ---------------------------------------------------------------------------------------


@pytest.fixture
def remote(server, tiny_corpus, tmp_path, cache, impatient) -> Corpus:
    """The tiny corpus on the server, and nothing of it in the cache."""
    shutil.copytree(tiny_corpus.url, tmp_path / "copy")
    place = server.url(f"corpus-{random.getrandbits(48):x}")
    transfer.upload(tmp_path / "copy", place)
    shutil.rmtree(cache)
    return Corpus.load(place)


def shards(cache: Path) -> list[Path]:
    return sorted(p for p in (cache / "shards").glob("*") if not p.suffix)


def test_remote_corpus_is_the_local_one_and_fetches_only_what_is_asked(remote, tiny_corpus, cache):
    assert remote.manifest == tiny_corpus.manifest
    assert remote.tokenizer().to_str() == tiny_corpus.tokenizer().to_str()
    assert not cache.exists()
    assert np.array_equal(remote.train("code"), tiny_corpus.train("code"))
    assert len(shards(cache)) == 1
    assert np.array_equal(remote.heldout("law"), tiny_corpus.heldout("law"))
    assert len(shards(cache)) == 2
    remote.verify()


def test_remote_corpus_is_read_through_trouble(remote, tiny_corpus, server):
    server.faults(busy=0.2, cut_get=0.2, lost=0.1)
    corpus = Corpus.load(remote.url)
    for domain in corpus.domains:
        assert np.array_equal(corpus.train(domain), tiny_corpus.train(domain))
    server.kill()
    assert len(corpus.train("code"))  # it is here


def test_processes_of_a_node_fetch_a_shard_once(remote, server):
    server.faults(seconds=0.02)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: Corpus(remote.url, remote.manifest).train("code"), range(16)))
    assert server.state()["seen"]["GET"] == 1


@pytest.mark.parametrize("damage", ["cut", "overwritten", "gone"])
def test_damaged_cache_is_fetched_again(remote, tiny_corpus, cache, damage):
    remote.train("code")
    [file] = shards(cache)
    if damage == "gone":
        file.unlink()
    else:
        size = 100 if damage == "cut" else file.stat().st_size
        file.chmod(0o600)
        file.write_bytes(b"\0" * size)
    assert np.array_equal(remote.train("code"), tiny_corpus.train("code"))


def test_changed_shard_is_named_and_not_kept(remote, server, cache):
    [file] = [p for p in (server.folder / "data/bucket").iterdir()
              if p.name.startswith(remote.url.split("/")[3].split("?")[0]) and "code%2Ftrain" in p.name]  # fmt: skip  # noqa: E501
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(CorpusError, match=r"domains/code/train.bin has changed.*Build the corpus"):
        remote.train("code")
    assert not shards(cache)
    with pytest.raises(CorpusError, match="has changed"):
        remote.verify()


def test_full_cache_and_no_cache_are_named(remote, cache, monkeypatch):
    full = shutil._ntuple_diskusage(10**9, 10**9, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    with pytest.raises(CorpusError, match="0 MB free.*RAYX_CACHE"):
        remote.train("code")
    monkeypatch.undo()
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    shutil.rmtree(cache)
    cache.write_text("a file")
    monkeypatch.setenv("RAYX_CACHE", str(cache))
    with pytest.raises(CorpusError, match="no folder for copies.*RAYX_CACHE"):
        remote.train("code")


def test_corpus_is_built_on_a_url_and_an_interrupted_upload_goes_on(
    server, cache, tmp_path, monkeypatch
):
    from rayx.corpus import Source

    for domain in ("web", "code"):
        lines = [f'{{"text": "{domain} {n} {"word " * 20}{n * 7}"}}' for n in range(200)]
        (tmp_path / f"{domain}.jsonl").write_text("\n".join(lines))
    sources = [Source(path=str(tmp_path / f"{d}.jsonl"), domain=d) for d in ("web", "code")]
    place = server.url("built")
    real, sent = transfer._put, []

    def dying(filesystem, path, content, url) -> None:
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(path)
        real(filesystem, path, content, url)

    def build() -> Corpus:
        return build_corpus(sources, place, tokenizer=300, heldout_share=0.2, min_heldout_tokens=64)

    monkeypatch.setattr(transfer, "_put", dying)
    with pytest.raises(KeyboardInterrupt):
        build()
    with pytest.raises(CorpusError, match="is no corpus: it has no manifest"):
        Corpus.load(place)
    before = [path for path in sent if path.endswith(".bin")]
    sent.clear()
    monkeypatch.setattr(
        transfer, "_put", lambda *args: (sent.append(args[1]), real(*args)) and None
    )
    corpus = build()
    assert before and not set(before) & set(sent) and sent[-1].endswith("manifest.json")
    assert corpus.domains == ("web", "code")
    sent.clear()
    assert build().fingerprint == corpus.fingerprint and not sent
    assert len(corpus.train("web")) == corpus.tokens["web"]
    with pytest.raises(CorpusError, match="holds corpus .* other sources"):
        build_corpus(sources[:1], place, tokenizer=300, heldout_share=0.2, min_heldout_tokens=64)
    open_store(server.url("taken"), create=True)
    with pytest.raises(CorpusError, match=r"not a corpus \(store.json\)"):
        build_corpus(sources, server.url("taken"), tokenizer=300)


# A sweep ---------------------------------------------------------------------------------------

SWEEP = """
import sys, threading, time
from pathlib import Path
import ray, rayx, rayx.remote
from rayx import Corpus
from rayx.proxy import train_pack
from rayx.store import open_store
from rayx.sweep import run_sweep
from tests.s3_server import S3Server
from tests.test_sweep import small_specs

if __name__ == "__main__":
    corpus_url, store_url, temp = sys.argv[1:]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, _temp_dir=temp)
    corpus = Corpus.load(corpus_url)
    run_sweep(small_specs(corpus, 8, 30), corpus, open_store(store_url, create=True), train_pack)
"""


@pytest.mark.slow  # 60 s
@pytest.mark.ray
def test_sweep_through_trouble_has_the_records_of_one_without(
    remote, tiny_corpus, server, tmp_path, cache
):
    (tmp_path / "sweep.py").write_text(SWEEP)
    place = server.url(f"sweep-{random.getrandbits(48):x}")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}

    def sweep(corpus: str, store: str) -> subprocess.Popen:
        temp = f"/tmp/s3r{random.getrandbits(24):x}"
        arguments = [sys.executable, tmp_path / "sweep.py", corpus, store, temp]
        return subprocess.Popen(arguments, env=environment, cwd=tmp_path)

    assert sweep(tiny_corpus.url, str(tmp_path / "plain")).wait(200) == 0
    server.faults(busy=0.2)
    process = sweep(remote.url, place)
    for done in (2, 5):
        while process.poll() is None and len(records(server, place)) < done:
            time.sleep(0.1)
        server.kill()
        time.sleep(4)
        server.start()
    assert process.wait(300) == 0
    assert server.state()["seen"]["busy"] > 5
    server.faults()
    store, plain = rayx.open(place), rayx.open(tmp_path / "plain")
    assert store.status() == plain.status() and set(store.status().values()) == {"ok"}
    for one, other in zip(store.records(), plain.records(), strict=True):
        assert (one.spec, one.curve, one.tokens) == (other.spec, other.curve, other.tokens)


def records(server: S3Server, place: str) -> list[Path]:
    """What the server has on its disk, whatever it answers."""
    name = place.split("/")[3].split("?")[0]
    folder = server.folder / "data" / "bucket"
    return [p for p in folder.iterdir() if p.name.startswith(f"{name}%2Frecords%2F")]

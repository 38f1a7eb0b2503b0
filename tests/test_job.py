"""`ray job submit` on a local head with its dashboard and token authentication on."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import rayx
from rayx.progress import progress
from tests.test_cli import EXPERIMENT

pytestmark = pytest.mark.ray

RAY = str(Path(sys.executable).with_name("ray"))


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextlib.contextmanager
def a_head(folder: Path, token: str):
    """Run a head of two CPUs on ports of its own; gives its process and what reaches it."""
    gcs, dashboard, agent, client = free_ports(4)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--temp-dir={short_folder()}",
    ]  # fmt: skip
    with open(folder / "head.log", "a") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its children end with it
        process.wait(timeout=60)


@pytest.fixture
def head(tmp_path):
    """A head of two CPUs; yields the environment that reaches it."""
    with a_head(tmp_path, secrets.token_hex(32)) as environment:
        yield environment


def short_folder() -> str:
    """Return a folder whose path is short enough for Ray's sockets."""
    import tempfile

    return tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None)


def status_of(request: str | urllib.request.Request) -> int | None:
    """Return the dashboard's HTTP status, or None while it does not answer."""
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def submit(
    environment: dict, folder: Path, entrypoint: str, *options: str
) -> subprocess.CompletedProcess:
    deadline = time.monotonic() + 90
    while status_of(f"{environment['RAY_API_SERVER_ADDRESS']}/api/version") is None:
        assert time.monotonic() < deadline, "the dashboard does not start"
        time.sleep(0.2)
    command = [RAY, "job", "submit", *options, "--working-dir", str(folder)]
    return subprocess.run(
        [*command, "--", "sh", "-c", entrypoint],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def test_submitted_sweep_fills_a_store_that_others_can_read(head, tiny_corpus, tmp_path):
    folder, store = tmp_path / "work", tmp_path / "store"
    folder.mkdir()
    (folder / "study.py").write_text(EXPERIMENT.format(corpus=tiny_corpus.url))
    done = submit(
        head, folder,
        "rayx run study.py --store here; echo refused with $?; "
        f"rayx run study.py --store {store} --set runs=6",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a Ray job runs in a temporary copy" in done.stdout + done.stderr
    assert "refused with 2" in done.stdout
    opened = rayx.open(store)
    assert progress(opened)["ok"] == 6 and not progress(opened)["alive"]
    assert opened.runs()["loss/law"].notna().all()

    jobs = f"{head['RAY_API_SERVER_ADDRESS']}/api/jobs/"
    entry = json.dumps({"entrypoint": "rayx --help"}).encode()
    assert (
        status_of(urllib.request.Request(jobs, entry, {"Content-Type": "application/json"})) == 401
    )
    token = {"Authorization": f"Bearer {head['RAY_AUTH_TOKEN']}"}
    assert status_of(urllib.request.Request(jobs, headers=token)) == 200


@pytest.mark.slow
def test_after_a_stopped_job_and_after_a_lost_head_the_next_submit_goes_on(tiny_corpus, tmp_path):
    folder, store, token = tmp_path / "work", tmp_path / "store", secrets.token_hex(32)
    folder.mkdir()
    study = EXPERIMENT.format(corpus=tiny_corpus.url).replace("640)", "48000)")
    (folder / "study.py").write_text(study)
    entrypoint = f"rayx run study.py --store {store} --set runs=16"
    kept: dict[str, bytes] = {}

    def wait_for_records(more: int) -> None:
        deadline, wanted = time.monotonic() + 150, len(kept) + more
        while len(list((store / "records").glob("*.json"))) < wanted:
            assert time.monotonic() < deadline, f"no {wanted} records"
            time.sleep(0.1)

    def keep() -> None:
        """Remember the records that there are; those of before must be the same."""
        now = {file.name: file.read_bytes() for file in (store / "records").glob("*.json")}
        assert kept.items() <= now.items()
        kept.update(now)

    def told(environment: dict, *command: str) -> str:
        done = subprocess.run(
            [RAY, "job", *command], env=environment, capture_output=True, text=True, timeout=120
        )
        return done.stdout + done.stderr

    with a_head(tmp_path, token) as environment:
        options = ("--no-wait", "--submission-id", "first")
        assert submit(environment, folder, entrypoint, *options).returncode == 0
        wait_for_records(2)
        told(environment, "stop", "first")
        assert "was stopped" in told(environment, "status", "first")
        time.sleep(3)  # what its trials finish still counts
        keep()
        assert 2 <= len(kept) < 16
        again = ("--no-wait", "--submission-id", "second")
        assert submit(environment, folder, entrypoint, *again).returncode == 0
        wait_for_records(2)
    time.sleep(3)  # the head was killed: Ray's processes end with it
    keep()
    assert len(kept) < 16
    with a_head(tmp_path, token) as environment:
        done = submit(environment, folder, entrypoint)
        assert done.returncode == 0, done.stdout + done.stderr
    keep()
    opened = rayx.open(store)
    assert progress(opened)["ok"] == len(kept) == 16
    assert opened.runs()["run_id"].is_unique
    deadline = time.monotonic() + 120  # the second driver notices after a minute that Ray has gone
    while progress(opened)["alive"]:
        assert time.monotonic() < deadline
        time.sleep(1)

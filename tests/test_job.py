"""`ray job submit` on a local head with its dashboard and token authentication on."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
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


@pytest.fixture
def head(tmp_path):
    """A head of two CPUs; yields the environment that reaches it."""
    gcs, dashboard, agent, client = free_ports(4)
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        RAY, "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}",
        "--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}",
        f"--temp-dir={short_folder()}",
    ]  # fmt: skip
    with open(tmp_path / "head.log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield {**environment, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # its children end with it
        process.wait(timeout=60)


def short_folder() -> str:
    """Return a folder whose path is short enough for Ray's sockets."""
    import tempfile

    return tempfile.mkdtemp(prefix="ray-", dir="/tmp" if os.path.isdir("/tmp") else None)


def submit(environment: dict, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [RAY, "job", "submit", "--working-dir", str(folder), "--", "rayx", *arguments]
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=240
        )
        if "Failed to connect" not in done.stdout + done.stderr or time.monotonic() > deadline:
            return done
        time.sleep(1)  # the dashboard is still starting


def test_submitted_sweep_fills_a_store_that_others_can_read(head, tiny_corpus, tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "study.py").write_text(EXPERIMENT.format(corpus=tiny_corpus.url))
    refused = submit(head, folder, "run", "study.py", "--store", "here")
    assert refused.returncode != 0
    assert "a Ray job runs in a temporary copy" in refused.stdout + refused.stderr

    store = tmp_path / "store"
    done = submit(head, folder, "run", "study.py", "--store", str(store), "--set", "runs=6")
    assert done.returncode == 0, done.stdout + done.stderr
    opened = rayx.open(store)
    assert progress(opened)["ok"] == 6 and not progress(opened)["alive"]
    assert opened.runs()["loss/law"].notna().all()

    stranger = {k: v for k, v in head.items() if k != "RAY_AUTH_TOKEN"} | {"HOME": str(tmp_path)}
    denied = submit(stranger, folder, "run", "study.py", "--store", str(store))
    assert denied.returncode != 0

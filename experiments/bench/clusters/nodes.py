"""Nodes of a Ray cluster as processes of this machine, for benches: started, killed, started again.

Each node is a `ray start --block` with everything that hangs below it, so killing it is what the
loss of a machine is. Nothing else on the host is touched: several such clusters run side by side.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RAY = str(Path(sys.executable).with_name("ray"))
TRIAL = ("ray::ResourceTrainable", "ray::PackTrial")  # processes that hold a trial
MEMORY = "--object-store-memory=150000000"


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def short_folder() -> str:
    """Return a new folder whose path is short enough for Ray's sockets."""
    return tempfile.mkdtemp(prefix="rx-", dir="/tmp" if os.path.isdir("/tmp") else None)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a cluster of one's own: a token, and nothing of another Ray."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        **more,
    }


def processes() -> dict[int, tuple[int, str]]:
    """Return pid -> (parent's pid, command line) of all processes."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True)
    rows = (line.split(None, 2) for line in listing.stdout.splitlines())
    return {int(row[0]): (int(row[1]), row[2]) for row in rows if len(row) == 3}


def below(root: int) -> dict[int, str]:
    """Return pid -> command line of a process and everything that it started."""
    known = processes()
    found = {root: known[root][1]} if root in known else {}
    while more := {p: a for p, (up, a) in known.items() if up in found and p not in found}:
        found |= more
    return found


def kill_tree(process: subprocess.Popen) -> None:
    """Kill a process and everything below it, at once."""
    for pid in below(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


class Node:
    """One node; `arguments` are those of `ray start`."""

    def __init__(self, name: str, arguments: list[str], env: dict[str, str], log: Path) -> None:
        self.name, self.arguments, self.env, self.log = name, arguments, env, log
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        """Start the node; it is there when Ray says so."""
        command = [RAY, "start", "--block", MEMORY, *self.arguments,
                   "--min-worker-port=0", "--max-worker-port=0",
                   f"--dashboard-agent-listen-port={free_port()}"]  # fmt: skip
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command, env=self.env, stdout=log, stderr=log, start_new_session=True
            )

    def kill(self) -> None:
        """Lose the machine."""
        if self.process is not None:
            kill_tree(self.process)
            self.process = None

    def trials(self) -> list[int]:
        """Return the processes of the node that hold a trial, oldest first."""
        if self.process is None:
            return []
        return sorted(p for p, a in below(self.process.pid).items() if a.startswith(TRIAL))


def wait_for_port(port: int, seconds: float = 60.0) -> None:
    """Wait until somebody listens."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"nobody listens on port {port}")

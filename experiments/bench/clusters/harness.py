"""A cluster, an S3 server and a driver that are killed by a schedule and started again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from rayx.errors import RayxError
from rayx.store import Store, open_store

from .nodes import Node, environment, free_port, kill_tree, short_folder, wait_for_port

ROOT = Path(__file__).parents[3]
SERVER = ROOT / "tests" / "s3_server.py"
CHAOS = Path(__file__).parents[1] / "chaos.py"
SHARES = {"worker": 9, "node": 5, "driver": 4, "server": 4, "cluster": 1}  # of the kills
MOST_SUBMITS = 60
MOST_SECONDS = 840.0


@dataclass(frozen=True)
class Kill:
    """One kill of the schedule."""

    after_records: int
    what: str  # worker, node, driver, server or cluster (all nodes and the driver)
    which: float  # in [0, 1): which of those that there are
    wait_seconds: float  # after the record, and then before the server comes back


def schedule(seed: int, kills: int, runs: int, what: list[str]) -> list[Kill]:
    """Return the kills, in order: a function of the arguments alone."""
    rng = random.Random(f"chaos {seed}")
    weights = [SHARES[name] for name in what]
    names = (what + rng.choices(what, weights, k=max(0, kills - len(what))))[:kills]
    rng.shuffle(names)
    records = sorted(rng.randint(1, int(0.9 * runs)) for _ in names)
    return [
        Kill(after, name, rng.random(), round(rng.uniform(0.0, 2.0), 2))
        for after, name in zip(records, names, strict=True)
    ]


def digest(store: Store, run_id: str) -> str:
    """Return a hash of a record's content."""
    return hashlib.sha256(store.read_bytes(f"records/{run_id}.json")).hexdigest()


class Harness:
    """The cluster, the S3 server and the driver, and what was done to them."""

    def __init__(self, folder: Path, settings: dict, store_kind: str) -> None:
        self.folder, self.settings = folder, settings
        self.env = environment(
            AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x", AWS_EC2_METADATA_DISABLED="true",
            OMP_NUM_THREADS="1",
        )  # fmt: skip
        os.environ.update({k: v for k, v in self.env.items() if k.startswith("AWS_")})
        self.server: subprocess.Popen | None = None
        self.server_port = free_port()
        if store_kind == "s3":
            self.start_server()
            settings["store"] = (
                f"s3://bucket/chaos?endpoint_override=127.0.0.1:{self.server_port}&scheme=http"
                "&region=us-east-1"
            )
        self.gcs = free_port()
        settings["address"] = f"127.0.0.1:{self.gcs}"
        log = folder / "nodes.log"
        head = [
            "--head",
            f"--port={self.gcs}",
            "--num-cpus=1",
            f"--temp-dir={short_folder()}",
            f"--ray-client-server-port={free_port()}",
            "--include-dashboard=false",
        ]
        worker = [f"--address=127.0.0.1:{self.gcs}", "--num-cpus=2"]
        self.nodes = [Node("head", head, self.env, log)]
        self.nodes += [Node(f"node{i}", worker, self.env, log) for i in (1, 2)]
        self.driver: subprocess.Popen | None = None
        self.submits = 0
        self.seen: dict[str, str] = {}  # run_id -> hash of the record as it was first seen
        self.changed: set[str] = set()

    def start_server(self) -> None:
        """Start the S3 server on the data that there is."""
        with open(self.folder / "server.log", "a") as log:
            self.server = subprocess.Popen(
                [sys.executable, str(SERVER), "--port", str(self.server_port),
                 "--folder", str(self.folder / "s3"), "--bucket", "bucket"],
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        wait_for_port(self.server_port)

    def start_cluster(self) -> None:
        """Start all nodes."""
        self.nodes[0].start()
        wait_for_port(self.gcs)
        for node in self.nodes[1:]:
            node.start()

    def submit(self) -> None:
        """Start the driver."""
        self.submits += 1
        with open(self.folder / "driver.log", "a") as log:
            self.driver = subprocess.Popen(
                [sys.executable, str(CHAOS), "--drive", json.dumps(self.settings)],
                env=self.env, cwd=ROOT, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def look(self, store: Store) -> None:
        """Remember new records."""
        for run_id in store.names("records"):
            if run_id not in self.seen:
                self.seen[run_id] = digest(store, run_id)

    def kill(self, kill: Kill) -> str | None:
        """Kill what is asked for and start it again; None where there is nothing to kill yet."""
        assert self.driver is not None
        if kill.what == "worker":
            pids = [pid for node in self.nodes for pid in node.trials()]
            if not pids:
                return None
            pid = pids[int(kill.which * len(pids))]
            os.kill(pid, signal.SIGKILL)
            return f"worker {pid}"
        if kill.what == "node":
            nodes = [node for node in self.nodes[1:] if node.trials()] or self.nodes[1:]
            node = nodes[int(kill.which * len(nodes))]
            busy = len(node.trials())
            node.kill()
            node.start()
            return f"{node.name} with {busy} trials"
        if kill.what == "server":
            assert self.server is not None
            kill_tree(self.server)
            time.sleep(kill.wait_seconds)
            self.start_server()
            return f"server, {kill.wait_seconds:.1f} s away"
        if not any(node.trials() for node in self.nodes):
            return None
        kill_tree(self.driver)
        if kill.what == "cluster":
            for node in self.nodes:
                node.kill()
            self.start_cluster()
        self.submit()
        return "all nodes and the driver" if kill.what == "cluster" else "driver"

    def stop(self) -> None:
        """End everything that was started here."""
        for process in (self.driver, self.server):
            if process is not None:
                kill_tree(process)
        for node in self.nodes:
            node.kill()

    def sweep(
        self, kills: list[Kill], say: Callable[[dict], None]
    ) -> tuple[list[dict], list[int], float]:
        """Run the sweep to its end; return the kills done, exits of the driver, and seconds."""
        began = time.monotonic()
        done, exits, waiting = [], [], list(kills)
        store: Store | None = None
        self.start_cluster()
        self.submit()
        while True:
            assert self.driver is not None
            if time.monotonic() - began > MOST_SECONDS or self.submits > MOST_SUBMITS:
                raise TimeoutError(f"{len(self.seen)} records, {self.submits} submits; see logs")
            code = self.driver.poll()
            with contextlib.suppress(RayxError, OSError):  # no store yet, or it is away
                store = store or open_store(self.settings["store"])
                self.look(store)
            if code == 0:
                return done, exits, time.monotonic() - began
            if code is not None:
                exits.append(code)
                self.submit()
            elif waiting and len(self.seen) >= waiting[0].after_records:
                time.sleep(0 if waiting[0].what == "server" else waiting[0].wait_seconds)
                if what := self.kill(waiting[0]):
                    fact = {**asdict(waiting.pop(0)), "killed": what, "records": len(self.seen),
                            "seconds": round(time.monotonic() - began, 1)}  # fmt: skip
                    done.append(fact)
                    say(fact)
            time.sleep(0.1)

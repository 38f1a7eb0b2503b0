"""Do nodes come with the work and go when it is done?

    python experiments/bench/autoscaling.py [--packs 24] [--nodes 4] [--plot FILE.png] [--json]

Ray's own autoscaler on this machine: a head without CPUs, and a provider whose nodes are further
raylets here. A sweep of small real packs is run with --elastic by a driver of its own, while the
nodes and the trials that run are counted every half second, until only the head is left. The
nodes share this machine's cores, so it is the coming and going that is measured, not speed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import rayx
from rayx.corpus import Corpus

sys.path.insert(0, str(Path(__file__).parent))

from chaos import make_corpus, make_specs  # noqa: E402
from clusters.nodes import Node, environment, free_port, short_folder, wait_for_port  # noqa: E402

HEAD = "f" * 51 + "00000"  # the name that the provider gives to the head
CPUS = 2  # of a node
IDLE_MINUTES = 0.1
MOST_SECONDS = 420.0


def autoscaler_config(gcs: str, nodes: int) -> dict:
    """Return what `ray up` would have made of a cluster.yaml with one type of worker."""
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray",
                "worker_start_ray")  # fmt: skip
    return {
        "cluster_name": "here",
        "max_workers": nodes,
        "idle_timeout_minutes": IDLE_MINUTES,
        "upscaling_speed": 4.0,
        "provider": {
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": gcs,
            "head_node_id": HEAD,
            "launch_multiple": True,
        },
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "cpu_worker": {
                "resources": {"CPU": CPUS},
                "node_config": {},
                "min_workers": 0,
                "max_workers": nodes,
            },
        },
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        **{f"{name}_commands": [] for name in commands},
    }


def noting_node(log: str, specs, corpus, **arguments):
    """Train, and note the node and the times."""
    import ray

    from rayx.proxy import train_pack

    node, began = ray.get_runtime_context().get_node_id(), time.time()
    records = train_pack(specs, corpus, **arguments)
    with open(log, "a") as file:
        for spec in specs:
            file.write(f"{spec.run_id} {node} {began:.2f} {time.time():.2f}\n")
    return records


def drive(settings: dict) -> None:
    """Be the driver: run the sweep, or, where `gpus` is set, one that no node can hold."""
    import functools
    import logging

    from rayx.sweep import Placement, run_sweep

    logging.basicConfig(level=logging.INFO)
    corpus = Corpus.load(settings["corpus"])
    placement = Placement(
        address=settings["address"], pack_size=2, elastic=True, gpus=settings["gpus"]
    )
    run_sweep(
        make_specs(corpus, settings["packs"], settings["steps"]),
        corpus,
        rayx.open(settings["store"], create=True),
        functools.partial(noting_node, settings["log"]),
        placement=placement,
    )


def count(settings: dict) -> None:
    """Print the nodes that are alive, twice a second, until told to stop by the end of input."""
    import logging

    import ray

    ray.init(address=settings["address"], log_to_driver=False, logging_level=logging.ERROR)
    while True:
        nodes = sum(node["Alive"] for node in ray.nodes())
        print(json.dumps([time.time(), nodes]), flush=True)
        time.sleep(0.5)


def child(what: str, settings: dict, env: dict[str, str], **streams) -> subprocess.Popen:
    """Start this file again in another part: `drive` or `count`."""
    return subprocess.Popen(
        [sys.executable, __file__, "--part", what, json.dumps(settings)],
        env=env, text=True, **streams,
    )  # fmt: skip


def measure(packs: int, nodes: int, steps: int) -> dict:
    """Start the cluster, run the sweep, and return what came and went when."""
    env = environment(
        RAY_FAKE_CLUSTER="1",
        RAY_enable_autoscaler_v2="1",
        RAY_CLOUD_INSTANCE_ID=HEAD,
        RAY_OVERRIDE_NODE_ID_FOR_TESTING=HEAD,
        AUTOSCALER_UPDATE_INTERVAL_S="1",
        OMP_NUM_THREADS="1",
    )
    client = {k: v for k, v in env.items() if not k.startswith("RAY_") or "AUTH" in k}
    with tempfile.TemporaryDirectory(prefix="rx-") as name:
        folder, port = Path(name), free_port()
        corpus = make_corpus(folder)
        config = folder / "autoscaler.json"
        config.write_text(json.dumps(autoscaler_config(f"127.0.0.1:{port}", nodes)))
        settings = {
            "address": f"127.0.0.1:{port}", "corpus": corpus.url, "packs": packs, "steps": steps,
            "store": str(folder / "store"), "log": str(folder / "log"), "gpus": 0.0,
        }  # fmt: skip
        head = Node("head", [
            "--head", f"--port={port}", "--num-cpus=0", f"--autoscaling-config={config}",
            f"--temp-dir={short_folder()}", "--include-dashboard=false",
            f"--ray-client-server-port={free_port()}",
        ], env, folder / "head.log")  # fmt: skip
        children: list[subprocess.Popen] = []
        head.start()
        try:
            wait_for_port(port)
            impossible = {**settings, "gpus": 8.0, "store": str(folder / "none")}
            asked = time.monotonic()
            refused = child("drive", impossible, client, stderr=subprocess.PIPE)
            children.append(refused)
            refusal = refused.communicate(timeout=120)[1].strip().splitlines()[-1]
            refused_seconds = time.monotonic() - asked

            counter = child("count", settings, client, stdout=subprocess.PIPE)
            children.append(counter)
            assert counter.stdout is not None
            timeline = [json.loads(counter.stdout.readline())]
            began = time.time()
            with open(folder / "driver.log", "w") as log:
                driver = child("drive", settings, client, stdout=log, stderr=log)
            children.append(driver)
            ended = 0.0
            for line in counter.stdout:
                timeline.append(json.loads(line))
                if not ended and driver.poll() is not None:
                    ended = timeline[-1][0]
                    if driver.returncode:
                        sys.exit((folder / "driver.log").read_text()[-3000:])
                if ended and timeline[-1][1] == 1:
                    break
                if timeline[-1][0] - began > MOST_SECONDS:
                    sys.exit("the cluster did not come back to one node")
        finally:
            for each in children:
                each.kill()
            head.kill()
        rows = [line.split() for line in (folder / "log").read_text().splitlines()]
        spans = [(float(first) - began, float(last) - began) for *_, first, last in rows]
        counted = [(when - began, alive - 1) for when, alive in timeline]
        most = max(alive for _, alive in counted)
        workers = Counter(node for _, node, *_ in rows)
        return {
            "packs": packs,
            "runs": 2 * packs,
            "ok": len(rayx.open(settings["store"]).names("records")),
            "seconds_to_refuse_gpus": refused_seconds,
            "refusal": refusal,
            "most_nodes": most,
            "seconds_to_first_node": next(when for when, alive in counted if alive),
            "seconds_to_most_nodes": next(when for when, alive in counted if alive == most),
            "sweep_seconds": ended - began,
            "seconds_back_to_head": counted[-1][0] - (ended - began),
            "runs_by_node": sorted(workers.values(), reverse=True),
            "timeline": [
                [round(when, 1), alive, sum(first <= when < last for first, last in spans)]
                for when, alive in counted
            ],
        }


def plot(result: dict, path: str) -> None:
    """Draw nodes and running trials over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    seconds, nodes, running = zip(*result["timeline"], strict=True)
    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    axes.fill_between(seconds, running, step="post", alpha=0.3, label="trials that run")
    axes.step(seconds, nodes, where="post", color="black", label="nodes beside the head")
    axes.axvline(result["sweep_seconds"], color="gray", linestyle=":", label="end of the sweep")
    axes.set(xlabel="seconds since the driver started", ylabel="count", xlim=(0, seconds[-1] + 2))
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", frameon=False, ncols=3)
    axes.set_title(f"{result['runs']} runs in {result['packs']} packs, autoscaled")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure, plot and print."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--packs", type=int, default=24)
    parser.add_argument("--nodes", type=int, default=4, help="most that may come")
    parser.add_argument("--steps", type=int, default=1000, help="of a run: about 2 s")
    parser.add_argument("--plot", metavar="FILE", help="write the timeline as PNG or SVG")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        {"drive": drive, "count": count}[arguments.part[0]](json.loads(arguments.part[1]))
        return
    result = measure(arguments.packs, arguments.nodes, arguments.steps)
    if arguments.plot:
        plot(result, arguments.plot)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        if name != "timeline":
            print(f"{name:24} {value:.1f}" if isinstance(value, float) else f"{name:24} {value}")


if __name__ == "__main__":
    main()

"""Does a run cost the same in a sweep of 100 and of 10,000?

    python experiments/bench/scale.py [--runs 100,1000,10000] [--pack-size 1] [--soak] [--json]

Simulated runs (no training) go through the real `run_sweep` on a real Ray of two CPUs. A short
sweep warms it up first. Per size: wall and CPU time of the driver for each run, its memory and open
files, and the time in which the driver's own store calls were busy. Time and the ratio of sizes
count from the first record on: before it, processes start, as long for any size. `--pack-size 1`
makes a trial of each run, the most that Tune can be asked for. `--soak` prints the driver's memory
and files over time, and writes runs/soak/soak.json and soak.png.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import logging
import os
import tempfile
import threading
import time
from pathlib import Path

import psutil
import ray
from overhead import trivial_pack

import rayx
from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.corpus import Source, build_corpus
from rayx.store import Store
from rayx.sweep import Placement, run_sweep

OUT = Path("runs/soak")
FIRST_SHARE = 0.2  # of the runs, after which memory is first compared


def corpus(folder: str) -> Corpus:
    """Return three tiny domains."""
    sources = []
    for domain in ("code", "docs", "news"):
        file = Path(folder, f"{domain}.jsonl")
        text = " ".join(f"{domain}{i % 37} word{i % 11}" for i in range(400))
        file.write_text("\n".join(json.dumps({"text": f"{text} {i}"}) for i in range(40)))
        sources.append(Source(path=str(file), domain=domain))
    return build_corpus(sources, f"{folder}/corpus", tokenizer=300, heldout_share=0.1)


def specs(made: Corpus, count: int, seed: int = 0) -> list[TrainSpec]:
    """Return runs that differ in their mixture."""
    spec = TrainSpec(
        corpus=made.fingerprint,
        model=ModelShape(
            layers=1, width=16, heads=2, ffn_width=32, vocab_size=made.vocab_size, context=16
        ),
        schedule=Schedule.constant(Mixture({"code": 1}), 6 * 4 * 16),
        optimizer=Optimizer(lr=1e-2, batch_sequences=4),
        seed=seed,
        evaluation=Evaluation(points=1, sequences=8),
    )
    mixtures = [Mixture({"code": 1 + i, "docs": 7, "news": count}) for i in range(count)]
    tokens = spec.schedule.tokens
    return [
        dataclasses.replace(spec, schedule=Schedule.constant(mixture, tokens))
        for mixture in mixtures
    ]


class Watch(threading.Thread):
    """Samples this process while a sweep runs."""

    def __init__(self, store: Store, seconds: float = 0.2) -> None:
        super().__init__(daemon=True)
        self.store, self.seconds = store, seconds
        self.samples: list[dict] = []
        self._end = threading.Event()

    def run(self) -> None:
        """Sample until told to stop."""
        me, began = psutil.Process(), time.perf_counter()
        while not self._end.wait(self.seconds):
            place = self.store.path("records")
            self.samples.append(
                {
                    "seconds": time.perf_counter() - began,
                    "runs": len(os.listdir(place)) if os.path.isdir(place) else 0,
                    "rss_mb": me.memory_info().rss / 1e6,
                    "files": me.num_fds(),
                    "threads": me.num_threads(),
                }
            )

    def stop(self) -> None:
        """End and wait."""
        self._end.set()
        self.join()


def count_store_seconds(store: Store) -> dict[str, float]:
    """Time the store's calls in this process; return the sums, which grow as the sweep goes on."""
    seconds: dict[str, float] = collections.defaultdict(float)

    def timed(name: str) -> None:
        real = getattr(store, name)

        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return real(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - began

        setattr(store, name, call)

    for name in ("put_pack", "status", "compact", "exists", "beat"):
        timed(name)
    return seconds


def sweep(made: Corpus, folder: str, runs: int, pack_size: int | None) -> tuple[dict, list[dict]]:
    """Run one size; return its figures and the samples over time."""
    store = rayx.open(f"{folder}/{runs}-{pack_size}", create=True)
    asked = specs(made, runs, seed=runs)
    store_seconds = count_store_seconds(store)
    watch = Watch(store)
    me = psutil.Process()
    files, rss = me.num_fds(), me.memory_info().rss / 1e6
    cpu, began = time.process_time(), time.perf_counter()
    watch.start()
    status = run_sweep(asked, made, store, trivial_pack, placement=Placement(pack_size=pack_size))
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    watch.stop()
    started = next(sample for sample in watch.samples if sample["runs"])
    assert set(status.values()) == {"ok"} and len(status) == runs, "runs are missing"
    rows = store.sql("select count(*) as n, count(distinct run_id) as d from runs")
    assert rows.to_numpy().tolist() == [[runs, runs]], "the store is not complete"
    began = time.perf_counter()
    for name in store.names("records")[:200]:
        store.put(store.get(name))
    early = [s for s in watch.samples if s["runs"] >= FIRST_SHARE * runs][:1] or watch.samples[:1]
    result = {
        "runs": runs,
        "packs": len(store.names("packs")),
        "seconds": wall,
        "start_seconds": started["seconds"],
        "ms_per_run": 1000 * (wall - started["seconds"]) / (runs - started["runs"]),
        "driver_cpu_ms_per_run": 1000 * cpu / runs,
        "driver_store_ms_per_run": 1000 * sum(store_seconds.values()) / runs,
        "put_and_get_ms": 1000 * (time.perf_counter() - began) / min(runs, 200),
        "rss_before_mb": rss,
        "rss_early_mb": early[0]["rss_mb"],
        "rss_peak_mb": max(s["rss_mb"] for s in watch.samples),
        "rss_after_mb": me.memory_info().rss / 1e6,
        "files_before": files,
        "files_early": early[0]["files"],
        "files_peak": max(s["files"] for s in watch.samples),
        "files_after": me.num_fds(),
        **{f"store_{k}_seconds": v for k, v in sorted(store_seconds.items())},
    }
    return result, watch.samples


def plot(samples: list[dict], path: Path) -> None:
    """Draw runs, memory and open files over time."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for axis, name, label in zip(
        axes, ("runs", "rss_mb", "files"), ("runs on record", "driver, MB", "open files"),
        strict=True,
    ):  # fmt: skip
        axis.plot([s["seconds"] for s in samples], [s[name] for s in samples])
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    axes[-1].set_xlabel("seconds")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Cost per run of sweeps of growing size.")
    parser.add_argument("--runs", default="100,1000,10000", help="sizes, with commas")
    parser.add_argument("--pack-size", type=int, help="runs of a trial [default: the sweep's]")
    parser.add_argument("--soak", action="store_true", help="the largest size alone, over time")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    sizes = sorted(int(size) for size in arguments.runs.split(","))
    results, samples = [], []
    with tempfile.TemporaryDirectory(prefix="rayx-scale-") as folder:
        made = corpus(folder)
        ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR
        )
        sweep(made, folder, 50, 1)
        for size in sizes[-1:] if arguments.soak else sizes:
            result, samples = sweep(made, folder, size, arguments.pack_size)
            results.append(result)
        ray.shutdown()
    for result in results:
        result["ratio"] = result["ms_per_run"] / results[0]["ms_per_run"]
    if arguments.soak:
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "soak.json").write_text(json.dumps({**results[-1], "samples": samples}))
        plot(samples, OUT / "soak.png")
    if arguments.json:
        print(json.dumps({"sizes": results, "samples": samples if arguments.soak else []}))
        return
    for name in results[0]:
        cells = (
            f"{r[name]:12.2f}" if isinstance(r[name], float) else f"{r[name]:12}" for r in results
        )
        print(f"{name:26}", *cells)
    if arguments.soak:
        print(f"\n{'seconds':>9} {'runs':>7} {'MB':>8} {'files':>6}")
        for s in samples[:: max(1, len(samples) // 20)]:
            print(f"{s['seconds']:9.1f} {s['runs']:7} {s['rss_mb']:8.1f} {s['files']:6}")


if __name__ == "__main__":
    main()

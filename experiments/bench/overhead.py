"""What does the sweep cost over the bare training loop?

    python experiments/bench/overhead.py [--runs 64] [--tokens 240000] [--trivial 128]
        [--processes 8] [--json]

Two questions, each paired in one run on this machine:

1. Quickstart proxies: the same runs (a) in a plain loop in one process with as many threads as
   cores, (b) in plain loops in as many processes of one thread as there are cores, (c) as a sweep,
   (d) in a process of its own each, as shell scripts do, one after another per core.
   `ratio` is c / b with Ray's start-up counted, `ratio_warm` without it; a and d are what people
   write. d is measured on --processes runs and scaled to all, since each costs the same.
2. Trivial runs (no training) in packs of one: seconds of a trial in a sweep, over a plain loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

import ray

import rayx
from rayx import Corpus, Mixture, Record, Schedule, TrainSpec
from rayx.experiment import load_experiment
from rayx.proxy import set_threads, train_pack
from rayx.record import CurvePoint, Loss
from rayx.sweep import Placement, run_sweep
from rayx.sweep.run import connect

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"


def bare_loop(specs: list[TrainSpec], corpus_url: str, threads: int) -> None:
    """Train the runs one after another and keep their records in memory."""
    set_threads(threads)
    corpus = Corpus.load(corpus_url)
    for spec in specs:
        train_pack([spec], corpus)


def timed_processes(specs: list[TrainSpec], corpus_url: str, processes: int, threads: int) -> float:
    """Return the wall seconds of the runs dealt out to fresh processes, imports included."""
    context = multiprocessing.get_context("spawn")
    began = time.perf_counter()
    workers = [
        context.Process(target=bare_loop, args=(specs[i::processes], corpus_url, threads))
        for i in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        if worker.exitcode:
            sys.exit("a bare loop failed")
    return time.perf_counter() - began


ONE_RUN = """
import json, sys
from rayx import Corpus, TrainSpec
from rayx.proxy import set_threads, train_pack
set_threads(1)
spec = TrainSpec.from_json(json.loads(sys.argv[2]))
train_pack([spec], Corpus.load(sys.argv[1]))
"""


def timed_one_process_each(specs: list[TrainSpec], corpus_url: str, at_once: int) -> float:
    """Return the wall seconds of the runs in a fresh python each, so many at a time."""

    def run(spec: TrainSpec) -> None:
        arguments = [sys.executable, "-c", ONE_RUN, corpus_url, json.dumps(spec.to_json())]
        subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL)

    began = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(run, specs))
    return time.perf_counter() - began


def trivial_pack(
    specs, corpus, *, pack_id, commit, device, on_progress, store=None, keep=None
) -> list[Record]:
    """Return records without training."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    loss = {target: Loss(1.0, 1.0, 0.1) for target in corpus.targets}
    return [
        Record(spec=s, curve=(CurvePoint(s.steps, s.tokens, loss),), epochs={}, tokens=s.tokens,
               flops=s.flops, seconds=0.0, pack_id=pack_id, pack_runs=len(specs), device=device,
               versions={}, commit=commit, started=now, finished=now)
        for s in specs
    ]  # fmt: skip


def measure(runs: int, tokens: int, trivial: int, processes: int) -> dict:
    """Measure what a sweep costs over the bare training loop, and return the figures."""
    quickstart = load_experiment(QUICKSTART)
    parameters = quickstart.Parameters(proxies=max(runs, 16), proxy_tokens=tokens)
    corpus = quickstart.corpus(parameters)
    specs = quickstart.specs(parameters, corpus)[:runs]
    cores = os.cpu_count() or 1
    result: dict = {"runs": runs, "tokens_per_run": specs[0].tokens, "cores": cores}
    with tempfile.TemporaryDirectory() as folder:
        result["bare_one_process_seconds"] = timed_processes(specs, corpus.url, 1, cores)
        result["bare_process_per_core_seconds"] = timed_processes(specs, corpus.url, cores, 1)
        few = specs[: max(cores, processes // cores * cores)]  # whole rounds
        seconds = timed_one_process_each(few, corpus.url, cores)
        result["process_per_run_seconds"] = seconds / len(few) * runs
        result["process_per_run_measured"] = len(few)
        began = time.perf_counter()
        connect(Placement())
        result["ray_start_seconds"] = time.perf_counter() - began
        began = time.perf_counter()
        run_sweep(specs, corpus, rayx.open(f"{folder}/proxies", create=True), train_pack)
        result["sweep_seconds"] = time.perf_counter() - began
        bare = result["bare_process_per_core_seconds"]
        result["ratio_warm"] = result["sweep_seconds"] / bare
        result["ratio"] = (result["sweep_seconds"] + result["ray_start_seconds"]) / bare
        result["ratio_to_one_process"] = (
            result["sweep_seconds"] + result["ray_start_seconds"]
        ) / result["bare_one_process_seconds"]

        result["ratio_to_process_per_run"] = (
            result["sweep_seconds"] + result["ray_start_seconds"]
        ) / result["process_per_run_seconds"]

        mixtures = [Mixture({"code": 1 + i, "docs": 1}) for i in range(trivial)]
        many = [
            dataclasses.replace(
                specs[0], schedule=Schedule.constant(mixture, specs[0].schedule.tokens)
            )
            for mixture in mixtures
        ]
        store = rayx.open(f"{folder}/bare", create=True)
        began = time.perf_counter()
        for spec in many:
            arguments = {"pack_id": "", "commit": "", "device": "cpu"}
            (record,) = trivial_pack([spec], corpus, **arguments, on_progress=lambda tokens: None)
            store.put(record)
        loop = time.perf_counter() - began
        began = time.perf_counter()
        store = rayx.open(f"{folder}/trivial", create=True)
        run_sweep(many, corpus, store, trivial_pack, placement=Placement(pack_size=1))
        result["trivial_trials"] = trivial
        result["trivial_bare_seconds_each"] = loop / trivial
        result["trivial_sweep_seconds_each"] = (time.perf_counter() - began) / trivial
    ray.shutdown()
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--runs", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=240_000)
    parser.add_argument("--trivial", type=int, default=128)
    parser.add_argument("--processes", type=int, default=8, help="runs of a process each")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.runs, arguments.tokens, arguments.trivial, arguments.processes)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:32} {value:.3f}" if isinstance(value, float) else f"{name:32} {value}")


if __name__ == "__main__":
    main()

"""What does the sweep cost over the bare training loop?

    python experiments/bench/overhead.py [--runs 64] [--tokens 240000] [--trivial 128] [--json]

Two questions, each paired in one run on this machine:

1. Quickstart proxies: the same runs (a) in a plain loop in one process with as many threads as
   cores, (b) in plain loops in as many processes of one thread as there are cores, (c) as a sweep.
   `ratio` is c / b with Ray's start-up counted, `ratio_warm` without it; a is what people write.
2. Trivial runs (no training) in packs of one: seconds of a trial in a sweep, over a plain loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
import time
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


def measure(runs: int, tokens: int, trivial: int) -> dict:
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
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.runs, arguments.tokens, arguments.trivial)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:32} {value:.3f}" if isinstance(value, float) else f"{name:32} {value}")


if __name__ == "__main__":
    main()

"""What does a policy cost over plain training?

    python experiments/bench/policies.py [--tokens 200000] [--runs 1] [--repeats 5] [--json]

The quickstart's proxies are trained plainly and under each registered policy at its own interval,
in turn, several times, in one process of one thread. Held-out text is hardly read, so that all
shares are of training itself, in percent:

- `flops`: of the signals, over those of training;
- `signals`: seconds in the signals, over the other seconds of the same run (median of repeats);
- `wall`: seconds of the run over those of the plain run of the same repeat, less 1 (median), with
  the range over repeats.

DoReMi's reference, the second Skill-It's matrix and the agent's network are quick ones: they cost
what good ones cost.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import rayx
from rayx import Corpus, Evaluation, Probe, Schedule
from rayx.experiment import load_experiment
from rayx.policies import POLICIES
from rayx.policies.agent import network_size
from rayx.proxy import set_threads, train_pack
from rayx.spec import Parent

QUICKSTART = Path(__file__).parents[1] / "quickstart.py"
UNITS = 16  # of the agent's network


def arms(corpus: Corpus, reference: Parent) -> dict[str, Any]:
    """Return name -> policy, each with its defaults and what it cannot do without."""
    num = len(corpus.domains)
    rng = np.random.default_rng(0)
    needed: dict[str, dict[str, Any]] = {
        "agent": {
            "domains": corpus.domains,
            "network": tuple(rng.normal(size=network_size(num, UNITS)).tolist()),
        },
        "dga": {"specific": (Probe(target="readmes"),)},
        "doremi": {"reference": reference},
    }
    made = {name: kind(**needed.get(name, {})) for name, kind in POLICIES.items()}
    matrix = tuple(tuple(row) for row in np.diag(np.arange(1.0, num + 1)).tolist())
    made["skill-it, matrix given"] = POLICIES["skill-it"](skills=matrix)
    return {"plain": None, **dict(sorted(made.items()))}


def measure(tokens: int, runs: int, repeats: int) -> dict[str, Any]:
    """Train every arm `repeats` times and return the figures, shares in percent."""
    set_threads(1)
    quickstart = load_experiment(QUICKSTART)
    parameters = quickstart.Parameters(proxy_tokens=tokens)
    corpus = quickstart.corpus(parameters)
    uniform = rayx.Mixture.uniform(corpus.domains)
    first = dataclasses.replace(
        quickstart.specs(parameters, corpus)[0],
        schedule=Schedule.constant(uniform, tokens),
        evaluation=Evaluation(points=1, sequences=8, part="second"),
    )
    specs = [dataclasses.replace(first, seed=seed, data_seed=seed) for seed in range(runs)]
    short = dataclasses.replace(first, schedule=Schedule.constant(uniform, tokens // 8))
    walls: dict[str, list[float]] = {}
    signals: dict[str, list[float]] = {}
    result: dict[str, Any] = {"steps": first.steps, "runs": runs, "repeats": repeats, "arms": {}}
    with tempfile.TemporaryDirectory() as folder:
        store = rayx.open(f"{folder}/references", create=True)
        train_pack([short], corpus, store=store, keep={short.run_id: [short.steps]})
        policies = arms(corpus, Parent(short, short.steps))
        for repeat in range(repeats):
            names = list(policies)
            names = names[repeat % len(names) :] + names[: repeat % len(names)]
            for name in names:
                began = time.perf_counter()
                steered = [dataclasses.replace(s, policy=policies[name]) for s in specs]
                records = train_pack(steered, corpus, store=store)
                wall = time.perf_counter() - began
                walls.setdefault(name, []).append(wall)
                measuring = sum(r.signal_seconds for r in records)
                signals.setdefault(name, []).append(measuring / (wall - measuring))
                result["arms"][name] = {
                    "measurements": sum(d.signal is not None for d in records[0].decisions),
                    "flops": 100 * records[0].signal_flops / first.flops,
                }
    for name, figures in result["arms"].items():
        ratio = 100 * (np.array(walls[name]) / np.array(walls["plain"]) - 1)
        figures["signals"] = 100 * float(np.median(signals[name]))
        figures["wall"] = float(np.median(ratio))
        figures["wall_range"] = [float(ratio.min()), float(ratio.max())]
    result["plain_seconds"] = float(np.median(walls["plain"]))
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=1, help="of a pack")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result = measure(arguments.tokens, arguments.runs, arguments.repeats)
    if arguments.json:
        print(json.dumps(result))
        return
    steps, seconds = result["steps"], result["plain_seconds"]
    print(f"{steps} steps, packs of {result['runs']}, plain {seconds:.2f} s; shares in percent")
    print(f"{'policy':24}{'measured':>9}{'flops':>8}{'signals':>9}{'wall':>8}   range")
    for name, f in result["arms"].items():
        low, high = f["wall_range"]
        print(
            f"{name:24}{f['measurements']:9}{f['flops']:8.1f}{f['signals']:9.1f}{f['wall']:8.1f}"
            f"   {low:.1f} to {high:.1f}"
        )


if __name__ == "__main__":
    main()

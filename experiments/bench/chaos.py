"""Does a sweep survive whatever dies, and come to the same choice?

    python experiments/bench/chaos.py [--packs 200] [--kills 24] [--seed 0]
                                      [--store-kind s3] [--json]

A sweep of small real packs on a cluster of three nodes (each a `ray start` of its own), with its
store on a local S3 server, while workers, nodes, the driver and the server are killed. What is
killed, and after how many records, is a function of the seed and is printed first. The same sweep
is run once undisturbed. Counted: finished runs that were lost or changed (a record is remembered as
it is first seen), runs with more than one record, work that was done again; compared: every curve
and the choice, to the bit. A driver that ends is submitted again, as a user would.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import rayx
from rayx import Evaluation, Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.choose import choose
from rayx.corpus import Corpus, Source, build_corpus
from rayx.fit import Table, fit_table
from rayx.store import Store

sys.path.insert(0, str(Path(__file__).parent))

from clusters.harness import SHARES, Harness, digest, schedule  # noqa: E402

DOMAINS = {"code": 11, "law": 7, "news": 5}  # -> step of the rule that its words follow
RUNS_OF_A_PACK = 2


def make_corpus(folder: Path) -> Corpus:
    """Build three domains in which each word follows the last by a rule of its own."""
    rng = random.Random(0)
    sources = []
    for domain, step in DOMAINS.items():
        words = [f"{domain[0]}{rng.randrange(1000)}" for _ in range(20)]
        rows = []
        for _ in range(300):
            place, text = rng.randrange(20), []
            for _ in range(90):
                text.append(words[place])
                place = (place * step + rng.randint(0, 2)) % 20
            rows.append(json.dumps({"text": " ".join(text)}))
        file = folder / f"{domain}.jsonl"
        file.write_text("\n".join(rows))
        sources.append(Source(path=str(file), domain=domain))
    return build_corpus(sources, folder / "corpus", tokenizer=300, heldout_share=0.1)


def make_specs(corpus: Corpus, packs: int, steps: int) -> list[TrainSpec]:
    """Return two runs a pack, on mixtures drawn evenly from the simplex."""
    rng = random.Random(1)
    shape = ModelShape(
        layers=1, width=32, heads=2, ffn_width=64, vocab_size=corpus.vocab_size, context=32
    )
    return [
        TrainSpec(
            corpus=corpus.fingerprint,
            model=shape,
            schedule=Schedule.constant(
                Mixture({domain: rng.expovariate(1.0) for domain in DOMAINS}), steps * 8 * 32
            ),
            optimizer=Optimizer(lr=1e-2, batch_sequences=8),
            evaluation=Evaluation(points=2, sequences=32),
        )
        for _ in range(packs * RUNS_OF_A_PACK)
    ]


def logged_pack(log: str, specs, corpus, **arguments):
    """Train, and note each try of each run where the harness can count them."""
    from rayx.proxy import train_pack

    def note(event: str) -> None:
        with open(log, "a") as file:
            for spec in specs:
                file.write(f"{event} {spec.run_id} {os.getpid()} {time.time():.2f}\n")

    note("start")
    records = train_pack(specs, corpus, **arguments)
    note("end")
    return records


def drive(settings: dict) -> None:
    """Be the driver: what a user submits, again and again."""
    import logging

    from rayx.sweep import Placement, run_sweep

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    corpus = Corpus.load(settings["corpus"])
    run_sweep(
        make_specs(corpus, settings["packs"], settings["steps"]),
        corpus,
        rayx.open(settings["store"], create=True),
        functools.partial(logged_pack, settings["log"]),
        placement=Placement(address=settings["address"], pack_size=RUNS_OF_A_PACK),
    )


def decision(store: Store) -> dict:
    """Fit and choose, as a user would."""
    fitted = fit_table(Table.from_frame(store.runs()), "scheffe", seed=0)
    objective = dict.fromkeys(fitted.table.targets, 1.0)
    chosen = choose(fitted, objective, dict.fromkeys(DOMAINS, 1.0), seed=0)
    return {"weights": chosen.weights, "predicted": chosen.predicted}


def tries(log: Path) -> tuple[Counter, Counter, list[float]]:
    """Return run_id -> tries started and tries ended, and the seconds of those that ended."""
    started, ended, seconds, since = Counter(), Counter(), [], {}
    for line in log.read_text().splitlines():
        event, run_id, pid, when = line.split()
        if event == "start":
            started[run_id] += 1
            since[run_id, pid] = float(when)
        else:
            ended[run_id] += 1
            seconds.append(float(when) - since[run_id, pid])
    return started, ended, seconds


def measure(packs: int, kills: int, seed: int, steps: int, store_kind: str, say) -> dict:
    """Run both sweeps and return what was lost, done twice, done again and chosen."""
    with tempfile.TemporaryDirectory(prefix="rx-") as name:
        folder = Path(name)
        corpus = make_corpus(folder)
        runs = packs * RUNS_OF_A_PACK
        what = [w for w in SHARES if w != "server" or store_kind == "s3"]
        planned = schedule(seed, kills, runs, what)
        for each in planned:
            say({"planned": each.what, "after_records": each.after_records})
        base = {"corpus": corpus.url, "packs": packs, "steps": steps}
        stores, times = {}, {}
        for name, these, kind in (("quiet", [], "local"), ("chaos", planned, store_kind)):
            (folder / name).mkdir()
            settings = {**base, "store": str(folder / name / "store"),
                        "log": str(folder / name / "log")}  # fmt: skip
            harness = Harness(folder / name, settings, kind)
            try:
                done, exits, times[name] = harness.sweep(these, say)
                store = rayx.open(settings["store"])
                frame = store.runs()
                names = set(store.names("records"))
                records = {record.run_id: record for record in store.records()}
                stores[name] = {
                    "records": records,
                    "choice": decision(store),
                    "failures": [
                        f"{record.run_id} {record.failure.type}: {record.failure.message}"
                        for record in records.values()
                        if record.failure
                    ],
                    "duplicates": len(frame) - frame["run_id"].nunique(),
                    "lost": sum(run not in names for run in harness.seen),
                    "changed": sum(
                        run in names and digest(store, run) != was
                        for run, was in harness.seen.items()
                    ),
                    "tries": tries(folder / name / "log"),
                }
            except BaseException:
                for log in ("driver.log", "server.log", "nodes.log"):
                    if (folder / name / log).exists():
                        print((folder / name / log).read_text()[-4000:], file=sys.stderr)
                raise
            finally:
                harness.stop()
        chaos, quiet = stores["chaos"], stores["quiet"]
        started, ended, seconds = chaos["tries"]
        again = sum(started.values()) - len(started)
        tokens = next(iter(chaos["records"].values())).tokens
        same = sum(
            chaos["records"][run].curve == record.curve
            for run, record in quiet["records"].items()
            if run in chaos["records"]
        )
        return {
            "seed": seed,
            "packs": packs,
            "runs": runs,
            "kills_planned": len(planned),
            "kills": done,
            "kills_by_kind": dict(Counter(each["what"] for each in done)),
            "driver_submits": harness.submits,
            "driver_exits": exits,
            "quiet_seconds": times["quiet"],
            "chaos_seconds": times["chaos"],
            "records": len(chaos["records"]),
            "finished_runs_lost": chaos["lost"],
            "finished_runs_changed": chaos["changed"],
            "duplicates": chaos["duplicates"],
            "failures": chaos["failures"],
            "tries_again": again,
            "finished_twice": sum(ended.values()) - len(ended),
            "tokens_again_at_most": again * tokens,
            "share_again_at_most": again / runs,
            "seconds_again_at_most": again * statistics.median(seconds),
            "curves_equal": same,
            "choice_equal": chaos["choice"] == quiet["choice"],
            "choice": chaos["choice"]["weights"],
        }


def passed(result: dict) -> bool:
    """Whether nothing was lost and the choice is the same."""
    wrong = ("finished_runs_lost", "finished_runs_changed", "duplicates", "failures")
    return (
        not any(result[name] for name in wrong)
        and result["records"] == result["curves_equal"] == result["runs"]
        and result["choice_equal"]
        and len(result["kills"]) == result["kills_planned"]
    )


def main() -> None:
    """Run and print; the exit code is 1 where anything was lost."""
    parser = argparse.ArgumentParser(description=measure.__doc__)
    parser.add_argument("--packs", type=int, default=200)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=250, help="of a run: about 0.7 s")
    parser.add_argument("--store-kind", choices=("local", "s3"), default="s3")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.drive:
        drive(json.loads(arguments.drive))
        return

    def say(fact: dict) -> None:
        print(*(f"{k}={v}" for k, v in fact.items()), file=sys.stderr, flush=True)

    result = measure(
        arguments.packs, arguments.kills, arguments.seed, arguments.steps,
        arguments.store_kind, say,
    )  # fmt: skip
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            if name != "kills":
                print(
                    f"{name:24} {value:.3f}" if isinstance(value, float) else f"{name:24} {value}"
                )
    sys.exit(not passed(result))


if __name__ == "__main__":
    main()

"""Every figure that says whether rayx's decisions can be trusted, with the command that prints it.

    python experiments/bench/decisions.py FOLDER                 # 20 minutes or so
    python experiments/bench/decisions.py FOLDER --only laws,constraints

FOLDER holds runs that others released: regmix/, chinchilla/, porian2024/, gemstones/, cpt-tables/.

regressors   RegMix's proxies: rank correlation and coverage over the number of training runs
laws         published fits, exponents and critical ratios; the error above the compute fitted
coverage     true parameters of synthetic runs inside 95% intervals, every law (an hour: --only)
split        what `rayx run experiments/optimal_split.py` left in its store
constraints  10,000 random constraint sets against an independent linear program
proposers    regret of iterative rounds against random search at equal budget
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

import rayx
from rayx.errors import StoreError

HERE = Path(__file__).parent
USUAL = "split,constraints,laws,proposers,regressors"


def commands(folder: Path) -> dict[str, str]:
    """Return part -> command line, run from the repository's root."""
    bench = "experiments/bench"
    return {
        "regressors": f"{bench}/regressors.py {shlex.quote(str(folder / 'regmix'))}",
        "laws": f"{bench}/laws.py {shlex.quote(str(folder))}",
        "coverage": f"{bench}/laws.py {shlex.quote(str(folder))} --parts coverage --draws 200",
        "constraints": f"{bench}/constraints.py --sets 10000",
        "proposers": f"{bench}/proposers.py --seeds 10",
    }


def split(store_url: str) -> dict:
    """Return the measured and predicted losses of the study of splits."""
    found: dict = {}
    try:
        store = rayx.open(store_url)
    except StoreError as error:
        return {"missing": f"{error} Run the experiment first."}
    for name in store.names("splits"):
        choice = store.read_json(f"splits/{name}.json")
        verified = store.read_json(f"verifications/{name}.json")
        keys = ("law", "fraction", "trunk_interval", "multiplier", "multiplier_interval")
        found[name] = {
            **{key: choice[key] for key in keys},
            "excess_over_best_fixed": verified["excess_over_best_fixed"],
            "seeds_below_no_split": verified["seeds_below_no_split"],
            "prediction_error": verified["prediction_error"],
            "verdict": verified["verdict"],
        }
    return found


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description="Can the decisions be trusted?")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default=USUAL)
    parser.add_argument("--store", default="runs/optimal_split", help="of the study of splits")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    lines = commands(arguments.folder)
    results = {}
    for part in arguments.only.split(","):
        started = time.monotonic()
        if part == "split":
            line = "rayx run experiments/optimal_split.py"
            results[part] = split(arguments.store)
        else:
            line = f"python {lines[part]}"
            done = subprocess.run(
                [sys.executable, *shlex.split(lines[part]), "--json"],
                cwd=HERE.parents[1],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
            results[part] = json.loads(done.stdout)
        if not arguments.json:
            print(f"\n{part}: {line}  ({time.monotonic() - started:.0f} s)")
            print(json.dumps(results[part], indent=2), flush=True)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()

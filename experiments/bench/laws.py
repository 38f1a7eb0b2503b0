"""How near are the laws to published fits, do they extrapolate, and are their intervals right?

    python experiments/bench/laws.py FOLDER                       # all but coverage: a minute
    python experiments/bench/laws.py FOLDER --parts coverage --laws chinchilla,dcpt --draws 200

FOLDER holds chinchilla/runs.csv, porian2024/, gemstones/runs.jsonl and cpt-tables/ (see their
SOURCE.txt).

chinchilla  the optimum with the 5 highest losses dropped, plain and with the scale of the residuals
            fitted, beside the published values, and the seconds of 1,000 bootstrap replicates
porian      exponents of the compute-optimal size, beside the published ones
continued   critical mixture ratios from CMR's published coefficients, the ratio of D-CPT's first
            usage from its published losses, beside the published ones
gemstones   a law fitted below the largest 20% of compute, and its error above
coverage    how often the true parameters of synthetic runs lie in their 95% intervals (tests/)
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd

from rayx.fit.laws import Chinchilla, LawTable, PowerLaw, extrapolate
from rayx.fit.laws.critical_ratio import PowerChange

# Besiroglu et al. 2024, arXiv:2404.10102: of 245 points, of which they drop 5.
REFIT = {"E": 1.8169, "A": 482.01, "B": 2085.43, "alpha": 0.34781, "beta": 0.36585}
KEYS = ["hparams", "warmup", "decay", "param_count"]


def chinchilla(folder: Path) -> dict:
    """Fit the points of Hoffmann et al.'s figure 4."""
    table = LawTable.from_csv(
        folder / "chinchilla" / "runs.csv", rename={"N": "params", "D": "tokens"}
    )
    arrays = table.arrays(Chinchilla())
    plain = Chinchilla(drop_highest=5).fit(*arrays)
    started = time.perf_counter()
    interval = Chinchilla(drop_highest=5, bootstrap=1000).fit(*arrays)
    seconds = time.perf_counter() - started
    free = Chinchilla(drop_highest=5, free_scale=True).fit(*arrays)
    found = extrapolate(plain, *arrays)
    return {
        "rows": plain.rows_,
        "plain": plain.params_,
        "objective": plain.objective_,
        "intervals": interval.intervals_,
        "bootstrap_seconds": seconds,
        "free_scale": free.params_,
        "published_free_scale_of_240_rows": REFIT,
        "extrapolation": {"error": found.error, "in_sample": found.in_sample, "rows": found.rows},
    }


def porian(folder: Path) -> dict:
    """Fit N* = k C^a to the compute-optimal pairs of each ablation step on RefinedWeb."""
    pairs = pd.read_csv(folder / "porian2024" / "summary_df_optimal_pairs.csv").dropna(subset=["n"])
    fits = pd.read_csv(folder / "porian2024" / "summary_df_fit_results.csv")
    result = {}
    for _, published in fits[fits["fit"] == "basic"].iterrows():
        step = pairs
        for key in KEYS:
            step = step[step[key] == published[key]]
        law = PowerLaw.fit(np.asarray(step["flops"]), np.asarray(step["n"]))
        name = "/".join(str(published[key]) for key in KEYS)
        result[name] = {"exponent": law.exponent, "published": float(published["n_exponent"])}
    return result


def gemstones(folder: Path) -> dict:
    """Fit evaluations below the largest 20% of compute; with and without those early in a run."""
    runs = pd.read_json(folder / "gemstones" / "runs.jsonl", lines=True)
    result = {}
    for name, least in (("all tokens", 0.0), ("above 20B tokens", 2e10)):
        rows = runs[runs["tokens"] >= least]
        arrays = [np.asarray(rows[c]) for c in ("params_active_precise", "tokens", "final_loss")]
        found = extrapolate(Chinchilla(), *arrays)
        result[name] = {
            "rows": len(rows),
            "left_out": found.rows,
            "median_error": found.error_median,
            "mean_error": found.error,
            "bias": found.bias,
            "median_in_sample": found.in_sample_median,
            "mean_in_sample": found.in_sample,
            "beyond": found.beyond,
            "wrong_form": found.wrong_form,
        }
    return result


def continued(folder: Path) -> dict:
    """Published tables of continued pretraining against what rayx makes of them."""
    tables = json.loads((folder / "cpt-tables" / "cpt_tables.json").read_text())
    tokens = np.array([100.0])
    ratios = {}
    for size, (a, s, b) in tables["cmr_table5_R_CMR=a*T^s+b (T in 0.2B tokens)"].items():
        theta = {n: np.array([[v]]) for n, v in {"a": a, "s": s, "b": b}.items()}
        ratios[size] = round(100 * float(PowerChange().loss(theta, {"tokens": tokens})[0][0, 0]), 1)
    usage = tables["dcpt_usage1_table5_chemistry_qwen1.5-1.8B"]
    limit = (1.0 + usage["tolerance"]) * usage["general_loss_0"]
    return {
        "critical_ratio_percent": ratios,
        "published_percent": tables["cmr_published_CMR_at_T100_pct"],
        "dcpt_ratio_within_tolerance": float(
            np.interp(limit, usage["general_loss"], usage["domain_ratio"])
        ),
        "published_ratio_within_tolerance": usage["published_optimal_ratio"],
    }


def coverage(names: list[str], draws: int, bootstrap: int) -> dict:
    """Share of true parameters inside their 95% intervals, pooled over a law's parameters."""
    sys.path.insert(0, str(Path(__file__).parents[2]))  # the cases of the laws are the tests'
    from tests.contracts.law_contract import coverage as count
    from tests.test_laws import CASES

    result, inside, total = {}, 0, 0
    for name in names or list(CASES):
        started = time.perf_counter()
        found, of = count(CASES[name], draws, bootstrap)
        inside, total = inside + found, total + of
        result[name] = {"coverage": found / of, "seconds": time.perf_counter() - started}
        print(f"{name}: {found} of {of} ({found / of:.3f})", file=sys.stderr, flush=True)
    return {"draws": draws, "laws": result, "pooled": inside / total}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Laws against published fits and planted truths.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--parts", default="chinchilla,porian,continued,gemstones")
    parser.add_argument("--laws", default="", help="for coverage; all by default")
    parser.add_argument("--draws", type=int, default=200, help="for coverage")
    parser.add_argument("--bootstrap", type=int, default=200, help="for coverage")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    measure = {
        "chinchilla": chinchilla,
        "porian": porian,
        "continued": continued,
        "gemstones": gemstones,
    }
    results = {}
    for part in arguments.parts.split(","):
        if part == "coverage":
            names = [name for name in arguments.laws.split(",") if name]
            results[part] = coverage(names, arguments.draws, arguments.bootstrap)
        else:
            results[part] = measure[part](arguments.folder)
        if not arguments.json:
            print(part, json.dumps(results[part], indent=2), flush=True)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()

"""Are constraints kept, and are those that no mixture can keep refused by name?

    python experiments/bench/constraints.py --sets 10000

Draws random sets of floors, caps, fixed shares and overlapping groups, some of them
contradictory, and projects random mixtures. A set is judged by a linear program that shares no code
with rayx: feasible ones must give mixtures within 1e-6 of every bound, the others must be refused,
and the bounds that the refusal names must contradict each other, all of them being needed.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter

import numpy as np
from scipy.optimize import linprog

from rayx.constraints import Constraints, Group
from rayx.errors import ChoiceError

TOLERANCE = 1e-6
NUMBER = r"([\d.e+-]+)"
BOUND = re.compile(  # in the words of the refusal
    rf"the (floor|cap) of (\w+) \({NUMBER}\)|at (least|most) {NUMBER} for ([\w+]+)"
)


def draw(rng: np.random.Generator) -> tuple[tuple[str, ...], dict]:
    """Return domains and the arguments of `Constraints.by_name`, rounded to four digits."""
    num_domains = int(rng.integers(2, 13))
    domains = tuple(f"d{k}" for k in range(num_domains))
    # A mixture that all bounds allow, unless the noise pushes them off it.
    centre_K = rng.dirichlet(np.full(num_domains, rng.choice([0.3, 1.0, 5.0])))
    noise = rng.choice([0.0, 0.05, 0.1, 0.3])
    arguments: dict = {"floors": {}, "caps": {}, "fixed": {}, "groups": []}
    for domain, centre in zip(domains, centre_K, strict=True):
        kind = rng.choice(["none", "floor", "cap", "both", "fixed"], p=[0.4, 0.2, 0.2, 0.1, 0.1])
        moved = float(np.clip(centre + noise * rng.normal(), 0, 1))
        if kind in ("floor", "both"):
            arguments["floors"][domain] = np.floor(moved * rng.random() * 1e4) / 1e4
        if kind in ("cap", "both"):
            arguments["caps"][domain] = np.ceil(min(1, moved + rng.random() * 0.3) * 1e4) / 1e4
        if kind == "fixed":
            arguments["fixed"][domain] = round(moved, 4)
    for _ in range(rng.integers(0, 5)):
        chosen = np.flatnonzero(rng.random(num_domains) < 0.5)
        if not len(chosen):
            continue
        total = float(np.clip(centre_K[chosen].sum() + noise * rng.normal(), 0, 1))
        width = rng.choice([0.0, 0.05, 0.2])
        low = round(max(0.0, total - width * rng.random()), 4)
        high = low if width == 0.0 else round(min(1.0, max(low, total + width * rng.random())), 4)
        if rng.random() < 0.3 and width:
            low = 0.0
        arguments["groups"].append(Group(tuple(domains[k] for k in chosen), low, high))
    return domains, arguments


def rows_of(domains: tuple[str, ...], arguments: dict) -> list[tuple[np.ndarray, float]]:
    """Return every bound as (row, limit), row @ x <= limit."""
    unit = dict(zip(domains, np.eye(len(domains)), strict=True))
    rows = [(-unit[d], -share) for d, share in arguments["floors"].items()]
    rows += [(unit[d], share) for d, share in arguments["caps"].items()]
    rows += [(unit[d], share) for d, share in arguments["fixed"].items()]
    rows += [(-unit[d], -share) for d, share in arguments["fixed"].items()]
    for group in arguments["groups"]:
        row = np.sum([unit[d] for d in group.domains], axis=0)
        rows += [(row, group.high), (-row, -group.low)]
    return rows


def feasible(rows: list[tuple[np.ndarray, float]], num_domains: int, slack: float = 0.0) -> bool:
    """Whether a mixture keeps all rows, each loosened by `slack`."""
    result = linprog(
        np.zeros(num_domains),
        A_ub=np.array([row for row, _ in rows]) if rows else None,
        b_ub=np.array([limit for _, limit in rows]) + slack if rows else None,
        A_eq=np.ones((1, num_domains)),
        b_eq=[1.0],
        bounds=(0, 1),
    )
    return result.status == 0


def named(message: str, domains: tuple[str, ...]) -> list[tuple[np.ndarray, float]] | None:
    """Return the bounds that a refusal names, or None where it is of another form."""
    unit = dict(zip(domains, np.eye(len(domains)), strict=True))
    rows = []
    for side, domain, share, bound, total, group in BOUND.findall(message):
        sign = -1.0 if "floor" in side or bound == "least" else 1.0
        row = unit[domain] if domain else np.sum([unit[d] for d in group.split("+")], axis=0)
        rows.append((sign * row, sign * float(share or total)))
    return rows or None


def judge(rng: np.random.Generator, num_mixtures: int = 8) -> str:
    """Draw a set of constraints, hold rayx against the oracle and return the outcome."""
    domains, arguments = draw(rng)
    rows = rows_of(domains, arguments)
    possible = feasible(rows, len(domains))
    try:
        constraints = Constraints.by_name(domains, **arguments)
    except ChoiceError as error:
        if possible and not feasible(rows, len(domains), -1e-7):
            return "border"  # feasible only to the last digit: either answer is right
        if possible:
            return "WRONG: feasible, refused"
        bounds = named(str(error), domains)
        if bounds is None:  # floors or caps alone, or a domain alone: told by its own sentence
            simple = re.search("sum to|is above its cap|is fixed at", str(error))
            return "refused by name" if simple else "WRONG: refused without a name"
        if feasible(bounds, len(domains)):
            return "WRONG: names bounds that agree"
        rest = [bounds[:i] + bounds[i + 1 :] for i in range(len(bounds))]
        needed = all(feasible(others, len(domains), 1e-6) for others in rest)
        return "refused by name" if needed else "WRONG: names a bound that is not needed"
    if not possible:
        return "border" if feasible(rows, len(domains), 1e-7) else "WRONG: infeasible, accepted"
    weights_MK = rng.dirichlet(np.full(len(domains), rng.choice([0.05, 0.5, 5.0])), num_mixtures)
    weights_MK[0] = np.eye(len(domains))[0]  # zeros too
    result_MK = constraints.nearest(weights_MK)
    over = np.abs(result_MK.sum(1) - 1.0).max()
    over = max(over, -result_MK.min(), *(float((result_MK @ r).max() - b) for r, b in rows), 0.0)
    return "kept" if over <= TOLERANCE else "WRONG: a bound is broken"


def measure(num_sets: int, seed: int = 0) -> dict[str, int]:
    """Return outcome -> number of sets."""
    rng = np.random.default_rng(seed)
    return dict(sorted(Counter(judge(rng) for _ in range(num_sets)).items()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Are constraints kept, and conflicts named?")
    parser.add_argument("--sets", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    start = time.monotonic()
    outcomes = measure(arguments.sets, arguments.seed)
    if arguments.json:
        print(json.dumps(outcomes))
        return
    for outcome, count in outcomes.items():
        print(f"{count:6} {outcome}")
    print(f"{arguments.sets} sets in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()

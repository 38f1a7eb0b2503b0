"""Are rounds worth it? Three rounds of 16 proxies against 48 at random, with known optima.

    python experiments/bench/proposers.py --seeds 10 --regressor inverse-power

Every acquisition starts from the same 16 random mixtures and adds two rounds; then a mixture is
chosen from all 48 runs. What is printed is its true regret in thousandths of a bit per byte.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from rayx.choose import Convex, choose
from rayx.fit import Table, fit_table
from rayx.propose import ACQUISITIONS, next_mixtures
from rayx.synthetic import World

SCALE = (1e6, 2e6)  # parameters and tokens of a proxy
NUM_DOMAINS = 8
ROUND = 16


def world_of(seed: int) -> World:
    """Return a world of 8 domains and 2 targets."""
    return World.random(NUM_DOMAINS, 2, seed=seed)


def objective_of(world: World) -> dict[str, float]:
    """Return an objective whose optimum is towards an edge of the simplex."""
    return {world.targets[0]: 2.0, world.targets[1]: 1.0}


def table_of(world: World, weights_RK: np.ndarray, seed: int, noise: float = 0.01) -> Table:
    """Run mixtures in a world; `noise` in bits per byte."""
    noise_RT = noise * np.random.default_rng(seed).standard_normal((len(weights_RK), 2))
    return Table(
        run_ids=tuple(map(str, range(len(weights_RK)))),
        domains=world.domains,
        targets=world.targets,
        weights_RK=weights_RK,
        losses_RM=world.loss(weights_RK, *SCALE) + noise_RT,
    )


def random_mixtures(num: int, seed: int) -> np.ndarray:
    """Draw mixtures evenly over the simplex."""
    return np.random.default_rng(seed).dirichlet(np.ones(NUM_DOMAINS), num)


def in_rounds(world: World, seed: int, acquisition: str, regressor: str) -> np.ndarray:
    """Return 48 mixtures: 16 at random, then two rounds of 16 that are proposed."""
    weights_RK = random_mixtures(ROUND, seed)
    for number in range(2):
        proposed = next_mixtures(
            fit_table(table_of(world, weights_RK, seed), regressor),
            objective_of(world),
            dict.fromkeys(world.domains, 1.0),
            num=ROUND,
            seed=10 * seed + number,
            acquisition=acquisition,
        )
        more = [mixture.to_array(world.domains) for mixture in proposed]
        weights_RK = np.vstack([weights_RK, more])
    return weights_RK


def true_regret(world: World, weights_RK: np.ndarray, seed: int, regressor: str) -> float:
    """Return the regret, in bits per byte, of the mixture that a fit of these runs chooses."""
    fitted = fit_table(table_of(world, weights_RK, seed), regressor)
    method = Convex(kl_strength=0.0, num_candidates=2_000, num_starts=4)
    prior = dict.fromkeys(world.domains, 1.0)
    choice = choose(fitted, objective_of(world), prior, seed=0, method=method)
    best = world.optimum(objective_of(world)).to_array(world.domains)
    both_MK = np.stack([[choice.weights[domain] for domain in world.domains], best])
    chosen, least = world.loss(both_MK, *SCALE) @ np.array([2 / 3, 1 / 3])
    return float(chosen - least)


def measure(acquisition: str, regressor: str, seed: int) -> float:
    """Return the regret after 48 runs of one way ("random" or an acquisition) in one world."""
    world = world_of(seed)
    if acquisition == "random":
        weights_RK = random_mixtures(3 * ROUND, seed)
    else:
        weights_RK = in_rounds(world, seed, acquisition, regressor)
    return true_regret(world, weights_RK, seed, regressor)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Three rounds of 16 against 48 at random.")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--regressor", default="inverse-power")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found = {}
    for acquisition in ("random", *ACQUISITIONS):
        regrets = [measure(acquisition, arguments.regressor, s) for s in range(arguments.seeds)]
        found[acquisition] = regrets
        if not arguments.json:
            listed = " ".join(f"{1e3 * regret:.2f}" for regret in regrets)
            print(f"{acquisition:12} {1e3 * np.mean(regrets):.2f} ({listed})", flush=True)
    if arguments.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()

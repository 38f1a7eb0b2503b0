"""Laws: bootstrap replicates of a fit, as one batch of row weights.

Shapes: B replicates, R runs, G groups of rows, O distinct optima of the fit, P parameters.
"""

from __future__ import annotations

import numpy as np

from rayx.fit.laws.problem import Problem

TOLERANCE = 1e-8  # of a replicate's objective: its parameters vary by far more than that leaves


def replicate(
    problem: Problem, optima_OP: np.ndarray, group_R: np.ndarray, num: int, seed: int
) -> np.ndarray:
    """Refit with groups of rows drawn with replacement.

    Args:
        problem: The fit.
        optima_OP: Where each replicate starts; its best result counts.
        group_R: Group of each row, integers; rows of a group are drawn together.
        num: Replicates B.
        seed: Seed of the draws.

    Returns:
        u_BP.

    Their percentile intervals at 95% held the truth in 94-96% of draws of 120 runs, over the laws;
    in 98% of draws of 3 to 5 runs a parameter, where they are too wide.

    Source: Efron 1979, Ann. Statist. 7(1) (pairs); rows of a group together: the cluster bootstrap.
    """
    numbers, group_R = np.unique(group_R, return_inverse=True)
    share_G = np.full(len(numbers), 1.0 / len(numbers))
    draws_BG = np.random.default_rng(seed).multinomial(len(numbers), share_G, size=num)
    weights_BR = draws_BG[:, group_R].astype(float)
    best_BP, best_B = np.empty((num, problem.num_parameters)), np.full(num, np.inf)
    for start_P in optima_OP:
        u_BP, cost_B = problem.solve(np.tile(start_P, (num, 1)), weights_BR, TOLERANCE)
        better_B = cost_B < best_B
        best_BP[better_B], best_B[better_B] = u_BP[better_B], cost_B[better_B]
    return best_BP[np.isfinite(best_B)]

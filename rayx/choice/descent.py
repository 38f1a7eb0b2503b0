"""Minimise a function of the mixture over what may be chosen, by numeric gradients.

Shapes: M mixtures, K domains, B bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linprog, minimize

from rayx.constraints import Constraints

Function = Callable[[np.ndarray], np.ndarray]  # weights_MK -> value_M
STEP = 1e-5


def minimum(
    function: Function,
    starts_MK: np.ndarray,
    constraints: Constraints,
    kept: Sequence[Function] = (),
) -> np.ndarray:
    """Search from each start and return what was found, feasible, shape (M, K).

    Args:
        function: What is minimised.
        starts_MK: Mixtures that may be chosen.
        constraints: What may be chosen.
        kept: Functions that must be >= 0; where the search fails they may not be.

    Source: sequential least squares programming, Kraft 1988, as in scipy.
    """
    polytope = constraints.polytope
    equal_S = polytope.lows_S >= polytope.highs_S
    equal_EK = np.vstack([np.ones(starts_MK.shape[1]), polytope.sums_SK[equal_S]])
    limit_E = np.r_[1.0, polytope.lows_S[equal_S]]
    sums_SK = np.vstack([polytope.sums_SK[~equal_S], -polytope.sums_SK[~equal_S]])
    limit_S = np.r_[polytope.lows_S[~equal_S], -polytope.highs_S[~equal_S]]
    rules: list[dict] = [
        {"type": "eq", "fun": lambda x_K: equal_EK @ x_K - limit_E, "jac": lambda _: equal_EK}
    ]
    if len(limit_S):
        rules.append(
            {"type": "ineq", "fun": lambda x_K: sums_SK @ x_K - limit_S, "jac": lambda _: sums_SK}
        )
    for rule in kept:
        rules.append(
            {
                "type": "ineq",
                "fun": lambda x_K, rule=rule: rule(np.maximum(x_K, 0.0)[None])[0],
                "jac": lambda x_K, rule=rule: gradient(rule, x_K),
            }
        )
    found_MK = [
        minimize(
            lambda x_K: function(np.maximum(x_K, 0.0)[None])[0],
            start_K,
            jac=lambda x_K: gradient(function, x_K),
            bounds=list(zip(polytope.floors_K, polytope.caps_K, strict=True)),
            constraints=rules,
            method="SLSQP",
            options={"ftol": 1e-10, "maxiter": 200},
        ).x
        for start_K in starts_MK
    ]
    return constraints.nearest(np.maximum(np.nan_to_num(found_MK), 1e-15))


def gradient(function: Function, weights_K: np.ndarray) -> np.ndarray:
    """Central differences, shape (K,); one-sided where a weight has no room below."""
    weights_K = np.maximum(weights_K, 0.0)
    eye_KK = np.eye(len(weights_K))
    below_K = np.minimum(STEP, weights_K)
    high_K = function(weights_K + STEP * eye_KK)
    low_K = function(weights_K - below_K[:, None] * eye_KK)
    return (high_K - low_K) / (STEP + below_K)


def duality_gap(function: Function, weights_K: np.ndarray, constraints: Constraints) -> float:
    """How much lower a convex function can at most be elsewhere: max_y gradient . (x - y), >= 0.

    Source: Frank and Wolfe 1956, Naval Research Logistics 3.
    """
    slope_K = gradient(function, weights_K)
    matrix_BK, limit_B = constraints.polytope.bounds
    best = linprog(
        slope_K,
        A_ub=matrix_BK,
        b_ub=limit_B,
        A_eq=np.ones((1, len(weights_K))),
        b_eq=[1.0],
        bounds=(0, None),
    )
    assert best.x is not None
    return max(0.0, float(slope_K @ (weights_K - best.x)))

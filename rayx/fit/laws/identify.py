"""Laws: which parameters the data cannot tell, in words.

Shapes: P parameters (a domain's side by side), R runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rayx.fit.laws.problem import Problem, at_bound

CORRELATION = 0.99
UNKNOWN = 1.0  # standard deviation in the logarithm (or logit)
NAMED = 3  # pairs that are listed


def identifiability(problem: Problem, u_P: np.ndarray, domains: Sequence[str]) -> list[str]:
    """Say which parameters lie on a bound, hardly matter, or cannot be told apart.

    In scaled data E, A and alpha of a design that covers sizes well are nearly uncorrelated; what
    is correlated here is so by the data, not by the units.
    """
    names, bounds = [], []
    for p, at in zip(problem.parameters, problem.slices, strict=True):
        names += [f"{p.name}/{d}" for d in domains] if p.per_domain else [p.name]
        bounds += at_bound(p, u_P[at].tolist())
    warnings = [
        f"{name} is at its bound of {bound:g}: the data do not show it"
        for name, bound in zip(names, bounds, strict=True)
        if bound is not None
    ]
    free = [i for i, bound in enumerate(bounds) if bound is None]
    value_1R, jacobian_1PR = problem.model(u_P[None])
    jacobian_PR = jacobian_1PR[0, free]
    length_P = np.linalg.norm(jacobian_PR, axis=1)
    noise = 1.483 * float(np.median(np.abs(value_1R[0] - problem.target_R)))
    scaled_PR = jacobian_PR / np.maximum(length_P, 1e-300)[:, None]
    left_PP, values_P, _ = np.linalg.svd(scaled_PR, full_matrices=False)
    covariance_PP = (left_PP / np.maximum(values_P, 1e-8) ** 2) @ left_PP.T
    sd_P = np.sqrt(np.diag(covariance_PP))
    correlation_PP = covariance_PP / np.outer(sd_P, sd_P)
    unknown_P = noise * sd_P / np.maximum(length_P, 1e-300)
    warnings += [
        f"{names[free[i]]} is hardly determined: it is known to a factor of "
        f"{np.exp(min(unknown_P[i], 20.0)):.2g} only"
        for i in np.flatnonzero(unknown_P > UNKNOWN)
    ]
    pairs = [
        (abs(correlation_PP[i, j]), names[free[i]], names[free[j]], correlation_PP[i, j])
        for i in range(len(free))
        for j in range(i)
        if abs(correlation_PP[i, j]) > CORRELATION
    ]
    warnings += [
        f"{a} and {b} cannot be told apart: their correlation is {correlation:.3f}"
        for _, b, a, correlation in sorted(pairs, reverse=True)[:NAMED]
    ]
    if len(pairs) > NAMED:
        warnings.append(f"{len(pairs) - NAMED} more pairs of parameters cannot be told apart")
    return warnings

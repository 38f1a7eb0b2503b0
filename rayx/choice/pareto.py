"""The Pareto front: mixtures of which none is predicted to be better at everything.

Shapes: M mixtures, K domains, G goals.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rayx.choice.descent import minimum
from rayx.choice.outlook import Outlook
from rayx.choice.problem import Problem
from rayx.errors import ChoiceError
from rayx.fit.fitted import normalised_objective


@dataclass(frozen=True, kw_only=True)
class FrontPoint:
    """A mixture that no other of the front beats at everything.

    Attributes:
        weights: Domain -> weight.
        goals: Goal -> predicted mean loss of its targets.
    """

    weights: dict[str, float]
    goals: dict[str, float]


def pareto_front(
    problem: Problem,
    goals: Mapping[str, Sequence[str]],
    *,
    seed: int,
    num_points: int = 12,
    num_candidates: int = 20_000,
    num_searches: int = 16,
) -> list[FrontPoint]:
    """Return mixtures along the front, spread out, from the best at the first goal to the worst.

    Candidates are simulated, and the weighted sum of the goals is minimised for each goal alone and
    for random weights; those that another one dominates are dropped.

    Args:
        problem: Constraints, prior, limits and supply; its objective does not count.
        goals: Name -> targets, whose losses are averaged.
        seed: Seed of the candidates and of the weights.
        num_points: Points at most; the best at each goal are among them.
        num_candidates: Mixtures simulated.
        num_searches: Weighted sums minimised besides the goals themselves.

    Raises:
        FitError: An unknown target.
        ChoiceError: Fewer than two goals, or no mixture keeps the limits.

    Source: Das and Dennis 1997, Structural Optimization 14: where goals are not convex, weighted
        sums miss a part of the front; the simulated candidates are there too.
    """
    if len(goals) < 2:
        raise ChoiceError(
            f"A front needs at least two goals; there is {', '.join(goals) or 'none'}. "
            f"Name targets, or groups of targets."
        )
    fitted = problem.outlook.fitted
    outlooks = [
        replace(
            problem.outlook,
            objective=normalised_objective(dict.fromkeys(targets, 1.0), fitted.table.targets),
        )
        for targets in goals.values()
    ]
    rng = np.random.default_rng(seed)
    candidates_MK = problem.candidates(num_candidates, rng)
    if problem.limits and not (problem.excess(candidates_MK) <= 0).any():
        candidates_MK[0] = problem.anchor(candidates_MK)
    candidates_MK = candidates_MK[problem.excess(candidates_MK) <= 0]
    goal_MG = _goals(outlooks, candidates_MK)
    # In units of their ranges, so that no goal counts for more because its losses vary more.
    unit_G = np.maximum(np.ptp(goal_MG, axis=0), 1e-12)
    mixes = [*np.eye(len(goals)), *rng.dirichlet(np.ones(len(goals)), num_searches)]
    searched = []
    for mix_G in mixes:
        start_K = candidates_MK[np.argmin(goal_MG @ (mix_G / unit_G))]
        searched.append(
            minimum(
                lambda w_MK, mix_G=mix_G: _goals(outlooks, w_MK) @ (mix_G / unit_G),
                start_K[None],
                problem.constraints,
                problem.limit_functions(tightened=1e-7),
            )
        )
    searched_MK = np.concatenate(searched)
    searched_MK = searched_MK[problem.excess(searched_MK) <= 0]
    all_MK = np.concatenate([searched_MK, candidates_MK])
    all_MG = np.concatenate([_goals(outlooks, searched_MK), goal_MG])
    front = non_dominated(all_MG)
    kept = front[_spread(all_MG[front] / unit_G, num_points)]
    kept = kept[np.argsort(all_MG[kept, 0], kind="stable")]
    domains = fitted.table.domains
    return [
        FrontPoint(
            weights=dict(zip(domains, map(float, all_MK[m]), strict=True)),
            goals=dict(zip(goals, map(float, all_MG[m]), strict=True)),
        )
        for m in kept
    ]


def non_dominated(value_MG: np.ndarray) -> np.ndarray:
    """Rows that no other row equals or beats everywhere and beats somewhere, shape (N,), sorted."""
    order_M = np.lexsort(value_MG.T[::-1])
    kept: list[int] = []
    for m in order_M:  # whoever dominates a row comes before it
        before_NG = value_MG[kept]
        if not (before_NG <= value_MG[m]).all(1).any():
            kept.append(int(m))
    return np.sort(np.array(kept, dtype=int))


def _goals(outlooks: Sequence[Outlook], weights_MK: np.ndarray) -> np.ndarray:
    return np.stack([outlook.value(weights_MK) for outlook in outlooks], axis=1)


def _spread(value_MG: np.ndarray, num_points: int) -> np.ndarray:
    """Indices of the best at each goal and of those that lie farthest from what is taken."""
    taken = list(dict.fromkeys(int(m) for m in value_MG.argmin(0)))
    distance_M = np.min([np.linalg.norm(value_MG - value_MG[m], axis=1) for m in taken], axis=0)
    while len(taken) < min(num_points, len(value_MG)) and distance_M.max() > 1e-9:
        taken.append(int(distance_M.argmax()))
        distance_M = np.minimum(distance_M, np.linalg.norm(value_MG - value_MG[taken[-1]], axis=1))
    return np.array(taken)

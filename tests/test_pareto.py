"""The Pareto front: nothing on it is dominated, by itself or by the true front of the models."""

from __future__ import annotations

import numpy as np
import pytest

from rayx.choice.descent import minimum
from rayx.choice.pareto import non_dominated, pareto_front
from rayx.choice.problem import prepare, simulate
from rayx.constraints import Constraints
from rayx.errors import RayxError
from rayx.fit import Table, fit_table
from rayx.synthetic import World

WORLD = World.random(4, 3, seed=2, noise_sd=0.0)


@pytest.fixture(scope="module")
def problem():
    weights_RK = np.random.default_rng(0).dirichlet(np.ones(4), 40)
    table = Table(
        run_ids=tuple(map(str, range(40))),
        domains=WORLD.domains,
        targets=WORLD.targets,
        weights_RK=weights_RK,
        losses_RM=WORLD.loss(weights_RK, 1e6, 2e6),
    )
    bounds = Constraints.by_name(WORLD.domains, caps={WORLD.domains[0]: 0.6})
    objective = dict.fromkeys(WORLD.targets, 1.0)
    prior = dict.fromkeys(WORLD.domains, 1.0)
    return prepare(fit_table(table, "inverse-power"), objective, prior, bounds)


def test_non_dominated_is_what_pairwise_comparison_keeps():
    rng = np.random.default_rng(0)
    for num_goals in (2, 3):
        value_MG = rng.integers(0, 6, (60, num_goals)).astype(float)
        kept = set(non_dominated(value_MG))
        for m, value_G in enumerate(value_MG):
            beaten = ((value_MG <= value_G).all(1) & (value_MG < value_G).any(1)).any()
            twin = any((value_MG[k] == value_G).all() for k in kept)
            assert (m in kept) <= (not beaten) and twin == (not beaten)
        assert len({tuple(value_MG[m]) for m in kept}) == len(kept)


def test_front_is_feasible_spread_and_as_good_as_weighted_sums(problem):
    a, b, c = WORLD.targets
    front = pareto_front(problem, {a: [a], "others": [b, c]}, seed=0, num_candidates=5_000)
    weights_NK = np.array([list(point.weights.values()) for point in front])
    goal_NG = np.array([list(point.goals.values()) for point in front])
    assert 6 <= len(front) <= 12
    assert problem.constraints.polytope.excess(weights_NK).max() < 1e-9
    assert (np.diff(goal_NG[:, 0]) > 0).all() and (np.diff(goal_NG[:, 1]) < 0).all()
    losses_NT = problem.outlook.fitted.predict(weights_NK)
    np.testing.assert_allclose(goal_NG[:, 0], losses_NT[:, 0])
    np.testing.assert_allclose(goal_NG[:, 1], losses_NT[:, 1:].mean(1))
    # The models are convex, so the least weighted sums lie on the front and bound it from below.
    unit_G = np.ptp(goal_NG, axis=0)
    for share in (0.0, 0.3, 0.7, 1.0):
        mix_T = np.array([share / unit_G[0], *[(1 - share) / unit_G[1] / 2] * 2])
        best_K = minimum(
            lambda w_MK, mix_T=mix_T: problem.outlook.fitted.predict(w_MK) @ mix_T,
            np.full((1, 4), 0.25),
            problem.constraints,
        )
        least = float(problem.outlook.fitted.predict(best_K)[0] @ mix_T)
        found = (losses_NT @ mix_T).min()
        assert least - 1e-6 <= found <= least + 0.02
        if share in (0.0, 1.0):
            assert found == pytest.approx(least, abs=1e-4)
    random_MK = problem.constraints.nearest(
        simulate(problem.prior_K, 3_000, np.random.default_rng(5))
    )
    random_MT = problem.outlook.fitted.predict(random_MK)
    random_MG = np.stack([random_MT[:, 0], random_MT[:, 1:].mean(1)], axis=1)
    for goal_G in goal_NG:
        assert not (random_MG < goal_G - 1e-4).all(1).any()


def test_front_keeps_limits_and_is_deterministic(problem):
    a, b, c = WORLD.targets
    free = pareto_front(problem, {a: [a], b: [b]}, seed=0, num_candidates=2_000, num_searches=4)
    limited = prepare(
        problem.outlook.fitted,
        problem.outlook.objective,
        dict.fromkeys(WORLD.domains, 1.0),
        problem.constraints,
        tolerances={c: 0.0},
    )
    kept = pareto_front(limited, {a: [a], b: [b]}, seed=0, num_candidates=2_000, num_searches=4)
    for point in kept:
        weights_K = np.array(list(point.weights.values()))
        assert limited.excess(weights_K[None])[0] <= 0
    assert min(p.goals[a] for p in kept) > min(p.goals[a] for p in free)
    again = pareto_front(problem, {a: [a], b: [b]}, seed=0, num_candidates=2_000, num_searches=4)
    assert again == free


@pytest.mark.parametrize(
    ("goals", "words"), [({"a": ["web"]}, "at least two"), ({"a": ["web"], "b": ["q"]}, "'q'")]
)
def test_front_of_wrong_goals_is_refused(problem, goals, words):
    with pytest.raises(RayxError, match=words):
        pareto_front(problem, goals, seed=0)

"""Proposers: batches that are feasible, spread out, and worth more than random mixtures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from experiments.bench.proposers import NUM_DOMAINS, measure, random_mixtures, table_of, world_of
from rayx.constraints import Constraints, Group
from rayx.errors import RayxError
from rayx.fit import fit_table
from rayx.propose import ACQUISITIONS, MIN_DISTANCE, d_optimal_mixtures, next_mixtures


def test_three_rounds_of_16_leave_less_regret_than_48_at_random():
    random, rounds = (
        [measure(way, "inverse-power", seed) for seed in range(5)] for way in ("random", "thompson")
    )
    assert np.mean(rounds) < 0.9 * np.mean(random), (rounds, random)


@pytest.fixture(scope="module")
def fitted():
    world = world_of(0)
    return fit_table(table_of(world, random_mixtures(32, 0), 0), "inverse-power")


@pytest.fixture(scope="module")
def constraints(fitted):
    a, b, c, *_ = fitted.table.domains
    return Constraints.by_name(
        fitted.table.domains, caps={a: 0.5}, groups=[Group((a, b), 0.3, 0.7), Group((b, c), 0.2)]
    )


@pytest.mark.parametrize("acquisition", ACQUISITIONS)
def test_a_batch_is_feasible_distinct_spread_out_and_promising(fitted, constraints, acquisition):
    objective, prior = {fitted.table.targets[0]: 1.0}, dict.fromkeys(fitted.table.domains, 1.0)
    arguments: dict[str, Any] = {"num": 16, "seed": 3, "acquisition": acquisition}
    proposed = next_mixtures(fitted, objective, prior, constraints, **arguments)
    assert proposed == next_mixtures(fitted, objective, prior, constraints, **arguments)
    assert proposed != next_mixtures(
        fitted, objective, prior, constraints, **{**arguments, "seed": 4}
    )
    weights_NK = np.array([mixture.to_array(fitted.table.domains) for mixture in proposed])
    assert constraints.polytope.excess(weights_NK).max() <= 1e-6
    others_MK = np.vstack([weights_NK, fitted.table.weights_RK])
    for n, weights_K in enumerate(weights_NK):
        distance_M = np.abs(np.delete(others_MK, n, axis=0) - weights_K).sum(1)
        assert distance_M.min() >= MIN_DISTANCE - 2e-5
    # Spread out: not all the same guess. The batch reaches well beyond its least distance.
    assert np.abs(weights_NK[:, None] - weights_NK[None]).sum(2).max() > 5 * MIN_DISTANCE
    random_MK = constraints.nearest(random_mixtures(500, 9))
    expected = fitted.objective(random_MK, objective)
    assert np.median(fitted.objective(weights_NK, objective)) < np.quantile(expected, 0.3)


def test_thompson_and_improvement_go_where_the_folds_disagree_more_than_top_does(fitted):
    objective, prior = {fitted.table.targets[0]: 1.0}, dict.fromkeys(fitted.table.domains, 1.0)
    model = fitted.models[fitted.table.targets[0]]
    spread = {}
    for acquisition in ACQUISITIONS:
        proposed = next_mixtures(fitted, objective, prior, num=16, seed=0, acquisition=acquisition)
        weights_NK = np.array([mixture.to_array(fitted.table.domains) for mixture in proposed])
        spread[acquisition] = np.mean(
            np.std([predict(weights_NK) for predict in model.predict_folds], axis=0)
        )
    assert spread["improvement"] > spread["top"]


def test_proposals_keep_limits(fitted):
    first, second = fitted.table.targets
    weights_RK = random_mixtures(200, 1)
    limit = float(np.quantile(fitted.predict(weights_RK)[:, 1], 0.3))
    proposed = next_mixtures(
        fitted,
        {first: 1.0},
        dict.fromkeys(fitted.table.domains, 1.0),
        num=8,
        seed=0,
        limits={second: limit},
    )
    weights_NK = np.array([mixture.to_array(fitted.table.domains) for mixture in proposed])
    assert fitted.predict(weights_NK)[:, 1].max() <= limit + 1e-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"acquisition": "thomson"}, "Did you mean 'thompson'"),
        ({"num": 0}, "num .of mixtures. is 0"),
        ({"num": 100}, "of 100 mixtures lie 0.02 apart"),
    ],
)
def test_wrong_arguments_are_named(fitted, change, words):
    fixed = {domain: 1 / NUM_DOMAINS for domain in fitted.table.domains[2:]}
    bounds = Constraints.by_name(fitted.table.domains, fixed=fixed)
    prior = dict.fromkeys(fitted.table.domains, 1.0)
    with pytest.raises(RayxError, match=words):
        next_mixtures(
            fitted, {fitted.table.targets[0]: 1}, prior, bounds, **{"num": 4, "seed": 0} | change
        )


# --- D-optimal designs ---


def scheffe(mixtures, domains):
    weights_NK = np.array([mixture.to_array(domains) for mixture in mixtures])
    i, j = np.triu_indices(len(domains), k=1)
    return np.hstack([weights_NK, 4 * weights_NK[:, i] * weights_NK[:, j]])


def test_d_optimal_design_of_the_quadratic_is_vertices_and_midpoints():
    # Kiefer 1961: for Scheffé's quadratic on the simplex, the {K, 2} lattice, equally weighted.
    domains = ("a", "b", "c")
    design = d_optimal_mixtures(Constraints.none(domains), 6, seed=0)
    lattice = {(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.5, 0, 0.5), (0, 0.5, 0.5)}
    assert {tuple(mixture.to_array(domains)) for mixture in design} == lattice
    linear = d_optimal_mixtures(Constraints.none(domains), 6, seed=0, order=1)
    weights_NK = np.array([mixture.to_array(domains) for mixture in linear])
    np.testing.assert_array_equal(weights_NK.sum(0), [2, 2, 2])  # each vertex twice
    assert weights_NK.max(1).min() == 1.0


def test_d_optimal_design_beats_random_ones_and_keeps_groups():
    domains = ("a", "b", "c", "d")
    bounds = Constraints.by_name(domains, caps={"a": 0.6}, groups=[Group(("b", "c"), 0.2, 0.5)])
    design = d_optimal_mixtures(bounds, 14, seed=1)
    assert design == d_optimal_mixtures(bounds, 14, seed=1)
    weights_NK = np.array([mixture.to_array(domains) for mixture in design])
    assert bounds.polytope.excess(weights_NK).max() <= 1e-6

    def log_det(features_NQ):
        return np.linalg.slogdet(features_NQ.T @ features_NQ)[1]

    rng = np.random.default_rng(0)
    i, j = np.triu_indices(4, k=1)
    others = []
    for _ in range(50):
        drawn_NK = bounds.nearest(rng.dirichlet(np.ones(4), 14))
        others.append(log_det(np.hstack([drawn_NK, 4 * drawn_NK[:, i] * drawn_NK[:, j]])))
    assert log_det(scheffe(design, domains)) > max(others) + 1.0


def test_d_optimal_wrong_arguments_are_named():
    with pytest.raises(RayxError, match="order is 3"):
        d_optimal_mixtures(Constraints.none(("a", "b")), 4, seed=0, order=3)

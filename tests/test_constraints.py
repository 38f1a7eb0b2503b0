"""Constraints: kept by every mixture returned, nearest in divergence, conflicts named."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from experiments.bench.constraints import measure
from rayx.caps import cap_weights
from rayx.constraints import Constraints, Group
from rayx.errors import ChoiceError


@st.composite
def bounded_weights(draw):
    """(weights_MK, caps_K, floors_K) that some mixture satisfies, with zeros and tight caps."""
    num_domains = draw(st.integers(1, 7))
    share = st.one_of(st.just(0.0), st.floats(1e-8, 1.0))
    weights_MK = np.array(
        draw(
            st.lists(
                st.lists(share, min_size=num_domains, max_size=num_domains),
                min_size=1,
                max_size=4,
            )
        )
    )
    weights_MK[weights_MK.sum(1) == 0] = 1.0
    target_K = np.array(draw(st.lists(share, min_size=num_domains, max_size=num_domains))) + 1e-3
    target_K /= target_K.sum()
    stretch = draw(st.lists(st.floats(0, 1), min_size=2 * num_domains, max_size=2 * num_domains))
    caps_K = np.minimum(1.0, target_K * (1 + 3 * np.array(stretch[:num_domains])))
    floors_K = target_K * np.array(stretch[num_domains:])
    return weights_MK, caps_K, floors_K


def plain(caps_K, floors_K, groups=()):
    domains = tuple(f"d{k}" for k in range(len(caps_K)))
    return Constraints(domains, np.asarray(floors_K), np.asarray(caps_K), groups)


@settings(max_examples=200, deadline=None)
@given(bounded_weights())
def test_nearest_keeps_floors_and_caps_and_is_the_same_for_one_mixture_and_many(case):
    weights_MK, caps_K, floors_K = case
    result_MK = plain(caps_K, floors_K).nearest(weights_MK)
    np.testing.assert_allclose(result_MK.sum(1), 1.0, rtol=0, atol=1e-12)
    assert (result_MK <= caps_K + 1e-12).all() and (result_MK >= floors_K - 1e-12).all()
    for weights_K, result_K in zip(weights_MK, result_MK, strict=True):
        np.testing.assert_allclose(result_K, cap_weights(weights_K, caps_K, floors_K), atol=1e-9)


@settings(max_examples=60, deadline=None)
@example(  # all weights are clipped at first: no slope shows where to go
    (np.array([[0.8125, 0.0, 0.0]]), np.array([0.0025, 1.0, 0.009]), np.array([0.0, 0.03, 0.002]))
)
@given(bounded_weights())
def test_a_group_of_all_domains_changes_nothing(case):
    weights_MK, caps_K, floors_K = case
    weights_MK = weights_MK + 1e-4  # in the dual, a weight of 0 counts as 1e-9
    without = plain(caps_K, floors_K)
    group = Group(without.domains, 0.5, 1.0)
    with_group = plain(caps_K, floors_K, (group,))
    np.testing.assert_allclose(
        with_group.nearest(weights_MK), without.nearest(weights_MK), atol=1e-6
    )


def test_nearest_with_overlapping_groups_is_the_least_divergence():
    groups = (Group(("d0", "d1", "d2"), 0.1, 0.3), Group(("d2", "d3"), 0.5, 0.5))
    bounds = plain([0.9, 0.9, 0.4, 0.9, 0.9], [0.0, 0.02, 0.0, 0.0, 0.1], groups)
    weights_MK = np.random.default_rng(0).dirichlet(np.ones(5), 20)
    result_MK = bounds.nearest(weights_MK)
    matrix_BK, limit_B = bounds.polytope.bounds
    for weights_K, result_K in zip(weights_MK, result_MK, strict=True):

        def divergence(x_K, weights_K=weights_K):
            x_K = np.maximum(x_K, 1e-12)
            return float(np.sum(x_K * np.log(x_K / weights_K)))

        found = minimize(
            divergence,
            bounds.polytope.inside,
            constraints=[
                {"type": "eq", "fun": lambda x_K: x_K.sum() - 1},
                {"type": "ineq", "fun": lambda x_K: limit_B - matrix_BK @ x_K},
            ],
            method="SLSQP",
            options={"ftol": 1e-13, "maxiter": 500},
        )
        assert divergence(result_K) <= found.fun + 1e-7
        assert (matrix_BK @ result_K <= limit_B + 1e-9).all()


def test_nearest_scales_a_group_of_its_own_as_a_whole():
    bounds = Constraints.by_name(("a", "b", "c", "d"), groups=[Group(("a", "b"), 0.6, 0.8)])
    result = bounds.nearest(np.array([[0.1, 0.2, 0.3, 0.4], [0.3, 0.4, 0.1, 0.2]]))
    np.testing.assert_allclose(result[0], [0.2, 0.4, 0.4 * 3 / 7, 0.4 * 4 / 7], atol=1e-9)
    np.testing.assert_array_equal(result[1], [0.3, 0.4, 0.1, 0.2])  # it may be chosen as it is


def test_random_constraints_are_kept_and_conflicts_named():
    outcomes = measure(300)
    assert not [outcome for outcome in outcomes if outcome.startswith("WRONG")], outcomes
    assert outcomes["kept"] > 100 and outcomes["refused by name"] > 50
    assert outcomes.get("border", 0) < 15


@pytest.mark.slow
def test_ten_thousand_random_constraints_are_kept_and_conflicts_named():
    outcomes = measure(10_000, seed=1)
    assert not [outcome for outcome in outcomes if outcome.startswith("WRONG")], outcomes


AB = ("a", "b")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Constraints(AB, np.zeros(2), np.array([0.3, 0.2])), "caps sum to 0.5"),
        (lambda: Constraints(AB, np.array([0.7, 0.6]), np.ones(2)), "floors sum to 1.3"),
        (
            lambda: Constraints(AB, np.array([0.5, 0]), np.array([0.2, 1])),
            r"floor of 'a' \(0.5\) is above its cap \(0.2\)",
        ),
        (lambda: Constraints(AB, np.zeros(2), np.array([np.nan, 1])), "cap of 'a' is nan"),
        (lambda: Constraints(AB, np.array([-0.1, 0]), np.ones(2)), "floor of 'a' is -0.1"),
        (lambda: Constraints(AB, np.zeros(3), np.ones(2)), "floors have shape"),
        (lambda: Constraints.by_name(("web", "code"), {"coed": 0.1}), "Did you mean 'code'"),
        (lambda: Constraints.from_supply({"a": 10, "b": 20}, 1000, 4), "max_epochs is 4"),
        (
            lambda: Constraints.from_supply({"a": 10, "b": 2000}, 1000, 4, {"a": 0.1}),
            "floor of 'a' .* above its cap",
        ),
        (
            lambda: Constraints.by_name(AB, caps={"a": 0.2}, fixed={"a": 0.3}),
            "share of 'a' is fixed at 0.3; expected 0 to 0.2",
        ),
        (lambda: Constraints.by_name(AB, fixed={"c": 0.3}), "fixed shares have domain 'c'"),
        (lambda: Constraints.by_name(AB, fixed={"a": 1.3}), "fixed at 1.3; expected 0 to 1"),
        (
            lambda: Constraints.by_name(("web", "code"), groups=[Group(("web", "coed"))]),
            "Group web.coed has domain 'coed'.*Did you mean 'code'",
        ),
        (lambda: Constraints.by_name(AB, groups=[Group(("a", "a"))]), "expected at least one"),
        (lambda: Constraints.by_name(AB, groups=[Group(())]), "expected at least one"),
        (lambda: Constraints.by_name(AB, groups=[Group(("a",), 0.5, 0.2)]), "low <= high"),
        (
            lambda: Constraints.by_name(
                ("a", "b", "c", "d"),
                floors={"a": 0.3, "b": 0.3, "c": 0.1},
                groups=[Group(("a", "b"), 0.0, 0.5), Group(("c", "d"), 0.2, 0.9)],
            ),
            re.escape(
                "No mixture keeps all of: the floor of a (0.3), the floor of b (0.3), at most 0.5 "
                "for a+b. Without"
            ),
        ),
        (
            lambda: Constraints.by_name(
                ("a", "b", "c"), groups=[Group(("a", "b"), 0.0, 0.4), Group(("b", "c"), 0.0, 0.5)]
            ),
            re.escape("at most 0.4 for a+b, at most 0.5 for b+c"),
        ),
    ],
)
def test_constraints_conflict_is_named(make, words):
    with pytest.raises(ChoiceError, match=words):
        make()


def test_constraints_from_supply_caps_are_epochs_of_the_budget():
    bounds = Constraints.from_supply({"a": 10, "b": 2000}, budget_tokens=1000, max_epochs=4)
    np.testing.assert_allclose(bounds.caps_K, [0.04, 1.0])
    assert bounds.domains == ("a", "b") and (bounds.floors_K == 0).all()

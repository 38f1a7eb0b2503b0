"""Candidates and caps: what is tried can be afforded, exactly, and is drawn as RegMix draws."""

import logging

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from rayx.candidates import (
    cap_weights,
    proportional_mixture,
    regmix_mixtures,
    sobol_mixtures,
    supply_caps,
    uniform_mixture,
    vertex_mixtures,
)
from rayx.caps import Borders
from rayx.errors import SpecError
from rayx.mixture import WHOLE, Mixture

PILE = {"cc": 227.0, "pubmed": 90.0, "books": 101.0, "code": 95.0, "wiki": 17.0, "math": 8.0}
DOMAINS = sorted(PILE)

relaxed = settings(deadline=None, max_examples=100)
shares = st.floats(0, 1)


@st.composite
def bounded(draw):
    """Weights, caps and floors that some mixture satisfies."""
    num = draw(st.integers(1, 12))
    weights = draw(
        st.lists(st.one_of(st.just(0.0), st.floats(1e-9, 1e9)), min_size=num, max_size=num)
    )
    caps = np.array(draw(st.lists(shares, min_size=num, max_size=num)))
    assume(caps.sum() > 1e-3)
    if caps.sum() < 1.001:
        caps = np.minimum(caps * (1.001 + draw(st.floats(0, 2))) / caps.sum(), 1.0)
    assume(caps.sum() >= 1.0001)
    floors = caps * draw(st.floats(0, 0.9999)) / caps.sum()
    return np.array(weights), caps, floors * draw(st.sampled_from([0.0, 1.0]))


# Caps -----------------------------------------------------------------------------------------


@relaxed
@given(bounded())
def test_capped_weights_keep_the_borders_and_add_up_to_one(problem):
    weights_K, caps_K, floors_K = problem
    result_K = cap_weights(weights_K, caps_K, floors_K)
    assert result_K.sum() == pytest.approx(1, abs=1e-12)
    assert (result_K <= caps_K).all() and (result_K >= floors_K).all()


@relaxed
@given(bounded())
def test_capped_weights_scale_all_free_domains_by_one_factor(problem):
    weights_K, caps_K, floors_K = problem
    result_K = cap_weights(weights_K, caps_K, floors_K)
    used_K = weights_K > 0
    factor_K = result_K[used_K] / weights_K[used_K]
    at_cap_K, at_floor_K = (result_K >= caps_K)[used_K], (result_K <= floors_K)[used_K]
    free_K = ~at_cap_K & ~at_floor_K
    if free_K.any():
        factor = factor_K[free_K][0]
        assert factor_K[free_K] == pytest.approx(factor, rel=1e-6)
        # A domain rests at its cap only if the factor would take it over, and so with floors.
        assert (factor_K[at_cap_K & ~at_floor_K] <= factor * (1 + 1e-6)).all()
        assert (factor_K[at_floor_K & ~at_cap_K] >= factor * (1 - 1e-6)).all()
        assert result_K[~used_K] == pytest.approx(floors_K[~used_K], abs=1e-12)


@relaxed
@given(bounded(), st.sampled_from([3.7, 1e-200, 1e200]))
def test_capped_weights_do_not_depend_on_the_unit(problem, unit):
    weights_K, caps_K, floors_K = problem
    result_K = cap_weights(weights_K, caps_K, floors_K)
    assert cap_weights(weights_K * unit, caps_K, floors_K) == pytest.approx(result_K, abs=1e-12)
    assert cap_weights(result_K, caps_K, floors_K) == pytest.approx(result_K, abs=1e-9)


def test_capped_weights_are_the_nearest_in_divergence():
    rng = np.random.default_rng(0)
    for _ in range(5):
        weights_K = rng.dirichlet(np.ones(5))
        caps_K = rng.uniform(0.15, 0.5, 5)
        floors_K = rng.uniform(0, 0.1, 5)

        def divergence(x_K, weights_K=weights_K):
            return float(np.sum(x_K * np.log(x_K / weights_K)))

        found = minimize(
            divergence,
            np.full(5, 0.2),
            bounds=list(zip(np.maximum(floors_K, 1e-9), caps_K, strict=True)),
            constraints={"type": "eq", "fun": lambda x_K: x_K.sum() - 1},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert cap_weights(weights_K, caps_K, floors_K) == pytest.approx(found.x, abs=1e-4)


def test_capping_in_one_pass_would_break_a_cap_and_ours_does_not():
    weights_K, caps_K = np.array([0.6, 0.3, 0.1]), np.array([0.4, 0.35, 1.0])
    once_K = np.minimum(weights_K, caps_K)
    assert once_K[1] / once_K.sum() > caps_K[1]
    assert cap_weights(weights_K, caps_K) == pytest.approx([0.4, 0.35, 0.25])


def test_domains_of_weight_zero_get_only_what_no_other_can_take():
    assert cap_weights(np.array([1, 1, 0, 0]), np.array([0.7, 0.7, 1, 1])).tolist() == [
        0.5,
        0.5,
        0,
        0,
    ]
    assert cap_weights(np.array([1, 0, 0]), np.array([0.4, 1, 0.1])) == pytest.approx(
        [0.4, 0.5, 0.1]
    )
    assert cap_weights(np.zeros(4), np.full(4, np.inf)) == pytest.approx([0.25] * 4)


def test_weights_of_any_size_are_capped():
    weights_K = np.array([1.0, 1e-300, 1e-308, 0.0])
    result_K = cap_weights(weights_K, np.array([0.5, 0.3, 1.0, 1.0]))
    assert result_K == pytest.approx([0.5, 0.3, 0.2, 0.0])


@relaxed
@given(bounded())
def test_mixtures_keep_caps_exactly_after_rounding(problem):
    weights_K, caps_K, _ = problem
    domains = [f"d{k:02}" for k in range(len(weights_K))]
    mixture = Borders(domains, dict(zip(domains, caps_K, strict=True))).mixture(weights_K)
    assert sum(mixture.millionths.values()) == WHOLE
    assert (mixture.to_array(domains) <= caps_K).all()
    exact_K = cap_weights(weights_K, caps_K)
    assert np.abs(mixture.to_array(domains) - exact_K).max() < 1e-6 * (len(domains) + 1)


@given(st.integers(0, WHOLE))
def test_a_cap_that_is_a_whole_number_of_millionths_is_not_rounded_down(parts):
    caps = {"a": parts / WHOLE, "b": 1.0}
    assert Borders(["a", "b"], caps).upper_K[0] == parts


def test_supply_caps_are_epochs_of_the_supply():
    caps = supply_caps({"web": 1000, "code": 50, "math": 0}, 400, 4)
    assert caps == {"web": 1.0, "code": 0.5, "math": 0.0}


# RegMix ---------------------------------------------------------------------------------------


def test_regmix_is_deterministic_and_its_beginning_stays():
    few, many = (regmix_mixtures(PILE, n, seed=7) for n in (20, 60))
    assert few == many[:20] == regmix_mixtures(PILE, 20, seed=7)
    assert few != regmix_mixtures(PILE, 20, seed=8)
    caps = {"cc": 0.3, "books": 0.2}
    few, many = (regmix_mixtures(PILE, n, seed=7, caps=caps) for n in (20, 60))
    assert few == many[:20]


def test_regmix_depends_neither_on_order_nor_on_the_unit_of_the_prior():
    mixtures = regmix_mixtures(PILE, 30, seed=1)
    reverse = {d: PILE[d] * 1024 for d in reversed(PILE)}
    assert regmix_mixtures(reverse, 30, seed=1) == mixtures


def test_regmix_keeps_every_bound():
    caps = {"cc": 0.5, "wiki": 0.05, "code": 0.333333333}
    mixtures = regmix_mixtures(PILE, 300, seed=3, caps=caps)
    total = sum(PILE.values())
    weights_NK = np.array([m.to_array(DOMAINS) for m in mixtures])
    bounds_K = [min(15 * PILE[d] / total, caps.get(d, 1.0), 1.0) for d in DOMAINS]
    assert (weights_NK <= bounds_K).all()
    # Millionths of rounding apart, a share is 0 or at least min_weight.
    assert not ((weights_NK > 0) & (weights_NK < 2e-4 - 1e-6)).any()
    distances_NN = np.abs(weights_NK[:, None] - weights_NK[None]).sum(axis=-1)
    assert distances_NN[~np.eye(len(mixtures), dtype=bool)].min() >= 1e-3 - 1e-12


def test_regmix_covers_corners_and_centre_around_the_tempered_prior():
    prior = {"a": 16.0, "b": 4.0, "c": 1.0}
    # Where no draw repeats another, the mean is that of each Dirichlet: the tempered prior, 4:2:1.
    mixtures = regmix_mixtures(
        prior, 2000, seed=0, max_prior_ratio=99, strengths=(1, 5), min_weight=0, min_distance=0
    )
    weights_NK = np.array([m.to_array(list(prior)) for m in mixtures])
    assert weights_NK.mean(axis=0) == pytest.approx([4 / 7, 2 / 7, 1 / 7], abs=0.03)
    mixtures = regmix_mixtures(prior, 200, seed=0, max_prior_ratio=99)
    weights_NK = np.array([m.to_array(list(prior)) for m in mixtures])
    largest_N = weights_NK.max(axis=1)
    assert (largest_N > 0.95).mean() > 0.2 and (largest_N < 0.6).mean() > 0.1


def test_regmix_strength_decides_the_spread():
    def spread(strength: float, temperature: float = 1.0) -> np.ndarray:
        mixtures = regmix_mixtures(
            {"a": 3, "b": 1},
            2000,
            seed=0,
            strengths=(strength, strength),
            num_strengths=1,
            temperature=temperature,
            min_distance=0.0,
            min_weight=0.0,
        )
        return np.array([m.get("a", 0.0) for m in mixtures])

    # Beta(s p, s (1 - p)) has mean p and variance p (1 - p) / (s + 1).
    for strength in (1.0, 9.0):
        draws = spread(strength)
        assert draws.mean() == pytest.approx(0.75, abs=0.03)
        assert draws.var() == pytest.approx(0.1875 / (strength + 1), rel=0.1)


def test_regmix_under_caps_too_tight_to_draw_pulls_inside_and_says_so(caplog):
    caps = dict.fromkeys(DOMAINS, 0.18)
    with caplog.at_level(logging.INFO):
        mixtures = regmix_mixtures(PILE, 40, seed=0, caps=caps, multiplier=15)
    assert "40 of 40 mixtures pulled inside the caps" in caplog.text
    assert len(set(mixtures)) == 40
    assert all(share <= 0.18 for mixture in mixtures for share in mixture.values())


def test_regmix_without_need_pulls_nothing(caplog):
    with caplog.at_level(logging.INFO):
        regmix_mixtures(PILE, 100, seed=0)
    assert not caplog.messages


def test_regmix_of_one_domain_is_that_domain():
    assert regmix_mixtures({"web": 5}, 1, seed=0) == [Mixture({"web": 1})]


def test_regmix_over_many_domains_with_shares_below_the_least_weight():
    prior = {f"d{k}": 1.0 for k in range(3000)}
    (mixture,) = regmix_mixtures(
        prior, 1, seed=0, strengths=(1e6, 1e6), num_strengths=1, min_weight=5e-4
    )
    assert len(mixture) > 2000


# Sobol, vertices, baselines -------------------------------------------------------------------


def test_sobol_is_deterministic_and_its_beginning_stays():
    few, many = (sobol_mixtures(DOMAINS, n, seed=2) for n in (16, 50))
    assert few == many[:16] == sobol_mixtures(DOMAINS[::-1], 16, seed=2)
    assert few != sobol_mixtures(DOMAINS, 16, seed=3)


def test_sobol_is_uniform_on_the_simplex_and_more_even_than_chance():
    mixtures = sobol_mixtures(["a", "b", "c"], 256, seed=0)
    weights_NK = np.array([m.to_array(["a", "b", "c"]) for m in mixtures])
    # Uniform on the simplex: mean 1/3, P(w_k < x) = 1 - (1 - x)^2. Chance errs by 0.03.
    assert weights_NK.mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.006)
    for x in (0.1, 0.3, 0.6):
        assert (weights_NK < x).mean(axis=0) == pytest.approx(1 - (1 - x) ** 2, abs=0.03)


@pytest.mark.parametrize("caps", [{"cc": 0.2}, dict.fromkeys(DOMAINS, 0.17), {"cc": 0, "code": 0}])
def test_sobol_keeps_caps_and_repeats_nothing(caps):
    mixtures = sobol_mixtures(DOMAINS, 40, seed=0, caps=caps)
    assert len(set(mixtures)) == 40
    assert all(m.get(d, 0) <= cap for m in mixtures for d, cap in caps.items())


def test_sobol_fills_what_caps_leave_and_keeps_what_they_do_not_touch():
    domains = ["a", "b", "c"]
    capped, free = (sobol_mixtures(domains, 256, 0, caps) for caps in ({"a": 0.5}, None))
    share_N = np.array([m.get("a", 0) for m in capped])
    assert (share_N == 0.5).mean() < 0.05  # inside, not heaped on the border
    assert 0.1 < (share_N > 0.4).mean() < 0.4
    tight = dict.fromkeys(domains, 0.34)
    spread_NK = np.array([m.to_array(domains) for m in sobol_mixtures(domains, 256, 0, tight)])
    # A triangle between 0.32 and 0.34: all of it, each way.
    assert spread_NK.min(axis=0) == pytest.approx([0.32] * 3, abs=0.004)
    assert spread_NK.max(axis=0) == pytest.approx([0.34] * 3, abs=0.001)
    assert spread_NK.mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.0005)
    # With centre (1/3, 1/3, 1/3) and loose caps, most rays meet no cap.
    loose = sobol_mixtures(domains, 256, 0, dict.fromkeys(domains, 0.99))
    assert sum(m in free for m in loose) > 200


def test_vertices_are_the_domains_where_nothing_binds():
    assert vertex_mixtures(["b", "a"]) == [Mixture({"a": 1}), Mixture({"b": 1})]


def test_vertices_go_as_far_as_caps_and_floors_let_them():
    mixtures = vertex_mixtures(["a", "b", "c"], caps={"a": 0.5}, floor=0.1)
    assert mixtures == [
        Mixture({"a": 0.5, "b": 0.25, "c": 0.25}),
        Mixture({"a": 0.1, "b": 0.8, "c": 0.1}),
        Mixture({"a": 0.1, "b": 0.1, "c": 0.8}),
    ]
    by_tokens = vertex_mixtures(["a", "b", "c"], {"a": 0.5, "b": 0.2}, rest={"b": 4, "c": 1})
    assert by_tokens[0] == Mixture({"a": 0.5, "b": 0.2, "c": 0.3})
    assert by_tokens[2] == Mixture({"c": 1})


def test_vertices_leave_out_forbidden_domains_and_repetitions():
    assert vertex_mixtures(["a", "b", "c"], caps={"a": 0}) == [Mixture({"b": 1}), Mixture({"c": 1})]
    only = Mixture({"a": 1, "b": 1})
    assert vertex_mixtures(["a", "b"], caps={"a": 0.5, "b": 0.5}) == [only]


@relaxed
@given(bounded(), st.floats(0, 1))
def test_vertices_keep_caps_and_floors_exactly(problem, floor_share):
    weights_K, caps_K, _ = problem
    domains = [f"d{k:02}" for k in range(len(weights_K))]
    floor = floor_share * 0.99 * min(1 / len(domains), caps_K.min())
    floor = 0.0 if floor < 1e-5 else floor
    for mixture in vertex_mixtures(domains, dict(zip(domains, caps_K, strict=True)), floor):
        weights = mixture.to_array(domains)
        assert (weights <= caps_K).all() and (weights >= floor).all()


def test_baselines_under_caps():
    assert uniform_mixture(["a", "b", "c", "d"]) == Mixture.uniform(["a", "b", "c", "d"])
    assert uniform_mixture(["a", "b", "c"], {"a": 0.1}) == Mixture({"a": 0.1, "b": 0.45, "c": 0.45})
    assert proportional_mixture(PILE) == Mixture(PILE)
    capped = proportional_mixture({"a": 90, "b": 9, "c": 1, "z": 0}, {"a": 0.5, "z": 0.3})
    assert capped == Mixture({"a": 0.5, "b": 0.45, "c": 0.05})


# What is refused ------------------------------------------------------------------------------


def array(*values: float) -> np.ndarray:
    return np.array(values, dtype=float)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: regmix_mixtures(PILE, 0, seed=0), ["num", "0", "integer > 0"]),
        (lambda: regmix_mixtures(PILE, 2.5, seed=0), ["num", "2.5"]),  # type: ignore[arg-type]
        (lambda: regmix_mixtures({}, 1, seed=0), ["domains", "at least one"]),
        (lambda: regmix_mixtures({"a": 1, "": 1}, 1, seed=0), ["Domain name", "''", "non-empty"]),
        (lambda: regmix_mixtures({"a": 1, "b": 0}, 1, seed=0), ["'b'", "0", "> 0", "leave out"]),
        (lambda: regmix_mixtures({"a": 1, "b": -2}, 1, seed=0), ["'b'", "-2", "> 0"]),
        (lambda: regmix_mixtures({"a": float("nan")}, 1, seed=0), ["'a'", "nan", "finite"]),
        (lambda: regmix_mixtures(PILE, 1, seed=-1), ["seed", "-1", ">= 0"]),
        (lambda: regmix_mixtures(PILE, 1, seed=0, temperature=0), ["temperature", "0", "> 0"]),
        (lambda: regmix_mixtures(PILE, 1, seed=0, strengths=(0, 5)), ["strength", "0", "> 0"]),
        (lambda: regmix_mixtures(PILE, 1, seed=0, num_strengths=0), ["num_strengths", "0"]),
        (lambda: regmix_mixtures(PILE, 1, seed=0, min_weight=1), ["min_weight", "1", "[0, 1)"]),
        (lambda: regmix_mixtures(PILE, 1, seed=0, max_prior_ratio=0), ["max_prior_ratio", "> 0"]),
        (lambda: regmix_mixtures(PILE, 1, seed=0, min_distance=2), ["min_distance", "[0, 2)"]),
        (lambda: regmix_mixtures(PILE, 1, seed=0, multiplier=0), ["multiplier", "0"]),
        (
            lambda: regmix_mixtures(PILE, 1, seed=0, caps={"coed": 0.1}),
            ["'coed'", "Did you mean 'code'?"],
        ),
        (lambda: regmix_mixtures(PILE, 1, seed=0, caps={"cc": -0.1}), ["cap of 'cc'", "-0.1"]),
        (
            lambda: regmix_mixtures({"a": 1, "b": 1}, 1, seed=0, caps={"a": 0.3, "b": 0.5}),
            ["a 0.3", "b 0.5", "0.800000", "at least 1", "Raise a cap"],
        ),
        (
            lambda: regmix_mixtures(PILE, 1, seed=0, max_prior_ratio=0.5),
            ["max_prior_ratio=0.5", "at least 1"],
        ),
        (lambda: regmix_mixtures({"a": 1}, 2, seed=0), ["only 1 of 2", "fewer", "min_distance"]),
        (lambda: sobol_mixtures([], 1, 0), ["domains", "at least one"]),
        (lambda: sobol_mixtures("web", 1, 0), ["domains", "'web'"]),
        (lambda: sobol_mixtures(["a", "a"], 1, 0), ["domains", "each name once"]),
        (lambda: sobol_mixtures(["a"], True, 0), ["num", "True"]),
        (lambda: sobol_mixtures(["a", "b"], 2, 0, {"a": 0.5, "b": 0.5}), ["only 1 of 2", "fewer"]),
        (lambda: vertex_mixtures(["a", "b"], floor=0.6), ["floor", "0.6", "0.5"]),
        (
            lambda: vertex_mixtures(["a", "b"], {"a": 0.1}, floor=0.2),
            ["floor", "0.2", "0.1", "cap"],
        ),
        (lambda: vertex_mixtures(["a", "b"], rest={"c": 1}), ["rest", "'c'", "a, b"]),
        (lambda: vertex_mixtures(["a", "b"], rest={"a": 0}), ["rest of 'a'", "> 0"]),
        (lambda: uniform_mixture(["a"], {"a": "half"}), ["cap of 'a'", "'half'"]),  # type: ignore
        (lambda: uniform_mixture(["a"], {"a": float("nan")}), ["cap of 'a'", "nan"]),
        (lambda: proportional_mixture({"a": 0}), ["all zero"]),
        (lambda: proportional_mixture({"a": 1}, {"b": 1}), ["'b'", "among a"]),
        (lambda: proportional_mixture({"a": 1, "b": 0}, {"a": 0.5}), ["a 0.5", "at least 1"]),
        (lambda: supply_caps({"a": 10}, 100, 4), ["10 tokens", "100", "10 times", "max_epochs"]),
        (lambda: supply_caps({"a": 0}, 100, 4), ["infinitely many"]),
        (lambda: supply_caps({"a": -1}, 100, 4), ["'a'", "-1", ">= 0"]),
        (lambda: supply_caps({"a": 1}, 0, 4), ["budget_tokens", "0", "> 0"]),
        (lambda: supply_caps({"a": 1}, 1, -4), ["max_epochs", "-4", "> 0"]),
        (lambda: cap_weights(array(1, 1), array(0.3, 0.3)), ["0.6", "at least 1", "Raise a cap"]),
        (lambda: cap_weights(array(1, 1), array(1, 1), array(0.6, 0.6)), ["1.2", "lower a floor"]),
        (lambda: cap_weights(array(1, 1), array(1, 0.1), array(0, 0.2)), ["floors_K", "[0, cap]"]),
        (lambda: cap_weights(array(1, -1), array(1, 1)), ["weights_K", "-1"]),
        (lambda: cap_weights(array(1, float("nan")), array(1, 1)), ["weights_K", "nan"]),
        (lambda: cap_weights(array(1, 1), array(1, float("nan"))), ["caps_K", "nan"]),
        (lambda: cap_weights(array(1, 1), array(1)), ["(2,)", "(1,)", "(K,)"]),
    ],
)
def test_bad_input_is_refused_in_words(call, words):
    with pytest.raises(SpecError) as error:
        call()
    for word in words:
        assert word in str(error.value), str(error.value)

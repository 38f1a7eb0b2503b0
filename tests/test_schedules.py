"""Schedules: exact tokens, known limits, and the published directions in numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx import Mixture, Schedule
from rayx.errors import SpecError
from rayx.policies import POLICIES
from rayx.policies.scalarised import Scalarised
from rayx.policy import Setting, policy_from_json, policy_to_json
from rayx.schedules import (
    cooldown,
    in_phases,
    schedule_epochs,
    switch_points,
    temperature,
    tempered,
    upsample_at_end,
    without,
)
from tests.samples import SPEC

SUPPLY = {"code": 32_000, "legal": 8_000, "docs": 1_000}
WEB, CODE = Mixture({"web": 1}), Mixture({"code": 1})


# Temperature


def test_temperature_is_the_power_of_the_sizes_and_has_the_limits_of_tau():
    found = temperature({"a": 81, "b": 1}, 4)
    assert dict(found) == pytest.approx({"a": 0.75, "b": 0.25})  # 81^(1/4) = 3
    assert temperature(SUPPLY, 1) == Mixture(SUPPLY)
    assert temperature(SUPPLY, math.inf) == temperature(SUPPLY, 1e12) == Mixture.uniform([*SUPPLY])
    assert temperature(SUPPLY, 1e-3) == Mixture({"code": 1})
    assert temperature({"a": 2e300, "b": 1e-300}, 5)["a"] == pytest.approx(1.0)
    assert temperature({d: 1e-6 * n for d, n in SUPPLY.items()}, 5) == temperature(SUPPLY, 5)


def test_a_higher_temperature_gives_more_to_the_smallest_and_less_to_the_largest():
    shares = [temperature(SUPPLY, tau) for tau in (0.5, 1, 2, 5, 20)]
    assert all(a["docs"] < b["docs"] for a, b in zip(shares, shares[1:], strict=False))
    assert all(a["code"] > b["code"] for a, b in zip(shares, shares[1:], strict=False))


@pytest.mark.parametrize(
    ("tokens", "tau", "named"),
    [
        (SUPPLY, 0, "tau is 0; expected a number > 0"),
        (SUPPLY, -1.0, "tau is -1.0"),
        (SUPPLY, math.nan, "tau is nan"),
        (SUPPLY, "5", "tau is '5'"),
        ({"code": 5}, 5, "two domains or more"),
        ({}, 5, "at least one name"),
        ({"code": 5, "docs": 0}, 5, "Tokens of 'docs' is 0"),
        ({"code": 5, "docs": -3}, 5, "Tokens of 'docs' is -3"),
    ],
)
def test_a_temperature_without_meaning_is_refused(tokens, tau, named):
    with pytest.raises(SpecError, match=named):
        temperature(tokens, tau)


# Phases


@settings(max_examples=200, deadline=None)
@given(
    budget=st.integers(min_value=1_000, max_value=15 * 10**12),
    parts=st.lists(st.integers(min_value=1, max_value=50), min_size=1, max_size=6),
)
def test_phases_add_up_to_the_budget_exactly_and_are_each_within_a_token(budget, parts):
    total = sum(parts)
    mixtures = [Mixture({"web": 1, "code": i + 1}) for i in range(len(parts))]
    pairs = [(part / total, mixture) for part, mixture in zip(parts, mixtures, strict=True)]
    schedule = in_phases(pairs, budget)
    assert schedule.tokens == budget
    for phase, part in zip(schedule.phases, parts, strict=True):
        assert abs(phase.tokens - budget * part / total) < 1 + 1e-9 * budget
    ends = np.cumsum(parts)[:-1] / total
    assert switch_points(schedule) == pytest.approx(tuple(ends), abs=6 / budget)


def test_empty_phases_and_equal_neighbours_vanish():
    assert in_phases([(0, WEB), (1, CODE)], 10) == Schedule.constant(CODE, 10)
    assert in_phases([(0.3, CODE), (0.7, CODE)], 11) == Schedule.constant(CODE, 11)
    assert in_phases([(0.5, CODE), (0.0, WEB), (0.5, CODE)], 11) == Schedule.constant(CODE, 11)
    assert switch_points(Schedule.constant(WEB, 9)) == ()
    thirds = in_phases([(0.25, WEB), (0.5, CODE), (0.25, WEB)], 8)
    assert [phase.tokens for phase in thirds.phases] == [2, 4, 2]
    assert switch_points(thirds) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("parts", "budget", "named"),
    [
        ([(-0.1, WEB), (1.1, CODE)], 100, "share of a phase is -0.1"),
        ([(math.nan, WEB), (1.0, CODE)], 100, "share of a phase is nan"),
        ([(0.5, WEB), (0.4, CODE)], 100, "sum of the phases' shares is 0.9"),
        ([], 100, "sum of the phases' shares is 0"),
        ([(1.0, WEB)], 0, "budget_tokens is 0"),
        ([(1.0, WEB)], 1e6, "budget_tokens is 1000000.0; expected an integer"),
        ([(0.999, WEB), (0.001, CODE)], 10, "Tokens of a phase with share 0.001 is 0"),
    ],
)
def test_impossible_phases_are_refused(parts, budget, named):
    with pytest.raises(SpecError, match=named):
        in_phases(parts, budget)


def test_upsampling_switches_at_one_less_the_share():
    schedule = upsample_at_end(WEB, CODE, 1_001, 0.2)
    assert [(p.mixture, p.tokens) for p in schedule.phases] == [(WEB, 801), (CODE, 200)]
    assert switch_points(schedule)[0] == pytest.approx(0.8, abs=1e-3)
    assert upsample_at_end(WEB, CODE, 1_001, 0) == Schedule.constant(WEB, 1_001)
    assert upsample_at_end(WEB, CODE, 1_001, 1) == Schedule.constant(CODE, 1_001)
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(SpecError, match=f"share of the final phase is {share}"):
            upsample_at_end(WEB, CODE, 1_001, share)


def test_cooldown_is_the_high_temperature_for_half_and_then_the_proportions():
    schedule = cooldown(SUPPLY, 4_001)
    assert [p.mixture for p in schedule.phases] == [temperature(SUPPLY, 5), Mixture(SUPPLY)]
    assert sorted(p.tokens for p in schedule.phases) == [2_000, 2_001]
    assert cooldown(SUPPLY, 4_001, (1,), (1,)) == Schedule.constant(Mixture(SUPPLY), 4_001)
    assert cooldown(SUPPLY, 400, (5, 5)) == cooldown(SUPPLY, 400, (5,), (1,))
    # The paper's LM data in billions of tokens: fifth roots 4.868, 2.766, 2.081 and 1.
    mc4 = {"en": 2733, "it": 162, "zh": 39, "sw": 1}
    first, last = cooldown(mc4, 100).phases
    assert last.mixture["sw"] == pytest.approx(1 / 2935, abs=1e-6)
    assert first.mixture["sw"] == pytest.approx(1 / 10.715, abs=1e-4)
    with pytest.raises(SpecError, match="number of shares is 1; expected one for each of the 2"):
        cooldown(SUPPLY, 400, (5, 1), (1,))


def test_epochs_add_up_over_phases_and_a_cap_names_the_domain():
    schedule = upsample_at_end(Mixture(SUPPLY), Mixture({"docs": 1}), 41_000, 0.5)
    found = schedule_epochs(schedule, SUPPLY)
    assert found == pytest.approx({"code": 0.5, "legal": 0.5, "docs": 21.0}, rel=1e-3)
    read = schedule.domain_tokens(schedule.tokens)
    assert found == pytest.approx({d: n / SUPPLY[d] for d, n in read.items()})
    assert schedule_epochs(schedule, SUPPLY, 21.1) == found
    with pytest.raises(SpecError, match=r"passes 21 times over domain 'docs' \(1,000 tokens\)"):
        schedule_epochs(schedule, SUPPLY, 20)
    with pytest.raises(SpecError, match="domain 'web', which is not in the token counts"):
        schedule_epochs(Schedule.constant(WEB, 10), SUPPLY)
    with pytest.raises(SpecError, match="max_epochs is -1"):
        schedule_epochs(schedule, SUPPLY, -1)


def test_a_dropped_domain_leaves_the_others_in_proportion():
    left = without(Mixture({"a": 2, "b": 1, "c": 1}), "b")
    assert dict(left) == pytest.approx({"a": 2 / 3, "c": 1 / 3}, abs=1e-6)
    for mixture, domain in ((WEB, "web"), (Mixture({"a": 1, "b": 1}), "z")):
        with pytest.raises(SpecError, match=f"The domain to drop is '{domain}'"):
            without(mixture, domain)


# Scalarisation


def setting(prior_K, steps: int = 100) -> Setting:
    names = tuple(f"d{k}" for k in range(len(prior_K)))
    return Setting(names, np.asarray(prior_K), steps=steps, batch_sequences=8)


def linear_gradients(rng, num_domains: int, equal: bool) -> list[np.ndarray]:
    """Per-sequence gradients of a linear regression, one array (sequences, parameters) a domain."""
    weights, found = rng.normal(size=6), []
    for k in range(num_domains):
        x = rng.normal(size=(500, 6)) + rng.normal(size=6)
        error = x @ weights - x @ rng.normal(size=6) + rng.normal(size=500)
        gradient = error[:, None] * x
        scale = np.sqrt((gradient**2).sum(1).mean()) if equal else 10.0**k
        found.append(gradient / scale)
    return found


def moments(sampled_K, factor_K, gradients) -> tuple[np.ndarray, float]:
    """Mean and variance of factor * gradient of a sequence of a domain drawn from sampled_K."""
    mean = (sampled_K * factor_K) @ np.stack([g.mean(0) for g in gradients])
    square = (sampled_K * factor_K**2) @ np.array([(g**2).sum(1).mean() for g in gradients])
    return mean, float(square - mean @ mean)


def loss_weights(prior_K, tau: float) -> np.ndarray:
    (block,) = Scalarised(taus=(tau,)).blocks(setting(prior_K))
    assert block.signal is None and np.array_equal(block.weights_K, prior_K)
    assert block.loss_weights_K is not None
    return block.loss_weights_K


def test_scalarisation_has_the_gradient_of_temperature_sampling_and_a_larger_variance():
    rng = np.random.default_rng(0)
    prior_K = np.array([0.9, 0.07, 0.02, 0.01])
    gaps = []
    gradients = linear_gradients(rng, 4, equal=True)
    for tau in (1.0, 1.5, 2.0, 3.0, 5.0, 20.0):
        tempered_K, factor_K = tempered(prior_K, tau), loss_weights(prior_K, tau)
        by_sampling, variance = moments(tempered_K, np.ones(4), gradients)
        by_weights, larger = moments(prior_K, factor_K, gradients)
        np.testing.assert_allclose(by_weights, by_sampling, rtol=1e-12)  # theorem 1
        gaps.append(larger - variance)
        chi2 = (tempered_K**2 / prior_K).sum() - 1
        assert gaps[-1] == pytest.approx(chi2, abs=1e-9)  # gradients have a mean square of 1
    assert gaps[0] == pytest.approx(0, abs=1e-12)
    assert (np.diff(gaps) > 0).all()  # theorems 2 and 3


def test_the_variances_order_can_turn_where_small_domains_have_small_gradients():
    gradients = linear_gradients(np.random.default_rng(1), 2, equal=False)  # the second: 1/10
    prior_K = np.array([0.9, 0.1])
    by_sampling = moments(tempered(prior_K, 5), np.ones(2), gradients)[1]
    assert moments(prior_K, loss_weights(prior_K, 5), gradients)[1] < by_sampling


def test_scalarised_draws_agree_with_its_moments():
    """The same by drawing sequences: 20,000 of each kind."""
    rng = np.random.default_rng(2)
    prior_K, gradients = np.array([0.8, 0.15, 0.05]), linear_gradients(rng, 3, equal=True)
    factor_K = loss_weights(prior_K, 5)
    for sampled_K, own_K in ((prior_K, factor_K), (tempered(prior_K, 5), np.ones(3))):
        domains = rng.choice(3, size=20_000, p=sampled_K)
        rows = rng.integers(0, 500, size=20_000)
        drawn = np.stack([own_K[k] * gradients[k][i] for k, i in zip(domains, rows, strict=True)])
        mean, variance = moments(sampled_K, own_K, gradients)
        assert np.abs(drawn.mean(0) - mean).max() < 5 * drawn.std(0).max() / 20_000**0.5
        assert drawn.var(0).sum() == pytest.approx(variance, rel=0.1)


def test_scalarised_can_cool_down_and_is_read_back():
    policy = Scalarised(taus=(5, 1), shares=(0.5, 0.5))
    blocks = list(policy.blocks(setting([0.9, 0.1], steps=101)))
    assert sum(block.steps for block in blocks) == 101
    first, last = (block.loss_weights_K for block in blocks)
    assert first is not None and last is not None
    assert np.array([0.9, 0.1]) @ first == pytest.approx(1.0) and first[1] > 3
    np.testing.assert_allclose(last, 1.0)
    assert POLICIES["scalarised"] is Scalarised
    assert policy_from_json(policy_to_json(policy)) == policy
    assert Scalarised(taus=(5,)) == Scalarised(taus=(5.0,)) == Scalarised()
    assert len(list(Scalarised(taus=(5, 1), shares=(1, 0)).blocks(setting([0.5, 0.5])))) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"taus": (0,)}, "taus is 0"),
        ({"taus": (-2.0,)}, "taus is -2.0"),
        ({"taus": (math.inf,)}, "taus is inf; expected a finite number"),
        ({"shares": (-0.5, 1.5), "taus": (5, 1)}, "shares is -0.5"),
        ({"shares": (0.5,)}, "sum of Scalarised.shares is 0.5"),
        ({"taus": (5, 1)}, "number of Scalarised.shares is 1; expected one for each of the 2"),
    ],
)
def test_a_scalarisation_without_meaning_is_refused(fields, named):
    with pytest.raises(SpecError, match=named):
        Scalarised(**fields)


def test_a_scalarised_run_of_one_domain_is_refused():
    with pytest.raises(SpecError, match="two domains or more"):
        dataclasses.replace(SPEC, schedule=Schedule.constant(WEB, 4_096), policy=Scalarised())

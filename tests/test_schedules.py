"""Schedules: exact tokens, limits, published directions in numbers, and the studies of ends."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayx
from rayx import Mixture, Schedule
from rayx.errors import SpecError, StoreError
from rayx.methods.cooldown import Cooldown
from rayx.methods.upsampling import BASE, Upsampling, effects
from rayx.mixture import Phase
from rayx.plan import Plan
from rayx.policies import POLICIES
from rayx.policies.scalarised import Scalarised
from rayx.policy import Setting, policy_from_json, policy_to_json
from rayx.record import CurvePoint, Loss, Record
from rayx.schedules import (
    cooldown,
    in_phases,
    on_trunk,
    schedule_epochs,
    switch_points,
    temperature,
    tempered,
    upsample_at_end,
    without,
)
from rayx.spec import Evaluation, TrainSpec
from tests.samples import SPEC, record

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


# Runs that share a trunk


BATCH = 4 * 128  # tokens, of SPEC
BUDGET = 400 * BATCH
TEMPLATE = dataclasses.replace(
    SPEC,
    schedule=Schedule.constant(Mixture(SUPPLY), BUDGET),
    evaluation=Evaluation(points=1, sequences=8, part="first"),
)


def path_tokens(run: TrainSpec) -> int:
    """Tokens from the first ancestor's start to the run's end."""
    return run.steps * BATCH + (run.parent.path_steps * BATCH if run.parent else 0)


def read_by(run: TrainSpec) -> dict[str, float]:
    """Domain -> tokens on the whole path."""
    before = {}
    if run.parent:
        before = run.parent.spec.schedule.domain_tokens(run.parent.steps * BATCH)
    own = run.schedule.domain_tokens(run.tokens)
    return {d: before.get(d, 0) + own.get(d, 0) for d in {*before, *own}}


def distinct_tokens(runs) -> int:
    """What a sweep of these runs trains: each run and each ancestor once."""
    return sum({s.run_id: s.tokens for run in runs for s in run.path}.values())


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(min_value=0.01, max_value=0.9),
    decay=st.floats(min_value=0.05, max_value=0.9),
    tokens=st.integers(min_value=40 * BATCH, max_value=100 * BATCH),
)
def test_a_run_on_a_trunk_reads_its_schedule_and_decays_as_the_whole_run(share, decay, tokens):
    optimizer = dataclasses.replace(SPEC.optimizer, decay_share=decay, warmup_share=0.02)
    template = dataclasses.replace(
        TEMPLATE, schedule=Schedule.constant(WEB, tokens), optimizer=optimizer
    )
    schedule = upsample_at_end(WEB, CODE, tokens, share)
    run = on_trunk(template, schedule)
    assert path_tokens(run) == pytest.approx(tokens, abs=1.5 * BATCH)
    read = read_by(run)
    assert read["code"] == pytest.approx(share * tokens, abs=BATCH)
    total = path_tokens(run) // BATCH
    assert run.optimizer.decay_share * run.steps == pytest.approx(decay * total, abs=1)
    if run.parent:
        leave = run.parent.path_steps
        assert leave == min(total - round(run.optimizer.decay_share * run.steps),
                            round(schedule.phases[0].tokens / BATCH))  # fmt: skip
        assert run.parent.spec.optimizer.decay_share == 0


def test_a_schedule_of_other_tokens_than_the_template_is_refused():
    with pytest.raises(SpecError, match="tokens of a schedule is 100; expected those of the templ"):
        on_trunk(TEMPLATE, Schedule.constant(WEB, 100))


# Upsampling at the end


FINALS = {"even": Mixture.uniform([*SUPPLY]), "small": Mixture({"docs": 3, "legal": 1})}
BEST = {"even": 0.1, "small": 0.2}  # where each final mixture is best; `small` is best of all


def study(**changes) -> Upsampling:
    usual = {
        "template": TEMPLATE,
        "base": Mixture(SUPPLY),
        "finals": FINALS,
        "objective": dict.fromkeys(SUPPLY, 1.0),
    }
    return Upsampling(**(usual | changes))


def planted(spec: TrainSpec, bpb: dict[str, float]) -> Record:
    losses = {d: Loss(2 * value, value, 0.01) for d, value in bpb.items()}
    point = CurvePoint(spec.steps, spec.tokens, losses)
    return dataclasses.replace(record(spec), curve=(point,))


def planted_upsampling(bowl: float = 1.0):
    """A study with records: each final mixture has a bowl over its shares."""
    upsampling = study()
    records = []
    for (final, share), run in upsampling.runs().items():
        off = 0.5 if final == BASE else (share - BEST[final]) ** 2 * bowl
        level = {"even": 2.0, "small": 1.9, BASE: 1.95}[final]
        records.append(planted(run, dict.fromkeys(SUPPLY, level + off)))
    return upsampling, records


@pytest.fixture
def store(tmp_path):
    return rayx.open(tmp_path / "store", create=True)


def test_all_arms_are_branches_of_one_trunk_with_equal_tokens():
    runs = study().runs()
    assert list(runs) == [(BASE, 0.0)] + [(f, s) for f in FINALS for s in (0.05, 0.1, 0.2, 0.3)]
    assert len({run.parent.spec.run_id for run in runs.values() if run.parent}) == 1
    assert {path_tokens(run) for run in runs.values()} == {BUDGET}
    for (final, share), run in runs.items():
        expected = {d: w * BUDGET * (1 - share) for d, w in Mixture(SUPPLY).items()}
        for d, w in FINALS.get(final, {}).items():
            expected[d] = expected.get(d, 0) + w * BUDGET * share
        assert read_by(run) == pytest.approx(expected, abs=BATCH)
    # A trunk of .8, base and shares up to .2 go on from .8, a share of .3 from .7.
    shares = 0.8 + 0.2 + len(FINALS) * (0.2 + 0.2 + 0.2 + 0.3)
    assert distinct_tokens(runs.values()) == pytest.approx(shares * BUDGET, rel=0.01)
    assert distinct_tokens(runs.values()) < 0.4 * len(runs) * BUDGET


def test_the_planted_best_end_is_chosen_and_planned(store):
    upsampling, records = planted_upsampling()
    for item in records:
        store.put(item)
    choice = upsampling.decide(store)
    assert (choice.final, choice.share) == ("small", 0.2)
    assert choice.loss == pytest.approx(1.9) and choice.switch == pytest.approx(0.8, abs=1e-5)
    assert choice.losses["even"]["0.3"] == pytest.approx(2.04)
    corpus = SimpleNamespace(domains=tuple(SUPPLY), tokens=SUPPLY, fingerprint="c0ffee")
    plan = upsampling.plan(choice, corpus, store)  # pyright: ignore[reportArgumentType]
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.schedule.phases[1] == Phase(FINALS["small"], BUDGET // 5)
    assert plan.epochs["docs"] == pytest.approx(
        (0.8 * BUDGET / 41_000) + 0.2 * 0.75 * BUDGET / 1_000, rel=1e-3
    )
    assert plan.choice["switch"] == choice.switch
    assert plan.specs(TEMPLATE)["model"].schedule == choice.schedule


def test_no_upsampling_is_chosen_where_none_helps(store):
    upsampling, records = planted_upsampling(bowl=0.0)
    for item, (final, _) in zip(records, upsampling.runs(), strict=True):
        bpb = 1.5 if final == BASE else 2.0
        store.put(planted(item.spec, dict.fromkeys(SUPPLY, bpb)))
    choice = upsampling.decide(store)
    assert (choice.final, choice.share, choice.switch) == (BASE, 0.0, None)
    assert choice.schedule == Schedule.constant(Mixture(SUPPLY), BUDGET)


def test_failed_arms_are_passed_over_and_a_study_of_failures_is_refused(store):
    upsampling, records = planted_upsampling()
    for item, arm in zip(records, upsampling.runs(), strict=True):
        store.put(record(item.spec, failed=True) if arm == ("small", 0.2) else item)
    choice = upsampling.decide(store)
    assert choice.final == "small" and choice.share in (0.1, 0.3)
    assert choice.to_json()["losses"]["small"]["0.2"] is None


def test_a_study_of_failures_is_refused(store):
    upsampling = study()
    for run in upsampling.runs().values():
        store.put(record(run, failed=True))
    with pytest.raises(StoreError, match="All runs of the upsampling study failed"):
        upsampling.decide(store)


def test_dropping_from_the_final_phase_is_cheap_and_says_who_misses_the_domain(store):
    upsampling = study()
    full = upsampling.runs()["even", 0.2]
    dropped = upsampling.ablations("even", 0.2)
    assert {*dropped} == {*SUPPLY}
    assert {run.parent for run in dropped.values()} == {full.parent} != {None}
    for domain, run in dropped.items():
        assert run.schedule == Schedule.constant(without(FINALS["even"], domain), BUDGET // 5)
    whole = upsampling.ablations("even", 0.2, whole=True)
    assert all(domain not in read_by(run) for domain, run in whole.items())
    added = distinct_tokens([full, *dropped.values()]) - distinct_tokens([full])
    assert added == len(dropped) * (BUDGET // 5)
    assert distinct_tokens(whole.values()) > 4 * added
    store.put(planted(full, dict.fromkeys(SUPPLY, 2.0)))
    for domain, run in dropped.items():  # a domain is missed by its own target alone
        store.put(planted(run, {t: 2.0 + 0.3 * (t == domain) for t in SUPPLY}))
    found = effects(store, full, dropped)
    assert len(found) == 9
    own = (found["dropped"] == found["target"]).to_numpy()
    np.testing.assert_allclose(found["effect"], 0.3 * own, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"finals": {}}, "names in Upsampling.finals"),
        ({"finals": {BASE: CODE}}, "not 'base'"),
        ({"objective": {}}, "Upsampling.objective"),
        ({"shares": (0.1, -0.2)}, "share in Upsampling.shares is -0.2"),
        ({"shares": (1.0,)}, "share in Upsampling.shares is 1.0"),
    ],
)
def test_an_upsampling_study_without_meaning_is_refused(changes, named):
    with pytest.raises(SpecError, match=named):
        study(**changes)


@pytest.mark.parametrize("arm", [(BASE, 0.0), ("even", 0.0), ("unknown", 0.1)])
def test_only_a_final_phase_can_be_ablated(arm):
    with pytest.raises(SpecError, match="The arm to ablate"):
        study().ablations(*arm)


def test_a_final_phase_of_one_domain_has_nothing_to_drop():
    with pytest.raises(SpecError, match="one of several in the mixture: docs"):
        study(finals={"docs": Mixture({"docs": 1})}).ablations("docs", 0.1)


# Cooldown's arms


def test_arms_have_equal_tokens_and_those_that_begin_alike_share_a_trunk():
    study = Cooldown(template=TEMPLATE, tokens_by_domain=SUPPLY)
    runs = study.runs()
    assert {path_tokens(run) for run in runs.values()} == {BUDGET}
    trunks = {arm: run.parent.spec.run_id for arm, run in runs.items() if run.parent}
    assert trunks["cooldown"] == trunks["temperature 5"] != trunks["reversed"]
    assert trunks["reversed"] == trunks["proportional"] != trunks["uniform"]
    cooled, reverse = read_by(runs["cooldown"]), read_by(runs["reversed"])
    assert cooled == pytest.approx(reverse, abs=2 * BATCH)  # only the order differs
    assert read_by(runs["average"]) == pytest.approx(cooled, abs=2 * BATCH)
    # Two pairs with a trunk of .8 and branches of .2 and .5, and three whole runs.
    assert distinct_tokens(runs.values()) == pytest.approx((2 * 1.5 + 3) * BUDGET, rel=0.02)
    by_loss = runs["scalarised 5"]
    assert by_loss.policy == Scalarised() and by_loss.schedule.average() == Mixture(SUPPLY)


def test_an_earlier_cooldown_reads_as_much_as_its_reverse():
    arms = Cooldown(template=TEMPLATE, tokens_by_domain=SUPPLY, tau=3, share=0.2).schedules()
    assert arms["cooldown"].average() == arms["reversed"].average()
    assert switch_points(arms["cooldown"]) == pytest.approx((0.2,), abs=1e-5)
    assert switch_points(arms["reversed"]) == pytest.approx((0.8,), abs=1e-5)


def test_groups_are_thirds_by_size_and_the_table_averages_them(store):
    supply = {"a": 5, "b": 50, "c": 20, "d": 1, "e": 40, "f": 2}
    study = Cooldown(template=TEMPLATE, tokens_by_domain=supply)
    assert study.groups() == {"high": ("b", "e"), "mid": ("c", "a"), "low": ("f", "d")}
    good, failed = SPEC, dataclasses.replace(SPEC, seed=5)
    store.put(planted(good, {d: float(n) for d, n in supply.items()}))
    store.put(record(failed, failed=True))
    table = study.table(store, {"good": good, "failed": failed}).set_index("arm")
    row = table.loc["good"].to_dict()
    assert {k: row[k] for k in ("high", "mid", "low")} == {"high": 45.0, "mid": 12.5, "low": 1.5}
    assert row["loss"] == pytest.approx(118 / 6) and row["b"] == 50.0
    assert table.loc["failed"].isna().all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tau": 1.0}, "Cooldown.tau is 1.0"),
        ({"share": 1.0}, "Cooldown.share is 1.0"),
        ({"tokens_by_domain": {"a": 1, "b": 2}}, "domains of Cooldown"),
    ],
)
def test_a_cooldown_without_meaning_is_refused(changes, named):
    with pytest.raises(SpecError, match=named):
        Cooldown(**({"template": TEMPLATE, "tokens_by_domain": SUPPLY} | changes))


def test_an_arm_over_the_cap_of_epochs_is_refused_by_its_domain():
    with pytest.raises(SpecError, match="over domain 'docs'"):
        Cooldown(template=TEMPLATE, tokens_by_domain=SUPPLY, max_epochs=5).schedules()

"""BOOM: bags and running averages, exactly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.errors import SpecError
from rayx.methods.boom import Bagging, Incremental, bootstrap_mixtures, running_weights
from rayx.methods.merge_proxy import MergeProxy
from rayx.mixture import Mixture
from tests.samples import SPEC

OLD, ARRIVALS = ("docs", "legal"), ("code", "wiki", "news")


def proxy(general: Mixture, seed: int = 0) -> MergeProxy:
    return MergeProxy(
        template=dataclasses.replace(SPEC, seed=seed, data_seed=seed),
        general=general,
        domains=tuple(general),
        trunk_tokens=16_384,
        branch_tokens=8_192,
    )


def bagging(**changes) -> Bagging:
    everything = Mixture.uniform((*OLD, *ARRIVALS))
    return Bagging(**{"proxy": proxy(everything), "mixture": everything, "bags": 4} | changes)


def incremental(history_share: float = 0.25) -> Incremental:
    return Incremental(
        proxy=proxy(Mixture.uniform(OLD)), arrivals=ARRIVALS, history_share=history_share
    )


@given(st.lists(st.floats(0, 1), max_size=6), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_running_weights_are_the_updates_multiplied_out(rates, seed):
    experts = np.random.default_rng(seed).normal(size=(len(rates) + 1, 3))
    current = experts[0]
    for rate, expert in zip(rates, experts[1:], strict=True):
        current = (1 - rate) * current + rate * expert
    weights = running_weights([1.0, *rates])
    assert sum(weights) == pytest.approx(1.0) and min(weights) >= 0
    assert np.array(weights) @ experts == pytest.approx(current, abs=1e-9)


@given(st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_rates_of_one_over_t_are_the_batch_average(count):
    rates = [1 / t for t in range(1, count + 1)]
    assert running_weights(rates) == pytest.approx([1 / count] * count)


@pytest.mark.parametrize("rates", [[], [0.5, 0.5], [1.0, 1.5], [1.0, -0.1]])
def test_rates_that_are_none_are_refused(rates):
    with pytest.raises(SpecError, match="rate of a running average"):
        running_weights(rates)


def test_bags_leave_one_base_with_a_sample_each():
    bags = bagging().specs()
    assert len({bag.run_id for bag in bags}) == 4 == len({bag.data_seed for bag in bags})
    assert bags[0].parent and all(bag.parent == bags[0].parent for bag in bags)
    assert {bag.mixture for bag in bags} == {Mixture.uniform((*OLD, *ARRIVALS))}
    assert {bag.seed for bag in bags} == {0} and bags[0].parent.spec.data_seed == 0
    # Other sweeps draw other bags: a seed's are not those of the next.
    other = bagging(proxy=proxy(Mixture.uniform((*OLD, *ARRIVALS)), seed=1), draws=5).specs()
    assert {bag.run_id for bag in other}.isdisjoint(bag.run_id for bag in bags)
    assert [b.mixture for b in other] != [b.mixture for b in bagging(draws=5).specs()]


def test_the_merge_of_bags_weighs_them_equally_and_one_run_reads_as_much():
    study = bagging()
    merged = study.merged()
    assert merged.weights == (0.25,) * 4 and merged.operator.name == "linear"
    assert merged.mixture == study.mixture and merged.tokens == 8_192
    single = study.single()
    assert single.tokens == sum(bag.tokens for bag in study.specs()) == 4 * 8_192
    assert single.parent == study.specs()[0].parent and single.mixture == study.mixture


def test_bootstrap_mixtures_are_draws_of_the_mixture():
    mixture = Mixture({"web": 0.6, "code": 0.3, "math": 0.1})
    bags = bootstrap_mixtures(mixture, 2_000, 10, seed=1)
    assert bags == bootstrap_mixtures(mixture, 2_000, 10, seed=1)
    assert bags[:50] != bootstrap_mixtures(mixture, 50, 10, seed=2)
    for domain, share in mixture.items():
        drawn_B = np.array([bag.get(domain, 0.0) for bag in bags])
        # Binomial: 2,000 means of 10 draws each.
        assert drawn_B.mean() == pytest.approx(share, abs=4 * 0.5 / np.sqrt(20_000))
        assert drawn_B.var() == pytest.approx(share * (1 - share) / 10, rel=0.2)
        assert np.round(10 * drawn_B) == pytest.approx(10 * drawn_B, abs=1e-4)
    with pytest.raises(SpecError, match="both > 0"):
        bootstrap_mixtures(mixture, 0, 3, seed=0)


def test_an_expert_reads_new_data_and_a_sample_of_what_came_before():
    study = incremental(0.25)
    base, *arrived = study.experts()
    assert base.mixture == Mixture.uniform(OLD)
    for t, expert in enumerate(arrived):
        before = (*OLD, *ARRIVALS[:t])
        assert expert.mixture[ARRIVALS[t]] == pytest.approx(0.75, abs=1e-5)
        assert {d: expert.mixture[d] for d in before} == pytest.approx(
            dict.fromkeys(before, 0.25 / len(before)), abs=1e-5
        )
        assert set(expert.mixture) == {*before, ARRIVALS[t]}
        assert expert.parent == base.parent and expert.tokens == 8_192
    assert set(incremental(0.0).experts()[1].mixture) == {"code"}


def test_the_current_model_is_the_running_average_of_what_arrived():
    study, models = incremental(), {}
    for run in study.experts():
        models[run.run_id] = np.random.default_rng(len(models)).normal(size=4)
    vectors = list(models.values())
    current = vectors[0]
    for arrived in range(1, 4):
        # ((t - 1) current + expert) / t: the new model needs the last one and one expert.
        current = (arrived * current + vectors[arrived]) / (arrived + 1)
        merge = study.current(arrived)
        members = [models[m.spec.run_id] for m in merge.experts.members]
        assert len(members) == arrived + 1 and sum(merge.weights) == pytest.approx(1.0, abs=1e-6)
        assert np.array(merge.weights) @ members == pytest.approx(current, abs=1e-6)
    assert study.current(0).weights == (1.0,)


def test_the_arms_that_are_compared_read_equally_much():
    study = incremental()
    experts = study.experts()
    continued, again = study.continued(3), study.again(3)
    assert continued.tokens == again.tokens == sum(e.tokens for e in experts)
    own = continued.schedule.domain_tokens(continued.tokens)
    of_experts = {d: sum(e.mixture.get(d, 0.0) * e.tokens for e in experts) for d in own}
    assert own == pytest.approx(of_experts, rel=1e-4)
    assert [max(p.mixture, key=p.mixture.__getitem__) for p in continued.schedule.phases[1:]] == [
        *ARRIVALS
    ]
    assert again.mixture == Mixture.uniform((*OLD, *ARRIVALS))
    assert continued.parent == again.parent == experts[0].parent
    # The rate falls over the last arrival alone.
    assert 0 < continued.optimizer.decay_share * continued.tokens <= 8_192
    forgetful = study.continued(3, history_share=0.0)
    assert set(forgetful.schedule.phases[-1].mixture) == {"news"}


def test_bad_arrivals_are_named():
    with pytest.raises(SpecError, match="not seen"):
        dataclasses.replace(incremental(), arrivals=("docs", "code"))
    with pytest.raises(SpecError, match="arrivals"):
        dataclasses.replace(incremental(), arrivals=())
    with pytest.raises(SpecError, match="history_share"):
        incremental(1.0)

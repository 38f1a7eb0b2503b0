"""TiKMiX: the solver against a grid, its bounds, the policies' blocks, M's search; one tiny run."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np
import pytest

import rayx
from rayx import Evaluation, Mixture, ModelShape, Optimizer, Schedule
from rayx.errors import ChoiceError, SpecError, StoreError
from rayx.methods.tikmix import TiKMiX, latin_mixtures, search
from rayx.policies.tikmix import (
    InfluenceSurvey,
    TiKMiXD,
    dynamic_weights,
    penalty,
    scales,
)
from rayx.policy import Decision, Setting, policy_from_json, policy_to_json
from rayx.proxy import set_threads, train_pack
from rayx.record import CurvePoint, Loss, Record
from rayx.spec import TrainSpec
from tests.samples import record, train_spec

DOMAINS = ("code", "math", "web")
PRIOR = np.array([0.5, 0.3, 0.2])
SETTING = Setting(domains=DOMAINS, prior_K=PRIOR, steps=50, batch_sequences=8)


def simplex(parts: int) -> np.ndarray:
    """All mixtures of three domains in steps of 1 / parts."""
    rows = [(i, j, parts - i - j) for i in range(parts + 1) for j in range(parts + 1 - i)]
    return np.array(rows) / parts


def price(influence_PK: np.ndarray, weights_MK: np.ndarray, *prices: float) -> np.ndarray:
    scaled_PK = influence_PK / scales(influence_PK)[:, None]
    return penalty(weights_MK @ scaled_PK.T, weights_MK, *prices)


def drive(policy, measure, setting: Setting = SETTING) -> list:
    """The blocks that a policy asks for."""
    generator, found, value = policy.blocks(setting), [], None
    while True:
        try:
            found.append(generator.send(value))
        except StopIteration:
            return found
        value = measure(found[-1].signal) if found[-1].signal else None


@pytest.mark.parametrize("prices", [(1, 1, 1), (3, 1, 0.1), (1, 0, 0.2), (0, 1, 1)])
def test_the_solver_finds_what_a_grid_finds(prices):
    rng = np.random.default_rng(0)
    grid_MK = simplex(100)
    for targets in (1, 2, 3, 4, 5):
        unit = 10.0 ** rng.uniform(-6, 6, (targets, 1))
        influence_PK = rng.normal(0.3, 1.0, (targets, 3)) * unit
        prior_K = rng.dirichlet(np.ones(3))
        weights_K = dynamic_weights(influence_PK, prior_K, *prices)
        assert weights_K.min() >= 0 and weights_K.sum() == pytest.approx(1)
        scaled_PK = influence_PK / scales(influence_PK)[:, None]
        assert (scaled_PK @ (weights_K - prior_K)).min() >= -1e-6
        kept_M = ((grid_MK - prior_K) @ scaled_PK.T).min(axis=1) >= 0
        least = price(influence_PK, np.vstack([prior_K, grid_MK[kept_M]]), *prices).min()
        mine = price(influence_PK, weights_K[None], *prices)[0]
        assert least - 0.02 < mine <= least + 1e-6  # the grid is coarse, so never better


def test_no_target_loses_at_the_size_of_the_paper():
    rng = np.random.default_rng(1)
    for _ in range(5):
        influence_PK = rng.normal(0.5, 1.0, (9, 26))
        prior_K = rng.dirichlet(np.full(26, 2.0))
        weights_K = dynamic_weights(influence_PK, prior_K)
        scaled_PK = influence_PK / scales(influence_PK)[:, None]
        assert (scaled_PK @ (weights_K - prior_K)).min() >= -1e-6
        both_MK = np.stack([weights_K, prior_K])
        assert np.diff(price(influence_PK, both_MK, 1, 1, 1))[0] > 0.1


def test_a_domain_that_helps_all_gains_and_one_that_harms_all_loses():
    influence_PK = np.array([[0.1, 1.0, -0.5], [0.0, 2.0, -1.0]])
    weights_K = dynamic_weights(influence_PK, PRIOR)
    assert weights_K[1] > 0.6 and weights_K[2] < 0.1
    bold_K = dynamic_weights(influence_PK, PRIOR, gamma=0.01)
    assert bold_K[1] > 0.99


def test_order_of_domains_and_targets_and_units_do_not_count():
    rng = np.random.default_rng(2)
    influence_PK, prior_K = rng.normal(0.5, 1.0, (4, 6)), rng.dirichlet(np.ones(6))
    weights_K = dynamic_weights(influence_PK, prior_K)
    k, p = rng.permutation(6), rng.permutation(4)
    units_P1 = 10.0 ** rng.uniform(-9, 9, (4, 1))
    turned_K = dynamic_weights((units_P1 * influence_PK)[p][:, k], 7 * prior_K[k])
    np.testing.assert_allclose(turned_K, weights_K[k], atol=1e-4)


def test_the_prior_stays_where_nothing_is_better(caplog):
    # Each domain helps itself alone: who gains takes it from another.
    np.testing.assert_allclose(dynamic_weights(np.eye(3), PRIOR), PRIOR, atol=1e-6)
    # Without worth of gains or diversity, equal gains are all, and the prior has them.
    uniform_K = np.full(3, 1 / 3)
    np.testing.assert_array_equal(dynamic_weights(np.eye(3), uniform_K, 1, 0, 0), uniform_K)
    with caplog.at_level(logging.WARNING):
        flat_PK = np.outer([1.0, -2e-9], np.ones(3))
        np.testing.assert_array_equal(dynamic_weights(flat_PK, PRIOR), PRIOR)
        np.testing.assert_array_equal(dynamic_weights(np.zeros((2, 3)), PRIOR), PRIOR)
    assert "weights stay" in caplog.text


def test_the_policy_remixes_from_the_current_weights():
    policy = TiKMiXD(targets=("qa", "code"), every_share=0.2, sequences=4, curvature="kronecker")
    influence_PK = np.array([[0.2, 1.0, 0.1], [0.9, 1.0, 0.0]])
    found = drive(policy, lambda signal: influence_PK)
    assert [block.steps for block in found] == [10] * 5
    np.testing.assert_array_equal(found[0].weights_K, PRIOR)
    first_K = dynamic_weights(influence_PK, PRIOR)
    np.testing.assert_array_equal(found[1].weights_K, first_K)
    again_K = dynamic_weights(influence_PK, first_K)
    np.testing.assert_array_equal(found[2].weights_K, again_K)
    assert found[-1].signal is None  # what no step could use is not measured
    signal = found[0].signal
    assert [probe.target for probe in signal.probes] == ["qa", "code"]
    assert signal.sources == SETTING.each and signal.curvature == "kronecker"
    assert policy_from_json(policy_to_json(policy)) == policy
    of_domains = drive(TiKMiXD(every_share=0.5), lambda signal: np.ones((3, 3)))
    assert [p.target for p in of_domains[0].signal.probes] == [*DOMAINS]
    np.testing.assert_array_equal(of_domains[1].weights_K, PRIOR)


def test_bad_values_are_named():
    influence_PK = np.array([[1.0, 2.0, 3.0], [1.0, np.nan, 3.0]])
    with pytest.raises(ChoiceError, match=r"domain 1 on target 1 is nan"):
        dynamic_weights(influence_PK, PRIOR)
    with pytest.raises(ChoiceError, match=r"math on target qa is nan"):
        drive(TiKMiXD(targets=("code", "qa")), lambda signal: influence_PK)
    with pytest.raises(SpecError, match=r"every_share is 1.0"):
        TiKMiXD(every_share=1.0)
    with pytest.raises(SpecError, match=r"gamma is -1"):
        TiKMiXD(gamma=-1)
    with pytest.raises(SpecError, match=r"curvature is 'hessian'"):
        InfluenceSurvey(curvature="hessian")
    with pytest.raises(SpecError, match=r"part is 'third'"):
        TiKMiXD(part="third")
    with pytest.raises(SpecError, match=r"at_share is 0"):
        InfluenceSurvey(at_share=0)


def test_a_survey_trains_on_the_prior_and_measures_once():
    sources = (Mixture({"code": 1}), Mixture({"code": 1, "web": 3}))
    survey = InfluenceSurvey(sources=sources, targets=("qa",), at_share=0.99)
    found = drive(survey, lambda signal: np.ones((1, 2)))
    assert [block.steps for block in found] == [49, 1]  # a step is left, so that it is recorded
    assert found[0].signal.sources == sources and found[1].signal is None
    assert policy_from_json(policy_to_json(survey)) == survey


def test_candidates_fill_their_intervals():
    prior_K = np.array([0.5, 0.25, 0.15, 0.07, 0.03])
    drawn_MK = latin_mixtures(prior_K, 200, seed=3, spread=(0.3, 3.0))
    np.testing.assert_allclose(drawn_MK.sum(axis=1), 1.0)
    assert (drawn_MK >= 0.3 * prior_K).all()
    assert (drawn_MK <= np.minimum(1.0, 3.0 * prior_K)).all()
    width_K = np.minimum(1.0, 3.0 * prior_K) - 0.3 * prior_K
    assert (np.ptp(drawn_MK, axis=0) > 0.6 * width_K).all()
    np.testing.assert_array_equal(drawn_MK, latin_mixtures(prior_K, 200, seed=3, spread=(0.3, 3.0)))
    assert np.abs(drawn_MK - latin_mixtures(prior_K, 200, seed=4, spread=(0.3, 3.0))).max() > 0.1
    with pytest.raises(SpecError, match=r"spread is \(1, 2\)"):
        latin_mixtures(prior_K, 5, seed=0, spread=(1, 2))
    with pytest.raises(SpecError, match=r"Widen the spread"):
        latin_mixtures(prior_K, 50, seed=0, spread=(0.9999, 50))


def test_the_search_finds_the_least_of_a_quadratic():
    best_K = np.array([0.05, 0.6, 0.1, 0.25])
    found_K = search(lambda w_MK: ((w_MK - best_K) ** 2).sum(axis=1), np.full(4, 0.25), seed=0)
    np.testing.assert_allclose(found_K, best_K, atol=0.01)
    at_corner_K = search(lambda w_MK: -w_MK[:, 2], np.array([0.49, 0.49, 0.02]), seed=0)
    assert at_corner_K[2] > 0.97


# A planted world: influence is quadratic in the shares, each target has a share that is best.
BEST_PK = np.array([[0.1, 0.7, 0.2], [0.2, 0.5, 0.3]])


def planted_influence(source: Mixture) -> np.ndarray:
    weights_K = source.to_array(DOMAINS)
    return 1e-3 * np.array([3.0, 1.0]) * (1.5 - ((weights_K - BEST_PK) ** 2).sum(axis=1))


def planted_record(spec: TrainSpec, value=planted_influence) -> Record:
    assert isinstance(spec.policy, InfluenceSurvey)
    signal_PS = np.stack([value(source) for source in spec.policy.sources], axis=1)
    decisions = (
        Decision(step=0, weights=dict(spec.mixture)),
        Decision(step=25, weights=dict(spec.mixture), signal=signal_PS.tolist()),
    )
    return dataclasses.replace(record(spec), decisions=decisions)


def study(**changes) -> TiKMiX:
    proxy = train_spec(schedule=Schedule.constant(Mixture.from_array(PRIOR, DOMAINS), 16_384))
    survey = InfluenceSurvey(targets=("code", "qa"))
    return TiKMiX(**({"proxy": proxy, "survey": survey, "num_candidates": 60} | changes))


@pytest.fixture
def store(tmp_path):
    return rayx.open(tmp_path / "store", create=True)


def test_m_finds_the_best_mixture_of_a_planted_world(store):
    tikmix = study(regressor="scheffe", gamma=0.0)
    single, mixed = tikmix.specs()
    assert single.run_id != mixed.run_id and single.pack_key == mixed.pack_key
    assert isinstance(single.policy, InfluenceSurvey) and isinstance(mixed.policy, InfluenceSurvey)
    assert mixed.policy.sources[:3] == single.policy.sources and len(mixed.policy.sources) == 63
    for spec in (single, mixed):
        store.put(planted_record(spec))
    grid_MK = simplex(60)
    influence_MP = np.stack([planted_influence(Mixture.from_array(w, DOMAINS)) for w in grid_MK])
    largest_P = scales(tikmix.influence(store, single))
    value_M = penalty(influence_MP / largest_P, grid_MK, 1.0, 1.0, 0.0)
    chosen_K = tikmix.modelled(tikmix.fitted(store)).to_array(DOMAINS)
    assert np.abs(chosen_K - grid_MK[value_M.argmin()]).max() < 0.03


def test_the_usual_regressor_of_m_is_validated_on_sets_that_it_has_not_seen(store):
    survey = InfluenceSurvey(targets=("code",))
    tikmix = study(num_candidates=32, survey=survey)
    store.put(planted_record(tikmix.mixed(), lambda source: planted_influence(source)[:1]))
    fitted = tikmix.fitted(store)
    assert fitted.regressors == {"code": "lightgbm"}
    assert fitted.cv.loc[fitted.cv["chosen"], "spearman"].min() > 0.6


def test_d_takes_influence_to_be_linear(store):
    tikmix = study()
    linear_PK = np.array([[0.2, 1.0, 0.6], [0.1, 0.5, 0.4]])
    spec = tikmix.single()
    store.put(planted_record(spec, lambda source: linear_PK @ source.to_array(DOMAINS)))
    weights_K = tikmix.dynamic(store).to_array(DOMAINS)
    np.testing.assert_allclose(weights_K, dynamic_weights(linear_PK, PRIOR), atol=1e-6)


def test_a_study_names_what_is_missing(store):
    tikmix = study()
    with pytest.raises(SpecError, match=r"num_candidates is 4"):
        study(num_candidates=4)
    with pytest.raises(SpecError, match=r"proxy.policy is InfluenceSurvey"):
        study(proxy=tikmix.single())
    store.put(record(tikmix.single(), failed=True))
    with pytest.raises(StoreError, match=r"no influence on record: loss is nan at step 3"):
        tikmix.dynamic(store)
    spec = study(regressor="scheffe").mixed()
    store.put(record(spec))
    with pytest.raises(StoreError, match=r"its policy measured nothing"):
        tikmix.fitted(store)


def test_a_forecast_is_judged_by_branches_of_the_surveyed_run(store):
    tikmix = study(survey=InfluenceSurvey(targets=("code",), at_share=0.5))
    store.put(planted_record(tikmix.single(), lambda source: np.array([source.get("math", 0.1)])))
    branches = tikmix.branches(4_096)
    assert [dict(spec.mixture) for spec in branches] == [{d: 1.0} for d in DOMAINS]
    for spec, loss in zip(branches, (2.0, 1.0, 1.5), strict=True):
        assert spec.parent is not None and spec.policy is None
        assert (spec.parent.spec, spec.parent.steps) == (tikmix.single(), 16)
        losses = {"code": Loss(loss, loss, 0.01)}
        point = CurvePoint(spec.steps, spec.tokens, losses)
        store.put(dataclasses.replace(record(spec), curve=(point,)))
    # Influence ranks math first and the others as equals.
    assert tikmix.forecast(store, branches) == {"code": pytest.approx(0.866, abs=1e-3)}


def test_sums_of_domains_tell_mixed_sets_as_far_as_the_world_is_linear(store):
    linear_PK, rng = np.array([[0.2, 1.0, 0.6], [0.1, -0.5, 0.4]]), np.random.default_rng(0)
    exact, noisy = study(), study(seed=1)
    for tikmix, noise in ((exact, 0.0), (noisy, 0.3)):
        store.put(
            planted_record(
                tikmix.mixed(),
                lambda source, noise=noise: (
                    linear_PK @ source.to_array(DOMAINS) + noise * rng.standard_normal(2)
                ),
            )
        )
    assert exact.additivity(store) == pytest.approx(1.0, abs=0.001)
    assert noisy.additivity(store) < 0.9


def test_a_real_pack_measures_and_remixes(tiny_corpus):
    set_threads(1)  # on a busy machine threads of so small a model wait for each other
    domains = tuple(tiny_corpus.domains)
    measured: dict[str, Any] = {"sequences": 8, "probe_sequences": 16}
    shape = ModelShape(
        layers=1, width=16, heads=2, ffn_width=32, vocab_size=tiny_corpus.vocab_size, context=16
    )
    survey = TrainSpec(
        corpus=tiny_corpus.fingerprint,
        model=shape,
        schedule=Schedule.constant(Mixture.uniform(domains), 4_800),
        optimizer=Optimizer(lr=1e-2, batch_sequences=4),
        evaluation=Evaluation(points=1, sequences=8, part="second"),
        policy=InfluenceSurvey(**measured),
    )
    online = dataclasses.replace(survey, policy=TiKMiXD(targets=("law",), **measured))
    surveyed, remixed = train_pack([survey, online], tiny_corpus)
    influence_PK = np.array(surveyed.decisions[-1].signal)
    assert (influence_PK.argmax(axis=1) == np.arange(3)).all()  # the texts share no words
    assert surveyed.mixture == survey.mixture and surveyed.signal_flops > 0
    assert [decision.step for decision in remixed.decisions] == [0, 15, 30, 45, 60]
    assert remixed.decisions[-1].weights["law"] > 0.45

"""Merging as a ranking proxy: agreement, the hull, costs and the branches, without training."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import rayx
from rayx import Evaluation, Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.errors import SpecError, StoreError
from rayx.experiment import load_experiment
from rayx.merging import MergeSpec
from rayx.methods.merge_proxy import MergeProxy, agreement, cost_tokens, losses, study
from rayx.proxy import set_threads, train_pack
from rayx.proxy.merge.candidates import Merges
from rayx.record import CurvePoint, Loss, Record
from rayx.spec import Parent

TARGETS = ("code", "law", "news")
EVALUATION_FLOPS = 6_000.0
EXPERIMENT = Path(__file__).parent.parent / "experiments" / "merged_proxies.py"


def merge_proxy(**changes) -> MergeProxy:
    general = Mixture({"code": 2, "law": 1, "news": 1})
    template = TrainSpec(
        corpus="c0ffee",
        model=ModelShape(layers=1, width=16, heads=2, ffn_width=32, vocab_size=300, context=16),
        schedule=Schedule.constant(general, 20_480),
        optimizer=Optimizer(lr=1e-2, batch_sequences=4),
        evaluation=Evaluation(points=1, sequences=8),
        seed=5,
        data_seed=5,
    )
    usual = {
        "template": template,
        "general": general,
        "domains": TARGETS,
        "trunk_tokens": 20_480,
        "branch_tokens": 6_400,
    }
    return MergeProxy(**(usual | changes))


def planted_record(spec, bpb_T) -> Record:
    """The record of a trained or merged spec with these losses."""
    named = {t: Loss(2 * float(b), float(b), 0.01) for t, b in zip(TARGETS, bpb_T, strict=True)}
    trained = isinstance(spec, TrainSpec)
    return Record(
        spec=spec,
        curve=(CurvePoint(1, spec.tokens, named),),
        epochs={},
        tokens=spec.tokens if trained else 0,
        flops=spec.flops if trained else EVALUATION_FLOPS,
        seconds=1.0,
        pack_id="pack0",
        pack_runs=1,
        device="cpu",
        versions={},
        commit="",
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:02+00:00",
    )


@pytest.fixture
def store(tmp_path):
    return rayx.open(tmp_path / "store", create=True)


def test_equal_losses_agree_in_everything():
    trained_RT = np.random.default_rng(0).uniform(1, 2, (8, 3))
    same = agreement(trained_RT, trained_RT, TARGETS)
    assert (same.mixtures, same.gap_bpb) == (8, 0.0)
    assert same.spearman == pytest.approx(dict.fromkeys(TARGETS, 1.0))
    ones = [same.macro_spearman, same.average_spearman, same.top_spearman, same.recovery]
    assert ones == pytest.approx([1.0] * 4)
    worse = agreement(2 * trained_RT, trained_RT, TARGETS)
    assert worse.macro_spearman == pytest.approx(1.0) and worse.recovery == pytest.approx(0.5)
    assert worse.gap_bpb == pytest.approx(trained_RT.mean())
    reversed_ = agreement(3 - trained_RT, trained_RT, TARGETS)
    assert reversed_.least_spearman == reversed_.average_spearman == pytest.approx(-1.0)


def test_top_spearman_looks_only_at_the_best_trained_quarter():
    trained_R = np.arange(16.0) + 1
    standin_R = trained_R.copy()
    standin_R[:4] = standin_R[:4][::-1]  # the best four are ranked the wrong way round
    found = agreement(standin_R[:, None], trained_R[:, None], ("code",))
    assert found.top_spearman == pytest.approx(-1.0)
    assert found.average_spearman == pytest.approx(spearmanr(standin_R, trained_R)[0])
    assert found.average_spearman > 0.9


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1_000), st.integers(4, 20))
def test_spearman_is_scipys_and_survives_any_increasing_function(seed, num):
    rng = np.random.default_rng(seed)
    standin_RT, trained_RT = rng.uniform(0.5, 3.0, (2, num, 3))
    found = agreement(standin_RT, trained_RT, TARGETS)
    bent = agreement(np.exp(standin_RT), trained_RT, TARGETS)
    for t, target in enumerate(TARGETS):
        expected = spearmanr(standin_RT[:, t], trained_RT[:, t])[0]
        assert found.spearman[target] == pytest.approx(expected)
        assert bent.spearman[target] == pytest.approx(expected)


def test_agreement_refuses_what_says_nothing():
    with pytest.raises(SpecError, match="at least 4"):
        agreement(np.ones((3, 3)), np.ones((3, 3)), TARGETS)
    with pytest.raises(SpecError, match=r"stand-ins' losses is \(5, 3\)"):
        agreement(np.ones((5, 3)), np.ones((6, 3)), TARGETS)


def test_branches_leave_the_end_of_one_trunk_and_keep_its_seeds():
    proxies = merge_proxy()
    for tokens in (640, 3_200, 6_400):
        branch = proxies.branch(Mixture({"law": 1}), tokens)
        assert branch.parent == Parent(proxies.trunk, proxies.trunk.steps)
        assert branch.tokens == tokens and branch.mixture == Mixture({"law": 1})
        assert (branch.seed, branch.data_seed) == (5, 5)
        assert branch.optimizer.decay_share == pytest.approx(0.8, abs=0.06)  # whole steps
    experts = proxies.experts(0.5)
    assert experts.base == Parent(proxies.trunk, proxies.trunk.steps)
    assert [m.spec.mixture["law"] for m in experts.members] == pytest.approx([0.125, 0.625, 0.125])


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1_000), st.sampled_from([0.0, 0.25, 0.5]))
def test_weights_are_mapped_back_through_the_experts_mixtures(seed, share):
    proxies = merge_proxy()
    mixture = proxies.hull_mixtures(1, share, seed)[0]
    (standin,) = proxies.standins([mixture], share)
    general_K = proxies.general.to_array(TARGETS)
    expected_K = (mixture.to_array(TARGETS) - share * general_K) / (1 - share)
    assert standin.weights == pytest.approx(expected_K, abs=1e-5)
    assert standin.mixture.to_array(TARGETS) == pytest.approx(mixture.to_array(TARGETS), abs=1e-5)
    hull = proxies.hull(share)
    assert hull.nearest(mixture.to_array(TARGETS)[None])[0] == pytest.approx(
        mixture.to_array(TARGETS), abs=2e-6
    )


def test_a_mixture_outside_the_hull_has_no_standin():
    proxies = merge_proxy()
    little_code = Mixture({"code": 0.1, "law": 0.5, "news": 0.4})
    with pytest.raises(SpecError, match="outside"):
        proxies.standins([little_code], 0.5)  # general text is half code: at least a quarter
    assert proxies.standins([little_code], 0.0)[0].weights == pytest.approx((0.1, 0.5, 0.4))


def test_a_general_domain_without_an_expert_is_fixed():
    proxies = merge_proxy(domains=("code", "law"))
    hull = proxies.hull(0.5)
    assert hull.domains == TARGETS
    assert hull.floors_K == pytest.approx([0.25, 0.125, 0.125])
    assert hull.caps_K == pytest.approx([1.0, 1.0, 0.125])
    for mixture in proxies.hull_mixtures(5, 0.5, 0):
        assert mixture["news"] == pytest.approx(0.125)
        assert isinstance(proxies.standins([mixture], 0.5)[0], MergeSpec)


def test_study_compares_records_and_refuses_another_order(store):
    proxies = merge_proxy()
    mixtures = proxies.hull_mixtures(6, 0.5, 0)
    references = [proxies.branch(mixture) for mixture in mixtures]
    standins = proxies.standins(mixtures, 0.5)
    rng = np.random.default_rng(0)
    trained_RT, standin_RT = rng.uniform(1, 2, (2, 6, 3))
    with pytest.raises(StoreError, match="no record"):
        study(store, standins, references)
    for specs, losses_RT in ((references, trained_RT), (standins, standin_RT)):
        for spec, bpb_T in zip(specs, losses_RT, strict=True):
            store.put(planted_record(spec, bpb_T))
    assert study(store, standins, references) == agreement(standin_RT, trained_RT, TARGETS)
    only = study(store, standins, references, ("news",))
    assert only == agreement(standin_RT[:, 2:], trained_RT[:, 2:], ("news",))
    assert losses(store, standins, ("news",))[:, 0] == pytest.approx(standin_RT[:, 2])
    with pytest.raises(SpecError, match="same order"):
        study(store, standins[::-1], references)
    with pytest.raises(SpecError, match="is 5"):
        study(store, standins[:5], references)
    with pytest.raises(SpecError, match="books"):
        losses(store, standins, ("books",))
    elsewhere = [dataclasses.replace(spec, corpus="beef", parent=None) for spec in references]
    with pytest.raises(SpecError, match="beef"):
        study(store, standins, elsewhere)


def test_merges_cost_their_experts_once_and_an_evaluation_each(store):
    proxies = merge_proxy()
    mixtures = proxies.hull_mixtures(10, 0.5, 0)
    standins = proxies.standins(mixtures, 0.5)
    for standin in standins:
        store.put(planted_record(standin, np.ones(3)))
    evaluation = EVALUATION_FLOPS / (6 * proxies.template.model.matmul_params)
    assert cost_tokens(store, standins) == pytest.approx(3 * 6_400 + 10 * evaluation)
    assert cost_tokens(store, [*standins, *standins]) == cost_tokens(store, standins)
    # An expert that is itself asked for is not paid twice; trained runs pay their own tokens.
    experts = [member.spec for member in proxies.experts(0.5).members]
    references = [proxies.branch(mixture, 3_200) for mixture in mixtures]
    everything = [*experts, *standins, *references]
    assert cost_tokens(store, everything) == pytest.approx(3 * 6_400 + 10 * evaluation + 10 * 3_200)


def test_general_share_of_one_leaves_nothing_to_learn():
    with pytest.raises(SpecError, match=r"\[0, 1\)"):
        merge_proxy().experts(1.0)


def test_merges_of_really_trained_experts_rank_really_trained_mixtures(store, tiny_corpus):
    set_threads(1)  # on a busy machine threads of so small a model wait for each other
    usual = merge_proxy()
    template = dataclasses.replace(
        usual.template,
        corpus=tiny_corpus.fingerprint,
        model=dataclasses.replace(usual.template.model, vocab_size=tiny_corpus.vocab_size),
        evaluation=Evaluation(points=1, sequences=64),
    )
    proxies = dataclasses.replace(
        usual, template=template, general=Mixture.uniform(TARGETS), branch_tokens=3_200
    )
    mixtures, trunk = proxies.hull_mixtures(10, 0.5, 0), proxies.trunk
    references = [proxies.branch(mixture) for mixture in mixtures]
    experts = [member.spec for member in proxies.experts(0.5).members]
    train_pack([trunk], tiny_corpus, store=store, keep={trunk.run_id: [trunk.steps]})
    ends = {expert.run_id: [expert.steps] for expert in experts}
    for record in train_pack([*references, *experts], tiny_corpus, store=store, keep=ends):
        store.put(record)
    standins, merges = proxies.standins(mixtures, 0.5), Merges()
    for record in merges.evaluate(standins, merges.load(standins, store), tiny_corpus):
        store.put(record)
    found = study(store, standins, references)
    assert found.least_spearman > 0.8
    assert abs(found.gap_bpb) < 0.1  # a merge is about as good a model as the trained one
    assert cost_tokens(store, standins) < cost_tokens(store, references)


def planted_bpb(mixture: Mixture, tokens: int) -> np.ndarray:
    """Each target learns from its own domain and a little from the others, over time."""
    own_T = np.array([mixture.get(t, 0.0) for t in TARGETS])
    return 1.0 + 1.0 / (0.5 + 2.0 * (own_T + 0.01) ** 0.5) + 30.0 / tokens**0.5


def test_the_experiment_says_what_merges_are_worth_on_planted_losses(
    store, tiny_corpus, monkeypatch
):
    """Merges here are exact, trained proxies noisy: the table must say so, row by row."""
    module = load_experiment(EXPERIMENT)
    p = module.Parameters(
        references=8,
        far_references=6,
        trunk_tokens=102_400,
        branch_tokens=49_152,
        regressor="scheffe",
    )

    def sweep(specs):
        for spec in {spec.run_id: spec for spec in specs}.values():
            rng = np.random.default_rng(int(spec.run_id, 16))
            noise = 0.0 if isinstance(spec, MergeSpec) or spec.tokens == 49_152 else 0.02
            bpb_T = planted_bpb(spec.mixture, spec.tokens) + noise * rng.standard_normal(3)
            store.put(planted_record(spec, bpb_T))

    monkeypatch.setattr(module, "ROUNDS", (16, 8))
    specs = module.specs(p, tiny_corpus)
    assert len({spec.run_id for spec in specs}) == len(specs)
    sweep(specs)
    sweep(module.propose(p, tiny_corpus, store))
    conclusion = module.analyse(p, tiny_corpus, store, sweep)

    rows = pd.read_csv(io.BytesIO(store.read_bytes("reports/merged_proxies.csv")))
    merged = rows.query("kind == 'merged'")
    assert len(merged) == 3 + 3 + 3  # shares, shorter ones at the widest, and the second seed
    assert merged["macro"].tolist() == pytest.approx([1.0] * len(merged))
    assert rows.loc[rows["kind"] == "own share of the mixture", "macro"].item() == pytest.approx(1)
    trained = rows[rows["kind"] == "trained"]
    assert trained["cost_tokens"].tolist() == [8 * 49_152 // f for f in (8, 4, 2)]
    assert trained["macro"].max() < 1
    anywhere = rows[rows["kind"] == "merged, anywhere"]
    assert anywhere["mixtures"].item() == 6 and anywhere["macro"].item() == pytest.approx(1.0)
    costs = store.read_json("verifications/merged_proxies.json")["search_cost_tokens"]
    assert costs["regmix_4"] == pytest.approx(costs["random"], rel=0.3)
    verdict = conclusion.verification["verdict"]
    assert "macro Spearman of 1.000" in verdict
    assert set(conclusion.verification["arms"]) == {
        "choice", "uniform", "proportional", "regmix_8", "regmix_4", "random"
    }  # fmt: skip
    dry = module.follow_up(p, tiny_corpus)
    assert len(dry) == 6 * p.verify_seeds

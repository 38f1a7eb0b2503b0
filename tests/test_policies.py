"""Policies on planted truths: worlds in numpy whose mixing law is known, and what all must keep."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayx
from rayx import Evaluation, ModelShape, Optimizer
from rayx.errors import SpecError
from rayx.fit.scores import spearman
from rayx.methods.aioli import LAWS, MixingStudy, laws, summary
from rayx.mixture import Mixture, Schedule
from rayx.policies import POLICIES
from rayx.policies.agent import Agent, network_size
from rayx.policies.aioli import Aioli, law, normalised, smoothed_one_hots
from rayx.policies.dga import DGA
from rayx.policies.doge import DoGE
from rayx.policies.doremi import DoReMi
from rayx.policies.mirror import ascend, blend, floored, running_scale, scores, tells_apart
from rayx.policies.rb import RB
from rayx.policies.scalarised import Scalarised
from rayx.policies.skill_it import SkillIt
from rayx.policies.tikmix import InfluenceSurvey, TiKMiXD
from rayx.policy import (
    Drops,
    Excess,
    Gradients,
    Influence,
    Losses,
    Probe,
    policy_from_json,
    policy_to_json,
)
from rayx.proxy import train_pack
from rayx.spec import Parent, TrainSpec
from rayx.steering import Steering
from tests.samples import train_spec

DOMAINS = ("a", "b", "c", "d")
STEPS = 1_000


class World:
    """Losses that fall by rate * A p each step: A_ij = <v_i, g_j>, v of targets, g of domains.

    Args:
        target_KF: v, shape (K, F).
        source_KF: g, shape (K, F).
        noise: Standard deviation of what is measured, as a share of its own size.
        seed: Of the noise.
    """

    def __init__(
        self, target_KF: np.ndarray, source_KF: np.ndarray, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.target_KF, self.source_KF, self.noise = target_KF, source_KF, noise
        self.loss_K = np.linspace(3.0, 4.0, len(target_KF))
        self.reference_K = np.linspace(3.0, 3.5, len(target_KF))
        self.rate = 1e-4
        self.rng = np.random.default_rng(seed)

    @property
    def law_KK(self) -> np.ndarray:
        return self.target_KF @ self.source_KF.T

    def train(self, weights_K: np.ndarray, steps: int) -> None:
        self.loss_K = self.loss_K - steps * self.rate * (self.law_KK @ weights_K)

    def _noisy(self, values: np.ndarray, scale: float) -> np.ndarray:
        return values + self.noise * scale * self.rng.standard_normal(values.shape)

    def measure(self, signal: Any, domains: tuple[str, ...]) -> np.ndarray | None:
        if signal is None:
            return None
        probes = [domains.index(probe.target) for probe in getattr(signal, "probes", ())]
        if isinstance(signal, Losses):  # noise as against the fall in ten steps
            return self._noisy(self.loss_K[probes], 10 * self.rate * self.law_KK.std())
        mixtures_SK = np.array([source.to_array(domains) for source in signal.sources])
        if isinstance(signal, Excess):
            return np.maximum(0.0, mixtures_SK @ (self.loss_K - self.reference_K))
        source_SF, target_PF = mixtures_SK @ self.source_KF, self.target_KF[probes]
        if isinstance(signal, Gradients):
            all_NF = np.concatenate([source_SF, target_PF])
            all_NF = self._noisy(all_NF, all_NF.std() / np.sqrt(all_NF.shape[1]))
            return all_NF @ all_NF.T
        law_PS = self._noisy(target_PF @ source_SF.T, self.law_KK.std())
        if isinstance(signal, Drops):
            return law_PS * signal.steps * self.rate
        assert isinstance(signal, Influence)
        return law_PS


def planted(seed: int, noise: float = 0.0) -> World:
    """A law with structure: every domain lowers its own loss most, and others by chance."""
    rng = np.random.default_rng(seed)
    shared_F = rng.standard_normal(8)
    source_KF = rng.standard_normal((len(DOMAINS), 8)) + shared_F
    return World(source_KF + 0.5 * rng.standard_normal(source_KF.shape), source_KF, noise, seed)


def one_best(best: int) -> World:
    """A law in which text of one domain lowers all losses most."""
    share_K = np.where(np.arange(len(DOMAINS)) == best, 2.0, 0.5)
    return World(np.ones((len(DOMAINS), 3)), np.outer(share_K, np.ones(3)))


def spec_of(policy: Any, prior: Mapping[str, float] | None = None) -> TrainSpec:
    prior = prior or dict.fromkeys(DOMAINS, 1.0)
    return train_spec(schedule=Schedule.constant(Mixture(prior), STEPS * 512), policy=policy)


def steer(policy: Any, world: World, prior: Mapping[str, float] | None = None) -> Steering:
    """Run a policy in a world as the training loop does, and return its decisions."""
    spec = spec_of(policy, prior)
    steering, step = Steering(spec), 0
    while True:
        end = min(steering.end, spec.steps)
        weights_K = steering.mixture(min(step, spec.steps - 1)).to_array(DOMAINS)
        world.train(weights_K, end - step)
        step = end
        if not steering.ends(step):
            return steering
        steering.go_on(step, world.measure(steering.signal, DOMAINS))


def weights(steering: Steering) -> np.ndarray:
    """All mixtures that were set, shape (S, K)."""
    return np.array([[d.weights.get(k, 0.0) for k in DOMAINS] for d in steering.decisions])


REFERENCE = Parent(train_spec(schedule=Schedule.constant(Mixture.uniform(DOMAINS), 51_200)), 100)
EXAMPLES = {
    "aioli": Aioli(rounds=5, eta=2.0),
    "doge": DoGE(),
    "doremi": DoReMi(reference=REFERENCE, smoothing=0.1),
    "rb": RB(sharpness=4.0, floor=0.2),
    "skill-it": SkillIt(start_share=0.05),
}
MINE = sorted(EXAMPLES)
NETWORK = tuple(np.random.default_rng(0).standard_normal(network_size(len(DOMAINS), 3)).tolist())
EVERY = EXAMPLES | {
    "agent": Agent(domains=DOMAINS, network=NETWORK),
    "dga": DGA(specific=(Probe(target="b"),), floor=0.01),
    "influence-survey": InfluenceSurvey(),
    "scalarised": Scalarised(),
    "tikmix-d": TiKMiXD(),
}


# Planted truths -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["aioli", "doge", "skill-it"])
@pytest.mark.parametrize("seed", range(3))
def test_a_planted_law_is_recovered(name: str, seed: int) -> None:
    world = planted(seed, noise=0.3)
    found = laws(EXAMPLES[name], steer(EXAMPLES[name], world).decisions)
    # Skill-It keeps no negative entry, and scales each target's row by its loss, which is about 3.
    truth_KK = np.maximum(world.law_KK, 0.0) if name == "skill-it" else world.law_KK
    assert spearman(np.mean(found, axis=0).ravel(), truth_KK.ravel()) >= 0.9


@pytest.mark.parametrize("name", ["aioli", "doge", "skill-it", "rb"])
def test_weight_goes_to_the_domain_that_lowers_all_losses(name: str) -> None:
    for best in (0, 2):
        final_K = weights(steer(EXAMPLES[name], one_best(best)))[-1]
        assert final_K.argmax() == best and final_K[best] > 0.3


def test_doremi_gives_weight_to_what_is_furthest_behind_the_reference() -> None:
    steering = steer(EXAMPLES["doremi"], one_best(0))
    assert (np.diff(weights(steering)[-1]) > 0).all()  # the excess grows from a to d


def test_aioli_lowers_the_average_loss_of_its_world() -> None:
    steered, uniform = one_best(1), one_best(1)
    steer(dataclasses.replace(EXAMPLES["aioli"], learn_share=0.1), steered)
    uniform.train(np.full(4, 0.25), STEPS)
    assert steered.loss_K.mean() < uniform.loss_K.mean()


def test_one_round_of_aioli_by_hand() -> None:
    policy = Aioli(rounds=1, learn_rounds=1, one_hot=0.7, eta=3.0, floor=0.0, learn_share=0.4)
    drop_KK = np.array([[5.0, 1, 2, 1], [1, 4, 0, 1], [2, 0, 3, 1], [1, 1, 1, 2]])
    mixtures_KK = smoothed_one_hots(4, 0.7)
    np.testing.assert_allclose(mixtures_KK[1], [0.1, 0.7, 0.1, 0.1])
    steering, loss_K = Steering(spec_of(policy)), np.full(4, 100.0)
    steering.go_on(0, loss_K)
    for _ in range(4):
        assert steering.end % 100 == 0  # 40% of 1,000 steps over 4 domains
        one_hot = int(np.argmax([steering.decisions[-1].weights[d] for d in DOMAINS]))
        loss_K = loss_K - drop_KK[:, one_hot]
        steering.go_on(steering.end, loss_K)
    # W A_i = Delta_i for every target i.
    law_KK = np.array([np.linalg.solve(mixtures_KK, drop_K) for drop_K in drop_KK])
    np.testing.assert_allclose(law(drop_KK, mixtures_KK), law_KK, atol=1e-12)
    law_KK = (law_KK - law_KK.min()) / (law_KK - law_KK.min()).sum()
    expected_K = np.exp(3.0 * law_KK.sum(axis=0))
    found_K = [steering.decisions[-1].weights[d] for d in DOMAINS]
    np.testing.assert_allclose(found_K, expected_K / expected_K.sum(), atol=2e-6)


def test_aioli_without_accumulating_forgets_its_weights_but_not_its_law() -> None:
    policy = dataclasses.replace(EXAMPLES["aioli"], cumulative=False, ema=0.0)
    cumulative = dataclasses.replace(policy, cumulative=True)
    turns = 4 * policy.learn_rounds + 1
    once = weights(steer(policy, planted(0)))[turns::turns]
    summed = weights(steer(cumulative, planted(0)))[turns::turns]
    # In a world whose law stays, each round adds the same to the log weights, or starts anew.
    np.testing.assert_allclose(once, once[:1].repeat(5, 0), atol=2e-6)
    gain_K = np.log(once[0] / once[0, 0])
    for number, weights_K in enumerate(summed, start=1):
        np.testing.assert_allclose(np.log(weights_K / weights_K[0]), number * gain_K, atol=1e-4)


def test_doge_and_rb_take_the_steps_of_their_laws() -> None:
    policy = dataclasses.replace(EXAMPLES["rb"], floor=0.0)
    steering = steer(policy, planted(2, noise=0.2))
    set_SK = weights(steering)
    for number, law_KK in enumerate(laws(policy, steering.decisions)):
        along_K = law_KK.sum(axis=0)
        expected_K = ascend(np.ones(4), along_K / np.linalg.norm(along_K), policy.sharpness)
        np.testing.assert_allclose(set_SK[number + 1], expected_K, atol=1e-5)
    world, policy = planted(2), DoGE(eta=0.7, floor=0.0)
    world.source_KF[:2] *= 0.1  # of norm below 1: these are not clipped
    clipped = [g / np.maximum(1.0, np.linalg.norm(g, axis=1, keepdims=True))
               for g in (world.source_KF, world.target_KF)]  # fmt: skip
    along_K = clipped[0] @ clipped[1].sum(axis=0)
    score_K = np.clip(along_K / np.linalg.norm(clipped[0], axis=1).mean(), 0.0, 5.0)
    set_SK = weights(steer(policy, world))
    for before_K, after_K in zip(set_SK[:-1], set_SK[1:], strict=True):
        np.testing.assert_allclose(after_K, ascend(before_K, score_K, 0.7), atol=1e-5)


def test_doremi_and_skill_it_take_the_steps_of_their_laws() -> None:
    steering = steer(EXAMPLES["doremi"], planted(1))
    set_SK = weights(steering)
    for number, law_KK in enumerate(laws(EXAMPLES["doremi"], steering.decisions)):
        stepped_K = ascend(set_SK[number], law_KK.sum(axis=0), 1.0)
        np.testing.assert_allclose(set_SK[number + 1], 0.9 * stepped_K + 0.025, atol=1e-5)
    policy = SkillIt(skills=tuple(map(tuple, np.eye(4).tolist())), eta=0.3, window=2, floor=0.0)
    steering = steer(policy, planted(1))
    set_SK, found = weights(steering), laws(policy, steering.decisions)
    np.testing.assert_allclose(set_SK[0], 0.25)  # all losses count 1 before the first
    for number in range(2, len(set_SK)):
        score_K = found[number - 1].sum(axis=0) + found[number - 2].sum(axis=0)
        np.testing.assert_allclose(set_SK[number], ascend(np.ones(4), score_K, 0.3), atol=1e-5)


def test_doge_goes_to_what_the_target_asks_for() -> None:
    world = World(np.eye(4), np.eye(4) + 0.1)
    for wanted in DOMAINS:
        policy = DoGE(target=Mixture({wanted: 1}), eta=3.0)
        final_K = weights(steer(policy, world))[-1]
        assert DOMAINS[final_K.argmax()] == wanted


# What all policies keep ---------------------------------------------------------------------------


def test_every_policy_has_an_example_here() -> None:
    assert EVERY.keys() == POLICIES.keys()
    assert all(type(policy) is POLICIES[name] for name, policy in EVERY.items())


@pytest.mark.parametrize("name", sorted(EVERY))
@settings(max_examples=8, deadline=None)
@given(
    prior=st.lists(st.floats(0.05, 1.0), min_size=4, max_size=4),
    seed=st.integers(0, 1_000),
)
def test_weights_are_mixtures_above_the_floor(name: str, prior: list[float], seed: int) -> None:
    policy = EVERY[name]
    start = {domain: weight for domain, weight in zip("abcd", prior, strict=True)}
    set_SK = weights(steer(policy, planted(seed, noise=0.5), start))
    np.testing.assert_allclose(set_SK.sum(axis=1), 1.0, atol=1e-9)
    floor = getattr(policy, "floor", getattr(policy, "smoothing", 0.0))
    moved = (set_SK != set_SK[0]).any(axis=1)
    assert (set_SK[moved] >= floor / 4 - 1e-6).all()


@pytest.mark.parametrize("name", sorted(EVERY))
def test_a_policy_is_a_function_of_what_it_sees(name: str) -> None:
    policy = EVERY[name]
    again = policy_from_json(policy_to_json(policy))
    assert again == policy and hash(again) == hash(policy)
    first = steer(policy, planted(3, noise=0.2)).decisions
    assert first == steer(again, planted(3, noise=0.2)).decisions
    # Interrupted after some decisions, it goes on from them.
    assert Steering(spec_of(again), tuple(first[:4])).decisions == first[:4]


@pytest.mark.parametrize("name", MINE)
def test_domains_have_no_names(name: str) -> None:
    order = [2, 0, 3, 1]
    world = planted(5)
    turned = World(world.target_KF[order], world.source_KF[order])
    turned.loss_K, turned.reference_K = world.loss_K[order], world.reference_K[order]
    last_K = weights(steer(EXAMPLES[name], world))[-1]
    np.testing.assert_allclose(weights(steer(EXAMPLES[name], turned))[-1], last_K[order], atol=5e-6)


@pytest.mark.parametrize("name", MINE)
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_a_signal_that_tells_nothing_leaves_the_weights(name: str, size: float, caplog) -> None:
    world = World(np.full((4, 3), size), np.full((4, 3), size))
    world.loss_K = np.full(4, 3.0)
    prior: dict[str, float] = {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}
    policy = EXAMPLES[name]
    if name == "doremi":
        world.measure = lambda signal, domains: np.full(4, size)  # pyright: ignore[reportAttributeAccessIssue]
    if name == "rb":  # it overwrites the weights: to be told apart is to be moved
        prior = {domain: 0.25 for domain in "abcd"}
    steering = steer(policy, world, prior)
    kept = {d.step: tuple(d.weights.values()) for d in steering.decisions}
    if name == "aioli":  # apart from what it learns on
        kept = {step: found for step, found in kept.items() if max(found) < policy.one_hot}
    assert set(kept.values()) == {tuple(prior.values())}
    assert f"{name} at step" in caplog.text and "the weights stay" in caplog.text


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        (Aioli, {"rounds": 0}, "Aioli.rounds is 0; expected an integer > 0"),
        (Aioli, {"eta": -1.0}, "Aioli.eta is -1.0; expected a number > 0"),
        (Aioli, {"learn_share": 1.5}, "Aioli.learn_share is 1.5; expected a share"),
        (Aioli, {"ema": 1.0}, "Aioli.ema is 1.0; expected a share < 1"),
        (Aioli, {"part": "third"}, "Aioli.part is 'third'; expected one of train"),
        (Aioli, {"cumulative": 1}, "Aioli.cumulative is 1; expected True or False"),
        (Aioli, {"seed": -1}, "Aioli.seed is -1"),
        (DoGE, {"every_steps": 2.5}, "DoGE.every_steps is 2.5"),
        (DoGE, {"target": {"a": 1}}, "DoGE.target is {'a': 1}; expected a Mixture"),
        (DoReMi, {"reference": None}, "DoReMi.reference is None; expected a Parent"),
        (DoReMi, {"reference": REFERENCE, "smoothing": 2}, "DoReMi.smoothing is 2"),
        (RB, {"sharpness": 0.0}, "RB.sharpness is 0.0"),
        (RB, {"over": "first"}, "RB.over is 'first'; expected one of all, last"),
        (SkillIt, {"skills": ((1.0,), (0.0, 1.0))}, "SkillIt.skills is .*a square of numbers"),
        (SkillIt, {"skills": ((-1.0,),)}, "SkillIt.skills is .*>= 0"),
        (SkillIt, {"window": True}, "SkillIt.window is True"),
    ],
)
def test_bad_fields_are_refused_in_words(kind: Any, fields: dict, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        kind(**fields)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Aioli(rounds=40), "Steps of a round of Aioli is 25; expected 27 or more"),
        (Aioli(one_hot=0.2), r"Aioli.one_hot is 0.2; expected a weight in \(1 / 4, 1\]"),
        (SkillIt(skills=((1.0,),)), "Rows of SkillIt.skills is .*expected 4"),
        (DoGE(target=Mixture({"e": 1})), "'e', which is not in"),
    ],
)
def test_policies_that_do_not_fit_the_run_are_refused_before_it(policy: Any, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        Steering(spec_of(policy))


def test_the_table_of_laws_names_the_policies_it_reads() -> None:
    named = {row.policy for row in LAWS if row.policy}
    assert named == set(MINE) and named <= set(POLICIES)
    with pytest.raises(SpecError, match="mixing law is 'dga'"):
        laws("dga", [])


# Steps on the simplex -----------------------------------------------------------------------------


@given(
    weights_K=st.lists(st.floats(1e-6, 1.0), min_size=2, max_size=6),
    floor=st.floats(0.0, 1.0),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_floor_and_ascent_stay_on_the_simplex(weights_K: list, floor: float, seed: int) -> None:
    start_K = np.array(weights_K)
    score_K = 50 * np.random.default_rng(seed).standard_normal(len(start_K))
    moved_K = ascend(start_K, score_K, 10.0)
    assert moved_K.sum() == pytest.approx(1.0) and np.isfinite(moved_K).all()
    kept_K = floored(moved_K, floor)
    assert kept_K.sum() == pytest.approx(1.0) and kept_K.min() >= floor / len(start_K) - 1e-12
    above = kept_K > floor / len(start_K) + 1e-9  # in proportion, as the nearest in KL are
    if above.sum() > 1:
        ratio = kept_K[above] / moved_K[above]
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


def test_ascent_adds_up_and_ignores_what_all_scores_share() -> None:
    start_K, score_K = np.array([0.5, 0.3, 0.2]), np.array([1.0, -1.0, 0.5])
    twice_K = ascend(ascend(start_K, score_K, 0.7), score_K, 0.3)
    np.testing.assert_allclose(ascend(start_K, score_K + 100.0, 1.0), twice_K)
    np.testing.assert_allclose(ascend(start_K, score_K, 0.0), start_K)
    np.testing.assert_allclose(blend(start_K, twice_K, 0.0), start_K)


def test_scales_do_not_divide_by_zero() -> None:
    vectors_NF = np.array([[3.0, 4.0], [0.0, 0.0], [-1.0, 0.0]])
    cosines_NN = scores(vectors_NF @ vectors_NF.T, cosine=True)
    np.testing.assert_allclose(cosines_NN, [[1, 0, -0.6], [0, 0, 0], [-0.6, 0, 1]])
    assert normalised(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]
    assert running_scale(None, np.array([1.0, 3.0])) == 1.0
    assert running_scale(1.0, np.array([1.0, 5.0]), keep=0.5) == 1.5


def test_scores_without_contrast_are_named(caplog) -> None:
    assert tells_apart(np.array([1.0, 1.1]), "x", 1)
    assert not tells_apart(np.array([1.0, 1.0]), "x", 20)
    assert not tells_apart(np.array([1.0, np.nan]), "y", 30)
    assert "x at step 20: the signal is equal for all domains; the weights stay." in caplog.text
    assert "y at step 30: the signal is not finite" in caplog.text


def test_probes_are_what_the_policies_say() -> None:
    first = Steering(spec_of(Aioli(part="second", sequences=5))).signal
    assert first == Losses(
        probes=tuple(Probe(target=d, part="second", sequences=5) for d in DOMAINS)
    )


# The study ----------------------------------------------------------------------------------------


def test_a_study_trains_every_method_and_tells_what_it_cost(tiny_corpus, tmp_path) -> None:
    shape = ModelShape(
        layers=1, width=16, heads=1, ffn_width=32, vocab_size=tiny_corpus.vocab_size, context=32
    )
    short: dict[str, Any] = {"every_steps": 8, "sequences": 4}
    study = MixingStudy(
        template=TrainSpec(
            corpus=tiny_corpus.fingerprint,
            model=shape,
            schedule=Schedule.constant(Mixture.uniform(tiny_corpus.domains), 32 * 4 * 32),
            optimizer=Optimizer(lr=5e-3, batch_sequences=4),
            evaluation=Evaluation(points=1, sequences=8, part="second"),
        ),
        sizes=tiny_corpus.tokens,
        online={
            "Aioli": Aioli(rounds=2, learn_share=0.5, learn_rounds=1, sequences=4),
            "DoGE": DoGE(**short),
            "Skill-It": SkillIt(learn_steps=1, **short),
            "R&B": RB(**short),
        },
        doremi=short,
        short_runs=8,
    )
    store = rayx.open(tmp_path / "store", create=True)

    def train(specs: Sequence[TrainSpec]) -> None:
        reference = study.first_arms()["uniform"]
        keep = {reference.run_id: [reference.steps]}
        known = store.status()
        new = [spec for spec in dict.fromkeys(specs) if spec.run_id not in known]
        new.sort(key=lambda spec: (spec.pack_key, len(spec.parents)))  # a reference comes first
        for _, group in groupby(new, key=lambda spec: (spec.pack_key, len(spec.parents))):
            for record in train_pack([*group], tiny_corpus, store=store, keep=keep):
                assert record.failure is None
                store.put(record)

    train(study.specs())
    arms = study.arms(store)
    train([*arms.values()])
    found = study.table(store)
    table = found.set_index("arm")
    assert table.loc["uniform", ["perplexity_less_uniform", "bpb_less_uniform"]].tolist() == [0, 0]
    np.testing.assert_allclose(table.filter(like="weight/").sum(axis=1), 1.0, atol=1e-5)
    cost = table["cost"]
    assert cost["uniform"] == cost["proportional"] == 1.0
    assert cost["random search"] == cost["DML"] == 2.0  # 8 runs of an eighth, then one in full
    assert 1.0 < cost["R&B"] < cost["DoGE"] and 2.0 < cost["DoReMi"] < 3.0
    assert cost["DoGE, averaged"] == cost["DoGE"] + 1.0
    steered = store.get(arms["DoGE"].run_id).mixture
    averaged = arms["DoGE, averaged"].mixture
    assert averaged == steered != Mixture.uniform(tiny_corpus.domains)
    # A drawn mixture is judged on the half that policies read, arms on the other.
    assert {spec.evaluation.part for spec in study.short()} == {"first"}
    rows = summary(pd.concat([found.assign(group="3", seed=s) for s in (0, 1)]))
    assert rows["seeds"].eq(2).all() and rows["wins"].isin([0, 2]).all()

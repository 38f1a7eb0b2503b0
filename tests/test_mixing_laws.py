"""Mixing laws: planted ones are recovered, each policy takes the step of its own, and the study."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import pytest

import rayx
from rayx import Evaluation, ModelShape, Optimizer
from rayx.fit.scores import spearman
from rayx.methods.aioli import MixingStudy, laws, summary
from rayx.mixture import Mixture, Schedule
from rayx.policies.aioli import Aioli, law, smoothed_one_hots
from rayx.policies.doge import DoGE
from rayx.policies.mirror import ascend
from rayx.policies.rb import RB
from rayx.policies.skill_it import SkillIt
from rayx.proxy import train_pack
from rayx.spec import TrainSpec
from rayx.steering import Steering
from tests.policy_world import (
    DOMAINS,
    EXAMPLES,
    STEPS,
    World,
    one_best,
    planted,
    spec_of,
    steer,
    weights,
)

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

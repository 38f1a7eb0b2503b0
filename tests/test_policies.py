"""What every policy keeps: mixtures above the floor, replay, refusals in words, flat signals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.errors import SpecError
from rayx.methods.aioli import LAWS, laws
from rayx.mixture import Mixture
from rayx.policies import POLICIES
from rayx.policies.aioli import Aioli, normalised
from rayx.policies.doge import DoGE
from rayx.policies.doremi import DoReMi
from rayx.policies.mirror import ascend, blend, floored, running_scale, scores, tells_apart
from rayx.policies.rb import RB
from rayx.policies.skill_it import SkillIt
from rayx.policy import (
    Losses,
    Probe,
    policy_from_json,
    policy_to_json,
)
from rayx.steering import Steering
from tests.policy_world import (
    DOMAINS,
    EVERY,
    EXAMPLES,
    MINE,
    REFERENCE,
    World,
    planted,
    spec_of,
    steer,
    weights,
)

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

"""Merged candidates as specs: what decides them, what they stand for, what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.branching import make_branch, make_trunk
from rayx.errors import SpecError
from rayx.merging import Experts, MergeSpec, Operator, spec_from_json
from rayx.mixture import Mixture, Phase, Schedule
from rayx.record import Record
from rayx.spec import Evaluation, Parent, Precision, TrainSpec
from tests.samples import SPEC, record

DOMAINS = ("code", "math", "web")
TRUNK = make_trunk(SPEC, Mixture.uniform(DOMAINS), 8_192)


def experts(general_share: float = 0.5, tokens: int = 8_192) -> Experts:
    """One expert a domain: `general_share` uniform, the rest its own domain."""
    runs = []
    for domain in DOMAINS:
        own = {d: general_share / 3 + (1 - general_share) * (d == domain) for d in DOMAINS}
        runs.append(make_branch(TRUNK, 8_192, (Phase(Mixture(own), tokens),), decay_share=0.3))
    return Experts.of(runs)


EXPERTS = experts()
MERGED = EXPERTS.merge((0.2, 0.3, 0.5))
simplex = st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3).map(
    lambda w: tuple(x / sum(w) for x in w)
)


@pytest.mark.parametrize(
    "other",
    [
        EXPERTS.merge((0.3, 0.2, 0.5)),
        EXPERTS.merge((0.2, 0.3, 0.5), Operator(name="task_arithmetic")),
        EXPERTS.merge((0.2, 0.3, 0.5), evaluation=Evaluation(points=1, sequences=9)),
        EXPERTS.merge((0.2, 0.3, 0.5), evaluation=Evaluation(points=1, sequences=8, part="second")),
        Experts(EXPERTS.members[::-1]).merge((0.2, 0.3, 0.5)),
        Experts((Parent(EXPERTS.members[0].spec, 3), *EXPERTS.members[1:])).merge((0.2, 0.3, 0.5)),
        experts(0.25).merge((0.2, 0.3, 0.5)),
        experts(tokens=9_000).merge((0.2, 0.3, 0.5)),
    ],
)
def test_whatever_decides_the_result_decides_the_run_id(other):
    assert other != MERGED and other.run_id != MERGED.run_id
    assert spec_from_json(json.loads(json.dumps(other.to_json()))) == other


def test_operators_that_differ_in_one_field_are_other_candidates():
    ties = Operator(name="ties", density=0.2)
    changes = {"name": "pcb", "density": 0.3, "scale": 1.1, "seed": 1}
    assert set(changes) == {f.name for f in dataclasses.fields(Operator)}
    ids = [EXPERTS.merge((1, 1, 1), ties).run_id]
    for name, value in changes.items():
        changed = dataclasses.replace(ties, **{name: value})
        ids.append(EXPERTS.merge((1, 1, 1), changed).run_id)
    assert len(set(ids)) == len(ids)


def test_an_operator_is_told_apart_by_what_is_not_usual():
    texts = [
        Operator(),
        Operator(name="ties", density=0.2),
        Operator(name="pcb", density=1, scale=2),
    ]
    assert list(map(str, texts)) == ["linear", "ties(density=0.2)", "pcb(density=1, scale=2)"]
    assert EXPERTS.merge((1, 1, 1), texts[1]).columns()["operator"] == "ties(density=0.2)"


def test_candidates_that_need_the_base_are_packed_apart_from_those_that_do_not():
    # A trial loads the experts once for its pack, with or without their base.
    ties = EXPERTS.merge((1, 1, 1), Operator(name="ties", density=0.2))
    edited = EXPERTS.merge((1, 1, 1), Operator(name="task_arithmetic"))
    assert ties.pack_key == edited.pack_key != MERGED.pack_key
    assert MERGED.pack_key == EXPERTS.merge((0.3, 0.2, 0.5)).pack_key


def test_specs_records_and_pickles_come_back_equal():
    again = spec_from_json(json.loads(json.dumps(MERGED.to_json())))
    assert again == MERGED and again.run_id == MERGED.run_id and hash(again) == hash(MERGED)
    assert pickle.loads(pickle.dumps(MERGED)) == MERGED
    assert spec_from_json(SPEC.to_json()) == SPEC
    whole = record(MERGED)
    back = Record.from_json(json.loads(json.dumps(whole.to_json())))
    assert back == whole and isinstance(back.spec, MergeSpec)
    assert back.run_row()["kind"] == "merge"


def test_a_candidate_stands_for_the_mixture_of_its_experts_own_mixtures():
    # Half general, half own: weights (.2, .3, .5) are not the mixture.
    assert dict(MERGED.mixture) == pytest.approx(
        {"code": 1 / 6 + 0.1, "math": 1 / 6 + 0.15, "web": 1 / 6 + 0.25}, abs=2e-6
    )
    row = MERGED.columns()
    assert row["weight/web"] == pytest.approx(1 / 6 + 0.25, abs=2e-6)
    assert (row["tokens"], row["trunk_tokens"]) == (
        EXPERTS.members[0].spec.tokens,
        EXPERTS.members[0].spec.trunk_tokens,
    )
    # An edited model's weights need not sum to 1; the mixture does.
    edited = EXPERTS.merge((0.4, 0.6, 1.0), Operator(name="task_arithmetic"))
    assert edited.mixture == MERGED.mixture


@settings(max_examples=60, deadline=None)
@given(simplex, st.sampled_from([0.0, 0.25, 0.5]))
def test_weights_for_is_the_inverse_of_mixture(weights, general_share):
    these = experts(general_share)
    found = these.weights_for(these.merge(weights).mixture)
    # A mixture is in millionths; the way back divides by the own share.
    assert found == pytest.approx(weights, abs=1e-5)
    assert sum(found) == pytest.approx(1.0, abs=1e-8)


@settings(max_examples=60, deadline=None)
@given(simplex)
def test_mixtures_outside_the_hull_are_refused_and_inside_are_met(share):
    mixture = Mixture(dict(zip(DOMAINS, share, strict=True)))
    inside = min(mixture.to_array(DOMAINS)) >= 1 / 6  # of experts that are half general
    if inside:
        assert EXPERTS.merge(EXPERTS.weights_for(mixture)).mixture.to_array(
            DOMAINS
        ) == pytest.approx(mixture.to_array(DOMAINS), abs=1e-4)
    elif min(mixture.to_array(DOMAINS)) < 1 / 6 - 1e-4:
        with pytest.raises(SpecError, match=r"inside the hull.*\(L1\) outside"):
            EXPERTS.weights_for(mixture)


def test_overlapping_experts_still_map_back_to_their_mixture():
    # Four experts over three domains: weights are not unique, the mixture is.
    extra = make_branch(TRUNK, 8_192, (Phase(Mixture.uniform(DOMAINS), 8_192),), decay_share=0.3)
    four = Experts.of([*(m.spec for m in EXPERTS.members), extra])
    wanted = Mixture({"code": 0.3, "math": 0.3, "web": 0.4})
    found = four.merge(four.weights_for(wanted)).mixture
    assert np.abs(found.to_array(DOMAINS) - wanted.to_array(DOMAINS)).max() < 1e-5


def test_the_base_is_the_state_that_all_experts_branch_from():
    assert EXPERTS.base == EXPERTS.members[0].spec.parent
    other = make_trunk(SPEC, Mixture.uniform(DOMAINS), 9_000)
    stray = make_branch(other, 9_000, (Phase(Mixture({"web": 1}), 8_192),), decay_share=0.3)
    mixed = Experts((*EXPERTS.members, Parent(stray, stray.steps)))
    assert mixed.base is None
    mixed.merge((0.25,) * 4)
    with pytest.raises(SpecError, match="base of task_arithmetic is None.*all experts start from"):
        mixed.merge((0.25,) * 4, Operator(name="task_arithmetic"))
    arithmetic = EXPERTS.merge((1, 1, 1), Operator(name="task_arithmetic"))
    assert arithmetic.parents == (*EXPERTS.members, EXPERTS.base)
    assert MERGED.parents == EXPERTS.members


def cyclic() -> dict:
    data = json.loads(json.dumps(MERGED.to_json()))
    data["experts"][0]["spec"] = data
    return data


def other_expert(**changes) -> tuple[Parent, ...]:
    spec = dataclasses.replace(SPEC, **changes)
    return (*EXPERTS.members, Parent(spec, spec.steps))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EXPERTS.merge((0.5, 0.5)), "number of MergeSpec.weights is 2.*of the 3 experts"),
        (lambda: EXPERTS.merge((0.5, 0.5, 0.5)), r"sum of linear merge weights is 1.5.*never norm"),
        (lambda: EXPERTS.merge((0.0, 0.0, 0.0)), "merge weights is .*at least one that is not 0"),
        (lambda: EXPERTS.merge((float("nan"), 0.5, 0.5)), "merge weight is nan.*finite"),
        (lambda: EXPERTS.merge(("1", 0, 0)), "merge weight is '1'.*finite number"),
        (lambda: EXPERTS.merge((1.5, -0.5, 0.0)), "weight of linear is -0.5.*only task_arithmetic"),
        (
            lambda: EXPERTS.merge((1.5, -0.5, 0.0), Operator(name="task_arithmetic")),
            "stands for a mixture",
        ),
        (lambda: EXPERTS.merge((1, 2, 1), Operator(name="soup")), "weights of a soup.*equal"),
        (lambda: EXPERTS.merge((1, 1, 1), Operator(name="slerp")), "experts of slerp is 3.*2; mul"),
        (lambda: Operator(name="linaer"), "'linaer' is unknown.*Did you mean 'linear'"),
        (lambda: Operator(name="ties"), r"density of ties is None.*in \(0, 1\]"),
        (lambda: Operator(name="ties", density=1.5), "density of ties is 1.5"),
        (lambda: Operator(name="linear", density=0.5), "density of linear is 0.5.*None"),
        (lambda: Operator(name="linear", scale=2.0), "scale of linear is 2.0.*no task vector"),
        (lambda: Operator(name="ties", density=1, scale=0), "scale is 0.*> 0"),
        (lambda: Operator(seed=-1), "seed is -1"),
        (lambda: Experts(()), "at least one Parent"),
        (lambda: Experts([EXPERTS.members[0]]), "a tuple"),
        (lambda: Experts((SPEC,)), "member of Experts is .*a Parent"),
        (lambda: Experts(EXPERTS.members[:1] * 2), "each state once"),
        (lambda: Experts(other_expert(corpus="decaf")), "corpus of expert .* is 'decaf'.*'c0ffee'"),
        (
            lambda: Experts(other_expert(model=dataclasses.replace(SPEC.model, vocab_size=2048))),
            "model of expert .*vocab_size=2048.*vocab_size=1024",
        ),
        (lambda: Experts(other_expert(precision=Precision.BFLOAT16)), "precision of expert"),
        (
            lambda: EXPERTS.merge((1, 0, 0), evaluation=Evaluation(points=2)),
            "evaluation.points is 2; expected 1",
        ),
        (lambda: Evaluation(part="third"), "part is 'third'; expected one of all, first, second"),
        (lambda: Parent(MERGED, 1), "Parent.spec is MergeSpec.*a TrainSpec"),
        (lambda: EXPERTS.weights_for(Mixture({"wbe": 1})), "'wbe'.*Did you mean 'web'"),
        (lambda: spec_from_json({"kind": "merged"}), "kind 'merged'; expected one of train, merge"),
        (lambda: spec_from_json([]), r"it is \[\], not an object"),
        (lambda: spec_from_json({"kind": []}), r"kind \[\]"),
        (lambda: spec_from_json({"kind": "merge"}), "cannot be read: KeyError"),
        (lambda: spec_from_json({**MERGED.to_json(), "extra": 1}), r"fields \['extra'\]"),
        (lambda: spec_from_json(cyclic()), "cannot be read.*[Cc]ircular"),
    ],
)
def test_bad_input_is_named(make, said):
    with pytest.raises(SpecError, match=f"(?s){said}"):
        make()


def test_weights_are_kept_to_nine_decimals_so_that_records_come_back_equal():
    thirds = EXPERTS.merge((1 / 3, 1 / 3, 1 / 3))
    assert spec_from_json(json.loads(json.dumps(thirds.to_json()))) == thirds
    assert thirds.run_id == EXPERTS.merge((0.3333333331, 1 / 3, 1 / 3)).run_id


def test_a_trained_run_can_be_evaluated_again_elsewhere_as_a_merge_of_one():
    run = TrainSpec.from_json(SPEC.to_json())
    again = Experts.of([run]).merge((1.0,), evaluation=Evaluation(points=1, part="second"))
    assert again.mixture == Schedule.average(run.schedule) and again.tokens == run.tokens

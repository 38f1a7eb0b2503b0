"""Mixtures and schedules: exact sums, one identity for one ratio, errors that say what to do."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.errors import SpecError
from rayx.mixture import WHOLE, Mixture, Phase, Schedule, epochs, largest_remainder

relaxed = settings(deadline=None)  # the machine is shared
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
weights = st.dictionaries(
    names, st.floats(0, 1e6, allow_subnormal=False) | st.integers(0, 10**9), min_size=1, max_size=30
).filter(lambda w: sum(w.values()) > 1e-9)


@relaxed
@given(weights)
def test_weights_add_up_to_exactly_one_million(given_weights):
    mixture = Mixture(given_weights)
    assert sum(mixture.millionths.values()) == WHOLE
    assert all(n > 0 for n in mixture.millionths.values())


@relaxed
@given(weights)
def test_rounding_is_within_one_millionth_of_the_ratio(given_weights):
    mixture = Mixture(given_weights)
    total = math.fsum(given_weights.values())
    for domain, weight in given_weights.items():
        assert abs(mixture.get(domain, 0.0) - weight / total) < 1.0001e-6


@relaxed
@given(weights, st.sampled_from([3.7, 1 / 3, 1e-12, 1e12, 1e-280, 1e280, math.pi]))
def test_same_ratio_in_another_unit_is_the_same_mixture(given_weights, unit):
    scaled = {d: w * unit for d, w in given_weights.items()}
    assert Mixture(scaled) == Mixture(given_weights)
    assert hash(Mixture(scaled)) == hash(Mixture(given_weights))


@pytest.mark.parametrize("unit", [1e-300, 1e-307, 1e300, 1e307])
def test_extreme_units_neither_overflow_nor_vanish(unit):
    assert Mixture({"a": 7 * unit, "b": 3 * unit}) == Mixture({"a": 0.7, "b": 0.3})


@relaxed
@given(weights, st.randoms())
def test_order_does_not_count(given_weights, random):
    items = list(given_weights.items())
    random.shuffle(items)
    assert Mixture(dict(items)) == Mixture(given_weights)
    assert list(Mixture(dict(items))) == sorted(Mixture(given_weights))


@relaxed
@given(weights)
def test_a_mixture_of_a_mixture_is_itself(given_weights):
    mixture = Mixture(given_weights)
    assert Mixture(mixture) == Mixture(mixture.millionths) == mixture
    assert Mixture(json.loads(json.dumps(mixture.millionths))) == mixture
    assert pickle.loads(pickle.dumps(mixture)) == copy.deepcopy(mixture) == mixture


@relaxed
@given(weights)
def test_array_round_trip(given_weights):
    mixture = Mixture(given_weights)
    domains = list(given_weights)[::-1]
    assert Mixture.from_array(mixture.to_array(domains), domains) == mixture
    assert mixture.to_array(domains).sum() == pytest.approx(1, abs=1e-12)


def test_domains_of_weight_zero_are_left_out():
    assert Mixture({"a": 1, "b": 0}) == Mixture({"a": 5})
    assert "b" not in Mixture({"a": 1, "b": 0})
    assert Mixture({"a": 1, "b": 1e-9}).millionths == {"a": WHOLE}


def test_mixture_reads_as_a_mapping_of_shares():
    mixture = Mixture({"web": np.float32(7), "code": np.int64(3)})  # type: ignore[dict-item]
    assert dict(mixture) == {"code": 0.3, "web": 0.7}
    assert len(mixture) == 2 and mixture["web"] == 0.7 and mixture.get("math") is None
    assert eval(repr(mixture)) == mixture
    assert mixture != {"code": 0.3, "web": 0.7} and mixture != Mixture({"web": 1})


def test_uniform_thirds_still_add_up():
    parts = Mixture.uniform(["c", "a", "b"]).millionths
    assert parts == {"a": 333_334, "b": 333_333, "c": 333_333}


@relaxed
@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=50), st.integers(0, 10**6))
def test_largest_remainder_adds_up_and_stays_within_one_of_the_quota(values, total):
    weights_K = np.array(values)
    if weights_K.sum() < 1e-6:
        return
    parts_K = largest_remainder(weights_K, total)
    assert parts_K.sum() == total and (parts_K >= 0).all()
    assert (np.abs(parts_K - weights_K / weights_K.sum() * total) < 1 + 1e-5).all()


@pytest.mark.parametrize(
    ("given_weights", "words"),
    [
        ({}, ["no domains", "{'web': 1}"]),
        ({"": 1}, ["domain name ''", "non-empty"]),
        ({3: 1}, ["domain name 3", "string"]),
        ({"a": -1}, ["'a'", "-1", ">= 0"]),
        ({"a": math.nan, "b": 1}, ["'a'", "nan", "finite"]),
        ({"a": math.inf}, ["'a'", "inf", "finite"]),
        ({"a": 10**400}, ["'a'", "finite"]),
        ({"a": "7"}, ["'a'", "'7'", "number"]),
        ({"a": True}, ["'a'", "True", "number"]),
        ({"a": None}, ["'a'", "None", "number"]),
        ({"a": 1j}, ["'a'", "number"]),
        ({"a": 0, "b": 0.0}, ["all zero", "['a', 'b']"]),
        (["web", "code"], ["['web', 'code']", "{'web': 1}"]),
        (0.7, ["0.7", "{'web': 1}"]),
    ],
)
def test_bad_weights_are_refused_in_words(given_weights, words):
    with pytest.raises(SpecError) as error:
        Mixture(given_weights)
    for word in words:
        assert word in str(error.value)


def test_unknown_domain_is_named_with_the_nearest_known_one():
    with pytest.raises(SpecError, match=r"'cod'.*corpus 'tiny' \(web, code\).*mean 'code'\?"):
        Mixture({"cod": 1}).check(["web", "code"], where="corpus 'tiny'")
    with pytest.raises(SpecError, match="'cod'"):
        Mixture({"cod": 1}).to_array(["web", "code"])


def test_array_of_another_length_is_refused():
    with pytest.raises(SpecError, match="3 weights for 2 domains"):
        Mixture.from_array(np.ones(3), ["a", "b"])


# Schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, -5, 1.5, True, None, "100"])
def test_phase_needs_a_whole_number_of_tokens(tokens):
    with pytest.raises(SpecError, match=r"Phase has .* tokens; expected an integer > 0"):
        Phase(Mixture({"a": 1}), tokens)


def test_phase_needs_a_mixture():
    with pytest.raises(SpecError, match=r"Phase.*\{'a': 1\}.*Mixture"):
        Phase({"a": 1}, 100)  # type: ignore[arg-type]


def test_schedule_needs_phases():
    with pytest.raises(SpecError, match="no phases"):
        Schedule(())
    with pytest.raises(SpecError, match="Phase"):
        Schedule((Mixture({"a": 1}),))  # type: ignore[arg-type]


def test_schedule_of_a_list_is_that_of_a_tuple():
    phases = [Phase(Mixture({"a": 1}), 100), Phase(Mixture({"b": 1}), 50)]
    assert Schedule(phases) == Schedule(tuple(phases))  # type: ignore[arg-type]
    assert hash(Schedule(phases)) == hash(Schedule(tuple(phases)))  # type: ignore[arg-type]


@relaxed
@given(st.lists(st.tuples(weights, st.integers(1, 10**13)), min_size=1, max_size=5))
def test_schedule_round_trips_through_json(phases):
    schedule = Schedule(tuple(Phase(Mixture(w), n) for w, n in phases))
    assert Schedule.from_json(json.loads(json.dumps(schedule.to_json()))) == schedule
    assert schedule.tokens == sum(n for _, n in phases)
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_average_weighs_phases_by_their_tokens():
    a, b = Mixture({"a": 1}), Mixture({"a": 1, "b": 1})
    assert Schedule((Phase(a, 300), Phase(b, 100))).average() == Mixture({"a": 7, "b": 1})
    assert Schedule.constant(b, 10**13).average() == b


def test_epochs_count_passes_over_the_supply():
    assert epochs(Mixture({"a": 3, "b": 1}), 1000, {"a": 250, "b": 1000, "c": 5}) == {
        "a": 3.0,
        "b": 0.25,
    }

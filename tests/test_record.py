"""Records: JSON round trips, what a failure looks like, and the rows made of them."""

import copy
import dataclasses
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.errors import SpecError
from rayx.record import CurvePoint, Failure, Loss, Record
from tests.samples import SPEC, record, train_spec, two_phases

numbers = st.floats(allow_nan=False, allow_infinity=False)
counts = st.integers(0, 2**63 - 1)  # what a column of a table can hold
losses = st.dictionaries(
    st.text(min_size=1, max_size=5), st.builds(Loss, numbers, numbers, numbers)
)
records = st.builds(
    lambda curve, seconds, text, failure: dataclasses.replace(
        record(), curve=tuple(curve), seconds=seconds, device=text, failure=failure
    ),
    st.lists(st.builds(CurvePoint, counts, counts, losses), max_size=4),
    numbers,
    st.text(),
    st.none() | st.builds(Failure, type=st.text(), message=st.text(), traceback=st.text()),
)


@settings(deadline=None)
@given(records)
def test_record_round_trips(given_record):
    data = json.loads(json.dumps(given_record.to_json(), allow_nan=False))
    assert Record.from_json(data) == given_record
    assert pickle.loads(pickle.dumps(given_record)) == copy.deepcopy(given_record) == given_record


def test_json_holds_every_field_and_says_what_it_is():
    data = record().to_json()
    assert set(data) == {f.name for f in dataclasses.fields(Record)} | {"format", "run_id"}
    assert data["run_id"] == SPEC.run_id and data["format"] == 1


def test_result_is_the_last_evaluation():
    run = record(loss=2.0)
    assert run.status == "ok" and run.losses == {"web": Loss(2.0, 1.0, 0.01)}
    assert run.run_id == SPEC.run_id


def test_failed_run_has_no_result_even_with_a_curve():
    failed = dataclasses.replace(record(), failure=Failure(type="OSError", message="disk"))
    assert failed.status == "failed" and failed.losses == {}
    assert failed.run_row()["failure"] == "disk"
    assert not [column for column in failed.run_row() if column.startswith("loss/")]
    assert record(failed=True).losses == {}


def test_row_tells_the_spec_the_cost_and_the_result():
    row = record(train_spec(seed=3)).run_row()
    assert row["status"] == "ok" and row["failure"] is None and row["seed"] == 3
    assert (row["weight/web"], row["weight/code"]) == (0.7, 0.3)
    assert (row["loss/web"], row["loss_nats/web"], row["stderr/web"]) == (1.0, 2.0, 0.01)
    assert row["params"] == SPEC.model.params and row["tokens"] == SPEC.tokens
    assert row["flops"] == SPEC.flops


def test_row_of_a_schedule_shows_the_average_of_its_phases():
    row = record(train_spec(schedule=two_phases())).run_row()
    assert row["phases"] == 2 and row["weight/web"] == row["weight/math"] == 0.5


def test_curve_rows_are_one_per_point_and_target():
    assert [(r["step"], r["target"], r["loss_bpb"]) for r in record().eval_rows()] == [
        (16, "web", 2.0),
        (32, "web", 1.0),
    ]
    assert record(failed=True).eval_rows() == []


OPTIONAL = {"decisions", "signal_seconds", "signal_flops"}  # not in records of before policies


@pytest.mark.parametrize("name", sorted({f.name for f in dataclasses.fields(Record)} - OPTIONAL))
def test_record_without_a_field_is_refused(name):
    data = record().to_json()
    del data[name]
    with pytest.raises(SpecError, match=name):
        Record.from_json(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format=2), "format 2; this rayx reads 1"),
        (lambda d: d.pop("format"), "format None"),
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d["curve"][0].pop("step"), "step"),
        (lambda d: d["curve"][0]["losses"]["web"].pop("bpb"), "bpb"),
        (lambda d: d["curve"][0].update(losses=[1.0]), "cannot be read"),
        (lambda d: d.update(curve=3), "cannot be read"),
        (lambda d: d.update(failure="it broke"), "cannot be read"),
        (lambda d: d["spec"]["optimizer"].update(lr=-1), "Optimizer.lr"),
        (lambda d: d["spec"].pop("corpus"), "corpus"),
    ],
)
def test_broken_record_is_refused_in_words(change, words):
    data = record().to_json()
    change(data)
    with pytest.raises(SpecError, match=words):
        Record.from_json(data)


@pytest.mark.parametrize("data", [None, [], "record", 3])
def test_json_of_another_kind_is_refused(data):
    with pytest.raises(SpecError, match="cannot be read"):
        Record.from_json(data)

"""Specs: the run_id differs exactly where specs differ, and what is refused is said in words."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.distillation import Distillation
from rayx.errors import SpecError
from rayx.mixture import Mixture, Phase, Schedule
from rayx.policies import DGA
from rayx.policy import Probe
from rayx.spec import LrSchedule, ModelShape, Optimizer, Parent, Precision, TrainSpec
from tests.samples import SPEC, train_spec, two_phases

replace = dataclasses.replace
CHANGES: dict[str, Any] = {  # every field, and a valid value other than that of SPEC
    "corpus": "decaf",
    "model.layers": 3,
    "model.width": 128,
    "model.heads": 2,
    "model.ffn_width": 161,
    "model.vocab_size": 1025,
    "model.context": 64,
    "model.tied_embeddings": False,
    "schedule.phases": two_phases().phases,
    "optimizer.lr": 0.0030000000000000005,
    "optimizer.batch_sequences": 8,
    "optimizer.lr_schedule": LrSchedule.COSINE,
    "optimizer.warmup_share": 0.1,
    "optimizer.decay_share": 0.3,
    "optimizer.min_lr_share": 0.1,
    "optimizer.weight_decay": 0.0,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.99,
    "optimizer.eps": 1e-8,
    "optimizer.clip_norm": 0.5,
    "seed": 1,
    "data_seed": 1,
    "evaluation.points": 3,
    "evaluation.sequences": 9,
    "evaluation.part": "first",
    "precision": Precision.BFLOAT16,
    "parent": Parent(train_spec(1, 1), 16),
    "policy": DGA(specific=(Probe(target="web", part="train"),)),
    "distillation": Distillation(teacher=Parent(train_spec(1, 1), 16)),
}


def field_paths(value: Any, prefix: str = "") -> list[str]:
    """Dotted names of all fields, down through nested dataclasses."""
    paths = []
    for f in dataclasses.fields(value):
        inner = getattr(value, f.name)
        if dataclasses.is_dataclass(inner):
            paths += field_paths(inner, f"{prefix}{f.name}.")
        else:
            paths.append(prefix + f.name)
    return paths


def changed(path: str, value: Any) -> TrainSpec:
    outer, _, inner = path.partition(".")
    if inner:
        value = replace(getattr(SPEC, outer), **{inner: value})
    return replace(SPEC, **{outer: value})


def test_every_field_has_a_change_to_test():
    assert set(field_paths(SPEC)) == set(CHANGES), "give each new field of a spec a line in CHANGES"


@pytest.mark.parametrize("path", field_paths(SPEC))
def test_each_field_decides_the_run_id(path):
    other = changed(path, CHANGES[path])
    assert other != SPEC
    assert other.run_id != SPEC.run_id
    assert TrainSpec.from_json(json.loads(json.dumps(other.to_json()))) == other


def test_all_changes_have_different_run_ids():
    ids = {changed(path, value).run_id for path, value in CHANGES.items()}
    assert len(ids) == len(CHANGES)


def test_run_id_of_a_known_spec_is_pinned():
    # If this fails, every store there is would be run again: raise FORMAT or undo the change.
    assert SPEC.run_id == "4a0fd413e68e"


def test_run_id_is_the_same_in_another_process():
    code = (
        "import json, sys; from rayx.spec import TrainSpec;"
        "print(TrainSpec.from_json(json.load(sys.stdin)).run_id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=json.dumps(SPEC.to_json()),
        capture_output=True,
        text=True,
        env={"PYTHONHASHSEED": "7"},
    )
    assert done.stdout.strip() == SPEC.run_id, done.stderr


specs = st.builds(
    lambda web, code, math, seed, lr, wide, tokens: train_spec(
        schedule=Schedule.constant(Mixture({"web": web, "code": code, "math": math}), tokens),
        seed=seed,
        optimizer=Optimizer(lr=lr, batch_sequences=4),
        model=replace(SPEC.model, ffn_width=wide),
    ),
    st.integers(1, 3),
    st.integers(0, 3),
    st.floats(0, 2),
    st.integers(0, 2),
    st.sampled_from([1, 1.0, 0.1, 0.3, 1e-3]),
    st.integers(1, 2),
    st.sampled_from([16_384, 32_768]),
)


@settings(deadline=None)
@given(specs, specs)
def test_run_ids_differ_exactly_where_specs_differ(a, b):
    assert (a.run_id == b.run_id) == (a == b)


@settings(deadline=None)
@given(specs)
def test_spec_round_trips(spec):
    data = json.loads(json.dumps(spec.to_json(), allow_nan=False))
    assert TrainSpec.from_json(data) == spec
    assert TrainSpec.from_json(dict(reversed(data.items()))).run_id == spec.run_id
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert hash(TrainSpec.from_json(data)) == hash(spec)


@pytest.mark.parametrize("unit", [3.7, 1e-300, 1e300, 1 / 3])
def test_run_id_does_not_depend_on_the_unit_of_weights(unit):
    scaled = Mixture({"code": 3 * unit, "web": 7 * unit})
    assert train_spec(schedule=Schedule.constant(scaled, 16_384)).run_id == SPEC.run_id


def test_run_id_does_not_depend_on_how_a_number_is_written():
    same = Optimizer(lr=0.003, batch_sequences=4, weight_decay=1e-1, clip_norm=1, warmup_share=0.05)
    assert train_spec(optimizer=same).run_id == SPEC.run_id
    zero, negative_zero = (
        train_spec(optimizer=Optimizer(lr=0.003, batch_sequences=4, min_lr_share=z))
        for z in (0.0, -0.0)
    )
    assert zero == negative_zero and zero.run_id == negative_zero.run_id
    named = Optimizer(lr=0.003, batch_sequences=4, lr_schedule="wsd")  # type: ignore[arg-type]
    assert train_spec(optimizer=named).run_id == SPEC.run_id


# What follows from a spec ---------------------------------------------------------------------


def test_parameters_are_counted_matrix_by_matrix():
    shape = ModelShape(layers=2, width=8, heads=2, ffn_width=16, vocab_size=100, context=32)
    attention, feed_forward, norms = 4 * 8 * 8, 3 * 8 * 16, 2 * 8
    blocks = 2 * (attention + feed_forward + norms) + 8
    assert shape.params == blocks + 800
    assert replace(shape, tied_embeddings=False).params == blocks + 1600
    assert shape.matmul_params == replace(shape, tied_embeddings=False).matmul_params


def test_steps_are_whole_batches_and_flops_are_six_n_d():
    assert SPEC.batch_tokens == 512 and SPEC.steps == 32 and SPEC.tokens == 16_384
    spec = train_spec(schedule=Schedule.constant(Mixture({"web": 1}), 16_384 + 300))
    assert spec.steps == 33 and spec.tokens == 33 * 512
    assert spec.flops == 6.0 * spec.model.matmul_params * spec.tokens


def test_runs_that_differ_in_mixture_rate_decay_and_seeds_share_a_pack():
    apart = replace(SPEC.optimizer, lr=0.01, weight_decay=0.0)
    assert train_spec(1, 1, seed=5, data_seed=6, optimizer=apart).pack_key == SPEC.pack_key


@pytest.mark.parametrize(
    "path",
    sorted(
        set(CHANGES)
        - {"seed", "data_seed", "schedule.phases", "optimizer.lr", "optimizer.weight_decay"}
        - {"policy"}
    ),
)
def test_runs_that_differ_otherwise_share_no_pack(path):
    assert changed(path, CHANGES[path]).pack_key != SPEC.pack_key


def test_a_branch_knows_its_whole_path():
    trunk = train_spec(1, 1)  # 32 steps of 512 tokens
    middle = train_spec(schedule=two_phases(), parent=Parent(trunk, 8))
    leaf = train_spec(3, 1, parent=Parent(middle, 24))
    assert leaf.path == (trunk, middle, leaf) and trunk.path == (trunk,)
    assert leaf.trunk_tokens == (8 + 24) * 512 and leaf.parent.path_steps == 32
    read = leaf.domain_tokens  # 8 steps half and half; 16 web, 8 math; 32 steps 3:1
    assert read["math"] == 8 * 512
    assert read["web"] == pytest.approx((4 + 16 + 24) * 512)
    assert sum(read.values()) == pytest.approx(leaf.trunk_tokens + leaf.tokens)
    assert leaf.flops == trunk.flops  # its own tokens alone


def test_branches_share_a_pack_if_they_leave_their_parents_after_as_many_steps():
    twins = [train_spec(parent=Parent(train_spec(1, w), 16)) for w in (1, 2)]
    assert twins[0].pack_key == twins[1].pack_key and twins[0].run_id != twins[1].run_id
    assert train_spec(parent=Parent(train_spec(1, 1), 17)).pack_key != twins[0].pack_key


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("parent", Parent(train_spec(corpus="other"), 4), ["TrainSpec.corpus of a branch", "c0ff"]),
        (
            "parent",
            Parent(train_spec(model=replace(SPEC.model, width=32)), 4),
            ["TrainSpec.model of a branch", "that of its parent"],
        ),
        ("parent", "4a0fd413e68e", ["TrainSpec.parent", "a Parent"]),
        ("corpus", "", ["TrainSpec.corpus", "''", "fingerprint"]),
        ("corpus", 7, ["TrainSpec.corpus", "7", "fingerprint"]),
        ("model", {"layers": 2}, ["TrainSpec.model", "ModelShape"]),
        ("schedule", Mixture({"web": 1}), ["TrainSpec.schedule", "Schedule"]),
        ("optimizer", None, ["TrainSpec.optimizer", "None", "Optimizer"]),
        ("evaluation", 4, ["TrainSpec.evaluation", "4", "Evaluation"]),
        ("precision", "fp8", ["TrainSpec.precision", "'fp8'", "float32", "bfloat16"]),
        ("seed", -1, ["TrainSpec.seed", "-1", "[0, 2^31)"]),
        ("seed", 2**31, ["TrainSpec.seed", "[0, 2^31)"]),
        ("data_seed", 1.0, ["TrainSpec.data_seed", "1.0", "integer"]),
        ("model.layers", 0, ["ModelShape.layers", "0", "> 0"]),
        ("model.width", "64", ["ModelShape.width", "'64'", "integer"]),
        ("model.heads", 3, ["ModelShape.width / heads", "even integer"]),
        ("model.heads", 64, ["ModelShape.width / heads", "1.0", "even"]),
        ("model.vocab_size", True, ["ModelShape.vocab_size", "True"]),
        ("model.tied_embeddings", 1, ["ModelShape.tied_embeddings", "1", "True or False"]),
        ("optimizer.lr", 0, ["Optimizer.lr", "(0, 10]"]),
        ("optimizer.lr", "1e-3", ["Optimizer.lr", "'1e-3'", "number"]),
        ("optimizer.lr", float("nan"), ["Optimizer.lr", "nan"]),
        ("optimizer.lr_schedule", "linear", ["Optimizer.lr_schedule", "'linear'", "wsd", "cosine"]),
        ("optimizer.batch_sequences", 4.0, ["Optimizer.batch_sequences", "4.0", "integer"]),
        ("optimizer.warmup_share", 0.9, ["warmup_share + decay_share", "at most 1"]),
        ("optimizer.decay_share", -0.1, ["Optimizer.decay_share", "-0.1", "[0, 1]"]),
        ("optimizer.beta2", 1, ["Optimizer.beta2", "1.0", "[0, 1)"]),
        ("optimizer.weight_decay", float("inf"), ["Optimizer.weight_decay", "inf", "finite"]),
        ("optimizer.clip_norm", 0, ["Optimizer.clip_norm", "> 0"]),
        ("optimizer.clip_norm", float("inf"), ["Optimizer.clip_norm", "inf", "finite"]),
        ("evaluation.points", 33, ["Evaluation.points", "33", "32 steps"]),
        ("evaluation.sequences", 0, ["Evaluation.sequences", "> 0"]),
        ("schedule.phases", (Phase(Mixture({"a": 1}), 511),), ["511", "512 tokens"]),
    ],
)
def test_bad_field_is_refused_in_words(path, value, words):
    with pytest.raises(SpecError) as error:
        changed(path, value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("path", ["corpus", "schedule", "seed", "evaluation", "kind"])
def test_json_without_a_field_is_refused(path):
    data = SPEC.to_json()
    del data[path]
    with pytest.raises(SpecError, match=path):
        TrainSpec.from_json(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(kind="merge"), "'merge'"),
        (lambda d: d.update(dropout=0.1), "dropout"),
        (lambda d: d["model"].update(dropout=0.1), "dropout"),
        (lambda d: d["model"].pop("width"), "width"),
        (lambda d: d.update(model=None), "cannot be read"),
        (lambda d: d.update(schedule=[]), "no phases"),
        (lambda d: d.update(schedule=[{"mixture": {"a": -1}, "tokens": 512}]), "'a'"),
        (lambda d: d.update(schedule=[{"mixture": ["a"], "tokens": 512}]), "'a'"),
        (lambda d: d.update(schedule="web"), "cannot be read"),
        (lambda d: d.update(precision="fp8"), "fp8"),
    ],
)
def test_broken_json_is_refused_in_words(change, words):
    data = SPEC.to_json()
    change(data)
    with pytest.raises(SpecError, match=words):
        TrainSpec.from_json(data)


@pytest.mark.parametrize("data", [None, [], "spec", 3])
def test_json_of_another_kind_is_refused(data):
    with pytest.raises(SpecError, match="cannot be read"):
        TrainSpec.from_json(data)

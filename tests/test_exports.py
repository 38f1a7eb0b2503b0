"""Exports, each read back by the rules of its format's own documentation, not by the writer."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import random
import re

import pytest
import yaml
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx import Mixture, Phase, Schedule
from rayx.errors import SpecError
from rayx.exports import FORMATS, Setting, export_plan
from rayx.plan import Plan
from tests.test_cli import run_main

FIRST = Mixture({"web": 70, "code": 29.9999, "math/tex": 0.0001})  # a share of a millionth
SECOND = Mixture({"code": 1, "math/tex": 3})
SUPPLY = {"web": 4_000_000, "code": 500_000, "math/tex": 900_000}
FULL = Setting(batch_tokens=4_096, context=512, seed=7)


def make_plan(branches: bool = False) -> Plan:
    phases = (Phase(FIRST, 1_000_000), Phase(SECOND, 600_000))
    experts = {
        "code": Schedule.constant(Mixture({"code": 1}), 300_000),
        "math/tex": Schedule((Phase(SECOND, 100_000), Phase(Mixture({"math/tex": 1}), 200_000))),
    }
    return Plan(
        schedule=Schedule(phases[:1] if branches else phases),
        branches=experts if branches else {},
        decay_share=0.2 if branches else None,
        epochs={},
        domain_tokens=SUPPLY,
        caps={},
        corpus="c0ffee",
        choice={},
        provenance={},
    )


# Readers: what each trainer does with its file ------------------------------------------------


def read_megatron(text: str) -> dict[str, float]:
    blend = text.split()
    assert len(blend) % 2 == 0
    weights = [float(w) for w in blend[::2]]
    assert all(w > 0 for w in weights)
    return {p: w / sum(weights) for w, p in zip(weights, blend[1::2], strict=True)}


def read_mosaicml(text: str) -> tuple[dict[str, float], int]:
    facts = yaml.safe_load(text)
    streams = facts["streams"]
    for stream in streams:
        assert {"remote", "local"} & stream.keys()
        assert len({"proportion", "repeat", "choose"} & stream.keys()) <= 1
        assert stream.keys() <= {"remote", "local", "split", "proportion", "repeat", "choose"}
    assert len({"proportion" in stream for stream in streams}) == 1
    total = sum(stream["proportion"] for stream in streams)
    shares = {s.get("remote", s.get("local")): s["proportion"] / total for s in streams}
    assert isinstance(facts["epoch_size"], int) and facts["epoch_size"] > 0
    return shares, facts["epoch_size"]


def read_olmo_core(text: str, supply: dict[str, int]) -> tuple[dict[str, float], int]:
    facts = yaml.safe_load(text)
    assert facts.keys() == {"source_list", "requested_tokens", "global_batch_size"}
    assert facts["requested_tokens"] > 0 and facts["global_batch_size"] > 0
    shares = {}
    for source in facts["source_list"]["sources"]:
        ratio, fraction = source["target_ratio"], source["max_source_fraction"]
        assert 0 < ratio <= 1 and 0 < fraction <= 1 and source["max_repetition_ratio"] >= 1
        (path,) = source["paths"]
        most = int(supply[source["source_name"]] * fraction * source["max_repetition_ratio"])
        assert most >= int(facts["requested_tokens"] * ratio), "the trainer would refuse it"
        assert path == f"{source['source_name']}/*.npy"
        shares[source["source_name"]] = ratio
    assert math.isclose(sum(shares.values()), 1.0, rel_tol=1e-5)
    return shares, facts["requested_tokens"]


def read_nanotron(text: str) -> tuple[list[tuple[dict[str, float], int]], int]:
    facts = yaml.safe_load(text)
    stages = facts["data_stages"]
    starts = [stage["start_training_step"] for stage in stages]
    assert starts[0] == 1 and starts == sorted(set(starts)) and starts[-1] <= steps_of(facts)
    assert len({stage["name"] for stage in stages}) == len(stages)
    found = []
    for stage in stages:
        data = stage["data"]["dataset"]
        assert len(data["dataset_folder"]) == len(data["dataset_weights"])
        shares = dict(zip(data["dataset_folder"], data["dataset_weights"], strict=True))
        found.append((shares, stage["start_training_step"]))
    return found, steps_of(facts)


def steps_of(facts: dict) -> int:
    return facts["tokens"]["train_steps"]


def read_torchtitan(text: str) -> list[tuple[dict[str, float], int]]:
    (assigned,) = [n for n in ast.parse(text).body if isinstance(n, ast.Assign)]
    found = []
    for stage in ast.literal_eval(assigned.value):
        names, weights = stage["datasets"], stage["weights"]
        assert len(names) == len(weights) and min(weights) >= 0 and sum(weights) > 0
        shares = {n: w / sum(weights) for n, w in zip(names, weights, strict=True)}
        found.append((shares, stage["steps"]))
    return found


def close(found: dict[str, float], mixture: Mixture) -> bool:
    """Whether shares by path are a mixture's, to its own millionth."""
    wanted = {f"data/{d}": share for d, share in mixture.items()}
    return found.keys() == wanted.keys() and all(abs(found[p] - wanted[p]) < 1e-6 for p in wanted)


# One model with a switch point --------------------------------------------------------------


def test_megatron_blends_are_the_mixtures():
    files = export_plan(make_plan(), "megatron")
    assert close(read_megatron(files["model-1.txt"]), FIRST)
    assert close(read_megatron(files["model-2.txt"]), SECOND)
    manifest = json.loads(files["manifest.json"])
    stages = manifest["models"]["model"]["stages"]
    assert [(s["start_tokens"], s["tokens"]) for s in stages] == [
        (0, 1_000_000),
        (1_000_000, 600_000),
    ]
    with pytest.raises(SpecError, match="white space, at which Megatron"):
        export_plan(make_plan(), "megatron", Setting(paths={"web": "my data/web"}))


def test_mosaicml_streams_are_the_mixtures():
    files = export_plan(make_plan(), "mosaicml", FULL)
    for name, mixture, tokens in (("model-1", FIRST, 1_000_000), ("model-2", SECOND, 600_000)):
        shares, rows = read_mosaicml(files[f"{name}.yaml"])
        assert close(shares, mixture) and rows == round(tokens / 512)
    far = export_plan(make_plan(), "mosaicml", dataclasses.replace(FULL, paths={"web": "s3://b/w"}))
    assert yaml.safe_load(far["model-1.yaml"])["streams"][-1]["remote"] == "s3://b/w"


def test_olmo_core_sources_hold_what_is_asked_of_them():
    files = export_plan(make_plan(), "olmo-core", FULL)
    supply = {f"data/{d}": tokens for d, tokens in SUPPLY.items()}
    for name, mixture, tokens in (("model-1", FIRST, 1_000_000), ("model-2", SECOND, 600_000)):
        shares, requested = read_olmo_core(files[f"{name}.yaml"], supply)
        assert close(shares, mixture) and requested == tokens
    often = dataclasses.replace(make_plan(), domain_tokens={**SUPPLY, "code": 70_000})
    text = export_plan(often, "olmo-core", FULL)["model-1.yaml"]
    read_olmo_core(text, {**supply, "data/code": 70_000})
    with pytest.raises(AssertionError, match="the trainer would refuse it"):
        read_olmo_core(text, {**supply, "data/code": 60_000})


def test_nanotron_switches_at_the_step_of_the_switch_point():
    text = export_plan(make_plan(), "nanotron", FULL)["model.yaml"]
    (first, second), steps = read_nanotron(text)
    assert close(first[0], FIRST) and close(second[0], SECOND)
    assert (first[1], second[1]) == (1, 1 + round(1_000_000 / 4_096))
    assert steps == round(1_600_000 / 4_096)


def test_torchtitan_draws_sources_in_the_shares():
    first, second = read_torchtitan(export_plan(make_plan(), "torchtitan", FULL)["model.py"])
    assert close(first[0], FIRST) and close(second[0], SECOND)
    assert first[1] + second[1] == round(1_600_000 / 4_096)
    drawn = random.Random(0).choices(list(second[0]), list(second[0].values()), k=20_000)
    assert drawn.count("data/code") / 20_000 == pytest.approx(0.25, abs=0.015)


def test_hugging_face_call_runs_and_gives_the_shares_and_rows():
    plan = dataclasses.replace(
        make_plan(),
        schedule=Schedule(
            (Phase(Mixture({"web": 6, "code": 4}), 1_000_000), Phase(SECOND, 512_000))
        ),
    )
    module: dict = {}
    exec(compile(export_plan(plan, "huggingface", FULL)["model.py"], "model.py", "exec"), module)
    sizes = {"data/web": 1_500, "data/code": 300, "data/math/tex": 700}  # code: 2.6 epochs

    def load(path: str):
        rows = [{"source": path, "row": n} for n in range(sizes[path])]
        return Dataset.from_list(rows).to_iterable_dataset()

    first = list(module["stage"](0, load))
    assert len(first) == round(1_000_000 / 512)
    read = [row["row"] for row in first if row["source"] == "data/code"]
    assert len(read) / len(first) == pytest.approx(0.4, abs=0.04)
    assert read == [n % 300 for n in range(len(read))], "repeated in order, not cut off"
    second = list(module["stage"](1, load))
    assert len(second) == 1_000
    fresh = [row["row"] for row in second if row["source"] == "data/math/tex"]
    assert len(fresh) / 1_000 == pytest.approx(0.75, abs=0.05) and fresh[0] == 0
    again = next(row["row"] for row in second if row["source"] == "data/code")
    assert again == round(0.4 * len(first)) % 300, "it goes on about where stage 0 was"
    assert [row["row"] for row in module["stage"](1, load)] == [row["row"] for row in second]


# Several models -----------------------------------------------------------------------------


@pytest.mark.parametrize("to", FORMATS)
def test_each_model_of_a_plan_with_branches_has_its_own_set(to):
    files = export_plan(make_plan(branches=True), to, FULL)
    manifest = json.loads(files["manifest.json"])
    assert manifest["branch_after_tokens"] == 1_000_000 and manifest["decay_share"] == 0.2
    models = manifest["models"]
    assert set(models) == {"code", "math/tex"}
    listed = [name for model in models.values() for name in model["files"]]
    assert sorted([*listed, "manifest.json"]) == sorted(files) and len(set(listed)) == len(listed)
    assert all(re.fullmatch(r"[\w-]+(\.\w+)", name) for name in listed)
    assert [len(model["stages"]) for model in models.values()] == [2, 3]
    starts = [stage["first_step"] for stage in models["math/tex"]["stages"]]
    steps = [stage["steps"] for stage in models["math/tex"]["stages"]]
    assert starts == [1, 1 + steps[0], 1 + steps[0] + steps[1]]
    assert sum(steps) == round(1_300_000 / 4_096)


NAMES = st.text(min_size=1, max_size=8).filter(lambda name: not re.search(r"\s", name))


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(NAMES, st.integers(1, 1_000_000), min_size=1, max_size=4))
def test_any_domain_name_and_share_comes_through(weights):
    mixture = Mixture(weights)
    plan = dataclasses.replace(
        make_plan(), schedule=Schedule.constant(mixture, 999_999), domain_tokens={}
    )
    paths = {domain: f"/d/{number}/{domain}" for number, domain in enumerate(mixture)}
    given_setting = dataclasses.replace(FULL, paths=paths)
    wanted = {paths[d]: share for d, share in mixture.items()}

    def right(found: dict[str, float]) -> bool:
        return found.keys() == wanted.keys() and all(
            abs(found[p] - wanted[p]) < 1e-6 for p in wanted
        )

    def files(to: str) -> str:
        return next(iter(export_plan(plan, to, given_setting).values()))

    assert right(read_megatron(files("megatron")))
    assert right(read_mosaicml(files("mosaicml"))[0])
    assert right(read_nanotron(files("nanotron"))[0][0][0])
    assert right(read_torchtitan(files("torchtitan"))[0][0])
    module: dict = {}
    exec(compile(files("huggingface"), "m.py", "exec"), module)
    assert right({p: share for p, (share, _) in module["STAGES"][0]["sources"].items()})
    sources = yaml.safe_load(files("olmo-core"))["source_list"]["sources"]
    assert right({s["source_name"]: s["target_ratio"] for s in sources})


# What is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("to", "setting", "message"),
    [
        ("nanotrom", FULL, "Did you mean 'nanotron'"),
        ("nanotron", Setting(), "--batch-tokens"),
        ("mosaicml", Setting(), "--context"),
        ("megatron", Setting(paths={"wbe": "x"}), "names 'wbe'"),
        ("megatron", Setting(paths={"web": "x", "code": "x"}), "one path"),
        ("nanotron", Setting(batch_tokens=700_000), "Stage 2 of model 'model' has 600,000"),
    ],
)
def test_what_cannot_be_exported_is_refused(to, setting, message):
    with pytest.raises(SpecError, match=message):
        export_plan(make_plan(), to, setting)


def test_command_writes_the_files(tmp_path, capsys):
    file, out = tmp_path / "plan.json", tmp_path / "configs"
    file.write_text(json.dumps(make_plan().to_json()))
    arguments = ("export", file, "--to", "nanotron", "--out", out, "--batch-tokens", 4096)
    assert run_main(*arguments, "--paths", "web=/mnt/web,math/tex=/mnt/math") == 0
    assert capsys.readouterr().out.split() == [str(out / "model.yaml"), str(out / "manifest.json")]
    (first, second), _ = read_nanotron((out / "model.yaml").read_text())
    assert set(first[0]) == {"/mnt/web", "data/code", "/mnt/math"}
    assert json.loads((out / "manifest.json").read_text())["paths"]["web"] == "/mnt/web"
    file.write_text('{"format": 99}')
    assert run_main(*arguments) == 2 and "format 99" in capsys.readouterr().err
    file.unlink()
    assert run_main(*arguments) == 2 and "cannot be read" in capsys.readouterr().err

"""`rayx merge`: what is written and printed, JSON, progress in a log, refusals."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rayx.cli import main, output


@pytest.fixture
def rayx_merge(monkeypatch, capsys, tmp_path):
    """Run `rayx merge ...` in a folder of its own; returns exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b", "base")):
        values = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        save_file({"up": values, "down": values + 1}, f"{name}.safetensors")
        Path(f"{name}-folder").mkdir()
        save_file({"up": values}, f"{name}-folder/model.safetensors")
        Path(f"{name}-folder/config.json").write_text(json.dumps({"n_layer": seed}))

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rayx", "merge", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        out, err = capsys.readouterr()
        return int(stopped.value.code or 0), out, err

    return call


TWO = ("--expert", "x=a.safetensors", "--expert", "y=b.safetensors")
BASE = ("--base", "base.safetensors")


def test_what_was_written_is_said(rayx_merge):
    code, out, err = rayx_merge("out.safetensors", *TWO, "--weights", "y=0.25,x=0.75")
    assert code == 0, err
    assert out.startswith(
        "wrote out.safetensors: 48 parameters in 2 tensors, 1.92e-07 GB in 1 file,"
    )
    assert "peak memory" in out and len(out.splitlines()) == 1
    a, b = load_file("a.safetensors"), load_file("b.safetensors")
    expected = 0.75 * a["up"] + 0.25 * b["up"]
    assert torch.allclose(load_file("out.safetensors")["up"], expected, atol=1e-6)


def test_a_folder_says_what_was_copied_and_warns(rayx_merge):
    experts = ("--expert", "x=a-folder", "--expert", "y=b-folder")
    code, out, err = rayx_merge("out", *experts, "--operator", "soup")
    assert code == 0 and "from expert 'x': config.json" in out
    assert "warning: config.json of expert 'y' differs from expert 'x''s" in err
    assert sorted(f.name for f in Path("out").iterdir()) == ["config.json", "model.safetensors"]


def test_json_is_one_object(rayx_merge):
    code, out, err = rayx_merge(
        "out.safetensors", *TWO, *BASE, "--weights", "x=1,y=-0.5", "--operator", "task_arithmetic",
        "--scale", "0.5", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0 and err == "" and found["peak_bytes"] > 1e7
    assert set(found) == {
        "path", "files", "copied", "tensors", "params", "nbytes", "seconds", "warnings",
        "peak_bytes",
    }  # fmt: skip
    assert (found["path"], found["tensors"], found["params"]) == ("out.safetensors", 2, 48)


def test_options_reach_the_operator(rayx_merge):
    options = (*TWO, *BASE, "--weights", "x=0.5,y=0.5", "--operator", "dare", "--density", "0.5")
    found = {}
    for out, seed in (("1.safetensors", 1), ("2.safetensors", 2), ("3.safetensors", 1)):
        assert rayx_merge(out, *options, "--seed", seed)[0] == 0
        found[out] = load_file(out)["up"]
    first, other, again = found.values()
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (TWO, "Give --weights, one an expert: x=...,y=..."),
        ((*TWO, "--weights", "x=0.5,z=0.5"), "weight for 'z', which is not an expert"),
        ((*TWO, "--weights", "x=half"), "expected name=number"),
        ((*TWO, "--weights", "x=1,y=1"), "sum of linear merge weights is 2"),
        ((*TWO, "--weights", "x=1,y=1", "--operator", "tiess"), "Did you mean 'ties'?"),
        ((*TWO, *BASE, "--weights", "x=1,y=1", "--operator", "ties"), "density of ties is None"),
        ((*TWO, *BASE, "--weights", "x=1,y=1", "--operator", "ties", "--density", "2"), "is 2.0"),
        ((*TWO, "--weights", "x=1,y=0", "--density", "0.5"), "density of linear is 0.5"),
        ((*TWO, "--weights", "x=1,y=1", "--operator", "task_arithmetic"), "base of task_ar"),
        (("--expert", "a.safetensors", "--weights", "a=1"), "'a.safetensors'; expected NAME=MODEL"),
        ((*TWO, "--expert", "x=b.safetensors", "--weights", "x=1"), "'x' twice"),
        ((*TWO, "--weights", "x=1,y=0", "--base", "a-folder"), "give all in one layout"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(rayx_merge, arguments, message):
    code, out, err = rayx_merge("out.safetensors", *arguments)
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert not Path("out.safetensors").exists()


def test_progress_is_plain_lines_where_there_is_no_terminal(monkeypatch, caplog):
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(output.time, "monotonic", lambda: float(next(clock)))
    with caplog.at_level(logging.INFO), output.work_progress("merge", "tensors") as show:
        for done in range(1, 5):
            show(done, 8, f"layers.{done}")
    assert caplog.messages[0] == "merge: 2/8 tensors, 0.1 a second, 1m00s left, layers.2"
    assert len(caplog.messages) == 2

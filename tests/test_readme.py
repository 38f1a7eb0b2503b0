"""README and experiments are kept true: code runs, tree and commands exist."""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import typer

from rayx.cli.main import command_tree
from rayx.experiment import load_experiment, set_parameters
from tests.test_cli import commands

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def fenced(language: str) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M)
    return [text for tag, text in blocks if tag == language]


def test_the_synthetic_example_prints_what_readme_shows():
    code = next(block for block in fenced("python") if "World.random" in block)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    shown = README.split(code)[1].split("```")[2].strip("\n")
    assert printed.getvalue().strip() == shown.strip()


def test_every_command_is_in_readme_and_every_command_in_readme_exists():
    names = {" ".join(n) for n in commands(typer.main.get_command(command_tree()))}
    used = set(re.findall(r"(?<![\w/])rayx ((?:corpus )?[a-z-]+)", "\n".join(fenced(""))))
    assert names == used


def test_options_in_readme_exist():
    group = typer.main.get_command(command_tree())
    for line in "\n".join(fenced("")).replace("\\\n", " ").splitlines():
        found = re.search(r"(?<![\w/])rayx ((?:corpus )?[a-z-]+)(.*)", line.split("#")[0])
        if not found:
            continue
        command = group
        for name in found[1].split():
            command = command.commands[name]
        options = {o for parameter in command.params for o in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", found[2])) <= options, line


def test_layout_names_what_is_on_disk():
    tree = next(block for block in fenced("") if "Makefile  pyproject.toml" in block)
    named = set(re.findall(r"[\w.]+(?:\.(?:py|md|txt|toml|yaml)|/)", tree))
    levels = ("*", "*/*", "rayx/*/*")
    on_disk = {p.name for level in levels for p in ROOT.glob(level)}
    assert {name.strip("/") for name in named} <= on_disk
    modules = {p.name for p in (ROOT / "rayx").glob("*.py")} - {"__init__.py", "__main__.py"}
    packages = {p.parent.name + "/" for p in (ROOT / "rayx").glob("*/__init__.py")}
    assert modules | packages <= named


@pytest.mark.parametrize("file", sorted((ROOT / "experiments").glob("*.py")), ids=lambda f: f.name)
def test_experiment_says_what_it_asks_costs_and_loads(file):
    text = file.read_text()
    assert all(heading in text for heading in ("Question:", "Cost:")), file
    module = load_experiment(file)
    assert set_parameters(module, ["seed=3"]).seed == 3


@pytest.mark.parametrize("file", sorted((ROOT / "experiments/bench").glob("*.py")), ids=str)
def test_benchmark_has_help(file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(file), "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(file), run_name="__main__")
    assert stopped.value.code in (0, None) and "--json" in capsys.readouterr().out

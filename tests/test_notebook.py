"""The notebook runs from its first cell to its last, and shows online what it shows when run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import rayx
from rayx import Mixture
from rayx.synthetic import World
from tests.notebooks import run, run_cell, source

FILE = Path(__file__).parents[1] / "experiments" / "query_sweep.ipynb"
NOTEBOOK = json.loads(FILE.read_text())
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def kinds(notebook: dict) -> list[list[str]]:
    """What each cell shows: text, tables, pictures."""
    return [
        sorted(kind for o in cell.get("outputs", ()) for kind in o.get("data", {"text": 0}))
        for cell in notebook["cells"]
    ]


def test_every_cell_runs_and_shows_what_the_committed_notebook_shows():
    done = run(NOTEBOOK)
    assert kinds(done) == kinds(NOTEBOOK)
    shown = [o.get("data", {}) for cell in done["cells"] for o in cell.get("outputs", ())]
    assert sum("image/png" in data for data in shown) == 5
    truth = done["cells"][-1]["outputs"][0]["data"]["text/plain"]
    rows = np.array([line.split()[1:] for line in truth[1:]], dtype=float)
    regression, best_run, optimum = rows.T
    assert abs(regression - optimum).sum() < abs(best_run - optimum).sum() < 0.3
    assert regression.sum() == pytest.approx(1, abs=1e-3)


def test_it_reads_a_store_of_ones_own(tmp_path, monkeypatch):
    world = World.random(3, 2, seed=4, failing_share=0.1)
    for name, tokens in (("first", 100_000), ("second", 200_000)):
        made = rayx.open(tmp_path / name, create=True)
        weights_RK = np.random.default_rng(0).dirichlet(np.ones(3), 24)
        mixtures = [Mixture.from_array(w, world.domains) for w in weights_RK]
        world.fill(made, [world.spec(mixture, tokens) for mixture in mixtures])
    monkeypatch.setenv("RAYX_STORE", str(tmp_path / "first"))
    monkeypatch.setenv("RAYX_OTHER_STORE", str(tmp_path / "second"))
    text = "".join("".join(o.get("text", ())) for c in run(NOTEBOOK)["cells"]
                   for o in c.get("outputs", ()))  # fmt: skip
    assert "pairs of" in text and "made-up" not in text


def test_committed_notebook_was_run_in_order_and_holds_no_path_of_a_machine():
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    text = json.dumps(NOTEBOOK)
    assert not [word for word in ("/tmp/", "/home/", "/root", "/work", "/Users") if word in text]
    words = {cell["cell_type"]: len(source(cell)) for cell in NOTEBOOK["cells"]}
    assert set(words) == {"markdown", "code"} and len(text) < 1_000_000


@pytest.mark.parametrize(
    ("code", "expected"),
    [("1 + 1", ["2"]), ("1 + 1;", []), ("x = 1\nx", ["1"]), ("print('a')\nNone", []), ("", [])],
)
def test_cell_shows_its_last_value(code, expected):
    shown = [o["data"]["text/plain"] for o in run_cell(code, "<cell>", {}) if "data" in o]
    assert shown == ([expected] if expected else [])


def test_cell_that_raises_is_named():
    broken = {"cells": [{"cell_type": "code", "source": ["1 / 0"]}]}
    with pytest.raises(AssertionError, match="cell 0 .*raised(.|\n)*ZeroDivisionError"):
        run(broken)

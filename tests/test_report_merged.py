"""The report's section on merged candidates, and the commands on a store of both kinds."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

import rayx
from rayx.cli import laws
from rayx.cli.main import command_tree
from rayx.fit import Table, fit_table, join_kinds, largest_scale
from rayx.report import render
from rayx.report.evidence import Evidence
from rayx.report.merged import HEADING, section
from rayx.synthetic import World
from tests.both_kinds import fill_both
from tests.test_report import SECTIONS, Page

TARGETS = 2


def make_store(folder, trained: int, merged: int, pairs: int, mode: str = "good"):
    store = rayx.open(folder, create=True)
    fill_both(World.random(4, TARGETS, seed=1), store, trained, merged, pairs, mode)
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """16 trained runs, 4 experts and 40 merged candidates, 12 of the runs' mixtures among them."""
    return make_store(tmp_path_factory.mktemp("both") / "store", 16, 40, 12)


@pytest.fixture(scope="module")
def fitted(store):
    return fit_table(join_kinds(largest_scale(store.runs())), "tilted-power")


def test_section_says_how_far_merged_proxies_can_be_believed(store, fitted):
    text = render(store, fitted)
    page = Page(text)
    place = SECTIONS.index("response")
    assert list(page.words)[1:] == [*SECTIONS[:place], "merged", *SECTIONS[place:]]
    said = page.text("merged")
    assert said.startswith(HEADING)
    assert "Merged proxies rank mixtures as trained ones do: ρ" in said
    assert "over 12 pairs" in said and "bpb too low" in said
    average = fitted.table.joint.beliefs[-1]
    assert f"{average.spearman:.3f} ({average.spearman_low:.3f} to" in said
    assert "40 merged beside 20 trained candidates" in said
    for row in ("trained candidates 16 6.4", "experts of the merged ones 4 1.6", "candidates 40 0"):
        assert row in said
    panels = [a["aria-label"] or "" for tag, a in page.tags if tag == "svg"]
    assert sum("Merged against trained" in label for label in panels) == 1 + TARGETS
    assert "Each of the 20 points" in page.text("fit")  # trained runs, merged ones are no test
    assert render(store, fitted) == text


def shown(store, fitted=None) -> str:
    """The section alone: drawing a whole page takes seconds."""
    evidence = Evidence(
        store=store, fitted=fitted, choice=None, verification=None, plan=None, caps={}
    )
    return " ".join(re.sub(r"<[^>]*>", " ", section(evidence)).split())


def test_section_stays_where_the_merged_rows_were_left_out(tmp_path):
    store = make_store(tmp_path / "bad", 6, 12, 6, "against")
    runs = store.runs()
    # A fit of the trained rows alone, as a plan's is, finds the verdict in the store.
    fitted = fit_table(Table.from_frame(runs[runs["kind"] == "train"]), "mean")
    said = shown(store, fitted)
    assert "do not rank mixtures as trained ones do" in said and "left out of the fit" in said


def test_section_without_trained_runs_says_what_to_train(tmp_path):
    store = make_store(tmp_path / "merged", 0, 12, 0)
    for run_id in store.runs().query("kind == 'train'")["run_id"]:
        store.remove(f"records/{run_id}.json")
    said = shown(store)
    assert "Nothing trained at the scale of the merged candidates" in said
    assert "merged candidates 12 0" in said


def test_commands_join_both_kinds_and_say_so(store):
    found = CliRunner().invoke(command_tree(), ["fit", store.url, "--regressor", "ridge"])
    assert found.exit_code == 0, found.output
    assert found.output.count("20 trained and 40 merged runs are fitted jointly") == 1
    shown = ["fit", store.url, "--regressor", "ridge", "--json"]
    result = json.loads(CliRunner().invoke(command_tree(), shown).stdout)
    assert result["rows"]["train"] == 60
    assert [b["target"] for b in result["kinds"]["beliefs"]] == ["code", "web", "average"]
    assert result["kinds"]["beliefs"][-1]["slope"] is None  # an average has no factor


def test_law_takes_the_trained_runs_of_a_store_only(store):
    table = laws._table(store.url, None, "web", None, None)
    assert len(table.columns["loss"]) == 20
    assert table.warnings == ("40 merged runs were left out: a law is of trained ones",)

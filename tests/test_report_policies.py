"""Policies in reports and fits: their weights and cost are shown, their runs are not fitted."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

import rayx
from rayx import Distillation, Mixture, Parent, Probe
from rayx.fit import Table, join_kinds
from rayx.fit.laws.table import LawTable
from rayx.fit.table import largest_scale
from rayx.policies import DGA, DoReMi
from rayx.policy import Decision
from rayx.report import render
from rayx.report.policies import weights_over_time
from rayx.spec import TrainSpec
from tests.samples import SPEC, record, train_spec

POLICY = DGA(specific=(Probe(target="web", part="train"),))


def decided(spec: TrainSpec, last: float):
    """A finished run whose policy moved to so much `web` after a quarter of it."""
    decisions = (
        Decision(step=0, weights=dict(spec.mixture)),
        Decision(step=8, weights={"web": last, "code": 1 - last}, signal=[[1.0]]),
    )
    return dataclasses.replace(
        record(spec), decisions=decisions, signal_seconds=0.3, signal_flops=0.1 * spec.flops
    )


@pytest.fixture
def store(tmp_path):
    store = rayx.open(str(tmp_path / "store"), create=True)
    for web in range(1, 10):
        store.put(record(train_spec(web, 10 - web), loss=2.0 - 0.05 * web))
    for seed, last in ((1, 0.8), (2, 0.9)):
        store.put(decided(train_spec(5, 5, policy=POLICY, seed=seed), last))
    taught = Distillation(teacher=Parent(SPEC, 4))
    store.put(record(train_spec(2, 3, distillation=taught), loss=0.1))
    return store


def test_steered_and_taught_runs_are_in_no_fit(store):
    runs = store.runs()
    assert len(runs) == 12 and set(runs["policy"].dropna()) == {"dga"}
    assert runs["teacher"].dropna().tolist() == [SPEC.run_id]
    kept = set(runs.loc[runs["policy"].isna() & runs["teacher"].isna(), "run_id"])
    assert set(Table.from_frame(runs).run_ids) == kept
    assert set(join_kinds(runs).run_ids) == kept
    assert set(largest_scale(runs)["run_id"]) == kept
    assert len(LawTable.from_runs(runs, "web").columns["loss"]) == 9


def test_average_mixture_counts_the_steps_of_each_decision(store):
    runs = store.runs().set_index("seed")
    assert runs.loc[1, "weight/web"] == pytest.approx(0.25 * 0.5 + 0.75 * 0.8, abs=1e-6)


def test_page_shows_the_weights_and_what_signals_took(store):
    page = render(store, title="Policies")
    assert '<h2 id="policies">' in page or "Policies</h2>" in page
    assert "dga: web rises from 0.50 to 0.85" in page
    assert "20.0%" in page, "0.3 of 1.5 seconds"
    assert "dga (specific web (train), from uniform over 2 domains); 2 runs." in page
    assert "left out of every fit" in page


def test_settings_and_priors_are_told_apart(store):
    other = dataclasses.replace(POLICY, eta=2.5)
    store.put(decided(train_spec(5, 5, policy=other), 0.1))
    store.put(decided(train_spec(9, 1, policy=POLICY), 0.2))
    runs = store.runs().dropna(subset=["policy"])
    assert sorted(runs["policy_id"].value_counts()) == [1, 1, 2]
    page = render(store, title="Policies")
    assert "specific web (train), eta 2.5, from uniform over 2 domains" in page
    assert "specific web (train), from web 0.90, code 0.10" in page
    assert "dga: web rises from 0.50 to 0.85" in page, "the mean of two, not of four"


def test_page_without_policies_has_no_such_section(tmp_path):
    store = rayx.open(str(tmp_path / "plain"), create=True)
    store.put(record())
    assert "left out of every fit" not in render(store, title="Plain")


def test_lines_are_the_weights_in_force(store):
    data = store.decisions().assign(end=SPEC.tokens)
    axes = Figure().add_subplot()
    weights_over_time(data, axes, "title")
    bold = {line.get_label(): line for line in axes.lines if line.get_linewidth() > 1}
    assert bold.keys() == {"web", "code"}
    x, y = (np.asarray(values, float) for values in bold["web"].get_data())
    assert x.tolist() == [0, 8 * 512, SPEC.tokens]
    assert y == pytest.approx([0.5, 0.85, 0.85])
    gone = data[(data["domain"] != "code") | (data["step"] == 0)]
    axes = Figure().add_subplot()
    weights_over_time(pd.DataFrame(gone), axes, "a weight of 0 has no row")
    code = next(line for line in axes.lines if line.get_label() == "code")
    assert np.asarray(code.get_ydata(), float).tolist() == [0.5, 0.0, 0.0]


def test_mixture_of_a_plain_run_is_its_schedules():
    assert record().mixture == Mixture({"web": 7, "code": 3})


def test_replicates_share_a_policy_id_whatever_their_references():
    policies = [DoReMi(reference=Parent(train_spec(1, 1, seed=seed), 8)) for seed in (1, 2)]
    specs = [train_spec(5, 5, policy=policy) for policy in policies]
    assert specs[0].run_id != specs[1].run_id
    assert specs[0].columns()["policy_id"] == specs[1].columns()["policy_id"]

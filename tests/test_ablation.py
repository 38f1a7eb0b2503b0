"""Data ablations: what averages stand for, what they cost, and how they are compared, planted."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayx
from rayx.errors import SpecError, StoreError
from rayx.experiment import load_experiment
from rayx.merging import MergeSpec
from rayx.methods.ablation import APPROXIMATIONS, Ablation, macro_weights, micro_weights
from rayx.methods.ablation_scores import AVERAGE, POOLED, correlations, pearson, regrets
from rayx.methods.merge_proxy import MergeProxy
from rayx.mixture import Mixture
from rayx.record import CurvePoint, Failure, Loss, Record
from rayx.units import train_flops
from tests.samples import SPEC

study = load_experiment(Path(__file__).parents[1] / "experiments" / "ablation.py")

UNITS = ("code", "docs", "legal", "wiki")
GROUPS = (("code",), ("docs", "legal", "wiki"))
EVALUATED_TOKENS = 3_000  # that an average costs, in tokens of training


def planted_nats(mixture, tokens, target):
    """A loss that falls with a target's tokens, and a little with those of all others."""
    own = round(mixture.get(target, 0.0), 4) * tokens  # millionths are dealt out unevenly
    return 3.0 - 0.1 * np.log1p(own / 1_000) - 0.02 * np.log1p(tokens / 1_000)


def planted(spec, targets=(*UNITS, "other"), merged=planted_nats, failed=False):
    """The record of a run on these losses; averages have those of their mixture, by `merged`."""
    is_merge = isinstance(spec, MergeSpec)
    loss = merged if is_merge else planted_nats
    nats = {t: loss(spec.mixture, spec.tokens, t) for t in targets}
    losses = {t: Loss(n, n / 2, 0.01) for t, n in nats.items()}
    tokens = 0 if is_merge else spec.tokens
    return Record(
        spec=spec,
        curve=() if failed else (CurvePoint(1, tokens, losses),),
        epochs={},
        tokens=tokens,
        flops=train_flops(spec.model.matmul_params, EVALUATED_TOKENS if is_merge else tokens),
        seconds=1.0,
        pack_id="pack0",
        pack_runs=1,
        device="cpu",
        versions={},
        commit="",
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:01+00:00",
        failure=Failure(type="Diverged", message="loss is nan") if failed else None,
    )


def ablation(seed: int = 0, general_share: float = 0.0) -> Ablation:
    template = dataclasses.replace(SPEC, seed=seed, data_seed=seed)
    proxy = MergeProxy(
        template=template,
        general=Mixture.uniform(UNITS),
        domains=UNITS,
        trunk_tokens=16_384,
        branch_tokens=8_192,
    )
    return Ablation(proxy=proxy, groups=GROUPS, general_share=general_share)


def fill(store, method: Ablation, truths=("fixed", "union"), **options) -> None:
    runs = method.averages(method.subsets())
    runs += [method.trained(s, truth) for s in method.subsets() for truth in truths]
    for run in runs:
        store.put(planted(run, **options))


@pytest.fixture
def store(tmp_path):
    return rayx.open(tmp_path / "store", create=True)


some_subset = st.sets(st.sampled_from(UNITS), min_size=1).map(lambda s: tuple(sorted(s)))


@given(some_subset, st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_averages_are_averages_of_the_subset_alone(subset, first, second):
    groups = tuple(
        tuple(u for u, at in zip(UNITS, (0, 1, first, second), strict=True) if at == g)
        for g in range(4)
    )
    models = dict(zip(UNITS, np.random.default_rng(0).normal(size=(4, 5)), strict=True))
    of_groups = [
        np.mean([models[u] for u in subset if u in group], axis=0)
        for group in groups
        if set(group) & set(subset)
    ]
    for weights, expected in (
        (micro_weights(subset, UNITS), np.mean([models[u] for u in subset], axis=0)),
        (macro_weights(subset, UNITS, groups), np.mean(of_groups, axis=0)),
    ):
        assert sum(weights) == pytest.approx(1.0, abs=1e-12)
        assert np.array(weights) @ np.stack(list(models.values())) == pytest.approx(expected)
        assert {u for u, w in zip(UNITS, weights, strict=True) if w} == set(subset)


def test_macro_is_micro_where_groups_have_equally_many_units():
    pairs = (("code", "docs"), ("legal", "wiki"))
    for subset in (UNITS, ("code", "wiki"), ("code", "docs"), ("docs",)):
        assert macro_weights(subset, UNITS, pairs) == micro_weights(subset, UNITS)
    assert macro_weights(("code", "docs", "wiki"), UNITS, pairs) == (0.25, 0.25, 0.0, 0.5)


def test_an_average_stands_for_the_mixture_that_its_subset_is_trained_on():
    for share in (0.0, 0.5):
        method = ablation(general_share=share)
        for subset in method.subsets():
            average, run = method.average(subset, "micro"), method.trained(subset, "fixed")
            for unit in UNITS:
                wanted = share / 4 + (1 - share) * (unit in subset) / len(subset)
                assert average.mixture.get(unit, 0.0) == pytest.approx(wanted, abs=2e-6)
                assert run.mixture.get(unit, 0.0) == pytest.approx(wanted, abs=2e-6)
            assert (average.tokens, average.trunk_tokens) == (run.tokens, run.trunk_tokens)
            union = method.trained(subset, "union")
            assert union.tokens == len(subset) * run.tokens and union.parent == run.parent


def test_subsets_are_all_or_some_each_once():
    method = ablation()
    assert [len(s) for s in method.subsets()] == 6 * [2] + 4 * [3] + [4]
    some = method.subsets(5, seed=3)
    assert len({*some}) == 5 and {*some} < {*method.subsets()} and some == method.subsets(5, seed=3)
    assert method.subsets(5, seed=4) != some and method.subsets(100) == method.subsets()


def test_averages_cost_what_the_units_cost_and_their_evaluation(store):
    method = ablation()
    fill(store, method)
    subsets, unit = method.subsets(), 8_192
    merged = [s for s in method.averages(subsets) if isinstance(s, MergeSpec)]
    fixed, union = (method.costs(store, subsets, truth) for truth in ("fixed", "union"))
    for costs in (fixed, union):
        assert costs["averages"] == pytest.approx(4 * unit + len(merged) * EVALUATED_TOKENS)
        assert costs["all_units"] == 4 * unit
    assert fixed["trained"] == 11 * unit and fixed["all_trained"] == (2**4 - 1) * unit
    assert union["trained"] == (6 * 2 + 4 * 3 + 4) * unit
    # Every unit is in half of the 2^K subsets.
    assert union["all_trained"] == union["trained"] + 4 * unit == 4 * 2**3 * unit


def test_experts_are_trained_once_for_all_averages():
    method = ablation()
    specs = method.averages(method.subsets())
    assert len({s.run_id for s in specs}) == len(specs)
    trained = [s for s in specs if not isinstance(s, MergeSpec)]
    assert {s.run_id for s in trained} == {m.spec.run_id for m in method.experts.members}
    # Micro and macro differ only where a subset has the lone unit and more than one other.
    assert len(specs) - len(trained) == 11 + 4


def test_table_holds_what_was_recorded(store):
    method = ablation(seed=5)
    fill(store, method)
    table = method.table(store, method.subsets())
    assert len(table) == 11 * 2 * 5 and set(table["seed"]) == {5}
    row = table.set_index(["truth", "subset", "target"]).loc[("union", "code+docs", "docs")]
    tokens = 8_192
    assert (row["size"], row["side"]) == (2, "inside")
    half, alone = Mixture.uniform(("code", "docs")), Mixture({"docs": 1})
    assert row["trained"] == pytest.approx(np.exp(planted_nats(half, 2 * tokens, "docs")))
    assert row["micro"] == pytest.approx(np.exp(planted_nats(half, tokens, "docs")))
    assert row["best_unit"] == pytest.approx(np.exp(planted_nats(alone, tokens, "docs")))
    code = np.exp(planted_nats(Mixture({"code": 1}), tokens, "docs"))
    assert row["mean_of_units"] == pytest.approx((row["best_unit"] * code) ** 0.5)
    assert set(table.loc[table["target"] == "other", "side"]) == {"outside"}


def test_correlations_are_those_of_the_planted_world(store):
    method = ablation()
    fill(store, method)
    table = method.table(store, method.subsets())
    found = correlations(table).set_index(["truth", "side", "target", "approximation"]).sort_index()
    # Inside, a target's loss depends on the subset's size alone: micro is exactly what is trained.
    inside = found.loc[("fixed", "inside", "docs", "micro")]
    assert inside["subsets"] == 7
    assert inside[["pearson", "spearman"]].tolist() == pytest.approx([1.0, 1.0])
    assert inside["pearson_same_size"] == 0.0  # nothing is left among subsets of equal size
    assert found.loc[("fixed", "inside", "docs", "macro"), "pearson"] < 0.99
    # The best unit is the target's own, whatever else is in the subset.
    assert found.loc[("fixed", "inside", "docs", "best_unit"), "pearson"] == 0.0
    # Fixed tokens make the trained worse with size, their union better.
    union = found.loc[("union", "inside", "docs", "micro"), "pearson"]
    assert union == 0.0 or union < 0.0
    assert ("fixed", "outside", "wiki", "micro") in found.index
    assert found.loc[("fixed", "inside", POOLED, "micro"), "subsets"] == 4 * 7
    everything = found.loc[("fixed", "any", AVERAGE)]
    assert set(everything["subsets"]) == {11}
    assert everything.loc["micro", "pearson"] == pytest.approx(1.0)
    # Averaging the units' losses cannot see that a subset covers more targets.
    assert abs(everything.loc["mean_of_units", "pearson"]) < 0.1


def test_regret_is_that_of_the_subset_liked_best():
    nats = {"code+docs": 1.0, "code+wiki": 1.5, "docs+wiki": 2.0}
    rows = [
        (seed, "fixed", name, 2, "code", "inside", np.exp(nats[name] + seed), good, bad)
        for seed in (0, 1)
        for name, good, bad in zip(nats, (3.0, 4.0, 5.0), (7.0, 6.0, 5.0 + 2 * seed), strict=True)
    ]
    names = ["seed", "truth", "subset", "size", "target", "side", "trained", "good", "bad"]
    (row,) = regrets(pd.DataFrame(rows, columns=names), ["good", "bad"]).to_dict("records")
    assert row == {"truth": "fixed", "side": "inside", "good": 0.0,
                   "bad": pytest.approx((1.0 + 0.5) / 2), "random": pytest.approx(0.5)}  # fmt: skip


def test_what_size_explains_is_told_from_the_rest():
    rng = np.random.default_rng(1)
    subsets = [s for k in (2, 3, 4, 5) for s in itertools.combinations("abcdef", k)]
    rows = [
        (
            0,
            "fixed",
            "".join(s),
            len(s),
            "a",
            "inside",
            50 + 10 * len(s) + e,
            50 + len(s) + f,
            50 + e,
        )
        for s, (e, f) in ((s, rng.normal(size=2)) for s in subsets)
    ]
    names = ["seed", "truth", "subset", "size", "target", "side", "trained", "of_size", "noise"]
    found = correlations(pd.DataFrame(rows, columns=names), ["of_size", "noise"])
    found = found[(found["target"] == "a") & (found["side"] == "inside")]
    found = found.set_index("approximation")
    assert found.loc["of_size", "pearson"] > 0.6  # that size explains
    assert abs(found.loc["of_size", "pearson_same_size"]) < 0.4  # and nothing else
    assert found.loc["noise", "pearson_same_size"] > 0.99
    assert pearson([1, 1, 1], [1, 2, 3]) == 0.0 and pearson([1, 2, 3], [6, 4, 2]) == -1.0


def test_bad_input_is_named(store):
    method = ablation()
    with pytest.raises(SpecError, match="each of code, docs, legal, wiki once"):
        dataclasses.replace(method, groups=(("code", "docs"), ("docs", "legal", "wiki")))
    with pytest.raises(SpecError, match="'harmonic' is unknown; expected one of micro, macro"):
        method.average(("code", "docs"), "harmonic")
    with pytest.raises(SpecError, match="'half' is unknown; expected one of fixed, union"):
        method.trained(("code", "docs"), "half")
    for subset in (("code", "poems"), (), ("code", "code")):
        with pytest.raises(SpecError, match="A subset"):
            method.average(subset, "micro")
        with pytest.raises(SpecError, match="A subset"):
            method.trained(subset, "fixed")


def test_a_missing_or_failed_run_is_named(store):
    method = ablation()
    fill(store, method)
    run = method.trained(("docs", "wiki"), "fixed")
    store.remove(f"records/{run.run_id}.json")
    with pytest.raises(StoreError, match=run.run_id):
        method.table(store, method.subsets())
    store.put(planted(run, failed=True))
    with pytest.raises(SpecError, match=f"{run.run_id}.*--retry-failed"):
        method.table(store, method.subsets())
    store.put(planted(run))
    assert len(method.table(store, method.subsets())) == 110


CORPUS = SimpleNamespace(
    domains=("code", "docs", "legal", "medicine", "speeches", "wiki"), fingerprint="c0ffee"
)


def test_the_experiment_on_planted_losses(store):
    p = study.Parameters(seeds=2, subsets=20)
    specs = study.specs(p, CORPUS)
    assert specs == study.specs(p, CORPUS)  # a sweep that is interrupted asks for the same again
    assert len({s.run_id for s in specs}) == len(specs)
    for spec in specs:
        store.put(planted(spec, targets=(*CORPUS.domains, "readmes")))

    def nothing_left(more):
        raise AssertionError(f"{len(more)} runs are asked for after the sweep")

    assert study.analyse(p, CORPUS, store, nothing_left) is None
    report = json.loads(store.read_bytes("reports/ablation.json"))
    found = pd.DataFrame(report["correlations"])
    assert set(found["approximation"]) == {*APPROXIMATIONS, "other_seed"}
    micro = found[(found["approximation"] == "micro") & (found["truth"] == "fixed")]
    inside = micro[(micro["side"] == "inside") & (micro["target"] != POOLED)]
    assert len(inside) == 2 * 6
    assert inside["subsets"].sum() == 2 * sum(
        len(s) for s in study.ablation(p, CORPUS, 0).subsets(20, 0)
    )
    assert inside["pearson"].min() > 0.9999
    noise = found[(found["approximation"] == "other_seed") & (found["side"] == "inside")]
    assert noise["pearson"].min() > 0.9999  # planted losses do not depend on the seed
    assert set(found.loc[found["truth"] == "union", "seed"]) == {0}
    rows = pd.read_csv(f"{store.root}/reports/ablation.csv")
    assert len(rows) == 20 * 7 * (2 + 1)
    assert (rows["trained"] / rows["micro"])[rows["truth"] == "fixed"].to_numpy() == pytest.approx(
        1.0, abs=1e-4
    )
    arms = pd.DataFrame(report["boom"])
    assert arms.groupby("study")["arm"].nunique().to_dict() == {"bagging": 4, "incremental": 5}
    loss = arms.groupby("arm")["loss"].mean()
    assert loss["one run, tokens of all bags"] < loss["bags, averaged"]  # in this world of tokens
    assert loss["bags, averaged"] == pytest.approx(loss["one bag"])
    assert arms["loss"].to_numpy() == pytest.approx(((arms["old"] + arms["new"]) / 2).to_numpy())

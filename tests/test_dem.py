"""DEM on planted losses: the best omega is found, costs add up, one source retrains one expert."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import rayx
from rayx import Evaluation, Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.errors import SpecError, StoreError
from rayx.experiment import load_experiment
from rayx.merging import MergeSpec
from rayx.methods.dem import DataSource, Dem, best_state, mean_loss
from rayx.methods.dem_search import OmegaSearch
from rayx.record import CurvePoint, Failure, Loss, Record

study = load_experiment(Path(__file__).parents[1] / "experiments" / "dem.py")

DOMAINS = ("code", "docs", "legal")
CORPUS = SimpleNamespace(
    domains=DOMAINS,
    targets=DOMAINS,
    fingerprint="c0ffee",
    vocab_size=300,
    tokens={"code": 400, "docs": 100, "legal": 200},
    proportional=lambda: {"code": 4 / 7, "docs": 1 / 7, "legal": 2 / 7},
)
BEST = np.array([0.3, 0.9, 0.5])  # the planted omega; its sum is not 1
EVALUATION_TOKENS = 96.0
SHAPE = ModelShape(layers=1, width=16, heads=2, ffn_width=32, vocab_size=300, context=16)
BATCH = 8 * 16


def planted_dem(**changes) -> Dem:
    base = TrainSpec(
        corpus="c0ffee",
        model=SHAPE,
        schedule=Schedule.constant(Mixture.uniform(DOMAINS), 200 * BATCH),
        optimizer=Optimizer(lr=8e-3, batch_sequences=8, warmup_share=0.02),
        evaluation=Evaluation(points=1, sequences=8, part="first"),
    )
    usual = {
        "base": base,
        "sources": {d: DataSource(Mixture({d: 1}), 40 * BATCH) for d in DOMAINS},
        "lr_shares": (0.5, 0.2, 0.1),
        "points": 4,
    }
    return Dem(**(usual | changes))


def planted(spec, failed: bool = False) -> Record:
    """A record whose losses have their least where DEM should find it.

    Experts: least at a rate of .2 of the base's and after three of four checkpoints. Merges: each
    domain's loss is a quadratic of omega around BEST, with interference between the first two.
    """
    if isinstance(spec, TrainSpec):
        own, curve = spec.mixture, []
        for point in range(1, spec.evaluation.points + 1):
            step = round(spec.steps * point / spec.evaluation.points)
            off = (spec.optimizer.lr / 8e-3 - 0.2) ** 2 + 0.01 * abs(point - 3)
            off += sum(w**2 for w in own.values()) * 0.05
            losses = {d: Loss(4.0, 2.0 - own.get(d, 0.0) + off, 0.01) for d in DOMAINS}
            curve.append(CurvePoint(step, step * BATCH, losses))
        flops = spec.flops
    else:
        away_K = np.array(spec.weights) - (BEST if len(spec.weights) == 3 else 0.5)
        off = 0.2 * away_K @ away_K + 0.1 * away_K[0] * away_K[-1]
        curve = [CurvePoint(0, spec.tokens, {d: Loss(3.0, 1.5 + off, 0.01) for d in DOMAINS})]
        flops = 6.0 * spec.model.matmul_params * EVALUATION_TOKENS
    return Record(
        spec=spec,
        curve=() if failed else tuple(curve),
        epochs={},
        tokens=spec.tokens if isinstance(spec, TrainSpec) else 0,
        flops=flops,
        seconds=1.0,
        pack_id="pack0",
        pack_runs=1,
        device="cpu",
        versions={},
        commit="",
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:02+00:00",
        failure=Failure(type="Diverged", message="loss is nan") if failed else None,
    )


@pytest.fixture
def store(tmp_path):
    return rayx.open(tmp_path / "store", create=True)


def sweep(dem: Dem, store) -> list[int]:
    """Do rounds until none is new; return how many specs each added."""
    added = []
    while True:
        ended = store.status()
        new = {s.run_id: s for s in dem.proposed(store) if s.run_id not in ended}
        if not new:
            return added
        added.append(len(new))
        for spec in new.values():
            store.put(planted(spec))


def test_experts_are_the_best_state_of_each_sources_own_search(store):
    dem = planted_dem()
    assert sweep(dem, store) == [9, 24, 12, 12]
    for expert in dem.decide(store).experts:
        spec = expert.member.spec
        assert spec.optimizer.lr == pytest.approx(0.2 * 8e-3)
        assert expert.member.steps == 30 and spec.steps == 40
        assert dict(spec.schedule.average()) == {expert.source: 1.0}
        assert spec.parent is not None and spec.parent.spec == dem.base
        assert spec.parent.steps == dem.base.steps
        assert (spec.optimizer.warmup_share, spec.optimizer.decay_share) == (0.0, 1.0)
        assert spec.evaluation.part == "first"
    base = {expert.member.spec.parent for expert in dem.decide(store).experts}
    assert len(base) == 1


def test_guided_search_finds_the_planted_omega_where_random_is_far(store, tmp_path):
    excess = {}
    for how in ("guided", "random"):
        for seed in range(3):
            dem = planted_dem(search=OmegaSearch(how=how, seed=seed))
            own = rayx.open(tmp_path / f"{how}{seed}", create=True)
            sweep(dem, own)
            found = dem.decide(own)
            assert len(found.loss_C) == 48 and found.loss == found.loss_C.min()
            excess.setdefault(how, []).append(found.loss - 1.5)
            if how == "guided":
                assert list(found.omega.values()) == pytest.approx(BEST, abs=0.15)
                assert sum(found.omega.values()) == pytest.approx(BEST.sum(), abs=0.2)
    assert max(excess["guided"]) < 2e-3 < np.mean(excess["random"])


def test_ledger_is_that_computed_by_hand(store):
    dem = planted_dem(
        sources={
            "code": DataSource(Mixture({"code": 1}), 40 * BATCH),
            "docs": DataSource(Mixture({"docs": 1}), 20 * BATCH),
            "legal": DataSource(Mixture({"legal": 1}), 10 * BATCH),
        },
        points=2,
        search=OmegaSearch(rounds=(10, 5)),
    )
    sweep(dem, store)
    cost = dem.decide(store).cost
    assert cost.source_tokens == {"code": 3 * 5_120, "docs": 3 * 2_560, "legal": 3 * 1_280}
    assert cost.evaluations == {"checkpoints": 9 * 2, "omegas": 15}
    assert cost.evaluation_tokens == pytest.approx(96.0)
    assert cost.tokens == pytest.approx(26_880 + 33 * 96)  # 30,048
    # 21 ratios, each trained on the tokens of all sources:
    assert cost.cheaper(21, 8_960) == pytest.approx(188_160 / 30_048)


def test_changing_one_source_retrains_its_expert_alone(store):
    dem = planted_dem()
    sweep(dem, store)
    changes = {
        "more": DataSource(Mixture({"docs": 1}), 60 * BATCH),
        "other": DataSource(Mixture({"docs": 3, "legal": 1}), 40 * BATCH),
    }
    for source in changes.values():
        changed = dataclasses.replace(dem, sources={**dem.sources, "docs": source})
        ended = store.status()
        missing = [s for s in changed.proposed(store) if s.run_id not in ended]
        assert [s.run_id for s in missing] == [s.run_id for s in changed.runs("docs")]
        trained = sum(s.tokens for s in missing)
        assert trained == 3 * source.tokens < sum(s.tokens for s in changed.specs())


def test_rounds_are_the_same_however_often_they_are_interrupted(store, tmp_path):
    dem = planted_dem(search=OmegaSearch(rounds=(8, 4, 4)))
    other = rayx.open(tmp_path / "whole", create=True)
    sweep(dem, other)
    whole = [s.run_id for s in dem.proposed(other)]
    seen = 0
    while new := [s for s in dem.proposed(store) if s.run_id not in store.status()]:
        asked = [s.run_id for s in dem.proposed(store)]
        assert asked == whole[: len(asked)]  # a round that is half done proposes itself again
        for spec in new[: max(1, len(new) // 2)]:
            store.put(planted(spec))
        seen += 1
    assert [s.run_id for s in dem.proposed(store)] == whole and seen > 5
    assert dem.decide(store).spec == dem.decide(other).spec


def test_failed_runs_and_candidates_are_passed_over(store):
    dem = planted_dem(search=OmegaSearch(rounds=(10, 5)))
    fast = {runs[0].run_id for runs in map(dem.runs, DOMAINS)}
    for spec in dem.specs():
        store.put(planted(spec, failed=spec.run_id in fast))
    first = [s for s in dem.proposed(store) if isinstance(s, MergeSpec)]
    for number, spec in enumerate(first):
        store.put(planted(spec, failed=number < 2))
    sweep(dem, store)
    found = dem.decide(store)
    assert np.isinf(found.loss_C).sum() == 2 and np.isfinite(found.loss)
    broken = dataclasses.replace(dem, lr_shares=(5.0,))
    for spec in broken.specs():
        store.put(planted(spec, failed=True))
    with pytest.raises(StoreError, match="failed; try smaller lr_shares"):
        broken.experts(store)


@pytest.mark.parametrize("how", ["guided", "random"])
def test_a_search_in_which_all_candidates_failed_says_so(store, how):
    dem = planted_dem(search=OmegaSearch(how=how, rounds=(4, 2)))
    for spec in dem.specs():
        store.put(planted(spec))
    for spec in dem.proposed(store):
        store.put(planted(spec, failed=isinstance(spec, MergeSpec)))
    with pytest.raises(StoreError, match="All merged candidates failed"):
        dem.decide(store)


def test_search_spaces():
    sources = ("a", "b")
    values = {"a": (0.5,), "b": tuple(np.linspace(0, 1, 3))}  # fixed, and a range
    grid = OmegaSearch(how="grid", values=values).first(sources)
    assert grid.tolist() == [[0.5, 0.0], [0.5, 0.5], [0.5, 1.0]]
    both = OmegaSearch(how="grid", values=(0.0, 1.0)).first(sources)
    assert both.tolist() == [[0, 1], [1, 0], [1, 1]]  # all zero is no merge
    drawn = OmegaSearch(how="random", values=(0.25, 2.0), scales=(), rounds=(9,)).first(sources)
    assert sorted(map(tuple, drawn)) == [(0.25, 0.25), (0.25, 2), (2, 0.25), (2, 2)]
    normed = OmegaSearch(how="random", scales=(0.5, 3.0), rounds=(5, 15)).first(sources)
    assert normed[:2].tolist() == [[0.25, 0.25], [1.5, 1.5]] and len(normed) == 20
    assert set(np.round(normed.sum(1), 9)) == {0.5, 3.0}  # never 1 of itself
    other = OmegaSearch(how="random", scales=(0.5, 3.0), rounds=(5, 15), seed=1).first(sources)
    assert not np.array_equal(normed, other)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"how": "annealing"}, "OmegaSearch.how is 'annealing'"),
        ({"values": ()}, "OmegaSearch.values"),
        ({"values": (-0.5, 1.0)}, "numbers >= 0"),
        ({"values": (0.0,)}, "not all 0"),
        ({"scales": (0.0, 1.0)}, "OmegaSearch.scales"),
        ({"rounds": ()}, "OmegaSearch.rounds"),
        ({"rounds": (8, 0)}, "counts > 0"),
    ],
)
def test_searches_that_make_no_sense_are_refused(arguments, what):
    with pytest.raises(SpecError, match=what):
        OmegaSearch(**arguments)


def test_a_study_without_rates_is_refused():
    with pytest.raises(SpecError, match="some of each"):
        planted_dem(lr_shares=())


def test_a_grid_that_is_too_large_and_a_source_without_values_are_refused():
    with pytest.raises(SpecError, match="15625"):
        OmegaSearch(how="grid").first(tuple("abcdef"))
    with pytest.raises(SpecError, match=r"\['b'\]"):
        OmegaSearch(values={"a": (1.0,)}).first(("a", "b"))


def test_the_objective_weighs_targets(store):
    dem = planted_dem()
    losses = {d: Loss(1.0, float(i), 0.0) for i, d in enumerate(DOMAINS)}
    assert mean_loss(losses, {"docs": 1.0, "legal": 3.0}) == pytest.approx(1.75)
    assert mean_loss({}, {"docs": 1.0}) == np.inf
    for spec in dem.specs():
        store.put(planted(spec))
    member, loss = best_state(store, dem.runs("code"), {"code": 1.0})
    assert (member.spec, member.steps) == (dem.runs("code")[1], 30)
    assert loss == pytest.approx(2.0 - 1.0 + 0.05)


def test_the_experiment_reports_every_arm_on_text_that_no_choice_saw(store):
    p = study.Parameters(seeds=2, width=16)
    trained = []

    def do(specs):
        for spec in specs:
            if spec.run_id not in store.status():
                store.put(planted(spec))
        trained.append(specs)

    do([dem.base for dem in study.studies(p, CORPUS).values()])
    do(study.specs(p, CORPUS))
    while new := [s for s in study.propose(p, CORPUS, store) if s.run_id not in store.status()]:
        do(new)
    chosen_on = {s.evaluation.part for specs in trained for s in specs}
    assert study.analyse(p, CORPUS, store, do) is None
    assert chosen_on == {"first"} and {s.evaluation.part for s in trained[-1]} == {"second"}
    said = json.loads(store.read_bytes("reports/dem.json"))
    arms = set(said["arm_less_dem"])
    assert arms >= {"DEM", "soup", "ties", "dare", "base", study.PROPORTIONAL, study.MIXING}
    full = 3 * study.SOURCE_TOKENS // 128 * 128
    rows = store.read_bytes("reports/dem.csv").decode().splitlines()
    assert len(rows) == 1 + 2 * len(arms)
    mixtures = study.mixing(p, CORPUS)
    assert len(mixtures) == 12 and len(set(mixtures)) == 12  # 3 (sources + 1)
    assert mixtures[0] == study.natural(p, CORPUS)
    (dem, _) = study.studies(p, CORPUS).values()
    costs = study.costs(p, CORPUS, store, dem)
    rates = len(study.LR_SHARES)
    assert costs[study.MIXING] == pytest.approx((12 + rates - 1) * full, rel=0.01)
    assert costs[study.PROPORTIONAL] == pytest.approx(rates * full, rel=0.01)
    assert said["cost_ratio"] == pytest.approx(costs[study.MIXING] / costs["DEM"], rel=0.01)
    runs = study.single_runs(p, CORPUS, dem)
    for name, tried in runs.items():
        assert {run.tokens for run in tried} == {runs[study.PROPORTIONAL][0].tokens}, name

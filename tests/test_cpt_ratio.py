"""Continued pretraining on planted losses: the ratios that are predicted and measured are true."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

import rayx
from rayx.experiment import load_experiment
from rayx.methods.cpt_ratio import CptLaws
from rayx.methods.cpt_verify import (
    critical_from_half,
    law_errors,
    mean_arms,
    measured_best,
    once_over,
)
from rayx.record import CurvePoint, Loss
from tests.samples import record

study = load_experiment(Path(__file__).parents[1] / "experiments" / "cpt_ratio.py")

DOMAINS = ("code", "docs", "legal", "wiki")
CORPUS = SimpleNamespace(domains=DOMAINS, fingerprint="c0ffee")
PARAMETERS = study.Parameters(verify_seeds=2, domain_tokens=150_000)
BASE = 1.5  # general loss before, at every size


def planted_loss(params, tokens, share):
    """A D-CPT law of a corpus by its share of the tokens."""
    return 0.9 + 30 / params**0.4 + 8 * share**0.6 / tokens**0.35 + 0.25 / (share + 0.08) ** 0.5


def planted(spec):
    """The record of a run whose losses follow the law at every point, all general domains alike."""
    if spec.parent is None:
        losses = {d: Loss(2 * BASE, BASE, 0.01) for d in DOMAINS}
        return dataclasses.replace(
            record(spec), curve=(CurvePoint(spec.steps, spec.tokens, losses),)
        )
    ratio, curve = spec.schedule.average().get("code", 0.0), []
    for point in range(spec.evaluation.points):
        step = round(spec.steps * (point + 1) / spec.evaluation.points)
        tokens = step * spec.batch_tokens
        domain = planted_loss(spec.model.params, tokens, ratio)
        general = planted_loss(spec.model.params, tokens, 1.0 - ratio)
        losses = {d: Loss(2 * general, general, 0.01) for d in DOMAINS}
        losses["code"] = Loss(2 * domain, domain, 0.01)
        curve.append(CurvePoint(step, tokens, losses))
    return dataclasses.replace(record(spec), curve=tuple(curve))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of the experiment on a store of planted runs, and what it trained at last."""
    store = rayx.open(tmp_path_factory.mktemp("cpt") / "store", create=True)
    trained = []

    def sweep(specs):
        trained.append(specs)
        for spec in specs:
            for run in spec.path:
                store.put(planted(run))

    sweep(study.specs(PARAMETERS, CORPUS))
    assert study.analyse(PARAMETERS, CORPUS, store, sweep) is None
    assert store.read_bytes("reports/cpt_ratio.png")[:4] == b"\x89PNG"
    return json.loads(store.read_bytes("reports/cpt_ratio.json")), trained[1]


def larger_params() -> int:
    return study.template(CORPUS, study.LARGER_WIDTH, 0).model.params


def test_a_branch_goes_on_with_its_trunk_at_the_ratio():
    method = study.method(PARAMETERS, CORPUS)
    template = study.template(CORPUS, 32, 7)
    run = method.branch(template, 0.25, 150_000)
    trunk = run.parent.spec
    assert run.parent.steps == trunk.steps
    assert trunk.schedule.average() == rayx.Mixture.uniform(DOMAINS[1:])
    assert (run.optimizer.warmup_share, run.optimizer.decay_share) == (0.0, 0.0)
    assert trunk.optimizer.decay_share == 0.0 and trunk.optimizer.lr == run.optimizer.lr
    assert run.schedule.domain_tokens(run.tokens) == pytest.approx(
        {"code": run.tokens / 4, **dict.fromkeys(DOMAINS[1:], run.tokens / 4)}, rel=1e-3
    )
    assert run.evaluation.points == 150_000 // study.POINT_TOKENS
    assert (run.seed, run.data_seed) == (trunk.seed, trunk.data_seed) == (7, 7)


def test_the_larger_size_and_its_ratios_and_seeds_are_new_to_the_laws():
    fitted = {t.model.params for t in study.smaller(PARAMETERS, CORPUS)}
    assert larger_params() > max(fitted) and study.LARGER_TOKENS > study.TOKENS
    seeds = {t.seed for t in study.larger(PARAMETERS, CORPUS)}
    assert len(seeds) == 2 and not seeds & {t.seed for t in study.smaller(PARAMETERS, CORPUS)}
    assert set(study.CHECKED) & set(study.RATIOS) == {study.NO_REPLAY}


def test_the_ratio_within_a_limit_is_that_of_the_planted_law(written):
    report, _ = written
    ratio_G = np.linspace(0, 1, 100_001)
    general_G = planted_loss(larger_params(), study.LARGER_TOKENS, 1 - ratio_G)
    domain_G = planted_loss(larger_params(), study.LARGER_TOKENS, ratio_G)
    limit = 1.03 * BASE
    assert report["general_loss_limit"] == pytest.approx(limit)
    allowed_G = general_G <= limit
    truth = ratio_G[np.argmin(np.where(allowed_G, domain_G, np.inf))]
    assert 0.1 < truth < 0.95 and not allowed_G.all()  # the limit binds
    for seed in report["seeds"]:
        found = seed["within"]
        assert found["predicted_ratio"] == pytest.approx(truth, abs=0.005)
        assert found["measured_ratio"] == pytest.approx(truth, abs=0.03)
        assert found["loss_at_predicted"] == pytest.approx(domain_G[allowed_G].min(), rel=2e-3)
        assert found["arms"][-1]["ratio"] == found["predicted_ratio"]
        assert found["arms"][-1]["general_rise"] == pytest.approx(0.03, abs=2e-3)
        rows = {row["ratio"]: row for row in found["arms"]}
        assert set(rows) == {*study.CHECKED, found["predicted_ratio"]}
        for ratio, row in rows.items():
            expected = planted_loss(larger_params(), row["tokens"], 1 - ratio)
            assert row["general_rise"] == pytest.approx(expected / BASE - 1, abs=1e-6)


def test_the_ratio_of_few_tokens_is_that_of_the_planted_law(written):
    report, trained = written
    ratio_G = np.linspace(1e-4, 1, 100_001)
    tokens_G = np.minimum(study.LARGER_TOKENS, PARAMETERS.domain_tokens / ratio_G)
    loss_G = planted_loss(larger_params(), tokens_G, ratio_G)
    assert {run.model.width for run in trained} == {study.LARGER_WIDTH}
    for seed in report["seeds"]:
        predicted = seed["few"]["predicted_ratio"]
        (run,) = (
            r
            for r in trained
            if r.seed == seed["seed"] and r.schedule.average()["code"] == pytest.approx(predicted)
        )
        used = run.schedule.average()["code"] * run.tokens
        assert used == pytest.approx(PARAMETERS.domain_tokens, abs=run.batch_tokens)
        tokens = min(study.LARGER_TOKENS, PARAMETERS.domain_tokens / predicted)
        assert planted_loss(larger_params(), tokens, predicted) < loss_G.min() * (1 + 1e-4)


def test_what_was_predicted_is_trained_with_every_seed(written):
    report, trained = written
    predicted = {report["seeds"][0][usage]["predicted_ratio"] for usage in ("within", "few")}
    shares = {run.schedule.average()["code"] for run in trained}
    assert sorted(shares) == pytest.approx(sorted(predicted), abs=2e-6)
    assert {run.seed for run in trained} == {seed["seed"] for seed in report["seeds"]}


def test_laws_of_planted_losses_have_no_error_and_a_wrong_law_has_its_own(written):
    report, _ = written
    assert max(report["law_errors"].values()) < 1e-3
    assert {name.rpartition("_")[2] for name in report["law_errors"]} == {"length", "beyond"}

    class TenPercentHigh(CptLaws):
        def predict(self, params, tokens, ratio_M):
            return 1.1 * np.stack([planted_loss(params, tokens, r) for r in (ratio_M, 1 - ratio_M)])

    rows = [
        (9_000, seed, r, t, planted_loss(9_000, t, r), planted_loss(9_000, t, 1 - r))
        for seed in (1, 2)
        for r in (0.2, 0.6)
        for t in (100, 200)
    ]
    names = ["params", "seed", "ratio", "tokens", "domain_loss", "general_loss"]
    errors = law_errors(
        TenPercentHigh(domain=None, general=None), pd.DataFrame(rows, columns=names), 150
    )
    assert errors == pytest.approx(dict.fromkeys(errors, 0.1)) and len(errors) == 4


def points(domain, general, ratio=(0.0, 0.5, 1.0)):
    return pd.DataFrame({"ratio": ratio, "domain_loss": domain, "general_loss": general})


def test_measured_best_is_where_the_limit_binds_or_the_loss_is_lowest():
    straight = points([3.0, 2.5, 2.0], [1.0, 1.5, 2.0])
    assert measured_best(straight, 1.75) == pytest.approx((0.75, 2.25), abs=1e-3)
    assert measured_best(straight, 2.0) == (1.0, 2.0)
    assert measured_best(points([3.0, 2.0, 2.5], [1.0, 1.5, 2.0])) == pytest.approx((0.5, 2.0))
    assert np.isnan(measured_best(straight, 0.9)).all()


def test_once_over_stops_a_curve_where_its_domain_tokens_end():
    curves = pd.DataFrame(
        [(r, t, 5 - t / 100, 1 + r) for r in (0.1, 0.5, 1.0) for t in (0, 100, 200)],
        columns=["ratio", "tokens", "domain_loss", "general_loss"],
    )
    found = once_over(curves, 50)
    assert found["tokens"].tolist() == [200, 100, 50]
    assert found["domain_loss"].tolist() == pytest.approx([3.0, 4.0, 4.5])
    assert once_over(curves)["tokens"].tolist() == [200] * 3


def test_mean_arms_are_means_over_seeds():
    seeds = [
        {"few": {"arms": [{"ratio": r, "domain_loss": r + s} for r in (0.5, 1.0)]}} for s in (1, 3)
    ]
    assert mean_arms(seeds, "few").to_dict("list") == {
        "ratio": [0.5, 1.0],
        "domain_loss": [2.5, 3.0],
    }


def critical_curves(top: float) -> pd.DataFrame:
    """General losses that reach 2.06 at the ratio .4 + 20 T^-.5, among ratios up to `top`."""
    rows = []
    for ratio in np.linspace(0.2, top, 6):
        for tokens in np.arange(0, 48_001, 3_000):
            domain = 3.0 - 0.01 * (tokens / 1_000) ** 0.5
            critical = 0.4 + 20 * tokens**-0.5 if tokens else 0.0
            general = 2.06 + 0.2 * (ratio - critical) if tokens else 2.0
            rows.append((ratio, tokens, domain, general))
    return pd.DataFrame(rows, columns=["ratio", "tokens", "domain_loss", "general_loss"])


def test_critical_ratio_of_the_whole_is_foretold_by_the_half():
    truth = 0.4 + 20 * 48_000**-0.5
    assert critical_from_half(critical_curves(1.0), 0.06) == pytest.approx(truth, abs=2e-3)
    assert np.isnan(critical_from_half(critical_curves(0.3), 0.06))  # all ratios are feasible

"""Splits: the split equation against closed forms, points from records, the study end to end."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar
from typer.testing import CliRunner

import rayx
from rayx import Evaluation, Mixture, ModelShape, Optimizer, Phase, Schedule, TrainSpec
from rayx.branching import make_branch, make_trunk
from rayx.cli.main import command_tree
from rayx.errors import ChoiceError, FitError, SpecError
from rayx.fit.laws import Chinchilla, SplitInteraction, SplitProportional
from rayx.methods.optimal_split import OptimalSplit, judge
from rayx.plan import Plan
from rayx.record import CurvePoint, Loss
from rayx.split import choose_split, fit_split_law, split_curves, split_points, split_share_curve
from tests.samples import record

K = 4
TRUTH = {"E": 1.2, "A": 40.0, "alpha": 0.4, "B": 60.0, "beta": 0.35, "D1": 4e4, "gamma": 0.3}
DOMAINS = ("code", "law", "news", "web")
BATCH = 512  # tokens of a step


def true_loss(kind, params, tokens, spec_tokens):
    theta = {name: np.array([[value]]) for name, value in TRUTH.items()}
    inputs = {"params": params, "tokens": tokens, "spec_tokens": spec_tokens}
    return kind().loss(theta, {n: np.atleast_1d(np.asarray(v, float)) for n, v in inputs.items()})[
        0
    ][0]


def draw_points(kind, noise: float = 0.002, seed: int = 0) -> pd.DataFrame:
    rows = [
        {"params": n, "tokens": d, "spec_tokens": s}
        for n in (5e4, 1e5, 2e5)
        for d in (1e5, 2.5e5, 5e5, 1e6)
        for s in (0, 2e4, 6e4, 1.2e5, 2.5e5)
    ]
    frame = pd.DataFrame(rows)
    loss = true_loss(kind, frame["params"], frame["tokens"], frame["spec_tokens"])
    error = np.random.default_rng(seed).normal(0.0, noise, len(frame))
    return frame.assign(loss=loss * np.exp(error))


def fitted(kind, **changes):
    points = draw_points(kind, **changes)
    columns = [points[n].to_numpy(float) for n in ("params", "tokens", "spec_tokens", "loss")]
    return kind(bootstrap=200).fit(*columns)


ASKED = {"params": 3e5, "branches": K, "least_trunk_tokens": 5e4}


@pytest.mark.parametrize("kind", [SplitInteraction, SplitProportional])
@pytest.mark.parametrize("budget", [4e5, 3e6])
def test_the_split_is_that_of_the_planted_law(kind, budget):
    choice = choose_split(fitted(kind), budget_tokens=budget, **ASKED)

    def loss_at(trunk: float) -> float:
        return float(true_loss(kind, 3e5, trunk, (budget - trunk) / K)[0])

    best = minimize_scalar(loss_at, bounds=(5e4, budget), method="bounded")
    assert loss_at(choice.trunk_tokens) <= min(best.fun, loss_at(budget)) * (1 + 1e-3)
    low, high = choice.trunk_interval
    assert low <= choice.trunk_tokens <= high and low * 0.98 <= best.x <= high * 1.02
    assert choice.predicted == pytest.approx(loss_at(choice.trunk_tokens), rel=0.01)
    assert choice.interval[0] < loss_at(choice.trunk_tokens) < choice.interval[1]
    assert choice.no_split == pytest.approx(loss_at(budget), rel=0.01)
    assert choice.branch_tokens == pytest.approx((budget - choice.trunk_tokens) / K)
    equal = float(true_loss(kind, 3e5, choice.multiplier * budget, 0.0)[0])
    assert equal == pytest.approx(best.fun, rel=0.01)
    assert choice.multiplier_interval[0] <= choice.multiplier <= choice.multiplier_interval[1]


def test_splitting_pays_from_the_closed_form_on():
    # B gamma / (D^beta D1) / K > beta B / D^(beta + 1)  <=>  D > K beta D1 / gamma
    choice = choose_split(fitted(SplitInteraction), budget_tokens=2e6, **ASKED)
    expected = K * TRUTH["beta"] * TRUTH["D1"] / TRUTH["gamma"]
    assert choice.split_from_tokens == pytest.approx(expected, rel=0.05)
    assert choice.split_from_interval[0] <= expected <= choice.split_from_interval[1]


def test_fraction_falls_with_budget_and_larger_models_split_later():
    curves = split_curves(
        fitted(SplitProportional), params=[5e4, 1e6], budgets=[4e5, 1e6, 1e7], branches=K,
        least_trunk_tokens=5e4,
    )  # fmt: skip
    small, large = (rows for _, rows in curves.groupby("params"))
    assert (np.diff(small["fraction"]) < 0).all() and (np.diff(large["fraction"]) < 0).all()
    assert (large["split_from_tokens"].to_numpy() > small["split_from_tokens"].to_numpy()).all()
    # With size as a term of its own, it does not matter.
    apart = split_curves(
        fitted(SplitInteraction), params=[5e4, 1e6], budgets=[1e6], branches=K,
        least_trunk_tokens=5e4,
    )  # fmt: skip
    assert apart["split_from_tokens"].nunique() == 1


def test_without_a_gain_from_branches_there_is_no_split():
    points = draw_points(SplitInteraction)
    plain = points.assign(loss=true_loss(SplitInteraction, points["params"], points["tokens"], 0.0))
    columns = [plain[n].to_numpy(float) for n in ("params", "tokens", "spec_tokens", "loss")]
    law = SplitInteraction(bootstrap=50).fit(*columns)
    choice = choose_split(law, budget_tokens=1e6, **ASKED)
    assert choice.trunk_tokens == 1e6 and choice.branch_tokens == 0.0 and choice.fraction == 1.0
    assert choice.multiplier == pytest.approx(1.0, rel=0.01)
    assert json.loads(choice.to_json())["split_from_tokens"] is None or (
        choice.split_from_tokens > 1e7
    )


def test_the_law_of_the_data_is_chosen_by_extrapolation_and_told_how_well_it_does():
    law, error = fit_split_law(draw_points(SplitProportional, noise=5e-4))
    assert error < 0.003
    plain, plain_error = fit_split_law(draw_points(SplitProportional, noise=5e-4), "split_additive")
    assert plain.name == "split_additive" and plain_error > error
    with pytest.raises(FitError, match="no split law 'split_addtive'.*Did you mean"):
        fit_split_law(draw_points(SplitProportional), "split_addtive")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"params": 0}, "params is 0; expected a number of at least 1"),
        ({"branches": 1}, "branches is 1; expected a number of at least 2"),
        ({"budget_tokens": 1e4}, "budget_tokens is 10000.0; expected a number of at least 50000"),
        ({"budget_tokens": np.nan}, "budget_tokens is nan"),
    ],
)
def test_what_cannot_be_split_is_refused(changes, words):
    with pytest.raises(ChoiceError, match=words):
        choose_split(fitted(SplitInteraction), **{"budget_tokens": 1e6, **ASKED, **changes})


def test_laws_of_other_inputs_or_without_bootstrap_are_refused():
    rng = np.random.default_rng(0)
    params, tokens = np.exp(rng.uniform(11, 14, (2, 40)))
    law = Chinchilla().fit(params, tokens, 1.0 + params**-0.3 + tokens**-0.3)
    with pytest.raises(FitError, match="chinchilla takes params, tokens; expected params, "):
        choose_split(law, budget_tokens=1e6, **ASKED)
    with pytest.raises(FitError, match="bootstrap=1000"):
        choose_split(
            SplitInteraction().fit(
                *(
                    draw_points(SplitInteraction)[n].to_numpy(float)
                    for n in ("params", "tokens", "spec_tokens", "loss")
                )
            ),
            budget_tokens=1e6,
            **ASKED,
        )


# Branching and points ------------------------------------------------------------------------


def template(width: int = 64, seed: int = 0) -> TrainSpec:
    return TrainSpec(
        corpus="c0ffee",
        model=ModelShape(layers=1, width=width, heads=2, ffn_width=64, vocab_size=256, context=64),
        schedule=Schedule.constant(Mixture.uniform(DOMAINS), 100 * BATCH),
        optimizer=Optimizer(lr=0.01, batch_sequences=8, warmup_share=0.02),
        evaluation=Evaluation(points=1, sequences=8),
        seed=seed,
    )


def test_a_branch_leaves_where_the_decay_begins_or_the_mixture_changes():
    trunk = make_trunk(template(), Mixture.uniform(DOMAINS), 200 * BATCH)
    assert trunk.optimizer.decay_share == 0.0
    assert round(trunk.optimizer.warmup_share * trunk.steps) == 2  # as in the template
    code = Phase(Mixture({"code": 1}), 100 * BATCH)
    late = make_branch(trunk, 100 * BATCH, (code,), 0.2)  # decays over 40 of 200 steps
    assert late.parent.steps == 100 and late.steps == 100
    assert late.optimizer.decay_share * late.steps == pytest.approx(40)
    short = Phase(Mixture({"code": 1}), 10 * BATCH)
    early = make_branch(trunk, 100 * BATCH, (short,), 0.2)  # 22 of 110: 12 before the split
    assert early.parent.steps == 88 and early.steps == 22
    assert [p.tokens for p in early.schedule.phases] == [12 * BATCH, 10 * BATCH]
    assert early.optimizer.decay_share == pytest.approx(1.0)
    whole = make_branch(trunk, 200 * BATCH, (), 0.2)
    assert whole.parent.steps == 160 and whole.trunk_tokens + whole.tokens == 200 * BATCH
    alone = make_branch(trunk, 0, (code,), 0.2)
    assert alone.parent is None and round(alone.optimizer.warmup_share * alone.steps) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((300 * BATCH, (), 0.2), "leave its trunk after 122,880 tokens; expected 1,024"),
        ((1 * BATCH, (Phase(Mixture({"code": 1}), 9 * BATCH),), 0.2), "after 512 tokens"),
        ((0, (), 0.2), "trains nothing"),
        ((100 * BATCH, (), 1.5), "decay_share is 1.5"),
    ],
)
def test_a_branch_that_cannot_be_is_refused(arguments, words):
    trunk = make_trunk(template(), Mixture.uniform(DOMAINS), 200 * BATCH)
    with pytest.raises(SpecError, match=words):
        make_branch(trunk, *arguments)


def planted_record(spec: TrainSpec):
    """The record that the planted law gives a run: its own domain's loss, the others' far off."""
    total = spec.trunk_tokens + spec.tokens
    last = spec.schedule.phases[-1]
    own = set(last.mixture) if len(last.mixture) == 1 else set(DOMAINS)
    special = last.tokens if len(last.mixture) == 1 else 0
    bpb = float(true_loss(SplitProportional, spec.model.params, total - special, special)[0])
    bpb *= 1.0 + 1e-4 * np.random.default_rng(int(spec.run_id, 16)).normal()
    losses = {
        d: Loss(1.0, (bpb if d in own else 9.0) + 0.1 * (i - 1.5), 0.01)
        for i, d in enumerate(DOMAINS)
    }
    curve = (CurvePoint(spec.steps, spec.tokens, losses),)
    return dataclasses.replace(record(spec), curve=curve)


def study(store=None) -> OptimalSplit:
    @dataclasses.dataclass
    class SomeCorpus:
        domains = DOMAINS
        tokens = dict.fromkeys(DOMAINS, 1_000_000)
        fingerprint = "c0ffee"
        mixture_labels = staticmethod(lambda mixture: {})

    lengths = [n * BATCH for n in (200, 500, 1000, 2000)]
    points = [(d, s) for d in lengths for s in (0, 40 * BATCH, 120 * BATCH, 300 * BATCH)]
    return OptimalSplit(
        corpus=SomeCorpus(),  # pyright: ignore
        scales=tuple(template(width) for width in (32, 64, 128)),
        points=tuple(points),
        general=Mixture.uniform(DOMAINS),
        domains=DOMAINS,
        final=template(192),
        budget_tokens=6000 * BATCH,
    )


def test_points_are_read_back_from_the_records_of_a_study():
    method = study()
    specs = method.specs()
    assert len(specs) == 3 * 4 * (1 + 3 * K)
    trunks = {s.parent.spec.run_id: s.parent.spec for s in specs}
    records = [planted_record(s) for s in (*specs, *trunks.values())]
    points = split_points(records)
    assert len(points) == 3 * 16
    asked = {(d // BATCH, s // BATCH) for d, s in method.points}
    assert set(zip(points["tokens"] // BATCH, points["spec_tokens"] // BATCH, strict=True)) == asked
    loss = true_loss(SplitProportional, points["params"], points["tokens"], points["spec_tokens"])
    np.testing.assert_allclose(points["loss"], loss, rtol=1e-3)
    # A point that lacks one expert is left out, and so is a run that failed.
    lost = next(s for s in specs if len(s.schedule.phases[-1].mixture) == 1)
    assert len(split_points([r for r in records if r.run_id != lost.run_id])) == 3 * 16 - 1
    other = dataclasses.replace(
        records[0], spec=dataclasses.replace(records[0].spec, corpus="decaf", parent=None)
    )
    with pytest.raises(FitError, match="2 corpora or general mixtures"):
        split_points([*records, other])
    with pytest.raises(FitError, match="No trunk and branch lengths"):
        split_points([record()], ["code"])


def test_a_study_chooses_verifies_and_plans(tmp_path):
    method = study()
    store = rayx.open(tmp_path / "store", create=True)
    asked: list[TrainSpec] = []

    def sweep(specs):
        asked.extend(specs)
        for spec in specs:
            store.put(planted_record(spec))

    sweep(method.specs())
    found = method.conclude(store, sweep, "study")
    choice, verification = found.choice, found.verification
    assert len(verification["arms"]["choice"]["loss_bpb"]) == len(method.seeds) == 3
    assert verification["seeds_below_no_split"] == 3
    assert max(map(abs, verification["prediction_error"].values())) < 0.02
    assert max(verification["excess_over_best_fixed"]) < 0.005
    assert "in 3 of 3 seeds" in verification["verdict"]
    assert store.read_bytes("reports/study.png")[:4] == b"\x89PNG"
    assert len(store.read_bytes("reports/study.csv").splitlines()) == 1 + 3 * 16
    # The plan reads back, and carries out to the runs that were verified.
    plan = Plan.from_json(json.loads(json.dumps(store.read_json("plans/study.json"))))
    assert plan == found.plan and set(plan.branches) == set(DOMAINS)
    assert plan.schedule.tokens == round(choice.trunk_tokens)
    seeded = dataclasses.replace(method.final, seed=1000, data_seed=1000)
    for spec in plan.specs(seeded).values():
        twin = next(s for s in asked if s.schedule == spec.schedule and s.seed == 1000)
        assert spec.parent.steps == twin.parent.steps
    total = plan.schedule.tokens + sum(b.tokens for b in plan.branches.values())
    assert total == pytest.approx(method.budget_tokens, abs=K)
    shares = split_share_curve(*method.decide(store)[1:])
    assert shares["loss"].min() == pytest.approx(choice.predicted, rel=1e-3)


def test_judge_says_plainly_when_the_choice_lost():
    arms = {
        "choice": {"predicted": 2.0, "loss_bpb": [2.1, 2.2]},
        "no_split": {"predicted": 2.2, "loss_bpb": [2.0, 2.3]},
        "fixed_0.5": {"predicted": 2.1, "loss_bpb": [2.0, 2.1]},
    }
    found = judge(arms)
    assert found["seeds_below_no_split"] == 1
    assert found["excess_over_best_fixed"] == pytest.approx([0.05, 2.2 / 2.1 - 1])
    assert found["prediction_error"]["choice"] == pytest.approx(2.0 / 2.15 - 1)
    assert "in 1 of 2 seeds" in found["verdict"] and "+5.00%" in found["verdict"]


# The command ---------------------------------------------------------------------------------


def call(*arguments: str):
    return CliRunner().invoke(command_tree(), ["split", *arguments])


def test_split_from_a_csv_is_that_of_the_planted_law(tmp_path):
    path = tmp_path / "points.csv"
    draw_points(SplitInteraction).to_csv(path, index=False)
    asked = ["--runs", str(path), "--params", "3e5", "--tokens", "2e6", "--branches", str(K)]
    done = call(*asked, "--law", "split_interaction", "--json", "--plot", str(tmp_path / "f.png"))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["law"] == "split_interaction" and 0 < found["fraction"] < 1
    assert found["extrapolation_error"] < 0.01
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    shown = call(*asked, "--law", "split_interaction")
    assert f"{found['fraction']:.3f} (choice)" in shown.output and "no split" in shown.output


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ([], SpecError, "Give a STORE, or --runs"),
        (["--runs", "none.csv", "--branches", "4"], SpecError, "No file 'none.csv'"),
        (["--runs", "{csv}"], SpecError, "give --branches"),
        (["--runs", "{csv}", "--branches", "4", "--law", "x"], FitError, "no split law 'x'"),
        (["--runs", "{bad}", "--branches", "4"], FitError, "no column 'spec_tokens'"),
        (["--runs", "{csv}", "--branches", "4", "--plot", "no/f.png"], SpecError, "Cannot write"),
    ],
)
def test_bad_calls_are_named(tmp_path, arguments, error, words):
    points = draw_points(SplitInteraction)
    points.to_csv(tmp_path / "points.csv", index=False)
    points[["params", "tokens", "loss"]].to_csv(tmp_path / "bad.csv", index=False)
    places = {"csv": tmp_path / "points.csv", "bad": tmp_path / "bad.csv"}
    done = call("--params", "1e5", "--tokens", "1e6", *(a.format(**places) for a in arguments))
    assert isinstance(done.exception, error) and words in str(done.exception)

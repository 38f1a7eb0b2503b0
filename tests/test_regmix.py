"""RegMix, verification and plan on planted losses: no training, no Ray."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

import rayx
from rayx import Evaluation, Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.choose import Choice
from rayx.errors import SpecError, StoreError
from rayx.methods.regmix import RegMix
from rayx.plan import Plan
from rayx.record import CurvePoint, Failure, Loss
from rayx.verify import CHOICE, compare, verdict, verification_specs
from tests.samples import record

OBJECTIVE = {"code": 2.0, "news": 1.0}


def planted_bpb(mixture: Mixture, target: str, params: int) -> float:
    """Each target learns from its own domain and a little from the others; convex in the shares."""
    own = mixture.get(target, 0.0)
    return 1.0 + 1.0 / (0.5 + 2.0 * (own + 1e-3) ** 0.5 + 0.3 * (1 - own) ** 0.5) + 30 / params**0.5


def planted_record(spec: TrainSpec, noise: float = 0.002):
    rng = np.random.default_rng(int(spec.run_id, 16))
    mixture = spec.schedule.average()
    losses = {}
    for target in ("code", "law", "news"):
        bpb = planted_bpb(mixture, target, spec.model.params) + noise * float(rng.normal())
        losses[target] = Loss(2 * bpb, bpb, 0.01)
    return dataclasses.replace(record(spec), curve=(CurvePoint(spec.steps, spec.tokens, losses),))


@pytest.fixture
def store(tmp_path):
    return rayx.open(tmp_path / "store", create=True)


@pytest.fixture
def regmix(tiny_corpus) -> RegMix:
    anything = Mixture.uniform(tiny_corpus.domains)
    proxy = TrainSpec(
        corpus=tiny_corpus.fingerprint,
        model=ModelShape(
            layers=1, width=16, heads=2, ffn_width=32, vocab_size=tiny_corpus.vocab_size, context=16
        ),
        schedule=Schedule.constant(anything, 20_000),
        optimizer=Optimizer(lr=1e-2, batch_sequences=4),
        evaluation=Evaluation(points=1, sequences=8),
    )
    larger = dataclasses.replace(
        proxy, model=dataclasses.replace(proxy.model, width=32, ffn_width=64)
    )
    return RegMix(
        corpus=tiny_corpus,
        proxy=proxy,
        num_proxies=32,
        objective=OBJECTIVE,
        budget_tokens=2 * sum(tiny_corpus.tokens.values()),
        max_epochs=4.0,
        seed=3,
        regressor="inverse-power",
        verification=larger,
    )


def sweep_into(store):
    def sweep(specs):
        for spec in specs:
            store.put(planted_record(spec))

    return sweep


def test_specs_hold_the_baselines_first_and_keep_to_the_caps(regmix):
    specs = regmix.specs()
    assert len(specs) == 32 and len({s.run_id for s in specs}) == 32
    baselines = regmix.baselines()
    assert [s.schedule.average() for s in specs[:2]] == list(baselines.values())
    for spec in specs:
        mixture = spec.schedule.average()
        assert all(share <= regmix.caps[domain] + 1e-9 for domain, share in mixture.items())
        assert (spec.seed, spec.data_seed) == (3, 3)  # common random numbers
    assert regmix.specs() == specs
    other = dataclasses.replace(regmix, seed=4)
    assert not {s.run_id for s in other.specs()} & {s.run_id for s in specs}


def test_conclude_finds_the_planted_optimum_and_proves_it(regmix, store, tiny_corpus):
    sweep = sweep_into(store)
    sweep(regmix.specs())
    conclusion = regmix.conclude(store, sweep, "mine")
    choice = conclusion.choice
    grid = np.random.default_rng(0).dirichlet(np.ones(3), 20_000)
    caps_K = np.array([regmix.caps[d] for d in tiny_corpus.domains])

    def objective(w_K):
        mixture = Mixture.from_array(w_K, tiny_corpus.domains)
        params = regmix.proxy.model.params
        return sum(w * planted_bpb(mixture, t, params) for t, w in OBJECTIVE.items()) / 3

    best = min(objective(w_K) for w_K in grid[(grid <= caps_K).all(1)])
    chosen = np.array([choice.weights[d] for d in tiny_corpus.domains])
    uniform = np.full(3, 1 / 3)
    assert objective(chosen) - best < 0.1 * (objective(uniform) - best)

    verification = conclusion.verification
    assert verification["verdict"].startswith("The choice beat uniform by")
    assert verification["comparisons"]["uniform"]["seeds_won"] == 3
    assert store.read_json("verifications/mine.json") == verification
    assert Choice.from_json(store.read_bytes("choices/mine.json").decode()) == choice
    plan = Plan.from_json(store.read_json("plans/mine.json"))
    assert plan == conclusion.plan and plan.verdict == verification["verdict"]
    assert max(plan.epochs.values()) <= 4.0 + 1e-5
    assert sum(m for m in plan.schedule.phases[0].mixture.millionths.values()) == 1_000_000
    page = store.read_bytes("reports/mine.html").decode()
    assert plan.verdict.split(" bpb")[0] in page
    # the same store gives the same choice
    assert regmix.decide(store)[1] == choice


def test_rounds_follow_the_records_and_come_out_the_same_after_an_interruption(regmix, store):
    method = dataclasses.replace(regmix, rounds=3, num_proxies=48)
    first = method.specs()
    assert len(first) == 16 and method.proposed(store) == first
    for spec in first[:-1]:
        store.put(planted_record(spec))
    assert method.proposed(store) == first  # the round has not ended
    store.put(planted_record(first[-1]))
    second = method.proposed(store)
    assert len(second) == 32 and second[:16] == first
    for spec in second[16:]:
        store.put(planted_record(spec))
    third = method.proposed(store)
    assert (
        len({s.run_id for s in third}) == 48 and third[:32] == second == method.proposed(store)[:32]
    )
    for spec in third[32:]:
        store.put(planted_record(spec))
    assert method.proposed(store) == third
    for spec in third:
        for domain, share in spec.schedule.average().items():
            assert share <= method.caps[domain] + 2e-6

    def value(spec: TrainSpec) -> float:
        mixture = spec.schedule.average()
        return sum(w * planted_bpb(mixture, t, 10**4) for t, w in OBJECTIVE.items())

    means = [np.mean([value(s) for s in third[i : i + 16]]) for i in (0, 16, 32)]
    assert means[1] < means[0] and means[2] < means[0]  # later rounds look where it is good
    fitted, _ = method.decide(store)
    assert len(fitted.table) == 48


def test_follow_up_cost_counts_what_verification_takes(regmix):
    specs = regmix.follow_up_cost()
    assert len(specs) == 4 * 3
    assert {s.model.width for s in specs} == {32}
    assert dataclasses.replace(regmix, verification=None).follow_up_cost() == []


def test_compare_reports_paired_differences(store, regmix):
    arms = {CHOICE: Mixture({"code": 7, "news": 3}), "uniform": Mixture({"code": 1, "law": 2})}
    specs = verification_specs(regmix.proxy, arms, [5, 6, 7, 8])
    assert [s.seed for s in specs[CHOICE]] == [s.data_seed for s in specs[CHOICE]] == [5, 6, 7, 8]
    values = {CHOICE: [1.0, 1.2, 1.1, 1.3], "uniform": [1.1, 1.25, 1.3, 1.2]}
    for arm, by_seed in values.items():
        for spec, bpb in zip(specs[arm], by_seed, strict=True):
            losses = {"code": Loss(1, bpb, 0.1), "law": Loss(1, 9.0, 0.1)}
            point = CurvePoint(spec.steps, spec.tokens, losses)
            store.put(dataclasses.replace(record(spec), curve=(point,)))
    result = compare(store, specs, {"code": 3.0})
    differences = np.subtract(values[CHOICE], values["uniform"])
    found = result["comparisons"]["uniform"]
    assert found["difference_bpb"] == pytest.approx(differences.mean())
    assert found["stderr_bpb"] == pytest.approx(differences.std(ddof=1) / 2)
    assert (found["seeds_won"], found["seeds"]) == (3, 4)
    pooled = np.sqrt(np.mean([np.var(v, ddof=1) for v in values.values()]))
    assert result["seed_sd_bpb"] == pytest.approx(pooled)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    # one seed has no spread, and says so instead of inventing one
    single = compare(store, {arm: s[:1] for arm, s in specs.items()}, {"code": 1.0})
    assert single["seed_sd_bpb"] is None and single["comparisons"]["uniform"]["stderr_bpb"] is None
    assert "noise" not in single["verdict"]


def test_compare_refuses_a_failed_run(store, regmix):
    specs = verification_specs(regmix.proxy, {CHOICE: Mixture({"code": 1})}, [1])
    failure = Failure(type="Diverged", message="loss is nan at step 3")
    store.put(dataclasses.replace(record(specs[CHOICE][0]), curve=(), failure=failure))
    with pytest.raises(StoreError, match="arm 'choice' failed: loss is nan.*--retry-failed"):
        compare(store, specs, {"code": 1.0})


def test_verdict_says_losses_as_plainly_as_wins():
    comparisons = {
        "uniform": {"difference_bpb": -0.02, "stderr_bpb": 0.001, "seeds_won": 3, "seeds": 3},
        "best_random": {"difference_bpb": 0.01, "stderr_bpb": 0.02, "seeds_won": 1, "seeds": 3},
    }
    text = verdict(comparisons, 0.004)
    assert text == (
        "The choice beat uniform by 0.0200 ± 0.0010 bpb (3 of 3 seeds); it lost to best random by "
        "0.0100 ± 0.0200 bpb (1 of 3 seeds); seed noise is 0.0040 bpb."
    )
    del comparisons["uniform"]
    assert verdict(comparisons, float("nan")).startswith("It lost to best random")


@pytest.mark.parametrize("data", [[], {"format": 99}, {"format": 1}, {"format": 1, "schedule": []}])
def test_plan_refuses_what_is_not_one(data):
    with pytest.raises(SpecError, match="Plan (has format|cannot be read)|no phases"):
        Plan.from_json(data)

"""Runs on shared trunks: planted ends are chosen, arms have equal tokens, and costs are as said."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rayx
from rayx import Mixture, Schedule
from rayx.errors import SpecError, StoreError
from rayx.methods.cooldown import Cooldown
from rayx.methods.upsampling import BASE, Upsampling, effects
from rayx.mixture import Phase
from rayx.plan import Plan
from rayx.policies.scalarised import Scalarised
from rayx.record import CurvePoint, Loss, Record
from rayx.schedules import on_trunk, switch_points, upsample_at_end, without
from rayx.spec import Evaluation, TrainSpec
from tests.samples import SPEC, record

SUPPLY = {"code": 32_000, "legal": 8_000, "docs": 1_000}
WEB, CODE = Mixture({"web": 1}), Mixture({"code": 1})


# Runs that share a trunk


BATCH = 4 * 128  # tokens, of SPEC
BUDGET = 400 * BATCH
TEMPLATE = dataclasses.replace(
    SPEC,
    schedule=Schedule.constant(Mixture(SUPPLY), BUDGET),
    evaluation=Evaluation(points=1, sequences=8, part="first"),
)


def path_tokens(run: TrainSpec) -> int:
    """Tokens from the first ancestor's start to the run's end."""
    return run.steps * BATCH + (run.parent.path_steps * BATCH if run.parent else 0)


def read_by(run: TrainSpec) -> dict[str, float]:
    """Domain -> tokens on the whole path."""
    before = {}
    if run.parent:
        before = run.parent.spec.schedule.domain_tokens(run.parent.steps * BATCH)
    own = run.schedule.domain_tokens(run.tokens)
    return {d: before.get(d, 0) + own.get(d, 0) for d in {*before, *own}}


def distinct_tokens(runs) -> int:
    """What a sweep of these runs trains: each run and each ancestor once."""
    return sum({s.run_id: s.tokens for run in runs for s in run.path}.values())


@settings(max_examples=60, deadline=None)
@given(
    share=st.floats(min_value=0.01, max_value=0.9),
    decay=st.floats(min_value=0.05, max_value=0.9),
    tokens=st.integers(min_value=40 * BATCH, max_value=100 * BATCH),
)
def test_a_run_on_a_trunk_reads_its_schedule_and_decays_as_the_whole_run(share, decay, tokens):
    optimizer = dataclasses.replace(SPEC.optimizer, decay_share=decay, warmup_share=0.02)
    template = dataclasses.replace(
        TEMPLATE, schedule=Schedule.constant(WEB, tokens), optimizer=optimizer
    )
    schedule = upsample_at_end(WEB, CODE, tokens, share)
    run = on_trunk(template, schedule)
    assert path_tokens(run) == pytest.approx(tokens, abs=1.5 * BATCH)
    read = read_by(run)
    assert read["code"] == pytest.approx(share * tokens, abs=BATCH)
    total = path_tokens(run) // BATCH
    assert run.optimizer.decay_share * run.steps == pytest.approx(decay * total, abs=1)
    if run.parent:
        leave = run.parent.path_steps
        assert leave == min(total - round(run.optimizer.decay_share * run.steps),
                            round(schedule.phases[0].tokens / BATCH))  # fmt: skip
        assert run.parent.spec.optimizer.decay_share == 0


def test_a_schedule_of_other_tokens_than_the_template_is_refused():
    with pytest.raises(SpecError, match="tokens of a schedule is 100; expected those of the templ"):
        on_trunk(TEMPLATE, Schedule.constant(WEB, 100))


# Upsampling at the end


FINALS = {"even": Mixture.uniform([*SUPPLY]), "small": Mixture({"docs": 3, "legal": 1})}
BEST = {"even": 0.1, "small": 0.2}  # where each final mixture is best; `small` is best of all


def study(**changes) -> Upsampling:
    usual = {
        "template": TEMPLATE,
        "base": Mixture(SUPPLY),
        "finals": FINALS,
        "objective": dict.fromkeys(SUPPLY, 1.0),
    }
    return Upsampling(**(usual | changes))


def planted(spec: TrainSpec, bpb: dict[str, float]) -> Record:
    losses = {d: Loss(2 * value, value, 0.01) for d, value in bpb.items()}
    point = CurvePoint(spec.steps, spec.tokens, losses)
    return dataclasses.replace(record(spec), curve=(point,))


def planted_upsampling(bowl: float = 1.0):
    """A study with records: each final mixture has a bowl over its shares."""
    upsampling = study()
    records = []
    for (final, share), run in upsampling.runs().items():
        off = 0.5 if final == BASE else (share - BEST[final]) ** 2 * bowl
        level = {"even": 2.0, "small": 1.9, BASE: 1.95}[final]
        records.append(planted(run, dict.fromkeys(SUPPLY, level + off)))
    return upsampling, records


@pytest.fixture
def store(tmp_path):
    return rayx.open(tmp_path / "store", create=True)


def test_all_arms_are_branches_of_one_trunk_with_equal_tokens():
    runs = study().runs()
    assert list(runs) == [(BASE, 0.0)] + [(f, s) for f in FINALS for s in (0.05, 0.1, 0.2, 0.3)]
    assert len({run.parent.spec.run_id for run in runs.values() if run.parent}) == 1
    assert {path_tokens(run) for run in runs.values()} == {BUDGET}
    for (final, share), run in runs.items():
        expected = {d: w * BUDGET * (1 - share) for d, w in Mixture(SUPPLY).items()}
        for d, w in FINALS.get(final, {}).items():
            expected[d] = expected.get(d, 0) + w * BUDGET * share
        assert read_by(run) == pytest.approx(expected, abs=BATCH)
    # A trunk of .8, base and shares up to .2 go on from .8, a share of .3 from .7.
    shares = 0.8 + 0.2 + len(FINALS) * (0.2 + 0.2 + 0.2 + 0.3)
    assert distinct_tokens(runs.values()) == pytest.approx(shares * BUDGET, rel=0.01)
    assert distinct_tokens(runs.values()) < 0.4 * len(runs) * BUDGET


def test_the_planted_best_end_is_chosen_and_planned(store):
    upsampling, records = planted_upsampling()
    for item in records:
        store.put(item)
    choice = upsampling.decide(store)
    assert (choice.final, choice.share) == ("small", 0.2)
    assert choice.loss == pytest.approx(1.9) and choice.switch == pytest.approx(0.8, abs=1e-5)
    assert choice.losses["even"]["0.3"] == pytest.approx(2.04)
    corpus = SimpleNamespace(
        domains=tuple(SUPPLY),
        tokens=SUPPLY,
        fingerprint="c0ffee",
        mixture_labels=lambda mixture: {"licence": {"mit": 1.0}},
    )
    plan = upsampling.plan(choice, corpus, store)  # pyright: ignore[reportArgumentType]
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.schedule.phases[1] == Phase(FINALS["small"], BUDGET // 5)
    assert plan.epochs["docs"] == pytest.approx(
        (0.8 * BUDGET / 41_000) + 0.2 * 0.75 * BUDGET / 1_000, rel=1e-3
    )
    assert plan.choice["switch"] == choice.switch and plan.labels == {"licence": {"mit": 1.0}}
    assert plan.specs(TEMPLATE)["model"].schedule == choice.schedule


def test_no_upsampling_is_chosen_where_none_helps(store):
    upsampling, records = planted_upsampling(bowl=0.0)
    for item, (final, _) in zip(records, upsampling.runs(), strict=True):
        bpb = 1.5 if final == BASE else 2.0
        store.put(planted(item.spec, dict.fromkeys(SUPPLY, bpb)))
    choice = upsampling.decide(store)
    assert (choice.final, choice.share, choice.switch) == (BASE, 0.0, None)
    assert choice.schedule == Schedule.constant(Mixture(SUPPLY), BUDGET)


def test_failed_arms_are_passed_over_and_a_study_of_failures_is_refused(store):
    upsampling, records = planted_upsampling()
    for item, arm in zip(records, upsampling.runs(), strict=True):
        store.put(record(item.spec, failed=True) if arm == ("small", 0.2) else item)
    choice = upsampling.decide(store)
    assert choice.final == "small" and choice.share in (0.1, 0.3)
    assert choice.to_json()["losses"]["small"]["0.2"] is None


def test_a_study_of_failures_is_refused(store):
    upsampling = study()
    for run in upsampling.runs().values():
        store.put(record(run, failed=True))
    with pytest.raises(StoreError, match="All runs of the upsampling study failed"):
        upsampling.decide(store)


def test_dropping_from_the_final_phase_is_cheap_and_says_who_misses_the_domain(store):
    upsampling = study()
    full = upsampling.runs()["even", 0.2]
    dropped = upsampling.ablations("even", 0.2)
    assert {*dropped} == {*SUPPLY}
    assert {run.parent for run in dropped.values()} == {full.parent} != {None}
    for domain, run in dropped.items():
        assert run.schedule == Schedule.constant(without(FINALS["even"], domain), BUDGET // 5)
    whole = upsampling.ablations("even", 0.2, whole=True)
    assert all(domain not in read_by(run) for domain, run in whole.items())
    added = distinct_tokens([full, *dropped.values()]) - distinct_tokens([full])
    assert added == len(dropped) * (BUDGET // 5)
    assert distinct_tokens(whole.values()) > 4 * added
    store.put(planted(full, dict.fromkeys(SUPPLY, 2.0)))
    for domain, run in dropped.items():  # a domain is missed by its own target alone
        store.put(planted(run, {t: 2.0 + 0.3 * (t == domain) for t in SUPPLY}))
    found = effects(store, full, dropped)
    assert len(found) == 9
    own = (found["dropped"] == found["target"]).to_numpy()
    np.testing.assert_allclose(found["effect"], 0.3 * own, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"finals": {}}, "names in Upsampling.finals"),
        ({"finals": {BASE: CODE}}, "not 'base'"),
        ({"objective": {}}, "Upsampling.objective"),
        ({"shares": (0.1, -0.2)}, "share in Upsampling.shares is -0.2"),
        ({"shares": (1.0,)}, "share in Upsampling.shares is 1.0"),
    ],
)
def test_an_upsampling_study_without_meaning_is_refused(changes, named):
    with pytest.raises(SpecError, match=named):
        study(**changes)


@pytest.mark.parametrize("arm", [(BASE, 0.0), ("even", 0.0), ("unknown", 0.1)])
def test_only_a_final_phase_can_be_ablated(arm):
    with pytest.raises(SpecError, match="The arm to ablate"):
        study().ablations(*arm)


def test_a_final_phase_of_one_domain_has_nothing_to_drop():
    with pytest.raises(SpecError, match="one of several in the mixture: docs"):
        study(finals={"docs": Mixture({"docs": 1})}).ablations("docs", 0.1)


# Cooldown's arms


def test_arms_have_equal_tokens_and_those_that_begin_alike_share_a_trunk():
    study = Cooldown(template=TEMPLATE, tokens_by_domain=SUPPLY)
    runs = study.runs()
    assert {path_tokens(run) for run in runs.values()} == {BUDGET}
    trunks = {arm: run.parent.spec.run_id for arm, run in runs.items() if run.parent}
    assert trunks["cooldown"] == trunks["temperature 5"] != trunks["reversed"]
    assert trunks["reversed"] == trunks["proportional"] != trunks["uniform"]
    cooled, reverse = read_by(runs["cooldown"]), read_by(runs["reversed"])
    assert cooled == pytest.approx(reverse, abs=2 * BATCH)  # only the order differs
    assert read_by(runs["average"]) == pytest.approx(cooled, abs=2 * BATCH)
    # Two pairs with a trunk of .8 and branches of .2 and .5, and three whole runs.
    assert distinct_tokens(runs.values()) == pytest.approx((2 * 1.5 + 3) * BUDGET, rel=0.02)
    by_loss = runs["scalarised 5"]
    assert by_loss.policy == Scalarised() and by_loss.schedule.average() == Mixture(SUPPLY)


def test_an_earlier_cooldown_reads_as_much_as_its_reverse():
    arms = Cooldown(template=TEMPLATE, tokens_by_domain=SUPPLY, tau=3, share=0.2).schedules()
    assert arms["cooldown"].average() == arms["reversed"].average()
    assert switch_points(arms["cooldown"]) == pytest.approx((0.2,), abs=1e-5)
    assert switch_points(arms["reversed"]) == pytest.approx((0.8,), abs=1e-5)


def test_groups_are_thirds_by_size_and_the_table_averages_them(store):
    supply = {"a": 5, "b": 50, "c": 20, "d": 1, "e": 40, "f": 2}
    study = Cooldown(template=TEMPLATE, tokens_by_domain=supply)
    assert study.groups() == {"high": ("b", "e"), "mid": ("c", "a"), "low": ("f", "d")}
    good, failed = SPEC, dataclasses.replace(SPEC, seed=5)
    store.put(planted(good, {d: float(n) for d, n in supply.items()}))
    store.put(record(failed, failed=True))
    table = study.table(store, {"good": good, "failed": failed}).set_index("arm")
    row = table.loc["good"].to_dict()
    assert {k: row[k] for k in ("high", "mid", "low")} == {"high": 45.0, "mid": 12.5, "low": 1.5}
    assert row["loss"] == pytest.approx(118 / 6) and row["b"] == 50.0
    assert table.loc["failed"].isna().all()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tau": 1.0}, "Cooldown.tau is 1.0"),
        ({"share": 1.0}, "Cooldown.share is 1.0"),
        ({"tokens_by_domain": {"a": 1, "b": 2}}, "domains of Cooldown"),
    ],
)
def test_a_cooldown_without_meaning_is_refused(changes, named):
    with pytest.raises(SpecError, match=named):
        Cooldown(**({"template": TEMPLATE, "tokens_by_domain": SUPPLY} | changes))


def test_an_arm_over_the_cap_of_epochs_is_refused_by_its_domain():
    with pytest.raises(SpecError, match="over domain 'docs'"):
        Cooldown(template=TEMPLATE, tokens_by_domain=SUPPLY, max_epochs=5).schedules()

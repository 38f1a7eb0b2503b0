"""DeMix on a planted world: rounds, resume, the choice in the hull, costs; no training, no Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest

import rayx
from rayx import Mixture
from rayx.choice.problem import prepare
from rayx.choose import Constraints, Simulate
from rayx.errors import SpecError
from rayx.fit import Table, fit_table
from rayx.merging import MergeSpec, Spec
from rayx.methods.demix import DeMix, InHull
from rayx.spec import TrainSpec
from rayx.store import Store
from rayx.verify import CHOICE, compare
from tests.test_merge_proxy import EVALUATION_FLOPS, TARGETS, merge_proxy, planted_record

OBJECTIVE = {"code": 1.0, "law": 2.0, "news": 1.0}
NEEDS = np.array([[1.0, 0.1, 0.0], [0.2, 1.2, 0.1], [0.0, 0.3, 0.9]])  # target x domain


def planted_bpb(mixture: Mixture) -> np.ndarray:
    """Losses of a mixture, convex in the shares; each target has a domain of its own."""
    return 1.0 + 0.4 / (0.2 + NEEDS @ (mixture.to_array(TARGETS) + 0.01) ** 0.5)


def sweep_into(store: Store, noise: float = 3e-4, bias: float = 0.01):
    """A sweep that writes planted losses; merged models are `bias` worse."""

    def sweep(specs: Sequence[Spec]) -> None:
        for spec in specs:
            rng = np.random.default_rng(int(spec.run_id, 16))
            worse = bias if isinstance(spec, MergeSpec) else 0.0
            bpb_T = planted_bpb(spec.mixture) + worse + noise * rng.standard_normal(3)
            store.put(planted_record(spec, bpb_T))

    return sweep


def search(**changes) -> DeMix:
    usual = {
        "proxies": merge_proxy(),
        "prior": {"code": 300, "law": 100, "news": 200},
        "objective": OBJECTIVE,
        "rounds": (24, 12, 6),
        "regressor": "inverse-power",
        "pool": 20_000,
        "top_k": 64,
    }
    return DeMix(**(usual | changes))


@pytest.fixture
def store(tmp_path) -> Store:
    return rayx.open(tmp_path / "store", create=True)


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> tuple[DeMix, Store, list[Spec]]:
    """One search that has ended, its store and its candidates."""
    store = rayx.open(tmp_path_factory.mktemp("searched") / "store", create=True)
    return search(), store, run(search(), store)


def run(demix: DeMix, store: Store) -> list[Spec]:
    """Sweep until no candidate is new."""
    sweep, specs = sweep_into(store), demix.specs()
    while True:
        sweep([spec for spec in specs if spec.run_id not in store.status()])
        more = demix.proposed(store)
        if len(more) == len(specs):
            return specs
        specs = more


def objective_of(weights_K: np.ndarray) -> float:
    shares = np.array([OBJECTIVE[t] for t in TARGETS]) / 4
    return float(planted_bpb(Mixture.from_array(weights_K, TARGETS)) @ shares)


def test_rounds_are_a_function_of_the_records(store):
    demix = search()
    first = demix.specs()
    assert len(first) == 24 == len({spec.run_id for spec in first})
    assert all(isinstance(spec, MergeSpec) for spec in first)
    sweep = sweep_into(store)
    sweep(first[:-1])
    assert demix.proposed(store) == first  # a round is not over before all its records are there
    sweep(first[-1:])
    second = demix.proposed(store)
    assert len(second) == 36 and second[:24] == first
    sweep(second[24:30])
    assert demix.proposed(store) == second  # an interrupted round is proposed again as it was
    sweep(second[30:])
    third = demix.proposed(store)
    assert len(third) == 42 and third[:36] == second
    assert len({spec.run_id for spec in third}) == 42
    assert {spec.run_id for spec in search(seed=1).specs()}.isdisjoint(s.run_id for s in first)


def test_later_rounds_are_predicted_better_and_stay_in_the_hull(searched):
    demix, _, specs = searched
    floors_K = 0.5 * demix.proxies.general.to_array(TARGETS)
    for spec in specs:
        assert (spec.mixture.to_array(TARGETS) >= floors_K - 1e-5).all()
    value = [objective_of(spec.mixture.to_array(TARGETS)) for spec in specs]
    assert np.mean(value[24:]) < np.mean(value[:24])


def test_the_choice_is_near_the_best_mixture_of_the_hull(searched):
    demix, store, _ = searched
    _, choice = demix.decide(store)
    chosen_K = np.array([choice.weights[d] for d in TARGETS])
    floors_K = demix.constraints.floors_K
    grid_MK = floors_K + 0.5 * np.random.default_rng(0).dirichlet(np.ones(3), 5_000)
    best = min(map(objective_of, grid_MK))
    uniform = objective_of(np.full(3, 1 / 3))
    assert (chosen_K >= floors_K - 1e-6).all()
    assert objective_of(chosen_K) - best < 0.1 * (uniform - best)
    assert choice.method["top_k"] == 64


def test_a_choice_that_the_experts_general_text_holds_back_says_so(searched):
    demix, store, _ = searched
    alone = dataclasses.replace(demix, objective={"law": 1.0}, rounds=(24,))
    _, choice = alone.decide(store)
    # For law alone the world wants less code than the experts' general half holds.
    assert any("floor of code" in bound for bound in choice.binding)
    assert choice.weights["code"] == pytest.approx(0.25, abs=0.01)


def test_caps_of_the_final_run_are_kept_by_candidates_and_choice(store):
    demix = search(caps={"law": 0.4}, rounds=(24,))
    specs = run(demix, store)
    assert max(spec.mixture["law"] for spec in specs) <= 0.4 + 1e-5
    _, choice = demix.decide(store)
    assert choice.weights["law"] == pytest.approx(0.4, abs=0.02)
    assert choice.weights["law"] <= 0.4 + 1e-9


def test_cost_is_the_experts_and_one_evaluation_a_candidate(searched):
    demix, store, _ = searched
    evaluation = EVALUATION_FLOPS / (6 * demix.proxies.template.model.matmul_params)
    assert demix.cost_tokens(store) == pytest.approx(3 * 6_400 + 42 * evaluation)
    short = search(expert_tokens=3_200, rounds=(24,))
    run(short, store)
    assert short.cost_tokens(store) == pytest.approx(3 * 3_200 + 24 * evaluation)


def test_trained_candidates_are_regmix_on_the_same_region(store):
    demix, regmix = search(rounds=(24,)), search(rounds=(24,), trained_tokens=640)
    specs = run(regmix, store)
    assert all(isinstance(spec, TrainSpec) and spec.tokens == 640 for spec in specs)
    for merged, trained in zip(demix.specs(), specs, strict=True):
        assert trained.mixture.to_array(TARGETS) == pytest.approx(
            merged.mixture.to_array(TARGETS), abs=1e-5
        )
    assert regmix.cost_tokens(store) == 24 * 640
    assert regmix.decide(store)[1].baselines["best_seen"].predicted > 0


def test_verification_trains_every_arm_over_new_seeds(searched):
    demix, store, _ = searched
    _, choice = demix.decide(store)
    arms = demix.arms(choice)
    assert list(arms) == [CHOICE, "uniform", "proportional"]
    assert arms["proportional"]["code"] == pytest.approx(0.5 * 0.5 + 0.5 * 0.5)
    runs = demix.follow_up(arms, [100, 101, 102])
    for s in range(3):
        assert len({runs[arm][s].parent for arm in arms}) == 1  # one trunk a seed
    assert [spec.seed for spec in runs[CHOICE]] == [100, 101, 102]
    assert {spec.tokens for specs in runs.values() for spec in specs} == {6_400}
    sweep_into(store)([spec for specs in runs.values() for spec in specs])
    found = compare(store, runs, OBJECTIVE)
    assert found["comparisons"]["uniform"]["seeds_won"] == 3


def test_the_pool_fills_the_hull_where_simulate_sits_on_its_floors():
    rng = np.random.default_rng(0)
    weights_RK = rng.dirichlet(np.ones(3), 24)
    table = Table(
        run_ids=tuple(map(str, range(24))),
        domains=TARGETS,
        targets=TARGETS,
        weights_RK=weights_RK,
        losses_RM=np.stack([planted_bpb(Mixture.from_array(w, TARGETS)) for w in weights_RK]),
    )
    constraints = Constraints.by_name(TARGETS, floors=dict.fromkeys(TARGETS, 0.25))
    prior: dict[str, float] = dict.fromkeys(TARGETS, 1.0)
    problem = prepare(fit_table(table, "ridge"), OBJECTIVE, prior, constraints)
    inside = []
    for chooser in (InHull(num_candidates=3_000), Simulate(num_candidates=3_000)):
        around_MK = chooser.solve(problem, 0).around_MK
        assert (around_MK >= 0.25 - 1e-9).all()
        assert around_MK.sum(1) == pytest.approx(1.0)
        inside.append((around_MK > 0.25 + 1e-6).all(1).mean())
    assert inside[0] > inside[1]


def test_a_search_without_an_expert_for_a_domain_of_the_prior_is_refused():
    with pytest.raises(SpecError, match="books"):
        search(prior={"code": 1, "law": 1, "news": 1, "books": 1})
    with pytest.raises(SpecError, match=r"DeMix\.rounds"):
        dataclasses.replace(search(), rounds=())

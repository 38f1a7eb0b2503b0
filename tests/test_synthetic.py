"""The analytic world against closed forms, brute force and the store's own reading of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import rayx
from rayx.choose import Constraints, Simulate, choose
from rayx.errors import ChoiceError, SpecError
from rayx.fit import Table, fit_table
from rayx.mixture import Mixture
from rayx.synthetic import World


def test_optimum_one_target_equals_the_closed_form():
    world = World(
        domains=("a", "b", "c"),
        targets=("t",),
        floor=np.array([0.5]),
        gain=np.array([[1.0, 2.0, 3.0]]),
        power=np.full((1, 3), 0.5),
        supply={"a": 1, "b": 1, "c": 1},
        eps=1e-9,
    )
    # With one gamma: w_k is proportional to C_k ** (1 / (1 - gamma)).
    expected = np.array([1.0, 4.0, 9.0]) / 14.0
    found = world.optimum({"t": 1.0}).to_array(world.domains)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("seed", range(3))
def test_optimum_with_caps_beats_every_mixture_of_a_grid(seed):
    world = World.random(3, 2, seed=seed)
    objective = {world.targets[0]: 0.7, world.targets[1]: 0.3}
    caps = {world.domains[0]: 0.25, world.domains[1]: 0.6}
    found = world.optimum(objective, caps)
    assert found[world.domains[0]] <= 0.25 + 1e-6
    steps = np.linspace(0, 1, 201)
    grid = np.array([(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1])
    grid = grid[(grid[:, 0] <= 0.25) & (grid[:, 1] <= 0.6)]
    best_of_grid = (world.loss(grid, 1e6, 1e7) @ [0.7, 0.3]).min()
    optimum = float(world.loss(found.to_array(world.domains)[None], 1e6, 1e7)[0] @ [0.7, 0.3])
    assert best_of_grid - 1e-3 < optimum <= best_of_grid + 1e-6


def test_optimum_of_impossible_demands_is_refused():
    world = World.random(3, 1)
    with pytest.raises(ChoiceError, match="Did you mean 'web'"):
        world.optimum({"wep": 1.0})
    with pytest.raises(ChoiceError, match="nothing to choose"):
        world.optimum({"web": 1.0}, dict.fromkeys(world.domains, 0.3))


def test_loss_falls_with_params_and_tokens_and_with_the_targets_own_domain():
    world = World.random(4, 4, seed=2)
    uniform = np.full((1, 4), 0.25)
    assert (world.loss(uniform, 1e6, 1e7) > world.loss(uniform, 2e6, 1e7)).all()
    assert (world.loss(uniform, 1e6, 1e7) > world.loss(uniform, 1e6, 2e7)).all()
    with_most = 0.2 + 0.2 * np.eye(4)
    with_none = (1 - np.eye(4)) / 3
    own = np.diag(world.loss(with_most, 1e6, 1e7)), np.diag(world.loss(with_none, 1e6, 1e7))
    assert (own[0] < own[1]).all()


def test_record_curve_falls_and_ends_at_the_law_plus_noise():
    world = World.random(4, 3, seed=1, noise_sd=0.01)
    noise = []
    for seed in range(60):
        spec = world.spec(Mixture.uniform(world.domains), 1_000_000, seed=seed)
        record = world.record(spec)
        bpb_PT = np.array([[p.losses[t].bpb for t in world.targets] for p in record.curve])
        assert (np.diff(bpb_PT, axis=0) < 0).all()
        assert record.curve[-1].tokens == spec.tokens == record.tokens
        weights = spec.schedule.average().to_array(world.domains)[None]
        noise.append(bpb_PT[-1] - world.loss(weights, spec.model.params, spec.tokens)[0])
    assert np.std(noise) == pytest.approx(0.01, rel=0.2)
    assert abs(np.mean(noise)) < 4 * 0.01 / np.sqrt(180)


def test_record_same_spec_gives_the_same_record_and_another_seed_another():
    spec = World.random(3, 2, seed=5).spec({"web": 1, "code": 1}, 500_000)
    first, again = (World.random(3, 2, seed=5).record(spec) for _ in range(2))
    assert first == again
    other = World.random(3, 2, seed=5).record(dataclasses.replace(spec, seed=1))
    assert other.losses["web"].bpb != first.losses["web"].bpb


def test_record_spec_of_another_world_is_refused():
    spec = World.random(3, 2, seed=5).spec({"web": 1}, 500_000)
    with pytest.raises(SpecError, match="this world"):
        World.random(3, 2, seed=6).record(spec)


def test_fill_store_reads_back_losses_failures_and_epochs(tmp_path):
    world = World.random(4, 3, seed=3, failing_share=0.2)
    rng = np.random.default_rng(0)
    specs = [
        world.spec(Mixture.from_array(w, world.domains), 400_000)
        for w in rng.dirichlet(np.ones(4), 80)
    ]
    store = rayx.open(tmp_path / "store", create=True)
    assert world.fill(store, specs) == 80
    failed = sum(state == "failed" for state in store.status().values())
    assert 6 <= failed <= 28  # 16 expected
    runs = store.runs()
    ok = runs[runs["status"] == "ok"]
    weights = ok[[f"weight/{d}" for d in world.domains]].to_numpy()
    losses = ok[[f"loss/{t}" for t in world.targets]].to_numpy()
    law = world.loss(weights, specs[0].model.params, specs[0].tokens)
    assert np.std(losses - law) == pytest.approx(world.noise_sd, rel=0.2)
    passes = ok[[f"epochs/{d}" for d in world.domains]].to_numpy()
    np.testing.assert_allclose(
        passes * list(world.supply.values()), weights * specs[0].tokens, rtol=1e-9
    )


@pytest.mark.parametrize("seed", [0, 1])
def test_pipeline_choice_is_near_the_optimum_and_better_than_the_best_run_seen(tmp_path, seed):
    world = World.random(4, 2, seed=seed, noise_sd=0.004)
    objective = {world.targets[0]: 0.5, world.targets[1]: 0.5}
    caps = {world.domains[0]: 0.35}
    weights_RK = np.random.default_rng(seed).dirichlet(np.ones(4), 64)
    specs = [world.spec(Mixture.from_array(w, world.domains), 400_000) for w in weights_RK]
    store = rayx.open(tmp_path / "store", create=True)
    world.fill(store, specs)
    fitted = fit_table(Table.from_frame(store.runs()), "auto", seed=seed)
    constraints = Constraints.by_name(fitted.table.domains, caps=caps)
    choice = choose(
        fitted,
        objective,
        world.supply,
        constraints,
        seed=seed,
        method=Simulate(num_candidates=20_000),
    )

    def objective_bpb(mixture):
        weights_1K = Mixture(mixture).to_array(world.domains)[None]
        return float(world.loss(weights_1K, specs[0].model.params, 400_000).mean())

    best = objective_bpb(world.optimum(objective, caps))
    regret = objective_bpb(choice.weights) - best
    regret_seen = objective_bpb(choice.baselines["best_seen"].weights) - best
    assert choice.weights[world.domains[0]] <= 0.35 + 1e-9
    # Half of a run's noise; the exact number is not the point.
    assert -1e-6 <= regret < 0.002 < objective_bpb(Mixture.uniform(world.domains)) - best
    assert regret < regret_seen

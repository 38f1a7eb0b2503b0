"""CLIMB on worlds with a known optimum: no training, no Ray."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import rayx.fit
import rayx.methods.climb
from rayx import Mixture
from rayx.choice.problem import Problem
from rayx.corpus import Corpus
from rayx.errors import ChoiceError, SpecError
from rayx.fit import ClimbTrees, boosted_trees, fit_table
from rayx.methods.climb import Climb, PoolOptimum
from rayx.methods.regmix import RegMix
from rayx.spec import TrainSpec
from rayx.store import Store
from rayx.synthetic import MODEL, World
from rayx.verify import CHOICE, objective_bpb
from tests.contracts.regressor_contract import draw_world

TOKENS = 200_000


def world_of(seed: int, num_domains: int = 8) -> World:
    """A world whose domains are of unequal supply: 1, 2 ... million tokens."""
    world = World.random(num_domains, 1, seed=seed, noise_sd=0.01)
    return dataclasses.replace(
        world, supply={d: 1_000_000 * (1 + k) for k, d in enumerate(world.domains)}
    )


def study(world: World, kind: type[RegMix], **changes: Any) -> Any:
    known = SimpleNamespace(
        domains=world.domains, tokens=dict(world.supply), fingerprint=world.fingerprint
    )
    return kind(
        corpus=cast(Corpus, known),
        proxy=world.spec(Mixture.uniform(world.domains), TOKENS),
        objective={world.targets[0]: 1.0},
        budget_tokens=4_000_000,
        **changes,
    )


def sweep(world: World, method: RegMix, store: Store) -> list[TrainSpec]:
    """Run rounds until none is new, and return all proxies."""
    specs = method.specs()
    while new := [spec for spec in specs if spec.run_id not in store.status()]:
        world.fill(store, new)
        specs = method.proposed(store)
    return specs


def true_bpb(world: World, mixture: Mixture) -> float:
    return float(world.loss(mixture.to_array(world.domains)[None], MODEL.params, TOKENS)[0, 0])


def open_in(folder) -> Store:
    return rayx.open(folder, create=True)


def test_climb_beats_random_search_and_uniform_at_equal_budget(tmp_path):
    gains = []
    for seed in range(3):
        world = world_of(seed)
        climb = study(world, Climb, sizes=(24, 12), seed=seed)
        random = study(world, RegMix, num_proxies=36, seed=seed)
        store = open_in(tmp_path / str(seed))
        assert len(sweep(world, climb, store)) == 36
        world.fill(store, random.specs())
        measured = {
            spec.mixture: objective_bpb({t: x.bpb for t, x in record.losses.items()}, {"web": 1.0})
            for spec, record in ((s, store.get(s.run_id)) for s in random.specs())
        }
        best_random = min(measured, key=measured.__getitem__)
        _, choice = climb.decide(store)
        chosen = true_bpb(world, Mixture(choice.weights))
        uniform = true_bpb(world, climb.baselines()["uniform"])
        gains.append((uniform - chosen, true_bpb(world, best_random) - chosen))
        for domain, share in choice.weights.items():
            assert share <= climb.caps[domain] + 1e-6
    assert np.min(gains) > 0 and np.mean(gains) > 0.02, gains


def test_rounds_shrink_look_where_it_is_good_and_come_out_the_same_after_an_interruption(tmp_path):
    world, store = world_of(3), open_in(tmp_path / "a")
    climb = study(world, Climb, sizes=(24, 12, 6), seed=3)
    assert (climb.num_proxies, climb.rounds) == (42, 3)
    first = climb.specs()
    assert len(first) == 24 and len({s.run_id for s in first}) == 24
    for spec in first:
        assert all(share <= climb.caps[d] + 1e-6 for d, share in spec.mixture.items())
    shares_RK = np.array([s.mixture.to_array(world.domains) for s in first])
    # Around the shares of the tokens: the largest domain has 8 times those of the smallest.
    assert shares_RK[:, -1].mean() > 2 * shares_RK[:, 0].mean()
    world.fill(store, first[1:])
    assert climb.proposed(store) == first  # the round has not ended
    world.fill(store, first[:1])
    second = climb.proposed(store)
    assert len(second) == 36 and second[:24] == first
    # A seed for each proxy, none of which another search or a verification (1,000 on) uses.
    assert [s.seed for s in second] == [s.data_seed for s in second] == [*range(400_000, 400_036)]
    shared = dataclasses.replace(climb, own_seeds=False)
    assert {s.seed for s in shared.specs()} == {3} and {s.mixture for s in shared.specs()} == {
        s.mixture for s in first
    }
    world.fill(store, second[24:30])  # killed in the middle of the second round
    assert climb.proposed(store) == second
    again = open_in(tmp_path / "b")  # another store, records in another order
    world.fill(again, reversed(first))
    assert climb.proposed(again) == second
    means = [np.mean([true_bpb(world, s.mixture) for s in part]) for part in (first, second[24:])]
    assert means[1] < means[0] - 0.02


def test_the_optimum_is_the_least_of_the_pool_and_tied_candidates_are_averaged(tmp_path):
    world, store = world_of(4), open_in(tmp_path / "a")
    climb = study(world, Climb, sizes=(40,), seed=4, chooser=PoolOptimum(), regressor="climb")
    sweep(world, climb, store)
    fitted, choice = climb.decide(store)
    assert choice.method["name"] == "pool optimum" and choice.method["averaged"] >= 1
    assert choice.regressors == {"web": "climb"}
    other = dataclasses.replace(climb, chooser=PoolOptimum(top_k=50)).decide(store)[1]
    assert choice.predicted <= other.predicted + 1e-12
    assert choice.predicted <= fitted.objective(fitted.table.weights_RK, {"web": 1.0}).min() + 1e-9
    arms = climb.arms(choice)
    assert list(arms) == [CHOICE, "uniform", "proportional", "best_proxy"]
    assert arms["best_proxy"] in {spec.mixture for spec in climb.specs()}


def test_early_stopping_never_sees_the_rows_of_a_test_fold(monkeypatch):
    weights_RK, loss_R = draw_world(60, seed=0)
    seen: list[tuple[set, set]] = []
    train = boosted_trees.lightgbm.train

    def watched(params, data, **options):
        rows = [{tuple(row) for row in part.data} for part in (data, *options["valid_sets"])]
        seen.append((rows[0], rows[1]))
        return train(params, data, **options)

    monkeypatch.setattr(boosted_trees.lightgbm, "train", watched)
    model = ClimbTrees(folds=5).fit(weights_RK, loss_R)
    assert len(seen) == 6  # without each fold, and once on all rows
    for grown, stopped_by in seen:
        assert grown and stopped_by and not grown & stopped_by
        assert len(stopped_by) == pytest.approx(0.2 * len(grown | stopped_by), abs=1)
    everything = set(map(tuple, weights_RK))
    tested = [everything - (grown | stopped_by) for grown, stopped_by in seen[:5]]
    # The rows that a fold's model has not seen, in either role, are just its test rows.
    assert sorted(map(len, tested)) == [12] * 5 and set.union(*tested) == everything
    assert seen[5][0] | seen[5][1] == everything and model.cross_fit_ is not None


def test_trees_do_not_depend_on_the_unit_of_the_loss():
    weights_RK, loss_R = draw_world(60, seed=1)
    plain = ClimbTrees(folds=0).fit(weights_RK, loss_R).predict(weights_RK)
    scaled = ClimbTrees(folds=0).fit(weights_RK, 1e-3 * loss_R + 7.0).predict(weights_RK)
    np.testing.assert_allclose(scaled, 1e-3 * plain + 7.0, rtol=1e-6)


def test_auto_does_not_know_the_published_predictor(tmp_path):
    world, store = world_of(5, 3), open_in(tmp_path / "a")
    sweep(world, study(world, Climb, sizes=(16,)), store)
    table = rayx.fit.Table.from_frame(store.runs())
    assert set(fit_table(table, "climb").cv["regressor"]) >= {"climb"}
    assert "climb" not in set(fit_table(table, "auto").cv["regressor"])


@pytest.mark.parametrize(
    ("num_domains", "changes", "words"),
    [
        (8, {"sizes": ()}, r"Climb.sizes is \(\); expected the proxies of each round, e.g. \(64"),
        (8, {"sizes": (8, 4)}, "sizes of round 1 is 8; expected at least 16 proxies"),
        (8, {"sizes": (64, 32, 1)}, "sizes of round 3 is 1; expected at least 2 proxies"),
        (8, {"sizes": (64, 32.0)}, "sizes of round 2 is 32.0; expected at least 2"),
        (8, {"concentration": 0.0}, "concentration is 0.0; expected more than 0"),
        (1, {}, r"Climb.domains is \('web',\); expected at least 2, to mix"),
        (2, {}, r"ask for 112 proxies; 2 domains under their caps leave about \d\d mixtures"),
        (8, {"max_epochs": 0.01}, "raise max_epochs or add data"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_is_trained(num_domains, changes, words):
    world = world_of(0, max(2, num_domains))
    if num_domains == 1:
        with pytest.raises(SpecError, match=words):
            one = SimpleNamespace(domains=("web",), tokens={"web": 10**7}, fingerprint="f")
            Climb(corpus=cast(Corpus, one), proxy=world.spec(Mixture({"web": 1}), TOKENS),
                  objective={"web": 1.0}, budget_tokens=10**6)  # fmt: skip
        return
    with pytest.raises(SpecError, match=words):
        study(world, Climb, **changes)


def test_a_pool_that_the_limits_leave_empty_is_named(monkeypatch):
    monkeypatch.setattr(rayx.methods.climb, "candidate_pool", lambda *_: np.empty((0, 3)))
    with pytest.raises(ChoiceError, match="No mixture of the pool is predicted to keep the limits"):
        PoolOptimum().solve(cast(Problem, None), 0)

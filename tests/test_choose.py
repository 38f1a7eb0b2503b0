"""Choosing a mixture: bounds kept exactly, better than what was seen, and honest about doubt."""

import json
import re

import numpy as np
import pytest
from scipy.optimize import minimize

from rayx.choose import Choice, Constraints, choose, simulate
from rayx.errors import ChoiceError, RayxError
from rayx.fit import Table, fit_table

DOMAINS: tuple[str, ...] = ("books", "code", "math", "news", "web", "wiki")
K = len(DOMAINS)
TARGETS = ("x", "y", "z")
OBJECTIVE = {"x": 2.0, "y": 1.0, "z": 1.0}


# --- a planted world: three inverse-power targets with a small interaction, caps, noise ---


def world_losses(seed, weights_MK):
    rng = np.random.default_rng(seed)
    strength, gamma = rng.uniform(0.05, 1, (3, K)), rng.uniform(0.1, 0.6, (3, K))
    floor, pairs = rng.uniform(1, 2, 3), 0.3 * rng.normal(size=(3, K, K))
    return np.stack(
        [
            (floor[t] + 1 / (strength[t] * (weights_MK + 1e-3) ** gamma[t]).sum(1))
            * (1 + 0.15 * np.einsum("mi,ij,mj->m", weights_MK, pairs[t], weights_MK))
            for t in range(3)
        ],
        axis=1,
    )


def true_objective(seed, weights):
    weights_K = np.array([weights[d] for d in DOMAINS]) if isinstance(weights, dict) else weights
    return float(world_losses(seed, weights_K[None])[0] @ [0.5, 0.25, 0.25])


def world(seed, noise=0.01, num_runs=48):
    rng = np.random.default_rng(1000 + seed)
    prior_K = rng.dirichlet(np.full(K, 2.0))
    bounds = Constraints(DOMAINS, np.full(K, 0.01), np.minimum(1, 3 * prior_K + 0.02))
    weights_RK = bounds.nearest(simulate(prior_K, num_runs, rng))
    noise_RT = np.exp(noise * rng.normal(size=(num_runs, 3)))
    table = Table(
        run_ids=tuple(map(str, range(num_runs))),
        domains=DOMAINS,
        targets=TARGETS,
        weights_RK=weights_RK,
        losses_RM=world_losses(seed, weights_RK) * noise_RT,
    )
    return table, dict(zip(DOMAINS, prior_K, strict=True)), bounds


def true_optimum(seed, bounds):
    starts = bounds.nearest(np.random.default_rng(0).dirichlet(np.ones(K), 5))
    return min(
        minimize(
            lambda weights_K: true_objective(seed, weights_K),
            start_K,
            bounds=list(zip(bounds.floors_K, bounds.caps_K, strict=True)),
            constraints={"type": "eq", "fun": lambda weights_K: weights_K.sum() - 1},
            method="SLSQP",
        ).fun
        for start_K in starts
    )


@pytest.fixture(scope="module")
def case():
    table, prior, bounds = world(0)
    fitted = fit_table(table, "inverse-power")
    choice = choose(fitted, OBJECTIVE, prior, bounds, seed=0, num_candidates=20_000)
    return fitted, prior, bounds, choice


def test_choose_regret_is_below_best_seen_and_baselines_in_most_worlds():
    beaten, regrets = 0, []
    for seed in range(8):
        table, prior, bounds = world(seed)
        fitted = fit_table(table, "inverse-power")
        choice = choose(fitted, OBJECTIVE, prior, bounds, seed=0, num_candidates=20_000)
        optimum = true_optimum(seed, bounds)
        regret = true_objective(seed, choice.weights) - optimum
        others = {
            name: true_objective(seed, baseline.weights) - optimum
            for name, baseline in choice.baselines.items()
        }
        observed = table.losses_RM @ [0.5, 0.25, 0.25]
        others["argmin of noise"] = (
            true_objective(seed, table.weights_RK[observed.argmin()]) - optimum
        )
        beaten += regret < min(others.values())
        regrets.append(regret / others["best_seen"])
    assert beaten >= 7
    assert np.median(regrets) < 0.4


def test_choose_keeps_the_bounds_and_predicts_what_it_says(case):
    fitted, _, bounds, choice = case
    weights_K = np.array([choice.weights[domain] for domain in DOMAINS])
    assert sum(choice.weights.values()) == pytest.approx(1.0, abs=1e-12)
    assert (weights_K <= bounds.caps_K + 1e-12).all()
    assert (weights_K >= bounds.floors_K - 1e-12).all()
    assert choice.objective == {"x": 0.5, "y": 0.25, "z": 0.25}
    assert choice.predicted == pytest.approx(
        sum(choice.objective[target] * choice.predicted_losses[target] for target in TARGETS)
    )
    low, high = choice.interval
    assert low < true_objective(0, choice.weights) < high
    for baseline in choice.baselines.values():
        baseline_K = np.array(list(baseline.weights.values()))
        assert (baseline_K <= bounds.caps_K + 1e-12).all()
        assert baseline.regret == pytest.approx(baseline.predicted - choice.predicted)
        true_gap = true_objective(0, baseline.weights) - true_objective(0, choice.weights)
        assert baseline.regret_interval[0] < true_gap < baseline.regret_interval[1]
        assert baseline.std > 0


def test_choose_is_deterministic_and_json_round_trips(case):
    fitted, prior, bounds, choice = case
    again = choose(fitted, OBJECTIVE, prior, bounds, seed=0, num_candidates=20_000)
    assert again.weights == pytest.approx(choice.weights, abs=1e-9)
    assert Choice.from_json(choice.to_json()) == choice
    json.loads(choice.to_json(), parse_constant=lambda name: pytest.fail(name))
    for text in ("[]", "{", '{"weights": {}}', "null"):
        with pytest.raises(ChoiceError, match="not the JSON of a choice"):
            Choice.from_json(text)


def test_choose_says_when_a_cap_binds(case):
    fitted, prior, _, _ = case
    free = choose(fitted, OBJECTIVE, prior, seed=0, num_candidates=20_000)
    wanted = max(free.weights, key=lambda domain: free.weights[domain] / prior[domain])
    tight = Constraints.by_name(DOMAINS, caps={wanted: 0.5 * free.weights[wanted]})
    choice = choose(fitted, OBJECTIVE, prior, tight, seed=0, num_candidates=20_000)
    assert any(note.startswith(f"{wanted} is on its cap") for note in choice.warnings)
    assert choice.predicted >= free.predicted - 1e-3


def test_choose_says_when_it_extrapolates():
    table, prior, _ = world(0)
    near = np.array([prior[domain] for domain in DOMAINS])
    rng = np.random.default_rng(0)
    weights_RK = rng.dirichlet(3000 * near, 40)
    narrow = Table(
        run_ids=tuple(map(str, range(40))),
        domains=DOMAINS,
        targets=TARGETS,
        weights_RK=weights_RK,
        losses_RM=world_losses(0, weights_RK),
    )
    choice = choose(
        fit_table(narrow, "inverse-power"), {"x": 1}, prior, seed=0, num_candidates=5000
    )
    assert choice.distance > 2 * choice.usual_distance
    assert any(note.startswith("extrapolation") for note in choice.warnings)
    assert any(note.startswith("edge of the data") for note in choice.warnings)


def test_choose_without_signal_is_the_capped_prior_and_says_so():
    table, prior, bounds = world(0)
    noise = Table(
        run_ids=table.run_ids,
        domains=DOMAINS,
        targets=TARGETS,
        weights_RK=table.weights_RK,
        losses_RM=np.random.default_rng(0).normal(3.0, 0.1, table.losses_RM.shape),
    )
    choice = choose(fit_table(noise), OBJECTIVE, prior, bounds, seed=0, num_candidates=1000)
    assert not choice.signal
    assert any(note.startswith("NO SIGNAL") for note in choice.warnings)
    expected = bounds.nearest(np.array([list(prior.values())]))[0]
    assert list(choice.weights.values()) == pytest.approx(expected)
    assert choice.baselines["proportional"].regret == 0.0


def test_choose_gain_within_its_interval_is_said():
    table, prior, bounds = world(0, noise=0.1)
    choice = choose(
        fit_table(table, "ridge"), OBJECTIVE, prior, bounds, seed=0, num_candidates=2000
    )
    assert any(
        re.match("the predicted gain over best_seen is .* within its 90% interval", note)
        for note in choice.warnings
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objective": {"xx": 1}}, "target 'xx'; there are x, y, z"),
        ({"objective": {"x": -1}}, "weight of 'x' is -1; expected more than 0"),
        ({"objective": {}}, "names no target"),
        ({"prior": {"web": 1}}, "no domain 'books'"),
        ({"prior": dict.fromkeys((*DOMAINS, "wbe"), 1)}, "Did you mean 'web'"),
        ({"prior": dict.fromkeys(DOMAINS, 0)}, "not all 0"),
        ({"constraints": Constraints.none(DOMAINS[::-1])}, "in this order"),
        ({"top_k": 0}, "top_k is 0"),
        ({"level": 1.5}, "level of the intervals is 1.5"),
    ],
)
def test_choose_wrong_arguments_are_named(case, change, words):
    fitted, prior, bounds, _ = case
    arguments = {"objective": OBJECTIVE, "prior": prior, "constraints": bounds} | change
    with pytest.raises(RayxError, match=words):
        choose(fitted, seed=0, num_candidates=100, **{"top_k": 10} | arguments)

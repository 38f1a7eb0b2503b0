"""Choosing a mixture: bounds kept exactly, better than what was seen, and honest about doubt."""

import dataclasses
import json
import re

import numpy as np
import pytest
from scipy.optimize import minimize

from rayx.choice.problem import simulate
from rayx.choose import Choice, Constraints, Convex, Group, Simulate, Supply, choose
from rayx.errors import ChoiceError, RayxError
from rayx.fit import Table, fit_table

DOMAINS: tuple[str, ...] = ("books", "code", "math", "news", "web", "wiki")
K = len(DOMAINS)
TARGETS = ("x", "y", "z")
OBJECTIVE = {"x": 2.0, "y": 1.0, "z": 1.0}
FEW = Simulate(num_candidates=20_000)


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
    choice = choose(fitted, OBJECTIVE, prior, bounds, seed=0, method=FEW)
    return fitted, prior, bounds, choice


def test_choose_regret_is_below_best_seen_and_baselines_in_most_worlds():
    beaten, regrets, covered = 0, [], []
    for seed in range(8):
        table, prior, bounds = world(seed)
        fitted = fit_table(table, "inverse-power")
        choice = choose(fitted, OBJECTIVE, prior, bounds, seed=0, method=FEW)
        optimum = true_optimum(seed, bounds)
        regret = true_objective(seed, choice.weights) - optimum
        others = {
            name: true_objective(seed, baseline.weights) - optimum
            for name, baseline in choice.baselines.items()
        }
        for name, baseline in choice.baselines.items():
            low, high = baseline.regret_interval
            covered.append(low <= others[name] - regret <= high)
        observed = table.losses_RM @ [0.5, 0.25, 0.25]
        others["argmin of noise"] = (
            true_objective(seed, table.weights_RK[observed.argmin()]) - optimum
        )
        beaten += regret < min(others.values())
        regrets.append(regret / others["best_seen"])
    assert beaten >= 7
    assert np.median(regrets) < 0.4
    # Of 24 intervals of 90%: choosing favours the models' errors, so that 39 of 48 others hold.
    assert sum(covered) >= 19, covered


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
        low, high = baseline.regret_interval
        assert low < baseline.regret < high
        assert baseline.std > 0


def test_choose_is_deterministic_and_json_round_trips(case):
    fitted, prior, bounds, choice = case
    again = choose(fitted, OBJECTIVE, prior, bounds, seed=0, method=FEW)
    assert again.weights == pytest.approx(choice.weights, abs=1e-9)
    assert Choice.from_json(choice.to_json()) == choice
    json.loads(choice.to_json(), parse_constant=lambda name: pytest.fail(name))
    for text in ("[]", "{", '{"weights": {}}', "null"):
        with pytest.raises(ChoiceError, match="not the JSON of a choice"):
            Choice.from_json(text)


def test_choose_says_when_a_cap_binds(case):
    fitted, prior, _, _ = case
    free = choose(fitted, OBJECTIVE, prior, seed=0, method=FEW)
    wanted = max(free.weights, key=lambda domain: free.weights[domain] / prior[domain])
    tight = Constraints.by_name(DOMAINS, caps={wanted: 0.5 * free.weights[wanted]})
    choice = choose(fitted, OBJECTIVE, prior, tight, seed=0, method=FEW)
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
    choice = choose(fit_table(narrow, "inverse-power"), {"x": 1}, prior, seed=0, method=FEW)
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
    choice = choose(fit_table(noise), OBJECTIVE, prior, bounds, seed=0, method=FEW)
    assert not choice.signal
    assert any(note.startswith("NO SIGNAL") for note in choice.warnings)
    expected = bounds.nearest(np.array([list(prior.values())]))[0]
    assert list(choice.weights.values()) == pytest.approx(expected)
    assert choice.baselines["proportional"].regret == 0.0


def test_choose_gain_within_its_interval_is_said():
    table, prior, bounds = world(0, noise=0.1)
    choice = choose(fit_table(table, "ridge"), OBJECTIVE, prior, bounds, seed=0, method=FEW)
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
        ({"method": Simulate(top_k=0)}, "top_k is 0"),
        ({"level": 1.5}, "level of the intervals is 1.5"),
    ],
)
def test_choose_wrong_arguments_are_named(case, change, words):
    fitted, prior, bounds, _ = case
    arguments = {"objective": OBJECTIVE, "prior": prior, "constraints": bounds} | change
    with pytest.raises(RayxError, match=words):
        choose(fitted, seed=0, **{"method": FEW} | arguments)


# --- constraints on groups and on losses, the convex program, repetition ---


@pytest.mark.parametrize("method", [FEW, Convex()], ids=["simulate", "convex"])
def test_choose_keeps_groups_and_fixed_shares_and_says_which_bind(case, method):
    fitted, prior, _, free = case
    heaviest = sorted(free.weights, key=lambda domain: -free.weights[domain])[:2]
    least = min(free.weights, key=lambda domain: free.weights[domain])
    together = 0.3 * sum(free.weights[domain] for domain in heaviest)
    bounds = Constraints.by_name(
        DOMAINS, fixed={least: 0.05}, groups=[Group(tuple(heaviest), 0.0, together)]
    )
    choice = choose(fitted, OBJECTIVE, prior, bounds, seed=0, method=method)
    assert sum(choice.weights[domain] for domain in heaviest) == pytest.approx(together, abs=2e-3)
    assert sum(choice.weights[domain] for domain in heaviest) <= together + 1e-6
    assert choice.weights[least] == pytest.approx(0.05, abs=1e-9)
    assert f"at most {together:.4g} for {'+'.join(heaviest)}" in choice.binding
    assert not any(least in words and "0.05" in words for words in choice.binding)
    for baseline in choice.baselines.values():
        assert sum(baseline.weights[d] for d in heaviest) <= together + 1e-6
        assert baseline.weights[least] == pytest.approx(0.05, abs=1e-9)


@pytest.mark.parametrize("regressor", ["inverse-power", "loglinear"])
def test_convex_finds_what_no_simulated_mixture_beats_and_certifies_it(case, regressor):
    _, prior, bounds, _ = case
    fitted = fit_table(case[0].table, regressor)
    prior_K = np.array([prior[domain] for domain in DOMAINS])

    def cost(weights_MK):
        kl_M = (weights_MK * np.log(np.maximum(weights_MK, 1e-12) / prior_K)).sum(1)
        return fitted.objective(weights_MK, OBJECTIVE) + 0.05 * kl_M

    choice = choose(fitted, OBJECTIVE, prior, bounds, seed=0, method=Convex(kl_strength=0.05))
    weights_K = np.array([choice.weights[domain] for domain in DOMAINS])
    rng = np.random.default_rng(1)
    around_MK = 0.9 * weights_K + 0.1 * simulate(prior_K, 20_000, rng)
    others_MK = bounds.nearest(np.concatenate([simulate(prior_K, 50_000, rng), around_MK]))
    assert cost(weights_K[None])[0] <= cost(others_MK).min() + 1e-9
    assert choice.method["convex"] and 0 <= choice.method["duality_gap"] < 1e-5
    assert not any("local searches" in note for note in choice.warnings)


def test_convex_goes_to_the_prior_as_the_kl_grows_and_to_the_optimum_as_it_falls(case):
    fitted, prior, bounds, simulated = case
    near, far = (
        choose(fitted, OBJECTIVE, prior, bounds, seed=0, method=Convex(kl_strength=strength))
        for strength in (1e3, 0.0)
    )
    proportional = near.baselines["proportional"]
    assert list(near.weights.values()) == pytest.approx(
        list(proportional.weights.values()), abs=1e-3
    )
    assert far.predicted <= simulated.predicted < proportional.predicted
    assert far.predicted == pytest.approx(simulated.predicted, abs=5e-3)


def test_convex_with_a_step_function_says_that_it_is_a_local_search(case):
    _, prior, bounds, _ = case
    table = dataclasses.replace(
        case[0].table, targets=("x",), losses_RM=case[0].table.losses_RM[:, :1]
    )
    method = Convex(num_candidates=500, num_starts=3)
    fitted = fit_table(table, "lightgbm")
    choice = choose(fitted, {"x": 1}, prior, bounds, seed=0, method=method)
    assert any("not convex (lightgbm)" in note for note in choice.warnings)
    assert choice.predicted < choice.baselines["proportional"].predicted


@pytest.mark.parametrize("method", [FEW, Convex(kl_strength=0.0)], ids=["simulate", "convex"])
def test_limits_are_kept_at_the_least_cost_to_the_objective(case, method):
    fitted, prior, bounds, _ = case
    free = choose(fitted, {"x": 1}, prior, bounds, seed=0, method=method)
    assert free.given_up["x"] < 0 and not free.limits
    worst = max(("y", "z"), key=lambda target: free.given_up[target])
    assert free.given_up[worst] > 0
    kept = choose(fitted, {"x": 1}, prior, bounds, seed=0, method=method, tolerances={worst: 0.0})
    assert kept.given_up[worst] <= 1e-6
    assert free.predicted < kept.predicted <= kept.baselines["proportional"].predicted + 1e-9
    assert any(words.startswith(f"{worst} at most") for words in kept.binding)
    middle = 0.5 * (free.predicted_losses[worst] + kept.predicted_losses[worst])
    half = choose(fitted, {"x": 1}, prior, bounds, seed=0, method=method, limits={worst: middle})
    assert half.predicted_losses[worst] <= middle + 1e-9
    assert free.predicted <= half.predicted + 1e-9 <= kept.predicted + 2e-9


def test_a_limit_that_hardly_any_mixture_keeps_is_kept(case):
    fitted, prior, bounds, _ = case
    best = choose(fitted, {"y": 1}, prior, bounds, seed=0, method=Convex(kl_strength=0.0))
    limit = best.predicted + 1e-4
    few = Simulate(num_candidates=500, top_k=20)
    choice = choose(fitted, {"x": 1}, prior, bounds, seed=0, method=few, limits={"y": limit})
    assert choice.predicted_losses["y"] <= limit
    assert choice.binding == ("y at most " + f"{limit:.4g}",) or len(choice.binding) > 1


@pytest.mark.parametrize("method", [FEW, Convex()], ids=["simulate", "convex"])
def test_limits_that_cannot_be_kept_are_refused_with_what_can(case, method):
    fitted, prior, bounds, _ = case
    best = {
        target: choose(
            fitted, {target: 1}, prior, bounds, seed=0, method=Convex(kl_strength=0.0)
        ).predicted
        for target in ("x", "y")
    }
    with pytest.raises(RayxError, match="x at most") as refused:
        choose(
            fitted, OBJECTIVE, prior, bounds, seed=0, method=method, limits={"x": best["x"] - 0.1}
        )
    least = float(re.findall(r"least attainable ([\d.]+)", str(refused.value))[0])
    assert least == pytest.approx(best["x"], abs=2e-3)
    both = {target: value + 1e-3 for target, value in best.items()}
    with pytest.raises(RayxError, match="x at most .* and y at most .*together with the others"):
        choose(fitted, OBJECTIVE, prior, bounds, seed=0, method=method, limits=both)


@pytest.mark.parametrize("method", [FEW, Convex(kl_strength=0.01)], ids=["simulate", "convex"])
def test_a_priced_repetition_takes_from_the_scarce_domain(case, method):
    fitted, prior, _, _ = case
    free = choose(fitted, OBJECTIVE, prior, seed=0, method=method)
    wanted = max(free.weights, key=lambda domain: free.weights[domain])
    tokens = dict.fromkeys(DOMAINS, 1e9) | {wanted: 1e9 * free.weights[wanted] / 50}
    priced = choose(
        fitted, OBJECTIVE, prior, seed=0, method=method,
        supply=Supply(domain_tokens=tokens, budget_tokens=1e9),
    )  # fmt: skip
    assert priced.weights[wanted] < 0.9 * free.weights[wanted]
    assert priced.predicted > free.predicted
    epochs = {d: share * 1e9 / tokens[d] for d, share in priced.weights.items()}
    assert priced.repetition == pytest.approx(epochs) and free.repetition == {}
    plenty = Supply(domain_tokens=dict.fromkeys(DOMAINS, 1e9), budget_tokens=1e9)
    if method is FEW:  # nothing is repeated: nothing changes
        same = choose(fitted, OBJECTIVE, prior, seed=0, method=method, supply=plenty)
        assert same.weights == pytest.approx(free.weights)
        assert same.predicted == pytest.approx(free.predicted)


def test_supply_worth_is_the_law_of_repetition():
    supply = Supply(domain_tokens={"a": 10.0, "b": 1000.0}, budget_tokens=100.0, r_star=5.0)
    seen_MK, factor_M = supply.worth(("a", "b"), np.array([[0.3, 0.7], [0.1, 0.9]]))
    worth = 10 + 10 * 5 * (1 - np.exp(-2 / 5))  # 30 tokens of 10: seen twice again
    np.testing.assert_allclose(seen_MK[0], [worth / (worth + 70), 70 / (worth + 70)])
    np.testing.assert_allclose(factor_M, [((worth + 70) / 100) ** -0.04, 1.0])
    np.testing.assert_allclose(seen_MK[1], [0.1, 0.9])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"limits": {"q": 1.0}}, "limit is on target 'q'; there are x, y, z"),
        ({"limits": {"x": float("nan")}}, "limit on 'x' is nan"),
        ({"method": Convex(kl_strength=-1)}, "kl_strength is -1"),
        (
            {"supply": Supply(domain_tokens={"books": 1}, budget_tokens=10)},
            "supply of 'code' is None",
        ),
    ],
)
def test_choose_wrong_limits_and_supply_are_named(case, change, words):
    fitted, prior, bounds, _ = case
    with pytest.raises(RayxError, match=words):
        choose(fitted, OBJECTIVE, prior, bounds, seed=0, **{"method": FEW} | change)
    with pytest.raises(RayxError, match="budget_tokens is 0"):
        Supply(domain_tokens={"a": 1}, budget_tokens=0)

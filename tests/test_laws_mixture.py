"""Laws of the mixture and of repetition: what each says of scale, redundancy and the edges."""

import math
from dataclasses import replace

import numpy as np
import pytest

from rayx.errors import FitError
from rayx.fit.laws.chinchilla import Chinchilla
from rayx.fit.laws.mixture import AdditiveMixture, BiMix, Exponential, JointMixture
from rayx.fit.laws.multilingual import Multilingual, effective_fraction
from rayx.fit.laws.nested import nested_mixture_law
from rayx.fit.laws.repetition import Repetition
from rayx.units import effective_tokens
from tests.contracts.law_contract import check_derivatives_agree_with_numeric_differences
from tests.planted import planted_loss, with_noise
from tests.test_laws import CASES

SCALES = [(1e8, 2e9), (1e9, 2e10), (1e10, 1e12)]


def simplex_grid(step: int) -> np.ndarray:
    return np.array(
        [(a, b, step - a - b) for a in range(step + 1) for b in range(step + 1 - a)]
    ) / float(step)


def runs(num: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    params_R = rng.choice([4e7, 1e8, 3e8, 1e9], num)
    tokens_R = np.exp(rng.uniform(np.log(5e8), np.log(3e10), num))
    return params_R, tokens_R, rng.dirichlet(np.full(3, 0.8), num)


ADDITIVE = {
    "E": 1.4, "C": [1.0, 0.6, 2.0], "gamma": [0.3, 0.5, 0.6],
    "A": 300.0, "alpha": 0.35, "B": 800.0, "beta": 0.37,
}  # fmt: skip
JOINT = ADDITIVE | {  # the first domain asks for parameters, the last for tokens
    "A": [4e3, 4e2, 2e2], "a": 0.8, "B": [3e2, 3e2, 4e3], "b": 0.9,
}  # fmt: skip


def best_mixtures(law: AdditiveMixture | JointMixture) -> np.ndarray:
    weights_MK = simplex_grid(60)
    ones_M = np.ones(len(weights_MK))
    return np.array(
        [weights_MK[np.argmin(law.predict(ones_M * n, ones_M * d, weights_MK))] for n, d in SCALES]
    )


def test_optimum_of_the_additive_law_is_the_same_at_every_scale():
    columns = runs(150, seed=0)
    loss_R = with_noise(planted_loss(AdditiveMixture, ADDITIVE, *columns), 0.002, seed=1)
    best_SK = best_mixtures(AdditiveMixture().fit(*columns, loss_R))
    assert (best_SK == best_SK[0]).all()
    # and near the planted one, whose three shares are all inside the simplex
    weights_MK = simplex_grid(60)
    ones_M = np.ones(len(weights_MK))
    truth_M = planted_loss(AdditiveMixture, ADDITIVE, ones_M * 1e9, ones_M * 1e10, weights_MK)
    assert weights_MK[np.argmin(truth_M)].min() > 0
    chosen = int(np.argmin(np.abs(weights_MK - best_SK[0]).sum(1)))
    assert truth_M[chosen] - truth_M.min() < 5e-4


def test_optimum_of_the_joint_law_moves_with_scale():
    columns = runs(250, seed=2)
    loss_R = with_noise(planted_loss(JointMixture, JOINT, *columns), 0.002, seed=3)
    best_SK = best_mixtures(JointMixture().fit(*columns, loss_R))
    weights_MK = simplex_grid(60)
    ones_M = np.ones(len(weights_MK))
    for best_K, (params, tokens) in zip(best_SK, SCALES, strict=True):
        truth_M = planted_loss(JointMixture, JOINT, ones_M * params, ones_M * tokens, weights_MK)
        np.testing.assert_allclose(best_K, weights_MK[np.argmin(truth_M)], atol=0.051)
    # What asks for tokens gains as they grow five-hundredfold: .30 to .87 in the planted law.
    assert best_SK[2, 2] - best_SK[0, 2] > 0.5


def test_additive_law_is_the_joint_law_of_equal_domains():
    params_R, tokens_R, weights_RK = runs(50, seed=4)
    equal = ADDITIVE | {"A": [300.0] * 3, "a": 1.0, "B": [800.0] * 3, "b": 1.0}
    np.testing.assert_allclose(
        planted_loss(JointMixture, equal, params_R, tokens_R, weights_RK),
        planted_loss(AdditiveMixture, ADDITIVE, params_R, tokens_R, weights_RK),
        rtol=1e-12,
    )


@pytest.mark.parametrize(("law", "truth"), [(AdditiveMixture, ADDITIVE), (JointMixture, JOINT)])
def test_absent_domain_is_as_if_it_were_not_there(law, truth):
    params_R, tokens_R, weights_RK = runs(20, seed=5)
    weights_RK[:, 2] = 0.0
    weights_RK /= weights_RK.sum(1, keepdims=True)
    two = {n: v[:2] if np.ndim(v) else v for n, v in truth.items()}
    np.testing.assert_allclose(
        planted_loss(law, truth, params_R, tokens_R, weights_RK),
        planted_loss(law, two, params_R, tokens_R, weights_RK[:, :2]),
        rtol=1e-12,
    )


EDGES = {  # inputs where a power is of 0, or of 1 - 1
    "exponential": {"weights": lambda rng, n, c: np.eye(3)[np.arange(n) % 3]},
    "additive_mixture": {"weights": lambda rng, n, c: np.eye(3)[np.arange(n) % 3]},
    "joint_mixture": {"weights": lambda rng, n, c: np.eye(3)[np.arange(n) % 3]},
    "capacity": {  # one of three absent
        "target": lambda rng, n, c: np.arange(n) % 3.0,
        "weights": lambda rng, n, c: (
            np.array([[6, 0, 4], [4, 6, 0], [0, 4, 6]])[np.arange(n) % 3] / 10
        ),
    },
    "bimix": {"ratio": lambda rng, n, c: np.ones(n)},
    "multilingual": {"ratio": lambda rng, n, c: np.ones(n)},
    "dcpt": {"ratio": lambda rng, n, c: np.arange(n) % 2.0},
    "cross_domain_dcpt": {
        "ratio": lambda rng, n, c: np.arange(n) % 2.0,
        "decline": lambda rng, n, c: np.zeros(n),
    },
    "repetition": {"unique_tokens": lambda rng, n, c: c["tokens"] * (1.0 + np.arange(n) % 2)},
}


@pytest.mark.parametrize(("law", "edge"), EDGES.items(), ids=EDGES)
def test_laws_and_derivatives_have_values_at_the_edges(law, edge):
    check_derivatives_agree_with_numeric_differences(replace(CASES[law], draw=edge))


def test_exponential_law_finds_ye_s_law_with_its_factor_absorbed():
    weights_RK = np.random.default_rng(6).dirichlet(np.full(3, 0.5), 40)
    slopes_K, factor = np.array([-1.2, -0.3, -2.0]), 1.7
    law = Exponential().fit(weights_RK, 2.1 + factor * np.exp(weights_RK @ slopes_K))
    assert law.params_["c"] == pytest.approx(2.1, abs=1e-6)
    learned_K = [law.params_[f"t/{k}"] for k in range(3)]
    np.testing.assert_allclose(learned_K, slopes_K + math.log(factor), atol=1e-5)


def test_bimix_finds_a_law_with_its_leading_factor_absorbed():
    rng = np.random.default_rng(7)
    tokens_R, ratio_R = np.exp(rng.uniform(20, 25, 60)), rng.uniform(0.01, 1, 60)
    loss_R = 2.0 / ratio_R**0.07 * (500.0 / tokens_R**0.35 + 0.9)
    law = BiMix().fit(tokens_R, ratio_R, loss_R)
    found = {"alpha": 0.07, "B": 1000.0, "beta": 0.35, "C": 1.8}
    assert law.params_ == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("law", [BiMix, Multilingual])
@pytest.mark.parametrize("ratio", [0.0, 7.0])
def test_laws_without_a_value_at_share_zero_say_so(law, ratio):
    with pytest.raises(FitError, match=rf"ratio of row 2 is {ratio:g}; expected a share in \(0, 1"):
        law().fit(np.full(20, 1e9), np.r_[0.5, 1.0, ratio, np.full(17, 0.2)], np.full(20, 3.0))


def curves(noise: float, num_mixtures: int = 14) -> tuple[np.ndarray, ...]:
    """Curves of small runs in a world where all three of the nested laws hold exactly."""
    rng = np.random.default_rng(8)
    mixtures_GK = rng.dirichlet(np.full(3, 0.7), num_mixtures)
    rows = [
        (g, n, d)
        for g in range(num_mixtures)
        for n in (2e7, 4e7, 8e7, 1.6e8, 4e8)
        for d in np.geomspace(5e8, 8e9, 8)
    ]
    mixture_R, params_R, tokens_R = (np.array(c) for c in zip(*rows, strict=True))
    weights_RK = mixtures_GK[mixture_R.astype(int)]
    loss_R = world(weights_RK, params_R, tokens_R)
    return weights_RK, params_R, tokens_R, with_noise(loss_R, noise, seed=9)


def world(weights_RK: np.ndarray, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    scale = 1.0 + 400.0 / params**0.4 + 900.0 / tokens**0.36
    return 1.6 + np.exp(weights_RK @ np.array([-1.2, -0.1, -0.6])) * scale


def test_nested_law_predicts_unseen_mixtures_at_a_scale_never_run():
    law = nested_mixture_law(*curves(noise=0.0), params=3e9, tokens=1e11)
    unseen_MK = np.random.default_rng(10).dirichlet(np.ones(3), 40)
    truth_M = world(unseen_MK, np.array(3e9), np.array(1e11))
    np.testing.assert_allclose(law.predict(unseen_MK), truth_M, rtol=1e-5)


def test_nested_law_ranks_unseen_mixtures_through_noise():
    law = nested_mixture_law(*curves(noise=0.0005), params=1e9, tokens=2e10)
    unseen_MK = np.random.default_rng(11).dirichlet(np.ones(3), 40)
    truth_M = world(unseen_MK, np.array(1e9), np.array(2e10))
    predicted_M = law.predict(unseen_MK)
    assert np.max(np.abs(predicted_M / truth_M - 1.0)) < 0.03
    assert np.argsort(predicted_M)[0] in np.argsort(truth_M)[:3]


def test_nested_law_says_which_run_is_too_short():
    weights_RK, params_R, tokens_R, loss_R = curves(noise=0.0)
    kept_R = ~((params_R == 2e7) & (tokens_R > 6e8))
    with pytest.raises(FitError, match=r"tokens law of run \[.*2.*e\+07\] has 1 points"):
        nested_mixture_law(
            weights_RK[kept_R], params_R[kept_R], tokens_R[kept_R], loss_R[kept_R],
            params=1e9, tokens=1e10,
        )  # fmt: skip


def test_multilingual_law_is_the_single_language_law_of_a_smaller_model():
    truth = {"E": 1.1, "B": 90.0, "alpha": 0.3, "c1": 0.25, "c2": 0.6, "c3": 0.9}
    params_R = np.geomspace(2e7, 2e9, 12)
    alone_R = planted_loss(Multilingual, truth, params_R, np.ones(12))
    np.testing.assert_allclose(alone_R, 1.1 + 90.0 / params_R**0.3, rtol=1e-12)
    for share in (0.05, 0.3, 0.7):
        # What the paper does: fit the factor at each share, turn it into a fraction.
        excess_R = planted_loss(Multilingual, truth, params_R, np.full(12, share)) - 1.1
        factor = float(np.mean(excess_R * params_R**0.3))
        fraction = share + 0.25 * share**0.6 * (1 - share) ** 0.9
        assert effective_fraction(factor, 90.0, 0.3) == pytest.approx(fraction, rel=1e-9)
        smaller_R = planted_loss(Multilingual, truth, fraction * params_R, np.ones(12))
        np.testing.assert_allclose(excess_R + 1.1, smaller_R, rtol=1e-12)


def repetition_runs(num: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    params_R = np.exp(rng.uniform(np.log(1e7), np.log(3e9), num))
    unique_R = rng.choice([1e8, 4e8, 1.5e9], num)  # the paper's data budgets
    return params_R, unique_R * np.exp(rng.uniform(-1.0, 5.0, num)), unique_R


PUBLISHED = {  # appendix A
    "E": math.exp(0.6254804), "A": math.exp(6.255414), "B": math.exp(7.3049974),
    "alpha": 0.3526596, "beta": 0.3526596, "R_star": 15.387756,
}  # fmt: skip


def test_repetition_law_finds_the_published_r_star_again():
    columns = repetition_runs(180, seed=12)
    loss_R = with_noise(planted_loss(Repetition, PUBLISHED, *columns), 0.002, seed=13)
    law = Repetition(bootstrap=300).fit(*columns, loss_R)
    assert law.params_["R_star"] == pytest.approx(15.39, rel=0.1)
    low, high = law.intervals_["R_star"]
    assert low < 15.387756 < high


def test_repetition_law_is_chinchilla_s_up_to_one_epoch_and_of_the_effective_tokens_after():
    params_R, tokens_R, unique_R = repetition_runs(60, seed=14)
    plain = {n: v for n, v in PUBLISHED.items() if n != "R_star"}
    worth_R = effective_tokens(tokens_R, unique_R, 15.387756)
    assert (worth_R[tokens_R <= unique_R] == tokens_R[tokens_R <= unique_R]).all()
    np.testing.assert_allclose(
        planted_loss(Repetition, PUBLISHED, params_R, tokens_R, unique_R),
        planted_loss(Chinchilla, plain, params_R, worth_R),
        rtol=1e-12,
    )


def test_repetition_law_refuses_a_run_without_data():
    params_R, tokens_R, unique_R = repetition_runs(20, seed=15)
    unique_R[3] = 0.0
    with pytest.raises(FitError, match="unique_tokens, row 3: the value is 0; expected above 0"):
        Repetition().fit(params_R, tokens_R, unique_R, np.full(20, 3.0))

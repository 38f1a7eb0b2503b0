"""Every regressor keeps the contract; and what is particular to one of them."""

import numpy as np
import pytest
from scipy.optimize import check_grad

from rayx.errors import FitError
from rayx.fit import (
    ClimbTrees,
    GaussianProcess,
    InversePower,
    LightGBM,
    LogLinear,
    Mean,
    Ridge,
    Scheffe,
    TiltedPower,
    gaussian_process,
    inverse_power,
    levenberg,
    log_linear,
    tilted_power,
)
from rayx.fit.linear import loo_ridge
from rayx.fit.regressor import make_folds
from rayx.fit.scheffe import with_products
from tests.contracts.regressor_contract import CHECKS, RegressorCase, draw_world, planted_loss

CASES = {
    "Mean": RegressorCase(Mean, recovery=None),
    "Ridge": RegressorCase(Ridge, recovery=0.97),
    # A polynomial cannot follow the law near 0; test_scheffe_recovers... asks for more.
    "Scheffe": RegressorCase(Scheffe, recovery=0.85),
    # Another law than the planted one; test_log_linear_recovers_its_own_law asks for more.
    "LogLinear": RegressorCase(LogLinear, recovery=0.7),
    "InversePower": RegressorCase(InversePower, recovery=0.995),
    "TiltedPower": RegressorCase(TiltedPower, recovery=0.995),
    "GaussianProcess": RegressorCase(GaussianProcess, recovery=0.98, permutation_tolerance=1e-3),
    "LightGBM": RegressorCase(LightGBM, recovery=0.94, permutation_tolerance=0.03),
    "ClimbTrees": RegressorCase(ClimbTrees, recovery=0.93, permutation_tolerance=0.03),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_regressor_contract(case, check):
    check(case)


@pytest.mark.parametrize(
    ("value", "num_params"),
    [
        (lambda theta, w: inverse_power.log_loss(theta, np.log(w + 1e-4)), 11),
        (lambda theta, w: tilted_power.log_loss(theta, w, np.log(w + 1e-4)), 17),
        (log_linear._log_loss, 6),
    ],
    ids=["inverse power", "tilted power", "log-linear"],
)
def test_jacobian_agrees_with_finite_differences(value, num_params):
    weights_RK, _ = draw_world(7, seed=3)
    theta_P = np.random.default_rng(0).normal(0, 0.5, num_params)
    for run in range(7):
        error = check_grad(
            lambda theta, run=run: value(theta[None], weights_RK)[0][0, run],
            lambda theta, run=run: value(theta[None], weights_RK)[1][0, run],
            theta_P,
        )
        assert error < 1e-6


def test_gaussian_process_gradient_agrees_with_finite_differences():
    weights_RK, loss_R = draw_world(25, seed=3)
    x_RK, y_R = np.log(weights_RK + 3e-3), np.log(loss_R) - np.log(loss_R).mean()
    centre = np.r_[0.0, -3.0, np.full(5, 1.0)]
    theta = centre + np.random.default_rng(0).normal(0, 0.4, 7)

    def objective(theta):
        return gaussian_process._objective(theta, x_RK, y_R, centre)

    error = check_grad(lambda t: objective(t)[0], lambda t: objective(t)[1], theta)
    assert error < 1e-4 * np.linalg.norm(objective(theta)[1])


def test_minimise_robust_fit_ignores_an_outlier():
    x_R = np.linspace(0.0, 1.0, 40)
    target_R = 2.0 + 3.0 * x_R
    target_R[5] += 50.0
    design_RP = np.stack([np.ones(40), x_R], axis=1)

    def line(theta_SP):
        return theta_SP @ design_RP.T, np.broadcast_to(design_RP, (len(theta_SP), 40, 2))

    theta_P = levenberg.minimise(line, np.zeros((1, 2)), target_R, ridge_P=np.zeros(2), scale=0.01)
    np.testing.assert_allclose(theta_P, [2.0, 3.0], atol=0.01)


def test_inverse_power_with_an_outlier_still_ranks_and_without_noise_is_near_exact():
    weights_RK, loss_R = draw_world(100, seed=0, noise=0.0)
    test_MK, true_M = draw_world(200, seed=5, noise=0.0)
    clean_M = InversePower(folds=0).fit(weights_RK, loss_R).predict(test_MK)
    assert np.abs(np.log(clean_M / true_M)).mean() < 0.005
    loss_R[10] *= 1.6
    spoilt_M = InversePower(folds=0).fit(weights_RK, loss_R).predict(test_MK)
    assert np.abs(np.log(spoilt_M / true_M)).mean() < 0.01


def test_log_linear_recovers_its_own_law():
    weights_RK, _ = draw_world(60, seed=0)
    test_MK, _ = draw_world(200, seed=5)
    t_K = np.array([-2.0, 0.5, 1.0, -0.5, 0.0])
    noise_R = np.random.default_rng(1).normal(0.0, 0.01, 60)
    loss_R = (2.0 + np.exp(weights_RK @ t_K)) * np.exp(noise_R)
    predicted_M = LogLinear(folds=0).fit(weights_RK, loss_R).predict(test_MK)
    assert np.abs(predicted_M / (2.0 + np.exp(test_MK @ t_K)) - 1.0).mean() < 0.01


def test_scheffe_recovers_a_quadratic_mixture_polynomial():
    weights_RK, _ = draw_world(60, seed=0)
    test_MK, _ = draw_world(200, seed=5)
    slope_Q = np.random.default_rng(2).normal(0.0, 1.0, 15)
    noise_R = np.random.default_rng(1).normal(0.0, 0.01, 60)
    loss_R = 3.0 + with_products(weights_RK) @ slope_Q + noise_R
    true_M = 3.0 + with_products(test_MK) @ slope_Q
    predicted_M = Scheffe(folds=0).fit(weights_RK, loss_R).predict(test_MK)
    assert np.mean((predicted_M - true_M) ** 2) < 0.01**2


def test_tilted_power_follows_tilts_and_outer_powers_that_the_additive_law_cannot():
    weights_RK, _ = draw_world(80, seed=0)
    test_MK, _ = draw_world(200, seed=5)
    log_c_K, tilt_K = np.array([1.0, 0.0, -1.0, -2.0, -4.0]), np.array([-0.1, 0.0, 0.1, 0.1, 0.1])
    logit_K = np.array([-1.0, 0.0, 0.5, 0.0, 0.0])
    theta_P = np.r_[0.3, log_c_K, logit_K, np.log(0.4), tilt_K]

    def planted(weights_RK):
        log_weights_RK = np.log(weights_RK + 1e-4)
        return np.exp(tilted_power.log_loss(theta_P[None], weights_RK, log_weights_RK)[0][0])

    loss_R = planted(weights_RK) * np.exp(np.random.default_rng(1).normal(0.0, 0.005, 80))
    rms = {
        make: np.sqrt(np.mean(np.log(predicted_M / planted(test_MK)) ** 2))
        for make in (TiltedPower, InversePower)
        for predicted_M in [make(folds=0).fit(weights_RK, loss_R).predict(test_MK)]
    }
    assert rms[TiltedPower] < 0.005 and rms[TiltedPower] < 0.5 * rms[InversePower]


def test_ridge_leave_one_out_error_equals_refitting_without_each_row():
    weights_RK, loss_R = draw_world(15, seed=2)
    features = with_products(weights_RK)
    centre, sd = features.mean(0), features.std(0)
    design = np.hstack([np.ones((15, 1)), (features - centre) / sd])
    error, _ = loo_ridge(with_products, weights_RK, loss_R)
    by_strength = []
    for strength in 15 * np.logspace(-5, 2, 22):
        penalty = strength * np.diag(np.r_[0.0, np.ones(design.shape[1] - 1)])
        residuals = []
        for left_out in range(15):
            rest = np.arange(15) != left_out
            gram = design[rest].T @ design[rest] + penalty
            slope = np.linalg.solve(gram, design[rest].T @ loss_R[rest])
            residuals.append(loss_R[left_out] - design[left_out] @ slope)
        by_strength.append(np.mean(np.square(residuals)))
    assert error == pytest.approx(min(by_strength), rel=1e-6)


@pytest.mark.parametrize("make", [LogLinear, InversePower, TiltedPower, GaussianProcess])
def test_log_regressors_refuse_losses_of_zero(make):
    weights_RK, loss_R = draw_world(20, seed=0)
    loss_R[4] = 0.0
    with pytest.raises(FitError, match="works on log loss, and the loss of row 4 is 0"):
        make().fit(weights_RK, loss_R)


def test_std_without_folds_is_refused():
    weights_RK, loss_R = draw_world(20, seed=0)
    with pytest.raises(FitError, match="folds=0"):
        Ridge(folds=0).fit(weights_RK, loss_R).predict(weights_RK, std=True)


def test_std_grows_away_from_the_data():
    rng = np.random.default_rng(0)
    near_RK = 0.2 + 0.05 * (rng.dirichlet(np.ones(5), 60) - 0.2)
    near_RK /= near_RK.sum(1, keepdims=True)
    loss_R = planted_loss(near_RK) * np.exp(rng.normal(0, 0.003, 60))
    fitted = Ridge().fit(near_RK, loss_R)
    _, (near, far) = fitted.predict(np.array([np.full(5, 0.2), [1.0, 0, 0, 0, 0]]), std=True)
    assert far > 3 * near


def test_folds_keep_replicates_together_and_do_not_depend_on_column_order():
    weights_RK = np.repeat(np.random.default_rng(0).dirichlet(np.ones(4), 10), 3, axis=0)
    fold_R = make_folds(weights_RK, 5, seed=1)
    assert all(len(set(fold_R[i : i + 3])) == 1 for i in range(0, 30, 3))
    assert np.bincount(fold_R).tolist() == [6] * 5
    np.testing.assert_array_equal(make_folds(weights_RK[:, ::-1], 5, seed=1), fold_R)

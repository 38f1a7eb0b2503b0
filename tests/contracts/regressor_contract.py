"""What every regressor does. Use: `@pytest.mark.parametrize("case", CASES)` over RegressorCase.

A case is one line: how to make the regressor, and what its kind allows (a tree may break ties by
the order of the columns; a linear model cannot follow a curved law).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from rayx.errors import FitError
from rayx.fit import PointRegressor
from rayx.fit.scores import spearman

NUM_DOMAINS = 5


@dataclass(frozen=True)
class RegressorCase:
    make: Callable[..., PointRegressor]
    recovery: float | None  # least Spearman on the planted world; None: not asked
    permutation_tolerance: float = 1e-5  # relative


def planted_loss(weights_RK: np.ndarray) -> np.ndarray:
    """An additive inverse-power law with a known shape: the last domain does nothing."""
    strength_K = np.array([1.2, 0.7, 0.4, 0.2, 0.0])
    gamma_K = np.array([0.2, 0.35, 0.5, 0.3, 0.5])
    return 1.5 + 1.0 / (strength_K * (weights_RK + 1e-4) ** gamma_K).sum(1)


def draw_mixtures(num: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(NUM_DOMAINS, 0.6), num)


def draw_world(num: int, seed: int, noise: float = 0.01) -> tuple[np.ndarray, np.ndarray]:
    weights_RK = draw_mixtures(num, seed)
    noise_R = np.random.default_rng(seed + 1).normal(0.0, noise, num)
    return weights_RK, planted_loss(weights_RK) * np.exp(noise_R)


def check_permuted_domains_leave_predictions(case: RegressorCase) -> None:
    weights_RK, loss_R = draw_world(64, seed=0)
    test_MK = draw_mixtures(50, seed=9)
    order = [3, 0, 4, 2, 1]
    plain = case.make().fit(weights_RK, loss_R).predict(test_MK)
    permuted = case.make().fit(weights_RK[:, order], loss_R).predict(test_MK[:, order])
    np.testing.assert_allclose(permuted, plain, rtol=case.permutation_tolerance)


def check_fit_twice_is_the_same(case: RegressorCase) -> None:
    weights_RK, loss_R = draw_world(48, seed=1)
    test_MK = draw_mixtures(50, seed=9)
    once, twice = case.make(), case.make()
    once.fit(draw_mixtures(20, seed=5), np.linspace(2.0, 3.0, 20))  # leaves no trace
    assert once.fit(weights_RK, loss_R) is once
    for a, b in zip(
        once.predict(test_MK, std=True),
        twice.fit(weights_RK, loss_R).predict(test_MK, std=True),
        strict=True,
    ):
        # Matrix products may round by the alignment of memory.
        np.testing.assert_allclose(a, b, rtol=1e-6)


def check_constant_target_is_predicted(case: RegressorCase) -> None:
    weights_RK = draw_mixtures(40, seed=2)
    loss_M, std_M = (
        case.make().fit(weights_RK, np.full(40, 3.25)).predict(draw_mixtures(30, seed=3), std=True)
    )
    np.testing.assert_allclose(loss_M, 3.25, rtol=1e-3)
    assert (std_M > 0).all() and (std_M < 0.01).all()


def check_planted_law_is_recovered(case: RegressorCase) -> None:
    if case.recovery is None:
        return
    weights_RK, loss_R = draw_world(128, seed=4)
    test_MK = draw_mixtures(300, seed=5)
    predicted_M = case.make().fit(weights_RK, loss_R).predict(test_MK)
    assert spearman(predicted_M, planted_loss(test_MK)) > case.recovery


def check_std_matches_the_error_on_new_runs(case: RegressorCase) -> None:
    weights_RK, loss_R = draw_world(96, seed=6, noise=0.02)
    test_MK, new_loss_M = draw_world(400, seed=7, noise=0.02)
    predicted_M, std_M = case.make().fit(weights_RK, loss_R).predict(test_MK, std=True)
    assert (std_M > 0).all()
    z_M = (new_loss_M - predicted_M) / std_M
    # Residuals out of fold are those of models with fewer rows, so too wide is the usual side.
    assert 0.5 < np.sqrt(np.mean(np.clip(z_M, -5, 5) ** 2)) < 1.5
    assert 0.85 < np.mean(np.abs(z_M) < 1.645) <= 1.0


def check_predictions_stay_in_a_sane_range(case: RegressorCase) -> None:
    weights_RK, loss_R = draw_world(64, seed=8)
    corners_MK = np.vstack([np.eye(NUM_DOMAINS), np.full((1, NUM_DOMAINS), 1 / NUM_DOMAINS)])
    predicted_M = case.make().fit(weights_RK, loss_R).predict(corners_MK)
    reach = np.ptp(loss_R)
    assert (predicted_M > loss_R.min() - 1.5 * reach).all()
    assert (predicted_M < loss_R.max() + 1.5 * reach).all()


def check_missing_values_are_refused(case: RegressorCase) -> None:
    weights_RK, loss_R = draw_world(20, seed=0)
    with pytest.raises(FitError, match="Loss of row 3 is not finite"):
        case.make().fit(weights_RK, np.where(np.arange(20) == 3, np.nan, loss_R))
    bad_RK = weights_RK.copy()
    bad_RK[7, 1] = np.nan
    with pytest.raises(FitError, match="Weights of row 7 are not finite"):
        case.make().fit(bad_RK, loss_R)
    with pytest.raises(FitError, match="not fitted"):
        case.make().predict(weights_RK)
    with pytest.raises(FitError, match="4 domains; the regressor was fitted on 5"):
        case.make().fit(weights_RK, loss_R).predict(weights_RK[:, :4])


def check_replicates_and_tiny_tables_are_fitted(case: RegressorCase) -> None:
    weights_RK = np.repeat(draw_mixtures(3, seed=0), 3, axis=0)
    loss_R = planted_loss(weights_RK) * np.exp(np.random.default_rng(0).normal(0, 0.01, 9))
    predicted_R, std_R = case.make().fit(weights_RK, loss_R).predict(weights_RK, std=True)
    assert np.isfinite(predicted_R).all() and np.isfinite(std_R).all()
    # Replicates share a fold: had they not, the residuals would be those of the noise alone.
    assert std_R.min() > 0.01


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]

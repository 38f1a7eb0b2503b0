"""Stage 5, regression: Scheffé's quadratic mixture polynomial.

Shapes: R runs, K domains, M mixtures, Q = K + K (K - 1) / 2 terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rayx.fit.linear import loo_ridge
from rayx.fit.regressor import PointRegressor, Predictor


@dataclass
class Scheffe(PointRegressor):
    """L(w) = sum_i b_i w_i + sum_{i<j} b_ij w_i w_j, least squares with a ridge.

    The weights sum to 1, so that the constant is among the b_i. The strength of the ridge is that
    with the least leave-one-out error, computed exactly.

    Args:
        folds: See PointRegressor.
        seed: See PointRegressor.

    Source: Scheffé 1958, J. R. Stat. Soc. B 20(2), the {q, 2} polynomial.
    Differs: the ridge, on terms in standard units, whose centre is the mean of the losses.
    """

    def fit_point(self, weights_RK: np.ndarray, loss_R: np.ndarray) -> Predictor:
        return loo_ridge(with_products, weights_RK, loss_R)[1]


def with_products(weights_RK: np.ndarray) -> np.ndarray:
    """The weights and all w_i w_j, i < j, shape (R, K + K (K - 1) / 2)."""
    i, j = np.triu_indices(weights_RK.shape[1], k=1)
    return np.hstack([weights_RK, weights_RK[:, i] * weights_RK[:, j]])

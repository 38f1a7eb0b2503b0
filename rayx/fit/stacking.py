"""Stage 5, regression: which regressors to average, decided by all targets together.

At few rows the cross-validation error of one target is too noisy to choose by: whatever wins, wins
partly by luck. Targets of one table are losses of the same runs on like text, so a regressor that
suits one mostly suits the others, and their errors, each in units of the target's own best, are
pooled.

Shapes: R runs (those that have the target), C regressors, T targets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy.optimize import nnls

# Weight of the other targets' mean beside the target's own error. Set by development.
POOLING = 1.0
LEAST_SHARE = 0.05  # members below it cost time and change nothing


def stacked_shares(
    residuals: Mapping[str, np.ndarray], pooling: float = POOLING
) -> dict[str, np.ndarray]:
    """Shares of the regressors in each target's average, shape (C,), >= 0, adding up to 1.

    a_t = argmin over the simplex of a' (G_t + pooling * mean of G_s over the other targets s) a,
    G_t = residual' residual / R_t in units of the least mean squared error of the target.

    Args:
        residuals: Target -> out-of-fold residuals, shape (R_t, C), of the same C regressors.
        pooling: Weight of the other targets, >= 0; 0 is a stack of each target by itself.

    Source: Breiman 1996, Stacked Regressions, Machine Learning 24, section 2.
    Differs: shares add up to 1; the errors of all targets are pooled.
    """
    gram_TCC = np.stack([_gram(residual_RC) for residual_RC in residuals.values()])
    others_TCC = gram_TCC.sum(0) - gram_TCC
    if len(gram_TCC) > 1:
        others_TCC = others_TCC / (len(gram_TCC) - 1)
    return {
        target: _simplex_minimum(gram_TCC[t] + pooling * others_TCC[t])
        for t, target in enumerate(residuals)
    }


def _gram(residual_RC: np.ndarray) -> np.ndarray:
    gram_CC = residual_RC.T @ residual_RC / len(residual_RC)
    least = np.diag(gram_CC).min()
    # Where a regressor is exact there is nothing to average: it takes all.
    return gram_CC / max(least, 1e-12 * float(np.diag(gram_CC).max()), 1e-300)


def _simplex_minimum(gram_CC: np.ndarray) -> np.ndarray:
    """argmin a' G a over a >= 0, sum a = 1; small shares go to the rest."""
    values_C, vectors_CC = np.linalg.eigh(gram_CC)
    root_CC = np.sqrt(np.maximum(values_C, 0.0))[:, None] * vectors_CC.T
    # The solution of min a'Ga + (1'a - 1)^2 over a >= 0 has the direction of the one sought.
    share_C = nnls(np.vstack([root_CC, np.ones(len(gram_CC))]), np.r_[np.zeros(len(gram_CC)), 1.0])[
        0
    ]
    share_C /= share_C.sum()
    share_C[share_C < LEAST_SHARE] = 0.0
    return share_C / share_C.sum()


def averaged(shares: Sequence[float], values: Sequence[np.ndarray]) -> np.ndarray:
    """sum of share * value."""
    return sum((s * v for s, v in zip(shares, values, strict=True)), np.zeros_like(values[0]))

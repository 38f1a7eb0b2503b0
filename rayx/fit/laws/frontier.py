"""Laws: the size and tokens that are best for a budget of compute.

Shapes: R pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import t as student

from rayx.errors import FitError
from rayx.fit.laws.chinchilla import Chinchilla


@dataclass(frozen=True)
class PowerLaw:
    """y = coefficient * x^exponent.

    Args:
        exponent: Slope of log y in log x.
        coefficient: y at x = 1.
        interval: 95% interval of the exponent, of independent normal errors in log y.
        r2: Share of the variance of log y that is explained.
    """

    exponent: float
    coefficient: float
    interval: tuple[float, float]
    r2: float

    @classmethod
    def fit(cls, x_R: np.ndarray, y_R: np.ndarray) -> PowerLaw:
        """Fit by least squares in logarithms, e.g. optimal params in compute.

        Raises:
            FitError: Fewer than 3 pairs, or a value that is not above 0.

        Source: Porian et al. 2024, arXiv:2406.19146, section 3 (their "basic" fit).
        """
        x_R, y_R = np.asarray(x_R, dtype=float), np.asarray(y_R, dtype=float)
        if x_R.shape != y_R.shape or x_R.ndim != 1 or len(x_R) < 3:
            raise FitError(f"Shapes {x_R.shape} and {y_R.shape}; expected 3 or more pairs.")
        if not ((x_R > 0) & (y_R > 0)).all():  # also NaN
            row = int(np.argmin((x_R > 0) & (y_R > 0)))
            raise FitError(f"Pair {row} is ({x_R[row]:g}, {y_R[row]:g}); expected values above 0.")
        log_x_R, log_y_R = np.log(x_R) - np.log(x_R).mean(), np.log(y_R)
        exponent = float(log_x_R @ log_y_R / (log_x_R @ log_x_R))
        residual_R = log_y_R - log_y_R.mean() - exponent * log_x_R
        error = np.sqrt(residual_R @ residual_R / (len(x_R) - 2) / (log_x_R @ log_x_R))
        half = float(student.ppf(0.975, len(x_R) - 2) * error)
        return cls(
            exponent=exponent,
            coefficient=float(np.exp(log_y_R.mean() - exponent * np.log(x_R).mean())),
            interval=(exponent - half, exponent + half),
            r2=float(1.0 - residual_R.var() / log_y_R.var()),
        )


def optimal_size(law: Chinchilla, flops: float) -> tuple[float, float]:
    """Params and tokens of least loss at 6 N D = flops.

    N = G (C / 6)^(beta / (alpha + beta)), G = (alpha A / (beta B))^(1 / (alpha + beta)).

    Source: Hoffmann et al. 2022, arXiv:2203.15556, eq. 4.
    """
    size, data = law.params_["alpha"], law.params_["beta"]
    ratio = size * law.params_["A"] / (data * law.params_["B"])
    params = ratio ** (1.0 / (size + data)) * (flops / 6.0) ** (data / (size + data))
    return params, flops / 6.0 / params

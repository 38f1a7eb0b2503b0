"""Stage 5, regression: scores of predictions, and what counts as a signal.

Shapes: R runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.stats import rankdata

# CV Spearman times sqrt(rows - 1) is about standard normal without signal; 2.6 is 1 in 200.
SIGNAL_Z = 2.6


def cv_scores(predicted_R: np.ndarray, loss_R: np.ndarray) -> dict[str, float]:
    """Spearman, R2 against the mean of the losses, and mean squared error."""
    mse = float(np.mean((predicted_R - loss_R) ** 2))
    variance = float(loss_R.var())
    # Losses that are constant to rounding leave nothing to explain.
    constant = variance <= 1e-18 * float(np.mean(loss_R**2))
    r2 = 0.0 if constant else 1.0 - mse / variance
    return {"spearman": spearman(predicted_R, loss_R), "r2": r2, "mse": mse}


def spearman(a_R: np.ndarray, b_R: np.ndarray) -> float:
    """Rank correlation; 0 if either side is constant, since it then ranks nothing."""
    if np.ptp(a_R) == 0 or np.ptp(b_R) == 0:
        return 0.0
    return float(np.corrcoef(rankdata(a_R), rankdata(b_R))[0, 1])


def has_signal(scores: Mapping[str, float], num_rows: int) -> bool:
    """Whether cross-validation beats the mean by more than chance."""
    return scores["r2"] > 0 and scores["spearman"] > signal_floor(num_rows)


def signal_floor(num_rows: int) -> float:
    """Cross-validated Spearman that noise alone exceeds in about 1 of 200 targets."""
    return SIGNAL_Z / math.sqrt(num_rows - 1)


def no_signal_words(target: str, name: str, scores: Mapping[str, float], num_rows: int) -> str:
    """Why a target has no signal, with the numbers, and what to do."""
    return (
        f"no signal in {target}: on held-out rows {name} explains {scores['r2']:.0%} of the "
        f"variance and ranks with Spearman {scores['spearman']:.2f}, and {num_rows} rows of noise "
        f"reach {signal_floor(num_rows):.2f} by chance. Its mean is used: add "
        f"runs, or repeat some with other seeds to see the noise"
    )

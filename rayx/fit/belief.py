"""Stage 5, regression: how far the merged candidates of a sweep can be believed, in numbers.

Shapes: U mixtures of trained runs, B bootstrap replicates, T targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import rankdata

from rayx.fit.factor import SAME
from rayx.fit.scores import spearman

AVERAGE = "average"  # the row of the mean over targets
MIN_PAIRS = 5  # fewer say nothing about ranks: then the law of the merged rows is asked
REPLICATES, LEVEL = 1000, 0.95
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Belief:
    """What trained runs say of the merged candidates of one group, for one target or the average.

    Attributes:
        group: The operator and experts in words.
        target: A target, or AVERAGE.
        trained: Trained rows.
        merged: Merged rows.
        pairs: Mixtures that have both.
        basis: "pairs": merged losses are compared with trained ones of the same mixture; "law":
            what a law of the merged rows says of the trained mixtures is, for there are too few.
        spearman: Of merged against trained losses on that basis.
        spearman_low: Lower end of its 95% bootstrap interval over mixtures.
        spearman_high: Upper end.
        gap_bpb: Mean of merged less trained losses on that basis.
        shift: See Factor; NaN in the average, as all that follow up to noise_bpb.
        shift_se: Its standard error.
        slope: See Factor.
        slope_se: Its standard error.
        tilt_bpb: Standard deviation over merged rows of the factor's dependence on the mixture.
        residual_bpb: Of trained losses around what merged ones say of them.
        noise_bpb: Between trained runs of one mixture; NaN without replicates.
        alone_spearman: Of predictions for held-out trained rows, from trained rows alone; NaN where
            the trained rows are too few to be held out.
        joint_spearman: The same with the merged rows, translated, added; in the average for the
            targets that they are kept for.
        alone_bpb: Mean absolute error of those predictions, from trained rows alone.
        joint_bpb: The same with the merged rows.
        kept: Whether the merged rows take part in the fit.
    """

    group: str
    target: str
    trained: int
    merged: int
    pairs: int
    basis: str
    spearman: float
    spearman_low: float
    spearman_high: float
    gap_bpb: float
    shift: float = NAN
    shift_se: float = NAN
    slope: float = NAN
    slope_se: float = NAN
    tilt_bpb: float = NAN
    residual_bpb: float = NAN
    noise_bpb: float = NAN
    alone_spearman: float = NAN
    joint_spearman: float = NAN
    alone_bpb: float = NAN
    joint_bpb: float = NAN
    kept: bool = True

    @property
    def judged(self) -> bool:
        """Whether there were enough trained rows to hold some out."""
        return bool(np.isfinite(self.alone_bpb))


def agreement(
    trained_U: np.ndarray, merged_U: np.ndarray, law_U: np.ndarray, seed: int
) -> dict[str, Any]:
    """Compare merged with trained losses by mixture; the fields of Belief that need no factor.

    Args:
        trained_U: Mean trained loss of each mixture.
        merged_U: Mean merged loss of it, NaN where it was not merged.
        law_U: What the law of the merged rows says of it.
        seed: Of the bootstrap.
    """
    paired_U = np.isfinite(merged_U) & np.isfinite(trained_U)
    pairs = int(paired_U.sum())
    basis = "pairs" if pairs >= MIN_PAIRS else "law"
    told_U = np.where(paired_U, merged_U, np.nan) if basis == "pairs" else law_U
    seen_U = np.isfinite(told_U) & np.isfinite(trained_U)
    a_U, b_U = told_U[seen_U], trained_U[seen_U]
    low, high = spearman_interval(a_U, b_U, seed)
    return {
        "pairs": pairs,
        "basis": basis,
        "spearman": spearman(a_U, b_U) if len(a_U) > 2 else NAN,
        "spearman_low": low,
        "spearman_high": high,
        "gap_bpb": float(np.mean(a_U - b_U)) if len(a_U) else NAN,
    }


def spearman_interval(a_U: np.ndarray, b_U: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentile interval of the rank correlation over resampled mixtures; NaN below MIN_PAIRS.

    Source: Efron 1979, Ann. Statist. 7(1).
    """
    if len(a_U) < MIN_PAIRS:
        return NAN, NAN
    draw_BU = np.random.default_rng(seed).integers(len(a_U), size=(REPLICATES, len(a_U)))
    rank_a_BU, rank_b_BU = rankdata(a_U[draw_BU], axis=1), rankdata(b_U[draw_BU], axis=1)
    rank_a_BU -= rank_a_BU.mean(1, keepdims=True)
    rank_b_BU -= rank_b_BU.mean(1, keepdims=True)
    norm_B = np.sqrt((rank_a_BU**2).sum(1) * (rank_b_BU**2).sum(1))
    found_B = (rank_a_BU * rank_b_BU).sum(1) / np.where(norm_B > 0, norm_B, 1.0)
    low, high = np.quantile(found_B, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def mixtures_of(weights_RK: np.ndarray) -> np.ndarray:
    """Number the mixtures of rows, those within SAME of an earlier one as that one, shape (R,)."""
    seen: list[np.ndarray] = []
    number_R = np.empty(len(weights_RK), dtype=int)
    for row, weights_K in enumerate(weights_RK):
        near = np.abs(np.array(seen) - weights_K).max(1) <= SAME if seen else np.zeros(0, bool)
        number_R[row] = int(near.argmax()) if near.any() else len(seen)
        if number_R[row] == len(seen):
            seen.append(weights_K)
    return number_R


def group_means(values_RT: np.ndarray, number_R: np.ndarray, count: int) -> np.ndarray:
    """Mean of each group's finite values, shape (count, T); NaN where it has none."""
    seen_RT = np.isfinite(values_RT)
    in_UR = np.arange(count)[:, None] == number_R
    number_UT = in_UR @ seen_RT.astype(float)
    sum_UT = in_UR @ np.where(seen_RT, values_RT, 0.0)
    return np.where(number_UT > 0, sum_UT / np.maximum(number_UT, 1.0), np.nan)


def noise_of(loss_R: np.ndarray, number_R: np.ndarray) -> float:
    """Standard deviation between runs of one mixture; NaN without replicates."""
    mean_U = group_means(loss_R[:, None], number_R, int(number_R.max()) + 1)[:, 0]
    free = len(loss_R) - len(np.unique(number_R))
    return float(np.sqrt(((loss_R - mean_U[number_R]) ** 2).sum() / free)) if free else NAN

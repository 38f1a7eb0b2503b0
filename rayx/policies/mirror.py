"""Steps on the simplex that multiplicative policies share: mirror ascent, floor, averages, scales.

A signal that cannot tell domains apart (all scores equal, or one not finite) leaves the weights as
they are, and says so in the log: `tells_apart` decides that, before anything is divided.

Legend: K domains, N gradients.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from rayx.recipe import is_int, is_number, require

log = logging.getLogger(__name__)

FLAT = 1e-12  # scores closer than this share of the largest are equal


def check(
    policy: Any,
    *,
    counts: tuple[str, ...] = (),
    positive: tuple[str, ...] = (),
    shares: tuple[str, ...] = (),
) -> None:
    """Check fields of a policy: integers > 0, numbers > 0, shares in [0, 1].

    Raises:
        SpecError: One is not.
    """
    for names, ok, expected in (
        (counts, lambda v: is_int(v) and v > 0, "an integer > 0"),
        (positive, lambda v: is_number(v) and v > 0, "a number > 0"),
        (shares, lambda v: is_number(v) and 0 <= v <= 1, "a share in [0, 1]"),
    ):
        for name in names:
            value = getattr(policy, name)
            require(ok(value), f"{type(policy).__name__}.{name}", value, expected)


def tells_apart(score_K: np.ndarray, policy: str, step: int) -> bool:
    """Return whether scores differ and are finite; if not, warn, naming policy and step."""
    finite = bool(np.isfinite(score_K).all())
    if finite and np.ptp(score_K) > FLAT * np.abs(score_K).max():
        return True
    what = "equal for all domains" if finite else "not finite"
    log.warning("%s at step %d: the signal is %s; the weights stay.", policy, step, what)
    return False


def ascend(weights_K: np.ndarray, score_K: np.ndarray, rate: float) -> np.ndarray:
    """Return one step of mirror ascent (exponentiated gradient).

    p_j' = p_j exp(rate score_j) / sum_i p_i exp(rate score_i): the p' that maximises
    rate <p', score> - KL(p' || p). A weight of 0 stays 0.

    Args:
        weights_K: p, shape (K,), >= 0, sum > 0.
        score_K: Higher is better, shape (K,), finite; only differences count.
        rate: In 1 / the scores' unit.

    Source: Beck and Teboulle 2003, Operations Research Letters 31, mirror descent with entropy.
    """
    with np.errstate(divide="ignore"):
        log_K = np.log(weights_K) + rate * (score_K - score_K.max())
    new_K = np.exp(log_K - log_K.max())
    return new_K / new_K.sum()


def floored(weights_K: np.ndarray, floor: float) -> np.ndarray:
    """Return the nearest weights (in KL) that are at least floor / K each, sum 1.

    Args:
        weights_K: Shape (K,), >= 0, sum > 0.
        floor: As a share of the uniform weight, in [0, 1].
    """
    least = floor / len(weights_K)
    new_K = np.asarray(weights_K, dtype=np.float64) / np.sum(weights_K)
    low_K = np.zeros(len(new_K), dtype=bool)
    while (new_K[~low_K] < least).any():  # scaling the others down may push one below
        low_K |= new_K < least
        rest = 1.0 - least * low_K.sum()
        others = new_K[~low_K].sum()
        new_K = np.where(low_K, least, new_K * (rest / others if others > 0 else 0.0))
    return new_K


def blend(old_K: np.ndarray, new_K: np.ndarray, share: float) -> np.ndarray:
    """Return (1 - share) old + share new: a moving average, or smoothing toward fixed weights."""
    return (1.0 - share) * old_K + share * new_K


def scores(products_NN: np.ndarray, cosine: bool) -> np.ndarray:
    """Return inner products of gradients as they are, or as cosines, shape (N, N).

    cos_ij = G_ij / sqrt(G_ii G_jj), so that a rate means the same at every scale of the loss; 0
    where a gradient is zero.

    Args:
        products_NN: G, shape (N, N), symmetric.
        cosine: Whether to divide.
    """
    if not cosine:
        return products_NN
    norm_N = np.sqrt(np.maximum(np.diag(products_NN), 0.0))
    scale_NN = np.outer(norm_N, norm_N)
    return np.divide(products_NN, scale_NN, out=np.zeros_like(products_NN), where=scale_NN > 0)


def running_scale(before: float | None, score_K: np.ndarray, keep: float = 0.9) -> float:
    """Return a moving average of the scores' standard deviation over domains, to divide them by.

    A signal that falls as training goes on moves the weights as much late as early, while a single
    measurement without contrast is not blown up to the size of the others.

    Args:
        before: What this returned last time, or None.
        score_K: Shape (K,), scores that tell domains apart.
        keep: Share of the old value, in [0, 1).
    """
    now = float(np.std(score_K))
    return now if before is None else keep * before + (1.0 - keep) * now

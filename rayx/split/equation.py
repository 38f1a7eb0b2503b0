"""Solutions of the split equations, for a fit and for all its bootstrap replicates at once.

Shapes: B bootstrap replicates, T trunk lengths.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rayx.errors import FitError
from rayx.fit.laws import Law

MARGIN = 1e-3  # of D: the few more tokens of D_split
BISECTIONS = 30
BEYOND = 1e4  # times the budget: as far as D_split and D_std are looked for


def evaluate(law: Law, params: float, trunk: np.ndarray, branch: np.ndarray) -> np.ndarray:
    """Losses of the fit (row 0) and of its bootstrap replicates.

    Args:
        law: Fitted, with a bootstrap.
        params: Model size.
        trunk: Trunk tokens: (T,), or (1 + B, 1) for lengths of each row's own.
        branch: Branch tokens, of the same shape.

    Returns:
        Shape (1 + B, T).
    """
    if law.replicates_ is None:
        raise FitError(f"No uncertainty without bootstrap; make {law.name} with bootstrap=1000.")
    theta = {n: np.concatenate([law.theta_[n], law.replicates_[n]]) for n in law.theta_}
    size = np.full(np.shape(trunk), float(params))
    return law.loss(theta, {"params": size, "tokens": trunk, "spec_tokens": branch})[0]


def equal_budget(law: Law, params: float, budget: float, loss_B: np.ndarray) -> np.ndarray:
    """D_std: the budget without a split that reaches the losses, infinite past BEYOND, (1 + B,)."""

    def reaches(tokens_B: np.ndarray) -> np.ndarray:
        tokens_B1 = tokens_B[:, None]
        return evaluate(law, params, tokens_B1, np.zeros_like(tokens_B1))[:, 0] <= loss_B

    ends = np.full(len(loss_B), budget), np.full(len(loss_B), BEYOND * budget)
    found_B = _bisect(reaches, *ends)
    return np.where(reaches(ends[1]), found_B, np.inf)


def split_from(law: Law, params: float, branches: int, least: float, budget: float) -> np.ndarray:
    """D_split: the least D at which MARGIN D more tokens do more in branches, (1 + B,)."""

    def pays(tokens: np.ndarray) -> np.ndarray:
        more = MARGIN * tokens
        in_branches = evaluate(law, params, tokens, more / branches)
        return in_branches < evaluate(law, params, tokens + more, np.zeros_like(tokens))

    tokens_T = np.geomspace(least / 100.0, BEYOND * budget, 160)
    pays_BT = pays(tokens_T)
    first_B = pays_BT.argmax(1)
    low_B, high_B = tokens_T[np.maximum(first_B - 1, 0)], tokens_T[first_B]
    found_B = _bisect(lambda tokens_B: pays(tokens_B[:, None])[:, 0], low_B, high_B)
    return np.where(pays_BT.any(1), found_B, np.inf)


def _bisect(
    holds: Callable[[np.ndarray], np.ndarray], low_B: np.ndarray, high_B: np.ndarray
) -> np.ndarray:
    """The least value between low and high at which a condition holds, each row by itself."""
    low_B, high_B = low_B.copy(), high_B.copy()
    for _ in range(BISECTIONS):
        middle_B = np.sqrt(low_B * high_B)
        holds_B = holds(middle_B)
        high_B = np.where(holds_B, middle_B, high_B)
        low_B = np.where(holds_B, low_B, middle_B)
    return np.where(holds(low_B), low_B, high_B)

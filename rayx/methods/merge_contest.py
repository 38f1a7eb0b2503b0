"""Which pairs beat the ones that a tokenizer merged, and under which shares they do the least.

Source: see `rayx.methods.tokenizer_mixture`.

Legend: K categories, W word types, T merges, R pairs, U changes of a pair by a merge, E edges: a
merge and a pair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse
from scipy.optimize import linprog
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from rayx.corpus.merges.pair_counts import PairHistory
from rayx.errors import FitError

MOST_ROUNDS = 500
LEAST_DISTANCE = 0.05  # of two categories, in [0, 1]

Edges = tuple[np.ndarray, np.ndarray]  # merges and pairs


@dataclass(frozen=True, slots=True)
class Contest:
    """Rates, per million bytes, of the merges' pairs and of those that compete with them.

    Attributes:
        history: How counts change.
        rate_UK: Rate of each change's pair after it.
        own_TK: Rate of the merge's pair before it.
        used_T: Whether any sample has the merge's pair.
    """

    history: PairHistory
    rate_UK: np.ndarray
    own_TK: np.ndarray
    used_T: np.ndarray

    @classmethod
    def of(cls, history: PairHistory, rates_WK: np.ndarray) -> Contest:
        """Prepare a contest from the rates of word types."""
        rate_UK = history.counts(rates_WK)
        own_TK = history.count_before(rate_UK, history.own_T, np.arange(len(history.own_T)))
        return cls(history, rate_UK, own_TK, own_TK.max(axis=1) > 0)

    def edges(self, share_K: np.ndarray, most: int | None = None) -> tuple[Edges, np.ndarray]:
        """Return merges and pairs that are more frequent then, and by how much, (E,).

        Args:
            share_K: The shares.
            most: Of a merge, the most frequent ones; None for all.
        """
        history = self.history
        by_step = np.argsort(history.step_U, kind="stable")
        starts = np.searchsorted(history.step_U[by_step], np.arange(len(self.own_TK) + 2))
        row_U, rate_U = history.row_U[by_step], (self.rate_UK @ share_K)[by_step]
        own_T, rate_R = self.own_TK @ share_K, np.zeros(int(row_U.max()) + 1)
        found = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
        for merge, used in enumerate(self.used_T):
            part = slice(starts[merge], starts[merge + 1])
            rate_R[row_U[part]] = rate_U[part]
            if history.own_T[merge] >= 0:
                rate_R[history.own_T[merge]] = -1.0
            if used:
                more = np.flatnonzero(rate_R > own_T[merge] * (1 + 1e-9) + 1e-9)
                if most is not None and len(more) > most:
                    more = more[np.argpartition(-rate_R[more], most)[:most]]
                found.append((np.full(len(more), merge), more, rate_R[more] - own_T[merge]))
        merge_E, pair_E, excess_E = (np.concatenate(part) for part in zip(*found, strict=True))
        return (merge_E, pair_E), excess_E

    def excess(self, edges: Edges) -> np.ndarray:
        """Return the sum over edges of how much more frequent the pair is, by category, (K,)."""
        merge_E, pair_E = edges
        rate_EK = self.history.count_before(self.rate_UK, pair_E, merge_E)
        return (rate_EK - self.own_TK[merge_E]).sum(axis=0)

    def near(self, names: tuple[str, ...]) -> list[tuple[str, str, float]]:
        """Return categories whose rates of the merges' pairs hardly differ, and by how much."""
        found = []
        for a in range(len(names)):
            for b in range(a):
                one_T, two_T = self.own_TK[:, a], self.own_TK[:, b]
                total = (one_T + two_T).sum()
                distance = abs(one_T - two_T).sum() / total if total else 0.0
                if distance < LEAST_DISTANCE:
                    found.append((names[b], names[a], float(distance)))
        return found


def least_violated(
    contest: Contest,
    start_K: np.ndarray,
    gap: float,
    known: Sequence[Edges] = (),
    most: int | None = None,
) -> tuple[np.ndarray, float, list[Edges]]:
    """Return the shares of the least sum of slacks, that sum, and the matchings met on the way.

    Each round evaluates shares exactly, adds the constraint of their heaviest matching, and solves
    the linear program of all constraints so far, whose value bounds the sum from below.

    Args:
        contest: The rates.
        start_K: Shares to begin with, if no matching is known.
        gap: Stop when the best sum is this near to its bound, over the sum of the merges' rates
            (mean of categories).
        known: Matchings of this or a similar contest, whose constraints are there from the first.
        most: Pairs that compete at a merge, the most frequent ones; None for all.

    Raises:
        FitError: HiGHS fails.
    """
    scale = float(contest.own_TK.sum(axis=0).mean())
    cuts = [contest.excess(matching) / scale for matching in known]
    met: list[Edges] = []
    share_K = _lowest(cuts)[0] if cuts else start_K
    seen: list[np.ndarray] = []
    best_K, best = share_K, np.inf
    for number in range(1, MOST_ROUNDS + 1):
        met.append(heaviest_matching(*contest.edges(share_K, most)))
        cuts.append(contest.excess(met[-1]) / scale)
        seen.append(share_K)
        # all constraints so far, since with few rivals another's matching may be heavier there
        sums = (np.array(cuts) @ np.array(seen).T).max(axis=0)
        best_K, best = seen[int(sums.argmin())], float(sums.min())
        lowest_K, bound = _lowest(cuts)
        if best - bound <= gap:
            break
        # every other step halfway, since the lowest points of few constraints swing about
        share_K = lowest_K if number % 2 else (best_K + lowest_K) / 2
    return best_K, best * scale, met


def _lowest(cuts: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """Return the shares under which the highest of the cuts' products with them is lowest."""
    K = len(cuts[0])
    solved = linprog(
        np.append(np.zeros(K), 1.0),
        A_ub=np.hstack([np.array(cuts), np.full((len(cuts), 1), -1.0)]),
        b_ub=np.zeros(len(cuts)), A_eq=np.append(np.ones(K), 0.0)[None], b_eq=[1.0],
        method="highs-ds",
    )  # fmt: skip
    if solved.x is None:
        raise FitError(f"HiGHS did not solve the linear program: {solved.message}")
    lowest_K = np.maximum(solved.x[:K], 0)
    return lowest_K / lowest_K.sum(), float(solved.x[K])


def heaviest_matching(edges: Edges, excess_E: np.ndarray) -> Edges:
    """Return the edges of the heaviest matching of merges to pairs.

    The sum of its excess is min sum v_t + sum v_p at these shares; for other shares it is at most
    that.
    """
    merge_E, pair_E = edges
    if not len(merge_E):
        return edges
    merges, merge_E = np.unique(merge_E, return_inverse=True)
    pairs, pair_E = np.unique(pair_E, return_inverse=True)
    # a partner of next to no weight for each merge, so that there is always a full matching
    none = excess_E.max() * 1e-12
    alone = np.arange(len(merges))
    weights = sparse.csr_matrix(
        (np.append(excess_E + none, np.full(len(merges), none)),
         (np.append(merge_E, alone), np.append(pair_E, len(pairs) + alone))),
        (len(merges), len(pairs) + len(merges)),
    )  # fmt: skip
    left, right = min_weight_full_bipartite_matching(weights, maximize=True)
    real = right < len(pairs)
    return merges[left[real]], pairs[right[real]]

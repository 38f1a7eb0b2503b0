"""Tokenizer mixture inference: what mixture of categories a tokenizer was trained on.

At each step the trainer merged the most frequent pair of its text, so under the true mixture no
other pair was more frequent. The shares are those that break this the least.

Source: Data Mixture Inference, Hayase et al. 2024, arXiv:2407.16607 (paper and code, read).
Differs: the linear program over shares alone. For given shares the least slacks are, by duality,
    the heaviest matching of merges to pairs that beat them, so each round adds one constraint, the
    sum of the pair constraints of that matching, in place of pair constraints and their slacks: the
    same optimum (tested) at about a hundredth of the time. Intervals by a bootstrap over documents.

Legend: K categories, T merges, R pairs, U changes of a pair by a merge, E edges: merge and pair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse
from scipy.optimize import linprog
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from rayx.corpus.merge_files import read_merge_order
from rayx.corpus.merge_order import MergeOrder
from rayx.corpus.pair_counts import PairHistory
from rayx.corpus.source import Source
from rayx.corpus.word_sample import WordSample, read_samples
from rayx.errors import FitError
from rayx.spec import require

GAP = 1e-4  # of the objective, between the best shares and the bound from below
BOOTSTRAP_GAP = 5e-3
MOST_KNOWN = 150  # matchings that a replicate begins with
MOST_ROUNDS = 500
KEPT = 0.2  # of the rate of the last merges: pairs that never reach it cannot compete
MOST_UNSEEN = 0.02  # of merges
MOST_VIOLATION = 0.05
LEAST_DISTANCE = 0.05
LEVEL = 0.9
MIN_MERGES = 50

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class TokenizerMixture:
    """Shares of the training text's bytes, with intervals and what speaks against them.

    Attributes:
        shares: Category -> share of bytes, in [0, 1], sum 1.
        intervals: Category -> LEVEL interval over documents of the sample; empty with no bootstrap.
        merges: Merges used.
        listed: Merges that the file lists.
        unseen: Share of the merges whose pair is in no sample.
        violation: Sum of the slacks over the sum of the merges' rates; 0 for perfect samples.
        unchecked: Merges at which a pair too rare to be kept may have been more frequent.
        rounds: Of the linear program.
        documents: Category -> documents of its sample.
        bytes: Category -> bytes of its sample.
        warnings: What to know before using the shares.
    """

    shares: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    merges: int
    listed: int
    unseen: float
    violation: float
    unchecked: int
    rounds: int
    documents: dict[str, int]
    bytes: dict[str, int]
    warnings: tuple[str, ...]


def infer_mixture(
    tokenizer: str | Path,
    sources: list[Source],
    merges: int = 3000,
    bootstrap: int = 50,
    seed: int = 0,
    pattern: str | None = None,
    progress: Progress = lambda done, total, what: None,
) -> TokenizerMixture:
    """Infer the mixture that a tokenizer's file was trained on.

    min sum_t v_t + sum_p v_p over shares a >= 0, sum 1, and slacks v >= 0, subject to
    sum_i a_i (c_i,m(t) - c_i,p) / size_i + v_t + v_p >= 0 for all merges t and pairs p, with
    counts c after the first t - 1 merges.

    Args:
        tokenizer: File, see `read_merge_order`.
        sources: Sample of each category, 2 or more, of documents like those of the training text.
        merges: How many are used, from the first; fewer if there are fewer, with a warning.
        bootstrap: Replicates for the intervals, 0 for none.
        seed: Draws the replicates.
        pattern: See `read_merge_order`.
        progress: Called with (done, total, what).

    Raises:
        CorpusError: The tokenizer or a sample cannot be used.
        FitError: No merge's pair is in any sample.
        SpecError: An argument is out of range.
    """
    require(len(sources) > 1, "samples", [s.domain for s in sources], "two categories or more")
    require(merges >= MIN_MERGES, "merges", merges, f"{MIN_MERGES} or more")
    require(bootstrap == 0 or bootstrap >= 10, "bootstrap", bootstrap, "0, or 10 or more")
    order = read_merge_order(tokenizer, merges, pattern)
    sample = read_samples(order, sources)
    return mixture_of(order, sample, bootstrap, seed, progress, asked=merges)


def mixture_of(
    order: MergeOrder,
    sample: WordSample,
    bootstrap: int = 50,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
    asked: int | None = None,
) -> TokenizerMixture:
    """Infer the mixture of a merge order; `infer_mixture` with the files read."""
    T, K = len(order), len(sample.categories)
    history = PairHistory.follow(order, sample.types, lambda n: progress(n, T, "merges"))
    kept_U, left_out_K = _competing(history, history.counts(sample.rates()))
    history = history.only(kept_U)
    contest = Contest.of(history, sample.rates())
    least_K, objective, matchings = least_violated(contest, np.full(K, 1 / K), GAP)
    rng = np.random.default_rng(seed)
    drawn, known = [], matchings
    for number in range(bootstrap):
        times_KB = np.array([_times(bytes_B, rng) for bytes_B in sample.bytes_KB])
        again = Contest.of(history, sample.rates(times_KB))
        drawn_K, _, met = least_violated(again, least_K, BOOTSTRAP_GAP, known)
        drawn.append(drawn_K)
        known = [*known, *met][-MOST_KNOWN:]
        progress(number + 1, bootstrap, "replicates")
    intervals = {}
    if drawn:
        low_K, high_K = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        ends = zip(np.minimum(low_K, least_K), np.maximum(high_K, least_K), strict=True)
        intervals = {
            name: (float(low), float(high))
            for name, (low, high) in zip(sample.categories, ends, strict=True)
        }
    own_T = contest.own_TK @ least_K
    named = dict(zip(sample.categories, range(K), strict=True))
    result = TokenizerMixture(
        shares={name: float(least_K[k]) for name, k in named.items()},
        intervals=intervals,
        merges=T,
        listed=order.listed,
        unseen=float(1 - contest.used_T.mean()),
        violation=float(objective / own_T.sum()),
        unchecked=int((own_T < left_out_K @ least_K)[contest.used_T].sum()),
        rounds=len(matchings),
        documents=dict(zip(sample.categories, sample.documents, strict=True)),
        bytes={name: int(sample.bytes_KB[k].sum()) for name, k in named.items()},
        warnings=(),
    )
    warnings = (*order.warnings, *sample.warnings, *_doubts(result, contest, sample, asked))
    return TokenizerMixture(**{**_fields(result), "warnings": warnings})


def _fields(result: TokenizerMixture) -> dict[str, object]:
    return {name: getattr(result, name) for name in TokenizerMixture.__slots__}


def _times(bytes_B: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw how often each block that has text is taken."""
    full = np.flatnonzero(bytes_B)
    return np.bincount(rng.choice(full, len(full)), minlength=len(bytes_B)).astype(float)


def _doubts(
    result: TokenizerMixture, contest: Contest, sample: WordSample, asked: int | None
) -> list[str]:
    found = []
    if asked is not None and asked > result.merges:
        found.append(f"{asked:,} merges were asked for, the tokenizer has {result.merges:,}")
    if result.unseen > MOST_UNSEEN:
        found.append(f"{result.unseen:.1%} of the merges are of pairs that no sample has: "
                     "categories are missing, and the shares are of the rest")  # fmt: skip
    if result.violation > MOST_VIOLATION:
        found.append(f"the shares leave a violation of {result.violation:.1%} (perfect samples "
                     "leave none): categories are missing, or samples are unlike the training "
                     "text or cut into words in another way")  # fmt: skip
    for name, number in result.documents.items():
        if number == 1:
            found.append(f"{name} is one document: its interval is only of that document's parts")
    for a, b, distance in contest.near(sample.categories):
        found.append(f"{a} and {b} are nearly the same to the tokenizer (distance {distance:.1%}): "
                     "only the sum of their shares is known")  # fmt: skip
    return found


def _competing(history: PairHistory, rate_UK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which changes are of pairs that can compete or of merges, and the others' top rates.

    Raises:
        FitError: No merge's pair is in any sample.
    """
    merge_T = np.arange(len(history.own_T))
    own_T = history.count_before(rate_UK, history.own_T, merge_T).max(axis=1)
    if not own_T.any():
        raise FitError(f"None of the {len(own_T):,} merges' pairs is in a sample. Are the samples "
                       "of the tokenizer's languages, and is the pattern its own?")  # fmt: skip
    floor = KEPT * np.median(own_T[own_T > 0][-max(1, len(own_T) // 20) :])
    starts_R = np.flatnonzero(np.diff(history.row_U, prepend=-1))
    peak_RK = np.maximum.reduceat(rate_UK, starts_R, axis=0)
    kept_R = peak_RK.max(axis=1) >= floor
    kept_R[history.own_T[history.own_T >= 0]] = True
    return kept_R[history.row_U], peak_RK[~kept_R].max(axis=0, initial=0.0)


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

    def edges(self, share_K: np.ndarray) -> tuple[Edges, np.ndarray]:
        """Return merges and pairs that are more frequent then, and by how much, (E,)."""
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
    contest: Contest, start_K: np.ndarray, gap: float, known: Sequence[Edges] = ()
) -> tuple[np.ndarray, float, list[Edges]]:
    """Return the shares of the least sum of slacks, that sum, and the matchings met on the way.

    Each round evaluates shares exactly, adds the constraint of their heaviest matching, and solves
    the linear program of all constraints so far, whose value bounds the sum from below.

    Args:
        contest: The rates.
        start_K: Shares to begin with.
        gap: Stop when the best sum is within this share of the bound.
        known: Matchings of a similar contest, whose constraints are there from the first round.

    Raises:
        FitError: HiGHS fails.
    """
    K = len(start_K)
    scale = float(contest.own_TK.sum(axis=0).mean())
    cuts = [contest.excess(matching) / scale for matching in known]
    met: list[Edges] = []
    share_K, best_K, best = start_K, start_K, np.inf
    for number in range(1, MOST_ROUNDS + 1):
        met.append(heaviest_matching(*contest.edges(share_K)))
        cuts.append(contest.excess(met[-1]) / scale)
        if (value := float(cuts[-1] @ share_K)) < best:
            best, best_K = value, share_K
        solved = linprog(
            np.append(np.zeros(K), 1.0),
            A_ub=np.hstack([np.array(cuts), np.full((len(cuts), 1), -1.0)]),
            b_ub=np.zeros(len(cuts)), A_eq=np.append(np.ones(K), 0.0)[None], b_eq=[1.0],
            method="highs-ds",
        )  # fmt: skip
        if solved.x is None:
            raise FitError(f"HiGHS did not solve the linear program: {solved.message}")
        if best - solved.x[K] <= gap * best + 1e-9:
            break
        lowest_K = np.maximum(solved.x[:K], 0)
        lowest_K /= lowest_K.sum()
        # every other step halfway, since the lowest points of few constraints swing about
        share_K = lowest_K if number % 2 else (best_K + lowest_K) / 2
    return best_K, best * scale, met


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

"""Tokenizer mixture inference: what mixture of categories a tokenizer was trained on.

At each step the trainer merged the most frequent pair of its text, so under the true mixture no
other pair was more frequent. The shares are those that break this the least.

Source: Data Mixture Inference, Hayase et al. 2024, arXiv:2407.16607 (paper and code, read).
Differs: the linear program over shares alone. For given shares the least slacks are, by duality,
    the heaviest matching of merges to pairs that beat them, so each round adds one constraint, the
    sum of the pair constraints of that matching, in place of pair constraints and their slacks: the
    same optimum (tested). At a merge only the RIVALS most frequent other pairs compete. On 6 real
    categories and 3,000 merges that took 5 s where all pair constraints took 455 s, for shares that
    differ by .0033 at most. Intervals by a bootstrap over documents.

Legend: K categories, B blocks, W word types, T merges, R pairs, U changes of a pair by a merge.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rayx.corpus.merges.files import read_merge_order
from rayx.corpus.merges.order import MergeOrder
from rayx.corpus.merges.pair_counts import PairHistory
from rayx.corpus.merges.word_sample import WordSample, read_samples
from rayx.corpus.source import Source
from rayx.errors import FitError
from rayx.methods.merge_contest import Contest, least_violated
from rayx.spec import require

GAP = 2e-5  # between the best sum of slacks and its bound, over the sum of the merges' rates
BOOTSTRAP_GAP = 1e-4
RIVALS = 64  # pairs that compete at a merge, the most frequent ones
MOST_KNOWN = 150  # matchings that a replicate begins with
KEPT = 0.2  # of the rate of the last merges: pairs that never reach it cannot compete
MOST_UNSEEN = 0.05  # of merges
MOST_VIOLATION = 0.08
LEVEL = 0.9
MIN_MERGES = 50

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class TokenizerMixture:
    """Shares of the training text's bytes, with intervals and what speaks against them.

    Attributes:
        shares: Category -> share of bytes, in [0, 1], sum 1.
        intervals: Category -> share +- sqrt(2) half the width of the bootstrap's LEVEL interval, as
            the training text is one more draw of documents; empty with no bootstrap.
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
    least_K, objective, matchings = least_violated(contest, np.full(K, 1 / K), GAP, most=RIVALS)
    rng = np.random.default_rng(seed)
    drawn, known = [], matchings
    for number in range(bootstrap):
        times_KB = np.array([_times(bytes_B, rng) for bytes_B in sample.bytes_KB])
        again = Contest.of(history, sample.rates(times_KB))
        drawn_K, _, met = least_violated(again, least_K, BOOTSTRAP_GAP, known, RIVALS)
        drawn.append(drawn_K)
        known = [*known, *met][-MOST_KNOWN:]
        progress(number + 1, bootstrap, "replicates")
    intervals = {}
    if drawn:
        low_K, high_K = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        # The tokenizer's own text is one more draw of documents, which no replicate shows.
        half_K = np.sqrt(2.0) * (high_K - low_K) / 2.0
        ends = np.clip([least_K - half_K, least_K + half_K], 0.0, 1.0).T
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

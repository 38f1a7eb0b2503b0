"""Stage 1, corpus: how often each pair of tokens occurs after each merge, kept incrementally.

Words are counted once for each type. All their tokens lie in one array as a doubly linked list; a
merge visits the places of its own pair, and counts what goes and what comes. All is vectorised
over the places of one merge, so a merge costs about as much as it has places.

Legend: W word types, K categories, T merges, R pairs, C changes at single places, U changes of a
pair by a merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from rayx.corpus.merges.order import MergeOrder

Places = dict[int, list[np.ndarray]]  # pair -> where it is, or was

NONE, GONE = -1, -2  # in place of a token: no neighbour; merged into the token before it


@dataclass(frozen=True, slots=True)
class Change:
    """What a merge does to pairs: one entry for each place where a pair goes (-1) or comes (+1).

    Attributes:
        keys_C: Pair, left id * V + right id.
        words_C: Word type.
        signs_C: -1 or +1.
    """

    keys_C: np.ndarray
    words_C: np.ndarray
    signs_C: np.ndarray


class Words:
    """Word types as linked tokens, to which merges are applied one after another.

    Args:
        order: The tokenizer.
        types: Word types, W of them.
    """

    def __init__(self, order: MergeOrder, types: Sequence[str]) -> None:
        ids = {token: number for number, token in enumerate(order.tokens)}
        symbols = [order.symbols(word) for word in types]
        lengths_W = np.array([len(s) for s in symbols], np.int64)
        # a symbol that no merge uses is in pairs all the same
        flat = (ids.setdefault(symbol, len(ids)) for word in symbols for symbol in word)
        self.token = np.fromiter(flat, np.int64, count=int(lengths_W.sum()))
        self.base, size = len(ids), len(self.token)
        self.word = np.repeat(np.arange(len(types)), lengths_W)
        self.token = np.append(self.token, NONE)
        self.after, self.before = np.arange(1, size + 2), np.arange(-1, size)
        ends = np.cumsum(lengths_W)[lengths_W > 0]
        self.after[ends - 1] = size
        self.before[np.append(0, ends[:-1])] = size
        self.before = np.append(self.before, size)
        self.after[size] = size
        self.order = order

    def initial(self) -> Change:
        """Return all pairs of symbols, as what comes before the first merge."""
        return self._pairs(np.arange(len(self.word)), 1)

    def steps(self) -> Iterator[Change]:
        """Yield the changes of each merge, in order."""
        merges = self.order.merges_T3
        wanted = np.unique(merges[:, 0] * self.base + merges[:, 1])
        places: Places = {}
        self._note(np.arange(len(self.word)), wanted, places)
        empty = np.zeros(0, np.int64)
        for left, right, product in merges:
            found = places.pop(int(left * self.base + right), [empty])
            at = np.unique(np.concatenate(found))
            follows = self.after[at]
            at = at[(self.token[at] == left) & (self.token[follows] == right)]
            if left == right:
                at = at[_every_other(at, self.after)]
            follows = self.after[at]
            gone = self._pairs(np.unique(np.concatenate([self.before[at], at, follows])), -1)
            beyond = self.after[follows]
            self.token[at], self.token[follows] = product, GONE
            self.after[at], self.before[beyond] = beyond, at
            new = np.unique(np.concatenate([self.before[at], at]))
            come = self._pairs(new, 1)
            self._note(new, wanted, places)
            yield Change(*(np.concatenate(both) for both in zip(
                (gone.keys_C, gone.words_C, gone.signs_C),
                (come.keys_C, come.words_C, come.signs_C), strict=True)))  # fmt: skip

    def _pairs(self, at: np.ndarray, sign: int) -> Change:
        """Return the pairs that begin at places."""
        at = at[(at < len(self.word)) & (self.token[self.after[at]] != NONE)]
        keys = self.token[at] * self.base + self.token[self.after[at]]
        return Change(keys, self.word[at], np.full(len(at), sign))

    def _note(self, at: np.ndarray, wanted: np.ndarray, places: Places) -> None:
        """Note the places of pairs that some merge is of."""
        at = at[(at < len(self.word)) & (self.token[self.after[at]] != NONE)]
        keys = self.token[at] * self.base + self.token[self.after[at]]
        near = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
        hit = wanted[near] == keys
        at, keys = at[hit], keys[hit]
        ordered = np.argsort(keys, kind="stable")
        distinct, starts = np.unique(keys[ordered], return_index=True)
        for key, group in zip(distinct.tolist(), np.split(at[ordered], starts[1:]), strict=False):
            places.setdefault(key, []).append(group)


def _every_other(at: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Mask the places that do not overlap with one taken before, in runs of one token."""
    joined = np.append(False, after[at[:-1]] == at[1:]) if len(at) else np.zeros(0, bool)
    number = np.arange(len(at))
    start = np.maximum.accumulate(np.where(joined, 0, number)) if len(at) else number
    return (number - start) % 2 == 0


@dataclass(frozen=True, slots=True)
class PairHistory:
    """How the counts of pairs change with the merges, for any counts of the word types.

    Changes are sorted by pair and step; step 0 is what there is before the first merge, step t + 1
    what merge t does.

    Attributes:
        changes_UW: Change of a pair by one occurrence of each word type, sparse.
        row_U: Pair of a change.
        step_U: Step of a change.
        own_T: Pair that a merge is of, -1 where it is never seen.
    """

    changes_UW: sparse.csr_matrix
    row_U: np.ndarray
    step_U: np.ndarray
    own_T: np.ndarray

    @classmethod
    def follow(
        cls, order: MergeOrder, types: Sequence[str], done: Callable[[int], None] = lambda n: None
    ) -> PairHistory:
        """Apply all merges to word types; holds at most 5 changes for each of their symbols.

        Args:
            order: The tokenizer.
            types: Word types.
            done: Called with the number of merges applied.
        """
        words = Words(order, types)
        changes = [words.initial()]
        for change in words.steps():
            changes.append(change)
            done(len(changes) - 1)
        steps = len(changes)
        sizes = [len(change.keys_C) for change in changes]
        step_C = np.repeat(np.arange(steps), sizes)
        keys_C, word_C, sign_C = (
            np.concatenate([getattr(change, name) for change in changes])
            for name in ("keys_C", "words_C", "signs_C")
        )
        changes.clear()
        keys_R, row_C = np.unique(keys_C, return_inverse=True)
        distinct, change_C = np.unique(row_C * steps + step_C, return_inverse=True)
        shape = (len(distinct), len(types))
        matrix = sparse.csr_matrix((sign_C.astype(np.float64), (change_C, word_C)), shape)
        own = order.merges_T3[:, 0] * words.base + order.merges_T3[:, 1]
        at = np.minimum(np.searchsorted(keys_R, own), len(keys_R) - 1)
        own_T = np.where(keys_R[at] == own, at, -1) if len(keys_R) else np.full(len(own), -1)
        return cls(matrix, distinct // steps, distinct % steps, own_T)

    def counts(self, counts_WK: np.ndarray) -> np.ndarray:
        """Return the count of each change's pair after it, by category, (U, K).

        Args:
            counts_WK: How often each word type occurs, or its rate in any unit.
        """
        sums_UK = np.cumsum(self.changes_UW @ counts_WK, axis=0)
        starts = np.flatnonzero(np.diff(self.row_U, prepend=-1))
        before = np.zeros((len(starts), sums_UK.shape[1]))
        before[1:] = sums_UK[starts[1:] - 1]
        return sums_UK - np.repeat(before, np.diff(np.append(starts, len(self.row_U))), axis=0)

    def count_before(
        self, counts_UK: np.ndarray, row_E: np.ndarray, merge_E: np.ndarray
    ) -> np.ndarray:
        """Return the counts of pairs just before merges, (E, K); 0 for a pair -1.

        Args:
            counts_UK: From `counts`.
            row_E: Pairs.
            merge_E: Merges.
        """
        if not len(self.row_U):
            return np.zeros((len(row_E), counts_UK.shape[1]))
        steps = len(self.own_T) + 1
        places_U = self.row_U * steps + self.step_U
        at_E = np.searchsorted(places_U, row_E * steps + merge_E, side="right") - 1
        seen_E = (row_E >= 0) & (at_E >= 0)
        seen_E &= self.row_U[np.maximum(at_E, 0)] == row_E
        return np.where(seen_E[:, None], counts_UK[at_E], 0.0)

    def only(self, keep_U: np.ndarray) -> PairHistory:
        """Return the history of some pairs, all changes of which are kept."""
        rows = np.unique(self.row_U[keep_U])
        at_T = np.minimum(np.searchsorted(rows, self.own_T), len(rows) - 1)
        return PairHistory(
            self.changes_UW[keep_U],
            np.searchsorted(rows, self.row_U[keep_U]),
            self.step_U[keep_U],
            np.where(rows[at_T] == self.own_T, at_T, -1),
        )

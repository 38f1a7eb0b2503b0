"""Stage 1, corpus: which train documents share word n-grams with held-out text.

Three passes: `add_heldout` over all held-out text, `find` over all train text, then
`train_documents` and `heldout_counts` read the result.

Boilerplate: an n-gram that more than 10 train documents hold (a licence head, a site's footer)
says nothing about one held-out document. It counts apart and marks no train document. A text
that leaked more than 10 times is counted there too: `near_duplicates` takes copies out first.

Source: Brown et al. (arXiv 2005.14165), appendix C: 13-grams, lower-cased, no punctuation, those
in more than 10 train documents left out.
Differs: train documents are dropped whole, not the 200 characters around the n-gram; a document
shorter than n words is compared as a whole.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np

from rayx.corpus.cleaning.ngrams import ngram_hashes, word_hashes
from rayx.errors import CorpusError
from rayx.recipe import is_int

BOILERPLATE = 10  # train documents
LEAST_WORDS, MOST_WORDS = 3, 100
SLICE_WORDS = 1_000_000  # of a long document, looked at together


class Contamination:
    """The word n-grams of held-out text, and the train documents that hold them.

    Memory: 9 bytes per different n-gram of held-out text (up to 24 while it is collected), a table
    of 16 to 32 bytes per n-gram to pass over the others fast (134 MB at most) and at most 88 bytes
    per n-gram for the documents that hold it; nothing per train document.

    Args:
        words: Words to an n-gram, in [3, 100].

    Raises:
        CorpusError: words is out of range.
    """

    def __init__(self, words: int = 13) -> None:
        check_words(words)
        self.words = words
        self._collected: list[np.ndarray] = []
        self._ngrams = np.zeros(0, np.uint64)  # sorted
        self._documents, self._held = array("Q"), array("Q")  # who holds which n-gram
        self._seen = 0
        self._close()

    def add_heldout(self, texts: Sequence[str]) -> None:
        """Take the n-grams of held-out documents, before any train document is looked at."""
        self._collected.append(np.unique(self._hashes(texts)[0]))

    def find(self, texts: Sequence[str]) -> None:
        """Look held-out n-grams up in train documents, which are numbered from 0 as they come."""
        if self._collected:
            self._close()
        hashes, bounds = self._hashes(texts)
        maybe = np.flatnonzero(self._table[self._slot(hashes)])
        at = np.searchsorted(self._ngrams, hashes[maybe])
        at[at == len(self._ngrams)] = 0
        hit = self._ngrams[at] == hashes[maybe] if len(self._ngrams) else np.zeros(0, bool)
        document = np.searchsorted(bounds, maybe[hit], side="right") - 1
        pairs = np.unique(np.stack([document, at[hit]], axis=1), axis=0)
        for number, ngram in pairs.tolist():
            if self._holders[ngram] <= BOILERPLATE:
                self._holders[ngram] += 1
                self._documents.append(self._seen + number)
                self._held.append(ngram)
        self._seen += len(texts)

    def train_documents(self) -> np.ndarray:
        """Return the numbers of the train documents that share an n-gram, sorted, 1-d int64."""
        held = np.frombuffer(self._held, np.uint64).astype(np.int64)
        telling = self._holders[held] <= BOILERPLATE
        return np.unique(np.frombuffer(self._documents, np.uint64).astype(np.int64)[telling])

    def heldout_counts(self, texts: Sequence[str]) -> dict[str, int]:
        """Count held-out documents again, once all train text has been looked at.

        Returns:
            documents with an n-gram that train text holds too, ngrams in all, those that are
            shared, and those that are boilerplate.
        """
        if self._collected:
            self._close()
        hashes, bounds = self._hashes(texts)
        holders = self._holders[np.searchsorted(self._ngrams, hashes)]
        shared = (holders > 0) & (holders <= BOILERPLATE)
        touched = np.searchsorted(bounds, np.flatnonzero(shared), side="right")
        return {"documents": len(np.unique(touched)), "ngrams": len(hashes),
                "shared": int(shared.sum()),
                "boilerplate": int((holders > BOILERPLATE).sum())}  # fmt: skip

    def _hashes(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the n-grams of documents and where each one's begin, see `ngram_hashes`."""
        step, parts, bounds = SLICE_WORDS, [], [0]
        documents = [word_hashes(text) for text in texts]
        if all(len(d) <= step for d in documents):
            return ngram_hashes(documents, self.words)
        for document in documents:
            last = max(len(document) - self.words + 1, 1)
            slices = [document[i : min(i + step, last) + self.words - 1]
                      for i in range(0, last, step)]  # fmt: skip
            parts += [ngram_hashes([s], self.words)[0] for s in slices]
            bounds.append(bounds[-1] + sum(len(p) for p in parts[-len(slices) :]))
        return np.concatenate(parts), np.array(bounds)

    def _close(self) -> None:
        self._ngrams = np.unique(np.concatenate([self._ngrams, *self._collected]))
        self._collected = []
        # train documents that hold each, counted to BOILERPLATE + 1
        self._holders = np.zeros(len(self._ngrams), np.uint8)
        bits = min(max(len(self._ngrams) * 16, 2).bit_length(), 27)
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, bool)
        self._table[self._slot(self._ngrams)] = True

    def _slot(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> self._shift).astype(np.int64)


def check_words(words: int) -> None:
    """Refuse n-grams of less than 3 or more than 100 words.

    Raises:
        CorpusError: It is one of them.
    """
    if not is_int(words) or not LEAST_WORDS <= words <= MOST_WORDS:
        raise CorpusError(
            f"contamination_words is {words}, expected a number of words in [{LEAST_WORDS}, "
            f"{MOST_WORDS}]: 13 is usual; shorter ones are in any text, longer ones in copies only."
        )

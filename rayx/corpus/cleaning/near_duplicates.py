"""Stage 1, corpus: near-duplicates by MinHash and locality-sensitive hashing.

Documents are bags of word bigrams: a repeated bigram counts as often as it occurs, so that a long
document of few phrases is not taken for a short one. Bigrams, because one changed word of w spoils
only 2 of about w: with a share p of the words changed, two documents keep a similarity of about
(1 - p)^2 / (2 - (1 - p)^2), .82 at 5% (5-grams: .63, where real documents differ as much).

What the signatures find is compared bigram by bigram, so no pair below the threshold is taken. Of
many that are found, as for pages made from one template, the 100 with the likest signatures are.

Source: Broder (1997), MinHash; Indyk and Motwani (1998), LSH; Lee et al. (arXiv 2107.06499) for
the check of each candidate. The signatures and the index are rensa's (MIT).
Differs: greedy, in order: a document goes if it resembles one that stays. Not transitive: of a
chain a ~ b ~ c, with a unlike c, both ends stay.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rayx.corpus.cleaning.ngrams import mix, ngram_hashes, word_hashes
from rayx.errors import CorpusError

BIGRAM = 2
PERMUTATIONS = 64  # the index finds, the exact check decides: more would only take memory
FOUND = 0.98  # least chance that the index finds a pair at the threshold
SEED = 1
MOST_WORDS = 4_000_000  # of a document are looked at, the first; some 25 MB
MOST_CHECKED = 100  # candidates of a document
SLACK = 0.2  # an estimate this far below the similarity has 3.5 standard errors
SLICE = 100_000  # bigrams given to the signature at once


class NearDuplicates:
    """Says of each document which earlier one it resembles.

    Memory: about 1.7 KB per document that stays, however long it is (3 KB below a threshold of
    .65, 1 KB above .85); its bigrams lie in `scratch`, 4 bytes each, less than its text.

    Args:
        threshold: Least Jaccard similarity |A and B| / |A or B| of two bags of bigrams, in (0, 1].
        scratch: File for the bigrams; replaced.

    Raises:
        CorpusError: The threshold is out of range.
    """

    def __init__(self, threshold: float, scratch: Path) -> None:
        from rensa import RMinHashLSH  # type: ignore[attr-defined]

        check_threshold(threshold)
        self.threshold = threshold
        self.too_short = 0  # documents of less than two words, which resemble nothing
        self._index = RMinHashLSH(threshold, PERMUTATIONS, num_bands(threshold))
        self._bags = open(scratch, "w+b")
        # of the documents that stay, as many as num_stay; the bag is begin to end in the file
        self._stay = np.zeros(1024, [("number", "u8"), ("begin", "u8"), ("end", "u8"),
                                     ("signature", "u4", PERMUTATIONS)])  # fmt: skip
        self._num_stay = 0
        self._seen = 0

    def __enter__(self) -> NearDuplicates:
        return self

    def __exit__(self, *_: object) -> None:
        self._bags.close()

    def add(self, texts: Sequence[str], all_stay: bool = False) -> np.ndarray:
        """Add documents, in order.

        Args:
            texts: The documents.
            all_stay: Take all of them as they are, for later ones to be compared with.

        Returns:
            For each the number, from 0 in order of adding, of the earlier document that stays and
            that it resembles; -1 if there is none and it stays. 1-d int64.
        """
        words = [word_hashes(t)[:MOST_WORDS] for t in texts]
        shingles, bounds = ngram_hashes(words, BIGRAM)
        found = np.full(len(texts), -1, np.int64)
        for i, (begin, end) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            if len(words[i]) < BIGRAM:
                self.too_short += 1
                continue
            bag = _bag(shingles[begin:end])
            signature = _signature(bag)
            digest = np.array(signature.digest(), np.uint32)
            candidates = [] if all_stay else self._index.query(signature)
            near = self._nearest(bag, digest, np.array(candidates, np.int64))
            if near is None:
                self._index.insert(self._num_stay, signature)
                self._keep(self._seen + i, bag, digest)
            else:
                found[i] = self._stay["number"][near]
        self._seen += len(texts)
        return found

    def _keep(self, number: int, bag: np.ndarray, digest: np.ndarray) -> None:
        if self._num_stay == len(self._stay):
            self._stay = np.resize(self._stay, 2 * len(self._stay))
        begin = self._bags.seek(0, os.SEEK_END)
        self._bags.write(bag.tobytes())
        self._stay[self._num_stay] = (number, begin, begin + bag.nbytes, digest)
        self._num_stay += 1

    def _nearest(self, bag: np.ndarray, digest: np.ndarray, candidates: np.ndarray) -> int | None:
        """Return the candidate with the likest signature that is as similar as asked."""
        estimates = (self._stay["signature"][candidates] == digest).mean(1)
        order = np.lexsort((candidates, -estimates))[:MOST_CHECKED]
        for key in candidates[order[estimates[order] >= self.threshold - SLACK]].tolist():
            begin, end = int(self._stay["begin"][key]), int(self._stay["end"][key])
            small, large = sorted((bag.nbytes, end - begin))
            if small < self.threshold * large:  # the most that the similarity can be
                continue
            self._bags.seek(begin)
            other = np.frombuffer(self._bags.read(end - begin), np.uint32)
            if _jaccard(bag, other) >= self.threshold:
                return key
        return None


def check_threshold(threshold: float) -> None:
    """Refuse a similarity outside (0, 1].

    Raises:
        CorpusError: It is outside.
    """
    if type(threshold) not in (int, float) or not 0 < threshold <= 1:
        raise CorpusError(
            f"near_duplicates is {threshold}, expected a Jaccard similarity in (0, 1]: 0.7 finds "
            "copies with 1 word in 20 changed, 1 only those that differ in case and punctuation."
        )


def num_bands(threshold: float) -> int:
    """Return the fewest bands b of r = PERMUTATIONS / b with 1 - (1 - threshold^r)^b >= FOUND."""
    bands = 4
    while bands < PERMUTATIONS and 1 - (1 - threshold ** (PERMUTATIONS / bands)) ** bands < FOUND:
        bands *= 2
    return bands


def similarity(first: str, second: str) -> float:
    """Return the exact Jaccard similarity of two texts, in [0, 1]; 0 for less than two words."""
    shingles, (_, middle, _) = ngram_hashes([word_hashes(first), word_hashes(second)], BIGRAM)
    return _jaccard(_bag(shingles[:middle]), _bag(shingles[middle:]))


def _bag(shingles: np.ndarray) -> np.ndarray:
    """Return the sorted 32-bit hashes of (bigram, how many of it came before)."""
    ordered = np.sort(shingles)
    starts = np.flatnonzero(_firsts(ordered))
    if len(starts) < len(ordered):
        lengths = np.diff(starts, append=len(ordered))
        before = np.arange(len(ordered)) - np.repeat(starts, lengths)
        ordered = np.sort(ordered + mix(before.astype(np.uint64)))
    hashes = (ordered >> np.uint64(32)).astype(np.uint32)
    return hashes[_firsts(hashes)]


def _firsts(ordered: np.ndarray) -> np.ndarray:
    """Say of each sorted value whether it is the first of its kind."""
    first = np.ones(len(ordered), bool)
    np.not_equal(ordered[1:], ordered[:-1], out=first[1:])
    return first


def _signature(bag: np.ndarray) -> Any:
    from rensa import RMinHash  # type: ignore[attr-defined]

    signature = RMinHash(PERMUTATIONS, SEED)
    for start in range(0, len(bag), SLICE):
        signature.update(bag[start : start + SLICE].view("V4").tolist())
    return signature


def _jaccard(first: np.ndarray, second: np.ndarray) -> float:
    both = len(np.intersect1d(first, second, assume_unique=True))
    return both / max(len(first) + len(second) - both, 1)

"""Stage 1, corpus: samples of text as counts of word types, in blocks for the bootstrap.

A block is a run of neighbouring documents, so that pieces of one document stay together.

Legend: W word types, K categories, B blocks of a category.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from rayx.corpus.documents import documents
from rayx.corpus.merges.order import MergeOrder, word_counts
from rayx.corpus.progress import progress
from rayx.corpus.source import Source, locate
from rayx.errors import CorpusError

log = logging.getLogger(__name__)

BLOCKS = 20
MOST_BYTES = 64_000_000  # of a category that are read
MOST_SYMBOLS = 4_000_000  # of all word types: what bounds memory, at some 100 bytes a symbol


@dataclass(frozen=True, slots=True)
class WordSample:
    """Counts of word types by category and block.

    Attributes:
        categories: Names.
        types: Word types, the most frequent ones.
        counts_WKB: Counts, sparse (W, K * B).
        bytes_KB: Bytes of text.
        documents: Documents of each category.
        warnings: What was left out.
    """

    categories: tuple[str, ...]
    types: tuple[str, ...]
    counts_WKB: sparse.csr_matrix
    bytes_KB: np.ndarray
    documents: tuple[int, ...]
    warnings: tuple[str, ...]

    def rates(self, times_KB: np.ndarray | None = None) -> np.ndarray:
        """Return occurrences of each word type per million bytes, (W, K).

        Args:
            times_KB: How often each block is taken; None takes each once.
        """
        K, B = self.bytes_KB.shape
        times_KB = np.ones((K, B)) if times_KB is None else times_KB
        spread = sparse.csr_matrix(
            (times_KB.ravel(), (np.arange(K * B), np.repeat(np.arange(K), B))), (K * B, K)
        )
        sizes_K = (self.bytes_KB * times_KB).sum(axis=1)
        return sparse.csr_matrix(self.counts_WKB @ spread).toarray() / sizes_K * 1e6


def read_samples(
    order: MergeOrder, sources: Sequence[Source], most_bytes: int = MOST_BYTES
) -> WordSample:
    """Read samples of text, one of each category, and count their word types.

    Args:
        order: The tokenizer, whose own cut into words is used.
        sources: One for each category.
        most_bytes: Of a category that are read, from its beginning.

    Raises:
        CorpusError: A source cannot be read, has no usable document, or two have one name.
    """
    names = [str(source.domain) for source in sources]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise CorpusError(f"Category {twice[0]!r} is given twice; give each category one sample.")
    locations = [locate(source) for source in sources]
    warnings: list[str] = []
    columns: list[Counter[str]] = []
    bytes_KB = np.zeros((len(sources), BLOCKS))
    numbers = []
    for k, (source, location) in enumerate(zip(sources, locations, strict=True)):
        texts, total = [], 0
        skipped: Counter[str] = Counter()
        for document in documents(source, location):
            if document.skip:
                skipped[document.skip] += 1
                continue
            texts.append(document.text)
            total += len(document.text.encode())
            if total >= most_bytes:
                warnings.append(f"{names[k]}: only the first {total:,} bytes are read")
                break
        left_out = ", ".join(f"{count} ({why})" for why, count in skipped.items())
        if not texts:
            raise CorpusError(
                f"Sample {names[k]!r} ({source.path}) has no usable document; skipped: "
                f"{left_out or 'none, it is empty'}. Give UTF-8 text of the category."
            )
        if skipped:
            warnings.append(f"{names[k]}: documents skipped: {left_out}")
        numbers.append(len(texts))
        with progress(f"words of {names[k]}", total) as advance:
            for b, block in enumerate(_blocks(texts, total)):
                bytes_KB[k, b] = sum(len(text.encode()) for text in block)
                columns.append(word_counts(order, block))
                advance(len(block), int(bytes_KB[k, b]))
    return _counted(order, names, columns, bytes_KB, numbers, warnings)


def _blocks(texts: Sequence[str], total: int) -> Iterator[list[str]]:
    """Yield BLOCKS runs of neighbouring documents of about equal bytes, cutting long documents."""
    longest = max(1, total // BLOCKS)
    pieces = [piece for text in texts for piece in _cut(text, longest)]
    ends = np.cumsum([len(piece.encode()) for piece in pieces])
    block = np.minimum((ends - 1) * BLOCKS // max(total, 1), BLOCKS - 1)
    for b in range(BLOCKS):
        first, last = np.searchsorted(block, [b, b + 1])
        yield pieces[first:last]


def _cut(text: str, longest: int) -> Iterator[str]:
    """Cut a text at ends of lines into pieces of about `longest` characters."""
    start = 0
    while len(text) - start > 2 * longest:
        end = text.find("\n", start + longest) + 1
        if not end:
            break
        yield text[start:end]
        start = end
    yield text[start:]


def _counted(
    order: MergeOrder,
    names: list[str],
    columns: list[Counter[str]],
    bytes_KB: np.ndarray,
    numbers: list[int],
    warnings: list[str],
) -> WordSample:
    number = {word: w for w, word in enumerate(sorted(set().union(*columns)))}
    at = [number[word] for column in columns for word in column]
    counts = [count for column in columns for count in column.values()]
    column_at = np.repeat(np.arange(len(columns)), [len(column) for column in columns])
    shape = (len(number), len(columns))
    counts_WKB = sparse.csr_matrix((np.array(counts, float), (at, column_at)), shape)
    types = np.array(list(number), dtype=object)
    sizes_W = np.array([len(word) for word in types])
    if sizes_W.sum() > MOST_SYMBOLS:
        total_W = np.asarray(counts_WKB.sum(axis=1)).ravel()
        kept = np.argsort(-total_W, kind="stable")
        kept = np.sort(kept[np.cumsum(sizes_W[kept]) <= MOST_SYMBOLS])
        share = (total_W * sizes_W)[kept].sum() / (total_W * sizes_W).sum()
        warnings.append(f"{len(types) - len(kept):,} of {len(types):,} word types, the rarest, are "
                        f"left out ({1 - share:.2%} of the text)")  # fmt: skip
        types, counts_WKB = types[kept], counts_WKB[kept]
    return WordSample(tuple(names), tuple(types), counts_WKB, bytes_KB, tuple(numbers),
                      tuple(warnings))  # fmt: skip

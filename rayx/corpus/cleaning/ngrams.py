"""Stage 1, corpus: text as hashed words and word n-grams, for near-duplicates and contamination.

Words are what is left when case, punctuation, white space and Unicode compatibility forms are
folded; in scripts written without spaces (Han, Kana, Thai, Lao, Burmese, Khmer) each letter is a
word. A hash is the same on every machine and in every process.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from zlib import crc32

import numpy as np

_FOLD = bytes(
    ord(chr(i).lower()) if i < 128 and chr(i).isalnum() else 32 if i < 128 else i
    for i in range(256)
)
_MARKS = re.compile(r"[\W_]+")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
    "\U00020000-\U0003ffff]"
)
_ODD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio
_SPACE = re.compile(r"\s")
SLICE_CHARS = 1_000_000  # a word in a list takes ten times its hash


def word_hashes(text: str) -> np.ndarray:
    """Return a 32-bit hash of each word of the folded text, 1-d uint32."""
    slices, start = [], 0
    while start < len(text):
        cut = _SPACE.search(text, start + SLICE_CHARS)
        end = cut.end() if cut else len(text)
        slices.append(_word_hashes(text[start:end]))
        start = end
    return np.concatenate(slices) if slices else np.zeros(0, np.uint32)


def _word_hashes(text: str) -> np.ndarray:
    if text.isascii():
        words = text.encode().translate(_FOLD).split()
    else:
        folded = unicodedata.normalize("NFKC", text).casefold()
        spaced = _UNSPACED.sub(r" \g<0> ", _MARKS.sub(" ", folded))
        words = spaced.encode("utf-8", "surrogatepass").split()
    return np.fromiter(map(crc32, words), np.uint32, len(words))


def mix(values: np.ndarray) -> np.ndarray:
    """Return uint64 values scattered over 64 bits, one to one."""
    values = values * _ODD
    return (values ^ (values >> np.uint64(32))) * _ODD


def ngram_hashes(documents: Sequence[np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Hash the word n-grams of documents.

    Args:
        documents: Word hashes of each, see `word_hashes`.
        n: Words to an n-gram. A document of 1 to n - 1 words has one, the whole of it, which is
            equal to another's only if all of that is the same.

    Returns:
        All n-grams in order, 1-d uint64, and where each document's begin and the last one's end,
        1-d int64 of len(documents) + 1.
    """
    padded = [np.pad(d, (0, n - len(d))) if 0 < len(d) < n else d for d in documents]
    sizes = np.array([len(d) for d in padded], np.int64)
    counts = np.maximum(sizes - n + 1, 0)
    bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    if not bounds[-1]:
        return np.zeros(0, np.uint64), bounds
    words = mix(np.concatenate(padded).astype(np.uint64) + np.uint64(1))
    hashes = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):
        hashes = mix(hashes + words[i : i + len(hashes)])
    ends = np.cumsum(sizes)
    inside = np.zeros(len(words) + 1, np.int64)  # +1 where a document's n-grams begin, -1 after
    np.add.at(inside, ends - sizes, np.where(counts, 1, 0))
    np.add.at(inside, ends - sizes + counts, np.where(counts, -1, 0))
    return hashes[np.cumsum(inside)[: len(hashes)] > 0], bounds

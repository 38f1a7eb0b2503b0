"""Near-duplicates: what is found is as similar as asked, and what is that similar is found."""

import random
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.corpus.cleaning.near_duplicates import (
    FOUND,
    PERMUTATIONS,
    NearDuplicates,
    num_bands,
    similarity,
)
from rayx.corpus.cleaning.ngrams import word_hashes
from rayx.errors import CorpusError

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "rk", "st")]


def oracle(first: str, second: str) -> float:
    bags = []
    for text in (first, second):
        words = re.findall(r"[a-z0-9]+", text.lower())
        bags.append(Counter(zip(words, words[1:], strict=False)))
    return (bags[0] & bags[1]).total() / max((bags[0] | bags[1]).total(), 1)


def find(texts: list[str], threshold: float, batch: int = 64) -> np.ndarray:
    with (
        tempfile.TemporaryDirectory() as folder,
        NearDuplicates(threshold, Path(folder) / "bigrams") as index,
    ):
        return np.concatenate([index.add(texts[i : i + batch])
                               for i in range(0, len(texts), batch)])  # fmt: skip


def changed(text: str, share: float, rng: random.Random) -> str:
    words = text.split()
    for i in rng.sample(range(len(words)), max(1, round(share * len(words)))):
        words[i] = rng.choice(WORDS) + "x"
    return " ".join(words)


def drawn(rng: random.Random, count: int) -> list[str]:
    return [" ".join(rng.choices(WORDS, k=rng.choice((35, 80, 300, 2000)))) for _ in range(count)]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([0.5, 0.7, 0.9, 1.0]))
def test_what_goes_resembles_something_that_stays(seed: int, threshold: float) -> None:
    rng = random.Random(seed)
    phrases = [" ".join(rng.choices(WORDS, k=6)) for _ in range(8)]
    texts = [". ".join(rng.choices(phrases, k=rng.randint(1, 6))) for _ in range(30)]
    found = find(texts, threshold)
    for i in np.flatnonzero(found >= 0):
        assert found[i] < i and found[found[i]] == -1, "an earlier one, and it stays"
        assert oracle(texts[i], texts[found[i]]) >= threshold
        assert similarity(texts[i], texts[found[i]]) == oracle(texts[i], texts[found[i]])
    half = find(texts[:15], threshold, batch=4)
    assert half.tolist() == found[:15].tolist(), "later documents and batches change nothing"


def test_copies_are_found_and_strangers_are_not() -> None:
    rng = random.Random(3)
    texts = drawn(rng, 200)
    for kind in (lambda t: t, str.upper, lambda t: changed(t, 0.05, rng)):
        found = find(texts + [kind(t) for t in texts], 0.7)
        assert (found[:200] == -1).all()
        assert (found[200:] == np.arange(200)).mean() >= 0.95


def test_bands_find_pairs_at_the_threshold() -> None:
    for threshold in (0.3, 0.5, 0.7, 0.8, 0.95, 1.0):
        bands = num_bands(threshold)
        assert PERMUTATIONS % bands == 0
        assert 1 - (1 - threshold ** (PERMUTATIONS / bands)) ** bands >= FOUND


def test_case_marks_and_unicode_forms_are_folded() -> None:
    texts = ["The Cafe\u0301's \uff21BC, and so on!", "the caf\u00e9 s abc AND\tso_on"]
    assert find(texts, 1.0).tolist() == [-1, 0]
    assert (
        word_hashes("\u4e2d\u6587 \u5b57x").tolist()
        == word_hashes("\u4e2d \u6587\u5b57 x").tolist()
    )


def test_a_repeated_phrase_is_no_copy_of_one_phrase() -> None:
    assert find(["ab cd " * 50, "ab cd ab cd ab", "ab cd " * 49], 0.7).tolist() == [-1, -1, 0]


def test_documents_that_are_all_equal_leave_one() -> None:
    assert find(["one and the same text"] * 300, 0.7).tolist() == [-1] + [0] * 299


def test_documents_too_short_to_tell_stay_and_are_counted(tmp_path: Path) -> None:
    with NearDuplicates(0.5, tmp_path / "bigrams") as index:
        found = index.add(["", "!?", "word", "word", "two words", "two words"])
        assert found.tolist() == [-1, -1, -1, -1, -1, 4]
        assert index.too_short == 4


def test_one_word_of_5_megabytes_stays(tmp_path: Path) -> None:
    with NearDuplicates(0.7, tmp_path / "bigrams") as index:
        assert index.add(["x" * 5_000_000, "y " * 100_000]).tolist() == [-1, -1]
        assert index.too_short == 1


@pytest.mark.parametrize("threshold", [0, -0.1, 1.01, float("nan"), True, "0.7"])
def test_a_threshold_outside_0_1_is_refused(threshold: Any, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"near_duplicates is .*\(0, 1\].*0\.7"):
        NearDuplicates(threshold, tmp_path / "bigrams")

"""Contamination: counts equal those of a search through all pairs."""

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.corpus.cleaning import contamination
from rayx.corpus.cleaning.contamination import BOILERPLATE, Contamination
from rayx.errors import CorpusError

SENTENCE = "The quick brown fox, it is said, jumps over the lazy dog on every second Sunday."


def grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return [tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, min(len(words), 1)))]


def look(heldout: list[str], train: list[str], n: int) -> tuple[list[int], dict[str, int]]:
    index = Contamination(n)
    for text in heldout:
        index.add_heldout([text])
    for start in range(0, len(train), 7):
        index.find(train[start : start + 7])
    return index.train_documents().tolist(), index.heldout_counts(heldout)


def oracle(heldout: list[str], train: list[str], n: int) -> tuple[list[int], dict[str, int]]:
    out = [grams(t, n) for t in heldout]
    known = {g for gs in out for g in gs}
    # a document shorter than n is one n-gram of its own length, so lengths keep them apart
    held = [set(grams(t, n)) & known for t in train]
    holders = Counter(g for gs in held for g in gs)
    shared = {g for g, count in holders.items() if count <= BOILERPLATE}
    return [i for i, gs in enumerate(held) if gs & shared], {
        "documents": sum(any(g in shared for g in gs) for gs in out),
        "ngrams": sum(len(gs) for gs in out),
        "shared": sum(g in shared for gs in out for g in gs),
        "boilerplate": sum(g in holders and g not in shared for gs in out for g in gs),
    }


texts = st.lists(st.lists(st.sampled_from("a B c. dd".split()), max_size=12).map(" ".join),
                 max_size=40)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(heldout=texts, train=texts, n=st.integers(3, 6))
def test_counts_equal_a_search_through_all_pairs(
    heldout: list[str], train: list[str], n: int
) -> None:
    assert look(heldout, train, n) == oracle(heldout, train, n)


def test_shared_words_are_found_in_another_case_and_punctuation() -> None:
    train = ["Nothing here.", f"Before. {SENTENCE.upper().replace(',', ' --')} After."]
    concerned, counts = look([SENTENCE, "Something else " * 20], train, 13)
    assert concerned == [1] and counts["documents"] == 1 and counts["shared"] == 4


def test_12_words_in_common_are_not_13() -> None:
    words = SENTENCE.split()
    assert look([SENTENCE], [" ".join(words[:12]) + " and more of other words"], 13)[0] == []
    assert look([SENTENCE], [" ".join(words[:13]) + " and more of other words"], 13)[0] == [0]


def test_a_document_shorter_than_an_ngram_counts_as_a_whole() -> None:
    heldout = ["What is two plus two?", "Yes."]
    train = ["what is TWO plus two", "So what is two plus two? Four.", "yes", "no", "", "?!"]
    concerned, counts = look(heldout, train, 13)
    assert concerned == [0, 2] and counts["documents"] == 2 and counts["ngrams"] == 2


def test_boilerplate_marks_no_train_document_and_is_counted() -> None:
    train = [f"{SENTENCE} number {i}" for i in range(BOILERPLATE + 1)]
    concerned, counts = look([SENTENCE], train, 13)
    assert concerned == [] and counts["shared"] == 0 and counts["boilerplate"] == 4
    concerned, counts = look([SENTENCE], train[:-1], 13)
    assert concerned == list(range(BOILERPLATE)) and counts["shared"] == 4


def test_a_long_document_is_looked_at_in_slices(monkeypatch: Any) -> None:
    whole = " ".join(f"w{i}" for i in range(200))
    heldout, train = [whole, "short one", whole[600:]], ["x", whole[300:900], "short one", whole]
    before = look(heldout, train, 13)
    monkeypatch.setattr(contamination, "SLICE_WORDS", 17)
    assert look(heldout, train, 13) == before == oracle(heldout, train, 13)


def test_one_word_of_5_megabytes_is_one_document() -> None:
    word = "x" * 5_000_000
    assert look([word], [word, word + "y"], 13) == (
        [0], {"documents": 1, "ngrams": 1, "shared": 1, "boilerplate": 0})  # fmt: skip


@pytest.mark.parametrize("words", [2, 0, -13, 101, True, 13.0])
def test_ngrams_that_tell_nothing_are_refused(words: Any) -> None:
    with pytest.raises(CorpusError, match=r"contamination_words is .*\[3, 100\].*13 is usual"):
        Contamination(words)

"""The page of a corpus: what it says, with and without clusters, and that it is self-contained."""

import copy
import re

import pytest

from rayx.cli.main import command_tree
from rayx.corpus.clusters.cluster import CLUSTERS
from rayx.report.corpus_page import _apart, corpus_page

ENTRY = {"terms": ["shall", "party"], "documents": 200, "bytes": 150_000, "similarity": 0.91,
         "quality": None, "initial": [0, 2],
         "examples": [{"text": "<script>alert(1)</script> shall", "similarity": 0.99}]}  # fmt: skip
FACTS = {
    "settings": {"clusters": None, "merge_distance": None, "prune": ["grade", 3.0],
                 "embedder": "tfidf", "seed": 4},
    "documents": 620, "skipped": {"empty": 3}, "sampled": 300, "unknown": 7, "initial": 11,
    "empty": 2, "joined": 5,
    "clusters": [{**ENTRY, "name": "shall-party"},
                 {**ENTRY, "name": "def-$return", "bytes": 50_000, "quality": 3.25}],
    "pruned": [{**ENTRY, "terms": ["buy", "now"], "quality": 1.5}],
    "map": {"method": "t-SNE", "x": [0.0, 0.5, 1.0], "y": [1.0, 0.2, 0.0], "cluster": [0, 1, 1]},
}  # fmt: skip


@pytest.fixture(scope="module")
def page(tiny_corpus) -> str:
    return corpus_page(tiny_corpus, copy.deepcopy(FACTS))


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_corpus_without_clusters_shows_its_domains(tiny_corpus):
    page = corpus_page(tiny_corpus)
    text = words_of(page)
    for name, tokens in tiny_corpus.tokens.items():
        assert re.search(rf"{name} [\d,]+ {tokens:,} ", text)
    assert "was not clustered" in text and "<svg" not in page
    assert tiny_corpus.fingerprint in text


def test_clusters_are_named_with_sizes_terms_and_examples(page):
    text = words_of(page)
    assert "2 clusters of 620 documents" in text
    assert "shall-party holds 75% of the text" in text
    assert re.search(r"def-\$return 200 0\.05 0\.91 3\.25 shall, party", text)
    assert page.count("<svg") == 2 and "t-SNE" in text


def test_what_was_left_out_is_counted(page):
    text = words_of(page)
    for said in ("initial clusters 11", "of these empty 2", "of these pruned 1",
                 "joined to their nearest 5", "the embedder knows nothing 7", "3 empty",
                 "Left out: mean grade below 3", "buy, now 200 0.15 1.50"):  # fmt: skip
        assert said in text


def test_page_is_self_contained_and_escapes_documents(page):
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    links = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert all(link.startswith("#") for link in links)
    assert "url(http" not in page


def test_same_corpus_gives_the_same_bytes(page, tiny_corpus):
    assert corpus_page(tiny_corpus, copy.deepcopy(FACTS)) == page


def test_too_few_documents_for_a_map(tiny_corpus):
    few = {**FACTS, "map": {"method": "none", "x": [0.0], "y": [0.0], "cluster": [0]}}
    assert "too few documents for a map" in corpus_page(tiny_corpus, few)


def test_names_on_the_map_do_not_lie_on_each_other():
    placed = _apart([[0.5, 0.5, "one-name"], [0.5, 0.5, "other"], [0.51, 0.52, "third"],
                     [0.0, 0.5, "far-away"]])  # fmt: skip
    heights = sorted(y for _, y, name in placed if name != "far-away")
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 0.04 - 1e-9
    assert all(0 < x < 1 for x, _, _ in placed)


def test_command_writes_the_page(tiny_corpus, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    out = tmp_path / "page.html"
    done = CliRunner().invoke(
        command_tree(), ["corpus", "show", tiny_corpus.url, "--page", str(out)]
    )
    assert done.exit_code == 0, done.output
    assert out.read_text().startswith("<!DOCTYPE html>") and CLUSTERS not in done.output

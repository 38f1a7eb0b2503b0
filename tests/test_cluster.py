"""Clusters: planted domains are found, named, counted; the same text gives the same clusters."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.cli.clustering import cluster as cluster_command
from rayx.corpus import Corpus, Source
from rayx.corpus.clusters import cluster
from rayx.corpus.clusters import parts as cluster_parts
from rayx.corpus.clusters.centroids import assign, distance_labels, join_small, unit, ward_labels
from rayx.corpus.clusters.cluster import Clustering, cluster_corpus, cluster_text, read_clusters
from rayx.corpus.clusters.names import names_of, telling_terms
from rayx.corpus.source import check_domain_name
from rayx.errors import CorpusError, SpecError
from tests.conftest import WORDS, sentences
from tests.s3_server import CREDENTIALS, S3Server

QUALITY = {"code": 4.0, "law": 2.0, "news": 3.5}


def write(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def rows_of(domain: str, count: int = 30) -> list[dict[str, Any]]:
    return [
        {"text": text, "quality": QUALITY[domain], "licence": "mit" if n % 2 else "by",
         "book": f"{domain}{n // 2}", "key": f"{domain}-{n}"}
        for n, text in enumerate(sentences(domain, count, 1))
    ]  # fmt: skip


def sources(folder: Path, **options: Any) -> list[Source]:
    return [Source(path=write(folder / f"{domain}.jsonl", rows_of(domain)), domain=domain,
                   **options) for domain in WORDS]  # fmt: skip


def labelled(folder: Path) -> dict[str, dict[str, Any]]:
    """Return text -> row of the labelled text."""
    parts = sorted(folder.glob("*.parquet"))
    return {row["text"]: row for part in parts for row in pq.read_table(part).to_pylist()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clusters")


@pytest.fixture(scope="module")
def corpus(folder) -> Corpus:
    exam = write(folder / "exam.jsonl", [{"text": t} for t in sentences("news", 5, 2)])
    odd = [{"text": " "}, {"text": None}, {"text": "zyx wvu"}]
    given = sources(folder, label_columns=("licence",), group_column="book", id_column="key")
    given.append(Source(path=write(folder / "odd.jsonl", odd), domain="odd"))
    return cluster_corpus(
        given, folder / "corpus", Clustering(clusters=3, seed=1), tokenizer=300, heldout_share=0.2,
        min_heldout_tokens=50, evaluation=[Source(path=exam, domain="exam", evaluation_only=True)],
    )  # fmt: skip


def test_planted_domains_are_found_and_named_by_their_words(corpus, folder):
    rows = labelled(folder / "corpus-text").values()
    pairs = Counter((row["source"], row["cluster"]) for row in rows)
    found = {source: name for source, name in pairs if source != "odd"}
    assert len(set(found.values())) == 3 and len(pairs) == 4
    assert set(corpus.domains) == set(found.values())
    for entry in read_clusters(corpus)["clusters"]:
        (source,) = (s for s, name in found.items() if name == entry["name"])
        words = {word.lower() for word in WORDS[source]}
        assert set(entry["terms"]) <= words and set(entry["name"].split("-")) <= words
        assert entry["documents"] == 30
        texts = [text for text, row in labelled(folder / "corpus-text").items()
                 if row["source"] == source]  # fmt: skip
        assert all(any(t.startswith(x["text"]) for t in texts) for x in entry["examples"])


def test_what_is_in_no_cluster_is_counted_and_shown(corpus):
    found = read_clusters(corpus)
    assert found["skipped"] == {"empty": 1, "null text": 1}
    assert found["unknown"] == 1
    assert corpus.manifest["skipped_without_domain"] == {"null cluster": 1}
    assert found["documents"] == 91 and sum(e["documents"] for e in found["clusters"]) == 90


def test_other_columns_stay_with_their_documents(corpus, folder):
    rows = [r for r in labelled(folder / "corpus-text").values() if r["source"] == "law"]
    assert {r["licence"] for r in rows} == {"mit", "by"}
    assert len({r["group"] for r in rows}) == 15 and len({r["id"] for r in rows}) == 30
    assert all(0.5 < r["similarity"] <= 1.0001 for r in rows)
    for shares in corpus.label_shares("licence").values():
        assert shares["mit"] == pytest.approx(0.5, abs=0.15)
    by_source = corpus.label_shares("source").values()
    assert {max(shares, key=lambda v: shares[v]) for shares in by_source} == set(WORDS)


def test_evaluation_sources_pass_through(corpus):
    assert corpus.targets[-1] == "exam" and "exam" not in corpus.domains


def test_map_has_a_place_for_each_sampled_document(corpus):
    places = read_clusters(corpus)["map"]
    assert len(places["x"]) == len(places["y"]) == len(places["cluster"]) == 90
    assert min(places["x"]) == 0 and max(places["x"]) == 1
    middles = [np.mean([[x, y] for x, y, c in zip(*(places[k] for k in ("x", "y", "cluster")),
                                                  strict=True) if c == k], axis=0)
               for k in range(3)]  # fmt: skip
    assert min(np.linalg.norm(a - b) for a in middles for b in middles if a is not b) > 0.2


def test_text_clustered_from_other_sources_is_not_overwritten(corpus, folder):
    before = labelled(folder / "corpus-text")
    with pytest.raises(CorpusError, match="clustered from other sources or in another way"):
        cluster_text(sources(folder), folder / "corpus-text", Clustering(clusters=3, seed=1))
    assert labelled(folder / "corpus-text") == before


def test_corpus_on_an_object_store_has_its_clusters_there(tmp_path, monkeypatch):
    for name, value in {**CREDENTIALS, "RAYX_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    with S3Server(tmp_path / "s3") as server:
        url = server.url("clusters")
        options: dict[str, Any] = {"tokenizer": 300, "heldout_share": 0.2, "min_heldout_tokens": 50}
        given, how = sources(tmp_path), Clustering(clusters=3)
        built = cluster_corpus(given, url, how, **options)
        found = read_clusters(Corpus.load(url))
        assert found and {c["name"] for c in found["clusters"]} == set(built.domains)
        again = cluster_corpus(given, url, how, **options)  # what is there is not made again
        assert again.fingerprint == built.fingerprint


def test_same_text_and_seed_give_the_same_clusters_in_any_order(tmp_path):
    given = sources(tmp_path)
    how = Clustering(seed=5)  # as many as separate best
    facts = cluster_text(given, tmp_path / "a", how)
    assert cluster_text(given, tmp_path / "a", how) == facts  # as it is
    other = cluster_text(given[::-1], tmp_path / "b", how)
    assert other == facts and len(facts["clusters"]) == 3
    assert labelled(tmp_path / "a") == labelled(tmp_path / "b")


def test_interrupted_clustering_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster_parts, "PART_BYTES", 10_000)
    given, how = sources(tmp_path), Clustering(clusters=3)
    cluster_text(given, tmp_path / "whole", how)
    one, calls = cluster_parts._Assigner.one, []

    def dies(self, path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return one(self, path)

    monkeypatch.setattr(cluster_parts._Assigner, "one", dies)
    with pytest.raises(KeyboardInterrupt):
        cluster_text(given, tmp_path / "cut", how)
    monkeypatch.setattr(cluster_parts, "documents", None)  # nothing is read again
    cluster_text(given, tmp_path / "cut", how)
    assert Counter(calls).most_common(1) == [(calls[1], 2)]
    assert labelled(tmp_path / "cut") == labelled(tmp_path / "whole")
    assert not (tmp_path / "cut" / cluster.STATE).exists()


@pytest.mark.slow
@pytest.mark.ray
def test_clusters_on_ray_are_those_of_one_process(tmp_path, monkeypatch, ray_cluster):
    monkeypatch.setattr(cluster_parts, "PART_BYTES", 10_000)
    given, how = sources(tmp_path), Clustering(clusters=3)
    here = cluster_text(given, tmp_path / "here", how, parallel=False)
    assert cluster_text(given, tmp_path / "ray", how, parallel=True) == here
    assert labelled(tmp_path / "ray") == labelled(tmp_path / "here")


def test_clusters_of_low_quality_are_left_out_and_counted(tmp_path):
    given = sources(tmp_path)
    how = Clustering(clusters=2, init_clusters=6, prune=("quality", 3.0))
    facts = cluster_text(given, tmp_path / "out", how)
    assert facts["pruned"] and all(e["quality"] == 2.0 for e in facts["pruned"])
    assert sum(e["documents"] for e in facts["pruned"]) == 30
    assert {r["source"] for r in labelled(tmp_path / "out").values()} == {"code", "news"}
    assert {e["quality"] for e in facts["clusters"]} == {4.0, 3.5}
    assert facts["columns"]["label_columns"] == ["source"]  # numbers are no labels


def test_clusters_merge_up_to_a_distance(tmp_path):
    how = Clustering(init_clusters=9, merge_distance=1.0)
    facts = cluster_text(sources(tmp_path), tmp_path / "out", how)
    assert facts["initial"] == 9 and len(facts["clusters"]) == 3


def test_sample_is_bounded_and_every_document_is_assigned(tmp_path):
    how = Clustering(clusters=3, sample_documents=40)
    facts = cluster_text(sources(tmp_path), tmp_path / "out", how)
    assert facts["sampled"] == 40 and sum(e["documents"] for e in facts["clusters"]) == 90
    assert len(facts["map"]["x"]) == 40


# The steps by themselves ----------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_merging_down_to_a_number_gives_that_number(seed, count, wanted):
    rng = np.random.default_rng(seed)
    labels = ward_labels(unit(rng.normal(size=(count, 4))), rng.integers(1, 90, count), wanted)
    assert set(labels) == set(range(min(wanted, count)))


def test_merging_weighs_centroids_by_their_documents():
    points = unit(np.array([[1, 0.0], [1, 0.5], [1, 1.1]]))
    assert len(set(ward_labels(points, np.array([900, 900, 1]), 2)[1:])) == 1
    assert len(set(ward_labels(points, np.array([1, 900, 900]), 2)[:2])) == 1


def test_distance_is_between_directions_from_the_mean_of_all_text():
    points = unit(np.array([[9, 1, 0, 0], [9, 1.1, 0, 0], [9, 0, 1, 0], [9, 0, 0, 1.0]]))
    documents = np.array([1, 1, 2, 2])  # the mean is along the first axis
    assert len(set(distance_labels(points, documents, 0.01))) == 4
    labels = distance_labels(points, documents, 1.6)
    assert labels[0] == labels[1] and len(set(labels)) == 3
    assert len(set(distance_labels(points, documents, 1.8))) == 1  # 120 degrees: sqrt(3)


def test_nearest_is_the_first_of_equals_and_zero_is_none():
    nearest, cosines = assign(np.array([[1, 0], [0, 0]], np.float32), np.eye(2, dtype=np.float32))
    assert nearest.tolist() == [0, -1] and cosines.tolist() == [1, 0]
    twins = np.array([[1, 0], [1, 0]], np.float32)
    assert assign(twins, twins)[0].tolist() == [0, 0]


def test_cluster_too_small_joins_its_nearest():
    points = unit(np.array([[1, 0.0], [1, 0.1], [0, 1.0], [0.1, 1]]))
    assert join_small(points, [90, 5, 80, 90], [9, 9, 9, 9], 8) == {1: 0}
    assert join_small(points, [90, 5, 80, 90], [9, 1, 9, 1], 8) == {1: 0, 3: 2}
    assert join_small(points, [1, 1, 1, 1], [1, 1, 1, 1], 8).keys() == {0, 1, 2}


def test_terms_tell_a_cluster_from_the_others():
    texts = ["shared apple pear", "shared apple", "shared stone brick", "shared stone"]
    terms = telling_terms(texts, np.array([0, 0, 1, 1]), 2)
    assert [t[0] for t in terms] == ["apple", "stone"]
    assert telling_terms(["1 2", "3"], np.array([0, 1]), 2) == [[], []]


@given(st.lists(st.lists(st.text("abcdefgh", min_size=3, max_size=8), max_size=4), max_size=6))
@settings(max_examples=50, deadline=None)
def test_names_are_unique_and_can_be_folders(terms):
    names = names_of(terms, taken=["abc", "cluster-0"])
    assert len({n.casefold() for n in names} | {"abc", "cluster-0"}) == len(terms) + 2
    assert all(check_domain_name(name) == name and "." not in name for name in names)


# Bad inputs -----------------------------------------------------------------------------------


def more_clusters_than_documents(folder):
    cluster_text(sources(folder), folder / "out", Clustering(clusters=91))


def one_cluster(folder):
    Clustering(clusters=1)


def fewer_initial_clusters(folder):
    Clustering(clusters=8, init_clusters=4)


def two_ends_of_merging(folder):
    Clustering(clusters=8, merge_distance=1.0)


def distance_of_zero(folder):
    Clustering(merge_distance=0.0)


def no_sources(folder):
    cluster_text([], folder / "out", Clustering())


def source_without_rows(folder):
    path = write(folder / "a.jsonl", [])
    (folder / "a.jsonl").write_text("\n")
    cluster_text([Source(path=path, domain="a")], folder / "out", Clustering())


def no_document_left(folder):
    path = write(folder / "a.jsonl", [{"text": " "}, {"text": 3}])
    cluster_text([Source(path=path, domain="a")], folder / "out", Clustering())


def equal_documents(folder):
    path = write(folder / "a.jsonl", [{"text": "all the same"}] * 50)
    cluster_text([Source(path=path, domain="a")], folder / "out", Clustering(clusters=2))


def nothing_after_pruning(folder):
    how = Clustering(clusters=2, prune=("quality", 9.0))
    cluster_text(sources(folder), folder / "out", how)


def one_cluster_after_pruning(folder):
    how = Clustering(clusters=3, init_clusters=3, prune=("quality", 3.8))
    cluster_text(sources(folder), folder / "out", how)


def no_quality_column(folder):
    cluster_text(sources(folder), folder / "out", Clustering(prune=("qualty", 3.0)))


def quality_in_words(folder):
    cluster_text(sources(folder), folder / "out", Clustering(prune=("licence", 3.0)))


def quality_of_nobody(folder):
    path = write(folder / "a.jsonl", [r | {"quality": None} for r in rows_of("law")])
    how = Clustering(clusters=2, prune=("quality", 3.0))
    cluster_text([Source(path=path, domain="a")], folder / "out", how)


def label_that_we_write(folder):
    rows = [r | {"cluster": 1} for r in rows_of("law")]
    path = write(folder / "a.jsonl", rows)
    given = Source(path=path, domain="a", label_columns=("cluster",))
    cluster_text([given], folder / "out", Clustering())


def text_folder_in_use(folder):
    (folder / "out").mkdir()
    (folder / "out" / "notes.txt").write_text("mine")
    cluster_text(sources(folder), folder / "out", Clustering())


def too_little_held_out_text(folder):
    cluster_corpus(sources(folder), folder / "out", Clustering(clusters=3), tokenizer=300)


def rule_that_is_none(folder):
    cluster_command(str(folder / "out"), ["a.jsonl"], prune="quality>3")


def threshold_that_is_none(folder):
    cluster_command(str(folder / "out"), ["a.jsonl"], prune="quality<high")


def evaluation_without_name(folder):
    cluster_command(str(folder / "out"), ["a.jsonl"], evaluation=["exam.jsonl"])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (more_clusters_than_documents, "91 clusters are asked for, but the sample has 90"),
        (one_cluster, "clusters is 1, expected at least 2"),
        (fewer_initial_clusters, "init_clusters is 4, expected at least clusters .8."),
        (two_ends_of_merging, "both say when merging ends"),
        (distance_of_zero, "merge_distance is 0.0, expected a number > 0"),
        (no_sources, "There are no sources"),
        (source_without_rows, "is empty: it has no rows"),
        (no_document_left, "no document to cluster .skipped: 1 empty, 1 text is not a string"),
        (equal_documents, "the sample has 1 documents that differ"),
        (nothing_after_pruning, "leaves nothing: the best of .* has a mean of 4"),
        (one_cluster_after_pruning, "Only one cluster is left"),
        (no_quality_column, "no column 'qualty'.*Did you mean 'quality'"),
        (quality_in_words, "column 'licence' has 'by'; expected a number"),
        (quality_of_nobody, "'quality' has no number in any document"),
        (label_that_we_write, "'cluster' would overwrite"),
        (text_folder_in_use, "holds something else .notes.txt."),
        (too_little_held_out_text, "each needs 5,120 bytes of train and of held-out text"),
        (rule_that_is_none, "'quality>3' is not column<number"),
        (threshold_that_is_none, "--prune has 'high'"),
        (evaluation_without_name, "'exam.jsonl' is not name=path"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_input_is_refused_with_the_reason(wrong, message, tmp_path):
    with pytest.raises((CorpusError, SpecError), match=message):
        wrong(tmp_path)


def test_damaged_facts_are_named(tiny_corpus, monkeypatch):
    assert read_clusters(tiny_corpus) is None
    monkeypatch.setattr(cluster, "read_sidecar", lambda url, name: {})
    with pytest.raises(CorpusError, match="clusters.json of corpus .* is damaged"):
        read_clusters(tiny_corpus)

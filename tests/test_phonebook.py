"""The phonebook experiment: its text, its budgets, and what it concludes from planted losses."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections import Counter
from pathlib import Path

import pytest

import rayx
from rayx.errors import SpecError
from rayx.experiment import load_experiment
from rayx.record import CurvePoint, Loss
from tests.samples import record

book = load_experiment(Path(__file__).parents[1] / "experiments" / "phonebook.py")


@pytest.fixture(scope="module")
def parameters(tmp_path_factory):
    place = tmp_path_factory.mktemp("phonebook") / "book"
    return book.Parameters(corpus=str(place), facts=64, budget_tokens=52_000, seeds=2, seed=5)


@pytest.fixture(scope="module")
def corpus(parameters):
    return book.corpus(parameters)


def documents(corpus, tokens) -> list[tuple[str, ...]]:
    """The facts of each document of a shard."""
    tokenizer = corpus.tokenizer()
    assert len(tokens) % book.CONTEXT == 0
    found = []
    for start in range(0, len(tokens), book.CONTEXT):
        *words, end = (tokenizer.id_to_token(int(t)) for t in tokens[start : start + book.CONTEXT])
        assert end == "<|endoftext|>"
        found.append(tuple(" ".join(words[i : i + 4]) for i in range(0, len(words), 4)))
    return found


def facts(corpus, domain: str) -> set[str]:
    return {fact for document in documents(corpus, corpus.train(domain)) for fact in document}


def test_held_out_documents_are_new_and_their_facts_are_not(corpus):
    for domain in corpus.domains:
        train = documents(corpus, corpus.train(domain))
        heldout = documents(corpus, corpus.heldout(domain))
        assert not set(train) & set(heldout)
        assert {fact for document in heldout for fact in document} <= facts(corpus, domain)
        counts = Counter(fact for document in train + heldout for fact in document)
        assert set(counts.values()) == {book.PASSES}


def test_names_are_unique_over_the_whole_phonebook(corpus, parameters):
    everything = [fact for domain in corpus.domains for fact in facts(corpus, domain)]
    names = {" ".join(fact.split()[:2]) for fact in everything}
    assert len(names) == len(everything) == 2 * parameters.facts


@pytest.mark.parametrize("overlap", book.OVERLAPS)
def test_overlap_is_the_share_of_facts_that_both_clusters_hold(corpus, parameters, overlap):
    first, second = (
        {fact for domain in cluster for fact in facts(corpus, domain)}
        for cluster in book.clusters(overlap)
    )
    assert len(first) == len(second) == parameters.facts
    assert len(first & second) == overlap * parameters.facts
    trunk = book.both(overlap)
    for cluster in (first, second):
        weight = sum(trunk[d] for d in trunk if facts(corpus, d) <= cluster)
        assert weight == pytest.approx((1 + overlap) / 2)


@pytest.mark.parametrize("split", book.SPLITS)
def test_trunk_and_experts_spend_the_budget(corpus, parameters, split):
    first, second = book.experts(parameters, corpus, 0.0, split, 0)
    own = [run.domain_tokens for run in (first, second)]
    for run, tokens in zip((first, second), own, strict=True):
        before = split * parameters.budget_tokens
        total = before + (parameters.budget_tokens - before) / 2
        assert sum(tokens.values()) == pytest.approx(total, abs=run.batch_tokens)
    # what a cluster's expert reads of the other cluster, it reads in the trunk
    other = sum(own[0].get(d, 0) for d in book.pieces("b"))
    assert other == pytest.approx(split * parameters.budget_tokens / 2, abs=first.batch_tokens)


def test_clusters_that_are_equal_share_their_expert(corpus, parameters):
    first, second = book.experts(parameters, corpus, 1.0, 0.5, 0)
    assert first.run_id == second.run_id


def planted_nats(run) -> dict[str, float]:
    """Nats a token: a piece is known the better the more it was read, other pieces crowd it out."""
    read = run.domain_tokens
    total = sum(read.values())
    return {
        d: 3.0 - 2e-5 * read.get(d, 0) + 1.0 * (total - read.get(d, 0)) / total
        for d in book.pieces("a") + book.pieces("b")
    }


def planted(run):
    losses = {d: Loss(n, n, 0.01) for d, n in planted_nats(run).items()}
    return dataclasses.replace(record(run), curve=(CurvePoint(run.steps, run.tokens, losses),))


def test_analysis_finds_the_best_split_of_planted_losses(corpus, parameters, tmp_path, caplog):
    store = rayx.open(tmp_path / "store", create=True)
    for run in book.specs(parameters, corpus):
        store.put(planted(run))
    with caplog.at_level(logging.INFO):
        assert book.analyse(parameters, corpus, store, lambda specs: None) is None
    written = json.loads(store.read_bytes("reports/phonebook.json"))
    assert store.read_bytes("reports/phonebook.png")[:4] == b"\x89PNG"
    assert "bits a fact" in caplog.text
    by_overlap = {found["overlap"]: found for found in written["summary"]}
    assert by_overlap[0.0]["best_split"] == 0.0
    assert by_overlap[1.0]["best_split"] == 1.0
    for overlap, found in by_overlap.items():
        # once more, by hand
        for split, value in found["bits"].items():
            runs = book.experts(parameters, corpus, overlap, float(split), parameters.seed)
            nats = [
                sum(w * planted_nats(run)[d] for d, w in cluster.items())
                for run, cluster in zip(runs, book.clusters(overlap), strict=True)
            ]
            assert value == pytest.approx(sum(nats) / 2 * 65 / 16 / math.log(2))
        assert found["best_split_by_seed"] == [found["best_split"]] * 2
        gain = found["bits"]["1.0"] - found["bits"][str(found["best_split"])]
        assert found["gain_over_no_split_bits"] == pytest.approx([gain] * 2)
        assert found["seed_sd_bits"] == pytest.approx(0.0)


def test_facts_that_do_not_fill_the_documents_are_refused():
    with pytest.raises(SpecError, match="facts is 100; expected a multiple of 32"):
        book.Parameters(facts=100)

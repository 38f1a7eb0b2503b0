"""Labels, crossings, scores and ids of documents, and what mixtures can ask of them."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rayx
from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.caps import supply_caps
from rayx.choose import choose
from rayx.corpus import Source, build_corpus, describe
from rayx.errors import CorpusError, SpecError
from rayx.fit import Table, fit_table
from rayx.methods.regmix import RegMix
from rayx.plan import Plan
from rayx.proxy.batches import Batches
from rayx.proxy.train import train_pack
from rayx.selection import parse_selection
from rayx.steering import Steering
from rayx.synthetic import World


def write(folder: Path, rows: list[dict], name: str = "a.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def build(folder: Path, *sources: Source) -> Corpus:
    return build_corpus(
        sources, folder / "out", tokenizer=300, heldout_share=0.2, min_heldout_tokens=1
    )


def rows(count: int) -> list[dict]:
    return [
        {
            "text": f"document {n} of the topic {'wiki' if n % 2 else 'code'} " * 4,
            "topic": "wiki" if n % 2 else "code",
            "quality": "high" if n % 3 == 0 else "low",
            "licence": ["mit", "gpl-3.0", None][n % 3],
            "score": None if n % 10 == 9 else (n * 37 % 101) / 101,
            "name": str(n),
        }
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def scored(tmp_path_factory) -> Corpus:
    folder = tmp_path_factory.mktemp("scored")
    source = Source(
        path=write(folder, rows(300)), domain_column="topic", label_columns=("licence",),
        score_column="score", id_column="name",
    )  # fmt: skip
    return build(folder, source)


def texts(corpus: Corpus, tokens: np.ndarray) -> list[str]:
    ends = np.flatnonzero(tokens == corpus.eos_id)
    return [corpus.tokenizer().decode(p.tolist()) for p in np.split(tokens, ends + 1) if len(p)]


def number(text: str) -> int:
    return int(text.replace("<|endoftext|>", "").split()[1])


def test_domains_are_crossings_of_columns_and_labels_are_counted_by_bytes(tmp_path: Path) -> None:
    given = rows(300)
    source = Source(path=write(tmp_path, given), domain_column=("topic", "quality"),
                    label_columns=("licence",))  # fmt: skip
    corpus = build(tmp_path, source)
    assert set(corpus.domains) == {"code.high", "code.low", "wiki.high", "wiki.low"}
    assert corpus.axes == ("topic", "quality", "licence")
    shares = corpus.label_shares("licence")
    # by construction n % 3 == 0 is both high and mit
    assert shares["wiki.high"] == {"mit": 1.0} and set(shares["wiki.low"]) == {"gpl-3.0", "unknown"}
    assert corpus.label_shares("topic")["code.low"] == {"code": 1.0}
    kept = {t.replace("<|endoftext|>", "")
            for t in texts(corpus, np.asarray(corpus.train("wiki.low")))}  # fmt: skip
    sizes = {"gpl-3.0": 0, "unknown": 0}
    for row in given:
        if row["text"] in kept:
            sizes[row["licence"] or "unknown"] += len(row["text"])
    assert corpus.manifest["domains"][list(corpus.domains).index("wiki.low")]["labels"][
        "licence"] == sizes  # fmt: skip


def test_labels_of_a_mixture_are_the_weighted_shares_of_its_domains(scored: Corpus) -> None:
    shares = scored.label_shares("licence")
    found = scored.mixture_labels({"code": 0.25, "wiki": 0.75})["licence"]
    for value, share in found.items():
        expected = 0.25 * shares["code"].get(value, 0.0) + 0.75 * shares["wiki"].get(value, 0.0)
        assert share == pytest.approx(expected)
    assert sum(found.values()) == pytest.approx(1.0)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    with pytest.raises(CorpusError, match="no label 'licnce'; it has topic, licence"):
        scored.label_shares("licnce")


def test_null_in_a_domain_column_is_counted_by_column(tmp_path: Path) -> None:
    given = rows(200)
    given[3]["quality"], given[4]["topic"], given[5]["topic"] = None, None, None
    source = Source(path=write(tmp_path, given), domain_column=("topic", "quality"))
    reasons = describe(build(tmp_path, source)).loc["(no domain)", "reasons"]
    assert set(str(reasons).split(", ")) == {"1 null quality", "2 null topic"}


def test_crossings_that_read_the_same_are_refused(tmp_path: Path) -> None:
    given = [{"text": "one", "a": "x.y", "b": "z"}, {"text": "two", "a": "x", "b": "y.z"}]
    source = Source(path=write(tmp_path, given), domain_column=("a", "b"))
    with pytest.raises(CorpusError, match="both make the domain 'x.y.z'"):
        build(tmp_path, source)


def test_a_column_of_free_text_is_no_label(tmp_path: Path) -> None:
    given = [{"text": f"text {n} of some length", "url": f"page {n}"} for n in range(3_000)]
    source = Source(path=write(tmp_path, given), domain="web", label_columns=("url",))
    with pytest.raises(CorpusError, match="'url' has more than 1,000 values.*rayx corpus label"):
        build(tmp_path, source)


def test_second_document_of_an_id_is_counted_and_skipped(tmp_path: Path) -> None:
    given = rows(200)
    given[150]["name"] = given[151]["name"] = "7"
    first = Source(path=write(tmp_path, given), domain="web", id_column="name")
    other = {"text": "a text of another file", "name": "7"}
    second = Source(path=write(tmp_path, [other] + rows(1), "b.jsonl"), domain="more",
                    evaluation_only=True, id_column="name")  # fmt: skip
    corpus = build(tmp_path, first, second)  # evaluation-only sources are read first
    # 7 itself and its two copies in web; document 0, which `more` holds, is a duplicate text
    assert describe(corpus).loc["web", "reasons"] == "3 duplicate id"
    assert describe(corpus).loc["web", "duplicates"] == 1


def test_training_text_is_ordered_by_falling_score_and_unscored_comes_last(scored: Corpus) -> None:
    by_number = {n: row["score"] for n, row in enumerate(rows(300))}
    found = [by_number[number(t)] for t in texts(scored, np.asarray(scored.train("wiki")))]
    known = [score for score in found if score is not None]
    assert known == sorted(known, reverse=True) and len(known) > 80
    assert found[: len(known)] == known and len(found) > len(known)


def test_selection_is_the_best_scored_share_of_a_domain(scored: Corpus) -> None:
    whole, best = scored.train("wiki"), scored.train("wiki@0.3")
    assert len(best) == scored.tokens["wiki@0.3"] == -(-3 * len(whole) // 10)
    assert np.array_equal(best, whole[: len(best)])
    assert "wiki@0.3" not in scored.tokens and "wiki@0.3" not in scored.domains
    caps = supply_caps({d: scored.tokens[d] for d in ("code", "wiki@0.3")}, 2 * len(best), 1.0)
    assert caps["wiki@0.3"] == pytest.approx(0.5)
    with pytest.raises(CorpusError, match="no domain 'wiki@0.3'"):
        scored.heldout("wiki@0.3")


@pytest.mark.parametrize("name", ["wiki@1", "wiki@0", "wiki@0.30", "wiki@", "@0.3", "wiki@x"])
def test_what_is_no_selection_is_an_unknown_domain(scored: Corpus, name: str) -> None:
    with pytest.raises(SpecError, match="which is not in corpus"):
        scored.check_mixture(Mixture({name: 1}))


def test_selection_without_scores_is_refused_with_the_way_to_get_them(tiny_corpus) -> None:
    domain = tiny_corpus.domains[0]
    with pytest.raises(CorpusError, match="have no scores .*--score-column"):
        tiny_corpus.check_mixture(Mixture({f"{domain}@0.5": 1}))


def test_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    given = rows(50)
    given[20]["score"] = "good"
    source = Source(path=write(tmp_path, given), domain="web", score_column="score")
    with pytest.raises(CorpusError, match="column 'score' has 'good'; expected numbers"):
        build(tmp_path, source)


@given(st.floats(0.001, 0.999).map(lambda x: f"{x:g}"), st.sampled_from(["web", "a@b", "c@0.5"]))
def test_a_selection_reads_back(share: str, domain: str) -> None:
    assert parse_selection(f"{domain}@{share}") == (domain, float(share))


def spec(corpus: Corpus, mixture: Mixture) -> TrainSpec:
    return TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(layers=1, width=16, heads=2, ffn_width=32, vocab_size=300, context=16),
        schedule=Schedule.constant(mixture, 2_048),
        optimizer=Optimizer(lr=1e-3, batch_sequences=4),
        evaluation=Evaluation(points=1, sequences=4),
    )


def test_a_run_on_a_selection_reads_its_text_and_no_other(scored: Corpus) -> None:
    asked = spec(scored, Mixture({"code@0.5": 1, "wiki@0.2": 3}))
    batches = Batches(scored, [asked], [{}], 0)
    assert batches.domains == ["code@0.5", "wiki@0.2"]
    best = {bytes(t) for t in np.lib.stride_tricks.sliding_window_view(
        np.asarray(scored.train("wiki@0.2")), 17)}  # fmt: skip
    tokens, domains = batches.next(0, [Steering(asked)])
    read = tokens[0].numpy().astype(scored.manifest["dtype"])[domains[0] == 1]
    assert len(read) >= 2 and all(bytes(row) in best for row in read)


def test_selections_are_trained_on_and_recorded(scored: Corpus, tmp_path: Path) -> None:
    store = rayx.open(str(tmp_path / "s"), create=True)
    asked = spec(scored, Mixture({"code": 1, "wiki@0.2": 3}))
    other = spec(scored, Mixture({"code": 1, "wiki": 3}))
    for record in train_pack([asked, other], scored):
        store.put(record)
    runs = store.runs().set_index("run_id")
    assert runs.loc[asked.run_id, "weight/wiki@0.2"] == pytest.approx(0.75)
    # one is what it read, the other is not
    assert runs.loc[asked.run_id, "loss/wiki"] != runs.loc[other.run_id, "loss/wiki"]


def test_plan_names_selections_their_supply_and_the_labels(scored: Corpus, tmp_path: Path) -> None:
    world = World.random(num_domains=2, num_targets=2, seed=0)
    names = ("code", "wiki@0.2")
    supply = dict(zip(names, world.supply.values(), strict=True))
    world = dataclasses.replace(world, domains=names, supply=supply)
    store = rayx.open(str(tmp_path / "s"), create=True)
    drawn = np.random.default_rng(0).dirichlet(np.ones(2), size=16)
    world.fill(store, [world.spec(Mixture.from_array(w, names), 200_000) for w in drawn])
    table = Table.from_frame(store.runs())
    choice = choose(fit_table(table, "ridge"), dict.fromkeys(table.targets, 1.0),
                    dict.fromkeys(names, 1.0), seed=0)  # fmt: skip
    plan = Plan.of(choice, scored, 500, {}, store, table.run_ids)
    assert plan.domain_tokens["wiki@0.2"] == scored.tokens["wiki@0.2"]
    assert plan.labels == scored.mixture_labels(plan.schedule.phases[0].mixture)
    plan.check(scored)
    assert Plan.from_json(plan.to_json()) == plan


def test_search_may_run_over_selections(scored: Corpus) -> None:
    names = ("code", "wiki", "wiki@0.2")
    study = RegMix(
        corpus=scored, domains=names, proxy=spec(scored, Mixture.uniform(names)), num_proxies=12,
        objective={"wiki": 1.0}, budget_tokens=scored.tokens["wiki@0.2"] * 8, max_epochs=4.0,
    )  # fmt: skip
    mixtures = [s.schedule.phases[0].mixture for s in study.specs()]
    assert len(mixtures) == 12 and {d for m in mixtures for d in m} == set(names)
    assert study.caps["wiki@0.2"] == pytest.approx(0.5)
    assert all(m.get("wiki@0.2", 0.0) <= 0.5 for m in mixtures)
    for mixture in mixtures:
        scored.check_mixture(mixture)

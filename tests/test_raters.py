"""Raters add checked columns, classifiers say what they are worth, buckets hold their shares."""

import json
import pickle
import random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.corpus.labels.buckets import Buckets
from rayx.corpus.labels.classifier import train_classifier
from rayx.corpus.labels.raters import (
    ColumnRater,
    FunctionRater,
    LicenceRater,
    check_names,
    load_function,
    rated,
)
from rayx.errors import CorpusError
from tests.conftest import sentences

FUNCTIONS = """
import math
def size(texts): return [len(t) for t in texts]
def kind(texts): return ["long" if len(t) > 3 else None for t in texts]
def odd(texts): return [math.nan, math.inf, 1.0]
def few(texts): return [1.0]
def one(texts): return 1.0
def lists(texts): return [[1] for t in texts]
def truth(texts): return [True for t in texts]
def mixed(texts): return [1.0, "a", None]
def text(texts): return "abc"
def fails(texts):
    if "bad" in texts: raise ValueError("no such word")
    return [0.0 for t in texts]
def array(texts):
    import numpy
    return numpy.arange(len(texts))
"""
DOCUMENTS = pa.table({"text": ["a", "bad", "longer"], "domain": ["web"] * 3,
                      "licence": ["MIT", None, "GPL-3.0"], "stars": ["2", "5", None]})  # fmt: skip


@pytest.fixture
def functions(tmp_path):
    file = tmp_path / "functions.py"
    file.write_text(FUNCTIONS)
    return lambda name: FunctionRater("score", f"{file}:{name}")


def test_a_function_gives_numbers_labels_or_nothing(functions):
    assert rated(functions("size"), DOCUMENTS).to_pylist() == [1.0, 3.0, 6.0]
    assert rated(functions("array"), DOCUMENTS).to_pylist() == [0.0, 1.0, 2.0]
    assert rated(functions("kind"), DOCUMENTS).to_pylist() == [None, None, "long"]
    again = pickle.loads(pickle.dumps(functions("size")))
    assert rated(again, DOCUMENTS).to_pylist() == [1.0, 3.0, 6.0]


def test_nan_and_infinities_are_missing(functions):
    assert rated(functions("odd"), DOCUMENTS).to_pylist() == [None, None, 1.0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("few", r"'score' returned 1 values; expected one number, text or None for each of 3"),
        ("one", r"'score' returned a float; expected one number"),
        ("text", r"'score' returned a str; expected one number"),
        ("lists", r"returned \[1\] \(a list\) for document 0 .* expected a number"),
        ("truth", r"returned True \(a bool\)"),
        ("mixed", r"returned numbers and texts"),
        ("fails", r"functions.py:fails raised ValueError: no such word \(document 1 of a batch"),
        ("sizes", r"has no function 'sizes'. Did you mean 'size'\?"),
    ],
)
def test_a_function_that_does_otherwise_is_named_with_the_document(functions, name, message):
    with pytest.raises(CorpusError, match=message):
        rated(functions(name), DOCUMENTS)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no.such.module:f", r"'no.such.module' cannot be imported \(ModuleNotFoundError"),
        ("none.py:f", r"the file 'none.py' does not exist"),
        ("rayx.mixture", r"is not package.module:function"),
        ("broken.py:f", r"cannot be imported \(ZeroDivisionError"),
    ],
)
def test_a_function_that_is_not_there_is_named(tmp_path, monkeypatch, reference, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(CorpusError, match=message):
        load_function(reference)


def test_columns_are_renamed_mapped_and_read_as_tiers():
    assert rated(ColumnRater("quality", "stars"), DOCUMENTS).to_pylist() == ["2", "5", None]
    mapped = ColumnRater("quality", "stars", {"2": "low", "5": "high"})
    assert rated(mapped, DOCUMENTS).to_pylist() == ["low", "high", None]
    tiers = rated(LicenceRater("tier", "licence"), DOCUMENTS).to_pylist()
    assert tiers == ["permissive", "unknown", "copyleft"]
    with pytest.raises(CorpusError, match=r"needs column 'license'.* Did you mean 'licence'\?"):
        rated(LicenceRater("tier", "license"), DOCUMENTS)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["text"], r"'text' would overwrite a column of every document"),
        (["stars"], r"'stars' would overwrite a column that was read"),
        (["a", "a"], r"'a' would overwrite an earlier rater's column"),
        ([""], r"named ''; expected a column name"),
    ],
)
def test_raters_overwrite_nothing(names, message):
    with pytest.raises(CorpusError, match=message):
        check_names([ColumnRater(name, "stars") for name in names], DOCUMENTS.column_names)


# Classifiers ----------------------------------------------------------------------------------


def examples(folder, rows) -> str:
    file = folder / "examples.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def law_and_news(folder, labels=("law", "news"), count=40) -> str:
    rows = [{"text": t, "label": label} for domain, label in zip(("law", "news"), labels,
            strict=True) for t in sentences(domain, count, 1)]  # fmt: skip
    return examples(folder, rows)


def unseen() -> pa.Table:
    return pa.table({"text": sentences("law", 20, 2) + sentences("news", 20, 2)})


def test_a_classifier_tells_classes_apart_and_says_how_well(tmp_path, caplog):
    caplog.set_level("INFO")
    rater = train_classifier("topic", law_and_news(tmp_path))
    assert rater.rate(unseen()) == ["law"] * 20 + ["news"] * 20
    assert rater.validation.auc == 1.0 and rater.validation.classes == {"law": 40, "news": 40}
    assert "accuracy 1.000" in caplog.text and "AUC 1.000" in caplog.text
    score = train_classifier("lawful", law_and_news(tmp_path), of="law")
    shares = np.array(rated(score, unseen()).to_pylist())
    assert shares[:20].min() > 0.5 > shares[20:].max()
    again = train_classifier("lawful", law_and_news(tmp_path), of="law")
    assert again.facts == score.facts and again.rate(unseen()) == shares.tolist()


def test_labels_that_are_numbers_give_their_mean(tmp_path):
    rater = train_classifier("stars", law_and_news(tmp_path, labels=("1", "5")))
    means = np.array(rated(rater, unseen()).to_pylist())
    assert (means >= 1).all() and (means <= 5).all() and means[:20].max() < 3 < means[20:].min()


def test_labels_that_say_nothing_are_warned_of(tmp_path, caplog):
    rng = random.Random(0)
    rows = [{"text": t, "label": rng.choice("ab")} for t in sentences("law", 120, 3)]
    found = train_classifier("noise", examples(tmp_path, rows)).validation
    assert 0.3 < found.auc < 0.65 and abs(found.accuracy - 0.5) < 4 * found.accuracy_se
    assert "little above chance" in caplog.text


def test_examples_without_a_label_and_copies_are_counted(tmp_path, caplog):
    rows = [json.loads(line) for line in open(law_and_news(tmp_path))]
    rows += [{"text": "no label here", "label": None}] * 3 + rows[:2]
    rater = train_classifier("topic", examples(tmp_path, rows))
    assert rater.validation.examples == 80
    assert "left out 3 no label, 2 duplicate" in caplog.text


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": f"text {n}", "label": "a"} for n in range(9)], {}, r"one label 'a'"),
        ([{"text": f"{n} words", "label": "ab"[n > 2]} for n in range(9)], {},
         r"3 different texts of label 'a'; expected at least 5"),
        ([{"text": "x", "label": None}] * 4, {}, r"no text with a label in column 'label' \(4 no"),
        ([{"text": "x", "lable": "a"}], {}, r"no column 'label'.* Did you mean 'lable'\?"),
        ([{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(20)], {"of": "c"},
         r"no label 'c'; labels are a, b"),
    ],
)  # fmt: skip
def test_examples_that_teach_nothing_are_refused(tmp_path, rows, options, message):
    with pytest.raises(CorpusError, match=message):
        train_classifier("quality", examples(tmp_path, rows), **options)


# Buckets --------------------------------------------------------------------------------------


def bucketed(buckets: Buckets, folder, **columns: Any) -> list[str]:
    table = pa.table({name: pa.array(values) for name, values in columns.items()})
    half = table.num_rows // 2
    files = [str(folder / f"{n}.parquet") for n in range(2)]
    pq.write_table(table.slice(0, half), files[0])
    pq.write_table(table.slice(half), files[1])
    return buckets.assign(table, buckets.find_edges(files, folder)).to_pylist()


def test_shares_are_of_the_documents_and_missing_scores_are_unknown(tmp_path):
    scores = [float(n) for n in np.random.default_rng(0).permutation(1000)]
    buckets = Buckets.parse("quality=score:low:0.3,middle:0.5,high:0.2")
    found = bucketed(buckets, tmp_path, score=[*scores, None, float("nan")])
    assert found[-2:] == ["unknown", "unknown"]
    expected = ["low" if s < 300 else "middle" if s < 800 else "high" for s in scores]
    assert found[:-2] == expected


def test_shares_within_each_value_of_a_column(tmp_path):
    scores = [*range(10), *range(1000, 1010), 7]
    groups = ["a"] * 10 + ["b"] * 10 + [None]
    buckets = Buckets.parse("quality=score@topic:low:0.5,high:0.5")
    found = bucketed(buckets, tmp_path, score=scores, topic=groups)
    assert found == ["low"] * 5 + ["high"] * 5 + ["low"] * 5 + ["high"] * 5 + ["low"]


def test_a_score_on_an_edge_is_above_it_and_numbers_may_be_text(tmp_path):
    buckets = Buckets.parse("quality=stars:low,2,middle,4,high")
    stars = ["1.9", "2", "3.99", "4", "unknown", None]
    assert bucketed(buckets, tmp_path, stars=stars) == [
        "low", "middle", "middle", "high", "unknown", "unknown"]  # fmt: skip


@settings(max_examples=12, deadline=None)
@given(scores=st.lists(st.integers(0, 6), min_size=2, max_size=40),
       cut=st.floats(0.05, 0.95))  # fmt: skip
def test_ties_share_a_bucket_and_order_is_kept(tmp_path_factory, scores, cut):
    buckets = Buckets(name="q", column="score", labels=("low", "high"), shares=(cut, 1 - cut))
    found = bucketed(buckets, tmp_path_factory.mktemp("ties"), score=[float(s) for s in scores])
    low = [s for s, b in zip(scores, found, strict=True) if b == "low"]
    high = [s for s, b in zip(scores, found, strict=True) if b == "high"]
    assert not low or not high or max(low) < min(high)
    # No split between two scores comes nearer to the share than a tie is wide.
    widest = max(scores.count(s) for s in scores) / len(scores)
    assert abs(len(low) / len(scores) - cut) <= widest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q=score:low:0.3,high:0.6", r"of sum 0.9; expected 2 positive shares of sum 1"),
        ("q=score:low:1.5,high:-0.5", r"expected 2 positive shares"),
        ("q=score:low,4,middle,2,high", r"edges \[4.0, 2.0\]; expected 2 ascending"),
        ("q=score:low,2,high,3", r"edges \[2.0, 3.0\]; expected 1 ascending"),
        ("q=score:low,x,high", r"expected NAME=COLUMN"),
        ("q=score", r"expected NAME=COLUMN"),
        ("q=score:low,2,low", r"two or more different names"),
        ("q=score:unknown,2,high", r"none of them 'unknown'"),
        ("q=score@topic:low,2,high", r"the same within 'topic'"),
    ],
)
def test_buckets_that_cannot_be_meant_are_refused(text, message):
    with pytest.raises(CorpusError, match=message):
        Buckets.parse(text)


def test_scores_that_are_no_numbers_are_named(tmp_path):
    buckets = Buckets.parse("q=score:low:0.5,high:0.5")
    with pytest.raises(CorpusError, match=r"column 'score' has 'good'; expected numbers"):
        bucketed(buckets, tmp_path, score=["1", "good", "2"])
    with pytest.raises(CorpusError, match=r"no document has a score"):
        bucketed(buckets, tmp_path, score=pa.array([None, None], pa.float64()))

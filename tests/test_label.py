"""Labelling: what is read, rated, bucketed and dropped, and that it comes out whole."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayx.corpus import Source, build_corpus
from rayx.corpus.documents import documents
from rayx.corpus.labels import label
from rayx.corpus.labels.buckets import Buckets
from rayx.corpus.labels.label import label_corpus
from rayx.corpus.labels.licences import Licences
from rayx.corpus.labels.raters import ColumnRater, FunctionRater
from rayx.corpus.source import locate
from rayx.errors import CorpusError
from tests.conftest import sentences

LICENCES = ("MIT", "CC BY-SA 4.0", "GPL-3.0-only", None, "my own")


@pytest.fixture
def source(tmp_path) -> Source:
    """150 documents of two topics, with licences, languages and ids; 3 more cannot be read."""
    rows = [
        {"text": f"{text} {n}", "topic": topic, "license": LICENCES[n % 5], "id": f"{topic}{n}",
         "language": "en" if n % 3 else "de"}
        for topic in ("law", "news") for n, text in enumerate(sentences(topic, 75, 0))
    ]  # fmt: skip
    rows += [{"text": None, "topic": "law"}, {"text": "  ", "topic": "law"},
             {"text": "no topic", "topic": None}]  # fmt: skip
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(path=str(file), domain_column="topic", id_column="id",
                  label_columns=("license", "language"))  # fmt: skip


@dataclass(frozen=True)
class Length:
    """Rates by length, and can fail from a document on."""

    name: str = "length"
    fails_from: int | None = None

    @property
    def facts(self) -> dict[str, Any]:
        return {"rater": "length"}

    def rate(self, documents: pa.Table) -> list[float]:
        COUNTED["documents"] += documents.num_rows
        COUNTED["slices"] += 1
        if self.fails_from is not None and COUNTED["documents"] > self.fails_from:
            raise RuntimeError("killed")
        return [float(len(text)) for text in documents["text"].to_pylist()]


COUNTED: Counter[str] = Counter()


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    COUNTED.clear()
    monkeypatch.setattr(label, "PART_DOCUMENTS", 20)


def read(folder) -> pa.Table:
    return pa.concat_tables([pq.read_table(f) for f in sorted(Path(folder).glob("*.parquet"))])


def test_labels_buckets_and_tiers_are_added_and_all_else_is_kept(source, tmp_path):
    out = tmp_path / "out"
    raters = [Length(), ColumnRater("copied", "length")]
    done = label_corpus([source], out, raters, licence_column="license", buckets=[
        Buckets.parse("quality=length@topic:low:0.4,high:0.6"),
        Buckets.parse("size=copied:short,500,long")])  # fmt: skip
    table = read(out)
    rows = table.to_pylist()
    assert table.column_names == [
        "text", "domain", "id", "topic", "license", "language", "licence_tier", "length", "copied",
        "quality", "size"]  # fmt: skip
    assert len(rows) == done.documents == 150
    assert all(row["length"] == row["copied"] == len(row["text"]) for row in rows)
    assert all((row["size"] == "long") == (row["length"] >= 500) for row in rows)
    tiers = {row["license"]: row["licence_tier"] for row in rows}
    assert tiers == {"MIT": "permissive", "CC BY-SA 4.0": "share-alike", "unknown": "unknown",
                     "GPL-3.0-only": "copyleft", "my own": "unknown"}  # fmt: skip
    for topic in ("law", "news"):
        mine = [row for row in rows if row["topic"] == topic]
        assert abs(sum(row["quality"] == "low" for row in mine) - 30) <= 2
    counted = Counter(row["licence_tier"] for row in rows)
    assert {tier: n for tier, (n, _) in done.counts["licence_tier"].items()} == counted
    sizes = {q: sum(len(r["text"].encode()) for r in rows if r["quality"] == q)
             for q in ("low", "high")}  # fmt: skip
    assert {q: size for q, (_, size) in done.counts["quality"].items()} == sizes
    assert done.numbers["length"]["mean"] == pytest.approx(sum(r["length"] for r in rows) / 150)
    assert done.skipped == {"null text": 1, "empty": 1, "null topic": 1}
    assert not list(tmp_path.glob("out.*"))  # nothing that was unfinished


def test_crossings_of_labels_become_the_domains_of_a_corpus(source, tmp_path):
    label_corpus([source], tmp_path / "out", [Length()], licence_column="license",
                 buckets=[Buckets.parse("quality=length:low:0.5,high:0.5")])  # fmt: skip
    crossed = Source(path=str(tmp_path / "out"), domain_column=("topic", "quality"),
                     label_columns=("licence_tier", "language"), score_column="length",
                     id_column="id")  # fmt: skip
    corpus = build_corpus([crossed], tmp_path / "corpus", tokenizer=300, heldout_share=0.2,
                          min_heldout_tokens=100)  # fmt: skip
    assert set(corpus.domains) == {f"{t}.{q}" for t in ("law", "news") for q in ("low", "high")}
    shares = corpus.label_shares("licence_tier")["law.high"]
    assert set(shares) == {"permissive", "share-alike", "copyleft", "unknown"}
    assert sum(shares.values()) == pytest.approx(1)


def test_denied_licences_are_dropped_and_counted(source, tmp_path):
    kept = label_corpus([source], tmp_path / "a", licence_column="license",
                        licences=Licences(allow=("permissive", "CC-BY-SA-4.0")))  # fmt: skip
    assert kept.documents == 60 and set(kept.counts["licence_tier"]) == {"permissive",
                                                                         "share-alike"}  # fmt: skip
    assert kept.denied == {"licence denied: copyleft": 30, "licence denied: unknown": 60}
    kept = label_corpus([source], tmp_path / "b", licence_column="license",
                        licences=Licences(deny=("copyleft",)))  # fmt: skip
    assert kept.documents == 120 and kept.denied == {"licence denied: copyleft": 30}


@pytest.mark.slow
@pytest.mark.ray
def test_ray_data_gives_the_same_bytes(source, tmp_path, ray_cluster):
    function = tmp_path / "f.py"
    function.write_text("def size(texts): return [len(t) / 7 for t in texts]")
    rater = FunctionRater("size", f"{function}:size")
    buckets = [Buckets.parse("quality=size:low:0.4,high:0.6")]
    for name, parallel in (("one", False), ("many", True)):
        label_corpus([source], tmp_path / name, [rater], buckets=buckets, parallel=parallel)
    files = [[f.read_bytes() for f in sorted((tmp_path / name).glob("*.parquet"))]
             for name in ("one", "many")]  # fmt: skip
    assert files[0] == files[1]
    function.write_text("def size(texts): return [len(t) if len(t) < 600 else [] for t in texts]")
    with pytest.raises(CorpusError, match="'size' returned"):
        label_corpus([source], tmp_path / "broken", [FunctionRater("size", f"{function}:size")],
                     parallel=True)  # fmt: skip


def test_an_interrupted_labelling_goes_on_where_it_was(source, tmp_path, caplog):
    caplog.set_level("INFO")
    whole = label_corpus([source], tmp_path / "whole", [Length()])
    COUNTED.clear()
    with pytest.raises(RuntimeError, match="killed"):
        label_corpus([source], tmp_path / "out", [Length(fails_from=70)])
    assert not (tmp_path / "out").exists() and COUNTED["documents"] < 100
    COUNTED.clear()
    done = label_corpus([source], tmp_path / "out", [Length()])
    assert "going on with an interrupted labelling" in caplog.text
    assert COUNTED["documents"] == 3 + 150 - 60  # a trial of three; three parts were done
    assert read(tmp_path / "out").equals(read(tmp_path / "whole"))
    assert done.counts == whole.counts
    COUNTED.clear()
    assert label_corpus([source], tmp_path / "out", [Length()]) == done and not COUNTED


def test_an_interrupted_labelling_starts_anew_with_other_raters(source, tmp_path, caplog):
    with pytest.raises(RuntimeError, match="killed"):
        label_corpus([source], tmp_path / "out", [Length(fails_from=70)])
    label_corpus([source], tmp_path / "out", [ColumnRater("other", "license")])
    assert "the labelling starts anew" in caplog.text
    assert "other" in read(tmp_path / "out").column_names


def test_several_sources_have_all_columns(source, tmp_path):
    (tmp_path / "more.txt").write_text("a text without any label")
    more = Source(path=str(tmp_path / "more.txt"), domain="more")
    label_corpus([source, more], tmp_path / "out", [Length()])
    last = read(tmp_path / "out").to_pylist()[-1]
    assert last["domain"] == "more" and last["license"] is None and last["length"] == 24
    again = Source(path=str(tmp_path / "out"), domain_column="domain", label_columns=("language",))
    found = Counter(d.labels["language"] for d in documents(again, locate(again)))
    assert found == {"en": 100, "de": 50, "unknown": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"raters": [ColumnRater("text", "license")]}, r"'text' would overwrite"),
        ({"raters": [ColumnRater("a", "licence")]}, r"needs column 'licence'.*mean 'license'\?"),
        ({"raters": [FunctionRater("a", "no.module:f")]}, r"'no.module' cannot be imported"),
        ({"buckets": [Buckets.parse("q=lenght:a,2,b")], "raters": [Length()]},
         r"'q' need column 'lenght'.* Did you mean 'length'\?"),
        ({"buckets": [Buckets.parse("topic=length:a,2,b")], "raters": [Length()]},
         r"'topic' would overwrite"),
        ({"buckets": [Buckets.parse("q=length:a,2,b"), Buckets.parse("r=q:a,2,b")],
          "raters": [Length()]}, r"'r' need column 'q'"),
        ({"buckets": [Buckets.parse("q=length:a,2,b")] * 2, "raters": [Length()]},
         r"'q' would overwrite"),
        ({"licence_column": "licence"}, r"licence_column 'licence' is not read"),
        ({"licences": Licences(deny=("copyleft",))}, r"need licence_column"),
        ({"licences": Licences(allow=("public-domain",)), "licence_column": "license"},
         r"No document is left to label \(.* 60 licence denied: unknown"),
        ({"buckets": [Buckets.parse("q=license:low:0.5,high:0.5")]},
         r"column 'license' has '.*'; expected numbers"),
        ({"out": "s3://bucket/out"}, r"is not local"),
        ({"sources": []}, r"There are no sources"),
    ],
)  # fmt: skip
def test_what_cannot_be_labelled_is_said_before_the_work(source, tmp_path, options, message):
    given = {"sources": [source], "out": tmp_path / "out"} | options
    with pytest.raises(CorpusError, match=message):
        label_corpus(given.pop("sources"), given.pop("out"), **given)
    assert not (tmp_path / "out").exists()
    assert COUNTED["documents"] in (0, 3)


def test_a_folder_of_something_else_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(CorpusError, match="exists and is not this labelling"):
        label_corpus([source], tmp_path / "out")
    assert (tmp_path / "out/mine.txt").read_text() == "mine"


def test_numbers_here_and_texts_there_are_refused(source, tmp_path):
    function = tmp_path / "f.py"
    function.write_text("def f(texts): return [1.0 if len(texts) == 20 else 'a'] * len(texts)")
    with pytest.raises(CorpusError, match="gave numbers for some documents and texts for others"):
        label_corpus([source], tmp_path / "out", [FunctionRater("a", f"{function}:f")])


SCRIPT = """
import sys, time
from rayx.corpus import Source
from rayx.corpus.labels import label
from rayx.corpus.labels.buckets import Buckets
from rayx.corpus.labels.raters import FunctionRater
label.PART_DOCUMENTS = 20
source = Source(path=sys.argv[1], domain_column="topic", label_columns=("language",))
label.label_corpus([source], sys.argv[2], [FunctionRater("size", sys.argv[3] + ":size")],
                   buckets=[Buckets.parse("quality=size:low:0.4,high:0.6")])
"""


@pytest.mark.slow
def test_killed_at_any_moment_the_bytes_are_the_same(source, tmp_path):
    function = tmp_path / "f.py"
    function.write_text(
        "import time\ndef size(texts):\n    time.sleep(.15)\n    return [len(t) for t in texts]\n"
    )

    def command(out: str) -> list[str]:
        return [sys.executable, "-c", SCRIPT, source.path, str(tmp_path / out), str(function)]

    subprocess.run(command("whole"), check=True, cwd=Path(__file__).parents[1])
    for parts in (1, 4, 7):
        process = subprocess.Popen(command("out"), cwd=Path(__file__).parents[1])
        rated = tmp_path / "out.partial/rated"
        while process.poll() is None and len(list(rated.glob("*.parquet"))) < parts:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert len(list(rated.glob("*.parquet"))) >= parts and not (tmp_path / "out").exists()
    subprocess.run(command("out"), check=True, cwd=Path(__file__).parents[1])
    assert read(tmp_path / "out").equals(read(tmp_path / "whole"))

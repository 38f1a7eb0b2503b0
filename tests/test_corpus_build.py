"""A corpus holds its documents exactly, splits them stably and names itself by content alone."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.corpus import Corpus, Source, build_corpus, describe
from rayx.corpus.stage import document_hash, is_heldout
from rayx.corpus.tokenizer import EOS, balanced_texts
from rayx.errors import CorpusError

WEB = [
    f"Page {n}: the {n % 7} foxes\n\n  saw {n * n} \u00e4pfel \U0001f34e today." for n in range(300)
]
CODE = [f"def f{n}(x):\n    return x ** {n} + {n % 5}\n" for n in range(200)]
NEWS = [f"Reports of {n} new items came in at {n % 24} o'clock." for n in range(80)]


def write_jsonl(file: Path, texts: list[str]) -> str:
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(file)


def sources(folder: Path, **domains: list[str]) -> list[Source]:
    return [
        Source(path=write_jsonl(folder / f"{name}.jsonl", texts), domain=name,
               evaluation_only=name == "news")
        for name, texts in domains.items()
    ]  # fmt: skip


def build(found: list[Source], out: Path, **options) -> Corpus:
    defaults: dict[str, Any] = {"tokenizer": 400, "min_heldout_tokens": 1}
    return build_corpus(found, out, **(defaults | options))


def texts_of(corpus: Corpus, tokens: np.ndarray) -> list[str]:
    ends = np.flatnonzero(tokens == corpus.eos_id)
    assert ends[-1] == len(tokens) - 1
    tokenizer = corpus.tokenizer()
    return [tokenizer.decode(ids.tolist()[:-1]) for ids in np.split(tokens, ends + 1)[:-1]]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("three")
    return build(sources(folder, web=WEB, code=CODE, news=NEWS), folder / "out")


def test_shards_decode_to_the_documents(three: Corpus) -> None:
    for name, texts in (("web", WEB), ("code", CODE)):
        train = texts_of(three, three.train(name))
        heldout = texts_of(three, three.heldout(name))
        assert train + heldout and set(train).isdisjoint(heldout)
        assert train == [t for t in texts if t in set(train)], "order of reading"
        assert sorted(train + heldout) == sorted(texts)
        assert sum(len(t.encode()) for t in train) == three.bytes[name]
        assert sum(len(t.encode()) for t in heldout) == three.heldout_bytes[name]
    assert texts_of(three, three.heldout("news")) == NEWS


def test_counts_agree_with_shards(three: Corpus) -> None:
    assert three.domains == ("web", "code") and three.targets == ("web", "code", "news")
    assert {n: len(three.train(n)) for n in three.domains} == three.tokens
    assert {n: len(three.heldout(n)) for n in three.targets} == three.heldout_tokens
    assert sum(three.proportional().values()) == pytest.approx(1)
    assert three.bytes_per_token("news") == three.heldout_bytes["news"] / len(three.heldout("news"))
    assert describe(three).loc["news", ["documents", "heldout_documents"]].tolist() == [0, 80]
    three.verify()


def test_end_of_text_inside_a_document_is_plain_text(tmp_path: Path) -> None:
    texts = [f"{n} a {EOS} b" for n in range(100)]
    corpus = build(sources(tmp_path, web=texts), tmp_path / "out")
    found = texts_of(corpus, corpus.train("web")) + texts_of(corpus, corpus.heldout("web"))
    assert sorted(found) == sorted(texts)


def test_training_a_target_without_train_tokens_is_refused(three: Corpus) -> None:
    with pytest.raises(CorpusError, match="'news' is evaluation-only.*web, code"):
        three.train("news")
    with pytest.raises(CorpusError, match="no domain 'wbe'.*Did you mean 'web'"):
        three.heldout("wbe")


def test_duplicates_are_removed_and_counted_across_domains(tmp_path: Path) -> None:
    same = ["Page  1:\tthe 1 foxes\nsaw 1 a\u0308pfel \U0001f34e today.", WEB[1].upper()]
    found = sources(tmp_path, web=WEB + WEB[:3] + same, code=CODE + WEB[5:9], news=NEWS)
    other = Source(path=write_jsonl(tmp_path / "b.jsonl", WEB[:4] + NEWS[:2]), domain="web")
    table = describe(build([*found, other], tmp_path / "out"))
    assert table["duplicates"].to_dict() == {"web": 3 + 1 + 4 + 2, "code": 4, "news": 0}
    assert table.loc["web", ["documents", "heldout_documents"]].sum() == 300 + 1, "case counts"


def test_text_kept_for_evaluation_is_never_trained_on(tmp_path: Path) -> None:
    corpus = build(sources(tmp_path, web=WEB + NEWS, news=NEWS), tmp_path / "out")
    assert not set(NEWS) & set(texts_of(corpus, corpus.train("web")))
    assert texts_of(corpus, corpus.heldout("news")) == NEWS


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=" \t\n\r\x0b\x0c\x1c\x1f\x85\xa0\u2028abe\u0301", max_size=30))
def test_hash_is_of_the_composed_text_with_single_spaces(text: str) -> None:
    words = unicodedata.normalize("NFC", text).split()
    assert document_hash(text) == blake2b(" ".join(words).encode(), digest_size=16).digest()


@settings(max_examples=200, deadline=None)
@given(st.text(), st.integers(0, 2**32), st.floats(0.01, 0.5), st.floats(0.01, 0.5))
def test_heldout_depends_on_text_alone_and_grows_with_the_share(text, seed, one, other) -> None:
    key = document_hash(text)
    assert key == document_hash(f" {text}\n\n") == document_hash(text.replace(" ", "\t"))
    small, large = sorted((one, other))
    assert is_heldout(key, large, seed) or not is_heldout(key, small, seed)


@settings(max_examples=5, deadline=None)
@given(st.sets(st.text("abc \u00e9", min_size=3, max_size=9).filter(str.strip), max_size=20))
def test_documents_stay_on_their_side_when_others_are_added(added: set[str]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = build(sources(folder, web=WEB), folder / "before", tokenizer=300)
        after = build(sources(folder, web=sorted(added) + WEB), folder / "after", tokenizer=300)
        assert set(texts_of(before, before.heldout("web"))) == set(WEB) & set(
            texts_of(after, after.heldout("web"))
        )


def test_groups_are_never_divided(tmp_path: Path) -> None:
    rows = [{"text": t, "book": n // 10} for n, t in enumerate(WEB)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(path=str(tmp_path / "a.jsonl"), domain="web", group_column="book")
    corpus = build([source], tmp_path / "out", heldout_share=0.2)
    heldout = set(texts_of(corpus, corpus.heldout("web")))
    by_book = [len(heldout.intersection(WEB[n : n + 10])) for n in range(0, 300, 10)]
    assert set(by_book) == {0, 10}


def test_fingerprint_is_of_the_content(three: Corpus, tmp_path: Path) -> None:
    again = build(sources(tmp_path, web=WEB, code=CODE, news=NEWS), tmp_path / "x")
    assert again.fingerprint == three.fingerprint
    assert again.domain_fingerprints == three.domain_fingerprints
    assert str(tmp_path) not in (tmp_path / "x" / "manifest.json").read_text()
    given_tokenizer = {"tokenizer": tmp_path / "x" / "tokenizer.json"}
    swapped = sources(tmp_path, code=CODE, news=NEWS, web=WEB)
    assert build(swapped, tmp_path / "y", **given_tokenizer).fingerprint == three.fingerprint
    fewer = build(sources(tmp_path, web=WEB[:-1], code=CODE, news=NEWS), tmp_path / "z",
                  **given_tokenizer)  # fmt: skip
    assert fewer.fingerprint != three.fingerprint
    assert fewer.domain_fingerprints["code"] == three.domain_fingerprints["code"]
    assert fewer.domain_fingerprints["web"] != three.domain_fingerprints["web"]


def test_large_vocabulary_uses_four_bytes_and_small_text_is_recorded(tmp_path: Path) -> None:
    corpus = build(sources(tmp_path, web=WEB), tmp_path / "a", tokenizer=5000)
    assert corpus.manifest["vocab_size_asked"] == 5000 > corpus.vocab_size
    tokenizer = corpus.tokenizer()
    tokenizer.add_tokens([f"<{n}>" for n in range(70_000)])
    tokenizer.save(str(tmp_path / "t.json"))
    texts = [f"{t} <{n + 69_000}>" for n, t in enumerate(WEB)]
    found = sources(tmp_path, web=texts)
    large = build(found, tmp_path / "b", tokenizer=tmp_path / "t.json")
    assert large.train("web").dtype == np.dtype("<u4") and large.train("web").max() > 65_536
    assert set(texts_of(large, large.train("web"))) <= set(texts)


def test_balanced_texts_levels_the_domains() -> None:
    texts = {"small": ["s" * 100] * 10, "large": ["l" * 100] * 100}
    drawn = list(balanced_texts({n: t.__iter__ for n, t in texts.items()},
                                {"small": 1_000, "large": 10_000}))  # fmt: skip
    assert drawn.count("s" * 100) == 40 and drawn.count("l" * 100) == 55


def damage_truncate(out: Path) -> None:
    with open(out / "domains/web/train.bin", "r+b") as file:
        file.truncate(100)


def damage_version(out: Path) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damage_truncate, r"domains/web/train.bin has 100 bytes, expected \d+. Build the corpus"),
        (lambda out: (out / "domains/web/heldout.bin").unlink(), "heldout.bin is missing"),
        (lambda out: (out / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (damage_version, "format version 99, this rayx reads 2"),
        (lambda out: (out / "manifest.json").write_text("{"), "is not JSON"),
        (lambda out: (out / "manifest.json").unlink(), "is no corpus: it has no manifest.json"),
    ],
)
def test_damaged_corpus_is_refused(damage, words: str, tmp_path: Path) -> None:
    build(sources(tmp_path, web=WEB), tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(CorpusError, match=words):
        Corpus.load(tmp_path / "out")


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    corpus = build(sources(tmp_path, web=WEB), tmp_path / "out")
    with open(tmp_path / "out/domains/web/train.bin", "r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 1]))
    Corpus.load(tmp_path / "out")
    with pytest.raises(CorpusError, match="content of domains/web/train.bin has changed"):
        corpus.verify()


# stalls for ever at the log line that contains the given words, having said so
STALLING_BUILD = """
import logging, pathlib, sys, time
from rayx.corpus import Source, build_corpus
folder, words, log = pathlib.Path(sys.argv[1]), sys.argv[2], logging.getLogger("rayx.corpus")
class Stall(logging.Handler):
    def emit(self, record):
        if words in record.getMessage():
            (folder / "stalled").touch()
            time.sleep(600)
log.addHandler(Stall())
log.setLevel(logging.INFO)
names = ["web", "code", "news"]
sources = [Source(path=str(folder / f"{n}.jsonl"), domain=n, evaluation_only=n == "news")
           for n in names]
build_corpus(sources, folder / "out", tokenizer=400, min_heldout_tokens=1)
"""


def kill_build_at(words: str, folder: Path) -> None:
    command = [sys.executable, "-c", STALLING_BUILD, str(folder), words]
    with subprocess.Popen(command, env=os.environ | {"RAYON_NUM_THREADS": "1"}) as process:
        while not (folder / "stalled").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    (folder / "stalled").unlink()


def test_killed_build_goes_on_to_the_same_corpus(three: Corpus, tmp_path: Path, caplog) -> None:
    found = sources(tmp_path, web=WEB, code=CODE, news=NEWS)
    kill_build_at("training a tokenizer", tmp_path)
    staged = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("out/.build/text/**/*.parquet")}
    with pytest.raises(CorpusError, match="is no corpus"):
        Corpus.load(tmp_path / "out")
    kill_build_at("encoded web/train", tmp_path)
    assert staged
    assert staged == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("**/*.parquet")}
    done = (tmp_path / "out/domains/web/train.bin").stat()
    (tmp_path / "out/domains/code/train.partial").write_bytes(b"torn")
    with caplog.at_level("INFO", "rayx.corpus"):
        corpus = build(found, tmp_path / "out")
    assert "going on with an interrupted build" in caplog.text
    assert "encoded code/train" in caplog.text and "encoded web/train" not in caplog.text
    assert (tmp_path / "out/domains/web/train.bin").stat() == done
    assert corpus.fingerprint == three.fingerprint
    assert {p.name for p in (tmp_path / "out").iterdir()} - {".lock"} == {
        "manifest.json", "tokenizer.json", "domains"}  # fmt: skip
    corpus.verify()


def test_interrupted_build_with_other_parameters_starts_anew(tmp_path: Path, caplog) -> None:
    found = sources(tmp_path, web=WEB, code=CODE, news=NEWS)
    kill_build_at("encoded web/train", tmp_path)
    other = build(found, tmp_path / "out", seed=5)
    assert "sources or parameters have changed; the build starts anew" in caplog.text
    assert other.fingerprint == build(found, tmp_path / "clean", seed=5).fingerprint
    other.verify()


def test_relative_path_is_kept_as_absolute(three: Corpus, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(Path(three.url).parent)
    corpus = Corpus.load("out")
    monkeypatch.chdir(tmp_path)
    assert corpus.url == three.url and len(corpus.train("web")) == three.tokens["web"]


def test_building_again_changes_nothing(tmp_path: Path) -> None:
    found = sources(tmp_path, web=WEB)
    build(found, tmp_path / "out")
    before = (tmp_path / "out/manifest.json").stat()
    build(found, tmp_path / "out")
    assert (tmp_path / "out/manifest.json").stat() == before


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_ray_data_gives_the_same_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayx.corpus.parts.PART_BYTES", 2_000)
    found = sources(tmp_path, web=WEB, code=CODE)
    here = build(found, tmp_path / "here", parallel=False)
    there = build(found, tmp_path / "there", parallel=True)
    assert there.fingerprint == here.fingerprint

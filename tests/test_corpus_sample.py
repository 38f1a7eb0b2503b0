"""The sample corpus is real, unequal, repeatable and leaks nothing into training."""

import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest

from rayx.corpus import Corpus, build_sample, describe, extract_sample, sample
from rayx.corpus.sample import EVALUATION_ONLY, PACKAGES, SIZES
from rayx.errors import CorpusError

SMALL = dict.fromkeys(SIZES, 350_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in PACKAGES:
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"package {package} of the `sample` extra is not installed")
    folder = tmp_path_factory.mktemp("sample")
    build_sample(folder / "one", sizes=SMALL)
    return folder


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in open(folder / f"one-text/{name}.jsonl")]


def test_sample_has_every_domain_within_its_size(folder: Path) -> None:
    corpus = Corpus.load(folder / "one")
    assert set(corpus.targets) == set(SIZES) and corpus.targets[-1:] == EVALUATION_ONLY
    table = describe(corpus)
    size = table["bytes"] + table["heldout_bytes"]
    least = [300_000 if name not in EVALUATION_ONLY else 100_000 for name in size.index]
    assert ((size > least) & (size <= 350_000)).all(), size
    assert (table["heldout_tokens"] >= 1024).all()
    assert corpus.vocab_size == 1024


def test_sample_text_is_of_its_kind(folder: Path) -> None:
    text = {name: "\n".join(row["text"] for row in rows(folder, name)) for name in SIZES}
    assert text["code"].count("\n    ") > 500 and "import " in text["code"]
    assert "licen" in text["legal"].lower() and "short_name:" not in text["legal"]
    assert "Congress" in text["speeches"]
    for markup in ("[[", "]]", "{{", "<ref", "{|", "'''", "Category:"):
        assert markup not in text["wiki"], markup
    assert "is_a:" not in text["medicine"] and "xref" not in text["medicine"]
    assert "Parameters\n----------" in text["docs"]


def test_pieces_of_a_document_stay_on_one_side(folder: Path) -> None:
    corpus = Corpus.load(folder / "one")
    decode = corpus.tokenizer().decode
    for name in ("code", "speeches", "wiki", "legal"):
        tokens = corpus.heldout(name)
        documents = np.split(tokens, np.flatnonzero(tokens == corpus.eos_id) + 1)
        heldout = {decode(ids.tolist()) for ids in documents}
        by_group: dict[str, set[bool]] = {}
        for row in rows(folder, name):
            by_group.setdefault(row["group"], set()).add(row["text"] in heldout)
        sides = list(by_group.values())
        assert all(len(side) == 1 for side in sides), name
        assert {True} in sides and {False} in sides


def test_sample_is_the_same_each_time_and_not_built_twice(folder: Path) -> None:
    corpus = Corpus.load(folder / "one")
    assert build_sample(folder / "two", sizes=SMALL).fingerprint == corpus.fingerprint
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*.*")}
    build_sample(folder / "one", sizes=SMALL)
    extract_sample(folder / "one-text", sizes=SMALL)
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*.*")}
    with pytest.raises(CorpusError, match="1024 token ids, 512 were asked for"):
        build_sample(folder / "one", vocab_size=512)


def test_missing_package_is_named_with_the_extra(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sample, "PACKAGES", ("no-such-package-of-rayx",))
    with pytest.raises(CorpusError, match=r"'no-such-package-of-rayx'.*rayx-mix\[sample\]"):
        extract_sample(tmp_path)


def test_unknown_sample_domain_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no domain 'wikis'.*Did you mean 'wiki'"):
        extract_sample(tmp_path, sizes={"wikis": 10})

"""Cleaning takes documents away and does nothing else: none crosses to the other split."""

import glob
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from rayx.cli.main import command_tree
from rayx.corpus import Corpus, Source, build_corpus, describe
from rayx.corpus.cleaning.clean import Cleaning, clean, passes
from rayx.corpus.cleaning.near_duplicates import similarity
from rayx.corpus.source import locate
from rayx.corpus.stage import SPLITS, Tally, stage_sources
from rayx.errors import CorpusError

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "rk", "st")]
ALL = Cleaning(near_duplicates=0.7, contamination_words=8, remove_contaminated=True)


def drawn(seed: int, count: int) -> list[str]:
    """Return documents that are often copies of each other, changed a little, or quote another."""
    rng = random.Random(seed)
    texts: list[str] = []
    for _ in range(count):
        words = rng.choices(WORDS, k=rng.randint(1, 60))
        if texts and rng.random() < 0.5:
            words = rng.choice(texts).split()
            words[rng.randrange(len(words))] = rng.choice(WORDS)
        if texts and rng.random() < 0.2:
            words += rng.choice(texts).split()
        texts.append(" ".join(words))
    return texts


def source(folder: Path, domain: str, texts: list[str], **options: Any) -> Source:
    file = folder / f"{domain}.jsonl"
    file.write_text(
        "".join(json.dumps({"text": t, "kind": "ab"[len(t) % 2]}) + "\n" for t in texts)
    )
    return Source(path=str(file), domain=domain, **options)


def staged(
    folder: Path, sources: list[Source], cleaning: Cleaning | None
) -> tuple[dict[tuple[str, str], list[str]], dict[str, Tally]]:
    """Return the documents by (domain, split), in order, and the tallies."""
    located = [(s, locate(s)) for s in sources]
    tallies, _ = stage_sources(located, folder / "text", 0.3, 0, lambda documents, size: None)
    if cleaning:
        looked: list[int] = []
        clean(folder / "text", folder / "cleaned", tallies, cleaning,
              lambda documents, size: looked.append(size))  # fmt: skip
    where = folder / ("cleaned" if cleaning else "text")
    found: dict[tuple[str, str], list[str]] = {}
    for file in sorted(glob.glob(f"{where}/source-*/*/*.parquet")):
        key = (Path(file).parent.name, Path(file).name.partition("-")[0])
        found.setdefault(key, []).extend(pq.read_table(file)["text"].to_pylist())
    return found, tallies


def in_order(part: list[str], whole: list[str]) -> bool:
    left = iter(whole)
    return all(text in left for text in part)


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32), more=st.integers(1, 40))
def test_nothing_crosses_and_what_goes_has_a_reason(seed: int, more: int) -> None:
    texts = drawn(seed, 80 + more)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        few = [source(folder, "web", texts[:50]), source(folder, "code", texts[50:80])]
        before, _ = staged(folder / "before", few, None)
        after, tallies = staged(folder / "after", few, ALL)
        grown = [source(folder, "web", texts[:50] + texts[80:]), few[1]]
        later, _ = staged(folder / "later", grown, ALL)
    sides = {split: {t for (_, s), ts in before.items() if s == split for t in ts}
             for split in SPLITS}  # fmt: skip
    for (domain, split), kept in after.items():
        assert in_order(kept, before[domain, split]), "a subset, in order"
        gone = len(before[domain, split]) - len(kept)
        counted = tallies[domain].near_duplicates, tallies[domain].contamination
        assert counted[0] and counted[1]
        dirty = counted[1]["train_documents"] if split == "train" else 0
        assert gone == counted[0][split] + dirty
        assert tallies[domain].documents[split] == len(kept)
        assert tallies[domain].bytes[split] == sum(len(t.encode()) for t in kept)
    everything = [t for split in ("heldout", "train")
                  for (_, s), ts in after.items() if s == split for t in ts]  # fmt: skip
    rng = random.Random(seed)
    for text, other in (rng.sample(everything, 2) for _ in range(100)):
        assert similarity(text, other) < 0.8, "at 0.7 the index misses one in 80, at 0.8 in 5,000"
    for (_, split), kept in later.items():
        other = sides[SPLITS[1 - SPLITS.index(split)]]
        assert not other & set(kept), "more documents move none across"


def test_of_a_pair_across_the_splits_the_train_copy_goes(tmp_path: Path) -> None:
    texts = [" ".join(random.Random(i).choices(WORDS, k=40)) for i in range(60)]
    copies = [f"{t} {WORDS[i]}" for i, t in enumerate(texts)]
    found, tallies = staged(tmp_path, [source(tmp_path, "web", texts + copies)],
                            Cleaning(near_duplicates=0.7))  # fmt: skip
    plain, _ = staged(tmp_path, [source(tmp_path, "web", texts + copies)], None)
    held = set(plain["web", "heldout"])
    for text, copy in zip(texts, copies, strict=True):
        stays = {split: {text, copy} & set(found["web", split]) for split in SPLITS}
        assert sum(map(len, stays.values())) == 1
        assert len(stays["heldout"]) == bool({text, copy} & held)
        if {text, copy} <= held or not {text, copy} & held:
            assert text in stays["heldout"] | stays["train"], "the first read stays"
    assert sum((tallies["web"].near_duplicates or {}).values()) == 60


def test_text_kept_for_evaluation_stays_whole_and_its_copies_go(tmp_path: Path) -> None:
    exam = [f"Question {i}: which of the following words is the odd one out?" for i in range(9)]
    web = drawn(5, 60) + [f"{t} Well," for t in exam] + [f"{exam[3]} {' '.join(WORDS)}"]
    sources = [source(tmp_path, "exam", exam, evaluation_only=True), source(tmp_path, "web", web)]
    found, tallies = staged(tmp_path, sources, ALL)
    assert found["exam", "heldout"] == exam
    kept = found["web", "train"] + found["web", "heldout"]
    assert not [t for t in kept if t.startswith("Question") and len(t) < 100]
    assert tallies["exam"].near_duplicates == {"train": 0, "heldout": 0, "too_short": 0}
    assert (tallies["exam"].contamination or {})["heldout_ngrams"] == 9 * 5


def test_labels_lose_the_bytes_of_what_goes(tmp_path: Path) -> None:
    web = source(tmp_path, "web", drawn(1, 120), label_columns=("kind",))
    found, tallies = staged(tmp_path, [web], ALL)
    expected = Counter[str]()
    for text in found["web", "train"]:
        expected["ab"[len(text) % 2]] += len(text)
    assert tallies["web"].labels == {"kind": expected}
    assert sum(expected.values()) == tallies["web"].bytes["train"]


def test_counting_contamination_removes_nothing(tmp_path: Path) -> None:
    web = [source(tmp_path, "web", drawn(2, 150))]
    only = Cleaning(contamination_words=8)
    found, tallies = staged(tmp_path / "a", web, only)
    assert found == staged(tmp_path / "b", web, None)[0]
    counts = tallies["web"].contamination or {}
    assert counts["train_documents"] > 0 and not counts["removed"]
    assert 0 < counts["heldout_documents"] <= len(found["web", "heldout"])
    removed, _ = staged(tmp_path / "c", web, Cleaning(None, 8, remove_contaminated=True))
    assert len(found["web", "train"]) - len(removed["web", "train"]) == counts["train_documents"]
    seen: list[int] = []
    located = [(s, locate(s)) for s in web]
    fresh, _ = stage_sources(located, tmp_path / "d", 0.3, 0, lambda documents, size: None)
    expected = passes(fresh, only)
    clean(tmp_path / "d", tmp_path / "e", fresh, only, lambda documents, size: seen.append(size))
    assert sum(seen) == expected, "the bar ends at 100%"


BUILD = """
import glob, os, signal, sys
from rayx.corpus import Source, build_corpus
from rayx.corpus.cleaning import clean
when, folder, out = sys.argv[1:]
before = getattr(clean, when)
def die(*given):
    before(*given)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(clean, when, die)
build_corpus([Source(path=f"{folder}/web.jsonl", domain="web")], out, tokenizer=400,
             heldout_share=0.3, min_heldout_tokens=1, near_duplicates=0.7, contamination_words=8)
"""


def built(folder: Path, out: Path, **options: Any) -> Corpus:
    return build_corpus([Source(path=str(folder / "web.jsonl"), domain="web")], out, tokenizer=400,
                        heldout_share=0.3, min_heldout_tokens=1, **options)  # fmt: skip


def test_a_build_killed_while_it_cleans_or_after_gives_the_same_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source(tmp_path, "web", drawn(4, 150))
    options: dict[str, Any] = {"near_duplicates": 0.7, "contamination_words": 8}
    whole = built(tmp_path, tmp_path / "whole", **options)
    command = [sys.executable, "-c", BUILD, "_write", str(tmp_path), str(tmp_path / "out")]
    died = subprocess.run(command, env=os.environ | {"PYTHONPATH": os.getcwd()}, check=False)
    assert died.returncode == -signal.SIGKILL
    assert (tmp_path / "out/.build/cleaned.partial").exists()
    with monkeypatch.context() as patch:
        patch.setattr("rayx.corpus.build._train", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            built(tmp_path, tmp_path / "out", **options)
    assert (tmp_path / "out/.build/cleaned").exists()
    again = built(tmp_path, tmp_path / "out", **options)
    assert again.fingerprint == whole.fingerprint
    assert again.manifest["domains"] == whole.manifest["domains"]
    table = describe(whole).loc["web"]
    domain = whole.manifest["domains"][0]
    assert table["near_duplicates"] == sum(domain["near_duplicates"][s] for s in SPLITS) > 0
    assert table["contaminated"] == domain["contamination"]["train_documents"] > 0
    share = domain["contamination"]["shared_ngrams"] / domain["contamination"]["heldout_ngrams"]
    assert table["heldout_shared"] == share
    with pytest.raises(CorpusError, match="built from other sources, versions of them or param"):
        built(tmp_path, tmp_path / "out")
    # the command line asks for the same build, and so finds it done
    result = CliRunner().invoke(command_tree(), [
        "corpus", "build", str(tmp_path / "out"), "--source", f"web={tmp_path / 'web.jsonl'}",
        "--tokenizer", "400", "--heldout-share", "0.3", "--near-duplicates", "0.7",
        "--contamination-words", "8"])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert re.search("near-duplicates +contaminated", result.output)
    assert f"fingerprint {whole.fingerprint}" in result.output
    plain = built(tmp_path, tmp_path / "plain")
    assert plain.manifest["domains"][0]["near_duplicates"] is None
    assert np.isnan(describe(plain).loc["web", "heldout_shared"])


def test_a_domain_of_which_nothing_stays_is_refused(tmp_path: Path) -> None:
    text = " ".join(WORDS[:50])
    many = source(tmp_path, "web", [f"{text} {i}" for i in range(40)])
    with pytest.raises(CorpusError, match="'web': cleaning leaves no train document.*'train': "):
        staged(tmp_path, [many], Cleaning(near_duplicates=0.7))


def test_removing_without_looking_is_refused() -> None:
    with pytest.raises(CorpusError, match="remove_contaminated is set without contamination_words"):
        Cleaning(near_duplicates=0.7, remove_contaminated=True)
    for wrong in ({"near_duplicates": 0}, {"contamination_words": 2}):
        with pytest.raises(CorpusError, match="is [02], expected"):
            build_corpus([Source(path="nowhere.jsonl", domain="a")], "out", tokenizer=400, **wrong)

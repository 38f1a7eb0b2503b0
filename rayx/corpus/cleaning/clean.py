"""Stage 1, corpus: take near-duplicates and contaminated train documents out of staged text.

Held-out text is read first, evaluation-only targets before the rest, then train text, each in the
order of staging. Of two near-duplicates the later one goes: of a pair across the splits that is
the train document. Whether a document is held out was decided before and by itself, so cleaning
moves none from one split to the other, whatever documents are added.

Evaluation-only text stays whole, near-duplicates too: a benchmark is what its makers made it.
It is done in one process, so the result does not depend on how many there are. The cleaned text
appears when all of it is done; a build killed before that cleans again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayx.corpus.cleaning.contamination import Contamination, check_words
from rayx.corpus.cleaning.near_duplicates import NearDuplicates, check_threshold
from rayx.corpus.parts import staged_parts
from rayx.corpus.stage import SPLITS, Tally
from rayx.errors import CorpusError

log = logging.getLogger(__name__)

BATCH_CHARS = 1_000_000  # looked at together
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class Cleaning:
    """What is taken out of staged text.

    Args:
        near_duplicates: Least Jaccard similarity of near-duplicates, in (0, 1]; None: not looked
            for. See `rayx.corpus.cleaning.near_duplicates`.
        contamination_words: Words to an n-gram that train and held-out text must not share, in
            [3, 100]; None: not looked for. See `rayx.corpus.cleaning.contamination`.
        remove_contaminated: Remove the train documents that share one, instead of counting them.

    Raises:
        CorpusError: A value is out of range, or nothing is looked for that could be removed.
    """

    near_duplicates: float | None = None
    contamination_words: int | None = None
    remove_contaminated: bool = False

    def __post_init__(self) -> None:
        if self.near_duplicates is not None:
            check_threshold(self.near_duplicates)
        if self.contamination_words is not None:
            check_words(self.contamination_words)
        elif self.remove_contaminated:
            raise CorpusError(
                "remove_contaminated is set without contamination_words: say how many words make "
                "an n-gram, e.g. 13."
            )

    def __bool__(self) -> bool:
        return self.near_duplicates is not None or self.contamination_words is not None


@dataclass
class _Part:
    """A staged part and which of its rows stay."""

    path: Path
    domain: str
    split: str
    whole: bool  # evaluation-only: all of it stays
    stays: np.ndarray

    def texts(self, advance: Advance) -> Iterator[tuple[np.ndarray, list[str]]]:
        """Yield (row numbers, texts) of the rows that stay, some megabytes at a time."""
        column = pq.read_table(self.path, columns=["text"])["text"].combine_chunks()
        rows = np.flatnonzero(self.stays)
        sizes = pc.binary_length(column).to_numpy(zero_copy_only=False)[rows]  # type: ignore[attr-defined]
        batch = np.cumsum(sizes) // BATCH_CHARS
        for start, end in pairwise([0, *(np.flatnonzero(np.diff(batch)) + 1), len(rows)]):
            if end > start:
                yield rows[start:end], column.take(pa.array(rows[start:end])).to_pylist()
                advance(end - start, int(sizes[start:end].sum()))


def clean(
    text: Path, out: Path, tallies: Mapping[str, Tally], cleaning: Cleaning, advance: Advance
) -> None:
    """Write the staged text that stays, unless that is done, and take the rest off the tallies.

    Args:
        text: Folder of the staged text.
        out: Folder for what stays, laid out alike; parts that stay whole are links.
        tallies: What was staged; gets `near_duplicates` and `contamination`.
        cleaning: What to take out.
        advance: Called with (documents, bytes) looked at.

    Raises:
        CorpusError: Nothing stays of a domain's train or held-out text.
    """
    facts_file = out / "facts.json"
    if not out.exists():
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        facts = _clean(text, partial, tallies, cleaning, advance)
        (partial / facts_file.name).write_text(json.dumps(facts))
        os.replace(partial, out)
    for name, facts in json.loads(facts_file.read_text()).items():
        tally = tallies[name]
        tally.near_duplicates, tally.contamination = (
            facts["near_duplicates"],
            facts["contamination"],
        )
        tally.documents -= Counter(facts["removed_documents"])
        tally.bytes -= Counter(facts["removed_bytes"])
        for column, values in facts["removed_labels"].items():
            tally.labels[column] -= Counter(values)
    for name, tally in tallies.items():
        for split in SPLITS:
            if not tally.documents[split] and not (tally.evaluation_only and split == "train"):
                raise CorpusError(
                    f"Domain {name!r}: cleaning leaves no {split} document (near-duplicates "
                    f"removed: {tally.near_duplicates}; contamination: {tally.contamination}). "
                    "Raise near_duplicates, count contamination without removing, or leave the "
                    "domain out."
                )


def passes(tallies: Mapping[str, Tally], cleaning: Cleaning) -> int:
    """Return the bytes of text that `clean` looks at, those it looks at twice twice."""
    heldout, train = (sum(t.bytes[split] for t in tallies.values()) for split in SPLITS[::-1])
    near = cleaning.near_duplicates is not None
    return near * (heldout + train) + bool(cleaning.contamination_words) * (2 * heldout + train)


def _clean(
    text: Path, out: Path, tallies: Mapping[str, Tally], cleaning: Cleaning, advance: Advance
) -> dict[str, dict[str, Any]]:
    names = sorted(tallies, key=lambda name: not tallies[name].evaluation_only)
    parts = [
        _Part(Path(path), name, split, tallies[name].evaluation_only,
              np.ones(pq.read_metadata(path).num_rows, bool))
        for split in ("heldout", "train") for name in names
        for path in staged_parts(text, name, split)
    ]  # fmt: skip
    facts: dict[str, dict[str, Any]] = {
        name: {"near_duplicates": None, "contamination": None, "removed_documents": Counter(),
               "removed_bytes": Counter(), "removed_labels": {}} for name in names
    }  # fmt: skip
    if cleaning.near_duplicates is not None:
        found = _drop_near_duplicates(parts, cleaning.near_duplicates, out / "bigrams", advance)
        for name in names:
            facts[name]["near_duplicates"] = {k: found[name, k] for k in (*SPLITS, "too_short")}
    if cleaning.contamination_words is not None:
        index = Contamination(cleaning.contamination_words)
        found = _count_contaminated(parts, index, cleaning.remove_contaminated, advance)
        for name in names:
            facts[name]["contamination"] = {
                "words": cleaning.contamination_words, "removed": cleaning.remove_contaminated,
                "train_documents": found[name, "train"],
                "heldout_documents": found[name, "documents"],
                "heldout_ngrams": found[name, "ngrams"], "shared_ngrams": found[name, "shared"],
                "boilerplate_ngrams": found[name, "boilerplate"],
            }  # fmt: skip
    for part in parts:
        _write(part, out / part.path.relative_to(text), facts[part.domain])
    return facts


def _drop_near_duplicates(
    parts: list[_Part], threshold: float, scratch: Path, advance: Advance
) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    with NearDuplicates(threshold, scratch) as index:
        for part in parts:
            before = index.too_short
            for rows, texts in part.texts(advance):
                near = index.add(texts, all_stay=part.whole) >= 0
                part.stays[rows[near]] = False
                found[part.domain, part.split] += int(near.sum())
            found[part.domain, "too_short"] += index.too_short - before
    scratch.unlink()
    log.info("%d near-duplicates", sum(n for (_, what), n in found.items() if what in SPLITS))
    return found


def _count_contaminated(
    parts: list[_Part], index: Contamination, remove: bool, advance: Advance
) -> Counter[tuple[str, str]]:
    found: Counter[tuple[str, str]] = Counter()
    heldout, train = ([p for p in parts if p.split == s] for s in SPLITS[::-1])
    for part in heldout:
        for _, texts in part.texts(advance):
            index.add_heldout(texts)
    for part in train:
        for _, texts in part.texts(advance):
            index.find(texts)
    for part in heldout:
        for _, texts in part.texts(advance):
            for what, number in index.heldout_counts(texts).items():
                found[part.domain, what] += number
    concerned, first = index.train_documents(), 0
    for part in train:
        rows = np.flatnonzero(part.stays)
        mine = concerned[(concerned >= first) & (concerned < first + len(rows))] - first
        first += len(rows)
        found[part.domain, "train"] += len(mine)
        if remove:
            part.stays[rows[mine]] = False
    return found


def _write(part: _Part, file: Path, facts: dict[str, Any]) -> None:
    """Write the rows that stay, and count the others."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if part.stays.all():
        try:
            os.link(part.path, file)
        except OSError:  # a file system without links
            shutil.copyfile(part.path, file)
        return
    table = pq.read_table(part.path)
    if part.stays.any():
        pq.write_table(table.filter(pa.array(part.stays)), file, compression="zstd")
    gone = table.filter(pa.array(~part.stays))
    sizes = pc.binary_length(gone["text"]).to_pylist()  # type: ignore[attr-defined]
    facts["removed_documents"][part.split] += len(sizes)
    facts["removed_bytes"][part.split] += sum(sizes)
    if part.split == "train":
        for labels, size in zip(gone["labels"].to_pylist(), sizes, strict=True):
            for column, value in json.loads(labels or "{}").items():
                facts["removed_labels"].setdefault(column, Counter())[value] += size

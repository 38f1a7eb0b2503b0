"""Stage 1, corpus: read sources, drop duplicates, choose held-out documents, stage the text.

Two documents are the same if their texts agree after NFC normalisation and with each run of white
space as one space; case is kept, because it matters in code. The first occurrence wins, across
domains too, and evaluation-only sources come first, so no text kept for evaluation is trained on.

Whether a document is held out depends on the seed and its own hash (or its group's) and nothing
else: it never moves when others are added. Exception: of two copies in different groups the first
read decides.

Rows keep their score and labels, so that what is removed later can be taken off the counts.
Staged text lies as Parquet parts under `source-NNN/<domain>/<split>-NNNNN.parquet`. A source's
tally appears when the source is done; until then a checkpoint says how far its parts go, so a
killed build reads at most CHECKPOINT_BYTES again. The hashes of all documents are held in memory
(about 100 bytes per document, and as much again for its id).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import dataset

from rayx.corpus.documents import Document, documents
from rayx.corpus.parts import Parts, write_whole
from rayx.corpus.source import Location, Source
from rayx.errors import CorpusError

log = logging.getLogger(__name__)

CHECKPOINT_BYTES = 64_000_000  # of text; bounds the parts that are being filled too
CHECKPOINT = "checkpoint.json"  # in a source's folder: how far its parts go
TALLY = "tally.json"  # there when the source is done
SORT_MEMORY = "1GB"  # beyond it DuckDB sorts on disk
MOST_VALUES = 1_000  # of a label column
SPLITS = ("train", "heldout")
SPACES = bytes(ord(" ") if chr(b).isspace() and b < 128 else b for b in range(256))  # to translate


def document_hash(text: str) -> bytes:
    """Return 16 bytes that agree for texts equal up to NFC form and white space."""
    if text.isascii():
        normal = _one_space(text.encode())
    else:
        normal = " ".join(unicodedata.normalize("NFC", text).split()).encode()
    return blake2b(normal, digest_size=16).digest()


def _one_space(text: bytes) -> bytes:
    """Return what `" ".join(text.split())` gives for ASCII text, in a third of the time."""
    characters = np.frombuffer(text.translate(SPACES), np.uint8)
    kept = characters != ord(" ")
    kept[1:] |= kept[:-1]
    return characters[kept].tobytes().rstrip(b" ")


def part_of(digest: bytes, parts: int) -> int:
    """Return the part, in [0, parts), that a document falls to; 0 for what is none."""
    return int.from_bytes(digest[:8], "little") % parts


def is_heldout(key: bytes, share: float, seed: int) -> bool:
    """Whether the document or group with this key is held out: a hash compared with the share."""
    value = blake2b(key, digest_size=8, salt=seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(value, "little") < share * 2**64


@dataclass(slots=True)
class Tally:
    """What happened to one domain's documents."""

    evaluation_only: bool = False
    documents: Counter[str] = field(default_factory=Counter)  # by split
    bytes: Counter[str] = field(default_factory=Counter)  # by split, UTF-8
    duplicates: int = 0
    skipped: Counter[str] = field(default_factory=Counter)  # by reason
    labels: dict[str, Counter[str]] = field(default_factory=dict)  # column -> value -> train bytes
    ordered_by: str | None = None  # column that the training text is sorted by
    near_duplicates: dict[str, int] | None = None  # removed, by split, and too short to tell
    contamination: dict[str, Any] | None = None  # see `rayx.corpus.cleaning.clean`

    def count(self, labels: Mapping[str, str], num_bytes: int) -> None:
        """Count a train document's labels."""
        for column, value in labels.items():
            values = self.labels.setdefault(column, Counter())
            values[value] += num_bytes
            if len(values) > MOST_VALUES:
                raise CorpusError(
                    f"Label column {column!r} has more than {MOST_VALUES:,} values, e.g. "
                    f"{value!r:.80}; expected a label. Leave it out, or put its values into "
                    "buckets with `rayx corpus label`."
                )

    def add(self, other: Tally) -> None:
        """Add another source's part of the same domain."""
        self.evaluation_only = other.evaluation_only
        self.documents += other.documents
        self.bytes += other.bytes
        self.duplicates += other.duplicates
        self.skipped += other.skipped
        for column, values in other.labels.items():
            self.labels.setdefault(column, Counter()).update(values)
        # what has no score comes last, so one source with scores is enough
        self.ordered_by = self.ordered_by or other.ordered_by


def stage_sources(
    sources: list[tuple[Source, Location]],
    folder: Path,
    heldout_share: float,
    seed: int,
    advance: Callable[[int, int], None],
    partition: tuple[int, int] | None = None,
    then: Callable[[Path], None] | None = None,
) -> tuple[dict[str, Tally], Counter[str]]:
    """Stage every source that is not staged yet.

    Args:
        sources: Evaluation-only sources first.
        folder: Where the staged text goes.
        heldout_share: Share of documents that are held out, in (0, 0.5].
        seed: Decides which documents are held out.
        advance: Called with (documents, bytes) read.
        partition: (i, n): stage only what falls to part i of n by its hash; rows that are no
            documents are counted in part 0.
        then: Called with each part of text when it is on disk.

    Returns:
        The tally of each domain, in order of appearance, and the skips of rows without a domain.

    Raises:
        CorpusError: See `rayx.corpus.source.documents`; or a domain is trained on and
            evaluation-only at once, or differs from another only by case.
    """
    seen: set[bytes] = set()
    domains: dict[str, Tally] = {}
    homeless: Counter[str] = Counter()
    for index, (source, location) in enumerate(sources):
        mine = folder / f"source-{index:03d}"
        if not (mine / TALLY).exists():
            mine.mkdir(parents=True, exist_ok=True)
            staging = _Staging(source, mine, seen, heldout_share, seed, partition or (0, 1))
            staging.run(location, advance, then)
            _check_names(domains, staging.tallies)
            facts = _to_json(staging.tallies, staging.homeless)
            write_whole(mine / TALLY, json.dumps(facts))
        else:
            _remember(mine, seen)
        facts = json.loads((mine / TALLY).read_text(encoding="utf-8"))
        tallies, lost = _from_json(facts, source)
        homeless += lost
        for name, tally in tallies.items():
            domains.setdefault(name, Tally()).add(tally)
    return domains, homeless


def _to_json(tallies: dict[str, Tally], homeless: Counter[str]) -> dict[str, Any]:
    return {"homeless": homeless, "domains": {
        name: {"documents": t.documents, "bytes": t.bytes, "duplicates": t.duplicates,
               "skipped": t.skipped, "labels": t.labels, "ordered_by": t.ordered_by}
        for name, t in tallies.items()}}  # fmt: skip


def _from_json(facts: dict[str, Any], source: Source) -> tuple[dict[str, Tally], Counter[str]]:
    tallies = {
        name: Tally(source.evaluation_only, Counter(f["documents"]), Counter(f["bytes"]),
                    f["duplicates"], Counter(f["skipped"]),
                    {c: Counter(v) for c, v in f["labels"].items()}, f["ordered_by"])
        for name, f in facts["domains"].items()
    }  # fmt: skip
    return tallies, Counter(facts["homeless"])


def _remember(folder: Path, seen: set[bytes]) -> None:
    for part in folder.rglob("*.parquet"):
        rows = pq.read_table(part, columns=["hash", "id_hash"])
        seen.update(rows["hash"].to_pylist(), rows["id_hash"].drop_null().to_pylist())


class _Staging:
    """One source on its way into parts: what has been counted so far."""

    def __init__(
        self, source: Source, folder: Path, seen: set[bytes], share: float, seed: int,
        partition: tuple[int, int],
    ) -> None:  # fmt: skip
        self.source, self.folder, self.seen = source, folder, seen
        self.share, self.seed, self.partition = share, seed, partition
        self.tallies: dict[str, Tally] = {}
        self.homeless: Counter[str] = Counter()

    def run(
        self, location: Location, advance: Callable[[int, int], None],
        then: Callable[[Path], None] | None,
    ) -> None:  # fmt: skip
        """Stage what the checkpoint of a killed build, if there is one, does not have."""
        with ThreadPoolExecutor(1) as writer:
            parts = Parts(self.folder, writer, then)
            start = self._resume(parts)
            for tally in self.tallies.values():
                advance(tally.documents.total(), tally.bytes.total())
            unsaved = 0
            for number, document in enumerate(documents(self.source, location, start), start):
                if unsaved >= CHECKPOINT_BYTES:
                    parts.flush_all()
                    self._save(parts, number)
                    unsaved = 0
                unsaved += len(document.text)
                if num_bytes := self._add(document, parts):
                    advance(1, num_bytes)
            parts.flush_all()

    def _save(self, parts: Parts, rows: int) -> None:
        written = [[*key, count] for key, count in parts.written.items()]
        facts = _to_json(self.tallies, self.homeless) | {"rows": rows, "written": written}
        write_whole(self.folder / CHECKPOINT, json.dumps(facts))

    def _resume(self, parts: Parts) -> int:
        """Return the number of rows that are staged, as at the last checkpoint."""
        file, rows, written = self.folder / CHECKPOINT, 0, Counter[tuple[str, str]]()
        if file.exists():
            facts = json.loads(file.read_text(encoding="utf-8"))
            self.tallies, self.homeless = _from_json(facts, self.source)
            rows = facts["rows"]
            written.update({(domain, split): n for domain, split, n in facts["written"]})
            log.info("source %s: going on after %d rows", self.source.path, rows)
        parts.cut_back(written)
        _remember(self.folder, self.seen)
        return rows

    def _add(self, document: Document, parts: Parts) -> int:
        """Count a document and pass it on; return its bytes, 0 if it is not kept."""
        part, parts_in_all = self.partition
        digest = b"" if document.skip else document_hash(document.text)
        if part != part_of(digest, parts_in_all):
            return 0
        if document.domain is None:
            self.homeless[document.skip or ""] += 1
            return 0
        tally = self.tallies.get(document.domain)
        if tally is None:
            order = None if self.source.evaluation_only else self.source.score_column
            tally = Tally(self.source.evaluation_only, ordered_by=order)
            self.tallies[document.domain] = tally
        if document.skip:
            tally.skipped[document.skip] += 1
            return 0
        text = document.text
        if digest in self.seen:
            tally.duplicates += 1
            return 0
        id_hash = None if document.id is None else _id_hash(document.id)
        if id_hash in self.seen:
            tally.skipped["duplicate id"] += 1
            return 0
        self.seen.add(digest)
        if id_hash:
            self.seen.add(id_hash)
        split = split_of(document, digest, self.source.evaluation_only, self.share, self.seed)
        labels = json.dumps(document.labels) if document.labels else None
        parts.add(document.domain, split, (digest, text, document.score, labels, id_hash))
        num_bytes = len(text) if text.isascii() else len(text.encode())
        if split == "train":
            tally.count(document.labels, num_bytes)
        tally.documents[split] += 1
        tally.bytes[split] += num_bytes
        return num_bytes


def by_score(parts: list[str], folder: Path) -> list[str]:
    """Write the rows of staged parts again by falling score, unscored last, unless that is done.

    Equal scores are ordered by hash, so the order of the sources does not count.

    Returns:
        The new parts, in order.
    """
    import duckdb

    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        settings: Any = {"memory_limit": SORT_MEMORY, "temp_directory": str(partial / "spilled")}
        query = "select text from rows order by score desc nulls last, hash"
        with duckdb.connect(config=settings) as connection:
            connection.register("rows", dataset(parts))
            for number, batch in enumerate(connection.sql(query).to_arrow_reader(1_000)):
                table, part = pa.Table.from_batches([batch]), partial / f"{number:05d}.parquet"
                pq.write_table(table, part, compression="zstd")
        os.replace(partial, folder)
    return sorted(map(str, folder.glob("*.parquet")))


def _id_hash(name: str) -> bytes:
    return blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16, person=b"id").digest()


def split_of(document: Document, digest: bytes, all_out: bool, share: float, seed: int) -> str:
    """Return the split of a document with this hash: by its group's key, else by its own."""
    key = (
        b"document:" + digest
        if document.group is None
        else b"group:" + document.group.encode("utf-8", "surrogatepass")
    )
    return "heldout" if all_out or is_heldout(key, share, seed) else "train"


def _check_names(known: dict[str, Tally], new: dict[str, Tally]) -> None:
    folded = {name.casefold(): name for name in known}
    for name, tally in new.items():
        twin = folded.setdefault(name.casefold(), name)
        if twin != name:
            raise CorpusError(
                f"Domains {twin!r} and {name!r} differ only by case; give them one name or two "
                "that differ on every file system."
            )
        if name in known and known[name].evaluation_only != tally.evaluation_only:
            raise CorpusError(
                f"Domain {name!r} comes from a source with evaluation_only=True and from one "
                "without: give the held-out one a name of its own."
            )

"""Stage 1, corpus: read sources, drop duplicates, choose held-out documents, stage the text.

Two documents are the same if their texts agree after NFC normalisation and with each run of white
space as one space; case is kept, because it matters in code. The first occurrence wins, across
domains too, and evaluation-only sources come first, so no text kept for evaluation is trained on.

Whether a document is held out depends on the seed and its own hash (or its group's) and nothing
else: it never moves when others are added. Exception: of two copies in different groups the first
read decides.

Rows keep their score and labels, so that what is removed later can be taken off the counts.
Staged text lies as Parquet parts under `source-NNN/<domain>/<split>-NNNNN.parquet`; a source's
folder appears when the source is done, so a killed build repeats at most one source. The hashes
of all documents are held in memory (about 100 bytes per document).
"""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.dataset import dataset

from rayx.corpus.documents import Document, documents
from rayx.corpus.source import Location, Source
from rayx.errors import CorpusError

PART_BYTES = 8_000_000
SORT_MEMORY = "1GB"  # beyond it DuckDB sorts on disk
MOST_VALUES = 1_000  # of a label column
SCHEMA = pa.schema([("hash", pa.binary(16)), ("text", pa.large_string()), ("score", pa.float64()),
                    ("labels", pa.string()), ("id_hash", pa.binary(16))])  # fmt: skip
SPLITS = ("train", "heldout")


def document_hash(text: str) -> bytes:
    """Return 16 bytes that agree for texts equal up to NFC form and white space."""
    composed = text if text.isascii() else unicodedata.normalize("NFC", text)
    normal = " ".join(composed.split())
    return blake2b(normal.encode(), digest_size=16).digest()


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
    contamination: dict[str, Any] | None = None  # see `rayx.corpus.clean`

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


class _Parts:
    """Buffers the documents of a source and writes them as parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[tuple[str, str], list[tuple[Any, ...]]] = defaultdict(list)
        self.sizes: Counter[tuple[str, str]] = Counter()
        self.written: Counter[tuple[str, str]] = Counter()

    def add(self, domain: str, split: str, row: tuple[Any, ...]) -> None:
        """Add a row as in SCHEMA."""
        self.rows[domain, split].append(row)
        self.sizes[domain, split] += len(row[1])
        if self.sizes[domain, split] >= PART_BYTES:
            self.flush(domain, split)

    def flush(self, domain: str, split: str) -> None:
        columns = zip(*self.rows.pop((domain, split)), strict=True)
        table = pa.table(list(columns), schema=SCHEMA)
        number = self.written[domain, split]
        (self.folder / domain).mkdir(parents=True, exist_ok=True)
        pq.write_table(table, self.folder / domain / f"{split}-{number:05d}.parquet",
                       compression="zstd")  # fmt: skip
        self.written[domain, split] += 1
        self.sizes[domain, split] = 0


def stage_sources(
    sources: list[tuple[Source, Location]],
    folder: Path,
    heldout_share: float,
    seed: int,
    advance: Callable[[int, int], None],
) -> tuple[dict[str, Tally], Counter[str]]:
    """Stage every source that is not staged yet.

    Args:
        sources: Evaluation-only sources first.
        folder: Where the staged text goes.
        heldout_share: Share of documents that are held out, in (0, 0.5].
        seed: Decides which documents are held out.
        advance: Called with (documents, bytes) read.

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
        done = folder / f"source-{index:03d}"
        if not done.exists():
            partial = folder / f"source-{index:03d}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            tallies, lost = _stage(source, location, partial, seen, heldout_share, seed, advance)
            _check_names(domains, tallies)
            facts = {"homeless": lost, "domains": {
                name: {"documents": t.documents, "bytes": t.bytes, "duplicates": t.duplicates,
                       "skipped": t.skipped, "labels": t.labels, "ordered_by": t.ordered_by}
                for name, t in tallies.items()}}  # fmt: skip
            (partial / "tally.json").write_text(json.dumps(facts))
            os.replace(partial, done)
        else:
            for part in done.rglob("*.parquet"):
                rows = pq.read_table(part, columns=["hash", "id_hash"])
                seen.update(rows["hash"].to_pylist(), rows["id_hash"].drop_null().to_pylist())
        facts = json.loads((done / "tally.json").read_text())
        homeless += Counter(facts["homeless"])
        for name, f in facts["domains"].items():
            tally = Tally(source.evaluation_only, Counter(f["documents"]), Counter(f["bytes"]),
                          f["duplicates"], Counter(f["skipped"]),
                          {c: Counter(v) for c, v in f["labels"].items()},
                          f["ordered_by"])  # fmt: skip
            domains.setdefault(name, Tally()).add(tally)
    return domains, homeless


def staged_parts(folder: Path, domain: str, split: str) -> list[str]:
    """Return the staged parts of a domain's split, in reading order."""
    sources = sorted(folder.glob("source-[0-9]*[0-9]"))
    return [str(p) for s in sources for p in sorted((s / domain).glob(f"{split}-*.parquet"))]


def _stage(
    source: Source,
    location: Location,
    folder: Path,
    seen: set[bytes],
    share: float,
    seed: int,
    advance: Callable[[int, int], None],
) -> tuple[dict[str, Tally], Counter[str]]:
    parts = _Parts(folder)
    tallies: dict[str, Tally] = {}
    homeless: Counter[str] = Counter()
    for document in documents(source, location):
        if document.domain is None:
            homeless[document.skip or ""] += 1
            continue
        tally = tallies.get(document.domain)
        if tally is None:
            order = None if source.evaluation_only else source.score_column
            tally = tallies[document.domain] = Tally(source.evaluation_only, ordered_by=order)
        if document.skip:
            tally.skipped[document.skip] += 1
            continue
        digest = document_hash(document.text)
        if digest in seen:
            tally.duplicates += 1
            continue
        id_hash = None if document.id is None else _id_hash(document.id)
        if id_hash in seen:
            tally.skipped["duplicate id"] += 1
            continue
        seen.add(digest)
        if id_hash:
            seen.add(id_hash)
        split = split_of(document, digest, source.evaluation_only, share, seed)
        text = document.text
        labels = json.dumps(document.labels) if document.labels else None
        parts.add(document.domain, split, (digest, text, document.score, labels, id_hash))
        num_bytes = len(text) if text.isascii() else len(text.encode())
        if split == "train":
            tally.count(document.labels, num_bytes)
        tally.documents[split] += 1
        tally.bytes[split] += num_bytes
        advance(1, num_bytes)
    for domain, split in list(parts.rows):
        parts.flush(domain, split)
    return tallies, homeless


def by_score(parts: list[str], folder: Path) -> list[str]:
    """Write the rows of staged parts again by falling score, those without a score last.

    Equal scores are ordered by hash, so the order of the sources does not count.

    Returns:
        The new parts, in order.
    """
    import duckdb

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    settings: Any = {"memory_limit": SORT_MEMORY, "temp_directory": str(folder / "spilled")}
    query = "select text from rows order by score desc nulls last, hash"
    written: list[str] = []
    with duckdb.connect(config=settings) as connection:
        connection.register("rows", dataset(parts))
        for batch in connection.sql(query).to_arrow_reader(10_000):
            written.append(str(folder / f"{len(written):05d}.parquet"))
            pq.write_table(pa.Table.from_batches([batch]), written[-1], compression="zstd")
    return written


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

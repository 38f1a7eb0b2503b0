"""Stage 1, corpus: read sources, drop duplicates, choose held-out documents, stage the text.

Two documents are the same if their texts agree after NFC normalisation and with each run of white
space as one space; case is kept, because it matters in code. The first occurrence wins, across
domains too, and evaluation-only sources come first, so no text kept for evaluation is trained on.

Whether a document is held out depends on the seed and its own hash (or its group's) and nothing
else: it never moves when others are added. Exception: of two copies in different groups the first
read decides.

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
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rayx.corpus.source import Document, Location, Source, documents
from rayx.errors import CorpusError

PART_BYTES = 8_000_000
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

    def add(self, other: Tally) -> None:
        """Add another source's part of the same domain."""
        self.evaluation_only = other.evaluation_only
        self.documents += other.documents
        self.bytes += other.bytes
        self.duplicates += other.duplicates
        self.skipped += other.skipped


class _Parts:
    """Buffers the documents of a source and writes them as parts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[tuple[str, str], list[tuple[bytes, str]]] = defaultdict(list)
        self.sizes: Counter[tuple[str, str]] = Counter()
        self.written: Counter[tuple[str, str]] = Counter()

    def add(self, domain: str, split: str, digest: bytes, text: str) -> None:
        self.rows[domain, split].append((digest, text))
        self.sizes[domain, split] += len(text)
        if self.sizes[domain, split] >= PART_BYTES:
            self.flush(domain, split)

    def flush(self, domain: str, split: str) -> None:
        digests, texts = zip(*self.rows.pop((domain, split)), strict=True)
        table = pa.table({"hash": pa.array(digests, pa.binary(16)),
                          "text": pa.array(texts, pa.large_string())})  # fmt: skip
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
                       "skipped": t.skipped} for name, t in tallies.items()}}  # fmt: skip
            (partial / "tally.json").write_text(json.dumps(facts))
            os.replace(partial, done)
        else:
            for part in done.rglob("*.parquet"):
                seen.update(pq.read_table(part, columns=["hash"])["hash"].to_pylist())
        facts = json.loads((done / "tally.json").read_text())
        homeless += Counter(facts["homeless"])
        for name, f in facts["domains"].items():
            tally = Tally(source.evaluation_only, Counter(f["documents"]), Counter(f["bytes"]),
                          f["duplicates"], Counter(f["skipped"]))  # fmt: skip
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
            tally = tallies[document.domain] = Tally(source.evaluation_only)
        if document.skip:
            tally.skipped[document.skip] += 1
            continue
        digest = document_hash(document.text)
        if digest in seen:
            tally.duplicates += 1
            continue
        seen.add(digest)
        split = _split(document, digest, source.evaluation_only, share, seed)
        parts.add(document.domain, split, digest, document.text)
        text = document.text
        num_bytes = len(text) if text.isascii() else len(text.encode())
        tally.documents[split] += 1
        tally.bytes[split] += num_bytes
        advance(1, num_bytes)
    for domain, split in list(parts.rows):
        parts.flush(domain, split)
    return tallies, homeless


def _split(document: Document, digest: bytes, all_out: bool, share: float, seed: int) -> str:
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

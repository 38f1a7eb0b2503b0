"""Stage 1, corpus: staged text as Parquet parts, and files that are there whole or not at all."""

from __future__ import annotations

import os
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

PART_BYTES = 4_000_000  # a core encodes it in about a second
SCHEMA = pa.schema([("hash", pa.binary(16)), ("text", pa.large_string()), ("score", pa.float64()),
                    ("labels", pa.string()), ("id_hash", pa.binary(16))])  # fmt: skip


class Parts:
    """Buffers the documents of a source and writes them as parts, on a thread of its own.

    Args:
        folder: Where `<domain>/<split>-NNNNN.parquet` go.
        writer: Writes them, while the next ones are read.
        then: Called with each part when it is on disk, on that thread.
    """

    def __init__(
        self, folder: Path, writer: ThreadPoolExecutor, then: Callable[[Path], None] | None = None
    ) -> None:
        self.folder, self.writer, self.then = folder, writer, then
        self.waiting: deque[Future[None]] = deque()
        self.rows: dict[tuple[str, str], list[tuple[Any, ...]]] = defaultdict(list)
        self.sizes: Counter[tuple[str, str]] = Counter()
        self.written: Counter[tuple[str, str]] = Counter()

    def add(self, domain: str, split: str, row: tuple[Any, ...]) -> None:
        """Add a row as in SCHEMA."""
        self.rows[domain, split].append(row)
        self.sizes[domain, split] += len(row[1])
        if self.sizes[domain, split] >= PART_BYTES:
            self._flush(domain, split)

    def flush_all(self) -> None:
        """Write what is buffered, and return when all of it is on disk."""
        for domain, split in list(self.rows):
            self._flush(domain, split)
        while self.waiting:
            self.waiting.popleft().result()

    def cut_back(self, written: Counter[tuple[str, str]]) -> None:
        """Remove the parts beyond those that were written at some time."""
        self.written = written
        for part in self.folder.rglob("*.parquet"):
            split, _, number = part.stem.rpartition("-")
            if int(number) >= written[part.parent.name, split]:
                part.unlink()
                ids_file(part).unlink(missing_ok=True)

    def _flush(self, domain: str, split: str) -> None:
        columns = zip(*self.rows.pop((domain, split)), strict=True)
        table = pa.table(list(columns), schema=SCHEMA)
        part = self.folder / domain / f"{split}-{self.written[domain, split]:05d}.parquet"
        self.waiting.append(self.writer.submit(self._write, table, part))
        self.written[domain, split] += 1
        self.sizes[domain, split] = 0
        if len(self.waiting) > 1:
            self.waiting.popleft().result()

    def _write(self, table: pa.Table, part: Path) -> None:
        _write(table, part)
        if self.then is not None:
            self.then(part)


def ids_file(part: str | Path) -> Path:
    """Return where the token ids of a part are kept."""
    return Path(part).with_suffix(".ids")


def _write(table: pa.Table, part: Path) -> None:
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb") as file:
        # the fastest level: staged text is read once or twice and removed
        pq.write_table(table, file, compression="zstd", compression_level=1)
        sync(file)


def staged_parts(folder: Path, domain: str, split: str) -> list[str]:
    """Return the staged parts of a domain's split, in reading order."""
    sources = sorted(folder.glob("source-[0-9]*[0-9]"))
    return [str(p) for s in sources for p in sorted((s / domain).glob(f"{split}-*.parquet"))]


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial_file = file.with_name(file.name + ".partial")
    with open(partial_file, "w", encoding="utf-8", newline="") as out:
        out.write(text)
        sync(out)
    os.replace(partial_file, file)


def sync(out: Any) -> None:
    """Return when what was written to a file is on disk."""
    out.flush()
    os.fsync(out.fileno())

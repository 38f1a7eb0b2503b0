"""Parts: finished records as Parquet under compact/, so that tables need not decode them again.

    compact/PART.evals.parquet  compact/PART.decisions.parquet  compact/PART.runs.parquet

A part holds every row of some runs and is never changed. `runs` is written last: without it the
part is not there. Small parts are merged into larger ones, so there are few of them and each run is
rewritten a few times at most. Parts are only a cache of records/: of parts that hold the same run
(a merge was killed, two drivers compact one store) the larger is read, a damaged one is passed over
with a warning, rows whose record is gone are left out, and records that no part holds are decoded.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from rayx.record import Record

if TYPE_CHECKING:
    from rayx.store import Store

log = logging.getLogger(__name__)

T = TypeVar("T")
Changes = tuple[list[str], frozenset[str]]
ROWS: Mapping[str, Callable[[Record], list[dict[str, Any]]]] = {  # in the order of writing
    "evals": Record.eval_rows,
    "decisions": Record.decision_rows,
    "runs": lambda record: [record.run_row()],
}
BATCH_RUNS = 5_000  # records that a compaction holds in memory at a time
LARGEST_RUNS = 50_000  # of a part; merging stops there
ORPHAN_AGE = timedelta(hours=1)  # after which files of a part without `runs` are of a killed writer
# Reading a page that is damaged raises, where it would else give wrong numbers.
PARQUET = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """An open part: whose rows it holds, and the columns of its tables."""

    name: str
    run_ids: pa.ChunkedArray
    schemas: Mapping[str, pa.Schema]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A store at one moment.

    Attributes:
        parts: No two of them hold the same run.
        gone: Runs in the parts that have no record any more.
        live: The records that no part holds, failures included.
    """

    store: Store
    parts: Sequence[Part]
    gone: frozenset[str]
    live: Sequence[Record]

    def sources(self, name: str) -> tuple[ds.Dataset, pa.Table]:
        """Return a table's compacted rows, those of `gone` among them, and its live rows.

        Both have the same columns; of the compacted ones only what is asked for is read.
        """
        live = to_table([row for record in self.live for row in ROWS[name](record)])
        schema = unify([*(part.schemas[name] for part in self.parts), live.schema])
        live = pa.concat_tables([schema.empty_table(), live], promote_options="permissive")
        files = [self.store.path(f"compact/{part.name}.{name}.parquet") for part in self.parts]
        if not files:
            return ds.dataset(schema.empty_table()), live
        return ds.dataset(files, schema, PARQUET, filesystem=self.store.filesystem), live

    def table(self, name: str) -> pa.Table:
        """Return a table in memory."""
        old, live = self.sources(name)
        if not self.gone or "run_id" not in old.schema.names:
            return pa.concat_tables([old.to_table(), live])
        left = old.to_table(filter=~ds.field("run_id").isin(sorted(self.gone)))
        table = pa.concat_tables([left, live])
        # Domains that only the runs that went had.
        empty = [c for c in table.column_names if "/" in c and table[c].null_count == len(table)]
        return table.drop_columns(empty)


def to_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows as a table; a row may lack columns."""
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: pa.array([row.get(name) for row in rows]) for name in names})


def unify(schemas: Sequence[pa.Schema]) -> pa.Schema:
    """Return the schema that holds all columns, integers with floats as floats."""
    return pa.unify_schemas(schemas, promote_options="permissive")


class Parts:
    """The parts of a store; what was opened once is kept, for a part never changes."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._open: dict[str, Part] = {}
        self._listed: set[str] = set()
        self._damaged: set[str] = set()
        self._usable: tuple[list[Part], frozenset[str]] | None = None  # of the parts in `_open`
        self._looked: tuple[frozenset[str], bytes, Changes] | None = None  # the last `_changes`

    # Reading ----------------------------------------------------------------------------------

    def read(self, look: Callable[[Snapshot], T], damage: tuple[type[Exception], ...] = ()) -> T:
        """Return what `look` makes of a snapshot.

        A part that turns out damaged, or was merged into another meanwhile, is left out of a new
        snapshot, on which `look` is called again.

        Args:
            look: Reads what it needs.
            damage: What it may raise, beyond Arrow's errors, where a part cannot be read.
        """
        while True:
            snapshot = self._snapshot()
            try:
                return look(snapshot)
            except (pa.ArrowException, OSError, *damage):
                if not self._drop_unreadable(snapshot.parts):
                    raise

    def damaged_records(self) -> list[str]:
        """Return the runs whose record cannot be read, of those that no part holds."""
        new, _ = self._changes(self._usable_parts()[1])
        return sorted(set(new) - {record.run_id for record in self.store.records(new)})

    def _snapshot(self) -> Snapshot:
        parts, known = self._usable_parts()
        failed = self.store.names("failures")
        new, gone = self._changes(known)
        failed = [run_id for run_id in failed if run_id not in known or run_id in gone]
        live = self.store.records(sorted({*failed, *new}))
        return Snapshot(self.store, parts, gone, live)

    def _changes(self, known: frozenset[str]) -> Changes:
        """Return the runs on record that the parts do not know, and those they know that went."""
        place = self.store.path("records")
        local = isinstance(self.store.filesystem, fs.LocalFileSystem)
        files = []
        if local:  # twice as fast as `names` for a million
            with contextlib.suppress(FileNotFoundError):
                files = os.listdir(place)
        else:
            files = [f"{name}.json" for name in self.store.names("records")]
        # Telling a million names apart takes as long again: not where they are those of last time.
        digest = hashlib.sha256("/".join(files).encode(errors="surrogateescape")).digest()
        if self._looked is not None and self._looked[0] is known and self._looked[1] == digest:
            return self._looked[2]
        run_ids = [file[: -len(".json")] for file in files if file.endswith(".json")]
        new = [run_id for run_id in run_ids if run_id not in known]
        gone = known.difference(run_ids) if len(run_ids) - len(new) < len(known) else frozenset()
        if local:
            new = [r for r in new if r[:1] != "." and os.path.isfile(f"{place}/{r}.json")]
        self._looked = known, digest, (sorted(new), gone)
        return self._looked[2]

    def _usable_parts(self) -> tuple[list[Part], frozenset[str]]:
        """Return parts that share no run, largest first, and the runs that they hold."""
        self._listed = set(self.store.names("compact", ".runs.parquet"))
        names = self._listed - self._damaged
        if self._usable is not None and names == self._open.keys():
            return self._usable
        opened = {name: self._open.get(name) or self._opened(name) for name in sorted(names)}
        self._open = {name: part for name, part in opened.items() if part}
        parts: list[Part] = []
        known: set[str] = set()
        for part in sorted(self._open.values(), key=lambda part: (-len(part.run_ids), part.name)):
            run_ids = part.run_ids.to_pylist()
            if known.isdisjoint(run_ids) and self._fits(part, parts):
                parts.append(part)
                known.update(run_ids)
        self._usable = parts, frozenset(known)
        return self._usable

    def _opened(self, name: str) -> Part | None:
        """Return a part, or None where it went meanwhile or is damaged."""
        try:
            schemas = {}
            for table in ROWS:
                with self._file(name, table) as file:
                    schemas[table] = file.schema_arrow
            with self._file(name, "runs") as file:
                run_ids = file.read(["run_id"])["run_id"]
            if run_ids.null_count or not pa.types.is_string(run_ids.type):
                raise pa.ArrowInvalid("its run_id are not names")
            return Part(name, run_ids, schemas)
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, KeyError) as error:
            self._warn(name, error)
            return None

    def _fits(self, part: Part, others: Sequence[Part]) -> bool:
        """Whether its columns go together with those of the others; else it is damaged."""
        try:
            for table in ROWS:
                unify([part.schemas[table], *(other.schemas[table] for other in others)])
        except pa.ArrowException as error:
            self._warn(part.name, error)
            return False
        return True

    def _file(self, name: str, table: str) -> pq.ParquetFile:
        return pq.ParquetFile(
            self.store.path(f"compact/{name}.{table}.parquet"),
            filesystem=self.store.filesystem,
            page_checksum_verification=True,
        )

    def _drop_unreadable(self, parts: Sequence[Part]) -> bool:
        """Read the parts whole; pass over those that are damaged or gone from now on."""
        lost = []
        for part in parts:
            try:
                for table in ROWS:
                    with self._file(part.name, table) as file:
                        file.read()
            except FileNotFoundError:
                lost.append(part.name)
            except (pa.ArrowException, OSError) as error:
                lost.append(part.name)
                self._warn(part.name, error)
        self._open = {name: part for name, part in self._open.items() if name not in lost}
        self._usable = None
        return bool(lost)

    def _warn(self, name: str, error: Exception) -> None:
        self._damaged.add(name)
        log.warning("compact/%s is damaged, its records are read instead: %s", name, error)

    # Writing ----------------------------------------------------------------------------------

    def compact(self) -> int:
        """Write the finished records that no part holds as parts; return how many all parts hold.

        Failures stay out: a record may replace one at any time.
        """
        while True:
            parts, known = self._usable_parts()
            try:
                return self._compact(list(parts), known)
            except (pa.ArrowException, OSError):
                if not self._drop_unreadable(parts):
                    raise

    def _compact(self, parts: list[Part], known: frozenset[str]) -> int:
        spare = self._listed - {part.name for part in parts}
        new, gone = self._changes(known)
        stale = [p for p in parts if gone and not gone.isdisjoint(p.run_ids.to_pylist())]
        for start in range(0, max(len(new), min(1, len(stale))), BATCH_RUNS):
            records = self.store.records(new[start : start + BATCH_RUNS])
            records = [record for record in records if not record.failure]
            merged, size = stale, len(records)
            parts, stale = [part for part in parts if part not in merged], []
            for part in sorted(parts, key=lambda part: len(part.run_ids)):
                if len(part.run_ids) <= 2 * size and size + len(part.run_ids) <= LARGEST_RUNS:
                    merged, size = [*merged, part], size + len(part.run_ids)
            written = self._write(Snapshot(self.store, merged, gone, records))
            parts = [part for part in parts if part not in merged]
            parts += [written] if written else []
            spare |= {part.name for part in merged}
        for name in spare | self._orphans():
            self._remove(name)
        return sum(len(part.run_ids) for part in parts)

    def _write(self, snapshot: Snapshot) -> Part | None:
        """Write a part, `runs` last, and return it; None where it would hold no run."""
        tables = {name: snapshot.table(name) for name in ROWS}
        if not len(tables["runs"]):
            return None
        name = uuid.uuid4().hex[:16]
        for table, rows in tables.items():
            sink = pa.BufferOutputStream()
            pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
            self.store.write_bytes(f"compact/{name}.{table}.parquet", sink.getvalue().to_pybytes())
        schemas = {table: rows.schema for table, rows in tables.items()}
        return Part(name, tables["runs"]["run_id"], schemas)

    def _remove(self, name: str) -> None:
        """Delete a part, `runs` first, whoever else may be deleting it."""
        for table in reversed(list(ROWS)):
            try:
                self.store.remove(f"compact/{name}.{table}.parquet")
            except FileNotFoundError:
                continue
        self._damaged.discard(name)

    def _orphans(self) -> set[str]:
        """Return the parts that a writer left half-written long ago."""
        whole = self.store.names("compact", ".runs.parquet")
        begun = set(self.store.names("compact", ".evals.parquet")).difference(whole)
        last = datetime.now(timezone.utc) - ORPHAN_AGE
        paths = [self.store.path(f"compact/{name}.evals.parquet") for name in sorted(begun)]
        infos: list[fs.FileInfo] = self.store.filesystem.get_file_info(paths)
        return {
            info.base_name.partition(".")[0]
            for info in infos
            if info.mtime is not None and info.mtime < last
        }

"""Stage 1, corpus: documents -> documents with labels, as Parquet that any Source reads.

Three steps: read (documents that a licence list denies are dropped and counted), rate (each rater
adds a column, later ones see earlier columns), write (scores become buckets). All that is not
finished lies beside the output in `OUT.partial`, which becomes OUT when everything is there: a
killed labelling that is started again with the same parameters goes on, at most one part of
`PART_DOCUMENTS` a worker is rated again, and a folder that is there is whole.

The map runs on Ray Data for large inputs, else in this process. Raters see the same slices of the
same documents either way, so the columns are the same on any number of workers.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from rayx.corpus.documents import Document, documents
from rayx.corpus.labels.buckets import Buckets
from rayx.corpus.labels.counts import Counts
from rayx.corpus.labels.licences import Licences
from rayx.corpus.labels.rate import BYTES, cast, rate_parts, rate_table, types_of, write_part
from rayx.corpus.labels.raters import (
    DOMAIN,
    GROUP,
    ID,
    KEPT,
    TEXT,
    LicenceRater,
    Rater,
    check_names,
)
from rayx.corpus.parts import write_whole
from rayx.corpus.progress import progress
from rayx.corpus.source import Location, Source, locate
from rayx.errors import CorpusError

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
FACTS = ".labels.json"  # hidden, so that a Source that reads the folder does not take it for text
PART_BYTES, PART_DOCUMENTS = 8_000_000, 1_000  # of a part that is rated as one
FILE_BYTES = 64_000_000  # of text in an output file
RAY_BYTES = 64_000_000  # below this much text, starting Ray takes longer than most raters
LICENCE_TIER = "licence_tier"


@dataclass(frozen=True)
class Labelled:
    """A finished labelling.

    `counts` has for each label column value -> [documents, bytes of text], largest first;
    `numbers` for each column of numbers its documents, missing, mean, min and max; `skipped` and
    `denied` documents by reason.
    """

    folder: str
    documents: int
    bytes: int
    counts: dict[str, dict[str, list[int]]]
    numbers: dict[str, dict[str, float | None]]
    skipped: dict[str, int]
    denied: dict[str, int]
    facts: dict[str, Any]  # of raters and buckets


def label_corpus(
    sources: Sequence[Source],
    out: str | Path,
    raters: Sequence[Rater] = (),
    *,
    buckets: Sequence[Buckets] = (),
    licence_column: str | None = None,
    licences: Licences | None = None,
    parallel: bool | None = None,
) -> Labelled:
    """Label documents, or go on with an interrupted labelling of them.

    Args:
        sources: Where the text comes from; their label, score, id and group columns are kept.
        out: Folder that is made, local.
        raters: In the order in which they are applied.
        buckets: Of columns that are read or rated.
        licence_column: A label column with licences; adds `licence_tier`.
        licences: Which of them to keep; None keeps all.
        parallel: Rate on Ray Data; None does so for more than 64 MB of text.

    Returns:
        What was labelled. If `out` already holds this labelling, it is returned as it is.

    Raises:
        CorpusError: A parameter or source cannot be used, a rater fails, `out` holds something
            else, or another labelling writes there.
    """
    if not sources:
        raise CorpusError("There are no sources; give at least one Source.")
    if licences is not None and licence_column is None:
        raise CorpusError("Licences need licence_column, the column that holds them.")
    if "://" in str(out):
        raise CorpusError(f"Output {str(out)!r} is not local; label into a folder and copy it.")
    if licence_column is not None:
        raters = [LicenceRater(LICENCE_TIER, licence_column), *raters]
    out = Path(out).expanduser().absolute()
    located = [(source, locate(source)) for source in sources]
    schema = _schema(sources)
    if licence_column is not None and licence_column not in schema.names:
        raise CorpusError(
            f"licence_column {licence_column!r} is not read; columns are {', '.join(schema.names)}."
        )
    check_names(raters, schema.names)
    columns = [*schema.names, *(rater.name for rater in raters)]
    for number, bucket in enumerate(buckets):
        bucket.check(columns, [earlier.name for earlier in buckets[:number]])
    facts = {
        "raters": [rater.facts for rater in raters], "buckets": [asdict(b) for b in buckets],
        "licences": None if licences is None else asdict(licences), "licence": licence_column,
    }  # fmt: skip
    key = _key(located, facts)
    work = out.with_name(out.name + ".partial")
    work.parent.mkdir(parents=True, exist_ok=True)
    lock_file = work.with_suffix(".lock")
    try:
        lock = FileLock(lock_file).acquire(timeout=0)
    except Timeout:
        raise CorpusError(f"Another labelling is writing to {str(out)!r}; wait for it.") from None
    with lock:
        if (done := _finished(out, key)) is not None:
            shutil.rmtree(work, ignore_errors=True)
            lock_file.unlink()
            return done
        _begin(work, key, str(out))
        _try_out(located, schema, raters)
        keep = _Keep(licence_column, licences)
        with progress("reading") as advance:
            read = _stage(located, schema, work, keep, advance)
        parts = [str(p) for p in sorted((work / "text").glob("part-*.parquet"))]
        on_ray = read["bytes"] > _parallel_bytes(raters) if parallel is None else parallel
        with progress("rating", read["bytes"]) as advance:
            rate_parts(parts, work / "rated", raters, on_ray, advance)
        found = _write(parts, work, raters, buckets)
        facts |= {"format_version": FORMAT_VERSION, "key": key}
        labelled = Labelled(str(out), facts=facts, **read, **found)
        write_whole(work / "out" / FACTS, json.dumps(asdict(labelled), indent=1))
        os.replace(work / "out", out)
        shutil.rmtree(work)
        lock_file.unlink()
    return labelled


def _parallel_bytes(raters: Sequence[Rater]) -> float:
    """Return above how much text Ray is worth its start; infinite if a rater wants one process."""
    asked = [float(getattr(rater, "parallel_bytes", RAY_BYTES)) for rater in raters]
    return math.inf if math.inf in asked else min([RAY_BYTES, *asked])


def _key(located: list[tuple[Source, Location]], facts: dict[str, Any]) -> str:
    """Hash of all that decides the result; a file counts by path, size and time."""
    files = [[file, *stamp] for _, location in located
             for file, stamp in zip(location.files, location.stamps, strict=False)]  # fmt: skip
    given = [FORMAT_VERSION, [asdict(source) for source, _ in located], files, facts]
    return hashlib.sha256(json.dumps(given).encode()).hexdigest()


def _schema(sources: Sequence[Source]) -> pa.Schema:
    """Return the columns of the documents that these sources give."""
    fields = [pa.field(TEXT, pa.large_string()), pa.field(DOMAIN, pa.string())]
    fields += [pa.field(ID, pa.string())] * any(source.id_column for source in sources)
    fields += [pa.field(GROUP, pa.string())] * any(source.group_column for source in sources)
    scores = dict.fromkeys(source.score_column for source in sources if source.score_column)
    labels = dict.fromkeys(column for source in sources for column in source.axes)
    for column in labels:
        if column == TEXT or column in scores:
            raise CorpusError(f"Label column {column!r} is a column of text or of scores, too.")
    fields += [pa.field(column, pa.string()) for column in labels if column not in KEPT]
    fields += [pa.field(str(column), pa.float64()) for column in scores]
    return pa.schema(fields)


def _finished(out: Path, key: str) -> Labelled | None:
    if not out.exists():
        return None
    try:
        labelled = Labelled(**json.loads((out / FACTS).read_text(encoding="utf-8")))
        if labelled.facts["key"] == key:
            return labelled
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise CorpusError(
        f"Output {str(out)!r} exists and is not this labelling (other sources, raters or versions "
        "of them). Name a new folder, or delete that one to replace it."
    )


def _begin(work: Path, key: str, out: str) -> None:
    file = work / "key"
    if work.exists() and (not file.exists() or file.read_text(encoding="utf-8") != key):
        log.warning("%s: sources or parameters have changed; the labelling starts anew", out)
        shutil.rmtree(work)
    elif work.exists():
        log.info("%s: going on with an interrupted labelling", out)
    (work / "rated").mkdir(parents=True, exist_ok=True)
    write_whole(file, key)


def _try_out(
    located: list[tuple[Source, Location]], schema: pa.Schema, raters: Sequence[Rater]
) -> None:
    """Rate a few documents, so that a rater that cannot work is known before the long part."""
    for source, location in located:
        first = list(islice((d for d in documents(source, location) if not d.skip), 3))
        if first and raters:
            rate_table(_table(source, first, schema), raters, lambda documents, num_bytes: None)


def _table(source: Source, rows: Sequence[Document], schema: pa.Schema) -> pa.Table:
    def values(column: str) -> list[Any]:
        if column in (TEXT, DOMAIN, ID, GROUP):
            return [getattr(row, column) for row in rows]
        if column == source.score_column:
            return [row.score for row in rows]
        return [row.labels.get(column) for row in rows]

    arrays = [pa.array(values(field.name), field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


@dataclass(frozen=True)
class _Keep:
    """Which documents are kept, by their licence."""

    column: str | None
    licences: Licences | None

    def refusal(self, document: Document) -> str | None:
        if self.licences is None or self.column is None:
            return None
        return self.licences.reason(document.labels.get(self.column))


def _stage(
    located: list[tuple[Source, Location]],
    schema: pa.Schema,
    work: Path,
    keep: _Keep,
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write what is read as parts, unless that is done; return documents, bytes and losses."""
    text = work / "text"
    if not text.exists():
        partial = work / "text.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        facts: dict[str, Any] = {"documents": 0, "bytes": 0}
        skipped: Counter[str] = Counter()
        denied: Counter[str] = Counter()
        numbers = iter(range(10**9))
        for source, location in located:
            rows: list[Document] = []
            size = 0
            for document in documents(source, location):
                if document.skip:
                    skipped[document.skip] += 1
                    continue
                if (refusal := keep.refusal(document)) is not None:
                    denied[refusal] += 1
                    continue
                rows.append(document)
                num_bytes = len(document.text.encode())
                size += num_bytes
                facts["documents"] += 1
                facts["bytes"] += num_bytes
                advance(1, num_bytes)
                if size >= PART_BYTES or len(rows) >= PART_DOCUMENTS:
                    write_part(partial, next(numbers), _table(source, rows, schema))
                    rows, size = [], 0
            if rows:
                write_part(partial, next(numbers), _table(source, rows, schema))
        if not facts["documents"]:
            lost = {**skipped, **denied}
            listed = ", ".join(f"{n} {reason}" for reason, n in lost.items()) or "no rows"
            raise CorpusError(f"No document is left to label ({listed}).")
        facts |= {"skipped": dict(skipped), "denied": dict(denied)}
        write_whole(partial / "facts.json", json.dumps(facts))
        os.replace(partial, text)
    return json.loads((text / "facts.json").read_text(encoding="utf-8"))


def _write(
    parts: list[str], work: Path, raters: Sequence[Rater], buckets: Sequence[Buckets]
) -> dict[str, Any]:
    """Join text and columns, add buckets and count; return `counts` and `numbers`."""
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    files = [str(work / "rated" / Path(part).name) for part in parts]
    found_types = types_of([pq.read_schema(file) for file in files], raters)
    nothing = pa.types.is_null
    types = {n: pa.string() if nothing(kind) else kind for n, kind in found_types.items()}
    edges = [bucket.find_edges(files, work) for bucket in buckets]
    tally = Counts()
    held: list[pa.Table] = []
    size = written = 0

    def flush() -> None:
        nonlocal held, size, written
        if held:
            write_part(out, written, pa.concat_tables(held))
            held, size, written = [], 0, written + 1

    for part, file in zip(parts, files, strict=True):
        columns = cast(pq.read_table(file), types)
        for bucket, found in zip(buckets, edges, strict=True):
            columns = columns.append_column(bucket.name, bucket.assign(columns, found))
        tally.add(columns)
        text = pq.read_table(part, columns=[TEXT])[TEXT]
        size += sum(columns[BYTES].to_pylist())
        held.append(columns.drop_columns([BYTES]).add_column(0, TEXT, text))
        if size >= FILE_BYTES:
            flush()
    flush()
    return {"counts": tally.labels, "numbers": tally.numbers}

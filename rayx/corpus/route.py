"""Stage 1, corpus: the files of a source dealt out to parts by the hash of each document.

For a corpus that is too large for one build: copies of a document fall to the same part, so parts
that are built one by one and joined (`join_corpora`) hold each document once. This is the shuffle:
all text is read once and written once. Each file is a task, on Ray where this process is connected
to it; what is done stays when it is killed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayx.corpus.documents import INVALID, reason_to_skip
from rayx.corpus.progress import progress
from rayx.corpus.rows import rows
from rayx.corpus.source import Location, Source, locate
from rayx.corpus.stage import document_hash, part_of
from rayx.errors import CorpusError
from rayx.files import Files
from rayx.remote import locate as locate_url

FLUSH_BYTES = 64_000_000  # of text in memory
MOST_PARTS = 4096
MOST_WAITING = 1000  # tasks that Ray is given ahead


def route(source: Source, out: str | Path, parts: int) -> list[Source]:
    """Write a source's rows to `out/part-NNNN/*.parquet` by the hash of their text.

    Rows without text go to part 0. Only the columns that the source names are kept, all but the
    score as text.

    Args:
        source: Files on this machine or an object store.
        out: Folder, or s3:// or gs:// URL; of the same source and number of parts if not empty.
        parts: How many, in [1, 4096].

    Returns:
        A source for each part.

    Raises:
        CorpusError: See `rayx.corpus.rows.rows`; or a hub name, a column that is not what it
            should be, or `out` holds another routing.
    """
    if not 1 <= parts <= MOST_PARTS:
        raise CorpusError(f"parts is {parts}, expected 1 to {MOST_PARTS}.")
    location = locate(source)
    if not location.stamps:
        raise CorpusError(f"Source {source.path!r} has no files to route; download it first.")
    out = str(out) if "://" in str(out) else str(Path(out).expanduser().absolute())
    files = Files(*locate_url(out), out)
    facts = {"files": list(location.files), "parts": parts, "columns": list(source.columns)}
    if files.exists("routing.json") and files.read_json("routing.json") != facts:
        raise CorpusError(f"{out} holds what was routed from other files or to other parts.")
    files.write_bytes("routing.json", json.dumps(facts).encode())
    done = set(files.names("done"))
    left = [k for k in range(len(location.files)) if f"{k:06d}" not in done]
    with progress("routing") as advance:
        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            _on_ray(source, location, out, parts, left, advance)
        else:
            for k in left:
                advance(*_route_file(source, location, out, parts, k))
    return [replace(source, path=_below(out, f"part-{k:04d}"), format="parquet")
            for k in range(parts)]  # fmt: skip


def _below(out: str, name: str) -> str:
    path, mark, query = out.partition("?") if "://" in out else (out, "", "")
    return f"{path}/{name}{mark}{query}"


def _route_file(
    source: Source, location: Location, out: str, parts: int, number: int
) -> tuple[int, int]:
    """Route one file; return its rows and bytes of text."""
    one = Location(location.format, (location.files[number],), (location.stamps[number],))
    filesystem, root = locate_url(out, in_parts=True)
    buffers: list[list[dict[str, Any]]] = [[] for _ in range(parts)]
    documents = num_bytes = unsaved = flushed = 0

    def flush() -> None:
        nonlocal flushed, unsaved
        for part, found in enumerate(buffers):
            if not (found or (part == flushed == 0 and number == 0)):
                continue
            folder = f"{root}/part-{part:04d}"
            filesystem.create_dir(folder)
            with filesystem.open_output_stream(
                f"{folder}/{number:06d}-{flushed:04d}.parquet"
            ) as to:
                pq.write_table(_table(found, source), to, compression="zstd", compression_level=1)
            found.clear()
        flushed, unsaved = flushed + 1, 0

    for row in rows(source, one):
        text = row.get(source.text_column)
        reason = reason_to_skip(text)
        digest = b"" if reason else document_hash(str(text))
        text = INVALID if reason == "invalid UTF-8" else text if isinstance(text, str) else None
        buffers[part_of(digest, parts)].append(row | {source.text_column: text})
        size = len(text or "")
        documents, num_bytes, unsaved = documents + 1, num_bytes + size, unsaved + size
        if unsaved >= FLUSH_BYTES:
            flush()
    flush()
    Files(filesystem, root, out).write_bytes(f"done/{number:06d}.json", b"{}")
    return documents, num_bytes


def _table(found: list[dict[str, Any]], source: Source) -> pa.Table:
    columns = {}
    for name in source.columns:
        values = [row.get(name) for row in found]
        try:
            if name == source.text_column:
                columns[name] = pa.array(values, pa.large_string())
            elif name == source.score_column:
                columns[name] = pa.array(values, pa.float64())
            else:
                columns[name] = pa.array([None if v is None else str(v) for v in values],
                                         pa.string())  # fmt: skip
        except (pa.ArrowException, UnicodeEncodeError) as error:
            raise CorpusError(
                f"Source {source.path!r}, column {name!r} cannot be routed: {error}"
            ) from error
    return pa.table(columns)


def _on_ray(
    source: Source, location: Location, out: str, parts: int, left: list[int],
    advance: Callable[[int, int], None],
) -> None:  # fmt: skip
    import ray

    task: Any = ray.remote(num_cpus=1)(_route_file)
    shared = [ray.put(value) for value in (source, location)]
    waiting: list[Any] = []
    for k in left:
        waiting.append(task.remote(*shared, out, parts, k))
        if len(waiting) >= MOST_WAITING:
            done, waiting = ray.wait(waiting)
            advance(*ray.get(done[0]))
    for done in waiting:
        advance(*ray.get(done))

"""Stage 1, corpus: the documents of a source.

Local JSONL and text are read here, never more than MOST_BYTES at once however much a compressed
file expands to; the `datasets` library reads the rest. Whatever cannot be a document is counted by
its reason, never dropped silently; whatever would spoil the whole source is a CorpusError before
any work is done.

JSONL is parsed line by line, so that a broken line is named by file and number and a value of an
unexpected type spoils only its own document. Invalid UTF-8 decodes to U+FFFD, so a document that
holds U+FFFD is skipped as invalid.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, SupportsFloat

from rayx.corpus.source import Location, Source, check_columns, check_domain_name
from rayx.errors import CorpusError

MOST_BYTES = 100_000_000  # of a document, decompressed
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what compressed files raise
CROSSED = "."  # between the values that name a domain of several columns
UNKNOWN = "unknown"  # the value of a label that a document lacks


@dataclass(frozen=True, slots=True)
class Document:
    """One document, or the reason (`skip`) why a row is none; domain None if it names none."""

    domain: str | None
    text: str
    group: str | None
    skip: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    score: float | None = None
    id: str | None = None


def documents(source: Source, location: Location) -> Iterator[Document]:
    """Yield every row of a source as a document or a counted skip, in file order.

    Raises:
        CorpusError: Broken JSONL line, unreadable file or hub dataset, missing column,
            impossible domain name.
    """
    rows = _json_rows(source, location) if location.format == "jsonl" else _rows(source, location)
    crossed: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(rows):
        if number == 0:
            check_columns(source, f"Source {source.path!r}", list(row))
        domain = source.domain
        if source.domain_column is not None:
            missing = [column for column in source.domain_column if row.get(column) is None]
            if missing:
                yield Document(None, "", None, f"null {missing[0]}")
                continue
            values = tuple(str(row[column]) for column in source.domain_column)
            domain = CROSSED.join(values)
            if domain not in crossed:
                crossed[check_domain_name(domain)] = values
            elif crossed[domain] != values:
                raise CorpusError(
                    f"Source {source.path!r}: {crossed[domain]} and {values} of "
                    f"{', '.join(source.domain_column)} both make the domain {domain!r}. Write the "
                    f"labels without {CROSSED!r}."
                )
        text, optional = row.get(source.text_column), _optional(source, row)
        skip = _reason_to_skip(text)
        yield Document(domain, "" if skip else str(text), optional[0], skip, *optional[1:])


def _optional(
    source: Source, row: dict[str, Any]
) -> tuple[str | None, dict[str, str], float | None, str | None]:
    """Return a row's group, labels, score and id."""
    group = row.get(source.group_column) if source.group_column else None
    name = row.get(source.id_column) if source.id_column else None
    score = row.get(source.score_column) if source.score_column else None
    if score is not None:
        if isinstance(score, (bool, str)) or not isinstance(score, SupportsFloat):
            raise CorpusError(
                f"Source {source.path!r}, column {source.score_column!r} has {score!r:.80}; "
                "expected numbers, by which documents are sorted."
            )
        score = float(score) if math.isfinite(score) else None
    labels = {c: UNKNOWN if row.get(c) is None else str(row[c]) for c in source.axes}
    return (None if group is None else str(group), labels, score,
            None if name is None else str(name))  # fmt: skip


def _reason_to_skip(text: Any) -> str | None:
    if text is None:
        return "null text"
    if not isinstance(text, str):
        return "text is not a string"
    if not text or text.isspace():
        return "empty"
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape
        return "invalid UTF-8"
    return "invalid UTF-8" if "\ufffd" in text else None


def _load(source: Source, files: tuple[str, ...], builder: str, **options: Any) -> Any:
    from datasets import load_dataset

    # datasets 5.2 passes `encoding` on to the http client, so text cannot be streamed from a URL
    stream = "://" not in files[0] or (source.streaming and builder == "parquet")
    options |= {"data_files": list(files), "split": "train", "streaming": stream}
    return load_dataset(builder, **options)


def _rows(source: Source, location: Location) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        if location.format == "txt" and location.local:
            for file in location.files:
                with _open(file) as stream:
                    text = _bounded(stream.read(MOST_BYTES + 1), file).decode("utf-8", "replace")
                yield {"text": text.replace("\r\n", "\n").replace("\r", "\n")}
            return
        if location.format == "txt":
            options = {"sample_by": "document", "encoding_errors": "replace"}
            yield from _load(source, location.files, "text", **options)
            return
        if location.format == "hub":
            data: Any = load_dataset(source.path, split=source.split, streaming=source.streaming)
        else:
            data = _load(source, location.files, "parquet")
        if data.column_names:
            check_columns(source, f"Source {source.path!r}", list(data.column_names))
            data = data.select_columns(sorted(source.columns))
        yield from data
    except (*BROKEN, ValueError, pa.ArrowException, DatasetsError) as error:
        what = "is no local file or folder, and cannot be read as a hub dataset"
        if location.format != "hub":
            what = f"cannot be read as {location.format} (files: {', '.join(location.files[:3])})"
        raise CorpusError(f"Source {source.path!r} {what}: {error}") from error


def _json_rows(source: Source, location: Location) -> Iterator[dict[str, Any]]:
    from datasets.exceptions import DatasetsError

    for file in location.files:
        try:
            if location.local:
                lines = _lines(file)
            else:
                rows = _load(source, (file,), "text", encoding_errors="replace")
                lines = (row["text"] for row in rows)
            for number, line in enumerate(lines, 1):
                if line and not line.isspace():
                    yield _json_row(file, number, line)
        except (*BROKEN, DatasetsError) as error:
            raise CorpusError(f"Source file {file!r} cannot be read: {error}") from error


def _open(file: str) -> Any:
    """Open a local file for reading bytes, decompressed by its suffix."""
    import pyarrow as pa

    def zstd(file: str) -> Any:
        return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(file), "zstd"))  # pyright: ignore[reportArgumentType]

    openers: dict[str, Callable[[str], Any]] = {
        ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd,
    }  # fmt: skip
    return openers.get(Path(file).suffix.lower(), lambda file: open(file, "rb"))(file)


def _lines(file: str) -> Iterator[str]:
    with _open(file) as stream:
        while line := stream.readline(MOST_BYTES + 1):
            yield _bounded(line, file).decode("utf-8", "replace")


def _bounded(data: bytes, file: str) -> bytes:
    if len(data) > MOST_BYTES:
        raise CorpusError(
            f"Source file {file!r} has a document of more than {MOST_BYTES:,} bytes; expected less "
            "than that. Cut it into pieces, or see whether the file is what it should be."
        )
    return data


def _json_row(file: str, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(
            f"{file!r}, line {number}: not JSON ({error}); JSONL has one object per line."
        ) from None
    if not isinstance(row, dict):
        raise CorpusError(
            f"{file!r}, line {number}: a {type(row).__name__}, expected one object per line."
        )
    return row

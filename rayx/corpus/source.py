"""Stage 1, corpus: where the text comes from, and the documents in it.

A source is files (Parquet, JSONL, plain text; local or remote) or a Hugging Face hub name. Local
JSONL and text are read here, never more than MOST_BYTES at once however much a compressed file
expands to; the `datasets` library reads the rest. A source names one domain, or the column that
holds each document's domain. Whatever cannot be a document is counted by its reason, never dropped
silently; whatever would spoil the whole source is a CorpusError before any work is done.

JSONL is parsed here line by line, so that a broken line is named by file and number and a
value of an unexpected type spoils only its own document. Invalid UTF-8 decodes to U+FFFD, so a
document that holds U+FFFD is skipped as invalid.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import logging
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePosixPath
from typing import Any

from rayx.errors import CorpusError, did_you_mean

log = logging.getLogger(__name__)

SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "txt"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
MOST_BYTES = 100_000_000  # of a document, decompressed
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what compressed files raise
FORMATS = ("parquet", "jsonl", "json", "txt", "hub")


def check_domain_name(name: str) -> str:
    """Return the name, which must also serve as a folder name and a column name.

    Raises:
        CorpusError: The name is empty, too long, or has characters that a folder cannot have.
    """
    if not name.strip() or name != name.strip():
        raise CorpusError(f"Domain name {name!r} is empty or starts or ends with white space.")
    bad = [c for c in name if c in '/\\:*?"<>|' or not c.isprintable()]
    if bad or name.startswith(".") or len(name) > 100:
        raise CorpusError(
            f"Domain name {name!r} cannot be a folder name: use at most 100 printable characters, "
            "no path separator, control character or leading dot."
        )
    return name


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Text for one domain (`domain`) or for the domains named in a column (`domain_column`).

    Args:
        path: Local file, folder or glob, URL, or Hugging Face hub name.
        domain: Name of the domain that all documents belong to.
        domain_column: Column with each document's domain, instead of `domain`.
        text_column: Column with the text.
        group_column: Column whose value keeps documents together when the held-out set is chosen
            (pieces of one book go the same way). None: each document by itself.
        format: "parquet", "jsonl" ("json"), "txt" or "hub"; None takes it from the suffix. One
            text file is one document.
        split: Split of a hub dataset.
        streaming: Stream a hub dataset or a Parquet URL instead of keeping a copy in the cache
            of `datasets`. Local files are always streamed, JSONL and text at a URL never.
        evaluation_only: All documents are held out: a target that no mixture can train on.

    Raises:
        CorpusError: Neither or both of domain and domain_column, an impossible name or format.
    """

    path: str
    domain: str | None = None
    domain_column: str | None = None
    text_column: str = "text"
    group_column: str | None = None
    format: str | None = None
    split: str = "train"
    streaming: bool = False
    evaluation_only: bool = False

    def __post_init__(self) -> None:
        if not str(self.path):
            raise CorpusError("Source has an empty path; name a file, folder, URL or hub dataset.")
        object.__setattr__(self, "path", str(self.path))
        if (self.domain is None) == (self.domain_column is None):
            raise CorpusError(
                f"Source {self.path!r} needs exactly one of domain (a name for all of it) and "
                f"domain_column, got {self.domain!r} and {self.domain_column!r}."
            )
        if self.domain is not None:
            check_domain_name(self.domain)
        if self.format is not None and self.format not in FORMATS:
            raise CorpusError(
                f"Source {self.path!r} has format {self.format!r}; known are {', '.join(FORMATS)}."
                + did_you_mean(self.format, FORMATS)
            )


@dataclass(frozen=True, slots=True)
class Document:
    """One document, or the reason (`skip`) why a row is none; domain None if it names none."""

    domain: str | None
    text: str
    group: str | None
    skip: str | None = None


@dataclass(frozen=True, slots=True)
class Location:
    """What a source's path turned out to be: a format and its files (none for the hub)."""

    format: str
    files: tuple[str, ...]
    local: bool


def _format_of(name: str) -> str | None:
    suffixes = [s.lower() for s in PurePosixPath(name.split("?")[0]).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def locate(source: Source) -> Location:
    """Find a source's files and format; reads no more than names, sizes and Parquet footers.

    Raises:
        CorpusError: Missing or empty file, unknown suffix, mixed formats, not a Parquet file.
    """
    path, asked = source.path, "jsonl" if source.format == "json" else source.format
    if asked == "hub":
        return Location("hub", (), False)
    if "://" in path:
        form = asked or _format_of(path)
        if form is None:
            raise _unknown_suffix(path)
        return Location(form, (path,), False)
    local = Path(path).expanduser()
    if has_magic(path) and not local.exists():
        files = sorted(f for f in glob(str(local), recursive=True) if Path(f).is_file())
    elif local.is_dir():
        inside = [f for f in local.rglob("*") if f.is_file() and not f.name.startswith(".")]
        files = sorted(str(f) for f in inside if asked or _format_of(f.name))
        if len(inside) > len(files):
            log.warning("%s: %d files of other suffixes ignored", path, len(inside) - len(files))
    elif local.is_file():
        files = [str(local)]
    elif asked or _format_of(path) or path[0] in "/.~" or path.count("/") > 1:
        near = [f.name for f in local.parent.iterdir()] if local.parent.is_dir() else []
        raise CorpusError(f"Source file {path!r} does not exist.{did_you_mean(local.name, near)}")
    else:
        return Location("hub", (), False)
    if not files:
        raise CorpusError(f"Source {path!r} has no file of a known suffix ({', '.join(SUFFIXES)}).")
    found = {asked or _format_of(f) for f in files}
    if None in found:
        raise _unknown_suffix(next(f for f in files if _format_of(f) is None))
    if len(found) > 1:
        raise CorpusError(
            f"Source {path!r} mixes {sorted(map(str, found))}: make them two sources."
        )
    location = Location(str(found.pop()), tuple(files), True)
    for file in files:
        # an empty text file among others is an empty document, counted like any other
        if not Path(file).stat().st_size and (location.format != "txt" or len(files) == 1):
            raise CorpusError(f"Source file {file!r} is empty (0 bytes).")
        if location.format == "parquet":
            _check_parquet(source, file)
    return location


def _unknown_suffix(file: str) -> CorpusError:
    return CorpusError(
        f"Source file {file!r} has an unknown suffix; known are {', '.join(SUFFIXES)} "
        f"(also with {', '.join(COMPRESSED)}). Name the format with format=."
    )


def _check_parquet(source: Source, file: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"Source file {file!r} is not readable as Parquet: {error}") from None
    if not meta.num_rows:
        raise CorpusError(f"Source file {file!r} is empty (a Parquet file with 0 rows).")
    _check_columns(source, file, meta.schema.to_arrow_schema().names)


def _check_columns(source: Source, where: str, columns: list[str]) -> None:
    for column in (source.text_column, source.domain_column, source.group_column):
        if column is not None and column not in columns:
            raise CorpusError(
                f"{where} has no column {column!r}; columns found: {', '.join(columns)}."
                + did_you_mean(column, columns)
            )


def documents(source: Source, location: Location) -> Iterator[Document]:
    """Yield every row of a source as a document or a counted skip, in file order.

    Raises:
        CorpusError: Broken JSONL line, unreadable file or hub dataset, missing column,
            impossible domain name.
    """
    rows = _json_rows(source, location) if location.format == "jsonl" else _rows(source, location)
    for number, row in enumerate(rows):
        if number == 0:
            _check_columns(source, f"Source {source.path!r}", list(row))
        domain = source.domain
        if source.domain_column is not None:
            value = row.get(source.domain_column)
            if value is None:
                yield Document(None, "", None, "null domain")
                continue
            domain = check_domain_name(str(value))
        text, group = row.get(source.text_column), None
        if source.group_column is not None and row.get(source.group_column) is not None:
            group = str(row[source.group_column])
        skip = _reason_to_skip(text)
        yield Document(domain, "" if skip else str(text), group, skip)


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

    columns = (source.text_column, source.domain_column, source.group_column)
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
            _check_columns(source, f"Source {source.path!r}", list(data.column_names))
            data = data.select_columns(sorted({c for c in columns if c is not None}))
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

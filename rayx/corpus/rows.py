"""Stage 1, corpus: the rows of a source's files, local or on an object store, in bounded memory.

JSONL is parsed line by line, so that a broken line is named by file and number and a value of an
unexpected type spoils only its own document. Never more than MOST_BYTES of a document are held,
however much a compressed file or a Parquet dictionary expands to. Files on s3:// and gs:// are read
in ranges with patience (`rayx.remote`); the `datasets` library reads the hub and other URLs. A file
that changes or vanishes while it is read ends the build with its name.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

from rayx.corpus.source import Location, Source, Stamp, check_columns, is_object, stamp
from rayx.errors import CorpusError, RayxError, UnreachableError
from rayx.remote import locate as locate_url
from rayx.remote import reach

MOST_BYTES = 100_000_000  # of a document, decompressed
RANGE_BYTES = 8_000_000  # of one request to an object store
BATCH_BYTES = 64_000_000  # of Parquet rows at once
BATCH_ROWS = 1024
BUFFER_BYTES = 1 << 20
USUAL_RATIO = 8  # text that Parquet's compression shrinks by more is repeated or a bomb
GONE = re.compile("NOT_FOUND|NO_SUCH_KEY|404")
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what compressed files raise


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What stands for the text of a file that has none."""

    reason: str


def rows(source: Source, location: Location, start: int = 0) -> Iterator[dict[str, Any]]:
    """Yield a source's rows in file order, from the given one on (0: all).

    Raises:
        CorpusError: A broken line, an unreadable file or hub dataset, a missing column, a document
            of more than MOST_BYTES, or a file that changed since it was located.
    """
    if not location.stamps:
        yield from islice(_datasets_rows(source, location), start, None)
        return
    read = {"jsonl": _json_rows, "parquet": _parquet_rows, "txt": _text_rows}[location.format]
    for file, expected in zip(location.files, location.stamps, strict=True):
        try:
            start = yield from read(source, file, start)
        except (*BROKEN, ValueError, RayxError) as error:
            if not isinstance(error, UnreachableError) or GONE.search(str(error)):
                _check_unchanged(file, expected)  # which may be the reason
            if isinstance(error, RayxError):
                raise
            raise CorpusError(f"Source file {file!r} cannot be read: {error}") from error
        _check_unchanged(file, expected)


def _check_unchanged(file: str, expected: Stamp) -> None:
    try:
        found = stamp(file)
    except FileNotFoundError:
        raise CorpusError(
            f"Source file {file!r} vanished while it was read; build from files that stay."
        ) from None
    if found != expected:
        raise CorpusError(
            f"Source file {file!r} changed while it was read ({expected[0]:,} bytes, now "
            f"{found[0]:,}); build again when nothing writes to it."
        )


class _Ranges(io.RawIOBase):
    """A file of an object store, read in ranges, each asked for again while the store is away."""

    def __init__(self, url: str) -> None:
        filesystem, path = locate_url(url)
        self.url = url
        self.file = reach(lambda: filesystem.open_input_file(path), "read", url)
        self.size, self.place = self.file.size(), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + (0, self.place, self.size)[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        count, place = min(len(buffer), max(0, self.size - self.place)), self.place
        data = reach(lambda: self.file.read_at(count, place), "read", self.url) if count else b""
        buffer[: len(data)] = data
        self.place += len(data)
        return len(data)


def open_bytes(file: str) -> Any:
    """Open a local file or one of an object store for reading bytes, decompressed by its suffix."""
    import pyarrow as pa

    def zstd(raw: Any) -> Any:
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))  # pyright: ignore[reportArgumentType]

    openers: dict[str, Callable[[Any], Any]] = {
        ".gz": lambda raw: gzip.GzipFile(fileobj=raw), ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile,
        ".zst": zstd,
    }  # fmt: skip
    suffix = PurePosixPath(file.partition("?")[0] if is_object(file) else file).suffix.lower()
    return openers.get(suffix, lambda raw: raw)(_open_raw(file))


def _open_raw(file: str) -> Any:
    if is_object(file):
        return io.BufferedReader(_Ranges(file), RANGE_BYTES)
    return open(file, "rb", BUFFER_BYTES)


def _bounded(size: int, file: str, where: str = "") -> None:
    if size > MOST_BYTES:
        raise CorpusError(
            f"Source file {file!r}{where} has a document of more than {MOST_BYTES:,} bytes; "
            "expected less than that. Cut it into pieces, or see whether the file is what it "
            "should be."
        )


def _text_rows(_: Source, file: str, start: int) -> Generator[dict[str, Any], None, int]:
    if start:
        return start - 1
    with open_bytes(file) as stream:
        data = stream.read(MOST_BYTES + 1)
    _bounded(len(data), file)
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        yield {"text": Unreadable("UTF-16 file")}
    elif b"\0" in data:
        yield {"text": Unreadable("binary file")}
    else:
        text = data.decode("utf-8", "replace")
        yield {"text": text.replace("\r\n", "\n").replace("\r", "\n")}
    return 0


def _json_rows(_: Source, file: str, start: int) -> Generator[dict[str, Any], None, int]:
    with open_bytes(file) as stream:
        number = 0
        while line := stream.readline(MOST_BYTES + 1):
            number += 1
            _bounded(len(line), file)
            text = line.decode("utf-8", "replace")
            if text.isspace():
                continue
            if start:
                start -= 1
                continue
            yield _json_row(file, number, text)
    return start


def _parquet_rows(source: Source, file: str, start: int) -> Generator[dict[str, Any], None, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = list(source.columns)
    try:
        with _open_raw(file) as raw, pq.ParquetFile(raw) as whole:
            check_columns(source, f"Source file {file!r}", whole.schema_arrow.names)
            done = 0
            for group in range(whole.num_row_groups):
                meta = whole.metadata.row_group(group)
                if start >= meta.num_rows:
                    start, done = start - meta.num_rows, done + meta.num_rows
                    continue
                batch_rows, shared = _at_once(meta, source.text_column, file)
                part = whole if not shared else pq.ParquetFile(raw, read_dictionary=shared)
                for batch in part.iter_batches(batch_rows, [group], columns):
                    _check_sizes(batch.column(source.text_column), file, done)
                    passed, start = min(start, batch.num_rows), max(0, start - batch.num_rows)
                    yield from _batch_rows(batch.slice(passed))
                    done += batch.num_rows
    except pa.ArrowException as error:
        raise CorpusError(f"Source file {file!r} cannot be read: {error}") from error
    return start


def _at_once(meta: Any, column: str, file: str) -> tuple[int, list[str]]:
    """Return how many rows of a row group to read at once, and what to read as a dictionary.

    A dictionary holds a value once however many rows have it.
    """
    chunks = (meta.column(k) for k in range(meta.num_columns))
    chunk = next((c for c in chunks if c.path_in_schema == column), None)
    if chunk is None:  # not a column of plain values: each row is counted as no string
        return BATCH_ROWS, []
    size, packed = chunk.total_uncompressed_size, max(1, chunk.total_compressed_size)
    mean = size // max(1, meta.num_rows)
    _bounded(mean if not chunk.has_dictionary_page else 0, file)
    first = 0
    if chunk.has_dictionary_page and chunk.dictionary_page_offset is not None:
        first = max(0, chunk.data_page_offset - chunk.dictionary_page_offset)
    at_once = BATCH_BYTES // max(1, mean, USUAL_RATIO * first)
    strings = chunk.physical_type == "BYTE_ARRAY"
    shared = [column] if strings and size > USUAL_RATIO * packed else []
    return min(BATCH_ROWS, max(1, at_once)), shared


def _check_sizes(column: Any, file: str, rows_before: int) -> None:
    import pyarrow as pa
    import pyarrow.compute as pc

    shared = isinstance(column, pa.DictionaryArray)
    values = column.dictionary if shared else column
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return
    sizes = pc.binary_length(values)  # type: ignore[attr-defined]
    longest = pc.max(sizes).as_py()  # type: ignore[attr-defined]
    if longest is not None and longest > MOST_BYTES:
        place = pc.index(sizes, longest).as_py()
        row = pc.index(column.indices, place).as_py() if shared else place  # -1: in a later batch
        _bounded(longest, file, f", row {rows_before + row + 1}" if row >= 0 else "")


def _batch_rows(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield rows one by one: a value that many rows share is never there as often."""
    columns = {name: batch.column(name) for name in batch.schema.names}
    for k in range(batch.num_rows):
        yield {name: column[k].as_py() for name, column in columns.items()}


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


def _datasets_rows(source: Source, location: Location) -> Iterator[dict[str, Any]]:
    """Yield the rows of a hub dataset, or of a URL that is not of an object store."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    def load(builder: str, **options: Any) -> Any:
        # datasets 5.2 passes `encoding` on to the http client: text cannot be streamed from a URL
        stream = source.streaming and builder == "parquet"
        return load_dataset(
            builder, data_files=list(location.files), split="train", streaming=stream, **options
        )

    try:
        if location.format == "jsonl":
            lines = load("text", encoding_errors="replace")
            for number, row in enumerate(lines, 1):
                if row["text"] and not row["text"].isspace():
                    yield _json_row(location.files[0], number, row["text"])
            return
        if location.format == "txt":
            yield from load("text", sample_by="document", encoding_errors="replace")
            return
        if location.format == "hub":
            data: Any = load_dataset(source.path, split=source.split, streaming=source.streaming)
        else:
            data = load("parquet")
        if data.column_names:
            check_columns(source, f"Source {source.path!r}", list(data.column_names))
            data = data.select_columns(sorted(source.columns))
        yield from data
    except (*BROKEN, ValueError, ArrowException, DatasetsError) as error:
        what = "is no local file or folder, and cannot be read as a hub dataset"
        if location.format != "hub":
            what = f"cannot be read as {location.format}"
        raise CorpusError(f"Source {source.path!r} {what}: {error}") from error

"""Stage 1, corpus: raters mapped over staged parts, on Ray Data or in this process.

A part becomes a file of all its columns but the text, with its text's bytes and the raters'
columns. Raters see the same slices of the same documents either way.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rayx.corpus.labels.raters import TEXT, Rater, rated
from rayx.errors import CorpusError, RayxError

SLICE = 128  # documents that a rater gets at once
BYTES = "bytes of text"  # a column while labels are counted


def write_part(folder: Path, number: int, table: pa.Table) -> None:
    """Write a Parquet file so that it is there whole or not at all."""
    file = folder / f"part-{number:06d}.parquet"
    partial = file.with_suffix(".partial")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, file)


def rate_parts(
    parts: list[str],
    folder: Path,
    raters: Sequence[Rater],
    on_ray: bool,
    advance: Callable[[int, int], None],
) -> None:
    """Write for each part a file of all columns but the text, with those of the raters."""
    pending = []
    for number, part in enumerate(parts):
        file = folder / Path(part).name
        if file.exists():
            done = pq.read_table(file, columns=[BYTES])[BYTES]
            advance(len(done), sum(done.to_pylist()))
        else:
            pending.append(number)
    if not on_ray:
        for number in pending:
            table = rate_table(pq.read_table(parts[number]), raters, advance)
            write_part(folder, number, table)
    elif pending:
        for number, table in _on_ray([(n, parts[n]) for n in pending], raters):
            write_part(folder, number, table)
            advance(table.num_rows, sum(table[BYTES].to_pylist()))


def rate_table(
    table: pa.Table, raters: Sequence[Rater], advance: Callable[[int, int], None]
) -> pa.Table:
    """Return a table without its text, and with its bytes and the raters' columns."""
    slices = []
    for start in range(0, table.num_rows, SLICE):
        piece = table.slice(start, SLICE)
        for rater in raters:
            piece = piece.append_column(rater.name, rated(rater, piece))
        sizes = [len(text.encode()) for text in piece[TEXT].to_pylist()]
        piece = piece.append_column(BYTES, pa.array(sizes, pa.int64())).drop_columns([TEXT])
        slices.append(piece)
        advance(piece.num_rows, sum(sizes))
    return _joined(slices, raters)


def _joined(tables: Sequence[pa.Table], raters: Sequence[Rater]) -> pa.Table:
    types = types_of([table.schema for table in tables], raters)
    return pa.concat_tables([cast(table, types) for table in tables])


def types_of(schemas: Sequence[pa.Schema], raters: Sequence[Rater]) -> dict[str, pa.DataType]:
    """Return each rater's one type.

    Raises:
        CorpusError: It gave numbers for some documents and texts for others.
    """
    types = {}
    for rater in raters:
        found = {schema.field(rater.name).type for schema in schemas} - {pa.null()}
        if len(found) > 1:
            raise CorpusError(f"Rater {rater.name!r} gave numbers for some documents and texts for "
                              "others; expected one of them.")  # fmt: skip
        types[rater.name] = found.pop() if found else pa.null()
    return types


def cast(table: pa.Table, types: dict[str, pa.DataType]) -> pa.Table:
    for name, kind in types.items():
        place = table.schema.get_field_index(name)
        table = table.set_column(place, name, table[name].cast(kind))
    return table


def _on_ray(
    parts: list[tuple[int, str]], raters: Sequence[Rater]
) -> Iterator[tuple[int, pa.Table]]:
    import ray.data
    import ray.exceptions

    def rate(batch: pa.Table) -> pa.Table:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray has a task per core already
        numbers, blobs = [], []
        for row in batch.to_pylist():
            table = rate_table(pq.read_table(row["part"]), raters, lambda documents, size: None)
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
            numbers.append(row["number"])
            blobs.append(sink.getvalue().to_pybytes())
        return pa.table({"number": numbers, "table": pa.array(blobs, pa.large_binary())})

    rows = [{"number": number, "part": part} for number, part in parts]
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    data = data.map_batches(rate, batch_format="pyarrow", batch_size=1)
    try:
        for row in data.iter_rows():
            with pa.ipc.open_stream(row["table"]) as reader:
                yield row["number"], reader.read_all()
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, RayxError):
            raise error.cause from None
        raise

"""Stage 1, corpus: the passes over the text when it is clustered, part by part.

Read (sources to Parquet parts and a sample), embed and assign (a small file beside each part; on
Ray Data for large corpora, else in this process), write (parts with their clusters). A part holds
8 MB of text; nothing else of the corpus is in memory but the sample. A killed clustering repeats
the read, or one part of the rest.
"""

from __future__ import annotations

import heapq
import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayx.corpus.clusters.centroids import assign
from rayx.corpus.clusters.embed import CHARS, Embedder
from rayx.corpus.documents import UNKNOWN, documents
from rayx.corpus.parts import PART_BYTES, write_whole
from rayx.corpus.progress import progress
from rayx.corpus.source import Location, Source
from rayx.corpus.stage import document_hash, split_of
from rayx.errors import CorpusError

log = logging.getLogger(__name__)

CLUSTER, SIMILARITY = "cluster", "similarity"
OWN = (
    "text",
    "hash",
    "bytes",
    "heldout_bytes",
    "source",
    "group",
    "id",
    "score",
    CLUSTER,
    SIMILARITY,
)
READ, ASSIGNED = "read.json", "assigned"
SAMPLE_BATCH = 256
SAMPLE, VECTORS = "sample.parquet", "sample.npy"
Advance = Callable[[int, int], None]


def read_text(
    located: Sequence[tuple[Source, Location]],
    folder: Path,
    sample_documents: int,
    quality_column: str | None,
    heldout: tuple[float, int],
    advance: Advance,
) -> dict[str, Any]:
    """Write the documents of sources as parts, and a sample of them, unless that is done.

    The sample is the distinct documents with the smallest hashes: it does not depend on the order
    of the sources.

    Args:
        located: The sources.
        folder: Where parts and sample go.
        sample_documents: Size of the sample, at most.
        quality_column: Column of numbers that is read too, for pruning.
        heldout: Share and seed of the corpus to come, so that a cluster's held-out text is known.
        advance: Called with (documents, bytes) read.

    Returns:
        documents, bytes, skipped (reason to number), labels (columns), columns (that any document
        filled), sources (their number).

    Raises:
        CorpusError: See `rayx.corpus.documents`; or a source is empty, or the quality is no number.
    """
    if (folder / READ).exists():
        return json.loads((folder / READ).read_text(encoding="utf-8"))
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    heap: list[tuple[int, bytes, str]] = []  # the largest hash on top
    held: set[bytes] = set()
    skipped: Counter[str] = Counter()
    labels = sorted({c for source, _ in located for c in source.axes} - {quality_column})
    schema = _schema(labels, quality_column)
    rows: list[tuple[Any, ...]] = []
    filled: set[str] = set()
    names: set[str] = set()
    parts = size = total = count = 0

    def flush() -> None:
        nonlocal parts, size
        table = pa.table(list(zip(*rows, strict=True)), schema=schema)
        filled.update(c for c in table.column_names if table[c].null_count < table.num_rows)
        pq.write_table(table, partial / f"part-{parts:05d}.parquet", compression="zstd")
        rows.clear()
        parts, size = parts + 1, 0

    for source, location in located:
        empty = True
        for document in documents(source, location):
            empty = False
            if document.skip or document.domain is None:
                skipped[document.skip or "no domain"] += 1
                continue
            names.add(document.domain)
            text = document.text
            num_bytes = len(text) if text.isascii() else len(text.encode())
            values = [document.labels.get(column) for column in labels]
            quality = [_number(source, quality_column, document.labels)] if quality_column else []
            digest = document_hash(text)
            out = num_bytes if split_of(document, digest, False, *heldout) == "heldout" else 0
            rows.append((text, digest, num_bytes, out, document.domain, document.group, document.id,
                         document.score, *values, *quality))  # fmt: skip
            _offer(heap, held, sample_documents, digest, text)
            size, total, count = size + num_bytes, total + num_bytes, count + 1
            advance(1, num_bytes)
            if size >= PART_BYTES:
                flush()
        if empty:
            raise CorpusError(f"Source {source.path!r} is empty: it has no rows.")
    if rows:
        flush()
    digests, texts = [[row[i] for row in sorted(heap, reverse=True)] for i in (1, 2)]
    sample = {"hash": pa.array(digests, pa.binary()), "text": pa.array(texts, pa.large_string())}
    pq.write_table(pa.table(sample), partial / SAMPLE)
    facts = {"documents": count, "bytes": total, "skipped": dict(skipped), "labels": labels,
             "columns": sorted(filled), "sources": len(names)}  # fmt: skip
    write_whole(partial / READ, json.dumps(facts))
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return facts


def _schema(labels: Sequence[str], quality_column: str | None) -> pa.Schema:
    taken = [c for c in (*labels, quality_column) if c in OWN]
    if taken:
        raise CorpusError(
            f"Column {taken[0]!r} would overwrite one of {', '.join(OWN)} of the labelled text; "
            "rename it in the source."
        )
    fields: dict[str, Any] = {"text": pa.large_string(), "hash": pa.binary(), "bytes": pa.int64(),
                              "heldout_bytes": pa.int64(), "source": pa.string(),
                              "group": pa.string(), "id": pa.string(),
                              "score": pa.float64()}  # fmt: skip
    fields |= {column: pa.string() for column in labels}
    fields |= {quality_column: pa.float64()} if quality_column else {}
    return pa.schema(list(fields.items()))


def _number(source: Source, column: str, labels: Mapping[str, str]) -> float | None:
    value = labels.get(column, UNKNOWN)
    try:
        number = math.nan if value == UNKNOWN else float(value)
    except ValueError:
        raise CorpusError(
            f"Source {source.path!r}, column {column!r} has {value!r:.80}; expected a number, by "
            "which clusters are pruned."
        ) from None
    return number if math.isfinite(number) else None


def _offer(
    heap: list[tuple[int, bytes, str]], held: set[bytes], most: int, digest: bytes, text: str
) -> None:
    key = -int.from_bytes(digest, "big")
    if digest in held or (len(heap) == most and key <= heap[0][0]):
        return
    held.add(digest)
    item = (key, digest, text[:CHARS])
    if len(heap) < most:
        heapq.heappush(heap, item)
    else:
        held.discard(heapq.heappushpop(heap, item)[1])


def text_parts(folder: Path) -> list[Path]:
    """Return the parts of a folder, in order."""
    return sorted(folder.glob("part-[0-9]*.parquet"))


def embed_sample(state: Path, embedder: Embedder) -> tuple[list[str], np.ndarray]:
    """Return the sample and its vectors, which an interrupted clustering has kept."""
    sample = pq.read_table(state / "text" / SAMPLE)["text"].to_pylist()
    log.info("fitting on %d documents", len(sample))
    embedder.fit(sample)
    if not (state / VECTORS).exists():
        with progress("embedding the sample") as advance:
            vectors = []
            for start in range(0, len(sample), SAMPLE_BATCH):
                texts = sample[start : start + SAMPLE_BATCH]
                vectors.append(embedder.embed(texts))
                advance(len(texts), sum(map(len, texts)))
        np.save(state / f"partial.{VECTORS}", np.concatenate(vectors))
        os.replace(state / f"partial.{VECTORS}", state / VECTORS)
    return sample, np.load(state / VECTORS)


def assign_parts(
    state: Path, embedder: Embedder, centroids_KF: np.ndarray, on_ray: bool, advance: Advance
) -> None:
    """Write each part's nearest centroids and cosines beside it, unless that is done.

    Args:
        state: Folder with the parts of the text, the sample and its vectors.
        embedder: Fitted.
        centroids_KF: Unit vectors.
        on_ray: Map with Ray Data, an embedder in each actor.
        advance: Called with (documents, bytes) done.
    """
    assigner = _Assigner(embedder, centroids_KF, state)
    (state / ASSIGNED).mkdir(exist_ok=True)
    parts = text_parts(state / "text")
    left = [str(part) for part in parts if not (state / ASSIGNED / part.name).exists()]
    done = _on_ray(left, assigner) if on_ray and left else (assigner.one(path) for path in left)
    for num_documents, num_bytes in done:
        advance(num_documents, num_bytes)


class _Assigner:
    """Embeds and assigns parts; what an actor of Ray Data holds."""

    def __init__(self, embedder: Embedder, centroids_KF: np.ndarray, state: Path) -> None:
        self.embedder, self.centroids_KF, self.state = embedder, centroids_KF, state
        self.sampled = pq.read_table(state / "text" / SAMPLE, columns=["hash"])["hash"]

    def one(self, path: str) -> tuple[int, int]:
        """Write the file of a part; return its documents and bytes."""
        table = pq.read_table(path, columns=["text", "hash", "bytes"])
        compute: Any = pc  # its stubs lack both functions
        known = compute.index_in(table["hash"], value_set=self.sampled.combine_chunks())
        places = known.fill_null(-1).to_numpy()
        vectors = np.load(self.state / VECTORS, mmap_mode="r")[places]  # of others, replaced below
        new = np.flatnonzero(places < 0)
        if len(new):
            vectors[new] = self.embedder.embed(table["text"].take(new).to_pylist())
        nearest, cosines = assign(vectors, self.centroids_KF)
        found = pa.table({CLUSTER: nearest, SIMILARITY: cosines})
        _write(found, self.state / ASSIGNED / Path(path).name)
        return table.num_rows, compute.sum(table["bytes"]).as_py()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        done = [self.one(str(path)) for path in batch["path"]]
        return {"documents": [d for d, _ in done], "bytes": [b for _, b in done]}


def _on_ray(paths: list[str], assigner: _Assigner) -> Iterator[tuple[int, int]]:
    import ray
    import ray.data

    data = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=len(paths))
    most = max(1, int(ray.cluster_resources().get("CPU", 1)))
    made = (assigner.embedder, assigner.centroids_KF, assigner.state)
    actors = ray.data.ActorPoolStrategy(min_size=1, max_size=most)
    data = data.map_batches(_Assigner, fn_constructor_args=made, batch_size=1, compute=actors)
    for row in data.iter_rows():
        yield row["documents"], row["bytes"]


def assigned(state: Path, column: str | None = None) -> pa.Table:
    """Return cluster, similarity, bytes and heldout_bytes of all documents, and a column more.

    About 30 bytes a document.
    """
    columns = ["bytes", "heldout_bytes", *([column] if column else [])]
    tables = []
    for part in text_parts(state / "text"):
        table = pq.read_table(state / ASSIGNED / part.name)
        read = pq.read_table(part, columns=columns)
        for name in columns:
            table = table.append_column(name, read[name])
        tables.append(table)
    return pa.concat_tables(tables)


def write_labelled(
    state: Path, out: Path, names: Mapping[int, str | None], columns: Sequence[str]
) -> None:
    """Write the text with the names of its clusters.

    Args:
        state: Folder with the text and the initial cluster of each document.
        out: Where the labelled parts go.
        names: Initial cluster to name; documents of one that is not here are left out, those of
            None keep a null, so that a build counts them.
        columns: Of the text, to keep.
    """
    for part in text_parts(state / "text"):
        table = pq.read_table(part, columns=list(columns))
        found = pq.read_table(state / ASSIGNED / part.name)
        nearest = found[CLUSTER].to_pylist()
        table = table.append_column(CLUSTER, pa.array([names.get(c) for c in nearest], pa.string()))
        table = table.append_column(SIMILARITY, found[SIMILARITY])
        _write(table.filter(pa.array([c in names for c in nearest])), out / part.name)


def _write(table: pa.Table, file: Path) -> None:
    partial = file.with_name(f".{file.name}.partial")
    pq.write_table(table, partial, compression="zstd")
    os.replace(partial, file)

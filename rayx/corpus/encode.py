"""Stage 1, corpus: staged text to token ids, part by part.

Parts are encoded on threads of this process (the tokenizer works outside Python's lock) or on Ray
Data; the bytes are the same. Where the tokenizer is known from the start, threads encode parts
while later ones are still being read: the ids wait beside the part.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from rayx.corpus.manifest import shard_dtype
from rayx.corpus.parts import ids_file, sync
from rayx.corpus.tokenizer import eos_id, num_ids, plain
from rayx.errors import CorpusError

BATCH_BYTES = 25_000  # of text at once: an encoding takes some 140 bytes per byte while it lives
PIECE_BYTES = 100_000  # longer documents are encoded in pieces where that is exact
MOST_THREADS = 16  # Python's share, 5% of the work, is done by one at a time
CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
THREADED = "TOKENIZERS_PARALLELISM"
CACHED_WORDS = 2_000  # of a tokenizer, whose own 10,000 are slower: they do not stay in the cache

_mine = threading.local()


def _loaded(tokenizer_json: str) -> tuple[Tokenizer, int, int, bool]:
    """Return this thread's own tokenizer, end of text, number of ids, and whether texts can be cut.

    Threads that share one wait for each other's caches.
    """
    if getattr(_mine, "json", None) != tokenizer_json:
        tokenizer = plain(tokenizer_json)
        if hasattr(tokenizer.model, "_resize_cache"):
            tokenizer.model._resize_cache(CACHED_WORDS)
        _mine.json = tokenizer_json
        _mine.loaded = (tokenizer, eos_id(tokenizer), num_ids(tokenizer),
                        _splits_at_spaces(tokenizer_json))  # fmt: skip
    return _mine.loaded


def _splits_at_spaces(tokenizer_json: str) -> bool:
    """Whether no token of this tokenizer can span, or depend on what is beyond, `a b`."""
    facts = json.loads(tokenizer_json)
    before = facts.get("pre_tokenizer") or {}
    steps = before.get("pretokenizers", [before])
    kinds = {step.get("type") for step in steps}
    regex = any(s.get("type") == "Split" or s.get("use_regex", True) for s in steps)
    added = any(" " in token["content"].strip() for token in facts.get("added_tokens", ()))
    return (facts.get("normalizer") is None and kinds <= {"ByteLevel", "Split", "Digits"}
            and "ByteLevel" in kinds and regex and not added)  # fmt: skip


def pieces(text: str, at_most: int) -> list[str]:
    """Cut a text before a space between two letters, into pieces of about `at_most` characters."""
    found, start = [], 0
    while len(text) - start > at_most:
        cut = CUT.search(text, start + at_most)
        if cut is None:
            break
        found.append(text[start : cut.start()])
        start = cut.start()
    return [*found, text[start:]]


def encode_texts(column: pa.ChunkedArray, tokenizer_json: str, dtype: str) -> bytes:
    """Return the token ids of texts, an end of text after each, as a shard has them.

    Raises:
        CorpusError: The tokenizer gives an id that its own vocabulary does not have.
    """
    tokenizer, eos, count, can_cut = _loaded(tokenizer_json)
    found: list[np.ndarray] = []
    for texts, ends in _batches(column, can_cut):
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for encoding, end in zip(encoded, ends, strict=True):
            ids = encoding.ids
            if end:
                ids.append(eos)
            found.append(np.fromiter(ids, "<u4", len(ids)))
    ids = np.concatenate(found)
    if ids.max(initial=0) >= count:
        raise CorpusError(
            f"The tokenizer gives id {ids.max()}, but its vocabulary has {count} ids; its "
            "files do not belong together. Save it again from where it works."
        )
    return ids.astype(dtype, copy=False).tobytes()


def _batches(column: pa.ChunkedArray, can_cut: bool) -> Iterator[tuple[list[str], list[bool]]]:
    """Yield texts, or pieces of them, and whether each is the end of its document."""
    texts: list[str] = []
    ends: list[bool] = []
    size = 0
    for scalar in column:
        text = scalar.as_py()
        found = pieces(text, PIECE_BYTES) if can_cut else [text]
        for number, piece in enumerate(found, 1):
            if texts and size + len(piece) > BATCH_BYTES:
                yield texts, ends
                texts, ends, size = [], [], 0
            texts.append(piece)
            ends.append(number == len(found))
            size += len(piece)
    if texts:
        yield texts, ends


def encode_part(part: str, tokenizer_json: str, dtype: str) -> dict[str, Any]:
    """Encode a staged part, unless its ids lie beside it: ids, documents and bytes of text."""
    kept = ids_file(part)
    if kept.exists():
        return pq.read_table(kept).to_pylist()[0]
    column = pq.read_table(part, columns=["text"])["text"]
    size = pc.sum(pc.binary_length(column)).as_py()  # type: ignore[attr-defined]
    ids = encode_texts(column, tokenizer_json, dtype)
    return {"ids": ids, "documents": len(column), "bytes": size}


class Encoder:
    """Encodes staged parts on threads, some of them before they are asked for; a context.

    Args:
        tokenizer_json: The tokenizer.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self.tokenizer_json, self.dtype = tokenizer_json, shard_dtype(tokenizer_json)
        self.threads = min(cores(), MOST_THREADS)
        self.begun: dict[str, Future[None]] = {}

    def __enter__(self) -> Encoder:
        self.pool = ThreadPoolExecutor(self.threads)
        # a thread of ours has a core to itself: no more threads in the tokenizer
        self.before = os.environ.get(THREADED)
        os.environ[THREADED] = "false"
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown(cancel_futures=True)
        os.environ.pop(THREADED)
        if self.before is not None:
            os.environ[THREADED] = self.before

    def begin(self, part: Path) -> None:
        """Encode a part when a thread is free; its ids wait beside it."""
        self.begun[str(part)] = self.pool.submit(self._keep, str(part))

    def _keep(self, part: str) -> None:
        file = ids_file(part)
        table = pa.Table.from_pylist([encode_part(part, self.tokenizer_json, self.dtype)])
        partial = file.with_suffix(".partial")
        with open(partial, "wb") as out:
            pq.write_table(table, out, compression="none", use_dictionary=False)
            sync(out)
        os.replace(partial, file)

    def encoded(self, parts: Iterable[tuple[str, bool]]) -> Generator[dict[str, Any]]:
        """Yield what `encode_part` gives for each (part, whether on Ray Data), in order.

        What was begun and has no thread yet is given up: it gets its turn in this order.
        """
        for future in self.begun.values():
            future.cancel()
        for on_ray, group in groupby(parts, key=lambda pair: pair[1]):
            work = self._on_ray if on_ray else self._here
            yield from work([part for part, _ in group])

    def _here(self, parts: list[str]) -> Iterator[dict[str, Any]]:
        waiting: deque[Future[dict[str, Any]]] = deque()
        try:
            for part in parts:
                waiting.append(self.pool.submit(self._one, part))
                if len(waiting) > 2 * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _one(self, part: str) -> dict[str, Any]:
        begun = self.begun.get(part)
        if begun is not None and not begun.cancelled():
            begun.result()
        return encode_part(part, self.tokenizer_json, self.dtype)

    def _on_ray(self, parts: list[str]) -> Iterator[dict[str, Any]]:
        import ray.data

        tokenizer_json, dtype = self.tokenizer_json, self.dtype

        def encode(row: dict[str, Any]) -> dict[str, Any]:
            os.environ[THREADED] = "false"  # Ray has a task per core already
            return encode_part(row["part"], tokenizer_json, dtype)

        options = ray.data.DataContext.get_current().execution_options
        before, options.preserve_order = options.preserve_order, True
        try:
            items = [{"part": part} for part in parts]
            data = ray.data.from_items(items, override_num_blocks=len(items)).map(encode)
            yield from data.iter_rows()
        finally:
            options.preserve_order = before


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""Stage 1, corpus: staged text to one token shard per domain and split.

A shard is raw little-endian uint16 (uint32 above 65,536 tokens): document, end of text, document,
end of text ... It is written beside its final name with a journal of how far it is, and renamed,
with a small JSON of its facts written after it: a killed build keeps finished shards, and all but
the last CHECKPOINT_BYTES of text of the one it was at. The map runs on Ray Data or on threads of
this process (the tokenizer works outside Python's lock); the bytes are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer

from rayx.corpus.parts import write_whole
from rayx.corpus.tokenizer import eos_id, num_ids, plain
from rayx.errors import CorpusError

log = logging.getLogger(__name__)

BATCH_BYTES = 1_000_000  # of text at once: an encoding takes some 140 bytes per byte while it lives
PIECE_BYTES = 1_000_000  # longer documents are encoded in pieces where that is exact
CHECKPOINT_BYTES = 64_000_000  # of text between two entries in the journal
MOST_THREADS = 16  # Python's share, 4% of the work, is done by one at a time
CUT = re.compile(r"(?<=[A-Za-z])(?= [A-Za-z])")
COUNTS = ("documents", "bytes", "file_bytes")


@lru_cache(maxsize=2)
def _loaded(tokenizer_json: str) -> tuple[Tokenizer, int, int, bool]:
    tokenizer = plain(tokenizer_json)
    return tokenizer, eos_id(tokenizer), num_ids(tokenizer), _splits_at_spaces(tokenizer_json)


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


def encode_table(table: pa.Table, tokenizer_json: str, dtype: str) -> pa.Table:
    """Encode the `text` column: a table of blobs of token ids, in order.

    Returns:
        ids; documents that end in it; bytes of UTF-8 text; whole, if its last document ends in it.

    Raises:
        CorpusError: The tokenizer gives an id that its own vocabulary does not have.
    """
    tokenizer, eos, count, can_cut = _loaded(tokenizer_json)
    rows: dict[str, list[Any]] = {"ids": [], "documents": [], "bytes": [], "whole": []}
    for texts, ends in _batches(table["text"], can_cut):
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        found = [part for e, end in zip(encoded, ends, strict=True)
                 for part in (np.fromiter(e.ids, "<u4"), [eos] * end)]  # fmt: skip
        ids = np.concatenate(found, dtype="<u4", casting="unsafe")
        if ids.max(initial=0) >= count:
            raise CorpusError(
                f"The tokenizer gives id {ids.max()}, but its vocabulary has {count} ids; its "
                "files do not belong together. Save it again from where it works."
            )
        rows["ids"].append(ids.astype(dtype, copy=False).tobytes())
        rows["documents"].append(sum(ends))
        rows["bytes"].append(sum(len(t) if t.isascii() else len(t.encode()) for t in texts))
        rows["whole"].append(ends[-1])
    return pa.table(rows | {"ids": pa.array(rows["ids"], pa.large_binary())})


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


def encode_shard(
    parts: list[str],
    shard: Path,
    facts_file: Path,
    tokenizer_json: str,
    dtype: str,
    on_ray: bool,
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Encode staged parts into a shard, unless that is done, from where a killed build was.

    Args:
        parts: Staged Parquet parts, in order.
        shard: File to write.
        facts_file: Where the shard's facts are kept for a build that is resumed.
        tokenizer_json: The tokenizer.
        dtype: "<u2" or "<u4".
        on_ray: Map with Ray Data.
        advance: Called with (documents, bytes) done.

    Returns:
        documents, tokens (with end of text), bytes (UTF-8 text), file_bytes and sha256.

    Raises:
        CorpusError: See `encode_table`.
    """
    if facts_file.exists() and shard.exists():
        facts = json.loads(facts_file.read_text())
        if shard.stat().st_size == facts["file_bytes"]:
            advance(facts["documents"], facts["bytes"])
            return facts
    for folder in (shard.parent, facts_file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    partial, journal = shard.with_suffix(".partial"), facts_file.with_suffix(".journal")
    done, digest = _resumed(partial, journal)
    advance(done["documents"], done["bytes"])
    kept = done["bytes"]
    tables = (_on_ray if on_ray else _here)(parts, done["documents"], tokenizer_json, dtype)
    with open(partial, "ab") as out:
        for row in (row for table in tables for row in table.to_pylist()):
            out.write(row["ids"])
            digest.update(row["ids"])
            for name, more in (*row.items(), ("file_bytes", len(row["ids"]))):
                if name in COUNTS:
                    done[name] += more
            advance(row["documents"], row["bytes"])
            if row["whole"] and done["bytes"] - kept >= CHECKPOINT_BYTES:
                _sync(out)
                write_whole(journal, json.dumps(done))
                kept = done["bytes"]
        _sync(out)
    os.replace(partial, shard)
    facts = done | {"tokens": done["file_bytes"] // np.dtype(dtype).itemsize,
                    "sha256": digest.hexdigest()}  # fmt: skip
    write_whole(facts_file, json.dumps(facts))
    journal.unlink(missing_ok=True)
    log.info("encoded %s/%s: %d tokens", shard.parent.name, shard.stem, facts["tokens"])
    return facts


def _resumed(partial: Path, journal: Path) -> tuple[dict[str, int], Any]:
    """Cut a shard back to its last journal entry; return that and its hash so far."""
    done: dict[str, int] = dict.fromkeys(COUNTS, 0)
    digest = hashlib.sha256()
    if journal.exists() and partial.exists():
        noted = json.loads(journal.read_text())
        if partial.stat().st_size >= noted["file_bytes"]:
            done = noted
            log.info("%s: going on after %d documents", partial, done["documents"])
    with open(partial, "ab") as file:
        file.truncate(done["file_bytes"])
    with open(partial, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return done, digest


def _sync(out: Any) -> None:
    out.flush()
    os.fsync(out.fileno())


def _left(parts: list[str], done: int) -> Iterator[tuple[str, int]]:
    """Yield the parts after the first `done` documents, with how many of its rows to pass over."""
    for part in parts:
        rows = pq.read_metadata(part).num_rows if done else 0
        if done <= rows:
            yield part, done
        done = max(0, done - rows)


def _here(parts: list[str], done: int, tokenizer_json: str, dtype: str) -> Iterator[pa.Table]:
    def encode(part: str, passed: int) -> pa.Table:
        table = pq.read_table(part, columns=["text"]).slice(passed)
        return encode_table(table, tokenizer_json, dtype)

    threads = min(cores(), MOST_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[pa.Table]] = deque()
        try:
            for part, passed in _left(parts, done):
                waiting.append(pool.submit(encode, part, passed))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_ray(parts: list[str], done: int, tokenizer_json: str, dtype: str) -> Iterator[pa.Table]:
    import ray.data

    def encode(table: pa.Table) -> pa.Table:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray has a task per core already
        return encode_table(table, tokenizer_json, dtype)

    left = list(_left(parts, done))
    begun = [part for part, passed in left if passed]
    whole = [part for part, passed in left if not passed]
    yield from _here(begun, left[0][1] if begun else 0, tokenizer_json, dtype)
    if not whole:
        return
    options = ray.data.DataContext.get_current().execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        data = ray.data.read_parquet(whole, override_num_blocks=len(whole)).select_columns(["text"])
        data = data.map_batches(encode, batch_format="pyarrow", batch_size=None)
        yield from data.iter_batches(batch_size=None, batch_format="pyarrow")
    finally:
        options.preserve_order = before

"""Stage 1, corpus: staged text to one token shard per domain and split.

A shard is raw little-endian uint16 (uint32 above 65,536 tokens): document, end of text, document,
end of text ... It is written beside its final name and renamed, with a small JSON of its facts
written after it, so a killed build keeps finished shards. The map runs on Ray Data for large
corpora, else in this process; the bytes are the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayx.corpus.tokenizer import eos_id, plain

log = logging.getLogger(__name__)

DOCUMENTS_PER_BATCH = 256  # an encoding takes some 100 bytes per token while it lives

_tokenizer = lru_cache(maxsize=2)(plain)


def encode_table(table: pa.Table, tokenizer_json: str, dtype: str) -> pa.Table:
    """Encode the `text` column: a table of blobs of token ids with their documents and bytes."""
    tokenizer = _tokenizer(tokenizer_json)
    eos = np.array([eos_id(tokenizer)], dtype)
    blobs, documents, sizes = [], [], []
    for start in range(0, table.num_rows, DOCUMENTS_PER_BATCH):
        texts = table["text"].slice(start, DOCUMENTS_PER_BATCH).to_pylist()
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [a for e in encoded for a in (np.array(e.ids, dtype), eos)]
        blobs.append(np.concatenate(ids).tobytes())
        documents.append(len(texts))
        sizes.append(sum(len(t) if t.isascii() else len(t.encode()) for t in texts))
    return pa.table({"ids": pa.array(blobs, pa.large_binary()), "documents": documents,
                     "bytes": sizes})  # fmt: skip


def encode_shard(
    parts: list[str],
    shard: Path,
    facts_file: Path,
    tokenizer_json: str,
    dtype: str,
    on_ray: bool,
    advance: Callable[[int, int], None],
) -> dict[str, Any]:
    """Encode staged parts into a shard, unless that is done.

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
    """
    if facts_file.exists() and shard.exists():
        facts = json.loads(facts_file.read_text())
        if shard.stat().st_size == facts["file_bytes"]:
            advance(facts["documents"], facts["bytes"])
            return facts
    shard.parent.mkdir(parents=True, exist_ok=True)
    digest, documents, num_bytes, file_bytes = hashlib.sha256(), 0, 0, 0
    partial = shard.with_suffix(".partial")
    tables = _on_ray(parts, tokenizer_json, dtype) if on_ray else (
        encode_table(pq.read_table(part, columns=["text"]), tokenizer_json, dtype)
        for part in parts)  # fmt: skip
    with open(partial, "wb") as out:
        for table in tables:
            for row in table.to_pylist():
                out.write(row["ids"])
                digest.update(row["ids"])
                documents += row["documents"]
                num_bytes += row["bytes"]
                file_bytes += len(row["ids"])
                advance(row["documents"], row["bytes"])
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial, shard)
    facts = {"documents": documents, "tokens": file_bytes // np.dtype(dtype).itemsize,
             "bytes": num_bytes, "file_bytes": file_bytes, "sha256": digest.hexdigest(),
             }  # fmt: skip
    facts_file.parent.mkdir(parents=True, exist_ok=True)
    facts_file.write_text(json.dumps(facts))
    log.info("encoded %s/%s: %d tokens", shard.parent.name, shard.stem, facts["tokens"])
    return facts


def _on_ray(parts: list[str], tokenizer_json: str, dtype: str) -> Iterator[pa.Table]:
    import ray.data

    def encode(table: pa.Table) -> pa.Table:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray has a task per core already
        return encode_table(table, tokenizer_json, dtype)

    options = ray.data.DataContext.get_current().execution_options
    before, options.preserve_order = options.preserve_order, True
    try:
        data = ray.data.read_parquet(parts, override_num_blocks=len(parts)).select_columns(["text"])
        data = data.map_batches(encode, batch_format="pyarrow", batch_size=None)
        yield from data.iter_batches(batch_size=None, batch_format="pyarrow")
    finally:
        options.preserve_order = before

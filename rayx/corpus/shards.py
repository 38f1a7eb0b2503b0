"""Stage 1, corpus: one token shard per domain and split.

A shard is raw little-endian uint16 (uint32 above 65,536 tokens): document, end of text, document,
end of text ... It is written beside its final name with a journal of how far it is, and renamed,
with a small JSON of its facts written after it: a killed build keeps finished shards, and all but
the last CHECKPOINT_BYTES of text of the one it was at.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rayx.corpus.encode import Encoder
from rayx.corpus.parts import ids_file, sync, write_whole

log = logging.getLogger(__name__)

CHECKPOINT_BYTES = 64_000_000  # of text between two entries in the journal
COUNTS = ("parts", "documents", "bytes", "file_bytes")


@dataclass(frozen=True)
class Shard:
    """A shard to be written.

    Attributes:
        parts: Staged Parquet parts, in order.
        file: The shard.
        facts_file: Where its facts are kept for a build that is resumed.
        on_ray: Whether to encode on Ray Data.
    """

    parts: list[str]
    file: Path
    facts_file: Path
    on_ray: bool = False

    @property
    def partial(self) -> Path:
        return self.file.with_suffix(".partial")

    @property
    def journal(self) -> Path:
        return self.facts_file.with_suffix(".journal")


def encode_shards(
    shards: Sequence[Shard], encoder: Encoder, advance: Callable[[int, int], None]
) -> Iterator[dict[str, Any]]:
    """Encode shards, unless that is done, from where a killed build was.

    Args:
        shards: What to write.
        encoder: Encodes their parts.
        advance: Called with (documents, bytes) done.

    Yields:
        The facts of each shard, when it is there: documents, tokens (with end of text), bytes
        (UTF-8 text), file_bytes and sha256.

    Raises:
        CorpusError: See `encode_texts`.
    """
    facts = [_finished(shard) for shard in shards]
    begun = {k: _resumed(shard) for k, shard in enumerate(shards) if facts[k] is None}
    left = [(part, shards[k].on_ray) for k, done in begun.items()
            for part in shards[k].parts[done["parts"]:]]  # fmt: skip
    with closing(encoder.encoded(left)) as encoded:
        for k, shard in enumerate(shards):
            known = facts[k]
            if known is None:
                rows = islice(encoded, len(shard.parts) - begun[k]["parts"])
                yield _write(shard, begun[k], rows, encoder.dtype, advance)
            else:
                advance(known["documents"], known["bytes"])
                yield known


def _finished(shard: Shard) -> dict[str, Any] | None:
    if shard.facts_file.exists() and shard.file.exists():
        facts = json.loads(shard.facts_file.read_text())
        if shard.file.stat().st_size == facts["file_bytes"]:
            return facts
    return None


def _resumed(shard: Shard) -> dict[str, int]:
    """Return the last journal entry of a shard."""
    if shard.journal.exists() and shard.partial.exists():
        noted = json.loads(shard.journal.read_text())
        if shard.partial.stat().st_size >= noted["file_bytes"]:
            log.info("%s: going on after %d documents", shard.partial, noted["documents"])
            return noted
    return dict.fromkeys(COUNTS, 0)


def _write(
    shard: Shard, done: dict[str, int], rows: Iterable[dict[str, Any]], dtype: str,
    advance: Callable[[int, int], None],
) -> dict[str, Any]:  # fmt: skip
    for folder in (shard.file.parent, shard.facts_file.parent):
        folder.mkdir(parents=True, exist_ok=True)
    digest = _cut_back(shard.partial, done["file_bytes"])
    advance(done["documents"], done["bytes"])
    kept = dict(done)
    with open(shard.partial, "ab") as out:
        for row in rows:
            out.write(row["ids"])
            digest.update(row["ids"])
            more = {"parts": 1, "file_bytes": len(row["ids"])} | row
            done = {count: done[count] + more[count] for count in COUNTS}
            advance(row["documents"], row["bytes"])
            if done["bytes"] - kept["bytes"] >= CHECKPOINT_BYTES:
                sync(out)
                write_whole(shard.journal, json.dumps(done))
                for part in shard.parts[kept["parts"] : done["parts"]]:
                    ids_file(part).unlink(missing_ok=True)
                kept = done
        sync(out)
    os.replace(shard.partial, shard.file)
    facts = {count: done[count] for count in COUNTS if count != "parts"}
    facts |= {
        "tokens": done["file_bytes"] // np.dtype(dtype).itemsize,
        "sha256": digest.hexdigest(),
    }
    write_whole(shard.facts_file, json.dumps(facts))
    shard.journal.unlink(missing_ok=True)
    log.info("encoded %s/%s: %d tokens", shard.file.parent.name, shard.file.stem, facts["tokens"])
    return facts


def _cut_back(partial: Path, file_bytes: int) -> Any:
    """Cut a shard back, and return its hash so far."""
    digest = hashlib.sha256()
    with open(partial, "ab") as file:
        file.truncate(file_bytes)
    with open(partial, "rb") as file:
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest

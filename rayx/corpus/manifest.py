"""Stage 1, corpus: the manifest, which makes a folder a corpus, and its fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pyarrow import fs
from tokenizers import Tokenizer

from rayx.corpus.stage import SPLITS, Tally
from rayx.corpus.tokenizer import eos_id, num_ids
from rayx.errors import CorpusError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
REBUILD = "Build the corpus again, or copy it again from where it is whole."


def write_manifest(
    out: Path,
    key: str,
    tallies: dict[str, Tally],
    homeless: dict[str, int],
    shards: dict[tuple[str, str], dict[str, Any]],
    asked: int | str | Path,
) -> None:
    """Write the manifest of a corpus whose shards and tokenizer are complete.

    Args:
        out: The corpus' folder.
        key: Hash of sources and parameters; decides whether a second build is the same one.
        tallies: What happened to each domain's documents; trainable domains first.
        homeless: Rows without a domain, by reason.
        shards: (domain, split) to the shard's facts, see `encode_shard`.
        asked: The tokenizer parameter of the build.
    """
    tokenizer_json = (out / TOKENIZER).read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer_hash = hashlib.sha256(tokenizer_json.encode()).hexdigest()
    domains = []
    for name, tally in tallies.items():
        mine = {split: shards[name, split] for split in SPLITS if (name, split) in shards}
        hashes = [tokenizer_hash, *(f"{split} {mine[split]['sha256']}" for split in mine)]
        domains.append({
            "name": name, "evaluation_only": tally.evaluation_only, **mine,
            "duplicates": tally.duplicates, "skipped": dict(tally.skipped),
            "fingerprint": _fingerprint(hashes),
        })  # fmt: skip
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": _fingerprint(sorted(f"{d['name']} {d['fingerprint']}" for d in domains)),
        "build_key": key,
        "tokenizer": {"file": TOKENIZER, "file_bytes": len(tokenizer_json.encode()),
                      "sha256": tokenizer_hash},
        "vocab_size": num_ids(tokenizer),
        "vocab_size_asked": asked if isinstance(asked, int) else None,
        "eos_id": eos_id(tokenizer),
        "dtype": shard_dtype(tokenizer_json),
        "domains": domains,
        "skipped_without_domain": dict(homeless),
    }  # fmt: skip
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1))


def _fingerprint(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def shard_dtype(tokenizer_json: str) -> str:
    """Return "<u2", or "<u4" if the token ids need more than 16 bits."""
    return "<u2" if num_ids(Tokenizer.from_str(tokenizer_json)) <= 65_536 else "<u4"


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial_file = file.with_name(file.name + ".partial")
    with open(partial_file, "w", encoding="utf-8", newline="") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(partial_file, file)


def read_manifest(filesystem: fs.FileSystem, root: str) -> dict[str, Any]:
    """Read the manifest of the corpus at `root`.

    Raises:
        CorpusError: There is none, it is not JSON, or of another version.
    """
    file = f"{root}/{MANIFEST}"
    try:
        with filesystem.open_input_file(file) as stream:
            manifest = json.loads(stream.read())
    except FileNotFoundError:
        raise CorpusError(
            f"{root} is no corpus: it has no {MANIFEST}. Build one with `rayx corpus build`; an "
            "interrupted build goes on when it is started again."
        ) from None
    except ValueError as error:
        raise CorpusError(f"{file} is not JSON ({error}). {REBUILD}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CorpusError(
            f"{file} has format version {version!r}, this rayx reads {FORMAT_VERSION}. {REBUILD}"
        )
    return manifest

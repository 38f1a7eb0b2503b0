"""Stage 1, corpus: the manifest, which makes a folder a corpus, and its fingerprints."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import fs
from tokenizers import Tokenizer

from rayx.corpus.parts import write_whole
from rayx.corpus.source import check_domain_name
from rayx.corpus.stage import SPLITS, Tally
from rayx.corpus.tokenizer import eos_id, num_ids
from rayx.errors import UNREADABLE, CorpusError
from rayx.recipe import is_int
from rayx.remote import reach

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
MOST_MANIFEST_BYTES = 100_000_000  # about 500 bytes a domain
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
        shards: (domain, split) to the shard's facts, see `encode_shards`.
        asked: The tokenizer parameter of the build.
    """
    tokenizer_json = (out / TOKENIZER).read_text(encoding="utf-8")
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer_hash = hashlib.sha256(tokenizer_json.encode()).hexdigest()
    domains = []
    for name, tally in tallies.items():
        mine = {split: shards[name, split] for split in SPLITS if (name, split) in shards}
        domains.append({
            "name": name, "evaluation_only": tally.evaluation_only, **mine,
            "duplicates": tally.duplicates, "skipped": dict(tally.skipped),
            "labels": tally.labels, "ordered_by": tally.ordered_by,
            "near_duplicates": tally.near_duplicates, "contamination": tally.contamination,
            "fingerprint": _domain_fingerprint(tokenizer_hash, mine),
        })  # fmt: skip
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": _corpus_fingerprint(domains),
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


def _domain_fingerprint(tokenizer_hash: str, shards: dict[str, Any]) -> str:
    hashes = (f"{split} {shards[split]['sha256']}" for split in SPLITS if split in shards)
    return _fingerprint([tokenizer_hash, *hashes])


def _corpus_fingerprint(domains: list[dict[str, Any]]) -> str:
    return _fingerprint(sorted(f"{d['name']} {d['fingerprint']}" for d in domains))


def _fingerprint(parts: list[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def shard_dtype(tokenizer_json: str) -> str:
    """Return "<u2", or "<u4" if the token ids need more than 16 bits."""
    return "<u2" if num_ids(Tokenizer.from_str(tokenizer_json)) <= 65_536 else "<u4"


def read_manifest(filesystem: fs.FileSystem, root: str, url: str) -> dict[str, Any]:
    """Read the manifest of the corpus at `root`, which is `url` to the user.

    Raises:
        CorpusError: There is none, it is not JSON, of another version, or was edited.
    """
    file = f"{root}/{MANIFEST}"

    def read() -> bytes:
        with filesystem.open_input_file(file) as stream:
            if stream.size() > MOST_MANIFEST_BYTES:
                raise ValueError(f"it has {stream.size():,} bytes, at most {MOST_MANIFEST_BYTES:,}")
            return stream.read()

    try:
        manifest = json.loads(reach(read, f"read {MANIFEST}", url))
    except FileNotFoundError:
        raise CorpusError(
            f"{url} is no corpus: it has no {MANIFEST}. Build one with `rayx corpus build`; an "
            "interrupted build goes on when it is started again."
        ) from None
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{file} is not JSON ({error}). {REBUILD}") from None
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CorpusError(
            f"{file} has format version {version!r}, this rayx reads {FORMAT_VERSION}. {REBUILD}"
        )
    try:
        _check(manifest)
    except CorpusError as error:
        raise CorpusError(f"{file}: {error} {REBUILD}") from None
    except UNREADABLE as error:
        raise CorpusError(f"{file} is damaged: {error!r}. {REBUILD}") from None
    return manifest


def _check(manifest: dict[str, Any]) -> None:
    """Refuse a manifest that `write_manifest` did not write: names lead to files, sizes to maps."""
    _want(manifest["dtype"] in ("<u2", "<u4"), "dtype", manifest["dtype"], "<u2 or <u4")
    _shard(manifest["tokenizer"], TOKENIZER)
    tokenizer_hash, domains = manifest["tokenizer"]["sha256"], manifest["domains"]
    size = manifest["vocab_size"]
    _want(is_int(size) and 0 < size < 2**32, "vocab_size", size, "an integer in [1, 2^32)")
    eos = manifest["eos_id"]
    _want(is_int(eos) and 0 <= eos < size, "eos_id", eos, f"an integer below {size}")
    _want(isinstance(domains, list) and bool(domains), "domains", domains, "at least one")
    counts = [("skipped_without_domain", manifest["skipped_without_domain"])]
    counts += [(f"skipped of {d['name']!r}", d["skipped"]) for d in domains]
    counts += [(f"duplicates of {d['name']!r}", {"": d["duplicates"]}) for d in domains]
    counts += [(f"label {c!r} of {d['name']!r}", v)
               for d in domains for c, v in d["labels"].items()]  # fmt: skip
    counts += [(f"{what} of {d['name']!r}", {k: v for k, v in d[what].items() if k != "removed"})
               for d in domains for what in ("near_duplicates", "contamination")
               if d[what]]  # fmt: skip
    for what, found in counts:
        _want(all(is_int(n) and n >= 0 for n in found.values()), what, found, "counts")
    names = [check_domain_name(domain["name"]) for domain in domains]
    _want(len(set(names)) == len(names), "domains", names, "each name once")
    for name, domain in zip(names, domains, strict=True):
        only, order = domain["evaluation_only"], domain["ordered_by"]
        _want(order is None or isinstance(order, str), f"ordered_by of {name!r}", order, "a name")
        _want(isinstance(only, bool), f"evaluation_only of {name!r}", only, "true or false")
        splits = [split for split in SPLITS if split in domain]
        _want("heldout" in splits and only != ("train" in splits), f"splits of {name!r}", splits,
              "heldout, and train unless it is evaluation-only")  # fmt: skip
        for split in splits:
            shard, what = domain[split], f"of {name!r}, {split}"
            _shard(shard, f"domains/{name}/{split}.bin")
            for key in ("tokens", "bytes", "documents"):
                _want(is_int(shard[key]) and shard[key] > 0, f"{key} {what}", shard[key], "> 0")
            expected = shard["tokens"] * np.dtype(manifest["dtype"]).itemsize
            _want(shard["file_bytes"] == expected, f"file_bytes {what}", shard["file_bytes"],
                  f"{expected}, {shard['tokens']} tokens")  # fmt: skip
        found = _domain_fingerprint(tokenizer_hash, domain)
        _want(domain["fingerprint"] == found, f"fingerprint of {name!r}", domain["fingerprint"],
              f"{found}, by its hashes")  # fmt: skip
    _want(manifest["fingerprint"] == _corpus_fingerprint(domains), "fingerprint",
          manifest["fingerprint"], f"{_corpus_fingerprint(domains)}, by its domains'")  # fmt: skip


def _shard(facts: dict[str, Any], file: str) -> None:
    # The one place where it can be: a name in a manifest leads out of no folder.
    _want(facts["file"] == file, "a file", facts["file"], repr(file))
    _want(isinstance(facts["sha256"], str), f"sha256 of {file!r}", facts["sha256"], "a text")
    size = facts["file_bytes"]
    _want(is_int(size) and size > 0, f"file_bytes of {file!r}", size, "an integer > 0")


def _want(condition: bool, what: str, value: object, expected: str) -> None:
    if not condition:
        raise CorpusError(f"{what} is {value!r:.100}; expected {expected}.")

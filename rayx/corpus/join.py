"""Stage 1, corpus: corpora built in parts (`build_corpus(partition=...)`) joined into one."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rayx.corpus.corpus import Corpus
from rayx.corpus.manifest import MANIFEST, TOKENIZER, write_manifest
from rayx.corpus.parts import write_whole
from rayx.corpus.progress import progress
from rayx.corpus.stage import SPLITS, Tally
from rayx.corpus.transfer import build_folder, read_chunks, upload
from rayx.errors import CorpusError
from rayx.remote import locate

COUNTS = ("documents", "tokens", "bytes", "file_bytes")


def join_corpora(parts: Sequence[str | Path], out: str | Path) -> Corpus:
    """Join corpora: each shard is those of the parts, one after another, in the order given.

    Args:
        parts: Folders or URLs of corpora with the same tokenizer.
        out: Folder of the new corpus, new or empty, or an s3:// or gs:// URL.

    Raises:
        CorpusError: Fewer than two parts, other tokenizers, a domain that is evaluation-only in
            some or sorted by scores (their order would be lost), or the output is taken.
    """
    corpora = [Corpus.load(part) for part in parts]
    _check(corpora)
    key = hashlib.sha256("\n".join(c.fingerprint for c in corpora).encode()).hexdigest()
    if "://" in str(out):
        if folder := build_folder(str(out), key):
            shutil.rmtree(folder, ignore_errors=True)
            _join(corpora, folder, key)
            upload(folder, str(out))
        return Corpus.load(str(out))
    folder = Path(out).expanduser().absolute()
    if (folder / MANIFEST).exists() and Corpus.load(folder).manifest["build_key"] == key:
        return Corpus.load(folder)
    if folder.exists() and any(folder.iterdir()):
        raise CorpusError(f"Output folder {str(folder)!r} is not empty; name a new one.")
    # its name comes last, so that what is left of a killed join is not taken for a folder in use
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _join(corpora, partial, key)
    os.replace(partial, folder)
    return Corpus.load(folder)


def _check(corpora: list[Corpus]) -> None:
    if len(corpora) < 2:
        raise CorpusError(f"There are {len(corpora)} corpora to join; give at least two.")
    first, only = corpora[0], {}
    for corpus in corpora:
        if corpus.manifest["tokenizer"]["sha256"] != first.manifest["tokenizer"]["sha256"]:
            raise CorpusError(
                f"Corpora {first.url} and {corpus.url} have different tokenizers; build all parts "
                "with --tokenizer FILE."
            )
        for domain in corpus.manifest["domains"]:
            name = domain["name"]
            if only.setdefault(name, domain["evaluation_only"]) != domain["evaluation_only"]:
                raise CorpusError(f"Domain {name!r} is evaluation-only in some of the corpora.")
            if domain["ordered_by"] is not None:
                raise CorpusError(
                    f"Domain {name!r} of {corpus.url} is sorted by {domain['ordered_by']!r}, and "
                    "joined shards would not be. Build it in one, or without a score column."
                )


def _join(corpora: list[Corpus], out: Path, key: str) -> None:
    shards: dict[tuple[str, str], dict[str, Any]] = {}
    tallies: dict[str, Tally] = {}
    homeless: Counter[str] = Counter()
    total = sum(sum((*c.bytes.values(), *c.heldout_bytes.values())) for c in corpora)
    names = {d["name"]: d["evaluation_only"] for c in corpora for d in c.manifest["domains"]}
    with progress("joining", total) as advance:
        for name in sorted(names, key=names.__getitem__):  # those to train on first
            mine = [(c, d) for c in corpora for d in c.manifest["domains"] if d["name"] == name]
            tallies[name] = Tally(names[name])
            for _, domain in mine:
                tallies[name].add(_tally(domain))
            for split in SPLITS:
                found = [(c, d[split]) for c, d in mine if split in d]
                if found:
                    shards[name, split] = _concatenate(found, out)
                    advance(shards[name, split]["documents"], shards[name, split]["bytes"])
    for corpus in corpora:
        homeless.update(corpus.manifest["skipped_without_domain"])
    tokenizer = b"".join(_chunks(corpora[0], corpora[0].manifest["tokenizer"]["file"]))
    write_whole(out / TOKENIZER, tokenizer.decode())
    write_manifest(out, key, tallies, homeless, shards, corpora[0].manifest["vocab_size_asked"])


def _tally(domain: dict[str, Any]) -> Tally:
    labels = {column: Counter(values) for column, values in domain["labels"].items()}
    return Tally(
        domain["evaluation_only"], duplicates=domain["duplicates"],
        skipped=Counter(domain["skipped"]), labels=labels,
    )  # fmt: skip


def _concatenate(found: list[tuple[Corpus, dict[str, Any]]], out: Path) -> dict[str, Any]:
    name = found[0][1]["file"]
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with open(out / name, "wb") as file:
        for corpus, facts in found:
            one = hashlib.sha256()
            for chunk in _chunks(corpus, name):
                file.write(chunk)
                digest.update(chunk)
                one.update(chunk)
            if one.hexdigest() != facts["sha256"]:
                raise CorpusError(f"Corpus {corpus.url}: the content of {name} has changed.")
        file.flush()
        os.fsync(file.fileno())
    return {"file": name, "sha256": digest.hexdigest()} | {
        count: sum(facts[count] for _, facts in found) for count in COUNTS
    }


def _chunks(corpus: Corpus, name: str) -> Iterator[bytes]:
    filesystem, root = locate(corpus.url)
    return read_chunks(filesystem, f"{root}/{name}", corpus.url)

"""Stage 1, corpus: sources of text -> a corpus on disk.

Three steps: stage (read, drop duplicates, choose held-out documents), tokenizer, encode (held-out
first, so a domain that is too small is known before the long part). What is finished stays in
`.build/` until the manifest is written: a killed build that is started again with the same
parameters goes on and gives the same corpus; with others it starts anew. Staged text takes about
a third of the text's size on disk while the build runs.

Same sources, parameters and library versions give the same fingerprint, with or without Ray Data
and on any number of workers. The order of the sources matters only for documents that occur in
several of them, for a domain that comes from several of them, and for a trained tokenizer.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from rayx.corpus.cleaning.clean import Cleaning, clean, passes
from rayx.corpus.corpus import Corpus
from rayx.corpus.documents import documents
from rayx.corpus.encode import MOST_THREADS, Encoder, cores
from rayx.corpus.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TOKENIZER,
    write_manifest,
)
from rayx.corpus.parts import staged_parts, write_whole
from rayx.corpus.progress import progress
from rayx.corpus.shards import Shard, encode_shards
from rayx.corpus.source import Location, Source, locate
from rayx.corpus.stage import SPLITS, Tally, by_score, stage_sources
from rayx.corpus.tokenizer import (
    MIN_VOCAB_SIZE,
    balanced_texts,
    load_tokenizer,
    train_tokenizer,
)
from rayx.corpus.transfer import build_folder, upload
from rayx.errors import CorpusError

log = logging.getLogger(__name__)

STATE = ".build"
LOCK = ".lock"
RAY_BYTES = 64_000_000  # below this much text, Ray's first tasks take longer than encoding it
FULL = (errno.ENOSPC, errno.EDQUOT)


def build_corpus(
    sources: Sequence[Source],
    out: str | Path,
    *,
    tokenizer: int | str | Path,
    heldout_share: float = 0.05,
    min_heldout_tokens: int = 1024,
    seed: int = 0,
    parallel: bool | None = None,
    near_duplicates: float | None = None,
    contamination_words: int | None = None,
    remove_contaminated: bool = False,
    partition: tuple[int, int] | None = None,
) -> Corpus:
    """Build a corpus, or go on with an interrupted build of it.

    Args:
        sources: Where the text comes from.
        out: Folder: new, empty, or of the same build. For an s3:// or gs:// URL the corpus is built
            in the cache of this node and then uploaded.
        tokenizer: Vocabulary size of a byte-level BPE to train on the train documents (>= 260),
            a tokenizers JSON file, or a Hugging Face name.
        heldout_share: Expected share of documents (or groups) held out, in (0, 0.5].
        min_heldout_tokens: Fewest held-out tokens that a target may have, >= 1.
        seed: Decides which documents are held out.
        parallel: Tokenise on Ray Data instead of threads of this process, on all its cores. None
            does so for shards of more than 64 MB of text where this process is connected to Ray or
            has more than 16 cores.
        near_duplicates, contamination_words, remove_contaminated: See
            `rayx.corpus.cleaning.clean.Cleaning`.
        partition: (i, n), 0 <= i < n: only the documents whose hash falls to part i of n, for a
            corpus that is too large for one build; with a given tokenizer. Copies fall to the same
            part; documents of one id, or nearly equal, need not.

    Returns:
        The corpus. If `out` already holds this corpus, it is returned as it is.

    Raises:
        CorpusError: A parameter, source or the output folder cannot be used, a domain has no
            train documents or too few held-out tokens, or another build writes there.
    """
    _check_parameters(sources, tokenizer, heldout_share, min_heldout_tokens, seed)
    _check_partition(partition, tokenizer)
    cleaning = Cleaning(near_duplicates, contamination_words, remove_contaminated)
    located = [(s, locate(s)) for s in sources]
    given = None if isinstance(tokenizer, int) else load_tokenizer(str(tokenizer))
    given_json = given.to_str() if given else None
    key = _build_key(located, given_json or str(tokenizer), heldout_share, seed,
                     asdict(cleaning), *([partition] if partition else []))  # fmt: skip
    if "://" in str(out):
        if folder := build_folder(str(out), key):
            build_corpus(
                sources, folder, tokenizer=tokenizer, heldout_share=heldout_share,
                min_heldout_tokens=min_heldout_tokens, seed=seed, parallel=parallel,
                **asdict(cleaning), partition=partition,
            )  # fmt: skip
            upload(folder, str(out))
        return Corpus.load(str(out))
    out = Path(out).expanduser().absolute()
    _check_out(out)
    with _locked(out), _enough_space(out):
        if _already_built(out, key):
            return Corpus.load(out)
        for source, location in located:
            if next(documents(source, location), None) is None:
                raise CorpusError(f"Source {source.path!r} is empty: it has no rows.")
        state = _begin(out, key)
        # text kept for evaluation first: a train document equal to one of its documents is dropped
        located.sort(key=lambda pair: not pair[0].evaluation_only)
        with ExitStack() as stack:
            # text that nothing removes or sorts later can be encoded as soon as it is staged
            final = not cleaning and all(source.score_column is None for source in sources)
            ahead = None
            if given_json and final and not parallel:
                ahead = stack.enter_context(Encoder(given_json))
            with progress("reading") as advance:
                tallies, homeless = stage_sources(
                    located, state / "text", heldout_share, seed, advance, partition,
                    ahead and ahead.begin,
                )  # fmt: skip
            _check_tallies(tallies, heldout_share)
            text = state / ("cleaned" if cleaning else "text")
            if cleaning:
                with progress("cleaning", passes(tallies, cleaning)) as advance:
                    clean(state / "text", text, tallies, cleaning, advance)
            tallies = dict(sorted(tallies.items(), key=lambda item: item[1].evaluation_only))
            if not (out / TOKENIZER).exists():
                made = given_json or _train(text, tallies, int(str(tokenizer)))
                write_whole(out / TOKENIZER, made)
            tokenizer_json = (out / TOKENIZER).read_text(encoding="utf-8")
            encoder = ahead or stack.enter_context(Encoder(tokenizer_json))
            shards = _encode(out, state, text, tallies, min_heldout_tokens, parallel, encoder)
        write_manifest(out, key, tallies, homeless, shards, tokenizer)
        shutil.rmtree(state)
    corpus = Corpus.load(out)
    log.info("built %r", corpus)
    return corpus


def _check_parameters(
    sources: Sequence[Source], tokenizer: Any, share: float, min_tokens: int, seed: int
) -> None:
    if not sources:
        raise CorpusError("There are no sources; give at least one Source.")
    if not 0 < share <= 0.5:
        raise CorpusError(f"heldout_share is {share}, expected a share in (0, 0.5].")
    if min_tokens < 1:
        raise CorpusError(f"min_heldout_tokens is {min_tokens}, expected at least 1.")
    if not -(2**63) <= seed < 2**63:
        raise CorpusError(f"seed is {seed}, expected a 64-bit integer.")
    if isinstance(tokenizer, int) and tokenizer < MIN_VOCAB_SIZE:
        raise CorpusError(
            f"Vocabulary size {tokenizer} is too small: 256 bytes, end of text and a few merges "
            f"need at least {MIN_VOCAB_SIZE}."
        )
    kinds: dict[str, tuple[str, bool]] = {}
    for source in sources:
        if source.domain is None:
            continue
        name, out_only = kinds.setdefault(
            source.domain.casefold(), (source.domain, source.evaluation_only)
        )
        if name != source.domain:
            raise CorpusError(f"Domains {name!r} and {source.domain!r} differ only by case.")
        if out_only != source.evaluation_only:
            raise CorpusError(
                f"Domain {name!r} is given by sources with evaluation_only=True and =False; give "
                "the held-out one a name of its own."
            )
    if all(source.evaluation_only for source in sources):
        raise CorpusError("All sources are evaluation_only; there is nothing to train on.")


def _check_partition(partition: tuple[int, int] | None, tokenizer: Any) -> None:
    if partition is None:
        return
    part, of = partition
    if not 0 <= part < of:
        raise CorpusError(f"partition is {part} of {of}; expected (i, n) with 0 <= i < n.")
    if isinstance(tokenizer, int):
        raise CorpusError(
            f"Part {part} of {of} cannot train a tokenizer of {tokenizer} tokens of its own: all "
            "parts need the same one. Build a sample first and give its tokenizer.json."
        )


def _build_key(located: list[tuple[Source, Location]], *parameters: Any) -> str:
    """Hash of all that decides the result; a file counts by path, size and time."""
    files = [[file, *stamp] for _, location in located
             for file, stamp in zip(location.files, location.stamps, strict=False)]  # fmt: skip
    facts = [FORMAT_VERSION, [asdict(source) for source, _ in located], files, parameters]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise CorpusError(f"Output {str(out)!r} is a file, expected a folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise CorpusError(f"Output folder {str(out)!r} cannot be written: {error}") from None
    names = {p.name for p in out.iterdir()} - {LOCK}
    if names and not names & {MANIFEST, STATE}:
        raise CorpusError(
            f"Output folder {str(out)!r} holds something that is not a corpus "
            f"({', '.join(sorted(names)[:3])}); name a new folder."
        )


def _locked(out: Path) -> AbstractContextManager[object]:
    try:
        return FileLock(out / LOCK).acquire(timeout=0)
    except Timeout:
        raise CorpusError(f"Another build is writing to {str(out)!r}; wait for it.") from None


@contextmanager
def _enough_space(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise CorpusError(
            f"There is no space left for {str(out)!r} ({error}). A build needs about the text's "
            "own size. Make space and start it again: it goes on where it was."
        ) from error


def _ray_is_worth_it() -> bool:
    ray = sys.modules.get("ray")
    return cores() > MOST_THREADS or (ray is not None and ray.is_initialized())


def _already_built(out: Path, key: str) -> bool:
    if not (out / MANIFEST).exists():
        return False
    found = Corpus.load(out)
    if found.manifest["build_key"] != key:
        raise CorpusError(
            f"{str(out)!r} holds corpus {found.fingerprint}, built from other sources, versions of "
            "them or parameters. Name another folder, or delete that one to replace it."
        )
    shutil.rmtree(out / STATE, ignore_errors=True)
    return True


def _begin(out: Path, key: str) -> Path:
    state = out / STATE
    file = state / "key"
    if state.exists() and (not file.exists() or file.read_text(encoding="utf-8") != key):
        log.warning("%s: sources or parameters have changed; the build starts anew", out)
        for left in (state, out / "domains"):
            shutil.rmtree(left, ignore_errors=True)
        (out / TOKENIZER).unlink(missing_ok=True)
    elif state.exists():
        log.info("%s: going on with an interrupted build", out)
    state.mkdir(exist_ok=True)
    write_whole(file, key)
    return state


def _check_tallies(tallies: dict[str, Tally], share: float) -> None:
    for name, tally in tallies.items():
        skipped = ", ".join(f"{n} {reason}" for reason, n in tally.skipped.items()) or "none"
        lost = f"skipped: {skipped}; duplicates: {tally.duplicates}"
        count = sum(tally.documents.values())
        if not count:
            raise CorpusError(f"Domain {name!r} is empty: no document is left ({lost}).")
        for split in SPLITS:
            if not tally.documents[split] and not (tally.evaluation_only and split == "train"):
                raise CorpusError(
                    f"Domain {name!r} is too small: of {count} documents ({lost}), 0 are "
                    f"{split} at heldout_share {share}. Add documents, cut them into pieces, or "
                    "change heldout_share."
                )


def _train(text: Path, tallies: dict[str, Tally], vocab_size: int) -> str:
    def read(domain: str) -> Iterator[str]:
        for part in staged_parts(text, domain, "train"):
            yield from pq.read_table(part, columns=["text"])["text"].to_pylist()

    sizes = {n: t.bytes["train"] for n, t in tallies.items() if not t.evaluation_only}
    readers: dict[str, Callable[[], Iterable[str]]] = {n: partial(read, n) for n in sizes}
    log.info("training a tokenizer of %d tokens", vocab_size)
    return train_tokenizer(balanced_texts(readers, sizes), vocab_size).to_str()


def _encode(
    out: Path,
    state: Path,
    text: Path,
    tallies: dict[str, Tally],
    min_tokens: int,
    parallel: bool | None,
    encoder: Encoder,
) -> dict[tuple[str, str], dict[str, Any]]:
    todo: dict[tuple[str, str], Shard] = {}
    for split in ("heldout", "train"):
        for name, tally in tallies.items():
            if not tally.documents[split]:
                continue
            large = tally.bytes[split] > RAY_BYTES
            on_ray = large and _ray_is_worth_it() if parallel is None else parallel
            parts = staged_parts(text, name, split)
            if split == "train" and tally.ordered_by:
                parts = by_score(parts, state / "sorted" / name)
            facts_file = state / "encoded" / f"{name}.{split}.json"
            file = out / "domains" / name / f"{split}.bin"
            todo[name, split] = Shard(parts, file, facts_file, on_ray)
    shards: dict[tuple[str, str], dict[str, Any]] = {}
    with progress("encoding", sum(t.bytes.total() for t in tallies.values())) as advance:
        encoded = encode_shards(list(todo.values()), encoder, advance)
        for (name, split), facts in zip(todo, encoded, strict=True):
            shards[name, split] = {"file": f"domains/{name}/{split}.bin"} | facts
            if split == "heldout" and facts["tokens"] < min_tokens:
                raise CorpusError(
                    f"Domain {name!r} is too small for its held-out share: it has "
                    f"{facts['tokens']} held-out tokens in {facts['documents']} documents, "
                    f"needed are {min_tokens}. Add text, raise heldout_share or lower "
                    "min_heldout_tokens."
                )
    return shards

"""Stage 1, corpus: text without domains -> clusters -> a corpus like any other.

Three passes over the text: read it and draw a bounded sample; fit embedder and k-means on the
sample, embed and assign every document; then, knowing every cluster's size and quality, prune,
merge, name, and write the text with its clusters as Parquet parts, which `build_corpus` reads.

The same text, settings and library versions give the same clusters, on any number of workers.
Clusters too small for a held-out set join their nearest. Documents in which the embedder knows
nothing keep a null cluster and are counted by the build.

Source: Diao et al. 2025 (CLIMB), arXiv:2504.13161, section 2: embed, cluster, prune, merge.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from rayx.corpus.build import RAY_BYTES, build_corpus
from rayx.corpus.clusters import centroids as directions
from rayx.corpus.clusters.embed import TFIDF, Embedder, embedder_facts, open_embedder
from rayx.corpus.clusters.facts import facts_of, merge, prune, sizes_of
from rayx.corpus.clusters.parts import (
    CLUSTER,
    assign_parts,
    assigned,
    embed_sample,
    read_text,
    write_labelled,
)
from rayx.corpus.corpus import Corpus
from rayx.corpus.parts import write_whole
from rayx.corpus.progress import progress
from rayx.corpus.source import Location, Source, locate
from rayx.corpus.transfer import cache_folder, read_sidecar, write_sidecar
from rayx.errors import CorpusError

log = logging.getLogger(__name__)

CLUSTERS = "clusters.json"  # beside a corpus' manifest
FACTS = ".clusters.json"  # beside the labelled text; hidden, so that the folder is Parquet only
STATE = ".cluster"
INITIAL, INITIAL_EACH = 64, 4  # clusters before merging, at least, and for each that is asked for
DOCUMENTS_EACH = 8  # sampled documents for each initial cluster, at least
BYTES_PER_TOKEN = 5  # more than most text has, so that a held-out set has tokens enough


@dataclass(frozen=True, kw_only=True, slots=True)
class Clustering:
    """How text is clustered.

    Args:
        clusters: How many domains, >= 2. None: as `merge_distance` says, else the fewest of good
            silhouette, from 2 to 32; see `rayx.corpus.clusters.centroids.best_number`.
        init_clusters: How many k-means finds before pruning and merging, >= 2. None: 64, or 4 times
            `clusters` where that is more, and fewer for a sample of less than 8 documents for each.
        merge_distance: Merge clusters nearer than this, instead of down to a number; see
            `rayx.corpus.clusters.centroids.distance_labels`.
        prune: (column, threshold): initial clusters whose documents' mean in a column of numbers is
            below the threshold are left out.
        embedder: "tfidf", or the folder of a sentence-transformers or ONNX model.
        sample_documents: On how many documents embedder and centroids are fitted, at most.
        seed: Of all that is drawn.

    Raises:
        CorpusError: A value that is out of range, or two that contradict each other.
    """

    clusters: int | None = None
    init_clusters: int | None = None
    merge_distance: float | None = None
    prune: tuple[str, float] | None = None
    embedder: str = TFIDF
    sample_documents: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("clusters", "init_clusters", "sample_documents"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise CorpusError(f"{name} is {value}, expected at least 2.")
        if self.clusters and self.merge_distance is not None:
            raise CorpusError(
                f"clusters ({self.clusters}) and merge_distance ({self.merge_distance}) both say "
                "when merging ends; give one of them."
            )
        if self.merge_distance is not None and not 0 < self.merge_distance < math.inf:
            raise CorpusError(f"merge_distance is {self.merge_distance}, expected a number > 0.")
        if self.clusters and self.init_clusters and self.init_clusters < self.clusters:
            raise CorpusError(
                f"init_clusters is {self.init_clusters}, expected at least clusters "
                f"({self.clusters}): clusters are merged, never split."
            )
        if self.prune and not math.isfinite(self.prune[1]):
            raise CorpusError(f"prune has threshold {self.prune[1]}, expected a number.")


def cluster_corpus(
    sources: Sequence[Source],
    out: str | Path,
    clustering: Clustering,
    *,
    tokenizer: int | str | Path,
    evaluation: Sequence[Source] = (),
    heldout_share: float = 0.05,
    min_heldout_tokens: int = 1024,
    parallel: bool | None = None,
    text: str | Path | None = None,
) -> Corpus:
    """Cluster text and build the corpus of its clusters, or go on where that was interrupted.

    Args:
        sources: The text; the domains that they name are kept in a column `source`.
        out: Folder of the corpus, or s3:// or gs:// URL.
        clustering: How.
        tokenizer: See `build_corpus`, as heldout_share, min_heldout_tokens and parallel.
        evaluation: Evaluation-only sources, held out as they are.
        text: Folder for the labelled text; None: `<out>-text`, for a URL in this node's cache.

    Returns:
        The corpus; what is known of its clusters lies beside its manifest, see `read_clusters`.

    Raises:
        CorpusError: See `cluster_text` and `build_corpus`.
    """
    if not 0 < heldout_share <= 0.5:
        raise CorpusError(f"heldout_share is {heldout_share}, expected a share in (0, 0.5].")
    folder = _text_folder(str(out)) if text is None else Path(text).expanduser().absolute()
    facts = cluster_text(
        sources, folder, clustering, heldout_share=heldout_share,
        min_heldout_bytes=min_heldout_tokens * BYTES_PER_TOKEN,
        taken=[s.domain for s in evaluation if s.domain], parallel=parallel,
    )  # fmt: skip
    given = Source(path=str(folder), domain_column=CLUSTER, format="parquet", **facts["columns"])
    corpus = build_corpus(
        [given, *evaluation], out, tokenizer=tokenizer, heldout_share=heldout_share,
        min_heldout_tokens=min_heldout_tokens, seed=clustering.seed, parallel=parallel,
    )  # fmt: skip
    write_sidecar(corpus.url, CLUSTERS, json.dumps(facts, ensure_ascii=False))
    return corpus


def read_clusters(corpus: Corpus) -> dict[str, Any] | None:
    """Return what `cluster_text` found of a corpus' clusters, None if it was not clustered.

    Raises:
        CorpusError: The file is damaged.
    """
    found = read_sidecar(corpus.url, CLUSTERS)
    if found is not None and not {"clusters", "map", "settings"} <= found.keys():
        raise CorpusError(
            f"{CLUSTERS} of corpus {corpus.url} is damaged; cluster the text again, or delete it."
        )
    return found


def cluster_text(
    sources: Sequence[Source],
    out: str | Path,
    clustering: Clustering,
    *,
    heldout_share: float = 0.05,
    min_heldout_bytes: int = 0,
    taken: Sequence[str] = (),
    parallel: bool | None = None,
) -> dict[str, Any]:
    """Write the text of sources with the cluster of each document, as a folder of Parquet parts.

    Columns: text, source, cluster, similarity (cosine with the centroid of the initial cluster),
    the label columns, and group, id and score where a source has them.

    Args:
        sources: The text.
        out: The folder: new, empty, or of the same clustering.
        clustering: How.
        heldout_share: Of the corpus to come, whose held-out documents the seed and this decide.
        min_heldout_bytes: Clusters with less held-out (or train) text join their nearest.
        taken: Names that no cluster gets.
        parallel: Embed on Ray Data; None does so for more than 64 MB of text.

    Returns:
        settings; documents, bytes, skipped, sampled, unknown (documents in which the embedder knows
        nothing); initial, empty, joined (numbers of initial clusters), pruned (list of clusters);
        clusters (largest first: name, terms, documents, bytes, similarity, quality, initial,
        examples); map (method, x, y, cluster); columns (for a Source).

    Raises:
        CorpusError: A source, the embedder or the folder cannot be used, there are fewer distinct
            documents than clusters, or nothing is left.
    """
    if not sources:
        raise CorpusError("There are no sources; give at least one Source.")
    embedder = open_embedder(clustering.embedder, clustering.seed)
    quality = clustering.prune[0] if clustering.prune else None
    sources = [_with_column(source, quality) for source in sources]
    located = [(source, locate(source)) for source in sources]
    out = Path(out).expanduser().absolute()
    key = _key(located, clustering, heldout_share, min_heldout_bytes, list(taken))
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(out / ".lock").acquire(timeout=0)
    except Timeout:
        raise CorpusError(f"Another clustering is writing to {str(out)!r}; wait for it.") from None
    with lock:
        if (facts := _already_there(out, key)) is not None:
            return facts
        state = out / STATE
        with progress("reading") as advance:
            read = read_text(located, state / "text", clustering.sample_documents, quality,
                             (heldout_share, clustering.seed), advance)  # fmt: skip
        on_ray = read["bytes"] > RAY_BYTES if parallel is None else parallel
        facts = _cluster(state, out, clustering, embedder, read, min_heldout_bytes, taken,
                         on_ray)  # fmt: skip
        write_whole(out / FACTS, json.dumps({"key": key, **facts}, ensure_ascii=False))
        shutil.rmtree(state)
    return facts


def _text_folder(out: str) -> Path:
    if "://" in out:
        return cache_folder("clusters") / hashlib.sha256(out.encode()).hexdigest()[:16]
    path = Path(out).expanduser().absolute()
    return path.with_name(f"{path.name}-text")


def _with_column(source: Source, quality: str | None) -> Source:
    if quality is None or quality in source.axes:
        return source
    return replace(source, label_columns=(*source.label_columns, quality))


def _key(located: list[tuple[Source, Location]], clustering: Clustering, *more: Any) -> str:
    """Hash of all that decides the result; a file counts by path, size and time."""
    files = [[file, *stamp] for _, location in located
             for file, stamp in zip(location.files, location.stamps, strict=False)]  # fmt: skip
    facts = [[asdict(source) for source, _ in located], files, asdict(clustering), more,
             embedder_facts(clustering.embedder), version("scikit-learn")]  # fmt: skip
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _already_there(out: Path, key: str) -> dict[str, Any] | None:
    """Return the facts of this clustering if it is done; else leave a state that fits it."""
    done, state = out / FACTS, out / STATE
    if done.exists():
        facts = json.loads(done.read_text(encoding="utf-8"))
        if facts.pop("key") != key:
            raise CorpusError(
                f"{str(out)!r} holds text clustered from other sources or in another way. Name "
                "another folder, or delete that one to replace it."
            )
        shutil.rmtree(state, ignore_errors=True)
        return facts
    names = sorted(f.name for f in out.iterdir() if not f.name.startswith("."))
    if names and not state.exists():
        raise CorpusError(
            f"Folder {str(out)!r} for the labelled text holds something else "
            f"({', '.join(names[:3])}); name a new one."
        )
    if state.exists() and (state / "key").read_text(encoding="utf-8") != key:
        log.warning("%s: sources or settings have changed; the clustering starts anew", out)
        for left in (state, *out.glob("part-*.parquet")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    elif state.exists():
        log.info("%s: going on with an interrupted clustering", out)
    state.mkdir(exist_ok=True)
    write_whole(state / "key", key)
    return None


def _cluster(
    state: Path,
    out: Path,
    clustering: Clustering,
    embedder: Embedder,
    read: dict[str, Any],
    least: int,
    taken: Sequence[str],
    on_ray: bool,
) -> dict[str, Any]:
    if not read["documents"]:
        lost = ", ".join(f"{n} {reason}" for reason, n in read["skipped"].items()) or "none"
        raise CorpusError(f"There is no document to cluster (skipped: {lost}).")
    sample, vectors = embed_sample(state, embedder)
    known = vectors.any(1)
    if not known.any():
        raise CorpusError(
            f"The embedder knows nothing in any of {len(sample)} sampled documents; give another."
        )
    centroids = directions.spherical_kmeans(
        vectors[known], _initial(clustering, vectors[known]), clustering.seed
    )
    nearest, _ = directions.assign(vectors, centroids)
    quality = clustering.prune[0] if clustering.prune else None
    with progress("embedding", read["bytes"]) as advance:
        assign_parts(state, embedder, centroids, on_ray, advance)
    sizes = sizes_of(assigned(state, quality), len(centroids), quality)
    kept, pruned = prune(sizes, clustering.prune)
    groups, joined = merge(centroids, sizes, kept, clustering.clusters, clustering.merge_distance,
                           vectors, nearest, least)  # fmt: skip
    facts = facts_of(sample, vectors, nearest, centroids, sizes, groups, pruned, taken,
                     clustering.seed)  # fmt: skip
    names: dict[int, str | None] = {-1: None}
    names |= {k: c["name"] for c in facts["clusters"] for k in c["initial"]}
    optional = [c for c in ("group", "id", "score") if c in read["columns"]]
    columns = ["text", "source", *optional, *read["labels"], *([quality] if quality else [])]
    write_labelled(state, out, names, columns)
    labels = read["labels"] + (["source"] if read["sources"] > 1 else [])
    return {
        "settings": asdict(clustering),
        **{k: read[k] for k in ("documents", "bytes", "skipped")},
        "sampled": len(sample),
        "unknown": sizes.unknown,
        "joined": joined,
        **facts,
        "columns": {"label_columns": labels, **{f"{c}_column": c for c in optional}},
    }


def _initial(clustering: Clustering, vectors: np.ndarray) -> int:
    if clustering.init_clusters:
        return clustering.init_clusters
    fewest = clustering.clusters or 2
    distinct = len(np.unique(vectors, axis=0))
    return max(fewest, min(max(INITIAL, INITIAL_EACH * fewest), distinct // DOCUMENTS_EACH))

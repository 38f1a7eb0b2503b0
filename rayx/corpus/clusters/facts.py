"""Stage 1, corpus: from many initial clusters to the few that become domains, and what they are.

Legend: N sampled documents, F features, K initial clusters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from rayx.corpus.clusters import centroids as directions
from rayx.corpus.clusters.names import examples_of, map_of, names_of, telling_terms
from rayx.corpus.clusters.parts import CLUSTER, SIMILARITY
from rayx.errors import CorpusError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What all documents of each initial cluster come to; arrays of shape (K,)."""

    documents: np.ndarray
    bytes: np.ndarray
    heldout_bytes: np.ndarray
    similarity: np.ndarray  # mean cosine with the centroid; NaN for an empty cluster
    quality: np.ndarray  # mean of the quality column; NaN without a number
    unknown: int  # documents that are in no cluster


def sizes_of(assigned: pa.Table, clusters: int, quality_column: str | None) -> Sizes:
    """Return the sizes of initial clusters, from what `assigned` returned."""
    cluster = assigned[CLUSTER].to_numpy()
    known = cluster >= 0

    def total(values: np.ndarray, where: np.ndarray = known) -> np.ndarray:
        return np.bincount(cluster[where], values[where], clusters)

    documents = total(np.ones(len(cluster)))
    quality = np.full(clusters, np.nan)
    with np.errstate(invalid="ignore"):
        if quality_column:
            values = assigned[quality_column].to_numpy()
            rated = known & np.isfinite(values)
            quality = total(values, rated) / total(np.ones(len(cluster)), rated)
        similarity = total(assigned[SIMILARITY].to_numpy()) / documents
    num_bytes, heldout = (total(assigned[c].to_numpy()) for c in ("bytes", "heldout_bytes"))
    return Sizes(
        documents.astype(int),
        num_bytes.astype(int),
        heldout.astype(int),
        similarity,
        quality,
        int((~known).sum()),
    )


def prune(sizes: Sizes, rule: tuple[str, float] | None) -> tuple[list[int], list[int]]:
    """Return the initial clusters that stay and those whose mean quality is below the threshold.

    Empty clusters are in neither; one without any number stays.

    Raises:
        CorpusError: Nothing stays, or no document has a number.
    """
    filled = [int(k) for k in np.flatnonzero(sizes.documents)]
    if rule is None:
        return filled, []
    column, threshold = rule
    if not np.isfinite(sizes.quality).any():
        raise CorpusError(
            f"Column {column!r} has no number in any document; clusters cannot be pruned by it."
        )
    kept = [k for k in filled if not sizes.quality[k] < threshold]
    if not kept:
        raise CorpusError(
            f"Pruning by {column}<{threshold:g} leaves nothing: the best of {len(filled)} clusters "
            f"has a mean of {np.nanmax(sizes.quality):.4g}. Lower the threshold."
        )
    return kept, [k for k in filled if k not in kept]


def merge(
    centroids_KF: np.ndarray,
    sizes: Sizes,
    kept: Sequence[int],
    clusters: int | None,
    distance: float | None,
    vectors_NF: np.ndarray,
    nearest_N: np.ndarray,
    least: int,
) -> tuple[list[list[int]], int]:
    """Return the initial clusters of each final one, largest first, and how many were too small.

    Args:
        centroids_KF: Unit vectors.
        sizes: Of the initial clusters.
        kept: Those that are merged.
        clusters: Down to how many, or
        distance: Up to which distance; neither: by silhouette.
        vectors_NF: The sample.
        nearest_N: Its initial clusters, -1 for none.
        least: Bytes of train and of held-out text that a cluster needs, or it joins its nearest.

    Raises:
        CorpusError: Fewer than two clusters are left.
    """
    groups = [[k] for k in kept]
    if len(kept) > 2 and (clusters is None or len(kept) > clusters):
        mine, weights = centroids_KF[list(kept)], sizes.documents[list(kept)]
        if clusters is None and distance is None:
            some = np.isin(nearest_N, kept)
            places = np.searchsorted(kept, nearest_N[some])
            clusters = directions.best_number(vectors_NF[some], places, mine, weights)
            log.info("%d clusters are the fewest of good silhouette", clusters)
        labels = (
            directions.ward_labels(mine, weights, clusters)
            if clusters
            else directions.distance_labels(mine, weights, distance or 0.0)
        )
        groups = [[k for k, g in zip(kept, labels, strict=True) if g == group]
                  for group in range(labels.max() + 1)]  # fmt: skip
    elif clusters and len(kept) < clusters:
        log.warning("%d clusters are left of %d asked for", len(kept), clusters)
    heldout = [int(sizes.heldout_bytes[g].sum()) for g in groups]
    train = [int(sizes.bytes[g].sum()) - h for g, h in zip(groups, heldout, strict=True)]
    joined = directions.join_small(middles(centroids_KF, sizes, groups), train, heldout, least)
    for small, into in joined.items():
        groups[into] = groups[into] + groups[small]
    groups = [sorted(g) for i, g in enumerate(groups) if i not in joined]
    if joined:
        log.warning("%d clusters joined their nearest, having less than %d bytes of train or "
                    "held-out text; a larger heldout_share keeps more of them", len(joined),
                    least)  # fmt: skip
    if len(groups) < 2:
        raise CorpusError(
            f"Only one cluster is left of {len(kept)}: each needs {least:,} bytes of train and of "
            "held-out text. Give more text, a larger heldout_share, or merge and prune less."
        )
    return sorted(groups, key=lambda g: (-sizes.bytes[g].sum(), g)), len(joined)


def middles(centroids_KF: np.ndarray, sizes: Sizes, groups: Sequence[list[int]]) -> np.ndarray:
    """Return the direction of each group: the mean of its centroids by documents."""
    means = [np.average(centroids_KF[g], axis=0, weights=sizes.documents[g]) for g in groups]
    return directions.unit(np.array(means))


def facts_of(
    texts: Sequence[str],
    vectors_NF: np.ndarray,
    nearest_N: np.ndarray,
    centroids_KF: np.ndarray,
    sizes: Sizes,
    groups: Sequence[list[int]],
    pruned: Sequence[int],
    taken: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Return what is told of the clusters: initial, empty, clusters, pruned, map.

    Args:
        texts: The sample.
        vectors_NF: Its vectors.
        nearest_N: Its initial clusters, -1 for none.
        centroids_KF: Of the initial clusters.
        sizes: Of the initial clusters.
        groups: The initial clusters of each final one.
        pruned: Initial clusters that are left out.
        taken: Names that no cluster gets.
        seed: Of the map.
    """
    everything = [*groups, *([k] for k in pruned)]
    final = np.full(len(centroids_KF) + 1, -1)  # the last for -1
    for number, group in enumerate(everything):
        final[group] = number
    labels = final[nearest_N]
    terms = telling_terms(texts, labels, len(everything))
    shown = np.where(labels < len(groups), labels, -1)
    cosines = (vectors_NF * middles(centroids_KF, sizes, everything)[labels]).sum(1)
    entries = []
    for number, group in enumerate(everything):
        documents = sizes.documents[group]
        quality = np.average(sizes.quality[group], weights=documents)
        entries.append({
            "terms": terms[number],
            "documents": int(documents.sum()),
            "bytes": int(sizes.bytes[group].sum()),
            "similarity": round(float(np.average(sizes.similarity[group], weights=documents)), 4),
            "quality": round(float(quality), 4) if np.isfinite(quality) else None,
            "initial": list(group),
            "examples": examples_of(texts, labels, cosines, number),
        })  # fmt: skip
    names = names_of([e["terms"] for e in entries[: len(groups)]], taken)
    return {
        "initial": len(centroids_KF),
        "empty": int((sizes.documents == 0).sum()),
        "clusters": [{"name": n, **e} for n, e in zip(names, entries, strict=False)],
        "pruned": entries[len(groups) :],
        "map": map_of(vectors_NF, shown, seed),
    }

"""Stage 1, corpus: directions that documents gather around: found, merged, and how many.

Legend: N documents, F features, K clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from rayx.errors import CorpusError

INITS = 4
JUDGED = 2_000  # documents on which a number of clusters is judged
MOST_AUTO = 32
WORSE = 0.05  # share of the best silhouette that fewer clusters may cost
COPIES = 20  # of the mean centroid, so that weights are right to a few percent


def spherical_kmeans(vectors_NF: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Return the centroids of k-means on directions, shape (K, F), unit length.

    Args:
        vectors_NF: Unit vectors.
        clusters: K, at least 2.
        seed: Of the initial centroids; the best of 4 starts is kept.

    Raises:
        CorpusError: There are fewer distinct vectors than clusters.

    Source: Dhillon and Modha 2001 (spherical k-means); Arthur and Vassilvitskii 2007 (the start).
    Differs: Lloyd's steps keep means of any length; their directions are taken at the end.
    """
    from sklearn.cluster import KMeans

    distinct = len(np.unique(vectors_NF, axis=0))
    if distinct < clusters:
        raise CorpusError(
            f"{clusters} clusters are asked for, but the sample has {distinct} documents that "
            "differ to the embedder; ask for fewer clusters, or give more text."
        )
    with threadpool_limits(1):  # with more, sums are taken in another order
        starts: Any = INITS  # its stubs know "auto" only
        fitted = KMeans(clusters, n_init=starts, random_state=seed).fit(vectors_NF)
    return unit(fitted.cluster_centers_)


def unit(vectors_NF: np.ndarray) -> np.ndarray:
    """Return the directions of vectors, float32; of a zero vector, zero."""
    lengths = np.linalg.norm(vectors_NF, axis=1, keepdims=True)
    return (vectors_NF / np.maximum(lengths, 1e-12)).astype(np.float32)


def assign(vectors_NF: np.ndarray, centroids_KF: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return each vector's cluster (int32, -1 for a zero vector) and cosine (float32), shape (N,).

    Of equally near centroids the first is taken.
    """
    with threadpool_limits(1):
        cosines_NK = vectors_NF @ centroids_KF.T
    nearest = cosines_NK.argmax(1).astype(np.int32)
    nearest[~vectors_NF.any(1)] = -1
    return nearest, cosines_NK.max(1).astype(np.float32)


def ward_labels(centroids_KF: np.ndarray, documents_K: np.ndarray, clusters: int) -> np.ndarray:
    """Return the cluster of each centroid after merging down to a number, from 0, shape (K,).

    The two clusters merge whose merging adds least to the squared distances of all documents, seen
    as lying at their centroids.

    Source: Ward 1963.
    Differs from: Diao et al. 2025, arXiv:2504.13161, who merge by distance of centroids alone. On
        labelled real text that made one large cluster and many tiny ones.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    shares_K = documents_K / documents_K.sum()
    copies_K = np.ceil(shares_K * COPIES * len(centroids_KF)).astype(int)
    # the library has no weights: what weighs more is there more often
    copied = np.repeat(centroids_KF.astype(np.float64), copies_K, axis=0)
    labels = fcluster(linkage(copied, "ward"), clusters, "maxclust")
    return labels[np.cumsum(copies_K) - copies_K] - 1


def distance_labels(
    centroids_KF: np.ndarray, documents_K: np.ndarray, distance: float
) -> np.ndarray:
    """Return the cluster of each centroid after merging those within a distance, shape (K,).

    Args:
        centroids_KF: Unit vectors.
        documents_K: Of each.
        distance: Euclidean, in (0, 2): clusters merge while the mean distance between their
            centroids, seen as directions from the mean of all text, is below it. sqrt(2) is a right
            angle.

    Source: Diao et al. 2025, arXiv:2504.13161 (a distance of 1.5; the linkage is not stated).
    Differs: the mean of all text is taken off first. Without that, what all text has in common
        hides what tells it apart, and one cluster swallows the others.
    """
    from scipy.cluster.hierarchy import fcluster, linkage

    mean_F = np.average(centroids_KF, axis=0, weights=documents_K)
    tree = linkage(unit(centroids_KF - mean_F).astype(np.float64), "average")
    return fcluster(tree, distance, "distance") - 1


def best_number(
    vectors_NF: np.ndarray, nearest_N: np.ndarray, centroids_KF: np.ndarray, documents_K: np.ndarray
) -> int:
    """Return the fewest clusters, from 2 to 32, whose silhouette is within 5% of the best.

    Args:
        vectors_NF: Unit vectors of the sample.
        nearest_N: Their initial clusters.
        centroids_KF: Of the initial clusters.
        documents_K: Their documents.

    Source: Rousseeuw 1987 (silhouette), by cosine distance on at most 2,000 documents.
    Differs: not the best, because on real text the silhouette hardly changes beyond the number of
        its sources, and the best was anywhere from 9 to 30.
    """
    from sklearn.metrics import silhouette_score

    step = -(-len(vectors_NF) // JUDGED)
    vectors_NF, nearest_N = vectors_NF[::step], nearest_N[::step]
    scores: dict[int, float] = {}
    with threadpool_limits(1):
        for clusters in range(2, min(MOST_AUTO, len(centroids_KF)) + 1):
            labels = ward_labels(centroids_KF, documents_K, clusters)[nearest_N]
            if 1 < len(np.unique(labels)) < len(labels):
                scores[clusters] = float(silhouette_score(vectors_NF, labels, metric="cosine"))
    best = max(scores.values(), default=0.0)
    return min((k for k, score in scores.items() if score >= best - WORSE * abs(best)), default=2)


def join_small(
    centroids_KF: np.ndarray, train_K: Sequence[int], heldout_K: Sequence[int], least: int
) -> dict[int, int]:
    """Return which cluster joins which, the smallest first, until all that are left are large.

    Args:
        centroids_KF: Directions of the clusters.
        train_K: Their bytes of train text.
        heldout_K: Their bytes of held-out text.
        least: Bytes of either that a cluster needs.
    """
    sizes = dict(enumerate(zip(train_K, heldout_K, strict=True)))
    joined: dict[int, int] = {}
    while len(sizes) > 1:
        small = [k for k, of in sizes.items() if min(of) < least]
        if not small:
            break
        smallest = min(small, key=lambda k: (sum(sizes[k]), k))
        train, heldout = sizes.pop(smallest)
        left = list(sizes)
        nearest = left[int((centroids_KF[left] @ centroids_KF[smallest]).argmax())]
        sizes[nearest] = (sizes[nearest][0] + train, sizes[nearest][1] + heldout)
        joined[smallest] = nearest
    return {k: _end(joined, k) for k in joined}


def _end(joined: dict[int, int], cluster: int) -> int:
    while cluster in joined:
        cluster = joined[cluster]
    return cluster

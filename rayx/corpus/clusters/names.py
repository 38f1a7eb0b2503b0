"""Stage 1, corpus: what a cluster is called, and what it looks like.

Legend: N documents, K clusters, V terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

TERMS = 10  # that tell a cluster, kept
NAMED_BY = 2  # of them
VOCABULARY = 50_000
EXAMPLES = 3
EXAMPLE_CHARS = 240
POINTS = 1_500  # of the map
WORD = r"(?u)\b[^\W\d_]{3,25}\b"


def telling_terms(texts: Sequence[str], labels: np.ndarray, clusters: int) -> list[list[str]]:
    """Return the terms that tell each cluster from the others, the most telling first.

    A term's weight in cluster c is `s_c * log(1 + K / sum_k s_k)`, where s_c is the share of the
    cluster's documents that have it.

    Args:
        texts: Sampled documents.
        labels: Their clusters, shape (N,), -1 for none.
        clusters: K.

    Returns:
        Up to 10 terms a cluster; none for one that has no sampled document with a word.

    Source: Grootendorst 2022, arXiv:2203.05794 (class-based TF-IDF).
    Differs: documents are counted and not words, so that no long document names a cluster.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer(binary=True, token_pattern=WORD, stop_words="english",
                            max_features=VOCABULARY)  # fmt: skip
    try:
        has_NV: Any = words.fit_transform(texts)
    except ValueError:  # no words at all
        return [[] for _ in range(clusters)]
    vocabulary = words.get_feature_names_out()
    shares_KV = np.zeros((clusters, len(vocabulary)))
    for cluster in range(clusters):
        mine = labels == cluster
        if mine.any():
            shares_KV[cluster] = np.asarray(has_NV[mine].mean(0)).ravel()
    weights_KV = shares_KV * np.log1p(clusters / np.maximum(shares_KV.sum(0), 1e-12))
    order_KV = np.argsort(-weights_KV, axis=1, kind="stable")[:, :TERMS]
    return [[str(vocabulary[v]) for v in row if weights_KV[k, v] > 0]
            for k, row in enumerate(order_KV)]  # fmt: skip


def names_of(terms: Sequence[Sequence[str]], taken: Iterable[str] = ()) -> list[str]:
    """Return a domain name for each cluster: its two most telling terms, more where two agree.

    Args:
        terms: Of each cluster, the most telling first.
        taken: Names that are in use.
    """
    used = {name.casefold() for name in taken}
    names = []
    for number, mine in enumerate(terms):
        different: list[str] = []
        for term in mine:  # "license" and "licensed" say the same
            if not any(term[:5] == other[:5] for other in different):
                different.append(term)
        candidates = ["-".join(different[:n]) for n in range(NAMED_BY, len(different) + 1)]
        candidates += different[:1] + [f"cluster-{number}"]
        candidates += [f"cluster-{number}-{n}" for n in range(2, 1000)]
        name = next(c for c in candidates if c.casefold() not in used)
        used.add(name.casefold())
        names.append(name)
    return names


def examples_of(
    texts: Sequence[str], labels: np.ndarray, similarity: np.ndarray, cluster: int
) -> list[dict[str, Any]]:
    """Return the beginnings of the sampled documents nearest a cluster's centroid."""
    mine = np.flatnonzero(labels == cluster)
    nearest = mine[np.argsort(-similarity[mine], kind="stable")][:EXAMPLES]
    return [{"text": texts[i][:EXAMPLE_CHARS], "similarity": round(float(similarity[i]), 4)}
            for i in nearest]  # fmt: skip


def map_of(vectors_NF: np.ndarray, labels: np.ndarray, seed: int) -> dict[str, Any]:
    """Return places of sampled documents in two dimensions, in [0, 1], like beside like.

    Returns:
        method, x, y and cluster, of at most 1,500 documents.

    Source: van der Maaten and Hinton 2008 (t-SNE), from the principal components.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    some = np.flatnonzero(labels >= 0)
    some = some[:: -(-len(some) // POINTS) or 1]
    vectors = vectors_NF[some].astype(np.float64)
    method, places = "none", np.zeros((len(some), 2))
    with threadpool_limits(1):
        if len(some) >= 100:
            method = "t-SNE"
            map_ = TSNE(init="pca", metric="cosine", random_state=seed, n_jobs=1)
            places = map_.fit_transform(vectors)
        elif len(some) >= 3 and vectors.shape[1] >= 2:
            method = "principal components"
            places = PCA(2, svd_solver="full").fit_transform(vectors)
    low, high = places.min(0), places.max(0)
    scaled = (places - low) / np.maximum(high - low, 1e-12)
    return {"method": method, "x": [round(float(v), 3) for v in scaled[:, 0]],
            "y": [round(float(v), 3) for v in scaled[:, 1]],
            "cluster": [int(c) for c in labels[some]]}  # fmt: skip

"""Importance sampling: the mixture whose text lies where a specific set lies.

Source: CRISP, Grangier et al. 2024, arXiv:2410.03735 (read in a note on the paper).
Differs: a text's place is its TF-IDF over token ids, reduced by a truncated SVD, in place of a
    language model's embedding.

Legend: G generic and S specific sequences, F features, K domains, C clusters, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from rayx.corpus import Corpus
from rayx.corpus.places import probe_places
from rayx.corpus.sampler import take
from rayx.mixture import Mixture
from rayx.policy import Probe
from rayx.spec import require


def importance_mixture(
    corpus: Corpus,
    probe: Probe,
    domains: Sequence[str],
    *,
    clusters: int = 0,
    context: int = 64,
    sequences: int = 512,
    features: int = 64,
    seed: int = 0,
) -> Mixture:
    """Return h_i, the share of a specific set's sequences whose nearest centroid is domain i's.

    With `clusters`, centroids are those of k-means over the domains' text, and a cluster's share is
    given to domains by their tokens in it: h_i = sum_c share_c tokens_ic / tokens_c. That tells
    apart the topics within a domain, which need no label. For a corpus whose domains are clusters
    themselves the first form is CRISP's.

    Args:
        corpus: The corpus.
        probe: The specific set.
        domains: The generic domains, two or more.
        clusters: 0 for a centroid a domain, else how many, 2 or more.
        context: Tokens of a sequence.
        sequences: Of each domain at most, spread evenly over its training text.
        features: Of the reduced space at most.
        seed: Draws the SVD's and k-means' starts.

    Raises:
        CorpusError: No such target, or one without a whole sequence of text.
        SpecError: An argument is out of range.
    """
    require(len(set(domains)) > 1, "domains", domains, "two different ones or more")
    require(clusters == 0 or clusters > 1, "clusters", clusters, "0, or 2 or more")
    texts_K = [_sequences(corpus, Probe(target=d, part="train", sequences=sequences), context)
               for d in domains]  # fmt: skip
    specific_ST = _sequences(corpus, probe, context)
    owner_G = np.repeat(np.arange(len(domains)), [len(text) for text in texts_K])
    generic_GF, specific_SF = _embedded(
        np.concatenate(texts_K), specific_ST, corpus.vocab_size, features, seed
    )
    onehot_GK = np.eye(len(domains))[owner_G]
    if clusters == 0:
        centroids_KF = onehot_GK.T @ generic_GF / onehot_GK.sum(axis=0)[:, None]
        near_S = _nearest(specific_SF, centroids_KF)
        return Mixture.from_array(np.bincount(near_S, minlength=len(domains)), domains)

    from sklearn.cluster import KMeans

    tokens_K = np.array([corpus.tokens[d] for d in domains]) / onehot_GK.sum(axis=0)
    weight_G = tokens_K[owner_G]
    require(clusters <= len(owner_G), "clusters", clusters, f"at most {len(owner_G)} sequences")
    found = KMeans(clusters, random_state=seed).fit(generic_GF, sample_weight=weight_G)
    tokens_CK = np.eye(clusters)[found.labels_].T @ (onehot_GK * weight_G[:, None])
    used_C = np.flatnonzero(tokens_CK.sum(axis=1))  # equal texts may leave a cluster empty
    near_S = _nearest(specific_SF, found.cluster_centers_[used_C])
    share_C = np.bincount(near_S, minlength=len(used_C))
    within_CK = tokens_CK[used_C] / tokens_CK[used_C].sum(axis=1, keepdims=True)
    return Mixture.from_array(share_C @ within_CK, domains)


def _sequences(corpus: Corpus, probe: Probe, context: int) -> np.ndarray:
    """Return the probe's sequences, shape (S, context + 1)."""
    tokens = corpus.train(probe.target) if probe.part == "train" else corpus.heldout(probe.target)
    return take(tokens, probe_places(corpus, probe, context), context)


def _embedded(
    generic_GT: np.ndarray, specific_ST: np.ndarray, vocab_size: int, features: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return places of unit length, (G, F) and (S, F); only the generic text decides the space."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfTransformer
    from sklearn.preprocessing import normalize

    def counts(tokens_NT: np.ndarray) -> csr_matrix:
        rows = np.repeat(np.arange(len(tokens_NT)), tokens_NT.shape[1])
        ones = np.ones(tokens_NT.size)
        return csr_matrix((ones, (rows, tokens_NT.ravel())), (len(tokens_NT), vocab_size))

    weigh = TfidfTransformer(sublinear_tf=True)
    weighed = weigh.fit_transform(counts(generic_GT))
    reduce = TruncatedSVD(min(features, min(weighed.shape) - 1), random_state=seed)
    generic_GF = reduce.fit_transform(weighed)
    specific_SF = reduce.transform(weigh.transform(counts(specific_ST)))
    return np.asarray(normalize(generic_GF)), np.asarray(normalize(specific_SF))


def _nearest(points_SF: np.ndarray, centroids_CF: np.ndarray) -> np.ndarray:
    """Return the index of the nearest centroid (Euclidean) of each point, shape (S,)."""
    # |p - c|^2 less |p|^2, which all centroids share.
    return ((centroids_CF**2).sum(axis=1) - 2.0 * points_SF @ centroids_CF.T).argmin(axis=1)

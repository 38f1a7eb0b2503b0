"""Log-likelihood vectors: how models see a fixed set of labelled texts, and how far apart they are.

A model is the vector of its log-likelihoods of N probe texts. Near by, half the variance over texts
of the difference of two vectors is the Kullback-Leibler divergence of the models. What measures
vectors is `rayx.proxy.likelihood`; no torch here.

Legend: N texts, M models, K domains.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayx.errors import ModelError, SpecError

CLIP_PERCENT = 2.0
LEAST_SD_NATS = 1e-6  # of a difference; rounding alone leaves less


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Likelihoods:
    """One model's log-likelihoods of the texts of a probe.

    Attributes:
        model: Its name, for messages.
        probe: Which texts: equal only where corpus, context, part and number are.
        targets: Names of the kinds of text.
        target_N: Kind of each text, an index into `targets`.
        nats_N: log p(text), summed over predicted tokens, the first one excluded; finite.
        bytes_N: Bytes of text that it is of, > 0.
    """

    model: str
    probe: str
    targets: tuple[str, ...]
    target_N: np.ndarray
    nats_N: np.ndarray
    bytes_N: np.ndarray

    def __post_init__(self) -> None:
        shapes = {self.target_N.shape, self.nats_N.shape, self.bytes_N.shape}
        if shapes != {(len(self.nats_N),)} or len(self.nats_N) < 2:
            raise SpecError(
                f"Likelihoods of {self.model} have shapes {shapes}; expected one value, one label "
                "and one number of bytes a text, of at least two texts."
            )
        if not np.isfinite(self.nats_N).all():
            target = self.targets[self.target_N[~np.isfinite(self.nats_N)][0]]
            raise ModelError(
                f"{self.model}: the log-likelihood of a text of {target!r} is not finite. Its "
                "weights are damaged, or it diverged; give another checkpoint."
            )

    def per_target(self, vector_N: np.ndarray | None = None) -> np.ndarray:
        """Return the mean over each target's texts, of the log-likelihoods by default."""
        return target_means(self.nats_N if vector_N is None else vector_N, self.target_N)

    @property
    def bits_per_byte(self) -> np.ndarray:
        """Loss of each target as records have it, bits per byte, shape (targets,)."""
        return -self.per_target() / (math.log(2.0) * self.per_target(self.bytes_N))


def target_means(values_MN: np.ndarray, target_N: np.ndarray) -> np.ndarray:
    """Return the mean over the texts of each target, shape (..., targets)."""
    count = int(target_N.max()) + 1
    return np.stack([values_MN[..., target_N == t].mean(-1) for t in range(count)], axis=-1)


def matrix(models: Sequence[Likelihoods]) -> np.ndarray:
    """Return the models' vectors as rows, clipped together, shape (M, N).

    Values below the 2nd percentile of the whole matrix are raised to it: a few texts that no model
    can predict would else decide everything.

    Raises:
        SpecError: The models were not read on the same texts.

    Source: Oyama et al. 2025, arXiv:2502.16173 (log-likelihood vectors, clipping).
    """
    first = models[0]
    for other in models[1:]:
        if other.probe != first.probe or len(other.nats_N) != len(first.nats_N):
            raise SpecError(
                f"{other.model} was read on {other.probe}, and {first.model} on {first.probe}; "
                "vectors compare on the same texts only."
            )
    nats_MN = np.stack([model.nats_N for model in models])
    return np.maximum(nats_MN, np.percentile(nats_MN, CLIP_PERCENT))


def difference(base: Likelihoods, target: Likelihoods) -> np.ndarray:
    """Return what the target knows beyond the base, centred: d_s - mean d, nats a text, shape (N,).

    Raises:
        SpecError: The two are equal on these texts, or were not read on the same.
    """
    base_N, target_N = matrix([base, target])
    found_N = target_N - base_N
    found_N = found_N - found_N.mean()
    if found_N.std() < LEAST_SD_NATS:
        raise SpecError(
            f"{target.model} and {base.model} differ by the same on all {len(found_N)} texts "
            f"(sd {found_N.std():.1e} nats), so no direction leads from one to the other. Give "
            "another target or another base."
        )
    return found_N


def kl_bits_per_byte(first: Likelihoods, second: Likelihoods) -> float:
    """Return the estimated divergence of two models: Var_s(l_1 - l_2) / 2 / (ln 2 mean bytes).

    Of models near each other; far apart it is no divergence any more but still a distance, and
    `mean_gap_bits_per_byte` should be looked at beside it. Symmetric, >= 0.

    Source: Oyama et al. 2025, arXiv:2502.16173; Shimodaira 1993 for the variance.
    """
    first_N, second_N = matrix([first, second])
    gap_N = first_N - second_N
    return float(gap_N.var() / 2.0 / (math.log(2.0) * first.bytes_N.mean()))


def plane(models: Sequence[Likelihoods]) -> tuple[np.ndarray, np.ndarray]:
    """Return the two directions in which models differ most: places (M, 2) and shares (2,).

    Principal components of the vectors, each model's mean and each text's mean taken out; distances
    in the plane are nats a text, root mean square. Shares are of the whole variance.
    """
    nats_MN = matrix(models)
    nats_MN = nats_MN - nats_MN.mean(1, keepdims=True)
    nats_MN = nats_MN - nats_MN.mean(0)
    left, size, _ = np.linalg.svd(nats_MN / np.sqrt(nats_MN.shape[1]), full_matrices=False)
    return left[:, :2] * size[:2], size[:2] ** 2 / max(float((size**2).sum()), 1e-300)


def mean_gap_bits_per_byte(first: Likelihoods, second: Likelihoods) -> float:
    """Return how much better the first model predicts the texts, bits per byte, unclipped."""
    if first.probe != second.probe:
        matrix([first, second])  # says what is wrong
    gap = float((first.nats_N - second.nats_N).mean())
    return gap / (math.log(2.0) * float(first.bytes_N.mean()))

"""The mixture sampler: which sequences of which domain an optimizer step reads.

Step b holds `batch_sequences` items. Their domains come from systematic sampling: the points
(j + u_b) / batch over [0, 1) fall into intervals as wide as the weights, so the count of every
domain in every step is its exact quota rounded down or up. The offsets u_b walk by the golden
ratio, which keeps the sum over steps within a few sequences of the exact quota for ever.

Item n of a domain is sequence n mod S of that domain in the order of epoch n // S. So every item is
a pure function of (data_seed, step): resuming is exact, workers need no coordination, and runs that
share a data_seed read each domain in the same order (common random numbers).

Legend: B sequences of a step, K domains, T context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from rayx.mixture import Mixture, Schedule

_GOLDEN = (5**0.5 - 1) / 2


def generator(*key: object) -> np.random.Generator:
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "little"))


class Sampler:
    """Sequences for each step of one run.

    Args:
        sequences: Domain -> number S of non-overlapping training sequences it holds, > 0.
        batch_sequences: Sequences of a step.
        data_seed: Draws the offsets and the order in which each domain is read.
    """

    def __init__(self, sequences: Mapping[str, int], batch_sequences: int, data_seed: int) -> None:
        self.domains = tuple(sequences)
        self.batch_sequences = batch_sequences
        self.data_seed = data_seed
        self.drawn_K = np.zeros(len(self.domains), dtype=np.int64)  # items taken so far
        self._sequences = [int(sequences[d]) for d in self.domains]
        self._mixture: Mixture | None = None  # of the last step
        self._start = float(generator("offset", data_seed).random())
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # domain index -> (epoch, order)

    def _order(self, k: int, epoch: int) -> np.ndarray:
        cached = self._orders.get(k)
        if cached is None or cached[0] != epoch:
            rng = generator("order", self.data_seed, self.domains[k], epoch)
            cached = self._orders[k] = (epoch, rng.permutation(self._sequences[k]))
        return cached[1]

    def step(self, step: int, mixture: Mixture) -> tuple[np.ndarray, np.ndarray]:
        """Return the next step's items and move on.

        Args:
            step: Number of the step, from 0; steps are asked for in order.
            mixture: The weights in force at this step.

        Returns:
            Domain indices (into `domains`) and sequence numbers, each of shape (B,).
        """
        if mixture is not self._mixture:  # the same one for most of the steps
            parts = [mixture.millionths.get(d, 0) for d in self.domains]
            self._mixture, self._upper_K = mixture, np.cumsum(parts) / 1e6
        offset = (self._start + step * _GOLDEN) % 1.0
        points_B = (np.arange(self.batch_sequences) + offset) / self.batch_sequences
        domain_B = np.searchsorted(self._upper_K, points_B, side="right")
        parts = []
        for k, wanted in enumerate(np.bincount(domain_B).tolist()):  # points, so domains, ascend
            while wanted:
                epoch, place = divmod(int(self.drawn_K[k]), self._sequences[k])
                part = self._order(k, epoch)[place : place + wanted]
                parts.append(part)
                self.drawn_K[k] += len(part)
                wanted -= len(part)
        return domain_B, np.concatenate(parts)

    def drawn(self) -> dict[str, int]:
        """Return domain -> sequences read so far; with the step, all there is to know to go on."""
        return {d: int(n) for d, n in zip(self.domains, self.drawn_K, strict=True)}

    def epochs(self) -> dict[str, float]:
        """Return the passes over each domain so far, domains not read left out."""
        passes_K = self.drawn_K / np.array(self._sequences)
        return {d: float(p) for d, p in zip(self.domains, passes_K, strict=True) if p > 0}


def phase_mixtures(schedule: Schedule, steps: int, batch_tokens: int) -> Sequence[Mixture]:
    """Return the mixture in force at each step, shape (steps,).

    A phase ends at the step nearest to its last token, so weights change at a step boundary.
    """
    result: list[Mixture] = []
    end = 0
    for phase in schedule.phases:
        end += phase.tokens
        result += [phase.mixture] * (min(round(end / batch_tokens), steps) - len(result))
    return result


def sequence_count(num_tokens: int, context: int) -> int:
    """Return how many sequences of `context` tokens and their successors `num_tokens` hold."""
    return max(0, (num_tokens - 1) // context)


def take(tokens: np.ndarray, sequence_B: np.ndarray, context: int) -> np.ndarray:
    """Return sequences with one token more for the targets, shape (B, context + 1), int64."""
    out_BT = np.empty((len(sequence_B), context + 1), dtype=np.int64)
    for row, start in zip(out_BT, (sequence_B * context).tolist(), strict=True):
        row[:] = tokens[start : start + context + 1]
    return out_BT

"""The batches of a pack: each run's own mixture and seeds over one set of shards.

Legend: R runs, B sequences of a batch, T context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rayx.corpus import Corpus
from rayx.corpus.sampler import Sampler, sequence_count, take
from rayx.errors import SpecError
from rayx.spec import TrainSpec
from rayx.steering import Steering


class Batches:
    """What each run reads at each step.

    Args:
        corpus: Where the text is.
        specs: The runs.
        drawn: For each, domain -> sequences that it has read before.
        steps_before: Steps of their path before the first that is asked for.
        rows: The sequences of a batch that are read here.
    """

    def __init__(
        self,
        corpus: Corpus,
        specs: Sequence[TrainSpec],
        drawn: Sequence[Mapping[str, int]],
        steps_before: int,
        rows: slice = slice(None),
    ) -> None:
        self.rows = rows
        self.context = specs[0].model.context
        # Ancestors' domains stay, so that a branch that reads them again goes on where they were.
        wanted = {d for s in specs for a in s.path for p in a.schedule.phases for d in p.mixture}
        for spec in specs:
            corpus.check_mixture(spec.schedule.average())
        self.domains = corpus.in_order(wanted)
        self.shards = [np.asarray(corpus.train(d)) for d in self.domains]
        sequences = {
            domain: sequence_count(len(shard), self.context)
            for domain, shard in zip(self.domains, self.shards, strict=True)
        }
        for domain, count in sequences.items():
            if count == 0:
                raise SpecError(
                    f"Domain {domain!r} has {corpus.tokens[domain]} training tokens, fewer "
                    f"than one sequence of context {self.context}. Leave it out or use a shorter "
                    "context."
                )
        batch = specs[0].optimizer.batch_sequences
        self.samplers = [Sampler(sequences, batch, spec.data_seed) for spec in specs]
        for sampler, known in zip(self.samplers, drawn, strict=True):
            sampler.drawn_K[:] = [known.get(d, 0) for d in sampler.domains]
        self.steps_before = steps_before

    def next(self, step: int, steerings: Sequence[Steering]) -> tuple[Tensor, np.ndarray]:
        """Return the tokens of a step, shape (R, B, T + 1), and their domains, indices (R, B)."""
        rows, domains = [], []
        for sampler, steering in zip(self.samplers, steerings, strict=True):
            domain_B, sequence_B = sampler.step(self.steps_before + step, steering.mixture(step))
            domain_B, sequence_B = domain_B[self.rows], sequence_B[self.rows]
            ends = np.flatnonzero(np.diff(domain_B)) + 1  # of a domain's rows: they lie together
            firsts = domain_B[[0, *ends]].tolist()
            rows += [
                take(self.shards[k], sequences, self.context)
                for k, sequences in zip(firsts, np.split(sequence_B, ends), strict=True)
            ]
            domains.append(domain_B)
        tokens = np.concatenate(rows).reshape(len(domains), -1, self.context + 1)
        return torch.from_numpy(tokens), np.stack(domains)

    def drawn(self) -> list[dict[str, int]]:
        """Return for each run domain -> sequences read so far."""
        return [sampler.drawn() for sampler in self.samplers]

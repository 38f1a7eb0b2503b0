"""Which sequences of a target's text are read to judge a run, or to steer it.

Legend: S sequences.
"""

from __future__ import annotations

import numpy as np

from rayx.corpus.corpus import Corpus
from rayx.corpus.sampler import sequence_count
from rayx.errors import CorpusError
from rayx.policy import Probe
from rayx.recipe import Evaluation


def heldout_places(corpus: Corpus, target: str, context: int, evaluation: Evaluation) -> np.ndarray:
    """Return the numbers of the held-out sequences of a target that are read, shape (S,).

    Raises:
        CorpusError: The part of the target's held-out text is shorter than one sequence.
    """
    num_tokens = corpus.heldout_tokens[target]
    available = sequence_count(num_tokens, context)
    begin = available // 2 if evaluation.part == "second" else 0
    end = available // 2 if evaluation.part == "first" else available
    if begin == end:
        raise CorpusError(
            f"Target {target!r} has {num_tokens} held-out tokens, too few for one sequence of "
            f"context {context} in its part {evaluation.part!r}. Build the corpus with a larger "
            "held-out share."
        )
    return _spread(begin, end, evaluation.sequences)


def probe_places(corpus: Corpus, probe: Probe, context: int) -> np.ndarray:
    """Return the numbers of the sequences that a probe reads, shape (S,).

    Raises:
        CorpusError: There is no such target, or its part is shorter than one sequence.
    """
    if probe.part != "train":
        corpus.check_target(probe.target, "heldout")
        evaluation = Evaluation(sequences=probe.sequences, part=probe.part)
        return heldout_places(corpus, probe.target, context, evaluation)
    corpus.check_target(probe.target, "train")
    available = sequence_count(corpus.tokens[probe.target], context)
    if not available:
        raise CorpusError(
            f"Probe {probe.target!r} has {corpus.tokens[probe.target]} training tokens, fewer than "
            f"one sequence of context {context}. Give another, or a shorter context."
        )
    return _spread(0, available, probe.sequences)


def _spread(begin: int, end: int, count: int) -> np.ndarray:
    return np.unique(np.linspace(begin, end - 1, min(count, end - begin)).astype(int))

"""How exactly a target's held-out text can measure a loss, read off the text alone."""

from __future__ import annotations

import numpy as np

from rayx.corpus.corpus import Corpus
from rayx.errors import CorpusError
from rayx.units import bits_per_byte

MOST_TOKENS = 4_000_000  # of held-out text that are looked at


def heldout_error_bpb(corpus: Corpus, target: str) -> float:
    """Return the standard error of a loss on a target's held-out text, bits per byte.

    Of a model that knows the target's token frequencies and no more, over documents d with n_d
    nats and t_d tokens: R = sum n / sum t, error = sqrt(D / (D - 1) sum (n_d - R t_d)^2) / sum t,
    turned to bits per byte. Trained proxies' losses spread 1.2 to 1.8 times as much over sequences
    of the sample corpus. Noise of training comes on top.

    Returns:
        The error; nan of a single document. Beyond MOST_TOKENS the rest is taken to be alike.

    Raises:
        CorpusError: No such target.
    """
    tokens = corpus.heldout(target)
    whole = len(tokens)
    tokens = np.asarray(tokens[:MOST_TOKENS])
    ends = np.flatnonzero(tokens == corpus.eos_id)
    if not len(ends):
        raise CorpusError(f"The held-out text of {target!r} in {corpus.url} has no end of text.")
    tokens = tokens[: ends[-1] + 1]
    count_V = np.bincount(tokens, minlength=corpus.vocab_size)
    nats_V = -np.log(np.maximum(count_V, 1) / len(tokens))
    starts = np.concatenate([[0], ends[:-1] + 1])
    nats_D, tokens_D = np.add.reduceat(nats_V[tokens], starts), ends + 1 - starts
    if len(ends) < 2:
        return float("nan")
    apart_D = nats_D - nats_D.sum() / tokens_D.sum() * tokens_D
    error = np.sqrt(len(ends) / (len(ends) - 1) * (apart_D**2).sum()) / tokens_D.sum()
    error *= np.sqrt(len(tokens) / whole)
    return bits_per_byte(float(error), whole, corpus.heldout_bytes[target])

"""Held-out text of a corpus in the tokens of another tokenizer, cut where the proxies cut it.

A proxy's sequence holds T predicted tokens of the corpus, after one that only gives context. The
same sequence for a model with its own tokenizer holds the tokens that end within the bytes of those
T: documents are decoded and encoded whole, so no character is cut, and each byte of text is
predicted in exactly one sequence, by every model from about the same bytes before it.

Legend: S sequences of a target, T context in tokens of the corpus.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from rayx.corpus import Corpus
from rayx.corpus.places import heldout_places
from rayx.corpus.sampler import take
from rayx.spec import Evaluation


@dataclass(frozen=True, slots=True)
class Encoder:
    """A model's tokenizer, as this module needs it."""

    tokenizer: Tokenizer  # one that takes special tokens inside a text as plain text
    eos: int  # closes each document
    prefix: tuple[int, ...] = ()  # tokens that every sequence of the model begins with

    def same_as(self, corpus: Corpus) -> bool:
        """Whether it gives the corpus' own tokens: same vocabulary, merges and splitting."""
        if self.eos != corpus.eos_id:
            return False
        mine, theirs = (_decisive(t) for t in (self.tokenizer, corpus.tokenizer()))
        return mine == theirs


@dataclass(frozen=True, slots=True)
class Passages:
    """A target's sequences; the last `scored_S[s]` tokens of sequence s are predicted."""

    tokens: list[np.ndarray]  # S arrays of token ids
    scored_S: np.ndarray


def passages(
    corpus: Corpus, target: str, encoder: Encoder, context: int, evaluation: Evaluation
) -> Passages:
    """Return the text of the proxies' held-out sequences in a model's own tokens.

    A token belongs to the sequence in which its last byte lies, and the end of a document counts
    as one byte. Where the tokenizer is the corpus' own, the tokens are taken as they are.

    Args:
        corpus: The corpus.
        target: One of its targets.
        encoder: The model's tokenizer.
        context: T, in tokens of the corpus.
        evaluation: How many sequences at most, and of which part of the held-out text.

    Raises:
        CorpusError: The held-out text is shorter than one sequence.
    """
    places = heldout_places(corpus, target, context, evaluation)
    shard = corpus.heldout(target)
    prefix = np.array(encoder.prefix, np.int64)
    if encoder.same_as(corpus):
        rows = take(shard, places, context)
        tokens = [np.concatenate([prefix, row]) for row in rows]
        return Passages(tokens, np.full(len(places), context))
    closes = np.flatnonzero(np.asarray(shard) == corpus.eos_id)  # where documents end
    first_S = np.searchsorted(closes, places * context)
    last_S = np.searchsorted(closes, places * context + context)
    wanted = np.unique(
        np.concatenate([np.arange(a, b + 1) for a, b in zip(first_S, last_S, strict=True)])
    )
    starts = np.append(0, closes[:-1] + 1)
    documents = [shard[starts[d] : closes[d]].astype(np.int64) for d in wanted]
    own = corpus.tokenizer()
    texts = own.decode_batch([d.tolist() for d in documents], skip_special_tokens=False)
    theirs = dict(zip(wanted.tolist(), _encode(own, texts), strict=True))
    mine = dict(zip(wanted.tolist(), _encode(encoder.tokenizer, texts), strict=True))
    for d, ids in zip(wanted.tolist(), documents, strict=True):
        if len(theirs[d].ids) != len(ids):
            # A tokenizer that does not give its text back: tokens are taken as equally long.
            ends = np.linspace(0, theirs[d].num_bytes, len(ids) + 1)[1:]
            theirs[d] = _Encoded(ids, np.ceil(ends).astype(np.int64), theirs[d].num_bytes)

    tokens, scored = [], []
    for place, first, last in zip(places * context, first_S, last_S, strict=True):
        inside = range(first, last + 1)
        _, ends = _stream([theirs[d] for d in inside], corpus.eos_id)
        ids, own_ends = _stream([mine[d] for d in inside], encoder.eos)
        bounds = ends[[place - starts[first], place - starts[first] + context]]
        low, high = np.searchsorted(own_ends, bounds, side="right")
        before = ids[low - 1 : low] if low else np.array([encoder.eos] if first else [], np.int64)
        row = np.concatenate([prefix, before, ids[low:high]])
        tokens.append(row)
        # The first token of a corpus has nothing before it, so it is not predicted.
        scored.append(min(high - low, len(row) - 1))
    return Passages(tokens, np.array(scored))


@dataclass(frozen=True, slots=True)
class _Encoded:
    ids: np.ndarray
    ends: np.ndarray  # bytes of the text up to the end of each token
    num_bytes: int


def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[_Encoded]:
    result = []
    for text, found in zip(
        texts, tokenizer.encode_batch(list(texts), add_special_tokens=False), strict=True
    ):
        code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        sizes = 1 + sum((code_points >= limit).astype(np.int64) for limit in (0x80, 0x800, 0x10000))
        upto = np.append(0, np.cumsum(sizes))
        ends = upto[np.array([end for _, end in found.offsets], np.int64)]
        ids = np.array(found.ids, np.int64)
        result.append(_Encoded(ids, np.maximum.accumulate(ends), int(upto[-1])))
    return result


def _stream(documents: Sequence[_Encoded], eos: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and ends of documents in a row, each closed by a token that counts one byte."""
    ids, ends, base = [], [], 0
    for document in documents:
        ids += [document.ids, [eos]]
        base, start = base + document.num_bytes + 1, base
        ends += [start + document.ends, [base]]
    return np.concatenate(ids).astype(np.int64), np.concatenate(ends).astype(np.int64)


def _decisive(tokenizer: Tokenizer) -> tuple[object, ...]:
    data = json.loads(tokenizer.to_str())
    added = sorted((t["id"], t["content"]) for t in data["added_tokens"])
    model = {k: v for k, v in data["model"].items() if v not in (None, False)}
    return model, data["normalizer"], data["pre_tokenizer"], added

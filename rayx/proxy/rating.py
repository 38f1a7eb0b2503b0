"""Raters that are language models: perplexity, and the answer to a rating prompt.

A model is a folder of a Hugging Face causal language model or, for perplexity, a checkpoint of rayx
with its corpus' tokenizer. Only the first tokens of a document are read, as many as `tokens` says:
a rating is of a document's beginning.

Everything runs on one thread, so that scores do not depend on how many cores a machine has; a CPU's
cores are filled by rating parts in parallel (Ray Data). On a GPU one process rates.

Legend: S documents of a slice, T tokens.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tokenizers import Tokenizer

from rayx.corpus.labels.raters import TEXT, Value
from rayx.corpus.tokenizer import eos_id, load_tokenizer, plain
from rayx.errors import ModelError, SpecError
from rayx.proxy.heldout_text import Encoder, Passages
from rayx.proxy.huggingface import LOGITS, HuggingFaceModel
from rayx.proxy.model import Rotary, token_losses
from rayx.proxy.models import RayxModel, open_model

log = logging.getLogger(__name__)

PLACE = "{text}"
MANY_CHARACTERS = 16  # a token at most, nearly always: more of a document is not tokenised
PARALLEL_BYTES = 500_000  # of text, above which a CPU's cores are worth a start of Ray
BATCH = 16  # of a rayx checkpoint
LITTLE_MASS = 0.1


@dataclass(frozen=True)
class PerplexityRater:
    """Bits per byte of a document's first tokens under a model; low is what the model expects.

    bits per byte = -sum_t log2 p(token_t | before) / bytes of these tokens' text. The first token
    is predicted after the model's begin- or end-of-text token.

    Args:
        name: Of the column, bits per byte > 0.
        model: A Hugging Face folder, or a checkpoint of rayx (.safetensors).
        tokens: Of the document, at most; less where the model has fewer positions.
        device: A torch device.
        tokenizer: For a checkpoint of rayx: its corpus' tokenizer.json.

    Source: as a quality score Wenzek et al. (CCNet, arXiv 1911.00359). Differs: bits per byte, so
        that models compare, and no line is cut out.
    """

    name: str
    model: str
    tokens: int = 512
    device: str = "cpu"
    tokenizer: str | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result."""
        return {"rater": "perplexity", **asdict(self), "files": _stamps(self.model)}

    @property
    def parallel_bytes(self) -> float:
        """Above how much text rating is worth a start of Ray."""
        return _parallel_bytes(self.device)

    def rate(self, documents: pa.Table) -> Sequence[Value]:
        """Return bits per byte; None for a text of which no token is left.

        Raises:
            ModelError: The model cannot be read.
            SpecError: A checkpoint of rayx came without its tokenizer.
        """
        opened = _open(self.model, self.device, self.tokenizer)
        most = min(self.tokens, opened.context - len(opened.begin))
        begun = [_first(opened.encoder.tokenizer, t, most) for t in documents[TEXT].to_pylist()]
        rows = [np.array([*opened.begin, *ids], np.int64) for ids, _ in begun if ids]
        scored = np.array([len(ids) for ids, _ in begun if ids], np.int64)
        with _one_thread():
            nats = iter(opened.nats(rows, scored))
        return [float(next(nats)) / math.log(2) / size if ids else None for ids, size in begun]


@dataclass(frozen=True)
class PromptRater:
    """The rating that a model gives a document: the mean of its answers by their probability.

    rating = sum_k value_k p(answer_k) / sum_k p(answer_k), of the token after the prompt. Nothing
    is generated, so there is always a rating and no answer to be parsed; a model that puts little
    of its probability on the answers is warned of.

    Args:
        name: Of the column, between the least and the largest value.
        model: A Hugging Face folder.
        prompt: With `{text}`, ending where the answer begins. A chat model's own marks belong into
            it. Special tokens are read as such in the prompt and as plain text in documents.
        answers: Answer, one token each -> its value.
        tokens: Of the document, at most; less where the model has fewer positions.
        device: A torch device.

    Raises:
        SpecError: The prompt has not exactly one `{text}`, or there are fewer than two answers.

    Source: rating by a model, Peng et al. (DataMan, arXiv 2502.19363); the mean by probability,
        Liu et al. (G-Eval, arXiv 2303.16634). Differs: any model instead of one that was tuned to
        rate, one criterion a rater.
    """

    name: str
    model: str
    prompt: str
    answers: Mapping[str, float] = field(
        default_factory=lambda: {str(k): float(k) for k in range(1, 6)}
    )
    tokens: int = 512
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.prompt.count(PLACE) != 1:
            raise SpecError(
                f"Rater {self.name!r}: its prompt has {PLACE} {self.prompt.count(PLACE)} times; "
                "expected once, where the document goes."
            )
        if len(self.answers) < 2:
            raise SpecError(f"Rater {self.name!r} has {len(self.answers)} answers; expected two.")

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result."""
        return {"rater": "prompt", **asdict(self), "files": _stamps(self.model)}

    @property
    def parallel_bytes(self) -> float:
        """Above how much text rating is worth a start of Ray."""
        return _parallel_bytes(self.device)

    def rate(self, documents: pa.Table) -> Sequence[Value]:
        """Return ratings.

        Raises:
            ModelError: The model cannot be read, or is no Hugging Face folder.
            SpecError: An answer is not one token, or the prompt leaves no place for a document.
        """
        if self.model.endswith(".safetensors"):
            raise ModelError(f"{self.model}: a prompt needs a folder of a Hugging Face model.")
        opened = _open(self.model, self.device, None)
        assert isinstance(opened, _HuggingFace)
        before, after = (opened.marked(part) for part in self.prompt.split(PLACE))
        answers = [opened.answer(self.prompt, answer) for answer in self.answers]
        most = min(self.tokens, opened.context - len(opened.prefix) - len(before) - len(after))
        if most < 1:
            raise SpecError(
                f"Rater {self.name!r}: its prompt has {len(before) + len(after)} tokens and "
                f"{self.model} has {opened.context} positions; shorten it."
            )
        begun = [_first(opened.encoder.tokenizer, t, most)[0] for t in documents[TEXT].to_pylist()]
        rows = [np.array([*opened.prefix, *before, *ids, *after], np.int64) for ids in begun]
        with _one_thread():
            shares_SA = opened.next_token(rows)[:, answers]
        mass_S = shares_SA.sum(axis=1)
        if mass_S.mean() < LITTLE_MASS:
            log.warning("rater %s: the answers have %.2g of the model's probability; it does not "
                        "answer this prompt", self.name, mass_S.mean())  # fmt: skip
        ratings_S = shares_SA @ np.array(list(self.answers.values())) / mass_S
        return [float(rating) for rating in ratings_S]


class _HuggingFace:
    """A Hugging Face model as a rater needs it."""

    def __init__(self, model: HuggingFaceModel) -> None:
        self._model, self.encoder = model, model.encoder
        self.context = model.context or 1 << 30
        self.prefix = model.encoder.prefix
        self.begin = model.encoder.prefix or (model.encoder.eos,)
        self._marking = Tokenizer.from_str(model.encoder.tokenizer.to_str())  # knows special tokens

    def marked(self, text: str) -> list[int]:
        return self._marking.encode(text, add_special_tokens=False).ids

    def answer(self, prompt: str, answer: str) -> int:
        """Return the token of an answer."""
        after = prompt.split(PLACE)[1]
        alone, ids = self.marked(after), self.marked(after + answer)
        if ids[:-1] != alone:
            raise SpecError(
                f"Answer {answer!r} is {ids[len(alone) :]} after the prompt's end {after[-20:]!r}; "
                f"expected one token of {self._model.name}. Change the answer or the prompt's end."
            )
        return ids[-1]

    def nats(self, rows: list[np.ndarray], scored_S: np.ndarray) -> np.ndarray:
        return self._model.nats_of(Passages(rows, scored_S)) if rows else np.zeros(0)

    @torch.no_grad()
    def next_token(self, rows: list[np.ndarray]) -> np.ndarray:
        """Return the probabilities of the token after each row, shape (S, vocabulary), float64."""
        model, found = self._model, []
        batch = max(1, LOGITS // (max(map(len, rows)) * model.vocab_size))
        for start in range(0, len(rows), batch):
            chosen = [torch.from_numpy(row) for row in rows[start : start + batch]]
            # What pads the shorter rows comes after them, where no token of theirs sees it.
            ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True).to(model.device)
            logits = model.module(input_ids=ids, use_cache=False).logits
            last = torch.tensor([len(row) - 1 for row in chosen], device=model.device)
            ends = logits[torch.arange(len(chosen), device=model.device), last]
            found.append(ends.double().softmax(dim=-1).cpu().numpy())
        return np.concatenate(found)


class _Checkpoint:
    """A checkpoint of rayx as a rater needs it."""

    def __init__(self, model: RayxModel, tokenizer: str) -> None:
        given = load_tokenizer(tokenizer)
        self.encoder = Encoder(plain(given.to_str()), eos_id(given, tokenizer))
        self.shape, self.begin = model.shape, (self.encoder.eos,)
        if given.get_vocab_size() > self.shape.vocab_size:
            raise SpecError(
                f"{model.name}: tokenizer {tokenizer!r} has {given.get_vocab_size()} tokens and "
                f"the model embeds {self.shape.vocab_size}. Give its own corpus' tokenizer."
            )
        self.context = self.shape.context + 1  # its last token is only predicted
        self._tensors = {name: t[None].to(model.device) for name, t in model.tensors.items()}
        self._rotary, self._device = Rotary(self.shape, model.device), model.device

    @torch.no_grad()
    def nats(self, rows: list[np.ndarray], scored_S: np.ndarray) -> np.ndarray:
        found = []
        for start in range(0, len(rows), BATCH):
            chosen = [torch.from_numpy(row) for row in rows[start : start + BATCH]]
            ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True).to(self._device)
            losses_ST = token_losses(self._tensors, self.shape, self._rotary, ids[None])[0]
            for row, losses_T in zip(chosen, losses_ST, strict=True):
                found.append(float(losses_T[: len(row) - 1].double().sum()))
        return np.array(found)


@lru_cache(maxsize=2)
def _open(model: str, device: str, tokenizer: str | None) -> _HuggingFace | _Checkpoint:
    opened = open_model(model, device)
    if isinstance(opened, HuggingFaceModel):
        return _HuggingFace(opened)
    assert isinstance(opened, RayxModel)
    if tokenizer is None:
        raise SpecError(f"{model}: a checkpoint of rayx needs its corpus' tokenizer.json, too.")
    return _Checkpoint(opened, tokenizer)


def _first(tokenizer: Tokenizer, text: str, most: int) -> tuple[list[int], int]:
    """Return a text's first tokens, and the bytes that they stand for."""
    found = tokenizer.encode(text[: most * MANY_CHARACTERS], add_special_tokens=False)
    ids = found.ids[:most]
    return ids, len(text[: max((end for _, end in found.offsets[:most]), default=0)].encode())


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parallel_bytes(device: str) -> float:
    return PARALLEL_BYTES if device == "cpu" else math.inf


def _stamps(model: str) -> list[list[Any]]:
    path = Path(model).expanduser()
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    stats = [(file.name, file.stat()) for file in files if file.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

"""Models that lie on disk, of either kind, alone or merged, evaluated on a corpus' targets.

A model is a checkpoint of rayx (.safetensors) or a folder of a Hugging Face causal language model.
Merged candidates are rows of a weight matrix over experts of one kind; no merged model is written.

Legend: C candidates, K experts, (...) a tensor's shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rayx.corpus import Corpus
from rayx.errors import ModelError, SpecError
from rayx.merge_operator import Operator
from rayx.proxy.evaluate import HeldOut, evaluate, held_out
from rayx.proxy.likelihood import sequence_nats
from rayx.proxy.merge.compatible import check_compatible
from rayx.proxy.merge.model_files import ModelFiles
from rayx.proxy.merge.operators import prepare_tensor
from rayx.proxy.model import Rotary, parameter_shapes
from rayx.record import Loss
from rayx.spec import Evaluation, ModelShape

HELD_BYTES = 1 << 31  # of experts that are kept in memory, in float32
CANDIDATE_BYTES = 1 << 30  # of merged candidates at a time, where experts are not
MOST_CANDIDATES = 16  # at a time, so that results come often
EVALUATION_SEQUENCES = 32  # of a batch


class Model(Protocol):
    """A model that can be evaluated with its own tensors, or with others in their place."""

    name: str
    device: torch.device
    files: ModelFiles
    usual_context: int  # tokens of a sequence, where nobody asks for another number

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What is stored, read when it is asked for."""
        ...

    def prepare(self, corpus: Corpus, context: int, evaluation: Evaluation) -> None:
        """Set the text to be evaluated on, sequences of `context` tokens of the corpus."""
        ...

    def losses(self, candidates: Mapping[str, Tensor] | None = None) -> list[dict[str, Loss]]:
        """Return target -> loss of each candidate, tensors of shape (C, ...), or of itself."""
        ...

    def nats(self) -> dict[str, np.ndarray]:
        """Return target -> nats of each sequence's predicted tokens, shape (S,), of itself."""
        ...


def open_model(path: str, device: str = "cpu") -> Model:
    """Open a checkpoint of rayx or a folder of a Hugging Face model; no weights are read yet.

    Raises:
        SpecError: There is no such device.
        ModelError: There is nothing there, or it is neither; the message says what is missing.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:120]
        raise SpecError(f"Device {device!r} cannot be used here ({reason}). Give cpu.") from error
    place = Path(path).expanduser()
    if place.suffix == ".safetensors" and place.is_file():
        return RayxModel(path, device)
    if place.is_dir():
        from rayx.proxy.huggingface import HuggingFaceModel

        return HuggingFaceModel(path, device)
    raise ModelError(
        f"{path!r} is neither a folder of a Hugging Face model nor a checkpoint of rayx "
        "(.safetensors)."
    )


class StoredTensors(Mapping[str, Tensor]):
    """A model's tensors by name, each read from its file when it is asked for."""

    def __init__(self, files: ModelFiles) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        entry = self._files.tensors[name]
        return entry.read(0, entry.numel).view(entry.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files.tensors)

    def __len__(self) -> int:
        return len(self._files.tensors)


class RayxModel:
    """A proxy's checkpoint.

    It is evaluated in float32, so a run whose precision was float32 has the losses of its record.

    Args:
        file: A checkpoint as `rayx run` keeps them.
        device: A torch device.

    Raises:
        ModelError: The file is damaged, or holds no proxy.
    """

    def __init__(self, file: str, device: str = "cpu") -> None:
        self.name = file
        self.device = torch.device(device)
        self.files = ModelFiles.open(Path(file).expanduser(), Path(file).stem)
        try:
            self.shape = ModelShape(**json.loads(self.files.metadata["model"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{file}: it does not say the shape of its model ({error!r}), so it is no "
                "checkpoint of this rayx. Run the sweep again, or give a Hugging Face folder."
            ) from error
        shapes = parameter_shapes(self.shape)
        found = {name: entry.shape for name, entry in self.files.tensors.items()}
        if found != shapes:
            wrong = sorted(set(found.items()) ^ set(shapes.items()))[0][0]
            raise ModelError(f"{file}: tensor {wrong!r} is not as its shape says; it is damaged.")
        self.tensors: Mapping[str, Tensor] = StoredTensors(self.files)
        self.usual_context = self.shape.context
        self._targets: dict[str, HeldOut] = {}

    def prepare(self, corpus: Corpus, context: int, evaluation: Evaluation) -> None:
        """Set the text to be evaluated on.

        Raises:
            CorpusError: A target's held-out text is shorter than one sequence.
            SpecError: The context is longer than the model's, or the vocabularies differ.
        """
        if context > self.shape.context:
            raise SpecError(
                f"{self.name}: its context is {self.shape.context} tokens; {context} were asked "
                f"for. Give a context of at most {self.shape.context}."
            )
        if corpus.vocab_size != self.shape.vocab_size:
            raise SpecError(
                f"{self.name}: its vocabulary is {self.shape.vocab_size} and that of corpus "
                f"{corpus.url} is {corpus.vocab_size}. Give the corpus that it was trained on."
            )
        self._targets = held_out(corpus, context, evaluation, self.device)

    def losses(self, candidates: Mapping[str, Tensor] | None = None) -> list[dict[str, Loss]]:
        """Return target -> loss of each candidate, or of the model itself."""
        stacks = candidates or {name: tensor[None] for name, tensor in self.tensors.items()}
        rotary = Rotary(self.shape, self.device)
        results = []
        for c in range(len(next(iter(stacks.values())))):
            # In turn: on a CPU a batch of candidates is no faster.
            one = {name: stack[c : c + 1].to(self.device) for name, stack in stacks.items()}
            results += evaluate(one, self.shape, rotary, self._targets, EVALUATION_SEQUENCES)
        return results

    def nats(self) -> dict[str, np.ndarray]:
        """Return target -> nats of each sequence's predicted tokens, shape (S,)."""
        own = {name: tensor[None].to(self.device) for name, tensor in self.tensors.items()}
        nats = sequence_nats(own, self.shape, Rotary(self.shape, self.device), self._targets)
        return {target: nats_RS[0] for target, nats_RS in nats.items()}


class MergedModels:
    """Experts and an operator: losses of merged candidates, none of which is written.

    Where the experts fit in HELD_BYTES they are read once. Else their files are read anew for each
    call, tensor by tensor, and memory holds the call's candidates and the experts of one tensor.

    Args:
        experts: K models of one architecture; the first is the one that is prepared with a text.
        operator: How they are merged.
        base: Read by operators on task vectors only.

    Raises:
        SpecError: The operator needs a base.
        ModelError: Models differ in architecture, tokenizer, tensors or shapes; both are named.

    Attributes:
        warnings: Differences that a merge can bear, in words.
        together: Candidates that a call should ask for.
    """

    def __init__(self, experts: Sequence[Model], operator: Operator, base: Model | None) -> None:
        if operator.needs_base and base is None:
            raise SpecError(f"Operator {operator.name} needs --base, the model all start from.")
        self.experts, self.operator = list(experts), operator
        self.base = base if operator.needs_base else None
        first = self.experts[0]
        others = [*self.experts[1:], *([self.base] if self.base else [])]
        self.warnings = check_compatible(first.files, [other.files for other in others])
        for other in others:  # heads do not show in the tensors' shapes
            mine, theirs = (getattr(m, "shape", None) for m in (first, other))
            if mine != theirs:
                raise ModelError(f"{other.name} is a {theirs}, and {first.name} a {mine}.")
        self._holds = (len(others) + 1) * 4 * first.files.params <= HELD_BYTES
        self._held: dict[str, Callable[[Tensor], Tensor]] = {}
        # One at a time has the same bits in whatever company a run that is resumed evaluates it.
        several = max(1, min(MOST_CANDIDATES, CANDIDATE_BYTES // first.files.nbytes))
        self.together = 1 if self._holds else several

    def losses(self, weights_CK: np.ndarray) -> list[dict[str, Loss]]:
        """Return target -> loss of each row of weights, see `Operator.check_weights`."""
        weights = torch.from_numpy(np.asarray(weights_CK, np.float64))
        first = self.experts[0]
        return first.losses({name: self._merge(name)(weights) for name in first.tensors})

    def _merge(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return what merges one tensor."""
        if name in self._held:
            return self._held[name]
        place = self.experts[0].device
        experts_K = torch.stack([expert.tensors[name] for expert in self.experts]).to(place)
        base = self.base.tensors[name].to(place) if self.base else None
        merge = prepare_tensor(self.operator, experts_K, base, name)
        if self._holds:
            self._held[name] = merge
        return merge

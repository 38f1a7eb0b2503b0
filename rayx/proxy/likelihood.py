"""Log-likelihood vectors of models: rayx checkpoints, Hugging Face folders and runs of a sweep.

Also the kernel of gradients, which says to first order how training on a domain moves them.

The texts are a corpus' held-out sequences, labelled by target and fixed by the corpus, the context
and the evaluation. A model with another tokenizer is read on the same bytes
(`rayx.proxy.heldout_text`), so that vectors compare. One forward pass of the texts a model.

Legend: R runs, S sequences of a target, T context, N texts, K domains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rayx.corpus import Corpus
from rayx.corpus.sampler import sequence_count, take
from rayx.errors import SpecError
from rayx.likelihoods import Likelihoods
from rayx.proxy.checkpoint import read_checkpoint
from rayx.proxy.evaluate import HeldOut, held_out
from rayx.proxy.model import Rotary, initial_parameters, stacked, token_losses
from rayx.proxy.signals import mean_gradients
from rayx.spec import Evaluation, ModelShape, Parent, TrainSpec
from rayx.store import Store

if TYPE_CHECKING:
    from rayx.proxy.models import Model

BATCH_SEQUENCES = 32
PACK_RUNS = 8  # whose parameters are in memory together
STEP = 1e-4  # of central differences, as a share of the parameters' norm
PART = Evaluation(points=1, part="first")  # of the held-out text, where nobody says


@torch.no_grad()
def sequence_nats(
    parameters: Mapping[str, Tensor],
    shape: ModelShape,
    rotary: Rotary,
    targets: Mapping[str, HeldOut],
) -> dict[str, np.ndarray]:
    """Return target -> nats of each sequence's predicted tokens, shape (R, S), float64.

    Args:
        parameters: Name -> tensor of shape (R, ...).
        shape: The model's shape.
        rotary: Its position tables.
        targets: The sequences.
    """
    runs = parameters["embedding"].shape[0]
    found = {}
    for target, data in targets.items():
        parts = [
            token_losses(parameters, shape, rotary, chunk.expand(runs, -1, -1)).double().sum(2)
            for chunk in data.tokens.split(BATCH_SEQUENCES)
        ]
        found[target] = torch.cat(parts, dim=1).cpu().numpy()
    return found


def likelihoods(
    models: Sequence[Model], corpus: Corpus, context: int, evaluation: Evaluation | None = None
) -> list[Likelihoods]:
    """Return the vectors of models on disk, over the text of the corpus' domains.

    Args:
        models: What `rayx.proxy.models.open_model` returned, of any kinds.
        corpus: Whose held-out text is read.
        context: T, in tokens of the corpus.
        evaluation: How many sequences a domain, and of which part; by default 64 of the first half.

    Raises:
        SpecError: The context is longer than a model's, or a proxy's vocabulary is not the corpus';
            nothing was run.
        CorpusError: A domain's held-out text is shorter than one sequence.
        ModelError: A log-likelihood is not finite.
    """
    evaluation = evaluation or PART
    for model in models:
        model.prepare(corpus, context, evaluation)
    return [_vector(m.name, corpus, context, evaluation, m.nats()) for m in models]


def state_likelihoods(
    states: Sequence[Parent | TrainSpec],
    corpus: Corpus,
    store: Store,
    evaluation: Evaluation | None = None,
    device: str = "cpu",
) -> list[Likelihoods]:
    """Return the vectors of states of runs, in a pack: checkpoints in a store, or untrained models.

    Args:
        states: Of one shape; a TrainSpec stands for the model that its seed draws.
        corpus: What they were trained on.
        store: Where their checkpoints are.
        evaluation: As in `likelihoods`.
        device: A torch device.

    Raises:
        SpecError: Shapes differ, or a run is of another corpus.
        CorpusError, ModelError: As in `likelihoods`.
        StoreError: A checkpoint is missing or damaged.
    """
    evaluation = evaluation or PART
    specs = [state.spec if isinstance(state, Parent) else state for state in states]
    for spec in specs:
        if (spec.model, spec.corpus) != (specs[0].model, corpus.fingerprint):
            raise SpecError(
                f"Run {spec.run_id} is a {spec.model} of corpus {spec.corpus}; expected "
                f"{specs[0].model} of {corpus.fingerprint}. Read the vectors of each shape apart."
            )
    shape, place = specs[0].model, torch.device(device)
    targets = held_out(corpus, shape.context, evaluation, place)
    targets = {d: targets[d] for d in corpus.domains}
    found: list[Likelihoods] = []
    for start in range(0, len(states), PACK_RUNS):
        some = states[start : start + PACK_RUNS]
        parameters = stacked([state_tensors(state, store) for state in some], place)
        nats = sequence_nats(parameters, shape, Rotary(shape, place), targets)
        for r, state in enumerate(some):
            one = {target: nats_RS[r] for target, nats_RS in nats.items()}
            name = _name(state)
            found.append(_vector(name, corpus, shape.context, evaluation, one))
    return found


def gradient_kernel(
    tensors: Mapping[str, Tensor],
    shape: ModelShape,
    corpus: Corpus,
    evaluation: Evaluation | None = None,
    sequences: int = 64,
    device: str = "cpu",
) -> np.ndarray:
    """Return K[s, k], what a step of gradient descent on domain k does for text s: shape (N, K).

    K[s, k] = -<grad log p(x_s), h_k>, h_k the mean gradient of the loss (nats per token) over
    domain k's training text: nats of the text for a unit of rate. By central differences along h_k,
    since only K of the N gradients' products are wanted.

    Cost: one forward and one backward pass of K `sequences` sequences, and 2 K forward passes of
    the texts.

    Args:
        tensors: The model's parameters, without the run axis.
        shape: Its shape.
        corpus: Whose domains are read.
        evaluation: Which texts, as in `likelihoods`.
        sequences: Of each domain's training text, at most, spread evenly.
        device: A torch device.

    Raises:
        CorpusError: A domain's held-out text is shorter than one sequence.
        SpecError: A gradient is zero or not finite.

    Source: derived.
    """
    place, context = torch.device(device), shape.context
    rotary = Rotary(shape, place)
    targets = held_out(corpus, context, evaluation or PART, place)
    targets = {d: targets[d] for d in corpus.domains}
    here = stacked([tensors], place)
    size = _norm(here)
    columns = []
    for domain in corpus.domains:
        shard = corpus.train(domain)
        available = sequence_count(len(shard), context)
        places = np.unique(np.linspace(0, available - 1, min(sequences, available)).astype(int))
        tokens = torch.from_numpy(take(shard, places, context)).to(place)
        gradient = mean_gradients(here, shape, rotary, tokens[None])
        length = _norm(gradient)
        if not 0.0 < length < np.inf:
            raise SpecError(
                f"The base's gradient on domain {domain!r} has norm {length}; expected a finite "
                "one above 0. Give another checkpoint."
            )
        rate = STEP * size / length
        both = {n: torch.cat([p - rate * gradient[n], p + rate * gradient[n]]) for n, p in
                here.items()}  # fmt: skip
        nats = sequence_nats(both, shape, rotary, targets)
        columns.append(np.concatenate([n_RS[1] - n_RS[0] for n_RS in nats.values()]) / (2 * rate))
    return np.stack(columns, axis=1)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors.values()))


def state_tensors(state: Parent | TrainSpec, store: Store) -> dict[str, Tensor]:
    """Return a state's parameters: a checkpoint's, or those that a spec's seed draws.

    Raises:
        StoreError: The checkpoint is missing or damaged.
    """
    if isinstance(state, Parent):
        return read_checkpoint(store, state).parameters
    return initial_parameters(state.model, state.seed)


def _name(state: Parent | TrainSpec) -> str:
    if isinstance(state, Parent):
        return f"run {state.spec.run_id} after {state.steps} steps"
    return f"the untrained model of seed {state.seed}"


def _vector(
    name: str,
    corpus: Corpus,
    context: int,
    evaluation: Evaluation,
    nats: Mapping[str, np.ndarray],
) -> Likelihoods:
    domains = tuple(corpus.domains)
    counts = [len(nats[d]) for d in domains]
    # As in losses: bytes per token of the whole held-out shard.
    sizes = [context * corpus.heldout_bytes[d] / corpus.heldout_tokens[d] for d in domains]
    probe = f"corpus {corpus.fingerprint}, context {context}, part {evaluation.part}, "
    return Likelihoods(
        model=name,
        probe=probe + f"{evaluation.sequences} sequences a domain",
        targets=domains,
        target_N=np.repeat(np.arange(len(domains)), counts),
        nats_N=-np.concatenate([nats[d] for d in domains]),
        bytes_N=np.repeat(sizes, counts),
    )

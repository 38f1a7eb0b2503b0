"""Signals: what a policy may read off R running models on text of S sources.

Each of the R S pairs of run and source is one copy of the model along the run axis, so that one
forward and one backward pass give every gradient, or a few passes where copies are large. No
function changes the tensors it is given, and a value that is not finite is returned as it is.

Legend: R runs, S sources, B sequences of a batch, T context, P probes, C copies (run, source) in
order, N sequences of a probe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rayx.proxy.model import Rotary, token_logits, token_losses
from rayx.proxy.optimizer import PackedAdamW
from rayx.spec import ModelShape, TrainSpec

# Memory of the copies that one pass holds, parameters, gradients and activations: what stays in a
# CPU's cache and is not asked of the system anew each time; enough to keep a GPU busy.
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**30}
SKETCH = 8192  # numbers that a projected gradient is kept in

Tensors = Mapping[str, Tensor]
Tap = Callable[[str, Tensor, Tensor], None]


@torch.no_grad()
def mean_losses(
    parameters: Tensors, shape: ModelShape, rotary: Rotary, tokens_RSBT: Tensor
) -> np.ndarray:
    """Return the mean loss of each run on each source, nats per token, shape (R, S), float64.

    Cost: one forward pass of the tokens.

    Args:
        parameters: Name -> tensor of shape (R, ...).
        shape: The model's shape.
        rotary: Its position tables.
        tokens_RSBT: Token ids, shape (R, S, B, T + 1).
    """
    return _forward(parameters, shape, rotary, tokens_RSBT).mean(2).cpu().numpy()


@torch.no_grad()
def probe_losses(
    parameters: Tensors, shape: ModelShape, rotary: Rotary, probes: Sequence[Tensor]
) -> np.ndarray:
    """Return the mean loss of each run on each probe, nats per token, shape (R, P), float64.

    Cost: one forward pass of the probes.

    Args:
        parameters: Name -> tensor of shape (R, ...).
        shape: The model's shape.
        rotary: Its position tables.
        probes: P tensors of token ids, shape (N, T + 1) each; N may differ.
    """
    runs = parameters["embedding"].shape[0]
    tokens = [probe.expand(runs, 1, -1, -1) for probe in probes]
    return np.hstack([mean_losses(parameters, shape, rotary, t) for t in tokens])


@torch.no_grad()
def excess_losses(
    parameters: Tensors,
    shape: ModelShape,
    rotary: Rotary,
    tokens_RSBT: Tensor,
    reference: Tensors,
    reference_shape: ModelShape,
) -> np.ndarray:
    """Return the mean over tokens of max(0, loss - the reference's loss), nats, shape (R, S).

    Cost: one forward pass of the tokens through both models.

    Args:
        parameters: Name -> tensor of shape (R, ...).
        shape: The model's shape.
        rotary: Its position tables.
        tokens_RSBT: Token ids, shape (R, S, B, T + 1).
        reference: Name -> tensor of one model, without the run axis.
        reference_shape: Its shape; of the same vocabulary.

    Source: Xie et al. 2023, arXiv:2305.10429, algorithm 1.
    """
    one = {name: tensor[None] for name, tensor in reference.items()}
    tables = Rotary(reference_shape, tokens_RSBT.device)
    flat = tokens_RSBT.flatten(0, 1)[None]
    theirs = _forward(one, reference_shape, tables, flat).view(*tokens_RSBT.shape[:2], -1)
    excess = _forward(parameters, shape, rotary, tokens_RSBT) - theirs
    return excess.clamp(min=0).mean(2).cpu().numpy()


def inner_products(
    parameters: Tensors,
    shape: ModelShape,
    rotary: Rotary,
    tokens_RSBT: Tensor,
    over: str = "all",
    seed: int = 0,
) -> np.ndarray:
    """Return the inner products of the sources' mean gradients, shape (R, S, S), float64.

    G_ij = <g_i, g_j>, g_i the gradient of the mean loss (nats per token) on source i's batch.
    Sums are taken in float64. The gradients of all copies are held at once, 4 bytes a number.

    Cost: one forward and one backward pass of the tokens; with `last` one forward pass, and a
    backward one of the output layer alone.

    Args:
        parameters: Name -> tensor of shape (R, ...).
        shape: The model's shape.
        rotary: Its position tables.
        tokens_RSBT: Token ids, shape (R, S, B, T + 1).
        over: What counts: `all` parameters; `last`, the output matrix, also where the embedding
            is tied to it, whose part as an embedding then does not count; `projection`, all, each
            gradient kept as a sketch of SKETCH numbers, which is unbiased, with a standard error
            of at most sqrt(2 / SKETCH) |g_i| |g_j|, 1.6% of the product of the norms.
        seed: Of the projection, which is the same for every run and source.

    Source: derived; the sketch: Weinberger et al. 2009, arXiv:0902.2206, lemma 2.
    Differs: buckets of equal size, so that a sum does not depend on the order of additions.
    """
    runs, sources = tokens_RSBT.shape[:2]
    names = None
    if over == "last":
        parameters = {**parameters, "head": parameters.get("head", parameters["embedding"])}
        names = {"head"}
    project = _Sketch(shape.params, seed, tokens_RSBT.device) if over == "projection" else None
    parts: dict[str, list[Tensor]] = {}
    for copies, tokens in copies_of(parameters, shape, tokens_RSBT):
        gradients = mean_gradients(copies, shape, rotary, tokens, names)
        if project is not None:
            flat = torch.cat([g.flatten(1) for g in gradients.values()], dim=1)
            gradients = {"sketch": project(flat)}
        for name, gradient in gradients.items():
            parts.setdefault(name, []).append(gradient.flatten(1))
    total = torch.zeros(runs, sources, sources, dtype=torch.float64, device=tokens_RSBT.device)
    for gradient in parts.values():
        g = torch.cat(gradient).view(runs, sources, -1).double()
        total += g @ g.mT
    return total.cpu().numpy()


def loss_drops(
    tensors: tuple[Tensors, Tensors, Tensors],
    specs: Sequence[TrainSpec],
    lr_share: float,
    shape: ModelShape,
    rotary: Rotary,
    batches: Sequence[Tensor],
    probes: Sequence[Tensor],
    updates: int,
) -> np.ndarray:
    """Return by how much each probe's loss falls after training on each source, shape (R, P, S).

    D_ps = L_p(run) - L_p(copy of the run trained on source s), nats per token, float64. A copy has
    the run's parameters and moments and takes one step for each batch, at the run's present rate.

    Cost: S training steps for each batch, and S + 1 forward passes of the probes.

    Args:
        tensors: Parameters, first and second moments, name -> tensor of shape (R, ...).
        specs: The R runs.
        lr_share: Share of their peak rates.
        shape: The model's shape.
        rotary: Its position tables.
        batches: For each step token ids of shape (R, S, B, T + 1).
        probes: P tensors of token ids, shape (N, T + 1) each.
        updates: Steps that are in the moments.
    """
    runs, sources = batches[0].shape[:2]
    before_RP = probe_losses(tensors[0], shape, rotary, probes)
    after: list[np.ndarray] = []
    flat = [batch.flatten(0, 1) for batch in batches]
    for rows in _rows(shape, batches[0]):
        run_C = rows // sources
        copies, first, second = (
            {n: t.detach()[run_C.to(t.device)] for n, t in group.items()} for group in tensors
        )
        for copy in copies.values():
            copy.requires_grad_()
        optimizer = PackedAdamW(copies, first, second, [specs[i] for i in run_C.tolist()], updates)
        alive_C = torch.ones(len(rows), dtype=torch.bool, device=copies["norm"].device)
        for batch in flat:
            token_losses(copies, shape, rotary, batch[rows]).mean(dim=(1, 2)).sum().backward()
            optimizer.step(lr_share, alive_C)
        after.append(probe_losses(copies, shape, rotary, probes))
    after_RSP = np.concatenate(after).reshape(runs, sources, len(probes))
    return (before_RP[:, None] - after_RSP).transpose(0, 2, 1)


def mean_gradients(
    parameters: Tensors,
    shape: ModelShape,
    rotary: Rotary,
    tokens_CBT: Tensor,
    names: set[str] | None = None,
    tap: Tap | None = None,
) -> dict[str, Tensor]:
    """Return the gradients of each copy's mean loss, nats per token: name -> shape (C, ...).

    Cost: one forward pass, and one backward pass down to the named parameters.

    Args:
        parameters: Name -> tensor of shape (C, ...).
        shape: The model's shape.
        rotary: Its position tables.
        tokens_CBT: Token ids, shape (C, B, T + 1).
        names: Whose gradients; None for all.
        tap: Called for each matrix product x W with W's name, x, shape (C, B T, in), and the
            gradient with respect to the product, shape (C, B T, out).
    """
    leaves = {n: p.detach().requires_grad_(not names or n in names) for n, p in parameters.items()}
    wanted = {n: leaf for n, leaf in leaves.items() if leaf.requires_grad}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def product(x: Tensor, weight: Tensor, name: str) -> Tensor:
        result = torch.bmm(x, weight)
        if tap is not None:
            inputs[name], outputs[name] = x.detach(), result
        return result

    logits = token_logits(leaves, shape, rotary, tokens_CBT[:, :, :-1], product)
    loss = copy_losses(logits, tokens_CBT).sum()
    gradients = torch.autograd.grad(loss, [*wanted.values(), *outputs.values()])
    if tap is not None:
        for name, gradient in zip(outputs, gradients[len(wanted) :], strict=True):
            tap(name, inputs[name], gradient)
    return dict(zip(wanted, gradients[: len(wanted)], strict=True))


def copy_losses(logits: Tensor, tokens_CBT: Tensor) -> Tensor:
    """Return the mean cross-entropy of each copy, shape (C,), nats per token, at least float32."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.cross_entropy(exact.flatten(0, 2), tokens_CBT[:, :, 1:].flatten(), reduction="none")
    return losses.view(len(tokens_CBT), -1).mean(1)


def copies_of(
    parameters: Tensors, shape: ModelShape, tokens_RSBT: Tensor
) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Yield the R S copies, as many at once as CHUNK_BYTES hold: parameters and their tokens."""
    flat = tokens_RSBT.flatten(0, 1)
    for rows in _rows(shape, tokens_RSBT):
        run_C = (rows // tokens_RSBT.shape[1]).to(flat.device)
        yield {n: p.detach()[run_C] for n, p in parameters.items()}, flat[rows]


class _Sketch:
    """A seeded random projection of gradients: signs, then sums over buckets of equal size."""

    def __init__(self, params: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(params, generator=generator).to(device)
        self.sign = (torch.randint(0, 2, (params,), generator=generator) * 2 - 1).to(device)
        self.padding = -params % SKETCH

    def __call__(self, gradients_CP: Tensor) -> Tensor:
        mixed = gradients_CP[:, self.order] * self.sign
        return F.pad(mixed, (0, self.padding)).view(len(mixed), -1, SKETCH).sum(1)


def _forward(parameters: Tensors, shape: ModelShape, rotary: Rotary, tokens_RSBT: Tensor) -> Tensor:
    """Return the loss of each token, shape (R, S, B T), float64, a few sequences at a time."""
    parts = sequence_parts(shape, tokens_RSBT.flatten(1, 2))
    losses = [token_losses(parameters, shape, rotary, part) for part in parts]
    return torch.cat(losses, dim=1).view(*tokens_RSBT.shape[:2], -1).double()


def sequence_parts(shape: ModelShape, tokens_RNT: Tensor) -> tuple[Tensor, ...]:
    """Return sequences of R runs, shape (R, N, T + 1), in parts that CHUNK_BYTES hold."""
    sequence_bytes = len(tokens_RNT) * _activation_bytes(shape, tokens_RNT.shape[2])
    return tokens_RNT.split(_at_once(sequence_bytes, tokens_RNT.device), dim=1)


def _rows(shape: ModelShape, tokens_RSBT: Tensor) -> tuple[Tensor, ...]:
    """Return the numbers of the R S copies, in parts that CHUNK_BYTES hold."""
    runs, sources, *batch = tokens_RSBT.shape
    # A copy's parameters, gradients, and at most two moments; and what its backward pass keeps.
    copy_bytes = 4 * 4 * shape.params + _activation_bytes(shape, math.prod(batch))
    return torch.arange(runs * sources).split(_at_once(copy_bytes, tokens_RSBT.device))


def _at_once(bytes_each: int, device: torch.device) -> int:
    limit = CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"]
    return max(1, limit // bytes_each)


def _activation_bytes(shape: ModelShape, tokens: int) -> int:
    """Return about what a forward pass keeps for the backward one, float32."""
    layer = 16 * shape.width + 6 * shape.ffn_width
    return 4 * tokens * (shape.layers * layer + 4 * shape.vocab_size)

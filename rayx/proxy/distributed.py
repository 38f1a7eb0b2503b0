"""One run trained by several processes, or by one: what of it differs, in one place.

All processes draw the same batches, each trains on its own rows of them, and gradients are averaged
before each step. So the order of the data and, up to rounding, the losses do not depend on how many
processes there are. But rounding grows: a change of 1e-7 in the start of a small model came to 0.5%
of its loss after 2,000 steps. One process that adds the gradients of two parts of the batch rounds
as two processes with a part each do, and reaches the same bits.

Legend: R runs (1 where processes share it), B sequences of a batch, T context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rayx.errors import SpecError
from rayx.proxy.model import (
    LAYER_NAMES,
    Rotary,
    TokenLosses,
    block,
    cross_entropies,
    embed,
    token_losses,
    unembed,
)
from rayx.proxy.objective import Objective
from rayx.spec import ModelShape, TrainSpec

Tensors = dict[str, Tensor]
Groups = tuple[Tensors, Tensors, Tensors]  # parameters, first moments, second moments


class Alone:
    """This process has the pack to itself.

    Args:
        groups: Parameters and moments, name -> tensor of shape (R, ...).
        specs: The runs.
        rotary: The model's position tables.
        parts: Of a batch, whose gradients are added in a fixed order.

    Attributes:
        groups: What the optimizer updates here.
        rows: The rows of a batch that this process trains on.
        rank: Number of the process; 0 is the one that writes.
        losses: As `token_losses`, of the model as it is spread; all must ask together.
    """

    rank, size = 0, 1
    rows = slice(None)
    losses: TokenLosses = staticmethod(token_losses)

    def __init__(
        self, groups: Groups, specs: Sequence[TrainSpec], rotary: Rotary, parts: int
    ) -> None:
        self.groups = groups
        self.parts = max(1, parts // self.size)  # that are this process' own
        for parameter in groups[0].values():
            parameter.requires_grad_()

    def backward(self, objective: Objective, tokens: Tensor, domain_RB: np.ndarray) -> Tensor:
        """Set the gradients of `groups`; return the mean loss over the rows here, shape (R,)."""
        parameters = self.groups[0]
        if self.parts * self.size == 1:
            return objective.backward(parameters, tokens, domain_RB)
        losses, total = [], torch.zeros(0)
        for number, rows in enumerate(self._row_parts(tokens)):
            losses.append(objective.backward(parameters, tokens[:, rows], domain_RB[:, rows]))
            grads = [p.grad for p in parameters.values() if p.grad is not None]
            flat = torch.cat([grad.flatten() for grad in grads])
            total = total.add_(flat) if number else flat
            for parameter in parameters.values():
                parameter.grad = None  # autograd would add to it
        total = self._over_processes(total).div_(self.parts * self.size)
        sizes = [parameter.numel() for parameter in parameters.values()]
        for parameter, grad in zip(parameters.values(), total.split(sizes), strict=True):
            parameter.grad = grad.view_as(parameter)
        return torch.stack(losses).mean(0)

    def _row_parts(self, tokens: Tensor) -> list[slice]:
        length = tokens.shape[1] // self.parts
        return [slice(i * length, (i + 1) * length) for i in range(self.parts)]

    def _over_processes(self, gradient: Tensor) -> Tensor:
        return gradient

    def total(self, squares_R: Tensor) -> Tensor:
        """Return sums over the whole gradient, given those over what is held here."""
        return squares_R

    def agree(self, loss_R: Tensor, due: bool) -> tuple[Tensor, bool]:
        """Return the mean loss over all rows, and what the first process says of `due`."""
        return loss_R.detach(), due

    def same(self, value: int) -> bool:
        """Whether all processes have the same value."""
        return True

    def whole(self) -> Groups:
        """Return all parameters and moments where rank is 0; all must ask together."""
        return self.groups

    def wait(self) -> None:
        """Return when all processes are here."""


class Together(Alone):
    """Several processes share one run, and each holds all of the model."""

    def __init__(
        self, groups: Groups, specs: Sequence[TrainSpec], rotary: Rotary, parts: int
    ) -> None:
        spec = specs[0]
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        if len(specs) > 1 or spec.policy or spec.distillation:
            what = "a pack" if len(specs) > 1 else "a policy" if spec.policy else "a teacher"
            raise SpecError(f"{self.size} workers cannot share {what}; train it with --workers 1.")
        own = spec.optimizer.worker_sequences(self.size)
        self.rows = slice(self.rank * own, (self.rank + 1) * own)
        super().__init__(groups, specs, rotary, parts)

    def _over_processes(self, gradient: Tensor) -> Tensor:
        dist.all_reduce(gradient)
        return gradient

    def agree(self, loss_R: Tensor, due: bool) -> tuple[Tensor, bool]:
        flag = loss_R.new_tensor([float(due and self.rank == 0)])
        sums = torch.cat([loss_R.detach(), flag])
        dist.all_reduce(sums)
        return sums[:-1] / self.size, bool(sums[-1] > 0)

    def same(self, value: int) -> bool:
        values: list[int | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return len(set(values)) == 1

    def wait(self) -> None:
        dist.barrier()


class Sharded(Together):
    """Several processes share one run, and each holds a part of every tensor (FSDP2)."""

    def __init__(
        self, groups: Groups, specs: Sequence[TrainSpec], rotary: Rotary, parts: int
    ) -> None:
        super().__init__(groups, specs, rotary, parts)
        # The run axis would be in the way of FSDP2, which shards the first one.
        model, first, second = ({n: t[0] for n, t in group.items()} for group in groups)
        self.decoder = Decoder({n: t.detach() for n, t in model.items()}, specs[0].model, rotary)
        mesh = init_device_mesh(model["norm"].device.type, (self.size,))
        for layer in self.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.decoder, mesh=mesh, reshard_after_forward=True)  # in place
        self.parameters = dict(self.decoder.named_parameters())
        self.moments = tuple(
            {n: distribute_tensor(t, mesh, [Shard(0)]) for n, t in moment.items()}
            for moment in (first, second)
        )
        self.groups = tuple(
            {n: held(t) for n, t in group.items()} for group in (self.parameters, *self.moments)
        )

    def losses(
        self, parameters: Mapping[str, Tensor], shape: ModelShape, rotary: Rotary, tokens: Tensor
    ) -> Tensor:
        return self.decoder(tokens)

    def backward(self, objective: Objective, tokens: Tensor, domain_RB: np.ndarray) -> Tensor:
        losses = [
            objective.backward(self.groups[0], tokens[:, rows], domain_RB[:, rows])
            for rows in self._row_parts(tokens)
        ]
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                self.groups[0][name].grad = held(parameter.grad).div_(self.parts)
                parameter.grad = None
        return torch.stack(losses).mean(0)

    def total(self, squares_R: Tensor) -> Tensor:
        dist.all_reduce(squares_R)
        return squares_R

    def whole(self) -> Groups:
        whole = []
        for group in (self.parameters, *self.moments):
            found: Tensors = {}
            for name, tensor in group.items():
                full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
                if self.rank == 0:
                    found[name] = full.detach()[None].cpu()
            whole.append(found)
        return tuple(whole)


def processes(
    groups: Groups,
    specs: Sequence[TrainSpec],
    rotary: Rotary,
    shard: bool = False,
    parts: int = 1,
) -> Alone:
    """Return how the processes of torch.distributed, where it was started, share these runs.

    Args:
        groups: Parameters and moments, name -> tensor of shape (R, ...), equal in all processes.
        specs: The runs.
        rotary: The model's position tables.
        shard: Spread parameters, gradients and moments over them (FSDP2).
        parts: Of a batch, whose gradients are added in a fixed order; divides the batch.

    Raises:
        SpecError: The batch does not divide by the processes, or they cannot share the runs.
    """
    started = dist.is_available() and dist.is_initialized()
    if shard and not started:
        raise SpecError("Sharding needs worker processes; give --workers 1 or more.")
    if started and (shard or dist.get_world_size() > 1):
        return (Sharded if shard else Together)(groups, specs, rotary, parts)
    return Alone(groups, specs, rotary, parts)


class Layer(nn.Module):
    """One layer of the decoder, so that FSDP2 can gather it by itself."""

    def __init__(self, tensors: Mapping[str, Tensor], shape: ModelShape, rotary: Rotary) -> None:
        super().__init__()
        self.shape, self.rotary = shape, rotary
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """Return the residual stream after the layer."""
        own = {name: getattr(self, name)[None] for name in LAYER_NAMES}
        return block(x, own, self.shape, self.rotary, batch)


class Decoder(nn.Module):
    """The decoder of `rayx.proxy.model` as a module of one run, for FSDP2.

    Its parameters have the names of `parameter_shapes`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], shape: ModelShape, rotary: Rotary) -> None:
        super().__init__()
        self.embedding: Tensor
        self.norm: Tensor
        self.layers = nn.ModuleList(
            Layer({n: tensors[f"layers.{i}.{n}"] for n in LAYER_NAMES}, shape, rotary)
            for i in range(shape.layers)
        )
        for name in ("embedding", "norm", "head"):
            if name in tensors:
                self.register_parameter(name, nn.Parameter(tensors[name]))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the nats of each predicted token, shape (1, B, T), of tokens (1, B, T + 1)."""
        inputs = tokens[:, :, :-1]
        x = embed(self.embedding[None], inputs)
        for layer in self.layers:
            x = layer(x, inputs.shape[1])
        head = getattr(self, "head", self.embedding)
        logits = unembed(x, self.norm[None], head[None])
        losses = cross_entropies(logits.view(*inputs.shape, -1), tokens[:, :, 1:])
        return losses.clone()  # FSDP2 wants no view


def held(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor, with a run axis, sharing its memory."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.detach()[None]

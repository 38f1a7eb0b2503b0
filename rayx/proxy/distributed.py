"""One run trained by several processes, or by one: what of it differs, in one place.

All processes draw the same batches, each trains on its own rows of them, and gradients are averaged
before each step. So the order of the data and, up to rounding, the losses do not depend on how many
processes there are. But rounding grows: a change of 1e-7 in the start of a small model came to 0.5%
of its loss after 2,000 steps. One process that adds the gradients of two parts of the batch rounds
as two processes with a part each do, and reaches the same bits.

Legend: R runs (1 where processes share it), B sequences of a batch, T context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rayx.errors import SpecError
from rayx.proxy.model import Rotary, TokenLosses, token_losses
from rayx.proxy.objective import Objective
from rayx.spec import TrainSpec

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
        if shard:
            from rayx.proxy.sharded import Sharded  # imports for seconds

            return Sharded(groups, specs, rotary, parts)
        return Together(groups, specs, rotary, parts)
    return Alone(groups, specs, rotary, parts)

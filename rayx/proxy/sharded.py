"""One run whose tensors are spread over processes: FSDP2, layer by layer.

Apart from the rest, since what it imports takes one and a half seconds.
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

from rayx.proxy.distributed import Groups, Tensors, Together
from rayx.proxy.model import LAYER_NAMES, Rotary, block, cross_entropies, embed, unembed
from rayx.proxy.objective import Objective
from rayx.spec import ModelShape, TrainSpec


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

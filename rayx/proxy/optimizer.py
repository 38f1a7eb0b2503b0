"""The optimizer of a pack: AdamW with a rate, a decay and a gradient norm for each run.

Legend: R runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rayx.spec import LrSchedule, Optimizer, TrainSpec


def lr_share(optimizer: Optimizer, step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step` of `steps` (from 0).

    Linear warm-up over warmup_share of the steps; then WSD: 1 until the last decay_share, falling
    linearly to min_lr_share; or cosine: min + (1 - min) (1 + cos(pi progress)) / 2.

    Source: Hu et al. 2024, arXiv:2404.06395, section 4 (WSD); Loshchilov and Hutter 2017,
        arXiv:1608.03983, eq. 5 (cosine).
    """
    warmup = round(optimizer.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    low = optimizer.min_lr_share
    if optimizer.lr_schedule is LrSchedule.COSINE:
        progress = (step - warmup) / max(1, steps - warmup)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = round(optimizer.decay_share * steps)
    left = steps - step
    return 1.0 if left > decay else low + (1 - low) * left / (decay + 1)


class PackedAdamW:
    """AdamW in which each run of the pack has its own rate, decay and gradient norm.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    Differs: norms are not decayed; each run's gradient is clipped to its own global norm.

    Args:
        parameters: Name -> tensor of shape (R, ...).
        first: First moments, of the same shapes.
        second: Second moments.
        specs: The R runs.
        updates: Updates that the moments have seen; None: those before the specs' parents end.
        reduce: Turns the runs' sums of squares of the gradients held here, shape (R,), into those
            of the whole gradients, where each of several processes holds a part.
    """

    def __init__(
        self,
        parameters: dict[str, Tensor],
        first: dict[str, Tensor],
        second: dict[str, Tensor],
        specs: Sequence[TrainSpec],
        updates: int | None = None,
        reduce: Callable[[Tensor], Tensor] = lambda squares_R: squares_R,
    ) -> None:
        self.parameters, self.first, self.second = parameters, first, second
        self.specs = specs
        self.optimizer = specs[0].optimizer  # all but lr and weight_decay agree in a pack
        self.reduce = reduce
        device = parameters["norm"].device
        self.lr_R = torch.tensor([s.optimizer.lr for s in specs], device=device)
        self.decay_R = torch.tensor([s.optimizer.weight_decay for s in specs], device=device)
        norms = [name for name in parameters if name.endswith("norm")]
        self.kinds = ([name for name in parameters if name not in norms], norms)
        self.views: list[list[list[list[Tensor]]]] = []  # by run, kind, group: for a CPU
        before = specs[0].parent.path_steps if specs[0].parent else 0
        self.updates = before if updates is None else updates  # that are in the moments

    @property
    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        """Parameters, first moments, second moments."""
        return self.parameters, self.first, self.second

    @torch.no_grad()
    def step(self, lr_share: float, alive_R: Tensor) -> Tensor:
        """Update the runs that are alive and return the gradient norms, shape (R,)."""
        o = self.optimizer
        self.updates += 1
        grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        norms = [torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads.values()]
        norm_R = self.reduce(torch.stack(norms).square().sum(0)).sqrt()
        alive_R = alive_R & norm_R.isfinite()
        scale_R = (o.clip_norm / norm_R).clamp(max=1.0)
        rate_R = self.lr_R * lr_share * alive_R
        if norm_R.device.type == "cpu":
            self._update_on_a_cpu(grads, scale_R.tolist(), lr_share, alive_R.tolist())
            return norm_R
        correct_1 = 1 - o.beta1**self.updates
        correct_2 = 1 - o.beta2**self.updates
        for name, grad in grads.items():
            parameter, first, second = self.parameters[name], self.first[name], self.second[name]
            column = (-1,) + (1,) * (grad.dim() - 1)
            grad = torch.where(alive_R.view(column), grad * scale_R.view(column), 0.0)
            first.lerp_(grad, 1 - o.beta1)
            second.mul_(o.beta2).addcmul_(grad, grad, value=1 - o.beta2)
            update = (first / correct_1).div_((second / correct_2).sqrt_().add_(o.eps))
            if not name.endswith("norm"):
                update.add_(parameter * self.decay_R.view(column))
            parameter.sub_(update.mul_(rate_R.view(column)))
            self.parameters[name].grad = None
        return norm_R

    def _update_on_a_cpu(
        self, grads: dict[str, Tensor], scale_R: list[float], lr_share: float, alive_R: list[bool]
    ) -> None:
        """Update run by run, each tensor in one pass over memory."""
        o, updates = self.optimizer, torch.tensor(float(self.updates))
        if not self.views:
            self.views = [
                [[[group[n][run] for n in names] for group in self.tensors] for names in self.kinds]
                for run in range(len(self.specs))
            ]
        for run, spec in enumerate(self.specs):
            if not alive_R[run]:
                continue
            decays = (spec.optimizer.weight_decay, 0.0)
            for names, decay, views in zip(self.kinds, decays, self.views[run], strict=True):
                grad = [grads[name][run] for name in names]
                if scale_R[run] < 1:
                    for part in grad:
                        part.mul_(scale_R[run])
                parameters, first, second = views
                torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]: AdamW's own
                    parameters, grad, first, second, [], [updates] * len(names),
                    lr=spec.optimizer.lr * lr_share, weight_decay=decay, eps=o.eps,
                    beta1=o.beta1, beta2=o.beta2, amsgrad=False, maximize=False,
                )  # fmt: skip
        for name in grads:
            self.parameters[name].grad = None

"""What a pack minimises.

Legend: R runs, B sequences of a batch, T context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from rayx.proxy.distillation import Teachers, distilled_losses
from rayx.proxy.fused import Fused, fits
from rayx.proxy.model import Rotary, TokenLosses, token_logits, token_losses
from rayx.spec import Precision, TrainSpec
from rayx.steering import Steering
from rayx.store import Store


class Objective:
    """The loss of each run of a pack: of the text, of a teacher, with factors on domains."""

    def __init__(
        self,
        specs: Sequence[TrainSpec],
        domains: Sequence[str],
        steerings: Sequence[Steering],
        rotary: Rotary,
        store: Store | None,
        device: torch.device,
        losses: TokenLosses = token_losses,
    ) -> None:
        self.losses = losses
        self.shape, self.rotary, self.device = specs[0].model, rotary, device
        self.domains, self.steerings = domains, steerings
        self.distillation = specs[0].distillation  # that of all, for packs differ in it
        self.teachers = Teachers(specs, store, device) if self.distillation else None
        half = specs[0].precision is Precision.BFLOAT16
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=half)
        plain = losses is token_losses and not (self.distillation or half)
        self.fused = Fused(self.shape, rotary) if plain and fits(self.shape, device) else None

    def backward(
        self, parameters: dict[str, Tensor], tokens: Tensor, domain_RB: np.ndarray
    ) -> Tensor:
        """Set the gradients of the parameters; return the mean loss of each run, shape (R,)."""
        if self.fused:
            return self.fused.backward(parameters, tokens, self._factors(domain_RB))
        with self.autocast:
            loss_R = self(parameters, tokens, domain_RB)
        loss_R.sum().backward()
        return loss_R.detach()

    def _factors(self, domain_RB: np.ndarray) -> Tensor | None:
        """Return the policies' factors on the losses of the sequences, shape (R, B)."""
        if not any(steering.loss_weights for steering in self.steerings):
            return None
        factor_RK = [
            [(s.loss_weights or {}).get(d, 1.0) for d in self.domains] for s in self.steerings
        ]
        factor_RB = np.take_along_axis(np.array(factor_RK), domain_RB, axis=1)
        return torch.from_numpy(factor_RB).float().to(self.device)

    def __call__(
        self, parameters: dict[str, Tensor], tokens: Tensor, domain_RB: np.ndarray
    ) -> Tensor:
        """Return the mean loss of each run, nats per token, shape (R,)."""
        if self.teachers is None or self.distillation is None:
            losses = self.losses(parameters, self.shape, self.rotary, tokens)
        else:
            inputs, taught = tokens[:, :, :-1], self.distillation.domains or self.domains
            share_K = np.where(np.isin(self.domains, taught), self.distillation.share, 0.0)
            losses = distilled_losses(
                token_logits(parameters, self.shape, self.rotary, inputs),
                self.teachers.logits(inputs),
                tokens,
                torch.from_numpy(share_K[domain_RB]).float().to(self.device),
                self.distillation.swap,
            )
        factor_RB = self._factors(domain_RB)
        if factor_RB is not None:
            losses = losses * factor_RB[..., None]
        return losses.mean(dim=(1, 2))

"""Distillation: the loss against a teacher's predictions, and the teachers of a pack.

Legend: R runs, B sequences of a batch, T context, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rayx.errors import SpecError
from rayx.proxy.checkpoint import read_checkpoint
from rayx.proxy.model import Rotary, stacked, token_logits
from rayx.spec import ModelShape, TrainSpec
from rayx.store import Store


def distilled_losses(
    logits: Tensor, teacher_logits: Tensor, tokens: Tensor, share: float | Tensor, swap: bool
) -> Tensor:
    """Return the loss of each predicted token against the text and against a teacher.

    loss = (1 - share) CE(text) + share CE(softmax(teacher_logits)) = CE of the two targets' mean.

    Args:
        logits: The model's, shape (R, B, T, V).
        teacher_logits: Shape (R, B, T, V); no gradient goes there.
        tokens: Token ids, shape (R, B, T + 1).
        share: In [0, 1]; or that of each sequence, shape (R, B), 0 where only the text counts.
        swap: Exchange the teacher's logit of the true token with its largest one first.

    Returns:
        Nats, shape (R, B, T), float32.

    Source: swap: Mix-CPT, Jiang et al. 2024, arXiv:2407.10804 (abstract only); the sum: derived.
    """
    true = tokens[:, :, 1:, None]
    with torch.no_grad():
        taught = teacher_logits.float()
        if swap:
            largest, at = taught.max(dim=-1, keepdim=True)
            taught = taught.scatter(-1, at, taught.gather(-1, true)).scatter_(-1, true, largest)
        share_RBT = torch.as_tensor(share, dtype=taught.dtype, device=taught.device)
        share_RBT = share_RBT[..., None, None].expand(*true.shape)
        target = taught.softmax(dim=-1) * share_RBT
        target.scatter_add_(-1, true, 1.0 - share_RBT)
    losses = F.cross_entropy(logits.float().flatten(0, 2), target.flatten(0, 2), reduction="none")
    return losses.view(logits.shape[:3])


class Teachers:
    """The teacher of each run of a pack; they may differ from the runs in shape.

    Args:
        specs: The pack's runs, all with a distillation.
        store: Where the teachers' checkpoints are.
        device: Where they are put.

    Raises:
        SpecError: There is no store.
        StoreError: A checkpoint is missing or damaged.
    """

    def __init__(self, specs: Sequence[TrainSpec], store: Store | None, device: torch.device):
        teachers = [s.distillation.teacher for s in specs if s.distillation]
        if store is None:
            raise SpecError(f"Run {specs[0].run_id} has a teacher; give the store that has it.")
        names = [teacher.checkpoint for teacher in teachers]
        once = dict(zip(names, teachers, strict=True))
        read = {name: read_checkpoint(store, once[name]).parameters for name in once}
        runs_of: dict[ModelShape, list[int]] = {}
        for run, teacher in enumerate(teachers):
            runs_of.setdefault(teacher.spec.model, []).append(run)
        self._groups = [
            (shape, Rotary(shape, device), runs, stacked([read[names[r]] for r in runs], device))
            for shape, runs in runs_of.items()
        ]

    @torch.no_grad()
    def logits(self, inputs: Tensor) -> Tensor:
        """Return each run's teacher's logits, shape (R, B, T, V), of token ids (R, B, T)."""
        parts = [
            token_logits(parameters, shape, rotary, inputs[runs])
            for shape, rotary, runs, parameters in self._groups
        ]
        order = [run for _, _, runs, _ in self._groups for run in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts)[torch.tensor(order).argsort()]

"""Evaluation: loss per target on fixed held-out sequences.

Legend: R runs, S sequences of a target, T context.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rayx.corpus import Corpus
from rayx.corpus.places import heldout_places
from rayx.corpus.sampler import take
from rayx.proxy.fused import Fused, fits
from rayx.proxy.model import Rotary, TokenLosses, token_losses
from rayx.record import Loss
from rayx.spec import Evaluation, ModelShape
from rayx.units import bits_per_byte


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A target's held-out sequences, the same for every run of a sweep."""

    tokens: Tensor  # (S, T + 1)
    bits_per_nat_token: float  # turns nats per token into bits per byte


def held_out(
    corpus: Corpus, context: int, evaluation: Evaluation, device: torch.device
) -> dict[str, HeldOut]:
    """Return target -> HeldOut: at most `sequences` sequences, spread evenly over the part.

    Bits per byte use the tokens per byte of the whole held-out shard, so that the factor does not
    depend on how many sequences are read.

    Raises:
        CorpusError: A target's held-out text is shorter than one sequence.
    """
    result = {}
    for target in corpus.targets:
        places = heldout_places(corpus, target, context, evaluation)
        tokens = torch.from_numpy(take(corpus.heldout(target), places, context)).to(device)
        factor = bits_per_byte(1.0, corpus.heldout_tokens[target], corpus.heldout_bytes[target])
        result[target] = HeldOut(tokens, factor)
    return result


@torch.no_grad()
def evaluate(
    parameters: dict[str, Tensor],
    shape: ModelShape,
    rotary: Rotary,
    targets: Mapping[str, HeldOut],
    batch_sequences: int,
    losses: TokenLosses = token_losses,
) -> list[dict[str, Loss]]:
    """Return for each of the R runs target -> loss, with the standard error over sequences."""
    runs, device = parameters["embedding"].shape[0], parameters["embedding"].device
    if losses is token_losses and fits(shape, device) and not torch.is_autocast_enabled("cpu"):
        losses = Fused(shape, rotary).losses
    results: list[dict[str, Loss]] = [{} for _ in range(runs)]
    for target, data in targets.items():
        parts = [
            losses(parameters, shape, rotary, chunk.expand(runs, -1, -1)).mean(dim=2)
            for chunk in data.tokens.split(batch_sequences)
        ]
        loss_RS = torch.cat(parts, dim=1).double().cpu().numpy()
        count = loss_RS.shape[1]
        for run in range(runs):
            nats = float(loss_RS[run].mean())
            spread = float(loss_RS[run].std(ddof=1)) if count > 1 else math.nan
            stderr = spread / math.sqrt(count) if count > 1 else 0.0
            factor = data.bits_per_nat_token
            results[run][target] = Loss(nats, nats * factor, stderr * factor)
    return results

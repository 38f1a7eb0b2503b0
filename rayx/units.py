"""FLOP accounting and loss units, in one place."""

from __future__ import annotations

import math


def train_flops(params: int, tokens: int) -> float:
    """FLOPs of training: 6 N D.

    Args:
        params: Parameters N that take part in matrix products (embedding look-ups left out).
        tokens: Training tokens D.

    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    """
    return 6.0 * params * tokens


def forward_flops(params: int, tokens: int) -> float:
    """FLOPs of a forward pass (evaluation): 2 N D.

    Source: Kaplan et al. 2020, arXiv:2001.08361, section 2.1.
    """
    return 2.0 * params * tokens


def bits_per_byte(loss_nats: float, tokens: int, num_bytes: int) -> float:
    """Turn a mean loss in nats per token into bits per byte of the same text.

    bpb = loss_nats * tokens / (ln 2 * num_bytes); it does not depend on the tokenizer's vocabulary,
    so losses under different tokenizers can be compared.
    """
    return loss_nats * tokens / (math.log(2.0) * num_bytes)

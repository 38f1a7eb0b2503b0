"""FLOP accounting and loss units, in one place."""

from __future__ import annotations

import math

import numpy as np

from rayx.errors import SpecError

# Repetitions after which one more is worth 1/e of fresh data: 15.387756 in the paper's fit.
REPETITION_R_STAR = 15.39


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


def effective_tokens(
    tokens: float | np.ndarray,
    unique_tokens: float | np.ndarray,
    r_star: float | np.ndarray = REPETITION_R_STAR,
) -> np.ndarray:
    """Tokens of fresh data that repeated tokens are worth: D' = U + U R* (1 - exp(-R / R*)).

    U = min(unique_tokens, tokens) is seen once and R = tokens / U - 1 times again. D' is tokens
    up to one epoch, then bends, and never passes U (1 + R*). Arguments broadcast.

    Args:
        tokens: Training tokens D drawn from the domain, >= 0.
        unique_tokens: Tokens that the domain holds, >= 0; 0 gives 0.
        r_star: R*, > 0; inf for no discount.

    Raises:
        SpecError: An argument is negative or not a number, or r_star is 0.

    Source: Muennighoff et al. 2023, arXiv:2305.16264, section 3.1; R_D* is fitted in appendix A.
    """
    tokens, unique, r_star = (np.asarray(x, float) for x in (tokens, unique_tokens, r_star))
    for name, value, ok in (
        ("tokens", tokens, tokens >= 0),
        ("unique_tokens", unique, unique >= 0),
        ("r_star", r_star, r_star > 0),
    ):
        if not np.all(ok):
            bad = value[~ok].flat[0]
            raise SpecError(
                f"effective_tokens: {name} is {bad:g}; expected a number that is not "
                f"negative{' or zero' if name == 'r_star' else ''}"
            )
    once = np.minimum(tokens, unique)
    again = np.where(once > 0, tokens - once, 0.0)
    # Scaled so that neither an infinite R* nor an infinite supply leaves 0 * inf behind.
    width = np.where(once > 0, once * r_star, np.inf)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        bent = np.where(again > 0, -width * np.expm1(-again / width), 0.0)
    return once + np.where(np.isinf(width), again, bent)

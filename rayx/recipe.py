"""Recipes: the parts of a spec that say how a model is built, trained and evaluated."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum
from typing import Any

from rayx.errors import SpecError


def require(condition: bool, what: str, value: object, expected: str) -> None:
    """Raise SpecError naming what is wrong, its value and what was expected."""
    if not condition:
        raise SpecError(f"{what} is {value!r}; expected {expected}.")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def member(kind: type[Enum], what: str, value: object) -> Enum:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(choice.value) for choice in kind)
        raise SpecError(f"{what} is {value!r}; expected one of {choices}.") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Shape of the decoder (RoPE, RMSNorm, SwiGLU)."""

    layers: int
    width: int
    heads: int
    ffn_width: int
    vocab_size: int
    context: int  # tokens a sequence
    tied_embeddings: bool = True

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "ffn_width", "vocab_size", "context"):
            value = getattr(self, name)
            require(is_int(value) and value > 0, f"ModelShape.{name}", value, "an integer > 0")
        require(
            isinstance(self.tied_embeddings, bool),
            "ModelShape.tied_embeddings",
            self.tied_embeddings,
            "True or False",
        )
        require(
            self.width % self.heads == 0 and (self.width // self.heads) % 2 == 0,
            "ModelShape.width / heads",
            self.width / self.heads,
            "an even integer (rotary positions turn pairs)",
        )

    @property
    def block_params(self) -> int:
        """Parameters without the embeddings: attention, feed-forward and norms."""
        per_layer = 4 * self.width**2 + 3 * self.width * self.ffn_width + 2 * self.width
        return self.layers * per_layer + self.width

    @property
    def params(self) -> int:
        """All trained parameters."""
        tables = 1 if self.tied_embeddings else 2
        return self.block_params + tables * self.vocab_size * self.width

    @property
    def matmul_params(self) -> int:
        """Parameters that take part in matrix products (blocks and output head), for FLOPs."""
        return self.block_params + self.vocab_size * self.width


class LrSchedule(str, Enum):
    """Shape of the learning rate after the warm-up."""

    WSD = "wsd"  # constant, then linear to min_lr_share over the last decay_share of the steps
    COSINE = "cosine"  # half a cosine to min_lr_share over all the steps


class Precision(str, Enum):
    """Precision of matrix products; parameters and losses are float32 always."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimizer:
    """AdamW with decoupled weight decay on matrices, clipping by global norm, and its schedule."""

    lr: float
    batch_sequences: int
    lr_schedule: LrSchedule = LrSchedule.WSD
    warmup_share: float = 0.05  # of the steps
    decay_share: float = 0.2  # of the steps, WSD only
    min_lr_share: float = 0.0  # of lr, at the end
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-6  # far over a gradient's rounding (1e-8), which would else decide signs
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        lr_schedule = member(LrSchedule, "Optimizer.lr_schedule", self.lr_schedule)
        object.__setattr__(self, "lr_schedule", lr_schedule)
        numbers = [f.name for f in dataclasses.fields(self) if f.type == "float"]
        for name in numbers:
            require(
                is_number(getattr(self, name)),
                f"Optimizer.{name}",
                getattr(self, name),
                "a finite number",
            )
            # Adding 0 turns -0.0 into 0.0: equal specs have equal ids.
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)
        require(0 < self.lr <= 10, "Optimizer.lr", self.lr, "a number in (0, 10]")
        require(
            is_int(self.batch_sequences) and self.batch_sequences > 0,
            "Optimizer.batch_sequences",
            self.batch_sequences,
            "an integer > 0",
        )
        for name in ("warmup_share", "decay_share", "min_lr_share"):
            require(
                0 <= getattr(self, name) <= 1,
                f"Optimizer.{name}",
                getattr(self, name),
                "a share in [0, 1]",
            )
        require(
            self.warmup_share + self.decay_share <= 1 or self.lr_schedule is LrSchedule.COSINE,
            "Optimizer.warmup_share + decay_share",
            self.warmup_share + self.decay_share,
            "at most 1",
        )
        for name in ("beta1", "beta2"):
            require(
                0 <= getattr(self, name) < 1, f"Optimizer.{name}", getattr(self, name), "in [0, 1)"
            )
        require(self.weight_decay >= 0, "Optimizer.weight_decay", self.weight_decay, ">= 0")
        require(self.eps > 0, "Optimizer.eps", self.eps, "> 0")
        require(self.clip_norm > 0, "Optimizer.clip_norm", self.clip_norm, "> 0")

    def worker_sequences(self, workers: int) -> int:
        """Return how many sequences of a batch each of `workers` processes trains on.

        Raises:
            SpecError: The batch cannot be divided evenly.
        """
        batch = self.batch_sequences
        fitting = ", ".join(str(n) for n in range(1, batch + 1) if batch % n == 0)
        require(batch % workers == 0, "The number of workers", workers,
                f"one that divides the {batch} sequences of a batch: {fitting}")  # fmt: skip
        return batch // workers


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """When and on how much held-out text a run is evaluated."""

    points: int = 4  # equally spaced over the steps, the end included
    sequences: int = 64  # per target at most, each of the model's context
    part: str = "all"  # of the held-out text: choose on the `first` half, report on the `second`

    def __post_init__(self) -> None:
        for name in ("points", "sequences"):
            value = getattr(self, name)
            require(is_int(value) and value > 0, f"Evaluation.{name}", value, "an integer > 0")
        parts = ("all", "first", "second")
        require(self.part in parts, "Evaluation.part", self.part, f"one of {', '.join(parts)}")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data; the usual part is left out."""
        return {k: v for k, v in dataclasses.asdict(self).items() if (k, v) != ("part", "all")}

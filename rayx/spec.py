"""Specs: everything that decides a run's result.

`run_id` is a hash of the whole spec. Two specs that could give different results have different
ids; what cannot change the result (where the store is, how many workers, the pack a run is trained
in) is an argument of the sweep and not part of the spec.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from rayx.errors import SpecError
from rayx.mixture import Schedule
from rayx.units import train_flops

FORMAT = 1  # of specs and records; part of every run_id


def require(condition: bool, what: str, value: object, expected: str) -> None:
    """Raise SpecError naming what is wrong, its value and what was expected."""
    if not condition:
        raise SpecError(f"{what} is {value!r}; expected {expected}.")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _member(kind: type[Enum], what: str, value: object) -> Enum:
    try:
        return kind(value)
    except ValueError:
        choices = ", ".join(repr(member.value) for member in kind)
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
            require(_is_int(value) and value > 0, f"ModelShape.{name}", value, "an integer > 0")
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
        lr_schedule = _member(LrSchedule, "Optimizer.lr_schedule", self.lr_schedule)
        object.__setattr__(self, "lr_schedule", lr_schedule)
        numbers = [f.name for f in dataclasses.fields(self) if f.type == "float"]
        for name in numbers:
            require(
                _is_number(getattr(self, name)),
                f"Optimizer.{name}",
                getattr(self, name),
                "a finite number",
            )
            # Adding 0 turns -0.0 into 0.0: equal specs have equal ids.
            object.__setattr__(self, name, float(getattr(self, name)) + 0.0)
        require(0 < self.lr <= 10, "Optimizer.lr", self.lr, "a number in (0, 10]")
        require(
            _is_int(self.batch_sequences) and self.batch_sequences > 0,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """When and on how much held-out text a run is evaluated."""

    points: int = 4  # equally spaced over the steps, the end included
    sequences: int = 64  # per target at most, each of the model's context

    def __post_init__(self) -> None:
        for name in ("points", "sequences"):
            value = getattr(self, name)
            require(_is_int(value) and value > 0, f"Evaluation.{name}", value, "an integer > 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """Everything that decides the result of a training run.

    `seed` draws the initial parameters, `data_seed` the order in which each domain is read. By
    default both are shared by all runs of a sweep (common random numbers), so that differences
    between mixtures are not drowned by noise; replicates change both.
    """

    corpus: str  # fingerprint
    model: ModelShape
    schedule: Schedule
    optimizer: Optimizer
    seed: int = 0
    data_seed: int = 0
    evaluation: Evaluation = field(default_factory=Evaluation)
    precision: Precision = Precision.FLOAT32

    def __post_init__(self) -> None:
        precision = _member(Precision, "TrainSpec.precision", self.precision)
        object.__setattr__(self, "precision", precision)
        require(
            isinstance(self.corpus, str) and bool(self.corpus),
            "TrainSpec.corpus",
            self.corpus,
            "a corpus fingerprint",
        )
        parts = {
            "model": ModelShape,
            "schedule": Schedule,
            "optimizer": Optimizer,
            "evaluation": Evaluation,
        }
        for name, kind in parts.items():
            value = getattr(self, name)
            require(
                isinstance(value, kind),
                f"TrainSpec.{name}",
                value,
                f"an instance of {kind.__name__}",
            )
        for name in ("seed", "data_seed"):
            value = getattr(self, name)
            require(
                _is_int(value) and 0 <= value < 2**31,
                f"TrainSpec.{name}",
                value,
                "an integer in [0, 2^31)",
            )
        require(
            min(p.tokens for p in self.schedule.phases) >= self.batch_tokens,
            "The shortest phase of TrainSpec.schedule, in tokens,",
            min(p.tokens for p in self.schedule.phases),
            f"at least one batch ({self.batch_tokens} tokens)",
        )
        require(
            self.evaluation.points <= self.steps,
            "Evaluation.points",
            self.evaluation.points,
            f"at most the {self.steps} steps of the run",
        )

    @property
    def batch_tokens(self) -> int:
        """Tokens of one optimizer step."""
        return self.optimizer.batch_sequences * self.model.context

    @property
    def steps(self) -> int:
        """Optimizer steps: the schedule's tokens rounded to whole batches."""
        return round(self.schedule.tokens / self.batch_tokens)

    @property
    def tokens(self) -> int:
        """Tokens that the run really trains on."""
        return self.steps * self.batch_tokens

    @property
    def flops(self) -> float:
        """Training FLOPs, 6 N D over the parameters in matrix products."""
        return train_flops(self.model.matmul_params, self.tokens)

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON of the whole spec."""
        text = json.dumps(
            {"format": FORMAT, **self.to_json()}, sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def pack_key(self) -> str:
        """Runs with equal keys can share a pack: all but mixture, rate, decay and seeds agree."""
        data = self.to_json()
        for name in ("schedule", "seed", "data_seed"):
            del data[name]
        del data["optimizer"]["lr"], data["optimizer"]["weight_decay"]
        return json.dumps({**data, "steps": self.steps}, sort_keys=True)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data from which `from_json` makes an equal spec."""
        return {
            "kind": "train",
            "corpus": self.corpus,
            "model": dataclasses.asdict(self.model),
            "schedule": self.schedule.to_json(),
            "optimizer": {
                **dataclasses.asdict(self.optimizer),
                "lr_schedule": self.optimizer.lr_schedule.value,
            },
            "seed": self.seed,
            "data_seed": self.data_seed,
            "evaluation": dataclasses.asdict(self.evaluation),
            "precision": self.precision.value,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainSpec:
        """Read what `to_json` wrote.

        Raises:
            SpecError: A field is missing, unknown or out of range.
        """
        try:
            if data["kind"] != "train":
                raise SpecError(f"Spec has kind {data['kind']!r}; expected 'train'.")
            unknown = set(data) - {"kind", *(f.name for f in dataclasses.fields(cls))}
            if unknown:
                raise SpecError(f"Spec has fields {sorted(unknown)} that this rayx does not know.")
            return cls(
                corpus=data["corpus"],
                model=ModelShape(**data["model"]),
                schedule=Schedule.from_json(data["schedule"]),
                optimizer=Optimizer(**data["optimizer"]),
                seed=data["seed"],
                data_seed=data["data_seed"],
                evaluation=Evaluation(**data["evaluation"]),
                precision=Precision(data["precision"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise SpecError(
                f"Spec cannot be read: {error!r}. Expected what TrainSpec.to_json wrote."
            ) from error

"""Specs: everything that decides a run's result.

`run_id` is a hash of the whole spec. Two specs that could give different results have different
ids; what cannot change the result (where the store is, how many workers, the pack a run is trained
in) is an argument of the sweep and not part of the spec.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field, fields
from typing import Any

from rayx.distillation import Distillation
from rayx.errors import UNREADABLE, SpecError
from rayx.mixture import Mixture, Schedule
from rayx.policy import Policy, policy_from_json, policy_id, policy_parents, policy_to_json
from rayx.recipe import (
    Evaluation,
    LrSchedule,
    ModelShape,
    Optimizer,
    Precision,
    is_int,
    member,
    require,
)
from rayx.units import forward_flops, train_flops

__all__ = [
    "Distillation",
    "Evaluation",
    "LrSchedule",
    "ModelShape",
    "Optimizer",
    "Parent",
    "Precision",
    "TrainSpec",
    "require",
]

FORMAT = 1  # of specs and records; part of every run_id


@dataclass(frozen=True, slots=True)
class Parent:
    """Where a branch leaves another run: after `steps` optimizer steps of `spec`.

    The branch takes over parameters, optimizer moments and the places in the data, so a branch that
    goes on with the parent's schedule is the parent's own continuation.
    """

    spec: TrainSpec
    steps: int
    # Its name in a store; what decides its content is in the name. Kept, for hashing takes long.
    checkpoint: str = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        require(isinstance(self.spec, TrainSpec), "Parent.spec", self.spec, "a TrainSpec")
        require(
            is_int(self.steps) and 0 < self.steps <= self.spec.steps,
            "Parent.steps",
            self.steps,
            f"an integer from 1 to the {self.spec.steps} steps of the parent",
        )
        name = f"checkpoints/{self.spec.run_id}-{self.steps}.safetensors"
        object.__setattr__(self, "checkpoint", name)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data from which `from_json` makes an equal parent."""
        return {"spec": self.spec.to_json(), "steps": self.steps}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Parent:
        """Read what `to_json` wrote."""
        return cls(TrainSpec.from_json(data["spec"]), data["steps"])

    @property
    def path_steps(self) -> int:
        """Optimizer steps since the first ancestor's start."""
        before = self.spec.parent.path_steps if self.spec.parent else 0
        return before + self.steps


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """Everything that decides the result of a training run.

    `seed` draws the initial parameters, `data_seed` the order in which each domain is read. By
    default both are shared by all runs of a sweep (common random numbers), so that differences
    between mixtures are not drowned by noise; replicates change both. With a `parent` the run is a
    branch: it starts from the parent's state instead of from `seed`. With a `policy` the schedule
    is one phase, the policy's prior, and the mixture is set while the run goes on.
    """

    corpus: str  # fingerprint
    model: ModelShape
    schedule: Schedule
    optimizer: Optimizer
    seed: int = 0
    data_seed: int = 0
    evaluation: Evaluation = field(default_factory=Evaluation)
    precision: Precision = Precision.FLOAT32
    parent: Parent | None = None
    policy: Policy | None = None
    distillation: Distillation | None = None

    def __post_init__(self) -> None:
        precision = member(Precision, "TrainSpec.precision", self.precision)
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
                is_int(value) and 0 <= value < 2**31,
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
        if self.parent is not None:
            require(isinstance(self.parent, Parent), "TrainSpec.parent", self.parent, "a Parent")
            for name in ("corpus", "model"):
                theirs = getattr(self.parent.spec, name)
                require(
                    getattr(self, name) == theirs,
                    f"TrainSpec.{name} of a branch",
                    getattr(self, name),
                    f"that of its parent ({theirs!r})",
                )
        if self.policy is not None:
            ok = hasattr(self.policy, "blocks")
            require(ok, "TrainSpec.policy", self.policy, "a policy, see rayx.policies")
            phases, prior = self.schedule.phases, self.mixture
            require(len(phases) == 1, "TrainSpec.schedule", phases, "one phase, beside a policy")
            require(len(prior) > 1, "The prior of a policy", prior, "two domains or more")
        ok = self.distillation is None or isinstance(self.distillation, Distillation)
        require(ok, "TrainSpec.distillation", self.distillation, "a Distillation")
        for other in self.parents[bool(self.parent) :]:
            mine = (self.corpus, self.model.vocab_size, self.model.context)
            theirs = other.spec.corpus, other.spec.model.vocab_size, other.spec.model.context
            what = "Corpus, vocabulary and context of a reference or teacher"
            require(mine == theirs, what, theirs, f"those of the run, {mine}")

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
    def trunk_tokens(self) -> int:
        """Tokens of the ancestors up to where this run leaves them; 0 without a parent."""
        if self.parent is None:
            return 0
        return self.parent.spec.trunk_tokens + self.parent.steps * self.parent.spec.batch_tokens

    @property
    def domain_tokens(self) -> dict[str, float]:
        """Domain -> training tokens read on the whole path, ancestors included."""
        read: dict[str, float] = {}
        for spec, after in zip(self.path, (*self.path[1:], None), strict=True):
            tokens = (
                after.parent.steps * spec.batch_tokens if after and after.parent else spec.tokens
            )
            for domain, count in spec.schedule.domain_tokens(tokens).items():
                read[domain] = read.get(domain, 0.0) + count
        return read

    @property
    def mixture(self) -> Mixture:
        """The average mixture of its own schedule; a policy's prior."""
        return self.schedule.average()

    @property
    def parents(self) -> tuple[Parent, ...]:
        """The states that it reads: its parent's, its policy's references' and its teacher's."""
        return (
            *((self.parent,) if self.parent else ()),
            *(policy_parents(self.policy) if self.policy else ()),
            *((self.distillation.teacher,) if self.distillation else ()),
        )

    @property
    def path(self) -> tuple[TrainSpec, ...]:
        """The ancestors from the first one on, and this spec."""
        return (*self.parent.spec.path, self) if self.parent else (self,)

    @property
    def flops(self) -> float:
        """Training FLOPs of this run alone: 6 N D over the parameters in matrix products.

        A teacher's forward passes count, a policy's signals do not: they are known to its record.
        """
        teacher = self.distillation.teacher.spec.model.matmul_params if self.distillation else 0
        own = train_flops(self.model.matmul_params, self.tokens)
        return own + forward_flops(teacher, self.tokens)

    @property
    def run_id(self) -> str:
        """First 12 hex digits of the sha256 of the canonical JSON of the whole spec."""
        text = json.dumps(
            {"format": FORMAT, **self.to_json()}, sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def pack_key(self) -> str:
        """Runs with equal keys can share a pack; mixture, policy, rates and seeds may differ."""
        data = self.to_json()
        for name in ("schedule", "seed", "data_seed"):
            del data[name]
        data.pop("policy", None)
        del data["optimizer"]["lr"], data["optimizer"]["weight_decay"]
        if self.parent is not None:
            data["parent"] = self.parent.path_steps  # Adam's bias correction is the pack's
        return json.dumps({**data, "steps": self.steps}, sort_keys=True)

    def columns(self) -> dict[str, Any]:
        """Return the spec's columns of `Store.runs`."""
        return {
            "kind": "train",
            "corpus": self.corpus,
            "params": self.model.params,
            "tokens": self.tokens,
            "trunk_tokens": self.trunk_tokens,
            "parent": self.parent.spec.run_id if self.parent else None,
            "expert_set": None,
            "operator": None,
            "policy": self.policy.name if self.policy else None,
            "policy_id": policy_id(self.policy, self.mixture) if self.policy else None,
            "teacher": self.distillation.teacher.spec.run_id if self.distillation else None,
            "seed": self.seed,
            "data_seed": self.data_seed,
            "layers": self.model.layers,
            "width": self.model.width,
            "context": self.model.context,
            "lr": self.optimizer.lr,
            "batch_sequences": self.optimizer.batch_sequences,
            "phases": len(self.schedule.phases),
            **{f"weight/{d}": w for d, w in self.mixture.items()},
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data from which `from_json` makes an equal spec."""
        optional: dict[str, Any] = {}  # left out where there is none
        if self.parent is not None:
            optional["parent"] = self.parent.to_json()
        if self.policy is not None:
            optional["policy"] = policy_to_json(self.policy)
        if self.distillation is not None:
            optional["distillation"] = self.distillation.to_json()
        return {
            "kind": "train",
            **optional,
            "corpus": self.corpus,
            "model": dataclasses.asdict(self.model),
            "schedule": self.schedule.to_json(),
            "optimizer": {
                **dataclasses.asdict(self.optimizer),
                "lr_schedule": self.optimizer.lr_schedule.value,
            },
            "seed": self.seed,
            "data_seed": self.data_seed,
            "evaluation": self.evaluation.to_json(),
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
            unknown = set(data) - {"kind", *(f.name for f in fields(cls))}
            if unknown:
                raise SpecError(f"Spec has fields {sorted(unknown)} that this rayx does not know.")
            optional: dict[str, Any] = {}
            if "parent" in data:
                optional["parent"] = Parent.from_json(data["parent"])
            if "policy" in data:
                optional["policy"] = policy_from_json(data["policy"])
            if "distillation" in data:
                teacher = Parent.from_json(data["distillation"]["teacher"])
                optional["distillation"] = Distillation(
                    **data["distillation"] | {"teacher": teacher}
                )
            return cls(
                corpus=data["corpus"],
                model=ModelShape(**data["model"]),
                schedule=Schedule.from_json(data["schedule"]),
                optimizer=Optimizer(**data["optimizer"]),
                seed=data["seed"],
                data_seed=data["data_seed"],
                evaluation=Evaluation(**data["evaluation"]),
                precision=Precision(data["precision"]),
                **optional,
            )
        except UNREADABLE as error:
            raise SpecError(
                f"Spec cannot be read: {error!r}. Expected what TrainSpec.to_json wrote."
            ) from error

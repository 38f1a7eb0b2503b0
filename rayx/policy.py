"""Policies: rules that set the mixture while a run trains, from signals read off the model.

A policy is a generator. It yields a Block, "train so many steps on these weights, then measure this
signal", and is sent what was measured. The training loop records each block and each value, so a
run that was interrupted replays them to the same state, to the bit. Rules are in `rayx.policies`;
what measures signals is `rayx.proxy.meter`. No torch here.

Legend: K domains, S sources of a signal, P probes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from rayx.errors import UNREADABLE, SpecError
from rayx.mixture import Mixture
from rayx.recipe import ModelShape, is_int, is_number, require
from rayx.units import forward_flops, train_flops

PARTS = ("train", "first", "second", "all")
OVER = ("all", "last", "projection")
CURVATURES = ("diagonal", "kronecker", "fisher")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Text that a signal reads: a target's sequences, the same in every measurement.

    Attributes:
        target: A domain, or a target that is only evaluated on.
        part: `train`, or of the held-out text the `first` half, the `second` or `all`. A run may
            not be judged on a part that its policy reads.
        sequences: How many at most, spread evenly over the part.
    """

    target: str
    part: str = "first"
    sequences: int = 64

    def __post_init__(self) -> None:
        ok = isinstance(self.target, str) and bool(self.target)
        require(ok, "Probe.target", self.target, "a name")
        require(self.part in PARTS, "Probe.part", self.part, f"one of {', '.join(PARTS)}")
        _check_count("Probe.sequences", self.sequences)


@dataclass(frozen=True, slots=True, kw_only=True)
class Losses:
    """Loss of each probe, nats per token: shape (P,). One forward pass of the probes."""

    probes: tuple[Probe, ...]

    def __post_init__(self) -> None:
        require(bool(self.probes), "Losses.probes", self.probes, "at least one probe")

    def flops(self, shape: ModelShape) -> float:
        """FLOPs of one measurement."""
        return forward_flops(shape.matmul_params, shape.context * _sequences(self.probes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gradients:
    """Inner products of mean gradients of the loss (nats per token): shape (S + P, S + P).

    One forward and one backward pass of (S + P) batches.

    Attributes:
        sources: Mixtures; of each, a fresh batch of training text is drawn.
        probes: Of each, at most `sequences` sequences drawn afresh; after the sources.
        sequences: Of a batch.
        over: Parameters that count: `all`; `last`, the output matrix alone (no backward pass
            through the blocks); `projection`, all, through a seeded random projection.
    """

    sources: tuple[Mixture, ...]
    probes: tuple[Probe, ...] = ()
    sequences: int = 8
    over: str = "all"

    def __post_init__(self) -> None:
        require(bool(self.sources), "Gradients.sources", self.sources, "at least one mixture")
        _check_count("Gradients.sequences", self.sequences)
        require(self.over in OVER, "Gradients.over", self.over, f"one of {', '.join(OVER)}")

    def flops(self, shape: ModelShape) -> float:
        """FLOPs of one measurement."""
        tokens = shape.context * self.sequences * (len(self.sources) + len(self.probes))
        if self.over != "last":
            return train_flops(shape.matmul_params, tokens)
        # Backward, the output matrix' own gradient alone: one product more.
        return forward_flops(shape.matmul_params + shape.vocab_size * shape.width, tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """Mean over tokens of max(0, loss - a reference model's loss), nats: shape (S,).

    One forward pass of S batches through both models.

    Attributes:
        reference: A rayx.spec.Parent; its model has the run's vocabulary and context.
        sources: Mixtures; of each, a fresh batch of training text is drawn.
        sequences: Of a batch.
    """

    reference: Any
    sources: tuple[Mixture, ...]
    sequences: int = 8

    def __post_init__(self) -> None:
        require(bool(self.sources), "Excess.sources", self.sources, "at least one mixture")
        _check_count("Excess.sequences", self.sequences)

    def flops(self, shape: ModelShape) -> float:
        """FLOPs of one measurement."""
        both = shape.matmul_params + self.reference.spec.model.matmul_params
        return forward_flops(both, shape.context * self.sequences * len(self.sources))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drops:
    """Fall of each probe's loss, nats per token, after short training on each source: (P, S).

    Copies of the run, moments included, train `steps` steps each at the run's rate; the run itself
    does not move. S * steps training steps, and S + 1 forward passes of the probes.

    Attributes:
        sources: Mixtures to train on.
        probes: Where losses are measured.
        steps: Of each copy, each of the run's own batch size.
    """

    sources: tuple[Mixture, ...]
    probes: tuple[Probe, ...]
    steps: int
    batch_sequences: int

    def __post_init__(self) -> None:
        require(bool(self.sources), "Drops.sources", self.sources, "at least one mixture")
        require(bool(self.probes), "Drops.probes", self.probes, "at least one probe")
        _check_count("Drops.steps", self.steps)
        _check_count("Drops.batch_sequences", self.batch_sequences)

    def flops(self, shape: ModelShape) -> float:
        """FLOPs of one measurement."""
        params = shape.matmul_params
        steps = len(self.sources) * self.steps * self.batch_sequences
        losses = (len(self.sources) + 1) * _sequences(self.probes)
        return shape.context * (train_flops(params, steps) + forward_flops(params, losses))


@dataclass(frozen=True, slots=True, kw_only=True)
class Influence:
    """Influence of training on each source on each probe's loss: shape (P, S), higher is better.

    I = g_probe^T H^-1 g_source: the fall of a probe's loss, nats per token, for a small Newton step
    on a source. H is a damped curvature of the loss on the sources' text.

    Attributes:
        sources: Mixtures; of each, a fresh batch of training text is drawn.
        probes: What is influenced.
        sequences: Of each source's batch; one gradient a sequence.
        curvature: `diagonal` or `kronecker` of the empirical Fisher matrix, or the whole `fisher`.
        damping: Added to the curvature, as a multiple of its mean eigenvalue.
    """

    sources: tuple[Mixture, ...]
    probes: tuple[Probe, ...]
    sequences: int = 16
    curvature: str = "diagonal"
    damping: float = 0.1

    def __post_init__(self) -> None:
        require(bool(self.sources), "Influence.sources", self.sources, "at least one mixture")
        require(bool(self.probes), "Influence.probes", self.probes, "at least one probe")
        _check_count("Influence.sequences", self.sequences)
        expected = f"one of {', '.join(CURVATURES)}"
        require(self.curvature in CURVATURES, "Influence.curvature", self.curvature, expected)
        ok = is_number(self.damping) and self.damping > 0
        require(ok, "Influence.damping", self.damping, "a number > 0")

    def flops(self, shape: ModelShape) -> float:
        """FLOPs of one measurement."""
        sequences = self.sequences * len(self.sources) + _sequences(self.probes)
        return train_flops(shape.matmul_params, shape.context * sequences)


Signal = Losses | Gradients | Excess | Drops | Influence


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """What a policy asks for: training, then a measurement.

    Attributes:
        weights_K: The mixture of the next steps, >= 0, in any unit.
        steps: How many; 0 to measure before training. The run's end cuts the last block.
        signal: What is measured after them, or None. At the run's end nothing is measured.
        loss_weights_K: Factor on the loss of each domain's sequences, or None for 1.
    """

    weights_K: np.ndarray
    steps: int
    signal: Signal | None = None
    loss_weights_K: np.ndarray | None = None


Blocks = Generator[Block, np.ndarray, None]


@dataclass(frozen=True, slots=True, eq=False)
class Setting:
    """The run that a policy steers.

    Attributes:
        domains: The K domains of the run's schedule.
        prior_K: Their weights there, > 0, sum 1: what a policy starts from.
        steps: Optimizer steps of the run.
        batch_sequences: Sequences of a step.
    """

    domains: tuple[str, ...]
    prior_K: np.ndarray
    steps: int
    batch_sequences: int

    @property
    def each(self) -> tuple[Mixture, ...]:
        """Each domain alone, the usual sources of a signal."""
        return tuple(Mixture({domain: 1}) for domain in self.domains)

    def probes(self, part: str = "first", sequences: int = 64) -> tuple[Probe, ...]:
        """Each domain's held-out text, the usual probes of a signal."""
        return tuple(Probe(target=d, part=part, sequences=sequences) for d in self.domains)


class Policy(Protocol):
    """A frozen dataclass of plain values, Mixtures, Probes and Parents, all part of the run_id.

    After the generator has ended, its last weights stay.
    """

    name: ClassVar[str]

    def blocks(self, setting: Setting) -> Blocks:
        """Yield blocks and receive what their signals measured (an array of float64)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The mixture that a policy set, as a record keeps it.

    Attributes:
        step: Optimizer steps before it.
        weights: Domain -> weight of the steps that follow.
        signal: What had been measured just before, or None.
        loss_weights: Domain -> factor on its loss, or None.
    """

    step: int
    weights: dict[str, float]
    signal: Any = None  # nested lists
    loss_weights: dict[str, float] | None = None


def policy_parents(policy: Any) -> tuple[Any, ...]:
    """Return the runs whose states a policy reads, in the order of its fields."""
    values = (getattr(policy, f.name) for f in dataclasses.fields(policy))
    return tuple(value for value in values if hasattr(value, "checkpoint"))


def policy_to_json(policy: Any) -> dict[str, Any]:
    """Return plain JSON data from which `policy_from_json` makes an equal policy."""
    values = {f.name: _plain(getattr(policy, f.name)) for f in dataclasses.fields(policy)}
    for f in dataclasses.fields(policy):  # 5 and 5.0 are one value, and so one run_id
        if f.type in (float, "float"):
            values[f.name] = float(values[f.name])
    return {"name": policy.name, **values}


def policy_id(policy: Any, prior: Mixture) -> str:
    """Return 8 hex digits of settings and prior, equal in replicates: references do not count."""
    values = policy_to_json(policy)
    values = {k: v for k, v in values.items() if not (isinstance(v, dict) and "parent" in v)}
    text = json.dumps([values, prior.millionths], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def policy_from_json(data: dict[str, Any]) -> Any:
    """Read what `policy_to_json` wrote.

    Raises:
        SpecError: No such policy, or a field is missing, unknown or out of range.
    """
    from rayx.policies import POLICIES  # policies import this module

    name = data.get("name") if isinstance(data, dict) else data
    if not isinstance(name, str) or name not in POLICIES:
        raise SpecError(f"Policy is {name!r:.60}; expected one of {', '.join(sorted(POLICIES))}.")
    try:
        json.dumps(data, allow_nan=False)  # no infinity
        return POLICIES[name](**{key: _read(data[key]) for key in data if key != "name"})
    except UNREADABLE as error:
        raise SpecError(f"Policy {name!r} cannot be read: {error!r}.") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mixture):
        return {"mixture": value.millionths}
    if isinstance(value, Probe):
        return {"probe": dataclasses.asdict(value)}
    if hasattr(value, "checkpoint"):
        return {"parent": value.to_json()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    expected = "a number, a text, a Mixture, a Probe, a Parent, or a tuple of these"
    raise SpecError(f"A policy has the value {value!r}; expected {expected}.")


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_read(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "mixture" in value:
        return Mixture(value["mixture"])
    if "probe" in value:
        return Probe(**value["probe"])
    from rayx.spec import Parent  # specs hold policies

    return Parent.from_json(value["parent"])


def _sequences(probes: tuple[Probe, ...]) -> int:
    return sum(probe.sequences for probe in probes)


def _check_count(what: str, value: object) -> None:
    require(is_int(value) and value > 0, what, value, "an integer > 0")  # pyright: ignore[reportOperatorIssue]

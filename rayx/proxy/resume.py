"""Unfinished packs: their whole state, written now and then, so that a death costs minutes.

A pack that is started again goes on from its last state and ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rayx.errors import UnreachableError
from rayx.policy import Decision
from rayx.proxy.checkpoint import metadata
from rayx.proxy.model import parameter_shapes
from rayx.record import CurvePoint, Failure, Loss
from rayx.spec import TrainSpec
from rayx.store import Store

log = logging.getLogger(__name__)

GROUPS = ("parameters", "first", "second")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What there is to know of one run beside its tensors."""

    drawn: dict[str, int]  # domain -> sequences read
    curve: list[CurvePoint]
    decisions: tuple[Decision, ...]
    failure: Failure | None
    signal_seconds: float
    signal_flops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PackState:
    """A pack after `steps` steps; tensors have shape (R, ...)."""

    steps: int
    seconds: float
    tensors: tuple[dict[str, Tensor], ...]
    runs: tuple[RunState, ...]


def unfinished(specs: Sequence[TrainSpec]) -> str:
    """Return the name of a pack's state in a store."""
    ids = ",".join(spec.run_id for spec in specs)
    return f"unfinished/{hashlib.sha256(ids.encode()).hexdigest()[:12]}.safetensors"


def write_unfinished(store: Store, specs: Sequence[TrainSpec], state: PackState) -> None:
    """Write a pack's state in place of its last."""
    tensors = {
        f"{group}.{name}": tensor.detach().cpu().contiguous()
        for group, named in zip(GROUPS, state.tensors, strict=True)
        for name, tensor in named.items()
    }
    facts = {
        "steps": state.steps,
        "seconds": state.seconds,
        "runs": [dataclasses.asdict(run) for run in state.runs],
    }
    name = unfinished(specs)
    try:
        store.write_bytes(name, save(tensors, {"state": json.dumps(facts)}), patient=False)
    except UnreachableError as error:  # the run does not wait for it, and the next state comes soon
        log.warning("%s", error)


def read_unfinished(store: Store, specs: Sequence[TrainSpec]) -> PackState | None:
    """Return the last state of a pack, or None where there is none that can be read."""
    name = unfinished(specs)
    if not store.exists(name):
        return None
    try:
        data = store.read_bytes(name)
        tensors = load(data)
        facts = json.loads(metadata(data)["state"])
        # In the order in which the model has them: sums over them depend on it.
        names = parameter_shapes(specs[0].model)
        groups = [{name: tensors[f"{group}.{name}"] for name in names} for group in GROUPS]
        return PackState(
            steps=facts["steps"],
            seconds=facts["seconds"],
            tensors=tuple(groups),
            runs=tuple(_run(run) for run in facts["runs"]),
        )
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        log.warning("%s is damaged, its pack starts anew: %s", name, error)
        return None


def _run(data: dict[str, Any]) -> RunState:
    curve = [
        CurvePoint(p["step"], p["tokens"], {t: Loss(**v) for t, v in p["losses"].items()})
        for p in data["curve"]
    ]
    failure = Failure(**data["failure"]) if data["failure"] else None
    decisions = tuple(Decision(**decision) for decision in data["decisions"])
    return RunState(**data | {"curve": curve, "failure": failure, "decisions": decisions})

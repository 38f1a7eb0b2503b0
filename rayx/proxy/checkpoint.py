"""Checkpoints: the whole state of one run at a step, as safetensors.

Parameters under their own names, Adam's moments under `first.` and `second.`, and in the metadata
the model's shape and how many sequences of each domain have been read. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from rayx.errors import UNREADABLE, SpecError, StoreError
from rayx.proxy.model import initial_parameters, parameter_shapes
from rayx.spec import Parent, TrainSpec
from rayx.store import Store

MOMENTS = ("first", "second")


@dataclass(frozen=True, slots=True)
class State:
    """What a branch takes over from its parent; tensors without the run axis."""

    parameters: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    drawn: dict[str, int]  # domain -> sequences read


def write_checkpoint(store: Store, parent: Parent, state: State) -> None:
    """Write the state that `parent` names."""
    tensors = dict(state.parameters)
    for moment in MOMENTS:
        tensors |= {f"{moment}.{n}": t for n, t in getattr(state, moment).items()}
    tensors = {n: t.detach().cpu().contiguous() for n, t in tensors.items()}
    metadata = {
        "drawn": json.dumps(state.drawn),
        "model": json.dumps(dataclasses.asdict(parent.spec.model)),
    }
    store.write_bytes(parent.checkpoint, save(tensors, metadata))


def read_checkpoint(store: Store, parent: Parent) -> State:
    """Read a state that a branch starts from, or an expert.

    Raises:
        StoreError: There is no such checkpoint (the parent failed, or it was dropped), or it is
            damaged or of another model.
    """
    name = parent.checkpoint
    try:
        data = store.read_bytes(name)
    except FileNotFoundError:
        raise StoreError(
            f"Store {store.url!r} has no {name}: run {parent.spec.run_id}, which this one needs, "
            "failed or was not trained. Look at its record, then run with --retry-failed."
        ) from None
    try:
        tensors = load(data)
        drawn = {domain: int(n) for domain, n in json.loads(metadata(data)["drawn"]).items()}
    except (SafetensorError, *UNREADABLE) as error:
        raise StoreError(
            f"{name} of store {store.url!r} is damaged: {error}. Remove it and run the sweep again."
        ) from error
    shapes = parameter_shapes(parent.spec.model)
    found = {n: tuple(t.shape) for n, t in tensors.items()}
    if found != shapes | {f"{m}.{n}": size for m in MOMENTS for n, size in shapes.items()}:
        raise StoreError(f"{name} of store {store.url!r} holds another model: {found}.")
    return State(
        parameters={n: tensors[n] for n in shapes},
        first={n: tensors[f"first.{n}"] for n in shapes},
        second={n: tensors[f"second.{n}"] for n in shapes},
        drawn=drawn,
    )


def start_states(specs: Sequence[TrainSpec], store: Store | None) -> list[State]:
    """Return the state in which each run begins: drawn from its seed, or its parent's.

    Raises:
        SpecError: A run has a parent and there is no store to read it from.
        StoreError: A parent's checkpoint is missing or damaged.
    """
    shape = specs[0].model
    drawn: dict[int, State] = {}
    states = []
    for spec in specs:
        if spec.parent is None:
            if spec.seed not in drawn:
                zeros = {n: torch.zeros(size) for n, size in parameter_shapes(shape).items()}
                drawn[spec.seed] = State(initial_parameters(shape, spec.seed), zeros, zeros, {})
            states.append(drawn[spec.seed])
        elif store is None:
            raise SpecError(f"Run {spec.run_id} branches from another; give the store that has it.")
        else:
            states.append(read_checkpoint(store, spec.parent))
    return states


def metadata(data: bytes) -> Mapping[str, str]:
    """Return the metadata of a safetensors file."""
    # The header: its length in 8 bytes, then JSON (safetensors reads metadata from files only).
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]

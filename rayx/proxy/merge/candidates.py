"""Merged candidates of a sweep, evaluated without writing a model.

The experts of a set are stacked once, each tensor as (K, ...); candidates are rows of a weight
matrix. On a CPU they are evaluated in turn, on a GPU many at a time: the leading axis of the
proxy's parameters is then the candidates'.

Legend: K experts, C candidates.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from rayx.corpus import Corpus
from rayx.errors import SpecError
from rayx.merging import MergeSpec, Operator
from rayx.proxy.checkpoint import read_checkpoint
from rayx.proxy.evaluate import HeldOut, evaluate, held_out
from rayx.proxy.merge.operators import prepare_tensor
from rayx.proxy.model import Rotary
from rayx.proxy.train import device_name, implausible, versions
from rayx.record import CurvePoint, Failure, Loss, Record
from rayx.spec import ModelShape, Precision
from rayx.store import Store
from rayx.units import forward_flops

GPU_BYTES = 2**30  # of merged parameters at a time on a GPU
EVALUATION_SEQUENCES = 32  # of a batch


class Stack(NamedTuple):
    """An expert set as plain arrays, which processes of a node can share."""

    experts: dict[str, np.ndarray]  # name -> (K, ...)
    base: dict[str, np.ndarray] | None


class Merges:
    """What a sweep is given to evaluate merged candidates; see `rayx.sweep.run_sweep`."""

    def load(self, specs: Sequence[MergeSpec], store: Store) -> Stack:
        """Read the experts, and the base where an operator needs it.

        Raises:
            StoreError: A checkpoint is missing or damaged.
        """
        experts = specs[0].experts
        members = [read_checkpoint(store, member).parameters for member in experts.members]
        base = None
        if experts.base is not None and specs[0].operator.needs_base:
            base = {
                n: t.numpy() for n, t in read_checkpoint(store, experts.base).parameters.items()
            }
        stacked = {n: torch.stack([m.pop(n) for m in members]).numpy() for n in list(members[0])}
        return Stack(stacked, base)

    def evaluate(
        self,
        specs: Sequence[MergeSpec],
        experts: Stack,
        corpus: Corpus,
        *,
        pack_id: str = "",
        commit: str = "",
        device: str = "cpu",
    ) -> Iterator[Record]:
        """Yield the record of each candidate as soon as it is evaluated.

        A candidate whose held-out loss is not finite, or far above that of an untrained model,
        gets a failure record.

        Args:
            specs: Candidates of one pack_key.
            experts: What `load` returned.
            corpus: The corpus that the experts name.
            pack_id: Written into the records.
            commit: Git commit, written into the records.
            device: A torch device.

        Raises:
            SpecError: The specs are of several expert sets, or of another corpus.
        """
        spec, place = specs[0], torch.device(device)
        if len({s.pack_key for s in specs}) > 1:
            raise SpecError("The merged candidates of a pack differ in experts or evaluation.")
        if spec.corpus != corpus.fingerprint:
            raise SpecError(
                f"The experts are of corpus {spec.corpus}, but {corpus.url} holds "
                f"{corpus.fingerprint}. Give the corpus that they were trained on."
            )
        targets = held_out(corpus, spec.model.context, spec.evaluation, place)
        read = sum(len(t.tokens) for t in targets.values()) * spec.model.context
        facts = {"versions": versions(), "device": device_name(place), "commit": commit}
        started, clock = datetime.now(timezone.utc), time.perf_counter()
        losses = merged_losses(
            spec.model,
            [(s.operator, s.weights) for s in specs],
            experts,
            targets,
            precision=spec.precision,
            device=place,
        )
        for s, by_target in zip(specs, losses, strict=True):
            seconds, clock = time.perf_counter() - clock, time.perf_counter()
            finished = datetime.now(timezone.utc)
            wrong = implausible(by_target, s.model.vocab_size)
            yield Record(
                spec=s,
                curve=() if wrong else (CurvePoint(0, s.tokens, by_target),),
                epochs={},
                tokens=0,
                flops=forward_flops(s.model.matmul_params, read),
                seconds=seconds,
                pack_id=pack_id,
                pack_runs=len(specs),
                started=started.isoformat(timespec="seconds"),
                finished=finished.isoformat(timespec="seconds"),
                failure=Failure(type="Diverged", message=wrong) if wrong else None,
                **facts,
            )
            started = finished


def merged_losses(
    shape: ModelShape,
    candidates: Sequence[tuple[Operator, Sequence[float]]],
    experts: Stack,
    targets: Mapping[str, HeldOut],
    *,
    precision: Precision = Precision.FLOAT32,
    device: torch.device | str = "cpu",
    together: int | None = None,
) -> Iterator[dict[str, Loss]]:
    """Yield the losses of each merged candidate, in order.

    Args:
        shape: Of the experts.
        candidates: Operator and K weights each.
        experts: Their stacked parameters.
        targets: Target -> held-out sequences, on `device`.
        precision: Of matrix products.
        device: Where to merge and evaluate.
        together: Candidates that are evaluated as one batch of models. By default one on a CPU,
            where more are no faster and one gives the same bits in whatever company a sweep that is
            run again evaluates it; on a GPU what GPU_BYTES hold.
    """
    place = torch.device(device)
    stacked = {n: _tensor(a).to(place) for n, a in experts.experts.items()}
    base = {n: _tensor(a).to(place) for n, a in (experts.base or {}).items()}
    rotary = Rotary(shape, place)
    if together is None:
        together = 1 if place.type == "cpu" else max(1, GPU_BYTES // (4 * shape.params))
    for operator, group in itertools.groupby(candidates, key=lambda c: c[0]):
        weights = [weights for _, weights in group]
        prepared = {
            name: prepare_tensor(operator, experts_K, base.get(name), name)
            for name, experts_K in stacked.items()
        }
        for start in range(0, len(weights), together):
            weights_CK = torch.tensor(weights[start : start + together], device=place)
            parameters = {name: merged(weights_CK) for name, merged in prepared.items()}
            with torch.autocast(
                place.type, torch.bfloat16, enabled=precision is Precision.BFLOAT16
            ):
                yield from evaluate(parameters, shape, rotary, targets, EVALUATION_SEQUENCES)


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():  # arrays in Ray's object store are read-only, and only read
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)

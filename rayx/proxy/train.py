"""Packed training: R runs of one shape, R data streams, rates and seeds, one loop.

Legend: R runs, B sequences of a batch, T context.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

import rayx
from rayx.corpus import Corpus
from rayx.corpus.sampler import Sampler, phase_mixtures, sequence_count, take
from rayx.errors import SpecError
from rayx.proxy.checkpoint import State, start_states, write_checkpoint
from rayx.proxy.evaluate import evaluate, held_out
from rayx.proxy.model import Rotary, stacked, token_losses
from rayx.proxy.optimizer import PackedAdamW, lr_share
from rayx.record import CurvePoint, Failure, Loss, Record
from rayx.spec import Parent, Precision, TrainSpec
from rayx.store import Store

DIVERGED_RATIO = 1.5  # of the untrained loss; a model this bad has left the region of learning
BEAT_SECONDS = 2.0


class _Batches:
    """The batches of a pack: each run's own mixture and seeds over one set of shards."""

    def __init__(self, corpus: Corpus, specs: Sequence[TrainSpec], states: Sequence[State]) -> None:
        context = specs[0].model.context
        # Ancestors' domains stay, so that a branch that reads them again goes on where they were.
        wanted = {d for s in specs for a in s.path for p in a.schedule.phases for d in p.mixture}
        for spec in specs:
            spec.schedule.average().check(corpus.domains, f"corpus {corpus.fingerprint}")
        self.shards = {d: corpus.train(d) for d in corpus.domains if d in wanted}
        sequences = {d: sequence_count(len(shard), context) for d, shard in self.shards.items()}
        for domain, count in sequences.items():
            if count == 0:
                raise SpecError(
                    f"Domain {domain!r} has {len(self.shards[domain])} training tokens, fewer than "
                    f"one sequence of context {context}. Leave it out or use a shorter context."
                )
        self.context = context
        batch = specs[0].optimizer.batch_sequences
        self.samplers = [Sampler(sequences, batch, spec.data_seed) for spec in specs]
        for sampler, state in zip(self.samplers, states, strict=True):
            sampler.drawn_K[:] = [state.drawn.get(d, 0) for d in sampler.domains]
        self.first_step = specs[0].parent.path_steps if specs[0].parent else 0
        self.mixtures = [
            phase_mixtures(spec.schedule, spec.steps, spec.batch_tokens) for spec in specs
        ]

    def next(self, step: int) -> Tensor:
        """Return the tokens of a step, shape (R, B, T + 1)."""
        shards = list(self.shards.values())
        rows = []
        for sampler, mixtures in zip(self.samplers, self.mixtures, strict=True):
            domain_B, sequence_B = sampler.step(self.first_step + step, mixtures[step])
            batch = np.empty((len(domain_B), self.context + 1), dtype=np.int64)
            for k in np.unique(domain_B):
                at = domain_B == k
                batch[at] = take(shards[k], sequence_B[at], self.context)
            rows.append(batch)
        return torch.from_numpy(np.stack(rows))


def versions() -> dict[str, str]:
    """Return the versions that a result may depend on."""
    return {
        "rayx": rayx.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """Return what the run was trained on, for the record."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} cpu, {torch.get_num_threads()} threads"


def train_pack(
    specs: Sequence[TrainSpec],
    corpus: Corpus,
    *,
    pack_id: str = "",
    commit: str = "",
    device: str = "cpu",
    on_progress: Callable[[int], None] = lambda tokens: None,
    store: Store | None = None,
    keep: Mapping[str, Sequence[int]] = MappingProxyType({}),
) -> list[Record]:
    """Train runs of one pack_key together and return their records, in the order of `specs`.

    A run whose loss or gradient stops being finite, or whose held-out loss rises above 1.5 times
    the untrained one, gets a failure record; the others of the pack go on unharmed.

    Args:
        specs: The runs; equal in everything but mixture, learning rate, weight decay and seeds.
        corpus: The corpus that the specs name.
        pack_id: Written into the records.
        commit: Git commit, written into the records.
        device: A torch device.
        on_progress: Called every two seconds with the tokens done by each run.
        store: Where checkpoints of parents are, and where those of `keep` go.
        keep: run_id -> steps after which a checkpoint is written, for the branches to come.

    Raises:
        SpecError: The specs cannot share a pack or do not fit the corpus.
        StoreError: The checkpoint of a parent is missing or damaged.
    """
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    spec, place = specs[0], torch.device(device)
    if len({s.pack_key for s in specs}) > 1:
        raise SpecError("The specs of a pack differ in more than mixture, rates and seeds.")
    if spec.corpus != corpus.fingerprint:
        raise SpecError(
            f"Spec is for corpus {spec.corpus}, but {corpus.url} holds {corpus.fingerprint}. "
            "Give the corpus that the specs were made for."
        )
    shape, evaluation = spec.model, spec.evaluation
    states = start_states(specs, store)
    batches = _Batches(corpus, specs, states)
    targets = held_out(corpus, shape.context, evaluation, place)
    parameters = stacked([s.parameters for s in states], place)
    for parameter in parameters.values():
        parameter.requires_grad_()
    optimizer = PackedAdamW(
        parameters,
        stacked([s.first for s in states], place),
        stacked([s.second for s in states], place),
        specs,
    )
    rotary = Rotary(shape, place)
    autocast = torch.autocast(
        place.type, torch.bfloat16, enabled=spec.precision is Precision.BFLOAT16
    )
    eval_steps = {round(spec.steps * (i + 1) / evaluation.points) for i in range(evaluation.points)}
    alive_R = torch.ones(len(specs), dtype=torch.bool, device=place)
    curves: list[list[CurvePoint]] = [[] for _ in specs]
    failures: list[Failure | None] = [None] * len(specs)
    last_beat = clock

    def fail(run: int, step: int, what: str) -> None:
        if failures[run] is None:
            tokens = step * spec.batch_tokens
            failures[run] = Failure(
                type="Diverged", message=f"{what} at step {step} ({tokens} tokens)"
            )
            alive_R[run] = False

    for step in range(spec.steps):
        tokens = batches.next(step).to(place, non_blocking=True)
        with autocast:
            loss_R = token_losses(parameters, shape, rotary, tokens).mean(dim=(1, 2))
        loss_R.sum().backward()
        norm_R = optimizer.step(lr_share(spec.optimizer, step, spec.steps), alive_R)
        # Asking a GPU for values waits for it, so there it is done now and then.
        if place.type == "cpu" or step % 50 == 0 or step + 1 in eval_steps:
            broken = ~(loss_R.isfinite() & norm_R.isfinite())
            for run in broken.nonzero().flatten().tolist():
                fail(run, step + 1, f"loss is {loss_R[run]:.4g}, gradient norm {norm_R[run]:.4g}")
            if not alive_R.any():
                break
        if step + 1 in eval_steps:
            with autocast:
                losses = evaluate(
                    parameters, shape, rotary, targets, spec.optimizer.batch_sequences
                )
            for run, by_target in enumerate(losses):
                if wrong := implausible(by_target, shape.vocab_size):
                    fail(run, step + 1, wrong)
                if failures[run] is None:
                    curves[run].append(
                        CurvePoint(step + 1, (step + 1) * spec.batch_tokens, by_target)
                    )
        for run, s in enumerate(specs):
            if step + 1 in keep.get(s.run_id, ()) and failures[run] is None and store is not None:
                state = State(
                    *({n: t[run] for n, t in tensors.items()} for tensors in optimizer.tensors),
                    drawn=batches.samplers[run].drawn(),
                )
                write_checkpoint(store, Parent(s, step + 1), state)
        if time.perf_counter() - last_beat > BEAT_SECONDS:
            last_beat = time.perf_counter()
            on_progress((step + 1) * spec.batch_tokens)

    seconds = (time.perf_counter() - clock) / len(specs)
    finished = datetime.now(timezone.utc)
    facts = {"versions": versions(), "device": device_name(place), "commit": commit}
    return [
        Record(
            spec=s,
            curve=tuple(curves[run]),
            epochs=batches.samplers[run].epochs(),
            tokens=s.tokens,
            flops=s.flops,
            seconds=seconds,
            pack_id=pack_id,
            pack_runs=len(specs),
            started=started.isoformat(timespec="seconds"),
            finished=finished.isoformat(timespec="seconds"),
            failure=failures[run],
            **facts,
        )
        for run, s in enumerate(specs)
    ]


def implausible(losses: dict[str, Loss], vocab_size: int) -> str:
    """Return what is wrong with a model's held-out losses, or an empty string."""
    untrained_nats = math.log(vocab_size)
    mean = sum(loss.nats for loss in losses.values()) / len(losses)
    if not math.isfinite(mean):
        return f"held-out loss is {mean}"
    if mean > DIVERGED_RATIO * untrained_nats:
        return (
            f"held-out loss is {mean:.2f} nats, over {DIVERGED_RATIO} times the "
            f"{untrained_nats:.2f} of an untrained model,"
        )
    return ""


def set_threads(num_threads: int) -> None:
    """Let torch use this many CPU threads in this process."""
    torch.set_num_threads(num_threads)

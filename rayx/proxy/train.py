"""Packed training: R runs of one shape, R data streams, rates and seeds, one loop.

Legend: R runs, B sequences of a batch, T context.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone

import numpy as np
import torch
from torch import Tensor

import rayx
from rayx.corpus import Corpus
from rayx.corpus.sampler import Sampler, phase_mixtures, sequence_count, take
from rayx.errors import SpecError
from rayx.proxy.evaluate import evaluate, held_out
from rayx.proxy.model import Rotary, stacked_parameters, token_losses
from rayx.record import CurvePoint, Failure, Loss, Record
from rayx.spec import LrSchedule, Optimizer, Precision, TrainSpec

DIVERGED_RATIO = 1.5  # of the untrained loss; a model this bad has left the region of learning
BEAT_SECONDS = 2.0


def lr_share(optimizer: Optimizer, step: int, steps: int) -> float:
    """Return the share of the peak learning rate at `step` of `steps` (from 0).

    Linear warm-up over warmup_share of the steps; then WSD: 1 until the last decay_share, falling
    linearly to min_lr_share; or cosine: min + (1 - min) (1 + cos(pi progress)) / 2.

    Source: Hu et al. 2024, arXiv:2404.06395, section 4 (WSD); Loshchilov and Hutter 2017,
        arXiv:1608.03983, eq. 5 (cosine).
    """
    warmup = round(optimizer.warmup_share * steps)
    if step < warmup:
        return (step + 1) / warmup
    low = optimizer.min_lr_share
    if optimizer.lr_schedule is LrSchedule.COSINE:
        progress = (step - warmup) / max(1, steps - warmup)
        return low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress))
    decay = round(optimizer.decay_share * steps)
    left = steps - step
    return 1.0 if left > decay else low + (1 - low) * left / (decay + 1)


class PackedAdamW:
    """AdamW in which each run of the pack has its own rate, decay and gradient norm.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2.
    Differs: norms are not decayed; each run's gradient is clipped to its own global norm.
    """

    def __init__(self, parameters: dict[str, Tensor], specs: Sequence[TrainSpec]) -> None:
        self.parameters = parameters
        self.optimizer = specs[0].optimizer  # all but lr and weight_decay agree in a pack
        device = parameters["norm"].device
        self.lr_R = torch.tensor([s.optimizer.lr for s in specs], device=device)
        self.decay_R = torch.tensor([s.optimizer.weight_decay for s in specs], device=device)
        self.first = {n: torch.zeros_like(p) for n, p in parameters.items()}
        self.second = {n: torch.zeros_like(p) for n, p in parameters.items()}
        self.updates = 0

    @torch.no_grad()
    def step(self, lr_share: float, alive_R: Tensor) -> Tensor:
        """Update the runs that are alive and return the gradient norms, shape (R,)."""
        o = self.optimizer
        self.updates += 1
        grads = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        squares = [g.flatten(1).square().sum(1) for g in grads.values()]
        norm_R = torch.stack(squares).sum(0).sqrt()
        alive_R = alive_R & norm_R.isfinite()
        scale_R = (o.clip_norm / norm_R).clamp(max=1.0)
        rate_R = self.lr_R * lr_share * alive_R
        correct_1 = 1 - o.beta1**self.updates
        correct_2 = 1 - o.beta2**self.updates
        for name, grad in grads.items():
            parameter, first, second = self.parameters[name], self.first[name], self.second[name]
            column = (-1,) + (1,) * (grad.dim() - 1)
            grad = torch.where(alive_R.view(column), grad * scale_R.view(column), 0.0)
            first.lerp_(grad, 1 - o.beta1)
            second.mul_(o.beta2).addcmul_(grad, grad, value=1 - o.beta2)
            update = (first / correct_1).div_((second / correct_2).sqrt_().add_(o.eps))
            if not name.endswith("norm"):
                update.add_(parameter * self.decay_R.view(column))
            parameter.sub_(update.mul_(rate_R.view(column)))
            self.parameters[name].grad = None
        return norm_R


class _Batches:
    """The batches of a pack: each run's own mixture and seeds over one set of shards."""

    def __init__(self, corpus: Corpus, specs: Sequence[TrainSpec]) -> None:
        context = specs[0].model.context
        wanted = {d for s in specs for p in s.schedule.phases for d in p.mixture}
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
        self.mixtures = [
            phase_mixtures(spec.schedule, spec.steps, spec.batch_tokens) for spec in specs
        ]

    def next(self, step: int) -> Tensor:
        """Return the tokens of a step, shape (R, B, T + 1)."""
        shards = list(self.shards.values())
        rows = []
        for sampler, mixtures in zip(self.samplers, self.mixtures, strict=True):
            domain_B, sequence_B = sampler.step(step, mixtures[step])
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

    Raises:
        SpecError: The specs cannot share a pack or do not fit the corpus.
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
    batches = _Batches(corpus, specs)
    targets = held_out(corpus, shape.context, evaluation.sequences, place)
    parameters = stacked_parameters(shape, [s.seed for s in specs], place)
    optimizer = PackedAdamW(parameters, specs)
    rotary = Rotary(shape, place)
    autocast = torch.autocast(
        place.type, torch.bfloat16, enabled=spec.precision is Precision.BFLOAT16
    )
    eval_steps = {round(spec.steps * (i + 1) / evaluation.points) for i in range(evaluation.points)}
    alive_R = torch.ones(len(specs), dtype=torch.bool, device=place)
    curves: list[list[CurvePoint]] = [[] for _ in specs]
    failures: list[Failure | None] = [None] * len(specs)
    untrained = math.log(shape.vocab_size)
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
                if wrong := _implausible(by_target, untrained):
                    fail(run, step + 1, wrong)
                if failures[run] is None:
                    curves[run].append(
                        CurvePoint(step + 1, (step + 1) * spec.batch_tokens, by_target)
                    )
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


def _implausible(losses: dict[str, Loss], untrained_nats: float) -> str:
    """Return what is wrong with a model's held-out losses, or an empty string."""
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

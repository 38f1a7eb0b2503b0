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

import rayx
from rayx.corpus import Corpus
from rayx.errors import SpecError, StoreError
from rayx.proxy.batches import Batches
from rayx.proxy.checkpoint import State, start_states, write_checkpoint
from rayx.proxy.distributed import processes
from rayx.proxy.evaluate import evaluate, held_out
from rayx.proxy.meter import Meter
from rayx.proxy.model import Rotary, stacked
from rayx.proxy.objective import Objective
from rayx.proxy.optimizer import PackedAdamW, lr_share
from rayx.proxy.resume import PackState, RunState, read_unfinished, unfinished, write_unfinished
from rayx.record import CurvePoint, Failure, Loss, Record
from rayx.spec import Parent, Precision, TrainSpec
from rayx.steering import Steering, check_policy
from rayx.store import Store

DIVERGED_RATIO = 1.5  # of the untrained loss; a model this bad has left the region of learning
BEAT_SECONDS = 2.0
RESUME_SECONDS = 120.0  # between the states from which a pack that died goes on


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
    shard: bool = False,
    parts: int = 1,
    state_seconds: float | None = None,
) -> list[Record]:
    """Train runs of one pack_key together and return their records, in the order of `specs`.

    A run whose loss or gradient stops being finite, or whose held-out loss rises above 1.5 times
    the untrained one, gets a failure record; the others of the pack go on unharmed.

    Where torch.distributed is initialised, all its processes call this with one spec and train it
    together; the first one writes, all return the record.

    Args:
        specs: The runs; equal in everything but mixture, learning rate, weight decay and seeds.
        corpus: The corpus that the specs name.
        pack_id: Written into the records.
        commit: Git commit, written into the records.
        device: A torch device.
        on_progress: Called every two seconds with the tokens done by each run.
        store: Where checkpoints of parents are, and where those of `keep` go.
        keep: run_id -> steps after which a checkpoint is written, for the branches to come.
        shard: Spread parameters, gradients and moments over the processes (FSDP2).
        parts: Of a batch, whose gradients are added in a fixed order: a process with two of them
            comes to the bits of two processes with one each.
        state_seconds: Between the states from which a run that died goes on; None: 120.

    Raises:
        SpecError: The specs cannot share a pack, do not fit the corpus or cannot be divided among
            the processes.
        StoreError: The checkpoint of a parent is missing or damaged.
    """
    if state_seconds is None:
        state_seconds = RESUME_SECONDS
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    spec, place = specs[0], torch.device(device)
    if len({s.pack_key for s in specs}) > 1:
        raise SpecError("The specs of a pack differ in more than mixture, rates and seeds.")
    if spec.corpus != corpus.fingerprint:
        raise SpecError(
            f"Spec is for corpus {spec.corpus}, but {corpus.url} holds {corpus.fingerprint}. "
            "Give the corpus that the specs were made for."
        )
    for each in specs:
        check_policy(each, corpus)
    shape, evaluation = spec.model, spec.evaluation
    resumed = read_unfinished(store, specs) if store else None
    if store and resumed:
        # A try that died may not have been asked for the checkpoints that this one is.
        passed = [
            Parent(s, step)
            for s in specs
            for step in keep.get(s.run_id, ())
            if step <= resumed.steps
        ]
        if not all(store.exists(parent.checkpoint) for parent in passed):
            resumed = None
    if resumed is None:
        starts = start_states(specs, store)
        groups = [[getattr(s, kind) for s in starts] for kind in ("parameters", "first", "second")]
        tensors = tuple(stacked(group, place) for group in groups)
        runs = tuple(_fresh(state) for state in starts)
        resumed = PackState(steps=0, seconds=0.0, tensors=tensors, runs=runs)
    parameters, first, second = (
        {n: t.to(place) for n, t in group.items()} for group in resumed.tensors
    )
    rotary = Rotary(shape, place)
    team = processes((parameters, first, second), specs, rotary, shard, parts)
    if not team.same(resumed.steps):
        raise StoreError(f"Workers found different states of run {spec.run_id}; run it again.")
    parameters, first, second = team.groups
    optimizer = PackedAdamW(parameters, first, second, specs, reduce=team.total)
    optimizer.updates += resumed.steps
    steerings = [Steering(s, r.decisions) for s, r in zip(specs, resumed.runs, strict=True)]
    path_steps = spec.parent.path_steps if spec.parent else 0
    batches = Batches(corpus, specs, [run.drawn for run in resumed.runs], path_steps, team.rows)
    meter = Meter(corpus, specs, steerings, optimizer, store, place)
    meter.seconds_R += [run.signal_seconds for run in resumed.runs]
    meter.flops_R += [run.signal_flops for run in resumed.runs]
    targets = held_out(corpus, shape.context, evaluation, place)
    objective = Objective(specs, batches.domains, steerings, rotary, store, place, team.losses)
    autocast = torch.autocast(
        place.type, torch.bfloat16, enabled=spec.precision is Precision.BFLOAT16
    )
    eval_steps = {round(spec.steps * (i + 1) / evaluation.points) for i in range(evaluation.points)}
    kept = [frozenset(keep.get(s.run_id, ())) for s in specs]
    curves = [list(run.curve) for run in resumed.runs]
    failures = [run.failure for run in resumed.runs]
    alive_R = torch.tensor([failure is None for failure in failures], device=place)
    last_beat = last_state = clock

    def fail(run: int, step: int, what: str) -> None:
        if failures[run] is None:
            tokens = step * spec.batch_tokens
            failures[run] = Failure(
                type="Diverged", message=f"{what} at step {step} ({tokens} tokens)"
            )
            alive_R[run] = False

    def decide(step: int, share: float) -> None:
        """Let the policies whose blocks end here set their next mixtures."""
        while due := [r for r, s in enumerate(steerings) if s.ends(step) and not failures[r]]:
            for run, value in zip(due, meter.measure(due, share), strict=True):
                if value is not None and not np.isfinite(value).all():
                    name = type(steerings[run].signal).__name__
                    fail(run, step, f"{name} signal of its policy is not finite")
                else:
                    steerings[run].go_on(step, value)

    def run_states() -> tuple[RunState, ...]:
        drawn = batches.drawn()
        return tuple(
            RunState(
                drawn=drawn[run],
                curve=curves[run],
                decisions=tuple(steerings[run].decisions),
                failure=failures[run],
                signal_seconds=float(meter.seconds_R[run]),
                signal_flops=float(meter.flops_R[run]),
            )
            for run in range(len(specs))
        )

    for step in range(resumed.steps, spec.steps):
        share = lr_share(spec.optimizer, step, spec.steps)
        decide(step, share)
        tokens, domain_RB = batches.next(step, steerings)
        tokens = tokens.to(place, non_blocking=True)
        loss_R = team.backward(objective, tokens, domain_RB)
        norm_R = optimizer.step(share, alive_R)
        # Asking a GPU for values waits for it, so there it is done now and then.
        looked, due = place.type == "cpu" or step % 50 == 0 or step + 1 in eval_steps, False
        if looked:
            late = time.perf_counter() - last_state > state_seconds
            loss_R, due = team.agree(loss_R, late)
            broken = ~(loss_R.isfinite() & norm_R.isfinite())
            for run in broken.nonzero().flatten().tolist():
                fail(run, step + 1, f"loss is {loss_R[run]:.4g}, gradient norm {norm_R[run]:.4g}")
            if not alive_R.any():
                break
        if step + 1 in eval_steps:
            with autocast:
                batch = spec.optimizer.batch_sequences
                losses = evaluate(parameters, shape, rotary, targets, batch, team.losses)
            for run, by_target in enumerate(losses):
                if wrong := implausible(by_target, shape.vocab_size):
                    fail(run, step + 1, wrong)
                if failures[run] is None:
                    curves[run].append(
                        CurvePoint(step + 1, (step + 1) * spec.batch_tokens, by_target)
                    )
        for run, s in enumerate(specs):
            if step + 1 in kept[run] and failures[run] is None and store is not None:
                groups = [{n: t[run] for n, t in group.items()} for group in team.whole()]
                if team.rank == 0:
                    state = State(*groups, drawn=batches.samplers[run].drawn())
                    write_checkpoint(store, Parent(s, step + 1), state)
        now = time.perf_counter()
        if team.rank == 0 and now - last_beat > BEAT_SECONDS:
            last_beat = now
            on_progress((step + 1) * spec.batch_tokens)
        if store is not None and due and step + 1 < spec.steps:
            last_state = now
            state = PackState(
                steps=step + 1,
                seconds=resumed.seconds + now - clock,
                tensors=team.whole(),
                runs=run_states(),
            )
            if team.rank == 0:
                write_unfinished(store, specs, state)

    seconds = (resumed.seconds + time.perf_counter() - clock) / len(specs)
    finished = datetime.now(timezone.utc)
    facts = {"versions": versions(), "device": device_name(place), "commit": commit}
    if store is not None and team.rank == 0 and store.exists(unfinished(specs)):
        store.remove(unfinished(specs))
    team.wait()  # what the first process wrote is there for all
    return [
        Record(
            spec=s,
            curve=tuple(state.curve),
            epochs=sampler.epochs(),
            tokens=s.tokens,
            flops=s.flops + state.signal_flops,
            seconds=seconds,
            pack_id=pack_id,
            pack_runs=len(specs),
            started=started.isoformat(timespec="seconds"),
            finished=finished.isoformat(timespec="seconds"),
            failure=state.failure,
            decisions=state.decisions,
            signal_seconds=state.signal_seconds,
            signal_flops=state.signal_flops,
            **facts,
        )
        for s, state, sampler in zip(specs, run_states(), batches.samplers, strict=True)
    ]


def _fresh(state: State) -> RunState:
    return RunState(
        drawn=state.drawn, curve=[], decisions=(), failure=None, signal_seconds=0, signal_flops=0
    )


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

"""A spec and records of it, small and valid, for tests to change."""

import dataclasses
from typing import Any

from rayx.merging import Spec
from rayx.mixture import Mixture, Phase, Schedule
from rayx.record import CurvePoint, Failure, Loss, Record
from rayx.spec import Evaluation, ModelShape, Optimizer, TrainSpec

SPEC = TrainSpec(
    corpus="c0ffee",
    model=ModelShape(layers=2, width=64, heads=4, ffn_width=160, vocab_size=1024, context=128),
    schedule=Schedule.constant(Mixture({"web": 7, "code": 3}), 16_384),
    optimizer=Optimizer(lr=0.003, batch_sequences=4),
    evaluation=Evaluation(points=2, sequences=8),
)


def train_spec(web: int = 7, code: int = 3, **changes: Any) -> TrainSpec:
    """SPEC with another mixture and other fields."""
    changes.setdefault("schedule", Schedule.constant(Mixture({"web": web, "code": code}), 16_384))
    return dataclasses.replace(SPEC, **changes)


def two_phases() -> Schedule:
    return Schedule((Phase(Mixture({"web": 1}), 8_192), Phase(Mixture({"math": 1}), 8_192)))


def record(spec: Spec = SPEC, loss: float = 2.0, failed: bool = False) -> Record:
    """A finished run of `spec`, or a failed one."""
    curve = tuple(
        CurvePoint(step, step * 512, {"web": Loss(loss + extra, loss / 2 + extra, 0.01)})
        for step, extra in ((16, 1.0), (32, 0.0))
    )
    return Record(
        spec=spec,
        curve=() if failed else curve,
        epochs={d: 2 * w for d, w in spec.mixture.items()},
        tokens=spec.tokens,
        flops=getattr(spec, "flops", 1e6),  # of a merged candidate: its evaluation
        seconds=1.5,
        pack_id="pack0",
        pack_runs=4,
        device="cpu",
        versions={"torch": "2.6"},
        commit="abc+dirty",
        started="2026-01-01T00:00:00+00:00",
        finished="2026-01-01T00:00:02+00:00",
        failure=Failure(type="Diverged", message="loss is nan at step 3") if failed else None,
    )

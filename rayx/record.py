"""Records: what came of a run.

A record is written once, by the worker that made it, the moment the run ends; that it exists means
that the run is done. A failure is a record too.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from rayx.errors import UNREADABLE, SpecError
from rayx.merging import Spec, spec_from_json
from rayx.mixture import Mixture
from rayx.policy import Decision
from rayx.recipe import is_int, is_number, require
from rayx.spec import FORMAT, TrainSpec

NUMBERS = ("flops", "seconds", "signal_seconds", "signal_flops")
TEXTS = ("pack_id", "device", "commit", "started", "finished")


@dataclass(frozen=True, slots=True)
class Loss:
    """Loss of one model on one target's held-out text."""

    nats: float  # per token
    bpb: float  # bits per byte of text
    stderr_bpb: float  # over sequences


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """An evaluation along the run."""

    step: int
    tokens: int
    losses: dict[str, Loss]  # target -> loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a run has no result."""

    type: str  # class of the exception, or "Diverged"
    message: str
    traceback: str = ""

    def __post_init__(self) -> None:
        for name in ("message", "traceback"):  # a path's odd bytes have no place in a table
            text = getattr(self, name)
            if isinstance(text, str) and not text.isascii():
                object.__setattr__(self, name, text.encode("utf-8", "replace").decode())


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The immutable result of one run: losses, or the failure.

    Facts about the run are fields here; nothing is ever parsed out of names or logs.
    """

    spec: Spec
    curve: tuple[CurvePoint, ...]  # every evaluation, the last one is the result
    epochs: dict[str, float]  # domain -> passes over its training tokens, the trunk's included
    tokens: int  # trained on by this run itself: 0 for a merged candidate
    flops: float  # of this run itself: training, or the evaluation of a merged candidate
    seconds: float  # the run's share of its pack's wall time
    pack_id: str
    pack_runs: int  # runs trained together with this one, itself included
    device: str
    versions: dict[str, str]
    commit: str  # git commit of the code, "+dirty" where the tree was changed, or ""
    started: str  # UTC, ISO 8601
    finished: str
    failure: Failure | None = None
    decisions: tuple[Decision, ...] = ()  # of its policy, in order
    signal_seconds: float = 0.0  # of `seconds`, what measuring the policy's signals took
    signal_flops: float = 0.0  # of `flops`, the same

    @property
    def run_id(self) -> str:
        """The spec's run_id."""
        return self.spec.run_id

    @property
    def status(self) -> str:
        """`ok` or `failed`."""
        return "failed" if self.failure else "ok"

    @property
    def mixture(self) -> Mixture:
        """The average mixture that it was trained on: the spec's, or what its policy made of it."""
        if not self.decisions:
            return self.spec.mixture
        total: dict[str, float] = {}
        assert isinstance(self.spec, TrainSpec), "merged candidates have no policy"
        ends = [*(decision.step for decision in self.decisions[1:]), self.spec.steps]
        for decision, end in zip(self.decisions, ends, strict=True):
            for domain, weight in decision.weights.items():
                total[domain] = total.get(domain, 0.0) + weight * (end - decision.step)
        return Mixture(total)

    @property
    def losses(self) -> dict[str, Loss]:
        """Final losses by target; empty for a failed run."""
        return self.curve[-1].losses if self.curve and not self.failure else {}

    def run_row(self) -> dict[str, Any]:
        """Return the record as a row of `Store.runs`."""
        return {
            "run_id": self.run_id,
            "status": self.status,
            "failure": self.failure.message if self.failure else None,
            **self.spec.columns(),
            **{f"weight/{d}": w for d, w in self.mixture.items()},
            "flops": self.flops,
            "seconds": self.seconds,
            "signal_flops": self.signal_flops,
            "signal_seconds": self.signal_seconds,
            "pack_id": self.pack_id,
            "pack_runs": self.pack_runs,
            "device": self.device,
            "commit": self.commit,
            "started": self.started,
            "finished": self.finished,
            **{f"epochs/{d}": e for d, e in self.epochs.items()},
            **{f"loss/{t}": loss.bpb for t, loss in self.losses.items()},
            **{f"loss_nats/{t}": loss.nats for t, loss in self.losses.items()},
            **{f"stderr/{t}": loss.stderr_bpb for t, loss in self.losses.items()},
        }

    def eval_rows(self) -> list[dict[str, Any]]:
        """Return the record's curve as rows of `Store.evals`: one per point and target."""
        return [
            {
                "run_id": self.run_id,
                "step": point.step,
                "tokens": point.tokens,
                "target": target,
                "loss_bpb": loss.bpb,
                "loss_nats": loss.nats,
                "stderr_bpb": loss.stderr_bpb,
            }
            for point in self.curve
            for target, loss in point.losses.items()
        ]

    def decision_rows(self) -> list[dict[str, Any]]:
        """Return what its policy decided as rows of `Store.decisions`: one per step and domain."""
        if not self.decisions:
            return []
        assert isinstance(self.spec, TrainSpec), "merged candidates have no policy"
        batch_tokens = self.spec.batch_tokens
        return [
            {
                "run_id": self.run_id,
                "policy": self.spec.columns()["policy"],
                "step": decision.step,
                "tokens": decision.step * batch_tokens,
                "domain": domain,
                "weight": weight,
            }
            for decision in self.decisions
            for domain, weight in decision.weights.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        data["spec"] = self.spec.to_json()
        data["curve"] = [dataclasses.asdict(point) for point in self.curve]
        data["failure"] = dataclasses.asdict(self.failure) if self.failure else None
        data["decisions"] = [dataclasses.asdict(decision) for decision in self.decisions]
        return {"format": FORMAT, "run_id": self.run_id, **data}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        """Read what `to_json` wrote.

        Raises:
            SpecError: The record is of another format or lacks a field.
        """
        if not isinstance(data, dict):
            raise SpecError(f"Record cannot be read: it is {data!r:.40}, not an object.")
        if data.get("format") != FORMAT:
            raise SpecError(f"Record has format {data.get('format')!r}; this rayx reads {FORMAT}.")
        fields = {k: v for k, v in data.items() if k not in ("format", "run_id")}
        try:
            fields["spec"] = spec_from_json(fields["spec"])
            fields["curve"] = tuple(
                CurvePoint(p["step"], p["tokens"], {t: Loss(**v) for t, v in p["losses"].items()})
                for p in fields["curve"]
            )
            fields["failure"] = Failure(**fields["failure"]) if fields["failure"] else None
            fields["decisions"] = tuple(Decision(**d) for d in fields.get("decisions", ()))
            record = cls(**fields)
            _check(record)
            return record
        except UNREADABLE as error:
            raise SpecError(f"Record cannot be read: {error!r}.") from error


def _check(record: Record) -> None:
    """Refuse values of wrong types: a file may have been edited, and one row must not cost all."""
    columns = record.spec.columns()
    counts = [(name, value) for name, value in columns.items() if is_int(value)]
    counts += [("tokens", record.tokens), ("pack_runs", record.pack_runs)]
    numbers = [(n, getattr(record, n)) for n in NUMBERS] + list(record.epochs.items())
    texts = [(n, getattr(record, n)) for n in TEXTS] + list(record.versions.items())
    texts += [(name, value) for name, value in columns.items() if isinstance(value, str)]
    if record.failure:
        texts += dataclasses.asdict(record.failure).items()
    for point in record.curve:
        counts += [("step", point.step), ("tokens", point.tokens)]
        for target, loss in point.losses.items():
            numbers += ((target, loss.nats), (target, loss.bpb), (target, loss.stderr_bpb))
    for decision in record.decisions:
        counts.append(("step", decision.step))
        json.dumps([decision.signal, decision.loss_weights], allow_nan=False)
    for name, value in counts:
        ok = is_int(value) and 0 <= value < 2**63
        require(ok, f"Record, {name}", value, "an integer in [0, 2^63)")
    for name, value in numbers:
        ok = is_number(value) and (isinstance(value, float) or abs(value) < 2**63)
        require(ok, f"Record, {name}", value, "a finite number")
    for name, value in texts:
        require(isinstance(value, str), f"Record, {name}", value, "a text")
    names = (name for pairs in (numbers, texts, columns.items()) for name, _ in pairs)
    "".join((*names, *(value for _, value in texts))).encode()  # lone surrogates raise
    if record.decisions:
        trained = isinstance(record.spec, TrainSpec)
        require(trained, "Record, decisions", "there", "none of a merged candidate")
        assert record.mixture, "or it raises"

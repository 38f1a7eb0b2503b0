"""Steering: which mixture a run trains on at each step, set by its schedule or by its policy."""

from __future__ import annotations

import numpy as np

from rayx.corpus import Corpus
from rayx.corpus.places import probe_places
from rayx.corpus.sampler import phase_mixtures
from rayx.errors import SpecError
from rayx.mixture import Mixture
from rayx.policy import Block, Decision, Setting, Signal
from rayx.spec import TrainSpec

MOST_MEASUREMENTS = 1_000  # of a policy without a step of training between them


class Steering:
    """The mixtures of one run.

    Args:
        spec: The run.
        decisions: What its policy had decided when it was interrupted, to go on from there.

    Attributes:
        decisions: What the policy has decided so far; empty without one.
        end: Step at which the block in force ends.
    """

    def __init__(self, spec: TrainSpec, decisions: tuple[Decision, ...] = ()) -> None:
        self.spec = spec
        self.decisions: list[Decision] = []
        self._mixtures = phase_mixtures(spec.schedule, spec.steps, spec.batch_tokens)
        self.end = spec.steps
        self._block: Block | None = None
        if spec.policy is None:
            return
        domains = tuple(spec.mixture)
        batch = spec.optimizer.batch_sequences
        self.setting = Setting(domains, spec.mixture.to_array(domains), spec.steps, batch)
        self._blocks = spec.policy.blocks(self.setting)
        self._take(0, None)
        for known in decisions[1:]:
            value = None if known.signal is None else np.asarray(known.signal, float)
            self._take(known.step, value)
        if decisions and self.decisions != list(decisions):
            raise SpecError(
                f"Policy {spec.policy.name} of run {spec.run_id} decides otherwise than before it "
                "was interrupted: it must depend on its fields and signals alone."
            )

    def mixture(self, step: int) -> Mixture:
        """Return the mixture of a step."""
        return self._mixtures[step] if self._block is None else self._mixture

    def ends(self, step: int) -> bool:
        """Whether the policy is to decide before this step."""
        return self._block is not None and step == self.end < self.spec.steps

    @property
    def signal(self) -> Signal | None:
        """What is measured at the end of the block in force."""
        return self._block.signal if self._block else None

    @property
    def loss_weights(self) -> dict[str, float] | None:
        """Domain -> factor on its loss, or None for 1."""
        return self.decisions[-1].loss_weights if self.decisions else None

    def go_on(self, step: int, value: np.ndarray | None) -> None:
        """Take the next block, given what was measured at the end of the last."""
        self._take(step, value)
        recent = self.decisions[-MOST_MEASUREMENTS:]
        if len(recent) == MOST_MEASUREMENTS and recent[0].step == step:
            raise self._wrong(f"{MOST_MEASUREMENTS} blocks without a step of training")

    def _take(self, step: int, value: np.ndarray | None) -> None:
        try:
            block = next(self._blocks) if self._block is None else self._blocks.send(value)  # pyright: ignore[reportArgumentType]
        except StopIteration:
            if self._block is None:
                raise self._wrong("no block at all") from None
            self.end = self.spec.steps
            return
        self._block, self.end = block, min(step + block.steps, self.spec.steps)
        domains, weights_K = self.setting.domains, np.asarray(block.weights_K, float)
        ok = weights_K.shape == (len(domains),) and bool(np.isfinite(weights_K).all())
        if not ok or weights_K.min() < 0 or weights_K.sum() <= 0 or block.steps < 0:
            raise self._wrong(f"the block {block}")
        self._mixture = Mixture.from_array(weights_K, domains)
        factors = block.loss_weights_K
        self.decisions.append(
            Decision(
                step=step,
                weights=dict(self._mixture),
                signal=None if value is None else value.tolist(),
                loss_weights=None
                if factors is None
                else {d: float(f) for d, f in zip(domains, factors, strict=True)},
            )
        )

    def _wrong(self, what: str) -> SpecError:
        assert self.spec.policy is not None
        return SpecError(
            f"Policy {self.spec.policy.name} gave {what} before step {self.end}; expected weights "
            f">= 0 of the {len(self.setting.domains)} domains, not all 0, and steps >= 0."
        )


def check_policy(spec: TrainSpec, corpus: Corpus) -> None:
    """Refuse a policy whose text is not there, or is the text that the run is judged on.

    Looks at what the policy asks for before its first measurement.

    Raises:
        SpecError: A probe overlaps the evaluation, a source has an unknown domain, or the policy
            does not fit the run.
        CorpusError: A probe has no such target, or no text.
    """
    if spec.policy is None:
        return
    steering = Steering(spec)
    while steering.signal is None and steering.ends(steering.end):
        steering.go_on(steering.end, None)
    signal = steering.signal
    who = f"policy {spec.policy.name}"
    for probe in getattr(signal, "probes", ()):
        probe_places(corpus, probe, spec.model.context)
        parts = {probe.part, spec.evaluation.part}
        if probe.part != "train" and parts != {"first", "second"}:
            raise SpecError(
                f"The {who} reads part {probe.part!r} of the held-out text of {probe.target!r}, "
                f"and the run is judged on part {spec.evaluation.part!r}. Give the probe part "
                "'first' and the run Evaluation(part='second')."
            )
    for source in getattr(signal, "sources", ()):
        corpus.check_mixture(source, f" (of {who})")

"""LLD on planted targets: what the study trains, which estimates it makes, and how near they come.

Targets are trained from the base on mixtures that are known, so that an estimate can be compared
with the truth (recovery) and training on it with the target (distance). The base is an untrained
model or a pretrained one.

Source: Kishino et al. 2026, arXiv:2603.16622, figures 2, 4 and 5 (captions): recovery of known
    weights, divergence to the target over steps, between mixtures against between samples.

Legend: K domains, R runs, T targets of a profile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rayx.branching import make_branch, make_trunk
from rayx.candidates import sobol_mixtures
from rayx.likelihoods import Likelihoods, kl_bits_per_byte
from rayx.merging import Experts, MergeSpec
from rayx.methods.lld import Estimate, aligned, identity_kernel, response_kernel
from rayx.methods.lld_sweep import SweepInversion
from rayx.mixture import Mixture, Phase, Schedule
from rayx.recipe import Evaluation, require
from rayx.record import Record
from rayx.spec import Distillation, Parent, TrainSpec

State = Parent | TrainSpec  # a checkpoint, or the untrained model of a spec's seed
Read = Callable[[Sequence[State]], list[Likelihoods]]

DECAY_SHARE = 0.5  # of a run's tokens
SMOOTHING = 0.5  # of one-hot mixtures: the share that is spread over all domains
RIDGE = 0.1  # of estimates from gradients and responses, whose zeros are not to be trusted
SHARED, OWN = "shared", "own"  # order in which a target has read its data


@dataclass(frozen=True, kw_only=True)
class LldStudy:
    """A base, planted targets, a sweep and responses from the base, and runs on estimates.

    Args:
        template: Model, optimizer, corpus, evaluation and seeds of every run.
        domains: Those that are mixed.
        base_tokens: The base's, on the uniform mixture; 0 for an untrained base.
        tokens: Of every run from the base.
        proxies: Runs of the sweep beside the responses and the uniform run.
        plants: Targets.
    """

    template: TrainSpec
    domains: tuple[str, ...]
    base_tokens: int
    tokens: int
    proxies: int
    plants: int

    @property
    def uniform(self) -> Mixture:
        """Equal weights."""
        return Mixture.uniform(self.domains)

    @property
    def base(self) -> State:
        """The model that all runs start from."""
        if not self.base_tokens:
            return self.run(self.uniform)
        trunk = make_trunk(self.template, self.uniform, self.base_tokens)
        return Parent(trunk, trunk.steps)

    def run(self, mixture: Mixture, order: int = 0, teacher: Parent | None = None) -> TrainSpec:
        """Return the run from the base on a mixture.

        Args:
            mixture: What it is trained on.
            order: 0 to read each domain in the sweep's order; else in one of its own.
            teacher: Train on this model's predictions instead of the text's tokens.
        """
        if self.base_tokens:
            trunk = make_trunk(self.template, self.uniform, self.base_tokens)
            share = DECAY_SHARE * self.tokens / (self.base_tokens + self.tokens)
            spec = make_branch(trunk, self.base_tokens, (Phase(mixture, self.tokens),), share)
        else:
            optimizer = dataclasses.replace(self.template.optimizer, decay_share=DECAY_SHARE)
            schedule = Schedule.constant(mixture, self.tokens)
            spec = dataclasses.replace(self.template, schedule=schedule, optimizer=optimizer)
        distillation = Distillation(teacher=teacher, share=1.0) if teacher else None
        data_seed = self.template.data_seed + 1_000_003 * order
        return dataclasses.replace(spec, data_seed=data_seed, distillation=distillation)

    @cached_property
    def planted(self) -> list[Mixture]:
        """The targets' mixtures, spread like Dirichlet(1)."""
        rng = np.random.default_rng([self.template.seed, 77])
        drawn = rng.dirichlet(np.ones(len(self.domains)), self.plants)
        return [Mixture.from_array(row, self.domains) for row in drawn]

    def target(self, plant: int, order: str) -> Parent:
        """Return a planted target: in the sweep's order, or with an order and weights of its own.

        A target of an untrained base that has its own order begins at other random weights too.
        """
        spec = self.run(self.planted[plant], 0 if order == SHARED else plant + 1)
        if order == OWN and not self.base_tokens:
            spec = dataclasses.replace(spec, seed=self.template.seed + 1_000_003 * (plant + 1))
        return Parent(spec, spec.steps)

    def sweep(self) -> list[TrainSpec]:
        """Return the uniform run, the responses, and runs spread evenly over the simplex."""
        drawn = sobol_mixtures(self.domains, self.proxies, self.template.seed)
        known = [self.reference.spec, *(state.spec for state in self.responses())]
        return [*known, *map(self.run, drawn)]

    def responses(self) -> list[Parent]:
        """Return one run a domain, half of it that domain's and half uniform."""
        spread = SMOOTHING / len(self.domains)
        rows = [
            {d: spread + (1 - SMOOTHING) * (d == own) for d in self.domains} for own in self.domains
        ]
        specs = [self.run(Mixture(row)) for row in rows]
        return [Parent(spec, spec.steps) for spec in specs]

    @property
    def reference(self) -> Parent:
        """A run on the uniform mixture, as long as a target's."""
        spec = self.run(self.uniform)
        return Parent(spec, spec.steps)

    def targets(self) -> dict[tuple[int, str], Parent]:
        """Return (plant, order) -> target."""
        return {(p, o): self.target(p, o) for p in range(self.plants) for o in (SHARED, OWN)}

    def specs(self) -> list[TrainSpec | MergeSpec]:
        """Return all that estimates need."""
        targets = list(self.targets().values())
        asked = [*self.sweep(), *(target.spec for target in targets)]
        return [*asked, *kept([*targets, self.reference, *self.responses()])]

    def estimates(
        self, records: Mapping[str, Record], read: Read, gradients_NK: np.ndarray
    ) -> dict[tuple[int, str], dict[str, Estimate]]:
        """Return (plant, order) -> estimator -> estimate.

        `identity, uniform run` takes the differences from a run on the uniform mixture instead of
        from the base, so that what every run learns drops out; one run more than `identity`.
        `random search` is the mixture of the proxy whose losses, one common shift aside, are
        nearest the target's: as costly as the sweep that is inverted.

        Args:
            records: run_id -> record of the sweep.
            read: Vectors of states, on the texts that the sweep was evaluated on.
            gradients_NK: `rayx.proxy.likelihood.gradient_kernel` of the base.
        """
        base, reference, *responses = read([self.base, self.reference, *self.responses()])
        rows = [state.spec.mixture.to_array(self.domains) for state in self.responses()]
        response_NK = response_kernel(base, responses, np.array(rows))
        sweep = self.sweep()
        losses_RT = np.array([[records[s.run_id].losses[d].bpb for d in self.domains]
                              for s in sweep])  # fmt: skip
        weights_RK = np.array([spec.mixture.to_array(self.domains) for spec in sweep])
        inversion = SweepInversion(weights_RK=weights_RK, losses_RT=losses_RT, domains=self.domains)
        targets = self.targets()
        found = {}
        for key, target in zip(targets, read(list(targets.values())), strict=True):
            gap_RT = losses_RT - target.bits_per_byte
            nearest = int((gap_RT - gap_RT.mean(1, keepdims=True)).var(1).argmin())
            found[key] = {
                "identity": identity_kernel(base, target),
                "identity, uniform run": identity_kernel(reference, target),
                "projection": identity_kernel(base, target, projection=True),
                "gradient": aligned(base, target, gradients_NK),
                "gradient, ridge": aligned(base, target, gradients_NK, None, RIDGE),
                "response": aligned(base, target, response_NK),
                "response, ridge": aligned(base, target, response_NK, None, RIDGE),
                "response, domain": aligned(base, target, response_NK, level="domain"),
                "sweep": inversion.estimate(target.bits_per_byte),
                "random search": Estimate(
                    mixture=sweep[nearest].mixture, aligned=True, cosine=float("nan"),
                    misfit=float(gap_RT[nearest].var()),
                ),
            }  # fmt: skip
        return found

    def spread(self, read: Read) -> dict[str, float]:
        """Return mean distances, bits per byte: targets of two mixtures, and two of one mixture."""
        own = read([self.target(p, OWN) for p in range(self.plants)])
        shared = read([self.target(p, SHARED) for p in range(self.plants)])
        apart = [kl_bits_per_byte(a, b) for i, a in enumerate(own) for b in own[:i]]
        same = [kl_bits_per_byte(a, b) for a, b in zip(own, shared, strict=True)]
        return {"between_mixtures": float(np.mean(apart)), "between_seeds": float(np.mean(same))}


def kept(states: Sequence[Parent]) -> list[MergeSpec]:
    """Return what makes a sweep keep the checkpoints of these states: merges of one state each."""
    least = Evaluation(points=1, sequences=1)
    return [Experts((state,)).merge((1.0,), evaluation=least) for state in states]


def along(spec: TrainSpec, points: int) -> list[Parent]:
    """Return evenly spaced states of a run, its end included."""
    require(0 < points <= spec.steps, "points", points, f"1 to the {spec.steps} steps of the run")
    return [Parent(spec, round(spec.steps * (i + 1) / points)) for i in range(points)]

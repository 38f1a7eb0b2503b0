"""Merging as a ranking proxy: experts trained once rank mixtures that nobody has trained.

A trunk on the general mixture; from it one expert a domain; any mixture is then stood in for by the
linear merge of the experts, which costs one evaluation. Whether that may be believed is measured:
`study` compares stand-ins with runs that were really trained on the same mixtures, in any store.

Source: Berasi et al. 2026, arXiv:2602.04937 (theta_w = sum_k w_k theta_k as a ranking proxy);
    experts on general_share general text and the rest of their domain, and the scores, macro and
    top-25% Spearman and recovery, as in DeMix, arXiv:2602.00747.
Differs: pretraining of a small model in place of fine-tuning; losses in place of benchmarks;
    weights are mapped through the experts' own mixtures (Experts.weights_for).

Shapes: R mixtures, T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rayx.branching import make_branch, make_trunk
from rayx.candidates import sobol_mixtures
from rayx.constraints import Constraints
from rayx.errors import SpecError
from rayx.fit.scores import spearman
from rayx.merging import Experts, MergeSpec, Spec
from rayx.mixture import Mixture, Phase
from rayx.spec import TrainSpec, require
from rayx.store import Store
from rayx.units import train_flops

Sweep = Callable[[Sequence[Spec]], None]

TOP_SHARE = 0.25  # of the mixtures, for the Spearman among the best
MIN_MIXTURES = 4


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How well stand-ins agree with what was trained.

    Attributes:
        mixtures: How many were compared.
        spearman: Target -> rank correlation over mixtures of the two losses.
        average_spearman: That of the loss averaged over targets.
        top_spearman: That among the quarter of mixtures whose trained average loss is lowest.
        recovery: Mean over mixtures of trained over stand-in average loss: the share of the trained
            model's score 1 / loss that the stand-in has; below 1 it is the worse model.
        gap_bpb: Mean over mixtures and targets of stand-in less trained loss.
    """

    mixtures: int
    spearman: dict[str, float]
    average_spearman: float
    top_spearman: float
    recovery: float
    gap_bpb: float

    @property
    def macro_spearman(self) -> float:
        """Mean of `spearman` over targets."""
        return float(np.mean(list(self.spearman.values())))

    @property
    def least_spearman(self) -> float:
        """Least of `spearman` over targets."""
        return min(self.spearman.values())


def agreement(standin_RT: np.ndarray, trained_RT: np.ndarray, targets: Sequence[str]) -> Agreement:
    """Compare losses, in bits per byte, of the same mixtures in the same order.

    Raises:
        SpecError: Shapes differ, or there are fewer than 4 mixtures: ranks would say nothing.
    """
    standin_RT, trained_RT = np.asarray(standin_RT, float), np.asarray(trained_RT, float)
    expected = (len(trained_RT), len(targets))
    for what, losses in (("stand-ins", standin_RT), ("trained runs", trained_RT)):
        require(losses.shape == expected, f"Shape of the {what}' losses", losses.shape,
                f"{expected} (mixtures, targets)")  # fmt: skip
    require(len(trained_RT) >= MIN_MIXTURES, "The number of mixtures", len(trained_RT),
            f"at least {MIN_MIXTURES}")  # fmt: skip
    standin_R, trained_R = standin_RT.mean(1), trained_RT.mean(1)
    top = np.argsort(trained_R, kind="stable")[: max(3, round(TOP_SHARE * len(trained_R)))]
    return Agreement(
        mixtures=len(trained_R),
        spearman={
            target: spearman(standin_RT[:, t], trained_RT[:, t]) for t, target in enumerate(targets)
        },
        average_spearman=spearman(standin_R, trained_R),
        top_spearman=spearman(standin_R[top], trained_R[top]),
        recovery=float((trained_R / standin_R).mean()),
        gap_bpb=float((standin_RT - trained_RT).mean()),
    )


def study(
    store: Store,
    standins: Sequence[Spec],
    references: Sequence[TrainSpec],
    targets: Sequence[str] | None = None,
) -> Agreement:
    """Compare stand-ins, merged or trained, with the trained runs of the same mixtures.

    Args:
        store: Holds the records of all of them, from whatever sweep.
        standins: One a reference, in its order.
        references: Trained runs.
        targets: Which losses; by default all that were evaluated.

    Raises:
        SpecError: A stand-in is of another mixture or corpus than its reference, or too few.
        StoreError: A run has no record.
    """
    require(len(standins) == len(references), "The number of stand-ins", len(standins),
            f"that of the references ({len(references)})")  # fmt: skip
    for standin, reference in zip(standins, references, strict=True):
        mine, theirs = standin.mixture, reference.mixture
        apart = sum(abs(mine.get(d, 0.0) - theirs.get(d, 0.0)) for d in {*mine, *theirs})
        if apart > 1e-3 or standin.corpus != reference.corpus:
            raise SpecError(
                f"Stand-in {standin.run_id} is of mixture {dict(mine)} on corpus {standin.corpus}, "
                f"its reference {reference.run_id} of {dict(theirs)} on {reference.corpus}. "
                "Give them in the same order."
            )
    names = tuple(targets or store.get(references[0].run_id).losses)
    return agreement(losses(store, standins, names), losses(store, references, names), names)


def losses(store: Store, specs: Sequence[Spec], targets: Sequence[str]) -> np.ndarray:
    """Return the recorded losses in bits per byte, shape (R, T).

    Raises:
        SpecError: A run failed or was not evaluated on a target.
        StoreError: A run has no record.
    """
    rows = []
    for spec in specs:
        found = store.get(spec.run_id).losses
        missing = [t for t in targets if t not in found]
        require(not missing, f"Targets without a loss in the record of run {spec.run_id}", missing,
                "none; if the run failed, run again with --retry-failed")  # fmt: skip
        rows.append([found[t].bpb for t in targets])
    return np.array(rows)


def cost_tokens(store: Store, specs: Iterable[Spec]) -> float:
    """Return what it takes to have these runs, in tokens of training the same model.

    Trained runs count their tokens; merged ones their experts' (each once) and their evaluation,
    at FLOPs / (6 params). The trunk, which all share, and the evaluation of trained runs are left
    out; the latter is in favour of trained runs.
    """
    trained: dict[str, int] = {}
    evaluated = 0.0
    for spec in {spec.run_id: spec for spec in specs}.values():
        if isinstance(spec, TrainSpec):
            trained[spec.run_id] = spec.tokens
            continue
        for member in spec.experts.members:
            trained[member.spec.run_id] = member.steps * member.spec.batch_tokens
        evaluated += store.get(spec.run_id).flops / train_flops(spec.model.matmul_params, 1)
    return sum(trained.values()) + evaluated


@dataclass(frozen=True, kw_only=True)
class MergeProxy:
    """One trunk, and branches of it: experts, their merges, and trained runs to compare with.

    Args:
        template: Model, optimizer, corpus, seeds and evaluation of every run.
        general: Mixture of the trunk, and of the experts' general part.
        domains: One expert each.
        trunk_tokens: Tokens of the trunk.
        branch_tokens: Tokens of a branch.
        decay_share: Share of a branch's own tokens over which the rate falls, in (0, 1].
    """

    template: TrainSpec
    general: Mixture
    domains: tuple[str, ...]
    trunk_tokens: int
    branch_tokens: int
    decay_share: float = 0.8

    @property
    def trunk(self) -> TrainSpec:
        """The run that all others branch from."""
        return make_trunk(self.template, self.general, self.trunk_tokens)

    def branch(self, mixture: Mixture, tokens: int | None = None) -> TrainSpec:
        """Return the run on `mixture` from the trunk's end, by default of `branch_tokens`."""
        tokens = tokens or self.branch_tokens
        decay_share = self.decay_share * tokens / (self.trunk_tokens + tokens)
        return make_branch(self.trunk, self.trunk_tokens, (Phase(mixture, tokens),), decay_share)

    def component(self, mixture: Mixture, general_share: float) -> Mixture:
        """Return general_share * general + (1 - general_share) * mixture."""
        require(0 <= general_share < 1, "general_share", general_share, "a share in [0, 1)")
        parts = {d: (1 - general_share) * mixture.get(d, 0.0) for d in {*mixture, *self.general}}
        return Mixture({d: w + general_share * self.general.get(d, 0.0) for d, w in parts.items()})

    def experts(self, general_share: float, tokens: int | None = None) -> Experts:
        """Return the experts, one a domain, each with a share of general text."""
        own = [self.component(Mixture({d: 1}), general_share) for d in self.domains]
        return Experts.of([self.branch(mixture, tokens) for mixture in own])

    def standins(
        self, mixtures: Sequence[Mixture], general_share: float, tokens: int | None = None
    ) -> list[MergeSpec]:
        """Return the merges that stand for the branches on these mixtures.

        Raises:
            SpecError: The experts cannot express one: a domain has less than its general part.
        """
        experts = self.experts(general_share, tokens)
        return [experts.merge(experts.weights_for(mixture)) for mixture in mixtures]

    def hull(self, general_share: float) -> Constraints:
        """Return the mixtures that merges of these experts can stand for.

        Every domain has at least its general part, and one without an expert has no more.
        """
        domains = tuple(sorted({*self.domains, *self.general}))
        floors = {d: general_share * self.general.get(d, 0.0) for d in domains}
        caps = {d: floors[d] for d in domains if d not in self.domains}
        return Constraints.by_name(domains, floors=floors, caps=caps)

    def hull_mixtures(self, num: int, general_share: float, seed: int) -> list[Mixture]:
        """Return mixtures spread evenly over the hull, none of them an expert's own."""
        even = sobol_mixtures(self.domains, num, seed)
        return [self.component(mixture, general_share) for mixture in even]

"""DEM, the distribution edited model: one expert a source, added to the base with searched weights.

Theta_D = Theta + sum_i omega_i (Theta_i - Theta). Every source has its own search of learning rate
and length, by its own validation loss, and is never trained together with another: a source that
changes retrains one expert. Then omega is searched among merged candidates, one evaluation each.
The sum of omega need not be 1, and it is never normalised.

Source: Ram et al. 2024, arXiv:2406.15570 (abstract; the search spaces as in the authors' tool, read
    and not copied); the defaults of the search and the cost ledger are derived.
Differs: losses in place of benchmarks; a guided search beside grid and random.

Shapes: K sources, C candidates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rayx.branching import make_branch
from rayx.errors import StoreError
from rayx.merging import Experts, MergeSpec, Operator, Spec
from rayx.methods.dem_search import OmegaSearch
from rayx.mixture import Mixture, Phase
from rayx.record import Loss
from rayx.spec import Parent, TrainSpec, require
from rayx.store import Store
from rayx.units import train_flops

ADDED = Operator(name="task_arithmetic")


@dataclass(frozen=True, slots=True)
class DataSource:
    """What a source is made of, and how much of it there is to train on."""

    mixture: Mixture
    tokens: int


@dataclass(frozen=True, slots=True)
class ChosenExpert:
    """The best state of a source's own search, by its own validation loss (bits per byte)."""

    source: str
    member: Parent
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What a model cost, in tokens of training it; a forward pass is a third of a training step.

    Attributes:
        source_tokens: Source -> tokens of all runs of its own search, hp_i * tokens_i.
        evaluations: Of checkpoints in the sources' searches, and of merged candidates.
        evaluation_tokens: Of one of them.
    """

    source_tokens: dict[str, int]
    evaluations: dict[str, int]
    evaluation_tokens: float

    @property
    def tokens(self) -> float:
        """C_DEM = sum_i hp_i tokens_i + evaluations * evaluation_tokens."""
        read = sum(self.evaluations.values()) * self.evaluation_tokens
        return sum(self.source_tokens.values()) + read

    def cheaper(self, configurations: int, full_tokens: int) -> float:
        """Return C_mix / C_DEM, C_mix = configurations * full_tokens, its evaluations for free."""
        return configurations * full_tokens / self.tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class EditedModel:
    """What DEM came to.

    Attributes:
        experts: One a source.
        omega: Source -> weight of its distribution vector.
        spec: The merge.
        loss: Its validation objective, bits per byte.
        omega_CK: All candidates, in the order tried.
        loss_C: Their objectives; infinite where one failed.
        cost: What it took; the base, which all methods start from, is left out.
    """

    experts: tuple[ChosenExpert, ...]
    omega: dict[str, float]
    spec: MergeSpec
    loss: float
    omega_CK: np.ndarray
    loss_C: np.ndarray
    cost: Ledger


@dataclass(frozen=True, kw_only=True)
class Dem:
    """A base, its sources, and how they are searched.

    Args:
        base: Theta is its state at its end. Its evaluation is the validation; report on another
            part of the text.
        sources: Name -> source.
        lr_shares: Peak rates of the sources' runs, as shares of the base's.
        points: Checkpoints of each run, equally spaced, that are candidates for its expert.
        decay_share: Share of a run's own tokens over which its rate falls, in (0, 1].
        search: Of omega.
        objective: Target -> weight of its loss; by default all domains of the sources alike.
    """

    base: TrainSpec
    sources: Mapping[str, DataSource]
    lr_shares: tuple[float, ...] = (0.3, 0.1)
    points: int = 2
    decay_share: float = 1.0
    search: OmegaSearch = field(default_factory=OmegaSearch)
    objective: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        good = bool(self.sources) and bool(self.lr_shares)
        require(good, "Dem.sources and lr_shares", (self.sources, self.lr_shares), "some of each")

    def run(self, mixture: Mixture, tokens: int, lr_share: float) -> TrainSpec:
        """Return a run from the base: a source's, or one on a mixture to compare with."""
        return self.phases((Phase(mixture, tokens),), lr_share)

    def phases(self, phases: tuple[Phase, ...], lr_share: float) -> TrainSpec:
        """Return a run from the base through several phases."""
        tokens, base = sum(phase.tokens for phase in phases), self.base
        decay = self.decay_share * tokens / (base.tokens + tokens)
        run = make_branch(base, base.tokens, phases, decay)
        optimizer = dataclasses.replace(run.optimizer, lr=base.optimizer.lr * lr_share)
        evaluation = dataclasses.replace(base.evaluation, points=self.points)
        return dataclasses.replace(run, optimizer=optimizer, evaluation=evaluation)

    def runs(self, name: str) -> list[TrainSpec]:
        """Return the runs of a source's own search."""
        source = self.sources[name]
        return [self.run(source.mixture, source.tokens, share) for share in self.lr_shares]

    def specs(self) -> list[TrainSpec]:
        """Return the runs of all sources."""
        return [run for name in self.sources for run in self.runs(name)]

    def experts(self, store: Store) -> tuple[ChosenExpert, ...]:
        """Return each source's best state.

        Raises:
            StoreError: A run has no record, or all runs of a source failed.
        """
        return tuple(
            ChosenExpert(name, *best_state(store, self.runs(name), self.sources[name].mixture))
            for name in self.sources
        )

    def proposed(self, store: Store) -> list[Spec]:
        """Return all specs up to the first round that is not all on record.

        A function of the records and the seed: an interrupted search proposes the same again.
        """
        specs, ended = self.specs(), store.status()
        if not all(spec.run_id in ended for spec in specs):
            return [*specs]
        return [*specs, *self._candidates(store)]

    def decide(self, store: Store) -> EditedModel:
        """Return the best candidate by the objective, once `proposed` proposes nothing new.

        Raises:
            StoreError: A run or a candidate has no record, or all failed.
        """
        specs = self._candidates(store)
        loss_C = self._losses(store, specs)
        best = specs[int(np.argmin(loss_C))]
        flops = train_flops(self.base.model.matmul_params, 1)
        cost = Ledger(
            source_tokens={name: sum(r.tokens for r in self.runs(name)) for name in self.sources},
            evaluations={"checkpoints": len(self.specs()) * self.points, "omegas": len(specs)},
            evaluation_tokens=store.get(specs[0].run_id).flops / flops,
        )
        return EditedModel(
            experts=self.experts(store),
            omega=dict(zip(self.sources, best.weights, strict=True)),
            spec=best,
            loss=float(loss_C.min()),
            omega_CK=np.array([spec.weights for spec in specs]),
            loss_C=loss_C,
            cost=cost,
        )

    def _candidates(self, store: Store) -> list[MergeSpec]:
        """Return the merged candidates up to the first round that is not all on record."""
        experts = Experts(tuple(expert.member for expert in self.experts(store)))

        validation = dataclasses.replace(self.base.evaluation, points=1)

        def merges(omega_CK: np.ndarray) -> list[MergeSpec]:
            return [experts.merge(omega_K.tolist(), ADDED, validation) for omega_K in omega_CK]

        specs = merges(self.search.first(tuple(self.sources)))
        for number in range(1, len(self.search.rounds) if self.search.how == "guided" else 0):
            ended = store.status()
            if not all(spec.run_id in ended for spec in specs):
                break
            omega_CK = np.array([spec.weights for spec in specs])
            specs += merges(self.search.later(number, omega_CK, self._losses(store, specs)))
        return specs

    def _losses(self, store: Store, specs: list[MergeSpec]) -> np.ndarray:
        domains = {d: 1.0 for source in self.sources.values() for d in source.mixture}
        objective = self.objective or domains
        loss_C = np.array([mean_loss(store.get(s.run_id).losses, objective) for s in specs])
        if not np.isfinite(loss_C).any():
            raise StoreError("All merged candidates failed; try smaller scales or lr_shares.")
        return loss_C


def best_state(
    store: Store, runs: Sequence[TrainSpec], objective: Mapping[str, float]
) -> tuple[Parent, float]:
    """Return the evaluated state of these runs with the lowest objective, and that.

    Raises:
        StoreError: A run has no record, or all failed.
    """
    found = [
        (mean_loss(point.losses, objective), Parent(record.spec, point.step))
        for record in (store.get(run.run_id) for run in runs)
        if record.status == "ok" and isinstance(record.spec, TrainSpec)
        for point in record.curve
    ]
    if not found:
        raise StoreError(f"All of {[run.run_id for run in runs]} failed; try smaller lr_shares.")
    loss, member = min(found, key=lambda pair: pair[0])
    return member, loss


def mean_loss(losses: Mapping[str, Loss], objective: Mapping[str, float]) -> float:
    """Return the weighted mean of losses in bits per byte; infinite for a run that failed."""
    if not losses:
        return math.inf
    return sum(w * losses[t].bpb for t, w in objective.items()) / sum(objective.values())

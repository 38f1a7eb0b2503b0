"""Mixing laws in one table: what each method believes of losses, and how it compares with uniform.

Aioli's paper writes all methods as a linear mixing law, in which target i's loss falls by
sum_j A_ij p_j, with a matrix A of the method's own, and a rule that turns A into weights. `LAWS` is
that table, `laws` reads A^t off a finished run, and `MixingStudy` trains every method beside
uniform and proportional mixing and a random search, at costs that are written down.

Source: Chen et al. 2024, arXiv:2411.05735 (the table, the comparison with stratified sampling);
    DoReMi arXiv:2305.10429, DoGE arXiv:2310.15393, Skill-It arXiv:2307.14430, DML
    arXiv:2403.16952, R&B arXiv:2505.00358.
Differs: R&B is in the table; DML takes as many short runs as the random search beside it.

Shapes: K domains, which are the targets too; S measurements.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rayx.candidates import sobol_mixtures
from rayx.choose import Convex, choose
from rayx.fit import Table, fit_table
from rayx.mixture import Mixture, Schedule
from rayx.policies.aioli import Aioli, law, smoothed_one_hots
from rayx.policies.doremi import DoReMi
from rayx.policies.skill_it import relative
from rayx.policy import Decision, Policy
from rayx.recipe import Evaluation
from rayx.record import Record
from rayx.spec import Parent, TrainSpec, require
from rayx.store import Store

UNIFORM = "uniform"
RANDOM, LOG_LINEAR = "random search", "DML"
DOREMI = "DoReMi"
AVERAGED = ", averaged"  # of an arm: a second run on the average weights of the first


@dataclass(frozen=True, slots=True)
class Law:
    """A row of the unified table.

    Attributes:
        method: Its name.
        policy: Name in rayx.policies; None for what is fitted on finished runs.
        matrix: A_ij, in words of the run: i a target, j a domain.
        rule: How weights come of it.
    """

    method: str
    policy: str | None
    matrix: str
    rule: str


LAWS = (
    Law("DML", None, "fitted once: L_i = c_i + exp(b_i - sum_j A_ij p_j)", "least predicted loss"),
    Law("DoReMi", "doremi", "max(0, L_i - L_i of a reference) if i = j, else 0", "p exp(eta A 1)"),
    Law("DoGE", "doge", "<gradient of L_j, gradient of probe i>", "p exp(eta A 1 / mean norm)"),
    Law("Skill-It", "skill-it", "L_i, times its relative fall on j alone", "prior exp(eta A 1)"),
    Law("R&B", "rb", "p_i <gradient of L_i, gradient of L_j>", "exp(sharpness A 1 / its norm)"),
    Law("Aioli", "aioli", "fall of L_i on j alone, learnt each round", "p exp(eta A 1)"),
)


def laws(policy: Any, decisions: Sequence[Decision]) -> list[np.ndarray]:
    """Return A^t of every measurement of a run, S arrays of shape (K, K), targets in rows.

    The order of the domains is that of the first decision. A is in the method's own unit; Aioli's
    is as it was solved for, before it is normalised.

    Args:
        policy: One of those in `LAWS`.
        decisions: Record.decisions.

    Raises:
        SpecError: The policy has no law.
    """
    name = getattr(policy, "name", policy)
    require(name in _READERS, "A policy with a mixing law", name, f"one of {', '.join(_READERS)}")
    return [*_READERS[name](policy, decisions)]


def _doge(policy: Any, decisions: Sequence[Decision]) -> Iterator[np.ndarray]:
    num = len(decisions[0].weights)
    for decision in decisions[1:]:
        yield np.array(decision.signal)[num:, :num]


def _doremi(policy: Any, decisions: Sequence[Decision]) -> Iterator[np.ndarray]:
    for decision in decisions[1:]:
        yield np.diag(decision.signal)


def _rb(policy: Any, decisions: Sequence[Decision]) -> Iterator[np.ndarray]:
    domains = list(decisions[0].weights)
    for before, decision in zip(decisions, decisions[1:], strict=False):
        weights_K = np.array([before.weights.get(d, 0.0) for d in domains])
        yield weights_K[:, None] * np.array(decision.signal)


def _skill_it(policy: Any, decisions: Sequence[Decision]) -> Iterator[np.ndarray]:
    measured = [np.array(d.signal) for d in decisions[1:]]
    if policy.skills is None:
        skills_KK, measured = relative(measured[1], measured[0]), [measured[0], *measured[2:]]
    else:
        skills_KK = np.array(policy.skills)
    for loss_K in measured:
        yield loss_K[:, None] * skills_KK


def _aioli(policy: Aioli, decisions: Sequence[Decision]) -> Iterator[np.ndarray]:
    domains = list(decisions[0].weights)
    mixtures_KK = smoothed_one_hots(len(domains), policy.one_hot)
    turns = len(domains) * policy.learn_rounds
    # Of a round: the measurement before it, and one after each one-hot.
    for start in range(1, len(decisions) - turns, turns + 1):
        learning = decisions[start : start + turns]
        loss_SK = np.array([d.signal for d in decisions[start : start + turns + 1]])
        drop_KK = np.zeros((len(domains), len(domains)))
        for decision, drop_K in zip(learning, loss_SK[:-1] - loss_SK[1:], strict=True):
            drop_KK[:, domains.index(max(decision.weights, key=decision.weights.__getitem__))] += (
                drop_K
            )
        yield law(drop_KK / policy.learn_rounds, mixtures_KK)


_READERS: dict[str, Callable[[Any, Sequence[Decision]], Iterator[np.ndarray]]] = {
    "aioli": _aioli, "doge": _doge, "doremi": _doremi, "rb": _rb, "skill-it": _skill_it,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MixingStudy:
    """Every method on one set of domains, from one seed.

    All arms train the template's tokens. What else each costs is in `table`: an online method its
    signals, DoReMi its reference, an averaged arm the run that it averages, the random search and
    DML the same `short_runs` short runs.

    Attributes:
        template: Scale, tokens and optimizer; its mixture is replaced. Policies read the first half
            of the held-out text, so it is judged on the second.
        sizes: Domain -> tokens, for proportional mixing.
        online: Arm -> policy.
        doremi: Fields of DoReMi beside its reference, which is the uniform run.
        averaged: Which online arms are followed by a run on their average weights.
        short_runs: Random mixtures, at least 8.
        short_share: Tokens of a short run, as a share of the template's.
    """

    template: TrainSpec
    sizes: Mapping[str, int]
    online: Mapping[str, Policy]
    doremi: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    averaged: tuple[str, ...] = ("DoGE", DOREMI)
    short_runs: int = 16
    short_share: float = 0.125

    @property
    def domains(self) -> tuple[str, ...]:
        """In the order of mixtures."""
        return tuple(sorted(self.sizes))

    def run(self, mixture: Mapping[str, float], policy: Policy | None = None) -> TrainSpec:
        """Return a run in full: on a mixture, or steered from it."""
        schedule = Schedule.constant(Mixture(mixture), self.template.schedule.tokens)
        return dataclasses.replace(self.template, schedule=schedule, policy=policy)

    def first_arms(self) -> dict[str, TrainSpec]:
        """Return arm -> run, for those that need no other run's result."""
        even = Mixture.uniform(self.domains)
        uniform = self.run(even)
        reference = Parent(uniform, uniform.steps)
        online = dict(self.online) | {DOREMI: DoReMi(reference=reference, **self.doremi)}
        fixed = {UNIFORM: uniform, "proportional": self.run(self.sizes)}
        return fixed | {arm: self.run(even, policy) for arm, policy in online.items()}

    def short(self) -> list[TrainSpec]:
        """Return the short runs on random mixtures, spread evenly, judged on the first half."""
        mixtures = sobol_mixtures(self.domains, self.short_runs, seed=self.template.seed)
        tokens = round(self.template.schedule.tokens * self.short_share)
        evaluation = Evaluation(
            points=1, sequences=self.template.evaluation.sequences, part="first"
        )
        return [
            dataclasses.replace(
                self.template, schedule=Schedule.constant(m, tokens), evaluation=evaluation
            )
            for m in mixtures
        ]

    def specs(self) -> list[TrainSpec]:
        """Return all runs that need no other run's result."""
        return [*self.first_arms().values(), *self.short()]

    def arms(self, store: Store) -> dict[str, TrainSpec]:
        """Return arm -> run, those included that follow from `specs`, once these are on record."""
        arms = self.first_arms()
        for arm in self.averaged:
            arms[arm + AVERAGED] = self.run(store.get(arms[arm].run_id).mixture)
        records = [store.get(spec.run_id) for spec in self.short()]
        best = min(records, key=lambda record: self._mean(record, "bpb"))
        arms[RANDOM] = self.run(best.mixture)
        arms[LOG_LINEAR] = self.run(self.log_linear(store))
        return arms

    def log_linear(self, store: Store) -> Mixture:
        """Return the mixture of least predicted average loss under a law fitted on short runs."""
        runs = store.runs()
        columns = ["run_id", "status", *(f"weight/{d}" for d in self.domains)]
        columns += [f"loss/{d}" for d in self.domains]
        rows = runs.loc[runs["run_id"].isin([s.run_id for s in self.short()]), columns]
        fitted = fit_table(Table.from_frame(rows), "loglinear", seed=self.template.seed)
        even = dict.fromkeys(self.domains, 1.0)
        found = choose(fitted, even, even, seed=self.template.seed, method=Convex(kl_strength=0.0))
        return Mixture(found.weights)

    def table(self, store: Store) -> pd.DataFrame:
        """Return a row for each arm.

        Columns: arm; perplexity and bpb, averages over the domains; the same less uniform mixing's;
        cost, FLOPs of everything the arm needed over those of a plain run; weight/<domain>, the
        average over the run.
        """
        arms = self.arms(store)
        records = {arm: store.get(spec.run_id) for arm, spec in arms.items()}
        plain = records[UNIFORM].flops
        extra = {arm + AVERAGED: arm for arm in self.averaged}
        cost = {arm: record.flops / plain for arm, record in records.items()}
        cost[DOREMI] += 1.0  # the reference
        for arm, first in extra.items():
            cost[arm] += cost[first]
        for arm in (RANDOM, LOG_LINEAR):
            cost[arm] += sum(store.get(spec.run_id).flops for spec in self.short()) / plain
        rows = [
            {
                "arm": arm,
                "perplexity": self._mean(record, "perplexity"),
                "bpb": self._mean(record, "bpb"),
                "cost": cost[arm],
                **{f"weight/{d}": record.mixture.get(d, 0.0) for d in self.domains},
            }
            for arm, record in records.items()
        ]
        table = pd.DataFrame(rows)
        for column in ("perplexity", "bpb"):
            at = table.loc[table["arm"] == UNIFORM, column].item()
            table[f"{column}_less_uniform"] = table[column] - at
        return table

    def _mean(self, record: Record, unit: str) -> float:
        losses = [record.losses[d] for d in self.domains]
        if unit == "bpb":
            return float(np.mean([loss.bpb for loss in losses]))
        return float(np.mean([math.exp(loss.nats) for loss in losses]))


def summary(tables: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each group and arm: means over seeds less uniform's, their spread, wins.

    Args:
        tables: Rows of `MixingStudy.table`, with columns `group` and `seed` beside.
    """
    rows = []
    for group, arm in tables[["group", "arm"]].drop_duplicates().itertuples(index=False):
        found = tables[(tables["group"] == group) & (tables["arm"] == arm)]
        less = np.array(found["perplexity_less_uniform"])
        rows.append(
            {
                "group": group,
                "arm": arm,
                "perplexity": found["perplexity"].mean(),
                "less_uniform": less.mean(),
                "stderr": less.std(ddof=1) / math.sqrt(len(less)) if len(less) > 1 else math.nan,
                "bpb_less_uniform": found["bpb_less_uniform"].mean(),
                "wins": int((less < 0).sum()),
                "seeds": len(less),
                "cost": found["cost"].mean(),
            }
        )
    return pd.DataFrame(rows)

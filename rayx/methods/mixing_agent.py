"""A mixing agent: trained offline on trajectories of random mixtures, then it steers runs.

Trajectories are runs of several phases, evaluated at the end of each. A phase is a transition: its
state, its mixture, and as the reward the fall of the objective in it. Conservative Q-learning on
all of them gives the network of the policy `agent`.

Source: Data Mixing Agent, Yang et al. 2025, arXiv:2507.15640 (abstract only: an agent for continual
    pretraining, learnt from trajectories with feedback of an evaluation); all else derived.

Legend: K domains, F features of a state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayx.errors import StoreError
from rayx.mixture import Mixture, Phase, Schedule
from rayx.policies.agent import Agent, state_features
from rayx.proxy.agent import Transitions, train_agent
from rayx.recipe import is_int, require
from rayx.record import Record
from rayx.spec import TrainSpec
from rayx.store import Store

# Dirichlet strengths: of a trajectory's centre around the prior, of its phases around the centre.
CENTRES, AROUND = 4.0, 12.0
LEAST = 0.05  # added to each concentration


@dataclass(frozen=True, kw_only=True)
class MixingAgent:
    """A study of one agent.

    Args:
        template: The run to be steered; its mixture is the prior, its domains are the agent's.
        objective: Domain -> weight of its loss (bits per byte).
        trajectories: How many.
        phases: Of each; also the agent's decisions.
        settings: Of `rayx.proxy.agent.train_agent`.
        seed: Draws the mixtures and trains the agent.
    """

    template: TrainSpec
    objective: Mapping[str, float]
    trajectories: int = 20
    phases: int = 12
    settings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        count = self.trajectories
        ok = is_int(count) and count > 0
        require(ok, "MixingAgent.trajectories", count, "an integer > 0")
        ok = is_int(self.phases) and self.phases >= 2
        require(ok, "MixingAgent.phases", self.phases, "an integer >= 2, for a state to follow")
        known = bool(self.objective) and set(self.objective) <= set(self.domains)
        expected = f"among {', '.join(self.domains)}"
        require(known, "Domains of MixingAgent.objective", sorted(self.objective), expected)

    @property
    def domains(self) -> tuple[str, ...]:
        """The K domains, in the order of weights."""
        return tuple(self.template.mixture)

    def specs(self) -> list[TrainSpec]:
        """Return the trajectories: phases around a centre of each one's own."""
        rng = np.random.default_rng(self.seed)
        template, domains = self.template, self.domains
        prior_K = template.mixture.to_array(domains)
        ends_P = np.round(np.linspace(0, template.steps, self.phases + 1)).astype(int)
        tokens_P = np.diff(ends_P) * template.batch_tokens
        evaluation = dataclasses.replace(template.evaluation, points=self.phases, part="first")
        runs = []
        for _ in range(self.trajectories):
            centre_K = rng.dirichlet(CENTRES * prior_K + LEAST)
            drawn_PK = rng.dirichlet(AROUND * centre_K + LEAST, size=self.phases)
            phases = tuple(
                Phase(Mixture.from_array(weights_K, domains), int(tokens))
                for weights_K, tokens in zip(drawn_PK, tokens_P, strict=True)
            )
            schedule = Schedule(phases)
            runs.append(dataclasses.replace(template, schedule=schedule, evaluation=evaluation))
        return runs

    def transitions(self, store: Store) -> Transitions:
        """Return those of all trajectories that are on record and did not fail.

        Raises:
            StoreError: There is none.
        """
        return read_transitions(store, self.specs(), self.domains, self.objective)

    def train(self, store: Store) -> Agent:
        """Return the agent that the trajectories on record teach."""
        network = train_agent(self.transitions(store), seed=self.seed, **self.settings)  # pyright: ignore[reportArgumentType]
        return Agent(
            domains=self.domains,
            network=network,
            decisions=self.phases,
            sequences=self.template.evaluation.sequences,
            seed=self.seed,
        )


def read_transitions(
    store: Store,
    specs: Sequence[TrainSpec],
    domains: Sequence[str],
    objective: Mapping[str, float],
) -> Transitions:
    """Return the transitions of recorded runs of phases, each evaluated at its end.

    Rewards are the fall of the objective, bits per byte, less the mean fall of the same phase over
    the runs: what all actions of a phase share does not count for a choice. A run begins at its
    parent's last losses, or at ln V nats.

    Raises:
        SpecError: A run has other domains, fewer than two phases, or was not evaluated at the end
            of each phase.
        StoreError: No run is on record, or all failed.
    """
    rows = []
    ended = store.status()
    for spec in specs:
        check_trajectory(spec, domains)
        if ended.get(spec.run_id) == "ok":
            rows.append(_trajectory(store, store.get(spec.run_id), domains, objective))
    if not rows:
        raise StoreError(
            f"Store {store.url!r} has no trajectories: none of the {len(specs)} runs has ended "
            "well. Sweep them first."
        )
    fall = {}
    for row in rows:
        for done, reward in zip(row["states"][:, 0], row["rewards"], strict=True):
            fall.setdefault(round(float(done), 6), []).append(reward)
    for row in rows:
        row["rewards"] -= [np.mean(fall[round(float(done), 6)]) for done in row["states"][:, 0]]
    joined = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return Transitions(
        states_NF=joined["states"],
        actions_NK=joined["actions"],
        rewards_N=joined["rewards"],
        next_NF=joined["next"],
        last_N=joined["last"],
    )


def check_trajectory(spec: TrainSpec, domains: Sequence[str]) -> None:
    """Raise SpecError where a run cannot be read as a trajectory."""
    what = f"of run {spec.run_id}, a trajectory,"
    count = len(spec.schedule.phases)
    require(count >= 2, f"The number of phases {what}", count, "2 or more")
    own = {d for phase in spec.schedule.phases for d in phase.mixture}
    expected = f"among {', '.join(domains)}"
    require(own <= set(domains), f"The domains {what}", sorted(own), expected)
    points = spec.evaluation.points
    require(points == count, f"Evaluation.points {what}", points, f"its {count} phases")
    length = spec.schedule.tokens / count
    even = all(abs(phase.tokens - length) <= spec.batch_tokens for phase in spec.schedule.phases)
    require(even, f"The phases' tokens {what}", spec.schedule.phases, "equal, for points between")
    if spec.parent is not None:
        part = spec.parent.spec.evaluation.part
        require(
            part == spec.evaluation.part, f"Evaluation.part of the parent {what}", part, "its own"
        )


def _trajectory(
    store: Store, record: Record, domains: Sequence[str], objective: Mapping[str, float]
) -> dict[str, np.ndarray]:
    """Return states, actions, rewards, next and last of one run."""
    spec = record.spec
    assert isinstance(spec, TrainSpec)
    points = [point.losses for point in record.curve]
    loss_PK = np.array([[losses[d].bpb for d in domains] for losses in points])
    if spec.parent is None:  # untrained: ln V nats, in bits per byte
        factor_K = [points[0][d].bpb / points[0][d].nats for d in domains]
        start_K = math.log(spec.model.vocab_size) * np.array(factor_K)
    else:
        before = store.get(spec.parent.spec.run_id).losses
        start_K = np.array([before[d].bpb for d in domains])
    loss_PK = np.vstack([start_K, loss_PK])
    phases = spec.schedule.phases
    action_PK = np.array([phase.mixture.to_array(domains) for phase in phases])
    tokens_P = np.array([phase.tokens for phase in phases])
    read_PK = np.vstack([np.zeros(len(domains)), np.cumsum(tokens_P[:, None] * action_PK, axis=0)])
    over_P = np.concatenate([[0], np.cumsum(tokens_P)])
    states = np.array(
        [
            state_features(over / over_P[-1], read_K / max(1, over), loss_K, start_K)
            for over, read_K, loss_K in zip(over_P, read_PK, loss_PK, strict=True)
        ]
    )
    weight_K = np.array([objective.get(d, 0.0) for d in domains])
    mean_P = loss_PK @ weight_K / weight_K.sum()
    last = np.zeros(len(phases), dtype=bool)
    last[-1] = True
    return {
        "states": states[:-1],
        "actions": action_PK,
        "rewards": -np.diff(mean_P),
        "next": states[1:],
        "last": last,
    }

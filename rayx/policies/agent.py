"""Agent: weights by a small network that was trained offline on recorded trajectories.

Source: Data Mixing Agent, Yang et al. 2025, arXiv:2507.15640 (abstract only: an agent learns from
    trajectories of random mixtures); all else derived.

Legend: K domains, F = 1 + 2K features of a state, M actions, H units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.policy import Block, Blocks, Losses, Probe, Setting
from rayx.recipe import is_int, is_number, require

STRENGTHS = (4.0, 60.0)  # of the Dirichlet draws around a mixture: wide, narrow
VERTEX_SHARE = 0.7  # of its domain in a smoothed vertex; the rest is the prior


def state_features(
    done: float, average_K: np.ndarray, losses_K: np.ndarray, start_K: np.ndarray
) -> np.ndarray:
    """Return what the agent knows when it sets weights: (done, average, loss / loss at the start).

    Args:
        done: Share of the run that is over, in [0, 1).
        average_K: Mean weights so far, zeros at the start.
        losses_K: Losses now, in any unit.
        start_K: Losses at the start, in the same unit.

    Returns:
        Shape (F,).

    Source: derived.
    """
    return np.concatenate([[done], average_K, losses_K / start_K])


def network_size(num_domains: int, units: int) -> int:
    """Return how many numbers `q_values` takes: (F + K) H + H + H + 1."""
    return (3 * num_domains + 3) * units + 1


def q_values(network: np.ndarray, state_F: np.ndarray, actions_MK: np.ndarray) -> np.ndarray:
    """Return the fall of the loss that is expected from here to the end, for each action.

    Q(s, a) = c + v^T tanh(b + W^T (s, sqrt a)); `network` is W (row by row), b, v and c. The root,
    for a larger share gains less and less.

    Args:
        network: Shape ((3K + 3) H + 1,).
        state_F: As `state_features` returns it.
        actions_MK: Mixtures.

    Returns:
        Shape (M,), bits per byte, up to a constant of the state's `done`.
    """
    inputs = 1 + 3 * actions_MK.shape[1]
    units = (len(network) - 1) // (inputs + 2)
    first = network[: inputs * units].reshape(inputs, units)
    offset_H, second_H = network[inputs * units : -1].reshape(2, units)
    states_MF = np.broadcast_to(state_F, (len(actions_MK), len(state_F)))
    hidden_MH = np.tanh(np.hstack([states_MF, np.sqrt(actions_MK)]) @ first + offset_H)
    return hidden_MH @ second_H + network[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    """The mean of the candidates of the largest Q, `decisions` times a run.

    Candidates: the prior and the current weights, Dirichlet draws around both, smoothed vertices.
    The mean of several, for the one of the very largest Q is mostly that of the largest error.

    Attributes:
        domains: What it was trained on, in the order of its inputs.
        network: As `q_values` takes it.
        decisions: Blocks of the run, of equal length; best as many as the trajectories' phases.
        sequences: Of each domain's probe, in the first half of its held-out text.
        candidates: How many are drawn at each decision.
        top: How many of the best are averaged; 1 for the best alone.
        seed: Draws them.

    Source: derived.
    """

    name: ClassVar[str] = "agent"
    domains: tuple[str, ...]
    network: tuple[float, ...]
    decisions: int = 12
    sequences: int = 64
    candidates: int = 256
    top: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        ok = isinstance(self.domains, tuple) and len(set(self.domains)) == len(self.domains) > 1
        require(ok, "Agent.domains", self.domains, "a tuple of two domains or more")
        ok = isinstance(self.network, tuple) and all(is_number(x) for x in self.network)
        require(ok, "Agent.network", self.network, "a tuple of numbers")
        per_unit = network_size(len(self.domains), 1) - 1
        size = len(self.network)
        ok = size > 1 and size % per_unit == 1
        require(ok, "Length of Agent.network", size, f"a multiple of {per_unit}, and 1 more")
        for name in ("decisions", "sequences", "candidates", "top"):
            value = getattr(self, name)
            require(is_int(value) and value > 0, f"Agent.{name}", value, "an integer > 0")
        require(is_int(self.seed) and self.seed >= 0, "Agent.seed", self.seed, "an integer >= 0")

    def blocks(self, setting: Setting) -> Blocks:
        """Yield the weights of each of the run's parts.

        Raises:
            SpecError: The run has other domains, or fewer steps than decisions.
        """
        same = set(setting.domains) == set(self.domains)
        require(same, "Domains of a run with an agent", setting.domains, f"{self.domains}")
        enough = setting.steps >= self.decisions
        require(enough, "Agent.decisions", self.decisions, f"at most the {setting.steps} steps")
        place = [self.domains.index(domain) for domain in setting.domains]
        prior_K = np.empty(len(place))
        prior_K[place] = setting.prior_K
        network, rng = np.array(self.network), np.random.default_rng(self.seed)
        probes = tuple(Probe(target=d, sequences=self.sequences) for d in self.domains)
        signal = Losses(probes=probes)
        start_K = losses_K = yield Block(setting.prior_K, 0, signal)
        weights_K, read_K, step = prior_K, np.zeros_like(prior_K), 0
        for decision in range(1, self.decisions + 1):
            state_F = state_features(step / setting.steps, read_K / max(1, step), losses_K, start_K)
            actions_MK = self._actions(prior_K, weights_K, rng)
            best = np.argsort(-q_values(network, state_F, actions_MK), kind="stable")[: self.top]
            weights_K = actions_MK[best].mean(axis=0)
            steps = round(setting.steps * decision / self.decisions) - step
            after = signal if decision < self.decisions else None
            losses_K = yield Block(weights_K[place], steps, after)
            step, read_K = step + steps, read_K + steps * weights_K

    def _actions(
        self, prior_K: np.ndarray, current_K: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        num = len(prior_K)
        vertices = VERTEX_SHARE * np.eye(num) + (1.0 - VERTEX_SHARE) * prior_K
        drawn = [
            rng.dirichlet(strength * centre_K + 1e-3, size=-(-self.candidates // 4))
            for centre_K in (prior_K, current_K)
            for strength in STRENGTHS
        ]
        return np.vstack([prior_K, current_K, vertices, *drawn])

"""Training of the mixing agent: conservative Q-learning on recorded transitions.

Legend: N transitions, K domains, F features of a state, A sampled actions, H units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayx.recipe import is_int, is_number, require

DIGITS = 6  # significant, of the network: it is part of a spec


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """What followed what, in trajectories of any number of phases.

    Attributes:
        states_NF: Before the phase.
        actions_NK: Its mixture.
        rewards_N: What it gained.
        next_NF: The state after it.
        last_N: True where nothing follows.
    """

    states_NF: np.ndarray
    actions_NK: np.ndarray
    rewards_N: np.ndarray
    next_NF: np.ndarray
    last_N: np.ndarray


def train_agent(
    transitions: Transitions,
    *,
    units: int = 16,
    alpha: float = 0.3,
    steps: int = 1_500,
    lr: float = 5e-3,
    weight_decay: float = 1e-2,
    actions: int = 24,
    seed: int = 0,
) -> tuple[float, ...]:
    """Return the network that conservative Q-learning finds, as `rayx.policies.agent` reads it.

    min mean (Q(s, a) - r - max_a' Q_target(s', a'))^2
        + alpha mean (log mean_a' exp Q(s, a') - Q(s, a))

    a' are mixtures drawn uniformly, Q in standard deviations of the rewards; the target follows at
    a rate of .01. No discount: runs end. Full batches, Adam, inputs standardised.

    Args:
        transitions: N of them.
        units: H.
        alpha: How conservative, >= 0.
        steps: Of Adam.
        lr: Its rate, falling to 0 as a cosine.
        weight_decay: Decoupled.
        actions: A, for each state.
        seed: Draws the network and the actions.

    Returns:
        W (row by row), b, v, c: see `rayx.policies.agent.q_values`.

    Raises:
        SpecError: There is no transition, or a setting is out of range.

    Source: Kumar et al. 2020, arXiv:2006.04779, eq. 4 (CQL(H)).
    Differs: uniform actions alone stand for the integral over mixtures.
    """
    count = len(transitions.rewards_N)
    require(count > 0, "Transitions", count, "at least one")
    for name, value in (("units", units), ("steps", steps), ("actions", actions)):
        require(is_int(value) and value > 0, name, value, "an integer > 0")
    require(is_number(alpha) and alpha >= 0, "alpha", alpha, "a number >= 0")

    generator = torch.Generator().manual_seed(seed)
    states, chosen, reward, following = (
        torch.from_numpy(np.asarray(a, dtype=np.float64))
        for a in (
            transitions.states_NF,
            transitions.actions_NK,
            transitions.rewards_N,
            transitions.next_NF,
        )
    )
    goes_on = torch.from_numpy(~np.asarray(transitions.last_N, dtype=bool)).double()
    scale = float(reward.std(correction=0)) or 1.0
    data = torch.cat([states, chosen], dim=1)
    mean, spread = data.mean(dim=0), data.std(dim=0, correction=0)
    spread = torch.where(spread > 1e-9, spread, 1.0)  # of an input that is always the same
    inputs, features = data.shape[1], states.shape[1]

    def drawn(rows: int, columns: int, gain: float) -> Tensor:
        return gain * torch.randn(rows, columns, generator=generator, dtype=torch.float64)

    network = {
        "first": drawn(inputs, units, inputs**-0.5),
        "offset": torch.zeros(units, dtype=torch.float64),
        "second": drawn(units, 1, 0.1 * units**-0.5),
        "constant": torch.zeros(1, dtype=torch.float64),
    }
    target = {name: tensor.clone() for name, tensor in network.items()}
    for tensor in network.values():
        tensor.requires_grad_()

    def q(of: dict[str, Tensor], state_NF: Tensor, action_NAK: Tensor) -> Tensor:
        state_NH = (state_NF - mean[:features]) / spread[:features] @ of["first"][:features]
        action = (action_NAK - mean[features:]) / spread[features:] @ of["first"][features:]
        hidden = torch.tanh((state_NH + of["offset"])[:, None] + action)
        return (hidden @ of["second"]).squeeze(-1) + of["constant"]

    optimizer = torch.optim.AdamW(network.values(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        # Uniform over the simplex: exponentials over their sum.
        draws = torch.empty(count, actions, chosen.shape[1], dtype=torch.float64)
        draws = draws.exponential_(generator=generator)
        others = draws / draws.sum(dim=-1, keepdim=True)
        with torch.no_grad():
            goal = reward / scale + goes_on * q(target, following, others).amax(dim=1)
        taken = q(network, states, chosen[:, None])[:, 0]
        loss = (taken - goal).square().mean()
        if alpha:
            above = torch.logsumexp(q(network, states, others), dim=1) - math.log(actions)
            loss = loss + alpha * (above - taken).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, tensor in network.items():
                target[name].lerp_(tensor, 0.01)

    with torch.no_grad():  # back to inputs and rewards in their own units
        first = network["first"] / spread[:, None]
        offset = network["offset"] - (mean / spread) @ network["first"]
        parts = (first, offset, scale * network["second"], scale * network["constant"])
        return tuple(float(f"{x:.{DIGITS}g}") for part in parts for x in part.flatten().tolist())

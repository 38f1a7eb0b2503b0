"""Training of the mixing agent: conservative Q-learning on recorded transitions.

Legend: N transitions, K domains, F features of a state, E members, A sampled actions, H units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayx.recipe import is_int, is_number, require

DIGITS = 6  # significant, of the network: it is part of a spec
TARGET_RATE = 0.05  # at which the target follows


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
    members: int = 4,
    units: int = 8,
    alpha: float = 0.5,
    steps: int = 500,
    lr: float = 5e-3,
    weight_decay: float = 1.0,
    actions: int = 16,
    seed: int = 0,
) -> tuple[float, ...]:
    """Return the network that conservative Q-learning finds, as `rayx.policies.agent` reads it.

    Q is the mean of a few small networks, which is one network; each member minimises

        mean (Q(s, a) - r - max_a' Q_target(s', a'))^2
            + alpha mean (log mean_a' exp Q(s, a') - Q(s, a))

    a' are mixtures drawn uniformly, Q is in standard deviations of the rewards, and Q_target, the
    members' mean, follows slowly. No discount: runs end. Full batches, inputs standardised.

    Args:
        transitions: N of them.
        members: E; they differ in how they begin.
        units: H, of each member.
        alpha: How conservative, >= 0.
        steps: Of AdamW.
        lr: Its rate, falling to 0 as a cosine.
        weight_decay: Decoupled; transitions are few.
        actions: A, for each state.
        seed: Draws the networks and the actions.

    Returns:
        W (row by row), b, v, c: see `rayx.policies.agent.q_values`.

    Raises:
        SpecError: There is no transition, or a setting is out of range.

    Source: Kumar et al. 2020, arXiv:2006.04779, eq. 4 (CQL(H)).
    Differs: uniform actions alone stand for the integral over mixtures; the mean of members.
    """
    count = len(transitions.rewards_N)
    require(count > 0, "Transitions", count, "at least one")
    sizes = {"members": members, "units": units, "steps": steps, "actions": actions}
    for name, value in sizes.items():
        require(is_int(value) and value > 0, name, value, "an integer > 0")
    require(is_number(alpha) and alpha >= 0, "alpha", alpha, "a number >= 0")

    states, chosen, reward, following = (
        torch.from_numpy(np.asarray(a, dtype=np.float64))
        for a in (
            transitions.states_NF,
            np.sqrt(transitions.actions_NK),
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
    generator = torch.Generator().manual_seed(seed)

    def drawn(gain: float, *size: int) -> Tensor:
        return gain * torch.randn(size, generator=generator, dtype=torch.float64)

    network = {
        "first": drawn(inputs**-0.5, members, inputs, units),
        "offset": drawn(0.0, members, 1, 1, units),
        "second": drawn(0.1 * units**-0.5, members, 1, units, 1),
        "constant": drawn(0.0, members, 1, 1),
    }
    target = {name: tensor.clone() for name, tensor in network.items()}
    for tensor in network.values():
        tensor.requires_grad_()

    def q(of: dict[str, Tensor], state_NF: Tensor, roots_NAK: Tensor) -> Tensor:
        """Q of each member, shape (E, N, A); actions come as square roots."""
        state = (state_NF - mean[:features]) / spread[:features] @ of["first"][:, :features]
        rows = ((roots_NAK - mean[features:]) / spread[features:]).flatten(0, 1)
        action = (rows @ of["first"][:, features:]).unflatten(1, roots_NAK.shape[:2])
        hidden = torch.tanh(state[:, :, None] + action + of["offset"])
        return (hidden @ of["second"]).squeeze(-1) + of["constant"]

    optimizer = torch.optim.AdamW(network.values(), lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
        # Uniform over the simplex: exponentials over their sum.
        draws = torch.empty(count, actions, chosen.shape[1], dtype=torch.float64)
        draws = draws.exponential_(generator=generator)
        others = (draws / draws.sum(dim=-1, keepdim=True)).sqrt()
        with torch.no_grad():
            best = q(target, following, others).mean(dim=0).amax(dim=1)
            goal = reward / scale + goes_on * best
        taken = q(network, states, chosen[:, None])[:, :, 0]
        losses = (taken - goal).square()
        if alpha:
            above = torch.logsumexp(q(network, states, others), dim=2) - math.log(actions)
            losses = losses + alpha * (above - taken)
        optimizer.zero_grad()
        losses.mean(dim=1).sum().backward()
        optimizer.step()
        with torch.no_grad():
            for name, tensor in network.items():
                target[name].lerp_(tensor, TARGET_RATE)

    with torch.no_grad():  # one network, of inputs and rewards in their own units
        first = torch.cat([*network["first"]], dim=1)
        offset = network["offset"].flatten() - (mean / spread) @ first
        second, constant = scale * network["second"] / members, scale * network["constant"].mean()
        parts = (first / spread[:, None], offset, second, constant)
        return tuple(float(f"{x:.{DIGITS}g}") for part in parts for x in part.flatten().tolist())

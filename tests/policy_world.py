"""Worlds in numpy whose mixing law is known, and an example of every policy to steer them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from rayx.mixture import Mixture, Schedule
from rayx.policies.agent import Agent, network_size
from rayx.policies.aioli import Aioli
from rayx.policies.dga import DGA
from rayx.policies.doge import DoGE
from rayx.policies.doremi import DoReMi
from rayx.policies.rb import RB
from rayx.policies.scalarised import Scalarised
from rayx.policies.skill_it import SkillIt
from rayx.policies.tikmix import InfluenceSurvey, TiKMiXD
from rayx.policy import (
    Drops,
    Excess,
    Gradients,
    Influence,
    Losses,
    Probe,
)
from rayx.spec import Parent, TrainSpec
from rayx.steering import Steering
from tests.samples import train_spec

DOMAINS = ("a", "b", "c", "d")
STEPS = 1_000


class World:
    """Losses that fall by rate * A p each step: A_ij = <v_i, g_j>, v of targets, g of domains.

    Args:
        target_KF: v, shape (K, F).
        source_KF: g, shape (K, F).
        noise: Standard deviation of what is measured, as a share of its own size.
        seed: Of the noise.
    """

    def __init__(
        self, target_KF: np.ndarray, source_KF: np.ndarray, noise: float = 0.0, seed: int = 0
    ) -> None:
        self.target_KF, self.source_KF, self.noise = target_KF, source_KF, noise
        self.loss_K = np.linspace(3.0, 4.0, len(target_KF))
        self.reference_K = np.linspace(3.0, 3.5, len(target_KF))
        self.rate = 1e-4
        self.rng = np.random.default_rng(seed)

    @property
    def law_KK(self) -> np.ndarray:
        return self.target_KF @ self.source_KF.T

    def train(self, weights_K: np.ndarray, steps: int) -> None:
        self.loss_K = self.loss_K - steps * self.rate * (self.law_KK @ weights_K)

    def _noisy(self, values: np.ndarray, scale: float) -> np.ndarray:
        return values + self.noise * scale * self.rng.standard_normal(values.shape)

    def measure(self, signal: Any, domains: tuple[str, ...]) -> np.ndarray | None:
        if signal is None:
            return None
        probes = [domains.index(probe.target) for probe in getattr(signal, "probes", ())]
        if isinstance(signal, Losses):  # noise as against the fall in ten steps
            return self._noisy(self.loss_K[probes], 10 * self.rate * self.law_KK.std())
        mixtures_SK = np.array([source.to_array(domains) for source in signal.sources])
        if isinstance(signal, Excess):
            return np.maximum(0.0, mixtures_SK @ (self.loss_K - self.reference_K))
        source_SF, target_PF = mixtures_SK @ self.source_KF, self.target_KF[probes]
        if isinstance(signal, Gradients):
            all_NF = np.concatenate([source_SF, target_PF])
            all_NF = self._noisy(all_NF, all_NF.std() / np.sqrt(all_NF.shape[1]))
            return all_NF @ all_NF.T
        law_PS = self._noisy(target_PF @ source_SF.T, self.law_KK.std())
        if isinstance(signal, Drops):
            return law_PS * signal.steps * self.rate
        assert isinstance(signal, Influence)
        return law_PS


def planted(seed: int, noise: float = 0.0) -> World:
    """A law with structure: every domain lowers its own loss most, and others by chance."""
    rng = np.random.default_rng(seed)
    shared_F = rng.standard_normal(8)
    source_KF = rng.standard_normal((len(DOMAINS), 8)) + shared_F
    return World(source_KF + 0.5 * rng.standard_normal(source_KF.shape), source_KF, noise, seed)


def one_best(best: int) -> World:
    """A law in which text of one domain lowers all losses most."""
    share_K = np.where(np.arange(len(DOMAINS)) == best, 2.0, 0.5)
    return World(np.ones((len(DOMAINS), 3)), np.outer(share_K, np.ones(3)))


def spec_of(policy: Any, prior: Mapping[str, float] | None = None) -> TrainSpec:
    prior = prior or dict.fromkeys(DOMAINS, 1.0)
    return train_spec(schedule=Schedule.constant(Mixture(prior), STEPS * 512), policy=policy)


def steer(policy: Any, world: World, prior: Mapping[str, float] | None = None) -> Steering:
    """Run a policy in a world as the training loop does, and return its decisions."""
    spec = spec_of(policy, prior)
    steering, step = Steering(spec), 0
    while True:
        end = min(steering.end, spec.steps)
        weights_K = steering.mixture(min(step, spec.steps - 1)).to_array(DOMAINS)
        world.train(weights_K, end - step)
        step = end
        if not steering.ends(step):
            return steering
        steering.go_on(step, world.measure(steering.signal, DOMAINS))


def weights(steering: Steering) -> np.ndarray:
    """All mixtures that were set, shape (S, K)."""
    return np.array([[d.weights.get(k, 0.0) for k in DOMAINS] for d in steering.decisions])


REFERENCE = Parent(train_spec(schedule=Schedule.constant(Mixture.uniform(DOMAINS), 51_200)), 100)
EXAMPLES = {
    "aioli": Aioli(rounds=5, eta=2.0),
    "doge": DoGE(),
    "doremi": DoReMi(reference=REFERENCE, smoothing=0.1),
    "rb": RB(sharpness=4.0, floor=0.2),
    "skill-it": SkillIt(start_share=0.05),
}
MINE = sorted(EXAMPLES)
NETWORK = tuple(np.random.default_rng(0).standard_normal(network_size(len(DOMAINS), 3)).tolist())
EVERY = EXAMPLES | {
    "agent": Agent(domains=DOMAINS, network=NETWORK),
    "dga": DGA(specific=(Probe(target="b"),), floor=0.01),
    "influence-survey": InfluenceSurvey(),
    "scalarised": Scalarised(),
    "tikmix-d": TiKMiXD(),
}

"""Aioli: learns how each domain's text lowers each loss, again and again while the run goes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.policies.mirror import ascend, blend, check, floored, tells_apart
from rayx.policy import PARTS, Block, Blocks, Losses, Setting
from rayx.recipe import is_int, require


@dataclass(frozen=True, slots=True, kw_only=True)
class Aioli:
    """Mirror ascent on a linear dynamic mixing law: L_i' = L_i - sum_j A_ij p_j.

    Each round trains on every smoothed one-hot mixture in turn, in a random order, and measures how
    far each loss falls; that gives A. Then p_j <- p_j exp(eta sum_i A_ij) / sum for the rest of the
    round, A brought to entries >= 0 and sum 1. All steps count in the run's budget.

    Attributes:
        eta: Of one round.
        rounds: Of the run, of equal length.
        learn_share: Share of a round for learning A.
        learn_rounds: Random orders of the domains in a round, averaged.
        one_hot: Weight of its domain in a smoothed one-hot, in (1 / K, 1].
        ema: Share of the former rounds in A, in [0, 1).
        cumulative: False for p = prior_j exp(eta sum_i A_ij) / sum, as the released code with ema.
        part: Of the probes.
        sequences: Of each probe.
        floor: Least weight of p, as a share of the uniform one.
        seed: Draws the orders.

    Source: Chen et al. 2024, arXiv:2411.05735, algorithm 1 and LearnParams; released code.
    Differs: a share of the round for learning in place of fixed steps; the released code counts
        learning steps as sequences and so trains too long on p.
    """

    name: ClassVar[str] = "aioli"
    eta: float = 1.0
    rounds: int = 8
    learn_share: float = 0.3
    learn_rounds: int = 2
    one_hot: float = 0.75
    ema: float = 0.1
    cumulative: bool = True
    part: str = "first"
    sequences: int = 16
    floor: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("rounds", "learn_rounds", "sequences")
        positive, shares = ("eta", "learn_share", "one_hot"), ("learn_share", "one_hot", "floor")
        check(self, counts=counts, positive=positive, shares=(*shares, "ema"))
        require(self.ema < 1, "Aioli.ema", self.ema, "a share < 1")
        require(self.part in PARTS, "Aioli.part", self.part, f"one of {', '.join(PARTS)}")
        ok = isinstance(self.cumulative, bool)
        require(ok, "Aioli.cumulative", self.cumulative, "True or False")
        ok = is_int(self.seed) and self.seed >= 0
        require(ok, "Aioli.seed", self.seed, "an integer >= 0")

    def blocks(self, setting: Setting) -> Blocks:
        """Yield `rounds` times: one block a smoothed one-hot, then one on the weights."""
        num, steps = len(setting.domains), setting.steps // self.rounds
        turns = num * self.learn_rounds
        learn_steps = int(self.learn_share * steps / turns)
        expected = f"{int(np.ceil(turns / self.learn_share))} or more, for {turns} turns of a step"
        require(learn_steps > 0, "Steps of a round of Aioli", steps, expected)
        mixtures_KK = smoothed_one_hots(num, self.one_hot)
        signal = Losses(probes=setting.probes(self.part, self.sequences))
        rng = np.random.default_rng(self.seed)
        weights_K, law_KK, rest = setting.prior_K, None, 0
        for number in range(self.rounds):
            before_K = yield Block(weights_K, rest, signal)
            drop_KK = np.zeros((num, num))
            orders = [rng.permutation(num) for _ in range(self.learn_rounds)]
            for domain in np.concatenate(orders):
                after_K = yield Block(mixtures_KK[domain], learn_steps, signal)
                drop_KK[:, domain] += (before_K - after_K) / self.learn_rounds
                before_K = after_K
            new_KK = normalised(law(drop_KK, mixtures_KK))
            law_KK = new_KK if law_KK is None else blend(new_KK, law_KK, self.ema)
            score_K = law_KK.sum(axis=0)
            if tells_apart(score_K, self.name, number * steps + turns * learn_steps):
                base_K = weights_K if self.cumulative else setting.prior_K
                weights_K = floored(ascend(base_K, score_K, self.eta), self.floor)
            rest = steps - turns * learn_steps
        yield Block(weights_K, setting.steps)


def smoothed_one_hots(num_domains: int, one_hot: float) -> np.ndarray:
    """Return W, row j with weight one_hot on domain j and the rest spread evenly, shape (K, K).

    Raises:
        SpecError: one_hot is not above 1 / K, so that the rows do not tell domains apart.
    """
    ok = 1.0 / num_domains < one_hot <= 1.0
    require(ok, "Aioli.one_hot", one_hot, f"a weight in (1 / {num_domains}, 1]")
    others = (1.0 - one_hot) / (num_domains - 1)
    return np.full((num_domains, num_domains), others) + (one_hot - others) * np.eye(num_domains)


def law(drop_KK: np.ndarray, mixtures_KK: np.ndarray) -> np.ndarray:
    """Return A of sum_j W_kj A_ij = drop_ik: fall of loss i on domain j alone, shape (K, K).

    Args:
        drop_KK: Fall of loss i on mixture k, nats per token.
        mixtures_KK: W, mixture k a row, invertible.
    """
    return np.linalg.solve(mixtures_KK, drop_KK.T).T


def normalised(law_KK: np.ndarray) -> np.ndarray:
    """Return A with its smallest entry at 0 if that is negative, and sum 1 (or all 0)."""
    shifted_KK = law_KK - min(0.0, law_KK.min())
    total = shifted_KK.sum()
    return shifted_KK / total if total > 0 else shifted_KK

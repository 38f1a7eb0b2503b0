"""BOOM: bags of one corpus, trained apart and averaged; new data merged into what there is.

Bagging: copies of one base are trained on samples of the data and their weights averaged.
Incremental: for data that arrive, one expert is trained on them and a little of what came before,
and merged into the current model as a running average, so that old data are hardly read again. A
running average is an average of all experts so far, with weights that its rates multiply out to:
the current model after each arrival is a merged candidate like any other.

Source: derived from the abstract of BOOM, 2026, arXiv:2602.05787 (bags trained on sampled subsets
    and merged; new data with a small sample of the history, merged into the current model).
Differs: the body was not read. Bags are samples of sequences (another data_seed), with `draws` also
    of domains; experts branch from the base, not from the current model; rates are 1 / t.

Shapes: B bags, K domains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayx.branching import make_branch
from rayx.merging import Experts, MergeSpec
from rayx.methods.merge_proxy import MergeProxy
from rayx.mixture import Mixture, Phase
from rayx.spec import TrainSpec, require


def running_weights(rates: Sequence[float]) -> tuple[float, ...]:
    """Return the weights that updates theta_t = (1 - r_t) theta_{t-1} + r_t e_t come to.

    w_k = r_k prod_{j > k} (1 - r_j); rates 1 / t give 1 / n each.

    Args:
        rates: r_1 ... r_n, in [0, 1]; r_1 is 1, for before it there is nothing.

    Raises:
        SpecError: A rate out of range, or the first is not 1.
    """
    for rate in rates:
        require(0 <= rate <= 1, "A rate of a running average", rate, "a number in [0, 1]")
    require(len(rates) > 0 and rates[0] == 1, "The first rate of a running average",
            rates[0] if len(rates) else None, "1")  # fmt: skip
    kept = np.cumprod([1.0, *(1.0 - np.array(rates[:0:-1]))])[::-1]  # prod_{j > k} (1 - r_j)
    return tuple(float(rate * share) for rate, share in zip(rates, kept, strict=True))


def bootstrap_mixtures(mixture: Mixture, bags: int, draws: int, seed: int) -> list[Mixture]:
    """Return a mixture a bag: `draws` domains drawn with replacement, by their weight.

    Raises:
        SpecError: bags or draws is not positive.
    """
    require(bags > 0 and draws > 0, "bags and draws", (bags, draws), "both > 0")
    domains = list(mixture)
    counts_BK = np.random.default_rng(seed).multinomial(draws, mixture.to_array(domains), size=bags)
    return [Mixture.from_array(counts_K, domains) for counts_K in counts_BK]


@dataclass(frozen=True, kw_only=True)
class Bagging:
    """Bags of one mixture, from one base.

    Args:
        proxy: The base (its trunk) and the tokens of a bag (its branch_tokens).
        mixture: The data.
        bags: How many.
        draws: Domains drawn with replacement for each bag; 0: every bag has the mixture itself, and
            only its sequences are another sample.
    """

    proxy: MergeProxy
    mixture: Mixture
    bags: int
    draws: int = 0

    def specs(self) -> list[TrainSpec]:
        """Return the bags; each reads its domains in an order of its own."""
        mixtures = [self.mixture] * self.bags
        first = self.proxy.template.data_seed
        if self.draws:
            mixtures = bootstrap_mixtures(self.mixture, self.bags, self.draws, first)
        return [
            dataclasses.replace(self.proxy.branch(mixture), data_seed=first + 1 + bag)
            for bag, mixture in enumerate(mixtures)
        ]

    def merged(self) -> MergeSpec:
        """Return the average of the bags."""
        return Experts.of(self.specs()).merge([1.0 / self.bags] * self.bags)

    def single(self) -> TrainSpec:
        """Return one run on the mixture with the tokens of all bags."""
        return self.proxy.branch(self.mixture, self.bags * self.proxy.branch_tokens)


@dataclass(frozen=True, kw_only=True)
class Incremental:
    """Data that arrive domain by domain, after a base on the first of them.

    Args:
        proxy: The base (its trunk, on the domains that were there first, in the proportions of its
            `general`) and the tokens of an arrival (its branch_tokens).
        arrivals: Domains in the order in which they come.
        history_share: Share of an expert's tokens that is a sample of what came before, in [0, 1).
    """

    proxy: MergeProxy
    arrivals: tuple[str, ...]
    history_share: float

    def __post_init__(self) -> None:
        again = sorted({*self.arrivals} & {*self.proxy.general})
        require(bool(self.arrivals) and not again, "Incremental.arrivals", self.arrivals,
                f"some that the base has not seen ({', '.join(self.proxy.general)})")  # fmt: skip
        require(0 <= self.history_share < 1, "Incremental.history_share", self.history_share,
                "a share in [0, 1)")  # fmt: skip

    def known(self, arrived: int) -> Mixture:
        """Return the data after so many arrivals: the base's domains and the new ones, equally."""
        return Mixture.uniform([*self.proxy.general, *self.arrivals[:arrived]])

    def mixture(self, arrival: int, history_share: float | None = None) -> Mixture:
        """Return what the expert of an arrival (1, 2, ...) reads: the new, and some history."""
        share = self.history_share if history_share is None else history_share
        old = self.known(arrival - 1)
        return Mixture(
            {self.arrivals[arrival - 1]: 1.0 - share, **{d: share * w for d, w in old.items()}}
        )

    def experts(self) -> list[TrainSpec]:
        """Return an expert for the base's own data and one for each arrival."""
        mixtures = [self.known(0), *(self.mixture(t + 1) for t in range(len(self.arrivals)))]
        return [self.proxy.branch(mixture) for mixture in mixtures]

    def current(self, arrived: int) -> MergeSpec:
        """Return the model after so many arrivals, the running average with rates 1 / t."""
        weights = running_weights([1.0 / t for t in range(1, arrived + 2)])
        return Experts.of(self.experts()[: arrived + 1]).merge(weights)

    def continued(self, arrived: int, history_share: float | None = None) -> TrainSpec:
        """Return the run that reads what the experts read one after another, without merging."""
        mixtures = [self.known(0)]
        mixtures += [self.mixture(t + 1, history_share) for t in range(arrived)]
        proxy, tokens = self.proxy, self.proxy.branch_tokens
        phases = tuple(Phase(mixture, tokens) for mixture in mixtures)
        # The rate falls when an expert's would: over the last arrival, not before it.
        decay = proxy.decay_share * tokens / (proxy.trunk_tokens + len(phases) * tokens)
        return make_branch(proxy.trunk, proxy.trunk_tokens, phases, decay)

    def again(self, arrived: int) -> TrainSpec:
        """Return the run of as many tokens over all data at once, old and new equally."""
        return self.proxy.branch(self.known(arrived), (arrived + 1) * self.proxy.branch_tokens)

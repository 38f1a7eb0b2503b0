"""Data ablations by averages: what would a model be that was trained on this subset of the data?

The data are parts of equal size, the units. One expert a unit is trained from a common trunk; the
model of any subset of units is then approximated by an average of experts, which costs an
evaluation: n runs in place of 2^n. Whether that may be believed is measured: `Ablation.table` puts
the averages beside runs that were really trained on the subsets, `ablation_scores` compares them.

Source: Na et al. 2024, arXiv:2410.15661 (micro and macro averages of modular units, perplexity of
    averages against perplexity of a run on the union).
Differs: units are domains, for a part of a domain is no unit of rayx; two runs stand for a subset,
    of as many tokens as one unit ("fixed") and of as many as its units together ("union", the
    paper's); the mean and the best of the units' own perplexities stand beside the averages.

Shapes: K units.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rayx.errors import SpecError
from rayx.merging import Experts, MergeSpec, Spec
from rayx.methods.merge_proxy import MergeProxy, cost_tokens
from rayx.mixture import Mixture
from rayx.spec import TrainSpec, require
from rayx.store import Store

Subset = tuple[str, ...]

TRUTHS = ("fixed", "union")  # tokens of the trained run: those of one unit, or of all its units
AVERAGES = ("micro", "macro")
# The last two are of the units' own perplexities, nothing merged: geometric mean, and the least.
APPROXIMATIONS = (*AVERAGES, "mean_of_units", "best_unit")


def micro_weights(subset: Subset, units: Sequence[str]) -> tuple[float, ...]:
    """Return the weights of the uniform average: w_k = [k in S] / |S|.

    Args:
        subset: S, units.
        units: All K units, in the order of the weights.
    """
    return tuple(float(unit in subset) / len(subset) for unit in units)


def macro_weights(
    subset: Subset, units: Sequence[str], groups: Sequence[Subset]
) -> tuple[float, ...]:
    """Return the weights of the average of group averages, multiplied out.

    w_k = [k in S] / (G |S and g(k)|), g(k) the group of unit k and G the number of groups that S
    meets. Equal to `micro_weights` where S has equally many units of each group that it meets.

    Args:
        subset: S, units.
        units: All K units, in the order of the weights.
        groups: Groups of units; each unit is in one.
    """
    met = [set(group) & set(subset) for group in groups if set(group) & set(subset)]
    return tuple(sum((unit in part) / (len(met) * len(part)) for part in met) for unit in units)


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """One expert a unit, averages of experts, and trained runs to compare with.

    Args:
        proxy: The trunk, a unit a domain of it, and the tokens of a unit (its branch_tokens).
        groups: Groups of units for macro averages; each unit is in one.
        general_share: Share of the trunk's mixture in what every expert and every trained subset
            reads, in [0, 1); 0 is the paper's.
    """

    proxy: MergeProxy
    groups: tuple[Subset, ...]
    general_share: float = 0.0

    def __post_init__(self) -> None:
        grouped = sorted(itertools.chain(*self.groups))
        require(grouped == sorted(self.units), "The units in Ablation.groups", grouped,
                f"each of {', '.join(self.units)} once")  # fmt: skip

    @property
    def units(self) -> tuple[str, ...]:
        """The units, in the order of merge weights."""
        return self.proxy.domains

    @functools.cached_property
    def experts(self) -> Experts:
        """The experts, one a unit."""
        return self.proxy.experts(self.general_share)

    def subsets(self, num: int | None = None, seed: int = 0) -> list[Subset]:
        """Return all subsets of two units and more, or `num` of them drawn without repetition."""
        sizes = range(2, len(self.units) + 1)
        every = [s for size in sizes for s in itertools.combinations(self.units, size)]
        if num is None or num >= len(every):
            return every
        drawn = np.random.default_rng(seed).choice(len(every), size=num, replace=False)
        return [every[i] for i in sorted(drawn)]

    def average(self, subset: Subset, how: str) -> MergeSpec:
        """Return the average that stands for a subset, `micro` or `macro`.

        Raises:
            SpecError: Another kind of average, or a unit that there is not.
        """
        self._check(subset)
        if how == "micro":
            return self.experts.merge(micro_weights(subset, self.units))
        if how == "macro":
            return self.experts.merge(macro_weights(subset, self.units, self.groups))
        raise SpecError(f"Average {how!r} is unknown; expected one of {', '.join(AVERAGES)}.")

    def trained(self, subset: Subset, truth: str) -> TrainSpec:
        """Return the run on the union of a subset's units, `fixed` or `union` in its tokens.

        Raises:
            SpecError: Another truth, or a unit that there is not.
        """
        if truth not in TRUTHS:
            raise SpecError(f"Truth {truth!r} is unknown; expected one of {', '.join(TRUTHS)}.")
        self._check(subset)
        mixture = self.proxy.component(Mixture.uniform(subset), self.general_share)
        units = len(subset) if truth == "union" else 1
        return self.proxy.branch(mixture, units * self.proxy.branch_tokens)

    def _check(self, subset: Subset) -> None:
        known = [unit for unit in self.units if unit in subset]
        require(len(subset) > 0 and sorted(known) == sorted(subset), "A subset", subset,
                f"some of {', '.join(self.units)}, each once")  # fmt: skip

    def averages(self, subsets: Sequence[Subset]) -> list[Spec]:
        """Return the experts and both averages of every subset, each once."""
        specs: list[Spec] = [member.spec for member in self.experts.members]
        specs += [self.average(subset, how) for subset in subsets for how in AVERAGES]
        return list({spec.run_id: spec for spec in specs}.values())

    def table(
        self, store: Store, subsets: Sequence[Subset], truths: Sequence[str] = TRUTHS
    ) -> pd.DataFrame:
        """Return a row for each subset, target and truth; perplexities are exp(nats per token).

        Columns: seed, truth, subset (units joined by +), size (its units), target, side (`inside`
        where the target is one of its units, else `outside`), trained, and APPROXIMATIONS.

        Raises:
            SpecError: A run failed.
            StoreError: A run has no record.
        """
        experts = zip(self.units, self.experts.members, strict=True)
        of_unit = {unit: perplexities(store, expert.spec) for unit, expert in experts}
        rows = []
        for subset in subsets:
            of_average = [perplexities(store, self.average(subset, how)) for how in AVERAGES]
            for truth in truths:
                for target, trained in perplexities(store, self.trained(subset, truth)).items():
                    units = [of_unit[unit][target] for unit in subset]
                    found = [trained, *(average[target] for average in of_average)]
                    side = "inside" if target in subset else "outside"
                    rows.append(
                        (self.proxy.template.seed, truth, "+".join(subset), len(subset), target)
                        + (side, *found, float(np.exp(np.log(units).mean())), min(units))
                    )
        names = ["seed", "truth", "subset", "size", "target", "side", "trained", *APPROXIMATIONS]
        return pd.DataFrame(rows, columns=names)

    def costs(self, store: Store, subsets: Sequence[Subset], truth: str) -> dict[str, float]:
        """Return tokens of training beyond the trunk: of `averages`, evaluated, and of `trained`.

        `all_units` and `all_trained` are those of all 2^K - 1 subsets: K tokens(unit) for the
        averages, (2^K - 1) tokens(unit) for runs of fixed tokens, K 2^(K - 1) for their union.
        """
        count, tokens = len(self.units), float(self.proxy.branch_tokens)
        units = count * 2 ** (count - 1) if truth == "union" else 2**count - 1
        return {
            "averages": cost_tokens(store, self.averages(subsets)),
            "trained": cost_tokens(store, [self.trained(s, truth) for s in subsets]),
            "all_units": count * tokens,
            "all_trained": units * tokens,
        }


def perplexities(store: Store, spec: Spec) -> dict[str, float]:
    """Return target -> exp(nats per token) of a run on record."""
    losses = store.get(spec.run_id).losses
    require(bool(losses), f"The status of run {spec.run_id}", "failed",
            "ok; run again with --retry-failed")  # fmt: skip
    return {target: float(np.exp(loss.nats)) for target, loss in losses.items()}

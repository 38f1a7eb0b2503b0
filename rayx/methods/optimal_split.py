"""Optimal splitting: when should one general model become one expert a domain?

Trunks on the general mixture at several sizes, branches of one domain each at several trunk and
branch lengths, a law of the loss in (params, trunk tokens, branch tokens) fitted to them, and from
it the split of a larger model and budget; then the choice is trained beside no split and beside
fixed splits.

Source: Seto et al. 2026, arXiv:2603.19149 (abstract and captions: pretrain once, specialise K
    copies, a scaling law in model size, pretraining tokens D and specialisation tokens D').
Differs: the body of the paper was not read: the forms of the law, the decay of every run over its
    last tokens (WSD) and the solution of the split equation are ours (see rayx/split.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rayx.branching import make_branch, make_trunk
from rayx.corpus import Corpus
from rayx.errors import FitError
from rayx.mixture import Mixture, Phase
from rayx.spec import TrainSpec
from rayx.store import Store

Point = tuple[int, int]  # trunk tokens D, branch tokens D'


@dataclass(frozen=True, kw_only=True)
class OptimalSplit:
    """A study: what to train, and the final run that the answer is for.

    Args:
        corpus: The corpus.
        scales: Templates of the runs that the law is fitted on, one a model size.
        points: (trunk tokens, branch tokens) of each size; 0 branch tokens is no split.
        general: Mixture of the trunk.
        domains: One expert each.
        decay_share: Share of every run's tokens, trunk included, over which the rate falls.
    """

    corpus: Corpus
    scales: tuple[TrainSpec, ...]
    points: tuple[Point, ...]
    general: Mixture
    domains: tuple[str, ...]
    decay_share: float = 0.2

    def experts(self, template: TrainSpec, point: Point, longest: int) -> dict[str, TrainSpec]:
        """Return domain -> the run that gives its loss: its expert, or the model without a split.

        Args:
            template: Model, optimizer and seeds.
            point: Trunk tokens and branch tokens.
            longest: Tokens of the trunk, the same for all points of a template.
        """
        trunk_tokens, branch_tokens = point
        trunk = make_trunk(template, self.general, longest)
        if branch_tokens == 0:
            whole = make_branch(trunk, trunk_tokens, (), self.decay_share)
            return dict.fromkeys(self.domains, whole)
        return {
            domain: make_branch(
                trunk,
                trunk_tokens,
                (Phase(Mixture({domain: 1}), branch_tokens),),
                self.decay_share,
            )
            for domain in self.domains
        }

    def arms(
        self, template: TrainSpec, points: Sequence[Point]
    ) -> dict[Point, dict[str, TrainSpec]]:
        """Return point -> experts; all points share the template's trunk."""
        longest = max(trunk_tokens for trunk_tokens, _ in points)
        return {point: self.experts(template, point, longest) for point in points}

    def specs(self) -> list[TrainSpec]:
        """Return the runs of the fit, each once, small models first."""
        runs = [
            spec
            for template in self.scales
            for experts in self.arms(template, self.points).values()
            for spec in experts.values()
        ]
        return list({spec.run_id: spec for spec in runs}.values())

    def table(
        self, store: Store, templates: Sequence[TrainSpec], points: Sequence[Point]
    ) -> pd.DataFrame:
        """Return one row per template and point: the mean over domains of the expert's own loss.

        Columns: params, tokens (of the trunk), spec_tokens (of a branch), loss (bits per byte),
        seed, and loss/<domain>. Points of which a run is missing or failed are left out.
        """
        rows = []
        for template in templates:
            for (trunk_tokens, branch_tokens), experts in self.arms(template, points).items():
                losses = own_losses(store, experts)
                if losses is not None:
                    rows.append(
                        {
                            "params": template.model.params,
                            "tokens": trunk_tokens,
                            "spec_tokens": branch_tokens,
                            "loss": float(np.mean(list(losses.values()))),
                            "seed": template.seed,
                            **{f"loss/{domain}": loss for domain, loss in losses.items()},
                        }
                    )
        if not rows:
            raise FitError("No point of the grid has all its runs; look at `rayx status`.")
        return pd.DataFrame(rows)


def own_losses(store: Store, experts: Mapping[str, TrainSpec]) -> dict[str, float] | None:
    """Return domain -> bits per byte of its expert on it; None where a run has no losses."""
    records = {r.run_id: r for r in store.records({s.run_id for s in experts.values()})}
    losses = {}
    for domain, spec in experts.items():
        record = records.get(spec.run_id)
        if record is None or record.status != "ok":
            return None
        losses[domain] = record.losses[domain].bpb
    return losses

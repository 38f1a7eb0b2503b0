"""Continued pretraining: which share of the tokens should the new domain have, and which replay?

Branches of small general models at several domain ratios give curves; the D-CPT law of the general
and of the domain's loss is fitted to them and says, for a larger model and more tokens, the ratio
that gains the domain most while the general loss keeps a limit (usage 1), and the ratio for a
domain of few tokens (usage 2). `cpt_verify` measures what is said.

Source: Que et al. 2024, arXiv:2406.01375 (D-CPT law, usages 1 and 2).
Differs: branches go on at the trunk's constant rate, so that one run gives every length and no
    change of loss is a decay's; the budget of usage 2 is bounded.

Shapes: R rows of curves, M ratios asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rayx.branching import make_trunk
from rayx.corpus import Corpus
from rayx.fit.laws import DCPT, ratio_of_limited_data, ratio_within_tolerance
from rayx.mixture import Mixture, Schedule
from rayx.spec import Parent, TrainSpec
from rayx.store import Store

LOSSES = ("domain_loss", "general_loss")


@dataclass(frozen=True, kw_only=True)
class CptRatio:
    """Continued pretraining of one domain on one corpus.

    Args:
        corpus: The corpus.
        domain: What pretraining is continued for; the other domains, equally, are general.
        trunk_tokens: Tokens of a general model before.
        point_tokens: Tokens between evaluations of a branch.
    """

    corpus: Corpus
    domain: str
    trunk_tokens: int
    point_tokens: int

    def mixture(self, ratio: float) -> Mixture:
        """Return the mixture with the domain at `ratio`, in [0, 1], and replay for the rest."""
        general = [d for d in self.corpus.domains if d != self.domain]
        return Mixture({self.domain: ratio, **dict.fromkeys(general, (1.0 - ratio) / len(general))})

    def branch(self, template: TrainSpec, ratio: float, tokens: int) -> TrainSpec:
        """Return the continuation of the template's general model at `ratio` for `tokens`."""
        trunk = make_trunk(template, self.mixture(0.0), self.trunk_tokens)
        points = max(1, round(tokens / self.point_tokens))
        return dataclasses.replace(
            trunk,
            schedule=Schedule.constant(self.mixture(ratio), tokens),
            optimizer=dataclasses.replace(trunk.optimizer, warmup_share=0.0),
            evaluation=dataclasses.replace(trunk.evaluation, points=points),
            parent=Parent(trunk, trunk.steps),
        )

    def curves(
        self, store: Store, templates: Sequence[TrainSpec], ratios: Sequence[float], tokens: int
    ) -> pd.DataFrame:
        """Return a row an evaluation, that of the trunk (tokens 0) first.

        Columns: params, seed, ratio, tokens, domain_loss and general_loss (the mean over the
        general domains), bits per byte.
        """
        general, rows = list(self.mixture(0.0)), []
        for template in templates:
            for ratio in ratios:
                run = self.branch(template, ratio, tokens)
                assert run.parent is not None
                before = store.get(run.parent.spec.run_id).losses
                after = [(p.tokens, p.losses) for p in store.get(run.run_id).curve]
                for done, losses in [(0, before), *after]:
                    loss = losses[self.domain].bpb, np.mean([losses[d].bpb for d in general])
                    rows.append((template.model.params, template.seed, ratio, done, *loss))
        return pd.DataFrame(rows, columns=["params", "seed", "ratio", "tokens", *LOSSES])


@dataclass(frozen=True, kw_only=True)
class CptLaws:
    """The D-CPT laws of both losses, at one size: ratios are the domain's in both."""

    domain: DCPT
    general: DCPT

    @classmethod
    def fit(cls, curves: pd.DataFrame) -> CptLaws:
        """Fit both to `CptRatio.curves` of several sizes."""
        curves = curves.loc[curves["tokens"] > 0]
        size_R, tokens_R, ratio_R = (curves[c].to_numpy() for c in ("params", "tokens", "ratio"))
        return cls(
            domain=DCPT().fit(size_R, tokens_R, ratio_R, curves["domain_loss"].to_numpy()),
            general=DCPT().fit(size_R, tokens_R, 1.0 - ratio_R, curves["general_loss"].to_numpy()),
        )

    def predict(self, params: float, tokens: float, ratio_M: np.ndarray) -> np.ndarray:
        """Return the domain's and the general loss, (2, M)."""
        size_M, tokens_M = np.full(len(ratio_M), params), np.full(len(ratio_M), tokens)
        return np.stack(
            [
                self.domain.predict(size_M, tokens_M, ratio_M),
                self.general.predict(size_M, tokens_M, 1.0 - ratio_M),
            ]
        )

    def ratio_within(self, params: float, tokens: float, limit: float) -> float:
        """Return usage 1: the ratio of the lowest domain loss with general loss <= limit."""
        domain, general = (
            lambda ratio_M, which=which: self.predict(params, tokens, ratio_M)[which]
            for which in (0, 1)
        )
        return ratio_within_tolerance(domain, general, limit)

    def ratio_of_few(self, params: float, tokens: float, domain_tokens: float) -> float:
        """Return usage 2: the ratio of the lowest domain loss, each domain token used once."""
        return ratio_of_limited_data(self.domain, params, domain_tokens, tokens)

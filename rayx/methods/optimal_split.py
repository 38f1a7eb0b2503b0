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

import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rayx.branching import make_branch, make_trunk
from rayx.corpus import Corpus
from rayx.experiment import Conclusion
from rayx.fit.laws import Law
from rayx.mixture import Mixture, Phase
from rayx.plan import Plan
from rayx.spec import TrainSpec
from rayx.split import SplitChoice, choose_split, fit_split_law, split_curves, split_points
from rayx.split.plots import split_figure
from rayx.store import Store

Sweep = Callable[[Sequence[TrainSpec]], None]
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
        final: Template of the final run: its size, and the seed of its first replicate.
        budget_tokens: Tokens of the final run, trunk and branches together.
        seeds: Seeds of the verification.
        fixed_shares: Shares of the trunk that the choice is compared with; 1 is no split.
        decay_share: Share of every run's tokens, trunk included, over which the rate falls.
        law: "auto", or the name of one of rayx.fit.laws that takes INPUTS.
    """

    corpus: Corpus
    scales: tuple[TrainSpec, ...]
    points: tuple[Point, ...]
    general: Mixture
    domains: tuple[str, ...]
    final: TrainSpec
    budget_tokens: int
    seeds: tuple[int, ...] = (1000, 1001, 1002)
    fixed_shares: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    decay_share: float = 0.2
    law: str = "auto"

    def specs(self) -> list[TrainSpec]:
        """Return the runs of the fit, each once, small models first."""
        longest = max(trunk_tokens for trunk_tokens, _ in self.points)
        runs = [
            spec
            for template in self.scales
            for point in self.points
            for spec in self.experts(make_trunk(template, self.general, longest), point)
        ]
        return list({spec.run_id: spec for spec in runs}.values())

    def experts(self, trunk: TrainSpec, point: Point) -> list[TrainSpec]:
        """Return the runs of one point: an expert a domain, or the one model without a split."""
        trunk_tokens, branch_tokens = point
        if branch_tokens == 0:
            return [make_branch(trunk, trunk_tokens, (), self.decay_share)]
        tails = [(Phase(Mixture({d: 1}), branch_tokens),) for d in self.domains]
        return [make_branch(trunk, trunk_tokens, tail, self.decay_share) for tail in tails]

    def decide(self, store: Store) -> tuple[pd.DataFrame, Law, SplitChoice]:
        """Fit the law that extrapolates best and solve for the final run's split."""
        points = split_points(store.records([s.run_id for s in self.specs()]), self.domains)
        law, error = fit_split_law(points, self.law)
        choice = choose_split(
            law,
            params=self.final.model.params,
            budget_tokens=self.budget_tokens,
            branches=len(self.domains),
            least_trunk_tokens=float(points["tokens"].min()),
            fixed_shares=self.fixed_shares,
            extrapolation_error=error,
        )
        return points, law, choice

    def plan(self, choice: SplitChoice, store: Store) -> Plan:
        """Make the choice executable."""
        run_ids = [spec.run_id for spec in self.specs()]
        return Plan.of_split(
            choice, self.corpus, self.general, self.domains, self.decay_share, store, run_ids
        )

    def arms(self, trunk_tokens: float) -> dict[str, Point]:
        """Return arm -> point of the final run: the choice, no split, and fixed splits."""
        shares = {"no_split": 1.0} | {f"fixed_{share:g}": share for share in self.fixed_shares}
        lengths = {"choice": round(trunk_tokens)} | {
            arm: round(share * self.budget_tokens) for arm, share in shares.items()
        }
        return {
            arm: (length, round((self.budget_tokens - length) / len(self.domains)))
            for arm, length in lengths.items()
        }

    def follow_up(self, trunk_tokens: float) -> dict[str, list[TrainSpec]]:
        """Return arm -> its runs over all seeds; the arms of a seed share a trunk."""
        runs: dict[str, list[TrainSpec]] = {}
        for seed in self.seeds:
            template = dataclasses.replace(self.final, seed=seed, data_seed=seed)
            trunk = make_trunk(template, self.general, self.budget_tokens)
            for arm, point in self.arms(trunk_tokens).items():
                runs.setdefault(arm, []).extend(self.experts(trunk, point))
        return runs

    def conclude(self, store: Store, sweep: Sweep, name: str) -> Conclusion:
        """Decide, verify and write what was decided into the store.

        Writes splits/NAME.json, plans/NAME.json, verifications/NAME.json and reports/NAME.png and
        .csv (the points of the fit).
        """
        points, law, choice = self.decide(store)
        store.write_bytes(f"splits/{name}.json", choice.to_json().encode())
        store.write_bytes(f"reports/{name}.csv", points.to_csv(index=False).encode())
        plan = self.plan(choice, store)
        sweep([spec for runs in self.follow_up(choice.trunk_tokens).values() for spec in runs])
        verification = self.verify(store, law, choice)
        plan = dataclasses.replace(plan, verdict=verification["verdict"])
        store.write_json(f"verifications/{name}.json", verification)
        store.write_json(f"plans/{name}.json", plan.to_json())
        image = io.BytesIO()
        split_figure(law, choice, self.curves(law, points), verification).savefig(image, dpi=144)
        store.write_bytes(f"reports/{name}.png", image.getvalue())
        places = {"plan": f"plans/{name}.json", "figure": f"reports/{name}.png"}
        return Conclusion(
            choice=choice,
            plan=plan,
            verification=verification,
            files={what: f"{store.url}/{place}" for what, place in places.items()},
        )

    def curves(self, law: Law, points: pd.DataFrame) -> pd.DataFrame:
        """Return how the best split moves over the study's sizes and to ten times its budget."""
        least = float(points["tokens"].min())
        sizes = sorted({t.model.params for t in (*self.scales, self.final)})
        return split_curves(
            law,
            params=sizes,
            budgets=list(np.geomspace(4 * least, 10 * self.budget_tokens, 16)),
            branches=len(self.domains),
            least_trunk_tokens=least,
        )

    def verify(self, store: Store, law: Law, choice: SplitChoice) -> dict[str, Any]:
        """Compare measured losses of the arms with each other and with the law's.

        Returns:
            Plain data: arms (trunk_tokens, branch_tokens, predicted, interval, loss_bpb one a
            seed), seed_sd_bpb, seeds_below_no_split, excess_over_best_fixed (relative, one a seed),
            prediction_error (relative, one an arm), verdict.
        """
        arms: dict[str, dict[str, Any]] = {}
        runs = self.follow_up(choice.trunk_tokens)
        for arm, point in self.arms(choice.trunk_tokens).items():
            rows = split_points(store.records({s.run_id for s in runs[arm]}), self.domains)
            columns = [np.array([float(v)]) for v in (choice.params, *point)]
            loss_M, low_M, high_M = law.predict(*columns, interval=choice.level)
            arms[arm] = {
                "trunk_tokens": point[0],
                "branch_tokens": point[1],
                "predicted": float(loss_M[0]),
                "interval": [float(low_M[0]), float(high_M[0])],
                "loss_bpb": rows.sort_values("seed")["loss"].tolist(),
            }
        return {"params": choice.params, "budget_tokens": self.budget_tokens, "arms": arms} | (
            judge(arms)
        )


def judge(arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return what the measured losses of the arms say of the choice."""
    loss_AS = {arm: np.array(values["loss_bpb"]) for arm, values in arms.items()}
    choice_S, plain_S = loss_AS["choice"], loss_AS["no_split"]
    best_S = np.min([loss_AS[arm] for arm in arms if arm.startswith("fixed_")], axis=0)
    excess_S = choice_S / best_S - 1.0
    errors = {arm: values["predicted"] / loss_AS[arm].mean() - 1.0 for arm, values in arms.items()}
    won = int((choice_S < plain_S).sum())
    spread = [losses.var(ddof=1) for losses in loss_AS.values() if len(losses) > 1]
    return {
        "seed_sd_bpb": float(np.sqrt(np.mean(spread))) if spread else None,
        "seeds_below_no_split": won,
        "excess_over_best_fixed": excess_S.tolist(),
        "prediction_error": {arm: float(error) for arm, error in errors.items()},
        "verdict": (
            f"The chosen split was below no split in {won} of {len(choice_S)} seeds, by "
            f"{(plain_S - choice_S).mean():.4f} bpb, and at most {excess_S.max():+.2%} from the "
            f"best fixed split; the law was off by {max(map(abs, errors.values())):.1%} at most."
        ),
    }

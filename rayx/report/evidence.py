"""What a report is made from: the store read once, and the tables behind the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from rayx.choose import Choice
from rayx.errors import FitError
from rayx.fit import Joint, join_kinds, largest_scale
from rayx.fit.fitted import FittedTable, normalised_objective
from rayx.fit.table import SCALE
from rayx.merging import MergeSpec
from rayx.store import Store

STEP = 0.05  # share added to a domain in the interaction map
CURVE_POINTS = 41
NOT_FITTED = "Nothing has been fitted yet: too few runs are finished, or no fit was asked for."


@dataclass(frozen=True, kw_only=True, eq=False)
class Evidence:
    """The arguments of `render`, and what follows from them."""

    store: Store
    fitted: FittedTable | None
    choice: Choice | None
    verification: Mapping[str, Any] | None
    plan: Mapping[str, Any] | None
    caps: Mapping[str, float]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """All runs of the store."""
        return self.store.runs()

    @cached_property
    def failed(self) -> pd.DataFrame:
        """The runs that failed."""
        return self.runs.loc[self.runs["status"] == "failed"]

    @cached_property
    def merged(self) -> pd.DataFrame:
        """The merged candidates that were evaluated."""
        return self.runs.loc[(self.runs["kind"] == "merge") & (self.runs["status"] == "ok")]

    @cached_property
    def steered(self) -> pd.DataFrame:
        """The runs that a policy steered."""
        if "policy" not in self.runs.columns:
            return self.runs.iloc[:0]
        return self.runs.loc[self.runs["policy"].notna() & (self.runs["status"] == "ok")]

    @cached_property
    def beside_merged(self) -> set[str]:
        """Ids of the runs at the scale that most merged candidates are of."""
        scale = largest_scale(self.merged)
        same = self.runs[list(SCALE)].eq(scale[list(SCALE)].iloc[0]).all(axis=1)
        return set(self.runs.loc[same, "run_id"])

    @cached_property
    def experts(self) -> set[str]:
        """Ids of the runs that the merged candidates are made of."""
        ids = set()
        for run_id in self.merged.drop_duplicates("expert_set")["run_id"]:
            spec = self.store.get(run_id).spec
            if isinstance(spec, MergeSpec):
                ids |= {member.spec.run_id for member in spec.experts.members}
        return ids

    @cached_property
    def joint(self) -> Joint | None:
        """What the trained runs say of the merged ones; None where there is nothing to compare."""
        if self.fitted and self.fitted.table.joint:
            return self.fitted.table.joint
        try:  # the runs fitted may be of one kind only: the merged ones were left out
            return join_kinds(self.runs.loc[self.runs["run_id"].isin(self.beside_merged)]).joint
        except FitError:
            return None

    @cached_property
    def domains(self) -> list[str]:
        """Domains in the corpus' order where the plan gives it, else in the table's."""
        planned = list((self.plan or {}).get("domain_tokens", {}))
        if self.fitted:
            known = list(self.fitted.table.domains)
        elif self.choice:
            known = list(self.choice.weights)
        else:
            known = [c.removeprefix("weight/") for c in self.runs if c.startswith("weight/")]
        return planned if set(planned) == set(known) else known

    @cached_property
    def objective(self) -> dict[str, float]:
        """Target -> weight: the choice's, the verification's, or all targets alike."""
        if self.choice:
            return self.choice.objective
        if self.verification:
            return dict(self.verification["objective"])
        targets = [c.removeprefix("loss/") for c in self.runs if c.startswith("loss/")]
        if self.fitted:
            targets = list(self.fitted.table.targets)
        return {target: 1.0 / len(targets) for target in targets}

    def objective_words(self) -> str:
        """Return the objective as words."""
        shares = self.objective
        total = sum(shares.values())
        if len(shares) < 2:
            return "".join(f"the loss on {target}" for target in shares) or "not known"
        if max(shares.values()) - min(shares.values()) < 1e-9 * total:
            return f"the mean loss on {listed(list(shares), 6)}"
        parts = [f"{100 * weight / total:.0f}% {target}" for target, weight in shares.items()]
        return f"the weighted loss on {listed(parts, 6)}"

    @cached_property
    def centre_K(self) -> np.ndarray:
        """The mixture that responses start from: the choice, else the mean over the runs."""
        assert self.fitted is not None
        if self.choice:
            return np.array([self.choice.weights[d] for d in self.fitted.table.domains])
        return self.fitted.table.weights_RK.mean(0)

    def measured_R(self) -> np.ndarray:
        """Measured objective of the runs fitted; NaN where a target is missing."""
        assert self.fitted is not None
        table = self.fitted.table
        shares = normalised_objective(self.objective, self.fitted.table.targets)
        columns = [table.targets.index(target) for target in shares]
        return table.losses_RM[:, columns] @ np.array(list(shares.values()))

    def held_out(self) -> dict[str, pd.DataFrame]:
        """Objective and targets -> measured_bpb, predicted_bpb and std_bpb by run."""
        assert self.fitted is not None
        fitted, table = self.fitted, self.fitted.table
        shares = normalised_objective(self.objective, table.targets)
        columns = [table.targets.index(target) for target in shares]
        predicted = fitted.oof_RT[:, columns] @ np.array(list(shares.values()))
        std = fitted.objective(table.weights_RK, shares, std=True)[1]
        # A merged row's loss is a translation: what is shown as measured was trained.
        trained_R = ~table.merged_R if table.merged_R is not None else np.ones(len(table), bool)
        entries = {"objective": (self.measured_R(), predicted, std)}
        std_RT = fitted.predict(table.weights_RK, std=True)[1]
        if len(table.targets) > 1:
            entries |= {
                target: (table.losses_RM[:, t], fitted.oof_RT[:, t], std_RT[:, t])
                for t, target in enumerate(table.targets)
            }
        names = ("measured_bpb", "predicted_bpb", "std_bpb")
        return {
            k: pd.DataFrame(
                {name: column[trained_R] for name, column in zip(names, v, strict=True)}
            )
            for k, v in entries.items()
        }

    def responses(self) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
        """Domain -> (predicted change along its share, measured runs), for `response_curve`."""
        assert self.fitted is not None
        fitted, table = self.fitted, self.fitted.table
        start = float(fitted.objective(self.centre_K[None], self.objective)[0])
        start_T = fitted.predict(self.centre_K[None])[0]
        result = {}
        for domain in self.domains:
            k = table.domains.index(domain)
            seen_R = table.weights_RK[:, k]
            top = max(float(seen_R.max()), float(self.centre_K[k]))
            # Dense near zero, where the response is steepest.
            share = np.linspace(0.0, 1.0, CURVE_POINTS) ** 2 * min(self.caps.get(domain, 1.0), top)
            weights_MK = np.stack([moved(self.centre_K, k, s) for s in share])
            value, std = fitted.objective(weights_MK, self.objective, std=True)
            change_MT = fitted.predict(weights_MK) - start_T
            curve = pd.DataFrame({"share": share, "objective": value - start, "std": std})
            for target in self.objective if len(self.objective) > 1 else ():
                curve[f"target {target}"] = change_MT[:, table.targets.index(target)]
            points = pd.DataFrame({"share": seen_R, "objective": self.measured_R() - start})
            result[domain] = (curve, points)
        return result

    def interactions(self) -> pd.DataFrame:
        """Change of each target's predicted loss when a domain's share grows by STEP, bpb."""
        assert self.fitted is not None
        table = self.fitted.table
        weights_MK = np.stack(
            [self.centre_K]
            + [
                moved(self.centre_K, k, min(1.0, self.centre_K[k] + STEP))
                for k in (table.domains.index(d) for d in self.domains)
            ]
        )
        losses_MT = self.fitted.predict(weights_MK)
        change = losses_MT[1:] - losses_MT[0]
        return pd.DataFrame(change, index=self.domains, columns=list(table.targets))

    def mixtures(self) -> pd.DataFrame:
        """Domain -> share in the choice and its baselines, and its cap; NaN where none."""
        assert self.choice is not None
        frame = pd.DataFrame({"choice": self.choice.weights})
        for name, baseline in self.choice.baselines.items():
            frame[name] = pd.Series(baseline.weights)
        if self.caps:
            frame["cap"] = pd.Series(dict(self.caps), dtype=float)
        return frame.reindex(self.domains)

    def curves(self) -> pd.DataFrame:
        """Objective at every evaluation: run_id, tokens, loss_bpb, arm, params, end (tokens)."""
        columns = ["run_id", "tokens", "loss_bpb", "arm", "params", "end"]
        evals = self.store.evals()
        evals = evals.loc[evals["target"].isin(list(self.objective))]
        evals = evals.loc[~evals["run_id"].isin(self.merged["run_id"])]  # a point is no curve
        if evals.empty:
            return pd.DataFrame(columns=columns)
        weight = evals["target"].map(self.objective) / sum(self.objective.values())
        evals = evals.assign(loss_bpb=evals["loss_bpb"] * weight)
        by_point = evals.groupby(["run_id", "tokens"])["loss_bpb"]
        # A run that lacks a target has no objective.
        frame = by_point.sum()[by_point.count() == len(self.objective)].reset_index()
        arm_of = {
            run: arm
            for arm, entry in reversed(list((self.verification or {}).get("arms", {}).items()))
            for run in entry["run_ids"]
        }
        frame["arm"] = [arm_of.get(run, "") for run in frame["run_id"]]
        scale = self.runs.set_index("run_id")
        frame["params"] = frame["run_id"].map(scale["params"])
        frame["end"] = frame["run_id"].map(scale["tokens"])
        return frame[columns]


def moved(weights_K: np.ndarray, k: int, share: float) -> np.ndarray:
    """Return weights with domain k at `share` and the others in their old proportions."""
    rest_K = np.delete(weights_K, k)
    rest_K = np.ones_like(rest_K) if rest_K.sum() <= 1e-9 else rest_K
    return np.insert(rest_K / rest_K.sum() * (1.0 - share), k, share)


def listed(items: list[str], most: int = 3) -> str:
    """Return names as people list them."""
    if len(items) > most:
        items = [*items[: most - 1], f"{len(items) - most + 1} more"]
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)

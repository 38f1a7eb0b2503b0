"""DGA beside what it must beat: training for a domain of which there is only a small specific set.

Every arm trains on the generic domains alone and is judged on held-out text of the domain that the
specific set is of. `rayx.policies.dga` is the rule, `rayx.methods.importance` the static baseline.

Source: Fan, Grangier and Ablin 2024, arXiv:2410.02498 (the comparison).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from rayx.candidates import regmix_mixtures
from rayx.merging import Experts, MergeSpec, Spec
from rayx.mixture import Mixture, Schedule
from rayx.policy import Policy
from rayx.spec import TrainSpec, require
from rayx.store import Store

UNIFORM, PROPORTIONAL, SEARCH = "uniform", "proportional", "random search"


@dataclass(frozen=True, kw_only=True)
class DgaStudy:
    """Arms trained from the same seeds on the same generic domains.

    Args:
        template: Scale and evaluation of every run, judged on the second half of held-out text; its
            schedule gives the tokens, its mixture and seeds are replaced.
        supply: Generic domain -> tokens that there are.
        target: What is judged.
        schedules: Arm -> what else it trains on: importance sampling; the specific set alone, for
            less tokens, since it is soon learnt by heart.
        policies: Arm -> a policy, started from equal weights.
        search: Candidates of the random search, drawn around the proportional mixture; the one with
            the lowest loss on the first half of the target's held-out text stands for it.
        seeds: Of initialisation and data order.
    """

    template: TrainSpec
    supply: Mapping[str, int]
    target: str
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    policies: Mapping[str, Policy] = field(default_factory=dict)
    search: int = 4
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        two = len(self.supply) > 1
        require(two, "DgaStudy.supply", dict(self.supply), "two generic domains or more")
        part = self.template.evaluation.part
        require(part == "second", "Evaluation.part of DgaStudy.template", part, "'second'")

    def arms(self, seed: int) -> dict[str, list[TrainSpec]]:
        """Return arm -> its runs: one, or the candidates of the random search."""
        uniform, prior = Mixture.uniform([*self.supply]), Mixture(self.supply)
        arms = {UNIFORM: [self.run(uniform, seed)], PROPORTIONAL: [self.run(prior, seed)]}
        for name, schedule in self.schedules.items():
            arms[name] = [dataclasses.replace(arms[UNIFORM][0], schedule=schedule)]
        for name, policy in self.policies.items():
            arms[name] = [self.run(uniform, seed, policy)]
        if self.search:
            tried = regmix_mixtures(prior, self.search, seed=seed)
            arms[SEARCH] = [self.run(mixture, seed) for mixture in tried]
        return arms

    def run(self, mixture: Mixture, seed: int, policy: Policy | None = None) -> TrainSpec:
        """Return a run of the template's length on a mixture, or with a policy from it."""
        schedule = Schedule.constant(mixture, self.template.schedule.tokens)
        return dataclasses.replace(
            self.template, schedule=schedule, policy=policy, seed=seed, data_seed=seed
        )

    def specs(self) -> list[Spec]:
        """Return all runs, and the ends of the candidates on the text that chooses among them."""
        found: list[Spec] = []
        for seed in self.seeds:
            arms = self.arms(seed)
            found += [run for runs in arms.values() for run in runs]
            found += [validation(run) for run in arms.get(SEARCH, [])]
        return found

    def chosen(self, store: Store, seed: int) -> dict[str, TrainSpec]:
        """Return arm -> its run; of the random search the best on the first half."""

        def loss(run: TrainSpec) -> float:
            losses = store.get(validation(run).run_id).losses
            return losses[self.target].bpb if losses else np.inf

        arms = self.arms(seed)
        return {n: min(runs, key=loss) if n == SEARCH else runs[0] for n, runs in arms.items()}

    def table(self, store: Store) -> pd.DataFrame:
        """Return a row for each arm, seed and evaluation; losses are of the target's second half.

        Columns: arm, seed, tokens, loss (bits per byte), runs (trained for the arm), signal_flops
        and signal_seconds (what measuring took, as shares of the run's other FLOPs and time).

        Raises:
            StoreError: A run has no record.
            SpecError: A run failed.
        """
        rows = []
        for seed in self.seeds:
            arms = self.arms(seed)
            for arm, spec in self.chosen(store, seed).items():
                found = store.get(spec.run_id)
                require(found.status == "ok", f"The run of {arm}", found.status, "ok")
                signal = {
                    "signal_flops": found.signal_flops / (found.flops - found.signal_flops),
                    "signal_seconds": found.signal_seconds / (found.seconds - found.signal_seconds),
                }
                rows += [
                    {
                        "arm": arm,
                        "seed": seed,
                        "tokens": point.tokens,
                        "loss": point.losses[self.target].bpb,
                        "runs": len(arms[arm]),
                        **signal,
                    }
                    for point in found.curve
                ]
        return pd.DataFrame(rows)

    def trajectories(self, store: Store) -> pd.DataFrame:
        """Return the weights that policies set: columns arm, seed, step, domain, weight."""
        rows = [
            (arm, seed, decision.step, domain, decision.weights.get(domain, 0.0))
            for seed in self.seeds
            for arm, spec in self.chosen(store, seed).items()
            for decision in store.get(spec.run_id).decisions
            for domain in self.supply
        ]
        return pd.DataFrame(rows, columns=["arm", "seed", "step", "domain", "weight"])


def validation(run: TrainSpec) -> MergeSpec:
    """Return the evaluation of a run's end on the first half of held-out text."""
    evaluation = dataclasses.replace(run.evaluation, points=1, part="first")
    return Experts.of([run]).merge((1.0,), evaluation=evaluation)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row an arm, best first: last loss, its difference to uniform, and what it cost.

    Columns: arm, loss (mean over seeds), gain (of uniform's loss, paired by seed), gain_stderr,
    beats_uniform (seeds), best_loss (lowest along the run), runs, signal_flops, signal_seconds.
    """
    last = table.groupby(["arm", "seed"]).tail(1)
    loss_AS = last.pivot(index="arm", columns="seed", values="loss")
    best_AS = table.pivot_table(index="arm", columns="seed", values="loss", aggfunc="min")
    gain_AS = loss_AS.loc[UNIFORM] - loss_AS
    found = pd.DataFrame(
        {
            "loss": loss_AS.mean(axis=1),
            "gain": gain_AS.mean(axis=1),
            "gain_stderr": gain_AS.std(axis=1, ddof=1) / np.sqrt(loss_AS.shape[1]),
            "beats_uniform": (gain_AS > 0).sum(axis=1),
            "best_loss": best_AS.mean(axis=1),
        }
    )
    for name in ("runs", "signal_flops", "signal_seconds"):
        found[name] = last.groupby("arm")[name].mean()
    return found.sort_values("loss").reset_index()


def recovery(weights: pd.DataFrame, planted: Mixture) -> dict[str, float]:
    """Return how far a policy's weights are from the planted mixture, over one run.

    Of the mean weights of the second half of the decisions, and of uniform weights: `kl` and
    `uniform_kl`, KL(planted || weights) in nats; `l1` and `uniform_l1`.

    Args:
        weights: Rows of `DgaStudy.trajectories` of one arm and seed.
        planted: What the specific set is made of.
    """
    weights_DK = weights.pivot(index="step", columns="domain", values="weight")
    mean_K = weights_DK.iloc[len(weights_DK) // 2 :].mean().to_numpy()
    planted_K = planted.to_array([*weights_DK.columns])
    result = {}
    for name, found_K in (("", mean_K), ("uniform_", np.full(len(mean_K), 1 / len(mean_K)))):
        on = planted_K > 0
        with np.errstate(divide="ignore"):
            result[f"{name}kl"] = float(planted_K[on] @ np.log(planted_K[on] / found_K[on]))
        result[f"{name}l1"] = float(np.abs(found_K - planted_K).sum())
    return result

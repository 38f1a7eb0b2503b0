"""Upsampling at the end: which share of the last tokens should small domains get, and from where?

Question:  Six domains of real text at 32:1 by weight, the mean of their losses. Is it better to
           upsample small domains in the last 5-30% of the tokens than not to, than to read as much
           of them all along or at the start, and than uniform? And does leaving a domain out of the
           last phase only tell what leaving it out of the whole run does?
Published: Blakeney et al. 2024, arXiv:2406.03476: the last 10-20% are best, 5-30% tried.
Method:    One trunk a seed; ends that sample all domains alike (even) or the three smallest alike
           (small). The end is chosen on the first half of the held-out text and put beside its
           average all along and its phases the other way round; its domains are dropped one by one,
           from the end and from the whole run. Random search takes the tokens of all ends. Figures
           are of the second half.
Cost:      `rayx run experiments/upsampling.py --dry-run`; about 5 minutes on 2 cores.
Run:       rayx run experiments/upsampling.py
Result:    All alike in the last 30% is below no upsampling by .065, below its average all along by
           .030 and below the start by .079, each in 3 of 3 seeds; uniform all along is a tie.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.candidates import regmix_mixtures
from rayx.corpus import build_sample
from rayx.fit.scores import spearman
from rayx.merging import Experts, MergeSpec, Spec
from rayx.methods.dem import mean_loss
from rayx.methods.merge_proxy import Sweep
from rayx.methods.upsampling import BASE, Arm, Upsampling, UpsamplingChoice, effects
from rayx.schedules import on_trunk

log = logging.getLogger(__name__)

MODEL = ModelShape(layers=1, width=64, heads=4, ffn_width=192, vocab_size=1024, context=64)
OPTIMIZER = Optimizer(lr=8e-3, batch_sequences=8, warmup_share=0.02, decay_share=0.2)
SMALL = 3  # domains that `small` upsamples
TRIED = 3  # mixtures of random search: a trunk of .8, a base of .2, ends of .9 twice
STRENGTHS = (2.0, 20.0)  # of its draws: few tries, so none near one domain alone
CHOICE, UNIFORM, RANDOM = "choice", "uniform", "random search"
AVERAGE, START = "average all along", "upsampled at the start"
REPORT = Evaluation(points=1, sequences=256, part="second")


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built
    budget_tokens: int = 400_000
    seed: int = 1  # 0 chose the settings
    seeds: int = 3


def corpus(p: Parameters) -> Corpus:
    """Return the sample corpus, built on first use."""
    return build_sample(p.corpus, vocab_size=1024)


def studies(p: Parameters, corpus: Corpus) -> dict[int, Upsampling]:
    """Return seed -> study. The base gives each domain half the share of the one before it."""
    ranked = sorted(corpus.domains, key=lambda d: -corpus.tokens[d])
    base = Mixture({domain: 0.5**rank for rank, domain in enumerate(ranked)})
    finals = {"even": Mixture.uniform(ranked), "small": Mixture.uniform(ranked[-SMALL:])}
    found = {}
    for seed in range(p.seed, p.seed + p.seeds):
        template = TrainSpec(
            corpus=corpus.fingerprint,
            model=MODEL,
            schedule=Schedule.constant(base, p.budget_tokens),
            optimizer=OPTIMIZER,
            evaluation=Evaluation(points=1, sequences=96, part="first"),
            seed=seed,
            data_seed=seed,
        )
        objective = dict.fromkeys(corpus.domains, 1.0)
        found[seed] = Upsampling(template=template, base=base, finals=finals, objective=objective)
    return found


def constant(study: Upsampling, mixture: Mixture) -> TrainSpec:
    """Return the run on one mixture all along."""
    schedule = Schedule.constant(mixture, study.template.schedule.tokens)
    return dataclasses.replace(study.template, schedule=schedule)


def others(study: Upsampling) -> dict[str, list[TrainSpec]]:
    """Return arm -> the runs that it chooses from."""
    drawn = regmix_mixtures(study.base, TRIED, seed=study.template.seed, strengths=STRENGTHS)
    return {
        UNIFORM: [constant(study, Mixture.uniform([*study.base]))],
        RANDOM: [constant(study, mixture) for mixture in drawn],
    }


def controls(study: Upsampling, schedule: Schedule) -> dict[str, TrainSpec]:
    """Return arm -> a run that reads as much of each domain as the choice, at another time."""
    backwards = on_trunk(study.template, Schedule(schedule.phases[::-1]))
    return {AVERAGE: constant(study, schedule.average()), START: backwards}


def to_ablate(choice: UpsamplingChoice) -> Arm:
    """Return the arm whose domains are dropped: the choice, or where that is the base an end."""
    return (choice.final, choice.share) if choice.share else ("even", 0.2)


def reported(run: TrainSpec) -> MergeSpec:
    """Return a run's end, evaluated on the text that no choice has seen."""
    return Experts.of([run]).merge((1.0,), evaluation=REPORT)


def with_reports(runs: list[TrainSpec]) -> list[Spec]:
    """Return runs and their ends."""
    return [*runs, *(reported(run) for run in runs)]


def specs(p: Parameters, corpus: Corpus) -> list[Spec]:
    """Return the ends, uniform and random search, and all of them on the second half."""
    runs: list[TrainSpec] = []
    for study in studies(p, corpus).values():
        runs += study.runs().values()
        runs += [run for tried in others(study).values() for run in tried]
    return with_reports(runs)


def later(study: Upsampling, schedule: Schedule, ablated: Arm) -> list[Spec]:
    """Return what follows the choice of a schedule: controls and ablations."""
    runs = [*controls(study, schedule).values()]
    for whole in (False, True):
        runs += study.ablations(*ablated, whole=whole).values()
    return with_reports(runs)


def follow_up(p: Parameters, corpus: Corpus) -> list[Spec]:
    """Return runs as costly as those that follow the choices."""
    arm = "even", 0.2
    found = [later(s, s.schedule(*arm), arm) for s in studies(p, corpus).values()]
    return [spec for of_seed in found for spec in of_seed]


def arms(store: Store, study: Upsampling, choice: UpsamplingChoice) -> dict[str, MergeSpec]:
    """Return arm -> its end on the second half; what was chosen was chosen on the first."""
    runs = study.runs()
    found = {BASE: runs[BASE, 0.0], CHOICE: runs[choice.final, choice.share]}
    for arm, tried in others(study).items():
        losses = [mean_loss(store.get(run.run_id).losses, study.objective) for run in tried]
        found[arm] = tried[int(np.argmin(losses))]
    found |= controls(study, choice.schedule)
    found |= {f"{final} {share:g}": run for (final, share), run in runs.items() if share}
    return {arm: reported(run) for arm, run in found.items()}


def table(
    p: Parameters, corpus: Corpus, store: Store, chosen: dict[int, UpsamplingChoice]
) -> pd.DataFrame:
    """Return a row an arm and seed: loss (mean over domains), each domain's."""
    rows = []
    for seed, study in studies(p, corpus).items():
        for arm, spec in arms(store, study, chosen[seed]).items():
            bpb = {d: store.get(spec.run_id).losses[d].bpb for d in corpus.domains}
            rows.append({"arm": arm, "seed": seed, "loss": np.mean(list(bpb.values())), **bpb})
    return pd.DataFrame(rows)


def ablation(
    p: Parameters, corpus: Corpus, store: Store, chosen: dict[int, UpsamplingChoice]
) -> pd.DataFrame:
    """Return a row a seed, dropped domain and target: its effect in the end, and in the whole."""
    parts = []
    for seed, study in studies(p, corpus).items():
        arm = to_ablate(chosen[seed])
        cheap, whole = (
            effects(
                store,
                reported(study.runs()[arm]),
                {d: reported(run) for d, run in study.ablations(*arm, whole=everywhere).items()},
            )
            for everywhere in (False, True)
        )
        parts.append(cheap.assign(whole=whole["effect"], seed=seed))
    found = pd.concat(parts, ignore_index=True)
    return found.loc[found["target"].isin(corpus.domains)]


def agreement(dropped: pd.DataFrame) -> dict[str, list[float]]:
    """Return rank correlations of both effects by seed, on the dropped domain and on others."""
    own = dropped["target"] == dropped["dropped"]
    return {
        side: [
            spearman(np.array(rows["effect"]), np.array(rows["whole"]))
            for _, rows in dropped.loc[mask].groupby("seed")
        ]
        for side, mask in (("own target", own), ("other targets", ~own))
    }


def verdict(p: Parameters, found: pd.DataFrame, dropped: pd.DataFrame) -> dict[str, object]:
    """Return the choice less every arm, by seed, and how the cheap ablation ranks."""
    loss = {str(arm): rows["loss"].to_numpy(float) for arm, rows in found.groupby("arm")}
    gap = {arm: loss[CHOICE] - loss_S for arm, loss_S in loss.items() if arm != CHOICE}
    said = ", ".join(
        f"{arm} {gap[arm].mean():+.4f} (below in {(gap[arm] < 0).sum()} of {p.seeds})"
        for arm in (BASE, UNIFORM, AVERAGE, START, RANDOM)
    )
    ranks = agreement(dropped)
    return {
        "choice_less_arm": {arm: gap_S.tolist() for arm, gap_S in gap.items()},
        "ablation_spearman": ranks,
        "verdict": (
            f"The chosen end, bits per byte, less: {said}. Rank correlation of dropping a domain "
            f"from the end and from the whole run, by seed: "
            + "; ".join(f"{side} {np.round(rho, 2).tolist()}" for side, rho in ranks.items())
            + "."
        ),
    }


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Choose, train what checks it; write reports/upsampling* and the first seed's plan."""
    by_seed = studies(p, corpus)
    chosen = {seed: study.decide(store) for seed, study in by_seed.items()}
    more: list[Spec] = []
    for seed, study in by_seed.items():
        more += later(study, chosen[seed].schedule, to_ablate(chosen[seed]))
    sweep(more)
    found, dropped = table(p, corpus, store, chosen), ablation(p, corpus, store, chosen)
    said = verdict(p, found, dropped)
    plan = dataclasses.replace(
        by_seed[p.seed].plan(chosen[p.seed], corpus, store), verdict=str(said["verdict"])
    )
    store.write_json("plans/upsampling.json", plan.to_json())
    store.write_bytes("reports/upsampling.csv", found.to_csv(index=False).encode())
    store.write_bytes("reports/upsampling_ablation.csv", dropped.to_csv(index=False).encode())
    choices = {str(seed): choice.to_json() for seed, choice in chosen.items()}
    store.write_json("reports/upsampling.json", said | {"choices": choices})
    log.info("chosen: %s", {seed: (c.final, c.share) for seed, c in chosen.items()})
    columns = ["loss", *corpus.domains]
    mean = pd.DataFrame(found.groupby("arm")[columns].mean()).sort_values("loss")
    mean["deviation"] = found.groupby("arm")["loss"].std()
    log.info("bits per byte, mean over %d seeds:\n%s", p.seeds, mean.round(4).to_string())
    for name in ("effect", "whole"):
        effect = dropped.pivot_table(index="dropped", columns="target", values=name)
        log.info("%s of dropping a domain:\n%s", name, effect.round(4).to_string())
    log.info("%s", said["verdict"])
    log.info("wrote plans/upsampling.json and reports/upsampling.* in %s", store.url)

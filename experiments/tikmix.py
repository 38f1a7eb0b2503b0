"""TiKMiX at a fifth of RegMix's compute: mixtures from influences, against a sweep of proxies.

Question:  Six domains of real text, four targets of equal weight. Does the influence measured in
           one short run give as good a mixture as RegMix's proxies, for 20% of their compute? And
           does influence forecast what training on a domain does to a target?
Published: TiKMiX, arXiv:2508.17677: D beats RegMix (45.5 against 43.9 over 9 benchmarks, 1B model)
           at 20% of its compute, M has 45.9; influence against later gains: Pearson .789.
Method:    Each seed searches anew: RegMix on `proxies` runs; D and M on a run as long as one proxy
           in which influence is measured; random search: the best of the proxies, or of a fifth.
           Each choice, uniform, the prior (in proportion to the domains' tokens) and D online
           (weights set anew each fifth of the run) are trained longer, from a seed of their own.
           Choices read the first half of the held-out text; the second half is reported.
           What influence forecasts: branches from the same run, on one domain each.
Cost:      `rayx run experiments/tikmix.py --dry-run`.
Run:       rayx run experiments/tikmix.py
           rayx run experiments/tikmix.py --set domains=true --store runs/tikmix-domains
Result:    D, at 5% of RegMix's compute, is below it in 3 of 3 seeds, by .043 bits per byte (.081
           with the whole Fisher matrix), and below uniform in 2 of 3, by .034 (.072); 1 to 1.7 of 4
           targets get worse than with the prior, which D's bounds should not allow. Influence
           forecasts branches at .72 (.77). M is as good as uniform: its mixed sets measure noise.
           See LOG.md.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.corpus import build_sample
from rayx.fit import FittedTable
from rayx.methods.regmix import RegMix, Sweep
from rayx.methods.tikmix import TiKMiX
from rayx.policies.tikmix import InfluenceSurvey, TiKMiXD
from rayx.policy import CURVATURES
from rayx.verify import objective_bpb

log = logging.getLogger(__name__)

FEW = ("code", "docs", "readmes", "wiki")  # no domain holds readmes
ONLINE = "D online"
PRIOR = "proportional"
MAIN = "D diagonal"
MEASURED: dict[str, Any] = {"sequences": 32, "probe_sequences": 64}  # of a source, of a target
BRANCH_TOKENS = 32_768  # of a branch on one domain


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built
    domains: bool = False  # whether the domains are the targets, in place of FEW
    proxies: int = 24
    proxy_tokens: int = 128_000
    final_tokens: int = 320_000
    candidates: int = 48  # mixed sets that M measures
    seed: int = 1  # 100 chose the settings
    seeds: int = 3


def corpus(p: Parameters) -> Corpus:
    """Return the sample corpus, built on first use."""
    return build_sample(p.corpus, vocab_size=1024)


def targets(p: Parameters, corpus: Corpus) -> tuple[str, ...]:
    """Return the targets of the objective."""
    return tuple(corpus.domains) if p.domains else FEW


def proxy(p: Parameters, corpus: Corpus, seed: int, tokens: int, part: str) -> TrainSpec:
    """Return a run on the prior."""
    return TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(layers=1, width=64, heads=4, ffn_width=192, vocab_size=1024, context=64),
        schedule=Schedule.constant(Mixture(corpus.proportional()), tokens),
        optimizer=Optimizer(lr=8e-3, batch_sequences=8),
        evaluation=Evaluation(points=1, sequences=256, part=part),
        seed=seed,
        data_seed=seed,
    )


def regmix(p: Parameters, corpus: Corpus, seed: int) -> RegMix:
    """Return RegMix's study of one seed."""
    return RegMix(
        corpus=corpus,
        proxy=proxy(p, corpus, seed, p.proxy_tokens, "first"),
        num_proxies=p.proxies,
        objective=dict.fromkeys(targets(p, corpus), 1.0),
        budget_tokens=p.final_tokens,
        seed=seed,
    )


def tikmix(p: Parameters, corpus: Corpus, seed: int, curvature: str = "diagonal") -> TiKMiX:
    """Return TiKMiX's study of one seed."""
    return TiKMiX(
        proxy=proxy(p, corpus, seed, p.proxy_tokens, "second"),
        survey=InfluenceSurvey(targets=targets(p, corpus), curvature=curvature, **MEASURED),
        num_candidates=p.candidates,
        seed=seed,
    )


def seeds(p: Parameters) -> range:
    """Return the seeds of the searches."""
    return range(p.seed, p.seed + p.seeds)


def specs(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return all searches' runs and the branches."""
    found: list[TrainSpec] = []
    for seed in seeds(p):
        found += regmix(p, corpus, seed).specs()
        found += [tikmix(p, corpus, seed, curvature).single() for curvature in CURVATURES]
        study = tikmix(p, corpus, seed)
        found += [study.mixed(), *study.branches(BRANCH_TOKENS)]
    return found


def final(p: Parameters, corpus: Corpus, seed: int) -> TrainSpec:
    """Return the template of a final run, on the prior."""
    return proxy(p, corpus, 1_000 + seed, p.final_tokens, "second")


def online(p: Parameters, corpus: Corpus, seed: int) -> TrainSpec:
    """Return the final run whose weights D sets as it goes on."""
    policy = TiKMiXD(targets=targets(p, corpus), **MEASURED)
    return dataclasses.replace(final(p, corpus, seed), policy=policy)


def follow_up(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return runs as costly as the final ones."""
    others = range(1, 7 + len(CURVATURES))  # arms of a constant mixture
    constant = [final(p, corpus, 1_000 * arm + seed) for arm in others for seed in seeds(p)]
    return [*constant, *(online(p, corpus, seed) for seed in seeds(p))]


def chosen(
    p: Parameters, corpus: Corpus, store: Store, seed: int, fitted: FittedTable
) -> dict[str, Mixture]:
    """Return arm -> mixture of one seed; `fitted` is M's."""
    study = regmix(p, corpus, seed)
    _, choice = study.decide(store)
    losses = {}  # of the random mixtures, in the order of their draw
    for spec in study.specs()[len(study.baselines()) :]:
        bpb = {t: loss.bpb for t, loss in store.get(spec.run_id).losses.items()}
        losses[spec.mixture] = objective_bpb(bpb, study.objective)
    fifth = [*losses][: round(0.2 * p.proxies)]
    return {
        "RegMix": Mixture(choice.weights),
        "random": min(losses, key=losses.__getitem__),
        "random, a fifth": min(fifth, key=losses.__getitem__),
        **study.baselines(),
        **{f"D {c}": tikmix(p, corpus, seed, c).dynamic(store) for c in CURVATURES},
        "M diagonal": tikmix(p, corpus, seed).modelled(fitted),
    }


def search_flops(p: Parameters, corpus: Corpus, store: Store, seed: int) -> dict[str, float]:
    """Return arm -> FLOPs of its search, measurements included; 0 for the others."""
    proxies = [store.get(spec.run_id).flops for spec in regmix(p, corpus, seed).specs()]
    full = float(sum(proxies))
    cost = {"RegMix": full, "random": full, "random, a fifth": 0.2 * full}
    single = {c: tikmix(p, corpus, seed, c).single() for c in CURVATURES}
    cost |= {f"D {c}": store.get(spec.run_id).flops for c, spec in single.items()}
    cost["M diagonal"] = store.get(tikmix(p, corpus, seed).mixed().run_id).flops
    cost[ONLINE] = store.get(online(p, corpus, seed).run_id).signal_flops
    return cost


def table(
    p: Parameters, corpus: Corpus, store: Store, runs: Mapping[int, Mapping[str, TrainSpec]]
) -> pd.DataFrame:
    """Return a row for each arm and seed: loss, worse (targets above the prior's), cost (of the
    search, as a share of RegMix's), every target's loss, and weights.
    """
    wanted, rows = targets(p, corpus), []
    for seed, arms in runs.items():
        cost = search_flops(p, corpus, store, seed)
        before = store.get(arms[PRIOR].run_id).losses
        for arm, spec in arms.items():
            record = store.get(spec.run_id)
            bpb = {t: loss.bpb for t, loss in record.losses.items()}
            row = {"arm": arm, "seed": seed, "loss": objective_bpb(bpb, dict.fromkeys(wanted, 1.0))}
            row["worse"] = sum(bpb[t] > before[t].bpb for t in wanted)
            row["cost"] = cost.get(arm, 0.0) / cost["RegMix"]
            row |= {f"loss/{t}": bpb[t] for t in bpb}
            rows.append(row | {f"weight/{d}": record.mixture.get(d, 0.0) for d in corpus.domains})
    return pd.DataFrame(rows)


def verdict(found: pd.DataFrame) -> dict[str, Any]:
    """Return every arm less D, paired by seed, and what follows from that."""
    loss = {str(arm): rows["loss"].to_numpy(float) for arm, rows in found.groupby("arm")}
    gap = {arm: loss_S - loss[MAIN] for arm, loss_S in loss.items()}
    mine = found[found["arm"] == MAIN]
    against = [
        f"{arm} by {gap[arm].mean():+.4f} ({(gap[arm] > 0).sum()} of {len(mine)} seeds)"
        for arm in ("RegMix", "random, a fifth", "uniform", PRIOR)
    ]
    return {
        "arm_less_d": {arm: gap_S.tolist() for arm, gap_S in gap.items()},
        "verdict": (
            f"{MAIN} was below (+) or above (-), in bits per byte, {', '.join(against)}; its "
            f"search cost {mine['cost'].mean():.1%} of RegMix's. On average "
            f"{mine['worse'].mean():.1f} targets were worse than with the prior."
        ),
    }


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Choose, train what was chosen, and write reports/tikmix.csv and .json."""
    fits = {seed: tikmix(p, corpus, seed).fitted(store) for seed in seeds(p)}
    runs: dict[int, dict[str, TrainSpec]] = {}
    for seed, fitted in fits.items():
        template, arms = final(p, corpus, seed), chosen(p, corpus, store, seed, fitted)
        runs[seed] = {ONLINE: online(p, corpus, seed)} | {
            arm: dataclasses.replace(template, schedule=Schedule.constant(mixture, p.final_tokens))
            for arm, mixture in arms.items()
        }
    sweep([spec for arms in runs.values() for spec in arms.values()])
    found = table(p, corpus, store, runs)
    said = verdict(found)
    branches = {seed: tikmix(p, corpus, seed).branches(BRANCH_TOKENS) for seed in fits}
    said["forecast_spearman"] = {
        c: {s: tikmix(p, corpus, s, c).forecast(store, branches[s]) for s in fits}
        for c in CURVATURES
    }
    said["m_spearman"] = {  # over mixed sets: of the regressor where it has not looked; of S w
        "held out": [float(fitted.cv["spearman"].mean()) for fitted in fits.values()],
        "linear": [tikmix(p, corpus, seed).additivity(store) for seed in fits],
    }
    store.write_bytes("reports/tikmix.csv", found.to_csv(index=False).encode())
    store.write_json("reports/tikmix.json", said)
    means = pd.DataFrame(found.drop(columns="seed").groupby("arm").mean()).sort_values("loss")
    log.info("mean over %d seeds:\n%s", p.seeds, means.round(4).to_string())
    for c, of_seeds in said["forecast_spearman"].items():
        mean = pd.DataFrame(of_seeds).mean(axis=1).round(2).to_dict()
        log.info("Spearman of influence (%s) with branches: %s", c, mean)
    log.info("Spearman of mixed sets' influence, by seed: %s", said["m_spearman"])
    log.info("%s", said["verdict"])

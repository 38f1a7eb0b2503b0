"""DEM: experts of single sources added up, against training on a mixture of the sources.

Question:  A base, six sources of real text, the average of their losses. Is a merge of one expert a
           source (DEM) as good as one run on all of them, and what does the search for its weights
           cost beside a search for a mixture?
Published: Ram et al. 2024, arXiv:2406.15570: 11 times cheaper than data mixing, and better.
Method:    The base is a finished run on sources in natural proportions. From it, all methods read
           as many tokens per model, and search their rate on the first half of the held-out text.
           The mixing search tries 3 (sources + 1) mixtures (Olmix's rule) and is in the table too.
           Every arm is reported on the second half, which no choice has seen.
Cost:      `rayx run experiments/dem.py --dry-run`.
Run:       rayx run experiments/dem.py
           rayx run experiments/dem.py --set sizes=corpus --store runs/dem-corpus
Result:    Sources of very unequal size: DEM is below proportional mixing in 3 of 3 seeds, by .005,
           at 1/5.6 of the cost of the mixing search; but uniform mixing, which nobody has to
           search for, is .068 below DEM. See LOG.md.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.candidates import regmix_mixtures
from rayx.corpus import build_sample
from rayx.merging import Experts, MergeSpec, Operator, Spec
from rayx.methods.dem import DataSource, Dem, best_state, mean_loss
from rayx.methods.dem_search import OmegaSearch
from rayx.methods.merge_proxy import Sweep
from rayx.mixture import Phase
from rayx.spec import require

log = logging.getLogger(__name__)

BASE_TOKENS = 2_000_000
SOURCE_TOKENS = 60_000
LR_SHARES = (1.0, 0.3, 0.1)  # of the base's peak rate, for every arm
SCALES = (0.5, 0.75, 1.0, 1.5)
DENSITIES = (0.2, 0.5, 0.8)
ROUNDS = (24, 12, 12)
PROPORTIONAL = "proportional"
MIXING = "mixing search"


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built
    sizes: str = "halving"  # each source half the one before it, or as in the `corpus`
    width: int = 32
    seed: int = 1  # 0 chose the settings
    seeds: int = 3


def corpus(p: Parameters) -> Corpus:
    """Return the sample corpus, built on first use."""
    return build_sample(p.corpus, vocab_size=1024)


def natural(p: Parameters, corpus: Corpus) -> Mixture:
    """Return the sources in proportion to their sizes.

    Raises:
        SpecError: `sizes` is neither.
    """
    require(p.sizes in ("halving", "corpus"), "sizes", p.sizes, "'halving' or 'corpus'")
    if p.sizes == "corpus":
        return Mixture(corpus.proportional())
    ranked = sorted(corpus.domains, key=lambda d: -corpus.tokens[d])
    return Mixture({domain: 0.5**rank for rank, domain in enumerate(ranked)})


def method(p: Parameters, corpus: Corpus, seed: int) -> Dem:
    """Return the study of one seed."""
    base = TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(
            layers=1,
            width=p.width,
            heads=p.width // 16,
            ffn_width=3 * p.width,
            vocab_size=corpus.vocab_size,
            context=64,
        ),
        schedule=Schedule.constant(natural(p, corpus), BASE_TOKENS),
        optimizer=Optimizer(lr=8e-3 * (64 / p.width) ** 0.5, batch_sequences=8, warmup_share=0.02),
        evaluation=Evaluation(points=1, sequences=32, part="first"),
        seed=seed,
        data_seed=seed,
    )
    return Dem(
        base=base,
        sources={d: DataSource(Mixture({d: 1}), SOURCE_TOKENS) for d in corpus.domains},
        lr_shares=LR_SHARES,
        search=OmegaSearch(scales=SCALES, rounds=ROUNDS, seed=seed),
    )


def studies(p: Parameters, corpus: Corpus) -> dict[int, Dem]:
    """Return seed -> study."""
    return {seed: method(p, corpus, seed) for seed in range(p.seed, p.seed + p.seeds)}


def full_tokens(corpus: Corpus) -> int:
    """Return the tokens that a model reads after the base: those of all sources."""
    return SOURCE_TOKENS * len(corpus.domains)


def single_runs(p: Parameters, corpus: Corpus, dem: Dem) -> dict[str, list[TrainSpec]]:
    """Return arm -> its runs, one a rate; all sources shuffled together are `proportional`."""
    prior, tokens = natural(p, corpus), full_tokens(corpus)
    one_by_one = tuple(Phase(Mixture({d: 1}), round(w * tokens)) for d, w in prior.items())
    mixtures = mixing(p, corpus)
    names = (PROPORTIONAL, "temperature 2", "uniform")
    arms = {
        name: [dem.run(mixture, tokens, share) for share in LR_SHARES]
        for name, mixture in zip(names, mixtures, strict=False)
    }
    return arms | {"one after another": [dem.phases(one_by_one, share) for share in LR_SHARES]}


def mixing(p: Parameters, corpus: Corpus) -> list[Mixture]:
    """Return what a search for a mixture tries: three usual ones and random ones around them."""
    prior = natural(p, corpus)
    usual = [prior, Mixture({d: w**0.5 for d, w in prior.items()}), Mixture.uniform([*prior])]
    return [*usual, *regmix_mixtures(prior, 3 * len(prior), seed=p.seed)]


def mixing_runs(p: Parameters, corpus: Corpus, store: Store, dem: Dem) -> list[TrainSpec]:
    """Return the mixing search: every mixture, at the rate that is best for the natural one."""
    runs = single_runs(p, corpus, dem)[PROPORTIONAL]
    member, _ = best_state(store, runs, objective(corpus))
    share = LR_SHARES[[run.run_id for run in runs].index(member.spec.run_id)]
    return [dem.run(mixture, full_tokens(corpus), share) for mixture in mixing(p, corpus)]


def objective(corpus: Corpus) -> dict[str, float]:
    """Return the average over sources."""
    return dict.fromkeys(corpus.domains, 1.0)


def operators(dem: Dem, store: Store) -> dict[str, list[MergeSpec]]:
    """Return arm -> merges of DEM's experts by other operators."""
    experts = Experts(tuple(expert.member for expert in dem.experts(store)))
    validation = dataclasses.replace(dem.base.evaluation, points=1)
    equal = [1.0 / len(dem.sources)] * len(dem.sources)
    merge = functools.partial(experts.merge, equal, evaluation=validation)
    arms = {"soup": [merge(Operator(name="soup"))]}
    arms["equal omega"] = [merge(Operator(name="task_arithmetic", scale=s)) for s in SCALES]
    for name in ("ties", "dare"):
        arms[name] = [
            merge(Operator(name=name, density=density, scale=scale))
            for density in DENSITIES
            for scale in SCALES
        ]
    return arms


def specs(p: Parameters, corpus: Corpus) -> list[Spec]:
    """Return the experts and the single runs."""
    found: list[Spec] = []
    for dem in studies(p, corpus).values():
        found += dem.specs()
        found += [run for runs in single_runs(p, corpus, dem).values() for run in runs]
    return found


def propose(p: Parameters, corpus: Corpus, store: Store) -> list[Spec]:
    """Return what needs the experts and the rates: merges in rounds, and the mixing search."""
    found: list[Spec] = []
    for dem in studies(p, corpus).values():
        found += dem.proposed(store)
        found += mixing_runs(p, corpus, store, dem)
        found += [merge for merges in operators(dem, store).values() for merge in merges]
    return found


def follow_up(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return runs as costly as those of the mixing searches."""
    return [
        dem.run(mixture, full_tokens(corpus), LR_SHARES[0])
        for dem in studies(p, corpus).values()
        for mixture in mixing(p, corpus)[3:]
    ]


def chosen(p: Parameters, corpus: Corpus, store: Store, dem: Dem) -> dict[str, MergeSpec]:
    """Return arm -> the state chosen by validation, as a merge on the text that is reported."""
    report = dataclasses.replace(dem.base.evaluation, points=1, sequences=256, part="second")
    wanted = objective(corpus)
    arms = {"DEM": dataclasses.replace(dem.decide(store).spec, evaluation=report)}
    for name, merges in operators(dem, store).items():
        best = min(merges, key=lambda merge: mean_loss(store.get(merge.run_id).losses, wanted))
        arms[name] = dataclasses.replace(best, evaluation=report)
    runs = single_runs(p, corpus, dem) | {MIXING: mixing_runs(p, corpus, store, dem)}
    runs["base"] = [dem.base]
    for name, tried in runs.items():
        member, _ = best_state(store, tried, wanted)
        arms[name] = Experts((member,)).merge((1.0,), evaluation=report)
    return arms


def costs(p: Parameters, corpus: Corpus, store: Store, dem: Dem) -> dict[str, float]:
    """Return arm -> tokens that its search and its model took beyond the base."""
    ledger = dem.decide(store).cost
    experts = sum(ledger.source_tokens.values())
    experts += ledger.evaluations["checkpoints"] * ledger.evaluation_tokens
    found = {"base": 0.0, "DEM": ledger.tokens}
    for name, merges in operators(dem, store).items():
        found[name] = experts + len(merges) * ledger.evaluation_tokens
    for name, runs in single_runs(p, corpus, dem).items():
        found[name] = float(sum(run.tokens for run in runs))
    # Its rates are tried on one mixture; what it evaluates is for free.
    configurations = len(mixing(p, corpus)) + len(LR_SHARES) - 1
    found[MIXING] = float(configurations * full_tokens(corpus))
    return found


def table(
    p: Parameters, corpus: Corpus, store: Store, arms: Mapping[int, Mapping[str, MergeSpec]]
) -> pd.DataFrame:
    """Return a row for each arm and seed: loss (mean over sources), each source's, cost_tokens."""
    rows = []
    for seed, dem in studies(p, corpus).items():
        cost = costs(p, corpus, store, dem)
        for name, spec in arms[seed].items():
            bpb = {t: loss.bpb for t, loss in store.get(spec.run_id).losses.items()}
            mean = float(np.mean([bpb[d] for d in corpus.domains]))
            rows.append({"arm": name, "seed": seed, "loss": mean, "cost_tokens": cost[name]} | bpb)
    return pd.DataFrame(rows)


def verdict(found: pd.DataFrame) -> dict[str, object]:
    """Return every arm less DEM, paired by seed, and the ratio of the two searches' costs."""
    loss = {str(arm): rows["loss"].to_numpy(float) for arm, rows in found.groupby("arm")}
    gap = {arm: loss_S - loss["DEM"] for arm, loss_S in loss.items()}
    cost = {str(arm): float(rows["cost_tokens"].mean()) for arm, rows in found.groupby("arm")}
    won = int((gap[PROPORTIONAL] > 0).sum())
    return {
        "arm_less_dem": {arm: gap_S.tolist() for arm, gap_S in gap.items()},
        "cost_ratio": cost[MIXING] / cost["DEM"],
        "verdict": (
            f"DEM was below proportional mixing in {won} of {len(loss['DEM'])} seeds, by "
            f"{gap[PROPORTIONAL].mean():+.4f} bits per byte, at 1/{cost[MIXING] / cost['DEM']:.1f} "
            "of the cost of the mixing search. It was above that search's best mixture by "
            f"{-gap[MIXING].mean():+.4f}, and above uniform mixing, which takes no search, by "
            f"{-gap['uniform'].mean():+.4f}."
        ),
    }


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Evaluate what was chosen on text that no choice has seen; write reports/dem.csv and .json."""
    arms = {seed: chosen(p, corpus, store, dem) for seed, dem in studies(p, corpus).items()}
    sweep([spec for of_seed in arms.values() for spec in of_seed.values()])
    found = table(p, corpus, store, arms)
    said = verdict(found)
    models = {}
    for seed, dem in studies(p, corpus).items():
        model = dem.decide(store)
        models[seed] = {
            "omega": model.omega,
            "validation": model.loss,
            "experts": {
                e.source: {"lr": e.member.spec.optimizer.lr, "steps": e.member.steps}
                for e in model.experts
            },
            "cost": dataclasses.asdict(model.cost),
            "loss_by_candidate": model.loss_C.tolist(),
        }
        log.info("seed %d: omega %s", seed, {d: round(w, 3) for d, w in model.omega.items()})
    store.write_bytes("reports/dem.csv", found.to_csv(index=False).encode())
    store.write_json("reports/dem.json", said | {"models": models})
    columns = ["loss", "cost_tokens", *corpus.domains]
    means = pd.DataFrame(found.groupby("arm")[columns].mean()).sort_values("loss")
    log.info("mean over %d seeds:\n%s", p.seeds, means.round(4).to_string())
    log.info("arm less DEM, by seed: %s", said["arm_less_dem"])
    log.info("%s", said["verdict"])
    log.info("wrote reports/dem.csv and .json in %s", store.url)

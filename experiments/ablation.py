"""Data ablations by averages: can averages of six experts stand for runs on subsets of domains?

Question:  Six domains of real text are units of equal size. Does the perplexity of an average of
           unit experts follow that of a model trained on the same subset of units, on domains
           inside and outside the subset? And are bags, averaged (BOOM), better than one run?
Method:    Trunk, an expert a unit, micro and macro averages of all 57 subsets of two units and
           more; the same subsets trained, on the tokens of one unit (every seed) and on those of
           all their units (the first seed); correlations over subsets. Bags of all data beside one
           run; three domains that arrive after a base on the other three.
Published: Na et al. 2024, arXiv:2410.15661: strongly correlated (figures not read).
Cost:      `rayx run experiments/ablation.py --dry-run`; 40M tokens, 11 minutes on 2 busy cores.
Run:       rayx run experiments/ablation.py
           rayx run experiments/ablation.py --set general_share=0.5 --set union_seeds=0
Result:    Fixed tokens, 3 seeds: mean Pearson over targets .919 inside, .957 outside, .969 for the
           loss averaged over targets; two trained seeds agree to .961, .947, .980. Half general
           text: .969 inside, .796 outside, where two seeds agree to .773. Averaging the units'
           losses instead does as well inside and fails outside (.773) and on the average (.387).
           Bags beat one bag by .037 bits per byte and lose to one run of their tokens by .059.
"""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from typing import cast

import numpy as np
import pandas as pd

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.corpus import build_sample
from rayx.merging import Spec
from rayx.methods.ablation import Ablation
from rayx.methods.ablation_scores import AVERAGE, POOLED, SCORES, correlations, regrets
from rayx.methods.boom import Bagging, Incremental
from rayx.methods.merge_proxy import MergeProxy, Sweep

log = logging.getLogger(__name__)

GROUPS = (("code",), ("docs", "wiki", "medicine"), ("legal", "speeches"))
ARRIVALS = ("medicine", "code", "speeches")  # after a base on the other domains
TRUNK_TOKENS = 600_000
UNIT_TOKENS = 80_000


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built
    seeds: int = 3
    union_seeds: int = 1  # of the runs on the tokens of all units of a subset
    subsets: int = 57  # of the 57 of two units and more
    general_share: float = 0.0  # of the trunk's mixture in every expert and subset
    bags: int = 4
    history_share: float = 0.2
    seed: int = 0


def corpus(p: Parameters) -> Corpus:
    """Return the sample corpus, built on first use."""
    return build_sample(p.corpus, vocab_size=1024)


def seeds(p: Parameters) -> range:
    """Return the seeds."""
    return range(p.seed, p.seed + p.seeds)


def proxy(corpus: Corpus, seed: int, general: Mixture | None = None) -> MergeProxy:
    """Return the base, trained on `general` (default: all domains equally), and its branches."""
    template = TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(layers=1, width=64, heads=4, ffn_width=192, vocab_size=1024, context=64),
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), TRUNK_TOKENS),
        optimizer=Optimizer(lr=4e-3, batch_sequences=8),
        evaluation=Evaluation(points=1, sequences=64),
        seed=seed,
        data_seed=seed,
    )
    return MergeProxy(
        template=template,
        general=general or Mixture.uniform(corpus.domains),
        domains=tuple(corpus.domains),
        trunk_tokens=TRUNK_TOKENS,
        branch_tokens=UNIT_TOKENS,
    )


def ablation(p: Parameters, corpus: Corpus, seed: int) -> Ablation:
    """Return the study of one seed."""
    return Ablation(proxy=proxy(corpus, seed), groups=GROUPS, general_share=p.general_share)


def truths(p: Parameters, seed: int) -> tuple[str, ...]:
    """Return what is trained with a seed."""
    return ("fixed", "union") if seed < p.seed + p.union_seeds else ("fixed",)


def boom_arms(p: Parameters, corpus: Corpus, seed: int) -> dict[str, dict[str, Spec]]:
    """Return study -> arm -> run."""
    base = proxy(corpus, seed)
    everything = Mixture.uniform(corpus.domains)
    bagging = Bagging(proxy=base, mixture=everything, bags=p.bags)
    drawn = dataclasses.replace(bagging, draws=len(corpus.domains))
    old = Mixture.uniform([d for d in corpus.domains if d not in ARRIVALS])
    arriving = Incremental(
        proxy=proxy(corpus, seed, old), arrivals=ARRIVALS, history_share=p.history_share
    )
    last = len(ARRIVALS)
    return {
        "bagging": {
            "one bag": base.branch(everything),
            "bags, averaged": bagging.merged(),
            "bags of drawn domains, averaged": drawn.merged(),
            "one run, tokens of all bags": bagging.single(),
        },
        "incremental": {
            "base alone": arriving.experts()[0],
            "averaged as it comes": arriving.current(last),
            "continued, with history": arriving.continued(last),
            "continued, new data only": arriving.continued(last, history_share=0.0),
            "all at once": arriving.again(last),
        },
    }


def specs(p: Parameters, corpus: Corpus) -> list[Spec]:
    """Return every run, trained and merged."""
    found: list[Spec] = []
    for seed in seeds(p):
        study = ablation(p, corpus, seed)
        subsets = study.subsets(p.subsets, p.seed)
        found += study.averages(subsets)
        found += [study.trained(s, truth) for truth in truths(p, seed) for s in subsets]
        found += [run for arms in boom_arms(p, corpus, seed).values() for run in arms.values()]
    return list({spec.run_id: spec for spec in found}.values())


def boom_table(p: Parameters, corpus: Corpus, store: Store) -> pd.DataFrame:
    """Return a row for each study, arm and seed: mean losses in bits per byte.

    Columns: study, arm, seed, loss (mean over all domains), old and new (over the domains that
    were there first, and that arrived).
    """
    rows = []
    for seed in seeds(p):
        for study, arms in boom_arms(p, corpus, seed).items():
            for arm, run in arms.items():
                bpb = {t: loss.bpb for t, loss in store.get(run.run_id).losses.items()}
                parts = {
                    "loss": corpus.domains,
                    "old": [d for d in corpus.domains if d not in ARRIVALS],
                    "new": ARRIVALS,
                }
                means = {name: np.mean([bpb[d] for d in part]) for name, part in parts.items()}
                rows.append({"study": study, "arm": arm, "seed": seed, **means})
    return pd.DataFrame(rows)


def with_other_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Add `other_seed`: the trained perplexity of the next seed, nan where there is none.

    As an approximation it is what noise leaves to reach.
    """
    seed_count = table["seed"].nunique()
    key = ["truth", "subset", "target"]
    trained = table.set_index(["seed", *key])["trained"]
    first = table["seed"].min()
    following = (table["seed"] - first + 1) % seed_count + first
    wanted = pd.MultiIndex.from_frame(table.loc[:, key].assign(seed=following)[["seed", *key]])
    return table.assign(other_seed=trained.reindex(wanted).to_numpy())


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """Return the correlations, those between seeds where there are several among them."""
    both = with_other_seed(table)
    again = both.loc[both["other_seed"].notna() & (both["truth"] == "fixed")]
    if table["seed"].nunique() == 1:
        return correlations(table)
    return pd.concat([correlations(table), correlations(again, ["other_seed"])])


def summary(found: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return title -> table of what is logged of the correlations."""
    by = ["truth", "side", "approximation"]
    single = found.loc[~found["target"].isin([POOLED, AVERAGE])]
    micro = single.loc[single["approximation"] == "micro"]
    pooled, average = (found.loc[found["target"] == name] for name in (POOLED, AVERAGE))
    return {
        "correlation with the trained, mean over targets and seeds": _mean(single, by),
        "the least over targets and seeds": single.groupby(by, as_index=False)[SCORES].min(),
        "micro by target, mean over seeds": _mean(micro, [*by[:2], "target"]),
        "log perplexity of all targets together, mean over seeds": _mean(pooled, by),
        "log perplexity averaged over targets, mean over seeds": _mean(average, by),
    }


def _mean(found: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    return cast(pd.DataFrame, found.groupby(by, as_index=False)[SCORES].mean())


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Correlate and compare; write reports/ablation.json and .csv."""
    studies = {seed: ablation(p, corpus, seed) for seed in seeds(p)}
    first = studies[p.seed]
    subsets = first.subsets(p.subsets, p.seed)
    table = pd.concat(
        [study.table(store, subsets, truths(p, seed)) for seed, study in studies.items()],
        ignore_index=True,
    )
    found, regret, boom = compared(table), regrets(table), boom_table(p, corpus, store)
    costs = {truth: first.costs(store, subsets, truth) for truth in truths(p, p.seed)}
    table["gap"] = np.log(table["micro"] / table["trained"])
    gap = table.groupby(["truth", "side"], as_index=False)[["gap"]].mean()
    store.write_bytes("reports/ablation.csv", table.to_csv(index=False).encode())
    store.write_json(
        "reports/ablation.json",
        {
            "correlations": found.to_dict("records"),
            "regrets": regret.to_dict("records"),
            "boom": boom.to_dict("records"),
            "costs": costs,
        },
    )
    arms = boom.groupby(["study", "arm"], sort=False)[["loss", "old", "new"]]
    tables = {
        **summary(found),
        "regret of the subset liked best, nats per token": regret,
        "log of micro's perplexity over the trained": gap,
        "bits per byte, mean over seeds": arms.mean(),
        "bits per byte, deviation over seeds": arms.std(),
    }
    for title, frame in tables.items():
        log.info("%s:\n%s", title, frame.round(4).to_string(index="arm" in frame.index.names))
    log.info("tokens: %s", costs)
    log.info("wrote reports/ablation.json and .csv in %s", store.url)

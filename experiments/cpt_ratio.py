"""Continued pretraining: how much of a new domain, how much replay of the old ones?

Question:  A general model (five domains of real text) goes on with code. Which share of code gains
           most on code while the general loss rises by at most a tolerance? Which when there is
           little code? Do laws fitted on smaller models and shorter runs tell?
Method:    A general trunk at three sizes, branches at seven ratios; the D-CPT law of both losses.
           Then a larger size, half as many tokens again, other ratios, over seeds: predicted and
           measured ratio, and the choice beside no replay and uniform replay. The critical-ratio
           law from the first half of those curves against the second half.
Cost:      `rayx run experiments/cpt_ratio.py --dry-run`; about 5 minutes on 2 cores.
Run:       rayx run experiments/cpt_ratio.py
Result:    Predicted 82% code within 3%, measured 84-86% (3 seeds), general loss up by 1.2-2.7%; the
           small models' own best is 75-80%. The critical-ratio law is off by up to 20 points.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.corpus import build_sample
from rayx.methods.cpt_ratio import LOSSES, CptLaws, CptRatio
from rayx.methods.cpt_verify import law_errors, mean_arms, verify
from rayx.methods.regmix import Sweep
from rayx.report.studies import cpt_figure

log = logging.getLogger(__name__)

WIDTHS = (32, 48, 64)
LARGER_WIDTH = 96
RATIOS = (0.0, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8, 1.0)
UNIFORM, NO_REPLAY = 1 / 6, 1.0  # the baselines
CHECKED = (UNIFORM, 3 / 8, 5 / 8, 13 / 16, 15 / 16, NO_REPLAY)  # at the larger size
TRUNK_TOKENS = 300_000
TOKENS = 300_000  # of the branches that the laws see
LARGER_TOKENS = 450_000
POINT_TOKENS = 30_000


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built
    domain: str = "code"
    domain_tokens: int = 30_000  # what there is of it, where there is little
    tolerance: float = 0.03  # rise of the general loss, as the paper's
    verify_seeds: int = 3
    seed: int = 0


def corpus(p: Parameters) -> Corpus:
    """Return the sample corpus, built on first use."""
    return build_sample(p.corpus, vocab_size=1024)


def method(p: Parameters, corpus: Corpus) -> CptRatio:
    """Return the study."""
    return CptRatio(
        corpus=corpus,
        domain=p.domain,
        trunk_tokens=TRUNK_TOKENS,
        point_tokens=POINT_TOKENS,
    )


def template(corpus: Corpus, width: int, seed: int) -> TrainSpec:
    """Return a run of one size; the rate falls with the width."""
    return TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(
            layers=1,
            width=width,
            heads=width // 16,
            ffn_width=3 * width,
            vocab_size=1024,
            context=64,
        ),
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), TRUNK_TOKENS),
        optimizer=Optimizer(lr=8e-3 * (64 / width) ** 0.5, batch_sequences=8),
        evaluation=Evaluation(points=1, sequences=48),
        seed=seed,
        data_seed=seed,
    )


def smaller(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return the templates of the sizes that the laws see."""
    return [template(corpus, width, p.seed) for width in WIDTHS]


def larger(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return the templates of the verification, one a seed, of seeds that no fit has seen."""
    first = 1_000 * (p.seed + 1)
    seeds = range(first, first + p.verify_seeds)
    return [template(corpus, LARGER_WIDTH, seed) for seed in seeds]


def specs(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return the branches of the fit and those that measure the larger size."""
    study = method(p, corpus)
    fitted = [study.branch(t, r, TOKENS) for t in smaller(p, corpus) for r in RATIOS]
    checked = [study.branch(t, r, LARGER_TOKENS) for t in larger(p, corpus) for r in CHECKED]
    return fitted + checked


def follow_up(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return runs as costly as those at the ratio that the laws will give."""
    study = method(p, corpus)
    return [study.branch(t, 0.7, LARGER_TOKENS) for t in larger(p, corpus)]


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Fit, predict, train at the predicted ratios, compare; write reports/cpt_ratio.*."""
    study, templates = method(p, corpus), larger(p, corpus)
    laws = CptLaws.fit(study.curves(store, smaller(p, corpus), RATIOS, TOKENS))
    grid = study.curves(store, templates, CHECKED, LARGER_TOKENS)
    params = templates[0].model.params
    base = float(grid.loc[grid["tokens"] == 0, "general_loss"].mean())
    limit = (1.0 + p.tolerance) * base
    ratios = {
        "within": laws.ratio_within(params, LARGER_TOKENS, limit),
        "few": laws.ratio_of_few(params, LARGER_TOKENS, p.domain_tokens),
    }
    least = p.domain_tokens / LARGER_TOKENS  # below this ratio the budget ends first
    few_tokens = round(p.domain_tokens / max(ratios["few"], least))
    lengths = {"within": LARGER_TOKENS, "few": few_tokens}
    sweep([study.branch(t, ratios[u], length) for t in templates for u, length in lengths.items()])
    chosen = {
        usage: study.curves(store, templates, (ratios[usage],), length)
        for usage, length in lengths.items()
    }
    seeds = verify(grid, chosen, p.tolerance, p.domain_tokens)
    errors = law_errors(laws, grid, TOKENS)
    store.write_json(
        "reports/cpt_ratio.json",
        {
            "domain": p.domain,
            "params": params,
            "tokens": LARGER_TOKENS,
            "general_loss_before": base,
            "general_loss_limit": limit,
            "laws": {"domain": laws.domain.params_, "general": laws.general.params_},
            "law_errors": errors,
            "seeds": seeds,
        },
    )
    ratio_M = np.linspace(0.0, 1.0, 101)
    lines = np.vstack([ratio_M, laws.predict(params, LARGER_TOKENS, ratio_M)]).T
    predicted = pd.DataFrame(lines, columns=["ratio", *LOSSES])
    measured = grid.loc[grid["tokens"] == grid["tokens"].max()]
    store.write_bytes("reports/cpt_ratio.png", cpt_figure(predicted, measured, limit, seeds))
    log.info("mean |predicted / measured - 1| at the larger size: %s", errors)
    for usage, ratio in ratios.items():
        measured = [round(seed[usage]["measured_ratio"], 3) for seed in seeds]
        arms = mean_arms(seeds, usage).round(4).to_string(index=False)
        log.info("%s: predicted %.3f, measured %s by seed; arms:\n%s", usage, ratio, measured, arms)
    for name in ("critical_predicted", "critical_measured"):
        log.info("%s by seed: %s", name, [seed[name] for seed in seeds])
    log.info("wrote reports/cpt_ratio.json and .png in %s", store.url)

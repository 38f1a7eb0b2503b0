"""Optimal split: when should one general model become one expert a domain?

Question:  A budget of tokens, six domains of real text: how many of them on the general mixture,
           before it splits into six experts? Does a law fitted on small models and budgets tell?
Method:    Trunks at four sizes, branches at many (trunk, branch) lengths, a law of both; then, at
           a larger size and budget and over seeds, the choice beside no split and fixed splits.
Cost:      `rayx run experiments/optimal_split.py --dry-run`.
Run:       rayx run experiments/optimal_split.py
"""

from __future__ import annotations

from dataclasses import dataclass

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.corpus import build_sample
from rayx.experiment import Conclusion
from rayx.methods.optimal_split import OptimalSplit, Point, Sweep

WIDTHS = (32, 48, 64, 96)
LARGER_WIDTH = 128
# (trunk tokens, branch tokens): with six branches at most 1.6 million together.
POINTS: tuple[Point, ...] = (
    (100_000, 0), (100_000, 17_000), (100_000, 50_000), (100_000, 125_000), (100_000, 250_000),
    (250_000, 0), (250_000, 17_000), (250_000, 50_000), (250_000, 125_000), (250_000, 225_000),
    (500_000, 0), (500_000, 17_000), (500_000, 50_000), (500_000, 110_000), (500_000, 180_000),
    (800_000, 0), (800_000, 50_000), (800_000, 130_000),
    (1_200_000, 0), (1_200_000, 65_000),
    (1_600_000, 0),
)  # fmt: skip


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built
    budget_tokens: int = 2_000_000  # trunk and branches of the final run
    verify_seeds: int = 3
    law: str = "auto"
    seed: int = 0


def corpus(p: Parameters) -> Corpus:
    """Return the sample corpus, built on first use."""
    return build_sample(p.corpus, vocab_size=1024)


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
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), 1_000_000),
        optimizer=Optimizer(lr=8e-3 * (64 / width) ** 0.5, batch_sequences=8, warmup_share=0.02),
        evaluation=Evaluation(points=1, sequences=64),
        seed=seed,
        data_seed=seed,
    )


def method(p: Parameters, corpus: Corpus) -> OptimalSplit:
    """Return the study."""
    return OptimalSplit(
        corpus=corpus,
        scales=tuple(template(corpus, width, p.seed) for width in WIDTHS),
        points=POINTS,
        general=Mixture.uniform(corpus.domains),
        domains=tuple(corpus.domains),
        final=template(corpus, LARGER_WIDTH, p.seed),
        budget_tokens=p.budget_tokens,
        # Seeds that no run of the fit has used.
        seeds=tuple(range(1_000 * (p.seed + 1), 1_000 * (p.seed + 1) + p.verify_seeds)),
        fixed_shares=(0.1, 0.25, 0.4, 0.6, 0.8),
        law=p.law,
    )


def final(p: Parameters, corpus: Corpus) -> TrainSpec:
    """Return the model of the final run."""
    return template(corpus, LARGER_WIDTH, p.seed)


def specs(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return the runs of the fit."""
    return method(p, corpus).specs()


def follow_up(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return runs about as costly as those of the verification."""
    arms = method(p, corpus).follow_up(trunk_tokens=0.5 * p.budget_tokens)
    return [spec for runs in arms.values() for spec in runs]


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> Conclusion:
    """Fit the law, choose the split, verify and plan."""
    return method(p, corpus).conclude(store, sweep, name=f"split-{p.seed}")

"""Quickstart: choose a mixture for a small documentation model from real text, on two CPU cores.

Question:  Six domains of unequal supply; which mixture gives the lowest loss on documentation,
           encyclopedia, READMEs (which no domain holds) and code, in the weights of OBJECTIVE?
Method:    RegMix: proxies over sampled mixtures, regression, simulate and average; then the choice,
           uniform, proportional and the best proxy's mixture are trained at a larger scale.
Cost:      `rayx run experiments/quickstart.py --dry-run`; about 5 minutes on 2 cores.
Run:       make demo, or rayx run experiments/quickstart.py
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.corpus import build_sample
from rayx.errors import SpecError
from rayx.experiment import Conclusion
from rayx.methods.regmix import RegMix, Sweep

# Documentation is what the model is for, and the scarcest domain.
OBJECTIVE = {"docs": 4, "wiki": 2, "readmes": 2, "code": 1}


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built
    proxies: int = 48
    rounds: int = 1  # that they are trained in; later ones look where the earlier ones point
    proxy_tokens: int = 200_000
    verify_tokens: int = 400_000
    verify_seeds: int = 3
    final_tokens: int = 2_000_000  # of the run that the plan is for
    max_epochs: float = 4.0
    regressor: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.proxies < 16:
            raise SpecError(f"proxies is {self.proxies}; expected at least 16 to fit 6 domains.")
        if not 1 <= self.rounds <= self.proxies // 12:
            raise SpecError(
                f"rounds is {self.rounds}; expected 1 to {self.proxies // 12}, 12 proxies each."
            )


def corpus(p: Parameters) -> Corpus:
    """Return the sample corpus, built on first use."""
    return build_sample(p.corpus, vocab_size=1024)


def proxy(p: Parameters, corpus: Corpus) -> TrainSpec:
    """Return a proxy, of 0.12M parameters."""
    return TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(layers=1, width=64, heads=4, ffn_width=192, vocab_size=1024, context=64),
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), p.proxy_tokens),
        optimizer=Optimizer(lr=8e-3, batch_sequences=8),
        evaluation=Evaluation(points=3, sequences=64),
    )


def final(p: Parameters, corpus: Corpus) -> TrainSpec:
    """Return the model of the verification and of the final run, of 0.34M parameters."""
    small = proxy(p, corpus)
    return dataclasses.replace(
        small,
        model=dataclasses.replace(small.model, layers=2, width=96, heads=6, ffn_width=288),
        optimizer=Optimizer(lr=4e-3, batch_sequences=8),
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), p.verify_tokens),
        evaluation=Evaluation(points=3, sequences=128),
    )


def method(p: Parameters, corpus: Corpus) -> RegMix:
    """Return the study: proxies, verified at three times their size and twice their tokens."""
    return RegMix(
        corpus=corpus,
        proxy=proxy(p, corpus),
        num_proxies=p.proxies,
        rounds=p.rounds,
        objective=OBJECTIVE,
        budget_tokens=p.final_tokens,
        max_epochs=p.max_epochs,
        seed=p.seed,
        regressor=p.regressor,
        verification=final(p, corpus) if p.verify_seeds else None,
        verification_seeds=p.verify_seeds,
    )


def specs(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return the proxies of the first round."""
    return method(p, corpus).specs()


def propose(p: Parameters, corpus: Corpus, store: Store) -> list[TrainSpec]:
    """Return the proxies of all rounds that the records allow."""
    return method(p, corpus).proposed(store)


def follow_up(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return runs as costly as those of the verification."""
    return method(p, corpus).follow_up_cost()


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> Conclusion:
    """Choose, verify, plan and report."""
    return method(p, corpus).conclude(store, sweep, name=f"quickstart-{p.seed}")

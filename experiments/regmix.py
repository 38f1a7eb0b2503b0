"""RegMix at the paper's size: 17 domains of the Pile, 512 proxies of 1M parameters, 1B tokens each.

Question:  Which mixture of the Pile's domains gives the lowest Pile-CC loss?
Published: Liu et al. 2024, arXiv:2407.01492: Pile-CC .870, Ubuntu IRC .064, PubMed abstracts .024.
Cost:      512 runs, 5.1e11 tokens; `rayx run experiments/regmix.py --dry-run` gives FLOPs and time.
           Scaled down it runs anywhere, on whatever corpus there is:
               rayx run experiments/regmix.py --set corpus=data/sample --set layers=1 \\
                   --set width=64 --set context=64 --set batch_sequences=8 --set lr=8e-3 \\
                   --set proxies=32 --set tokens=120_000 --set target=docs \\
                   --set final_tokens=2_000_000 --set verify_seeds=2
Corpus:    Build it first from the Pile's domains, with a 50,432-token tokenizer:
               rayx corpus build data/pile --table 'pile/*.parquet' --domain-column domain \\
                   --tokenizer EleutherAI/gpt-neox-20b
Result:    Not run at full size; scaled down (2026-11-22) the choice beats uniform and proportional,
           not clearly the best of 32 proxies; see LOG.md.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.errors import SpecError, did_you_mean
from rayx.experiment import Conclusion
from rayx.methods.regmix import RegMix, Sweep


@dataclass(frozen=True)
class Parameters:
    """What --set may change; the defaults are the paper's tinyllama_1M."""

    corpus: str = "data/pile"
    target: str = "pile_cc"  # the objective: this target's loss alone
    proxies: int = 512
    tokens: int = 1_000_000_000
    layers: int = 2
    width: int = 256
    heads: int = 8
    context: int = 2_048
    batch_sequences: int = 512
    lr: float = 4e-4
    warmup_share: float = 0.1
    final_tokens: int = 25_000_000_000
    max_epochs: float = 4.0
    regressor: str = "lightgbm"
    verify_scale: int = 2  # width and tokens of the verification, as multiples of the proxies'
    verify_seeds: int = 3  # 0: no verification
    seed: int = 42


def corpus(p: Parameters) -> Corpus:
    """Open the corpus."""
    found = Corpus.load(p.corpus)
    if p.target not in found.targets:
        raise SpecError(
            f"target is {p.target!r}; corpus {p.corpus} has {', '.join(found.targets)}. "
            f"Give one with --set target=NAME.{did_you_mean(p.target, found.targets)}"
        )
    return found


def method(p: Parameters, corpus: Corpus) -> RegMix:
    """Return the study."""
    anything = Mixture.uniform(corpus.domains)
    proxy = TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(
            layers=p.layers,
            width=p.width,
            heads=p.heads,
            ffn_width=2 * p.width,
            vocab_size=corpus.vocab_size,
            context=p.context,
            tied_embeddings=False,
        ),
        schedule=Schedule.constant(anything, p.tokens),
        # The paper's rate is constant after the warm-up.
        optimizer=Optimizer(
            lr=p.lr,
            batch_sequences=p.batch_sequences,
            warmup_share=p.warmup_share,
            decay_share=0.0,
        ),
        evaluation=Evaluation(points=5, sequences=128),
    )
    width = p.verify_scale * p.width
    larger = dataclasses.replace(
        proxy,
        model=dataclasses.replace(proxy.model, width=width, ffn_width=2 * width),
        schedule=Schedule.constant(anything, p.verify_scale * p.tokens),
    )
    return RegMix(
        corpus=corpus,
        proxy=proxy,
        num_proxies=p.proxies,
        objective={p.target: 1.0},
        budget_tokens=p.final_tokens,
        max_epochs=p.max_epochs,
        seed=p.seed,
        regressor=p.regressor,
        verification=larger if p.verify_seeds else None,
        verification_seeds=p.verify_seeds,
    )


def specs(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return the proxies."""
    return method(p, corpus).specs()


def follow_up(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return runs as costly as those of the verification."""
    return method(p, corpus).follow_up_cost()


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> Conclusion:
    """Choose, verify, plan and report."""
    return method(p, corpus).conclude(store, sweep, name=f"regmix-{p.target}-{p.seed}")

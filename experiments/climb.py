"""CLIMB: real text without labels -> clusters -> proxies in three rounds -> a mixture of clusters.

Question:  Text of six kinds, its labels thrown away, is clustered. Which mixture of the clusters
           gives the lowest loss on documentation, encyclopedia, READMEs and code, in the weights of
           OBJECTIVE? Does CLIMB find one that beats uniform over clusters and random search?
Published: Diao et al. 2025, arXiv:2504.13161: 64, 32 and 16 proxies; better than random and RegMix.
Method:    CLIMB's 112 proxies in rounds; RegMix's 112 at once, of which the best is random search.
           Choices, uniform and proportional are trained at 2.8 times the size on twice the tokens.
           Held-out text of the kinds (pieces of one document together) is in no cluster; choices
           read its first half, the second half is reported.
Cost:      `rayx run experiments/climb.py --dry-run`.
Run:       rayx run experiments/climb.py --set seed=0
           rayx run experiments/climb.py --set domains=labels --store runs/climb-labels
           The second is what true labels would have given: RegMix on them, same text and targets.
Result:    Above uniform by .17-.22 bits per byte in 3 of 3 seeds; above the best of 112 random
           proxies by .016, .077 and .008, clearly in one; above RegMix in 1 of 3. See LOG.md.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.choose import Constraints, choose
from rayx.corpus import Source, build_corpus, extract_sample
from rayx.corpus.clusters.cluster import Clustering, cluster_corpus
from rayx.errors import SpecError
from rayx.experiment import Conclusion
from rayx.fit import FittedTable, fit_once
from rayx.methods.climb import Climb, PoolOptimum
from rayx.methods.regmix import RegMix, Sweep
from rayx.verify import CHOICE

log = logging.getLogger(__name__)

OBJECTIVE = {"docs": 4, "wiki": 2, "readmes": 2, "code": 1}  # the quickstart's
SIZES = {  # bytes of text of each kind, at most
    "code": 3_000_000, "legal": 3_000_000, "speeches": 2_400_000, "wiki": 1_600_000,
    "medicine": 700_000, "docs": 1_000_000, "readmes": 400_000,
}  # fmt: skip
HELDOUT_SHARE = 0.15  # of the documents of a kind in OBJECTIVE
VOCAB_SIZE = 1024


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/climb"  # where the clusters' corpus is, or is built; -labels, -text beside
    domains: str = "clusters"  # or labels, for comparison
    clusters: int = 20  # those too small for a held-out set join others: 14-16 remain
    first: int = 64  # proxies of the three rounds
    second: int = 32
    third: int = 16
    proxy_tokens: int = 200_000
    verify_seeds: int = 4
    final_tokens: int = 4_000_000  # of the run that the plan is for
    max_epochs: float = 4.0
    regressor: str = "auto"
    own_seeds: bool = True  # of CLIMB's proxies
    seed: int = 0  # 0-3 and 9 chose the settings

    def __post_init__(self) -> None:
        if self.domains not in ("clusters", "labels"):
            raise SpecError(f"domains is {self.domains!r}; expected clusters or labels.")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Proxies of each round; a round of 0 is none."""
        return tuple(size for size in (self.first, self.second, self.third) if size)


def texts(p: Parameters) -> tuple[Source, list[Source]]:
    """Return the text to train on, kinds only in a column, and the held-out text of each target."""
    folder = Path(f"{p.corpus}-text").expanduser().absolute()
    raw = extract_sample(folder / "raw", sizes=SIZES)
    known, train = {Path(source.path).stem for source in raw}, folder / "train.jsonl"
    if not train.exists():
        rows: dict[str, list[str]] = {"train": [], **{target: [] for target in OBJECTIVE}}
        for kind in sorted(known):
            # by "\n" alone: JSON text may hold other separators of lines
            lines = (folder / "raw" / f"{kind}.jsonl").read_text(encoding="utf-8").split("\n")
            for row in map(json.loads, filter(None, lines)):
                group = f"{kind}/{row['group']}"
                draw = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
                held = kind == "readmes" or (kind in OBJECTIVE and draw < HELDOUT_SHARE)
                kept = {"text": row["text"], "group": group, "kind": f"all {kind}"}
                rows[kind if held else "train"].append(json.dumps(kept, ensure_ascii=False))
        for name in (*OBJECTIVE, "train"):  # what says that all is there comes last
            partial = folder / f"{name}.partial"
            partial.write_text("\n".join(rows[name]) + "\n", encoding="utf-8")
            os.replace(partial, folder / f"{name}.jsonl")
    source = Source(path=str(train), domain="text", group_column="group", label_columns=("kind",))
    held_out = [
        Source(path=str(folder / f"{target}.jsonl"), domain=target, evaluation_only=True)
        for target in OBJECTIVE
    ]
    return source, held_out


def corpus(p: Parameters) -> Corpus:
    """Return the corpus of clusters, or of the true kinds with its tokenizer."""
    train, held_out = texts(p)
    clusters = cluster_corpus(
        [train],
        p.corpus,
        Clustering(clusters=p.clusters),
        tokenizer=VOCAB_SIZE,
        evaluation=held_out,
        heldout_share=0.1,
        min_heldout_tokens=512,  # so that small clusters can stay
        text=f"{p.corpus}-text/clustered",
    )
    if p.domains == "clusters":
        return clusters
    labelled = dataclasses.replace(train, domain=None, domain_column="kind", label_columns=())
    tokenizer = Path(clusters.url) / "tokenizer.json"
    return build_corpus([labelled, *held_out], f"{p.corpus}-labels", tokenizer=tokenizer)


def proxy(p: Parameters, corpus: Corpus) -> TrainSpec:
    """Return a proxy, of 0.12M parameters."""
    return TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(
            layers=1, width=64, heads=4, ffn_width=192, vocab_size=VOCAB_SIZE, context=64
        ),
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), p.proxy_tokens),
        optimizer=Optimizer(lr=8e-3, batch_sequences=8),
        evaluation=Evaluation(points=1, sequences=96, part="first"),
    )


def final(p: Parameters, corpus: Corpus) -> TrainSpec:
    """Return the model of the verification and of the final run, of 0.34M parameters."""
    small = proxy(p, corpus)
    return dataclasses.replace(
        small,
        model=dataclasses.replace(small.model, layers=2, width=96, heads=6, ffn_width=288),
        optimizer=Optimizer(lr=4e-3, batch_sequences=8),
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), 2 * p.proxy_tokens),
        evaluation=Evaluation(points=2, sequences=256, part="second"),
    )


def methods(p: Parameters, corpus: Corpus) -> tuple[Climb, RegMix]:
    """Return CLIMB, and RegMix with as many proxies."""
    climb = Climb(
        corpus=corpus,
        proxy=proxy(p, corpus),
        sizes=p.sizes,
        objective=OBJECTIVE,
        budget_tokens=p.final_tokens,
        max_epochs=p.max_epochs,
        seed=p.seed,
        regressor=p.regressor,
        own_seeds=p.own_seeds,
        verification=final(p, corpus) if p.verify_seeds else None,
        verification_seeds=p.verify_seeds,
    )
    regmix = RegMix(
        corpus=corpus,
        proxy=climb.proxy,
        num_proxies=climb.num_proxies,
        objective=OBJECTIVE,
        budget_tokens=p.final_tokens,
        max_epochs=p.max_epochs,
        seed=p.seed,
        verification=climb.verification,
        verification_seeds=p.verify_seeds,
    )
    return climb, regmix


def specs(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return CLIMB's first round and all of RegMix's proxies."""
    climb, regmix = methods(p, corpus)
    return [*(climb.specs() if p.domains == "clusters" else ()), *regmix.specs()]


def propose(p: Parameters, corpus: Corpus, store: Store) -> list[TrainSpec]:
    """Return the proxies of all rounds that the records allow."""
    climb, regmix = methods(p, corpus)
    return [*(climb.proposed(store) if p.domains == "clusters" else ()), *regmix.specs()]


def follow_up(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return runs as costly as the later rounds and the verification."""
    climb, regmix = methods(p, corpus)
    if p.domains == "labels":
        return regmix.follow_up_cost()
    later = dataclasses.replace(climb, sizes=(climb.num_proxies,)).specs()[p.first :]
    return later + climb.follow_up_cost(["regmix", "climb_published"])


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> Conclusion:
    """Choose by both methods, verify, plan and report CLIMB's choice."""
    climb, regmix = methods(p, corpus)
    if p.domains == "labels":
        return regmix.conclude(store, sweep, name=f"climb-labels-{p.seed}")
    (found, _), (all_at_once, drawn) = climb.decide(store), regmix.decide(store)
    arms = regmix.arms(drawn)
    others = {"best_random": arms["best_random"], "regmix": arms[CHOICE],
              "climb_published": as_published(climb, store)}  # fmt: skip
    for name, fitted in (("climb", found), ("regmix", all_at_once)):
        log.info("%s: Spearman out of fold %s", name, out_of_fold(fitted))
    return climb.conclude(store, sweep, f"climb-{p.seed}", others)


def as_published(climb: Climb, store: Store) -> Mixture:
    """Return the single best candidate of the published predictor, on the same proxies."""
    fitted, _ = climb.decide(store)
    domains = fitted.table.domains
    bounds = Constraints.by_name(domains, caps={d: climb.caps[d] for d in domains})
    prior = {d: climb.supply[d] for d in domains}
    theirs = fit_once(fitted.table, "climb", climb.seed)
    choice = choose(
        theirs, climb.objective, prior, bounds, seed=climb.seed, method=PoolOptimum()
    )  # fmt: skip
    return Mixture(choice.weights)


def out_of_fold(fitted: FittedTable) -> dict[str, float]:
    """Return how well each target of the objective is predicted where its model has not looked."""
    chosen = fitted.cv[fitted.cv["chosen"]].set_index("target")["spearman"]
    return {target: round(float(chosen[target]), 3) for target in OBJECTIVE}

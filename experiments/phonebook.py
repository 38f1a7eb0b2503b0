"""Phonebook: when does splitting a model in two pay, depending on how much the two halves share?

Question:  Facts (name, number) fall into two clusters, a share of which both hold. A budget of
           tokens: a trunk on both clusters for a part t of it, then one expert a cluster on half
           of the rest each. Which t leaves the fewest bits of a fact unknown?
Method:    Every t at every overlap, over seeds, at one small model that cannot hold both clusters.
           Held-out documents list the facts of the training documents in other orders. A cluster
           is a mixture over pieces of the phonebook, so that one corpus serves every overlap.
Measure:   Bits a fact on held-out documents: name and number. The name is about log2(facts) of
           them (one more for a model of two clusters), the number 13.3 where it is not known.
           Not the accuracy of facts: records hold losses, and no answers.
Source:    Seto et al. 2026, arXiv:2603.19149 (captions only: a phonebook of two clusters with
           varied overlap, fact accuracy over the split step). Differs: sizes, measure, WSD decay.
Cost:      `rayx run experiments/phonebook.py --dry-run`; about 2 minutes on 2 cores.
Run:       rayx run experiments/phonebook.py
Result:    Best split of the mean over 3 seeds: 0 without overlap (by seed 0, .25, .25), .5 at half
           (every seed), never with full overlap (every seed).
"""

from __future__ import annotations

import json
import logging
import math
import random
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from tokenizers import Tokenizer, models, pre_tokenizers

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.branching import make_branch, make_trunk
from rayx.corpus import Source, build_corpus
from rayx.corpus.manifest import MANIFEST
from rayx.corpus.tokenizer import EOS
from rayx.errors import SpecError
from rayx.methods.regmix import Sweep
from rayx.mixture import Phase
from rayx.report.studies import phonebook_figure

log = logging.getLogger(__name__)

OVERLAPS = (0.0, 0.5, 1.0)  # share of a cluster's facts that the other holds too
SPLITS = (0.0, 0.25, 0.5, 0.75, 1.0)  # t / D_T; 1 is no split
PIECES = 2  # of a cluster; overlaps are multiples of 1 / PIECES
DOCUMENT_FACTS = 16
FACT_WORDS = 4  # first name, last name, two digits, two digits: a token each
CONTEXT = DOCUMENT_FACTS * FACT_WORDS + 1  # a document and its end: no sequence cuts a fact
PASSES = 64  # over the facts in the text, each in another order
DECAY_SHARE = 0.2


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/phonebook"  # where the phonebooks are, or are built
    facts: int = 512  # of a cluster
    budget_tokens: int = 600_000  # trunk and both experts
    width: int = 16
    seeds: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.facts < 1 or self.facts % (PIECES * DOCUMENT_FACTS):
            raise SpecError(
                f"facts is {self.facts}; expected a multiple of {PIECES * DOCUMENT_FACTS}, so that "
                "pieces and documents are whole."
            )


def pieces(cluster: str) -> list[str]:
    """Return the domains that hold a cluster's own facts."""
    return [f"{cluster}{i}" for i in range(PIECES)]


def clusters(overlap: float) -> tuple[Mixture, Mixture]:
    """Return both clusters: the second has its first pieces in common with the first."""
    shared = round(overlap * PIECES)
    second = pieces("a")[:shared] + pieces("b")[shared:]
    return Mixture.uniform(pieces("a")), Mixture.uniform(second)


def both(overlap: float) -> Mixture:
    """Return the trunk's mixture: half of each cluster."""
    first, second = clusters(overlap)
    return Mixture({d: first.get(d, 0) + second.get(d, 0) for d in {*first, *second}})


def corpus(p: Parameters) -> Corpus:
    """Return the phonebook, built on first use: a domain a piece, all numbers random."""
    out = Path(f"{p.corpus}-{p.facts}").absolute()
    if (out / MANIFEST).exists():
        return Corpus.load(out)
    rng = random.Random(0)
    side = math.isqrt(4 * p.facts) + 1  # twice as many pairs of names as are taken
    first, last = ([f"{kind}{i}" for i in range(side)] for kind in ("first", "last"))
    digits = [f"{i:02d}" for i in range(100)]
    names = [f"{a} {b}" for a in first for b in last]
    rng.shuffle(names)
    text = out.with_name(f"{out.name}-text")
    text.mkdir(parents=True, exist_ok=True)
    sources = []
    for domain in pieces("a") + pieces("b"):
        facts = [
            f"{names.pop()} {rng.choice(digits)} {rng.choice(digits)}"
            for _ in range(p.facts // PIECES)
        ]
        with open(text / f"{domain}.jsonl", "w") as file:
            for _ in range(PASSES):
                rng.shuffle(facts)
                for i in range(0, len(facts), DOCUMENT_FACTS):
                    document = " ".join(facts[i : i + DOCUMENT_FACTS])
                    file.write(json.dumps({"text": document}) + "\n")
        sources.append(Source(path=str(text / f"{domain}.jsonl"), domain=domain))
    vocabulary = {word: i for i, word in enumerate([EOS, *first, *last, *digits])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=EOS))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([EOS])
    tokenizer.save(str(text / "tokenizer.json"))
    return build_corpus(sources, out, tokenizer=text / "tokenizer.json", min_heldout_tokens=CONTEXT)


def experts(
    p: Parameters, corpus: Corpus, overlap: float, split: float, seed: int
) -> tuple[TrainSpec, TrainSpec]:
    """Return the runs that answer for the first and the second cluster, after a split at t."""
    template = TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(
            layers=1,
            width=p.width,
            heads=p.width // 16,
            ffn_width=3 * p.width,
            vocab_size=corpus.vocab_size,
            context=CONTEXT,
        ),
        schedule=Schedule.constant(both(overlap), p.budget_tokens),
        optimizer=Optimizer(lr=1e-2, batch_sequences=8, warmup_share=0.02),
        evaluation=Evaluation(points=1, sequences=64),
        seed=seed,
        data_seed=seed,
    )
    # The last branch leaves where the decay of no split begins.
    trunk = make_trunk(template, both(overlap), round((1 - DECAY_SHARE) * p.budget_tokens))
    before = round(split * p.budget_tokens)
    if split == 1.0:
        whole = make_branch(trunk, before, (), DECAY_SHARE)
        return whole, whole
    half = (p.budget_tokens - before) // 2
    first, second = (
        make_branch(trunk, before, (Phase(cluster, half),), DECAY_SHARE)
        for cluster in clusters(overlap)
    )
    return first, second


def specs(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return all experts, each once."""
    runs = [
        run
        for seed in range(p.seed, p.seed + p.seeds)
        for overlap in OVERLAPS
        for split in SPLITS
        for run in experts(p, corpus, overlap, split, seed)
    ]
    return list({run.run_id: run for run in runs}.values())


def bits(store: Store, run: TrainSpec, cluster: Mixture) -> float:
    """Return the bits of a fact of a cluster to a run: nats a token, times tokens, over facts."""
    losses = store.get(run.run_id).losses
    nats = sum(weight * losses[domain].nats for domain, weight in cluster.items())
    return nats * CONTEXT / DOCUMENT_FACTS / math.log(2)


def table(p: Parameters, corpus: Corpus, store: Store) -> pd.DataFrame:
    """Return overlap, split, seed and bits (the mean of both clusters), one row an arm."""
    rows = []
    for overlap in OVERLAPS:
        for split in SPLITS:
            for seed in range(p.seed, p.seed + p.seeds):
                runs = experts(p, corpus, overlap, split, seed)
                values = [bits(store, *pair) for pair in zip(runs, clusters(overlap), strict=True)]
                rows.append((overlap, split, seed, sum(values) / 2))
    return pd.DataFrame(rows, columns=["overlap", "split", "seed", "bits"])


def summary(data: pd.DataFrame) -> list[dict]:
    """Return for each overlap the best split by the mean, and what it gains over no split."""
    found = []
    for overlap, part in data.groupby("overlap"):
        by_seed = part.pivot(index="seed", columns="split", values="bits")
        mean_S = by_seed.mean().to_numpy()
        best = float(by_seed.columns[mean_S.argmin()])
        gain = by_seed[1.0] - by_seed[best]
        found.append(
            {
                "overlap": overlap,
                "best_split": best,
                "best_split_by_seed": by_seed.idxmin(axis=1).tolist(),
                "bits": dict(zip(map(str, by_seed.columns), mean_S.tolist(), strict=True)),
                "seed_sd_bits": float((by_seed.var().mean()) ** 0.5) if len(by_seed) > 1 else None,
                "gain_over_no_split_bits": gain.tolist(),
            }
        )
    return found


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Write reports/phonebook.json and .png into the store."""
    data = table(p, corpus, store)
    found = summary(data)
    store.write_json(
        "reports/phonebook.json",
        {"name_bits": math.log2(p.facts), "summary": found, "runs": data.to_dict("records")},
    )
    store.write_bytes("reports/phonebook.png", phonebook_figure(data, math.log2(p.facts)))
    shown = data.pivot_table(index="overlap", columns="split", values="bits")
    log.info("bits a fact by overlap and split share:\n%s", shown.round(2).to_string())
    log.info("wrote reports/phonebook.json and .png in %s", store.url)

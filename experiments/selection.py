"""Selection: half of the text is noisy; how much of each domain should be read?

Question:  Six domains of real text, in half of the documents a third of the words misspelt as by a
           bad scan. A classifier trained on 200 labelled documents scores all. Is it better to
           train on all of a domain, or on its best `share`, at equal tokens, where less text is
           read more often?
Method:    `rayx corpus label` scores, the score orders the corpus, and a mixture asks for
           `docs@0.5`. Held-out text is clean. Every arm gives the domains equal weight.
Cost:      `rayx run experiments/selection.py --dry-run`; about 2 minutes on 2 cores.
Run:       rayx run experiments/selection.py
"""

from __future__ import annotations

import dataclasses
import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.corpus import Source, build_corpus, extract_sample
from rayx.corpus.labels.classifier import train_classifier
from rayx.corpus.labels.label import label_corpus
from rayx.corpus.manifest import MANIFEST
from rayx.corpus.sample import HELDOUT_SHARE
from rayx.corpus.stage import is_heldout
from rayx.methods.regmix import Sweep
from rayx.mixture import epochs

log = logging.getLogger(__name__)

SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
EXAMPLES = 200
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/noisy"  # where the corpus is, or is built; its text is beside it
    noisy: float = 0.5  # share of the training documents
    misspelt: float = 0.3  # share of their words
    tokens: int = 400_000
    seed: int = 0
    seeds: int = 3


def corpus(p: Parameters) -> Corpus:
    """Spoil the sample's training text, score it and build the corpus, on first use."""
    out = Path(p.corpus).absolute()
    if (out / MANIFEST).exists():
        return Corpus.load(out)
    rows = []
    for source in extract_sample(out.with_name(f"{out.name}-text")):
        if source.evaluation_only:
            continue
        rng = random.Random(f"{source.domain} {p.seed}")
        for line in Path(source.path).read_text(encoding="utf-8").rstrip("\n").split("\n"):
            row = json.loads(line) | {"domain": source.domain, "state": "clean"}
            held_out = is_heldout(b"group:" + row["group"].encode(), HELDOUT_SHARE, 0)
            if not held_out and rng.random() < p.noisy:
                row |= {"text": spoilt(row["text"], p.misspelt, rng), "state": "noisy"}
            rows.append(row | {"held_out": held_out})
    text = out.with_name(f"{out.name}-text") / "spoilt"
    text.mkdir(exist_ok=True)
    trained = [row for row in rows if not row["held_out"]]
    labelled = random.Random(p.seed).sample(trained, EXAMPLES)
    write(text / "examples.jsonl", [{"text": r["text"], "label": r["state"]} for r in labelled])
    write(text / "all.jsonl", rows)
    everything = Source(path=str(text / "all.jsonl"), domain_column="domain",
                        group_column="group", label_columns=("state",))  # fmt: skip
    rater = train_classifier("clean", text / "examples.jsonl", of="clean")
    label_corpus([everything], text / "scored", [rater])
    scored = Source(path=str(text / "scored"), domain_column="domain", group_column="group",
                    label_columns=("state",), score_column="clean")  # fmt: skip
    return build_corpus([scored], out, tokenizer=1024, heldout_share=HELDOUT_SHARE)


def spoilt(text: str, share: float, rng: random.Random) -> str:
    """Return the text with a letter or two of a share of its words replaced."""
    words = text.split(" ")
    for i, word in enumerate(words):
        if len(word) > 2 and rng.random() < share:
            letters = list(word)
            for place in rng.sample(range(len(letters)), 2):
                letters[place] = rng.choice(LETTERS)
            words[i] = "".join(letters)
    return " ".join(words)


def write(file: Path, rows: list[dict]) -> None:
    """Write JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def arms(corpus: Corpus) -> dict[float, Mixture]:
    """Return share -> the uniform mixture of each domain's best share."""
    names = {share: "" if share == 1 else f"@{share:g}" for share in SHARES}
    return {
        share: Mixture.uniform([f"{domain}{end}" for domain in corpus.domains])
        for share, end in names.items()
    }


def runs(p: Parameters, corpus: Corpus) -> dict[float, list[TrainSpec]]:
    """Return share -> one run a seed."""
    template = TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(layers=1, width=64, heads=4, ffn_width=192, vocab_size=1024, context=64),
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), p.tokens),
        optimizer=Optimizer(lr=8e-3, batch_sequences=8),
        evaluation=Evaluation(points=1, sequences=256),
    )
    return {
        share: [
            dataclasses.replace(template, schedule=Schedule.constant(mixture, p.tokens),
                                seed=seed, data_seed=seed)
            for seed in range(p.seed, p.seed + p.seeds)
        ]
        for share, mixture in arms(corpus).items()
    }  # fmt: skip


def specs(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return every run."""
    return [spec for of_share in runs(p, corpus).values() for spec in of_share]


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Compare the shares; write reports/selection.csv."""
    rows = []
    for share, of_share in runs(p, corpus).items():
        mixture = of_share[0].schedule.phases[0].mixture
        passes = epochs(mixture, p.tokens, corpus.tokens)
        for spec in of_share:
            losses = store.get(spec.run_id).losses
            rows.append({"share": share, "seed": spec.seed, "most epochs": max(passes.values()),
                         "loss": sum(losses[d].bpb for d in corpus.domains) / len(corpus.domains)
                         } | {d: losses[d].bpb for d in corpus.domains})  # fmt: skip
    table = pd.DataFrame(rows)
    store.write_bytes("reports/selection.csv", table.to_csv(index=False).encode())
    mean = pd.DataFrame(table.drop(columns="seed").groupby("share").mean())
    loss = table.pivot(index="share", columns="seed", values="loss")
    gain = loss.loc[1.0] - loss
    mean["gain over all"], mean["won"] = gain.mean(axis=1), (gain > 0).sum(axis=1)
    log.info("training text: %s", corpus.mixture_labels(corpus.proportional())["state"])
    log.info("bits per byte, mean over %d seeds:\n%s", p.seeds, mean.round(4).to_string())

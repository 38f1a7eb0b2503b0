"""DGA: training for a domain of which there are some fifty sequences, on other domains' text.

Question:  A specific set of few sequences of documentation, generic domains of real text. Do online
           weights from gradients (DGA) beat no specialisation, importance sampling and a random
           search of as many runs as eta was tried with? Also where generic text is so scarce that
           every domain is read many times, and where the domain itself is among the generic ones?
           Theorem 1: does a specific set that is a known mixture of domains give that mixture?
Published: Fan, Grangier and Ablin 2024, arXiv:2410.02498: DGA is better than importance sampling
           where generic text is scarce; a moving average of the weights helps there.
Method:    Judged on the second half of the domain's held-out text; seed 0 chose eta.
Cost:      `rayx run experiments/dga.py --dry-run`.
Run:       rayx run experiments/dga.py
Result:    DGA is below uniform by .08 (domain left out) and .18 (inside), in 3 of 3 seeds each, and
           below importance sampling by .26 where text is scarce; it is above importance sampling by
           .04 where text is plentiful, and not below uniform where it is scarce. See LOG.md.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Probe, Schedule, Store
from rayx.corpus import Source, build_corpus, extract_sample
from rayx.merging import Spec
from rayx.methods.dga import DgaStudy, recovery, summary
from rayx.methods.importance import importance_mixture
from rayx.policies.dga import DGA
from rayx.spec import TrainSpec

log = logging.getLogger(__name__)

Sweep = Callable[[list[Spec]], None]

GENERIC = ("code", "legal", "speeches", "wiki", "medicine")
SPECIFIC = "specific"  # a domain too, for the arm that trains on nothing else
IMPORTANCE, ALONE = "importance sampling", "specific set alone"
SCARCE_CHARS, SPECIFIC_CHARS, PIECE_CHARS = 30_000, 12_000, 1_500
WIDTH, TOKENS, ALONE_TOKENS = 32, 300_000, 30_000
PLANTED = {  # name -> sources of the specific set, each with equal weight
    "legal 2, medicine 1": ("legal", "legal", "medicine"),
    "code 1, wiki 1": ("code", "wiki"),
}


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/dga"  # where the corpus is, or is built
    text: str = "data/sample-text"  # where the sample's text is, or is written
    domain: str = "docs"  # that the specific set is of
    eta: float = 5.0
    ema_eta: float = 100.0  # with a moving average, which makes steps ten times shorter
    every_steps: int = 75
    search: int = 3  # candidates of the random search: as many as etas were tried
    seed: int = 1  # 0 chose eta
    seeds: int = 3


def scarce(domain: str) -> str:
    """Return the name of a domain's small sibling."""
    return f"{domain}-scarce"


def corpus(p: Parameters) -> Corpus:
    """Return the sample cut anew, built on first use: full domains, scarce ones, a specific set."""
    text = Path(p.corpus).with_name(f"{Path(p.corpus).name}-text")
    text.mkdir(parents=True, exist_ok=True)
    names = [*GENERIC, p.domain]
    for source in extract_sample(p.text):
        domain = str(source.domain)
        if domain in names:
            small = SPECIFIC if domain == p.domain else scarce(domain)
            num_chars = SPECIFIC_CHARS if domain == p.domain else SCARCE_CHARS
            _divide(Path(source.path), text, domain, small, num_chars)
            names.append(small)
    sources = [
        Source(path=str(text / f"{name}.jsonl"), domain=name, group_column="group")
        for name in names
    ]
    return build_corpus(
        sources, p.corpus, tokenizer=1024, heldout_share=0.2, min_heldout_tokens=256
    )


def _divide(file: Path, out: Path, domain: str, small: str, num_chars: int) -> None:
    """Write a domain's first documents, in pieces, to `small` and the others to `domain`."""
    pieces, others, used = [], [], set()
    for row in map(json.loads, file.open(encoding="utf-8")):
        if num_chars > 0:
            used.add(row["group"])
            text = row["text"][:num_chars]
            num_chars -= len(text)
            cut = range(0, len(text), PIECE_CHARS)
            pieces += [{"group": None, "text": text[i : i + PIECE_CHARS]} for i in cut]
        elif row["group"] not in used:  # no document is in both
            others.append(row)
    for name, rows in ((small, pieces), (domain, others)):
        path, written = out / f"{name}.jsonl", "\n".join(map(json.dumps, rows))
        if not path.exists() or path.read_text(encoding="utf-8") != written:
            path.write_text(written, encoding="utf-8")  # a file that is left keeps its corpus


def template(corpus: Corpus) -> TrainSpec:
    """Return the run whose mixture, policy and seeds the studies replace."""
    return TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(
            layers=1, width=WIDTH, heads=2, ffn_width=3 * WIDTH, vocab_size=corpus.vocab_size,
            context=64,
        ),
        schedule=Schedule.constant(Mixture.uniform(GENERIC), TOKENS),
        optimizer=Optimizer(lr=8e-3 * (64 / WIDTH) ** 0.5, batch_sequences=8),
        evaluation=Evaluation(points=3, sequences=96, part="second"),
    )  # fmt: skip


def studies(p: Parameters, corpus: Corpus) -> dict[str, DgaStudy]:
    """Return setting -> study."""
    settings = {
        "outside": GENERIC,
        "scarce": tuple(scarce(d) for d in GENERIC),
        "inside": (*GENERIC, p.domain),
    }
    specific = Probe(target=SPECIFIC, part="train", sequences=1_000)
    found = {}
    for name, domains in settings.items():
        near = importance_mixture(corpus, specific, domains, seed=p.seed)
        topics = importance_mixture(corpus, specific, domains, clusters=64, seed=p.seed)
        supply = {d: corpus.tokens[d] for d in domains}
        plain = DGA(specific=(specific,), eta=p.eta, every_steps=p.every_steps)
        basis = (Mixture.uniform(domains), Mixture(supply), near, topics)
        found[name] = DgaStudy(
            template=template(corpus),
            supply=supply,
            target=p.domain,
            schedules={
                IMPORTANCE: Schedule.constant(near, TOKENS),
                ALONE: Schedule.constant(Mixture({SPECIFIC: 1}), ALONE_TOKENS),
            },
            policies={
                "DGA": plain,
                "DGA, moving average": dataclasses.replace(plain, eta=p.ema_eta, ema=0.1),
                "DGA, basis": dataclasses.replace(plain, basis=basis),
            },
            search=p.search,
            seeds=tuple(range(p.seed, p.seed + p.seeds)),
        )
    return found


def planted(p: Parameters, corpus: Corpus) -> DgaStudy:
    """Return runs whose specific sets are known mixtures of the generic domains."""
    return DgaStudy(
        template=template(corpus),
        supply={d: corpus.tokens[d] for d in GENERIC},
        target=p.domain,
        policies={
            name: DGA(
                specific=tuple(Probe(target=d, part="first", sequences=256) for d in parts),
                eta=3.0,
                every_steps=25,  # what measuring takes is not the question
            )
            for name, parts in PLANTED.items()
        },
        search=0,
        seeds=tuple(range(p.seed, p.seed + p.seeds)),
    )


def specs(p: Parameters, corpus: Corpus) -> list[Spec]:
    """Return the runs of all settings and of the planted mixtures."""
    every = [*studies(p, corpus).values(), planted(p, corpus)]
    return list({spec.run_id: spec for study in every for spec in study.specs()}.values())


def recovered(p: Parameters, corpus: Corpus, store: Store) -> pd.DataFrame:
    """Return a row for each planted mixture and seed: distances of weights to it."""
    weights, rows = planted(p, corpus).trajectories(store), []
    for name, parts in PLANTED.items():
        truth = Mixture({d: parts.count(d) for d in parts})
        for seed in weights["seed"].unique():
            of_run = weights.loc[(weights["arm"] == name) & (weights["seed"] == seed)]
            rows.append({"planted": name, "seed": int(seed)} | recovery(of_run, truth))
    return pd.DataFrame(rows)


def verdict(found: pd.DataFrame) -> str:
    """Return what DGA with a moving average did against every other arm, per setting."""
    said = []
    for setting, rows in found.groupby("setting", sort=False):
        loss = {str(arm): of_arm["loss"].to_numpy(float) for arm, of_arm in rows.groupby("arm")}
        for arm in ("DGA", "DGA, moving average"):
            against = [
                f"{other} by {np.mean(loss[arm] - loss_S):+.3f} ({(loss[arm] < loss_S).sum()})"
                for other, loss_S in loss.items()
                if other != arm
            ]
            said.append(f"{setting}: {arm} less {', '.join(against)}")
    return f"Bits per byte (wins of {found['seed'].nunique()}): " + "; ".join(said) + "."


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Compare arms in every setting; write reports/dga.csv, dga_weights.csv and dga.json."""
    tables, weights, curves = [], [], []
    for name, study in studies(p, corpus).items():
        curve = study.table(store)
        curves.append(curve.assign(setting=name))
        weights.append(study.trajectories(store).assign(setting=name))
        tables.append(summary(curve).assign(setting=name))
        log.info("%s:\n%s", name, tables[-1].round(4).to_string(index=False))
        last = weights[-1].groupby(["arm", "domain"])["weight"].last().unstack()
        log.info("last weights, last seed:\n%s", last.round(3).to_string())
        log.info("importance sampling: %s", dict(study.schedules[IMPORTANCE].average()))
    curve = pd.concat(curves)
    theorem = recovered(p, corpus, store)
    log.info("planted mixtures:\n%s", theorem.round(3).to_string(index=False))
    said = verdict(curve.groupby(["setting", "arm", "seed"]).tail(1))
    log.info("%s", said)
    store.write_bytes("reports/dga.csv", curve.to_csv(index=False).encode())
    store.write_bytes("reports/dga_weights.csv", pd.concat(weights).to_csv(index=False).encode())
    report = {
        "arms": pd.concat(tables).to_dict("records"),
        "planted": theorem.to_dict("records"),
        "verdict": said,
    }
    store.write_json("reports/dga.json", report)
    log.info("wrote reports/dga.csv, dga_weights.csv and dga.json in %s", store.url)

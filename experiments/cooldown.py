"""Cooldown: on a corpus of very unequal domains, should small ones be read often first or last?

Question:  Six domains of real text, each half the one before it (32:1), the mean of their losses.
           Does sampling at temperature 5 and then in proportion (Cooldown) beat either alone, and
           weighting the loss (scalarisation)? Whom does it cost?
Published: Li et al. 2024, arXiv:2410.04579, translation: Cooldown is above tau 1 by .7 BLEU on
           domains of middle size and by 3.1 on small ones and .2 below on large ones, and 1.5 above
           static tau 5 on large ones.
Method:    The sample corpus with its training text cut to sizes that halve, its held-out text
           whole. Every arm reads as many tokens from the same seeds. Random search tries mixtures
           for as many tokens as all arms together took, and chooses on the first half of the
           held-out text. All figures are of the second half.
Cost:      `rayx run experiments/cooldown.py --dry-run`; about 5 minutes on 2 cores.
Run:       rayx run experiments/cooldown.py
           rayx run experiments/cooldown.py --set largest_tokens=560_000 --store runs/cooldown-560k
Result:    Where text is scarce (5 passes in proportion, 39 over the smallest at temperature 5)
           Cooldown is below proportional by .021, scalarisation by .041, its reverse by .051 and
           temperature 5 by .105, each in 3 of 3 seeds. It ties with its own average all along
           and with random search. With ten times the text it is the worst arm (one seed).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.candidates import regmix_mixtures, supply_caps
from rayx.corpus import Source, build_corpus, build_sample, extract_sample
from rayx.corpus.manifest import MANIFEST, TOKENIZER
from rayx.corpus.sample import HELDOUT_SHARE
from rayx.corpus.stage import is_heldout
from rayx.merging import Experts, MergeSpec, Spec
from rayx.methods.cooldown import COOLDOWN, GROUPS, Cooldown
from rayx.methods.dem import mean_loss
from rayx.methods.merge_proxy import Sweep
from rayx.schedules import schedule_epochs

log = logging.getLogger(__name__)

WIDTH = 64
RANDOM = "random search"
TRIED = 6  # mixtures: the arms take 6 runs' worth of tokens, trunks counted once
STRENGTHS = (2.0, 20.0)  # of its draws: few tries, so none near one domain alone
TRIED_EPOCHS = 20  # most passes over a domain in random search, above which text is worth little
REPORT = Evaluation(points=1, sequences=256, part="second")


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built; ours is beside it
    largest_tokens: int = 56_000  # of the largest domain: how scarce text is
    budget_tokens: int = 600_000
    tau: float = 5.0
    decay_share: float = 0.5  # of the tokens: the rate falls from where Cooldown cools down
    seed: int = 1  # 0 chose the settings
    seeds: int = 3


def corpus(p: Parameters) -> Corpus:
    """Return the sample with the training text of each domain half that of the one before it.

    Held-out text and tokenizer are the sample's, whether a document is held out depends on nothing
    but itself; of the others, the first that fit are kept. Built on first use.
    """
    whole = build_sample(p.corpus, vocab_size=1024)
    out = Path(f"{p.corpus}-halving-{p.largest_tokens}").absolute()
    if (out / MANIFEST).exists():
        return Corpus.load(out)
    text = out.with_name(f"{out.name}-text")
    text.mkdir(parents=True, exist_ok=True)
    ranked = sorted(whole.domains, key=lambda d: -whole.tokens[d])
    sources = []
    for source in extract_sample(Path(f"{p.corpus}-text")):
        name, kept, left = str(source.domain), [], 0.0
        if name in ranked:
            tokens = p.largest_tokens / 2 ** ranked.index(name)
            left = tokens * whole.bytes[name] / whole.tokens[name]
        for line in Path(source.path).read_text(encoding="utf-8").rstrip("\n").split("\n"):
            row = json.loads(line)
            size = len(row["text"].encode())
            if is_heldout(b"group:" + row["group"].encode(), HELDOUT_SHARE, 0):
                kept.append(line)
            elif name not in ranked or size <= left:
                kept.append(line)
                left -= size
        file = text / f"{name}.jsonl"
        file.write_text("\n".join(kept) + "\n", encoding="utf-8")
        sources.append(Source(path=str(file), domain=name, group_column="group",
                              evaluation_only=source.evaluation_only))  # fmt: skip
    tokenizer = Path(whole.url) / TOKENIZER
    return build_corpus(sources, out, tokenizer=tokenizer, heldout_share=HELDOUT_SHARE)


def studies(p: Parameters, corpus: Corpus) -> dict[int, Cooldown]:
    """Return seed -> the arms."""
    found = {}
    for seed in range(p.seed, p.seed + p.seeds):
        template = TrainSpec(
            corpus=corpus.fingerprint,
            model=ModelShape(
                layers=1,
                width=WIDTH,
                heads=WIDTH // 16,
                ffn_width=3 * WIDTH,
                vocab_size=corpus.vocab_size,
                context=64,
            ),
            schedule=Schedule.constant(Mixture(corpus.tokens), p.budget_tokens),
            optimizer=Optimizer(
                lr=8e-3, batch_sequences=8, warmup_share=0.02, decay_share=p.decay_share
            ),
            evaluation=Evaluation(points=1, sequences=96, part="first"),
            seed=seed,
            data_seed=seed,
        )
        found[seed] = Cooldown(template=template, tokens_by_domain=corpus.tokens, tau=p.tau)
    return found


def tried(study: Cooldown) -> list[TrainSpec]:
    """Return the runs of random search: constant mixtures around the natural one."""
    supply, tokens = study.tokens_by_domain, study.template.schedule.tokens
    seed = study.template.seed
    caps = supply_caps(supply, tokens, TRIED_EPOCHS)
    mixtures = regmix_mixtures(supply, TRIED, seed=seed, caps=caps, strengths=STRENGTHS)
    return [
        dataclasses.replace(study.template, schedule=Schedule.constant(mixture, tokens))
        for mixture in mixtures
    ]


def reported(run: TrainSpec) -> MergeSpec:
    """Return a run's end, evaluated on the text that no choice has seen."""
    return Experts.of([run]).merge((1.0,), evaluation=REPORT)


def specs(p: Parameters, corpus: Corpus) -> list[Spec]:
    """Return every run, and its end on the second half of the held-out text."""
    runs = [run for s in studies(p, corpus).values() for run in (*s.runs().values(), *tried(s))]
    return [*runs, *(reported(run) for run in runs)]


def arms(store: Store, study: Cooldown) -> dict[str, MergeSpec]:
    """Return arm -> its end on the second half; random search chose on the first."""
    objective = dict.fromkeys(study.tokens_by_domain, 1.0)
    best = min(tried(study), key=lambda r: mean_loss(store.get(r.run_id).losses, objective))
    return {arm: reported(run) for arm, run in (study.runs() | {RANDOM: best}).items()}


def verdict(table: pd.DataFrame) -> dict[str, object]:
    """Return Cooldown less every arm, by seed, for the mean loss and each group's."""
    columns = ["loss", *GROUPS]
    cooled = table.loc[table["arm"] == COOLDOWN].set_index("seed")[columns]
    gaps, parts = {}, []
    for arm, rows in table.groupby("arm", sort=False):
        if arm == COOLDOWN:
            continue
        gap = cooled - rows.set_index("seed")[columns]
        gaps[str(arm)] = {name: gap[name].tolist() for name in columns}
        won = int((gap["loss"] < 0).sum())
        groups = ", ".join(f"{name} {gap[name].mean():+.3f}" for name in GROUPS)
        parts.append(f"{arm} {gap['loss'].mean():+.4f} (below in {won} of {len(gap)}; {groups})")
    return {
        "cooldown_less_arm": gaps,
        "verdict": f"Cooldown, bits per byte, less: {'; '.join(parts)}.",
    }


def passes(study: Cooldown) -> Mapping[str, dict[str, float]]:
    """Return arm -> how often it reads each domain."""
    supply = study.tokens_by_domain
    return {arm: schedule_epochs(s, supply) for arm, s in study.schedules().items()}


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Compare the arms by groups of domains; write reports/cooldown.csv and .json."""
    found = {seed: s.table(store, arms(store, s)) for seed, s in studies(p, corpus).items()}
    table = pd.concat([rows.assign(seed=seed) for seed, rows in found.items()], ignore_index=True)
    study = studies(p, corpus)[p.seed]
    said = verdict(table)
    extra = {"tokens": dict(corpus.tokens), "groups": study.groups(), "epochs": passes(study)}
    store.write_bytes("reports/cooldown.csv", table.to_csv(index=False).encode())
    store.write_json("reports/cooldown.json", said | extra)
    columns = ["loss", *GROUPS, *corpus.domains]
    mean = pd.DataFrame(table.groupby("arm")[columns].mean()).sort_values("loss")
    deviation = pd.DataFrame(table.groupby("arm")[columns].std())
    log.info("groups: %s", study.groups())
    log.info("epochs:\n%s", pd.DataFrame(extra["epochs"]).T.round(1).to_string())
    log.info("bits per byte, mean over %d seeds:\n%s", p.seeds, mean.round(4).to_string())
    log.info("deviation over seeds:\n%s", deviation.round(4).to_string())
    log.info("%s", said["verdict"])
    log.info("wrote reports/cooldown.csv and .json in %s", store.url)

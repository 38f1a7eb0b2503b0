"""Merged proxies: can merges of a few experts rank mixtures, and find one, in place of training?

Question:  Six domains of real text, a trunk, one expert a domain. How well do linear merges rank
           mixtures that were really trained; what does the share of general text in the experts
           do; are merges cheaper than short trained proxies that rank as well; and does a search
           over merges (DeMix) find a mixture as good as RegMix or random search do at equal cost?
Published: Berasi et al. 2026, arXiv:2602.04937 (merging ranks mixtures); DeMix, arXiv:2602.00747
           (at 50, 25, 0% general text: macro Spearman .787, .667, .652; 6.4 times cheaper).
Method:    References: branches of one trunk on mixtures inside the hull of the 50% experts, over
           two seeds. Then stand-ins for the same mixtures: merges at three general shares and four
           lengths of the experts, trained branches at three lengths, other seeds, regressions.
           Mixtures that the searches found are trained over seeds that no search has used.
Cost:      `rayx run experiments/merged_proxies.py --dry-run`.
Run:       rayx run experiments/merged_proxies.py
Result:    2026-11-22, seeds 3 and 4: at 50% general text Spearman .967 over domains (worst .919)
           and .970 on the average loss; at 25% as good, at 0% .92 and .35. On the average loss
           merges cost .3 to .6 of trained proxies that rank as well, on single domains up to twice.
           DeMix's mixture beats uniform and random search and ties with RegMix; see LOG.md.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.corpus import build_sample
from rayx.experiment import Conclusion
from rayx.fit import FittedTable
from rayx.merging import Spec
from rayx.methods.demix import DeMix
from rayx.methods.merge_proxy import (
    Agreement,
    MergeProxy,
    Sweep,
    agreement,
    cost_tokens,
    losses,
    study,
)
from rayx.plan import Plan
from rayx.verify import CHOICE, compare

log = logging.getLogger(__name__)

SHARES = (0.0, 0.25, 0.5)  # of general text in the experts
WIDEST = max(SHARES)  # the references lie in the hull of these experts, so all reach them
FRACTIONS = (8, 4, 2)  # of a branch: how much shorter cheaper stand-ins are
ROUNDS = (64, 32, 16)
RANDOM = "random"  # search: the best of a few mixtures trained in full


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built
    references: int = 32  # mixtures that are really trained, in the hull
    far_references: int = 16  # and anywhere on the simplex
    width: int = 64
    trunk_tokens: int = 600_000
    branch_tokens: int = 200_000
    decay_share: float = 0.8  # of a branch
    lr: float = 8e-3
    regressor: str = "auto"
    seed: int = 3  # 0 chose the settings; 1 and 2 were looked at too
    seeds: int = 2
    verify_seeds: int = 4


def corpus(p: Parameters) -> Corpus:
    """Return the sample corpus, built on first use."""
    return build_sample(p.corpus, vocab_size=1024)


def proxies(p: Parameters, corpus: Corpus, seed: int) -> MergeProxy:
    """Return the trunk of a seed and its branches."""
    general = Mixture.uniform(corpus.domains)
    template = TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(
            layers=1,
            width=p.width,
            heads=p.width // 16,
            ffn_width=3 * p.width,
            vocab_size=corpus.vocab_size,
            context=64,
        ),
        schedule=Schedule.constant(general, 1_000_000),
        optimizer=Optimizer(lr=p.lr, batch_sequences=8, warmup_share=0.02),
        evaluation=Evaluation(points=1, sequences=64),
        seed=seed,
        data_seed=seed,
    )
    return MergeProxy(
        template=template,
        general=general,
        domains=tuple(corpus.domains),
        trunk_tokens=p.trunk_tokens,
        branch_tokens=p.branch_tokens,
        decay_share=p.decay_share,
    )


def reference_mixtures(p: Parameters, corpus: Corpus) -> list[Mixture]:
    """Return mixtures drawn as a search draws its candidates, so that all experts reach them."""
    # A seed that no search draws from: a reference is no candidate.
    return searches(p, corpus)["demix"].drawn(p.references, seed=100 + p.seed)


def far_mixtures(p: Parameters, corpus: Corpus) -> list[Mixture]:
    """Return mixtures spread evenly over the simplex."""
    return proxies(p, corpus, p.seed).hull_mixtures(p.far_references, 0.0, seed=4)


@dataclass(frozen=True, kw_only=True)
class StandIns:
    """One way to stand in for references, a row of the report."""

    kind: str
    share: float  # of general text in the experts; NaN without experts
    tokens: int  # of an expert or of a trained branch
    seed: int
    standins: Sequence[Spec]
    references: Sequence[TrainSpec]


def all_standins(p: Parameters, corpus: Corpus) -> Iterator[StandIns]:
    """Return every way that is compared."""
    mixtures, branch = reference_mixtures(p, corpus), p.branch_tokens
    trained = {}
    for seed in range(p.seed, p.seed + p.seeds):
        one = proxies(p, corpus, seed)
        trained[seed] = references = [one.branch(mixture) for mixture in mixtures]
        for share in SHARES:
            shorter = FRACTIONS if share == WIDEST and seed == p.seed else ()
            for tokens in (branch, *(branch // f for f in shorter)):
                merges = one.standins(mixtures, share, tokens)
                yield StandIns(kind="merged", share=share, tokens=tokens, seed=seed,
                               standins=merges, references=references)  # fmt: skip
    one, first = proxies(p, corpus, p.seed), trained[p.seed]
    for tokens in (branch // f for f in FRACTIONS):
        shorter = [one.branch(mixture, tokens) for mixture in mixtures]
        yield StandIns(kind="trained", share=math.nan, tokens=tokens, seed=p.seed,
                       standins=shorter, references=first)  # fmt: skip
    for seed in range(p.seed + 1, p.seed + p.seeds):
        other = proxies(p, corpus, seed)
        merges = other.standins(mixtures, WIDEST)
        yield StandIns(kind="trained, other seed", share=math.nan, tokens=branch, seed=seed,
                       standins=trained[seed], references=first)  # fmt: skip
        yield StandIns(kind="merged, other seed", share=WIDEST, tokens=branch, seed=seed,
                       standins=merges, references=first)  # fmt: skip
    far = far_mixtures(p, corpus)
    merges = one.standins(far, 0.0)
    yield StandIns(kind="merged, anywhere", share=0.0, tokens=branch, seed=p.seed,
                   standins=merges, references=[one.branch(m) for m in far])  # fmt: skip


def searches(p: Parameters, corpus: Corpus) -> dict[str, DeMix]:
    """Return name -> search, all in the same region and at about the same cost."""
    demix = DeMix(
        proxies=proxies(p, corpus, p.seed),
        prior=corpus.tokens,
        objective=dict.fromkeys(corpus.domains, 1.0),
        general_share=WIDEST,
        rounds=ROUNDS,
        regressor=p.regressor,
        seed=p.seed,
    )
    # A forward pass costs a third of a training step.
    evaluation = demix.proxies.template.evaluation.sequences * len(corpus.targets) * 64 / 3
    cost = len(corpus.domains) * p.branch_tokens + sum(ROUNDS) * evaluation
    found = {"demix": demix}
    for fraction in (8, 4, 1):
        tokens = p.branch_tokens // fraction
        found[RANDOM if fraction == 1 else f"regmix_{fraction}"] = dataclasses.replace(
            demix, rounds=(round(cost / tokens),), trained_tokens=tokens
        )
    return found


def specs(p: Parameters, corpus: Corpus) -> list[Spec]:
    """Return references, stand-ins and the first rounds of the searches, each once."""
    asked = [s for one in all_standins(p, corpus) for s in (*one.references, *one.standins)]
    asked += [spec for search in searches(p, corpus).values() for spec in search.specs()]
    # Their own losses are compared too.
    asked += [member.spec for member in proxies(p, corpus, p.seed).experts(WIDEST).members]
    return list({spec.run_id: spec for spec in asked}.values())


def propose(p: Parameters, corpus: Corpus, store: Store) -> list[Spec]:
    """Return the rounds of the search over merges so far."""
    return searches(p, corpus)["demix"].proposed(store)


def follow_up(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return runs as costly as those of the verification."""
    arms = (CHOICE, "uniform", "proportional", "regmix_8", "regmix_4", RANDOM)
    mixtures: dict[str, Mixture] = dict(zip(arms, reference_mixtures(p, corpus), strict=False))
    runs = searches(p, corpus)["demix"].follow_up(mixtures, verify_seeds(p))
    return [spec for specs in runs.values() for spec in specs]


def verify_seeds(p: Parameters) -> list[int]:
    """Return seeds that no run of the study has."""
    first = 1_000 * (p.seed + 1)
    return list(range(first, first + p.verify_seeds))


def row(kind: str, share: float, tokens: int, seed: int, cost: float, found: Agreement) -> dict:
    """Return a row of the report; scores are over the domains' own targets."""
    return {
        "kind": kind,
        "general": share,
        "tokens": tokens,
        "seed": seed,
        "mixtures": found.mixtures,
        "macro": found.macro_spearman,
        "least": found.least_spearman,
        "average": found.average_spearman,
        "top25": found.top_spearman,
        "recovery": found.recovery,
        "gap_bpb": found.gap_bpb,
        "cost_tokens": cost,
    } | {f"spearman/{target}": value for target, value in found.spearman.items()}


def table(
    p: Parameters, corpus: Corpus, store: Store, fits: dict[str, FittedTable]
) -> pd.DataFrame:
    """Return one row a way of standing in."""
    rows = []
    for one in all_standins(p, corpus):
        cost = cost_tokens(store, one.standins)
        found = study(store, one.standins, one.references, corpus.domains)
        rows.append(row(one.kind, one.share, one.tokens, one.seed, cost, found))
        # Text of no domain, apart: its losses spread more over seeds than over mixtures.
        others = [target for target in corpus.targets if target not in corpus.domains]
        if others:
            apart = study(store, one.standins, one.references, others)
            rows[-1] |= {f"spearman/{t}": value for t, value in apart.spearman.items()}
    base, mixtures = proxies(p, corpus, p.seed), reference_mixtures(p, corpus)
    targets = list(corpus.domains)
    trained_RT = losses(store, [base.branch(mixture) for mixture in mixtures], targets)
    # Without merging: the experts' losses, averaged with the same weights.
    experts = [member.spec for member in base.experts(WIDEST).members]
    weights_RK = np.array([s.weights for s in base.standins(mixtures, WIDEST)])
    mean_RT = weights_RK @ losses(store, experts, targets)
    found = agreement(mean_RT, trained_RT, targets)
    rows.append(row("experts' losses averaged", WIDEST, p.branch_tokens, p.seed,
                    cost_tokens(store, experts), found))  # fmt: skip
    # Without anything: the less of a domain, the higher its loss.
    share_RT = np.array([[1.0 - mixture.get(t, 0.0) for t in targets] for mixture in mixtures])
    found = agreement(share_RT, trained_RT, targets)
    blank = dict.fromkeys(("average_spearman", "top_spearman", "recovery", "gap_bpb"), math.nan)
    found = dataclasses.replace(found, **blank)  # shares are no losses, and average out to nothing
    rows.append(row("own share of the mixture", math.nan, 0, p.seed, 0.0, found))
    for name, search in searches(p, corpus).items():
        if name not in fits:  # random search predicts nothing
            continue
        fitted = fits[name]
        order = [fitted.table.targets.index(t) for t in targets]
        weights_RK = np.array([m.to_array(fitted.table.domains) for m in mixtures])
        found = agreement(fitted.predict(weights_RK)[:, order], trained_RT, targets)
        tokens = search.trained_tokens or p.branch_tokens
        rows.append(row(f"regression, {name}", math.nan, tokens, p.seed,
                        search.cost_tokens(store), found))  # fmt: skip
    return pd.DataFrame(rows)


def sentence(table: pd.DataFrame) -> str:
    """Return what the table says of merges against shorter trained proxies."""
    rows = table.to_dict("records")
    merged = [r for r in rows if r["kind"] == "merged" and r["general"] == WIDEST]
    trained = [r for r in rows if r["kind"] == "trained"]
    full = [r for r in merged if r["tokens"] == max(m["tokens"] for m in merged)]
    macro, least, average = (min(r[s] for r in full) for s in ("macro", "least", "average"))
    parts = [
        f"merges at {WIDEST:.0%} general text ranked {full[0]['mixtures']} trained mixtures with a "
        f"macro Spearman of {macro:.3f}, {least:.3f} on the worst target and {average:.3f} on the "
        f"average loss (the worse of {len(full)} seeds)"
    ]
    for score in ("macro", "average"):
        for short in trained:
            enough = [r for r in merged if r["seed"] == short["seed"] and r[score] >= short[score]]
            what = (
                f"the {score} Spearman {short[score]:.3f} of proxies of {short['tokens']:,} tokens"
            )
            least = min((r["cost_tokens"] for r in enough), default=math.inf)
            ratio = least / short["cost_tokens"]
            parts.append(f"{what} cost merges {ratio:.2f} times as much" if enough else
                         f"{what} was reached by no merges")  # fmt: skip
    return "; ".join(parts)


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> Conclusion:
    """Compare all stand-ins, decide every search and train what they found beside baselines.

    Writes reports/merged_proxies.csv and .json, choices/, plans/ and verifications/ of that name.
    """
    name = "merged_proxies"
    found = {
        key: search.decide(store) for key, search in searches(p, corpus).items() if key != RANDOM
    }
    rows = table(p, corpus, store, {key: fitted for key, (fitted, _) in found.items()})
    shown = rows.drop(columns=[c for c in rows.columns if c.startswith("spearman/")])
    log.info("stand-ins for trained mixtures:\n%s", shown.round(4).to_string(index=False))
    demix = searches(p, corpus)["demix"]
    fitted, choice = found["demix"]
    arms = demix.arms(choice) | {
        key: Mixture(other.weights) for key, (_, other) in found.items() if key.startswith("regmix")
    }
    drawn = searches(p, corpus)[RANDOM].specs()
    best = losses(store, drawn, corpus.domains).mean(1).argmin()
    arms[RANDOM] = drawn[best].mixture
    runs = demix.follow_up(arms, verify_seeds(p))
    sweep([spec for specs in runs.values() for spec in specs])
    verification = compare(store, runs, choice.objective)
    costs = {key: search.cost_tokens(store) for key, search in searches(p, corpus).items()}
    verdict = f"{sentence(rows)}. {verification['verdict']}"
    verification |= {"search_cost_tokens": costs, "verdict": verdict}
    plan = Plan.of(choice, corpus, p.branch_tokens, demix.caps, store, fitted.table.run_ids)
    plan = dataclasses.replace(plan, verdict=verdict)
    store.write_bytes(f"reports/{name}.csv", rows.to_csv(index=False).encode())
    store.write_json(f"verifications/{name}.json", verification)
    store.write_json(f"plans/{name}.json", plan.to_json())
    store.write_bytes(f"choices/{name}.json", choice.to_json().encode())
    places = {"table": f"reports/{name}.csv", "plan": f"plans/{name}.json",
              "verification": f"verifications/{name}.json"}  # fmt: skip
    files = {what: f"{store.url}/{place}" for what, place in places.items()}
    return Conclusion(choice=choice, plan=plan, verification=verification, files=files)

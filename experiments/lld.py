"""LLD: from two models to the mixture that takes one to the other, with the truth planted.

Question:  A target was trained on a mixture that nobody tells. How well do log-likelihoods alone
           say which, from an untrained and from a pretrained base; and does training on what was
           found bring the base to the target as a distribution?
Published: Kishino et al. 2026, arXiv:2603.16622 (abstract): below uniform weights in divergence to
           the target, always; distillation is better where it is possible.
Method:    Six domains of real text. Targets on planted mixtures, each twice: in the data order of
           the sweep, and in an order (and from random weights) of its own. Estimates are made on
           the first half of the held-out text. Then from each base, on data of another order, runs
           on the estimates of one target beside uniform and proportional mixing, the planted one,
           the nearest of the sweep's own (random search) and distillation; second half.
Cost:      `rayx run experiments/lld.py --dry-run`.
Run:       rayx run experiments/lld.py
Result:    Seeds 4-6: the inverted sweep leaves .01-.02 (pretrained) and .04-.05 (untrained) of
           uniform's median KL(planted || found), and is below it on 47 of 48 targets. Training on
           it ends about as near to the target as training on the planted mixture, at .34-.38 of
           uniform's divergence, in 6 of 6; distillation comes 16 to 80 times nearer. See LOG.md.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.corpus import build_sample
from rayx.likelihoods import Likelihoods, kl_bits_per_byte, mean_gap_bits_per_byte, plane
from rayx.merging import Spec
from rayx.methods.lld import Estimate, recovery
from rayx.methods.lld_study import OWN, LldStudy, State, along, kept
from rayx.methods.merge_proxy import Sweep

log = logging.getLogger(__name__)

BASES = {"untrained": 0, "pretrained": 600_000}  # tokens of the base itself
FIRST = Evaluation(points=1, sequences=64, part="first")
SECOND = Evaluation(points=1, sequences=32, part="second")
TRAINED = ("random search", "identity", "response, ridge", "sweep")
DRAWN = ("uniform", "identity", "sweep", "planted", "distillation")
FRESH = 1_000  # an order of the data that no target has
PLANT = 0  # whose estimates are trained on


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built
    width: int = 32
    untrained_tokens: int = 224_000  # of every run from the untrained base
    pretrained_tokens: int = 96_000
    proxies: int = 12  # beside one a domain and a uniform one
    plants: int = 4  # a base and seed
    points: int = 3  # along a run, where it is compared with its target
    seed: int = 4  # 0 to 3 chose the settings
    seeds: int = 3


def corpus(p: Parameters) -> Corpus:
    """Return the sample corpus, built on first use."""
    return build_sample(p.corpus, vocab_size=1024)


def studies(p: Parameters, corpus: Corpus) -> dict[tuple[str, int], LldStudy]:
    """Return (base, seed) -> study."""
    domains = tuple(corpus.domains)
    shape = ModelShape(layers=1, width=p.width, heads=p.width // 16, ffn_width=3 * p.width,
                       vocab_size=corpus.vocab_size, context=64)  # fmt: skip
    lr = 8e-3 * (64 / p.width) ** 0.5
    optimizer = Optimizer(lr=lr, batch_sequences=8, warmup_share=0.02)
    found = {}
    for base, base_tokens in BASES.items():
        tokens = p.pretrained_tokens if base_tokens else p.untrained_tokens
        for seed in range(p.seed, p.seed + p.seeds):
            template = TrainSpec(
                corpus=corpus.fingerprint, model=shape, optimizer=optimizer, evaluation=FIRST,
                schedule=Schedule.constant(Mixture.uniform(domains), tokens),
                seed=seed, data_seed=seed,
            )  # fmt: skip
            found[base, seed] = LldStudy(
                template=template, domains=domains, base_tokens=base_tokens, tokens=tokens,
                proxies=p.proxies, plants=p.plants,
            )  # fmt: skip
    return found


def specs(p: Parameters, corpus: Corpus) -> list[Spec]:
    """Return sweeps, responses and targets."""
    return [spec for study in studies(p, corpus).values() for spec in study.specs()]


def follow_up(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return runs as costly as those on the estimates, distillation apart."""
    nothing: dict[str, Mixture] = dict.fromkeys(TRAINED, Mixture.uniform(corpus.domains))
    return [
        run
        for study in studies(p, corpus).values()
        for run in arms(study, corpus, nothing).values()
        if run.distillation is None
    ]


def arms(study: LldStudy, corpus: Corpus, found: Mapping[str, Mixture]) -> dict[str, TrainSpec]:
    """Return arm -> the run from the base; `found` are the mixtures of estimates."""
    mixtures = {
        "uniform": study.uniform,
        "proportional": Mixture(corpus.proportional()),
        "planted": study.planted[PLANT],
        **found,
    }
    runs = {arm: study.run(mixture, FRESH) for arm, mixture in mixtures.items()}
    teacher = study.target(PLANT, OWN)
    return runs | {"distillation": study.run(study.uniform, FRESH, teacher)}


def estimates(
    p: Parameters, corpus: Corpus, store: Store
) -> dict[tuple[str, int], dict[tuple[int, str], dict[str, Estimate]]]:
    """Return (base, seed) -> (plant, order) -> estimator -> estimate."""
    from rayx.proxy.likelihood import gradient_kernel, state_tensors

    records = {record.run_id: record for record in store.records()}
    found = {}
    for key, study in studies(p, corpus).items():
        tensors = state_tensors(study.base, store)
        gradients_NK = gradient_kernel(tensors, study.template.model, corpus, FIRST)
        found[key] = study.estimates(records, reader(corpus, store, FIRST), gradients_NK)
    return found


def reader(corpus: Corpus, store: Store, evaluation: Evaluation):
    """Return what reads the vectors of states on a part of the held-out text."""
    from rayx.proxy.likelihood import state_likelihoods

    return functools.partial(state_likelihoods, corpus=corpus, store=store, evaluation=evaluation)


def recovery_table(p: Parameters, corpus: Corpus, found) -> pd.DataFrame:
    """Return a row for each base, seed, plant, order and estimator."""
    rows = []
    for (base, seed), study in studies(p, corpus).items():
        for (plant, order), by_name in found[base, seed].items():
            mixtures = {"uniform": study.uniform} | {n: e.mixture for n, e in by_name.items()}
            for name, mixture in mixtures.items():
                kl, l1 = recovery(study.planted[plant], mixture)
                rows.append({"base": base, "seed": seed, "plant": plant, "order": order,
                             "estimator": name, "kl": kl, "l1": l1,
                             "aligned": name == "uniform" or by_name[name].aligned,
                             **{f"weight/{d}": w for d, w in mixture.items()}})  # fmt: skip
    return pd.DataFrame(rows)


def paths(
    p: Parameters, corpus: Corpus, store: Store, runs: dict[tuple[str, int], dict[str, TrainSpec]]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return distances to the target along each run, and places of the first seed's paths."""
    distances, places = [], []
    read = reader(corpus, store, SECOND)
    for (base, seed), study in studies(p, corpus).items():
        ends: list[State] = [study.base, study.target(PLANT, OWN)]
        start, target = read(ends)
        names, tokens, vectors = ["base", "target"], [0, study.tokens], [start, target]
        for arm, run in runs[base, seed].items():
            states = along(run, p.points)
            steps = [0, *(state.steps * run.batch_tokens for state in states)]
            found: Sequence[Likelihoods] = [start, *read(states)]
            for at, vector in zip(steps, found, strict=True):
                distances.append({"base": base, "seed": seed, "arm": arm, "tokens": at,
                                  "kl": kl_bits_per_byte(vector, target),
                                  "gap": mean_gap_bits_per_byte(vector, target)})  # fmt: skip
            if arm in DRAWN:
                names += [arm] * p.points
                tokens += steps[1:]
                vectors += found[1:]
        if seed == p.seed:
            xy, share = plane(vectors)
            places += [
                {"base": base, "arm": arm, "tokens": at, "x": x, "y": y, "share": share.sum()}
                for arm, at, (x, y) in zip(names, tokens, xy.tolist(), strict=True)
            ]
    return pd.DataFrame(distances), pd.DataFrame(places)


def summary(rows: pd.DataFrame) -> pd.DataFrame:
    """Return for each base, order and estimator the median recovery and how often it was worse."""
    keys = ["base", "order"]
    uniform = rows[rows["estimator"] == "uniform"].set_index([*keys, "seed", "plant"])["kl"]
    gap = rows.join(uniform.rename("uniform"), on=[*keys, "seed", "plant"])
    gap = gap.assign(not_below=gap["kl"] >= gap["uniform"])
    grouped = gap.groupby([*keys, "estimator"])
    found = grouped.agg(median_kl=("kl", "median"), worst_kl=("kl", "max"),
                        median_l1=("l1", "median"), uniform_kl=("uniform", "median"),
                        not_below=("not_below", "sum"), plants=("kl", "size"))  # fmt: skip
    return found.assign(ratio=found["median_kl"] / found["uniform_kl"]).reset_index()


def verdict(recovered: pd.DataFrame, distances: pd.DataFrame) -> str:
    """Return the outcome in words."""
    own = recovered[recovered["order"] == OWN].set_index(["base", "estimator"])
    last = distances.sort_values("tokens").groupby(["base", "seed", "arm"]).last().reset_index()
    end = last.pivot_table(index=["base", "seed"], columns="arm", values="kl")
    parts = []
    for base in BASES:
        row, arm = own.loc[(base, "sweep")], end.loc[base]
        won = int((arm["sweep"] < arm["uniform"]).sum())
        parts.append(
            f"from the {base} base the inverted sweep left {row['ratio']:.3f} of uniform's median "
            f"KL(planted || found) ({row['median_kl']:.4f}; not below it in {row['not_below']:.0f} "
            f"of {row['plants']:.0f}), and training on it ended at {arm['sweep'].mean():.4f} bits "
            f"per byte from the target (uniform {arm['uniform'].mean():.4f}, won {won} of "
            f"{len(arm)}; planted {arm['planted'].mean():.4f}; distillation "
            f"{arm['distillation'].mean():.4f})"
        )
    return "; ".join(parts) + "."


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Estimate, train on estimates, compare; write reports/lld.json, three tables and a figure."""
    from rayx.report.trajectories import trajectory_figure

    found = estimates(p, corpus, store)
    rows = recovery_table(p, corpus, found)
    recovered = summary(rows)
    log.info("KL(planted || found):\n%s", recovered.round(4).to_string(index=False))
    runs = {}
    for key, study in studies(p, corpus).items():
        mixtures: dict[str, Mixture] = {
            name: found[key][PLANT, OWN][name].mixture for name in TRAINED
        }
        runs[key] = arms(study, corpus, mixtures)
    asked = [run for of_study in runs.values() for run in of_study.values()]
    sweep([*asked, *kept([state for run in asked for state in along(run, p.points)])])
    distances, places = paths(p, corpus, store, runs)
    spreads = {f"{base}/{seed}": study.spread(reader(corpus, store, SECOND))
               for (base, seed), study in studies(p, corpus).items()}  # fmt: skip
    said = verdict(recovered, distances)
    for name, frame in (("recovery", rows), ("distances", distances), ("paths", places)):
        store.write_bytes(f"reports/lld-{name}.csv", frame.to_csv(index=False).encode())
    store.write_json("reports/lld.json", {"verdict": said, "spread": spreads,
                                          "summary": recovered.to_dict("records")})  # fmt: skip
    store.write_bytes("reports/lld.png", trajectory_figure(places, distances))
    table = distances.pivot_table(index=["base", "arm"], columns="tokens", values=["kl", "gap"])
    log.info("distance to the target:\n%s", table.round(4).to_string())
    log.info("between mixtures and between seeds: %s", spreads)
    log.info("%s\nwrote reports/lld.json, tables and lld.png in %s", said, store.url)

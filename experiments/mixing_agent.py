"""A mixing agent, trained on trajectories of random mixtures, against fixed mixtures.

Question:  A general model goes on with code beside its old domains; what counts is half the loss of
           code and half the mean of the others. Does an agent, trained offline on recorded runs of
           random phases, steer new runs better than fixed mixtures do?
Published: Yang et al. 2025, arXiv:2507.15640 (abstract): balanced performance across source and
           target fields, above strong baselines, in continual pretraining on math.
Method:    20 trajectories of 10 phases from one trunk; conservative Q-learning; the policy `agent`
           on fresh trunks. Beside it: an agent without the conservative term, uniform and
           proportional, the objective's own weights, the best of as many constant random mixtures
           as costly as the trajectories, and the best trajectory trained again.
           All choices on the first half of the held-out text, all figures on the second.
Cost:      `rayx run experiments/mixing_agent.py --dry-run`.
Run:       rayx run experiments/mixing_agent.py
Result:    The agent is no better than uniform (1 of 3 seeds) and loses to random search and to the
           best recorded trajectory (0 of 3). Without its conservative term it beats both in 3 of 3,
           and loses to the objective's weights as the mixture. See LOG.md.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, Store, TrainSpec
from rayx.branching import make_trunk
from rayx.candidates import regmix_mixtures
from rayx.corpus import build_sample
from rayx.methods.dem import mean_loss
from rayx.methods.mixing_agent import MixingAgent
from rayx.methods.regmix import Sweep
from rayx.policies.agent import Agent, network_size
from rayx.policy import Policy
from rayx.spec import Parent
from rayx.verify import CHOICE, compare

log = logging.getLogger(__name__)

TRUNK_TOKENS = 150_000
TOKENS = 61_440
SEQUENCES = {"first": 24, "second": 128}  # of a target, by part of its held-out text
GREEDY = "agent, not conservative"


@dataclass(frozen=True)
class Parameters:
    """What --set may change."""

    corpus: str = "data/sample"  # where the sample corpus is, or is built
    domain: str = "code"  # the new one
    trajectories: int = 20
    phases: int = 10
    seed: int = 100  # of the trajectories and the search; 0 chose the settings
    seeds: int = 3  # fresh ones after it, that the comparison is on


def corpus(p: Parameters) -> Corpus:
    """Return the sample corpus, built on first use."""
    return build_sample(p.corpus, vocab_size=1024)


def objective(p: Parameters, corpus: Corpus) -> dict[str, float]:
    """Return half the new domain's loss and half the mean of the others."""
    others = len(corpus.domains) - 1
    return {d: 0.5 if d == p.domain else 0.5 / others for d in corpus.domains}


def template(p: Parameters, corpus: Corpus, seed: int, part: str) -> TrainSpec:
    """Return the continuation of a general model of one seed; its mixture is uniform."""
    start = TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(
            layers=1, width=64, heads=4, ffn_width=192, vocab_size=corpus.vocab_size, context=64
        ),
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), TRUNK_TOKENS),
        optimizer=Optimizer(lr=8e-3, batch_sequences=8),
        evaluation=Evaluation(points=1, sequences=SEQUENCES[part], part=part),
        seed=seed,
        data_seed=seed,
    )
    general = Mixture.uniform([d for d in corpus.domains if d != p.domain])
    trunk = make_trunk(start, general, TRUNK_TOKENS)
    return dataclasses.replace(
        trunk,
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), TOKENS),
        optimizer=dataclasses.replace(trunk.optimizer, warmup_share=0.0, decay_share=0.3),
        parent=Parent(trunk, trunk.steps),
    )


def method(p: Parameters, corpus: Corpus) -> MixingAgent:
    """Return the study."""
    return MixingAgent(
        template=template(p, corpus, p.seed, "first"),
        objective=objective(p, corpus),
        trajectories=p.trajectories,
        phases=p.phases,
        seed=p.seed,
    )


def searched(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return the random search: as many constant mixtures as there are trajectories."""
    prior = dict.fromkeys(corpus.domains, 1.0)
    start = method(p, corpus).template
    return [
        dataclasses.replace(start, schedule=Schedule.constant(mixture, TOKENS))
        for mixture in regmix_mixtures(prior, p.trajectories, seed=p.seed)
    ]


def specs(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return the trajectories and the random search."""
    return [*method(p, corpus).specs(), *searched(p, corpus)]


def fresh(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return a run of each seed that the comparison is on."""
    seeds = range(p.seed + 1, p.seed + p.seeds + 1)
    return [template(p, corpus, seed, "second") for seed in seeds]


def follow_up(p: Parameters, corpus: Corpus) -> list[TrainSpec]:
    """Return runs as costly as those of the comparison."""
    any_found = method(p, corpus).specs()[0].schedule, searched(p, corpus)[0].schedule
    runs = [run for runs in fixed_arms(p, corpus, *any_found).values() for run in runs]
    network = (0.0,) * network_size(len(corpus.domains), 1)
    for seed in range(2):
        agent = Agent(
            domains=corpus.domains,
            network=network,
            decisions=p.phases,
            sequences=SEQUENCES["first"],
            seed=seed,
        )
        runs += steered(p, corpus, agent)
    return runs


def fixed_arms(
    p: Parameters, corpus: Corpus, trajectory: Schedule, found: Schedule
) -> dict[str, list[TrainSpec]]:
    """Return arm -> its runs, one a seed."""
    schedules = {
        "uniform": Schedule.constant(Mixture.uniform(corpus.domains), TOKENS),
        "proportional": Schedule.constant(Mixture(corpus.proportional()), TOKENS),
        "the objective's weights": Schedule.constant(Mixture(objective(p, corpus)), TOKENS),
        "random search": found,
        "best trajectory": trajectory,
    }
    return {
        name: [dataclasses.replace(run, schedule=schedule) for run in fresh(p, corpus)]
        for name, schedule in schedules.items()
    }


def steered(p: Parameters, corpus: Corpus, policy: Policy) -> list[TrainSpec]:
    """Return the runs of an agent, one a seed."""
    return [dataclasses.replace(run, policy=policy) for run in fresh(p, corpus)]


def best(p: Parameters, corpus: Corpus, store: Store, runs: Sequence[TrainSpec]) -> TrainSpec:
    """Return the run of the lowest objective."""
    wanted = objective(p, corpus)
    return min(runs, key=lambda run: mean_loss(store.get(run.run_id).losses, wanted))


def decided(store: Store, runs: Sequence[TrainSpec]) -> list[dict[str, float]]:
    """Return the weights of each block, averaged over seeds; the first only measures."""
    records = [store.get(run.run_id).decisions[1:] for run in runs]
    return [
        {d: float(np.mean([x.weights.get(d, 0.0) for x in block])) for d in runs[0].mixture}
        for block in zip(*records, strict=True)
    ]


def analyse(p: Parameters, corpus: Corpus, store: Store, sweep: Sweep) -> None:
    """Train the agents, run them beside fixed mixtures, write reports/mixing_agent.json."""
    study = method(p, corpus)
    greedy = dataclasses.replace(study, settings={"alpha": 0.0})
    trajectory = best(p, corpus, store, study.specs())
    found = best(p, corpus, store, searched(p, corpus))
    arms = {CHOICE: steered(p, corpus, study.train(store))}
    arms |= {GREEDY: steered(p, corpus, greedy.train(store))}
    arms |= fixed_arms(p, corpus, trajectory.schedule, found.schedule)
    sweep([run for runs in arms.values() for run in runs])
    compared = compare(store, arms, objective(p, corpus))
    blocks = decided(store, arms[CHOICE])
    signals = [store.get(run.run_id) for run in arms[CHOICE]]
    extra = float(np.mean([r.signal_flops / (r.flops - r.signal_flops) for r in signals]))
    store.write_json(
        "reports/mixing_agent.json",
        {
            "comparison": compared,
            "decisions": blocks,
            "decisions_not_conservative": decided(store, arms[GREEDY]),
            "search_mixture": dict(found.mixture),
            "trajectory_mixture": dict(trajectory.mixture),
            "signal_share_of_flops": extra,
        },
    )
    for arm, runs in compared["arms"].items():
        log.info("%s: %s", arm, [round(loss, 4) for loss in runs["objective_bpb"]])
    new = [round(weights[p.domain], 2) for weights in blocks]
    log.info("the agent's share of %s, by decision: %s", p.domain, new)
    log.info("signals took %.1f%% of the training FLOPs", 100 * extra)
    log.info("%s", compared["verdict"])
    log.info("wrote reports/mixing_agent.json in %s", store.url)

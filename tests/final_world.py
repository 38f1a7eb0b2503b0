"""Plans of one model and of several experts, and processes that train them together.

Ray is not imported, for each process would take seconds to do so.
"""

from __future__ import annotations

import multiprocessing
from datetime import timedelta

import torch.distributed as dist

import rayx
from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Phase, Schedule, TrainSpec
from rayx.plan import Plan
from rayx.proxy import set_threads, train_pack
from rayx.proxy.batches import Batches

BATCH_TOKENS = 8 * 16
STUDY = """
from dataclasses import dataclass
from rayx import Corpus
from tests.final_world import template

@dataclass(frozen=True)
class Parameters:
    corpus: str = {corpus!r}
    lr: float = 0.01

def corpus(p):
    return Corpus.load(p.corpus)

def final(p, corpus):
    return template(corpus, p.lr)
"""


def template(corpus: Corpus, lr: float = 0.01, tied: bool = True) -> TrainSpec:
    return TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(
            layers=2, width=16, heads=2, ffn_width=40, vocab_size=corpus.vocab_size, context=16,
            tied_embeddings=tied,
        ),
        schedule=Schedule.constant(Mixture({"code": 1}), 24 * BATCH_TOKENS),
        optimizer=Optimizer(lr=lr, batch_sequences=8),
        evaluation=Evaluation(points=2, sequences=16),
    )  # fmt: skip


def plan(corpus: Corpus, branches: bool, steps: int = 24) -> Plan:
    """Half the steps on one mixture; then another, or an expert for each of two domains."""
    half = steps // 2 * BATCH_TOKENS
    first, second = Mixture({"code": 1, "law": 2}), Mixture({"news": 3, "law": 1})
    ends = {d: Schedule.constant(Mixture({d: 1}), half) for d in ("code", "news")}
    phases = (Phase(first, half),) if branches else (Phase(first, half), Phase(second, half))
    return Plan(
        schedule=Schedule(phases),
        branches=ends if branches else {},
        decay_share=0.25 if branches else None,
        epochs={d: 2.0 for d in corpus.domains},
        domain_tokens=dict(corpus.tokens),
        caps={},
        corpus=corpus.fingerprint,
        choice={"predicted": 2.0, "interval": [1.9, 2.1], "objective": {"law": 1.0}},
        provenance={},
    )


class InterruptedError(Exception):
    """What ends a run in the middle."""


def runs(corpus: Corpus, branches: bool) -> list[TrainSpec]:
    """All runs of a plan, parents first."""
    return with_trunks(plan(corpus, branches).specs(template(corpus)).values())


def with_trunks(specs) -> list[TrainSpec]:
    return list({a.run_id: a for spec in specs for a in spec.path}.values())


def train_all(specs, corpus, store, **settings) -> None:
    for spec in specs:
        branches = {s.parent.steps for s in specs if s.parent and s.parent.spec == spec}
        keep = {spec.run_id: sorted({spec.steps} | branches)}
        record = train_pack([spec], corpus, store=store, keep=keep, parts=2, **settings)[0]
        if not dist.is_initialized() or dist.get_rank() == 0:
            store.put(record)


def interrupt(spec: TrainSpec, step: int, corpus, store) -> None:
    """Train until `step` with a state after each step, in all processes."""
    whole = Batches.next

    def stop(self, number, steerings):
        if number == step:
            raise InterruptedError
        return whole(self, number, steerings)

    Batches.next = stop
    try:
        train_pack([spec], corpus, store=store, state_seconds=0.0, parts=2)
    except InterruptedError:
        pass
    finally:
        Batches.next = whole


def _work(rank: int, port: int, corpus_url: str, folder: str) -> None:
    set_threads(1)
    place, patience = f"tcp://127.0.0.1:{port}", timedelta(seconds=120)
    dist.init_process_group("gloo", place, patience, rank=rank, world_size=2)
    try:
        _train(corpus_url, folder)
    finally:
        dist.destroy_process_group()


def _train(corpus_url: str, folder: str) -> None:
    corpus = Corpus.load(corpus_url)
    for name, branches, settings in (
        ("ddp", False, {}), ("fsdp", False, {"shard": True}),
        ("ddp-branches", True, {}), ("fsdp-branches", True, {"shard": True}),
    ):  # fmt: skip
        train_all(runs(corpus, branches), corpus, rayx.open(f"{folder}/{name}"), **settings)
    (spec,) = runs(corpus, False)
    for name in ("resumed", "resumed-alone"):
        interrupt(spec, 15, corpus, rayx.open(f"{folder}/{name}"))
    dist.barrier()
    train_all([spec], corpus, rayx.open(f"{folder}/resumed"))


def train_in_two_processes(corpus: Corpus, folder: str, port: int) -> None:
    """Train plans by this process and another, into the stores ddp, fsdp ... of a folder."""
    names = ("ddp", "fsdp", "ddp-branches", "fsdp-branches", "resumed", "resumed-alone")
    for name in names:
        rayx.open(f"{folder}/{name}", create=True)
    context = multiprocessing.get_context("spawn")
    other = context.Process(target=_work, args=(1, port, corpus.url, folder))
    other.start()
    _work(0, port, corpus.url, folder)
    other.join(60)
    assert other.exitcode == 0

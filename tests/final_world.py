"""Plans of one model and of several experts, and processes that train them together."""

from __future__ import annotations

import os

import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

import rayx
from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Phase, Schedule, TrainSpec
from rayx.plan import Plan
from rayx.proxy import set_threads, train_pack
from rayx.proxy.batches import Batches
from rayx.sweep.final import kept_steps
from rayx.sweep.packs import with_ancestors

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
    return with_ancestors(list(plan(corpus, branches).specs(template(corpus)).values()))


def train_all(specs, corpus, store, **settings) -> None:
    keep = kept_steps(specs)
    for spec in specs:
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
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    set_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
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
    dist.destroy_process_group()


def train_in_two_processes(corpus: Corpus, folder: str, port: int) -> None:
    """Train plans by two processes, into the stores ddp, fsdp, resumed ... of a folder."""
    names = ("ddp", "fsdp", "ddp-branches", "fsdp-branches", "resumed", "resumed-alone")
    for name in names:
        rayx.open(f"{folder}/{name}", create=True)
    spawn(_work, (port, corpus.url, folder), nprocs=2)

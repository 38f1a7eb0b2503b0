"""Merged candidates without Ray: batches of models, devices, what is implausible."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from rayx.merging import Experts, Operator
from rayx.proxy.evaluate import held_out
from rayx.proxy.merge.candidates import Merges, Stack, merged_losses
from rayx.proxy.model import initial_parameters
from rayx.spec import Evaluation
from tests.test_sweep_merges import candidates, expert_runs

OPERATORS = [
    Operator(),
    Operator(name="task_arithmetic"),
    Operator(name="ties", density=0.3),
    Operator(name="pcb", density=0.3),
]


@pytest.fixture(scope="module")
def set_of_experts(tiny_corpus):
    """Three experts as small steps from a base, their shape, and what they are evaluated on."""
    shape = dataclasses.replace(expert_runs(tiny_corpus)[0].model, layers=2)
    base = initial_parameters(shape, 0)
    steps = [initial_parameters(shape, seed) for seed in (1, 2, 3)]
    stacked = {n: torch.stack([b + 0.3 * s[n] for s in steps]).numpy() for n, b in base.items()}
    stack = Stack(stacked, {n: b.numpy() for n, b in base.items()})
    targets = held_out(tiny_corpus, shape.context, Evaluation(sequences=8), torch.device("cpu"))
    return shape, stack, targets


def draws(operator: Operator, count: int) -> list:
    rng = np.random.default_rng(0)
    return [(operator, tuple(rng.dirichlet(np.ones(3)).tolist())) for _ in range(count)]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_a_batch_of_candidates_is_the_candidates_one_by_one(set_of_experts, operator):
    shape, stack, targets = set_of_experts
    wanted = draws(operator, 7)
    alone = list(merged_losses(shape, wanted, stack, targets))
    batched = list(merged_losses(shape, wanted, stack, targets, together=3))
    assert len({loss["law"].nats for loss in alone}) == 7
    for one, other in zip(alone, batched, strict=True):
        for target in targets:
            assert other[target].nats == pytest.approx(one[target].nats, rel=1e-5)


def test_operators_may_alternate_and_the_order_is_kept(set_of_experts):
    shape, stack, targets = set_of_experts
    wanted = [
        pair for pairs in zip(*(draws(o, 2) for o in OPERATORS), strict=True) for pair in pairs
    ]
    every = list(merged_losses(shape, wanted, stack, targets))
    for candidate, found in zip(wanted, every, strict=True):
        (alone,) = merged_losses(shape, [candidate], stack, targets)
        assert alone == found


def test_a_broken_expert_makes_its_candidates_failures_and_no_others(set_of_experts, tiny_corpus):
    shape, stack, _ = set_of_experts
    specs = candidates_of(tiny_corpus, shape)
    broken = {n: a.copy() for n, a in stack.experts.items()}
    broken["norm"][2] = np.nan
    records = list(Merges().evaluate(specs, Stack(broken, None), tiny_corpus))
    assert [r.status for r in records] == ["failed"] * len(specs)
    assert records[0].failure.type == "Diverged" and "nan" in records[0].failure.message
    huge = {n: a.copy() for n, a in stack.experts.items()}
    huge["norm"][2] *= 1e4
    good, *bad = Merges().evaluate(
        [dataclasses.replace(specs[0], weights=(0.5, 0.5, 0.0)), specs[1]],
        Stack(huge, None),
        tiny_corpus,
    )
    assert good.status == "ok" and "times the" in bad[0].failure.message


def candidates_of(corpus, shape):
    runs = [dataclasses.replace(r, model=shape, parent=None) for r in expert_runs(corpus)]
    return candidates(Experts.of(runs), 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu(set_of_experts, tiny_corpus):
    shape, stack, _ = set_of_experts
    specs = candidates_of(tiny_corpus, shape)
    on_cpu = Merges().evaluate(specs, stack, tiny_corpus)
    on_gpu = Merges().evaluate(specs, stack, tiny_corpus, device="cuda")
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert gpu.losses["law"].nats == pytest.approx(cpu.losses["law"].nats, rel=1e-2)

"""Signals against brute force: separate gradients, loops over copies, packs against singles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rayx.proxy import set_threads, signals
from rayx.proxy.model import Rotary, initial_parameters, stacked, token_logits, token_losses
from rayx.proxy.optimizer import PackedAdamW
from rayx.proxy.signals import (
    excess_losses,
    inner_products,
    loss_drops,
    mean_losses,
    probe_losses,
)
from rayx.spec import ModelShape, Optimizer
from tests.samples import train_spec

SHAPE = ModelShape(layers=2, width=8, heads=2, ffn_width=12, vocab_size=17, context=6)
LARGER = ModelShape(layers=1, width=12, heads=2, ffn_width=16, vocab_size=17, context=6)
CPU = torch.device("cpu")
ROTARY = Rotary(SHAPE, CPU)
RUNS, SOURCES, BATCH = 3, 4, 2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a trial."""
    set_threads(1)


def model(shape: ModelShape = SHAPE, dtype: torch.dtype = torch.float64, runs: int = RUNS):
    """Return parameters of shape (R, ...), with embeddings large enough to matter."""
    drawn = stacked([initial_parameters(shape, seed) for seed in range(runs)], CPU)
    scale = {"embedding": 10.0, "head": 10.0}
    return {n: (p * scale.get(n, 1.0)).to(dtype).requires_grad_() for n, p in drawn.items()}


def text(*size: int, seed: int = 0) -> torch.Tensor:
    """Return random tokens, in which later sources use fewer words."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 17, (*size, SHAPE.context + 1), generator=generator)
    if len(size) == 3:
        tokens %= torch.arange(17, 17 - 2 * size[1], -2)[:, None, None]
    return tokens


def one(parameters, run):
    return {n: p[run : run + 1].detach() for n, p in parameters.items()}


def gradients_RSP(parameters, shape, tokens, only=None):
    """Return each source's gradient by its own backward pass through one run alone."""
    rows = []
    for run, source in np.ndindex(*tokens.shape[:2]):
        leaves = {n: p.clone().requires_grad_() for n, p in one(parameters, run).items()}
        if only:  # an output matrix of its own, equal to the embedding
            leaves[only] = leaves.get(only, leaves["embedding"]).detach().clone().requires_grad_()
        logits = token_logits(leaves, shape, ROTARY, tokens[run, source : source + 1, :, :-1])
        loss = F.cross_entropy(logits.flatten(0, 2), tokens[run, source, :, 1:].flatten())
        wanted = [leaves[only]] if only else list(leaves.values())
        grads = torch.autograd.grad(loss, wanted)
        rows.append(torch.cat([g.flatten() for g in grads]).numpy())
    return np.array(rows).reshape(*tokens.shape[:2], -1)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("over", ["all", "last"])
def test_inner_products_equal_separate_gradients(over, tied, monkeypatch):
    shape = ModelShape(**{**{n: getattr(SHAPE, n) for n in NAMES}, "tied_embeddings": tied})
    parameters, tokens = model(shape), text(RUNS, SOURCES, BATCH)
    g = gradients_RSP(parameters, shape, tokens, only="head" if over == "last" else None)
    want = g @ g.transpose(0, 2, 1)
    got = inner_products(parameters, shape, ROTARY, tokens, over=over)
    assert got.dtype == np.float64 and got == pytest.approx(want, rel=1e-9)
    exact = {n: p.float() for n, p in parameters.items()}
    assert inner_products(exact, shape, ROTARY, tokens, over=over) == pytest.approx(want, rel=1e-4)
    monkeypatch.setitem(signals.CHUNK_BYTES, "cpu", 1)  # one copy at a time
    assert inner_products(parameters, shape, ROTARY, tokens, over) == pytest.approx(want, rel=1e-9)
    assert all(p.grad is None for p in parameters.values())


NAMES = ("layers", "width", "heads", "ffn_width", "vocab_size", "context")


def test_projection_is_seeded_unbiased_and_within_its_error(monkeypatch):
    monkeypatch.setattr(signals, "SKETCH", 256)  # of 1,464 parameters
    parameters, tokens = model(), text(RUNS, SOURCES, BATCH)
    want = inner_products(parameters, SHAPE, ROTARY, tokens)
    drawn = np.array(
        [inner_products(parameters, SHAPE, ROTARY, tokens, "projection", s) for s in range(60)]
    )
    again = inner_products(parameters, SHAPE, ROTARY, tokens, "projection", 0)
    assert np.array_equal(again, drawn[0]) and not np.array_equal(again, drawn[1])
    norm_RS = np.sqrt(np.einsum("rss->rs", want))
    bound = np.sqrt(2 / 256) * norm_RS[:, :, None] * norm_RS[:, None]
    error = (drawn - want) / bound
    assert np.abs(error.mean(0)).max() < 4 / np.sqrt(60)  # unbiased: 4 standard errors
    assert 0.2 < np.sqrt((error**2).mean()) < 1.0
    # The same projection for every run: a run alone is projected as in the pack.
    alone = inner_products(one(parameters, 2), SHAPE, ROTARY, tokens[2:], "projection", 5)
    assert alone[0] == pytest.approx(drawn[5, 2], rel=1e-9)


def test_projection_of_few_parameters_keeps_inner_products():
    parameters, tokens = model(), text(RUNS, SOURCES, BATCH)
    got = inner_products(parameters, SHAPE, ROTARY, tokens, over="projection")
    want = inner_products(parameters, SHAPE, ROTARY, tokens)
    assert got == pytest.approx(want, rel=1e-9)  # a signed permutation


def test_packs_equal_singles():
    parameters, tokens = model(dtype=torch.float32), text(RUNS, SOURCES, BATCH)
    reference = {n: p[0] for n, p in model(LARGER, torch.float32, runs=1).items()}

    def signals_of(parameters, tokens):
        yield mean_losses(parameters, SHAPE, ROTARY, tokens)
        yield excess_losses(parameters, SHAPE, ROTARY, tokens, reference, LARGER)
        for over in ("all", "last"):
            yield inner_products(parameters, SHAPE, ROTARY, tokens, over=over)

    for run in range(RUNS):
        alone = signals_of(one(parameters, run), tokens[run : run + 1])
        for packed, single in zip(signals_of(parameters, tokens), alone, strict=True):
            assert packed[run] == pytest.approx(single[0], rel=1e-4, abs=1e-6)


def test_losses_and_excess_equal_plain_sums(monkeypatch):
    parameters, tokens = model(dtype=torch.float32), text(RUNS, SOURCES, BATCH)
    reference = model(LARGER, torch.float32, runs=1)
    rotary = Rotary(LARGER, CPU)
    mean, excess = np.empty((RUNS, SOURCES)), np.empty((RUNS, SOURCES))
    for run, source in np.ndindex(RUNS, SOURCES):
        batch = tokens[run, source][None]
        ours = token_losses(one(parameters, run), SHAPE, ROTARY, batch).detach().numpy()
        theirs = token_losses(reference, LARGER, rotary, batch).detach().numpy()
        mean[run, source] = ours.mean()
        excess[run, source] = np.maximum(ours - theirs, 0).mean()
    assert mean_losses(parameters, SHAPE, ROTARY, tokens) == pytest.approx(mean, rel=1e-5)
    first = {n: p[0] for n, p in reference.items()}
    got = excess_losses(parameters, SHAPE, ROTARY, tokens, first, LARGER)
    assert got == pytest.approx(excess, rel=1e-5)
    itself = {n: p[1] for n, p in parameters.items()}
    assert excess_losses(one(parameters, 1), SHAPE, ROTARY, tokens[1:2], itself, SHAPE).max() < 1e-6
    monkeypatch.setitem(signals.CHUNK_BYTES, "cpu", 1)  # one sequence at a time
    assert mean_losses(parameters, SHAPE, ROTARY, tokens) == pytest.approx(mean, rel=1e-5)
    probes = [text(5, seed=1), text(2, seed=2)]
    want = [mean_losses(parameters, SHAPE, ROTARY, p.expand(RUNS, 1, -1, -1)) for p in probes]
    assert probe_losses(parameters, SHAPE, ROTARY, probes) == pytest.approx(np.hstack(want))


@pytest.mark.parametrize("chunk_bytes", [2**30, 1])
def test_drops_equal_a_plain_loop_over_copies(chunk_bytes, monkeypatch):
    monkeypatch.setitem(signals.CHUNK_BYTES, "cpu", chunk_bytes)
    specs = [
        train_spec(optimizer=Optimizer(lr=lr, batch_sequences=BATCH)) for lr in (1e-3, 3e-3, 1e-2)
    ]
    parameters = model(dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    noise = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
    moments = {n: t * 1e-3 for n, t in noise.items()}, {n: t**2 * 1e-5 for n, t in noise.items()}
    tensors = (parameters, *moments)
    before = [{n: t.detach().clone() for n, t in group.items()} for group in tensors]
    batches = [text(RUNS, SOURCES, BATCH, seed=s) for s in range(3)]
    probes = [text(5, seed=7), text(3, seed=8)]
    got = loss_drops(tensors, specs, 0.5, SHAPE, ROTARY, batches, probes, updates=11)

    want = np.empty((RUNS, len(probes), SOURCES))
    for run, source in np.ndindex(RUNS, SOURCES):
        copy, first, second = ({n: t.clone() for n, t in one(g, run).items()} for g in tensors)
        start = [token_losses(copy, SHAPE, ROTARY, p[None]).mean().item() for p in probes]
        for p in copy.values():
            p.requires_grad_()
        optimizer = PackedAdamW(copy, first, second, specs[run : run + 1])
        optimizer.updates = 11
        for batch in batches:
            tokens = batch[run, source][None]
            token_losses(copy, SHAPE, ROTARY, tokens).mean().backward()
            optimizer.step(0.5, torch.ones(1, dtype=torch.bool))
        end = [token_losses(copy, SHAPE, ROTARY, p[None]).mean().item() for p in probes]
        want[run, :, source] = np.subtract(start, end)
    assert got == pytest.approx(want, abs=1e-5) and np.abs(want).max() > 1e-3
    for group, old in zip(tensors, before, strict=True):  # the runs did not move, to the bit
        assert all(torch.equal(group[n], old[n]) for n in old)
        assert all(t.grad is None for t in group.values())


def test_a_broken_run_stays_broken_and_alone():
    parameters, tokens = model(), text(RUNS, SOURCES, BATCH)
    whole = inner_products(parameters, SHAPE, ROTARY, tokens)
    with torch.no_grad():
        parameters["norm"][1] = torch.nan
    for over in ("all", "last", "projection"):
        products = inner_products(parameters, SHAPE, ROTARY, tokens, over=over)
        assert np.isnan(products[1]).all() and np.isfinite(products[[0, 2]]).all()
    assert inner_products(parameters, SHAPE, ROTARY, tokens)[0] == pytest.approx(whole[0])

"""Influence against the explicit inverse of each curvature matrix, built by hand in float64."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rayx.proxy import set_threads, signals
from rayx.proxy.influence import influence
from rayx.proxy.model import Rotary, initial_parameters, stacked, token_logits
from rayx.proxy.signals import inner_products
from rayx.spec import ModelShape

SHAPE = ModelShape(layers=1, width=8, heads=2, ffn_width=6, vocab_size=11, context=5)
CPU = torch.device("cpu")
ROTARY = Rotary(SHAPE, CPU)
MATRICES = [f"layers.0.{name}" for name in ("qkv", "attention_out", "gate_up", "down")]
RUNS, SOURCES, BATCH, DAMPING = 2, 3, 4, 0.2


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a trial."""
    set_threads(1)


@pytest.fixture
def parameters() -> dict[str, torch.Tensor]:
    drawn = stacked([initial_parameters(SHAPE, seed) for seed in range(RUNS)], CPU)
    return {n: p.double() * (10.0 if n == "embedding" else 1.0) for n, p in drawn.items()}


@pytest.fixture
def sources_RSBT() -> torch.Tensor:
    tokens = text(RUNS, SOURCES, BATCH)
    return tokens % torch.tensor([11, 7, 4])[:, None, None]


@pytest.fixture
def probes() -> list[torch.Tensor]:
    return [text(5, seed=1), text(2, seed=2) % 4]


def text(*size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 11, (*size, SHAPE.context + 1), generator=generator)


def gradient(parameters, run, tokens_BT, taps=None):
    """Return the gradient of the mean loss of one run as an array, parameters in order."""
    leaves = {n: p[run : run + 1].clone().requires_grad_() for n, p in parameters.items()}

    def keep(pairs, x, output_gradient):
        pairs.append((x, output_gradient[0]))

    def product(x, weight, name):
        out = torch.bmm(x, weight)
        if taps is not None and name in MATRICES:
            out.register_hook(functools.partial(keep, taps[name], x.detach()[0]))
        return out

    logits = token_logits(leaves, SHAPE, ROTARY, tokens_BT[None, :, :-1], product)
    loss = F.cross_entropy(logits.flatten(0, 2), tokens_BT[:, 1:].flatten())
    loss.backward()
    return np.concatenate([leaf.grad.flatten().numpy() for leaf in leaves.values()])


def dense_curvature(parameters, run, tokens_SBT, curvature):
    """Return the whole matrix of a curvature, before damping."""
    taps = {name: [] for name in MATRICES}
    sequences = tokens_SBT.flatten(0, 1)
    g = np.array([gradient(parameters, run, z[None], taps) for z in sequences])
    fisher = g.T @ g / len(g)
    if curvature == "fisher":
        return fisher
    basis = np.eye(fisher.shape[0])
    begin = 0
    for name, p in parameters.items() if curvature == "kronecker" else ():
        size = p[0].numel()
        if name in MATRICES:
            x = torch.cat([x for x, _ in taps[name]]).numpy()
            d = torch.cat([d for _, d in taps[name]]).numpy()
            vectors = np.kron(np.linalg.eigh(x.T @ x)[1], np.linalg.eigh(d.T @ d)[1])
            basis[begin : begin + size, begin : begin + size] = vectors
        begin += size
    return basis @ np.diag(np.diag(basis.T @ fisher @ basis)) @ basis.T


@pytest.mark.parametrize("curvature", ["diagonal", "kronecker", "fisher"])
def test_influence_equals_the_explicit_inverse(
    curvature, parameters, sources_RSBT, probes, monkeypatch
):
    got = influence(parameters, SHAPE, ROTARY, probes, sources_RSBT, curvature, DAMPING)
    assert got.shape == (RUNS, len(probes), SOURCES) and got.dtype == np.float64
    for run in range(RUNS):
        of_probes = np.array([gradient(parameters, run, probe) for probe in probes])
        of_sources = np.array([gradient(parameters, run, tokens) for tokens in sources_RSBT[run]])
        c = dense_curvature(parameters, run, sources_RSBT[run], curvature)
        damped = c + DAMPING * np.trace(c) / len(c) * np.eye(len(c))
        want = of_probes @ np.linalg.solve(damped, of_sources.T)
        assert got[run] == pytest.approx(want, rel=1e-6)
    monkeypatch.setitem(signals.CHUNK_BYTES, "cpu", 1)  # one sequence at a time
    parts = influence(parameters, SHAPE, ROTARY, probes, sources_RSBT, curvature, DAMPING)
    assert parts == pytest.approx(got, rel=1e-9)
    single = {n: p.float() for n, p in parameters.items()}
    rough = influence(single, SHAPE, ROTARY, probes, sources_RSBT, curvature, DAMPING)
    assert rough == pytest.approx(got, rel=1e-3)


def test_the_curvatures_differ_and_large_damping_leaves_inner_products(
    parameters, sources_RSBT, probes
):
    arguments = (parameters, SHAPE, ROTARY)
    probe = sources_RSBT[:1, :1].expand(RUNS, 1, BATCH, -1)  # one probe: a source of the first run
    both = torch.cat([sources_RSBT, probe], dim=1)
    plain = inner_products(*arguments, both)[:, -1, :-1]
    values = {}
    for curvature in ("diagonal", "kronecker", "fisher"):
        (flat,) = influence(*arguments, [probe[0, 0]], sources_RSBT, curvature, 1e9).swapaxes(0, 1)
        ratio = flat / plain  # 1 / lambda of each run, whatever the source
        assert ratio == pytest.approx(np.repeat(ratio[:, :1], SOURCES, axis=1), rel=1e-5)
        values[curvature] = influence(*arguments, probes, sources_RSBT, curvature, DAMPING)
    assert np.abs(values["diagonal"] / values["fisher"] - 1).max() > 0.01
    assert np.abs(values["kronecker"] / values["diagonal"] - 1).max() > 0.01


def test_text_helps_itself_most(parameters, sources_RSBT):
    for curvature in ("diagonal", "kronecker", "fisher"):
        own = [sources_RSBT[0, s] for s in range(SOURCES)]
        value_PS = influence(parameters, SHAPE, ROTARY, own, sources_RSBT, curvature, DAMPING)[0]
        assert (value_PS.argmax(0) == np.arange(SOURCES)).all()
        assert value_PS == pytest.approx(value_PS.T, rel=1e-6)  # a symmetric form


def test_a_broken_run_has_no_influence_and_breaks_no_other(parameters, sources_RSBT, probes):
    arguments = (SHAPE, ROTARY, probes, sources_RSBT)
    broken = {n: p.clone() for n, p in parameters.items()}
    broken["norm"][1] = torch.nan
    for curvature in ("diagonal", "kronecker", "fisher"):
        whole = influence(parameters, *arguments, curvature, DAMPING)
        got = influence(broken, *arguments, curvature, DAMPING)
        assert np.isnan(got[1]).all() and got[0] == pytest.approx(whole[0])

"""The hand-derived training step: losses and gradients are those of autograd."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rayx import Evaluation, Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.proxy import set_threads, train_pack
from rayx.proxy.fused import Fused, fits
from rayx.proxy.model import Rotary, initial_parameters, stacked, token_logits, token_losses
from rayx.proxy.objective import Objective
from rayx.spec import Precision

CPU = torch.device("cpu")
SHAPES = {
    # slices of 512 tokens: a batch of one slice, of several, of several and a rest
    "one layer": (dict(layers=1, width=64, heads=4, ffn_width=192, vocab_size=1024, context=64), 8),
    "two layers": (dict(layers=2, width=32, heads=2, ffn_width=64, vocab_size=300, context=32), 40),
    "one head": (dict(layers=3, width=8, heads=1, ffn_width=8, vocab_size=17, context=3), 1),
    "long": (dict(layers=1, width=16, heads=4, ffn_width=40, vocab_size=50, context=500), 3),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    set_threads(1)


def drawn(shape: ModelShape, runs: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return parameters in which the gains of norms differ from 1."""
    generator = torch.Generator().manual_seed(5)
    parameters = stacked([initial_parameters(shape, seed) for seed in range(runs)], CPU)
    for name, tensor in parameters.items():
        if name.endswith("norm"):
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    return {n: t.to(dtype).requires_grad_() for n, t in parameters.items()}


def reference(parameters, shape, rotary, tokens) -> Tensor:
    """`token_losses`, but in the precision of the parameters."""
    logits = token_logits(parameters, shape, rotary, tokens[:, :, :-1])
    targets = tokens[:, :, 1:].flatten()
    losses = F.cross_entropy(logits.flatten(0, 2), targets, reduction="none")
    return losses.view(logits.shape[:3])


def assert_equal_gradients(parameters, shape, tokens, factor_RB, tolerance) -> None:
    """Compare losses and every gradient, relative to the largest of each tensor."""
    rotary, dtype = Rotary(shape, CPU), parameters["norm"].dtype
    losses = reference(parameters, shape, rotary, tokens)
    weighted = losses if factor_RB is None else losses * factor_RB[..., None]
    wanted_R = weighted.mean((1, 2))
    wanted = torch.autograd.grad(wanted_R.sum(), list(parameters.values()))
    fused = Fused(shape, rotary, dtype)
    again = []
    for _ in range(2):  # buffers hold the first batch when the second comes
        loss_R = fused.backward(parameters, tokens, factor_RB)
        again.append([p.grad.clone() for p in parameters.values()])
        torch.testing.assert_close(loss_R, wanted_R, rtol=tolerance, atol=tolerance)
    for (name, parameter), grad in zip(parameters.items(), wanted, strict=True):
        scale = grad.flatten(1).abs().amax(1)
        error = (parameter.grad - grad).flatten(1).abs().amax(1)
        assert (error <= tolerance * scale).all(), (name, error / scale)
    assert all(map(torch.equal, *again))
    found = fused.losses(parameters, shape, rotary, tokens)
    torch.testing.assert_close(found, losses.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"]
)
def test_losses_and_gradients_are_those_of_autograd(name, tied, dtype, tolerance):
    arguments, batch = SHAPES[name]
    shape = ModelShape(**arguments, tied_embeddings=tied)
    generator = torch.Generator().manual_seed(1)
    for runs, weighted in ((1, False), (3, True)):
        tokens = torch.randint(
            shape.vocab_size, (runs, batch, shape.context + 1), generator=generator
        )
        factor_RB = torch.rand(runs, batch, generator=generator, dtype=dtype) if weighted else None
        parameters = drawn(shape, runs, dtype)
        assert_equal_gradients(parameters, shape, tokens, factor_RB, tolerance)


@pytest.mark.parametrize("large", ["embedding", "layers.0.qkv"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)], ids=["64", "32"]
)
def test_scores_too_large_for_exponentials_are_handled(large, dtype, tolerance):
    """Logits of hundreds, and attention of one key: exp() of them is infinite or 0."""
    shape = ModelShape(layers=1, width=32, heads=2, ffn_width=64, vocab_size=300, context=32)
    parameters = drawn(shape, 2, dtype)
    with torch.no_grad():
        parameters[large][1] *= 20 if large == "layers.0.qkv" else 1000
    tokens = torch.randint(300, (2, 20, 33), generator=torch.Generator().manual_seed(2))
    scores = token_logits(parameters, shape, Rotary(shape, CPU), tokens[:, :, :-1])
    assert large != "embedding" or scores.max() > 100
    assert_equal_gradients(parameters, shape, tokens, None, tolerance)


def test_a_run_that_is_not_finite_changes_no_bit_of_the_others():
    shape = ModelShape(layers=2, width=32, heads=2, ffn_width=64, vocab_size=300, context=32)
    tokens = torch.randint(300, (3, 20, 33), generator=torch.Generator().manual_seed(2))
    rotary, parameters = Rotary(shape, CPU), drawn(shape, 3, torch.float32)
    with torch.no_grad():
        parameters["layers.1.qkv"][1, 0, 0] = math.nan
    loss_R = Fused(shape, rotary).backward(parameters, tokens)
    assert loss_R.isfinite().tolist() == [True, False, True]
    for run in (0, 2):
        alone = {n: t[run : run + 1].detach().requires_grad_() for n, t in parameters.items()}
        alone_loss = Fused(shape, rotary).backward(alone, tokens[run : run + 1])
        assert torch.equal(alone_loss[0], loss_R[run])
        assert all(torch.equal(alone[n].grad[0], p.grad[run]) for n, p in parameters.items())


@pytest.fixture
def spec(tiny_corpus) -> TrainSpec:
    return TrainSpec(
        corpus=tiny_corpus.fingerprint,
        model=ModelShape(layers=2, width=32, heads=2, ffn_width=64, vocab_size=300, context=32),
        schedule=Schedule.constant(Mixture({"code": 1, "law": 1}), 40 * 8 * 32),
        optimizer=Optimizer(lr=5e-3, batch_sequences=8),
        evaluation=Evaluation(points=2, sequences=20),
    )


def test_training_goes_as_with_autograd(spec, tiny_corpus, monkeypatch):
    fast = train_pack([spec], tiny_corpus)[0]
    monkeypatch.setattr("rayx.proxy.objective.fits", lambda shape, device: False)
    monkeypatch.setattr("rayx.proxy.evaluate.fits", lambda shape, device: False)
    slow = train_pack([spec], tiny_corpus)[0]
    for target, loss in slow.losses.items():
        assert fast.losses[target].nats == pytest.approx(loss.nats, rel=1e-4)
    assert fast.losses != slow.losses  # so that two ways were compared


def test_it_is_used_where_it_fits(spec):
    def chosen(spec: TrainSpec, losses=token_losses) -> bool:
        rotary = Rotary(spec.model, CPU)
        return Objective([spec], ("code",), [], rotary, None, CPU, losses).fused is not None

    assert chosen(spec)
    assert not chosen(dataclasses.replace(spec, precision=Precision.BFLOAT16))
    assert not chosen(spec, lambda *arguments: token_losses(*arguments))
    assert not fits(spec.model, torch.device("cuda"))
    assert not fits(dataclasses.replace(spec.model, context=4096), CPU)

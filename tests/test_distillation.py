"""Distillation: the loss against a loop, its limits and gradients; teachers of other shapes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import rayx
from rayx.errors import SpecError, StoreError
from rayx.proxy.checkpoint import State, write_checkpoint
from rayx.proxy.distillation import Teachers, distilled_losses
from rayx.proxy.model import Rotary, initial_parameters, token_logits
from rayx.spec import Distillation, ModelShape, Parent
from tests.samples import train_spec

CPU = torch.device("cpu")
R, B, T, V = 2, 3, 4, 7


@pytest.fixture
def drawn():
    """Logits of a model and of a teacher, and tokens."""
    generator = torch.Generator().manual_seed(5)
    logits, taught = (3 * torch.randn(R, B, T, V, generator=generator) for _ in range(2))
    return logits, taught, torch.randint(V, (R, B, T + 1), generator=generator)


def by_loop(logits, taught, tokens, share_RB, swap):
    """The same losses, one token after another in float64."""
    losses = np.empty((R, B, T))
    for r, b, t in np.ndindex(R, B, T):
        model, teacher = (x[r, b, t].double().numpy().copy() for x in (logits, taught))
        true = int(tokens[r, b, t + 1])
        if swap:
            top = int(teacher.argmax())
            teacher[top], teacher[true] = teacher[true], teacher[top]
        log_p = model - np.log(np.exp(model).sum())
        q = np.exp(teacher) / np.exp(teacher).sum()
        losses[r, b, t] = -(1 - share_RB[r, b]) * log_p[true] - share_RB[r, b] * (q @ log_p)
    return losses


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_losses_are_those_of_a_loop(drawn, share, swap):
    logits, taught, tokens = drawn
    found = distilled_losses(logits, taught, tokens, share, swap)
    expected = by_loop(logits, taught, tokens, np.full((R, B), share), swap)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_a_share_for_each_sequence(drawn):
    logits, taught, tokens = drawn
    share_RB = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.0, 0.0]])
    found = distilled_losses(logits, taught, tokens, share_RB, True)
    expected = by_loop(logits, taught, tokens, share_RB.numpy(), True)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6, atol=1e-6)


def test_without_a_share_only_the_text_counts(drawn):
    logits, taught, tokens = drawn
    text = torch.nn.functional.cross_entropy(
        logits.flatten(0, 2), tokens[:, :, 1:].flatten(), reduction="none"
    ).view(R, B, T)
    torch.testing.assert_close(distilled_losses(logits, taught, tokens, 0.0, False), text)
    # and the change with the share is continuous, of its own order
    small = distilled_losses(logits, taught, tokens, 1e-4, True)
    assert 0 < (small - text).abs().max() < 1e-4 * 40


def test_swap_makes_the_text_the_teachers_best_guess_with_the_same_logits(drawn):
    """The teacher's probabilities are read off the losses of models that prefer one token."""
    _, taught, tokens = drawn
    true = tokens[:, :, 1:]
    seen = []
    for token in range(V):  # log p is 0 for all tokens but a constant less for this one
        logits = torch.zeros(R, B, T, V)
        logits[..., token] = 1.0
        normal = torch.logsumexp(logits, dim=-1)
        seen.append(normal - distilled_losses(logits, taught, tokens, 1.0, True))
    swapped = torch.stack(seen, dim=-1)  # the teacher's probabilities
    assert torch.equal(swapped.argmax(dim=-1), true)
    plain = taught.softmax(dim=-1)
    torch.testing.assert_close(
        swapped.sort(dim=-1).values, plain.sort(dim=-1).values, rtol=1e-4, atol=1e-6
    )
    moved = (swapped - plain).abs() > 1e-5
    assert set(moved.sum(dim=-1).flatten().tolist()) == {0, 2}  # where it was right, nothing moves


def test_a_model_equal_to_its_teacher_has_no_gradient(drawn):
    _, taught, tokens = drawn
    logits = taught.clone().requires_grad_()
    teacher = taught.clone().requires_grad_()
    distilled_losses(logits, teacher, tokens, 1.0, False).sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6
    assert teacher.grad is None


def test_gradients_are_finite_differences(drawn):
    logits, taught, tokens = drawn
    logits.requires_grad_()
    distilled_losses(logits, taught, tokens, 0.4, True).sum().backward()
    assert logits.grad is not None
    share_RB = np.full((R, B), 0.4)
    for at in [(0, 0, 0, 1), (1, 2, 3, 6), (0, 1, 2, int(tokens[0, 1, 3]))]:
        ends = []
        for step in (1e-4, -1e-4):
            moved = logits.detach().double().clone()
            moved[at] += step
            ends.append(by_loop(moved, taught, tokens, share_RB, True).sum())
        slope = (ends[0] - ends[1]) / 2e-4
        assert float(logits.grad[at]) == pytest.approx(slope, rel=1e-4, abs=1e-5)


# Teachers ------------------------------------------------------------------------------------

SMALL = ModelShape(layers=1, width=16, heads=2, ffn_width=24, vocab_size=300, context=8)
LARGE = dataclasses.replace(SMALL, layers=2, width=32, heads=4)


def teacher(shape: ModelShape, seed: int) -> Parent:
    spec = train_spec(model=shape, seed=seed)
    return Parent(spec, spec.steps)


def distilled(taught_by: Parent):
    return train_spec(model=SMALL, distillation=Distillation(teacher=taught_by))


@pytest.fixture
def store(tmp_path):
    """A store with the teachers' states: as they were drawn."""
    store = rayx.open(tmp_path / "store", create=True)
    for shape, seed in ((SMALL, 1), (LARGE, 2), (LARGE, 3)):
        drawn = initial_parameters(shape, seed)
        first, second = ({n: torch.zeros_like(p) for n, p in drawn.items()} for _ in range(2))
        write_checkpoint(store, teacher(shape, seed), State(drawn, first, second, {}))
    return store


def test_each_run_has_the_logits_of_its_own_teacher_whatever_its_shape(store):
    own = [(LARGE, 2), (SMALL, 1), (LARGE, 3), (LARGE, 2)]
    teachers = Teachers([distilled(teacher(*who)) for who in own], store, CPU)
    inputs = torch.randint(300, (4, 3, 8), generator=torch.Generator().manual_seed(0))
    found = teachers.logits(inputs)
    assert found.shape == (4, 3, 8, 300) and not found.requires_grad
    for run, (shape, seed) in enumerate(own):
        alone = {n: p[None] for n, p in initial_parameters(shape, seed).items()}
        expected = token_logits(alone, shape, Rotary(shape, CPU), inputs[run : run + 1])
        torch.testing.assert_close(found[run : run + 1], expected)


def test_a_teacher_that_cannot_be_read_is_named(store):
    unknown = teacher(SMALL, 9)
    absent = distilled(unknown)
    with pytest.raises(StoreError, match=unknown.spec.run_id):
        Teachers([absent], store, CPU)
    with pytest.raises(SpecError, match=f"{absent.run_id} has a teacher; give the store"):
        Teachers([absent], None, CPU)

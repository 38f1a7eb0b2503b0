"""Distillation: the loss against a loop and its limits; teachers; continued pretraining by arms."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

import rayx
from rayx import Mixture, Optimizer, Schedule
from rayx.errors import SpecError, StoreError
from rayx.experiment import load_experiment
from rayx.methods.mix_cpt import Arm, MixCpt, best_within, less_replay, on_front
from rayx.proxy import set_threads, train_pack
from rayx.proxy.checkpoint import State, write_checkpoint
from rayx.proxy.distillation import Teachers, distilled_losses
from rayx.proxy.model import Rotary, initial_parameters, token_logits
from rayx.record import CurvePoint, Loss
from rayx.spec import Distillation, Evaluation, ModelShape, Parent
from tests.samples import record, train_spec

study = load_experiment(Path(__file__).parents[1] / "experiments" / "mix_cpt.py")

CPU = torch.device("cpu")
R, B, T, V = 2, 3, 4, 7


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices; threads that wait for each other take longer."""
    set_threads(1)


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


# Continued pretraining by arms ---------------------------------------------------------------


def base(**changes):
    return train_spec(schedule=Schedule.constant(Mixture({"law": 1, "web": 3}), 16_384), **changes)


def test_an_arm_goes_on_from_the_base_and_is_taught_by_it():
    method = MixCpt(base=base(), domain="code", tokens=8_192)
    plain = method.run(Arm())
    assert plain.parent == Parent(method.base, method.base.steps)
    assert plain.mixture == Mixture({"code": 1}) and plain.distillation is None
    assert plain.optimizer == method.base.optimizer and plain.tokens == 8_192
    replayed = method.run(Arm(ratio=0.6, share=0.5, swap=True, replay_only=True))
    assert replayed.mixture == Mixture({"code": 0.6, "law": 0.1, "web": 0.3})
    assert replayed.distillation == Distillation(
        teacher=plain.parent, share=0.5, swap=True, domains=("law", "web")
    )
    everywhere = Distillation(teacher=plain.parent, share=0.5)
    assert method.run(Arm(share=0.5)).distillation == everywhere
    slow = method.run(Arm(lr_share=0.1))
    assert slow.optimizer.lr == pytest.approx(0.1 * plain.optimizer.lr)


def test_arms_have_names_and_families_of_equal_size():
    assert len({arm.name for arm in study.ARMS}) == len(study.ARMS)
    sizes = pd.Series([arm.family for arm in study.ARMS]).value_counts().to_dict()
    assert sizes.pop("plain") == 1 and set(sizes.values()) == {4}
    assert set(sizes) == {"replay", "rate", "distilled", "swapped", "both"}
    assert Arm(ratio=0.75, share=0.5, swap=True).name == "25% replay, swapped 0.5"


def test_what_keeps_a_base_from_forgetting_does_so(tiny_corpus, tmp_path):
    """Really trained: the base's own predictions hold the old domain, and the text teaches less."""
    start = dataclasses.replace(
        base(),
        corpus=tiny_corpus.fingerprint,
        model=dataclasses.replace(SMALL, vocab_size=tiny_corpus.vocab_size, context=32),
        schedule=Schedule.constant(Mixture({"law": 1}), 100 * 8 * 32),
        optimizer=Optimizer(lr=8e-3, batch_sequences=8),
        evaluation=Evaluation(points=1, sequences=32),
    )
    method = MixCpt(base=start, domain="code", tokens=60 * 8 * 32)
    arms = [Arm(), Arm(share=0.8), Arm(share=0.8, swap=True)]
    store = rayx.open(tmp_path / "store", create=True)
    (trained,) = train_pack([start], tiny_corpus, store=store, keep={start.run_id: [start.steps]})
    store.put(trained)
    for arm in arms:
        store.put(train_pack([method.run(arm)], tiny_corpus, store=store)[0])
    found = method.outcomes(store, arms).set_index("arm")
    assert (found["gain"] > 0).all() and found.loc["plain", "forgetting"] > 0
    for name in ("distilled 0.8", "swapped 0.8"):
        assert found.loc[name, "forgetting"] < 0.9 * found.loc["plain", "forgetting"]
        assert found.loc[name, "gain"] < found.loc["plain", "gain"]


def outcomes(rows):
    names = ["arm", "family", "domain_loss", "general_loss", "gain", "forgetting"]
    return pd.DataFrame(
        [(arm, family, d, g, 3.0 - d, g - 2.0) for arm, family, d, g in rows], columns=names
    )


PLANTED = outcomes(
    [
        ("plain", "plain", 2.0, 3.0),  # of replay alone: domain + general loss = 5
        ("half", "replay", 2.6, 2.4),
        ("most", "replay", 3.0, 2.0),
        ("swap", "swapped", 2.5, 2.4),
        ("weak", "swapped", 2.9, 2.2),
        ("beyond", "rate", 3.3, 1.9),
    ]
)


def test_front_and_the_gap_to_replay_by_hand():
    assert PLANTED["arm"][on_front(PLANTED)].tolist() == ["plain", "most", "swap", "weak", "beyond"]
    found = less_replay(PLANTED)
    np.testing.assert_allclose(found[:5], [0, 0, 0, -0.1, 0.1], atol=1e-12)
    assert np.isnan(found[5])
    twice = pd.concat([PLANTED, PLANTED])  # equal rows do not dominate each other
    assert on_front(twice).sum() == 10


def test_front_is_what_a_loop_finds():
    rng = np.random.default_rng(0)
    drawn = outcomes([("a", "b", *pair) for pair in rng.integers(0, 6, (40, 2))])
    points = list(zip(drawn["domain_loss"], drawn["general_loss"], strict=True))
    expected = [not any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points) for p in points]
    assert on_front(drawn).tolist() == expected


def test_each_familys_best_within_a_limit_may_be_the_plain_arm():
    assert best_within(PLANTED, 0.4) == {
        "plain": "plain",
        "rate": "beyond",
        "replay": "half",
        "swapped": "swap",
    }
    assert set(best_within(PLANTED, 1.0).values()) == {"plain"}
    assert best_within(PLANTED, -0.5)["replay"] == "most"  # none keeps the limit: the nearest


def test_experiment_chooses_on_one_seed_and_reports_the_others(tmp_path):
    corpus = SimpleNamespace(domains=("code", "law", "web"), fingerprint="c0ffee", vocab_size=300)
    p = study.Parameters(seeds=2, forgetting=0.1)
    store = rayx.open(tmp_path / "store", create=True)

    def put(spec, domain, general):
        losses = {d: Loss(1.0, general, 0.0) for d in ("law", "web")}
        losses["code"] = Loss(1.0, domain, 0.0)
        point = CurvePoint(spec.steps, spec.tokens, losses)
        store.put(dataclasses.replace(record(spec), curve=(point,)))

    for method in study.studies(p, corpus):
        put(method.base, 3.0, 2.0)
        for arm in study.ARMS:
            held = max(1 - arm.ratio, 1 - arm.lr_share, arm.share)
            better = 0.0105 if arm.family == "swapped" else 0.0
            put(method.run(arm), 2.0 + held**2 - better, 2.4 - 0.4 * held)
    assert len(study.specs(p, corpus)) == 3 * len(study.ARMS)
    parts = {m.base.seed: m.base.evaluation.part for m in study.studies(p, corpus)}
    assert parts == {100: "first", 101: "second", 102: "second"}
    study.analyse(p, corpus, store, lambda specs: None)
    report = json.loads(store.read_bytes("reports/mix_cpt.json"))
    # Forgetting is .4 - .4 held: a limit of .1 asks for held >= .75.
    assert report["chosen"]["swapped"] == "swapped 0.75"
    assert report["chosen"]["replay"] == "75% replay" and report["chosen"]["plain"] == "plain"
    means = {row["arm"]: row for row in report["means"]}
    assert means["swapped 0.75"]["less_replay"] == pytest.approx(-0.0105)
    assert means["swapped 0.75"]["count"] == 2 and means["plain"]["front"]
    assert "swapped: swapped 0.75 gains 0.448, forgets +0.100" in report["verdict"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 0.0}, "Arm.ratio is 0.0; expected a share in"),
        ({"lr_share": 2}, "Arm.lr_share is 2"),
        ({"share": 1.5}, "Arm.share is 1.5"),
        ({"swap": True}, "Arm.swap is True; expected False without a teacher"),
        ({"share": 0.5, "replay_only": True}, "Arm.replay_only is True"),
    ],
)
def test_arms_that_cannot_be_are_refused(changes, said):
    with pytest.raises(SpecError, match=said):
        Arm(**changes)


def test_a_domain_of_the_base_is_not_new():
    with pytest.raises(SpecError, match="MixCpt.domain is 'web'; expected none of the base's"):
        MixCpt(base=base(), domain="web", tokens=8_192)

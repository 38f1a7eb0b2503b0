"""LLD: planted mixtures in a world of bigrams, vectors against float64, divergences, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.errors import ModelError, SpecError, StoreError
from rayx.fit import TiltedPower
from rayx.likelihoods import (
    Likelihoods,
    difference,
    kl_bits_per_byte,
    matrix,
    mean_gap_bits_per_byte,
    plane,
)
from rayx.merging import MergeSpec
from rayx.methods.lld import (
    Estimate,
    aligned,
    identity_kernel,
    recovery,
    response_kernel,
    simplex_projection,
)
from rayx.methods.lld_study import LldStudy, State, along
from rayx.methods.lld_sweep import SweepInversion, between_seeds, sweep_records
from rayx.mixture import Mixture, Schedule
from rayx.proxy.likelihood import gradient_kernel, likelihoods, state_likelihoods, state_tensors
from rayx.proxy.model import Rotary, token_losses
from rayx.proxy.models import open_model
from rayx.record import Loss
from rayx.spec import Evaluation, ModelShape, Optimizer, Parent, TrainSpec

pytest.importorskip("transformers")

from tests.test_cli_evaluate import cli  # noqa: E402, F401 (a fixture)
from tests.test_huggingface import plain_bits, trained  # noqa: E402, F401 (a fixture)
from tests.test_proxy import reference_losses  # noqa: E402
from tests.tiny_models import own_tokenizer_json, save_model  # noqa: E402

DOMAINS: tuple[str, ...] = ("code", "law", "news", "wiki")
EVALUATION = Evaluation(points=1, sequences=6, part="first")


# A world of tabular bigram models -----------------------------------------------------------------


class Bigrams:
    """Domains are tables of transitions; a model is a table of logits trained by gradient flow."""

    def __init__(self, seed: int, size: int = 10, texts: int = 40, length: int = 40) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.next_KAB = rng.dirichlet(np.full(size, 0.3), (len(DOMAINS), size))
        self.first_KA = rng.dirichlet(np.full(size, 2.0), len(DOMAINS))
        self.counts_NAB = np.zeros((len(DOMAINS) * texts, size, size))
        self.label_N = np.repeat(np.arange(len(DOMAINS)), texts)
        for n, k in enumerate(self.label_N):
            a = rng.integers(size)
            for _ in range(length):
                b = rng.choice(size, p=self.next_KAB[k, a])
                self.counts_NAB[n, a, b] += 1
                a = b

    def gradient(self, table_AB: np.ndarray, pi_K: np.ndarray) -> np.ndarray:
        p_AB = np.exp(table_AB - np.log(np.exp(table_AB).sum(1, keepdims=True)))
        return np.einsum("k,ka,kab->ab", pi_K, self.first_KA, self.next_KAB - p_AB)

    def train(self, table_AB: np.ndarray, pi_K: np.ndarray, steps: int = 60, seed: int = 0):
        noise = np.random.default_rng(seed)  # of the data's order: the same by default
        for _ in range(steps):
            step_AB = self.gradient(table_AB, pi_K)
            table_AB = table_AB + 2.0 * step_AB + 0.002 * noise.standard_normal(table_AB.shape)
        return table_AB

    def read(self, table_AB: np.ndarray, name: str = "model") -> Likelihoods:
        logp_AB = table_AB - np.log(np.exp(table_AB).sum(1, keepdims=True))
        return vector(np.einsum("nab,ab->n", self.counts_NAB, logp_AB), self.label_N, name)


def vector(nats_N, label_N=None, model="model", probe="texts", bytes_N=None) -> Likelihoods:
    nats_N = np.asarray(nats_N, float)
    label_N = np.arange(len(nats_N)) * len(DOMAINS) // len(nats_N) if label_N is None else label_N
    bytes_N = np.full(len(nats_N), 100.0) if bytes_N is None else bytes_N
    return Likelihoods(model=model, probe=probe, targets=DOMAINS, target_N=label_N, nats_N=nats_N,
                       bytes_N=bytes_N)  # fmt: skip


@dataclasses.dataclass
class Planted:
    """Estimates of planted mixtures, and how they did."""

    true: list[dict[str, float]]
    found: dict[str, list[Estimate]]
    after: dict[str, list[float]]  # distance to the target after training on the estimate

    def kl(self, name: str) -> np.ndarray:
        pairs = zip(self.true, self.found[name], strict=True)
        return np.array([recovery(t, f.mixture)[0] for t, f in pairs])


@pytest.fixture(scope="module", params=["untrained", "trained"])
def planted(request) -> Planted:
    world, size, K = Bigrams(seed=5), 10, len(DOMAINS)
    start = np.zeros((size, size))
    if request.param == "trained":
        start = world.train(start, np.full(K, 1 / K), 40, seed=9)
    base = world.read(start, "base")
    corners_KK = 0.5 * np.eye(K) + 0.5 / K
    responses = [world.read(world.train(start, row)) for row in corners_KK]
    weights_RK = world.rng.dirichlet(np.ones(K), 16)
    losses_RT = np.stack([world.read(world.train(start, w)).bits_per_byte for w in weights_RK])
    inversion = SweepInversion(weights_RK=weights_RK, losses_RT=losses_RT, domains=DOMAINS)
    slopes_KX = np.stack([world.gradient(start, e).ravel() for e in np.eye(K)])
    p_AB = np.exp(start - np.log(np.exp(start).sum(1, keepdims=True)))
    scores_NAB = world.counts_NAB - world.counts_NAB.sum(2, keepdims=True) * p_AB
    kernels = {
        "gradient": scores_NAB.reshape(-1, size**2) @ slopes_KX.T,
        "response": response_kernel(base, responses, corners_KK),
        "none": np.zeros((len(world.label_N), K)),
    }
    found = Planted([], {}, {})
    for i, pi_K in enumerate(world.rng.dirichlet(np.full(K, 1.0), 8)):
        target = world.read(world.train(start, pi_K, seed=100 + i), "target")
        estimates = {name: aligned(base, target, k_NK) for name, k_NK in kernels.items()}
        estimates["response, domain"] = aligned(
            base, target, kernels["response"], None, 0.03, "domain"
        )
        estimates["identity"] = identity_kernel(base, target)
        estimates["sweep"] = inversion.estimate(target.bits_per_byte)
        found.true.append(dict(zip(DOMAINS, pi_K, strict=True)))
        for name, estimate in estimates.items():
            found.found.setdefault(name, []).append(estimate)
            after = world.train(start, estimate.mixture.to_array(DOMAINS), seed=200 + i)
            distance = kl_bits_per_byte(target, world.read(after))
            found.after.setdefault(name, []).append(distance)
    return found


def test_planted_mixtures_are_recovered(planted):
    uniform = np.median(planted.kl("none"))
    assert np.median(planted.kl("sweep")) < uniform / 50
    assert (planted.kl("sweep") < planted.kl("none")).all()
    assert np.median(planted.kl("response")) < uniform / 20
    for name in ("identity", "gradient"):
        assert np.median(planted.kl(name)) < 0.7 * uniform
    assert all(e.aligned for n, of in planted.found.items() for e in of if n != "none")
    assert all(not e.aligned and e.cosine == 0 and e.misfit == 1 for e in planted.found["none"])


def test_training_on_what_was_found_leads_to_the_target(planted):
    after = {name: np.array(distance) for name, distance in planted.after.items()}
    assert (after["sweep"] < after["none"] / 20).all()
    for name in ("identity", "gradient", "response"):
        assert np.median(after[name]) < np.median(after["none"])


def sweep_of(world: Bigrams, runs: int = 12, noise_sd: float = 0.0):
    start = np.zeros((10, 10))
    weights_RK = world.rng.dirichlet(np.ones(len(DOMAINS)), runs)
    tables = [world.train(start, w) for w in weights_RK]
    losses_RT = np.stack([world.read(table).bits_per_byte for table in tables])
    return start, weights_RK, losses_RT + noise_sd * world.rng.standard_normal(losses_RT.shape)


def test_inversion_bears_a_target_that_is_better_at_everything_alike():
    world = Bigrams(seed=3)
    start, weights_RK, losses_RT = sweep_of(world, 16)
    inversion = SweepInversion(weights_RK=weights_RK, losses_RT=losses_RT, domains=DOMAINS)
    pi_K = np.array([0.5, 0.3, 0.15, 0.05])
    losses_T = world.read(world.train(start, pi_K)).bits_per_byte
    plain, moved = (inversion.estimate(losses_T - by) for by in (0.0, losses_RT.mean(1).std()))
    true = dict(zip(DOMAINS, pi_K, strict=True))
    assert recovery(true, plain.mixture)[0] < 0.01 and recovery(true, moved.mixture)[0] < 0.05
    assert plain.misfit < moved.misfit
    # the same sweep in nats, or with another law, says the same
    nats = SweepInversion(weights_RK=weights_RK, losses_RT=losses_RT * 69.3, domains=DOMAINS)
    assert recovery(plain.mixture, nats.estimate(losses_T * 69.3).mixture)[1] < 1e-3
    tilted = SweepInversion(weights_RK=weights_RK, losses_RT=losses_RT, domains=DOMAINS,
                            regressor=TiltedPower())  # fmt: skip
    assert recovery(true, tilted.estimate(losses_T).mixture)[0] < 0.03


def test_ridge_leads_from_the_evidence_to_the_prior():
    world = Bigrams(seed=4)
    start, weights_RK, losses_RT = sweep_of(world)
    base, target = world.read(start), world.read(world.train(start, np.array([0.7, 0.1, 0.1, 0.1])))
    prior = {"code": 1, "law": 2, "news": 3, "wiki": 4}
    kernel_NK = response_kernel(
        base, [world.read(world.train(start, w)) for w in weights_RK], weights_RK
    )
    inversion = SweepInversion(weights_RK=weights_RK, losses_RT=losses_RT, domains=DOMAINS)
    for estimate in (
        lambda ridge: aligned(base, target, kernel_NK, prior, ridge),
        lambda ridge: inversion.estimate(target.bits_per_byte, prior, ridge),
    ):
        apart = [recovery(estimate(r).mixture, Mixture(prior))[0] for r in (0.0, 1.0, 1e6)]
        assert apart[0] > apart[1] > apart[2] and apart[2] < 1e-4
    hot = identity_kernel(base, target, prior, temperature=1e6).mixture
    assert recovery(hot, Mixture(prior))[1] < 1e-3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.2, 5.0))
def test_identity_kernel_maximises_what_it_says(seed, temperature):
    rng = np.random.default_rng(seed)
    base, target = (vector(rng.normal(-50, 5, 40)) for _ in range(2))
    prior = dict(zip(DOMAINS, rng.dirichlet(np.ones(4)) + 0.01, strict=True))
    pi_K = identity_kernel(base, target, prior, temperature).mixture.to_array(DOMAINS)
    d_K = base.per_target(difference(base, target))
    prior_K = Mixture(prior).to_array(DOMAINS)

    def value(p_K):
        return p_K @ d_K - temperature * d_K.std() * (p_K * np.log(p_K / prior_K)).sum()

    for other_K in rng.dirichlet(np.ones(4), 20):
        assert value(np.maximum(pi_K, 1e-9)) >= value(np.maximum(other_K, 1e-9)) - 1e-4


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_alignment_has_the_largest_cosine(seed):
    rng = np.random.default_rng(seed)
    base, target = (vector(rng.normal(-50, 5, 24)) for _ in range(2))
    kernel_NK = rng.normal(size=(24, 4))
    kernel_NK[:, 0] += difference(base, target)  # so that something points there
    found = aligned(base, target, kernel_NK)
    wanted_N = difference(base, target)
    for other_K in [*rng.dirichlet(np.ones(4), 50), *np.eye(4)]:
        step_N = kernel_NK @ other_K
        assert found.cosine >= np.corrcoef(step_N, wanted_N)[0, 1] - 1e-9
    assert found.misfit == pytest.approx(1 - found.cosine**2)
    assert found.cosine == pytest.approx(aligned(base, target, 1e6 * kernel_NK).cosine)


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=6))
def test_projection_is_the_nearest_point_of_the_simplex(point):
    point_K = np.array(point)
    found_K = simplex_projection(point_K)
    assert found_K.min() >= 0 and found_K.sum() == pytest.approx(1)
    drawn = np.random.default_rng(0).dirichlet(np.ones(len(point)), 50)
    for other_K in [*drawn, *np.eye(len(point))]:
        assert np.linalg.norm(found_K - point_K) <= np.linalg.norm(other_K - point_K) + 1e-9


# The study ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_tokens", [0, 12_800])
def test_study_recovers_what_it_plants(base_tokens):
    world, K = Bigrams(seed=8), len(DOMAINS)
    start = np.zeros((10, 10))
    template = TrainSpec(
        corpus="c0ffee",
        model=ModelShape(layers=1, width=16, heads=2, ffn_width=32, vocab_size=300, context=16),
        schedule=Schedule.constant(Mixture.uniform(DOMAINS), 6_400),
        optimizer=Optimizer(lr=1e-2, batch_sequences=4),
        evaluation=Evaluation(points=1, sequences=8, part="first"),
        seed=5, data_seed=5,
    )  # fmt: skip
    study = LldStudy(template=template, domains=DOMAINS, base_tokens=base_tokens, tokens=6_400,
                     proxies=8, plants=3)  # fmt: skip

    def state_of(state: State) -> Likelihoods:
        if state == study.base:
            return world.read(start, "base")
        assert isinstance(state, Parent)
        pi_K = state.spec.mixture.to_array(DOMAINS)
        return world.read(world.train(start, pi_K, seed=state.spec.data_seed))

    def read(states):
        return [state_of(state) for state in states]

    specs = [spec for spec in study.specs() if isinstance(spec, TrainSpec)]
    asked = {member.checkpoint for spec in study.specs() if isinstance(spec, MergeSpec)
             for member in spec.experts.members}  # fmt: skip
    assert {target.checkpoint for target in study.targets().values()} <= asked
    own, shared = study.target(1, "own").spec, study.target(1, "shared").spec
    assert own.data_seed != shared.data_seed == template.data_seed
    assert (own.seed != shared.seed) == (base_tokens == 0) and own.mixture == shared.mixture
    records: Any = {}
    for spec in specs:
        bits = state_of(Parent(spec, spec.steps)).bits_per_byte
        losses = {d: Loss(0.0, float(b), 0.0) for d, b in zip(DOMAINS, bits, strict=True)}
        records[spec.run_id] = SimpleNamespace(losses=losses)
    gradients_NK = np.random.default_rng(0).normal(size=(len(world.label_N), K))
    found = study.estimates(records, read, gradients_NK)
    assert set(found) == {(p, o) for p in range(3) for o in ("shared", "own")}
    for (plant, _), estimates in found.items():
        kl = {n: recovery(study.planted[plant], e.mixture)[0] for n, e in estimates.items()}
        kl["uniform"] = recovery(study.planted[plant], study.uniform)[0]
        assert kl["sweep"] < 0.1 * kl["uniform"] and kl["sweep"] < kl["random search"]
        assert estimates["random search"].mixture in [s.mixture for s in study.sweep()]
    spread = study.spread(read)
    assert spread["between_mixtures"] > 10 * spread["between_seeds"] > 0
    points = along(specs[0], 4)
    assert points[-1].steps == specs[0].steps and len({point.steps for point in points}) == 4
    with pytest.raises(SpecError, match="points is 0"):
        along(specs[0], 0)


# Vectors ------------------------------------------------------------------------------------------


def test_divergence_is_half_the_variance_in_bits_per_byte():
    rng = np.random.default_rng(0)
    first, second = (vector(rng.uniform(-80, -40, 200), bytes_N=rng.uniform(50, 90, 200))
                     for _ in range(2))  # fmt: skip
    clipped = matrix([first, second])
    low = np.percentile(np.concatenate([first.nats_N, second.nats_N]), 2)
    assert clipped.min() == low and (clipped >= np.stack([first.nats_N, second.nats_N])).all()
    q_MN = clipped - clipped.mean(1, keepdims=True) - clipped.mean(0) + clipped.mean()
    per_byte = math.log(2) * first.bytes_N.mean()
    want = ((q_MN[0] - q_MN[1]) ** 2).sum() / (2 * 200) / per_byte
    assert kl_bits_per_byte(first, second) == pytest.approx(want)
    gap = (first.nats_N - second.nats_N).mean() / per_byte
    assert mean_gap_bits_per_byte(first, second) == pytest.approx(gap)
    shifted = vector(second.nats_N - 3.0, bytes_N=second.bytes_N)
    assert kl_bits_per_byte(second, shifted) < 0.01 * want  # a shift of all texts is no divergence
    places, share = plane([first, second, shifted])
    want = np.sqrt(((q_MN[0] - q_MN[1]) ** 2).mean())
    assert np.linalg.norm(places[0] - places[1]) == pytest.approx(want, rel=0.02)
    assert share[0] > 0.99


def test_divergence_of_near_models_is_that_of_their_tokens():
    """Texts drawn from one of two near bigram models: half the variance is the KL of the texts."""
    rng = np.random.default_rng(1)
    p_B = rng.dirichlet(np.full(12, 3.0))
    q_B = p_B * np.exp(0.15 * rng.standard_normal(12))
    q_B /= q_B.sum()
    counts_NB = rng.multinomial(50, p_B, 20_000)
    label_N = np.arange(20_000) % 4
    first, second = (vector(counts_NB @ np.log(x), label_N) for x in (p_B, q_B))
    want = 50 * (p_B * np.log(p_B / q_B)).sum() / (100 * math.log(2))
    assert kl_bits_per_byte(first, second) == pytest.approx(want, rel=0.1)


def test_vectors_of_checkpoints_equal_a_plain_reference_in_float64(tiny_corpus, trained):  # noqa: F811
    store, specs, _, files = trained
    states = [Parent(spec, spec.steps) for spec in specs]
    found = state_likelihoods([*states, specs[0]], tiny_corpus, store, EVALUATION)
    on_disk = likelihoods([open_model(f) for f in files], tiny_corpus, 24, EVALUATION)
    for state, vector_, same in zip(states, found, on_disk, strict=False):
        np.testing.assert_allclose(vector_.nats_N, same.nats_N, rtol=1e-6)
        tensors = {n: t.double().numpy() for n, t in state_tensors(state, store).items()}
        for domain, name in enumerate(tiny_corpus.domains):
            shard = tiny_corpus.heldout(name)
            half = (len(shard) - 1) // 24 // 2
            rows = np.unique(np.linspace(0, half - 1, 6).astype(int))
            texts = [np.asarray(shard[r * 24 : r * 24 + 25], int) for r in rows]
            want = [-sum(reference_losses(tensors, state.spec.model, text)) for text in texts]
            np.testing.assert_allclose(vector_.nats_N[vector_.target_N == domain], want, rtol=1e-5)
    untrained = found[2]
    assert untrained.nats_N.mean() == pytest.approx(
        -24 * math.log(tiny_corpus.vocab_size), rel=0.05
    )
    assert kl_bits_per_byte(found[0], on_disk[0]) < 1e-9 < kl_bits_per_byte(found[0], found[1])


def test_losses_of_vectors_are_those_of_records(tiny_corpus, trained):  # noqa: F811
    store, specs, records, _ = trained
    evaluation = dataclasses.replace(specs[0].evaluation, points=1)
    found = state_likelihoods([Parent(specs[1], specs[1].steps)], tiny_corpus, store, evaluation)[0]
    want = [records[1].losses[d].bpb for d in tiny_corpus.domains]
    np.testing.assert_allclose(found.bits_per_byte, want, rtol=1e-5)


def test_another_tokenizer_reads_the_same_bytes(tiny_corpus, trained, tmp_path):  # noqa: F811
    folder = save_model(tmp_path / "m", own_tokenizer_json())
    evaluation = dataclasses.replace(EVALUATION, part="all")  # what the reference reads
    models = [open_model(str(folder)), open_model(trained[3][0])]
    theirs, ours = likelihoods(models, tiny_corpus, 24, evaluation)
    for domain, bits in zip(tiny_corpus.domains, theirs.bits_per_byte, strict=True):
        want = plain_bits(folder, tiny_corpus, domain, 24, evaluation)
        assert bits == pytest.approx(want, rel=1e-5)
    assert kl_bits_per_byte(theirs, ours) > 0 and len(theirs.nats_N) == len(ours.nats_N)
    again = likelihoods([models[0]], tiny_corpus, 24, evaluation)[0]
    np.testing.assert_array_equal(again.nats_N, theirs.nats_N)
    found = identity_kernel(ours, theirs)
    assert sum(found.mixture.values()) == pytest.approx(1)


def test_gradient_kernel_is_the_change_of_a_small_step(tiny_corpus, trained):  # noqa: F811
    """Against gradients of single texts in float64."""
    store, specs, _, _ = trained
    state, shape = Parent(specs[0], specs[0].steps), specs[0].model
    tensors = state_tensors(state, store)
    evaluation = Evaluation(points=1, sequences=2, part="first")
    found_NK = gradient_kernel(tensors, shape, tiny_corpus, evaluation, sequences=4)
    rotary = Rotary(shape, torch.device("cpu"))

    def gradient(tokens_BT, total):
        leaves = {n: t[None].clone().requires_grad_() for n, t in tensors.items()}
        loss = token_losses(leaves, shape, rotary, torch.from_numpy(tokens_BT)[None])
        found = torch.autograd.grad(loss.sum() if total else loss.mean(), list(leaves.values()))
        return torch.cat([g.double().flatten() for g in found]).numpy()

    def rows(shard, count, available):
        starts = 24 * np.unique(np.linspace(0, available - 1, count).astype(int))
        return np.stack([np.asarray(shard[s : s + 25], np.int64) for s in starts])

    texts, columns = [], []
    for domain in tiny_corpus.domains:
        held, train = tiny_corpus.heldout(domain), tiny_corpus.train(domain)
        texts += list(rows(held, 2, (len(held) - 1) // 24 // 2))
        columns.append(gradient(rows(train, 4, (len(train) - 1) // 24), total=False))
    want_NK = np.stack([gradient(t[None], total=True) for t in texts]) @ np.array(columns).T
    np.testing.assert_allclose(found_NK, want_NK, rtol=2e-3, atol=1e-3 * np.abs(want_NK).max())


# The command --------------------------------------------------------------------------------------


def test_command_says_which_mixture(cli, tiny_corpus, trained, tmp_path):  # noqa: F811
    files = trained[3]
    target = save_model(tmp_path / "target", own_tokenizer_json())
    on = ("--corpus", tiny_corpus.url, "--sequences", 8)
    for arguments in (
        (),
        ("--estimator", "gradient", "--ridge", 0.1),
        ("--estimator", "projection"),
    ):
        code, out, err = cli("lld", files[0], files[1], *on, *arguments, "--json")
        assert code == 0, err
        found = json.loads(out)
        assert sum(found["weights"].values()) == pytest.approx(1) and found["aligned"]
        assert found["kl_bits_per_byte"] > 0 and found["context"] == 24
    code, out, err = cli("lld", files[0], target, "--corpus", tiny_corpus.url)
    assert code == 0 and "divergence" in out and "law" in out, err


def test_command_inverts_a_sweep(cli, tiny_corpus, trained, tmp_path):  # noqa: F811
    import rayx

    _, specs, records, files = trained
    sweep = rayx.open(tmp_path / "sweep", create=True)
    rng = np.random.default_rng(0)
    for weights in rng.dirichlet(np.ones(3), 8):
        mixture = Mixture.from_array(weights, tuple(tiny_corpus.domains))
        schedule = dataclasses.replace(specs[0].schedule)
        spec = dataclasses.replace(
            specs[0], schedule=type(schedule).constant(mixture, schedule.tokens)
        )
        point = records[0].curve[-1]
        losses = {
            # no model like the target is among them: they are far worse at news
            d: dataclasses.replace(point.losses[d], bpb=2 + 9 * (d == "news") + (w + 0.05) ** -0.3)
            for d, w in zip(tiny_corpus.domains, weights, strict=True)
        }
        curve = (dataclasses.replace(point, losses=losses),)
        sweep.put(dataclasses.replace(records[0], spec=spec, curve=curve))
    assert len(sweep_records(sweep.records())) == 8
    arguments = ("lld", files[0], files[1], "--corpus", tiny_corpus.url)
    code, out, err = cli(*arguments, "--sweep", sweep.root, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["estimator"], found["runs"], found["cosine"]) == ("sweep", 8, None)
    assert found["sequences"] == specs[0].evaluation.sequences and found["part"] == "all"
    assert found["weights"]["news"] > 0.5
    code, out, err = cli(*arguments, "--sweep", sweep.root)
    assert code == 0 and "was not trained as the sweep's runs were" in err
    for wrong, words in (
        (("--sweep", sweep.root, "--estimator", "identity"), "give --sweep with sweep alone"),
        (("--estimator", "sweep"), "give --sweep with sweep alone"),
        (("--estimator", "gradiant"), "Did you mean 'gradient'"),
        (("--context", 25), "its context is 24 tokens; 25 were asked"),
        (("--ridge", 0.1), "the estimator is identity"),
        (("--prior", "code=1,poems=2"), "'poems', which is not in"),
    ):
        code, _, err = cli(*arguments, *wrong)
        assert code == 2 and words in err, err
    code, _, err = cli("lld", files[0], files[0], "--corpus", tiny_corpus.url)
    assert code == 2 and "no direction leads from one to the other" in err
    folder = save_model(tmp_path / "m", own_tokenizer_json())
    code, _, err = cli("lld", folder, files[0], "--corpus", tiny_corpus.url, "--estimator",
                       "gradient")  # fmt: skip
    assert code == 2 and "no checkpoint of rayx" in err


# Refusals -----------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named(tiny_corpus, trained, tmp_path):  # noqa: F811
    store, specs, _, files = trained
    folder = save_model(tmp_path / "m", own_tokenizer_json())
    model = open_model(files[0])
    with pytest.raises(SpecError, match="its context is 24 tokens; 25 were asked"):
        likelihoods([model], tiny_corpus, 25)
    with pytest.raises(SpecError, match="and it has 96 positions"):
        likelihoods([open_model(str(folder))], tiny_corpus, 300)
    with pytest.raises(StoreError, match="was not trained"):
        state_likelihoods([Parent(specs[0], 1)], tiny_corpus, store)
    other = dataclasses.replace(specs[0], corpus="c0ffee")
    with pytest.raises(SpecError, match="of corpus c0ffee; expected"):
        state_likelihoods([other], tiny_corpus, store)
    tensors = state_tensors(specs[0], store)
    broken = {n: t * math.nan for n, t in tensors.items()}
    with pytest.raises(SpecError, match="gradient on domain 'code' has norm nan"):
        gradient_kernel(broken, specs[0].model, tiny_corpus)
    with pytest.raises(
        ModelError, match=r"model: the log-likelihood of a text of 'law' is not fin"
    ):
        vector([-1.0, -2.0, -3.0, math.nan, -2.0, -1.0, -1.0, -1.0])
    with pytest.raises(SpecError, match="of at least two texts"):
        vector([-1.0])


def test_what_leads_nowhere_is_named():
    rng = np.random.default_rng(0)
    base, target = (vector(rng.normal(-50, 5, 40), model=m) for m in ("base", "target"))
    kernel_NK = rng.normal(size=(40, 4))
    with pytest.raises(SpecError, match="target and base differ by the same on all 40 texts"):
        difference(base, vector(base.nats_N, model="target"))
    with pytest.raises(SpecError, match="vectors compare on the same texts only"):
        difference(base, vector(target.nats_N, probe="others"))
    with pytest.raises(SpecError, match="vectors compare on the same texts only"):
        mean_gap_bits_per_byte(base, vector(target.nats_N, probe="others"))
    refused: list[tuple[tuple[Any, ...], str]] = [
        ((kernel_NK[:, :3],), r"Shape of the kernel is \(40, 3\)"),
        ((kernel_NK * math.nan,), "The kernel is 'not finite'"),
        ((kernel_NK, None, -1.0), "ridge is -1.0"),
        ((kernel_NK, None, 0.0, "token"), "level is 'token'; expected one of text, domain"),
        ((kernel_NK, {"poems": 1}), "'poems', which is not in"),
    ]
    for wrong, words in refused:
        with pytest.raises(SpecError, match=words):
            aligned(base, target, *wrong)
    with pytest.raises(SpecError, match="temperature is 0"):
        identity_kernel(base, target, temperature=0)
    flat = vector(np.tile([-50.0, -51.0], 20))
    base = vector(np.full(40, -60.0))
    with pytest.raises(SpecError, match="one that is not the same for all domains"):
        identity_kernel(base, flat)
    with pytest.raises(SpecError, match="The rank of the runs' mixtures is 1; expected the number"):
        response_kernel(base, [target] * 4, np.full((4, 4), 0.25))
    with pytest.raises(SpecError, match="Shape of the mixtures"):
        response_kernel(base, [target], np.full((4, 4), 0.25))
    one = dataclasses.replace(base, targets=("code",), target_N=np.zeros(40, int))
    with pytest.raises(SpecError, match="There is one domain"):
        identity_kernel(one, dataclasses.replace(one, nats_N=target.nats_N))


def test_sweeps_that_cannot_be_inverted_are_named():
    weights_RK = np.random.default_rng(0).dirichlet(np.ones(4), 12)
    losses_RT = 2 + (weights_RK + 0.1) ** -0.2
    inversion = SweepInversion(weights_RK=weights_RK, losses_RT=losses_RT, domains=DOMAINS)
    for wrong, words in (
        ((weights_RK[:7], losses_RT[:7]), "number of runs of the sweep is 7; expected at least 8"),
        ((weights_RK[:, :3], losses_RT), r"Shape of the mixtures is \(12, 3\)"),
        ((weights_RK, losses_RT[:, :1]), "number of targets of a profile is 1"),
    ):
        with pytest.raises(SpecError, match=words):
            SweepInversion(weights_RK=wrong[0], losses_RT=wrong[1], domains=DOMAINS)
    with pytest.raises(SpecError, match="folds"):
        SweepInversion(weights_RK=weights_RK, losses_RT=losses_RT, domains=DOMAINS,
                       regressor=TiltedPower(folds=0))  # fmt: skip
    with pytest.raises(SpecError, match=r"Shape of the target's losses is \(3,\)"):
        inversion.estimate(losses_RT[0, :3])
    with pytest.raises(SpecError, match="The target's losses is"):
        inversion.estimate(losses_RT[0] * math.nan)
    with pytest.raises(SpecError, match="no finished run on a fixed mixture"):
        sweep_records([])
    with pytest.raises(SpecError, match="number of seeds of a mixture is 1"):
        between_seeds(losses_RT[:, None])


def test_noise_between_seeds_is_pooled_over_mixtures():
    rng = np.random.default_rng(0)
    root_TT = np.array([[1.0, 0.0], [0.8, 0.3]])
    losses = rng.normal(size=(400, 1, 2)) * 9 + rng.standard_normal((400, 3, 2)) @ root_TT.T
    np.testing.assert_allclose(between_seeds(losses), root_TT @ root_TT.T, atol=0.1)

"""DGA on planted losses and on real text, importance sampling on real text, and their study."""

from __future__ import annotations

import dataclasses
import logging
from functools import cache

import numpy as np
import pytest

import rayx
from rayx import Evaluation, Mixture, ModelShape, Optimizer, Probe, Schedule, TrainSpec
from rayx.errors import RayxError, SpecError
from rayx.merging import MergeSpec, Spec
from rayx.methods.dga import DgaStudy, recovery, summary
from rayx.methods.importance import importance_mixture
from rayx.policies.dga import DGA
from rayx.policy import Block, Decision, Gradients, Setting, policy_from_json, policy_to_json
from rayx.record import CurvePoint, Loss, Record
from rayx.store import Store
from tests import samples

SPECIFIC = (Probe(target="law", part="train", sequences=32),)


def setting(num: int) -> Setting:
    domains = tuple(f"d{k:04}" for k in range(num))
    return Setting(domains=domains, prior_K=np.full(num, 1 / num), steps=10**6, batch_sequences=8)


class Quadratics:
    """Domain k has the loss |theta - c_k|^2 / 2; the specific set is a mixture of the domains."""

    def __init__(self, num: int, planted_K: np.ndarray, width: int = 12, noise: float = 0.0):
        self.rng = np.random.default_rng(0)
        self.centres_KD = self.rng.standard_normal((num, width))
        self.planted_K, self.noise = planted_K, noise
        self.theta_D = np.zeros(width)
        self.domains = setting(num).domains
        self.to_array = cache(lambda mixture: mixture.to_array(self.domains))

    def train(self, block: Block) -> None:
        to_D = block.weights_K @ self.centres_KD
        self.theta_D = to_D + (self.theta_D - to_D) * 0.97**block.steps

    def measure(self, signal: Gradients) -> np.ndarray:
        """Inner products of the sources' gradients and the specific set's, from noisy batches."""
        mixtures = [self.to_array(mixture) for mixture in signal.sources]
        mixtures += [self.planted_K] * len(signal.probes)
        gradient_ND = self.theta_D - np.stack(mixtures) @ self.centres_KD
        gradient_ND += self.noise * self.rng.standard_normal(gradient_ND.shape)
        return gradient_ND @ gradient_ND.T

    def run(self, policy: DGA, blocks: int) -> np.ndarray:
        """Return the weights of each block, shape (blocks, K)."""
        asked = policy.blocks(setting(len(self.domains)))
        block, weights = next(asked), []
        for _ in range(blocks):
            assert isinstance(block.signal, Gradients)
            weights.append(block.weights_K)
            self.train(block)
            block = asked.send(self.measure(block.signal))
        return np.array(weights)


def distance(weights_K: np.ndarray, planted_K: np.ndarray) -> float:
    return float(np.abs(weights_K - planted_K).sum())


@pytest.mark.parametrize("changes", [
    {"eta": 0.03}, {"eta": 0.03, "cosine": False}, {"eta": 0.3, "ema": 0.1},
    {"eta": 0.3, "ema": 0.1, "cosine": False},
])  # fmt: skip
def test_weights_approach_the_mixture_that_the_specific_set_is(changes):
    planted_K = np.array([0.5, 0.3, 0.15, 0.05, 0.0])
    world = Quadratics(5, planted_K, noise=0.3)
    weights_BK = world.run(DGA(specific=SPECIFIC, every_steps=20, **changes), 1000)
    before = distance(weights_BK[0], planted_K)
    assert distance(weights_BK[-300:].mean(axis=0), planted_K) < before / 5
    assert np.allclose(weights_BK.sum(axis=1), 1) and weights_BK.min() >= 1e-4 - 1e-12


@pytest.mark.parametrize("cosine", [True, False])
def test_a_domain_identical_to_the_specific_set_gains(cosine):
    planted_K = np.eye(4)[2]
    world = Quadratics(4, planted_K)
    weights_BK = world.run(DGA(specific=SPECIFIC, eta=0.3, every_steps=5, cosine=cosine), 40)
    assert (np.diff(weights_BK[:10, 2]) > 0).all() and weights_BK[-1, 2] > 0.8


def answered(policy: DGA, products: np.ndarray, times: int = 1) -> np.ndarray:
    """The weights after the same measurement so many times."""
    sources = len(products) - len(policy.specific)
    asked = policy.blocks(setting(sources))
    block = next(asked)
    for _ in range(times):
        block = asked.send(products)
    return block.weights_K


def products(scale: float = 1.0) -> np.ndarray:
    vectors_ND = np.random.default_rng(1).standard_normal((4, 6)) * scale
    return vectors_ND @ vectors_ND.T


def test_the_step_is_the_formula_with_and_without_a_moving_average():
    g = products()
    cosine_K = g[:3, 3] / np.sqrt(np.diag(g)[:3] * g[3, 3])
    raw_K = g[:3, 3] / g[:3, 3].std()  # of one measurement the spread is its own
    for cosine, score_K in ((True, cosine_K), (False, raw_K)):
        new_K = np.exp(0.7 * score_K) / np.exp(0.7 * score_K).sum()
        policy = DGA(specific=SPECIFIC, eta=0.7, cosine=cosine)
        assert answered(policy, g) == pytest.approx(new_K)
        policy = DGA(specific=SPECIFIC, eta=0.7, cosine=cosine, ema=0.1)
        once_K = 0.9 / 3 + 0.1 * new_K
        assert answered(policy, g) == pytest.approx(once_K)
        again_K = once_K * np.exp(0.7 * score_K)
        again_K = 0.9 * once_K + 0.1 * again_K / again_K.sum()
        assert answered(policy, g, times=2) == pytest.approx(again_K)
        # eta means the same at every scale of the gradients.
        assert answered(policy, products(1e4), times=2) == pytest.approx(again_K)


def test_no_weight_falls_below_the_floor_and_it_can_come_back():
    g = products()
    worst = int(np.argmin(g[:3, 3] / np.sqrt(np.diag(g)[:3])))
    asked = DGA(specific=SPECIFIC, eta=50.0, floor=0.01).blocks(setting(3))
    weights_K = next(asked).weights_K
    for _ in range(5):
        weights_K = asked.send(g).weights_K
    assert weights_K[worst] == pytest.approx(0.01) and weights_K.min() >= 0.01 - 1e-12
    turned = g.copy()
    turned[:3, 3] *= -1
    assert asked.send(turned).weights_K[worst] > 0.9


def test_the_specific_gradient_is_the_mean_of_several_probes():
    all_ND = np.random.default_rng(2).standard_normal((5, 6))
    folded_ND = np.vstack([all_ND[:3], all_ND[3:].mean(axis=0)])
    one, two = DGA(specific=SPECIFIC), DGA(specific=(*SPECIFIC, Probe(target="code")))
    assert answered(two, all_ND @ all_ND.T) == pytest.approx(answered(one, folded_ND @ folded_ND.T))


def test_a_measurement_that_tells_nothing_leaves_the_weights(caplog):
    with caplog.at_level(logging.WARNING):
        for g in (np.full((4, 4), np.nan), np.ones((4, 4))):
            assert answered(DGA(specific=SPECIFIC), g) == pytest.approx(np.full(3, 1 / 3))
    assert "not finite" in caplog.text and "equal for all" in caplog.text


def test_a_basis_of_single_domains_is_dga_over_the_domains():
    planted_K = np.array([0.6, 0.3, 0.1, 0.0])
    plain = DGA(specific=SPECIFIC, eta=0.5, every_steps=10)
    basis = dataclasses.replace(plain, basis=setting(4).each)
    one, other = (Quadratics(4, planted_K, noise=0.2).run(p, 50) for p in (plain, basis))
    assert np.array_equal(one, other)
    assert policy_from_json(policy_to_json(basis)) == basis


def test_eight_basis_distributions_stand_for_a_thousand_domains():
    domains, rng = setting(1000).domains, np.random.default_rng(3)
    basis_NK = rng.dirichlet(np.full(1000, 0.02), size=8)
    basis = tuple(Mixture.from_array(h_K, domains) for h_K in basis_NK)
    basis_NK = np.stack([mixture.to_array(domains) for mixture in basis])
    planted_N = np.array([0.5, 0.25, 0.15, 0.1, 0, 0, 0, 0])
    world = Quadratics(1000, planted_N @ basis_NK, width=64, noise=0.02)
    policy = DGA(specific=SPECIFIC, eta=0.03, every_steps=20, basis=basis)
    signal = next(policy.blocks(setting(1000))).signal
    assert isinstance(signal, Gradients)
    assert len(signal.sources) == 8  # the cost is the basis', not the domains'
    weights_BK = world.run(policy, 600)
    before = distance(weights_BK[0], world.planted_K)
    assert distance(weights_BK[-200:].mean(axis=0), world.planted_K) < before / 5


@pytest.mark.parametrize("changes, said", [
    ({"specific": ()}, "DGA.specific"), ({"specific": SPECIFIC[0]}, "DGA.specific"),
    ({"eta": -1.0}, "DGA.eta"), ({"ema": 1.5}, "DGA.ema"), ({"floor": -0.1}, "DGA.floor"),
    ({"every_steps": 0}, "DGA.every_steps"), ({"cosine": 1}, "DGA.cosine"),
    ({"basis": (Mixture({"a": 1}),)}, "DGA.basis"), ({"sequences": 0}, "sequences"),
    ({"over": "some"}, "over"),
])  # fmt: skip
def test_bad_fields_are_named(changes, said):
    with pytest.raises(SpecError, match=said):
        DGA(**({"specific": SPECIFIC} | changes))


def test_a_floor_or_a_basis_that_does_not_fit_the_run_is_named():
    with pytest.raises(SpecError, match="DGA.floor is 0.25; expected below 1/4"):
        next(DGA(specific=SPECIFIC, floor=0.25).blocks(setting(4)))
    basis = (Mixture({"d0000": 1}), Mixture({"d0009": 1}))
    with pytest.raises(SpecError, match="'d0009'"):
        next(DGA(specific=SPECIFIC, basis=basis).blocks(setting(4)))


def train_spec(corpus, policy: DGA, domains=("code", "law", "news")) -> TrainSpec:
    return TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(layers=1, width=32, heads=2, ffn_width=64, context=32,
                         vocab_size=corpus.vocab_size),
        schedule=Schedule.constant(Mixture.uniform(domains), 120 * 8 * 32),
        optimizer=Optimizer(lr=8e-3, batch_sequences=8),
        evaluation=Evaluation(points=1, sequences=8, part="second"),
        policy=policy,
    )  # fmt: skip


@pytest.mark.parametrize("part", ["train", "first"])
def test_on_real_text_the_domain_of_the_specific_set_gains(tiny_corpus, part):
    from rayx.proxy import train_pack

    probe = Probe(target="law", part=part, sequences=16)
    policy = DGA(specific=(probe,), eta=0.7, every_steps=20)
    (record,) = train_pack([train_spec(tiny_corpus, policy)], tiny_corpus)
    law = [decision.weights["law"] for decision in record.decisions]
    assert len(law) == 6 and law[0] == pytest.approx(1 / 3, abs=1e-6)
    assert (np.diff(law) > 0).all() and law[-1] > 0.6


def test_what_is_missing_is_named_before_training(tiny_corpus):
    from rayx.steering import check_policy

    for policy, said in (
        (DGA(specific=(Probe(target="lore"),)), "lore"),
        (DGA(specific=(Probe(target="law", part="second"),)), "judged on part 'second'"),
        (DGA(specific=SPECIFIC, floor=0.4), "DGA.floor"),
    ):
        with pytest.raises(RayxError, match=said):
            check_policy(train_spec(tiny_corpus, policy), tiny_corpus)
    with pytest.raises(SpecError, match="two domains or more"):
        train_spec(tiny_corpus, DGA(specific=SPECIFIC), domains=("law",))


@pytest.mark.parametrize("clusters", [0, 12])
def test_importance_sampling_finds_the_domain_that_the_text_is_of(tiny_corpus, clusters):
    for target in tiny_corpus.domains:
        probe = Probe(target=target, part="all")
        mixture, again = (
            importance_mixture(tiny_corpus, probe, tiny_corpus.domains, clusters=clusters)
            for _ in range(2)
        )
        assert mixture[target] > 0.9 and mixture == again


def test_importance_sampling_refuses_what_it_cannot_do(tiny_corpus):
    domains = tiny_corpus.domains
    for bad, said in (
        ((Probe(target="lore"), domains), "lore"),
        ((SPECIFIC[0], ("law",)), "domains"),
        ((SPECIFIC[0], ("law", "lore")), "lore"),
    ):
        with pytest.raises(RayxError, match=said):
            importance_mixture(tiny_corpus, *bad)
    with pytest.raises(RayxError, match="fewer than one sequence of context 1000000"):
        importance_mixture(tiny_corpus, SPECIFIC[0], domains, context=10**6)
    with pytest.raises(SpecError, match="clusters"):
        importance_mixture(tiny_corpus, SPECIFIC[0], domains, clusters=1)


POLICY = DGA(specific=(Probe(target="web", part="train"),))


def study(**changes) -> DgaStudy:
    spec = samples.train_spec(evaluation=Evaluation(points=2, sequences=8, part="second"))
    near = Schedule.constant(Mixture({"web": 9, "code": 1}), 4_096)
    usual = {
        "template": spec, "supply": {"web": 3, "code": 1}, "target": "web", "seeds": (1, 2),
        "schedules": {"near": near}, "policies": {"DGA": POLICY}, "search": 3,
    }  # fmt: skip
    return DgaStudy(**(usual | changes))


def planted_record(spec: Spec) -> Record:
    """Losses fall with the share of web; DGA ends with .8 of it and took a tenth for measuring."""
    policy = getattr(spec, "policy", None)
    share = 0.8 if policy else spec.mixture.get("web", 0.0)
    bpb = 3.0 - share + 0.01 * getattr(spec, "seed", 0)
    curve = tuple(
        CurvePoint(step, 512 * step, {"web": Loss(2 * bpb, bpb + more, 0.01)})
        for step, more in ((16, 0.5), (32, 0.0))
    )
    found = dataclasses.replace(samples.record(spec), curve=curve)
    if policy is None:
        return found
    weights = [(step, {"web": w, "code": 1 - w}) for step, w in
               ((0, 0.5), (10, 0.7), (20, 0.8), (30, 0.8))]  # fmt: skip
    decisions = tuple(Decision(step=step, weights=of_step) for step, of_step in weights)
    tenth = {"signal_flops": 0.1 * found.flops, "signal_seconds": 0.1 * found.seconds}
    return dataclasses.replace(found, flops=1.1 * found.flops, decisions=decisions, **tenth)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    store = rayx.open(tmp_path_factory.mktemp("dga") / "store", create=True)
    for spec in study().specs():
        store.put(planted_record(spec))
    return store


def test_a_study_pairs_its_arms_by_seed_and_counts_what_they_cost(store):
    arms = study().arms(1)
    assert {name: len(runs) for name, runs in arms.items()} == {
        "uniform": 1, "proportional": 1, "near": 1, "DGA": 1, "random search": 3,
    }  # fmt: skip
    runs = [run for of_arm in arms.values() for run in of_arm]
    assert {(r.seed, r.data_seed, r.evaluation.part) for r in runs} == {(1, 1, "second")}
    assert arms["near"][0].tokens == 4_096 and arms["DGA"][0].policy == POLICY
    assert arms["DGA"][0].mixture == arms["uniform"][0].mixture == Mixture.uniform(("web", "code"))
    # The search is judged on the half that is not reported.
    merges = [spec for spec in study().specs() if isinstance(spec, MergeSpec)]
    assert {merge.evaluation.part for merge in merges} == {"first"} and len(merges) == 6
    best = study().chosen(store, 1)["random search"].mixture["web"]
    assert best == max(run.mixture.get("web", 0) for run in arms["random search"])


def test_a_summary_says_gains_over_uniform_and_overhead(store):
    table = study().table(store)
    assert len(table) == 2 * 2 * 5
    found = summary(table).set_index("arm")
    assert found["loss"].is_monotonic_increasing
    assert found.loc["DGA", "gain"] == pytest.approx(0.3)
    assert found.loc["DGA", "beats_uniform"] == 2 and found.loc["uniform", "gain"] == 0
    assert found.loc["near", "loss"] == pytest.approx(3.0 - 0.9 + 0.015)
    costs = found[["signal_flops", "signal_seconds", "runs"]]
    assert costs.loc["DGA"].tolist() == pytest.approx([0.1, 0.1 / 0.9, 1])
    assert costs.loc["random search"].tolist() == [0, 0, 3]


def test_recovery_measures_the_mean_of_the_later_weights(store):
    weights = study().trajectories(store)
    assert set(weights["arm"]) == {"DGA"} and len(weights) == 2 * 4 * 2
    of_run = weights.loc[weights["seed"] == 1]
    planted = Mixture({"web": 0.8, "code": 0.2})
    found = recovery(of_run, planted)
    assert found["kl"] == pytest.approx(0, abs=1e-12) and found["l1"] == pytest.approx(0)
    assert found["uniform_l1"] == pytest.approx(0.6)
    assert found["uniform_kl"] == pytest.approx(0.8 * np.log(1.6) + 0.2 * np.log(0.4))


def test_a_study_that_cannot_be_is_named(store):
    with pytest.raises(SpecError, match="two generic domains"):
        study(supply={"web": 1})
    with pytest.raises(SpecError, match="'second'"):
        study(template=samples.train_spec())
    other = rayx.open(store.url + "-other", create=True)
    for spec in study().specs():
        other.put(samples.record(spec, failed=spec == study().arms(1)["uniform"][0]))
    with pytest.raises(SpecError, match="The run of uniform is 'failed'"):
        study().table(other)

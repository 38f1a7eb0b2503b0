"""The mixing agent: transitions by hand, a planted world, a conservative term that is one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rayx
from rayx.errors import SpecError, StoreError
from rayx.experiment import load_experiment
from rayx.methods.mixing_agent import MixingAgent, read_transitions
from rayx.mixture import Mixture, Phase, Schedule
from rayx.policies.agent import Agent, network_size, q_values, state_features
from rayx.policy import Decision, Losses, Setting
from rayx.proxy import set_threads
from rayx.proxy.agent import Transitions, train_agent
from rayx.record import CurvePoint, Loss
from rayx.spec import Evaluation, Parent, TrainSpec
from tests.samples import record, train_spec

experiment = load_experiment(Path(__file__).parents[1] / "experiments" / "mixing_agent.py")

DOMAINS = ("code", "math", "web")
EQUAL: dict[str, float] = dict.fromkeys(DOMAINS, 1.0)
BATCH = 4 * 128
GAIN_KK = np.array([[0.9, 0.1, 0.0], [0.3, 0.3, 0.0], [0.6, 0.0, 0.1]])  # of a whole run
BYTES = 0.5  # bits per byte of a nat


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices; threads that wait for each other take longer."""
    set_threads(1)


def steered(steps: int = 240, **changes) -> TrainSpec:
    schedule = Schedule.constant(Mixture(EQUAL), steps * BATCH)
    evaluation = Evaluation(points=1, sequences=8, part="second")
    return train_spec(schedule=schedule, evaluation=evaluation, **changes)


def study(**changes) -> MixingAgent:
    usual = {"template": steered(), "objective": EQUAL, "trajectories": 20, "phases": 8, "seed": 3}
    return MixingAgent(**(usual | changes))


def moved(losses_K: np.ndarray, weights_K: np.ndarray, share: float) -> np.ndarray:
    """The planted world: each domain's text lowers losses by its own column, linearly."""
    return losses_K - share * GAIN_KK @ weights_K


def planted(spec: TrainSpec, noise: float = 0.0):
    """The record of a run in the planted world."""
    rng = np.random.default_rng(int(spec.run_id, 16))
    losses_K, done, curve = np.full(3, math.log(spec.model.vocab_size)), 0, []
    for phase in spec.schedule.phases:
        share = phase.tokens / spec.schedule.tokens
        losses_K = moved(losses_K, phase.mixture.to_array(DOMAINS), share)
        done += phase.tokens
        seen_K = losses_K + noise * rng.standard_normal(3)
        losses = {
            d: Loss(x, BYTES * x, 0.01) for d, x in zip(DOMAINS, seen_K.tolist(), strict=True)
        }
        curve.append(CurvePoint(done // BATCH, done, losses))
    return dataclasses.replace(record(spec), curve=tuple(curve))


def swept(path, method: MixingAgent, noise: float = 0.0):
    store = rayx.open(path, create=True)
    for spec in method.specs():
        store.put(planted(spec, noise))
    return store


def played(policy, prior_K=(1 / 3, 1 / 3, 1 / 3), domains=DOMAINS, steps: int = 240):
    """Run a policy in the planted world; return its mean weights and its final mean loss."""
    order = [domains.index(d) for d in DOMAINS]
    setting = Setting(domains, np.array(prior_K), steps, 4)
    losses_K, read_K, left = np.full(3, math.log(1024)), np.zeros(3), steps
    blocks, value = policy.blocks(setting), None
    while left:
        try:
            block = blocks.send(value)
        except StopIteration:
            break
        taken = min(left, block.steps)
        weights_K = np.asarray(block.weights_K)[order]
        losses_K = moved(losses_K, weights_K, taken / steps)
        read_K, left = read_K + taken * weights_K, left - taken
        value = None
        if block.signal is not None:
            assert isinstance(block.signal, Losses)
            assert {probe.part for probe in block.signal.probes} == {"first"}
            places = [DOMAINS.index(probe.target) for probe in block.signal.probes]
            value = losses_K[places]
    assert not left
    return read_K / steps, losses_K.mean()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An agent of noisy trajectories in the planted world."""
    method = study(settings={"steps": 300, "actions": 12})
    return method.train(swept(tmp_path_factory.mktemp("agent") / "store", method, noise=0.002))


def test_trajectories_are_phases_around_centres_of_their_own():
    specs = study().specs()
    assert len({spec.run_id for spec in specs}) == 20 and specs == study().specs()
    average_TK = np.array([spec.mixture.to_array(DOMAINS) for spec in specs])
    assert average_TK.std(axis=0).min() > 0.1  # they differ from each other as wholes
    for spec in specs:
        assert spec.evaluation == Evaluation(points=8, sequences=8, part="first")
        assert [phase.tokens for phase in spec.schedule.phases] == [30 * BATCH] * 8
        assert len({phase.mixture for phase in spec.schedule.phases}) == 8


def test_transitions_of_two_runs_by_hand(tmp_path):
    mixtures = ({"code": 1}, {"math": 1}), ({"code": 1, "web": 1}, {"web": 1})
    specs = [
        train_spec(
            schedule=Schedule(tuple(Phase(Mixture(m), 10 * BATCH) for m in pair)),
            evaluation=Evaluation(points=2, sequences=8),
        )
        for pair in mixtures
    ]
    store = rayx.open(tmp_path / "store", create=True)
    for spec in specs:
        store.put(planted(spec))
    found = read_transitions(store, specs, DOMAINS, {"code": 3.0, "web": 1.0})
    start = math.log(1024)
    code_K = start - np.array([0.45, 0.15, 0.30])  # after half a run on code
    np.testing.assert_allclose(found.states_NF[0], [0, 0, 0, 0, 1, 1, 1])
    np.testing.assert_allclose(found.states_NF[1], [0.5, 1, 0, 0, *(code_K / start)])
    np.testing.assert_allclose(found.next_NF[0], found.states_NF[1])
    np.testing.assert_allclose(found.next_NF[1][:4], [1, 0.5, 0.5, 0])
    np.testing.assert_allclose(found.actions_NK[[1, 2]], [[0, 1, 0], [0.5, 0, 0.5]])
    assert found.last_N.tolist() == [False, True, False, True]
    # Falls of (3 code + web) / 4 in bits per byte, less the mean of the phase.
    fall_N = BYTES * np.array([0.4125, 0.0375, 0.4125 / 2 + 0.0125 / 2, 0.0125])
    expected_N = fall_N - np.tile((fall_N[:2] + fall_N[2:]) / 2, 2)
    np.testing.assert_allclose(found.rewards_N, expected_N, atol=1e-12)


def test_a_branch_begins_at_its_parents_losses(tmp_path):
    trunk = steered(steps=40)
    parts = Schedule((Phase(Mixture({"code": 1}), 4 * BATCH), Phase(Mixture(EQUAL), 4 * BATCH)))
    evaluation = Evaluation(points=2, sequences=8, part="second")
    branch = train_spec(schedule=parts, evaluation=evaluation, parent=Parent(trunk, 40))
    store = rayx.open(tmp_path / "store", create=True)
    store.put(planted(trunk))
    store.put(planted(branch))
    found = read_transitions(store, [branch], DOMAINS, EQUAL)
    before = store.get(trunk.run_id).losses
    after = store.get(branch.run_id).curve[0].losses
    ratio_K = [after[d].bpb / before[d].bpb for d in DOMAINS]
    np.testing.assert_allclose(found.states_NF[1, 4:], ratio_K)


def test_the_network_is_the_same_in_numpy_and_from_a_loop():
    rng = np.random.default_rng(0)
    units, network = 5, rng.standard_normal(network_size(3, 5))
    first, rest = network[: 10 * units].reshape(10, units), network[10 * units :]
    state_F = state_features(0.25, np.array([0.2, 0.3, 0.5]), np.ones(3), np.full(3, 2.0))
    assert state_F.tolist() == [0.25, 0.2, 0.3, 0.5, 0.5, 0.5, 0.5]
    actions_MK = rng.dirichlet(np.ones(3), size=4)
    for action_K, q in zip(actions_MK, q_values(network, state_F, actions_MK), strict=True):
        inputs = [*state_F, *np.sqrt(action_K)]
        hidden = [
            math.tanh(sum(x * first[i, h] for i, x in enumerate(inputs)) + rest[h])
            for h in range(units)
        ]
        assert q == pytest.approx(sum(h * rest[units + i] for i, h in enumerate(hidden)) + rest[-1])


def test_q_learning_of_one_phase_is_a_regression():
    """Without anything to follow and no conservative term, Q is the reward, in its own units."""
    rng = np.random.default_rng(1)
    actions_NK = rng.dirichlet(np.ones(3), size=120)
    states_NF = np.tile(state_features(0.0, np.zeros(3), np.ones(3), np.ones(3)), (120, 1))
    rewards_N = 0.02 * np.sin(4 * actions_NK[:, 0]) - 0.01
    transitions = Transitions(
        states_NF=states_NF,
        actions_NK=actions_NK,
        rewards_N=rewards_N,
        next_NF=states_NF,
        last_N=np.ones(120, dtype=bool),
    )
    settings = {"alpha": 0.0, "weight_decay": 0.0, "steps": 600, "lr": 2e-2, "actions": 1}
    found_N = q_values(np.array(train_agent(transitions, **settings)), states_NF[0], actions_NK)
    assert np.sqrt(np.mean((found_N - rewards_N) ** 2)) < 0.05 * rewards_N.std()


def test_agent_beats_uniform_and_prefers_the_best_domain_of_a_planted_world(trained):
    _, uniform = played(dataclasses.replace(trained, network=(0.0,) * len(trained.network), top=1))
    best = math.log(1024) - GAIN_KK.mean(axis=0).max()  # all on one domain
    for top, least in ((1, 0.6), (16, 0.5)):
        average_K, loss = played(dataclasses.replace(trained, top=top))
        assert average_K.argmax() == 0 and average_K[0] > 0.7
        assert (uniform - loss) / (uniform - best) > least


def test_conservative_term_keeps_the_agent_near_the_data():
    """Data around one mixture, rewards that rise away from it."""
    rng = np.random.default_rng(2)
    centre_K = np.array([0.15, 0.15, 0.7])
    actions_NK = rng.dirichlet(60 * centre_K, size=150)
    states_NF = np.tile(state_features(0.0, np.zeros(3), np.ones(3), np.ones(3)), (150, 1))
    transitions = Transitions(
        states_NF=states_NF,
        actions_NK=actions_NK,
        rewards_N=actions_NK[:, 0] + 0.02 * rng.standard_normal(150),
        next_NF=states_NF,
        last_N=np.ones(150, dtype=bool),
    )
    away = {}
    for alpha in (0.0, 1.0):
        network = train_agent(transitions, alpha=alpha, steps=200, actions=12)
        agent = Agent(domains=DOMAINS, network=network, decisions=1)
        average_K, _ = played(agent)
        away[alpha] = np.abs(average_K - centre_K).sum()
    assert away[0.0] > 1.0 and away[1.0] < 0.35


def test_agent_is_the_same_again_and_does_not_depend_on_the_order_of_domains(trained, tmp_path):
    method = study(settings={"steps": 40})
    store = swept(tmp_path / "store", method)
    assert method.train(store) == method.train(store)
    assert dataclasses.replace(method, seed=4).specs() != method.specs()
    average_K, loss = played(trained)
    again_K, again = played(trained, domains=("web", "code", "math"))
    np.testing.assert_allclose(again_K, average_K)
    assert again == pytest.approx(loss)
    other_K, _ = played(dataclasses.replace(trained, seed=9))
    assert not np.allclose(other_K, average_K)


def test_spec_with_an_agent_survives_json_and_its_network_decides_the_run_id(trained):
    spec = steered(policy=trained)
    assert TrainSpec.from_json(spec.to_json()) == spec
    assert TrainSpec.from_json(spec.to_json()).run_id == spec.run_id
    assert all(float(f"{x:.6g}") == x for x in trained.network)
    other = (trained.network[0] + 1e-3, *trained.network[1:])
    assert steered(policy=dataclasses.replace(trained, network=other)).run_id != spec.run_id


def test_weights_fill_the_run_and_what_is_left_over_is_the_last(trained):
    setting = Setting(DOMAINS, np.full(3, 1 / 3), 101, 4)
    blocks, value, taken = trained.blocks(setting), None, []
    for _ in range(1 + trained.decisions):
        block = blocks.send(value)
        assert block.weights_K.sum() == pytest.approx(1.0) and block.weights_K.min() >= 0
        taken.append((block.steps, block.signal is None))
        value = np.ones(3)
    assert taken[0] == (0, False) and sum(steps for steps, _ in taken) == 101
    assert [last for _, last in taken] == [False] * trained.decisions + [True]


def test_experiment_compares_agents_with_what_the_searches_found(tmp_path):
    corpus = SimpleNamespace(
        domains=DOMAINS,
        fingerprint="c0ffee",
        vocab_size=1024,
        proportional=lambda: {"code": 0.1, "math": 0.2, "web": 0.7},
    )
    p = experiment.Parameters(trajectories=3, phases=3, seeds=2)
    store = rayx.open(tmp_path / "store", create=True)
    trained = []

    def sweep(specs):
        trained.extend(specs)
        for spec in specs:
            for run in spec.path:
                store.put(planted(run) if run.policy is None else played_record(run))

    def played_record(spec):
        average_K, loss = played(spec.policy, steps=spec.steps)
        losses = {d: Loss(loss, BYTES * loss, 0.01) for d in DOMAINS}
        weights: dict[str, float] = {d: float(w) for d, w in zip(DOMAINS, average_K, strict=True)}
        decisions = [Decision(step=0, weights=weights) for _ in range(1 + p.phases)]
        return dataclasses.replace(
            record(spec),
            curve=(CurvePoint(spec.steps, spec.tokens, losses),),
            decisions=tuple(decisions),
            flops=1.25 * spec.flops,
            signal_flops=0.25 * spec.flops,
        )

    sweep(experiment.specs(p, corpus))
    assert {spec.evaluation.part for spec in trained} == {"first"}
    trained.clear()
    assert experiment.analyse(p, corpus, store, sweep) is None
    assert {spec.evaluation.part for spec in trained} == {"second"}
    assert {spec.seed for spec in trained} == {p.seed + 1, p.seed + 2}
    assert len(experiment.follow_up(p, corpus)) == len(trained) == 7 * 2
    report = json.loads(store.read_bytes("reports/mixing_agent.json"))
    arms = report["comparison"]["arms"]
    assert set(arms) == {
        "choice",
        "agent, not conservative",
        "uniform",
        "proportional",
        "the objective's weights",
        "random search",
        "best trajectory",
    }
    least = min(
        experiment.searched(p, corpus),
        key=lambda run: experiment.mean_loss(
            store.get(run.run_id).losses, experiment.objective(p, corpus)
        ),
    )
    assert report["search_mixture"] == arms["random search"]["mixture"] == dict(least.mixture)
    assert arms["the objective's weights"]["mixture"] == {"code": 0.5, "math": 0.25, "web": 0.25}
    assert len(report["decisions"]) == p.phases
    assert report["signal_share_of_flops"] == pytest.approx(0.25)


# Refusals ------------------------------------------------------------------------------------


def test_no_trajectories_is_said(tmp_path):
    method = study(trajectories=2)
    store = rayx.open(tmp_path / "store", create=True)
    with pytest.raises(StoreError, match="no trajectories: none of the 2 runs"):
        method.train(store)
    for spec in method.specs():
        store.put(record(spec, failed=True))
    with pytest.raises(StoreError, match="no trajectories"):
        method.train(store)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phases": 1}, "MixingAgent.phases is 1; expected an integer >= 2"),
        ({"trajectories": 0}, "MixingAgent.trajectories is 0"),
        ({"objective": {"law": 1.0}}, "MixingAgent.objective is .'law'.; expected among code"),
        ({"objective": {}}, "MixingAgent.objective"),
    ],
)
def test_studies_that_cannot_be_are_refused(changes, said):
    with pytest.raises(SpecError, match=said):
        study(**changes)


@pytest.mark.parametrize(
    ("schedule", "points", "domains", "said"),
    [
        ([(EQUAL, 8)], 1, DOMAINS, "number of phases of run .* is 1; expected 2 or more"),
        ([(EQUAL, 4), ({"law": 1}, 4)], 2, DOMAINS, r"domains of run .*'law'.*expected among"),
        ([(EQUAL, 4), ({"code": 1}, 4)], 1, DOMAINS, "Evaluation.points of run .* its 2 phases"),
        ([(EQUAL, 2), ({"code": 1}, 6)], 2, DOMAINS, "phases' tokens of run .*expected equal"),
    ],
)
def test_runs_that_are_no_trajectories_are_named(tmp_path, schedule, points, domains, said):
    phases = tuple(Phase(Mixture(mixture), steps * BATCH) for mixture, steps in schedule)
    spec = train_spec(schedule=Schedule(phases), evaluation=Evaluation(points=points, sequences=8))
    with pytest.raises(SpecError, match=said):
        read_transitions(rayx.open(tmp_path / "s", create=True), [spec], domains, EQUAL)


def test_agent_refuses_other_domains_and_runs_too_short(trained):
    other = Setting(("code", "law", "web"), np.full(3, 1 / 3), 240, 4)
    with pytest.raises(SpecError, match=r"Domains of a run with an agent.*'law'.*expected.*'math'"):
        next(trained.blocks(other))
    short = Setting(DOMAINS, np.full(3, 1 / 3), 7, 4)
    with pytest.raises(SpecError, match="Agent.decisions is 8; expected at most the 7 steps"):
        next(trained.blocks(short))
    with pytest.raises(SpecError, match="Length of Agent.network is 14; expected a multiple of 12"):
        Agent(domains=DOMAINS, network=(1.0,) * 14)
    with pytest.raises(SpecError, match="Agent.network"):
        Agent(domains=DOMAINS, network=(math.nan,) * 13)


def test_training_without_transitions_is_refused():
    none = np.empty((0, 7))
    empty = Transitions(
        states_NF=none, actions_NK=none, rewards_N=np.empty(0), next_NF=none, last_N=np.empty(0)
    )
    with pytest.raises(SpecError, match="Transitions is 0; expected at least one"):
        train_agent(empty)


def test_training_leaves_the_global_generator_alone(tmp_path):
    method = study(settings={"steps": 3})
    before = torch.get_rng_state()
    method.train(swept(tmp_path / "store", method))
    assert torch.equal(torch.get_rng_state(), before)

"""Policies in the training loop: resumed to the bit, alike in packs, recorded, refused in words."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

import rayx
import rayx.proxy.meter
import rayx.proxy.train
from rayx import Evaluation, Mixture, ModelShape, Optimizer, Parent, Phase, Probe, Schedule
from rayx.errors import CorpusError, SpecError
from rayx.policies import DGA, Aioli, DoReMi, Scalarised, SkillIt
from rayx.policy import Block, Gradients, Losses
from rayx.proxy import set_threads, train_pack
from rayx.record import Record
from rayx.spec import TrainSpec
from rayx.steering import Steering
from rayx.sweep import run_sweep

STEPS = 24


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    set_threads(1)


@pytest.fixture(scope="module")
def template(tiny_corpus) -> TrainSpec:
    shape = ModelShape(
        layers=1, width=16, heads=1, ffn_width=32, vocab_size=tiny_corpus.vocab_size, context=32
    )
    return TrainSpec(
        corpus=tiny_corpus.fingerprint,
        model=shape,
        schedule=Schedule.constant(Mixture.uniform(tiny_corpus.domains), STEPS * 4 * 32),
        optimizer=Optimizer(lr=5e-3, batch_sequences=4),
        evaluation=Evaluation(points=2, sequences=8, part="second"),
    )


def law(part: str = "train") -> tuple[Probe, ...]:
    return (Probe(target="law", part=part, sequences=16),)


def policies(template: TrainSpec) -> dict[str, Any]:
    """Each kind of signal: gradients, losses, drops, a reference's excess, none but factors."""
    return {
        "dga": DGA(specific=law(), every_steps=5, sequences=4),
        "aioli": Aioli(rounds=2, learn_rounds=1, sequences=4),
        "skill-it": SkillIt(every_steps=6, learn_steps=2, sequences=4),
        "doremi": DoReMi(reference=Parent(template, STEPS), every_steps=7, sequences=4),
        "scalarised": Scalarised(taus=(3.0, 1.0), shares=(0.5, 0.5)),
    }


def with_policy(template: TrainSpec, policy: Any, **changes: Any) -> TrainSpec:
    prior = Mixture({"code": 5, "law": 3, "news": 2})
    schedule = Schedule.constant(prior, template.schedule.tokens)
    return dataclasses.replace(template, policy=policy, schedule=schedule, **changes)


@pytest.fixture
def store(tmp_path, template, tiny_corpus):
    """A store that has the reference's state."""
    store = rayx.open(str(tmp_path / "store"), create=True)
    train_pack([template], tiny_corpus, store=store, keep={template.run_id: [STEPS]})
    return store


def same(one: Record, other: Record) -> bool:
    """Whether two records agree to the bit in all that is not time."""
    kept = ("spec", "curve", "epochs", "flops", "decisions", "signal_flops", "failure")
    return all(getattr(one, name) == getattr(other, name) for name in kept)


class StopError(Exception):
    pass


@pytest.mark.parametrize("name", ["dga", "aioli", "skill-it", "doremi", "scalarised"])
def test_run_that_is_interrupted_goes_on_to_the_same_bits(
    name, template, tiny_corpus, store, monkeypatch
):
    spec = with_policy(template, policies(template)[name])
    whole = train_pack([spec], tiny_corpus, store=store)[0]
    monkeypatch.setattr(rayx.proxy.train, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(rayx.proxy.train, "RESUME_SECONDS", 0.0)
    starts = []
    for stop in (9, 16):  # in the middle of blocks
        beats: list[int] = []

        def stop_there(tokens: int, stop: int = stop, beats: list[int] = beats) -> None:
            beats.append(tokens // spec.batch_tokens)
            if beats[-1] == stop:
                raise StopError

        with pytest.raises(StopError):
            train_pack([spec], tiny_corpus, store=store, on_progress=stop_there)
        starts.append(beats[0])
    beats = []
    resumed = train_pack([spec], tiny_corpus, store=store, on_progress=beats.append)[0]
    assert starts == [1, 9], "the second try went on where the first was stopped"
    assert beats[0] == 16 * spec.batch_tokens
    assert same(resumed, whole)
    assert len(whole.decisions) > 1
    assert not [n for n in os.listdir(f"{store.url}/unfinished") if n.endswith(".safetensors")]


def _train_and_die(spec_json: dict, corpus_url: str, store_url: str) -> None:
    set_threads(1)
    rayx.proxy.train.BEAT_SECONDS = rayx.proxy.train.RESUME_SECONDS = 0.0
    spec = TrainSpec.from_json(spec_json)

    def die(tokens: int) -> None:
        if tokens == 13 * spec.batch_tokens:
            os.kill(os.getpid(), signal.SIGKILL)

    corpus = rayx.Corpus.load(corpus_url)
    train_pack([spec], corpus, store=rayx.open(store_url), on_progress=die)


def test_process_that_is_killed_loses_no_decision(template, tiny_corpus, store):
    spec = with_policy(template, policies(template)["dga"])
    whole = train_pack([spec], tiny_corpus, store=store)[0]
    arguments = (spec.to_json(), tiny_corpus.url, store.url)
    process = multiprocessing.get_context("spawn").Process(target=_train_and_die, args=arguments)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    beats: list[int] = []
    resumed = train_pack([spec], tiny_corpus, store=store, on_progress=beats.append)[0]
    assert same(resumed, whole)


def test_state_past_a_checkpoint_that_is_wanted_now_is_not_used(
    template, tiny_corpus, store, monkeypatch
):
    spec = with_policy(template, policies(template)["dga"])
    monkeypatch.setattr(rayx.proxy.train, "BEAT_SECONDS", 0.0)
    monkeypatch.setattr(rayx.proxy.train, "RESUME_SECONDS", 0.0)

    def stop(tokens: int) -> None:
        if tokens == 9 * spec.batch_tokens:
            raise StopError

    with pytest.raises(StopError):
        train_pack([spec], tiny_corpus, store=store, on_progress=stop)
    beats: list[int] = []
    keep = {spec.run_id: [5]}
    train_pack([spec], tiny_corpus, store=store, keep=keep, on_progress=beats.append)
    assert beats[0] == spec.batch_tokens, "it began anew"
    assert store.exists(Parent(spec, 5).checkpoint)


def test_damaged_state_of_a_pack_is_not_used(template, tiny_corpus, store):
    spec = with_policy(template, policies(template)["dga"])
    store.write_bytes(rayx.proxy.train.unfinished([spec]), b"\x00" * 100)
    again = train_pack([spec], tiny_corpus, store=store)[0]
    assert same(again, train_pack([spec], tiny_corpus)[0])


def test_pack_of_policies_agrees_with_single_runs(template, tiny_corpus, store):
    kinds = policies(template)
    specs = [with_policy(template, kinds[k]) for k in ("dga", "aioli", "doremi", "scalarised")]
    specs += [with_policy(template, kinds["dga"], data_seed=1), template]
    assert len({spec.pack_key for spec in specs}) == 1
    for spec, record in zip(specs, train_pack(specs, tiny_corpus, store=store), strict=True):
        alone = train_pack([spec], tiny_corpus, store=store)[0]
        assert [d.step for d in record.decisions] == [d.step for d in alone.decisions]
        for mine, theirs in zip(record.decisions, alone.decisions, strict=True):
            assert mine.weights == pytest.approx(theirs.weights, abs=2e-3)
        for target, loss in record.losses.items():
            assert loss.nats == pytest.approx(alone.losses[target].nats, rel=1e-3)


def test_record_says_what_was_decided_and_what_it_was_trained_on(template, tiny_corpus, store):
    policy = DGA(specific=law(), every_steps=5, sequences=4, eta=30.0)
    record = train_pack([with_policy(template, policy)], tiny_corpus)[0]
    assert [d.step for d in record.decisions] == [0, 5, 10, 15, 20]
    assert record.decisions[0].weights == {"code": 0.5, "law": 0.3, "news": 0.2}
    assert record.decisions[0].signal is None and len(record.decisions[1].signal) == 4
    lengths = np.array([5, 5, 5, 5, 4])
    for domain, weight in record.mixture.items():
        by_block = [d.weights[domain] for d in record.decisions]
        assert weight == pytest.approx(lengths @ by_block / STEPS, abs=2e-6)
    assert record.mixture["law"] > 0.35, "the specific set's own domain gains weight"
    read = {d: e * (len(tiny_corpus.train(d)) - 1) // 32 for d, e in record.epochs.items()}
    assert read["law"] / sum(read.values()) == pytest.approx(record.mixture["law"], abs=0.03)
    sources = (Mixture({"law": 1}),) * 3
    signal_flops = Gradients(sources=sources, probes=law(), sequences=4).flops(template.model)
    assert record.signal_flops == 4 * signal_flops
    assert record.flops == record.spec.flops + record.signal_flops  # pyright: ignore[reportAttributeAccessIssue]
    assert 0 < record.signal_seconds < record.seconds
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record

    plain = dataclasses.replace(template, seed=5)
    for each in (record, train_pack([plain], tiny_corpus)[0]):
        store.put(each)
    weights = store.sql("select step, weight from decisions where domain = 'law' order by step")
    assert weights["weight"].tolist() == [d.weights["law"] for d in record.decisions]
    runs = store.runs().set_index("run_id")
    assert runs.loc[record.run_id, "weight/law"] == record.mixture["law"]
    assert runs.loc[record.run_id, "policy"] == "dga"
    before = store.decisions()
    store.compact()
    assert store.decisions().equals(before)


def test_factors_on_losses_change_the_gradient_as_they_say(template, tiny_corpus):
    # AdamW is scale-free, so a common factor shows in clipping and eps alone.
    optimizer = dataclasses.replace(template.optimizer, clip_norm=1e9, eps=1e-30)
    spec = dataclasses.replace(template, optimizer=optimizer)
    plain = train_pack([spec], tiny_corpus)[0].losses
    doubled = train_pack([dataclasses.replace(spec, policy=Common(factor=2.0))], tiny_corpus)[0]
    for target, loss in doubled.losses.items():
        assert loss.nats == pytest.approx(plain[target].nats, rel=1e-4)
    prior = Schedule.constant(Mixture({"code": 8, "law": 1, "news": 1}), spec.schedule.tokens)
    flat = dataclasses.replace(spec, schedule=prior)
    tilted = dataclasses.replace(flat, policy=Scalarised(taus=(50.0,)))
    before, after = train_pack([flat, tilted], tiny_corpus)
    assert after.losses["law"].nats < before.losses["law"].nats - 0.01
    assert after.losses["code"].nats > before.losses["code"].nats


@dataclass(frozen=True, slots=True)
class Common:
    """One factor on all losses."""

    name: ClassVar[str] = "common"
    factor: float = 1.0

    def blocks(self, setting):
        yield Block(setting.prior_K, STEPS, None, np.full(3, self.factor))


@dataclass(frozen=True, slots=True)
class Broken:
    """A policy that misbehaves in a chosen way."""

    name: ClassVar[str] = "broken"
    how: str = "none"

    def blocks(self, setting):
        if self.how == "none":
            return
        if self.how == "endless":
            while True:
                yield Block(setting.prior_K, 0, None)
        weights = {"negative": np.array([-1.0, 1, 1]), "short": np.ones(2)}[self.how]
        yield Block(setting.prior_K, 3, Losses(probes=law("first")))
        yield Block(weights, 3)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("none", "no block at all"),
        ("endless", "1000 blocks without a step of training"),
        ("negative", "weights_K=array\\(\\[-1."),
        ("short", "the 3 domains"),
    ],
)
def test_policy_that_misbehaves_is_named(how, words, template, tiny_corpus):
    with pytest.raises(SpecError, match=words) as error:
        train_pack([with_policy(template, Broken(how=how))], tiny_corpus)
    assert "broken" in str(error.value)


def test_signal_that_is_not_finite_fails_its_run_alone(template, tiny_corpus, monkeypatch):
    spoiled = with_policy(template, DGA(specific=law(), every_steps=5, sequences=4))
    other = with_policy(template, DGA(specific=law(), every_steps=6, sequences=4))
    real = rayx.proxy.meter.inner_products
    calls = []

    def spoil(*args, **kwargs):
        calls.append(1)
        value = real(*args, **kwargs)
        return value * np.nan if len(calls) == 1 else value

    monkeypatch.setattr(rayx.proxy.meter, "inner_products", spoil)
    bad, good = train_pack([spoiled, other], tiny_corpus)
    assert bad.failure and bad.failure.message.startswith(
        "Gradients signal of its policy is not finite at step 5"
    )
    assert good.status == "ok" and len(good.decisions) == 4


REFUSED = {
    "judged on what it reads": (
        {"policy": DGA(specific=law("first")), "evaluation": Evaluation(points=1, sequences=8)},
        SpecError,
        "reads part 'first' of the held-out text of 'law', and the run is judged on part 'all'",
    ),
    "no such target": (
        {"policy": DGA(specific=(Probe(target="lew", part="train"),))},
        CorpusError,
        "no domain 'lew'.*law",
    ),
    "source of an unknown domain": (
        {"policy": DGA(specific=law(), basis=(Mixture({"law": 1}), Mixture({"lab": 1})))},
        SpecError,
        "lab",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_policy_is_refused_before_training(case, template, tiny_corpus):
    changes, kind, words = REFUSED[case]
    spec = dataclasses.replace(template, **changes)
    with pytest.raises(kind, match=words):
        train_pack([spec], tiny_corpus)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"schedule": Schedule.constant(Mixture({"law": 1}), 4096)}, "two domains or more"),
        (
            {"schedule": Schedule((Phase(Mixture({"law": 1, "code": 1}), 2048),) * 2)},
            "one phase, beside a policy",
        ),
        ({"policy": "dga"}, "a policy, see rayx.policies"),
    ],
)
def test_policy_that_does_not_fit_the_run_is_refused(changes, words, template):
    with pytest.raises(SpecError, match=words):
        dataclasses.replace(template, **{"policy": DGA(specific=law())} | changes)


def test_reference_of_another_context_is_refused(template):
    shorter = dataclasses.replace(template.model, context=16)
    reference = Parent(dataclasses.replace(template, model=shorter), 4)
    with pytest.raises(SpecError, match="Corpus, vocabulary and context of a reference"):
        dataclasses.replace(template, policy=DoReMi(reference=reference))


def test_whole_number_is_the_same_run_as_its_float(template):
    one, other = (with_policy(template, DGA(specific=law(), eta=eta)) for eta in (5, 5.0))
    assert one == other and one.run_id == other.run_id


def test_unknown_policy_is_named(template):
    data = with_policy(template, DGA(specific=law())).to_json()
    data["policy"]["name"] = "dgq"
    with pytest.raises(SpecError, match="Policy is 'dgq'; expected one of agent, aioli, dga"):
        TrainSpec.from_json(data)


def test_policy_that_forgets_what_it_decided_is_named(template, tiny_corpus):
    spec = with_policy(template, DGA(specific=law(), every_steps=5, sequences=4))
    record = train_pack([spec], tiny_corpus)[0]
    Steering(spec, record.decisions)
    changed = dataclasses.replace(record.decisions[2], weights={"code": 1.0})
    with pytest.raises(SpecError, match="decides otherwise than before"):
        Steering(spec, (*record.decisions[:2], changed, *record.decisions[3:]))


def test_sweep_trains_the_reference_first_and_records_decisions(
    ray_cluster, template, tiny_corpus, tmp_path
):
    store = rayx.open(str(tmp_path / "sweep"), create=True)
    spec = with_policy(template, policies(template)["doremi"])
    assert run_sweep([spec], tiny_corpus, store, train_pack) == {spec.run_id: "ok"}
    assert store.status().keys() == {spec.run_id, template.run_id}
    decisions = store.get(spec.run_id).decisions
    assert [d.step for d in decisions] == [0, 7, 14, 21]
    assert not store.exists(Parent(template, STEPS).checkpoint)
    with pytest.raises(SpecError, match="judged on part"):
        bad = with_policy(template, DGA(specific=law("all")))
        run_sweep([bad], tiny_corpus, store, train_pack)

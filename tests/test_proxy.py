"""Proxies: pack = singles, divergence, oracles for the loss, schedules of the rate."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

import rayx
from rayx import Evaluation, Mixture, ModelShape, Optimizer, Phase, Schedule, TrainSpec
from rayx.corpus.sampler import sequence_count, take
from rayx.errors import CorpusError, SpecError, StoreError
from rayx.proxy import set_threads, train_pack
from rayx.proxy.model import Rotary, initial_parameters, stacked, token_losses
from rayx.proxy.objective import Objective
from rayx.proxy.optimizer import PackedAdamW, lr_share
from rayx.spec import LrSchedule, Parent, Precision


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in a trial; with more threads, sums are split by shape and training amplifies that."""
    set_threads(1)


@pytest.fixture(scope="module")
def template(tiny_corpus) -> TrainSpec:
    return TrainSpec(
        corpus=tiny_corpus.fingerprint,
        model=ModelShape(
            layers=2,
            width=32,
            heads=2,
            ffn_width=64,
            vocab_size=tiny_corpus.vocab_size,
            context=32,
        ),
        schedule=Schedule.constant(Mixture({"code": 1, "law": 1}), 50 * 8 * 32),
        optimizer=Optimizer(lr=5e-3, batch_sequences=8),
        evaluation=Evaluation(points=2, sequences=32),
    )


def fresh_parameters(shape: ModelShape, seeds: list[int]) -> dict[str, torch.Tensor]:
    drawn = [initial_parameters(shape, seed) for seed in seeds]
    return {n: p.requires_grad_() for n, p in stacked(drawn, torch.device("cpu")).items()}


def zeros(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def varied(template: TrainSpec, count: int) -> list[TrainSpec]:
    """Return specs with different mixtures, learning rates, weight decays and seeds."""
    return [
        dataclasses.replace(
            template,
            schedule=Schedule.constant(
                Mixture({"code": 1 + i, "law": 3, "news": i % 3}), template.schedule.tokens
            ),
            optimizer=dataclasses.replace(
                template.optimizer, lr=1e-3 * (1 + i), weight_decay=0.05 * i
            ),
            seed=i // 2,
            data_seed=i // 3,
        )
        for i in range(count)
    ]


def test_pack_of_eight_gives_the_losses_of_eight_single_runs(template, tiny_corpus):
    specs = varied(template, 8)
    assert specs[0].steps == 50
    packed = train_pack(specs, tiny_corpus)
    for spec, record in zip(specs, packed, strict=True):
        single = train_pack([spec], tiny_corpus)[0]
        assert record.run_id == single.run_id == spec.run_id
        assert record.pack_runs == 8 and single.pack_runs == 1
        assert record.epochs == single.epochs
        for point, alone in zip(record.curve, single.curve, strict=True):
            for target, loss in point.losses.items():
                assert loss.nats == pytest.approx(alone.losses[target].nats, rel=1e-4)
    # and the runs of the pack do differ, so that the comparison says something
    assert len({round(r.losses["law"].bpb, 3) for r in packed}) == 8


def test_training_again_gives_the_same_bits(template, tiny_corpus):
    first, second = (train_pack([template], tiny_corpus)[0] for _ in range(2))
    assert first.curve == second.curve


def test_proxies_learn_their_domains_and_not_the_absent_one(template, tiny_corpus):
    record = train_pack([template], tiny_corpus)[0]
    untrained = math.log(template.model.vocab_size)
    assert record.losses["code"].nats < 0.6 * untrained
    assert record.losses["news"].nats > record.losses["code"].nats + 0.5
    assert record.curve[0].losses["code"].nats > record.losses["code"].nats
    assert record.status == "ok" and record.tokens == 50 * 8 * 32
    assert record.epochs.keys() == {"code", "law"}


def test_losses_equal_a_plain_reference_in_float64(template):
    """An independent decoder, written with loops and explicit formulas."""
    shape = template.model
    parameters = fresh_parameters(shape, [3, 4])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, shape.vocab_size, (2, 3, 13), generator=generator)
    got = token_losses(parameters, shape, Rotary(shape, torch.device("cpu")), tokens)
    for run in range(2):
        p = {n: v[run].detach().double().numpy() for n, v in parameters.items()}
        for b in range(3):
            want = reference_losses(p, shape, tokens[run, b].numpy())
            assert got[run, b].detach().numpy() == pytest.approx(want, rel=2e-5)


def reference_losses(p, shape, tokens):
    def norm(x, gain):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain

    def rotate(x):  # (T, width of a head)
        half = x.shape[1] // 2
        out = np.empty_like(x)
        for t in range(len(x)):
            for i in range(half):
                angle = t * 10_000.0 ** (-i / half)
                a, b = x[t, i], x[t, i + half]
                out[t, i] = a * math.cos(angle) - b * math.sin(angle)
                out[t, i + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    x = p["embedding"][tokens[:-1]]
    length, head = len(x), shape.width // shape.heads
    for layer in range(shape.layers):
        name = f"layers.{layer}."
        q, k, v = np.split(norm(x, p[name + "attention_norm"]) @ p[name + "qkv"], 3, axis=1)
        mixed = np.zeros_like(x)
        for h in range(shape.heads):
            cols = slice(h * head, (h + 1) * head)
            scores = rotate(q[:, cols]) @ rotate(k[:, cols]).T / math.sqrt(head)
            scores[np.triu_indices(length, 1)] = -np.inf
            weights = np.exp(scores - scores.max(1, keepdims=True))
            mixed[:, cols] = weights / weights.sum(1, keepdims=True) @ v[:, cols]
        x = x + mixed @ p[name + "attention_out"]
        gate, up = np.split(norm(x, p[name + "ffn_norm"]) @ p[name + "gate_up"], 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p[name + "down"]
    logits = norm(x, p["norm"]) @ p["embedding"].T
    logits -= logits.max(1, keepdims=True)
    return (np.log(np.exp(logits).sum(1)) - logits[np.arange(length), tokens[1:]]).tolist()


def test_packed_adamw_equals_torch_adamw_run_by_run(template):
    specs = varied(template, 3)
    shape = template.model
    parameters = fresh_parameters(shape, [s.seed for s in specs])
    rotary = Rotary(shape, torch.device("cpu"))
    tokens = torch.randint(0, shape.vocab_size, (3, 4, 33), generator=torch.manual_seed(0))
    twins, optimizers = [], []
    for run, spec in enumerate(specs):
        twin = {
            n: v[run : run + 1].detach().clone().requires_grad_() for n, v in parameters.items()
        }
        decayed = [v for n, v in twin.items() if not n.endswith("norm")]
        norms = [v for n, v in twin.items() if n.endswith("norm")]
        groups = [
            {"params": decayed, "weight_decay": spec.optimizer.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ]
        betas = (spec.optimizer.beta1, spec.optimizer.beta2)
        optimizers.append(torch.optim.AdamW(groups, lr=spec.optimizer.lr, betas=betas, eps=1e-6))
        twins.append(twin)
    packed = PackedAdamW(parameters, zeros(parameters), zeros(parameters), specs)
    alive_R = torch.ones(3, dtype=torch.bool)
    for _ in range(5):
        token_losses(parameters, shape, rotary, tokens).mean((1, 2)).sum().backward()
        norm_R = packed.step(1.0, alive_R)
        for run, (twin, optimizer) in enumerate(zip(twins, optimizers, strict=True)):
            optimizer.zero_grad()
            token_losses(twin, shape, rotary, tokens[run : run + 1]).mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(list(twin.values()), 1.0)
            assert norm_R[run].item() == pytest.approx(norm.item(), rel=1e-4)
            optimizer.step()
    for run, twin in enumerate(twins):
        for name, value in twin.items():
            torch.testing.assert_close(parameters[name][run], value[0], rtol=1e-4, atol=1e-5)


def test_a_run_that_diverges_is_recorded_and_leaves_its_pack_unharmed(template, tiny_corpus):
    wild = dataclasses.replace(template, optimizer=dataclasses.replace(template.optimizer, lr=10.0))
    good, bad = train_pack([template, wild], tiny_corpus)
    alone = train_pack([template], tiny_corpus)[0]
    assert bad.status == "failed" and bad.failure.type == "Diverged" and not bad.losses
    assert "held-out loss is" in bad.failure.message or "loss is" in bad.failure.message
    assert good.losses["law"].nats == pytest.approx(alone.losses["law"].nats, rel=1e-4)


def test_nan_in_one_run_is_named_with_its_step(template, tiny_corpus, monkeypatch):
    plain, calls = Objective.backward, []

    def poisoned(self, parameters, tokens, domain_RB):
        calls.append(1)
        if len(calls) == 7:
            parameters["norm"].data[1, 0] = math.nan
        return plain(self, parameters, tokens, domain_RB)

    monkeypatch.setattr(Objective, "backward", poisoned)
    twin = dataclasses.replace(template, seed=9)
    good, bad = train_pack([template, twin], tiny_corpus)
    assert good.status == "ok" and math.isfinite(good.losses["law"].nats)
    assert bad.failure.message.startswith("loss is nan") and "at step 7 (" in bad.failure.message


def test_evaluation_is_the_mean_over_the_stated_sequences(template, tiny_corpus):
    record = train_pack([template], tiny_corpus)[0]
    loss = record.losses["law"]
    shard = tiny_corpus.heldout("law")
    factor = 1 / (math.log(2) * tiny_corpus.bytes_per_token("law"))
    assert loss.bpb == pytest.approx(loss.nats * factor)
    assert 0 < loss.stderr_bpb < 0.1 * loss.bpb
    count = sequence_count(len(shard), 32)
    assert count > 32  # so 32 of them were chosen, spread over the shard
    assert take(shard, np.array([count - 1]), 32).shape == (1, 33)


def test_bfloat16_stays_near_float32(template, tiny_corpus):
    half = dataclasses.replace(template, precision=Precision.BFLOAT16)
    full, low = (train_pack([s], tiny_corpus)[0].losses["law"].nats for s in (template, half))
    assert low != full and low == pytest.approx(full, rel=0.05)


def test_phases_change_what_is_read(template, tiny_corpus):
    tokens = template.schedule.tokens // 2
    phases = Schedule((Phase(Mixture({"code": 1}), tokens), Phase(Mixture({"news": 1}), tokens)))
    record = train_pack([dataclasses.replace(template, schedule=phases)], tiny_corpus)[0]
    assert record.epochs.keys() == {"code", "news"}
    first, last = record.curve
    assert last.losses["news"].nats < first.losses["news"].nats - 0.5


@pytest.mark.parametrize("schedule", LrSchedule)
def test_lr_share_warms_up_peaks_and_ends_low(schedule):
    optimizer = Optimizer(
        lr=1, batch_sequences=1, lr_schedule=schedule, warmup_share=0.1, min_lr_share=0.1
    )
    shares = [lr_share(optimizer, step, 100) for step in range(100)]
    assert shares[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert max(shares) == 1.0 and 0.1 <= shares[-1] < 0.15
    assert all(a >= b for a, b in zip(shares[10:], shares[11:], strict=False))
    middle = shares[55]
    assert middle == 1.0 if schedule is LrSchedule.WSD else middle == pytest.approx(0.55, abs=0.02)


def test_bad_packs_are_refused_before_training(template, tiny_corpus):
    def replaced(**changes):
        return dataclasses.replace(template, **changes)

    longer = Schedule.constant(Mixture({"code": 1}), 2 * template.schedule.tokens)
    with pytest.raises(SpecError, match="differ in more than mixture"):
        train_pack([template, replaced(schedule=longer)], tiny_corpus)
    with pytest.raises(SpecError, match="Give the corpus that the specs were made for"):
        train_pack([replaced(corpus="0123")], tiny_corpus)
    unknown = Schedule.constant(Mixture({"cod": 1}), template.schedule.tokens)
    with pytest.raises(SpecError, match="'cod'.*Did you mean 'code'"):
        train_pack([replaced(schedule=unknown)], tiny_corpus)
    huge = dataclasses.replace(template.model, context=50_000)
    whole = Schedule.constant(Mixture({"code": 1}), 50_000 * 8 * 2)
    with pytest.raises((CorpusError, SpecError), match="context 50000"):
        train_pack([replaced(model=huge, schedule=whole)], tiny_corpus)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu(template, tiny_corpus):
    specs = varied(template, 4)
    for cpu, gpu in zip(
        train_pack(specs, tiny_corpus), train_pack(specs, tiny_corpus, device="cuda"), strict=True
    ):
        assert gpu.losses["law"].nats == pytest.approx(cpu.losses["law"].nats, rel=1e-2)


# Branches -------------------------------------------------------------------------------------


def test_a_branch_of_a_trunk_is_the_run_in_one_go_to_the_bit(template, tiny_corpus, tmp_path):
    """Trunk at a constant rate, then a branch of another mixture that decays: WSD in two runs."""
    batch = template.batch_tokens
    general, special = Mixture({"code": 1, "law": 1}), Mixture({"news": 3, "law": 1})
    phases = (Phase(general, 35 * batch), Phase(special, 15 * batch))
    warm = dataclasses.replace(template.optimizer, warmup_share=0.1, decay_share=0.3)
    whole = dataclasses.replace(template, schedule=Schedule(phases), optimizer=warm)
    trunk = dataclasses.replace(
        template,
        schedule=Schedule.constant(general, 40 * batch),  # longer than the branch point
        optimizer=dataclasses.replace(warm, warmup_share=0.125, decay_share=0.0),
    )
    branch = dataclasses.replace(
        template,
        schedule=Schedule.constant(special, 15 * batch),
        optimizer=dataclasses.replace(warm, warmup_share=0.0, decay_share=1.0),
        parent=Parent(trunk, 35),
        seed=99,  # a branch draws nothing
    )
    store = rayx.open(tmp_path / "store", create=True)
    train_pack([trunk], tiny_corpus, store=store, keep={trunk.run_id: [35]})
    in_one_go, branched = (train_pack([s], tiny_corpus, store=store)[0] for s in (whole, branch))
    assert branched.losses == in_one_go.losses
    assert branched.epochs == in_one_go.epochs
    assert branched.tokens + branch.trunk_tokens == in_one_go.tokens
    row = branched.run_row()
    assert (row["trunk_tokens"], row["parent"]) == (35 * batch, trunk.run_id)


def test_a_pack_of_branches_gives_the_losses_of_single_branches(template, tiny_corpus, tmp_path):
    store = rayx.open(tmp_path / "store", create=True)
    trunks = varied(template, 3)
    train_pack(trunks, tiny_corpus, store=store, keep={s.run_id: [30] for s in trunks})
    branches = [dataclasses.replace(s, parent=Parent(s, 30)) for s in trunks]
    packed = train_pack(branches, tiny_corpus, store=store)
    for branch, record in zip(branches, packed, strict=True):
        single = train_pack([branch], tiny_corpus, store=store)[0]
        for target, loss in record.losses.items():
            assert loss.nats == pytest.approx(single.losses[target].nats, rel=1e-4)


def test_a_checkpoint_that_is_missing_or_damaged_is_named(template, tiny_corpus, tmp_path):
    branch = dataclasses.replace(template, parent=Parent(template, 10))
    with pytest.raises(SpecError, match="branches from another; give the store"):
        train_pack([branch], tiny_corpus)
    store = rayx.open(tmp_path / "store", create=True)
    with pytest.raises(StoreError, match=f"has no checkpoints/{template.run_id}-10.safetensors"):
        train_pack([branch], tiny_corpus, store=store)
    train_pack([template], tiny_corpus, store=store, keep={template.run_id: [10]})
    data = store.read_bytes(branch.parent.checkpoint)
    store.write_bytes(branch.parent.checkpoint, data[: len(data) // 2])
    with pytest.raises(StoreError, match="is damaged"):
        train_pack([branch], tiny_corpus, store=store)

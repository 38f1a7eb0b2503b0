"""The size of packs, where nobody says."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest

import rayx
from rayx import Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.sweep import Placement
from rayx.sweep.calibrate import ROUND_PACK_SIZE, PackSizes, cpu_pack_size, fastest_size
from rayx.sweep.packs import form_packs


def specs(count: int, tokens: int) -> list[TrainSpec]:
    """Return runs of quickstart's shape: 0.7 MFLOPs a token."""
    first = TrainSpec(
        corpus="0",
        model=ModelShape(layers=1, width=64, heads=4, ffn_width=192, vocab_size=1024, context=64),
        schedule=Schedule.constant(Mixture({"a": 1, "b": 1}), tokens),
        optimizer=Optimizer(lr=8e-3, batch_sequences=8),
    )
    return [dataclasses.replace(first, data_seed=seed) for seed in range(count)]


@pytest.mark.parametrize(
    ("runs", "tokens", "size"),
    [
        (48, 200_000, 3),  # 3 s each: more would pay, but 16 packs are wanted
        (1000, 200_000, 6),  # 17 s a pack for a quarter of a second
        (1000, 20_000_000, 1),  # 5 minutes each
        (10, 4 * 512, 1),
        (4_000, 4 * 512, 250),  # trivial runs
    ],
)
def test_packs_on_a_cpu_outweigh_their_trial_and_can_be_shared(runs, tokens, size):
    assert cpu_pack_size(specs(runs, tokens)) == size


def test_packs_of_a_shape_have_its_size(tmp_path):
    store = rayx.open(tmp_path / "store", create=True)
    sizes = PackSizes(Placement(), None, store, None)
    short, long = specs(48, 200_000), specs(20, 20_000_000)
    packs = form_packs([*short, *long], sizes)
    assert sorted(len(pack) for pack in packs.values()) == [1] * 20 + [3] * 16
    assert packs.keys() == form_packs([*short, *long], sizes).keys()


def test_the_fastest_pack_is_found_and_leaves_room_in_memory():
    """A device that is bound by launches up to 32 runs, then by work."""
    tried = []

    def seconds(size: int) -> float:
        tried.append(size)
        return max(1.0, size / 32)

    assert fastest_size(seconds, 1000) == 32
    assert tried == [1, 2, 4, 8, 16, 32, 64]
    assert fastest_size(seconds, 20) == 16
    assert fastest_size(lambda size: size * 1.0, 1000) == 1

    def within(full: int, size: int) -> float:
        if size > full:
            raise OutOfMemoryError("CUDA out of memory")
        return 1.0

    for full, size in ((20, 8), (1, 1), (0, 1)):  # 16 would just fit
        assert fastest_size(partial(within, full), 1000) == size

    def broken(size: int) -> float:
        raise RuntimeError("another error")

    with pytest.raises(RuntimeError, match="another error"):
        fastest_size(broken, 1000)


class OutOfMemoryError(RuntimeError):
    """As torch's is called."""


def test_what_a_gpu_was_measured_to_hold_is_kept_in_the_store(tmp_path, monkeypatch):
    store = rayx.open(tmp_path / "store", create=True)
    measured = []

    def measure(self, specs):
        measured.append(len(specs))
        return 8 * len(measured)

    monkeypatch.setattr(PackSizes, "_measured", measure)
    runs, others = specs(48, 200_000), specs(48, 400_000)
    for _ in range(2):  # a sweep, and the same one again
        sizes = PackSizes(Placement(gpus=1), None, store, None)
        assert sizes(runs) == 8 and measured == [48]
    sizes.busy = True  # in a round, trials hold the GPUs
    assert sizes(runs) == 8 and sizes(others) == ROUND_PACK_SIZE
    assert PackSizes(Placement(gpus=1), None, store, None)(others) == ROUND_PACK_SIZE
    assert measured == [48]
    assert len(store.status()) == 0

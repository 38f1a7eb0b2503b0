"""The mixture sampler: exact counts, common random numbers, epochs, phases."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.corpus.sampler import Sampler, phase_mixtures, sequence_count, take
from rayx.mixture import Mixture, Phase, Schedule

SEQUENCES = {"a": 40, "b": 7, "c": 100}

weights = st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(lambda w: sum(w) > 0)


@given(weights, st.integers(1, 40), st.integers(0, 10))
@settings(max_examples=60, deadline=None)
def test_step_counts_are_the_quota_rounded_down_or_up(weights, batch, seed):
    mixture = Mixture(dict(zip("abc", weights, strict=True)))
    sampler = Sampler(SEQUENCES, batch, seed)
    share_K = mixture.to_array("abc")
    total_K = np.zeros(3)
    for step in range(30):
        domain_B, _ = sampler.step(step, mixture)
        count_K = np.bincount(domain_B, minlength=3)
        assert (count_K >= np.floor(share_K * batch - 1e-9)).all()
        assert (count_K <= np.ceil(share_K * batch + 1e-9)).all()
        total_K += count_K
    # The golden-ratio walk keeps the sum near its quota, far nearer than sqrt(steps) would.
    assert np.abs(total_K - share_K * batch * 30).max() <= 4


def test_long_run_counts_stay_within_a_few_sequences_of_the_quota():
    mixture = Mixture({"a": 0.003, "b": 0.2, "c": 0.797})
    sampler = Sampler(SEQUENCES, 8, 1)
    for step in range(5_000):
        sampler.step(step, mixture)
    assert np.abs(sampler.drawn_K - mixture.to_array("abc") * 40_000).max() < 6


def test_each_epoch_reads_every_sequence_once_in_a_new_order():
    sampler = Sampler({"b": 7}, 7, 3)
    epochs = [sampler.step(step, Mixture({"b": 1}))[1] for step in range(4)]
    assert all(sorted(order) == list(range(7)) for order in epochs)
    assert len({tuple(order) for order in epochs}) > 1
    assert sampler.epochs() == {"b": 4.0}


def test_runs_with_equal_data_seed_read_a_domain_in_the_same_order():
    read = []
    for mixture in (Mixture({"a": 1, "b": 1}), Mixture({"a": 1, "c": 4})):
        sampler, order = Sampler(SEQUENCES, 8, 5), []
        for step in range(30):
            domain_B, sequence_B = sampler.step(step, mixture)
            order += sequence_B[domain_B == 0].tolist()
        read.append(order)
    shared = min(map(len, read))
    assert shared > 40 and read[0][:shared] == read[1][:shared]
    other = Sampler(SEQUENCES, 8, 6).step(0, Mixture({"a": 1}))[1].tolist()
    assert other != read[0][:8]


def test_phase_mixtures_change_at_the_step_nearest_to_the_boundary():
    first, second = Mixture({"a": 1}), Mixture({"b": 1})
    schedule = Schedule((Phase(first, 1_040), Phase(second, 960)))
    mixtures = phase_mixtures(schedule, 20, 100)
    assert list(mixtures) == [first] * 10 + [second] * 10


def test_take_returns_windows_that_share_only_their_border_token():
    tokens = np.arange(25, dtype=np.uint16)
    assert sequence_count(25, 8) == 3 and sequence_count(24, 8) == 2 and sequence_count(0, 8) == 0
    windows = take(tokens, np.array([0, 2]), 8)
    assert windows.tolist() == [list(range(9)), list(range(16, 25))]

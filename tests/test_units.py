"""FLOPs and loss units against numbers worked out by hand."""

import math

import pytest

from rayx import units


def test_train_flops_are_three_forward_passes():
    assert units.train_flops(10, 7) == 420.0
    assert units.train_flops(123, 456) == 3 * units.forward_flops(123, 456)


def test_train_flops_of_a_large_run_stay_exact_enough():
    # Chinchilla: 70e9 parameters, 1.4e12 tokens, 5.88e23 FLOPs (6 N D).
    assert units.train_flops(70_000_000_000, 1_400_000_000_000) == pytest.approx(5.88e23)


def test_bits_per_byte_of_uniform_bytes_is_eight():
    assert units.bits_per_byte(math.log(256), tokens=1000, num_bytes=1000) == pytest.approx(8.0)


def test_bits_per_byte_does_not_depend_on_the_tokenizer():
    # The same text as 100 tokens or as 50: the loss of the whole text counts.
    a = units.bits_per_byte(2.0, tokens=100, num_bytes=400)
    b = units.bits_per_byte(4.0, tokens=50, num_bytes=400)
    assert a == b == pytest.approx(200 / math.log(2) / 400)

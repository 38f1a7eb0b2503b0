"""FLOPs and loss units against numbers worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayx import units
from rayx.errors import SpecError


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


def test_effective_tokens_of_one_epoch_are_the_tokens():
    got = units.effective_tokens(np.array([0.0, 5.0, 100.0]), 100.0)
    np.testing.assert_array_equal(got, [0.0, 5.0, 100.0])


def test_effective_tokens_of_four_epochs_are_worth_3_7_epochs():
    # By hand: R = 3, 100 (1 + 15.39 (1 - exp(-3 / 15.39))) of 400.
    assert units.effective_tokens(400.0, 100.0) == pytest.approx(372.57, abs=0.01)
    # After R* repetitions a token is worth 1/e of a fresh one: the slope of D' in D.
    end = 100 * (1 + units.REPETITION_R_STAR)
    slope = (units.effective_tokens(end + 1e-3, 100) - units.effective_tokens(end, 100)) / 1e-3
    assert slope == pytest.approx(math.exp(-1), rel=1e-4)


def test_effective_tokens_at_the_edges():
    assert units.effective_tokens(7.0, 0.0) == 0.0  # nothing to draw from
    assert units.effective_tokens(0.0, 0.0) == 0.0
    assert units.effective_tokens(700.0, 100.0, math.inf) == 700.0
    assert units.effective_tokens(7.0, math.inf) == 7.0
    assert units.effective_tokens(5e-324, 1.0, 0.5) == 5e-324
    assert units.effective_tokens(1e30, 100.0) == pytest.approx(1639.0)


@given(st.floats(0, 1e15), st.floats(0, 1e15), st.floats(1e-3, 1e4), st.floats(0, 1e15))
def test_effective_tokens_grow_and_never_pass_supply_or_tokens(tokens, unique, r_star, more):
    worth = units.effective_tokens(tokens, unique, r_star)
    ceiling = min(tokens, unique * (1 + r_star))
    assert 0 <= worth <= ceiling * (1 + 1e-12)
    assert units.effective_tokens(tokens + more, unique, r_star) >= worth * (1 - 1e-12)
    assert units.effective_tokens(tokens, unique + more, r_star) >= worth * (1 - 1e-12)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1.0, 2.0), "tokens is -1"),
        ((1.0, math.nan), "unique_tokens is nan"),
        ((1.0, np.array([2.0, -3.0])), "unique_tokens is -3"),
        ((1.0, 2.0, 0.0), "r_star is 0"),
    ],
)
def test_effective_tokens_refuses_what_is_not_an_amount(arguments, message):
    with pytest.raises(SpecError, match=message):
        units.effective_tokens(*arguments)

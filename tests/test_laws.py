"""Every law keeps the contract, and its intervals hold the truth as often as they say."""

import pytest

from rayx.fit.laws import (
    Chinchilla,
    SplitAdditive,
    SplitEffective,
    SplitInteraction,
    SplitTwoStage,
    laws,
)
from tests.contracts.law_contract import CHECKS, LawCase, coverage

PLAIN = {"E": 1.8, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.36}
SPLIT = {"E": 1.2, "A": 300.0, "alpha": 0.34, "B": 1500.0, "beta": 0.36}

# One line a law; truths are in units of runs of 5e7 to 1e10 params and 1e9 to 5e11 tokens.
CASES = {
    "chinchilla": LawCase(Chinchilla, PLAIN),
    "split_additive": LawCase(SplitAdditive, SPLIT | {"C": 30.0, "D0": 3e8, "gamma": 0.2}),
    "split_interaction": LawCase(SplitInteraction, SPLIT | {"D1": 5e8, "gamma": 0.3}),
    "split_effective": LawCase(SplitEffective, SPLIT | {"rho": 20.0, "kappa": 0.8}),
    "split_two_stage": LawCase(SplitTwoStage, SPLIT | {"D1": 5e8, "gamma": 1.0, "epsilon": 0.03}),
}


def test_every_law_has_a_case():
    assert set(CASES) == set(laws())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_law_contract(case, check):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_intervals_of_200_draws_hold_the_truth(case):
    inside, total = coverage(case, draws=200, bootstrap=400)
    assert 0.90 <= inside / total <= 0.99, (inside, total)

"""Laws of continued pretraining: the paper's three usages and the critical mixture ratio."""

import json

import numpy as np
import pytest
from scipy.optimize import curve_fit

from rayx.errors import ChoiceError, FitError
from rayx.fit.laws.continued import (
    DCPT,
    CrossDomainDCPT,
    optimal_size_at_ratio,
    ratio_of_limited_data,
    ratio_within_tolerance,
)
from rayx.fit.laws.critical_ratio import PowerChange, TwoPowerChange, critical_ratio
from rayx.fit.laws.nested import SizeLaw, TokenLaw
from tests.contracts import law_contract
from tests.contracts.law_contract import LawCase
from tests.planted import planted_loss, with_noise

DOMAIN = {  # falls in r from a billion tokens on, as the paper asks
    "E": 0.9, "A": 300.0, "alpha": 0.33, "B": 7000.0, "beta": 0.5,
    "eta": 1.1, "C": 0.5, "gamma": 0.7, "epsilon": 0.15,
}  # fmt: skip
GENERAL = DOMAIN | {"E": 1.6, "B": 300.0, "C": 0.05, "gamma": 1.0, "epsilon": 0.04}


def runs() -> tuple[np.ndarray, ...]:
    """The paper's design: three sizes, nine ratios, twenty evaluations of each run."""
    sizes = np.array([0.5e9, 1.8e9, 4e9])
    ratios = np.array([0.0, 0.1, 0.2, 1 / 3, 0.5, 2 / 3, 0.8, 0.9, 1.0])
    tokens = np.linspace(0.1e9, 10e9, 20)
    return tuple(x.reshape(-1) for x in np.meshgrid(sizes, tokens, ratios, indexing="ij"))


@pytest.fixture(scope="module")
def domain_law() -> DCPT:
    columns = runs()
    return DCPT().fit(*columns, with_noise(planted_loss(DCPT, DOMAIN, *columns), 0.001, seed=1))


@pytest.fixture(scope="module")
def general_law() -> DCPT:
    columns = runs()
    return DCPT().fit(*columns, with_noise(planted_loss(DCPT, GENERAL, *columns), 0.001, seed=2))


def fixed(law: DCPT, params: float, tokens: float, general: bool = False):
    """Loss over domain ratios at one scale; the general law is asked for the rest, 1 - r."""

    def loss(ratio_R: np.ndarray) -> np.ndarray:
        ones_R = np.ones(len(ratio_R))
        return law.predict(ones_R * params, ones_R * tokens, 1 - ratio_R if general else ratio_R)

    return loss


def test_general_and_domain_law_predict_a_larger_model(domain_law, general_law):
    ratio_R = np.linspace(0.0, 1.0, 21)
    for law, truth in ((domain_law, DOMAIN), (general_law, GENERAL)):
        columns = (np.full(21, 14e9), np.full(21, 40e9), ratio_R)
        truth_R = planted_loss(DCPT, truth, *columns)
        np.testing.assert_allclose(law.predict(*columns), truth_R, rtol=0.01)


def test_usage_1_is_the_best_allowed_ratio_of_a_brute_force_search(domain_law, general_law):
    domain = fixed(domain_law, 1.8e9, 10e9)
    general = fixed(general_law, 1.8e9, 10e9, general=True)
    ratio_G = np.linspace(0.0, 1.0, 20_001)
    before = general(np.array([0.0]))[0]
    for tolerance in (0.005, 0.03, 0.1):
        limit = (1 + tolerance) * before
        allowed_G = general(ratio_G) <= limit
        brute = ratio_G[allowed_G][np.argmin(domain(ratio_G[allowed_G]))]
        found = ratio_within_tolerance(domain, general, limit)
        assert found == pytest.approx(brute, abs=1e-4)
        assert general(np.array([found]))[0] <= limit * (1 + 1e-9)


def test_usage_1_does_not_bind_when_the_tolerance_is_wide():
    # The domain loss has its lowest point at .4, well inside of what is allowed.
    found = ratio_within_tolerance(lambda r: (r - 0.4) ** 2, lambda r: 1.0 + r, limit=1.9)
    assert found == pytest.approx(0.4, abs=1e-6)


def test_usage_1_says_when_no_ratio_keeps_the_limit():
    with pytest.raises(ChoiceError, match="the lowest is 2.0000, at ratio 0.000"):
        ratio_within_tolerance(lambda r: 1.0 - r, lambda r: 2.0 + r, limit=1.9)


def test_usage_1_gives_the_published_ratio_for_chemistry(reference):
    table = json.loads((reference / "cpt-tables" / "cpt_tables.json").read_text())
    table = table["dcpt_usage1_table5_chemistry_qwen1.5-1.8B"]
    limit = (1 + table["tolerance"]) * table["general_loss_0"]
    ratio_7 = np.array(table["domain_ratio"])

    def measured(name: str):
        # Below the lowest ratio of the table the losses are those of that ratio.
        return lambda ratio_R: np.interp(ratio_R, ratio_7, table[name])

    found = ratio_within_tolerance(measured("domain_loss"), measured("general_loss"), limit)
    assert found == pytest.approx(table["published_optimal_ratio"], abs=1e-3)

    # The law at one scale: the floor and the term of the ratio are what is left of it.
    def law(share, floor, scale, epsilon, gamma):
        return floor + scale / (share + epsilon) ** gamma

    theta, _ = curve_fit(
        law, 1 - ratio_7, table["general_loss"], p0=(2.0, 0.3, 0.05, 0.5), bounds=(0, 10)
    )
    found = ratio_within_tolerance(measured("domain_loss"), lambda r: law(1 - r, *theta), limit)
    assert found == pytest.approx(table["published_optimal_ratio"], abs=2e-3)


@pytest.mark.parametrize("domain_tokens", [5e7, 2e8, 1e9, 5e10])
def test_usage_2_is_the_best_ratio_of_a_brute_force_search(domain_law, domain_tokens):
    ratio_G = np.linspace(0.0, 1.0, 20_001)
    tokens_G = np.array([min(2e10, domain_tokens / r) if r else 2e10 for r in ratio_G])
    loss_G = domain_law.predict(np.full(len(ratio_G), 1.8e9), tokens_G, ratio_G)
    found = ratio_of_limited_data(domain_law, 1.8e9, domain_tokens, tokens=2e10)
    used = domain_tokens / max(found, domain_tokens / 2e10)
    loss = domain_law.predict(np.array([1.8e9]), np.array([used]), np.array([found]))[0]
    assert loss <= loss_G.min() + 1e-9
    assert found == pytest.approx(ratio_G[np.argmin(loss_G)], abs=1e-4)


def test_usage_2_trains_less_where_general_tokens_no_longer_help(domain_law):
    # 1B domain tokens: neither the whole budget (.05) nor the domain alone (1).
    assert 0.3 < ratio_of_limited_data(domain_law, 1.8e9, 1e9, tokens=2e10) < 0.99


@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_usage_3_is_the_best_size_of_a_brute_force_search(domain_law, ratio):
    flops = 1e21
    params_G = np.geomspace(1e6, 1e14, 200_001)
    loss_G = domain_law.predict(params_G, flops / 6 / params_G, np.full(len(params_G), ratio))
    params, tokens = optimal_size_at_ratio(domain_law, flops, ratio)
    assert params == pytest.approx(params_G[np.argmin(loss_G)], rel=1e-3)
    assert 6 * params * tokens == pytest.approx(flops)


def test_usage_3_has_no_answer_without_data_of_the_domain(domain_law):
    with pytest.raises(ChoiceError, match="ratio is 0"):
        optimal_size_at_ratio(domain_law, 1e21, 0.0)


def test_ratio_in_percent_is_refused():
    params_R, tokens_R, ratio_R = runs()
    with pytest.raises(FitError, match="ratio of row .* is 100; expected a share"):
        DCPT().fit(params_R, tokens_R, 100 * ratio_R, np.full(len(ratio_R), 2.0))


def test_cross_domain_law_predicts_a_domain_from_its_first_steps():
    truth = DOMAIN | {"F": 0.8, "mu": 1.2, "w": 1.5}
    rng = np.random.default_rng(3)
    domains = list(zip(rng.uniform(1.0, 4.0, 7), rng.uniform(0.05, 1.0, 7), strict=True))
    scale = [column[::4] for column in runs()]

    def columns(initial: float, decline: float) -> tuple[np.ndarray, ...]:
        return (*scale, np.full(len(scale[0]), initial), np.full(len(scale[0]), decline))

    seen = [np.concatenate(c) for c in zip(*(columns(*d) for d in domains[:6]), strict=True)]
    loss_R = with_noise(planted_loss(CrossDomainDCPT, truth, *seen), 0.001, seed=4)
    law = CrossDomainDCPT().fit(*seen, loss_R)
    unseen = columns(*domains[6])
    np.testing.assert_allclose(
        law.predict(*unseen), planted_loss(CrossDomainDCPT, truth, *unseen), rtol=0.01
    )


def test_published_coefficients_give_the_published_critical_ratios(reference):
    tables = json.loads((reference / "cpt-tables" / "cpt_tables.json").read_text())
    published = tables["cmr_published_CMR_at_T100_pct"]
    assert published == {"460M": 29.8, "940M": 34.9, "1.6B": 41.4, "3.1B": 47.8}
    for size, (a, s, b) in tables["cmr_table5_R_CMR=a*T^s+b (T in 0.2B tokens)"].items():
        ratio = planted_loss(PowerChange, {"a": a, "s": s, "b": b}, np.array([100.0]))[0]
        assert round(100 * ratio, 1) == published[size]


RATIOS_C = np.array([1 / 8, 1 / 4, 1 / 3, 1 / 2])
TOKENS_T = 2e8 * np.array([2, 4, 8, 15, 25, 40, 60, 80, 100])


def planted_critical(tokens: np.ndarray) -> np.ndarray:
    """A critical ratio a D^s + b that rises with the budget, .17 to .40."""
    return 0.09 * (tokens / 2e8) ** 0.35 - 0.05


def changes(noise: float) -> tuple[np.ndarray, np.ndarray]:
    """General and domain changes whose critical ratio at a limit of .05 is the planted one."""
    rng = np.random.default_rng(5)
    excess_CT = RATIOS_C[:, None] - planted_critical(TOKENS_T)
    general_CT = 0.05 + 0.6 * excess_CT
    domain_CT = -0.3 * np.sqrt(RATIOS_C[:, None]) * (TOKENS_T / 2e8) ** 0.2
    return (
        general_CT + rng.normal(0, noise, general_CT.shape),
        domain_CT + rng.normal(0, noise, domain_CT.shape),
    )


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-3), (0.001, 0.01)])
def test_critical_ratio_is_the_planted_one_at_every_budget(noise, tolerance):
    found = critical_ratio(TOKENS_T, RATIOS_C, *changes(noise))
    inside_T = (planted_critical(TOKENS_T) > 1 / 8) & (planted_critical(TOKENS_T) < 1 / 2)
    assert (np.isfinite(found.ratio_T) == inside_T).all()
    np.testing.assert_allclose(
        found.ratio_T[inside_T], planted_critical(TOKENS_T[inside_T]), atol=tolerance
    )
    later_T = 2e8 * np.array([120.0, 150.0])  # half as far again as the longest run
    np.testing.assert_allclose(
        found.law.predict(later_T), planted_critical(later_T), atol=3 * tolerance
    )


def test_ratio_whose_domain_loss_rises_is_not_feasible():
    general_CT, domain_CT = changes(noise=0.0)
    domain_CT[2] = 0.1 * (TOKENS_T / 2e8) ** 0.2  # one third: the domain gets worse
    found = critical_ratio(TOKENS_T, RATIOS_C, general_CT, domain_CT, limit=0.1)
    assert np.nanmax(found.ratio_T) <= 1 / 3


def test_critical_ratio_outside_of_what_was_tried_is_refused():
    general_CT, domain_CT = changes(noise=0.0)
    with pytest.raises(FitError, match="Try ratios further up"):
        critical_ratio(TOKENS_T, RATIOS_C, general_CT - 1.0, domain_CT)
    with pytest.raises(FitError, match="Try ratios further down"):
        critical_ratio(TOKENS_T, RATIOS_C, general_CT + 1.0, domain_CT)
    with pytest.raises(FitError, match="expected ratios that increase"):
        critical_ratio(TOKENS_T, RATIOS_C[::-1], general_CT, domain_CT)


def test_general_loss_that_rises_and_recovers_is_followed():
    truth = {"a": -1.1, "s": -0.6, "c": 0.9, "gap": 0.4, "b": 0.2}
    change_T = planted_loss(TwoPowerChange, truth, TOKENS_T / 2e8)
    assert 0 < np.argmax(change_T) < len(TOKENS_T) - 1
    law = TwoPowerChange().fit(TOKENS_T, change_T)
    np.testing.assert_allclose(law.predict(TOKENS_T), change_T, atol=1e-6)


PARTS = [  # laws that only serve others, and are not in the registry
    LawCase(PowerChange, {"a": -300.0, "s": -0.3, "b": 0.1}),
    LawCase(
        TwoPowerChange,
        {"a": -3e4, "s": -0.5, "c": 0.002, "gap": 0.7, "b": 0.3},
        open=("a", "s", "c", "gap", "b"),
    ),
    LawCase(TokenLaw, {"E": 1.5, "A": 900.0, "alpha": 0.3}),
    LawCase(SizeLaw, {"E": 1.5, "A": 300.0, "alpha": 0.3}),
]


@pytest.mark.parametrize("case", PARTS, ids=lambda case: case.make.name)
@pytest.mark.parametrize(
    "check",
    [
        law_contract.check_derivatives_agree_with_numeric_differences,
        law_contract.check_a_batch_of_parameters_is_that_of_each,
        law_contract.check_natural_parameters_give_the_scaled_law,
        law_contract.check_units_of_the_data_do_not_matter,
        law_contract.check_runs_without_noise_are_met,
    ],
    ids=lambda check: check.__name__,
)
def test_laws_inside_other_laws_keep_the_contract(case, check):
    check(case)

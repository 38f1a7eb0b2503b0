"""The law of capacity: its allocation against a general solver, its limits and its recovery."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize

from rayx.errors import FitError
from rayx.fit.laws.capacity import Capacity, allocate
from tests.planted import planted_loss, with_noise

TRUTH = {
    "E": [1.2, 1.5, 0.9], "c": [40.0, 25.0, 60.0], "b": [0.25, 0.2, 0.3], "H": 4e6,
    "A": [900.0, 500.0, 2000.0], "a": [0.35, 0.3, 0.4],
}  # fmt: skip


def sizes(c_K, b_K, floor: float, params: float, weights_K) -> np.ndarray:
    theta = {"c": np.array([[c_K]]), "b": np.array([[b_K]]), "H": np.array([[floor]])}
    return allocate(theta, np.array([params]), np.array([weights_K])).size_SRK[0, 0]


@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_what_a_general_solver_finds(seed):
    rng = np.random.default_rng(seed)
    c_K, b_K = rng.uniform(0.1, 2.0, 4), rng.uniform(0.1, 0.8, 4)
    weights_K, floor, params = rng.dirichlet(np.full(4, 0.4)), 0.05, 3.0

    def objective(log_size_K: np.ndarray) -> float:
        return float((weights_K * c_K * np.exp(-b_K * log_size_K)).sum())

    found = minimize(
        objective,
        np.log(np.full(4, (params + 3 * floor) / 4)),
        bounds=[(np.log(floor), None)] * 4,
        constraints={"type": "eq", "fun": lambda x: np.exp(x).sum() - params - 3 * floor},
        options={"ftol": 1e-14, "maxiter": 500},
        method="SLSQP",
    )
    size_K = sizes(c_K, b_K, floor, params, weights_K)
    assert objective(np.log(size_K)) <= found.fun + 1e-9
    np.testing.assert_allclose(size_K, np.exp(found.x), rtol=2e-3)


@given(
    hnp.arrays(float, 5, elements=st.floats(0.01, 10.0)),
    hnp.arrays(float, 5, elements=st.floats(0.05, 1.5)),
    hnp.arrays(float, 5, elements=st.floats(0.0, 1.0)).filter(lambda w: w.sum() > 0.1),
    st.floats(1e-3, 1.0),
    st.floats(1.0, 100.0),
)
@settings(max_examples=60, deadline=None)
def test_allocation_spends_the_budget_and_keeps_the_floor(c_K, b_K, weights_K, floor, params):
    size_K = sizes(c_K, b_K, floor, params, weights_K / weights_K.sum())
    assert size_K.sum() == pytest.approx(params + 4 * floor, rel=1e-9)
    assert (size_K >= floor * (1 - 1e-12)).all()


def test_domains_alike_share_alike_and_an_absent_one_keeps_the_floor():
    even_K = sizes(np.ones(4), np.full(4, 0.3), 0.1, 2.0, np.full(4, 0.25))
    np.testing.assert_allclose(even_K, (2.0 + 3 * 0.1) / 4)
    absent_K = sizes(np.ones(3), np.full(3, 0.3), 0.1, 2.0, np.array([0.5, 0.5, 0.0]))
    np.testing.assert_allclose(absent_K, [1.05, 1.05, 0.1])


def test_model_smaller_than_what_all_domains_share_serves_all_with_all_of_it():
    np.testing.assert_allclose(
        sizes(np.array([1.0, 3.0]), np.array([0.3, 0.5]), 5.0, 2.0, np.array([0.1, 0.9])), 2.0
    )


def test_one_domain_alone_follows_the_law_of_size_and_tokens():
    params_R, tokens_R = np.geomspace(1e7, 1e9, 9), np.geomspace(1e9, 1e11, 9)
    truth = {name: value[:1] if np.ndim(value) else value for name, value in TRUTH.items()}
    loss_R = planted_loss(Capacity, truth, params_R, tokens_R, np.zeros(9), np.ones((9, 1)))
    np.testing.assert_allclose(
        loss_R, 1.2 + 40.0 * params_R**-0.25 + 900.0 * tokens_R**-0.35, rtol=1e-10
    )


def rows(num_runs: int, seed: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    weights_UK = rng.dirichlet(np.full(3, 0.8), num_runs)
    weights_UK = np.maximum(weights_UK, 0.01) / np.maximum(weights_UK, 0.01).sum(1, keepdims=True)
    params_U = rng.choice([1e7, 3e7, 1e8, 4e8], num_runs)
    tokens_U = np.exp(rng.uniform(np.log(3e8), np.log(3e10), num_runs))
    target_R = np.tile(np.arange(3.0), num_runs)
    return params_U.repeat(3), tokens_U.repeat(3), target_R, weights_UK.repeat(3, axis=0)


def test_law_of_capacity_is_found_again_and_predicts_a_larger_model():
    columns = rows(80, seed=0)
    loss_R = with_noise(planted_loss(Capacity, TRUTH, *columns), 0.001, seed=1)
    law = Capacity().fit(*columns, loss_R)
    assert law.params_["H"] == pytest.approx(TRUTH["H"], rel=0.3)
    for name in ("b", "a"):
        learned_K = [law.params_[f"{name}/{k}"] for k in range(3)]
        np.testing.assert_allclose(learned_K, TRUTH[name], rtol=0.25)
    _, _, target_M, weights_MK = rows(40, seed=2)
    larger = (np.full(120, 3e9), np.full(120, 2e11), target_M, weights_MK)
    np.testing.assert_allclose(
        law.predict(*larger), planted_loss(Capacity, TRUTH, *larger), rtol=0.02
    )


def test_law_of_capacity_refuses_the_loss_of_an_absent_domain_and_an_unknown_one():
    params_R, tokens_R, target_R, weights_RK = rows(20, seed=3)
    weights_RK[4] = [0.5, 0.0, 0.5]
    with pytest.raises(FitError, match="row 4 is the loss of domain 1, whose weight is 0"):
        Capacity().fit(params_R, tokens_R, target_R, weights_RK, np.full(60, 2.0))
    target_R[2] = 3.0
    with pytest.raises(FitError, match="target of row 2 is 3; expected .* 0 to 2"):
        Capacity().fit(params_R, tokens_R, target_R, weights_RK, np.full(60, 2.0))

"""What every law does. Use: `@pytest.mark.parametrize("case", CASES)` over LawCase.

A case is one line: the law, the true values of its parameters, and what its kind needs. The runs
are drawn from the law itself, with noise on the log loss.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest

from rayx.errors import FitError
from rayx.fit.laws import Law, extrapolate
from rayx.fit.laws.extrapolate import run_sizes

NUM_DOMAINS = 3
Columns = dict[str, np.ndarray]


@dataclass(frozen=True)
class LawCase:
    make: Callable[..., Law]
    truth: Mapping[str, float | list[float]]  # a list for one value a domain
    draw: Mapping[str, Callable[[np.random.Generator, int, Columns], np.ndarray]] = field(
        default_factory=dict
    )  # input -> (rng, rows, inputs so far) -> column, where `draw_inputs` does not fit the law
    rows: int = 120
    noise: float = 0.005  # standard deviation of the log loss (of the loss, over its median)
    open: tuple[str, ...] = ()  # parameters that such runs do not determine
    permutable: bool = True  # domains are alike
    draws: int = 4  # of the quick check of intervals


DRAWS: dict[str, Callable[[np.random.Generator, int, Columns], np.ndarray]] = {
    "params": lambda rng, n, c: rng.choice(np.geomspace(5e7, 1e10, 10), n),
    "tokens": lambda rng, n, c: np.exp(rng.uniform(np.log(1e9), np.log(5e11), n)),
    "spec_tokens": lambda rng, n, c: (
        c["tokens"] * np.where(rng.random(n) < 0.2, 0.0, np.exp(rng.uniform(-7.0, 1.0, n)))
    ),
    "unique_tokens": lambda rng, n, c: c["tokens"] / np.exp(rng.uniform(0.0, np.log(60.0), n)),
    "ratio": lambda rng, n, c: rng.uniform(0.02, 1.0, n),
    "weights": lambda rng, n, c: rng.dirichlet(np.full(NUM_DOMAINS, 0.8), n),
    "initial_loss": lambda rng, n, c: rng.uniform(1.5, 4.0, n),
    "decline": lambda rng, n, c: rng.uniform(0.05, 0.5, n),
}


def draw_inputs(case: LawCase, rows: int, seed: int) -> Columns:
    """Draw the law's inputs; tokens before what depends on them."""
    rng = np.random.default_rng(seed)
    columns: Columns = {}
    for name in case.make().inputs:
        columns[name] = case.draw.get(name, DRAWS.get(name))(rng, rows, columns)
    return columns


def theta_of(case: LawCase) -> dict[str, np.ndarray]:
    return {
        name: np.array(value, dtype=float)[None, None] if isinstance(value, list)
        else np.array([[value]], dtype=float)
        for name, value in case.truth.items()
    }  # fmt: skip


def true_loss(case: LawCase, columns: Columns) -> np.ndarray:
    return case.make().loss(theta_of(case), columns)[0][0]


def draw_runs(
    case: LawCase, seed: int, rows: int | None = None, noise: float | None = None
) -> tuple[np.ndarray, ...]:
    """The law's columns and a noisy loss, as `fit` takes them."""
    columns = draw_inputs(case, rows or case.rows, seed)
    loss_R = true_loss(case, columns)
    noise = case.noise if noise is None else noise
    error_R = np.random.default_rng(seed + 10**6).normal(0.0, noise, len(loss_R))
    loss_R = (
        loss_R * np.exp(error_R)
        if case.make().on_log
        else loss_R + error_R * np.median(np.abs(loss_R))
    )
    return (*columns.values(), loss_R)


def coverage(case: LawCase, draws: int, bootstrap: int) -> tuple[int, int]:
    """Count true values of determined parameters inside their 95% intervals: (inside, all)."""
    flat = {}
    for name, value in case.truth.items():
        if isinstance(value, list):
            flat |= {f"{name}/{k}": v for k, v in enumerate(value)}
        else:
            flat[name] = value
    inside = total = 0
    for seed in range(draws):
        law = case.make(bootstrap=bootstrap, seed=seed).fit(*draw_runs(case, seed))
        for name, value in flat.items():
            if name not in case.open and name.partition("/")[0] not in case.open:
                low, high = law.intervals_[name]
                inside += low <= value <= high
                total += 1
    return inside, total


def check_derivatives_agree_with_numeric_differences(case: LawCase) -> None:
    law, columns, theta = case.make(), draw_inputs(case, 9, 1), theta_of(case)
    _, derivatives = law.loss(theta, columns)
    assert set(derivatives) == {p.name for p in law.parameters()} == set(theta)
    for name, value in theta.items():
        for k in np.ndindex(value.shape[2:]):
            at = (0, 0, *k)
            step = 1e-6 * max(abs(value[at]), 1e-3)
            sides = []
            for sign in (1, -1):
                moved = value.copy()
                moved[at] += sign * step
                sides.append(law.loss({**theta, name: moved}, columns)[0][0])
            numeric_R = (sides[0] - sides[1]) / (2 * step)
            analytic_R = derivatives[name][0] if not k else derivatives[name][0][:, k[0]]
            scale = np.abs(numeric_R).max() + 1e-12 / step
            np.testing.assert_allclose(analytic_R, numeric_R, rtol=1e-4, atol=1e-5 * scale)


def check_a_batch_of_parameters_is_that_of_each(case: LawCase) -> None:
    law, columns, theta = case.make(), draw_inputs(case, 7, 2), theta_of(case)
    factors = (1.0, 1.02, 0.97)
    batch = {name: np.concatenate([value * f for f in factors]) for name, value in theta.items()}
    loss_SR, derivatives = law.loss(batch, columns)
    for s, f in enumerate(factors):
        one_1R, ones = law.loss({name: value * f for name, value in theta.items()}, columns)
        np.testing.assert_allclose(loss_SR[s], one_1R[0], rtol=1e-12)
        for name, derivative in derivatives.items():
            np.testing.assert_allclose(derivative[s], ones[name][0], rtol=1e-10)


def check_natural_parameters_give_the_scaled_law(case: LawCase) -> None:
    law = case.make()
    unit = {"loss": 1.7, "params": 3.0, "tokens": 0.4}
    natural = law.natural(theta_of(case), unit)
    columns = draw_inputs(case, 12, 3)
    scaled = {
        name: array * (unit["tokens"] if name.endswith("tokens") else unit.get(name, 1.0))
        for name, array in columns.items()
    }
    np.testing.assert_allclose(
        law.loss(natural, scaled)[0][0], 1.7 * true_loss(case, columns), rtol=1e-9
    )


def check_units_of_the_data_do_not_matter(case: LawCase) -> None:
    *columns, loss_R = draw_runs(case, seed=4)
    law = case.make().fit(*columns, loss_R)
    factor = {
        name: 1e-6 if name == "params" else 1e-9 if name.endswith("tokens") else 1.0
        for name in law.inputs
    }
    scaled = [array * factor[name] for name, array in zip(law.inputs, columns, strict=True)]
    other = case.make().fit(*scaled, loss_R / np.log(2.0))
    assert other.objective_ == pytest.approx(law.objective_, rel=1e-6)
    np.testing.assert_allclose(
        other.predict(*scaled) * np.log(2.0), law.predict(*columns), rtol=1e-5
    )


def check_order_of_rows_does_not_matter(case: LawCase) -> None:
    *columns, loss_R = draw_runs(case, seed=5)
    order = np.random.default_rng(0).permutation(len(loss_R))
    law = case.make(drop_highest=2).fit(*columns, loss_R)
    other = case.make(drop_highest=2).fit(*(c[order] for c in columns), loss_R[order])
    assert other.objective_ == pytest.approx(law.objective_, rel=1e-7)
    np.testing.assert_allclose(other.predict(*columns), law.predict(*columns), rtol=1e-5)


def check_order_of_domains_does_not_matter(case: LawCase) -> None:
    if "weights" not in case.make().inputs or not case.permutable:
        return
    *columns, loss_R = draw_runs(case, seed=6)
    at = case.make().inputs.index("weights")
    law = case.make().fit(*columns, loss_R)
    permuted = [c[:, ::-1] if i == at else c for i, c in enumerate(columns)]
    other = case.make().fit(*permuted, loss_R)
    np.testing.assert_allclose(other.predict(*permuted), law.predict(*columns), rtol=1e-4)


def check_runs_without_noise_are_met(case: LawCase) -> None:
    *columns, loss_R = draw_runs(case, seed=7, noise=0.0)
    law = case.make().fit(*columns, loss_R)
    scale_R = loss_R if law.on_log else np.median(np.abs(loss_R))
    assert np.abs((law.predict(*columns) - loss_R) / scale_R).max() < 2e-4
    for name, value in case.truth.items():
        if name not in case.open:
            np.testing.assert_allclose(getattr(law, f"{name}_"), value, rtol=0.02, err_msg=name)


def check_intervals_hold_the_truth(case: LawCase) -> None:
    inside, total = coverage(case, draws=case.draws, bootstrap=100)
    # Few draws, and a fit's parameters fail together: tests/test_laws.py has 200 draws, slow.
    assert inside / total > 0.75, (inside, total)


def check_wrong_form_is_flagged_and_the_right_one_is_not(case: LawCase) -> None:
    *columns, loss_R = draw_runs(case, seed=8)
    right = extrapolate(case.make(), *columns, loss_R)
    assert not right.wrong_form, right
    size_R = _size(case, columns)
    beyond_R = np.maximum(np.log(size_R / np.quantile(size_R, 0.8)), 0.0)
    beyond_R = np.where(beyond_R > 0, 0.3 + 0.1 * beyond_R, 0.0)  # the law stops to hold there
    spoilt_R = loss_R * np.exp(beyond_R)
    wrong = extrapolate(case.make(), *columns, spoilt_R)
    assert wrong.wrong_form and wrong.warnings and wrong.bias * np.median(loss_R) < 0, wrong


def _size(case: LawCase, columns: list[np.ndarray]) -> np.ndarray:
    return run_sizes(dict(zip(case.make().inputs, columns, strict=True)))[1]


def check_bad_columns_are_refused(case: LawCase) -> None:
    *columns, loss_R = draw_runs(case, seed=9, rows=60)
    law = case.make()
    with pytest.raises(FitError, match="not fitted"):
        law.predict(*columns)
    with pytest.raises(FitError, match="Loss of row 3 is nan"):
        law.fit(*columns, np.where(np.arange(60) == 3, np.nan, loss_R))
    first = columns[0].copy()
    first[5] = -1.0
    with pytest.raises(FitError, match=f"Column {law.inputs[0]}, row 5: the value is -1"):
        law.fit(first, *columns[1:], loss_R)
    with pytest.raises(FitError, match="columns"):
        law.fit(*columns)
    if "weights" in law.inputs:
        law.fit(*columns, loss_R)
        more = [np.pad(c, ((0, 0), (0, 1))) if c.ndim == 2 else c for c in columns]
        with pytest.raises(FitError, match="4 domains; the law was fitted on 3"):
            law.predict(*more)
    with pytest.raises(FitError, match="delta is 0"):
        case.make(delta=0.0)
    with pytest.raises(FitError, match="too few"):
        law.fit(*(c[:4] for c in columns), loss_R[:4])


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]

"""Stacks that targets decide together, and the race that gives up candidates far behind."""

import dataclasses

import numpy as np
import pytest

from rayx.fit import Mean, Ridge, Table
from rayx.fit.race import Job, survivors
from rayx.fit.stacking import stacked_shares


def residuals(num, sds, seed, common=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (num, len(sds))) * sds + common * rng.normal(0, 1, (num, 1))


def test_shares_go_with_the_inverse_variance_of_independent_errors():
    shares = stacked_shares({"t": residuals(20000, [1.0, 3.0, 0.5], seed=0)})["t"]
    inverse = 1.0 / np.square([1.0, 3.0, 0.5])
    expected = np.where(inverse / inverse.sum() < 0.05, 0.0, inverse)
    np.testing.assert_allclose(shares, expected / expected.sum(), atol=0.02)


def test_shares_are_the_least_error_on_a_grid_of_the_simplex():
    by_target = {"t": residuals(60, [1.0, 1.1, 1.3], seed=1, common=0.7)}
    shares = stacked_shares(by_target)["t"]
    error = np.mean((by_target["t"] @ shares) ** 2)
    grid = np.array([(i, j, 20 - i - j) for i in range(21) for j in range(21 - i)]) / 20
    assert error <= np.mean((by_target["t"] @ grid.T) ** 2, axis=0).min() + 1e-3
    assert shares.sum() == pytest.approx(1.0) and (shares >= 0).all()


def test_many_targets_overrule_the_luck_of_one():
    # The first regressor is better on all targets, but by luck not on the eight rows of "few".
    by_target = {f"t{i}": residuals(200, [1.0, 1.6], seed=i) for i in range(8)}
    by_target["few"] = residuals(8, [1.3, 1.0], seed=99)
    alone, together = (stacked_shares(by_target, pooling)["few"] for pooling in (0.0, 4.0))
    assert alone[0] < 0.5 < together[0]


def test_an_exact_regressor_takes_all_and_units_do_not_matter():
    exact = residuals(50, [1.0, 1.0], seed=3) * [1.0, 0.0]
    np.testing.assert_array_equal(stacked_shares({"t": exact})["t"], [0.0, 1.0])
    by_target = {"a": residuals(80, [1.0, 1.2], seed=4), "b": residuals(80, [1.2, 1.0], seed=5)}
    scaled = by_target | {"b": 1000.0 * by_target["b"]}
    for target, share_C in stacked_shares(by_target).items():
        np.testing.assert_allclose(stacked_shares(scaled)[target], share_C, atol=1e-9)


def linear_table():
    rng = np.random.default_rng(0)
    weights_RK = rng.dirichlet(np.ones(3), 60)
    clear_R = weights_RK @ [1.0, 2.0, 3.0] + rng.normal(0, 0.01, 60)
    noise_RM = rng.normal(2.0, 0.1, (60, 5))
    return Table(
        run_ids=tuple(map(str, range(60))),
        domains=("a", "b", "c"),
        targets=("clear", *(f"noise{i}" for i in range(5))),
        weights_RK=weights_RK,
        losses_RM=np.hstack([clear_R[:, None], noise_RM]),
    )


@dataclasses.dataclass
class Upside(Ridge):
    """Ridge with its sign turned round: always far behind."""

    def fit_point(self, weights_RK, loss_R):
        predict = super().fit_point(weights_RK, loss_R)
        return lambda weights_MK: 10.0 - predict(weights_MK)


def test_race_gives_up_those_far_behind_and_keeps_specialists():
    table = linear_table()
    jobs = {
        (target, name): Job.of(table, target, candidate, seed=0)
        for target in table.targets
        for name, candidate in {"mean": Mean(), "ridge": Ridge(), "upside": Upside()}.items()
    }
    for job in jobs.values():
        job.start()
        assert len(job.first) == 2
    # Ridge is ahead for one target of six only, but there by far.
    assert survivors(jobs) == {"mean", "ridge"}


def test_a_race_in_two_goes_is_the_same_cross_validation():
    table = linear_table()
    job, whole = (Job.of(table, "clear", Ridge(), seed=0) for _ in range(2))
    job.start()
    np.testing.assert_array_equal(job.finish().oof_R, whole.finish().oof_R)

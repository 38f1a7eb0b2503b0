"""Trained and merged candidates in one table: planted factors, and merges that tell nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.errors import FitError
from rayx.fit import AVERAGE, Table, fit_table, join_kinds, largest_scale
from rayx.fit.belief import group_means, mixtures_of, noise_of, spearman_interval
from rayx.fit.factor import estimate, partners
from rayx.fit.kinds import _picked
from rayx.fit.scores import spearman
from tests.both_kinds import SHIFT, SLOPE, both_kinds

WEIGHTS = ("weight/web", "weight/code", "weight/math", "weight/books")


def arrays(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mixtures and losses of the merged rows, then of the trained ones."""
    parts = []
    for kind in ("merge", "train"):
        rows = frame[frame["kind"] == kind]
        parts += [rows[list(WEIGHTS)].to_numpy(), rows["loss/web"].to_numpy()]
    return parts[0], parts[1], parts[2], parts[3]


@pytest.mark.parametrize("pairs", [0, 12])
def test_factor_is_found_within_its_standard_errors(pairs):
    missed = []
    for seed in range(20):
        frame, world = both_kinds(12, 60, pairs, seed=seed)
        merged_MK, merged_M, trained_TK, trained_T = arrays(frame)
        found = estimate(merged_MK, merged_M, trained_TK, trained_T)
        # The planted shift is at the mean of the trained scale, the factor's at the merged one's.
        centre = np.log(world.loss(merged_MK, 1e6, 1e6)).mean()
        shift = centre + SHIFT + SLOPE * (found.centre - centre) - found.centre
        missed.append(
            [(found.shift - shift) / found.shift_se, (found.slope - SLOPE) / found.slope_se]
        )
        assert 0.6 < found.slope < 1.0
    # Of 40 intervals of 2 standard errors about 2 are missed by chance.
    assert np.mean(np.abs(missed) < 2.0) >= 0.8
    assert np.abs(np.mean(missed, axis=0)).max() < 0.8


def test_factor_slope_stays_near_one_where_two_runs_say_little():
    frame, _ = both_kinds(2, 30, seed=1, run_noise=0.05)
    found = estimate(*arrays(frame))
    assert 0.5 < found.slope < 2.0
    assert found.slope_se > 0.05


def test_factor_tilt_is_found_where_the_gap_depends_on_the_mixture():
    frame, _ = both_kinds(30, 60, 30, seed=2)
    merged_MK, merged_M, trained_TK, trained_T = arrays(frame)
    tilt_M = 0.3 * (merged_MK[:, 0] - merged_MK[:, 0].mean())
    found = estimate(merged_MK, merged_M * np.exp(-tilt_M), trained_TK, trained_T)
    assert spearman(found.tilts(merged_MK), tilt_M) > 0.9
    flat = estimate(merged_MK, merged_M, trained_TK, trained_T)
    assert flat.tilts(merged_MK).std() < 0.1 * tilt_M.std()


def test_joint_fit_ranks_new_mixtures_better_than_few_trained_runs_alone():
    new_MK = np.random.default_rng(1).dirichlet(np.ones(4), 300)
    errors = {"alone": [], "joint": []}
    for seed in range(3):
        frame, world = both_kinds(12, 150, seed=seed)
        truth_M = world.loss(new_MK, 1e6, 1e6)[:, 0]
        tables = {"joint": join_kinds(frame), "alone": Table.from_frame(frame[:12])}
        for name, table in tables.items():
            predicted_M = fit_table(table, "tilted-power").predict(new_MK)[:, 0]
            errors[name].append([1 - spearman(predicted_M, truth_M), _rms(predicted_M - truth_M)])
    alone, joint = (np.mean(errors[name], axis=0) for name in ("alone", "joint"))
    assert (joint < 0.6 * alone).all()


@pytest.mark.parametrize("mode", ["noise", "against"])
def test_merged_rows_that_tell_nothing_are_left_out(mode):
    frame, _ = both_kinds(16, 40, 16, mode=mode, num_targets=2)
    table = join_kinds(frame)
    alone = Table.from_frame(frame[:16])
    assert table.run_ids == alone.run_ids and table.merged_R is None
    np.testing.assert_array_equal(table.losses_RM, alone.losses_RM)
    np.testing.assert_allclose(table.weights_RK, alone.weights_RK, rtol=1e-14)
    assert table.joint is not None and not any(belief.kept for belief in table.joint.beliefs)
    assert "left out" in table.warnings[0]
    average = table.joint.beliefs[-1]
    assert average.spearman < (0.6 if mode == "noise" else -0.8)


@pytest.fixture(scope="module")
def joined() -> Table:
    """20 trained and 50 merged rows of two targets, 10 pairs, two losses missing."""
    frame, _ = both_kinds(20, 50, 10, num_targets=2, seed=4)
    frame.loc[3, "loss/web"] = np.nan  # trained
    frame.loc[25, "loss/code"] = np.nan  # merged
    return join_kinds(frame)


def test_join_puts_merged_rows_on_the_trained_scale_and_tells_what_it_found(joined):
    _, world = both_kinds(20, 50, 10, num_targets=2, seed=4)
    assert joined.joint is not None and joined.merged_R is not None
    assert joined.merged_R.sum() == 50 and len(joined) == 70
    truth_RT = world.loss(joined.weights_RK, 1e6, 1e6)
    error_RT = np.log(joined.losses_RM) - np.log(truth_RT)
    assert np.nanmax(np.abs(error_RT[joined.merged_R])) < 0.03  # 0.05 and more before
    assert np.isnan(joined.losses_RM).sum() == 2
    web, code, average = joined.joint.beliefs
    assert (web.target, code.target, average.target) == ("web", "code", AVERAGE)
    assert (web.trained, web.merged, web.pairs) == (19, 50, 9)
    assert (code.trained, code.merged, code.pairs) == (20, 49, 9)
    for belief in joined.joint.beliefs:
        assert belief.basis == "pairs" and belief.kept and belief.judged
        assert 0.8 < belief.spearman_low <= belief.spearman <= belief.spearman_high <= 1
        assert belief.joint_bpb < belief.alone_bpb
        assert belief.gap_bpb < -0.05
    points = joined.joint.points
    assert (points["target"] == "web").sum() == 9
    assert any("2 losses are missing" in warning for warning in joined.warnings)
    assert any("20 trained and 50 merged" in warning for warning in joined.warnings)


def test_join_is_deterministic_and_blind_to_the_order_of_columns(joined):
    frame, _ = both_kinds(20, 50, 10, num_targets=2, seed=4)
    frame.loc[3, "loss/web"] = np.nan
    frame.loc[25, "loss/code"] = np.nan
    again = join_kinds(frame)
    np.testing.assert_array_equal(again.losses_RM, joined.losses_RM)
    assert again.joint is not None and joined.joint is not None
    assert again.joint.to_json() == joined.joint.to_json()


def test_join_partners_share_a_mixture_so_that_folds_never_part_them():
    frame, _ = both_kinds(12, 12, 12, seed=6)
    frame.loc[frame["kind"] == "merge", list(WEIGHTS)] += [4e-5, -4e-5, 0.0, 0.0]
    table = join_kinds(frame)
    assert table.joint is not None and table.joint.beliefs[0].pairs == 12
    assert len(np.unique(table.weights_RK, axis=0)) == 12


def test_join_without_pairs_compares_through_the_law_of_the_merged_rows():
    frame, _ = both_kinds(12, 60, 0, seed=3)
    table = join_kinds(frame)
    assert table.joint is not None
    belief = table.joint.beliefs[0]
    assert (belief.pairs, belief.basis) == (0, "law")
    assert belief.spearman > 0.9 and belief.gap_bpb < -0.03
    assert len(table.joint.points[table.joint.points["target"] == "web"]) == 12


def test_join_few_trained_rows_translate_but_are_said_to_check_nothing():
    frame, _ = both_kinds(4, 30, 4, seed=3)
    table = join_kinds(frame)
    assert table.joint is not None and len(table) == 34
    assert not any(belief.judged for belief in table.joint.beliefs)
    assert "unchecked where fewer than 8 trained" in table.joint.words


def test_one_kind_is_as_before():
    frame, _ = both_kinds(12, 12, seed=3)
    for kind in ("train", "merge"):
        rows = frame[frame["kind"] == kind]
        plain, table = Table.from_frame(rows), join_kinds(rows)
        assert table.joint is None and table.merged_R is None
        assert table.warnings == plain.warnings
        np.testing.assert_array_equal(table.losses_RM, plain.losses_RM)
    assert "all 12 runs are merged" in table.warnings[0]
    with pytest.raises(FitError, match=r"2 kinds \(merge, train\).*join_kinds"):
        Table.from_frame(frame)


def test_failed_merges_do_not_make_two_kinds():
    frame, _ = both_kinds(12, 3, seed=3)
    frame.loc[frame["kind"] == "merge", "status"] = "failed"
    table = join_kinds(frame)
    assert table.joint is None and table.warnings == ("12 of 15 runs used; 3 failed",)


def test_join_judges_each_operator_by_itself():
    good, _ = both_kinds(16, 30, 8, seed=5)
    bad, _ = both_kinds(16, 30, 8, seed=5, mode="against")
    bad = bad[bad["kind"] == "merge"].assign(operator="ties")
    bad["run_id"] = "z" + bad["run_id"]
    good["operator"] = np.where(good["kind"] == "merge", "linear", None)
    table = join_kinds(pd.concat([good, bad], ignore_index=True))
    assert table.joint is not None and len(table) == 46
    kept = {(b.group, b.target): b.kept for b in table.joint.beliefs}
    assert kept["linear", "web"] and not kept["ties", "web"]


def test_largest_scale_holds_the_merged_rows_of_the_runs_that_they_stand_for():
    frame, _ = both_kinds(10, 20)
    larger = frame[:5].assign(tokens=9, run_id=[f"v{i}" for i in range(5)])
    scale = largest_scale(pd.concat([frame, larger], ignore_index=True))
    assert sorted(scale["kind"].value_counts()) == [10, 20]


def test_intervals_of_a_joint_fit_are_those_of_trained_runs(joined):
    fitted = fit_table(joined, "tilted-power")
    assert joined.merged_R is not None
    residual_RT = joined.losses_RM - fitted.oof_RT
    trained_T = np.sqrt(np.nanmean(residual_RT[~joined.merged_R] ** 2, axis=0))
    std_T = np.median(fitted.predict(joined.weights_RK, std=True)[1], axis=0)
    assert (std_T > 0.5 * trained_T).all() and (std_T < 2.0 * trained_T).all()
    # Without the kinds, all rows count alike: the bare models are those of the same rows.
    bare = dataclasses.replace(fitted, table=dataclasses.replace(joined, merged_R=None, joint=None))
    np.testing.assert_array_equal(
        bare.predict(joined.weights_RK[:5]), fitted.predict(joined.weights_RK[:5])
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 900), st.integers(0, 500), st.integers(0, 10))
def test_picked_rows_hold_all_the_paired_ones_in_order(num, num_paired, seed):
    paired_M = np.arange(num) < num_paired
    np.random.default_rng(seed).shuffle(paired_M)
    picked = _picked(paired_M)
    assert (np.diff(picked) > 0).all() and set(np.flatnonzero(paired_M)) <= set(picked)
    assert len(picked) <= max(400, paired_M.sum() + 200)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_mixtures_and_their_means_follow_the_rows(numbers):
    weights_RK = np.eye(5)[numbers] + 1e-6
    number_R = mixtures_of(weights_RK)
    assert len(set(number_R)) == len(set(numbers))
    values_R = np.arange(len(numbers), dtype=float)
    mean_U = group_means(values_R[:, None], number_R, len(set(numbers)))[:, 0]
    for mixture in set(number_R):
        assert mean_U[mixture] == pytest.approx(values_R[number_R == mixture].mean())
    assert np.isnan(noise_of(values_R, number_R)) == (len(set(numbers)) == len(numbers))


@settings(max_examples=20, deadline=None)
@given(st.integers(5, 30), st.integers(0, 100))
def test_spearman_interval_holds_the_value_of_equal_ranks(num, seed):
    a_U = np.random.default_rng(seed).standard_normal(num)
    assert spearman_interval(a_U, np.exp(a_U), seed) == pytest.approx((1.0, 1.0))
    low, high = spearman_interval(a_U, np.ones(num), seed)
    assert low == high == 0.0


def test_partners_are_within_the_tolerance_in_every_share():
    trained_TK = np.array([[0.5, 0.5], [0.2, 0.8]])
    merged_MK = np.array([[0.50005, 0.49995], [0.2002, 0.7998], [0.2, 0.8]])
    np.testing.assert_array_equal(
        partners(trained_TK, merged_MK), [[True, False, False], [False, False, True]]
    )


def _rms(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))

"""Choosing regressors by cross-validation, uncertainty of objectives, and the fit command."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from rayx.errors import FitError
from rayx.fit import Mean, Ridge, Table, evaluate_fit, fit_table, score
from rayx.fit.scores import has_signal, spearman
from tests.contracts.regressor_contract import draw_mixtures, draw_world, planted_loss

DOMAINS: tuple[str, ...] = ("a", "b", "c", "d", "e")


def make_table(num=60, seed=0, noise=0.01):
    """Three targets: the planted law, noise alone, and a linear one that goes below 0."""
    weights_RK, planted_R = draw_world(num, seed, noise)
    rng = np.random.default_rng(seed + 50)
    linear_R = weights_RK @ np.array([1.0, -1.0, 0.5, 0.0, 0.0]) + rng.normal(0, noise, num)
    return Table(
        run_ids=tuple(f"r{i}" for i in range(num)),
        domains=DOMAINS,
        targets=("planted", "noise", "linear"),
        weights_RK=weights_RK,
        losses_RM=np.stack([planted_R, rng.normal(3.0, 0.1, num), linear_R], axis=1),
    )


def only(table, target):
    column = [table.targets.index(target)]
    return dataclasses.replace(table, targets=(target,), losses_RM=table.losses_RM[:, column])


@pytest.fixture(scope="module")
def fitted():
    return fit_table(make_table())


def test_auto_averages_by_cross_validation_and_says_no_signal_with_the_reason(fitted):
    assert "power" in fitted.regressors["planted"]
    assert "ridge" in fitted.regressors["linear"]
    assert fitted.no_signal == ("noise",) and fitted.regressors["noise"] == "mean"
    (words,) = [note for note in fitted.warnings if note.startswith("no signal in noise: ")]
    assert "60 rows of noise reach 0.34 by chance" in words and "explains" in words
    assert "linear: gp left out, it needs losses above 0" in fitted.warnings
    cv = fitted.cv
    assert list(cv.columns) == ["target", "regressor", "spearman", "r2", "mse", "chosen"]
    assert (cv.groupby("target")["chosen"].sum() == 1).all()
    for target in ("planted", "linear"):
        of_target = cv[cv["target"] == target]
        chosen_mse = of_target.loc[of_target["chosen"], "mse"].item()
        # Other targets have a say, so the least error of the target itself may be a little less.
        assert chosen_mse < 1.1 * of_target["mse"].min()


def test_oof_predictions_come_from_models_without_the_row(fitted):
    spoilt = fitted.table.losses_RM.copy()
    spoilt[7, 0] *= 1.1
    again = fit_table(dataclasses.replace(fitted.table, losses_RM=spoilt), Ridge())
    clean = fit_table(fitted.table, Ridge())
    change_R = np.abs(again.oof_RT / clean.oof_RT - 1)[:, 0]
    assert change_R[7] < 1e-9 and np.median(change_R) > 1e-4


def test_fit_table_is_deterministic_and_counts_progress(fitted):
    steps = []
    again = fit_table(make_table(), progress=lambda *step: steps.append(step))
    pd.testing.assert_frame_equal(again.cv, fitted.cv, rtol=1e-6)
    test_MK = draw_mixtures(20, seed=1)
    np.testing.assert_allclose(again.predict(test_MK), fitted.predict(test_MK), rtol=1e-6)
    assert [step[:2] for step in steps] == [(i + 1, 48) for i in range(48)]
    assert steps[0][2] == "planted: mean, first folds" and steps[-1][2] == "linear: lightgbm"


def test_noise_alone_is_called_no_signal_in_nearly_all_draws():
    weights_RK = draw_mixtures(48, seed=0)
    rng = np.random.default_rng(0)
    targets = tuple(f"t{i}" for i in range(40))
    table = Table(
        run_ids=tuple(map(str, range(48))),
        domains=DOMAINS,
        targets=targets,
        weights_RK=weights_RK,
        losses_RM=rng.normal(3.0, 0.1, (48, 40)),
    )
    assert len(fit_table(table, "ridge").no_signal) >= 38
    assert not has_signal({"r2": -0.1, "spearman": 0.9}, 50)
    assert has_signal({"r2": 0.8, "spearman": 0.9}, 12)


def test_missing_losses_are_masked_for_their_target_only(fitted):
    losses_RM = fitted.table.losses_RM.copy()
    losses_RM[:10, 0] = np.nan
    holed = fit_table(dataclasses.replace(fitted.table, losses_RM=losses_RM), Ridge())
    full = fit_table(fitted.table, Ridge())
    test_MK = draw_mixtures(20, seed=1)
    np.testing.assert_allclose(holed.predict(test_MK)[:, 2], full.predict(test_MK)[:, 2], rtol=1e-9)
    assert np.isnan(holed.oof_RT[:10, 0]).all() and np.isfinite(holed.oof_RT[10:]).all()
    rest = Ridge().fit(fitted.table.weights_RK[10:], losses_RM[10:, 0])
    np.testing.assert_allclose(holed.predict(test_MK)[:, 0], rest.predict(test_MK))
    losses_RM[:53, 0] = np.nan
    with pytest.raises(FitError, match="Target 'planted' has 7 losses; expected at least 8"):
        fit_table(dataclasses.replace(fitted.table, losses_RM=losses_RM), Ridge())


def test_intervals_cover_new_runs_at_about_their_level():
    # One table of 60 runs misses its level by a few points; the mean over tables must not.
    test_MK, loss_M = draw_world(500, seed=77, noise=0.02)
    tables = [only(make_table(60, seed * 10, noise=0.02), "planted") for seed in range(6)]
    fits = [fit_table(table, "inverse-power") for table in tables]
    for level, least, most in ((0.5, 0.42, 0.65), (0.9, 0.85, 0.97)):
        covered = []
        for fitted in fits:
            low_MT, high_MT = fitted.interval(test_MK, level)
            covered.append(np.mean((low_MT[:, 0] <= loss_M) & (loss_M <= high_MT[:, 0])))
        assert least <= np.mean(covered) <= most


def test_objective_uncertainty_is_that_of_the_weighted_sum():
    # Two targets with opposite noise: each is uncertain, their mean is not.
    weights_RK = draw_mixtures(100, seed=0)
    noise_R = np.random.default_rng(1).normal(0, 0.2, 100)
    loss_R = planted_loss(weights_RK)
    table = Table(
        run_ids=tuple(map(str, range(100))),
        domains=DOMAINS,
        targets=("up", "down"),
        weights_RK=weights_RK,
        losses_RM=np.stack([loss_R + noise_R, loss_R - noise_R], axis=1),
    )
    fitted = fit_table(table, Ridge())
    test_MK = draw_mixtures(30, seed=2)
    value_M, std_M = fitted.objective(test_MK, {"up": 5, "down": 5}, std=True)
    losses_MT, std_MT = fitted.predict(test_MK, std=True)
    np.testing.assert_allclose(value_M, losses_MT.mean(1))
    assert (std_M < 0.5 * std_MT.min(1)).all()
    low_M, high_M = fitted.objective_interval(test_MK, {"up": 1, "down": 1})
    assert ((low_M < value_M) & (value_M < high_M)).all()
    gap, low, high = fitted.difference(test_MK[0], test_MK[1], {"up": 1, "down": 1})
    assert gap == pytest.approx(value_M[0] - value_M[1]) and low < gap < high
    assert fitted.difference(test_MK[0], test_MK[1], {"up": 1})[2] > high  # one target: wider
    _, two_low, two_high = fitted.difference(
        test_MK[0], test_MK[1], {"up": 1, "down": 1}, one_run_each=True
    )
    assert two_high >= high and two_low <= low  # noise of two runs on top


def linear_table(num, seed, noise):
    """Two targets of known slopes, with noise that is common to them in part, as a run's is."""
    rng = np.random.default_rng(seed)
    weights_RK = rng.dirichlet(np.full(5, 0.6), num)
    slope_KT = rng.normal(0.0, 0.3, (5, 2))
    common_R1 = rng.normal(0.0, noise, (num, 1))
    table = Table(
        run_ids=tuple(map(str, range(num))),
        domains=DOMAINS,
        targets=("x", "y"),
        weights_RK=weights_RK,
        losses_RM=3.0 + weights_RK @ slope_KT + common_R1 + rng.normal(0.0, noise, (num, 2)),
    )
    return table, slope_KT


def test_expected_difference_covers_the_true_one_at_about_its_level():
    objective, covered, runs_covered = {"x": 0.5, "y": 0.5}, [], []
    for seed in range(40):
        table, slope_KT = linear_table(48, seed, noise=0.05)
        fitted = fit_table(table, "ridge")
        rng = np.random.default_rng(seed + 1000)
        for w_K, v_K in rng.dirichlet(np.full(5, 0.6), (10, 2)):
            true = float(((w_K - v_K) @ slope_KT).mean())
            _, low, high = fitted.difference(w_K, v_K, objective)
            covered.append(low <= true <= high)
            noise_22 = rng.normal(0.0, 0.05, (2, 2)).mean(1) + rng.normal(0.0, 0.05, 2)
            _, low, high = fitted.difference(w_K, v_K, objective, one_run_each=True)
            runs_covered.append(low <= true + noise_22[0] - noise_22[1] <= high)
    assert 0.85 < np.mean(covered) < 0.97
    assert 0.85 < np.mean(runs_covered) < 0.97


def test_expected_difference_of_a_regressor_of_the_wrong_form_says_so():
    # Scheffe's polynomial cannot follow the law near 0, where all folds' models err alike.
    covered, without = [], []
    for seed in range(12):
        weights_RK, loss_R = draw_world(150, seed * 3, noise=0.002)
        table = dataclasses.replace(
            only(make_table(150), "planted"), weights_RK=weights_RK, losses_RM=loss_R[:, None]
        )
        fitted = fit_table(table, "scheffe")
        model = fitted.models["planted"]
        for w_K, v_K in np.random.default_rng(seed).dirichlet(np.full(5, 0.6), (10, 2)):
            true = float(planted_loss(w_K[None])[0] - planted_loss(v_K[None])[0])
            gap, low, high = fitted.difference(w_K, v_K, {"planted": 1})
            covered.append(low <= true <= high)
            gaps_F = [float(np.subtract(*f(np.stack([w_K, v_K])))) for f in model.predict_folds]
            half = 1.833 * np.sqrt((len(gaps_F) - 1) * np.var(gaps_F))
            without.append(abs(gap - true) <= half)
    assert np.mean(covered) > 0.75 and np.mean(without) < 0.65


def test_expected_difference_of_a_target_without_signal_is_not_certain():
    table = only(make_table(60), "noise")
    fitted = fit_table(table, "ridge")
    gap, low, high = fitted.difference(table.weights_RK[0], table.weights_RK[1], {"noise": 1})
    assert gap == 0.0 and low < -0.01 and high > 0.01


def test_objective_of_targets_never_seen_together_has_a_std():
    table = make_table(40)
    losses_RM = table.losses_RM.copy()
    losses_RM[:20, 0], losses_RM[20:, 2] = np.nan, np.nan
    fitted = fit_table(dataclasses.replace(table, losses_RM=losses_RM), Mean())
    _, std_M = fitted.objective(table.weights_RK[:1], {"planted": 1, "linear": 3}, std=True)
    assert std_M[0] > 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda f: f.objective(draw_mixtures(2, 0), {"plantd": 1}), "Did you mean 'planted'"),
        (lambda f: f.objective(draw_mixtures(2, 0), {"planted": 0}), "is 0; expected more than 0"),
        (lambda f: f.objective(draw_mixtures(2, 0), {}), "names no target"),
        (lambda f: f.predict(np.ones((2, 4)) / 4), "4 domains; the table has 5"),
        (lambda f: f.interval(draw_mixtures(2, 0), level=90), "level of an interval is 90"),
        (lambda f: fit_table(f.table, "lightbgm"), "Did you mean 'lightgbm'"),
        (lambda f: fit_table(f.table, "gp"), "GaussianProcess works on log loss"),
    ],
)
def test_wrong_requests_are_named(fitted, call, words):
    with pytest.raises(FitError, match=words):
        call(fitted)


def test_a_regressor_from_outside_needs_fit_and_predict_only():
    class Nearest:
        def fit(self, weights_RK, loss_R):
            self.weights_RK, self.loss_R = weights_RK, loss_R
            return self

        def predict(self, weights_MK, std=False):
            gaps = np.abs(weights_MK[:, None] - self.weights_RK).sum(2)
            return self.loss_R[gaps.argmin(1)]

    regressor = Nearest()
    fitted = fit_table(make_table(80), regressor)
    assert fitted.regressors["planted"] == "Nearest" and not hasattr(regressor, "loss_R")
    test_MK = draw_mixtures(200, seed=1)
    assert spearman(fitted.predict(test_MK)[:, 0], planted_loss(test_MK)) > 0.5


def test_score_finds_rank_error_and_regret(fitted):
    test_MK = draw_mixtures(5, seed=11)
    predicted_MT = fitted.predict(test_MK)
    best = int(np.argmin(predicted_MT[:, 0]))
    losses_MT = predicted_MT + 0.1
    losses_MT[best, 0] = losses_MT[:, 0].max() + 0.4  # the mixture predicted best is the worst
    table = dataclasses.replace(
        fitted.table, run_ids=tuple("vwxyz"), weights_RK=test_MK, losses_RM=losses_MT
    )
    scores = score(fitted, table)
    assert scores["linear"] == pytest.approx({"spearman": 1.0, "mse": 0.01, "top1_regret": 0.0})
    assert scores["noise"]["spearman"] == 0.0  # a constant prediction ranks nothing
    assert scores["planted"]["top1_regret"] == pytest.approx(np.ptp(losses_MT[:, 0]))
    assert scores["planted"]["spearman"] < 0.5


def write_csvs(folder, name, table):
    paths = folder / f"{name}_w.csv", folder / f"{name}_l.csv"
    for path, columns, values in zip(
        paths,
        (table.domains, table.targets),
        (table.weights_RK, table.losses_RM),
        strict=True,
    ):
        rows = [
            ",".join([run_id, *map(repr, map(float, row))])
            for run_id, row in zip(table.run_ids, values, strict=True)
        ]
        path.write_text("\n".join([",".join(["index", *columns]), *rows]))
    return paths


def fit_files(weights, losses, *test, **options):
    test_table = Table.from_csv(*test) if test else None
    return evaluate_fit(Table.from_csv(weights, losses), test_table, **options)


def test_evaluate_fit_reports_with_and_without_test_files(tmp_path):
    train = write_csvs(tmp_path, "train", make_table(60, 0))
    test = write_csvs(tmp_path, "test", make_table(40, 9))
    report = fit_files(*train, *test, regressor="ridge", seed=1)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert set(report) == {"rows", "targets", "mean", "seconds"}
    assert report["rows"] == {"train": 60, "test": 40}
    assert set(report["targets"]["planted"]) == {"regressor", "cv", "test"}
    assert set(report["targets"]["planted"]["cv"]) == {"spearman", "r2"}
    assert set(report["targets"]["planted"]["test"]) == {"spearman", "mse", "top1_regret"}
    assert report["targets"]["linear"]["test"]["spearman"] > 0.98
    assert report["targets"]["noise"]["regressor"] == "mean"
    assert set(report["mean"]) == {"test_spearman", "test_mse"}
    of_targets = [entry["test"]["mse"] for entry in report["targets"].values()]
    assert report["mean"]["test_mse"] == pytest.approx(np.mean(of_targets))

    alone = fit_files(*train, regressor="ridge", seed=1)
    assert alone["rows"] == {"train": 60, "test": 0} and set(alone["mean"]) == {
        "cv_spearman",
        "cv_r2",
    }
    assert alone["targets"]["planted"]["cv"] == report["targets"]["planted"]["cv"]
    assert "test" not in alone["targets"]["planted"]


def test_evaluate_fit_test_rows_do_not_change_the_fit(tmp_path):
    train = write_csvs(tmp_path, "train", only(make_table(40, 0), "planted"))
    test = write_csvs(tmp_path, "test", only(make_table(40, 9), "planted"))
    other = write_csvs(tmp_path, "other", only(make_table(12, 5), "planted"))
    first, second = (fit_files(*train, *files, regressor="lightgbm") for files in (test, other))
    assert first["targets"]["planted"]["cv"] == pytest.approx(second["targets"]["planted"]["cv"])

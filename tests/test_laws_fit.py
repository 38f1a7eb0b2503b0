"""Fitting laws: the exact optimum, bootstrap, identifiability, extrapolation, choice of a form."""

import csv

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from rayx.errors import FitError
from rayx.fit.laws import (
    Chinchilla,
    LawTable,
    PowerLaw,
    SplitAdditive,
    SplitEffective,
    SplitInteraction,
    SplitTwoStage,
    choose_law,
    extrapolate,
    optimal_size,
)
from tests.contracts.law_contract import draw_runs
from tests.test_laws import CASES

TRUE = {"E": 1.8, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.36}


def chinchilla_loss(params_R, tokens_R, E, A, B, alpha, beta):
    return E + A / params_R**alpha + B / tokens_R**beta


def make_runs(rows, seed, noise=0.005):
    rng = np.random.default_rng(seed)
    params_R = rng.choice(np.geomspace(5e7, 1e10, 10), rows)
    tokens_R = np.exp(rng.uniform(np.log(1e9), np.log(5e11), rows))
    loss_R = chinchilla_loss(params_R, tokens_R, **TRUE) * np.exp(rng.normal(0, noise, rows))
    return params_R, tokens_R, loss_R


@pytest.fixture(scope="module")
def points(reference):
    """Chinchilla's runs as read off the figure, without the 5 of highest loss."""
    with (reference / "chinchilla" / "runs.csv").open() as file:
        rows = [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]
    table_RC = np.array(sorted(rows, key=lambda row: row[3])[:-5])
    return table_RC[:, 1], table_RC[:, 2], table_RC[:, 3]


def scipy_objective(u, params_R, tokens_R, loss_R, delta=1e-3):
    """Sum of Huber on log loss, written independently of rayx; u are logs."""
    predicted_R = chinchilla_loss(params_R, tokens_R, *np.exp(u))
    error_R = np.abs(np.log(predicted_R) - np.log(loss_R))
    huber_R = np.where(error_R <= delta, 0.5 * error_R**2, delta * (error_R - 0.5 * delta))
    return huber_R.sum()


def test_the_optimum_is_that_of_scipy_to_five_digits(points):
    law = Chinchilla().fit(*points)
    best = minimize(
        lambda u: 1e3 * scipy_objective(u, *points),
        np.log([1.8, 400, 1000, 0.34, 0.33]),
        method="Nelder-Mead",
        options={"xatol": 1e-10, "fatol": 1e-15, "maxiter": 20_000, "maxfev": 20_000},
    )
    assert law.objective_ == pytest.approx(1e-3 * best.fun, rel=1e-7)
    assert law.objective_ == pytest.approx(scipy_objective(np.log(_values(law)), *points), rel=1e-9)
    np.testing.assert_allclose(_values(law), np.exp(best.x), rtol=2e-5)


def _values(law):
    return np.array([law.params_[name] for name in ("E", "A", "B", "alpha", "beta")])


def test_published_points_have_this_optimum(points):
    law = Chinchilla(drop_highest=0).fit(*points)
    assert law.rows_ == 229
    np.testing.assert_allclose(
        _values(law), [1.780390, 443.6252, 1179.596, 0.3428632, 0.3383503], rtol=1e-6
    )
    assert law.objective_ == pytest.approx(8.27607230e-4, rel=1e-8)


def test_free_scale_is_the_optimum_of_the_huber_likelihood(points):
    law = Chinchilla(free_scale=True).fit(*points)

    def negative_log_likelihood(x):
        z_R = (np.log(chinchilla_loss(*points[:2], *np.exp(x[:5]))) - np.log(points[2])) / np.exp(
            x[5]
        )
        size_R = np.minimum(np.abs(z_R), 1e-3)
        # exp(-huber) integrates to about 2 / delta: the normal part inside is 1e-6 of it.
        constant = np.log(2e3 * np.exp(-0.5e-6) + 2e-3)
        return (size_R * (np.abs(z_R) - size_R / 2)).sum() + len(z_R) * (x[5] + constant)

    # The scale that maximises the likelihood given the law is delta times the mean |residual|.
    error_R = np.log(chinchilla_loss(*points[:2], *_values(law))) - np.log(points[2])
    x = np.r_[np.log(_values(law)), np.log(1e-3 * np.abs(error_R).mean())]
    assert law.objective_ == pytest.approx(negative_log_likelihood(x), abs=1e-3)
    better = minimize(negative_log_likelihood, x, method="Nelder-Mead", options={"maxiter": 3000})
    assert better.fun > law.objective_ - 1e-4
    # Nearly absolute deviations: the plain fit's sum of |residuals| is above this one's.
    plain = Chinchilla().fit(*points)
    assert np.abs(error_R).sum() < np.abs(plain.residual_R_).sum()


def test_optimum_does_not_depend_on_the_starts(points):
    rng = np.random.default_rng(0)
    law = Chinchilla().fit(*points)
    starts_SP = law.u_ + rng.normal(0.0, 0.7, (64, 5))
    u_SP, cost_S = law.problem_.solve(starts_SP, np.ones((1, len(points[0]))))
    at_optimum_S = cost_S < law.objective_ * (1 + 1e-9)
    assert at_optimum_S.mean() > 0.9 and cost_S.min() > law.objective_ * (1 - 1e-9)
    np.testing.assert_allclose(u_SP[at_optimum_S], np.tile(law.u_, (at_optimum_S.sum(), 1)), 1e-5)


def test_dropped_runs_are_the_highest_and_counted():
    params_R, tokens_R, loss_R = make_runs(60, seed=0)
    loss_R[[3, 40]] *= 1.5
    law = Chinchilla(drop_highest=2).fit(params_R, tokens_R, loss_R)
    kept = np.argsort(loss_R)[:-2]
    again = Chinchilla().fit(params_R[kept], tokens_R[kept], loss_R[kept])
    assert (law.rows_, law.dropped_) == (58, 2)
    assert law.params_ == pytest.approx(again.params_, rel=1e-6)
    with pytest.raises(FitError, match="drop_highest is 60"):
        Chinchilla(drop_highest=60).fit(params_R, tokens_R, loss_R)


def test_bootstrap_is_seeded_and_holds_the_estimate():
    runs = make_runs(60, seed=1)
    first, same, other = (Chinchilla(bootstrap=100, seed=s).fit(*runs) for s in (0, 0, 1))
    assert first.intervals_ == same.intervals_ != other.intervals_
    assert all(low < first.params_[name] < high for name, (low, high) in first.intervals_.items())
    with pytest.raises(FitError, match="No uncertainty without bootstrap"):
        Chinchilla().fit(*runs).predict(*runs[:2], std=True)


def test_rows_of_a_run_are_drawn_together():
    rng = np.random.default_rng(2)
    run_R = np.repeat(np.arange(20), 15)
    params_R = np.geomspace(5e7, 1e10, 20)[run_R]
    tokens_R = np.tile(np.geomspace(1e9, 5e11, 15), 20)
    loss_R = chinchilla_loss(params_R, tokens_R, **TRUE)
    loss_R = loss_R * np.exp(rng.normal(0, 0.01, 20)[run_R] + rng.normal(0, 0.001, 300))
    by_row = Chinchilla(bootstrap=100).fit(params_R, tokens_R, loss_R)
    by_run = Chinchilla(bootstrap=100).fit(params_R, tokens_R, loss_R, groups=run_R)
    assert by_row.params_ == by_run.params_

    def width(law):
        return law.intervals_["alpha"][1] - law.intervals_["alpha"][0]

    assert width(by_run) > 1.5 * width(by_row)
    with pytest.raises(FitError, match="groups have shape"):
        Chinchilla().fit(params_R, tokens_R, loss_R, groups=run_R[:-1])


def test_intervals_of_predictions_hold_new_runs_also_beyond_the_data():
    inside = []
    for seed in range(8):
        params_R, tokens_R, loss_R = make_runs(80, seed)
        law = Chinchilla(bootstrap=100).fit(params_R, tokens_R, loss_R)
        params_M, tokens_M, loss_M = make_runs(60, seed + 100)
        params_M, tokens_M = 3 * params_M, 3 * tokens_M
        loss_M = chinchilla_loss(params_M, tokens_M, **TRUE) * np.exp(
            np.random.default_rng(seed).normal(0, 0.005, 60)
        )
        predicted_M, low_M, high_M = law.predict(params_M, tokens_M, interval=0.9)
        assert ((low_M < predicted_M) & (predicted_M < high_M)).all()
        inside.append(np.mean((low_M <= loss_M) & (loss_M <= high_M)))
        assert law.reach(params_M, tokens_M).max() > 2.5
        assert law.reach(params_R, tokens_R).max() == 1.0
    assert 0.83 < np.mean(inside) < 0.97


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("split_additive", lambda t: {"E": t["E"] + t["C"] / t["D0"] ** t["gamma"]}),
        ("split_interaction", lambda t: {}),
        (
            "split_effective",
            lambda t: {"B": t["B"] / t["rho"] ** t["beta"], "beta": t["kappa"] * t["beta"]},
        ),
        ("split_two_stage", lambda t: {}),
    ],
)
def test_without_specialisation_a_split_law_is_a_plain_law(name, plain):
    truth = dict(CASES[name].truth)
    theta = {key: np.array([[value]]) for key, value in truth.items()}
    params_R, tokens_R, _ = make_runs(50, seed=3)
    columns = {"params": params_R, "tokens": tokens_R, "spec_tokens": np.zeros(50)}
    split_R = CASES[name].make().loss(theta, columns)[0][0]
    values = {key: truth[key] for key in ("E", "A", "B", "alpha", "beta")} | plain(truth)
    np.testing.assert_allclose(split_R, chinchilla_loss(params_R, tokens_R, **values), rtol=1e-12)


@pytest.mark.parametrize("name", ["split_additive", "split_effective", "split_interaction"])
def test_the_form_of_a_split_law_is_chosen_by_extrapolation(name):
    forms = (SplitAdditive, SplitInteraction, SplitEffective, SplitTwoStage)
    *columns, loss_R = draw_runs(CASES[name], seed=4, rows=120, noise=0.002)
    table = dict(zip(("params", "tokens", "spec_tokens"), columns, strict=True)) | {"loss": loss_R}
    best, found, failed = choose_law({f.name: f() for f in (*forms, Chinchilla)}, table)
    assert not failed and set(found) == {f.name for f in forms} | {"chinchilla"}
    # The two-stage form contains the interaction form.
    assert best == name or (best, name) == ("split_two_stage", "split_interaction")
    assert found["chinchilla"].wrong_form or found["chinchilla"].error > 3 * found[best].error


def test_one_size_of_model_leaves_size_undetermined_and_says_so():
    params_R, tokens_R, _ = make_runs(60, seed=5)
    params_R = np.full(60, 1e9)
    noise_R = np.random.default_rng(0).normal(0, 0.005, 60)
    loss_R = chinchilla_loss(params_R, tokens_R, **TRUE) * np.exp(noise_R)
    law = Chinchilla().fit(params_R, tokens_R, loss_R)
    text = "; ".join(law.warnings_)
    assert "alpha" in text and "A" in text
    assert not Chinchilla().fit(*make_runs(120, seed=5)).warnings_


def test_a_term_that_is_not_there_is_at_its_bound():
    params_R, tokens_R, _ = make_runs(100, seed=6)
    loss_R = 2.0 + 1500.0 / tokens_R**0.36
    warnings = Chinchilla().fit(params_R, tokens_R, loss_R).warnings_
    assert any(w.startswith(("A is at its bound of 0", "alpha is")) for w in warnings), warnings


def test_extrapolation_of_the_right_form_is_seldom_flagged():
    found = [extrapolate(Chinchilla(), *make_runs(40, seed)) for seed in range(25)]
    assert sum(e.wrong_form for e in found) <= 2
    assert np.mean([e.error for e in found]) < 0.01
    assert all(e.rows == 8 and e.by == "compute" and e.beyond > 1 for e in found)


def test_extrapolation_needs_runs_of_several_sizes():
    params_R, tokens_R, loss_R = make_runs(30, seed=0)
    with pytest.raises(FitError, match="All runs are of one size by compute"):
        extrapolate(Chinchilla(), np.full(30, 1e9), np.full(30, 1e10), loss_R)


def test_a_compute_optimal_size_is_that_of_a_search():
    law = Chinchilla().fit(*make_runs(100, seed=7))
    params, tokens = optimal_size(law, 1e22)
    assert 6 * params * tokens == pytest.approx(1e22)
    grid_M = np.geomspace(params / 4, params * 4, 4001)
    best = grid_M[np.argmin(law.predict(grid_M, 1e22 / 6 / grid_M))]
    assert best == pytest.approx(params, rel=2e-3)


PORIAN = {  # head-less count; standard count; short warm-up; cosine to the right length; tuned
    ("base", "long", "kaplan", "kaplan"): 0.834,
    ("base", "long", "kaplan", "standard"): 0.701,
    ("base", "short", "kaplan", "standard"): 0.604,
    ("base", "short", "chinchilla", "standard"): 0.571,
    ("tuned", "short", "const", "standard"): 0.497,
}


def test_porian_exponents(reference):
    keys = ["hparams", "warmup", "decay", "param_count"]
    folder = reference / "porian2024"
    pairs = pd.read_csv(folder / "summary_df_optimal_pairs.csv").dropna(subset=["n"])
    published = pd.read_csv(folder / "summary_df_fit_results.csv")
    published = published[published["fit"] == "basic"].set_index(keys)
    found = {
        key: PowerLaw.fit(rows["flops"], rows["n"]) for key, rows in pairs.groupby(keys, sort=False)
    }
    assert set(found) == set(PORIAN)
    for key, law in found.items():
        assert round(law.exponent, 3) == PORIAN[key]
        assert law.exponent == pytest.approx(published.loc[key, "n_exponent"], rel=1e-9)
        assert law.coefficient == pytest.approx(published.loc[key, "n_coef"], rel=1e-6)
        assert law.r2 == pytest.approx(published.loc[key, "n_r2"], rel=1e-6)
        assert law.interval[0] < law.exponent < law.interval[1]


def test_power_law_refuses_what_has_no_logarithm():
    with pytest.raises(FitError, match="Pair 1 is"):
        PowerLaw.fit(np.array([1.0, 2.0, 3.0]), np.array([1.0, np.nan, 3.0]))
    with pytest.raises(FitError, match="3 or more pairs"):
        PowerLaw.fit(np.ones(2), np.ones(2))


def test_table_takes_names_weights_and_groups(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text("id,N,D,loss,weight/web,weight/code\na,1,2,3.0,.5,.5\nb,1,2,,.1,.9\n")
    table = LawTable.from_csv(path, rename={"N": "params", "D": "tokens"}, group="id")
    assert table.domains == ("web", "code") and list(table.groups) == ["a"]
    assert table.warnings == ("1 rows have no loss and were left out",)
    np.testing.assert_array_equal(table.columns["weights"], [[0.5, 0.5]])
    assert [a[0] for a in table.arrays(Chinchilla())] == [1, 2, 3]
    with pytest.raises(FitError, match="needs params, tokens"):
        LawTable.from_csv(path).arrays(Chinchilla())
    with pytest.raises(FitError, match="no column 'M'"):
        LawTable.from_csv(path, rename={"M": "params"})
    with pytest.raises(FitError, match="Cannot read"):
        LawTable.from_csv(tmp_path / "none.csv")
    path.write_text("params,tokens\n1,2\n")
    with pytest.raises(FitError, match="no column 'loss'"):
        LawTable.from_csv(path)


def test_table_of_a_store_takes_runs_that_are_ok_and_never_pools_corpora():
    runs = pd.DataFrame(
        {
            "run_id": list("abc"),
            "status": ["ok", "ok", "failed"],
            "corpus": ["x", "x", "y"],
            "params": [1e6, 2e6, 3e6],
            "tokens": [1e8, 2e8, 3e8],
            "weight/web": [0.2, 0.4, 0.6],
            "weight/code": [0.8, 0.6, 0.4],
            "loss/docs": [3.0, 2.9, np.nan],
        }
    )
    table = LawTable.from_runs(runs, "docs")
    assert list(table.columns["loss"]) == [3.0, 2.9] and table.columns["weights"].shape == (2, 2)
    with pytest.raises(FitError, match="no target 'doc'.*Did you mean 'docs'"):
        LawTable.from_runs(runs, "doc")
    runs.loc[2, "status"] = "ok"
    with pytest.raises(FitError, match="2 corpora"):
        LawTable.from_runs(runs, "docs")


def test_laws_are_compared_on_the_same_runs_left_out():
    *columns, loss_R = draw_runs(CASES["additive_mixture"], seed=1, rows=150)
    table = dict(zip(("params", "tokens", "weights"), columns, strict=True)) | {"loss": loss_R}
    names = ("chinchilla", "exponential", "additive_mixture")
    best, found, _ = choose_law({name: CASES[name].make() for name in names}, table)
    assert best == "additive_mixture"
    assert {(e.by, e.rows) for e in found.values()} == {("compute", 30)}

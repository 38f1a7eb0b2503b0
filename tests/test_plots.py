"""Figures: what is drawn is the data, the title is the finding, names are drawn as they are."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from rayx import plots

HOSTILE = ["<b>web</b>", "$x^2$", 'a"b&c', "_under", "tab\tand\x00nul"]


def axes_of(plot):
    """Draw on fresh axes, render (so that bad text would raise), return the axes."""
    figure = Figure(figsize=(4.7, 3.3), layout="constrained")
    axes = figure.add_subplot()
    plot(axes)
    figure.draw_without_rendering()
    return axes


def texts(axes) -> list[str]:
    return [t.get_text() for t in (*axes.get_yticklabels(), *axes.get_xticklabels())]


@pytest.fixture
def mixtures() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "choice": [0.4, 0.3, 0.15, 0.1, 0.05],
            "uniform": 0.2,
            "proportional": [0.6, 0.1, 0.1, 0.1, 0.1],
            "cap": [np.nan, 0.3, 0.5, 0.5, 0.5],
        },
        index=HOSTILE,
    )


def test_mixture_bars_show_shares_caps_and_baselines_in_corpus_order(mixtures):
    axes = axes_of(lambda a: plots.mixture_bars(mixtures, a))
    assert [bar.get_width() for bar in axes.patches] == pytest.approx(100 * mixtures["choice"])
    colors = plots.domain_colors(HOSTILE)
    assert len(set(colors.values())) == 5
    marks = {tuple(line.get_xdata()) for line in axes.lines}
    assert tuple(100 * mixtures["proportional"]) in marks
    caps = axes.collections[0].get_segments()
    assert [segment[0][0] for segment in caps] == [30.0, 50.0, 50.0, 50.0]
    named = [t.get_text() for t in axes.get_legend().get_texts()]
    assert named == ["uniform", "proportional", "cap"]


def test_hostile_names_are_no_formulas_and_hold_no_control_signs(mixtures):
    axes = axes_of(lambda a: plots.mixture_bars(mixtures, a, "More $x^2$ and $y$"))
    drawn = [
        t._preprocess_math(t.get_text())  # what matplotlib draws, and whether as a formula
        for t in (*axes.get_yticklabels(), axes._left_title)
    ]
    assert [is_formula for _, is_formula in drawn] == [False] * 6
    assert [text for text, _ in drawn] == [
        "<b>web</b>",
        "$x^2$",
        'a"b&c',
        "_under",
        "tab?and?nul",
        "More $x^2$ and $y$",
    ]


def test_label_long_name_is_cut_visibly():
    assert plots.label("x" * 100, 10) == "x" * 9 + "\u2026"


def test_predicted_measured_title_gives_r2_and_spearman():
    x = np.linspace(1.0, 2.0, 50)
    data = pd.DataFrame({"measured_bpb": x, "predicted_bpb": x**3, "std_bpb": 0.1})
    data.loc[50] = [np.nan, 1.0, 0.1]
    axes = axes_of(lambda a: plots.predicted_measured(data, a, "web"))
    r2 = 1 - np.sum((x - x**3) ** 2) / np.sum((x - x.mean()) ** 2)
    assert axes.get_title(loc="left") == f"web: R\u00b2 {r2:.2f}, Spearman 1.00"
    assert "n = 50" in axes.get_xlabel()
    points = max(axes.lines, key=lambda line: len(line.get_xdata()))
    assert len(points.get_xdata()) == 50


def test_predicted_measured_constant_loss_draws_without_a_correlation():
    data = pd.DataFrame({"measured_bpb": [1.0] * 5, "predicted_bpb": [1.0] * 5})
    axes = axes_of(lambda a: plots.predicted_measured(data, a))
    assert "nan" in axes.get_title(loc="left")


@pytest.mark.parametrize(
    ("objective", "finding"),
    [(lambda s: (s - 0.3) ** 2, "lowest at 30%"), (lambda s: -s, "lowest at 60% (edge)")],
)
def test_response_curve_title_names_the_lowest_share(objective, finding):
    share = np.linspace(0.0, 0.6, 61)
    curve = pd.DataFrame({"share": share, "objective": objective(share), "std": 0.01, "t": share})
    points = pd.DataFrame({"share": [0.1, 0.2], "objective": [0.5, 0.6]})
    axes = axes_of(lambda a: plots.response_curve(curve, a, "web", points))
    assert axes.get_title(loc="left") == f"web: {finding}"
    assert any(list(line.get_ydata()) == [0.5, 0.6] for line in axes.lines)  # raw points
    band = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() >= objective(share).max() + 1.9 * 0.01


def test_interaction_shows_sign_by_colour_and_size_by_opacity():
    data = pd.DataFrame([[-0.02, 0.01], [0.0, 0.02]], index=["web", "code"], columns=["t1", "t2"])
    axes = axes_of(lambda a: plots.interaction(data, a))
    faces = [patch.get_facecolor() for patch in axes.patches]
    alphas = [face[3] for face in faces]
    assert alphas[0] == alphas[3] == 2 * alphas[1] > alphas[2] == 0.0
    assert faces[0][:3] != faces[3][:3] == faces[1][:3]
    assert {t.get_text() for t in axes.texts} == {"-20", "+10", "0", "+20"}
    assert axes.get_title(loc="left") == "+5 points of web help t1 most"


def test_loss_curves_draw_every_run_and_arms_above_the_proxies():
    rows = [
        {"run_id": f"{arm}{i}", "tokens": tokens, "loss_bpb": 2.0 - tokens / 1e6, "arm": arm}
        for arm, count in (("", 7), ("choice", 2), ("best_random", 2))
        for i in range(count)
        for tokens in (100_000, 200_000)
    ]
    axes = axes_of(lambda a: plots.loss_curves(pd.DataFrame(rows), a, "Choice ends lowest"))
    assert len(axes.lines) == 11
    widths = sorted(line.get_linewidth() for line in axes.lines)
    assert widths[6] < 1 < widths[7]
    named = {t.get_text() for t in axes.get_legend().get_texts()}
    assert named == {"proxies", "choice", "best seen"}


def test_verification_shows_each_seed_the_mean_and_its_interval():
    data = pd.DataFrame({"arm": ["choice"] * 4 + ["uniform"] * 4, "objective_bpb": range(8)})
    axes = axes_of(lambda a: plots.verification(data, a, "title", 0.5))
    assert {tuple(line.get_xdata()) for line in axes.lines} >= {(0, 1, 2, 3), (1.5,), (5.5,)}
    ends = axes.containers[0][2][0].get_segments()[0][:, 0]
    assert ends == pytest.approx([1.5 - 2.4469 * 0.25, 1.5 + 2.4469 * 0.25], rel=1e-4)
    without_noise = axes_of(lambda a: plots.verification(data, a, "title", float("nan")))
    assert len(without_noise.lines) == len(axes.lines)


@pytest.mark.parametrize(
    ("value", "words"), [(1_234_567, "1.23M"), (3e4, "30k"), (12, "12"), (5e18, "5E")]
)
def test_short_count_reads_as_people_say_it(value, words):
    assert plots.short_count(value) == words


def test_import_plots_leaves_pyplot_alone():
    code = "import sys, rayx.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

"""Figures of laws: what is drawn is the data and the law, with the band where there is one."""

import numpy as np
import pytest

from rayx.errors import SpecError
from rayx.fit.laws import Chinchilla, extrapolate
from rayx.law_plots import law_figure, scale_curves, write_law_figure
from tests.contracts.law_contract import draw_runs
from tests.test_laws import CASES


@pytest.fixture(scope="module")
def fitted():
    arrays = draw_runs(CASES["chinchilla"], seed=0, rows=60)
    return Chinchilla(bootstrap=50).fit(*arrays), arrays


def test_both_figures_draw_the_runs_and_the_title_tells_the_error(fitted):
    law, arrays = fitted
    found = extrapolate(law, *arrays)
    figure = law_figure(law, arrays, found)
    first, second = figure.axes
    np.testing.assert_array_equal(first.lines[1].get_xdata(), arrays[2])
    np.testing.assert_allclose(first.lines[1].get_ydata(), law.predict(*arrays[:2]))
    np.testing.assert_allclose(second.lines[0].get_xdata(), 6 * arrays[0] * arrays[1])
    assert f"{found.error:.2%}" in second.get_title(loc="left")
    assert len(second.collections) == 5  # a band a curve


def test_curves_go_beyond_the_runs_and_their_band_holds_them(fitted):
    law, arrays = fitted
    kind, curves = scale_curves(law, dict(zip(("params", "tokens"), arrays[:2], strict=True)))
    assert kind == "compute" and curves["curve"].nunique() == 5
    assert curves["size"].max() > 9 * (6 * arrays[0] * arrays[1]).max()
    assert ((curves["low"] < curves["loss"]) & (curves["loss"] < curves["high"])).all()


def test_a_law_at_one_scale_has_no_curves():
    arrays = draw_runs(CASES["exponential"], seed=0, rows=40)
    law = CASES["exponential"].make().fit(*arrays)
    assert scale_curves(law, {"weights": arrays[0]}) is None
    assert len(law_figure(law, arrays).axes) == 1


def test_a_figure_that_cannot_be_written_is_refused(fitted, tmp_path):
    with pytest.raises(SpecError, match="Cannot write"):
        write_law_figure(*fitted, str(tmp_path / "law.no-such-format"))

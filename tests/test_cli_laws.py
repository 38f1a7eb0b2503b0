"""`rayx law`: JSON, the table, `auto`, predictions with reach, a store, refusals."""

from __future__ import annotations

import json
import sys

import numpy as np
import pandas as pd
import pytest

import rayx
from rayx.cli import main
from rayx.synthetic import World
from tests.contracts.law_contract import draw_runs
from tests.test_laws import CASES


@pytest.fixture
def rayx_law(monkeypatch, capsys):
    """Run `rayx law ...`; returns exit code, standard output and standard error."""

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rayx", "law", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
            raise SystemExit(0)
        code = stopped.value.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return call


@pytest.fixture(scope="module")
def runs_csv(tmp_path_factory):
    params_R, tokens_R, loss_R = draw_runs(CASES["chinchilla"], seed=0, rows=60)
    path = tmp_path_factory.mktemp("laws") / "runs.csv"
    frame = pd.DataFrame({"params": params_R, "tokens": tokens_R, "loss": loss_R})
    frame["name"] = [f"run-{i}" for i in range(60)]
    frame.to_csv(path, index=False)
    return path


def test_json_is_one_object_and_holds_the_truth(rayx_law, runs_csv, tmp_path):
    figure = tmp_path / "law.png"
    code, out, err = rayx_law(
        "--law", "chinchilla", "--runs", runs_csv, "--drop-highest", 2, "--bootstrap", 100,
        "--at", "params=7e10,tokens=1e12", "--plot", figure, "--group", "name", "--json",
    )  # fmt: skip
    result = json.loads(out)
    assert code == 0 and err == ""
    assert set(result) == {
        "law", "params", "intervals", "objective", "rows", "dropped", "extrapolation", "tried",
        "at", "warnings", "seconds",
    }  # fmt: skip
    assert (result["law"], result["rows"], result["dropped"]) == ("chinchilla", 58, 2)
    for name, value in CASES["chinchilla"].truth.items():
        low, high = result["intervals"][name]
        assert low < result["params"][name] < high and 0.3 * low < value < 3 * high
    assert result["extrapolation"]["by"] == "compute" and not result["extrapolation"]["wrong_form"]
    point = result["at"]
    assert point["low"] < point["loss"] < point["high"] and 5 < point["reach"] < 15
    assert figure.read_bytes()[:4] == b"\x89PNG"


def test_auto_chooses_the_form_that_extrapolates_and_shows_all(rayx_law, tmp_path):
    *columns, loss_R = draw_runs(CASES["split_effective"], seed=1, rows=100, noise=0.002)
    frame = pd.DataFrame(dict(zip(("params", "tokens", "spec_tokens"), columns, strict=True)))
    frame.assign(loss=loss_R).to_csv(tmp_path / "runs.csv", index=False)
    arguments = ("--runs", tmp_path / "runs.csv", "--bootstrap", 0)
    result = json.loads(rayx_law(*arguments, "--json")[1])
    tried = result["tried"]
    assert {"chinchilla", "split_additive", "split_effective"} <= set(tried)
    assert result["law"] == min(tried, key=lambda name: tried[name]["error"])
    assert tried["chinchilla"]["error"] > 3 * tried[result["law"]]["error"]
    assert tried["split_effective"]["error"] < 1.5 * tried[result["law"]]["error"]
    shown = rayx_law(*arguments)[1]
    assert all(name in shown for name in tried) and "100 runs, 0 dropped" in shown


def test_columns_by_other_names_are_renamed_only_when_asked(rayx_law, runs_csv, tmp_path):
    frame = pd.read_csv(runs_csv).rename(columns={"params": "N", "tokens": "D"})
    frame.to_csv(tmp_path / "runs.csv", index=False)
    arguments = ("--law", "chinchilla", "--runs", tmp_path / "runs.csv", "--bootstrap", 0)
    code, out, err = rayx_law(*arguments)
    assert code == 2 and out == "" and "needs params, tokens" in err and "--rename N=params" in err
    code, out, _ = rayx_law(*arguments, "--rename", "N=params,D=tokens", "--json")
    assert code == 0 and json.loads(out)["rows"] == 60


def test_a_law_is_fitted_to_the_runs_of_a_store(rayx_law, tmp_path):
    world = World.random(num_domains=3, num_targets=2, seed=0)
    store = rayx.open(str(tmp_path / "store"), create=True)
    weights_RK = np.random.default_rng(0).dirichlet(np.ones(3), 30)
    world.fill(
        store, [world.spec(rayx.Mixture.from_array(w, world.domains), 200_000) for w in weights_RK]
    )
    arguments = (store.url, "--target", world.targets[0], "--bootstrap", 20, "--json")
    code, out, _ = rayx_law(*arguments, "--law", "exponential")
    result = json.loads(out)
    assert code == 0 and result["rows"] == 30
    assert {f"t/{domain}" for domain in world.domains} <= set(result["params"])
    assert result["extrapolation"]["by"] == "distance"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--law", "chinchila", "--runs", "x.csv"), "Did you mean 'chinchilla'"),
        ((), "Give --runs RUNS.csv, or a STORE with --target"),
        (("--runs", "no-such.csv"), "Cannot read no-such.csv"),
        (("--runs", "RUNS", "--plot", "no/such/folder.png"), "its folder does not exist"),
        (("--runs", "RUNS", "--law", "dcpt"), "needs ratio"),
        (("--runs", "RUNS", "--rename", "params"), "expected name=name"),
        (("--runs", "RUNS", "--law", "chinchilla", "--at", "params=1e9"), "--at has no tokens"),
        (
            ("--runs", "RUNS", "--law", "chinchilla", "--bootstrap", "0", "--at",
             "params=1e9,tokens=1e9"),
            "no extrapolation without an interval",
        ),
        (("--runs", "RUNS", "--law", "chinchilla", "--drop-highest", "60"), "drop_highest is 60"),
    ],
)  # fmt: skip
def test_refusals_name_the_fix(rayx_law, runs_csv, arguments, message):
    code, out, err = rayx_law(*(runs_csv if a == "RUNS" else a for a in arguments))
    assert code == 2 and out == "" and message in err.replace("\n", " ")

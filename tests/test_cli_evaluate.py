"""`rayx evaluate`: models and merged candidates to a table that fit and choose read; resuming."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rayx.choose import Choice
from rayx.cli import main
from rayx.cli.rows import Rows, read_merge_weights
from rayx.errors import SpecError
from rayx.proxy.models import MergedModels

pytest.importorskip("transformers")

from tests.test_huggingface import trained  # noqa: E402, F401 (a fixture)
from tests.tiny_models import own_tokenizer_json, save_model  # noqa: E402

FEW = ("--sequences", 3, "--context", 16)


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run the real entry point in a folder of its own; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rayx", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
            raise SystemExit(0)
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and three experts near it."""
    root = tmp_path_factory.mktemp("models")
    base = save_model(root / "base", own_tokenizer_json())
    experts = [
        save_model(root / name, own_tokenizer_json(), seed=i + 1, near=base)
        for i, name in enumerate(("code", "law", "news"))
    ]
    return [base, *experts]


def named(folders):
    return [f"{folder.name}={folder}" for folder in folders[1:]]


def write_weights(path, rows=12, names=("news", "code", "law"), seed=0):
    """Candidates in another order of columns than the experts are given in."""
    weights = np.random.default_rng(seed).dirichlet(np.ones(len(names)), rows).round(6)
    weights[:, 0] = 1 - weights[:, 1:].sum(1)
    frame = pd.DataFrame(weights, columns=list(names)).clip(0, 1)
    frame.insert(0, "id", [f"m{i}" for i in range(rows)])
    frame.to_csv(path, index=False)
    return frame


def test_models_of_both_kinds_are_one_table(cli, folders, trained, tiny_corpus):  # noqa: F811
    _, _, records, files = trained
    arguments = ("--corpus", tiny_corpus.url, "--sequences", 6)
    code, out, err = cli("evaluate", folders[0], f"mine={files[0]}", *arguments, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert result["context"] == 24 and result["reused"] == 0  # the checkpoint's own
    first, second = result["rows"]
    assert (first["id"], second["id"]) == (str(folders[0]), "mine")
    for target, loss in records[0].losses.items():
        assert second["loss"][target] == pytest.approx(loss.bpb, rel=1e-6)
        assert second["nats"][target] == pytest.approx(loss.nats, rel=1e-6)
        assert first["stderr"][target] > 0
    code, out, _ = cli("evaluate", f"mine={files[0]}", *arguments)
    assert code == 0 and f"{records[0].losses['law'].bpb:.4f}" in out and "context 24" in out


def test_merged_candidates_are_what_choose_and_fit_read(cli, folders, tiny_corpus):
    frame = write_weights("w.csv")
    given = ("--weights", "w.csv", "--corpus", tiny_corpus.url, *FEW, "--out", "l.csv")
    code, out, err = cli("evaluate", *named(folders), *given)
    assert code == 0, err
    losses = pd.read_csv("l.csv")
    assert list(losses) == ["id", *tiny_corpus.targets]
    assert losses["id"].tolist() == frame["id"].tolist() and not losses.isna().any(axis=None)
    code, out, err = cli(
        "choose", "--weights", "w.csv", "--losses", "l.csv", "--regressor", "ridge", "--json"
    )
    assert code == 0, err
    choice = Choice.from_json(out)
    assert set(choice.weights) == {"code", "law", "news"}
    code, out, _ = cli("fit", "--weights", "w.csv", "--losses", "l.csv", "--regressor", "ridge")
    assert code == 0 and "mean of 3 targets" in out
    # The candidate that `rayx merge` writes has the losses of the row.
    row = frame.iloc[4]
    weights = ",".join(f"{name}={row[name]:.6f}" for name in ("code", "law", "news"))
    experts = [part for text in named(folders) for part in ("--expert", text)]
    code, _, err = cli("merge", "written", *experts, "--weights", weights)
    assert code == 0, err
    code, out, err = cli("evaluate", "written", "--corpus", tiny_corpus.url, *FEW, "--json")
    assert code == 0, err
    alone = json.loads(out)["rows"][0]["loss"]
    for target in tiny_corpus.targets:
        assert losses[target][4] == pytest.approx(alone[target], rel=1e-5)


def test_task_vectors_take_a_base_and_any_sum(cli, folders, tiny_corpus):
    Path("w.csv").write_text("id,code,law,news\nnone,0.0001,0,0\nall,0.9,0.8,0.7\none,0,1,0\n")
    given = ("--weights", "w.csv", "--corpus", tiny_corpus.url, *FEW, "--base", folders[0])
    arguments = ("evaluate", *named(folders), *given, "--operator", "task_arithmetic", "--json")
    code, out, err = cli(*arguments)
    assert code == 0, err
    rows = {row["id"]: row["loss"] for row in json.loads(out)["rows"]}
    single = ("evaluate", folders[0], folders[2], "--corpus", tiny_corpus.url, *FEW, "--json")
    base, law = (row["loss"] for row in json.loads(cli(*single)[1])["rows"])
    assert rows["none"] == pytest.approx(base, rel=1e-3)
    assert rows["one"] == pytest.approx(law, rel=1e-5)
    assert rows["all"] != pytest.approx(base, rel=1e-3)


def test_merged_checkpoints_of_rayx_are_evaluated_the_same_way(cli, trained, tiny_corpus):  # noqa: F811
    _, _, records, files = trained
    Path("w.csv").write_text("id,a,b\nx,1,0\ny,0.5,0.5\nz,0,1\n")
    code, out, err = cli(
        "evaluate", f"a={files[0]}", f"b={files[1]}", "--weights", "w.csv", "--corpus",
        tiny_corpus.url, "--sequences", 6, "--json",
    )  # fmt: skip
    assert code == 0, err
    rows = {row["id"]: row["loss"] for row in json.loads(out)["rows"]}
    for row_id, record in (("x", records[0]), ("z", records[1])):
        expected = {target: loss.bpb for target, loss in record.losses.items()}
        assert rows[row_id] == pytest.approx(expected, rel=1e-6)


def test_a_killed_run_is_taken_up_where_it_was(cli, folders, tiny_corpus, monkeypatch):
    write_weights("w.csv", rows=9)
    given = ("--weights", "w.csv", "--corpus", tiny_corpus.url, *FEW)
    assert cli("evaluate", *named(folders), *given, "--out", "whole.csv")[0] == 0
    whole = Path("whole.csv").read_text()
    evaluated = []
    plain = MergedModels.losses

    def killed(self, weights_CK):
        if len(evaluated) == 4:
            raise KeyboardInterrupt
        evaluated.append(len(weights_CK))
        return plain(self, weights_CK)

    monkeypatch.setattr(MergedModels, "losses", killed)
    assert cli("evaluate", *named(folders), *given, "--out", "l.csv")[0] != 0
    lines = Path("l.csv").read_text().splitlines()
    assert len(lines) == 1 + 4
    # The fifth row is torn, as a kill in the midst of a write leaves it.
    Path("l.csv").write_text("\n".join([*lines, "m4,1.2"]))
    evaluated.clear()
    monkeypatch.setattr(
        MergedModels, "losses", lambda s, w: evaluated.append(len(w)) or plain(s, w)
    )
    code, out, err = cli("evaluate", *named(folders), *given, "--out", "l.csv")
    assert code == 0 and "5 evaluated, 4 taken from l.csv" in out, err
    assert sum(evaluated) == 5
    assert Path("l.csv").read_text() == whole
    evaluated.clear()
    assert cli("evaluate", *named(folders), *given, "--out", "whole.csv")[0] == 0
    assert not evaluated and Path("whole.csv").read_text() == whole
    # More candidates go below; others of the same name, or other settings, are refused.
    more = write_weights("w.csv", rows=9)
    more.loc[9] = ["new", 0.0, 0.5, 0.5]
    more.to_csv("w.csv", index=False)
    code, out, _ = cli("evaluate", *named(folders), *given, "--out", "l.csv")
    assert code == 0 and evaluated == [1] and "new" in Path("l.csv").read_text().splitlines()[-1]
    for changed, message in (
        (("--context", 12), "made with context 16, and this asks for 12"),
        (("--operator", "multi_slerp"), "made with operator"),
    ):
        code, _, err = cli("evaluate", *named(folders), *given, *changed, "--out", "l.csv")
        assert code == 2 and message in err
    write_weights("w.csv", rows=9, seed=1)
    code, _, err = cli("evaluate", *named(folders), *given, "--out", "l.csv")
    assert code == 2 and "row 'm0' that was made of" in err


def test_losses_that_are_not_finite_are_left_empty_and_said(cli, folders, tiny_corpus, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(folders[1], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    given = ("--corpus", tiny_corpus.url, *FEW, "--out", "l.csv")
    code, out, err = cli("evaluate", f"bad={broken}", f"good={folders[2]}", *given, "--json")
    assert code == 0 and "not finite, 'bad' the first" in err
    bad, good = json.loads(out)["rows"]
    assert set(bad["loss"].values()) == {None} and None not in good["loss"].values()
    assert Path("l.csv").read_text().splitlines()[1] == "bad,,,"


def test_rows_keep_what_is_there(tmp_path):
    path = str(tmp_path / "r.csv")
    rows = Rows(path, ["a", "b"], {"x": 1}, {"i,1": [1, 2]})
    rows.append("i,1", {"b": float("nan"), "a": 1 / 3})
    again = Rows(path, ["a", "b"], {"x": 1}, {"i,1": (1, 2), "j": (3, 4)})
    assert again.values["i,1"]["a"] == pytest.approx(1 / 3, rel=1e-8)
    assert np.isnan(again.values["i,1"]["b"]) and list(again.values) == ["i,1"]
    with pytest.raises(SpecError, match="columns id, a, b"):
        Rows(path, ["a"], {"x": 1}, {})
    with open(path, "a") as file:
        file.write("j,1,two\n")
    with pytest.raises(SpecError, match="Cannot read .*'two'"):
        Rows(path, ["a", "b"], {"x": 1}, {})
    (tmp_path / "r.csv.json").unlink()
    with pytest.raises(SpecError, match="does not say what it was made with"):
        Rows(path, ["a", "b"], {"x": 1}, {})
    Rows(None, ["a"], {}, {}).append("i", {"a": 1.0})


BAD_WEIGHTS = {
    "no file": (None, "Cannot read"),
    "empty": ("id,code,law,news\n", "is empty"),
    "unknown expert": ("id,code,law,new\nx,1,0,0\n", "'new', and there is no such.*mean 'news'"),
    "expert without a column": ("id,code,law\nx,1,0\n", "Expert 'news' has no column"),
    "twice": ("id,code,law,news,law\nx,1,0,0,0\n", "column 'law' twice"),
    "not a number": (
        "id,code,law,news\nx,1,0,zero\n",
        "row 'x', column 'news': the value is 'zero'",
    ),
    "nan": ("id,code,law,news\nx,1,nan,0\n", "column 'law': the value is 'nan'"),
    "infinite": ("id,code,law,news\nx,1,0,inf\n", "expected a finite number"),
    "ragged": ("id,code,law,news\nx,1,0\n", "3 cells; the header has 4"),
    "id twice": ("id,code,law,news\nx,1,0,0\nx,0,1,0\n", "'x' is empty or occurs twice"),
    "sum": ("id,code,law,news\nx,1,0,0\ny,0.5,0.4,0\n", "row 'y': The sum of linear merge weights"),
    "negative": ("id,code,law,news\nx,1.5,-0.5,0\n", "row 'x': A merge weight of linear is -0.5"),
    "zeros": ("id,code,law,news\nx,0,0,0\n", "at least one that is not 0"),
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights_are_named_before_a_model_is_opened(name, cli, tiny_corpus):
    text, message = BAD_WEIGHTS[name]
    if text is not None:
        Path("w.csv").write_text(text)
    models = [f"{expert}=nowhere/{expert}" for expert in ("code", "law", "news")]
    given = ("--weights", "w.csv", "--corpus", tiny_corpus.url, "--out", "l.csv")
    code, out, err = cli("evaluate", *models, *given)
    assert code == 2 and out == "" and re.search(message, err), err
    assert not Path("l.csv").exists()


BAD_CALLS = {
    "no such model": (["nowhere"], "'nowhere' is neither a folder"),
    "twice": (["a=MODEL", "a=MODEL"], "'a' is given twice"),
    "no path": (["a="], "is not name=path"),
    "expert without a name": (["MODEL", "--weights", "w.csv"], "is not name=path; with --weights"),
    "operator alone": (["MODEL", "--operator", "ties", "--density", "0.5"], "give --weights too"),
    "base alone": (["MODEL", "--base", "MODEL"], "give --weights too"),
    "operator": (["a=MODEL", "--operator", "mean"], "Operator 'mean' is unknown"),
    "density": (["a=MODEL", "--operator", "ties", "--density", "2"], "density of ties is 2"),
    "part": (["MODEL", "--part", "third"], "Evaluation.part is 'third'"),
    "corpus": (["MODEL", "--corpus", "nowhere"], "nowhere"),
    "context": (["MODEL", "--context", "500"], "has 96 positions"),
    "device": (["MODEL", "--device", "cuda:99"], "Device 'cuda:99' cannot be used here"),
    "no such folder": (["MODEL", "--out", "no/such/l.csv"], "its folder does not exist"),
    "no base": (["a=MODEL", "--weights", "w.csv", "--operator", "task_arithmetic"], "base of task"),
    "other file": (["MODEL", "--out", "w.csv"], "does not say what it was made with"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_say_what_is_wrong(name, cli, folders, tiny_corpus):
    arguments, message = BAD_CALLS[name]
    Path("w.csv").write_text("id,a\nx,1\n")
    arguments = [a.replace("MODEL", str(folders[0])) for a in arguments]
    if "--corpus" not in arguments:
        arguments += ["--corpus", tiny_corpus.url]
    if "--out" not in arguments:
        arguments += ["--out", "l.csv"]
    code, out, err = cli("evaluate", *arguments)
    assert code == 2 and out == "" and re.search(message, err.replace("\n", " ")), err
    assert not Path("l.csv").exists() and not Path("l.csv.json").exists()


def test_weights_are_in_the_order_of_the_experts(tmp_path):
    path = tmp_path / "w.csv"
    path.write_text("\ufeffid, law ,code\nx,0.25,0.75\n\n")
    assert read_merge_weights(str(path), ["code", "law"]) == {"x": (0.75, 0.25)}

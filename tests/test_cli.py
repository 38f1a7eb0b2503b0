"""The command line: exit codes, JSON, errors that name the fix, before anything is trained."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import rayx
from rayx.choose import Choice
from rayx.cli import main
from rayx.cli.main import command_tree
from rayx.plan import Plan
from rayx.synthetic import World

EXPERIMENT = """
from dataclasses import dataclass
from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.errors import SpecError

@dataclass(frozen=True)
class Parameters:
    corpus: str = {corpus!r}
    runs: int = 4
    lr: float = 0.01
    fast: bool = False
    name: str = "x"
    pair: tuple = (1, 2)

    def __post_init__(self):
        if self.runs < 1:
            raise SpecError(f"runs is {{self.runs}}; expected at least 1.")

def corpus(p):
    return Corpus.load(p.corpus)

def specs(p, corpus):
    model = ModelShape(layers=1, width=16, heads=2, ffn_width=32,
                       vocab_size=corpus.vocab_size, context=16)
    return [
        TrainSpec(corpus=corpus.fingerprint, model=model,
                  schedule=Schedule.constant(Mixture({{"code": 1 + i, "law": 5}}), 640),
                  optimizer=Optimizer(lr=p.lr, batch_sequences=4),
                  evaluation=Evaluation(points=1, sequences=4))
        for i in range(p.runs)
    ]
"""


def run_main(*arguments: object) -> int:
    """Run the real entry point; return its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["rayx", *map(str, arguments)])
        main()
    return stopped.value.code if isinstance(stopped.value.code, int) else 0


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Run the real entry point in a folder of its own; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run_main(*arguments)
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def experiment(tiny_corpus, tmp_path) -> Path:
    file = tmp_path / "study.py"
    file.write_text(EXPERIMENT.format(corpus=tiny_corpus.url))
    return file


@pytest.fixture(scope="module")
def swept(ray_cluster, tiny_corpus, tmp_path_factory) -> Path:
    """A folder in which `rayx run study.py --store s --set runs=10` was done."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "study.py").write_text(EXPERIMENT.format(corpus=tiny_corpus.url))
    assert run_main("run", folder / "study.py", "--store", folder / "s", "--set", "runs=10") == 0
    return folder


@pytest.fixture(scope="module")
def world_store(tmp_path_factory):
    """A store of 60 runs of an analytic world."""
    world = World.random(4, 3, seed=1)
    store = rayx.open(tmp_path_factory.mktemp("world") / "store", create=True)
    rng = np.random.default_rng(0)
    mixtures = [rayx.Mixture.from_array(w, world.domains) for w in rng.dirichlet(np.ones(4), 60)]
    world.fill(store, [world.spec(mixture, 200_000) for mixture in mixtures])
    return world, store


def csv_files(folder: Path, store) -> tuple[Path, Path]:
    runs = store.runs()
    for prefix, name in (("weight/", "weights"), ("loss/", "losses")):
        columns = [c for c in runs.columns if c.startswith(prefix)]
        frame = runs[["run_id", *columns]]
        frame.columns = ["id", *(c.removeprefix(prefix) for c in columns)]
        frame.to_csv(folder / f"{name}.csv", index=False)
    return folder / "weights.csv", folder / "losses.csv"


@pytest.mark.ray
def test_run_trains_shows_and_does_nothing_the_second_time(swept, cli):
    store, run = swept / "s", ("run", swept / "study.py", "--store", swept / "s")
    code, out, _ = cli("status", store)
    assert code == 0 and out.startswith("10/10 runs") and "(finished)" in out
    state = json.loads(cli("status", store, "--json")[1])
    assert (state["ok"], state["failed"], state["alive"]) == (10, 0, False)
    before = {f: f.stat().st_mtime_ns for f in (store / "records").iterdir()}
    assert cli(*run, "--set", "runs=10")[0] == 0
    assert before == {f: f.stat().st_mtime_ns for f in (store / "records").iterdir()}
    query = "select count(*) as n from runs where status = 'ok'"
    code, out, _ = cli("query", store, query, "--csv")
    assert (code, out) == (0, "n\n10\n")
    assert cli(*run, "--limit", "1")[0] == 0


@pytest.mark.ray
def test_run_with_a_failed_run_exits_with_1_and_says_where(ray_cluster, cli, experiment):
    code, _, err = cli("run", experiment, "--store", "s", "--set", "lr=10", "--set", "runs=2")
    assert code == 1 and "2 of 2 runs failed; see `rayx status s`" in err
    out = cli("status", "s")[1]
    assert out.count("  failed ") == 2 and "loss is" in out


def test_dry_run_prints_the_cost_and_leaves_no_store(cli, experiment):
    code, out, _ = cli("run", experiment, "--dry-run", "--store", "s")
    assert code == 0
    assert out.startswith("sweep: 4 runs, 2.56e+03 tokens, ") and "minutes" in out
    assert not Path("s").exists()


def test_fit_prints_one_json_object(cli, world_store, tmp_path):
    weights, losses = csv_files(tmp_path, world_store[1])
    code, out, _ = cli(
        "fit", "--weights", weights, "--losses", losses, "--test-weights", weights,
        "--test-losses", losses, "--regressor", "ridge", "--json",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0 and set(report) == {"rows", "targets", "mean", "seconds"}
    assert report["rows"] == {"train": 60, "test": 60}
    from_store = json.loads(cli("fit", world_store[1].url, "--regressor", "ridge", "--json")[1])
    for target, found in from_store["targets"].items():
        assert found["cv"]["spearman"] == pytest.approx(
            report["targets"][target]["cv"]["spearman"], abs=0.1
        )
    code, out, _ = cli("fit", world_store[1].url, "--regressor", "ridge")
    assert code == 0 and "ridge" in out and "mean of 3 targets" in out


def test_choose_plan_and_report_from_a_store(cli, world_store, tmp_path):
    world, store = world_store
    target = world.targets[0]
    caps = f"{world.domains[0]}=0.3"
    code, out, _ = cli(
        "choose", store.url, "--objective", f"{target}=2", "--caps", caps, "--json",
        "--name", "mine", "--regressor", "inverse-power",
    )  # fmt: skip
    choice = Choice.from_json(out)
    assert code == 0 and choice.weights[world.domains[0]] <= 0.3 + 1e-9
    assert store.read_json("choices/mine.json") == json.loads(out)
    code, out, _ = cli("report", store.url, "--out", "page.html")
    assert code == 0 and out == "page.html\n"
    page = Path("page.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and target in page
    code, out, _ = cli("choose", store.url, "--regressor", "ridge")
    assert code == 0 and "predicted objective" in out and "uniform" in out
    code, _, err = cli("report", store.url)
    assert code == 2 and "more than one" in err and "give --name" in err


def test_report_of_three_runs_says_that_nothing_could_be_fitted(cli, world_store):
    world, few = world_store[0], rayx.open("few", create=True)
    weights_RK = np.random.default_rng(1).dirichlet(np.ones(4), 3)
    world.fill(
        few, [world.spec(rayx.Mixture.from_array(w, world.domains), 200_000) for w in weights_RK]
    )
    code, _, err = cli("report", "few", "--out", "page.html")
    assert code == 0 and "nothing could be fitted" in err and Path("page.html").stat().st_size > 1e3


def test_choose_obeys_its_options_and_prints_a_front(cli, world_store, tmp_path):
    weights, losses = csv_files(tmp_path, world_store[1])
    tokens = ",".join(
        f"{domain}={'3e5' if domain == 'web' else '1e7'}"
        for domain in ("web", "code", "math", "books")
    )
    given = (
        "choose", "--weights", weights, "--losses", losses, "--objective", "web=1",
        "--regressor", "inverse-power", "--fix", "books=0.15", "--json",
    )  # fmt: skip
    plain = Choice.from_json(cli(*given)[1])
    code, out, err = cli(
        *given, "--method", "convex", "--groups", "code+math=0.3:0.6", "--discount", tokens,
        "--tokens", "1e6", "--keep", "code=proportional,math=9",
    )  # fmt: skip
    assert code == 0, err
    choice = Choice.from_json(out)
    assert choice.weights["books"] == pytest.approx(0.15, abs=1e-9)
    assert plain.weights["code"] + plain.weights["math"] < 0.3
    assert 0.3 - 1e-6 <= choice.weights["code"] + choice.weights["math"] <= 0.6 + 1e-6
    assert choice.given_up["code"] <= 1e-6 and set(choice.limits) == {"code", "math"}
    assert choice.repetition["web"] == pytest.approx(choice.weights["web"] * 1e6 / 3e5)
    assert choice.method["name"] == "convex" and plain.method["name"] == "simulate"
    code, out, _ = cli(*given, "--pareto", "web,code+math")
    front = json.loads(out)["front"]
    assert code == 0 and len(front) > 3
    goals = np.array([list(point["goals"].values()) for point in front])
    assert (np.diff(goals[:, 0]) > 0).all() and (np.diff(goals[:, 1]) < 0).all()
    assert all(point["weights"]["books"] == pytest.approx(0.15, abs=1e-6) for point in front)
    code, out, _ = cli(*given[:-1], "--pareto", "web,code+math")
    assert code == 0 and len(out.splitlines()) == len(front) + 1
    code, out, _ = cli(*given[:-1])
    assert code == 0 and "given up against proportional:" in out


@pytest.mark.ray
def test_choose_with_a_corpus_writes_a_plan_that_stands_alone(swept, cli, tiny_corpus):
    store = swept / "s"
    tokens = 4 * tiny_corpus.tokens["law"]
    code, out, err = cli(
        "choose", store, "--corpus", tiny_corpus.url, "--tokens", tokens, "--max-epochs", 3,
        "--discount", "corpus", "--regressor", "ridge", "--json",
    )  # fmt: skip
    assert code == 0, err
    choice = Choice.from_json(out)
    code, out, _ = cli("plan", store, "--out", "plan.json")
    assert code == 0 and json.loads(out) == json.loads(Path("plan.json").read_text())
    plan = Plan.from_json(json.loads(out))
    assert plan.schedule.tokens == tokens and plan.corpus == tiny_corpus.fingerprint
    assert max(plan.epochs.values()) <= 3.0 + 1e-5
    assert choice.repetition == pytest.approx(plan.epochs, abs=1e-4)
    assert len(plan.provenance["run_ids"]) == 10


def test_corpus_build_and_show(cli, tmp_path):
    for name in ("web", "code"):
        lines = [json.dumps({"text": f"{name} {i} " + "some words here " * 20}) for i in range(200)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    build = (
        "corpus", "build", "c", "--source", "web=web.jsonl", "--source", "code=code.jsonl",
        "--tokenizer", "300", "--heldout-share", "0.2",
    )  # fmt: skip
    code, _, err = cli(*build, "--min-heldout-tokens", "100000")
    assert code == 2 and "needed are 100000. Add text, raise heldout_share" in err
    code, out, err = cli(*build)
    assert code == 0 and "web" in out, err
    code, out, _ = cli("corpus", "show", "c", "--verify")
    assert code == 0 and "fingerprint" in out and "bytes/token" in out


def commands(group, path=()):
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


def test_every_command_has_help_with_an_example(cli):
    import typer

    names = list(commands(typer.main.get_command(command_tree())))
    assert ("corpus", "build") in names and ("run",) in names
    for name in names:
        code, out, _ = cli(*name, "--help")
        assert code == 0 and "Example:" in out and f"rayx {' '.join(name)}" in out


BAD_CALLS = {
    "experiment missing": (["run", "nowhere.py"], "'nowhere.py' is not a Python file"),
    "experiment not python": (["run", "notes.txt"], "is not a Python file"),
    "experiment broken": (["run", "broken.py"], "does not import: SyntaxError"),
    "experiment imports nothing": (["run", "importing.py"], "does not import: ModuleNotFound"),
    "experiment without specs": (["run", "empty.py"], "has no Parameters"),
    "set without equals": (["run", "study.py", "--set", "runs"], "'runs' has no '='"),
    "set unknown": (["run", "study.py", "--set", "run=3"], "no parameter 'run'.*mean 'runs'"),
    "set wrong type": (["run", "study.py", "--set", "runs=many"], "'many' is not of type int"),
    "set fraction of an int": (
        ["run", "study.py", "--set", "runs=1.5"],
        "'1.5' is not of type int",
    ),
    "set 15e-1": (["run", "study.py", "--set", "runs=15e-1"], "is not of type int"),
    "set bool": (["run", "study.py", "--set", "fast=yes"], "'yes' is not of type bool"),
    "set twice": (["run", "study.py", "--set", "runs=1", "--set", "runs=2"], "'runs' twice"),
    "set tuple": (["run", "study.py", "--set", "pair=3"], "can change int, float, bool and str"),
    "set out of range": (["run", "study.py", "--set", "runs=0"], "runs is 0; expected at least 1"),
    "lr out of range": (["run", "study.py", "--set", "lr=-1"], r"Optimizer.lr is -1.0.*\(0, 10\]"),
    "lr nan": (["run", "study.py", "--set", "lr=nan"], "Optimizer.lr is nan"),
    "corpus missing": (["run", "study.py", "--set", "corpus=no/where"], "no/where"),
    "no cpus": (["run", "study.py", "--cpus", "0"], "0.0 CPUs.*expected CPUs > 0"),
    "store url": (["run", "study.py", "--store", "ftp://x/y"], "'ftp://x/y' cannot be opened"),
    "status of nothing": (["status", "nowhere"], "No store at 'nowhere'.*Give the --store"),
    "query of nothing": (["query", "nowhere", "select 1"], "No store at 'nowhere'"),
    "report of nothing": (["report", "nowhere"], "No store at 'nowhere'"),
    "plan of nothing": (["plan", "nowhere"], "No store at 'nowhere'"),
    "query writes": (["query", "STORE", "drop table runs"], "is not one SELECT"),
    "query file": (["query", "STORE", "select * from read_csv('x.csv')"], "Query failed"),
    "query typo": (["query", "STORE", 'select "loss/x" from runs'], "Query failed.*loss/x"),
    "plan not there": (["plan", "STORE", "--name", "q"], "has no 'q' in plans"),
    "report unwritable": (["report", "STORE", "--out", "no/such/folder/x.html"], "Cannot write"),
    "fit of nothing": (["fit"], "Give a STORE, or --weights and --losses"),
    "fit of both": (["fit", "STORE", "--weights", "w.csv"], "not both"),
    "fit without losses": (["fit", "--weights", "w.csv"], "Give a STORE, or --weights"),
    "fit missing file": (["fit", "--weights", "w.csv", "--losses", "l.csv"], "w.csv"),
    "fit test alone": (["fit", "STORE", "--test-weights", "w.csv"], "go together"),
    "fit regressor": (["fit", "STORE", "--regressor", "lightbgm"], "lightbgm.*lightgbm"),
    "choose objective syntax": (["choose", "STORE", "--objective", "a"], "expected name=number"),
    "choose objective number": (["choose", "STORE", "--objective", "a=b"], "expected name=number"),
    "choose objective target": (["choose", "STORE", "--objective", "zzz=1"], "target 'zzz'"),
    "choose cap domain": (["choose", "STORE", "--caps", "zzz=0.5"], "'zzz'.*not among"),
    "choose infeasible": (["choose", "STORE", "--caps", "CAPS"], "caps sum to"),
    "choose floor over cap": (["choose", "STORE", "--caps", "D=.1", "--floors", "D=.2"], "above"),
    "choose corpus alone": (["choose", "STORE", "--corpus", "c"], "--corpus and --tokens go"),
    "choose other corpus": (
        ["choose", "STORE", "--corpus", "TINY", "--tokens", "1e4"],
        "no domain",
    ),
    "choose fixed over cap": (
        ["choose", "STORE", "--caps", "D=.1", "--fix", "D=.2"],
        "fixed at 0.2",
    ),
    "choose fix twice": (["choose", "STORE", "--fix", "web=.1,web=.2"], "'web' twice"),
    "choose group syntax": (
        ["choose", "STORE", "--groups", "web=0.1:x"],
        "'x'; expected a.b=least",
    ),
    "choose group domain": (["choose", "STORE", "--groups", "web+wbe=.1:.2"], "mean 'web'"),
    "choose group bounds": (["choose", "STORE", "--groups", "web=.3:.2"], "low <= high"),
    "choose group conflict": (
        ["choose", "STORE", "--groups", "web+code=.6:.8,code+math=.6:.8", "--caps", "code=.1"],
        "No mixture keeps all of: the cap of code .0.1., at least 0.6 for web.code, at least 0.6",
    ),
    "choose keep target": (["choose", "STORE", "--keep", "wbe=1"], "--keep has target 'wbe'"),
    "choose keep syntax": (["choose", "STORE", "--keep", "web=best"], "'best'; expected target="),
    "choose keep unattainable": (
        ["choose", "STORE", "--keep", "web=0.1", "--regressor", "inverse-power"],
        "keep web at most 0.1000 .least attainable",
    ),
    "choose method": (["choose", "STORE", "--method", "convx"], "Did you mean 'convex'"),
    "choose pareto target": (["choose", "STORE", "--pareto", "web,q"], "--pareto has target 'q'"),
    "choose pareto one": (["choose", "STORE", "--pareto", "web"], "two goals or more"),
    "choose discount alone": (["choose", "STORE", "--discount", "web=1"], "needs --tokens"),
    "choose discount of no corpus": (
        ["choose", "STORE", "--discount", "corpus", "--tokens", "1e6"],
        "needs --corpus",
    ),
    "choose discount domains": (
        ["choose", "STORE", "--discount", "web=1", "--tokens", "1e6"],
        "'books' is on one side only",
    ),
    "choose tokens alone": (["choose", "STORE", "--tokens", "1e6"], "--corpus and --tokens go"),
    "corpus nothing": (["corpus", "build", "c"], "source"),
    "corpus source syntax": (["corpus", "build", "c", "--source", "web"], "is not name=path"),
    "corpus source missing": (["corpus", "build", "c", "--source", "web=x.jsonl"], "x.jsonl"),
    "corpus show nothing": (["corpus", "show", "nowhere"], "nowhere"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_exits_with_2_and_says_what_is_wrong(
    name, cli, experiment, world_store, tiny_corpus, tmp_path
):
    world, store = world_store
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "importing.py").write_text("import no_such_module")
    (tmp_path / "empty.py").write_text("")
    arguments, message = BAD_CALLS[name]
    replaced = {
        "STORE": store.url,
        "TINY": tiny_corpus.url,
        "CAPS": ",".join(f"{d}=0.2" for d in world.domains),
        "D=.1": f"{world.domains[0]}=.1",
        "D=.2": f"{world.domains[0]}=.2",
    }
    code, out, err = cli(*(replaced.get(a, a) for a in arguments))
    assert code == 2 and out == ""
    assert err.startswith("error: ") and "Traceback" not in err
    assert re.search(message, err), err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/packs"))


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "x.py", "--limit", "0"], ["nonsense"], ["fit", "--seed", "-1"]],
)
def test_usage_errors_exit_with_2(cli, arguments):
    code, _, err = cli(*arguments)
    assert code == 2 and "Usage" in err

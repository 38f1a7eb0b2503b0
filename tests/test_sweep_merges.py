"""Experts and merged candidates in one sweep, on real Ray."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from pyarrow import fs

import rayx
from rayx import Evaluation, Experts, MergeSpec, Mixture, Operator, Phase, TrainSpec
from rayx.branching import make_branch, make_trunk
from rayx.errors import SpecError
from rayx.merging import Spec
from rayx.progress import progress
from rayx.proxy import train_pack
from rayx.proxy.checkpoint import read_checkpoint
from rayx.proxy.evaluate import evaluate, held_out
from rayx.proxy.merge.candidates import Merges
from rayx.proxy.model import Rotary
from rayx.sweep import Placement, estimate, run_sweep
from rayx.sweep.packs import MERGES_PER_PACK, missing_packs
from tests.samples import record
from tests.test_sweep import assert_equal_results, small_specs

pytestmark = pytest.mark.ray
DOMAINS = ("code", "law", "news")
ONE_AT_A_TIME = Placement(pack_size=4, cpus=2)  # one process to start, where that is enough


def expert_runs(corpus, steps: int = 6, general_share: float = 0.5) -> list[TrainSpec]:
    """One expert a domain, each half general, that leave a trunk after its 4 steps."""
    (template,) = small_specs(corpus, 1)
    general = Mixture.uniform(DOMAINS)
    trunk = make_trunk(template, general, 4 * template.batch_tokens)
    experts = []
    for domain in DOMAINS:
        own = {d: general_share / 3 + (1 - general_share) * (d == domain) for d in DOMAINS}
        phase = Phase(Mixture(own), steps * trunk.batch_tokens)
        experts.append(make_branch(trunk, trunk.tokens, (phase,), decay_share=0.3))
    return experts


def candidates(experts: Experts, count: int, operator: Operator | None = None) -> list[MergeSpec]:
    weights = [(share / 2, share / 2, 1 - share) for share in (i / count for i in range(count))]
    return [experts.merge(w, operator) for w in weights]


@pytest.fixture
def store(tmp_path):
    return rayx.open(tmp_path / "store", create=True)


def checkpoints(store) -> list[str]:
    found = store.filesystem.get_file_info(
        fs.FileSelector(f"{store.root}/checkpoints", allow_not_found=True)
    )
    return sorted(info.base_name for info in found)


class Study(NamedTuple):
    """Three experts, merges of them and of one of them alone."""

    runs: list[TrainSpec]
    linear: list[MergeSpec]
    edited: MergeSpec
    alone: MergeSpec

    @classmethod
    def of(cls, corpus) -> Study:
        runs = expert_runs(corpus)
        experts = Experts.of(runs)
        edited = experts.merge((0.9, 0.6, 0.3), Operator(name="task_arithmetic"))
        return cls(runs, candidates(experts, 32), edited, Experts.of(runs[:1]).merge((1.0,)))

    @property
    def specs(self) -> list[Spec]:
        """What is asked for. The merges come first: what they need is trained before them."""
        return [*self.linear, self.edited, self.alone, self.runs[0]]

    @property
    def total(self) -> int:
        return len(self.specs) + 2 + 1  # with two experts and the trunk


def doomed(runs: list[TrainSpec]) -> tuple[TrainSpec, list[MergeSpec]]:
    """An expert that diverges, and two merges with it."""
    optimizer = dataclasses.replace(runs[0].optimizer, lr=10.0, clip_norm=100.0)
    wild = dataclasses.replace(runs[0], optimizer=optimizer)
    return wild, candidates(Experts.of([wild, *runs[1:]]), 2)


@pytest.fixture(scope="module")
def quiet(ray_cluster, tiny_corpus, tmp_path_factory):
    """The store of the study and of doomed merges, swept undisturbed; checkpoints kept."""
    store = rayx.open(tmp_path_factory.mktemp("quiet") / "store", create=True)
    study = Study.of(tiny_corpus)
    failing = doomed(study.runs)[1]
    status = run_sweep(
        [*study.specs, *failing], tiny_corpus, store, train_pack, merges=Merges(),
        placement=Placement(pack_size=4), keep_checkpoints=True,
    )  # fmt: skip
    assert status == {s.run_id: "ok" for s in study.specs} | {s.run_id: "failed" for s in failing}
    return store


def test_candidates_of_an_expert_that_failed_are_failures_that_name_it(tiny_corpus, quiet):
    wild, failing = doomed(Study.of(tiny_corpus).runs)
    for spec in failing:
        assert f"run {wild.run_id}, which this one needs, failed" in (
            quiet.get(spec.run_id).failure.message
        )


def test_merges_and_trained_runs_in_one_sweep(tiny_corpus, quiet):
    store, (runs, linear, edited, alone) = quiet, Study.of(tiny_corpus)
    experts = linear[0].experts
    states = [read_checkpoint(store, m).parameters for m in experts.members]
    base = read_checkpoint(store, experts.base).parameters
    shape = runs[0].model
    targets = held_out(tiny_corpus, shape.context, linear[0].evaluation, torch.device("cpu"))

    def losses(parameters):
        stacked = {n: t[None] for n, t in parameters.items()}
        return evaluate(stacked, shape, Rotary(shape, torch.device("cpu")), targets, 8)[0]

    for spec in (linear[0], linear[11], linear[31]):
        merged = {n: sum(w * s[n] for w, s in zip(spec.weights, states, strict=True)) for n in base}
        for target, loss in losses(merged).items():
            found = store.get(spec.run_id).losses[target]
            assert found.bpb == pytest.approx(loss.bpb, rel=1e-5)
            assert found.stderr_bpb == pytest.approx(loss.stderr_bpb, rel=1e-4)
    merged = {
        n: b + sum(w * (s[n] - b) for w, s in zip(edited.weights, states, strict=True))
        for n, b in base.items()
    }
    for target, loss in losses(merged).items():
        assert store.get(edited.run_id).losses[target].bpb == pytest.approx(loss.bpb, rel=1e-5)
    # A merge of one is the run itself, evaluated again.
    for target, loss in store.get(runs[0].run_id).losses.items():
        assert store.get(alone.run_id).losses[target].bpb == pytest.approx(loss.bpb, rel=1e-5)

    frame = store.runs().set_index("run_id")
    row = frame.loc[linear[1].run_id]
    assert row["kind"] == "merge" and row["operator"] == "linear"
    assert row["expert_set"] == experts.expert_set_id
    assert row["parent"] == runs[0].parent.spec.run_id
    assert [row[f"weight/{d}"] for d in DOMAINS] == pytest.approx(
        [dict(linear[1].mixture)[d] for d in DOMAINS]
    )
    assert row["tokens"] == frame.loc[runs[0].run_id, "tokens"]  # of the run that it stands for
    assert row["flops"] < frame.loc[runs[0].run_id, "flops"]
    assert store.get(linear[1].run_id).tokens == 0
    assert store.evals().groupby("run_id").size()[linear[1].run_id] == len(tiny_corpus.targets)
    assert progress(store)["ok"] == Study.of(tiny_corpus).total


@dataclasses.dataclass(frozen=True)
class Refuses:
    """A training loop that must not be called."""

    def __call__(self, specs, *_, **__):
        raise AssertionError(f"trained {[s.run_id for s in specs]}")


@dataclasses.dataclass(frozen=True)
class Counted:
    """Merges that note in a file what is loaded and evaluated, and fail for one candidate."""

    log: str
    raises: str = ""

    def load(self, specs, store):
        self._note(f"load {specs[0].expert_set_id}")
        return {"big": torch.arange(1000).numpy()}

    def evaluate(self, specs, experts, corpus, *, pack_id, commit, device):
        assert not experts["big"].flags.writeable  # Ray's shared memory, not a copy
        for spec in specs:
            self._note(f"evaluate {spec.run_id}")
            if spec.run_id == self.raises:
                raise ValueError("no luck")
            yield dataclasses.replace(record(small_specs(corpus, 1)[0]), spec=spec)

    def _note(self, line: str) -> None:
        with open(self.log, "a") as file:
            file.write(line + "\n")


def scripted_training(specs, corpus, *, pack_id, commit, device, on_progress, store, keep):
    for spec in specs:
        for steps in keep.get(spec.run_id, ()):
            store.write_bytes(rayx.spec.Parent(spec, steps).checkpoint, b"experts")
    return [record(spec) for spec in specs]


def test_a_node_loads_an_expert_set_once_for_all_its_packs(
    ray_cluster, tiny_corpus, store, tmp_path
):
    experts = Experts.of(expert_runs(tiny_corpus))
    specs = candidates(experts, 4 * MERGES_PER_PACK)
    bad = specs[MERGES_PER_PACK + 1].run_id
    merges = Counted(str(tmp_path / "log"), raises=bad)
    status = run_sweep(specs, tiny_corpus, store, scripted_training, merges=merges)
    assert status == {s.run_id: "failed" if s.run_id == bad else "ok" for s in specs}
    lines = (tmp_path / "log").read_text().split("\n")
    assert lines.count(f"load {experts.expert_set_id}") == 1
    evaluated = [line.split()[1] for line in lines if line.startswith("evaluate")]
    # Only the one that raises is tried again, alone, so that it takes no other with it.
    assert sorted(evaluated) == sorted([*(s.run_id for s in specs), bad])
    assert store.get(bad).failure.message == "no luck"


def test_rounds_of_merges_keep_the_experts_between_them(ray_cluster, tiny_corpus, store):
    experts = Experts.of(expert_runs(tiny_corpus))
    rounds = candidates(experts, 6)

    def propose():
        ended = store.status()
        return rounds[: 2 + 2 * sum(s.run_id in ended for s in rounds) // 2]

    status = run_sweep(
        rounds[:2], tiny_corpus, store, train_pack, merges=Merges(), propose=propose,
        placement=ONE_AT_A_TIME,
    )  # fmt: skip
    assert set(status.values()) == {"ok"} and len(status) == 6
    assert len(store.runs()) == 6 + 3 + 1  # each expert and the trunk once


def test_missing_packs_train_again_only_the_experts_that_a_missing_candidate_needs(tiny_corpus):
    runs = expert_runs(tiny_corpus)
    pair, every = Experts.of(runs[:2]), Experts.of(runs)
    specs = [pair.merge((0.5, 0.5)), every.merge((0.2, 0.3, 0.5))]
    trunk = runs[0].parent.spec

    def runs_of(ended, there=()):
        packs = missing_packs(specs, 2, ended, set(there).__contains__)
        return {run: list(steps) for pack in packs for run, steps in pack.runs.items()}

    ids = [run.run_id for run in runs]
    ends = {run.run_id: [run.steps] for run in runs}
    everything = {trunk.run_id: [runs[0].parent.steps], **ends}
    asked = {s.run_id: [] for s in specs}
    assert runs_of({}) == everything | asked
    assert list(runs_of({}))[0] == trunk.run_id and list(runs_of({}))[-2:] == list(asked)
    done = dict.fromkeys([trunk.run_id, *ids, specs[1].run_id], "ok")
    third = set(ids[:2])
    assert runs_of(done) == {trunk.run_id: [runs[0].parent.steps], specs[0].run_id: []} | {
        run: ends[run] for run in third
    }
    there = [m.checkpoint for m in pair.members]
    assert runs_of(done, there) == {specs[0].run_id: []}
    assert runs_of(done | {specs[0].run_id: "ok"}) == {}


def test_merges_are_refused_where_they_cannot_work(ray_cluster, tiny_corpus, store):
    specs = candidates(Experts.of(expert_runs(tiny_corpus)), 2)
    with pytest.raises(SpecError, match="give run_sweep `merges`"):
        run_sweep(specs, tiny_corpus, store, train_pack)
    assert store.names("packs") == []
    with pytest.raises(SpecError, match="differ in experts or evaluation"):
        other = dataclasses.replace(specs[0], evaluation=Evaluation(points=1, sequences=3))
        next(Merges().evaluate([specs[1], other], None, tiny_corpus))


def test_halves_of_the_held_out_text_share_no_sequence(tiny_corpus):
    def rows(part):
        evaluation = Evaluation(points=1, sequences=10_000, part=part)
        found = held_out(tiny_corpus, 16, evaluation, torch.device("cpu"))
        return {t: [tuple(r.tolist()) for r in h.tokens] for t, h in found.items()}

    first, second, every = rows("first"), rows("second"), rows("all")
    for target in tiny_corpus.targets:
        assert first[target] + second[target] == every[target]
        assert min(len(first[target]), len(second[target])) > 10


def test_estimate_counts_merges_as_evaluations(tiny_corpus):
    runs = expert_runs(tiny_corpus)
    trained = estimate(runs, tiny_corpus, train_pack, Placement())
    merged = estimate(
        [*runs, *candidates(Experts.of(runs), 100)], tiny_corpus, train_pack, Placement()
    )
    assert (merged.runs, trained.runs) == (104, 4)
    assert merged.tokens == trained.tokens and merged.flops == trained.flops


@dataclasses.dataclass(frozen=True)
class SlowTraining:
    """A training loop slow enough to be killed within, whose processes leave their ids."""

    folder: str

    def __call__(self, *arguments, **options):
        (Path(self.folder) / str(os.getpid())).touch()
        time.sleep(0.5)
        return train_pack(*arguments, **options)


@dataclasses.dataclass(frozen=True)
class SlowMerges(Merges):
    """Merges slow enough to be killed among them, whose processes leave their ids."""

    folder: str

    def evaluate(self, *arguments, **options):
        (Path(self.folder) / str(os.getpid())).touch()
        for found in super().evaluate(*arguments, **options):
            time.sleep(0.1)
            yield found


DRIVER = """
import sys
import rayx
from rayx.corpus import Corpus
from rayx.sweep import Placement, run_sweep
from tests.test_sweep_merges import SlowMerges, SlowTraining, Study
corpus, folder = Corpus.load(sys.argv[1]), sys.argv[3]
run_sweep(Study.of(corpus).specs, corpus, rayx.open(sys.argv[2], create=True),
          SlowTraining(folder), merges=SlowMerges(folder), placement=Placement(pack_size=4))
"""


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def killed_at(corpus, store: Path, records: int, address: str) -> dict[str, bytes]:
    """Kill -9 a driver when the store has so many records; return what it holds then."""
    with tempfile.TemporaryDirectory() as pids:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, corpus.url, str(store), pids],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "RAY_ADDRESS": address, "RAY_AUTH_MODE": "token"},
            start_new_session=True,
        )
        while len(list((store / "records").glob("*.json"))) < records:
            assert driver.poll() is None
            time.sleep(0.02)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
        # A job's processes end with their driver; what they finish before that still counts.
        ends = time.monotonic() + 30
        while any(is_alive(int(file.name)) for file in Path(pids).iterdir()):
            assert time.monotonic() < ends, "a killed driver's workers go on"
            time.sleep(0.02)
    return {f.name: f.read_bytes() for f in (store / "records").glob("*.json")}


def test_killed_in_the_expert_stage_and_in_the_merged_stage_nothing_finished_is_redone(
    ray_cluster, tiny_corpus, quiet, tmp_path
):
    disturbed, study = tmp_path / "disturbed", Study.of(tiny_corpus)
    address = ray_cluster.get_runtime_context().gcs_address
    in_experts = killed_at(tiny_corpus, disturbed, 2, address)
    assert 2 <= len(in_experts) < 4  # the trunk and one or two of a pack of three experts
    kept = {f: f.stat().st_mtime_ns for f in (disturbed / "checkpoints").iterdir()}
    assert len(kept) >= 2
    in_merges = killed_at(tiny_corpus, disturbed, 4 + 8, address)
    assert 4 + 8 <= len(in_merges) < study.total
    assert all(f.stat().st_mtime_ns == then for f, then in kept.items())  # nor trained again
    # Over the kept checkpoints nothing is trained; then they are dropped.
    opened = rayx.open(disturbed)
    run_sweep(
        study.specs, tiny_corpus, opened, Refuses(), merges=Merges(),
        placement=ONE_AT_A_TIME,
    )  # fmt: skip
    assert checkpoints(opened) == []
    for before in (in_experts, in_merges):
        for name, content in before.items():
            assert (disturbed / "records" / name).read_bytes() == content
    first, second = (
        {name: json.loads(Path(store.root, "records", f"{name}.json").read_text())
         for name in store.names("records")}
        for store in (opened, quiet)
    )  # fmt: skip
    assert len(first) == study.total
    assert {r: f["curve"] for r, f in first.items()} == {r: second[r]["curve"] for r in first}
    trained = [spec.run_id for spec in (study.runs[0].parent.spec, *study.runs)]
    assert_equal_results({r: first[r] for r in trained}, {r: second[r] for r in trained})

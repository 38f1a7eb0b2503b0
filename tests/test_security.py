"""Hostile input: each is refused by name or made harmless, and nothing but RayxError escapes.

Stores, corpora, models and CSV files come from other people. What they may hold is what rayx
writes; anything else is named. The tests that need S3 or a cluster are with those parts.
"""

from __future__ import annotations

import bz2
import copy
import dataclasses
import gzip
import html.parser
import json
import lzma
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rayx
from rayx import Corpus, Mixture, Schedule
from rayx.choose import Choice
from rayx.corpus import Source, build_corpus
from rayx.errors import CorpusError, FitError, ModelError, RayxError, SpecError, StoreError
from rayx.fit import Table
from rayx.fit.laws.table import LawTable
from rayx.merging import Experts, spec_from_json
from rayx.plan import Plan
from rayx.policy import policy_from_json, policy_to_json
from rayx.progress import progress
from rayx.proxy.checkpoint import read_checkpoint
from rayx.proxy.merge.model_files import ModelFiles
from rayx.proxy.merge.tensor_files import read_header
from rayx.record import Record
from rayx.report import render
from rayx.spec import Parent
from rayx.store import Store
from rayx.synthetic import World
from tests.samples import SPEC, record, train_spec
from tests.test_cli import EXPERIMENT, run_main
from tests.test_policies import EVERY

ROOT = Path(__file__).parents[1]
HOSTILE = "<script>alert(1)</script>\x1b]0;owned\x07\x1b[31m'\"; DROP TABLE runs--\n[bold]"


@pytest.fixture
def store(tmp_path) -> Store:
    made = rayx.open(tmp_path / "store", create=True)
    made.put(record())
    return made


# A crafted store ------------------------------------------------------------------------------

MARKERS = {
    "a list": "[]",
    "null": "null",
    "a format that is a list": '{"format": [1]}',
    "a format that is NaN": '{"format": NaN}',
    "an integer of 10,000 digits": '{"format": ' + "9" * 10_000 + "}",
    "nested 200,000 deep": "[" * 200_000,
    "not text": b"\xff\xfe\x00",
}


@pytest.mark.parametrize("kind", MARKERS)
def test_store_with_a_crafted_marker_is_refused(store, kind):
    content = MARKERS[kind]
    marker = Path(store.root) / "store.json"
    marker.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StoreError, match=r"cannot be read|has format .*reads 1"):
        rayx.open(store.root)


def json_files() -> list[dict[str, Any]]:
    """Records of every kind that there is, as JSON."""
    branch = dataclasses.replace(SPEC, parent=Parent(SPEC, 8), seed=3)
    steered = [dataclasses.replace(SPEC, policy=policy) for policy in EVERY.values()]
    merged = Experts.of([train_spec(seed=1), train_spec(seed=2)]).merge([0.5, 0.5])
    records = [record(spec).to_json() for spec in (SPEC, branch, merged, *steered)]
    steps = {"step": 0, "weights": {"web": 0.5}, "signal": [1.0], "loss_weights": None}
    return [*records, records[3] | {"decisions": [steps]}, record(failed=True).to_json()]


RECORDS = json_files()
JUNK = st.sampled_from(
    [None, True, 0, -1, 1.5, float("inf"), float("nan"), 2**62, 10**40, -(2**70), "", "x", "../x",
     "\ud800", [], {}, [1], {"a": 1}, [[[]]], {"parent": {}}, {"probe": {}}, {"mixture": [1]}]
)  # fmt: skip


def places(data: Any, path: tuple = ()) -> list[tuple]:
    inside = data.items() if isinstance(data, dict) else ()
    inside = enumerate(data) if isinstance(data, list) else inside
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


@st.composite
def tampered(draw, originals: list) -> Any:
    """One of the originals with a value or two replaced, renamed or removed."""
    data = copy.deepcopy(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(data)))
        if not path:
            return draw(JUNK)
        owner = data
        for key in path[:-1]:
            owner = owner[key]
        what = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if what == "replace" or isinstance(owner, list):
            owner[path[-1]] = copy.deepcopy(draw(JUNK))
        else:
            value = owner.pop(path[-1])
            if what == "rename":
                owner["unknown"] = value
    return data


FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(tampered(RECORDS))
def test_tampered_record_is_refused_or_makes_rows_that_a_table_can_hold(data):
    try:
        found = Record.from_json(data)
    except RayxError:
        return
    for rows in ([found.run_row()], found.eval_rows(), found.decision_rows()):
        pa.Table.from_pandas(pd.DataFrame(rows))
    json.dumps(found.to_json(), allow_nan=False).encode()


PLAN = Plan(
    schedule=Schedule.constant(Mixture({"web": 1}), 10), epochs={"web": 0.1}, caps={},
    domain_tokens={"web": 100}, corpus="c", choice={}, provenance={},
).to_json()  # fmt: skip
READERS: dict[str, tuple[Callable, list]] = {
    "spec": (spec_from_json, [data["spec"] for data in RECORDS]),
    "policy": (policy_from_json, [policy_to_json(policy) for policy in EVERY.values()]),
    "plan": (Plan.from_json, [PLAN]),
}


@pytest.mark.parametrize("kind", READERS)
def test_nothing_but_a_rayx_error_comes_of_tampered_json(kind):
    read, originals = READERS[kind]

    @FUZZ
    @given(tampered(originals))
    def check(data):
        try:
            read(data)
        except RayxError:
            pass

    for original in originals:
        read(original)
    check()


def test_spec_with_ten_thousand_ancestors_is_refused():
    data = SPEC.to_json()
    for _ in range(10_000):
        data = {**SPEC.to_json(), "parent": {"spec": data, "steps": 8}}
    with pytest.raises(SpecError, match="cannot be read: RecursionError"):
        spec_from_json(data)


def test_record_of_nested_json_costs_no_other_record(store, caplog):
    (Path(store.root) / "records" / "aaaaaaaaaaaa.json").write_text('{"a":' * 100_000)
    assert store.runs()["run_id"].tolist() == [SPEC.run_id]
    assert "aaaaaaaaaaaa.json" in caplog.text and "nested too deep" in caplog.text


def test_record_that_is_too_large_is_refused_unread(store, monkeypatch):
    monkeypatch.setattr("rayx.files.MOST_JSON_BYTES", 1000)
    with pytest.raises(StoreError, match=r"has [\d,]+ bytes, expected at most 1,000"):
        store.get(SPEC.run_id)


def test_symlink_in_a_store_leads_nowhere(store, tmp_path, caplog):
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(record(train_spec(seed=5)).to_json()))
    run_id = train_spec(seed=5).run_id
    (Path(store.root) / "records" / f"{run_id}.json").symlink_to(elsewhere)
    with pytest.raises(StoreError, match=run_id):
        store.get(run_id)
    assert store.runs()["run_id"].tolist() == [SPEC.run_id]


@pytest.mark.parametrize("folder", ["sweeps", "drivers", "heartbeats"])
@pytest.mark.parametrize("content", [[], "x", {}, {"tokens": [], "time": "x"}, {"runs": 5}, None])
def test_crafted_file_of_a_sweep_is_left_out_of_the_progress(store, folder, content):
    tokens = {SPEC.run_id: 1}
    store.write_json("sweeps/a.json", {"tokens": tokens, "started": 1.0, "tokens_before": 0})
    store.write_json(f"{folder}/a.json", content)
    state = progress(store)
    assert state["total"] == (folder != "sweeps") and not state["alive"]


# Names that lead out of a store ---------------------------------------------------------------

NAMES = ["../../x", "/etc/passwd", "a/../../x", "..", ".hidden", "a\\..\\b", "a\0b", "x" * 300, "",
         "a b", "%2e%2e/x", "\u202eexe"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_name_cannot_lead_out_of_a_store(store, name):
    before = sorted(Path(store.root).rglob("*"))
    for use in (
        lambda: store.write_json(f"plans/{name}.json", {}) if name else store.write_json("", {}),
        lambda: store.put_pack(name, [SPEC]),
        lambda: store.get_pack(name),
        lambda: store.read_bytes(f"checkpoints/{name}/x"),
        lambda: store.exists(f"choices/{name}/x"),
        lambda: store.remove(f"records/{name}/x"),
        lambda: store.beat(f"heartbeats/{name}/x"),
        lambda: store.get(f"{name}/x"),
    ):
        with pytest.raises(RayxError, match="cannot be used in a store|has no record"):
            use()
    assert sorted(Path(store.root).rglob("*")) == before


@pytest.fixture(scope="module")
def chosen(tmp_path_factory) -> Store:
    """A store of 12 runs and the choice from them."""
    world = World.random(3, 2, seed=0)
    made = rayx.open(tmp_path_factory.mktemp("chosen") / "world", create=True)
    weights_RK = np.random.default_rng(0).dirichlet(np.ones(3), 12)
    mixtures = [Mixture.from_array(weights, world.domains) for weights in weights_RK]
    world.fill(made, [world.spec(mixture, 100_000) for mixture in mixtures])
    assert run_main("choose", made.root, "--regressor", "ridge") == 0
    return made


@pytest.mark.parametrize("command", ["choose", "plan", "report"])
def test_option_name_cannot_lead_out_of_a_store(command, chosen, capsys):
    assert run_main(command, chosen.root, "--name", "../../x") == 2
    assert "../../x" in capsys.readouterr().err
    assert not list(Path(chosen.root).parent.parent.glob("x*"))


@pytest.mark.parametrize("content", ["[", "[" * 100_000, '"x"', "[1]", '{"provenance": 5}'])
@pytest.mark.parametrize("folder", ["plans", "choices"])
def test_damaged_choice_or_plan_is_named(chosen, tmp_path, capsys, folder, content):
    file = Path(chosen.root) / folder / "choice.json"
    kept = file.read_bytes() if file.exists() else None
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)
    try:
        assert run_main("report", chosen.root, "--out", tmp_path / "r.html") == 2
    finally:
        file.write_bytes(kept) if kept else file.unlink()
    assert re.search(r"damaged|not the JSON of a choice", capsys.readouterr().err)


def test_choice_of_wrong_types_costs_only_its_sections_of_a_report(chosen, caplog):
    choice = Choice.from_json(json.dumps(chosen.read_json("choices/choice.json")))
    broken = dataclasses.replace(choice, predicted={}, weights="x")  # pyright: ignore
    page = render(chosen, choice=broken)
    assert "The store holds what cannot be drawn here" in page and "section verdict" in caplog.text
    assert "Loss curves" in page and "12 recorded" in page


@pytest.mark.parametrize("content", [None, 5, {"a": 1}, [1], [{}], [[[]]], "x"])
def test_crafted_pack_is_named(store, content):
    store.write_json("packs/abc.json", content)
    with pytest.raises(StoreError, match=r"packs/abc\.json .* is damaged"):
        store.get_pack("abc")


# A crafted corpus -----------------------------------------------------------------------------


def put(*path: Any) -> Callable[[dict], None]:
    def change(manifest: dict) -> None:
        owner: Any = manifest
        for key in path[:-2]:
            owner = owner[key]
        owner[path[-2]] = path[-1]

    return change


MANIFESTS: dict[str, tuple[Callable[[dict], None], str]] = {
    "a shard above the corpus": (put("domains", 0, "train", "file", "../../etc/passwd"), "a file"),
    "a shard at an absolute path": (put("domains", 0, "train", "file", "/etc/passwd"), "a file"),
    "a shard's name with a zero byte": (put("domains", 0, "train", "file", "a\0b"), "a file is"),
    "another tokenizer": (put("tokenizer", "file", "../x.json"), "expected 'tokenizer.json'"),
    "10^15 tokens": (put("domains", 0, "train", "tokens", 10**15), "file_bytes of .*expected 2"),
    "tokens in words": (put("domains", 0, "train", "tokens", "x"), "tokens of .*'x'"),
    "fewer than no bytes": (put("domains", 0, "heldout", "bytes", -5), "bytes of .*-5"),
    "no held-out tokens": (put("domains", 0, "heldout", "tokens", 0), "tokens of .*> 0"),
    "a size that is no map": (put("domains", 0, "train", "file_bytes", 101), "file_bytes of .*101"),
    "objects": (put("dtype", "O"), "dtype is 'O'"),
    "a domain that is HTML": (put("domains", 0, "name", "<script>"), "Domain name '<script>'"),
    "a domain that is a command": (put("domains", 0, "name", "a\x1b[31m"), "Domain name 'a.x1b"),
    "a domain that is a path": (put("domains", 0, "name", "../x"), "Domain name '../x'"),
    "a domain twice": (put("domains", 0, "name", "law"), "each name once"),
    "a domain that is a number": (put("domains", 0, "name", 5), "damaged"),
    "no domains": (put("domains", []), "domains is"),
    "an end of text out of range": (put("eos_id", 10**9), "eos_id"),
    "a vocabulary of 10^12": (put("vocab_size", 10**12), "vocab_size"),
    "another fingerprint": (put("fingerprint", "0" * 16), "by its domains'"),
    "another hash": (put("domains", 0, "train", "sha256", "0" * 64), "by its hashes"),
    "counts in words": (put("domains", 0, "skipped", {"a": "b"}), "skipped of"),
}


@pytest.fixture(scope="module")
def built(tiny_corpus, tmp_path_factory) -> Path:
    return Path(shutil.copytree(tiny_corpus.url, tmp_path_factory.mktemp("crafted") / "corpus"))


@pytest.mark.parametrize("kind", MANIFESTS)
def test_corpus_with_a_crafted_manifest_is_refused(built, tiny_corpus, kind):
    change, words = MANIFESTS[kind]
    manifest = copy.deepcopy(tiny_corpus.manifest)
    change(manifest)
    (built / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match=words):
        Corpus.load(built)


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", '{"format_version": 1}', "\0"])
def test_corpus_whose_manifest_is_none_is_refused(built, content):
    (built / "manifest.json").write_text(content)
    with pytest.raises(CorpusError, match=r"manifest\.json"):
        Corpus.load(built)


# Sources of a corpus --------------------------------------------------------------------------

LINE = b'{"text": "' + b"a" * 5_000_000 + b'"}\n'
PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": None, "": bytes}


@pytest.mark.parametrize("form", ["jsonl", "txt"])
@pytest.mark.parametrize("suffix", PACKED)
def test_file_that_expands_is_refused_before_it_fills_the_memory(
    tmp_path, monkeypatch, suffix, form
):
    monkeypatch.setattr("rayx.corpus.rows.MOST_BYTES", 1_000_000)
    pack = PACKED[suffix] or (lambda data: pa.compress(data, "zstd", asbytes=True))
    file = tmp_path / f"bomb.{form}{suffix}"
    file.write_bytes(pack(LINE))
    with pytest.raises(CorpusError, match=r"bomb.*more than 1,000,000 bytes"):
        build_corpus([Source(path=str(file), domain="web")], tmp_path / "out", tokenizer=300)


@pytest.mark.parametrize(
    "line", ['{"a":' * 100_000, '{"text": ' + "9" * 10_000 + "}", "NaN"], ids=["deep", "big", "NaN"]
)
def test_line_that_breaks_a_parser_is_named(tmp_path, line):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(CorpusError, match=r"a\.jsonl', line 2"):
        build_corpus([Source(path=str(file), domain="web")], tmp_path / "out", tokenizer=300)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_damaged_archive_is_named_and_bad_text_in_one_is_skipped(tmp_path, suffix):
    pack = PACKED[suffix] or (lambda data: pa.compress(data, "zstd", asbytes=True))
    file = tmp_path / f"a.jsonl{suffix}"
    rows = b"".join(b'{"text": "row %d of text"}\n' % n for n in range(99)) + b'{"text": "\xff"}'
    file.write_bytes(pack(rows))
    given = [Source(path=str(file), domain="web")]
    made = build_corpus(
        given, tmp_path / "out", tokenizer=300, heldout_share=0.2, min_heldout_tokens=1
    )
    assert made.manifest["domains"][0]["skipped"] == {"invalid UTF-8": 1}
    file.write_bytes(pack(rows)[:-20])
    with pytest.raises(CorpusError, match=r"a\.jsonl.*cannot be read"):
        build_corpus(given, tmp_path / "other", tokenizer=300)


# SQL ------------------------------------------------------------------------------------------

QUERIES = [
    "COPY runs TO '{out}'",
    "ATTACH '{out}'",
    "EXPORT DATABASE '{out}'",
    "SELECT * FROM read_csv('{file}')",
    "SELECT * FROM read_text('{file}')",
    "SELECT * FROM read_blob('{file}')",
    "SELECT * FROM read_json_auto('{file}')",
    "SELECT * FROM read_parquet('/**/*.parquet')",
    "SELECT * FROM '{file}'",
    "SELECT * FROM glob('/etc/*')",
    "SELECT * FROM sniff_csv('{file}')",
    "SELECT * FROM query_table('{file}')",
    "SELECT * FROM parquet_metadata('{file}')",
    "SELECT getenv('HOME')",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET enable_external_access = true",
    "PRAGMA enable_profiling",
    "CALL pragma_version()",
    "DELETE FROM runs",
    "DROP VIEW runs",
    "CREATE TABLE x AS SELECT 1",
    "WITH x AS (INSERT INTO runs SELECT * FROM runs RETURNING *) SELECT * FROM x",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP VIEW runs",
    "SELECT * FROM leaked",
    "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "",
    "\0",
]


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: ascii(query)[:40])
def test_sql_writes_nothing_and_reads_nothing_but_the_tables(store, tmp_path, query):
    leaked = pd.DataFrame({"secret": [1]})
    file, out = tmp_path / "secret.csv", tmp_path / "written"
    file.write_text("secret\n1\n")
    with pytest.raises(StoreError, match="Query|not one SELECT"):
        store.sql(query.replace("{file}", str(file)).replace("{out}", str(out)))
    assert not out.exists() and len(leaked) == 1
    assert store.sql("select count(*) as n from runs")["n"].tolist() == [1]


# Hostile names --------------------------------------------------------------------------------


@pytest.fixture
def hostile(tmp_path) -> Store:
    """A store that somebody else made, whose domains, targets and failures are attacks."""
    made = rayx.open(tmp_path / "hostile", create=True)
    for seed in range(3):
        schedule = Schedule.constant(Mixture({HOSTILE: 1 + seed, "code": 1}), 16_384)
        run = record(train_spec(schedule=schedule), failed=seed == 2)
        if run.failure:
            failure = dataclasses.replace(run.failure, message=f"error {HOSTILE}")
            run = dataclasses.replace(run, failure=failure)
        losses = [dataclasses.replace(p, losses={HOSTILE: p.losses["web"]}) for p in run.curve]
        made.put(dataclasses.replace(run, curve=tuple(losses)))
    return made


def test_report_escapes_every_name(hostile):
    page = render(hostile, title=HOSTILE)
    assert "<script" not in page and "\x1b" not in page and "\x07" not in page
    assert "&lt;script&gt;" in page
    seen: list[str] = []

    class Tags(html.parser.HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.extend([tag, *(name for name, _ in attrs)])

    Tags().feed(page)
    assert "script" not in seen and not [name for name in seen if name.startswith("on")]


@pytest.mark.parametrize(
    "arguments",
    [("status",), ("status", "--json"), ("query", "select * from runs"), ("query", "from evals"),
     ("query", "from runs", "--csv"), ("query", f"select '{HOSTILE}"), ("fit",), ("choose",),
     ("plan", "--name", HOSTILE)],
    ids=lambda arguments: " ".join(arguments)[:24],
)  # fmt: skip
def test_terminal_gets_no_command_from_a_name(hostile, capsys, arguments):
    run_main(arguments[0], hostile.root, *arguments[1:])
    said = capsys.readouterr()
    assert said.out + said.err
    assert not re.search(r"[^\n\x20-\x7e\u2010-\uffff]", said.out + said.err)


def test_choice_is_shown_with_names_that_look_like_markup(capsys):
    from rich.console import Console

    from rayx.cli.output import grid_of

    grid = grid_of("", "[/]")
    grid.add_row("[/red]\x1b[2J", "1")
    Console().print(grid)
    assert "[/red]\\x1b[2J" in capsys.readouterr().out


# CSV ------------------------------------------------------------------------------------------

CSVS = {
    "a cell of 30 MB": (b"id,loss\na," + b"1" * 30_000_000 + b"\n", "field larger than"),
    "a cell of 100 kB of text": (b"id,loss\na," + b"x" * 100_000 + b"\nb,1\n", "value is 'xxx"),
    "200,000 columns": (b"id" + b",a" * 200_000 + b"\n", "200,001 columns.*expected at most"),
    "zero bytes": (b"id,lo\0ss\na,1\n", "zero bytes"),
    "zero bytes below": (b"id,loss\na,1\0\n", "zero bytes"),
    "UTF-16": ("id,loss\na,1".encode("utf-16"), "not UTF-8"),
    "an open quote": (b'id,loss\na,"1\n', "expected at least 8"),
    "an infinite loss": (b"id,loss\na,1e999\n", "."),
}


@pytest.mark.parametrize("kind", CSVS)
def test_crafted_csv_is_refused(tmp_path, kind):
    content, words = CSVS[kind]
    file = tmp_path / "a.csv"
    file.write_bytes(content)
    with pytest.raises(FitError, match=words) as refused:
        Table.from_csv(file, file)
    assert len(str(refused.value)) < 1000
    with pytest.raises(FitError) as refused:
        LawTable.from_csv(file).arrays  # noqa: B018
        raise FitError("read as the numbers and notes that it holds")
    assert len(str(refused.value)) < 1000


def test_large_csv_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("rayx.fit.csv_files.MOST_BYTES", 100)
    file = tmp_path / "a.csv"
    file.write_text("id,loss\n" + "a,1\n" * 100)
    for read in (LawTable.from_csv, lambda path: Table.from_csv(path, path)):
        with pytest.raises(FitError, match="408 bytes; expected at most 100"):
            read(file)


def test_csv_is_neither_fetched_nor_expanded(tmp_path):
    with pytest.raises(FitError, match="Cannot read .*no such file"):
        LawTable.from_csv("http://localhost:9/runs.csv")
    file = tmp_path / "a.csv.gz"
    file.write_bytes(gzip.compress(b"params,loss\n" + b"1,2\n" * 100_000))
    with pytest.raises(FitError):
        LawTable.from_csv(file)


# Models and checkpoints -----------------------------------------------------------------------


def safetensors(header: Any, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + b"\0" * 64


def tensor(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]} | changes}


HEADERS = {
    "a header of 2^60 bytes": (safetensors(b"{}", 2**60), "truncated or not a safetensors"),
    "a header longer than the file": (safetensors(b"{}", 10**6), "truncated or not"),
    "nothing": (b"", "truncated"),
    "nested 100,000 deep": (safetensors(b"[" * 100_000), "not a safetensors file"),
    "a list": (safetensors([1]), "not an object"),
    "a tensor beyond the file": (safetensors(tensor(data_offsets=[10**9, 10**9 + 16])), "trunc"),
    "a tensor of 2^124 bytes": (
        safetensors(tensor(shape=[2**61, 2**61], data_offsets=[0, 2**124])), "truncated"),
    "a negative shape": (safetensors(tensor(shape=[-1, -4])), "header of tensor 'a' is damaged"),
    "a negative offset": (safetensors(tensor(data_offsets=[-16, 0])), "is damaged"),
    "half a row": (safetensors(tensor(shape=[4.5])), "is damaged"),
    "metadata of numbers": (safetensors({"__metadata__": {"a": 1}} | tensor()), "metadata"),
    "a pickle": (b"\x80\x04\x95" + b"x" * 100, "a pickle"),
    "a zipped pickle": (b"PK\x03\x04" + b"0" * 100, "PyTorch pickle"),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_crafted_safetensors_is_refused(store, tmp_path, kind):
    content, words = HEADERS[kind]
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(ModelError, match=words):
        read_header(file)
    parent = Parent(SPEC, 8)
    store.write_bytes(parent.checkpoint, content)
    with pytest.raises(StoreError, match=rf"{parent.checkpoint}.*damaged|another model"):
        read_checkpoint(store, parent)


class Bomb:
    """Unpickling it leaves a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_pickles_are_never_loaded(store, tmp_path):
    import pickle

    fired = tmp_path / "fired"
    bomb = pickle.dumps(Bomb(fired))
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (folder, Path(store.root) / "records", Path(store.root) / "checkpoints"):
        place.mkdir(exist_ok=True)
        for name in ("pytorch_model.bin", "a.pkl", "model.pt", "training_args.bin"):
            (place / name).write_bytes(bomb)
    (folder / "config.json").write_text('{"auto_map": {"AutoConfig": "evil.Config"}}')
    (folder / "evil.py").write_text(f"open({str(fired)!r}, 'w')")
    with pytest.raises(ModelError, match="pickled"):
        ModelFiles.open(folder)
    assert run_main("merge", folder, folder, "--out", tmp_path / "m") == 2
    assert len(store.records()) == len(store.runs()) == 1 and store.compact() == 1
    assert not fired.exists()


@pytest.mark.parametrize(
    "pattern",
    [r"\bpickle\.(loads?|Unpickler)", r"\btorch\.load\(", r"\bjoblib\b", r"allow_pickle\s*=\s*True",
     r"\byaml\.(load|unsafe_load|full_load)\(", r"\b(eval|exec)\(", r"trust_remote_code\W+True",
     r"shell\s*=\s*True", r"\bos\.system\("],
)  # fmt: skip
def test_source_holds_no_door(pattern):
    files = [*(ROOT / "rayx").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")]
    found = [
        f"{file.relative_to(ROOT)}: {line.strip()}"
        for file in files
        for line in file.read_text().splitlines()
        if re.search(pattern, line) and not re.search(r"\.(eval|exec)\(", line)
    ]
    assert not found


# Secrets --------------------------------------------------------------------------------------

SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "canary-aws-7f3a", "WANDB_API_KEY": "canary-wandb-91bc",
    "RAY_AUTH_TOKEN": "c0ffee" * 8, "HF_TOKEN": "canary-hf-55de", 
    "MLFLOW_TRACKING_TOKEN": "canary-ml-0a",
}  # fmt: skip


@pytest.mark.ray
def test_secrets_of_the_environment_are_in_no_file_and_no_output(
    ray_cluster, tiny_corpus, tmp_path, monkeypatch, capfd
):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    study = tmp_path / "study.py"
    study.write_text(EXPERIMENT.format(corpus=tiny_corpus.url))
    url = tmp_path / "s"
    assert (
        run_main(
            "run",
            study,
            "--store",
            url,
            "--set",
            "runs=2",
            "--cpus",
            "2",
            "--log-to",
            "tensorboard",
        )
        == 0
    )
    assert run_main("status", url) == 0
    said = "".join(capfd.readouterr())
    folders = [tmp_path, Path(ray_cluster._private.worker._global_node.get_session_dir_path())]
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    texts = {str(file): file.read_bytes() for file in files}
    assert len(texts) > 8
    for value in SECRETS.values():
        assert value not in said
        assert not [name for name, content in texts.items() if value.encode() in content]


def test_traceback_on_record_holds_no_values():
    from rayx.sweep.trial import failed_record, failure_of

    def work(token: str) -> None:
        password = token + "-more"
        raise ValueError(len(password))

    secret = "-".join(["canary", "local"])
    try:
        work(secret)
    except ValueError as error:
        found = failed_record(SPEC, failure_of(error), "pack", "")
    assert found.failure and secret not in json.dumps(found.to_json())
    assert "in work" in found.failure.traceback


def test_error_with_signs_that_no_file_holds_is_a_record_that_reads_back():
    from rayx.sweep.trial import failed_record, failure_of

    failed = failed_record(SPEC, failure_of(OSError("no file \udcff here")), "pack", "")
    assert Record.from_json(json.loads(json.dumps(failed.to_json()))).status == "failed"

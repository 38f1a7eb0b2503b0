"""Tables on Parquet parts: the same rows as the records give, whatever happened to the parts."""

import dataclasses
import random
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pandas.testing import assert_frame_equal

from rayx import parts
from rayx.policy import Decision
from rayx.record import Record
from rayx.store import Store, open_store
from tests.samples import record, train_spec
from tests.test_store import other_record

TABLES = ("runs", "evals", "decisions")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder) -> Store:
    return open_store(folder, create=True)


def part_files(folder: Path) -> list[Path]:
    return sorted((folder / "compact").glob("*.parquet"))


def decoded(folder: Path) -> Store:
    """The same records in a store without parts: what the tables must say."""
    copy = folder.with_name("decoded")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("compact"))
    return open_store(copy)


def assert_tables_are_those_of_the_records(folder: Path, *stores: Store) -> None:
    expected = decoded(folder)
    for store in (*stores, open_store(folder)):
        for name in TABLES:
            frame = getattr(expected, name)()
            assert_frame_equal(getattr(store, name)(), frame)
            count = store.sql(f"select count(distinct run_id) as n from {name}")["n"][0]
            assert count == frame["run_id"].nunique()


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


def flip_in_column(path: Path, name: str) -> None:
    """Damage the last byte of a column's values."""
    group = pq.read_metadata(path).row_group(0)
    columns = {(c := group.column(i)).path_in_schema: c for i in range(group.num_columns)}
    start = columns[name].dictionary_page_offset or columns[name].data_page_offset
    flip(path, start + columns[name].total_compressed_size - 1)


def with_decisions(seed: int) -> Record:
    """A finished run of a policy."""
    weights = {0: {"web": 0.5, "code": 0.5}, 16: {"web": 0.9, "code": 0.1}}
    decisions = tuple(Decision(step=step, weights=w) for step, w in weights.items())
    return dataclasses.replace(other_record(3 * seed), decisions=decisions)


@pytest.mark.parametrize("seed", range(6))
def test_tables_are_those_of_the_records_whatever_happens(folder, store, seed, monkeypatch):
    """Records come, fail and go, parts are damaged, lost and doubled, compactions come between."""
    monkeypatch.setattr(parts, "BATCH_RUNS", 3)
    rng = random.Random(seed)
    reader = open_store(folder)  # has parts open that change under it

    def forget() -> None:
        if names := store.names("records"):
            store.remove(f"records/{rng.choice(names)}.json")

    def damage() -> None:
        if files := part_files(folder):
            file = rng.choice(files)
            kind = rng.choice(["flip", "cut", "remove", "empty"])
            if kind == "remove":
                file.unlink()
            elif kind == "flip":
                flip(file, rng.randrange(file.stat().st_size))
            else:
                content = file.read_bytes()
                file.write_bytes(content[: len(content) // 2 if kind == "cut" else 0])

    def double() -> None:
        """As two drivers leave it that compact the same records."""
        for file in part_files(folder):
            if not file.name.startswith("two"):
                shutil.copy(file, file.with_name(f"two{file.name}"))

    def put() -> None:
        store.put(other_record(rng.randrange(30), failed=rng.random() < 0.2))

    acts = [put, put, put, put, forget, damage, double]
    acts += [store.compact, lambda: open_store(folder).compact(), reader.runs]
    for _ in range(25):
        rng.choice(acts)()
    assert_tables_are_those_of_the_records(folder, store, reader)
    store.compact()
    assert_tables_are_those_of_the_records(folder, store, reader)
    finished = len(store.names("records"))
    assert sum(len(pq.read_table(f)) for f in part_files(folder) if ".runs." in f.name) == finished


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("damage", ["page", "footer", "cut", "empty"])
def test_damaged_part_is_named_and_its_records_are_read(folder, store, caplog, table, damage):
    for run in [other_record(0), *map(with_decisions, range(1, 5))]:
        store.put(run)
    store.compact()
    (file,) = (f for f in part_files(folder) if f.name.endswith(f".{table}.parquet"))
    content = file.read_bytes()
    if damage == "page":
        flip_in_column(file, "run_id")
    elif damage == "footer":
        flip(file, len(content) - 20)
    else:
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    assert_tables_are_those_of_the_records(folder, store)
    assert f"compact/{file.name.partition('.')[0]} is damaged" in caplog.text
    assert store.compact() == 5
    assert not file.exists()  # a whole one is in its place
    caplog.clear()
    assert_tables_are_those_of_the_records(folder, store)
    assert not caplog.messages


def test_part_of_a_killed_compaction_is_not_seen_and_goes(folder, store, monkeypatch):
    for seed in range(3):
        store.put(other_record(seed))
    real = store.write_bytes

    def killed(name: str, data: bytes, patient: bool = True) -> None:
        if ".runs." in name:
            raise KeyboardInterrupt
        real(name, data)

    monkeypatch.setattr(store, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        store.compact()
    monkeypatch.undo()
    assert len(part_files(folder)) == 2
    assert_tables_are_those_of_the_records(folder, store)
    assert store.compact() == 3 and len(part_files(folder)) == 5  # it may be another's, at work
    monkeypatch.setattr(parts, "ORPHAN_AGE", parts.ORPHAN_AGE * 0)
    assert store.compact() == 3 and len(part_files(folder)) == 3
    assert_tables_are_those_of_the_records(folder, store)


def test_parts_stay_few_and_each_run_is_rewritten_a_few_times(folder, store, monkeypatch):
    """A long sweep: fifty compactions of three records each."""
    written = []
    real = store.write_bytes

    def count(name: str, data: bytes, patient: bool = True) -> None:
        real(name, data)
        if ".runs." in name:
            written.append(pq.read_metadata(folder / name).num_rows)

    monkeypatch.setattr(store, "write_bytes", count)
    for seed in range(150):
        store.put(record(train_spec(seed=seed)))
        if seed % 3 == 2:
            assert store.compact() == seed + 1
    assert len(part_files(folder)) / 3 <= 6
    assert sum(written) <= 150 * 6  # fifty whole rewrites would be 3,825
    assert_tables_are_those_of_the_records(folder, store)


def test_a_part_is_not_merged_beyond_its_largest_size(folder, store, monkeypatch):
    monkeypatch.setattr(parts, "LARGEST_RUNS", 8)
    monkeypatch.setattr(parts, "BATCH_RUNS", 4)
    for seed in range(30):
        store.put(record(train_spec(seed=seed)))
    assert store.compact() == 30
    sizes = [pq.read_metadata(f).num_rows for f in part_files(folder) if ".runs." in f.name]
    assert sum(sizes) == 30 and max(sizes) == 8


def test_a_query_reads_the_columns_that_it_names(folder, store):
    """Bytes of other columns may be damaged: a query that does not need them never sees it."""
    for seed in range(4):
        store.put(other_record(seed))
    store.compact()
    (file,) = (f for f in part_files(folder) if ".runs." in f.name)
    flip_in_column(file, "seconds")
    content = file.read_bytes()
    assert store.sql('select avg("loss/web") as l from runs')["l"][0] > 0
    assert store.sql("select kind, count(*) as n from runs group by kind")["n"].tolist() == [4]
    assert file.read_bytes() == content and store.parts._damaged == set()
    assert store.sql("select avg(seconds) as s from runs")["s"].tolist() == [1.5]
    assert store.parts._damaged


def test_columns_of_parts_are_unified(folder, store, monkeypatch):
    monkeypatch.setattr(parts, "LARGEST_RUNS", 1)
    for seed in (0, 1, 2, 4, 5):
        store.put(other_record(seed))
        store.compact()
    store.put(other_record(3, failed=True))
    assert len(part_files(folder)) == 15
    frame = store.sql('select "weight/d2" as d2, failure from runs order by d2')
    assert frame["d2"].tolist() == pytest.approx([0, 0, 0, 0, 2 / 3, 2 / 3])
    assert store.sql("select count(*) as n from runs where failure like '%nan%'")["n"].tolist() == [
        1
    ]
    assert_tables_are_those_of_the_records(folder, store)


def test_a_part_whose_columns_contradict_the_others_is_passed_over(folder, store, caplog):
    for seed in range(3):
        store.put(other_record(seed))
    store.compact()
    store.put(other_record(4))
    (runs,) = (f for f in part_files(folder) if ".runs." in f.name)
    wrong = pq.read_table(runs).slice(0, 1)
    place = wrong.column_names.index("params")
    wrong = wrong.set_column(place, "params", [["many"]])
    wrong = wrong.set_column(wrong.column_names.index("run_id"), "run_id", [["f" * 12]])
    for table in ("evals", "decisions"):
        shutil.copy(
            runs.with_name(runs.name.replace("runs", table)), folder / f"compact/w.{table}.parquet"
        )
    pq.write_table(wrong, folder / "compact" / "w.runs.parquet")
    assert_tables_are_those_of_the_records(folder, store)
    assert "compact/w is damaged" in caplog.text
    assert store.compact() == 4


def test_rows_that_no_record_backs_are_not_believed(folder, store):
    """A part is a cache: what it says of runs without a record is left out, and purged."""
    for seed in range(6):
        store.put(other_record(seed))
    store.compact()
    for name in store.names("records")[:5]:
        store.remove(f"records/{name}.json")
    assert_tables_are_those_of_the_records(folder, store)
    assert store.compact() == 1
    assert [len(pq.read_table(f)) for f in part_files(folder) if ".runs." in f.name] == [1]

"""How fast does a large store answer?

    python experiments/bench/query.py [--runs 1000000] [--repeats 5] [--folder DIR] [--json]

Builds a store of synthetic runs (8 domains, 8 targets, 4 evaluations each) and asks it questions.
The Parquet parts are real ones, of the sizes that a long sweep leaves; the record files, which a
query only lists, are empty. `open` is `rayx.open` and the first answer of a new Store, which opens
the parts; the other lines are medians of warm questions, the compacted parts and the folder in the
operating system's cache, each of which lists the folder again. `live` is a group-by after a record
came, as in a store that a sweep writes to. With --folder the store is kept, and used again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import rayx
from rayx.parts import LARGEST_RUNS
from rayx.store import Store
from rayx.synthetic import World

TEMPLATE_RUNS = 2_000  # real records, whose rows are used again under other names
SWEEP_RUNS = 10_000
QUERIES = {
    "count": "select count(*) from runs",
    "group-by": 'select batch, count(*), avg("loss/web"), min("loss/code") from '
    '(select *, floor("weight/web" * 20) as batch from runs) group by batch order by batch',
    "top-k": 'select run_id, "loss/web", "weight/web" from runs order by "loss/web" limit 10',
    "join": "select target, step, avg(loss_bpb - stderr_bpb) from evals join runs using (run_id) "
    'where "weight/web" > 0.9 group by target, step order by target, step',
    "one sweep": "select * from runs where data_seed = 3",
}


def build(folder: Path, runs: int) -> float:
    """Write the store and return the seconds that it took."""
    began = time.perf_counter()
    store = rayx.open(folder, create=True)
    world = World.random(8, 8, seed=0)
    rng = np.random.default_rng(0)
    weights_RK = rng.dirichlet(np.full(8, 0.5), TEMPLATE_RUNS)
    specs = [
        world.spec(dict(zip(world.domains, row, strict=True)), 1_000_000, seed=seed)
        for seed, row in enumerate(weights_RK)
    ]
    world.fill(store, specs)
    store.compact()
    (part,) = (folder / "compact").glob("*.runs.parquet")
    stem = part.name.partition(".")[0]
    tables = {
        name: pq.read_table(folder / "compact" / f"{stem}.{name}.parquet")
        for name in ("evals", "decisions", "runs")
    }
    old_ids = {run_id: i for i, run_id in enumerate(tables["runs"]["run_id"].to_pylist())}
    places = {
        name: np.array([old_ids[run_id] for run_id in table["run_id"].to_pylist()])
        for name, table in tables.items()
        if len(table)
    }
    for file in (*(folder / "compact").iterdir(), *(folder / "records").iterdir()):
        file.unlink()
    for number, start in enumerate(range(0, runs, LARGEST_RUNS)):
        count = min(LARGEST_RUNS, runs - start)
        ids = np.array([f"{i * 2654435761 % 2**48:012x}" for i in range(start, start + count)])
        for name, table in tables.items():
            pieces = []
            for copy in range(0, count, TEMPLATE_RUNS if len(table) else count):
                here = ids[copy : copy + TEMPLATE_RUNS]
                piece = table
                if len(table):
                    place = places[name][places[name] < len(here)]
                    piece = table.filter(places[name] < len(here))
                    column = table.column_names.index("run_id")
                    piece = piece.set_column(column, "run_id", pa.array(here[place]))
                if name == "runs":
                    sweep = np.full(len(here), (start + copy) // SWEEP_RUNS)
                    column = table.column_names.index("data_seed")
                    piece = piece.set_column(column, "data_seed", pa.array(sweep))
                pieces.append(piece)
            path = folder / "compact" / f"{number:016x}.{name}.parquet"
            whole = pa.concat_tables(pieces)
            pq.write_table(whole, path, compression="zstd", write_page_checksum=True)
        for run_id in ids:
            os.close(os.open(f"{folder}/records/{run_id}.json", os.O_CREAT | os.O_WRONLY))
    return time.perf_counter() - began


def timed(action: Callable[[], object]) -> float:
    """Return the wall seconds of a call."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure(folder: Path, runs: int, repeats: int) -> dict:
    """Build, ask and return the figures."""
    result: dict = {"runs": runs}
    if not (folder / "store.json").exists():
        result["build_seconds"] = build(folder, runs)
    files = list((folder / "compact").iterdir())
    result["parts"] = len(files) // 3
    result["parquet_mb"] = sum(file.stat().st_size for file in files) / 1e6

    def first() -> Store:
        store = rayx.open(folder)
        assert store.sql(QUERIES["count"]).iloc[0, 0] == runs, "the store holds other runs"
        return store

    first()  # warms the operating system's cache
    result["open_seconds"] = statistics.median(timed(first) for _ in range(3))
    store = first()
    logging.getLogger("rayx").setLevel(logging.ERROR)
    seconds: dict[str, list[float]] = {name: [] for name in (*QUERIES, "live", "status")}
    for _ in range(repeats):
        for name, query in QUERIES.items():
            seconds[name].append(timed(lambda query=query: store.sql(query)))
        seconds["status"].append(timed(store.status))
        store.write_json("records/new.json", {})  # damaged, and so read in vain
        seconds["live"].append(timed(lambda: store.sql(QUERIES["group-by"])))
        store.remove("records/new.json")
    result |= {f"{name}_seconds": statistics.median(times) for name, times in seconds.items()}
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Ask a large store.")
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the store here")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.folder or Path(scratch) / "store"
        result = measure(folder, arguments.runs, arguments.repeats)
    if arguments.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")


if __name__ == "__main__":
    main()

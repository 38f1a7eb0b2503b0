"""Tables over the records of a store: compaction to Parquet, DataFrames and SQL."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from rayx.errors import StoreError
from rayx.record import Record

if TYPE_CHECKING:
    from rayx.store import Store

log = logging.getLogger(__name__)


def compact(store: Store) -> int:
    """Write the finished runs as Parquet and return how many; later reads decode only the rest.

    Failures stay out: a record may replace one at any time.
    """
    ended = runs(store)
    ended = ended[ended["status"] == "ok"]
    tables = {"evals": evals(store), "decisions": decisions(store), "runs": ended}
    for name, frame in tables.items():
        frame = frame[frame["run_id"].isin(ended["run_id"])]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), sink)
        store.write_bytes(f"compact/{name}.parquet", sink.getvalue().to_pybytes())
    return len(ended)


def _table(store: Store, name: str, rows: Callable[[Record], list[dict]]) -> pd.DataFrame:
    """Return the compacted rows that still hold, and those of the records since."""
    status = store.status()
    # `runs` is written last, so the other tables hold whatever runs it has.
    runs = _compacted(store, "runs", ["run_id"])
    old = _compacted(store, name) if runs is not None else None
    if runs is None or old is None:
        old, known = pd.DataFrame(columns=["run_id"]), set()
    else:
        known = {run for run in runs["run_id"] if status.get(run) == "ok"}
        old = old.loc[old["run_id"].isin(known)]
    records = store.records([run for run in status if run not in known])
    new = pd.DataFrame([row for record in records for row in rows(record)])
    frames = [frame for frame in (old, new) if len(frame)]
    if not frames:
        return pd.DataFrame(columns=old.columns)
    # A column without a value (no failure yet) has no type in Parquet: find it again.
    return pd.concat(frames, ignore_index=True).infer_objects()


def _compacted(store: Store, name: str, columns: list[str] | None = None) -> pd.DataFrame | None:
    """Return a compacted table, or None where there is none that can be read."""
    try:
        data = store.read_bytes(f"compact/{name}.parquet")
        table = pq.read_table(pa.BufferReader(data), columns=columns)
        return table.to_pandas() if "run_id" in table.column_names else None
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError, KeyError) as error:
        log.warning("compact/%s.parquet is damaged, records are read: %s", name, error)
        return None


def runs(store: Store) -> pd.DataFrame:
    """Return one row a run: spec, cost, weight/DOMAIN, epochs/DOMAIN, loss/TARGET (bpb) ..."""
    frame = _table(store, "runs", lambda record: [record.run_row()])
    if frame.empty:
        return pd.DataFrame(columns=["run_id", "kind", "status"])
    zero = [c for c in frame.columns if c.startswith(("weight/", "epochs/"))]
    frame[zero] = frame[zero].fillna(0.0)
    # Columns by name, not by the record that happens to come first: fits depend on the order.
    plain = [c for c in frame.columns if "/" not in c]
    frame = frame.sort_values("run_id", ignore_index=True)
    return frame.reindex(columns=plain + sorted(c for c in frame.columns if "/" in c))


def evals(store: Store) -> pd.DataFrame:
    """Return one row per run, evaluation point and target: the loss curves."""
    frame = _table(store, "evals", Record.eval_rows)
    if frame.empty:
        return pd.DataFrame(columns=["run_id", "step", "tokens", "target", "loss_bpb"])
    return frame.sort_values(["run_id", "step", "target"], ignore_index=True)


def decisions(store: Store) -> pd.DataFrame:
    """Return one row per run with a policy, decision and domain: weights over time."""
    frame = _table(store, "decisions", Record.decision_rows)
    if frame.empty:
        return pd.DataFrame(columns=["run_id", "policy", "step", "tokens", "domain", "weight"])
    return frame.sort_values(["run_id", "step", "domain"], kind="stable", ignore_index=True)


def sql(store: Store, query: str) -> pd.DataFrame:
    """Answer a SELECT over the tables `runs`, `evals` and `decisions` through DuckDB.

    Columns like weight/web need double quotes. Nothing outside the tables can be reached.

    Raises:
        StoreError: The query is not a single SELECT, or DuckDB refuses it.
    """
    connection = duckdb.connect(config={"enable_external_access": "false"})
    try:
        statements = connection.extract_statements(query)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise StoreError(f"Query {query!r} is not one SELECT; the store is read-only.")
        connection.register("runs", runs(store))
        connection.register("evals", evals(store))
        connection.register("decisions", decisions(store))
        return connection.execute(query).df()
    except duckdb.Error as error:
        raise StoreError(f"Query failed: {error}") from error
    finally:
        connection.close()

"""Tables over the records of a store: DataFrames and SQL on its parts and on what came since."""

from __future__ import annotations

from typing import TYPE_CHECKING

import duckdb
import pandas as pd
import pyarrow as pa

from rayx.errors import StoreError
from rayx.parts import Snapshot

if TYPE_CHECKING:
    from rayx.store import Store

EMPTY = {  # columns of a table without a row
    "runs": ("run_id", "kind", "status"),
    "evals": ("run_id", "step", "tokens", "target", "loss_bpb"),
    "decisions": ("run_id", "policy", "step", "tokens", "domain", "weight"),
}
ZERO = ("weight/", "epochs/")  # columns in which a run without a value has 0
# What DuckDB raises where a part cannot be read; a wrong query raises others.
UNREADABLE = (duckdb.InvalidInputException, duckdb.IOException)


def _frame(store: Store, name: str, sort: list[str]) -> pd.DataFrame:
    table = store.parts.read(lambda snapshot: snapshot.table(name))
    if not len(table):
        return pd.DataFrame(columns=list(EMPTY[name]))
    return table.to_pandas().sort_values(sort, kind="stable", ignore_index=True)


def runs(store: Store) -> pd.DataFrame:
    """Return one row a run: spec, cost, weight/DOMAIN, epochs/DOMAIN, loss/TARGET (bpb) ..."""
    frame = _frame(store, "runs", ["run_id"])
    zero = [c for c in frame.columns if c.startswith(ZERO)]
    frame[zero] = frame[zero].fillna(0.0)
    # Columns by name, not by the record that happens to come first: fits depend on the order.
    plain = [c for c in frame.columns if "/" not in c]
    return frame.reindex(columns=plain + sorted(c for c in frame.columns if "/" in c))


def evals(store: Store) -> pd.DataFrame:
    """Return one row per run, evaluation point and target: the loss curves."""
    return _frame(store, "evals", ["run_id", "step", "target"])


def decisions(store: Store) -> pd.DataFrame:
    """Return one row per run with a policy, decision and domain: weights over time."""
    return _frame(store, "decisions", ["run_id", "step", "domain"])


def sql(store: Store, query: str) -> pd.DataFrame:
    """Answer a SELECT over the tables `runs`, `evals` and `decisions` through DuckDB.

    Columns like weight/web need double quotes. Nothing outside the tables can be reached: DuckDB
    opens no file, it is handed the parts by name.

    Raises:
        StoreError: The query is not a single SELECT, or DuckDB refuses it.
    """
    try:
        statements = duckdb.extract_statements(query)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise StoreError(f"Query {query!r} is not one SELECT; the store is read-only.")
        return store.parts.read(lambda snapshot: _answer(snapshot, query), UNREADABLE)
    except duckdb.Error as error:
        raise StoreError(f"Query failed: {error}") from error


def _answer(snapshot: Snapshot, query: str) -> pd.DataFrame:
    with duckdb.connect(config={"enable_external_access": "false"}) as connection:
        connection.register(
            "_gone", pa.table({"run_id": pa.array(sorted(snapshot.gone), pa.string())})
        )
        for name in EMPTY:
            old, live = snapshot.sources(name)
            if not old.schema.names:
                connection.register(name, pd.DataFrame(columns=list(EMPTY[name])))
                continue
            connection.register(f"_{name}", old)
            connection.register(f"_{name}_live", live)
            columns = ", ".join(map(_column, old.schema))
            there = "where run_id not in (from _gone)" if snapshot.gone else ""
            connection.execute(
                f"create view {name} as select {columns} from _{name} {there} "
                f"union all select {columns} from _{name}_live"
            )
        return connection.execute(query).df()


def _column(field: pa.Field) -> str:
    """Return a column in SQL; one without any value is text that is missing."""
    name = '"' + field.name.replace('"', '""') + '"'
    if field.name.startswith(ZERO):
        return f"coalesce({name}, 0) as {name}"
    return f"cast({name} as varchar) as {name}" if pa.types.is_null(field.type) else name

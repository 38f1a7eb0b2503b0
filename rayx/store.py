"""The store: all records of a sweep, on a local folder or an object store.

    records/RUN.json     a finished run; written once, atomically, by its worker: existence = done
    failures/RUN.json    a run that failed; replaced by a record when a retry succeeds
    packs/PACK.json      the specs of one trial
    heartbeats/PACK.json how far a pack is, rewritten every few seconds
    sweeps/SWEEP.json    the run_ids asked for and when
    drivers/SWEEP.json   the driver's heartbeat
    compact/             the records as Parquet, rewritten while a sweep goes on; only a cache
    choices/ plans/      what was decided on these records

Killing anything loses nothing that was recorded, `cp -r` is a backup, and two sweeps may share a
store: at worst they do one run twice. Reading needs neither Ray nor torch. All nodes of a cluster
must see the path.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import re
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from rayx.errors import RayxError, StoreError
from rayx.merging import Spec, spec_from_json
from rayx.record import Record
from rayx.spec import FORMAT

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def open_store(url: str | os.PathLike, create: bool = False) -> Store:
    """Open a store on a local path, s3:// or gs://; exported as `rayx.open`.

    Args:
        url: Where the store is.
        create: Make an empty one where nothing is yet.

    Raises:
        StoreError: There is no store, it is of another format, or it cannot be read or made.
    """
    url = os.fspath(url)
    try:
        if "://" in url:
            filesystem, root = fs.FileSystem.from_uri(url)
        else:
            filesystem, root = fs.LocalFileSystem(), os.path.abspath(url)
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(
            f"Store URL {url!r} cannot be opened: {error}. Expected a local path, s3:// or gs://."
        ) from error
    store = Store(filesystem, root, url)
    try:
        marker = store.read_json("store.json")
    except FileNotFoundError:
        if not create:
            raise StoreError(
                f"No store at {url!r}: store.json is missing. Give the --store of a sweep."
            ) from None
        store.write_json("store.json", {"format": FORMAT})
        return store
    except (OSError, ValueError) as error:
        raise StoreError(f"Store {url!r} cannot be read: {error}.") from error
    if not isinstance(marker, dict):
        raise StoreError(f"Store {url!r} cannot be read: store.json is not an object.")
    if marker.get("format") != FORMAT:
        raise StoreError(
            f"Store {url!r} has format {marker.get('format')!r}; this rayx reads {FORMAT}."
        )
    return store


class Store:
    """Records of runs; made by `rayx.open`.

    `runs()` and `evals()` are fresh at each call, also while a sweep is writing.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, url: str) -> None:
        self.filesystem = filesystem
        self.root = root
        self.url = url

    def __repr__(self) -> str:
        return f"rayx.open({self.url!r})"

    # Files ------------------------------------------------------------------------------------

    def _path(self, name: str) -> str:
        if not all(_NAME.fullmatch(part) for part in name.split("/")):
            raise StoreError(
                f"Name {name!r} cannot be used in a store; expected letters, digits, '.', '_', '-'."
            )
        return posixpath.join(self.root, name)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a file so that readers see either the old content or all of the new."""
        path = self._path(name)
        try:
            if isinstance(self.filesystem, fs.LocalFileSystem):
                self.filesystem.create_dir(posixpath.dirname(path), recursive=True)
                # The leading dot keeps a half-written file out of every listing.
                temporary = posixpath.join(posixpath.dirname(path), f".{uuid.uuid4().hex}")
                with self.filesystem.open_output_stream(temporary) as stream:
                    stream.write(data)
                self.filesystem.move(temporary, path)
            else:  # an object appears when its upload is complete
                with self.filesystem.open_output_stream(path) as stream:
                    stream.write(data)
        except OSError as error:
            raise StoreError(
                f"Cannot write {name} to store {self.url!r}: {error}. Check permission and space."
            ) from error

    def read_bytes(self, name: str) -> bytes:
        """Return a file's content; FileNotFoundError where there is none."""
        with self.filesystem.open_input_stream(self._path(name)) as stream:
            return stream.read()

    def write_json(self, name: str, data: Any) -> None:
        """Write JSON atomically; NaN is refused."""
        self.write_bytes(name, json.dumps(data, allow_nan=False).encode())

    def read_json(self, name: str) -> Any:
        """Return parsed JSON; FileNotFoundError or ValueError where it is missing or broken."""
        return json.loads(self.read_bytes(name))

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.filesystem.get_file_info(self._path(name)).type == fs.FileType.File

    def remove(self, name: str) -> None:
        """Delete a file."""
        self.filesystem.delete_file(self._path(name))

    def names(self, folder: str) -> list[str]:
        """Return the stems of the JSON files in a folder, sorted."""
        selector = fs.FileSelector(self._path(folder), allow_not_found=True)
        try:
            infos = self.filesystem.get_file_info(selector)
        except FileNotFoundError:  # pyarrow: the folder was made while it was looked for
            return []
        files = (info.base_name for info in infos if info.is_file)
        return sorted(n[: -len(".json")] for n in files if n.endswith(".json") and n[0] != ".")

    # Records ----------------------------------------------------------------------------------

    def put(self, record: Record) -> None:
        """Write a record; a failure never replaces a finished run."""
        folder = "failures" if record.failure else "records"
        self.write_json(f"{folder}/{record.run_id}.json", record.to_json())

    def status(self) -> dict[str, str]:
        """Return run_id -> `ok` or `failed` for every run that has ended."""
        failed = dict.fromkeys(self.names("failures"), "failed")
        return failed | dict.fromkeys(self.names("records"), "ok")

    def get(self, run_id: str) -> Record:
        """Return one record.

        Raises:
            StoreError: The run has no record, or the record cannot be read.
        """
        for folder in ("records", "failures"):
            try:
                record = Record.from_json(self.read_json(f"{folder}/{run_id}.json"))
            except FileNotFoundError:
                continue
            except (RayxError, ValueError, TypeError, KeyError, AttributeError) as error:
                raise StoreError(
                    f"Record {folder}/{run_id}.json of store {self.url!r} is damaged: {error}. "
                    "Remove the file and run the sweep again: only this run is redone."
                ) from error
            if record.run_id != run_id:
                raise StoreError(
                    f"Record {folder}/{run_id}.json holds run {record.run_id}: the file was "
                    "renamed or edited. Remove it and run the sweep again."
                )
            return record
        raise StoreError(f"Store {self.url!r} has no record of run {run_id!r}.")

    def records(self, run_ids: Iterable[str] | None = None) -> list[Record]:
        """Return the records of `run_ids` (default: all); damaged ones are logged and left out."""
        result = []
        for run_id in sorted(self.status()) if run_ids is None else run_ids:
            try:
                result.append(self.get(run_id))
            except StoreError as error:
                log.warning("%s", error)
        return result

    # Packs, heartbeats, sweeps ----------------------------------------------------------------

    def put_pack(self, pack_id: str, specs: Iterable[Spec]) -> None:
        """Write the specs of one trial."""
        self.write_json(f"packs/{pack_id}.json", [spec.to_json() for spec in specs])

    def get_pack(self, pack_id: str) -> list[Spec]:
        """Return the specs of a pack."""
        return [spec_from_json(data) for data in self.read_json(f"packs/{pack_id}.json")]

    def beat(self, name: str, **facts: Any) -> None:
        """Write a heartbeat: facts and the time."""
        self.write_json(f"{name}.json", {**facts, "time": time.time()})

    def facts(self, name: str) -> dict[str, Any] | None:
        """Return parsed JSON, or None where it is damaged or went while a folder was listed."""
        try:
            return self.read_json(name)
        except (FileNotFoundError, ValueError):
            return None

    # Tables -----------------------------------------------------------------------------------

    def compact(self) -> int:
        """Write the finished runs as Parquet and return how many; later reads decode only the rest.

        Failures stay out: a record may replace one at any time.
        """
        runs = self.runs()
        runs = runs[runs["status"] == "ok"]
        tables = {"evals": self.evals(), "decisions": self.decisions(), "runs": runs}
        for name, frame in tables.items():
            frame = frame[frame["run_id"].isin(runs["run_id"])]
            sink = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), sink)
            self.write_bytes(f"compact/{name}.parquet", sink.getvalue().to_pybytes())
        return len(runs)

    def _table(self, name: str, rows: Callable[[Record], list[dict]]) -> pd.DataFrame:
        """Return the compacted rows that still hold, and those of the records since."""
        status = self.status()
        # `runs` is written last, so the other tables hold whatever runs it has.
        runs = self._compacted("runs", ["run_id"])
        old = self._compacted(name) if runs is not None else None
        if runs is None or old is None:
            old, known = pd.DataFrame(columns=["run_id"]), set()
        else:
            known = {run for run in runs["run_id"] if status.get(run) == "ok"}
            old = old.loc[old["run_id"].isin(known)]
        records = self.records([run for run in status if run not in known])
        new = pd.DataFrame([row for record in records for row in rows(record)])
        frames = [frame for frame in (old, new) if len(frame)]
        if not frames:
            return pd.DataFrame(columns=old.columns)
        # A column without a value (no failure yet) has no type in Parquet: find it again.
        return pd.concat(frames, ignore_index=True).infer_objects()

    def _compacted(self, name: str, columns: list[str] | None = None) -> pd.DataFrame | None:
        """Return a compacted table, or None where there is none that can be read."""
        try:
            data = self.read_bytes(f"compact/{name}.parquet")
            table = pq.read_table(pa.BufferReader(data), columns=columns)
            return table.to_pandas() if "run_id" in table.column_names else None
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, KeyError) as error:
            log.warning("compact/%s.parquet is damaged, records are read: %s", name, error)
            return None

    def runs(self) -> pd.DataFrame:
        """Return one row a run: spec, cost, weight/DOMAIN, epochs/DOMAIN, loss/TARGET (bpb) ..."""
        frame = self._table("runs", lambda record: [record.run_row()])
        if frame.empty:
            return pd.DataFrame(columns=["run_id", "kind", "status"])
        zero = [c for c in frame.columns if c.startswith(("weight/", "epochs/"))]
        frame[zero] = frame[zero].fillna(0.0)
        # Columns by name, not by the record that happens to come first: fits depend on the order.
        plain = [c for c in frame.columns if "/" not in c]
        frame = frame.sort_values("run_id", ignore_index=True)
        return frame.reindex(columns=plain + sorted(c for c in frame.columns if "/" in c))

    def evals(self) -> pd.DataFrame:
        """Return one row per run, evaluation point and target: the loss curves."""
        frame = self._table("evals", Record.eval_rows)
        if frame.empty:
            return pd.DataFrame(columns=["run_id", "step", "tokens", "target", "loss_bpb"])
        return frame.sort_values(["run_id", "step", "target"], ignore_index=True)

    def decisions(self) -> pd.DataFrame:
        """Return one row per run with a policy, decision and domain: weights over time."""
        frame = self._table("decisions", Record.decision_rows)
        if frame.empty:
            return pd.DataFrame(columns=["run_id", "policy", "step", "tokens", "domain", "weight"])
        return frame.sort_values(["run_id", "step", "domain"], kind="stable", ignore_index=True)

    def sql(self, query: str) -> pd.DataFrame:
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
            connection.register("runs", self.runs())
            connection.register("evals", self.evals())
            connection.register("decisions", self.decisions())
            return connection.execute(query).df()
        except duckdb.Error as error:
            raise StoreError(f"Query failed: {error}") from error
        finally:
            connection.close()

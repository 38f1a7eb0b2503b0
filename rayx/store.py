"""The store: all records of a sweep, on a local folder or an object store.

    records/RUN.json     a finished run; written once, atomically, by its worker: existence = done
    failures/RUN.json    a run that failed; replaced by a record when a retry succeeds
    packs/PACK.json      the specs of one trial
    heartbeats/PACK.json how far a pack is, rewritten every few seconds
    sweeps/SWEEP.json    the run_ids asked for and when
    drivers/SWEEP.json   the driver's heartbeat
    compact/             the records as Parquet, in parts that come while a sweep goes on: a cache
    choices/ plans/      what was decided on these records

Killing anything loses nothing that was recorded, `cp -r` is a backup, and two sweeps may share a
store: at worst they do one run twice. Reading needs neither Ray nor torch. All nodes of a cluster
must see the path.

A table is the parts plus the records that came since, without the rows whose record has gone, so
each look lists records/: 0.4 s for a million names on a local disk, 0.4 s more to tell what is new
among them if any is, and a request for each thousand in an object store.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import pandas as pd

from rayx import tables
from rayx.errors import RayxError, SpecError, StoreError, UnreachableError
from rayx.files import Files
from rayx.merging import Spec, spec_from_json
from rayx.parts import Parts
from rayx.record import Record
from rayx.remote import locate
from rayx.spec import FORMAT

log = logging.getLogger(__name__)

READERS = 16  # of records at a time, from an object store


def open_store(url: str | os.PathLike, create: bool = False) -> Store:
    """Open a store on a local path, s3:// or gs://; exported as `rayx.open`.

    Args:
        url: Where the store is.
        create: Make an empty one where nothing is yet.

    Raises:
        StoreError: There is no store, it is of another format, or it cannot be read or made.
    """
    url = os.fspath(url)
    filesystem, root = locate(url)
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


class Store(Files):
    """Records of runs; made by `rayx.open`.

    `runs()` and `evals()` are fresh at each call, also while a sweep is writing.
    """

    def __repr__(self) -> str:
        return f"rayx.open({self.url!r})"

    def path(self, name: str) -> str:
        """Return where a file is on the store's filesystem."""
        return self._path(name)

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
            except UnreachableError:  # which is no damage: the record may be fine
                raise
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
        asked = sorted(self.status()) if run_ids is None else list(run_ids)
        if self.is_local:
            found = [self._get_if_whole(run_id) for run_id in asked]
        else:  # which answers many requests as soon as one
            with ThreadPoolExecutor(READERS) as pool:
                found = list(pool.map(self._get_if_whole, asked))
        return [record for record in found if record is not None]

    def _get_if_whole(self, run_id: str) -> Record | None:
        try:
            return self.get(run_id)
        except UnreachableError:
            raise
        except StoreError as error:
            log.warning("%s", error)
            return None

    # Packs, heartbeats, sweeps ----------------------------------------------------------------

    def put_pack(self, pack_id: str, specs: Iterable[Spec]) -> None:
        """Write the specs of one trial."""
        self.write_json(f"packs/{pack_id}.json", [spec.to_json() for spec in specs])

    def get_pack(self, pack_id: str) -> list[Spec]:
        """Return the specs of a pack."""
        try:
            return [spec_from_json(data) for data in self.read_json(f"packs/{pack_id}.json")]
        except (SpecError, ValueError, TypeError) as error:
            raise StoreError(
                f"packs/{pack_id}.json of store {self.url!r} is damaged: {error}. Remove it and "
                "run the sweep again."
            ) from error

    def beat(self, name: str, **facts: Any) -> None:
        """Write a heartbeat, facts and the time; tried once, for the next one comes soon."""
        self.write_json(f"{name}.json", {**facts, "time": time.time()}, patient=False)

    def facts(self, name: str) -> dict[str, Any] | None:
        """Return parsed JSON, or None where it is damaged or went while a folder was listed."""
        try:
            return self.read_json(name)
        except (FileNotFoundError, ValueError):
            return None

    # Tables -----------------------------------------------------------------------------------

    @cached_property
    def parts(self) -> Parts:
        """The records as Parquet, as far as they were compacted."""
        return Parts(self)

    def compact(self) -> int:
        """Add the finished runs since the last time to the Parquet; return how many it holds."""
        return self.parts.compact()

    def runs(self) -> pd.DataFrame:
        """Return one row a run: spec, cost, weight/DOMAIN, epochs/DOMAIN, loss/TARGET (bpb) ..."""
        return tables.runs(self)

    def evals(self) -> pd.DataFrame:
        """Return one row per run, evaluation point and target: the loss curves."""
        return tables.evals(self)

    def decisions(self) -> pd.DataFrame:
        """Return one row per run with a policy, decision and domain: weights over time."""
        return tables.decisions(self)

    def sql(self, query: str) -> pd.DataFrame:
        """Answer a SELECT over the tables `runs`, `evals` and `decisions` through DuckDB.

        Columns like weight/web need double quotes. Nothing outside the tables can be reached.

        Raises:
            StoreError: The query is not a single SELECT, or DuckDB refuses it.
        """
        return tables.sql(self, query)

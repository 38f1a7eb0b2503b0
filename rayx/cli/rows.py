"""A CSV with one row an id that is written as results come, and taken up where it was left."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayx.errors import SpecError, did_you_mean
from rayx.fit.csv_files import check_csv

ANOTHER = "Give another --out, or remove it"


class Rows:
    """Rows of numbers by id; with a path each is in the file before the next one is computed.

    Beside `losses.csv` lies `losses.csv.json`, which says what the rows were made with, so that
    rows of other settings are never mixed with those that are there.

    Args:
        path: The CSV, or None to keep rows in memory only.
        columns: Names of the numbers.
        settings: What all rows are made with, as JSON data.
        made_of: id -> what its row is made of, as JSON data.

    Raises:
        SpecError: The file is there and was made with other settings, other columns or other rows,
            or it cannot be written.
    """

    def __init__(
        self,
        path: str | None,
        columns: Sequence[str],
        settings: Mapping[str, Any],
        made_of: Mapping[str, Any],
    ) -> None:
        self.columns = list(columns)
        self.values: dict[str, dict[str, float]] = {}  # id -> column -> number, NaN where missing
        self._file = Path(path).expanduser() if path else None
        if self._file is None:
            return
        self._about = self._file.with_name(f"{self._file.name}.json")
        self._now = json.loads(json.dumps({"settings": settings, "rows": made_of}))  # no tuples
        self._begun = False  # nothing is written before there is a row
        try:
            if self._file.exists():
                self._read(self._now)
        except (
            OSError,
            ValueError,
            csv.Error,
        ) as error:  # not such a table
            raise SpecError(f"Cannot read {path!r}: {error}. {ANOTHER}.") from error

    def append(self, row_id: str, numbers: Mapping[str, float]) -> None:
        """Add a row; numbers that are not finite are left empty in the file."""
        self.values[row_id] = {c: float(numbers[c]) for c in self.columns}
        if self._file is not None:
            found = self.values[row_id].values()
            self._write([row_id, *(f"{v:.9g}" if math.isfinite(v) else "" for v in found)])

    def _write(self, cells: Sequence[str]) -> None:
        assert self._file is not None
        try:
            if not self._begun:
                partial = self._about.with_name(f".{self._about.name}.partial")
                partial.write_text(json.dumps(self._now))
                os.replace(partial, self._about)
                self._begun = True
                if not self._file.exists() or not self._file.stat().st_size:
                    self._write(["id", *self.columns])
            with open(self._file, "a", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(cells)
        except OSError as error:
            raise SpecError(f"Cannot write {str(self._file)!r}: {error}. {ANOTHER}.") from error

    def _read(self, now: dict[str, Any]) -> None:
        assert self._file is not None
        name, about = str(self._file), self._about
        try:
            before = json.loads(about.read_text())
            settings, made_of = dict(before["settings"]), dict(before["rows"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SpecError(
                f"{name} is there, and {about.name} does not say what it was made with. {ANOTHER}."
            ) from error
        for key in {**settings, **now["settings"]}:
            old, new = settings.get(key), now["settings"].get(key)
            if old != new:
                raise SpecError(
                    f"{name} was made with {key} {old!r:.120}, and this asks for {new!r:.120}. "
                    f"{ANOTHER} and {about.name}."
                )
        data = self._file.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:  # the last row was not finished when the process was killed
            with open(self._file, "r+b") as file:
                file.truncate(len(whole))
        header, *lines = list(csv.reader(whole.decode().splitlines())) or [[]]
        if header and header != ["id", *self.columns]:
            raise SpecError(f"{name} has columns {', '.join(header)}; {ANOTHER}.")
        for row_id, *cells in lines:
            if row_id in now["rows"] and made_of.get(row_id) != now["rows"][row_id]:
                raise SpecError(
                    f"{name} has a row {row_id!r} that was made of {made_of.get(row_id)}, and this "
                    f"asks for {now['rows'][row_id]}. {ANOTHER} and {about.name}."
                )
            numbers = (float(cell) if cell else math.nan for cell in cells)
            self.values[row_id] = dict(zip(self.columns, numbers, strict=True))
        now["rows"] = {**made_of, **now["rows"]}


def read_merge_weights(path: str, experts: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Read id -> weights in the order of `experts` from a CSV with one column an expert.

    Raises:
        SpecError: The file cannot be read, its columns are not the experts, an id repeats, or a
            cell is not a finite number.
    """
    check_csv(path, SpecError)
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
        lines = [line for line in csv.reader(text.splitlines()) if any(map(str.strip, line))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SpecError(f"--weights {path!r} cannot be read: {error}.") from error
    if len(lines) < 2:
        raise SpecError(f"--weights {path!r} is empty; expected a header and one row a candidate.")
    header = [name.strip() for name in lines[0]]
    for name in header[1:]:
        if name not in experts:
            raise SpecError(
                f"--weights {path!r} has a column {name!r}, and there is no such expert; given are "
                f"{', '.join(experts)}.{did_you_mean(name, experts)}"
            )
        if header.count(name) > 1:
            raise SpecError(f"--weights {path!r} has the column {name!r} twice.")
    for name in experts:
        if name not in header[1:]:
            raise SpecError(
                f"Expert {name!r} has no column in --weights {path!r}; it has "
                f"{', '.join(header[1:])}.{did_you_mean(name, header[1:])}"
            )
    result: dict[str, tuple[float, ...]] = {}
    for cells in lines[1:]:
        row_id = cells[0].strip()
        if len(cells) != len(header):
            raise SpecError(
                f"--weights {path!r}, row {row_id!r}: {len(cells)} cells; the header has "
                f"{len(header)}."
            )
        if row_id in result or not row_id:
            raise SpecError(f"--weights {path!r}: the id {row_id!r} is empty or occurs twice.")
        found = dict(zip(header, cells, strict=True))
        result[row_id] = tuple(
            _number(found[n], f"row {row_id!r}, column {n!r}", path) for n in experts
        )
    return result


def _number(cell: str, where: str, path: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise SpecError(
            f"--weights {path!r}, {where}: the value is {cell.strip()!r}; expected a finite number."
        )
    return value

"""Stage 1, corpus: raters, each of which adds a column to documents.

A rater is anything with a `name`, JSON `facts` that decide its result, and `rate(documents)`; it
must be picklable and deterministic. It may have `parallel_bytes`: above how much text its work is
worth a start of Ray (infinite: it works in one process). Here are a column, the tier of a licence
and a Python function; a classifier trained from examples is in `rayx.corpus.labels.classifier`,
language models are in `rayx.proxy.rating`.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pyarrow as pa

from rayx.corpus.labels.licences import tier_of
from rayx.errors import CorpusError, did_you_mean

TEXT, ID, GROUP, DOMAIN = "text", "id", "group", "domain"
KEPT = (TEXT, ID, GROUP, DOMAIN)  # columns that no rater may write
Value = float | str | None


class Rater(Protocol):
    """Adds the column `name` to documents."""

    @property
    def name(self) -> str:
        """The column that is added."""
        ...

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result, as JSON: a labelling that is resumed has the same."""
        ...

    def rate(self, documents: pa.Table) -> Sequence[Value]:
        """Return a number or a label for each document, None where there is none.

        Args:
            documents: Columns `text`, `domain`, those that were read, and earlier raters' columns.
        """
        ...


def rated(rater: Rater, documents: pa.Table) -> pa.Array:
    """Return a rater's column, checked: numbers (float64), labels (strings) or only nulls.

    NaN and infinities are missing values, as None.

    Raises:
        CorpusError: The rater returned another count than asked for, or values of another type.
    """
    values = rater.rate(documents)
    expected = f"expected one number, text or None for each of {documents.num_rows} documents"
    if isinstance(values, str) or not hasattr(values, "__len__"):
        raise CorpusError(
            f"Rater {rater.name!r} returned a {type(values).__name__}; {expected}, as a list."
        )
    if len(values) != documents.num_rows:
        raise CorpusError(f"Rater {rater.name!r} returned {len(values)} values; {expected}.")
    found = [_checked(rater.name, row, value) for row, value in enumerate(values)]
    kinds = {type(value) for value in found if value is not None}
    if len(kinds) > 1:
        raise CorpusError(f"Rater {rater.name!r} returned numbers and texts; {expected}.")
    return pa.array(
        found, pa.null() if not kinds else pa.string() if str in kinds else pa.float64()
    )


def _checked(name: str, row: int, value: Any) -> Value:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value) if math.isfinite(value) else None
    raise CorpusError(
        f"Rater {name!r} returned {value!r:.60} (a {type(value).__name__}) for document {row} of a "
        "batch; expected a number, a text or None."
    )


def check_names(raters: Sequence[Rater], columns: Sequence[str]) -> None:
    """Refuse raters that would overwrite a column.

    Args:
        raters: In the order in which they are applied.
        columns: Of the documents, before any rater.

    Raises:
        CorpusError: A rater is named like a column or an earlier rater, or not at all.
    """
    taken = dict.fromkeys(KEPT, "a column of every document")
    taken |= {column: "a column that was read" for column in columns if column not in KEPT}
    for rater in raters:
        if not rater.name or not rater.name.isprintable() or rater.name != rater.name.strip():
            raise CorpusError(f"A rater is named {rater.name!r}; expected a column name.")
        if rater.name in taken:
            raise CorpusError(
                f"Rater {rater.name!r} would overwrite {taken[rater.name]}; name it otherwise."
            )
        taken[rater.name] = "an earlier rater's column"


def column_of(documents: pa.Table, column: str, who: str) -> list[Any]:
    """Return a column's values.

    Raises:
        CorpusError: There is no such column.
    """
    if column not in documents.column_names:
        found = documents.column_names
        raise CorpusError(
            f"{who} needs column {column!r}; columns are {', '.join(found)}. Read it with "
            f"label_columns.{did_you_mean(column, found)}"
        )
    return documents[column].to_pylist()


@dataclass(frozen=True)
class ColumnRater:
    """A column under another name, its values mapped.

    Args:
        name: Of the new column.
        column: The column that is read.
        mapping: Value -> new value; values that it does not name become missing. None keeps all.
    """

    name: str
    column: str
    mapping: Mapping[str, Value] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result."""
        return {"rater": "column", **asdict(self)}

    def rate(self, documents: pa.Table) -> Sequence[Value]:
        """Return the column's values, mapped."""
        values = column_of(documents, self.column, f"Rater {self.name!r}")
        return values if self.mapping is None else [self.mapping.get(str(v)) for v in values]


@dataclass(frozen=True)
class LicenceRater:
    """The tier of the licence that a column holds, see `rayx.corpus.labels.licences.tier_of`."""

    name: str
    column: str

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result."""
        return {"rater": "licence", **asdict(self)}

    def rate(self, documents: pa.Table) -> Sequence[Value]:
        """Return tiers."""
        found = column_of(documents, self.column, f"Rater {self.name!r}")
        return [tier_of(None if value is None else str(value)) for value in found]


@dataclass(frozen=True)
class FunctionRater:
    """A Python function: texts -> numbers, labels or None, one for each text, in order.

    Args:
        name: Of the new column.
        function: `package.module:function` or `file.py:function`. The nodes of a cluster must have
            the module or see the file.
    """

    name: str
    function: str

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the result; a file counts by its content, a package by its name alone."""
        load_function(self.function)  # says what is missing
        where = self.function.rpartition(":")[0]
        source = Path(where).expanduser().read_bytes() if where.endswith(".py") else b""
        return {"rater": "function", **asdict(self), "source": hashlib.sha256(source).hexdigest()}

    def rate(self, documents: pa.Table) -> Sequence[Value]:
        """Return what the function returns.

        Raises:
            CorpusError: The function cannot be loaded, or raised; which document, if only one did.
        """
        function = load_function(self.function)
        texts = documents[TEXT].to_pylist()
        try:
            values = function(texts)
        except Exception as error:
            raise CorpusError(
                f"Rater {self.name!r}: {self.function} raised {type(error).__name__}: {error}"
                f"{_culprit(function, texts)}"
            ) from error
        return list(values) if isinstance(values, (tuple, pa.Array)) else _listed(values)


def _listed(values: Any) -> Any:
    return values.tolist() if hasattr(values, "tolist") else values  # numpy, pandas


def _culprit(function: Callable[[list[str]], Any], texts: list[str]) -> str:
    """Say which text makes a function fail, by giving it each alone."""
    for row, text in enumerate(texts):
        try:
            function([text])
        except Exception:
            return f" (document {row} of a batch of {len(texts)}, which begins {text[:60]!r})"
    return f" (for a batch of {len(texts)} documents, and for none of them alone)"


def load_function(reference: str) -> Callable[[list[str]], Any]:
    """Load `package.module:function` or `file.py:function`; a file that has changed, anew.

    Raises:
        CorpusError: There is no such module, file or function, or its import fails.
    """
    where, colon, name = reference.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise CorpusError(
            f"Function {reference!r} is not package.module:function or file.py:function."
        )
    try:
        module = _load_file(where) if where.endswith(".py") else importlib.import_module(where)
    except FileNotFoundError:
        raise CorpusError(f"Function {reference!r}: the file {where!r} does not exist.") from None
    except Exception as error:
        raise CorpusError(
            f"Function {reference!r}: {where!r} cannot be imported ({type(error).__name__}: "
            f"{error})."
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [key for key, value in vars(module).items() if callable(value)]
        raise CorpusError(
            f"Function {reference!r}: {where!r} has no function {name!r}."
            + did_you_mean(name, known)
        )
    return found


def _load_file(file: str) -> ModuleType:
    path = Path(file).expanduser().resolve(strict=True)
    return _run_file(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=64)
def _run_file(path: Path, mtime_ns: int) -> ModuleType:
    name = f"rayx_rater_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses in the file need
    spec.loader.exec_module(module)
    return module

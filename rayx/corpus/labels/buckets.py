"""Stage 1, corpus: scores to named buckets, by edges or by shares of the documents.

Shares need all scores: they are counted and sorted by DuckDB, on disk where they do not fit, and
documents of one score always share a bucket (the one of their middle rank). A missing score is
"unknown".
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from rayx.corpus.documents import UNKNOWN
from rayx.errors import CorpusError, did_you_mean

MEMORY = "500MB"  # of DuckDB
ROWS = 100_000  # fetched at once
FORM = "NAME=COLUMN:low:0.3,middle:0.4,high:0.3 (shares) or NAME=COLUMN:low,2,middle,4,high (edges)"

Edges = dict[str | None, tuple[float, ...]]  # value of `within` -> lowest score of buckets 1, 2 ...


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """Names for ranges of a score, from the lowest to the highest.

    Args:
        name: Of the new column.
        column: The score: numbers, or text that is numbers.
        labels: B names, of the lowest scores first.
        shares: B shares of the documents, > 0, of sum 1; or
        edges: B - 1 ascending scores; one that is equal to an edge is in the bucket above it.
        within: Column within each of whose values the shares are taken; None for all together.

    Raises:
        CorpusError: Neither or both of shares and edges, or they do not fit the labels.
    """

    name: str
    column: str
    labels: tuple[str, ...]
    shares: tuple[float, ...] | None = None
    edges: tuple[float, ...] | None = None
    within: str | None = None

    def __post_init__(self) -> None:
        what, labels = f"Buckets {self.name!r}", self.labels
        if len(labels) < 2 or len({*labels, UNKNOWN}) <= len(labels) or not all(labels):
            raise CorpusError(
                f"{what} are named {', '.join(map(repr, labels))}; expected two or more different "
                f"names, none of them {UNKNOWN!r}."
            )
        if (self.shares is None) == (self.edges is None):
            raise CorpusError(f"{what} need either shares or edges: {FORM}.")
        if self.shares is not None:
            total = math.fsum(self.shares)
            if len(self.shares) != len(labels) or not min(self.shares) > 0 or abs(total - 1) > 1e-6:
                raise CorpusError(
                    f"{what} have shares {list(self.shares)} of sum {total:.6g}; expected "
                    f"{len(labels)} positive shares of sum 1, one a name."
                )
        if self.edges is not None:
            ascending = all(a < b for a, b in pairwise(self.edges))
            if len(self.edges) != len(labels) - 1 or not ascending or not np.isfinite(
                    self.edges).all():  # fmt: skip
                raise CorpusError(
                    f"{what} have edges {list(self.edges)}; expected {len(labels) - 1} ascending "
                    "numbers, one between every two names."
                )
            if self.within is not None:
                raise CorpusError(f"{what} have edges, which are the same within {self.within!r}; "
                                  "give shares, or leave `within` out.")  # fmt: skip

    @classmethod
    def parse(cls, text: str) -> Buckets:
        """Read `NAME=COLUMN[@WITHIN]:low:0.3,high:0.7` (shares) or `...:low,2,high` (edges).

        Raises:
            CorpusError: It has another form, or see the class.
        """
        name, equals, rest = text.partition("=")
        where, colon, list_of = rest.partition(":")
        column, _, within = where.partition("@")
        parts = [part.strip() for part in list_of.split(",")]
        if not (name and equals and column and colon and all(parts)):
            raise CorpusError(f"Buckets {text!r}; expected {FORM}.")
        try:
            if any(":" in part for part in parts):
                pairs = [part.rpartition(":") for part in parts]
                labels = tuple(label.strip() for label, _, _ in pairs)
                shares, edges = tuple(float(share) for _, _, share in pairs), None
            else:
                labels, shares = tuple(parts[::2]), None
                edges = tuple(float(edge) for edge in parts[1::2])
        except ValueError:
            raise CorpusError(f"Buckets {text!r}; expected {FORM}.") from None
        return cls(name=name.strip(), column=column.strip(), labels=labels, shares=shares,
                   edges=edges, within=within.strip() or None)  # fmt: skip

    def check(self, columns: Sequence[str], taken: Sequence[str] = ()) -> None:
        """Refuse columns that are not there, and a name that is one of them or of `taken`.

        Raises:
            CorpusError: So it is.
        """
        for column in (self.column, *([self.within] if self.within else [])):
            if column not in columns:
                raise CorpusError(
                    f"Buckets {self.name!r} need column {column!r}; columns are "
                    f"{', '.join(columns)}.{did_you_mean(column, columns)}"
                )
        if self.name in (*columns, *taken):
            raise CorpusError(f"Buckets {self.name!r} would overwrite a column of that name.")

    def find_edges(self, parts: Sequence[str], spill: Path) -> Edges:
        """Return the edges between buckets, for each value of `within`.

        Args:
            parts: Parquet files with the columns.
            spill: Folder for what does not fit in memory.

        Raises:
            CorpusError: A score is text that is no number, or no document has a score.
        """
        edges: Edges = {}
        rows = _counted_scores(self, parts, spill)
        for group, scores in groupby(rows, key=lambda row: row[0]):
            if self.edges is not None:
                edges[group] = self.edges
                continue
            bounds = list(accumulate(self.shares or ()))[:-1]
            found: list[float] = []
            before = 0
            for _, score, count, total in scores:
                middle = (before + count / 2) / total
                while len(found) < len(bounds) and middle > bounds[len(found)]:
                    found.append(score)
                before += count
            edges[group] = (*found, *[math.inf] * (len(bounds) - len(found)))
        if not edges:
            raise CorpusError(f"Buckets {self.name!r}: no document has a score in {self.column!r}.")
        return edges

    def assign(self, documents: pa.Table, edges: Edges) -> pa.Array:
        """Return each document's bucket.

        Args:
            documents: With the columns.
            edges: What `find_edges` returned.
        """
        within = documents[self.within].to_pylist() if self.within else [None] * len(documents)
        values = documents[self.column].to_pylist()
        return pa.array(
            [self._bucket(value, edges.get(None if group is None else str(group)))
             for value, group in zip(values, within, strict=True)], pa.string()
        )  # fmt: skip

    def _bucket(self, value: Any, edges: tuple[float, ...] | None) -> str:
        if edges is None or value is None or value == UNKNOWN or not math.isfinite(float(value)):
            return UNKNOWN
        return self.labels[bisect_right(edges, float(value))]


def _counted_scores(
    buckets: Buckets, parts: Sequence[str], spill: Path
) -> Iterator[tuple[str | None, float, int, int]]:
    """Yield (value of within, score, documents of it, of the group), ascending."""
    import duckdb

    column = '"' + buckets.column.replace('"', '""') + '"'
    group = '"' + buckets.within.replace('"', '""') + '"' if buckets.within else "NULL"
    with duckdb.connect(":memory:", config={"temp_directory": str(spill)}) as database:
        database.execute(f"SET memory_limit = '{MEMORY}'")
        database.execute("SET preserve_insertion_order = false")
        files = list(parts)
        bad = database.execute(
            f"SELECT {column} FROM read_parquet(?, union_by_name = true) WHERE {column} IS NOT NULL"
            f" AND CAST({column} AS VARCHAR) <> ? AND TRY_CAST({column} AS DOUBLE) IS NULL LIMIT 1",
            [files, UNKNOWN],
        ).fetchone()
        if bad is not None:
            raise CorpusError(
                f"Buckets {buckets.name!r}: column {buckets.column!r} has {bad[0]!r:.60}; expected "
                "numbers."
            )
        cursor = database.execute(
            f"""WITH scores AS (
                SELECT CAST({group} AS VARCHAR) AS g, TRY_CAST({column} AS DOUBLE) AS score
                FROM read_parquet(?, union_by_name = true) WHERE isfinite(score)
            ), totals AS (SELECT g, count(*) AS total FROM scores GROUP BY g)
            SELECT s.g, s.score, count(*), any_value(t.total) FROM scores s
            JOIN totals t ON s.g IS NOT DISTINCT FROM t.g
            GROUP BY s.g, s.score ORDER BY s.g, s.score""",
            [files],
        )
        while rows := cursor.fetchmany(ROWS):
            yield from rows

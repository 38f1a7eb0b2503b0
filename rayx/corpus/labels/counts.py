"""Stage 1, corpus: what labels and scores documents have, counted part by part."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from rayx.corpus.documents import UNKNOWN
from rayx.corpus.labels.rate import BYTES
from rayx.corpus.labels.raters import GROUP, ID

MOST_VALUES = 1_000  # of a label column that are counted one by one
OTHERS = "(others)"


class Counts:
    """Documents and bytes by label, and what numbers a score takes."""

    def __init__(self) -> None:
        self._labels: dict[str, dict[str, list[int]]] = {}
        self._numbers: dict[str, list[np.ndarray]] = {}

    def add(self, columns: pa.Table) -> None:
        """Count a part: its labels, scores and `bytes`."""
        for field in columns.schema:
            if field.name in (ID, GROUP, BYTES):
                continue
            values = columns[field.name]
            if pa.types.is_floating(field.type):
                self._add_numbers(field.name, values.to_pylist())
            else:
                self._add_labels(field.name, values.to_pylist(), columns[BYTES].to_pylist())

    def _add_labels(self, name: str, values: list[str | None], sizes: list[int]) -> None:
        found = self._labels.setdefault(name, {})
        for value, size in zip(values, sizes, strict=True):
            label = UNKNOWN if value is None else value
            if label not in found and len(found) >= MOST_VALUES:
                label = OTHERS
            place = found.setdefault(label, [0, 0])
            place[0] += 1
            place[1] += size

    def _add_numbers(self, name: str, values: list[float | None]) -> None:
        found = np.array([value for value in values if value is not None], np.float64)
        ends = [found.min(), found.max()] if found.size else [np.inf, -np.inf]
        facts = np.array([len(values), len(values) - found.size, found.sum(), *ends])
        self._numbers.setdefault(name, []).append(facts)

    @property
    def labels(self) -> dict[str, dict[str, list[int]]]:
        """Column -> value -> [documents, bytes], most bytes first."""
        return {
            name: dict(sorted(values.items(), key=lambda item: (-item[1][1], item[0])))
            for name, values in self._labels.items()
        }

    @property
    def numbers(self) -> dict[str, dict[str, float | None]]:
        """Column -> documents, missing, and the mean, min and max of what is not missing."""
        result: dict[str, dict[str, float | None]] = {}
        for name, parts in self._numbers.items():
            count, missing, total = np.sum(parts, axis=0)[:3].tolist()
            low, high = np.min(parts, axis=0)[3], np.max(parts, axis=0)[4]
            spread = (total / max(1, count - missing), float(low), float(high))
            if count == missing:
                spread = (None, None, None)
            facts = dict(zip(("mean", "min", "max"), spread, strict=True))
            result[name] = {"documents": int(count), "missing": int(missing), **facts}
        return result

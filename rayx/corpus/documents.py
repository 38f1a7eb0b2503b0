"""Stage 1, corpus: the documents of a source.

Whatever cannot be a document is counted by its reason, never dropped silently; whatever would spoil
the whole source is a CorpusError before any work is done. Invalid UTF-8 decodes to U+FFFD, so a
document that holds U+FFFD is skipped as invalid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, SupportsFloat

from rayx.corpus.rows import Unreadable, rows
from rayx.corpus.source import Location, Source, check_columns, check_domain_name
from rayx.errors import CorpusError

CROSSED = "."  # between the values that name a domain of several columns
INVALID = "\ufffd"  # what invalid UTF-8 decodes to
UNKNOWN = "unknown"  # the value of a label that a document lacks


@dataclass(frozen=True, slots=True)
class Document:
    """One document, or the reason (`skip`) why a row is none; domain None if it names none."""

    domain: str | None
    text: str
    group: str | None
    skip: str | None = None
    labels: dict[str, str] = field(default_factory=dict)
    score: float | None = None
    id: str | None = None


def documents(source: Source, location: Location, start: int = 0) -> Iterator[Document]:
    """Yield every row of a source, or those from `start` on, as a document or a counted skip.

    Raises:
        CorpusError: Broken JSONL line, unreadable file or hub dataset, missing column,
            impossible domain name.
    """
    crossed: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(rows(source, location, start)):
        if number == 0 and not start:
            check_columns(source, f"Source {source.path!r}", list(row))
        domain = source.domain
        if source.domain_column is not None:
            missing = [column for column in source.domain_column if row.get(column) is None]
            if missing:
                yield Document(None, "", None, f"null {missing[0]}")
                continue
            values = tuple(str(row[column]) for column in source.domain_column)
            domain = CROSSED.join(values)
            if domain not in crossed:
                crossed[check_domain_name(domain)] = values
            elif crossed[domain] != values:
                raise CorpusError(
                    f"Source {source.path!r}: {crossed[domain]} and {values} of "
                    f"{', '.join(source.domain_column)} both make the domain {domain!r}. Write the "
                    f"labels without {CROSSED!r}."
                )
        text, optional = row.get(source.text_column), _optional(source, row)
        skip = reason_to_skip(text)
        yield Document(domain, "" if skip else str(text), optional[0], skip, *optional[1:])


def _optional(
    source: Source, row: dict[str, Any]
) -> tuple[str | None, dict[str, str], float | None, str | None]:
    """Return a row's group, labels, score and id."""
    group = row.get(source.group_column) if source.group_column else None
    name = row.get(source.id_column) if source.id_column else None
    score = row.get(source.score_column) if source.score_column else None
    if score is not None:
        if isinstance(score, (bool, str)) or not isinstance(score, SupportsFloat):
            raise CorpusError(
                f"Source {source.path!r}, column {source.score_column!r} has {score!r:.80}; "
                "expected numbers, by which documents are sorted."
            )
        score = float(score) if math.isfinite(score) else None
    labels = {c: UNKNOWN if row.get(c) is None else str(row[c]) for c in source.axes}
    return (None if group is None else str(group), labels, score,
            None if name is None else str(name))  # fmt: skip


def reason_to_skip(text: Any) -> str | None:
    """Return why a value is no document's text, None if it is."""
    if text is None:
        return "null text"
    if isinstance(text, Unreadable):
        return text.reason
    if not isinstance(text, str):
        return "text is not a string"
    if not text or text.isspace():
        return "empty"
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can escape
        return "invalid UTF-8"
    return "invalid UTF-8" if INVALID in text else None

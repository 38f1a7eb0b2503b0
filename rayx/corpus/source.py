"""Stage 1, corpus: where the text comes from.

A source is files (Parquet, JSONL, plain text; local or remote) or a Hugging Face hub name. It names
one domain, or the columns whose values, joined, name each document's domain.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path, PurePosixPath

from rayx.errors import CorpusError, did_you_mean

log = logging.getLogger(__name__)

SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "txt"}
COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
FORMATS = ("parquet", "jsonl", "json", "txt", "hub")


def check_domain_name(name: str) -> str:
    """Return the name, which must also serve as a folder name and a column name.

    Raises:
        CorpusError: The name is empty, too long, or has characters that a folder cannot have.
    """
    if not name.strip() or name != name.strip():
        raise CorpusError(f"Domain name {name!r} is empty or starts or ends with white space.")
    bad = [c for c in name if c in '/\\:*?"<>|' or not c.isprintable()]
    if bad or name.startswith(".") or len(name) > 100:
        raise CorpusError(
            f"Domain name {name!r} cannot be a folder name: use at most 100 printable characters, "
            "no path separator, control character or leading dot."
        )
    return name


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Text for one domain (`domain`) or for the domains named in columns (`domain_column`).

    Args:
        path: Local file, folder or glob, URL, or Hugging Face hub name.
        domain: Name of the domain that all documents belong to.
        domain_column: Column with each document's domain, instead of `domain`; of several columns
            the domain is the crossing: their values joined by "." (`wiki.high`).
        text_column: Column with the text.
        label_columns: Columns whose values are counted in each domain by bytes (licence, language);
            domain columns are labels too.
        score_column: Column of numbers by which the training text of a domain is sorted, highest
            first, so that a mixture can ask for `web@0.3`, its best 30%.
        id_column: Column of ids; a second document of an id is skipped.
        group_column: Column whose value keeps documents together when the held-out set is chosen
            (pieces of one book go the same way). None: each document by itself.
        format: "parquet", "jsonl" ("json"), "txt" or "hub"; None takes it from the suffix. One
            text file is one document.
        split: Split of a hub dataset.
        streaming: Stream a hub dataset or a Parquet URL instead of keeping a copy in the cache
            of `datasets`. Local files are always streamed, JSONL and text at a URL never.
        evaluation_only: All documents are held out: a target that no mixture can train on.

    Raises:
        CorpusError: Neither or both of domain and domain_column, an impossible name or format.
    """

    path: str
    domain: str | None = None
    domain_column: str | tuple[str, ...] | None = None
    text_column: str = "text"
    label_columns: tuple[str, ...] = ()
    score_column: str | None = None
    id_column: str | None = None
    group_column: str | None = None
    format: str | None = None
    split: str = "train"
    streaming: bool = False
    evaluation_only: bool = False

    def __post_init__(self) -> None:
        if not str(self.path):
            raise CorpusError("Source has an empty path; name a file, folder, URL or hub dataset.")
        object.__setattr__(self, "path", str(self.path))
        if isinstance(self.domain_column, str):
            object.__setattr__(self, "domain_column", (self.domain_column,))
        elif self.domain_column is not None:
            object.__setattr__(self, "domain_column", tuple(self.domain_column))
        object.__setattr__(self, "label_columns", tuple(self.label_columns))
        if (self.domain is None) == (self.domain_column is None):
            raise CorpusError(
                f"Source {self.path!r} needs exactly one of domain (a name for all of it) and "
                f"domain_column, got {self.domain!r} and {self.domain_column!r}."
            )
        if self.domain is not None:
            check_domain_name(self.domain)
        if self.format is not None and self.format not in FORMATS:
            raise CorpusError(
                f"Source {self.path!r} has format {self.format!r}; known are {', '.join(FORMATS)}."
                + did_you_mean(self.format, FORMATS)
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """Columns that are counted as labels."""
        return tuple(dict.fromkeys((*(self.domain_column or ()), *self.label_columns)))

    @property
    def columns(self) -> tuple[str, ...]:
        """All columns that are read."""
        optional = (self.group_column, self.score_column, self.id_column)
        return tuple(dict.fromkeys((self.text_column, *self.axes, *(c for c in optional if c))))


@dataclass(frozen=True, slots=True)
class Location:
    """What a source's path turned out to be: a format and its files (none for the hub)."""

    format: str
    files: tuple[str, ...]
    local: bool


def _format_of(name: str) -> str | None:
    suffixes = [s.lower() for s in PurePosixPath(name.split("?")[0]).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def locate(source: Source) -> Location:
    """Find a source's files and format; reads no more than names, sizes and Parquet footers.

    Raises:
        CorpusError: Missing or empty file, unknown suffix, mixed formats, not a Parquet file.
    """
    path, asked = source.path, "jsonl" if source.format == "json" else source.format
    if asked == "hub":
        return Location("hub", (), False)
    if "://" in path:
        form = asked or _format_of(path)
        if form is None:
            raise _unknown_suffix(path)
        return Location(form, (path,), False)
    local = Path(path).expanduser()
    if has_magic(path) and not local.exists():
        files = sorted(f for f in glob(str(local), recursive=True) if Path(f).is_file())
    elif local.is_dir():
        inside = [f for f in local.rglob("*") if f.is_file() and not f.name.startswith(".")]
        files = sorted(str(f) for f in inside if asked or _format_of(f.name))
        if len(inside) > len(files):
            log.warning("%s: %d files of other suffixes ignored", path, len(inside) - len(files))
    elif local.is_file():
        files = [str(local)]
    elif asked or _format_of(path) or path[0] in "/.~" or path.count("/") > 1:
        near = [f.name for f in local.parent.iterdir()] if local.parent.is_dir() else []
        raise CorpusError(f"Source file {path!r} does not exist.{did_you_mean(local.name, near)}")
    else:
        return Location("hub", (), False)
    if not files:
        raise CorpusError(f"Source {path!r} has no file of a known suffix ({', '.join(SUFFIXES)}).")
    found = {asked or _format_of(f) for f in files}
    if None in found:
        raise _unknown_suffix(next(f for f in files if _format_of(f) is None))
    if len(found) > 1:
        raise CorpusError(
            f"Source {path!r} mixes {sorted(map(str, found))}: make them two sources."
        )
    location = Location(str(found.pop()), tuple(files), True)
    for file in files:
        # an empty text file among others is an empty document, counted like any other
        if not Path(file).stat().st_size and (location.format != "txt" or len(files) == 1):
            raise CorpusError(f"Source file {file!r} is empty (0 bytes).")
        if location.format == "parquet":
            _check_parquet(source, file)
    return location


def _unknown_suffix(file: str) -> CorpusError:
    return CorpusError(
        f"Source file {file!r} has an unknown suffix; known are {', '.join(SUFFIXES)} "
        f"(also with {', '.join(COMPRESSED)}). Name the format with format=."
    )


def _check_parquet(source: Source, file: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        meta = pq.read_metadata(file)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"Source file {file!r} is not readable as Parquet: {error}") from None
    if not meta.num_rows:
        raise CorpusError(f"Source file {file!r} is empty (a Parquet file with 0 rows).")
    check_columns(source, file, meta.schema.to_arrow_schema().names)


def check_columns(source: Source, where: str, columns: list[str]) -> None:
    for column in source.columns:
        if column not in columns:
            raise CorpusError(
                f"{where} has no column {column!r}; columns found: {', '.join(columns)}."
                + did_you_mean(column, columns)
            )

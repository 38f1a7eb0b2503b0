"""Stage 1, corpus: where the text comes from.

A source is files (Parquet, JSONL, plain text; local or remote) or a Hugging Face hub name. It names
one domain, or the columns whose values, joined, name each document's domain.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from fnmatch import translate
from glob import glob, has_magic
from pathlib import Path, PurePosixPath

from pyarrow import fs

from rayx import remote
from rayx.errors import CorpusError, StoreError, UnreachableError, did_you_mean

log = logging.getLogger(__name__)

Stamp = tuple[int, int]  # bytes and time of the last change, ns
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
        path: Local file, folder or glob; the same on s3:// or gs://; another URL, or hub name.
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
    """What a source's path turned out to be: a format and its files (none for the hub).

    Files on this machine or an object store have a stamp, their size and the time of their last
    change; those of other URLs have none.
    """

    format: str
    files: tuple[str, ...]
    stamps: tuple[Stamp, ...] = ()


def _format_of(name: str) -> str | None:
    suffixes = [s.lower() for s in PurePosixPath(name.split("?")[0]).suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def locate(source: Source) -> Location:
    """Find a source's files and format; reads no more than names, sizes and Parquet footers.

    Raises:
        CorpusError: Missing or empty file, unknown suffix, mixed formats, not a Parquet file.
        StoreError: An object store's URL holds credentials or cannot be understood.
        UnreachableError: The object store is away or does not allow it.
    """
    path, asked = source.path, "jsonl" if source.format == "json" else source.format
    if asked == "hub":
        return Location("hub", ())
    if is_object(path):
        files = _objects(path, asked)
    elif "://" in path:
        form = asked or _format_of(path)
        if form is None:
            raise _unknown_suffix(path)
        return Location(form, (path,))
    else:
        found = _local_files(path, asked)
        if found is None:
            return Location("hub", ())
        files = found
    if not files:
        raise CorpusError(f"Source {path!r} has no file of a known suffix ({', '.join(SUFFIXES)}).")
    forms = {asked or _format_of(f) for f in files}
    if None in forms:
        raise _unknown_suffix(next(f for f in files if _format_of(f) is None))
    if len(forms) > 1:
        raise CorpusError(
            f"Source {path!r} mixes {sorted(map(str, forms))}: make them two sources."
        )
    location = Location(str(forms.pop()), tuple(files), tuple(files.values()))
    for file, (size, _) in files.items():
        # an empty text file among others is an empty document, counted like any other
        if not size and (location.format != "txt" or len(files) == 1):
            raise CorpusError(f"Source file {file!r} is empty (0 bytes).")
        # a store is asked for one footer only: each takes a while
        if location.format == "parquet" and (file == location.files[0] or not is_object(file)):
            _check_parquet(source, file)
    return location


def _local_files(path: str, asked: str | None) -> dict[str, Stamp] | None:
    """Return the files of a path in order, each once; None if it can only be a hub name."""
    local = Path(path).expanduser()
    if has_magic(path) and not local.exists():
        names = sorted(f for f in glob(str(local), recursive=True) if Path(f).is_file())
    elif local.is_dir():
        inside = [f for f in local.rglob("*") if not f.name.startswith(".")]
        if links := [f for f in inside if f.is_symlink() and not f.is_file()]:
            log.warning("%s: %d links to folders or to nothing are not followed, e.g. %s",
                        path, len(links), links[0])  # fmt: skip
        names = _known(path, [str(f) for f in inside if f.is_file()], asked)
    elif local.is_file():
        names = [str(local)]
    elif asked or _format_of(path) or path[0] in "/.~" or path.count("/") > 1:
        near = [f.name for f in local.parent.iterdir()] if local.parent.is_dir() else []
        raise CorpusError(f"Source file {path!r} does not exist.{did_you_mean(local.name, near)}")
    else:
        return None
    once: dict[str, str] = {}  # through a loop of links a pattern finds a file again and again
    for name in names:
        once.setdefault(os.path.realpath(name), name)
    return {name: stamp(name) for name in once.values()}


def _objects(url: str, asked: str | None) -> dict[str, Stamp]:
    """Return the files of an object store's URL, in order: an object, a folder's, a pattern's."""
    filesystem, root = remote.locate(url)
    scheme, query = url.split("://")[0], "?" + url.partition("?")[2] if "?" in url else ""

    def found(infos: list[fs.FileInfo]) -> dict[str, Stamp]:
        seen = [i for i in infos if i.type == fs.FileType.File and not i.base_name.startswith(".")]
        return {f"{scheme}://{info.path}{query}": _stamp_of(info) for info in seen}

    info = remote.reach(lambda: filesystem.get_file_info(root), "look for the source", url)
    if info.type == fs.FileType.File:
        return found([info])
    magic = has_magic(root)
    parts = root.split("/")
    folder = "/".join(parts[: next((k for k, part in enumerate(parts) if has_magic(part)), None)])
    under = fs.FileSelector(folder, recursive=True, allow_not_found=True)
    infos = remote.reach(lambda: filesystem.get_file_info(under), "list the source", url)
    if not infos:
        raise CorpusError(f"Source {url!r} does not exist: nothing is there or below it.")
    if magic:
        pattern = re.compile(_as_regex(root))
        files = found([info for info in infos if pattern.fullmatch(info.path)])
        if not files:
            raise CorpusError(f"Source {url!r} matches none of the {len(infos)} objects there.")
    else:
        files = found(infos)
        files = {name: files[name] for name in _known(url, list(files), asked)}
    return dict(sorted(files.items()))


def _as_regex(pattern: str) -> str:
    steps = (".*" if part == "**" else translate(part)[4:-3].replace(".*", "[^/]*")
             for part in pattern.split("/"))  # fmt: skip
    return "/".join(steps).replace(".*/", "(?:.*/)?")


def _known(path: str, names: list[str], asked: str | None) -> list[str]:
    known = sorted(name for name in names if asked or _format_of(name))
    if len(names) > len(known):
        log.warning("%s: %d files of other suffixes ignored", path, len(names) - len(known))
    return known


def is_object(path: str) -> bool:
    """Whether a path is the URL of an object store that is read here."""
    return path.startswith(("s3://", "gs://", "gcs://"))


def stamp(file: str) -> Stamp:
    """Return a file's size and the time of its last change, ns.

    Raises:
        FileNotFoundError: It is not there.
    """
    if not is_object(file):
        found = os.stat(file)
        return found.st_size, found.st_mtime_ns
    filesystem, path = remote.locate(file)
    info = remote.reach(lambda: filesystem.get_file_info(path), "look for", file)
    if info.type != fs.FileType.File:
        raise FileNotFoundError(file)
    return _stamp_of(info)


def _stamp_of(info: fs.FileInfo) -> Stamp:
    return info.size or 0, info.mtime_ns or 0


def _unknown_suffix(file: str) -> CorpusError:
    return CorpusError(
        f"Source file {file!r} has an unknown suffix; known are {', '.join(SUFFIXES)} "
        f"(also with {', '.join(COMPRESSED)}). Name the format with format=."
    )


def _check_parquet(source: Source, file: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        filesystem, path = remote.locate(file)
        meta = remote.reach(lambda: pq.read_metadata(path, filesystem=filesystem), "read", file)
    except UnreachableError:
        raise
    except (pa.ArrowException, OSError, StoreError) as error:
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

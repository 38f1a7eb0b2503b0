"""Files of a store: written whole or not at all, on a local folder or an object store.

An object store that is busy or away is waited for (`rayx.remote`); what stays is an
`UnreachableError`, which must never be taken for a damaged or missing file.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import posixpath
import re
import stat
import uuid
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

from pyarrow import fs

from rayx.errors import StoreError
from rayx.remote import ONE_PUT_BYTES, locate, reach

T = TypeVar("T")
MOST_JSON_BYTES = 256_000_000  # the specs of 100,000 runs take a quarter of it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def _mode(path: str) -> int | None:
    """Return the mode of a file, of a link itself, or None where there is nothing."""
    try:
        return os.lstat(path).st_mode
    except OSError:  # whoever opens it says why
        return None


class Files:
    """Named files under one root; names are checked, so that none can lead out of it."""

    def __init__(self, filesystem: fs.FileSystem, root: str, url: str) -> None:
        self.filesystem = filesystem
        self.root = root
        self.url = url
        self.is_local = isinstance(filesystem, fs.LocalFileSystem)

    def _path(self, name: str) -> str:
        if not all(_NAME.fullmatch(part) for part in name.split("/")):
            raise StoreError(
                f"Name {name!r} cannot be used in a store; expected letters, digits, '.', '_', '-'."
            )
        path = self.root
        for part in name.split("/")[:-1]:
            path = f"{path}/{part}"
            self._refuse_link(path)
        return posixpath.join(self.root, name)

    def _refuse_link(self, path: str) -> None:
        """Refuse a link or device, by which whoever can write here could lead a reader away."""
        mode = _mode(path) if self.is_local else None
        if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            kind = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
            raise StoreError(
                f"{path!r} is {kind}, which a store never holds: remove it. (The folder of a store "
                "may be a link; what is in it may not.)"
            )

    def _do(self, action: Callable[[], T], what: str, patient: bool = True) -> T:
        return reach(action, what, self.url, None if patient else 0.0)

    def write_bytes(self, name: str, data: bytes, patient: bool = True) -> None:
        """Write a file so that readers see either the old content or all of the new.

        Args:
            name: Of the file.
            data: All of its content.
            patient: Try for minutes where an object store is away.

        Raises:
            UnreachableError: The store is away, full, or does not allow it.
        """
        path = self._path(name)
        write = self._write_local if self.is_local else self._write_object
        self._do(lambda: write(path, data), f"write {name}", patient)

    def _write_local(self, path: str, data: bytes) -> None:
        folder = posixpath.dirname(path)
        os.makedirs(folder, exist_ok=True)
        # The leading dot keeps a half-written file out of every listing.
        temporary = posixpath.join(folder, f".{uuid.uuid4().hex}")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def _write_object(self, path: str, data: bytes) -> None:
        # In one write: an object appears when its upload is complete, and leaving this block early
        # would complete it. An upload that breaks leaves nothing that a listing or a read finds.
        filesystem = self.filesystem if len(data) <= ONE_PUT_BYTES else self._in_parts
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)

    @cached_property
    def _in_parts(self) -> fs.FileSystem:
        """The filesystem that writes large objects."""
        is_s3 = isinstance(self.filesystem, fs.S3FileSystem)
        return locate(self.url, in_parts=True)[0] if is_s3 else self.filesystem

    def read_bytes(self, name: str, most_bytes: int | None = None) -> bytes:
        """Return the content.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It has more than `most_bytes`.
            UnreachableError: The store is away or does not allow it.
            StoreError: It is a link, a device or a folder.
        """
        while True:
            data, version = self._read(name, most_bytes)
            # pyarrow asks for the size and then for so many bytes: of an object that was replaced
            # by a longer one in between, only a part comes.
            if self.is_local or self._read(name, most_bytes, version_only=True)[1] == version:
                return data

    def _read(
        self, name: str, most_bytes: int | None, version_only: bool = False
    ) -> tuple[bytes, object]:
        """Return the content, and what differs where an object was replaced."""
        path = self._path(name)
        self._refuse_link(path)

        def read() -> tuple[bytes, object]:
            with self.filesystem.open_input_file(path) as file:
                size = file.size()
                if most_bytes is not None and size > most_bytes:
                    raise ValueError(f"it has {size:,} bytes, expected at most {most_bytes:,}")
                version = None if self.is_local else file.metadata()
                return b"" if version_only else file.read(), version

        return self._do(read, f"read {name}")

    def write_json(self, name: str, data: Any, patient: bool = True) -> None:
        """Write JSON atomically; NaN is refused. See `write_bytes`."""
        self.write_bytes(name, json.dumps(data, allow_nan=False).encode(), patient)

    def read_json(self, name: str) -> Any:
        """Return parsed JSON; FileNotFoundError or ValueError where it is missing or broken."""
        tries = 1 if self.is_local else 3  # a part of an object (see `read_bytes`) is no JSON
        for left in reversed(range(tries)):
            try:
                return json.loads(self._read(name, MOST_JSON_BYTES)[0])
            except RecursionError:
                raise ValueError("JSON nested too deep") from None
            except ValueError:
                if not left:
                    raise

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        path = self._path(name)
        if self.is_local:
            return stat.S_ISREG(_mode(path) or 0)
        info = self._do(lambda: self.filesystem.get_file_info(path), f"look for {name}")
        return info.type == fs.FileType.File

    def remove(self, name: str) -> None:
        """Delete a file; FileNotFoundError where there is none."""
        path, tries = self._path(name), itertools.count()

        def remove() -> None:
            again = next(tries) > 0
            try:
                self.filesystem.delete_file(path)
            except FileNotFoundError:
                if not again:  # else it is our own work, whose answer was lost
                    raise

        self._do(remove, f"remove {name}")

    def names(self, folder: str, suffix: str = ".json") -> list[str]:
        """Return the stems of the files in a folder that end in `suffix`, sorted."""
        path = self._path(folder)
        self._refuse_link(path)

        def names() -> list[str]:
            if self.is_local:  # where pyarrow would stat each file
                with os.scandir(path) as entries:
                    return [entry.name for entry in entries if entry.is_file()]
            infos = self.filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
            return [info.base_name for info in infos if info.is_file]

        try:
            files = self._do(names, f"list {folder}")
        except FileNotFoundError:  # pyarrow too: the folder was made while it was looked for
            return []
        return sorted(n.removesuffix(suffix) for n in files if n.endswith(suffix) and n[0] != ".")

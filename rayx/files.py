"""Files of a store: written whole or not at all, on a local folder or an object store."""

from __future__ import annotations

import json
import os
import posixpath
import re
import uuid
from typing import Any

import pyarrow as pa
from pyarrow import fs

from rayx.errors import StoreError

MOST_JSON_BYTES = 256_000_000  # the specs of 100,000 runs take a quarter of it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def locate(url: str) -> tuple[fs.FileSystem, str]:
    """Return the filesystem and the path of a local path, s3:// or gs:// URL.

    Raises:
        StoreError: The URL cannot be understood.
    """
    try:
        if "://" in url:
            return fs.FileSystem.from_uri(url)
        return fs.LocalFileSystem(), os.path.abspath(url)
    except (pa.ArrowInvalid, OSError) as error:
        raise StoreError(
            f"Store URL {url!r} cannot be opened: {error}. Expected a local path, s3:// or gs://."
        ) from error


class Files:
    """Named files under one root; names are checked, so that none can lead out of it."""

    def __init__(self, filesystem: fs.FileSystem, root: str, url: str) -> None:
        self.filesystem = filesystem
        self.root = root
        self.url = url

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

    def read_bytes(self, name: str, most_bytes: int | None = None) -> bytes:
        """Return the content; FileNotFoundError where there is none, ValueError where too long."""
        with self.filesystem.open_input_file(self._path(name)) as file:
            if most_bytes is not None and file.size() > most_bytes:
                raise ValueError(f"it has {file.size():,} bytes, expected at most {most_bytes:,}")
            return file.read()

    def write_json(self, name: str, data: Any) -> None:
        """Write JSON atomically; NaN is refused."""
        self.write_bytes(name, json.dumps(data, allow_nan=False).encode())

    def read_json(self, name: str) -> Any:
        """Return parsed JSON; FileNotFoundError or ValueError where it is missing or broken."""
        try:
            return json.loads(self.read_bytes(name, MOST_JSON_BYTES))
        except RecursionError:
            raise ValueError("JSON nested too deep") from None

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return self.filesystem.get_file_info(self._path(name)).type == fs.FileType.File

    def remove(self, name: str) -> None:
        """Delete a file."""
        self.filesystem.delete_file(self._path(name))

    def names(self, folder: str, suffix: str = ".json") -> list[str]:
        """Return the stems of the files in a folder that end in `suffix`, sorted."""
        path = self._path(folder)
        try:
            if isinstance(self.filesystem, fs.LocalFileSystem):  # which would stat each file
                with os.scandir(path) as entries:
                    files = [entry.name for entry in entries if entry.is_file()]
            else:
                infos = self.filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
                files = [info.base_name for info in infos if info.is_file]
        except FileNotFoundError:  # pyarrow too: the folder was made while it was looked for
            return []
        return sorted(n[: -len(suffix)] for n in files if n.endswith(suffix) and n[0] != ".")

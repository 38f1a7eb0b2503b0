"""Stage 1, corpus: a corpus on an object store, fetched into a cache of this node and uploaded.

The cache is $RAYX_CACHE, else `rayx` in the user's cache folder. A shard is kept there under its
hash, so that corpora share it, processes of one node fetch it once, and deleting any of it only
costs time. A file gets its name when its hash was found right, with a time stamp that any later
writing would change.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock
from pyarrow import fs

from rayx.corpus.manifest import MANIFEST, REBUILD, read_manifest
from rayx.corpus.parts import write_whole
from rayx.errors import CorpusError
from rayx.remote import locate, reach

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 25
VERIFIED_NS = 1_000_000_000  # the time stamp of a file in the cache
UPLOADING = "uploading.json"  # which corpus the shards are of, until the manifest is there


def cache_folder(kind: str) -> Path:
    """Return a folder of the cache that can be written.

    Raises:
        CorpusError: There is none.
    """
    places = [os.environ.get("RAYX_CACHE")]
    if places == [None]:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        places = [f"{home}/rayx", f"{tempfile.gettempdir()}/rayx-{os.getuid()}"]
    why = ""
    for place in places:
        folder = Path(str(place)).expanduser().absolute() / kind
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
                return folder
            why += f"; {folder} is not yours to write"
        except OSError as error:
            why += f"; {error}"
    raise CorpusError(
        f"There is no folder for copies of a remote corpus{why}. Set RAYX_CACHE to a folder on a "
        "local disk that you can write."
    )


def read_chunks(filesystem: fs.FileSystem, path: str, url: str) -> Iterator[bytes]:
    """Yield a file's content; each request is tried again where an object store is away.

    Raises:
        FileNotFoundError: There is no such file.
        UnreachableError: The store is away or does not allow it.
    """
    with reach(lambda: filesystem.open_input_file(path), f"read {path}", url) as file:
        size = file.size()
        for start in range(0, size, CHUNK_BYTES):
            count = min(CHUNK_BYTES, size - start)
            yield reach(lambda n=count, at=start: file.read_at(n, at), f"read {path}", url)


def fetch(filesystem: fs.FileSystem, path: str, facts: dict[str, Any], url: str) -> Path:
    """Return the local copy of a shard, fetched if it is not there whole.

    Args:
        filesystem: Where the shard is.
        path: Of the shard.
        facts: Its file_bytes and sha256.
        url: Of the corpus.

    Raises:
        CorpusError: The shard is not as the manifest says, or the cache is full.
        UnreachableError: The store is away or does not allow it.
    """
    size, sha256 = facts["file_bytes"], facts["sha256"]
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise CorpusError(f"Corpus {url}: sha256 {sha256!r:.80} is no hash. {REBUILD}")
    folder = cache_folder("shards")
    file = folder / sha256
    if _is_whole(file, size):
        return file
    with FileLock(folder / f"{sha256}.lock"):
        if _is_whole(file, size):  # another process was first
            return file
        _need_space(folder, size)
        log.info("fetching %s of %s, %.1f MB, to %s", facts["file"], url, size / 1e6, folder)
        partial = folder / f"{sha256}.partial"
        digest = hashlib.sha256()
        try:
            with open(partial, "wb") as out:
                for chunk in read_chunks(filesystem, path, url):
                    digest.update(chunk)
                    _write(out, chunk, folder)
            if digest.hexdigest() != sha256:
                raise CorpusError(
                    f"Corpus {url}: the content of {facts['file']} has changed (sha256 "
                    f"{digest.hexdigest()[:16]}..., expected {sha256[:16]}...). {REBUILD}"
                )
            _keep(partial, file)
        finally:
            partial.unlink(missing_ok=True)
    return file


def _is_whole(file: Path, size: int) -> bool:
    try:
        found = file.lstat()
    except FileNotFoundError:
        return False
    return found.st_size == size and found.st_mtime_ns == VERIFIED_NS


def _keep(verified: Path, file: Path) -> None:
    os.utime(verified, ns=(VERIFIED_NS, VERIFIED_NS))
    os.replace(verified, file)


def _need_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise CorpusError(
            f"Cache {str(folder)!r} has {free / 1e6:,.0f} MB free, a shard needs {size / 1e6:,.0f} "
            "MB. Delete what is old in it, or set RAYX_CACHE to a folder with more space."
        )


def _write(out: Any, chunk: bytes, folder: Path) -> None:
    try:
        out.write(chunk)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _need_space(folder, 1 << 62)
        raise


def build_folder(url: str, key: str) -> Path | None:
    """Return where a corpus for a URL is built before it is uploaded, None where it is there.

    Args:
        url: Where the corpus goes.
        key: Hash of its sources and parameters.

    Raises:
        StoreError: The URL cannot be understood.
        CorpusError: There is something else at the URL, or no cache.
    """
    filesystem, root = locate(url)
    found = _json(filesystem, f"{root}/{MANIFEST}", url)
    if found is not None and found.get("build_key") == key:
        return None
    if found is not None:
        raise CorpusError(
            f"{url} holds corpus {found.get('fingerprint')}, built from other sources, versions of "
            "them or parameters. Name another folder, or delete that one to replace it."
        )
    listing = fs.FileSelector(root, allow_not_found=True)
    infos = reach(lambda: filesystem.get_file_info(listing), "list the corpus", url)
    names = {info.base_name for info in infos if info.path.strip("/") != root.strip("/")}
    if names and UPLOADING not in names:
        raise CorpusError(
            f"{url} holds something that is not a corpus ({', '.join(sorted(names)[:3])}); name a "
            "new folder."
        )
    return cache_folder("builds") / hashlib.sha256(f"{url} {key}".encode()).hexdigest()[:16]


def upload(folder: Path, url: str) -> None:
    """Upload a built corpus, the manifest last, and keep its shards in the cache.

    What an interrupted upload of the same corpus brought there is not sent again.

    Raises:
        UnreachableError: The store is away or does not allow it.
    """
    filesystem, root = locate(url, in_parts=True)
    manifest = read_manifest(fs.LocalFileSystem(), str(folder), str(folder))
    marker = {"fingerprint": manifest["fingerprint"]}
    going_on = _json(filesystem, f"{root}/{UPLOADING}", url) == marker
    _put(filesystem, f"{root}/{UPLOADING}", json.dumps(marker).encode(), url)
    shards = [d[s] for d in manifest["domains"] for s in ("train", "heldout") if s in d]
    for facts in (*shards, manifest["tokenizer"]):
        name, size, path = facts["file"], facts["file_bytes"], f"{root}/{facts['file']}"
        info = reach(lambda path=path: filesystem.get_file_info(path), f"look for {name}", url)
        if not (going_on and info.type == fs.FileType.File and info.size == size):
            log.info("uploading %s, %.1f MB, to %s", name, size / 1e6, url)
            _put(filesystem, path, folder / name, url)
    _put(filesystem, f"{root}/{MANIFEST}", folder / MANIFEST, url)
    with contextlib.suppress(FileNotFoundError):  # the answer to an earlier try was lost
        reach(lambda: filesystem.delete_file(f"{root}/{UPLOADING}"), f"remove {UPLOADING}", url)
    for shard in shards:
        _keep(folder / shard["file"], cache_folder("shards") / shard["sha256"])
    shutil.rmtree(folder)


def write_sidecar(url: str, name: str, text: str) -> None:
    """Write a file beside the manifest of a built corpus; the fingerprint does not count it."""
    if "://" in url:
        filesystem, root = locate(url, in_parts=True)
        _put(filesystem, f"{root}/{name}", text.encode(), url)
    else:
        write_whole(Path(url) / name, text)


def read_sidecar(url: str, name: str) -> dict[str, Any] | None:
    """Return the JSON of a file beside the manifest, None where there is none, {} if broken."""
    filesystem, root = locate(url)
    return _json(filesystem, f"{root}/{name}", url)


def _json(filesystem: fs.FileSystem, path: str, url: str) -> dict[str, Any] | None:
    try:
        found = json.loads(b"".join(read_chunks(filesystem, path, url)))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _put(filesystem: fs.FileSystem, path: str, content: bytes | Path, url: str) -> None:
    def put() -> None:
        # Leaving this block by an error would complete a truncated object: the size tells, and
        # without a manifest it is no corpus.
        with filesystem.open_output_stream(path) as out:
            if isinstance(content, bytes):
                out.write(content)
            else:
                with open(content, "rb") as source:
                    while chunk := source.read(CHUNK_BYTES):
                        out.write(chunk)

    reach(put, f"write {path}", url)

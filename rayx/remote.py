"""File systems by URL, and patience with object stores: busy, slow or away is not the end.

    s3://bucket/path?region=us-east-1                                AWS
    s3://bucket/path?endpoint_override=host:9000&scheme=http&region=us-east-1    any other S3

Credentials come from the environment, a profile or the node's role, never from a URL: URLs are
logged and recorded.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
from pyarrow import fs

from rayx.errors import StoreError, UnreachableError

log = logging.getLogger(__name__)

T = TypeVar("T")
RETRY_SECONDS = 300.0  # an object store that is away for longer is given up
PAUSES = (0.5, 15.0)  # seconds between tries, the first and the longest
ONE_PUT_BYTES = 5_000_000  # S3 takes no smaller parts
SDK_TRIES = 4  # of one request inside the SDK, within about 5 s where each fails at once
CONNECT_SECONDS, SILENT_SECONDS = 10.0, 30.0  # then a request is tried again

_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECRET = re.compile(r"key|secret|token|passw|credential|signature", re.IGNORECASE)
_AWS = re.compile(r"AWS Error (\w+)(?: \(HTTP status (\d+)\))? during (\w+) operation")
_TRANSIENT = {
    "NETWORK_CONNECTION",
    "SLOW_DOWN",
    "THROTTLING",
    "SERVICE_UNAVAILABLE",
    "INTERNAL_FAILURE",
    "REQUEST_TIMEOUT",
    "NO_SUCH_UPLOAD",  # it was completed, and the answer was lost
}
_NO_CREDENTIALS = (
    "credentials are missing or wrong (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
    "or the role of the node)"
)
_PERMISSION = {
    "ListObjectsV2": "s3:ListBucket",
    "HeadBucket": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "DeleteObject": "s3:DeleteObject",
}


def locate(url: str, in_parts: bool = False) -> tuple[fs.FileSystem, str]:
    """Return the filesystem and the path of a local path, s3:// or gs:// URL.

    Args:
        url: The URL or path.
        in_parts: For writing more than `ONE_PUT_BYTES` to S3.

    Raises:
        StoreError: The URL cannot be understood, or holds credentials.
    """
    if "://" not in url:
        return fs.LocalFileSystem(), os.path.abspath(url)
    refuse_secrets(url)
    try:
        filesystem, root = persist(lambda: fs.FileSystem.from_uri(url), url)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise StoreError(
            f"URL {url!r} cannot be opened: {error}. Expected a local path, s3:// or gs://."
        ) from error
    if isinstance(filesystem, fs.S3FileSystem):
        filesystem = _patient(filesystem, url, in_parts)
    return filesystem, root.rstrip("/")


def refuse_secrets(url: str) -> None:
    """Refuse a URL that may hold credentials, without showing it.

    Raises:
        StoreError: It has a user, an access key or a token in it, or no bucket.
    """
    scheme, _, rest = url.partition("://")
    if scheme not in ("s3", "gs", "gcs"):
        return
    bucket, _, query = re.split(r"[/?]", rest)[0], "", url.partition("?")[2]
    named = [name for name, _ in parse_qsl(query) if _SECRET.search(name)]
    if named or not _BUCKET.fullmatch(bucket.removeprefix("anonymous@")):
        what = f"a parameter {named[0]!r}" if named else "no plain bucket name"
        raise StoreError(
            f"The {scheme}:// URL has {what} (it is not shown, for it may hold a secret). Expected "
            f"{scheme}://bucket/path; give credentials by AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile (AWS_PROFILE) or the role of the node."
        )


def _patient(found: fs.S3FileSystem, url: str, in_parts: bool) -> fs.S3FileSystem:
    """Return the filesystem of a URL with our time limits, which a URL cannot express."""
    given = dict(parse_qsl(urlsplit(url).query))
    texts = {name: given[name] for name in ("scheme", "endpoint_override", "tls_ca_file_path")
             if name in given}  # fmt: skip
    return fs.S3FileSystem(
        region=found.region,
        allow_bucket_creation=given.get("allow_bucket_creation") == "true",
        # Delayed, a small object is one request, not three; but of a large one an empty object is
        # left where the first request of its upload fails.
        allow_delayed_open=not in_parts,
        connect_timeout=CONNECT_SECONDS,
        request_timeout=SILENT_SECONDS,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=SDK_TRIES),
        **texts,
    )


def persist(action: Callable[[], T], what: str, seconds: float | None = None) -> T:
    """Do something, again and again while an object store is only busy or away.

    Args:
        action: What to do; it may be done several times.
        what: Names the store in the log.
        seconds: How long to try, `RETRY_SECONDS` by default; 0: once.

    Raises:
        OSError: What `action` raised, at once if waiting cannot help.
    """
    end = time.monotonic() + (RETRY_SECONDS if seconds is None else seconds)
    pause, longest = PAUSES
    while True:
        try:
            return action()
        except OSError as error:
            wait = pause * random.uniform(0.5, 1.5)  # so that workers do not come all at once
            left = end - time.monotonic() - wait
            if left < 0 or not is_transient(error):
                raise
            found = _AWS.search(str(error))
            brief = found.group() if found else error
            log.warning("%s: %s; again in %.1f s, for %.0f s more", what, brief, wait, left)
            time.sleep(wait)
            pause = min(2 * pause, longest)


def reach(action: Callable[[], T], what: str, url: str, seconds: float | None = None) -> T:
    """Do something with a store or corpus, with patience (see `persist`).

    Args:
        action: What to do; it may be done several times.
        what: For the error, e.g. `read NAME`.
        url: Of the store or corpus.
        seconds: How long to try; see `persist`.

    Raises:
        FileNotFoundError: There is no such file.
        UnreachableError: It is away, full or not allowed.
        StoreError: It is a folder, or not in one.
    """
    try:
        return persist(action, url, seconds)
    except FileNotFoundError:
        raise
    except OSError as error:
        kind = StoreError if error.errno in (errno.EISDIR, errno.ENOTDIR) else UnreachableError
        raise kind(f"Cannot {what} in {url!r}: {explain(error)}.") from error


def is_transient(error: OSError) -> bool:
    """Whether an object store may do tomorrow what it did not do now."""
    found = _AWS.search(str(error))
    if found is None:
        return False
    code, status, _ = found.groups()
    # 416: the object was replaced by a shorter one while it was read.
    return code in _TRANSIENT or status in ("408", "416", "429") or (status or "")[:1] == "5"


def explain(error: Exception) -> str:
    """Return an error's text with what to do about it."""
    found = _AWS.search(str(error))
    if found is None:
        return f"{str(error).rstrip('.')}. Check permission and space"
    code, status, operation = found.groups()
    if code == "ACCESS_DENIED" or status == "403":
        needed = _PERMISSION.get(operation, "s3:PutObject")
        fix = f"Permission {needed} is missing for the bucket, or {_NO_CREDENTIALS}"
    elif code in ("INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "EXPIRED_TOKEN",
                  "INVALID_CLIENT_TOKEN_ID", "MISSING_AUTHENTICATION_TOKEN"):  # fmt: skip
        fix = f"The {_NO_CREDENTIALS}"
    elif code == "NO_SUCH_BUCKET":
        fix = "Make the bucket, or correct its name"
    elif status in ("301", "400"):
        fix = "Give the bucket's region, e.g. s3://bucket/path?region=eu-central-1"
    elif is_transient(OSError(str(error))):
        fix = "It was tried for a while: check the network, the endpoint and the server"
    else:
        fix = "Check the bucket, the region and the permissions"
    return f"{str(error).rstrip('.')}. {fix}"

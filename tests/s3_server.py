"""A small S3 server for tests: keeps objects on disk, can be killed, and fails on request.

    python tests/s3_server.py --port 9000 --folder /tmp/s3 --bucket bucket

An object is there when its whole body has arrived, as on S3; a server that is killed and started
again on its folder has all of them. `S3Server` starts one from a test. Faults are set while it runs
(`S3Server.faults`, or a PUT of the JSON to `/_faults`) and stay over a restart:

    seconds   wait before every answer
    busy      share of requests answered 503 SlowDown
    cut_put   share of PUTs whose connection is cut in the body
    cut_get   share of GETs whose answer is cut in the body
    lost      share of requests done but never answered
    deny      HTTP methods answered 403 AccessDenied
    times     faults until all is well again; None: for ever

Requests are not authenticated. moto's server is the reference that the tests hold this against.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from datetime import datetime, timezone
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape

NO_FAULTS = {"seconds": 0.0, "busy": 0.0, "cut_put": 0.0, "cut_get": 0.0, "lost": 0.0, "deny": [],
             "times": None}  # fmt: skip
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}  # fmt: skip


class Disk:
    """Buckets as folders, objects as files with quoted names; an index of them in memory."""

    def __init__(self, folder: Path) -> None:
        self.data, self.uploads, self.scratch = (folder / n for n in ("data", "uploads", "scratch"))
        shutil.rmtree(self.scratch, ignore_errors=True)
        for path in (self.data, self.uploads, self.scratch):
            path.mkdir(parents=True, exist_ok=True)
        self.lock = threading.Lock()
        self.index = {
            bucket.name: {unquote(f.name): _facts(f) for f in bucket.iterdir()}
            for bucket in self.data.iterdir()
        }

    def path(self, bucket: str, key: str) -> Path:
        return self.data / bucket / quote(key, safe="").replace(".", "%2E")

    def make_bucket(self, bucket: str) -> None:
        with self.lock:
            (self.data / bucket).mkdir(exist_ok=True)
            self.index.setdefault(bucket, {})

    def put(self, bucket: str, key: str, body: bytes) -> str:
        part = self.scratch / uuid.uuid4().hex
        part.write_bytes(body)
        with self.lock:
            os.replace(part, self.path(bucket, key))
            self.index[bucket][key] = _facts(self.path(bucket, key))
        return _etag(self.path(bucket, key).stat())

    def delete(self, bucket: str, key: str) -> None:
        with self.lock:
            if self.index[bucket].pop(key, None):
                self.path(bucket, key).unlink()


def _facts(path: Path) -> tuple[int, float]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime


def _etag(stat: os.stat_result) -> str:
    return f"{stat.st_ino:x}-{stat.st_mtime_ns:x}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def do(self) -> None:
        url = urlsplit(self.path)
        self.query = {k: v[0] for k, v in parse_qs(url.query, keep_blank_values=True).items()}
        self.bucket, _, self.key = unquote(url.path).lstrip("/").partition("/")
        if self.bucket == "_faults":
            return self.admin()
        fault = self.server.fault(self.command)
        if fault == "cut_put":
            if self.headers.get("Content-Length") != "0":
                self.rfile.readline()  # not the whole of it
            return self.cut()
        body = self.body()
        if body is None:
            return self.cut()
        if fault == "busy":
            return self.error(503, "SlowDown", "Please reduce your request rate.")
        if fault == "deny":
            return self.error(403, "AccessDenied", "Access Denied")
        self.lost = fault == "lost"
        self.half = fault == "cut_get"
        if (
            self.bucket
            and self.bucket not in self.server.disk.index
            and self.what() != "PUT bucket"
        ):
            return self.error(404, "NoSuchBucket", "The specified bucket does not exist")
        getattr(self, self.what().replace(" ", "_").lower())(body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def what(self) -> str:
        if "uploadId" in self.query or "uploads" in self.query:
            return f"{self.command} upload"
        return f"{self.command} {'object' if self.key else 'bucket' if self.bucket else 'root'}"

    # Buckets

    def head_bucket(self, _: bytes) -> None:
        self.answer(200, headers={"x-amz-bucket-region": "us-east-1"})

    def put_bucket(self, _: bytes) -> None:
        self.server.disk.make_bucket(self.bucket)
        self.answer(200)

    def get_bucket(self, _: bytes) -> None:
        """ListObjectsV2; a continuation token is the last key or common prefix that was given."""
        query = self.query
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        limit = min(int(query.get("max-keys", 1000)), 1000)
        with self.server.disk.lock:
            objects = self.server.disk.index[self.bucket]
            keys = sorted(k for k in objects if k.startswith(prefix) and k > after)
            facts = {key: objects[key] for key in keys}
        rows: dict[str, str] = {}
        more = False
        for key in keys:
            end = key.find(delimiter, len(prefix)) if delimiter else -1
            shown = key if end < 0 else key[: end + len(delimiter)]
            if shown in rows or (end >= 0 and shown == after):
                continue
            if len(rows) == limit:
                more = True
                break
            name = quote(shown) if query.get("encoding-type") == "url" else escape(shown)
            size, changed = facts[key]
            when = datetime.fromtimestamp(changed, timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z")
            rows[shown] = (
                f"<CommonPrefixes><Prefix>{name}</Prefix></CommonPrefixes>" if end >= 0 else
                f"<Contents><Key>{name}</Key><Size>{size}</Size><LastModified>{when}"
                "</LastModified></Contents>"
            )  # fmt: skip
        token = (
            f"<NextContinuationToken>{escape([*rows][-1])}</NextContinuationToken>" if more else ""
        )
        encoding = "<EncodingType>url</EncodingType>" if "encoding-type" in query else ""
        self.xml(
            f"<ListBucketResult><Name>{self.bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(rows)}</KeyCount><MaxKeys>{limit}</MaxKeys>{encoding}"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{''.join(rows.values())}"
            "</ListBucketResult>"
        )

    def post_bucket(self, body: bytes) -> None:
        """DeleteObjects."""
        keys = [unescape(k) for k in re.findall(r"<Key>(.*?)</Key>", body.decode(), re.S)]
        for key in keys:
            self.server.disk.delete(self.bucket, key)
        rows = "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        self.xml(f"<DeleteResult>{rows}</DeleteResult>")

    # Objects

    def put_object(self, body: bytes) -> None:
        etag = self.server.disk.put(self.bucket, self.key, body)
        self.answer(200, headers={"ETag": f'"{etag}"'})

    def get_object(self, _: bytes) -> None:
        try:
            with open(self.server.disk.path(self.bucket, self.key), "rb") as file:
                stat = os.fstat(file.fileno())
                size = stat.st_size
                first, last, status, headers = 0, size - 1, 200, {"Accept-Ranges": "bytes"}
                if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                    first = int(wanted[1])
                    last = min(int(wanted[2] or size), size - 1)
                    if first > last:
                        return self.error(416, "InvalidRange", "The range is not satisfiable")
                    status, headers["Content-Range"] = 206, f"bytes {first}-{last}/{size}"
                headers["Last-Modified"] = formatdate(stat.st_mtime, usegmt=True)
                headers["ETag"] = f'"{_etag(stat)}"'
                if self.command == "HEAD":
                    return self.answer(status, headers=headers | {"Content-Length": str(size)})
                file.seek(first)
                self.answer(status, file.read(last - first + 1), headers)
        except FileNotFoundError:
            self.error(404, "NoSuchKey", "The specified key does not exist.")

    head_object = get_object

    def delete_object(self, _: bytes) -> None:
        self.server.disk.delete(self.bucket, self.key)
        self.answer(204)

    # Uploads in parts

    def post_upload(self, body: bytes) -> None:
        uploads = self.server.disk.uploads
        where = f"<Bucket>{self.bucket}</Bucket><Key>{escape(self.key)}</Key>"
        if "uploads" in self.query:
            upload = uuid.uuid4().hex
            (uploads / upload).mkdir()
            return self.xml(
                f"<InitiateMultipartUploadResult>{where}<UploadId>{upload}</UploadId>"
                "</InitiateMultipartUploadResult>"
            )
        upload = self.query["uploadId"]
        parts = [uploads / upload / n for n in re.findall(rb"<PartNumber>(\d+)<", body)
                 for n in [n.decode()]]  # fmt: skip
        if not parts or not all(part.exists() for part in parts):
            return self.error(404, "NoSuchUpload", "The specified upload does not exist.")
        etag = self.server.disk.put(self.bucket, self.key, b"".join(p.read_bytes() for p in parts))
        shutil.rmtree(uploads / upload)
        self.xml(
            f'<CompleteMultipartUploadResult>{where}<ETag>"{etag}"</ETag>'
            "</CompleteMultipartUploadResult>"
        )

    def put_upload(self, body: bytes) -> None:
        folder = self.server.disk.uploads / self.query["uploadId"]
        if not folder.exists():
            return self.error(404, "NoSuchUpload", "The specified upload does not exist.")
        part = self.server.disk.scratch / uuid.uuid4().hex
        part.write_bytes(body)
        os.replace(part, folder / str(int(self.query["partNumber"])))
        self.answer(200, headers={"ETag": f'"{uuid.uuid4().hex}"'})

    def delete_upload(self, _: bytes) -> None:
        shutil.rmtree(self.server.disk.uploads / self.query["uploadId"], ignore_errors=True)
        self.answer(204)

    # Bytes in and out

    def admin(self) -> None:
        body = self.body() or b""
        self.lost = self.half = False
        if self.command == "PUT":
            self.server.set_faults(json.loads(body))
        self.answer(
            200, json.dumps({"faults": self.server.faults, "seen": self.server.seen}).encode()
        )

    def body(self) -> bytes | None:
        """Return the whole body, or None where the sender went away in the middle of it."""
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = unchunked(self.rfile)
        else:
            length = int(self.headers.get("Content-Length", 0))
            data = self.rfile.read(length) if length else b""
            data = data if len(data) == length else None
        if data is not None and "aws-chunked" in self.headers.get("Content-Encoding", ""):
            data = unchunked(io.BytesIO(data))  # chunks inside the chunks, then a check sum
        return data

    def xml(self, text: str, status: int = 200) -> None:
        body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
        self.answer(status, body, {"Content-Type": "application/xml"})

    def error(self, status: int, code: str, message: str) -> None:
        self.lost = self.half = False
        self.xml(f"<Error><Code>{code}</Code><Message>{message}</Message></Error>", status)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self.lost:
            return self.cut()
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "x-amz-request-id": uuid.uuid4().hex} | (
            headers or {}
        )
        for name, value in headers.items():
            self.send_header(name, value)
        self._headers_buffer.append(b"\r\n")
        head, self._headers_buffer = b"".join(self._headers_buffer), []
        if self.command == "HEAD":
            body = b""
        self.wfile.write(head + (body[: len(body) // 2] if self.half else body))
        if self.half:
            self.cut()

    def cut(self) -> None:
        self.close_connection = True
        with_reset = b"\x01\x00\x00\x00\x00\x00\x00\x00"  # SO_LINGER of 0 s: RST, no farewell
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, with_reset)


def unchunked(stream: Any) -> bytes | None:
    """Return a body that comes in chunks, or None where its end never came."""
    result = []
    while line := stream.readline():
        size = int(line.split(b";")[0], 16)
        if not size:
            while stream.readline() not in (b"\r\n", b""):  # what follows the last chunk
                pass
            return b"".join(result)
        result.append(stream.read(size))
        stream.readline()
    return None


def unescape(text: str) -> str:
    for entity, character in (("&lt;", "<"), ("&gt;", ">"), ("&quot;", '"'), ("&amp;", "&")):
        text = text.replace(entity, character)
    return text


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, folder: Path) -> None:
        self.disk = Disk(folder)
        self.file = folder / "faults.json"
        self.faults: dict[str, Any] = dict(NO_FAULTS)
        if self.file.exists():
            self.faults = json.loads(self.file.read_text())
        self.seen: dict[str, int] = {}
        self.random = random.Random(0)
        self.guard = threading.Lock()
        super().__init__(("127.0.0.1", port), Handler)

    def set_faults(self, faults: dict[str, Any]) -> None:
        with self.guard:
            self.faults = NO_FAULTS | faults
            self.seen = {}
            self.random = random.Random(0)  # so that what a test meets does not depend on others
            self.file.write_text(json.dumps(self.faults))

    def fault(self, method: str) -> str | None:
        """Return the fault that a request meets, and count it."""
        faults = self.faults
        time.sleep(faults["seconds"])
        with self.guard:
            drawn = self.random.random()
            kind = None
            if faults["times"] == 0:
                pass
            elif method in faults["deny"]:
                kind = "deny"
            else:
                shares = {"busy": faults["busy"], "lost": faults["lost"]}
                if method in ("PUT", "GET"):
                    shares[f"cut_{method.lower()}"] = faults[f"cut_{method.lower()}"]
                for name, share in shares.items():
                    if drawn < share:
                        kind = name
                        break
                    drawn -= share
            for name in {method, kind or "well"}:
                self.seen[name] = self.seen.get(name, 0) + 1
            if kind and faults["times"]:
                faults["times"] -= 1
            return kind

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class S3Server:
    """A server in a process of its own; `with S3Server(folder) as server: server.url("store")`."""

    def __init__(self, folder: Path, bucket: str = "bucket") -> None:
        self.folder, self.bucket = folder, bucket
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> S3Server:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, again with the same data after `kill`."""
        assert self.process is None, "it runs"
        self.process = subprocess.Popen([
            sys.executable, __file__, "--port", str(self.port), "--folder", str(self.folder),
            "--bucket", self.bucket,
        ])  # fmt: skip
        for _ in range(200):
            try:
                self.state()
                return
            except (urllib.error.URLError, ConnectionError):
                time.sleep(0.05)
        raise TimeoutError(f"no S3 server on port {self.port}")

    def kill(self) -> None:
        """Kill it in the middle of whatever it does."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def faults(self, **faults: Any) -> None:
        """Set the faults (see the module), instead of those that were; none: all is well."""
        self._admin(json.dumps(faults).encode())

    def state(self) -> dict[str, Any]:
        """Return the faults, and the requests and faults seen since they were set."""
        return self._admin(None)

    def url(self, path: str) -> str:
        """Return the s3:// URL of a path in the bucket."""
        return (
            f"s3://{self.bucket}/{path}?endpoint_override=127.0.0.1:{self.port}&scheme=http"
            "&region=us-east-1"
        )

    def _admin(self, body: bytes | None) -> dict[str, Any]:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/_faults", data=body, method="PUT" if body else "GET"
        )
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--bucket", action="append", default=[], help="made at the start")
    given = parser.parse_args()
    server = Server(given.port, given.folder)
    for bucket in given.bucket:
        server.disk.make_bucket(bucket)
    server.serve_forever()


if __name__ == "__main__":
    main()

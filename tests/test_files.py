"""Files of a store: where names may lead, what is tried again, and what an error says."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from pyarrow import fs

import rayx.remote
from rayx.errors import StoreError, UnreachableError
from rayx.files import Files
from rayx.remote import explain, is_transient, locate, persist

BUSY = OSError("When x: AWS Error SLOW_DOWN during PutObject operation: Please reduce your rate.")
DENIED = OSError("When x: AWS Error ACCESS_DENIED during PutObject operation: Access Denied")


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def files(folder) -> Files:
    folder.mkdir()
    return Files(fs.LocalFileSystem(), str(folder), str(folder))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(rayx.remote, "PAUSES", (0.001, 0.01))


# A local folder --------------------------------------------------------------------------------


def test_link_is_refused_by_name_and_never_read_through(files, folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"key": "hush"}')
    (folder / "records").mkdir()
    (folder / "records" / "x.json").symlink_to(secret)
    with pytest.raises(StoreError, match=r"records/x.json' is a symbolic link.*remove it"):
        files.read_json("records/x.json")
    assert not files.exists("records/x.json")
    assert files.names("records") == ["x"]  # so that whoever lists it comes to know
    files.write_json("records/x.json", 1)
    assert files.read_json("records/x.json") == 1 and "hush" in secret.read_text()


def test_removing_a_link_leaves_what_it_points_to(files, folder, tmp_path):
    (tmp_path / "precious").write_text("mine")
    (folder / "x.json").symlink_to(tmp_path / "precious")
    files.remove("x.json")
    assert (tmp_path / "precious").exists() and not os.path.lexists(folder / "x.json")


def test_folder_that_is_a_link_is_refused_for_everything(files, folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x.json").write_text("1")
    (folder / "records").symlink_to(elsewhere)
    for use in (
        lambda: files.read_json("records/x.json"),
        lambda: files.write_json("records/y.json", 1),
        lambda: files.remove("records/x.json"),
        lambda: files.exists("records/x.json"),
        lambda: files.names("records"),
    ):
        with pytest.raises(StoreError, match=r"records' is a symbolic link"):
            use()
    assert sorted(p.name for p in elsewhere.iterdir()) == ["x.json"]


def test_store_whose_root_is_a_link_works(folder, tmp_path):
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    files = Files(fs.LocalFileSystem(), str(tmp_path / "link"), "link")
    files.write_json("a/x.json", 1)
    assert files.read_json("a/x.json") == 1


def test_pipe_is_refused_and_not_waited_for(files, folder):
    os.mkfifo(folder / "x.json")
    with pytest.raises(StoreError, match="no regular file"):
        files.read_json("x.json")


def test_json_that_is_too_large_is_refused_before_it_is_read(files, folder):
    with open(folder / "x.json", "wb") as file:
        file.truncate(10_000_000_000)  # sparse: takes no space
    with pytest.raises(ValueError, match="10,000,000,000 bytes, expected at most 256,000,000"):
        files.read_json("x.json")


@pytest.mark.parametrize(
    "name", ["../x", "a/../x", "/etc/passwd", "", "a//b", ".x", "a/.x", "a\\b"]
)
def test_name_that_could_lead_out_is_refused(files, name):
    for use in (files.read_bytes, files.exists, files.remove, files.names):
        with pytest.raises(StoreError, match="cannot be used in a store"):
            use(name)
    with pytest.raises(StoreError, match="cannot be used in a store"):
        files.write_bytes(name, b"")


def test_full_disk_is_named_at_once_and_leaves_nothing(files, folder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UnreachableError, match="Cannot write a/x.json.*No space left.*space"):
        files.write_json("a/x.json", 1)
    assert list((folder / "a").iterdir()) == []


def test_folder_in_place_of_a_file_says_so(files, folder):
    (folder / "x.json").mkdir()
    with pytest.raises(StoreError, match="Cannot read x.json"):
        files.read_json("x.json")


def test_concurrent_writers_leave_one_of_their_contents(files):
    contents = [bytes([i]) * 200_000 for i in range(4)]

    def write(content: bytes) -> None:
        for _ in range(20):
            files.write_bytes("a/x", content)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if files.exists("a/x"):
            assert files.read_bytes("a/x") in contents
    assert files.read_bytes("a/x") in contents


# Patience --------------------------------------------------------------------------------------


def test_busy_store_is_tried_again_until_it_answers(quick, caplog):
    errors = [
        BUSY,
        BUSY,
        OSError("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation"),
    ]

    def act() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert persist(act, "s3://b/p") == "done"
    assert [m.split(";")[0] for m in caplog.messages] == [
        "s3://b/p: AWS Error UNKNOWN (HTTP status 503) during HeadObject operation",
        *["s3://b/p: AWS Error SLOW_DOWN during PutObject operation"] * 2,
    ]


def test_pauses_grow_to_a_bound_and_end_in_time(monkeypatch):
    slept, now = [], [0.0]
    monkeypatch.setattr(rayx.remote.time, "monotonic", lambda: now[0])

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(rayx.remote.time, "sleep", sleep)
    with pytest.raises(OSError, match="SLOW_DOWN"):
        persist(lambda: (_ for _ in ()).throw(BUSY), "s3://b/p")
    assert 250 < sum(slept) <= 300
    assert slept[0] < 1 and max(slept) <= 1.5 * 15
    assert len(slept) > 15


@pytest.mark.parametrize(
    "error",
    [
        DENIED,
        OSError("AWS Error NO_SUCH_BUCKET during PutObject operation: no"),
        OSError(
            "AWS Error UNKNOWN (HTTP status 400) during HeadObject operation: No response body."
        ),
        FileNotFoundError("x"),
        OSError(errno.ENOSPC, "No space left on device"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
    ids=str,
)
def test_what_waiting_cannot_help_is_not_tried_again(error):
    calls = []

    def act() -> None:
        calls.append(1)
        raise error

    with pytest.raises(type(error)):
        persist(act, "s3://b/p")
    assert len(calls) == 1 and not is_transient(error)


@pytest.mark.parametrize(
    ("code", "operation", "fix"),
    [
        ("ACCESS_DENIED", "PutObject", "Permission s3:PutObject"),
        ("ACCESS_DENIED", "UploadPart", "Permission s3:PutObject"),
        ("ACCESS_DENIED", "HeadObject", "Permission s3:GetObject"),
        ("ACCESS_DENIED", "ListObjectsV2", "Permission s3:ListBucket"),
        ("ACCESS_DENIED", "DeleteObject", "Permission s3:DeleteObject"),
        ("INVALID_ACCESS_KEY_ID", "GetObject", "AWS_ACCESS_KEY_ID"),
        ("SIGNATURE_DOES_NOT_MATCH", "GetObject", "AWS_SECRET_ACCESS_KEY"),
        ("NO_SUCH_BUCKET", "PutObject", "Make the bucket"),
        ("UNKNOWN (HTTP status 301)", "HeadObject", "region="),
        ("UNKNOWN (HTTP status 403)", "HeadObject", "s3:GetObject"),
        ("NETWORK_CONNECTION", "GetObject", "check the network"),
    ],
)
def test_error_names_the_fix(code, operation, fix):
    assert fix in explain(OSError(f"When x: AWS Error {code} during {operation} operation: y."))


# URLs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "s3://AKIAKEY:hush@bucket/p",
        "s3://AKIAKEY:hu/sh@bucket/p",
        "s3://hush@bucket/p",
        "s3://bucket/p?secret_key=hush",
        "s3://bucket/p?region=us-east-1&session_token=hush",
        "s3://AKIAKEY:hush@bucket/p?foo=1",
        "gs://user:hush@bucket/p",
        "gs://bucket/p?access_token=hush",
    ],
)
def test_credentials_in_a_url_are_refused_and_not_shown(url):
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as refused:
        rayx.open(url)
    assert "hu" not in str(refused.value) and refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "bucket"),
        ("s3:///p", "bucket"),
        ("ftp://host/p", "Expected a local path, s3:// or gs://"),
        ("s3://bucket/p?region=us-east-1&nonsense=1", "nonsense"),
    ],
)
def test_url_that_cannot_be_opened_says_what_is_expected(url, message):
    with pytest.raises(StoreError, match=message):
        rayx.open(url)


def test_url_keeps_what_it_says_and_gets_our_time_limits():
    url = "s3://bucket/a/b/?region=eu-west-1&scheme=http&endpoint_override=127.0.0.1:9"
    filesystem, root = locate(url)
    assert root == "bucket/a/b" and isinstance(filesystem, fs.S3FileSystem)
    assert filesystem.region == "eu-west-1"
    assert locate("gs://anonymous@bucket/p")[1] == "bucket/p"

"""Sources that are hard to read: too large, damaged, not text, moving, in loops, or far away."""

import bz2
import errno
import gzip
import json
import lzma
import os
import random
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import rayx.remote
from rayx.corpus import Corpus, Source, build_corpus, encode, rows, shards, stage
from rayx.corpus import build as build_module
from rayx.corpus.documents import documents
from rayx.corpus.join import join_corpora
from rayx.corpus.route import route
from rayx.corpus.source import locate
from rayx.corpus.tokenizer import train_tokenizer
from rayx.errors import CorpusError, UnreachableError
from tests.s3_server import CREDENTIALS, S3Server

TEXTS = [f"the {n} red fox and {n * n} lazy dogs \u00e4 " * 5 for n in range(60)]


def build(source: Source, folder: Path, **options: Any) -> Corpus:
    defaults: dict[str, Any] = {"tokenizer": 300, "heldout_share": 0.2, "min_heldout_tokens": 1}
    return build_corpus([source], folder / "out", **(defaults | options))


def skips(corpus: Corpus) -> dict[str, int]:
    return corpus.manifest["domains"][0]["skipped"]


def write_texts(folder: Path, texts: list[str] = TEXTS) -> Path:
    folder.mkdir(exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def write_jsonl(file: Path, texts: list[str] = TEXTS) -> str:
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(file)


# Text that is none -------------------------------------------------------------------------------


def test_files_that_are_not_utf8_text_are_counted_by_what_they_are(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts")
    plain = build(Source(path=str(folder), domain="web"), tmp_path / "plain")
    (folder / "x1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (folder / "x2.txt").write_bytes("caf\u00e9".encode("utf-16"))
    (folder / "x3.txt").write_bytes(random.Random(0).randbytes(5_000))
    (folder / "x4.txt").write_bytes("abc".encode("utf-16-le"))
    corpus = build(Source(path=str(folder), domain="web"), tmp_path)
    assert skips(corpus) == {"invalid UTF-8": 1, "UTF-16 file": 1, "binary file": 2}
    assert corpus.fingerprint == plain.fingerprint


def test_binary_file_as_the_only_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 10)
    with pytest.raises(CorpusError, match="'web' is empty: no document.*1 binary file"):
        build(Source(path=str(tmp_path / "a.txt"), domain="web"), tmp_path)


# Too much at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cell", "shared", "group"])
def test_giant_parquet_cell_is_refused_by_its_row(kind: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(rows, "MOST_BYTES", 100_000)
    giant = "y" * 200_000 if kind == "shared" else random.Random(0).randbytes(100_000).hex()
    texts = [*TEXTS[:5], *[giant] * (50 if kind == "shared" else 1)]
    if kind == "group":
        texts = [giant]
    table = pa.table({"text": texts})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=kind == "shared")
    where = "" if kind == "group" else ", row 6"
    with pytest.raises(
        CorpusError, match=rf"a.parquet'{where} has a document of more than 100,000"
    ):
        build(Source(path=str(tmp_path / "a.parquet"), domain="web"), tmp_path)


def test_value_that_many_rows_share_is_held_once(tmp_path: Path) -> None:
    """400 rows of 1 MB in a file of some KB: 400 MB if each row had its own."""
    table = pa.table({"text": pa.array(["y" * 1_000_000]).dictionary_encode().take([0] * 400)})
    pq.write_table(table, tmp_path / "a.parquet")
    source = Source(path=str(tmp_path / "a.parquet"), domain="web")
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in rows.rows(source, locate(source))]
    assert len(held) == 400 and max(held) < 50_000_000


def test_long_document_is_encoded_in_pieces_to_the_same_tokens(monkeypatch) -> None:
    rng = random.Random(0)
    words = [
        "fox",
        " lazy",
        "  dogs\n",
        "\n\n\tdef",
        " 1234",
        "'s",
        " \u00e4pfel",
        ",",
        " a",
        "b c",
    ]
    texts = ["".join(rng.choices(words, k=3_000)), "x" * 5_000, "", " ", "a b " * 900]
    plain = train_tokenizer(TEXTS + texts, 400)
    split = Tokenizer.from_str(plain.to_str())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
    split.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    column = pa.chunked_array([texts])

    def ids(tokenizer: Tokenizer, most: int) -> tuple[bytes, int]:
        monkeypatch.setattr(encode, "BATCH_BYTES", most)
        monkeypatch.setattr(encode, "PIECE_BYTES", most)
        found = encode.encode_texts(column, tokenizer.to_str(), "<u2")
        return found, len(list(encode._batches(column, can_cut=True)))

    for tokenizer in (plain, split):
        whole, pieces = ids(tokenizer, 10**9), ids(tokenizer, 100)
        assert whole[0] == pieces[0] and whole[1] == 1 and pieces[1] > 30
        each = (tokenizer.encode(t, add_special_tokens=False).ids for t in texts)
        end = encode.eos_id(tokenizer)
        assert np.frombuffer(whole[0], "<u2").tolist() == [i for x in each for i in (*x, end)]


def test_tokenizer_that_works_across_spaces_gets_whole_documents() -> None:
    spm = Tokenizer(models.Unigram([("<unk>", 0.0), ("a b", -1.0), ("</s>", 0.0)], 0, False))
    spm.decoder = decoders.Metaspace()
    assert not encode._splits_at_spaces(spm.to_str())
    spaced = train_tokenizer(TEXTS, 300)
    assert encode._splits_at_spaces(spaced.to_str())
    spaced.add_tokens(["x y"])
    assert not encode._splits_at_spaces(spaced.to_str())


def test_tokenizer_that_emits_what_its_vocabulary_lacks_is_refused(monkeypatch) -> None:
    column, tokenizer = pa.chunked_array([TEXTS]), train_tokenizer(TEXTS, 299).to_str()
    monkeypatch.setattr(encode, "_mine", threading.local())
    monkeypatch.setattr(encode, "num_ids", lambda tokenizer: 260)
    with pytest.raises(CorpusError, match=r"gives id 29\d, but its vocabulary has 260 ids"):
        encode.encode_texts(column, tokenizer, "<u2")


# What moves, loops, repeats or fills up ----------------------------------------------------------


def test_loops_of_links_and_second_names_give_each_file_once(tmp_path: Path, caplog) -> None:
    folder = write_texts(tmp_path / "texts")
    plain = build(Source(path=str(folder), domain="web"), tmp_path / "plain")
    (folder / "again").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nothing")
    (folder / "z.txt").symlink_to(folder / "000.txt")
    for number, path in enumerate((str(folder), f"{folder}/**/*.txt")):
        corpus = build(Source(path=path, domain="web"), tmp_path / str(number))
        assert corpus.fingerprint == plain.fingerprint
        assert corpus.manifest["domains"][0]["duplicates"] == 0
    assert "2 links to folders or to nothing are not followed" in caplog.text


def test_file_given_twice_is_counted_as_duplicates(tmp_path: Path) -> None:
    source = Source(path=write_jsonl(tmp_path / "a.jsonl"), domain="web")
    corpus = build_corpus([source, source], tmp_path / "out", tokenizer=300, heldout_share=0.2,
                          min_heldout_tokens=1)  # fmt: skip
    assert corpus.manifest["domains"][0]["duplicates"] == 60


def test_file_that_changes_or_vanishes_while_it_is_read_is_named(tmp_path: Path) -> None:
    for act, words in ((lambda f: os.truncate(f, 10), "changed while it was read.*now 10"),
                       (os.unlink, "vanished while it was read")):  # fmt: skip
        file = write_jsonl(tmp_path / "a.jsonl")
        source = Source(path=file, domain="web")
        read = documents(source, locate(source))
        next(read)
        act(file)
        with pytest.raises(CorpusError, match=f"a.jsonl' {words}"):
            list(read)


def test_full_disk_is_said_and_the_build_goes_on_when_there_is_space(tmp_path, monkeypatch) -> None:
    source = Source(path=write_jsonl(tmp_path / "a.jsonl"), domain="web")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("rayx.corpus.parts._write", "rayx.corpus.shards.sync"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            with pytest.raises(CorpusError, match="no space left for .*out.*goes on where it was"):
                build(source, tmp_path)
    assert build(source, tmp_path).fingerprint == build(source, tmp_path / "other").fingerprint


# Killed in the middle of a source or a shard -----------------------------------------------------


class Killed(BaseException):
    pass


@pytest.mark.parametrize("form", ["jsonl", "parquet", "txt"])
def test_build_goes_on_inside_a_source_and_a_shard(form: str, tmp_path, monkeypatch) -> None:
    texts = [*TEXTS[:30], "", *TEXTS[10:], *TEXTS[:7]]  # an empty row, and duplicates on both sides
    path = str(write_texts(tmp_path / "texts", texts)) if form == "txt" else (
        str(tmp_path / f"a.{form}"))  # fmt: skip
    if form == "jsonl":
        write_jsonl(Path(path), texts)
    elif form == "parquet":
        pq.write_table(pa.table({"text": texts}), path, row_group_size=7)
    source = Source(path=path, domain="web")
    expected = build(source, tmp_path / "whole")
    monkeypatch.setattr(stage, "CHECKPOINT_BYTES", 2_000)
    monkeypatch.setattr(shards, "CHECKPOINT_BYTES", 1_000)
    monkeypatch.setattr(encode, "BATCH_BYTES", 500)
    monkeypatch.setattr("rayx.corpus.parts.PART_BYTES", 1_500)
    read: list[str] = []
    encoded: list[int] = []
    stage_one, encode_some = stage.document_hash, encode.encode_texts
    monkeypatch.setattr(stage, "document_hash", lambda text: read.append(text) or stage_one(text))

    def die_at_55(self: Any, document: Any, parts: Any) -> int:
        if len(read) >= 55:
            raise Killed
        return add(self, document, parts)

    add = stage._Staging._add
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stage._Staging, "_add", die_at_55)
        build(source, tmp_path)

    def die_at_30(column: pa.ChunkedArray, *more: Any) -> bytes:
        encoded.append(len(column))
        if sum(encoded) > 30:
            raise Killed
        return encode_some(column, *more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(encode, "encode_texts", die_at_30)
        build(source, tmp_path)
    assert len(texts) - 1 < len(read) < len(texts) + 12, "at most a checkpoint is read again"
    encoded.clear()
    monkeypatch.setattr(encode, "encode_texts", counting(encoded))
    corpus = build(source, tmp_path)
    assert corpus.fingerprint == expected.fingerprint
    corpus.verify()
    assert {**corpus.manifest["domains"][0]} == {**expected.manifest["domains"][0]}
    assert sum(encoded) < 50, "of 60; what was written before is kept"


def counting(encoded: list[int]) -> Any:
    """`encode_texts`, with the number of documents of each call noted."""
    encode_some = encode.encode_texts

    def counted(column: pa.ChunkedArray, *more: Any) -> bytes:
        encoded.append(len(column))
        return encode_some(column, *more)

    return counted


def test_parts_encoded_while_others_are_read_are_kept_by_a_killed_build(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.delenv(encode.THREADED, raising=False)
    tokenizer = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 300).save(str(tokenizer))
    files = [write_jsonl(tmp_path / f"{k}.jsonl", TEXTS[30 * k : 30 * k + 30]) for k in range(2)]
    sources = [Source(path=path, domain="web") for path in files]

    def go(folder: str) -> Corpus:
        return build_corpus(sources, tmp_path / folder, tokenizer=tokenizer, heldout_share=0.2,
                            min_heldout_tokens=1)  # fmt: skip

    monkeypatch.setattr("rayx.corpus.parts.PART_BYTES", 1_500)
    with monkeypatch.context() as patch:
        patch.setattr(encode.Encoder, "begin", lambda encoder, part: None)
        late = go("late")
    encoded: list[int] = []
    monkeypatch.setattr(encode, "encode_texts", counting(encoded))

    def at_once(encoder: encode.Encoder, part: Path) -> None:
        encoder._keep(str(part))
        encoder.begun[str(part)] = Future()
        encoder.begun[str(part)].set_result(None)

    stage_sources = build_module.stage_sources

    def killed(*given: Any) -> Any:
        stage_sources(*given)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(encode.Encoder, "begin", at_once)
        patch.setattr(build_module, "stage_sources", killed)
        go("early")
    assert sum(encoded) == 60 and list((tmp_path / "early/.build").rglob("*.ids"))
    assert os.environ.get(encode.THREADED) is None
    assert go("early").fingerprint == late.fingerprint
    assert sum(encoded) == 60, "all was encoded before"


def test_build_that_encodes_while_it_reads_says_what_is_wrong_with_a_tokenizer(
    tmp_path, monkeypatch
) -> None:
    file = tmp_path / "tokenizer.json"
    train_tokenizer(TEXTS, 298).save(str(file))
    monkeypatch.setattr("rayx.corpus.parts.PART_BYTES", 1_500)
    monkeypatch.setattr(encode, "num_ids", lambda tokenizer: 260)
    with pytest.raises(CorpusError, match=r"gives id 29\d, but its vocabulary has 260 ids"):
        build(Source(path=write_jsonl(tmp_path / "a.jsonl"), domain="web"), tmp_path,
              tokenizer=file)  # fmt: skip


# Object stores -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch, S3Server(tmp_path_factory.mktemp("s3")) as server:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        patch.setattr(rayx.remote, "SDK_TRIES", 1)
        patch.setattr(rayx.remote, "PAUSES", (0.01, 0.1))
        yield server


def put(server: S3Server, name: str, data: bytes) -> str:
    filesystem, path = rayx.remote.locate(server.url(name))
    with filesystem.open_output_stream(path, compression=None) as out:
        out.write(data)
    return server.url(name)


def test_every_kind_of_object_gives_the_corpus_of_the_local_files(server, tmp_path) -> None:
    local = Path(write_jsonl(tmp_path / "a.jsonl"))
    expected = build(Source(path=str(local), domain="web"), tmp_path / "local")
    lines = local.read_bytes()
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=9)
    urls = [put(server, "one/a.parquet", (tmp_path / "a.parquet").read_bytes())]
    for suffix, pack in (("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress),
                         (".xz", lzma.compress),
                         (".zst", lambda d: pa.compress(d, "zstd", asbytes=True))):  # fmt: skip
        urls.append(put(server, f"one/a.jsonl{suffix}", pack(lines)))
    rows_of = lines.splitlines(keepends=True)
    for number in range(0, 60, 20):
        part = b"".join(rows_of[number : number + 20])
        put(server, f"many/deep/{number:02d}.jsonl.gz", gzip.compress(part))
    put(server, "many/README", b"not read")
    urls += [
        server.url("many"),
        server.url("many/**/*.jsonl.gz"),
        server.url("many/deep/*0.jsonl*"),
    ]
    server.faults(busy=0.1, cut_get=0.1)
    for url in urls:
        source = Source(path=url, domain="web")
        assert [d.text for d in documents(source, locate(source))] == TEXTS, url
        server.faults()
    assert build(Source(path=urls[-1], domain="web"), tmp_path).fingerprint == expected.fingerprint


def test_object_that_is_not_there_vanishes_or_may_not_be_read_is_named(
    server, tmp_path, monkeypatch
) -> None:
    for name, words in (("none.jsonl", "does not exist"), ("none/*.jsonl", "does not exist")):
        with pytest.raises(CorpusError, match=words):
            locate(Source(path=server.url(name), domain="web"))
    url = put(server, "gone/a.jsonl", Path(write_jsonl(tmp_path / "a.jsonl")).read_bytes())
    with pytest.raises(CorpusError, match="matches none of the 1 objects"):
        locate(Source(path=server.url("gone/*.parquet"), domain="web"))
    source = Source(path=url, domain="web")
    monkeypatch.setattr(rows, "RANGE_BYTES", 1_000)
    read = documents(source, locate(source))
    next(read)
    filesystem, path = rayx.remote.locate(url)
    filesystem.delete_file(path)
    with pytest.raises(CorpusError, match="a.jsonl.* vanished while it was read"):
        list(read)
    url = put(server, "denied/a.jsonl", b"{}\n")
    server.faults(deny=["GET", "HEAD"])
    with pytest.raises(UnreachableError, match="Permission"):
        locate(Source(path=url, domain="web"))
    server.faults()


def test_threads_and_cores_do_not_count(tmp_path: Path, monkeypatch) -> None:
    source = Source(path=write_jsonl(tmp_path / "a.jsonl"), domain="web")
    monkeypatch.setattr("rayx.corpus.parts.PART_BYTES", 2_000)
    made = []
    for threads in (1, 5):
        monkeypatch.setattr(encode, "cores", lambda n=threads: n)
        made.append(np.array(build(source, tmp_path / str(threads)).train("web")))
    assert made[0].tolist() == made[1].tolist()


# Built in parts ----------------------------------------------------------------------------------


def test_parts_by_hash_joined_are_the_corpus_built_at_once(tmp_path: Path) -> None:
    bad = [{"text": None}, {"text": " "}]
    kept = [{"text": t, "lang": "en"} for t in (*TEXTS, *TEXTS[:9])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(r) + "\n" for r in kept + bad))
    source = Source(path=str(tmp_path / "a.jsonl"), domain="web", label_columns=("lang",))
    train_tokenizer(TEXTS, 300).save(str(tmp_path / "t.json"))
    options = {"tokenizer": tmp_path / "t.json", "heldout_share": 0.3}
    whole = build(source, tmp_path / "whole", **options)
    parts = [build(source, tmp_path / str(k), partition=(k, 3), **options) for k in range(3)]
    joined = join_corpora([part.url for part in parts], tmp_path / "joined")
    joined.verify()

    def texts(corpus: Corpus, tokens: Any) -> list[str]:
        ends = np.flatnonzero(tokens == corpus.eos_id) + 1
        return sorted(part.tobytes().hex() for part in np.split(tokens, ends)[:-1])

    assert texts(joined, joined.train("web")) == texts(whole, whole.train("web"))
    assert texts(joined, joined.heldout("web")) == texts(whole, whole.heldout("web"))
    assert min(len(part.train("web")) for part in parts) > 0
    for corpus in (joined, whole):
        for split in ("train", "heldout"):
            corpus.manifest["domains"][0][split].pop("sha256")
        corpus.manifest["domains"][0].pop("fingerprint")
    assert joined.manifest["domains"] == whole.manifest["domains"]
    routed = route(source, tmp_path / "routed", 3)
    for k, (part, expected) in enumerate(zip(routed, parts, strict=True)):
        found = build(part, tmp_path / f"routed{k}", **options)
        assert found.fingerprint == expected.fingerprint
        assert skips(found) == skips(expected)
    again = join_corpora([part.url for part in parts], tmp_path / "joined")
    assert again.fingerprint == joined.fingerprint


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = Source(path=write_jsonl(tmp_path / "a.jsonl"), domain="web")
    with pytest.raises(CorpusError, match="partition is 3 of 3; expected"):
        build(source, tmp_path, partition=(3, 3))
    with pytest.raises(CorpusError, match="Part 0 of 3 cannot train a tokenizer of 300 tokens"):
        build(source, tmp_path, partition=(0, 3))
    one, two = build(source, tmp_path / "1"), build(source, tmp_path / "2", tokenizer=280)
    with pytest.raises(CorpusError, match="different tokenizers"):
        join_corpora([one.url, two.url], tmp_path / "joined")
    with pytest.raises(CorpusError, match="There are 1 corpora to join"):
        join_corpora([one.url], tmp_path / "joined")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(CorpusError, match="'.*taken' is not empty"):
        join_corpora([one.url, one.url], tmp_path / "taken")

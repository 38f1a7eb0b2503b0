"""Every kind of source gives the same documents; what cannot be a document is counted."""

import functools
import gzip
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayx.corpus import Corpus, Source, build_corpus, describe
from rayx.errors import CorpusError

ROWS = [{"text": f"the {n} red fox and {n * n} lazy dogs " * 5} for n in range(60)]


def write_jsonl(file: Path, rows: list) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def build(source: Source, folder: Path) -> Corpus:
    return build_corpus(
        [source], folder / "out", tokenizer=300, heldout_share=0.2, min_heldout_tokens=1
    )


def test_rows_that_are_no_documents_are_counted_by_reason(tmp_path: Path) -> None:
    bad = [{"text": None}, {"text": None}, {"text": 5}, {"text": ["a"]}, {"text": " \n"}, {"id": 1}]
    file = Path(write_jsonl(tmp_path / "a.jsonl", ROWS + bad))
    with open(file, "ab") as out:
        out.write(b'{"text": "caf\xe9"}\n{"text": "\\ud800"}\n')
    table = describe(build(Source(path=str(file), domain="web"), tmp_path))
    assert table.loc["web", "skipped"] == 8
    expected = {"3 null text", "2 text is not a string", "1 empty", "2 invalid UTF-8"}
    assert set(str(table.loc["web", "reasons"]).split(", ")) == expected
    assert table.loc["web", "documents"] + table.loc["web", "heldout_documents"] == 60


def test_rows_without_domain_are_counted_beside_the_domains(tmp_path: Path) -> None:
    rows = [r | {"label": n % 2} for n, r in enumerate(ROWS)] + [{"text": "x", "label": None}]
    source = Source(path=write_jsonl(tmp_path / "a.jsonl", rows), domain_column="label")
    corpus = build(source, tmp_path)
    assert corpus.domains == ("0", "1")
    assert describe(corpus).loc["(no domain)", "reasons"] == "1 null label"


def test_every_format_gives_the_same_corpus(tmp_path: Path) -> None:
    texts = [row["text"] for row in ROWS]
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number:03d}.txt").write_text(text)
    (folder / "README").write_text("not read")
    (folder / "zzz.txt").write_text("")
    pq.write_table(pa.table({"text": texts, "id": range(60)}), tmp_path / "a.parquet")
    paths = [write_jsonl(tmp_path / "a.jsonl", ROWS), str(tmp_path / "a.parquet"),
             str(folder), str(folder / "*.txt")]  # fmt: skip
    corpora = [
        build(Source(path=path, domain="web"), tmp_path / str(n)) for n, path in enumerate(paths)
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == 1
    assert describe(corpora[2]).loc["web", "reasons"] == "1 empty"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    """URL of the test's folder."""
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_urls_and_hub_datasets_give_the_corpus_of_the_local_file(
    tmp_path: Path, served: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    plain = write_jsonl(tmp_path / "good.jsonl", ROWS)
    local = build(Source(path=plain, domain="web"), tmp_path / "local")
    with gzip.open(tmp_path / "good.jsonl.gz", "wt") as out:
        out.write((tmp_path / "good.jsonl").read_text())
    (tmp_path / "set" / "data").mkdir(parents=True)
    part = tmp_path / "set/data/train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), part)
    url = f"{served}/set/data/{part.name}"
    found = [f"{served}/good.jsonl", str(tmp_path / "good.jsonl.gz"), url]
    made = [
        Source(path=path, domain="web", format=form, streaming=streaming)
        for path, form in [*((path, None) for path in found), (str(tmp_path / "set"), "hub")]
        for streaming in (False, True)
    ]
    for number, source in enumerate(made):
        corpus = build(source, tmp_path / f"case{number}")
        assert corpus.fingerprint == local.fingerprint, source
    with pytest.raises(CorpusError, match="nothing.jsonl.*cannot be read"):
        build(Source(path=f"{served}/nothing.jsonl", domain="web"), tmp_path / "missing")
    with pytest.raises(CorpusError, match="Unknown split .*tset"):
        source = Source(path=str(tmp_path / "set"), format="hub", split="tset", domain="web")
        build(source, tmp_path / "split")

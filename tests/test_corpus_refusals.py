"""Bad inputs are refused with the reason, before work starts."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models

from rayx.corpus import Corpus, Source, build_corpus
from rayx.errors import CorpusError

ROWS = [{"text": f"the {n} red fox and {n * n} lazy dogs " * 5} for n in range(60)]


def write_jsonl(file: Path, rows: list) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def build(source: Source | list[Source], folder: Path, **options) -> Corpus:
    sources = source if isinstance(source, list) else [source]
    defaults: dict[str, Any] = {"tokenizer": 300, "heldout_share": 0.2, "min_heldout_tokens": 1}
    return build_corpus(sources, folder / "out", **(defaults | options))


def good(folder: Path, **options) -> Source:
    fields: dict[str, Any] = {"domain": "web"} | options
    return Source(path=write_jsonl(folder / "good.jsonl", ROWS), **fields)


def missing_file(folder):
    good(folder)
    build(Source(path=str(folder / "goood.jsonl"), domain="web"), folder)


def empty_file(folder):
    build(Source(path=write_jsonl(folder / "a.jsonl", []), domain="web"), folder)


def blank_file(folder):
    (folder / "a.jsonl").write_text("\n\n")
    build(Source(path=str(folder / "a.jsonl"), domain="web"), folder)


def empty_parquet(folder):
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "a.parquet")
    build(Source(path=str(folder / "a.parquet"), domain="web"), folder)


def not_parquet(folder):
    (folder / "a.parquet").write_text("text")
    build(Source(path=str(folder / "a.parquet"), domain="web"), folder)


def invalid_utf8_in_parquet(folder):
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"text": bad}), folder / "a.parquet")
    build(Source(path=str(folder / "a.parquet"), domain="web"), folder)


def unknown_suffix(folder):
    (folder / "a.csv").write_text("text\nhello\n")
    build(Source(path=str(folder / "a.csv"), domain="web"), folder)


def folder_without_text(folder):
    build(Source(path=str(folder), domain="web"), folder)


def mixed_folder(folder):
    good(folder)
    (folder / "a.txt").write_text("hello")
    build(Source(path=str(folder), domain="web"), folder)


def missing_text_column(folder):
    build(good(folder, text_column="texts"), folder)


def missing_text_column_in_parquet(folder):
    pq.write_table(pa.table({"content": ["a"], "id": [1]}), folder / "a.parquet")
    build(Source(path=str(folder / "a.parquet"), domain="web", text_column="contents"), folder)


def missing_domain_column(folder):
    build(good(folder, domain=None, domain_column="label"), folder)


def broken_line(folder):
    (folder / "a.jsonl").write_text('{"text": "a"}\n\n{"text": "b"\n')
    build(Source(path=str(folder / "a.jsonl"), domain="web"), folder)


def truncated_gzip(folder):
    whole = gzip.compress(Path(good(folder).path).read_bytes())
    (folder / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    build(Source(path=str(folder / "a.jsonl.gz"), domain="web"), folder)


def json_array(folder):
    (folder / "a.json").write_text('[{"text": "a"}]')
    build(Source(path=str(folder / "a.json"), domain="web"), folder)


def hub_name(folder):
    build(Source(path="nobody/nothing", domain="web"), folder)


def neither_domain(folder):
    Source(path="a.jsonl")


def both_domains(folder):
    Source(path="a.jsonl", domain="web", domain_column="label")


def unknown_format(folder):
    Source(path="a", domain="web", format="parqet")


def empty_name(folder):
    good(folder, domain=" ")


def name_with_separator(folder):
    good(folder, domain="web/en")


def name_with_control_character(folder):
    rows = [{"text": "a", "label": "web\n1"}]
    source = Source(path=write_jsonl(folder / "a.jsonl", rows), domain_column="label")
    build(source, folder)


def names_differ_by_case(folder):
    build([good(folder), good(folder, domain="Web")], folder)


def names_in_column_differ_by_case(folder):
    rows = [{"text": f"a{n}", "label": "web" if n % 2 else "Web"} for n in range(60)]
    source = Source(path=write_jsonl(folder / "a.jsonl", rows), domain_column="label")
    build(source, folder)


def conflicting_evaluation_only(folder):
    build([good(folder), good(folder, evaluation_only=True)], folder)


def conflicting_evaluation_only_in_column(folder):
    rows = [{"text": f"a{n}", "label": "web"} for n in range(60)]
    column = Source(path=write_jsonl(folder / "a.jsonl", rows), domain_column="label")
    build([column, good(folder, evaluation_only=True)], folder)


def only_evaluation(folder):
    build(good(folder, evaluation_only=True), folder)


def no_sources(folder):
    build([], folder)


def duplicate_domain_of_duplicates(folder):
    build([good(folder), good(folder, domain="copy")], folder)


def one_document(folder):
    build(Source(path=write_jsonl(folder / "a.jsonl", ROWS[:1]), domain="web"), folder)


def too_few_heldout_tokens(folder):
    build(good(folder), folder, min_heldout_tokens=10**6)


def share_zero(folder):
    build(good(folder), folder, heldout_share=0.0)


def share_too_large(folder):
    build(good(folder), folder, heldout_share=0.6)


def vocabulary_too_small(folder):
    build(good(folder), folder, tokenizer=259)


def tokenizer_missing(folder):
    build(good(folder), folder, tokenizer="nowhere/tokenizer.json")


def tokenizer_unreadable(folder):
    (folder / "t.json").write_text("{}")
    build(good(folder), folder, tokenizer=folder / "t.json")


def tokenizer_unreachable(folder):
    build(good(folder), folder, tokenizer="nobody/nothing")


def tokenizer_without_eos(folder):
    Tokenizer(models.BPE()).save(str(folder / "t.json"))
    build(good(folder), folder, tokenizer=folder / "t.json")


def out_is_a_file(folder):
    (folder / "out").write_text("")
    build(good(folder), folder)


def out_below_a_file(folder):
    (folder / "out").write_text("")
    build(good(folder), folder / "out", seed=1)


def out_is_something_else(folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.tex").write_text("")
    build(good(folder), folder)


def out_is_another_corpus(folder):
    build(good(folder), folder)
    build(good(folder), folder, seed=1)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (missing_file, "does not exist. Did you mean 'good.jsonl'?"),
        (empty_file, r"is empty \(0 bytes\)"),
        (blank_file, "is empty: it has no rows"),
        (empty_parquet, "0 rows"),
        (not_parquet, "not readable as Parquet"),
        (invalid_utf8_in_parquet, "a.parquet.*cannot be read"),
        (unknown_suffix, "unknown suffix; known are .parquet"),
        (folder_without_text, "no file of a known suffix"),
        (mixed_folder, r"mixes \['jsonl', 'txt'\]"),
        (missing_text_column, "no column 'texts'; columns found: text. Did you mean 'text'?"),
        (missing_text_column_in_parquet, "columns found: content, id. Did you mean 'content'?"),
        (missing_domain_column, "no column 'label'"),
        (broken_line, "a.jsonl', line 3: not JSON"),
        (truncated_gzip, "a.jsonl.gz' cannot be read"),
        (json_array, "line 1: a list, expected one object per line"),
        (hub_name, "'nobody/nothing' is no local file or folder, and cannot be read as a hub"),
        (neither_domain, "exactly one of domain .* and domain_column"),
        (both_domains, "exactly one of domain .* and domain_column"),
        (unknown_format, "Did you mean 'parquet'?"),
        (empty_name, "' ' is empty"),
        (name_with_separator, "'web/en' cannot be a folder name"),
        (name_with_control_character, r"'web\\n1' cannot be a folder name"),
        (names_differ_by_case, "'web' and 'Web' differ only by case"),
        (names_in_column_differ_by_case, "'Web' and 'web' differ only by case"),
        (conflicting_evaluation_only, "'web' is given by sources with evaluation_only"),
        (conflicting_evaluation_only_in_column, "'web' comes from a source with evaluation_only"),
        (only_evaluation, "nothing to train on"),
        (no_sources, "no sources"),
        (duplicate_domain_of_duplicates, "'copy' is empty: .*duplicates: 60"),
        (one_document, "'web' is too small: of 1 documents"),
        (too_few_heldout_tokens, r"has \d+ held-out tokens in \d+ documents, needed are 1000000"),
        (share_zero, r"heldout_share is 0.0, expected a share in \(0, 0.5\]"),
        (share_too_large, "heldout_share is 0.6"),
        (vocabulary_too_small, "Vocabulary size 259 is too small.*at least 260"),
        (tokenizer_missing, "nowhere/tokenizer.json' does not exist"),
        (tokenizer_unreadable, "t.json' cannot be read"),
        (tokenizer_unreachable, "'nobody/nothing' cannot be read"),
        (tokenizer_without_eos, "no end-of-text token; looked for"),
        (out_is_a_file, "is a file, expected a folder"),
        (out_below_a_file, "cannot be written"),
        (out_is_something_else, r"not a corpus \(thesis.tex\)"),
        (out_is_another_corpus, "built from other sources, versions of them or parameters"),
    ],
)
def test_bad_input_is_refused_with_the_reason(
    act: Callable[[Path], None], words: str, tmp_path: Path, offline: None
) -> None:
    with pytest.raises(CorpusError, match=words):
        act(tmp_path)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hub look-ups fail at once instead of being tried again for half a minute."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # first: it copies the other one
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

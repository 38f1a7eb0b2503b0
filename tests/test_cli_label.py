"""`rayx corpus label`: raters, buckets and licences from the shell, and the corpus of crossings."""

from __future__ import annotations

import json
import re

import pytest

from tests.conftest import sentences
from tests.test_cli import run_main
from tests.tiny_models import own_tokenizer_json, save_model

LICENCES = ("MIT", "CC BY-SA 4.0", "GPL-3.0-only", None)


@pytest.fixture
def label(monkeypatch, capsys, tmp_path):
    """Run the real entry point beside labelled text; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"text": f"{text} {n}", "topic": topic, "licence": LICENCES[n % 4]}
        for topic in ("law", "news") for n, text in enumerate(sentences(topic, 160, 0))
    ]  # fmt: skip
    kinds = {"good": "law", "bad": "news"}
    examples = [{"text": text, "label": label} for label, topic in kinds.items()
                for text in sentences(topic, 30, 1)]  # fmt: skip
    for name, written in (("text", rows), ("examples", examples)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in written))

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run_main("corpus", *arguments)
        return (code, *capsys.readouterr())

    return call


TABLE = ("label", "out", "--table", "text.jsonl", "--domain-column", "topic")


def test_text_is_labelled_and_its_crossings_are_a_corpus(label):
    code, out, _ = label(
        *TABLE, "--rater", "score=classifier:examples.jsonl:good", "--bucket",
        "quality=score@topic:low:0.5,high:0.5", "--licence-column", "licence",
        "--deny-licences", "copyleft",
    )  # fmt: skip
    assert code == 0
    assert re.search(r"licence_tier: share-alike +80 +\d+\.\d%", out)
    assert re.search(r"quality: low +120 +", out)
    assert "score: 60 examples; cross-validated accuracy" in out
    assert "dropped: 80 licence denied: copyleft" in out and "240 documents" in out
    code, out, _ = label(
        "build", "corpus", "--table", "out", "--domain-column", "topic,quality", "--label-columns",
        "licence_tier", "--score-column", "score", "--tokenizer", "300", "--heldout-share", "0.2",
    )  # fmt: skip
    assert code == 0
    assert all(f"{topic}.{quality}" in out for topic in ("law", "news") for quality in
               ("low", "high"))  # fmt: skip


def test_json_is_one_object_and_nothing_else(label, tmp_path):
    save_model(tmp_path / "model", own_tokenizer_json())
    (tmp_path / "prompt.txt").write_text("{text}\nfrom 1 to 5: \n")
    code, out, _ = label(
        *TABLE, "--rater", "bpb=perplexity:model", "--rater", "stars=prompt:model:prompt.txt",
        "--rater", "kind=column:topic:law=dry", "--tokens", 20, "--no-parallel", "--json",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0 and found["documents"] == 320
    assert {kind: n for kind, (n, _) in found["counts"]["kind"].items()} == {
        "dry": 160, "unknown": 160}  # fmt: skip
    assert found["numbers"]["bpb"]["missing"] == 0 and 1 < found["numbers"]["stars"]["mean"] < 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rater", "q=perplexty:model"], r"kind column:COLUMN.*Did you mean 'perplexity'\?"),
        (["--rater", "q"], r"expected name=kind:what"),
        (["--rater", "q=column:topic:law"], r"--rater has 'law'; expected value=new"),
        (["--rater", "q=prompt:model"], r"names no prompt; expected q=prompt:FOLDER:FILE"),
        (["--rater", "q=prompt:model:none.txt"], r"the prompt cannot be read"),
        (["--rater", "q=prompt:model:examples.jsonl"], r"has \{text\} 0 times"),
        (["--rater", "q=perplexity:none"], r"'none' is neither a folder of a Hugging Face model"),
        (["--rater", "q=classifier:examples.jsonl:god"], r"no label 'god'; labels are bad, good"),
        (["--rater", "q=function:no.module:f"], r"'no.module' cannot be imported"),
        (["--bucket", "q=score:low:0.5,high:0.6"], r"expected 2 positive shares of sum 1"),
        (["--deny-licences", "copyleft"], r"need --licence-column"),
        (["--licence-column", "licence", "--deny-licences", "copylefty"],
         r"neither a tier .* Did you mean 'copyleft'\?"),
        (["--label-columns", "langage"], r"no column 'langage'"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_line_and_exit_code_2(label, options, message):
    code, out, err = label(*TABLE, *options)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and not out and len(lines) == 1
    assert re.search(message, lines[0])

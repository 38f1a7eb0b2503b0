"""`rayx corpus`: build, sample, show."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rayx.cli.options import SeedOption
from rayx.cli.output import say
from rayx.corpus import Corpus, Source, build_corpus, build_sample, describe
from rayx.errors import SpecError


def build(
    out: Annotated[str, typer.Argument(help="Folder of the corpus.", metavar="OUT")],
    sources: Annotated[
        list[str] | None, typer.Option("--source", help="domain=path; again for more.")
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="Files with columns that name the domain.")
    ] = None,
    domain_column: Annotated[
        str, typer.Option(help="That column, with --table; topic,quality crosses two.")
    ] = "domain",
    evaluation: Annotated[
        list[str] | None, typer.Option("--evaluation", help="target=path, held out whole.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    group_column: Annotated[
        str | None, typer.Option(help="Documents of one value are held out together, or not.")
    ] = None,
    label_columns: Annotated[
        str | None, typer.Option(help="Columns to count by their values: licence,language.")
    ] = None,
    score_column: Annotated[
        str | None, typer.Option(help="Sorts training text, so that web@0.3 is web's best 30%.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="A second document of an id is skipped.")
    ] = None,
    tokenizer: Annotated[
        str, typer.Option(help="Vocabulary size to train, a tokenizers file, or a name.")
    ] = "32768",
    heldout_share: Annotated[float, typer.Option(help="Share of documents held out.")] = 0.05,
    seed: SeedOption = 0,
) -> None:
    """Turn Parquet, JSONL or text files, or hub datasets, into a corpus.

    Example: `rayx corpus build data/mine --source web=web/*.parquet --source code=code.jsonl`
    """
    columns: dict[str, Any] = {
        "text_column": text_column,
        "group_column": group_column,
        "label_columns": tuple(_names(label_columns)),
        "score_column": score_column,
        "id_column": id_column,
    }
    given = [
        Source(path=path, domain=domain, evaluation_only=held_out, **columns)
        for option, values, held_out in (
            ("--source", sources, False),
            ("--evaluation", evaluation, True),
        )
        for domain, path in (_named(option, value) for value in values or [])
    ]
    if table:
        given.append(Source(path=table, domain_column=tuple(_names(domain_column)), **columns))
    vocabulary = int(tokenizer) if tokenizer.isdigit() else tokenizer
    built = build_corpus(given, out, tokenizer=vocabulary, heldout_share=heldout_share, seed=seed)
    say(describe(built).to_string())


def sample(
    out: Annotated[
        str, typer.Argument(help="Folder of the corpus.", metavar="OUT")
    ] = "data/sample",
    vocab_size: Annotated[int, typer.Option(help="Vocabulary to train.")] = 1024,
) -> None:
    """Build the sample corpus of real text from the packages of the extra `sample`.

    Example: `rayx corpus sample data/sample`
    """
    say(describe(build_sample(out, vocab_size=vocab_size)).to_string())


def show(
    corpus: Annotated[str, typer.Argument(help="Folder of the corpus.", metavar="CORPUS")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Also check every shard's hash.")
    ] = False,
) -> None:
    """Show a corpus: documents, tokens, bytes, held-out text, duplicates and skips by domain.

    Example: `rayx corpus show data/sample`
    """
    opened = Corpus.load(corpus)
    if verify:
        opened.verify()
    say(describe(opened).to_string())
    typer.echo(f"fingerprint {opened.fingerprint}, vocabulary {opened.vocab_size}")


def _names(value: str | None) -> list[str]:
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def _named(option: str, value: str) -> tuple[str, str]:
    name, equals, path = value.partition("=")
    if not equals or not name or not path:
        raise SpecError(f"{option} {value!r} is not name=path, e.g. web=data/web.jsonl.")
    return name, path

"""`rayx corpus`: build, sample, show."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer
from rich.console import Console

from rayx.cli.options import (
    GroupColumnOption,
    HeldoutShareOption,
    IdColumnOption,
    LabelColumnsOption,
    MinHeldoutTokensOption,
    ScoreColumnOption,
    SeedOption,
    TextColumnOption,
    names_of,
)
from rayx.cli.output import MOST_VALUES, check_folder, grid_of, say, write_text
from rayx.cli.training import read_plan
from rayx.corpus import Corpus, Source, build_corpus, build_sample, describe
from rayx.corpus.clusters.cluster import read_clusters
from rayx.corpus.join import join_corpora
from rayx.errors import SpecError
from rayx.plan import Plan


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
    text_column: TextColumnOption = "text",
    group_column: GroupColumnOption = None,
    label_columns: LabelColumnsOption = None,
    score_column: ScoreColumnOption = None,
    id_column: IdColumnOption = None,
    tokenizer: Annotated[
        str, typer.Option(help="Vocabulary size to train, a tokenizers file, or a name.")
    ] = "32768",
    heldout_share: HeldoutShareOption = 0.05,
    min_heldout_tokens: MinHeldoutTokensOption = 1024,
    near_duplicates: Annotated[
        float | None, typer.Option(help="Remove what is this similar (Jaccard) to another: 0.7.")
    ] = None,
    contamination_words: Annotated[
        int | None, typer.Option(help="Count word n-grams shared with held-out text: 13.")
    ] = None,
    remove_contaminated: Annotated[
        bool, typer.Option(help="Also remove the train documents that share one.")
    ] = False,
    partition: Annotated[
        str | None, typer.Option(help="0/64: only the first of 64 parts by hash, to join later.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Turn Parquet, JSONL or text files, or hub datasets, into a corpus.

    Example: `rayx corpus build data/mine --source web=web/*.parquet --source code=code.jsonl`
    """
    columns: dict[str, Any] = {
        "text_column": text_column,
        "group_column": group_column,
        "label_columns": names_of(label_columns),
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
        given.append(Source(path=table, domain_column=names_of(domain_column), **columns))
    vocabulary = int(tokenizer) if tokenizer.isdigit() else tokenizer
    built = build_corpus(
        given, out, tokenizer=vocabulary, heldout_share=heldout_share,
        min_heldout_tokens=min_heldout_tokens, seed=seed,
        near_duplicates=near_duplicates, contamination_words=contamination_words,
        remove_contaminated=remove_contaminated, partition=_partition(partition),
    )  # fmt: skip
    show_corpus(built)


def join(
    out: Annotated[str, typer.Argument(help="Folder of the new corpus.", metavar="OUT")],
    parts: Annotated[list[str], typer.Argument(help="Corpora to join.", metavar="PART...")],
) -> None:
    """Join corpora that were built in parts.

    Example: `rayx corpus join data/all data/part0 data/part1`
    """
    show_corpus(join_corpora(parts, out))


def _partition(value: str | None) -> tuple[int, int] | None:
    found = re.fullmatch(r"(\d+)/(\d+)", value or "")
    if value and not found:
        raise SpecError(f"--partition is {value!r}; expected PART/PARTS, such as 0/64.")
    return (int(found[1]), int(found[2])) if found else None


def sample(
    out: Annotated[
        str, typer.Argument(help="Folder of the corpus.", metavar="OUT")
    ] = "data/sample",
    vocab_size: Annotated[int, typer.Option(help="Vocabulary to train.")] = 1024,
) -> None:
    """Build the sample corpus of real text from the packages of the extra `sample`.

    Example: `rayx corpus sample data/sample`
    """
    show_corpus(build_sample(out, vocab_size=vocab_size))


def show(
    corpus: Annotated[str, typer.Argument(help="Folder of the corpus.", metavar="CORPUS")],
    plan: Annotated[
        str | None, typer.Option(help="A plan's file: the passes that it takes over each domain.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also check every shard's hash.")
    ] = False,
    page: Annotated[
        str | None, typer.Option(help="Also write an HTML page, with the map of its clusters.")
    ] = None,
) -> None:
    """Show a corpus: supply, tokens' length, held-out text, what was removed, labels.

    Example: `rayx corpus show data/sample --plan plan.json`
    """
    if page:
        check_folder(page)
    opened = Corpus.load(corpus)
    if verify:
        opened.verify()
    planned = read_plan(plan) if plan else None
    if planned is not None:
        planned.check(opened)
    show_corpus(opened, planned)
    if page:
        from rayx.report.corpus_page import corpus_page

        write_text(page, corpus_page(opened, read_clusters(opened)))


def show_corpus(corpus: Corpus, plan: Plan | None = None) -> None:
    """Print what a corpus holds, what was removed from its sources, and its labels."""
    facts = describe(corpus)
    passes = plan.epochs if plan else {}
    supply = grid_of("", "documents", "tokens", "share", "bytes/token", "|", "held-out",
                     "tokens", "± bpb", *["epochs"] * bool(plan))  # fmt: skip
    removed = grid_of("", "duplicates", "skipped", "")
    cleaned = grid_of("", "near-duplicates", "contaminated", "held-out shared")
    for name, row in facts.to_dict("index").items():
        if row["heldout_documents"]:
            supply.add_row(
                name, f"{row['documents']:,}", f"{row['tokens']:,}", f"{row['share']:.3f}",
                f"{row['bytes_per_token']:.2f}", "|", f"{row['heldout_documents']:,}",
                f"{row['heldout_tokens']:,}", f"{row['heldout_error_bpb']:.3f}",
                *[f"{passes.get(str(name), 0.0):.2f}"] * bool(plan),
            )  # fmt: skip
        if row["duplicates"] or row["skipped"]:
            removed.add_row(name, f"{row['duplicates']:,}", f"{row['skipped']:,}", row["reasons"])
        found = (row["near_duplicates"], row["contaminated"], row["heldout_shared"])
        if any(value == value for value in found):  # not nan
            cleaned.add_row(name, f"{found[0]:,.0f}", f"{found[1]:,.0f}", f"{found[2]:.2%}")
    for grid in (supply, removed, cleaned):
        if grid.row_count:
            Console().print(grid, "")
    show_labels(corpus)
    say(f"fingerprint {corpus.fingerprint}, vocabulary {corpus.vocab_size}")


def show_labels(corpus: Corpus) -> None:
    """Print the values of each label, largest first, as shares of the training text."""
    proportional = {d: float(n) for d, n in corpus.bytes.items()}
    total = sum(proportional.values())
    shares = corpus.mixture_labels({d: n / total for d, n in proportional.items()})
    for axis, found in shares.items():
        most = [f"{value} {share:.1%}" for value, share in list(found.items())[:MOST_VALUES]]
        more = f" and {len(found) - MOST_VALUES} more" if len(found) > MOST_VALUES else ""
        say(f"{axis}: {', '.join(most)}{more}")


def _named(option: str, value: str) -> tuple[str, str]:
    name, equals, path = value.partition("=")
    if not equals or not name or not path:
        raise SpecError(f"{option} {value!r} is not name=path, e.g. web=data/web.jsonl.")
    return name, path

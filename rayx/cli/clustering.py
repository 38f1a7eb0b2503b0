"""`rayx corpus cluster`: text without domains to a corpus of its clusters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rayx.cli.corpora import show_corpus
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
    number_of,
)
from rayx.cli.output import say
from rayx.corpus import Source
from rayx.corpus.clusters.cluster import Clustering, cluster_corpus, read_clusters
from rayx.errors import SpecError


def cluster(
    out: Annotated[str, typer.Argument(help="Folder of the corpus.", metavar="OUT")],
    sources: Annotated[
        list[str], typer.Option("--source", help="path, or name=path; again for more.")
    ],
    clusters: Annotated[
        int | None, typer.Option(help="How many domains; else the fewest that separate well.")
    ] = None,
    embedder: Annotated[
        str, typer.Option(help="tfidf, or a sentence-transformers or ONNX folder.")
    ] = "tfidf",
    init_clusters: Annotated[
        int | None, typer.Option(help="How many to find, before pruning and merging.")
    ] = None,
    merge_distance: Annotated[
        float | None, typer.Option(help="Merge those nearer than this, not down to a number.")
    ] = None,
    prune: Annotated[
        str | None, typer.Option(help="Leave clusters out by a mean: quality<3.")
    ] = None,
    sample: Annotated[int, typer.Option(help="Documents to fit on, at most.")] = 20_000,
    evaluation: Annotated[
        list[str] | None, typer.Option("--evaluation", help="target=path, held out whole.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Folder for the labelled text; OUT-text.")
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
    seed: SeedOption = 0,
) -> None:
    """Cluster text that has no domains, and build the corpus of its clusters.

    Example: `rayx corpus cluster data/clusters --source web/*.parquet --clusters 20`
    """
    clustering = Clustering(
        clusters=clusters, init_clusters=init_clusters, merge_distance=merge_distance,
        prune=_rule(prune), embedder=embedder, sample_documents=sample, seed=seed,
    )  # fmt: skip
    columns: dict[str, Any] = {
        "text_column": text_column,
        "group_column": group_column,
        "label_columns": names_of(label_columns),
        "score_column": score_column,
        "id_column": id_column,
    }
    given = [
        Source(domain=name or "text", path=path, **columns)
        for name, path in map(_maybe_named, sources)
    ]
    held_out = []
    for value in evaluation or []:
        name, path = _maybe_named(value)
        if not name:
            raise SpecError(f"--evaluation {value!r} is not name=path, e.g. exam=data/exam.jsonl.")
        held_out.append(
            Source(domain=name, path=path, text_column=text_column, evaluation_only=True)
        )
    corpus = cluster_corpus(
        given, out, clustering, tokenizer=int(tokenizer) if tokenizer.isdigit() else tokenizer,
        evaluation=held_out, heldout_share=heldout_share,
        min_heldout_tokens=min_heldout_tokens, text=text,
    )  # fmt: skip
    found = read_clusters(corpus) or {}
    show_corpus(corpus)
    for entry in found["clusters"]:
        say(f"{entry['name']}: {', '.join(entry['terms'])}")
    say(
        f"{len(found['clusters'])} clusters of {found['documents']} documents: "
        f"{found['initial']} initial, {found['empty']} empty, {len(found['pruned'])} pruned, "
        f"{found['joined']} too small and joined; {found['unknown']} documents in none; "
        f"skipped: {', '.join(f'{n} {why}' for why, n in found['skipped'].items()) or 'none'}"
    )


def _rule(prune: str | None) -> tuple[str, float] | None:
    if prune is None:
        return None
    column, less, threshold = (piece.strip() for piece in prune.partition("<"))
    if not (column and less and threshold):
        raise SpecError(f"--prune {prune!r} is not column<number, e.g. quality<3.")
    return column, number_of("--prune", threshold, "column<number")


def _maybe_named(value: str) -> tuple[str | None, str]:
    name, equals, path = value.partition("=")
    # an s3:// URL may hold a "=" of its own
    return (name, path) if equals and name and "/" not in name else (None, value)

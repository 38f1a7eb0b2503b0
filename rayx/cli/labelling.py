"""`rayx corpus label`: documents to documents with labels, by raters, buckets and licences."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rayx.cli.options import JsonOption, SeedOption, names_of, parse_pairs
from rayx.cli.output import MOST_VALUES, grid_of, say
from rayx.corpus import Source
from rayx.corpus.labels.buckets import Buckets
from rayx.corpus.labels.classifier import train_classifier
from rayx.corpus.labels.label import Labelled, label_corpus
from rayx.corpus.labels.licences import Licences
from rayx.corpus.labels.raters import ColumnRater, FunctionRater, LicenceRater, Rater
from rayx.errors import SpecError, did_you_mean

KINDS = {
    "column": "COLUMN or COLUMN:value=new,value=new",
    "licence": "COLUMN",
    "function": "package.module:function or file.py:function",
    "classifier": "EXAMPLES or EXAMPLES:LABEL",
    "perplexity": "FOLDER, or CHECKPOINT:TOKENIZER",
    "prompt": "FOLDER:PROMPT.txt",
}


def label(
    out: Annotated[str, typer.Argument(help="Folder of the labelled text.", metavar="OUT")],
    sources: Annotated[
        list[str] | None, typer.Option("--source", help="path, or domain=path; again for more.")
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="Files with columns that name the domain.")
    ] = None,
    domain_column: Annotated[
        str, typer.Option(help="That column, with --table; topic,quality crosses two.")
    ] = "domain",
    raters: Annotated[
        list[str] | None,
        typer.Option(
            "--rater",
            help="name=kind:…, kind column, licence, function, classifier, perplexity or prompt; "
            "again for more.",
        ),
    ] = None,
    buckets: Annotated[
        list[str] | None,
        typer.Option(
            "--bucket",
            help="name=column:low:0.3,high:0.7 (shares; column@domain: of each domain) or "
            "name=column:low,2,high (edges); again for more.",
        ),
    ] = None,
    licence_column: Annotated[
        str | None, typer.Option(help="Column with licences; adds licence_tier.")
    ] = None,
    allow_licences: Annotated[
        str | None, typer.Option(help="Tiers or SPDX ids to keep: permissive,CC-BY-4.0.")
    ] = None,
    deny_licences: Annotated[
        str | None, typer.Option(help="Tiers or SPDX ids to drop: copyleft,unknown.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    label_columns: Annotated[
        str | None, typer.Option(help="Columns to keep as labels: licence,language.")
    ] = None,
    score_column: Annotated[str | None, typer.Option(help="Column of numbers to keep.")] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Documents of one value belong together; kept.")
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of ids; kept.")] = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Of a document that a language model reads.")
    ] = 512,
    device: Annotated[str, typer.Option(help="Of language models: cpu, cuda …")] = "cpu",
    parallel: Annotated[
        bool | None,
        typer.Option("--parallel/--no-parallel", help="On Ray Data. [default: if large]"),
    ] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Add columns to documents: ratings, buckets of scores, tiers of licences.

    Example: `rayx corpus label data/rated --source web=web/*.parquet
    --rater score=classifier:examples.jsonl:good --bucket quality=score:low:0.5,high:0.5`
    """
    columns: dict[str, Any] = {
        "text_column": text_column,
        "group_column": group_column,
        "label_columns": names_of(label_columns),
        "score_column": score_column,
        "id_column": id_column,
    }
    if licence_column and licence_column not in columns["label_columns"]:
        columns["label_columns"] += (licence_column,)
    given = [_source(value, columns) for value in sources or []]
    if table:
        given.append(Source(path=table, domain_column=names_of(domain_column), **columns))
    made = [_rater(value, tokens, device, seed) for value in raters or []]
    lists = Licences(allow=names_of(allow_licences), deny=names_of(deny_licences))
    if (lists.allow or lists.deny) and not licence_column:
        raise SpecError("--allow-licences and --deny-licences need --licence-column.")
    labelled = label_corpus(
        given,
        out,
        made,
        buckets=[Buckets.parse(value) for value in buckets or []],
        licence_column=licence_column,
        licences=lists if lists.allow or lists.deny else None,
        parallel=parallel,
    )
    if as_json:
        return typer.echo(json.dumps(asdict(labelled)))
    _show(labelled)


def _source(value: str, columns: dict[str, Any]) -> Source:
    name, equals, path = value.partition("=")
    if not equals or Path(value).exists():
        name, path = "text", value
    return Source(path=path, domain=name, **columns)


def _rater(value: str, tokens: int, device: str, seed: int) -> Rater:
    name, equals, rest = value.partition("=")
    kind, colon, what = rest.partition(":")
    if not (name and equals and colon and what) or kind not in KINDS:
        raise SpecError(
            f"--rater {value!r}; expected name=kind:what, with kind "
            + ", ".join(f"{known}:{form}" for known, form in KINDS.items())
            + f".{did_you_mean(kind, KINDS)}"
        )
    if kind == "column":
        column, _, pairs = what.partition(":")
        mapping = parse_pairs("--rater", pairs, "value=new") if pairs else None
        return ColumnRater(name, column, mapping)
    if kind == "licence":
        return LicenceRater(name, what)
    if kind == "function":
        return FunctionRater(name, what)
    first, second = _pair(what)
    if kind == "classifier":
        return train_classifier(name, first, of=second, seed=seed)
    from rayx.proxy.rating import PerplexityRater, PromptRater  # torch takes seconds to import

    if kind == "perplexity":
        return PerplexityRater(name, first, tokens, device, tokenizer=second)
    if second is None:
        raise SpecError(f"--rater {value!r} names no prompt; expected {name}=prompt:FOLDER:FILE.")
    try:
        prompt = Path(second).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"--rater {value!r}: the prompt cannot be read ({error}).") from None
    return PromptRater(name, first, prompt.removesuffix("\n"), tokens=tokens, device=device)


def _pair(what: str) -> tuple[str, str | None]:
    """Split `path:more`; a path may have colons of its own."""
    first, colon, second = what.rpartition(":")
    if not colon or Path(what).expanduser().exists() or "/" in second and "://" in what:
        return what, None
    return first, second


def _show(labelled: Labelled) -> None:
    grid = grid_of("", "documents", "share of bytes")
    for column, values in labelled.counts.items():
        for value, (documents, num_bytes) in list(values.items())[:MOST_VALUES]:
            grid.add_row(f"{column}: {value}", f"{documents}", f"{num_bytes / labelled.bytes:.1%}")
        if (rest := len(values) - MOST_VALUES) > 0:
            grid.add_row(f"{column}: {rest} more", "", "")
    Console().print(grid)
    for column, facts in labelled.numbers.items():
        spread = (f"{key} {facts[key]:.4g}" for key in ("mean", "min", "max")
                  if facts[key] is not None)  # fmt: skip
        say(f"{column}: {', '.join(spread)}; {facts['missing']} missing (unknown)")
    for rater in labelled.facts["raters"]:
        if (found := rater.get("validation")) is not None:
            say(f"{rater['name']}: {found['examples']} examples; cross-validated accuracy "
                f"{found['accuracy']:.3f} +- {found['accuracy_se']:.3f} (largest class "
                f"{found['majority']:.3f}), AUC {found['auc']:.3f}")  # fmt: skip
    for what, lost in (("skipped", labelled.skipped), ("dropped", labelled.denied)):
        if lost:
            say(f"{what}: {', '.join(f'{n} {reason}' for reason, n in lost.items())}")
    say(f"{labelled.documents} documents, {labelled.bytes / 1e6:.1f} MB in {labelled.folder}")

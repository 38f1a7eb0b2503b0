"""`rayx corpus infer-mixture`: from a tokenizer's merges to the mixture of its training text."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Annotated

import typer
from rich.console import Console

from rayx.cli.options import JsonOption, SeedOption
from rayx.cli.output import grid_of, say, warn, work_progress
from rayx.corpus.source import Source
from rayx.errors import SpecError
from rayx.methods.tokenizer_mixture import LEVEL, infer_mixture


def infer(
    tokenizer: Annotated[
        str,
        typer.Argument(
            help="tokenizers JSON, SentencePiece .model, tiktoken ranks, tekken.json, or a folder.",
            metavar="TOKENIZER",
        ),
    ],
    samples: Annotated[
        list[str] | None,
        typer.Option("--sample", help="category=path of text like its own; again for more."),
    ] = None,
    merges: Annotated[int, typer.Option(help="Merges used, from the first.")] = 3000,
    bootstrap: Annotated[
        int, typer.Option(min=0, help="Replicates for the intervals, 0 for none.")
    ] = 30,
    pattern: Annotated[
        str | None,
        typer.Option(help="For ranks: gpt2, cl100k, o200k, or a regular expression."),
    ] = None,
    text_column: Annotated[str, typer.Option(help="Column that holds the text.")] = "text",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Infer the mixture of categories that a tokenizer was trained on, with intervals.

    Needs samples of the categories that the training text may have had, some megabytes each, of
    documents like its own. A category without a sample is shared out among the others; merges that
    no sample has, and the violation that is left, tell of it.

    Example: `rayx corpus infer-mixture tokenizer.json --sample web=web.jsonl --sample code=src.jsonl`
    """  # noqa: E501
    started = time.perf_counter()
    given = [_sample(text) for text in samples or []]
    sources = [Source(path=path, domain=name, text_column=text_column) for name, path in given]
    with work_progress("inference", "steps") as shown:
        found = infer_mixture(tokenizer, sources, merges, bootstrap, seed, pattern, shown)
    seconds = time.perf_counter() - started
    if as_json:
        result = dataclasses.asdict(found) | {"level": LEVEL, "seconds": seconds}
        return typer.echo(json.dumps(result))
    grid = grid_of("", "share of bytes", f"{LEVEL:.0%} interval", "documents", "MB")
    for name, share in sorted(found.shares.items(), key=lambda item: -item[1]):
        low, high = found.intervals.get(name, (None, None))
        interval = "" if low is None else f"{low:.1%} to {high:.1%}"
        size = f"{found.bytes[name] / 1e6:.2f}"
        grid.add_row(name, f"{share:.1%}", interval, f"{found.documents[name]:,}", size)
    Console().print(grid)
    say(f"{found.merges:,} of {found.listed:,} merges, {found.unseen:.1%} of them in no sample; "
        f"violation {found.violation:.1%}; {found.unchecked:,} merges with a rival too rare to be "
        f"kept; {found.rounds} rounds, {seconds:.1f} s")  # fmt: skip
    warn(found.warnings)


def _sample(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (equals and name.strip() and path.strip()):
        raise SpecError(f"--sample {text!r} is not category=path, e.g. code=data/code.jsonl.")
    return name.strip(), path.strip()

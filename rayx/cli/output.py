"""What the commands print: tables, warnings, a choice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table as Grid
from rich.text import Text

from rayx.choose import Choice
from rayx.corpus import Corpus
from rayx.errors import SpecError
from rayx.progress import duration
from rayx.split import SplitChoice

log = logging.getLogger(__name__)

MOST_VALUES = 8  # of a label, in a table
LOG_SECONDS = 15.0  # between plain lines, where the output is not a terminal


def check_folder(path: str) -> None:
    """Raise SpecError where the folder that a file is to be written to does not exist."""
    if not Path(path).absolute().parent.is_dir():
        raise SpecError(f"Cannot write {path!r}: its folder does not exist. Give another --out.")


def write_text(path: str, text: str) -> None:
    """Write a file that the user asked for."""
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"Cannot write {path!r}: {error}. Give another --out.") from error


def printable(text: object) -> str:
    """Return a text in which signs that could command a terminal are written out, as \\x1b."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in str(text))


def say(text: object, err: bool = False) -> None:
    """Print a line; names and messages in it may be anybody's."""
    typer.echo(printable(text), err=err)


class _Grid(Grid):
    """A table whose cells are texts and no markup."""

    def add_row(self, *cells: object, **options: Any) -> None:
        super().add_row(*(Text(printable(cell)) for cell in cells), **options)


def grid_of(*columns: str) -> Grid:
    """Return an empty table; names on the left, numbers on the right."""
    grid = _Grid(box=None, pad_edge=False)
    for column in columns:
        left = column in ("target", "regressor", "")
        grid.add_column(Text(printable(column)), justify="left" if left else "right")
    return grid


@contextmanager
def work_progress(what: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a callback (done, total, which) that shows them, the rate and the time left."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(),
               TaskProgressColumn(show_speed=True), TimeRemainingColumn())  # fmt: skip
    began = last = time.monotonic()
    with Progress(*columns, TextColumn("{task.description}"), console=console,
                  transient=True, disable=not console.is_terminal) as bar:  # fmt: skip
        task = bar.add_task("", total=None)

        def show(done: int, total: int, which: str) -> None:
            nonlocal last
            bar.update(task, completed=done, total=total, description=which)
            now = time.monotonic()
            if done and not console.is_terminal and now - last > LOG_SECONDS:
                last, rate = now, done / (now - began)
                log.info("%s: %d/%d %s, %.3g a second, %s left, %s", what, done, total, unit,
                         rate, duration((total - done) / rate), which)  # fmt: skip

        yield show


def warn(warnings: Sequence[str]) -> None:
    """Print warnings on standard error."""
    for warning in warnings:
        say(f"warning: {warning}", err=True)


def show_choice(choice: Choice, corpus: Corpus | None = None) -> None:
    """Print the chosen shares beside the baselines', and what each is predicted to reach.

    Of a corpus with labels (licences, languages) also the share of each value.
    """
    grid = grid_of("", "choice", *choice.baselines)
    for domain, share in choice.weights.items():
        others = (b.weights[domain] for b in choice.baselines.values())
        grid.add_row(domain, *(f"{w:.3f}" for w in (share, *others)))
    predicted = [choice.predicted, *(b.predicted for b in choice.baselines.values())]
    grid.add_row("predicted objective", *(f"{value:.4f}" for value in predicted))
    if corpus is not None and corpus.axes:
        mixtures = [choice.weights, *(b.weights for b in choice.baselines.values())]
        labels = [corpus.mixture_labels(weights) for weights in mixtures]
        for axis in corpus.axes:
            for value in list(labels[0][axis])[:MOST_VALUES]:
                shares = (f"{found[axis].get(value, 0.0):.3f}" for found in labels)
                grid.add_row(f"{axis}: {value}", *shares)
    Console().print(grid)
    low, high = choice.interval
    typer.echo(f"{choice.level:.0%} interval of the choice: {low:.4f} to {high:.4f}")
    worse = {target: loss for target, loss in choice.given_up.items() if loss > 0}
    if worse:
        listed = ", ".join(f"{target} {loss:+.4f}" for target, loss in worse.items())
        say(f"given up against proportional: {listed}")
    if choice.repetition:
        listed = ", ".join(f"{d} {passes:.2g}" for d, passes in choice.repetition.items())
        say(f"epochs: {listed}")
    warn(choice.warnings)


def show_split(choice: SplitChoice) -> None:
    """Print the split, what it gains, and the splits one might have taken instead."""
    grid = grid_of("share before the split", "trunk tokens", "predicted loss")
    shares = {float(share): loss for share, loss in choice.fixed.items()} | {1.0: choice.no_split}
    marked = {**{share: "" for share in shares}, choice.fraction: " (choice)"}
    for share, mark in sorted(marked.items()):
        loss = shares.get(share, choice.predicted)
        tokens = f"{share * choice.budget_tokens:,.0f}"
        grid.add_row(f"{share:.3f}{mark or (' (no split)' if share == 1.0 else '')}", tokens,
                     f"{loss:.4f}")  # fmt: skip
    Console().print(grid)
    low, high = (tokens / choice.budget_tokens for tokens in choice.trunk_interval)
    typer.echo(
        f"{choice.law}: {choice.params:,.0f} params, {choice.budget_tokens:,.0f} tokens, "
        f"{choice.branches} branches of {choice.branch_tokens:,.0f}; "
        f"{choice.level:.0%} interval of the share {low:.3f} to {high:.3f}, "
        f"of the loss {choice.interval[0]:.4f} to {choice.interval[1]:.4f}"
    )
    low, high = choice.multiplier_interval
    typer.echo(
        f"without a split the same loss takes {choice.multiplier:.2f} times the tokens "
        f"({low:.2f} to {high:.2f}); splitting pays from {choice.split_from_tokens:,.0f} trunk "
        f"tokens on ({choice.split_from_interval[0]:,.0f} to {choice.split_from_interval[1]:,.0f})"
    )
    warn(choice.warnings)

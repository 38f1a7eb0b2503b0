"""Stage 1, corpus: how far a build is, on a terminal as a bar and elsewhere as log lines."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)
SECONDS_PER_LINE = 10.0


@contextmanager
def progress(label: str, total_bytes: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """Show work on text; yields `advance(num_documents, num_bytes)`.

    Args:
        label: What is being done.
        total_bytes: Bytes of text to do, None if unknown (then there is no ETA).
    """
    console = Console(stderr=True)
    begun = said = time.monotonic()
    documents = done = 0
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(), console=console, disable=not console.is_terminal, transient=True,
    )  # fmt: skip
    task = bar.add_task(label, total=total_bytes, facts="")

    def facts() -> str:
        rate = done / 1e6 / max(time.monotonic() - begun, 1e-9)
        of = f"/{total_bytes / 1e6:.1f}" if total_bytes else ""
        return f"{documents} documents, {done / 1e6:.1f}{of} MB, {rate:.1f} MB/s"

    def advance(num_documents: int, num_bytes: int) -> None:
        nonlocal documents, done, said
        documents, done = documents + num_documents, done + num_bytes
        now = time.monotonic()
        if console.is_terminal:
            bar.update(task, completed=done, facts=facts())
        elif now - said > SECONDS_PER_LINE:
            said = now
            left = (now - begun) * (total_bytes - done) / done if total_bytes and done else None
            log.info("%s: %s%s", label, facts(), f", ETA {left:.0f} s" if left else "")

    with bar:
        yield advance
    log.info("%s: %s, done in %.1f s", label, facts(), time.monotonic() - begun)

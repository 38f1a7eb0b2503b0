"""The live progress line of a sweep: done/total, failures, tokens/s, time left."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rayx.errors import StoreError
from rayx.store import Store

log = logging.getLogger(__name__)

LOG_SECONDS = 15.0  # between plain lines, where the output is not a terminal
COMPACT_SECONDS = 60.0


def duration(seconds: float) -> str:
    """Return seconds as `1h02m`, `3m20s` or `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def progress_line(state: dict) -> str:
    """Return one line on what `Store.progress` says."""
    ended = state["ok"] + state["failed"]
    line = f"{ended}/{state['total']} runs"
    if state["failed"]:
        line += f", {state['failed']} failed"
    new_tokens = state["tokens"] - state["tokens_before"]
    if new_tokens > 0 and state["seconds"] > 0:
        rate = new_tokens / state["seconds"]
        line += f", {rate:,.0f} tokens/s"
        if ended < state["total"]:
            line += f", {duration((state['tokens_total'] - state['tokens']) / rate)} left"
    return line


class Watcher(threading.Thread):
    """Writes the driver's heartbeat, shows progress and compacts, until told to stop."""

    def __init__(self, store: Store, heartbeat: Callable[[], None]) -> None:
        super().__init__(daemon=True, name="rayx-progress")
        self.store = store
        self.heartbeat = heartbeat
        self._end = threading.Event()

    def run(self) -> None:
        """Look at the store again and again; its listing paces the loop."""
        console = Console(stderr=True)
        columns = (TextColumn("sweep"), BarColumn(), TextColumn("{task.description}"))
        shown_at = compacted_at = time.monotonic()
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("starting workers", total=None)
            pause = 0.0
            while not self._end.wait(pause):
                began = time.monotonic()
                try:
                    self.heartbeat()
                    state = self.store.progress()
                    if began - compacted_at > COMPACT_SECONDS:
                        compacted_at = began
                        self.store.compact()
                except StoreError as error:
                    log.warning("progress: %s", error)
                    continue
                finally:
                    pause = max(1.0, 10 * (time.monotonic() - began))
                line = progress_line(state)
                bar.update(
                    task, description=line, completed=state["tokens"], total=state["tokens_total"]
                )
                if not console.is_terminal and began - shown_at > LOG_SECONDS:
                    shown_at = began
                    log.info("%s", line)

    def stop(self) -> None:
        """End the thread and wait for it."""
        self._end.set()
        self.join()

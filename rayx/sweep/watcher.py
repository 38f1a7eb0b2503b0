"""The driver's heartbeat, and the live line of a sweep: done, failures, tokens/s, time left."""

from __future__ import annotations

import logging
import threading
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from rayx.errors import StoreError
from rayx.progress import progress, progress_line
from rayx.store import Store

log = logging.getLogger(__name__)

LOG_SECONDS = 15.0  # between plain lines, where the output is not a terminal
COMPACT_SECONDS = 60.0
BEAT_SECONDS = 5.0  # between heartbeats of the driver


class Watcher(threading.Thread):
    """Writes the driver's heartbeat, shows progress and compacts, until told to stop."""

    def __init__(self, store: Store, sweep_id: str) -> None:
        super().__init__(daemon=True, name="rayx-progress")
        self.store = store
        self.sweep_id = sweep_id
        self._end = threading.Event()
        self._moved: float | None = None  # when a pack last gave a sign of life
        self._heart = threading.Thread(target=self._beat, daemon=True, name="rayx-heartbeat")

    def _beat(self) -> None:
        """Write the heartbeat, however long a look at the store or a compaction takes."""
        while True:
            try:
                self.store.beat(f"drivers/{self.sweep_id}", state="running", moved=self._moved)
            except (StoreError, OSError) as error:
                log.warning("heartbeat: %s", error)
            if self._end.wait(BEAT_SECONDS):
                return

    def run(self) -> None:
        """Look at the store again and again; its listing paces the loop."""
        self._heart.start()
        before = None
        console = Console(stderr=True)
        columns = (TextColumn("sweep"), BarColumn(), TextColumn("{task.description}"))
        shown_at = compacted_at = time.monotonic()
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("starting workers", total=None)
            pause = 0.0
            while not self._end.wait(pause):
                began = time.monotonic()
                try:
                    state = progress(self.store, self.sweep_id)
                    if began - compacted_at > COMPACT_SECONDS:
                        compacted_at = began
                        self.store.compact()
                except (StoreError, OSError) as error:  # a slow store must not end the heartbeat
                    log.warning("progress: %s", error)
                    continue
                finally:
                    pause = min(10.0, max(1.0, 10 * (time.monotonic() - began)))
                done = state["ok"], state["failed"], state["tokens"]
                if state["running"] or before not in (None, done):
                    self._moved = time.time()
                before = done
                line = progress_line(state)
                bar.update(
                    task, description=line, completed=state["tokens"], total=state["tokens_total"]
                )
                if not console.is_terminal and began - shown_at > LOG_SECONDS:
                    shown_at = began
                    log.info("%s", line)

    def stop(self) -> None:
        """End both threads and wait for them, so that no heartbeat comes after this."""
        self._end.set()
        self.join()
        self._heart.join()

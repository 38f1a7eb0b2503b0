"""How far the sweeps in a store are, read from the store alone."""

from __future__ import annotations

import logging
import time
from typing import Any

from rayx.recipe import is_int, is_number
from rayx.store import Store

log = logging.getLogger(__name__)

ALIVE_SECONDS = 30.0  # a heartbeat older than this means that its process is gone


def progress(store: Store, sweep_id: str | None = None) -> dict[str, Any]:
    """Return what one sweep, or all sweeps in a store, are doing.

    Returns:
        `total`, `ok`, `failed`, `running` (runs in live packs), `tokens` (done, with those of live
        packs), `tokens_total`, `alive` (a driver's heartbeat is fresh), and of the latest sweep
        `new_tokens` (done since it began) and `seconds` (up to its last heartbeat).
    """
    now = time.time()
    wanted: dict[str, Any] = {}
    alive, seconds = False, 0.0
    latest: dict[str, Any] = {"started": 0.0, "tokens": {}, "tokens_before": 0}
    for name in store.names("sweeps") if sweep_id is None else [sweep_id]:
        sweep = _facts(store, f"sweeps/{name}", tokens=dict, started=float, tokens_before=int)
        if sweep is None:
            continue
        wanted |= {run: count for run, count in sweep["tokens"].items() if is_int(count)}
        starting = {"state": "starting", "time": sweep["started"]}
        driver = _facts(store, f"drivers/{name}", state=str, time=float) or starting
        alive |= driver["state"] != "stopped" and now - driver["time"] < ALIVE_SECONDS
        if sweep["started"] > latest["started"]:
            latest, seconds = sweep, max(0.0, driver["time"] - sweep["started"])
    status = {run: state for run, state in store.status().items() if run in wanted}
    done = {run: wanted[run] for run in status}
    for name in store.names("heartbeats"):
        beat = _facts(store, f"heartbeats/{name}", runs=list, tokens_per_run=int, time=float)
        if beat is not None and now - beat["time"] < ALIVE_SECONDS:
            live = (run for run in map(str, beat["runs"]) if run in wanted and run not in status)
            done |= dict.fromkeys(live, beat["tokens_per_run"])
    new_tokens = sum(done.get(run, 0) for run in latest["tokens"]) - latest["tokens_before"]
    return {
        "total": len(wanted),
        "ok": sum(state == "ok" for state in status.values()),
        "failed": sum(state == "failed" for state in status.values()),
        "running": len(done) - len(status),
        "tokens": sum(done.values()),
        "tokens_total": sum(wanted.values()),
        "alive": alive,
        "new_tokens": new_tokens,
        "seconds": seconds,
    }


def _facts(store: Store, name: str, **kinds: Any) -> dict[str, Any] | None:
    """Return what a file of the sweep says, or None where it is missing or was tampered with."""
    data: Any = store.facts(f"{name}.json")
    if data is None:
        return None
    if isinstance(data, dict) and all(_is(kind, data.get(f)) for f, kind in kinds.items()):
        return data
    log.warning("%s.json of store %r is damaged and left out", name, store.url)
    return None


def _is(kind: type, value: object) -> bool:
    if kind is float:
        return is_number(value)
    return is_int(value) if kind is int else isinstance(value, kind)


def duration(seconds: float) -> str:
    """Return seconds as `1h02m`, `3m20s` or `12s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"


def progress_line(state: dict) -> str:
    """Return one line on what `progress` says."""
    ended = state["ok"] + state["failed"]
    line = f"{ended}/{state['total']} runs"
    if state["failed"]:
        line += f", {state['failed']} failed"
    if state["new_tokens"] > 0 and state["seconds"] > 0:
        rate = state["new_tokens"] / state["seconds"]
        line += f", {rate:,.0f} tokens/s"
        if ended < state["total"]:
            line += f", {duration((state['tokens_total'] - state['tokens']) / rate)} left"
    return line

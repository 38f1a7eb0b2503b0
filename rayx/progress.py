"""How far the sweeps in a store are, read from the store alone."""

from __future__ import annotations

import logging
import time
from typing import Any

from rayx.recipe import is_int, is_number
from rayx.store import Store

log = logging.getLogger(__name__)

# A heartbeat older than this means that its process is gone. It carries its writer's clock, so the
# clocks of the nodes may differ by as much less the few seconds between heartbeats.
ALIVE_SECONDS = 30.0
STALLED_SECONDS = 120.0  # without a sign of life of any pack, while the driver lives


def progress(store: Store, sweep_id: str | None = None) -> dict[str, Any]:
    """Return what one sweep, or all sweeps in a store, are doing.

    Returns:
        `total`, `ok`, `failed`, `running` (runs in live packs), `tokens` (done, with those of live
        packs), `tokens_total`, `alive` (a driver's heartbeat is fresh), and of the sweep that is
        alive, or else of the latest, `state`, `seen` (its driver's last heartbeat, in seconds since
        the epoch), `new_tokens` (done since it began) and `seconds` (up to `seen`). `state` is
        `starting`, `running` or `stalled` (no pack gave a sign for STALLED_SECONDS) while the
        driver is alive, else `finished`, `stopped`, or `dead` where the driver could not say so.
    """
    now = time.time()
    wanted: dict[str, Any] = {}
    latest: dict[str, Any] = {"started": 0.0, "tokens": {}, "tokens_before": 0}
    last: dict[str, Any] = {"state": "stopped", "time": 0.0}
    alive = False
    for name in store.names("sweeps") if sweep_id is None else [sweep_id]:
        sweep = _facts(store, f"sweeps/{name}", tokens=dict, started=float, tokens_before=int)
        if sweep is None:
            continue
        wanted |= {run: count for run, count in sweep["tokens"].items() if is_int(count)}
        starting = {"state": "starting", "time": sweep["started"]}
        driver = _facts(store, f"drivers/{name}", state=str, time=float) or starting
        # A time far ahead is of a wrong clock: it must not look fresh for hours.
        lives = driver["state"] != "stopped" and abs(now - driver["time"]) < ALIVE_SECONDS
        if (lives, sweep["started"]) > (alive, latest["started"]):
            alive, latest, last = lives, sweep, driver
    status = {run: state for run, state in store.status().items() if run in wanted}
    done = {run: wanted[run] for run in status}
    for name in store.names("heartbeats"):
        beat = _facts(store, f"heartbeats/{name}", runs=list, tokens_per_run=int, time=float)
        if beat is not None and abs(now - beat["time"]) < ALIVE_SECONDS:
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
        "state": _state(last, alive, ended=latest["tokens"].keys() <= status.keys()),
        "seen": last["time"],
        "new_tokens": new_tokens,
        "seconds": max(0.0, last["time"] - latest["started"]),
    }


def _state(driver: dict[str, Any], alive: bool, ended: bool) -> str:
    if alive:
        moved = driver.get("moved")  # by the same clock as "time"
        if not is_number(moved):
            return "starting"
        return "stalled" if driver["time"] - moved > STALLED_SECONDS else "running"
    if ended:
        return "finished"
    return "stopped" if driver["state"] == "stopped" else "dead"


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


def state_line(state: dict) -> str:
    """Return what `progress` says of the driver, and since when."""
    ago = duration(max(0.0, time.time() - state["seen"]))
    word: str = state["state"]
    return {
        "stalled": "stalled: the driver lives, but no run moves; see Ray's logs and free resources",
        "stopped": "stopped; run it again to go on",
        "dead": f"dead: last sign of life {ago} ago; run it again to go on",
    }.get(word, word)


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

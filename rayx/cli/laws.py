"""`rayx law`: from runs at several scales to a law, its intervals and its extrapolation error."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from rayx.cli.options import JsonOption, SeedOption, parse_numbers
from rayx.cli.output import check_folder, grid_of, warn, work_progress
from rayx.errors import FitError, SpecError, did_you_mean
from rayx.fit.laws import Law, LawTable, choose_law, extrapolate, laws
from rayx.store import open_store

INTERVAL = 0.95


def law(
    store: Annotated[
        str | None,
        typer.Argument(help="A store, with --target; or give --runs.", metavar="[STORE]"),
    ] = None,
    runs: Annotated[
        str | None, typer.Option(help="CSV: params, tokens, loss, weight/<domain> …")
    ] = None,
    name: Annotated[str, typer.Option("--law", help="auto, or one of the laws.")] = "auto",
    target: Annotated[str | None, typer.Option(help="Whose loss, with a store.")] = None,
    rename: Annotated[
        str | None, typer.Option(help="Columns by other names: N=params,D=tokens,…")
    ] = None,
    group: Annotated[
        str | None, typer.Option(help="Column of the run, where rows are points of curves.")
    ] = None,
    drop_highest: Annotated[
        int, typer.Option(min=0, help="Leave out the runs with the highest losses.")
    ] = 0,
    bootstrap: Annotated[int, typer.Option(min=0, help="Replicates for intervals.")] = 200,
    at: Annotated[
        str | None, typer.Option(help="Predict there: params=7e9,tokens=1.4e11,…")
    ] = None,
    plot: Annotated[str | None, typer.Option(help="Write a figure to this PNG.")] = None,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit a law over scale; show its parameters with intervals, and how well it extrapolates.

    `auto` tries every law whose columns are there, and takes the one that predicts the largest
    runs best when it is fitted without them.

    Example: `rayx law --law chinchilla --runs runs.csv --drop-highest 5 --bootstrap 1000 --json`
    """
    started = time.perf_counter()
    if name not in ("auto", *laws()):
        raise SpecError(f"No law {name!r}.{did_you_mean(name, laws())} Laws: {', '.join(laws())}.")
    if plot:
        check_folder(plot)
    table = _table(store, runs, target, rename, group)
    settings: dict[str, Any] = {"drop_highest": drop_highest, "bootstrap": bootstrap, "seed": seed}
    tried: dict[str, Any] = {}
    with work_progress("fit", "regressors") as shown:
        if name == "auto":
            candidates = {
                n: make(**settings)
                for n, make in laws().items()
                if all(column in table.columns for column in make.inputs)
            }
            if not candidates:
                raise FitError(
                    f"No law fits the columns {', '.join(table.columns)}; laws take params, "
                    "tokens, spec_tokens, ratio, weight/<domain> … Use --rename, e.g. "
                    "N=params,D=tokens."
                )
            name, tried, failed = choose_law(candidates, table.columns, table.domains, shown)
            table = _warned(table, [f"{n} was not tried: {why}" for n, why in failed.items()])
        chosen = laws()[name](**settings)
        arrays = table.arrays(chosen)
        shown(0, 1, f"{name}, {bootstrap} replicates")
        chosen.fit(*arrays, domains=table.named(chosen), groups=table.groups)
    notes = [*table.warnings, *chosen.warnings_]
    try:
        found = tried[name] if tried else extrapolate(chosen, *arrays)
        notes += found.warnings
    except FitError as error:
        found = None
        notes.append(f"extrapolation is not checked: {error}")
    result = {
        "law": name,
        "params": chosen.params_,
        "intervals": chosen.intervals_,
        "objective": chosen.objective_,
        "rows": chosen.rows_,
        "dropped": chosen.dropped_,
        "extrapolation": dataclasses.asdict(found) if found else None,
        "tried": {n: dataclasses.asdict(e) for n, e in tried.items()},
        "warnings": notes,
    }
    if at:
        result["at"] = _predict(chosen, table, parse_numbers("--at", at))
    if plot:
        from rayx.law_plots import write_law_figure

        write_law_figure(chosen, arrays, plot, found)
    result["seconds"] = time.perf_counter() - started
    if as_json:
        return typer.echo(json.dumps(result))
    _show(result)


def _table(
    store: str | None, runs: str | None, target: str | None, rename: str | None, group: str | None
) -> LawTable:
    if store and target and not (runs or rename or group):
        found = open_store(store).runs()
        merged = found["kind"] == "merge"  # they have no scale of their own
        law_table = LawTable.from_runs(found.loc[~merged], target)
        left = [f"{merged.sum()} merged runs were left out: a law is of trained ones"]
        return _warned(law_table, left) if merged.any() else law_table
    if runs and not (store or target):
        return LawTable.from_csv(runs, parse_names("--rename", rename) if rename else None, group)
    raise SpecError("Give --runs RUNS.csv, or a STORE with --target NAME; not both.")


def parse_names(option: str, text: str) -> dict[str, str]:
    """Parse `name=name,name=name`."""
    pairs = [part.partition("=") for part in text.split(",")]
    for old, _, new in pairs:
        if not old.strip() or not new.strip():
            raise SpecError(f"{option} has {text!r}; expected name=name, separated by commas.")
    return {old.strip(): new.strip() for old, _, new in pairs}


def _warned(table: LawTable, notes: list[str]) -> LawTable:
    return dataclasses.replace(table, warnings=(*table.warnings, *notes))


def _predict(chosen: Law, table: LawTable, point: dict[str, float]) -> dict[str, Any]:
    """Loss at a point with its interval, and how far it is beyond the runs."""
    columns = []
    for name in chosen.inputs:
        wanted = [f"weight/{d}" for d in table.domains] if name == "weights" else [name]
        missing = [key for key in wanted if key not in point]
        if missing:
            raise SpecError(f"--at has no {missing[0]}, which the law {chosen.name} needs.")
        values = np.array([[point[key] for key in wanted]])
        columns.append(values if name == "weights" else values[0])
    predicted: dict[str, Any] = {**point, "reach": float(chosen.reach(*columns)[0])}
    if chosen.bootstrap:
        loss_M, low_M, high_M = chosen.predict(*columns, interval=INTERVAL)
        return predicted | {"loss": loss_M[0], "low": low_M[0], "high": high_M[0]}
    raise SpecError("--at needs --bootstrap: no extrapolation without an interval.")


def _show(result: dict[str, Any]) -> None:
    console = Console()
    grid = grid_of("", result["law"], "95% interval")
    for parameter, value in result["params"].items():
        interval = result["intervals"].get(parameter)
        shown = f"{interval[0]:.5g} to {interval[1]:.5g}" if interval else ""
        grid.add_row(parameter, f"{value:.6g}", shown)
    console.print(grid)
    typer.echo(
        f"{result['rows']} runs, {result['dropped']} dropped; objective {result['objective']:.6g}; "
        f"{result['seconds']:.1f} s"
    )
    checked = result["tried"] or {result["law"]: result["extrapolation"]}
    if checked[result["law"]]:
        grid = grid_of("", "error in sample", "error on the largest runs", "runs", "wrong form")
        for name, found in sorted(checked.items(), key=lambda item: item[1]["error"]):
            errors = (f"{found[key]:.2%}" for key in ("in_sample", "error"))
            flag = "yes" if found["wrong_form"] else "no"
            grid.add_row(name, *errors, str(found["rows"]), flag)
        console.print(grid)
    if point := result.get("at"):
        typer.echo(
            f"predicted loss {point['loss']:.4f}, {INTERVAL:.0%} interval {point['low']:.4f} to "
            f"{point['high']:.4f}; {point['reach']:.3g} times the largest run"
        )
    warn(result["warnings"])

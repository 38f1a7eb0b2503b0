"""`rayx fit`, `plan` and `report`: from records, or a CSV, to a page."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console

from rayx.choose import Choice
from rayx.cli.options import (
    JsonOption,
    LossesOption,
    NameOption,
    RegressorOption,
    SeedOption,
    StoreArgument,
    StoreOrNone,
    WeightsOption,
    read_table,
)
from rayx.cli.output import check_folder, grid_of, say, warn, work_progress, write_text
from rayx.errors import UNREADABLE, FitError, SpecError
from rayx.fit import Table, evaluate_fit, fit_table, join_kinds, largest_scale
from rayx.report import render
from rayx.store import Store, open_store


def fit(
    store: StoreOrNone = None,
    weights: WeightsOption = None,
    losses: LossesOption = None,
    test_weights: Annotated[str | None, typer.Option(help="CSV of test mixtures.")] = None,
    test_losses: Annotated[str | None, typer.Option(help="CSV of test losses.")] = None,
    regressor: RegressorOption = "auto",
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Fit loss as a function of the mixture; show cross-validation, and the test where given.

    Example: `rayx fit --weights w.csv --losses l.csv --regressor auto --json`
    """
    if (test_weights is None) != (test_losses is None):
        raise SpecError("--test-weights and --test-losses go together; give both or neither.")
    table = read_table(store, weights, losses)
    test = Table.from_csv(test_weights, test_losses) if test_weights and test_losses else None
    with work_progress("fit", "regressors") as shown:
        result = evaluate_fit(table, test, regressor, seed, shown)
    if table.joint:
        result["kinds"] = table.joint.to_json()
    if as_json:
        return typer.echo(json.dumps(result))
    warn(table.warnings)
    columns = ["target", "regressor", "cv spearman", "cv r2"]
    columns += ["test spearman", "test mse", "top-1 regret"] if test else []
    grid = grid_of(*columns)
    for target, found in result["targets"].items():
        row = [target, found["regressor"], *(f"{found['cv'][k]:.4f}" for k in ("spearman", "r2"))]
        row += [f"{value:.4g}" for value in found.get("test", {}).values()]
        grid.add_row(*row)
    Console().print(grid)
    mean = ", ".join(f"{name} {value:.4f}" for name, value in result["mean"].items())
    say(f"mean of {len(result['targets'])} targets: {mean}; {result['seconds']:.1f} s")


def plan(
    store: StoreArgument,
    name: NameOption = None,
    out: Annotated[str | None, typer.Option(help="Also write it to this file.")] = None,
) -> None:
    """Print a plan as JSON: the schedule of the final run with its evidence; it stands alone.

    Example: `rayx plan runs/quickstart --out plan.json`
    """
    opened = open_store(store)
    text = json.dumps(_read(opened, "plans", _only(opened, "plans", name)), indent=2)
    if out:
        write_text(out, text)
    typer.echo(text)


def report(
    store: StoreArgument,
    name: NameOption = None,
    out: Annotated[str, typer.Option(help="The page to write.")] = "report.html",
) -> None:
    """Write one self-contained HTML page: choice, evidence, curves, cost, failures.

    Example: `rayx report runs/quickstart --out report.html`
    """
    opened = open_store(store)
    check_folder(out)
    if name or opened.names("choices"):
        name = _only(opened, "choices", name)
    found = {
        folder: _read(opened, folder, name) if name and name in opened.names(folder) else None
        for folder in ("choices", "verifications", "plans")
    }
    choice = Choice.from_json(json.dumps(found["choices"])) if found["choices"] else None
    plan, runs = found["plans"], opened.runs()
    try:
        fitted_runs = list(plan["provenance"]["run_ids"] if plan else largest_scale(runs)["run_id"])
        caps = dict(plan["caps"]) if plan else None
    except UNREADABLE as error:
        raise SpecError(
            f"Plan {name!r} of store {store!r} is damaged: {error!r}. Make it again: rayx choose."
        ) from error
    try:
        table = join_kinds(runs.loc[runs["run_id"].isin(fitted_runs)])
        with work_progress("fit", "regressors") as shown:
            fitted = fit_table(table, progress=shown)
    except FitError as error:  # too few runs yet: the page says what there is
        warn([f"nothing could be fitted: {error}"])
        fitted = None
    title = f"rayx: {name}" if name else "rayx report"
    write_text(out, render(opened, fitted, choice, found["verifications"], plan, title, caps))
    typer.echo(out)


def _read(store: Store, folder: str, name: str) -> Any:
    try:
        return store.read_json(f"{folder}/{name}.json")
    except ValueError as error:
        raise SpecError(
            f"{folder}/{name}.json of store {store.url!r} is damaged: {error}. Make it again."
        ) from error


def _only(store: Store, folder: str, name: str | None) -> str:
    names = store.names(folder)
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        known = ", ".join(names) or "none"
        asked = f"no {name!r}" if name else "more than one or none"
        raise SpecError(f"Store {store.url!r} has {asked} in {folder} ({known}); give --name.")
    return name

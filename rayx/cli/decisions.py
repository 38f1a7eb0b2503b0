"""`rayx fit`, `choose`, `plan` and `report`: from records, or a CSV, to a plan."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from rayx.caps import supply_caps
from rayx.choose import Choice, Constraints
from rayx.choose import choose as choose_mixture
from rayx.cli.options import (
    JsonOption,
    LossesOption,
    NameOption,
    RegressorOption,
    SeedOption,
    StoreArgument,
    StoreOrNone,
    WeightsOption,
)
from rayx.cli.output import check_folder, fit_progress, grid_of, show_choice, warn, write_text
from rayx.corpus import Corpus
from rayx.errors import FitError, SpecError
from rayx.fit import Table, evaluate_fit, fit_table, largest_scale, normalised_objective
from rayx.plan import Plan
from rayx.report import render
from rayx.store import Store, open_store


def _table(store: str | None, weights: str | None, losses: str | None) -> Table:
    """Read the table from a store, or from two CSV files."""
    if store and not (weights or losses):
        return Table.from_frame(largest_scale(open_store(store).runs()))
    if weights and losses and not store:
        return Table.from_csv(weights, losses)
    raise SpecError("Give a STORE, or --weights and --losses; not both and not one of the two.")


def parse_numbers(option: str, text: str) -> dict[str, float]:
    """Parse `name=number,name=number`."""
    result = {}
    for part in text.split(","):
        name, equals, number = part.rpartition("=")
        try:
            result[name.strip()] = float(number)
        except ValueError:
            equals = ""
        if not equals or not name.strip():
            raise SpecError(f"{option} has {part!r}; expected name=number, separated by commas.")
    return result


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
    table = _table(store, weights, losses)
    test = Table.from_csv(test_weights, test_losses) if test_weights and test_losses else None
    with fit_progress() as shown:
        result = evaluate_fit(table, test, regressor, seed, shown)
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
    typer.echo(f"mean of {len(result['targets'])} targets: {mean}; {result['seconds']:.1f} s")


def choose(
    store: StoreOrNone = None,
    weights: WeightsOption = None,
    losses: LossesOption = None,
    objective: Annotated[
        str | None, typer.Option(help="target=weight,… [default: all alike]")
    ] = None,
    prior: Annotated[
        str | None, typer.Option(help="domain=weight,… [default: supply, or uniform]")
    ] = None,
    caps: Annotated[str | None, typer.Option(help="domain=largest share,…")] = None,
    floors: Annotated[str | None, typer.Option(help="domain=least share,…")] = None,
    corpus: Annotated[str | None, typer.Option(help="Corpus whose supply caps the shares.")] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens of the final run, with --corpus.")
    ] = None,
    max_epochs: Annotated[float, typer.Option(help="Passes over a domain, with --corpus.")] = 4.0,
    regressor: RegressorOption = "auto",
    seed: SeedOption = 0,
    name: Annotated[str, typer.Option(help="Name of the choice and plan in the store.")] = "choice",
    as_json: JsonOption = False,
) -> None:
    """Choose a mixture under constraints; a store keeps the choice and, with --corpus, a plan.

    Example: `rayx choose runs/mine --objective docs=2,wiki=1 --corpus data/mine --tokens 2e9`
    """
    if (corpus is None) != (tokens is None):
        raise SpecError("--corpus and --tokens go together: caps are epochs * supply / tokens.")
    table = _table(store, weights, losses)
    limits = parse_numbers("--caps", caps) if caps else {}
    supply: dict[str, float] = dict.fromkeys(table.domains, 1.0)
    opened = Corpus.load(corpus) if corpus else None
    if opened is not None and tokens is not None:
        missing = [d for d in table.domains if d not in opened.domains]
        if missing:
            raise SpecError(f"Corpus {corpus} has no domain {missing[0]!r}, which the runs have.")
        supply = {d: float(opened.tokens[d]) for d in table.domains}
        for domain, cap in supply_caps(supply, tokens, max_epochs).items():
            limits[domain] = min(cap, limits.get(domain, 1.0))
    # All that can be wrong is found before the time of the fit is spent.
    constraints = Constraints.by_name(
        table.domains, parse_numbers("--floors", floors) if floors else None, limits
    )
    goal = (
        parse_numbers("--objective", objective) if objective else dict.fromkeys(table.targets, 1.0)
    )
    goal = normalised_objective(goal, table.targets)
    centre = parse_numbers("--prior", prior) if prior else supply
    kept = open_store(store) if store else None
    if kept is not None and kept.exists(f"choices/{name}.json"):
        warn([f"the choice {name!r} in the store is replaced"])
    with fit_progress() as shown:
        fitted = fit_table(table, regressor, seed, shown)
    choice = choose_mixture(fitted, goal, centre, constraints, seed=seed)
    if kept is not None:
        kept.write_bytes(f"choices/{name}.json", choice.to_json().encode())
        if opened is not None and tokens is not None:
            plan = Plan.of(choice, opened, int(tokens), limits, kept, table.run_ids)
            kept.write_json(f"plans/{name}.json", plan.to_json())
    if as_json:
        return typer.echo(choice.to_json())
    show_choice(choice)


def plan(
    store: StoreArgument,
    name: NameOption = None,
    out: Annotated[str | None, typer.Option(help="Also write it to this file.")] = None,
) -> None:
    """Print a plan as JSON: the schedule of the final run with its evidence; it stands alone.

    Example: `rayx plan runs/quickstart --out plan.json`
    """
    opened = open_store(store)
    text = json.dumps(opened.read_json(f"plans/{_only(opened, 'plans', name)}.json"), indent=2)
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
        folder: opened.read_json(f"{folder}/{name}.json") if name in opened.names(folder) else None
        for folder in ("choices", "verifications", "plans")
    }
    choice = Choice.from_json(json.dumps(found["choices"])) if found["choices"] else None
    plan, runs = found["plans"], opened.runs()
    fitted_runs = plan["provenance"]["run_ids"] if plan else largest_scale(runs)["run_id"]
    try:
        table = Table.from_frame(runs.loc[runs["run_id"].isin(fitted_runs)])
        with fit_progress() as shown:
            fitted = fit_table(table, progress=shown)
    except FitError as error:  # too few runs yet: the page says what there is
        warn([f"nothing could be fitted: {error}"])
        fitted = None
    title = f"rayx: {name}" if name else "rayx report"
    caps = plan["caps"] if plan else None
    write_text(out, render(opened, fitted, choice, found["verifications"], plan, title, caps))
    typer.echo(out)


def _only(store: Store, folder: str, name: str | None) -> str:
    names = store.names(folder)
    if name is None and len(names) == 1:
        return names[0]
    if name not in names:
        known = ", ".join(names) or "none"
        asked = f"no {name!r}" if name else "more than one or none"
        raise SpecError(f"Store {store.url!r} has {asked} in {folder} ({known}); give --name.")
    return name

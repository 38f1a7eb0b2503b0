"""`rayx choose`: a mixture, or the front between targets, under constraints."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer
from rich.console import Console

from rayx.caps import supply_caps
from rayx.choice.pareto import FrontPoint, pareto_front
from rayx.choice.problem import prepare
from rayx.choose import CHOOSERS, Constraints, Group, Supply
from rayx.choose import choose as choose_mixture
from rayx.cli.options import (
    JsonOption,
    LossesOption,
    RegressorOption,
    SeedOption,
    StoreOrNone,
    WeightsOption,
    number_of,
    parse_numbers,
    parse_pairs,
    read_table,
)
from rayx.cli.output import grid_of, show_choice, warn, work_progress
from rayx.corpus import Corpus
from rayx.errors import SpecError, did_you_mean
from rayx.fit import Table, fit_table, normalised_objective
from rayx.plan import Plan
from rayx.store import open_store

PROPORTIONAL = "proportional"


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
    fix: Annotated[str | None, typer.Option(help="domain=its share,…")] = None,
    groups: Annotated[
        str | None, typer.Option(help="a+b=least:largest,… or a+b=share: of the sum over domains.")
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option(help="target=largest loss,… or target=proportional or proportional+0.01."),
    ] = None,
    method: Annotated[
        str, typer.Option(help="simulate: average the best; convex: solve, with KL to the prior.")
    ] = "simulate",
    pareto: Annotated[
        str | None, typer.Option(help="Print the front between targets, or a+b,c: groups of them.")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="Corpus whose supply caps the shares.")] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Tokens of the final run, with --corpus or --discount.")
    ] = None,
    max_epochs: Annotated[float, typer.Option(help="Passes over a domain, with --corpus.")] = 4.0,
    discount: Annotated[
        str | None,
        typer.Option(help="Price repetition: domain=tokens there are,… or 'corpus'."),
    ] = None,
    regressor: RegressorOption = "auto",
    seed: SeedOption = 0,
    name: Annotated[str, typer.Option(help="Name of the choice and plan in the store.")] = "choice",
    as_json: JsonOption = False,
) -> None:
    """Choose a mixture under constraints; a store keeps the choice and, with --corpus, a plan.

    Example: `rayx choose runs/mine --objective docs=2,wiki=1 --corpus data/mine --tokens 2e9`
    """
    if corpus is not None and tokens is None:
        raise SpecError("--corpus and --tokens go together: caps are epochs * supply / tokens.")
    if tokens is not None and corpus is None and discount is None:
        raise SpecError("--corpus and --tokens go together; or --discount and --tokens.")
    if method not in CHOOSERS:
        raise SpecError(
            f"--method is {method!r}; expected one of {', '.join(CHOOSERS)}."
            f"{did_you_mean(method, CHOOSERS)}"
        )
    table = read_table(store, weights, losses)
    limits = parse_numbers("--caps", caps)
    supply: dict[str, float] = dict.fromkeys(table.domains, 1.0)
    opened = Corpus.load(corpus) if corpus else None
    if opened is not None and tokens is not None:
        missing = [d for d in table.domains if d not in opened.domains and not opened.selection(d)]
        if missing:
            raise SpecError(f"Corpus {corpus} has no domain {missing[0]!r}, which the runs have.")
        supply = {d: float(opened.tokens[d]) for d in table.domains}
        for domain, cap in supply_caps(supply, tokens, max_epochs).items():
            limits[domain] = min(cap, limits.get(domain, 1.0))
    # All that can be wrong is found before the time of the fit is spent.
    constraints = Constraints.by_name(
        table.domains,
        parse_numbers("--floors", floors),
        limits,
        parse_numbers("--fix", fix),
        parse_groups(groups) if groups else (),
    )
    goal = parse_numbers("--objective", objective) or dict.fromkeys(table.targets, 1.0)
    goal = normalised_objective(goal, table.targets)
    centre = parse_numbers("--prior", prior) or supply
    largest, tolerances = parse_keep(keep, table) if keep else ({}, {})
    priced = _supply(discount, tokens, supply if opened else None, table) if discount else None
    goals = parse_goals(pareto, table) if pareto else None
    kept = open_store(store) if store else None
    if kept is not None:
        kept.exists(f"choices/{name}.json")  # refuses a name that leads out of the store
    with work_progress("fit", "regressors") as shown:
        fitted = fit_table(table, regressor, seed, shown)
    if goals is not None:
        problem = prepare(
            fitted, goal, centre, constraints, limits=largest, tolerances=tolerances, supply=priced
        )
        front = pareto_front(problem, goals, seed=seed)
        if as_json:
            return typer.echo(json.dumps({"front": [dataclasses.asdict(p) for p in front]}))
        return show_front(front)
    choice = choose_mixture(
        fitted,
        goal,
        centre,
        constraints,
        seed=seed,
        method=CHOOSERS[method](),
        limits=largest,
        tolerances=tolerances,
        supply=priced,
    )
    if kept is not None:
        if kept.exists(f"choices/{name}.json"):
            warn([f"the choice {name!r} in the store is replaced"])
        kept.write_bytes(f"choices/{name}.json", choice.to_json().encode())
        if opened is not None and tokens is not None:
            plan = Plan.of(choice, opened, int(tokens), limits, kept, table.run_ids)
            kept.write_json(f"plans/{name}.json", plan.to_json())
    if as_json:
        return typer.echo(choice.to_json())
    show_choice(choice, opened)


def parse_groups(text: str) -> list[Group]:
    """Parse `a+b=0.2:0.5,c+d=0.3`."""
    form = "a+b=least:largest or a+b=share"
    result = []
    for names, bounds in parse_pairs("--groups", text, form).items():
        low, colon, high = bounds.partition(":")
        numbers = [number_of("--groups", part, form) for part in ([low, high] if colon else [low])]
        domains = tuple(name.strip() for name in names.split("+"))
        result.append(Group(domains, numbers[0], numbers[-1]))
    return result


def parse_keep(text: str, table: Table) -> tuple[dict[str, float], dict[str, float]]:
    """Parse `code=1.23,web=proportional,math=proportional+0.01`: (limits, tolerances)."""
    form = "target=loss, target=proportional or target=proportional+number"
    limits: dict[str, float] = {}
    tolerances: dict[str, float] = {}
    for target, value in parse_pairs("--keep", text, form).items():
        _check_target("--keep", target, table)
        if value.startswith(PROPORTIONAL):
            rest = value.removeprefix(PROPORTIONAL)
            tolerances[target] = number_of("--keep", rest, form) if rest else 0.0
        else:
            limits[target] = number_of("--keep", value, form)
    return limits, tolerances


def parse_goals(text: str, table: Table) -> dict[str, list[str]]:
    """Parse `code,web+wiki`: name of the goal -> targets."""
    goals = {}
    for part in text.split(","):
        targets = [target.strip() for target in part.split("+")]
        for target in targets:
            _check_target("--pareto", target, table)
        goals[part.strip()] = targets
    if len(goals) < 2:
        raise SpecError(
            f"--pareto has {text!r}; expected two goals or more, e.g. code,web+wiki of "
            f"{', '.join(table.targets)}."
        )
    return goals


def _check_target(option: str, target: str, table: Table) -> None:
    if target not in table.targets:
        raise SpecError(
            f"{option} has target {target!r}; there are {', '.join(table.targets)}."
            f"{did_you_mean(target, table.targets)}"
        )


def _supply(
    text: str, tokens: float | None, corpus: dict[str, float] | None, table: Table
) -> Supply:
    """The supply that --discount names; of a corpus, or written out."""
    if tokens is None:
        raise SpecError("--discount needs --tokens: what is repeated depends on the final run.")
    if text == "corpus" and corpus is None:
        raise SpecError("--discount corpus needs --corpus; or give domain=tokens,….")
    found = corpus if text == "corpus" and corpus else parse_numbers("--discount", text)
    for domain in [*found, *table.domains]:
        if domain not in table.domains or domain not in found:
            raise SpecError(
                f"--discount has domains {', '.join(found)}; the runs have "
                f"{', '.join(table.domains)}: {domain!r} is on one side only."
            )
    return Supply(domain_tokens=found, budget_tokens=tokens)


def show_front(front: list[FrontPoint]) -> None:
    """Print the front, one mixture a row: predicted losses, then shares."""
    grid = grid_of(*front[0].goals, "|", *front[0].weights)
    for point in front:
        goals = [f"{loss:.4f}" for loss in point.goals.values()]
        grid.add_row(*goals, "|", *(f"{share:.3f}" for share in point.weights.values()))
    Console().print(grid)

"""`rayx split`: from runs of trunks and branches to the split point of a final run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from rayx.cli.options import JsonOption
from rayx.cli.output import check_folder, show_split
from rayx.errors import FitError, SpecError
from rayx.fit.csv_files import check_csv
from rayx.split import INPUTS, choose_split, fit_split_law, split_curves, split_points
from rayx.store import open_store


def split(
    params: Annotated[float, typer.Option(help="Model size of the final run.")],
    tokens: Annotated[float, typer.Option(help="Its budget, trunk and branches together.")],
    store: Annotated[
        str | None,
        typer.Argument(help="A store of trunks and branches; or give --runs.", metavar="[STORE]"),
    ] = None,
    runs: Annotated[
        str | None, typer.Option(help="CSV: params, tokens, spec_tokens, loss.")
    ] = None,
    branches: Annotated[
        int | None, typer.Option(help="Experts. [default: as many as in the store]")
    ] = None,
    law: Annotated[str, typer.Option(help="auto, or one of the laws of a split.")] = "auto",
    plot: Annotated[str | None, typer.Option(help="Write a figure to this PNG.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose how many tokens a general model gets before it becomes experts, one a domain.

    In a CSV, tokens are those of the trunk, spec_tokens those of one branch (0: no split), and loss
    is the mean over domains of each expert's own.

    Example: `rayx split --runs points.csv --params 3.4e5 --tokens 2e6 --branches 6 --json`
    """
    if (store is None) == (runs is None):
        raise SpecError("Give a STORE, or --runs RUNS.csv; not both and not none.")
    if plot:
        check_folder(plot)
    if store is not None:
        points = split_points(open_store(store).records())
        found = sum(column.startswith("loss/") for column in points)
        branches = branches or found
    else:
        points = _points(str(runs))
    if branches is None:
        raise SpecError("A CSV does not say how many experts there are; give --branches.")
    fitted, error = fit_split_law(points, law)
    least = float(points["tokens"].min())
    choice = choose_split(
        fitted,
        params=params,
        budget_tokens=tokens,
        branches=branches,
        least_trunk_tokens=least,
        extrapolation_error=error,
    )
    if plot:
        from rayx.split.plots import write_split_figure

        curves = split_curves(
            fitted,
            params=sorted({*points["params"].unique()[-3:], params}),
            budgets=list(np.geomspace(4 * least, 10 * tokens, 16)),
            branches=branches,
            least_trunk_tokens=least,
        )
        write_split_figure(plot, fitted, choice, curves, None)
    if as_json:
        return typer.echo(choice.to_json())
    show_split(choice)


def _points(path: str) -> pd.DataFrame:
    if not Path(path).is_file():
        raise SpecError(f"No file {path!r}; give a CSV with columns {', '.join(INPUTS)}, loss.")
    check_csv(path, FitError)
    try:
        frame = pd.read_csv(path, compression=None)  # a small file stays small
    except ValueError as error:
        raise FitError(f"Cannot read {path}: {error}") from error
    for column in (*INPUTS, "loss"):
        if column not in frame:
            raise FitError(
                f"{path} has no column {column!r}; it has {', '.join(map(str, frame))}. A split "
                f"law needs {', '.join(INPUTS)}, loss."
            )
    return frame

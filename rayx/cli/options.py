"""Arguments that several commands share, and how they are read."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from rayx.errors import SpecError
from rayx.fit import Table, join_kinds, largest_scale
from rayx.store import open_store

StoreArgument = Annotated[
    str, typer.Argument(help="The store: a folder, s3:// or gs://.", metavar="STORE")
]
StoreOrNone = Annotated[
    str | None, typer.Argument(help="A store; or give --weights and --losses.", metavar="[STORE]")
]
WeightsOption = Annotated[str | None, typer.Option(help="CSV: id, one column a domain.")]
LossesOption = Annotated[str | None, typer.Option(help="CSV: id, one column a target.")]
RegressorOption = Annotated[str, typer.Option(help="auto, or one of the regressors.")]
TextColumnOption = Annotated[str, typer.Option(help="Column that holds the text.")]
GroupColumnOption = Annotated[
    str | None, typer.Option(help="Documents of one value are held out together, or not.")
]
LabelColumnsOption = Annotated[
    str | None, typer.Option(help="Columns to count by their values: licence,language.")
]
ScoreColumnOption = Annotated[
    str | None, typer.Option(help="Sorts training text, so that web@0.3 is web's best 30%.")
]
IdColumnOption = Annotated[str | None, typer.Option(help="A second document of an id is skipped.")]
HeldoutShareOption = Annotated[float, typer.Option(help="Share of documents held out.")]
MinHeldoutTokensOption = Annotated[
    int, typer.Option(help="Fewest held-out tokens that a domain may have.")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of all that is drawn.")]
NameOption = Annotated[str | None, typer.Option(help="Which one, where there are several.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def check_store_place(url: str) -> None:
    """Raise SpecError where a Ray job would write a store into its own temporary folder."""
    if "://" not in url and not os.path.isabs(url) and "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise SpecError(
            f"--store {url!r} is relative, but a Ray job runs in a temporary copy of its working "
            "directory. Give an absolute path that all nodes see, or an s3:// or gs:// URL."
        )


def read_table(store: str | None, weights: str | None, losses: str | None) -> Table:
    """Read the table from a store, trained and merged runs joined, or from two CSV files."""
    if store and not (weights or losses):
        return join_kinds(largest_scale(open_store(store).runs()))
    if weights and losses and not store:
        return Table.from_csv(weights, losses)
    raise SpecError("Give a STORE, or --weights and --losses; not both and not one of the two.")


def parse_pairs(option: str, text: str, form: str) -> dict[str, str]:
    """Parse `name=value,name=value`; `form` is what the error asks for."""
    result: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.rpartition("="))
        if not (equals and name and value):
            raise SpecError(f"{option} has {part!r}; expected {form}, separated by commas.")
        if name in result:
            raise SpecError(f"{option} has {name!r} twice; give it once.")
        result[name] = value
    return result


def number_of(option: str, text: str, form: str) -> float:
    """Parse one number of an option."""
    try:
        return float(text)
    except ValueError:
        raise SpecError(f"{option} has {text!r}; expected {form}, separated by commas.") from None


def parse_numbers(option: str, text: str | None) -> dict[str, float]:
    """Parse `name=number,name=number`; nothing where the option was not given."""
    form = "name=number"
    pairs = parse_pairs(option, text, form) if text else {}
    return {name: number_of(option, value, form) for name, value in pairs.items()}


def names_of(text: str | None) -> tuple[str, ...]:
    """Parse `name,name`; nothing where the option was not given."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())

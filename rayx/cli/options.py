"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

StoreArgument = Annotated[
    str, typer.Argument(help="The store: a folder, s3:// or gs://.", metavar="STORE")
]
StoreOrNone = Annotated[
    str | None, typer.Argument(help="A store; or give --weights and --losses.", metavar="[STORE]")
]
WeightsOption = Annotated[str | None, typer.Option(help="CSV: id, one column a domain.")]
LossesOption = Annotated[str | None, typer.Option(help="CSV: id, one column a target.")]
RegressorOption = Annotated[str, typer.Option(help="auto, or one of the regressors.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of all that is drawn.")]
NameOption = Annotated[str | None, typer.Option(help="Which one, where there are several.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]

"""`rayx evaluate`: losses of models on disk, and of candidates merged from them."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console

from rayx.cli.options import JsonOption
from rayx.cli.output import check_folder, grid_of, warn, work_progress
from rayx.cli.rows import Rows, read_merge_weights
from rayx.corpus import Corpus
from rayx.errors import SpecError
from rayx.merge_operator import OPERATORS, Operator
from rayx.recipe import Evaluation

if TYPE_CHECKING:
    from rayx.proxy.models import Model
    from rayx.record import Loss

SHOWN = 20  # rows of the table that is printed


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Folders of Hugging Face models and rayx checkpoints (.safetensors), or "
            "name=path; with --weights the experts, as name=path.",
            metavar="MODEL...",
        ),
    ],
    corpus: Annotated[str, typer.Option(help="Corpus whose held-out text is read.")],
    weights: Annotated[
        str | None, typer.Option(help="CSV of merged candidates: id, one column an expert.")
    ] = None,
    operator: Annotated[
        str, typer.Option(help=f"How experts are merged: {', '.join(OPERATORS)}.")
    ] = "linear",
    base: Annotated[
        str | None, typer.Option(help="Model that the experts start from, for task vectors.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of task vectors kept.")] = None,
    scale: Annotated[float, typer.Option(help="Factor on the merged task vector.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of DARE's masks.")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="Of each target, at most.")] = 64,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of the corpus a sequence. [default: what all models can take]"
        ),
    ] = None,
    part: Annotated[
        str,
        typer.Option(help="Of the held-out text: all, or first to choose on, second to report."),
    ] = "all",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    out: Annotated[
        str | None,
        typer.Option(help="CSV: id, one column a target. Rows that are there are not done again."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate models in bits per byte of each target, on the text that proxies are evaluated on.

    With --weights each row is a candidate: the experts merged with its weights, in memory. The
    result is what `rayx fit` and `rayx choose` read with the same --weights, as --losses.

    Example: `rayx evaluate code=m/code law=m/law --weights w.csv --corpus data/mine --out l.csv`
    """
    started = time.perf_counter()
    paths = named_models(models, merges=weights is not None)
    how = Operator(name=operator, density=density, scale=scale, seed=seed)
    if weights is None and (base, how) != (None, Operator()):
        raise SpecError("--operator and --base are for merged candidates; give --weights too.")
    evaluation = Evaluation(points=1, sequences=sequences, part=part)
    rows_of: dict[str, Any] = dict(paths)
    if weights is not None:
        candidates = read_merge_weights(weights, list(paths))
        for row_id, row in candidates.items():
            try:
                how.check_weights(row, base)
            except SpecError as error:
                raise SpecError(f"--weights {weights!r}, row {row_id!r}: {error}") from error
        rows_of = dict(candidates)
    if out:
        check_folder(out)
    opened = Corpus.load(corpus)
    from rayx.proxy.models import MergedModels, open_model  # torch takes seconds to import

    loaded = {name: open_model(path, device) for name, path in paths.items()}
    length = context or min(model.usual_context for model in loaded.values())
    settings = {
        "corpus": opened.fingerprint, "context": length, "sequences": sequences, "part": part,
        "device": device,
    }  # fmt: skip
    merged = None
    if weights is not None:
        start = open_model(base, device) if base and how.needs_base else None
        merged = MergedModels(list(loaded.values()), how, start)
        warn(merged.warnings)
        settings |= {"operator": how.to_json(), "experts": paths, "base": base}
    rows = Rows(out, opened.targets, settings, rows_of)
    left = [row_id for row_id in rows_of if row_id not in rows.values]
    reused = len(rows_of) - len(left)
    if left:  # all that can be wrong is found before any model is run
        for name in left if merged is None else list(paths)[:1]:
            loaded[name].prepare(opened, length, evaluation)
    details: dict[str, Mapping[str, Loss]] = {}
    if merged is None:
        found = _one_by_one(loaded, left)
    else:
        found = _candidates(merged.losses, merged.together, rows_of, left)
    with work_progress("evaluate", "models") as show:
        for row_id, losses in found:
            details[row_id] = losses
            rows.append(row_id, {target: loss.bpb for target, loss in losses.items()})
            show(len(details), len(left), row_id)
    values = {row_id: rows.values[row_id] for row_id in rows_of}
    broken = [i for i, row in values.items() if not all(map(math.isfinite, row.values()))]
    if broken:
        warn([f"{len(broken)} models have losses that are not finite, {broken[0]!r} the first"])
    if as_json:
        facts = {**settings, "reused": reused, "seconds": time.perf_counter() - started}
        return typer.echo(json.dumps({**facts, "rows": _rows_json(values, details)}))
    _show(values, opened.targets)
    typer.echo(
        f"bits per byte of {sequences} sequences a target at most, context {length}; "
        f"{len(left)} evaluated, {reused} taken from {out}"
        if reused
        else f"bits per byte of {sequences} sequences a target at most, context {length}"
    )


def named_models(models: Sequence[str], merges: bool) -> dict[str, str]:
    """Return name -> path; a path alone is its own name, except for experts to be merged."""
    result: dict[str, str] = {}
    for text in models:
        name, equals, path = text.partition("=")
        if not equals or (not merges and Path(text).exists()):
            name, path = text, text
            if merges:
                raise SpecError(
                    f"{text!r} is not name=path; with --weights an expert is named by its column."
                )
        if not name or not path:
            raise SpecError(f"{text!r} is not name=path, e.g. code=models/code.")
        if name in result:
            raise SpecError(f"The model {name!r} is given twice; give each once.")
        result[name] = path
    return result


def _one_by_one(
    loaded: dict[str, Model], names: Sequence[str]
) -> Iterator[tuple[str, Mapping[str, Loss]]]:
    for name in names:
        yield name, loaded.pop(name).losses()[0]  # popped, so that one model is in memory


def _candidates(
    losses: Callable[[np.ndarray], list[dict[str, Loss]]],
    together: int,
    weights: Mapping[str, Sequence[float]],
    ids: Sequence[str],
) -> Iterator[tuple[str, Mapping[str, Loss]]]:
    for start in range(0, len(ids), together):
        some = ids[start : start + together]
        yield from zip(some, losses(np.array([weights[i] for i in some])), strict=True)


def _rows_json(
    values: Mapping[str, Mapping[str, float]], details: Mapping[str, Mapping[str, Loss]]
) -> list[dict[str, Any]]:
    """Bits per byte of all rows; of those that were evaluated now also errors and nats."""
    result = []
    for row_id, row in values.items():
        own = details.get(row_id, {})
        found = {
            "loss": row,
            "stderr": {t: loss.stderr_bpb for t, loss in own.items()},
            "nats": {t: loss.nats for t, loss in own.items()},
        }
        clean = {
            kind: {t: v if math.isfinite(v) else None for t, v in numbers.items()}
            for kind, numbers in found.items()
        }
        result.append({"id": row_id, **clean})
    return result


def _show(values: Mapping[str, Mapping[str, float]], targets: Sequence[str]) -> None:
    """Print the rows, or where there are many those with the lowest mean."""
    means = {row_id: sum(row.values()) / len(row) for row_id, row in values.items()}
    names = list(values)
    if len(names) > SHOWN:
        typer.echo(f"the {SHOWN} of {len(names)} rows with the lowest mean:")
        names = sorted(names, key=lambda i: means[i] if math.isfinite(means[i]) else math.inf)
    grid = grid_of("", *targets, "mean")
    grid.columns[0].overflow = "fold"  # paths often differ at their ends only
    for row_id in names[:SHOWN]:
        numbers = [*values[row_id].values(), means[row_id]]
        grid.add_row(row_id, *(f"{number:.4f}" for number in numbers))
    Console().print(grid)

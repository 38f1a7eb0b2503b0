"""`rayx merge`: models on disk become one."""

from __future__ import annotations

import dataclasses
import json
import re
import resource
from pathlib import Path
from typing import Annotated

import typer

from rayx.cli.options import JsonOption, SeedOption, parse_numbers
from rayx.cli.output import warn, work_progress
from rayx.errors import SpecError
from rayx.merge_operator import OPERATORS, Operator

BaseOption = Annotated[
    str | None, typer.Option(help="What the experts start from; also gives config and tokenizer.")
]


def merge(
    out: Annotated[str, typer.Argument(help="What to write; it must not exist.", metavar="OUT")],
    expert: Annotated[
        list[str], typer.Option(help="NAME=MODEL: a folder or a .safetensors file; repeat it.")
    ],
    weights: Annotated[
        str | None,
        typer.Option(help="name=weight,... never normalised. [default: equal, for a soup]"),
    ] = None,
    operator: Annotated[str, typer.Option(help=f"One of {', '.join(OPERATORS)}.")] = "linear",
    base: BaseOption = None,
    density: Annotated[
        float | None, typer.Option(help="Share of a task vector that ties, dare and pcb keep.")
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on the merged task vector.")] = 1.0,
    seed: SeedOption = 0,
    max_shard_gb: Annotated[float, typer.Option(help="Largest file of a folder, in GB.")] = 5.0,
    as_json: JsonOption = False,
) -> None:
    """Merge models of one architecture, tensor by tensor, in the memory of a few tensors.

    Models are folders of Hugging Face's layout or .safetensors files, rayx's checkpoints among
    them. linear: sum of weight times model, weights sum to 1. task_arithmetic: base + the weighted
    sum of the differences from it, weights of any sum. Everything that is wrong is said before
    anything is written.

    Example: `rayx merge merged --expert web=a --expert code=b --weights web=0.6,code=0.4`
    """
    chosen = Operator(name=operator, density=density, scale=scale, seed=seed)
    experts = _experts(expert)
    if weights is None and operator != "soup":
        raise SpecError(f"Give --weights, one an expert: {','.join(f'{n}=...' for n in experts)}.")
    by_name = parse_numbers("--weights", weights) or dict.fromkeys(experts, 1.0)
    from rayx.proxy.merge.files import merge_files  # torch, which most commands do without

    with work_progress("merge", "tensors") as show:
        shard_bytes = int(max_shard_gb * 1e9)
        merged = merge_files(experts, by_name, chosen, base, out, shard_bytes, on_tensor=show)
    peak = _peak_bytes()
    if as_json:
        found = dataclasses.asdict(merged) | {"path": str(merged.path), "peak_bytes": peak}
        return typer.echo(json.dumps(found))
    typer.echo(
        f"wrote {merged.path}: {merged.params:,} parameters in {merged.tensors} tensors, "
        f"{merged.nbytes / 1e9:.3g} GB in {len(merged.files)} "
        f"file{'s' if len(merged.files) > 1 else ''}, {merged.seconds:.1f} s, "
        f"peak memory {peak / 1e9:.2f} GB"
    )
    if merged.copied:
        source = "the base" if base else f"expert {next(iter(experts))!r}"
        typer.echo(f"from {source}: {', '.join(merged.copied)}")
    warn(merged.warnings)


def _experts(given: list[str]) -> dict[str, str]:
    """Parse NAME=MODEL of each --expert."""
    experts: dict[str, str] = {}
    for text in given:
        name, equals, path = (part.strip() for part in text.partition("="))
        if not (equals and name and path):
            raise SpecError(f"--expert has {text!r}; expected NAME=MODEL.")
        if name in experts:
            raise SpecError(f"--expert has {name!r} twice; give each expert a name of its own.")
        experts[name] = path
    return experts


def _peak_bytes() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # getrusage counts what the starting process had, this does not
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS

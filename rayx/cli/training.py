"""`rayx train` and `export`: a plan is carried out, here or by another trainer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from rayx.cli.options import check_store_place, parse_pairs
from rayx.cli.output import grid_of, say, write_text
from rayx.corpus import Corpus
from rayx.errors import SpecError
from rayx.experiment import load_experiment, set_parameters
from rayx.exports import FORMATS, Setting, export_plan
from rayx.plan import Plan
from rayx.record import Record
from rayx.spec import Parent, TrainSpec
from rayx.store import Store, open_store

PlanArgument = Annotated[str, typer.Argument(help="What `rayx plan` wrote.", metavar="PLAN.json")]


def train(
    plan: PlanArgument,
    experiment: Annotated[
        str,
        typer.Argument(
            help="A file with Parameters, corpus(p) and final(p, corpus).", metavar="EXPERIMENT.py"
        ),
    ],
    store: Annotated[
        str | None, typer.Option(help="Where records and models go. [default: runs/PLAN]")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Change a parameter: name=value.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Processes that train one run together; 0: this one.")
    ] = 0,
    cpus: Annotated[float, typer.Option(help="CPUs of a worker.")] = 1.0,
    gpu: Annotated[bool, typer.Option("--gpu", help="Each worker trains on a GPU.")] = False,
    shard: Annotated[
        bool, typer.Option("--shard", help="Spread the model over the workers (FSDP2).")
    ] = False,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster: auto, ray://… [default: a Ray here]")
    ] = None,
    state_seconds: Annotated[
        float, typer.Option(min=0, help="Between the states from which a run that died goes on.")
    ] = 120.0,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Train failed runs again.")
    ] = False,
    other_corpus: Annotated[
        bool, typer.Option("--other-corpus", help="The corpus is not the plan's, on purpose.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print runs, tokens, FLOPs, epochs; train nothing.")
    ] = False,
) -> None:
    """Train what a plan says: its switch points, its trunk, its branches; go on where it stopped.

    The number of workers changes neither the order of the data nor, beyond rounding, a loss.

    Example: `rayx train plan.json experiments/quickstart.py --workers 2`
    """
    made = read_plan(plan)
    module = load_experiment(experiment, needed=("Parameters", "corpus", "final"))
    parameters = set_parameters(module, assignments or [])
    corpus: Corpus = module.corpus(parameters)
    made.check(corpus, other_corpus)
    runs = made.specs(module.final(parameters, corpus))
    url = store or f"runs/{Path(plan).stem}"
    check_store_place(url)
    # Seconds of imports, after all that can be refused without them.
    from rayx.proxy import set_threads, train_pack
    from rayx.sweep.final import Workers, check_final, train_final

    group = Workers(count=workers, cpus=cpus, gpu=gpu, shard=shard, address=address)
    check_final(list(runs.values()), corpus, group)
    if dry_run:
        return _show_cost(runs, corpus)
    if not workers:
        set_threads(max(1, int(cpus)))
    opened = open_store(url, create=True)
    statuses = train_final(
        list(runs.values()),
        corpus,
        opened,
        train_pack,
        workers=group,
        retry_failed=retry_failed,
        state_seconds=state_seconds,
    )
    for run_id, status in statuses.items():
        failure = opened.get(run_id).failure
        if status == "failed" and failure:
            say(f"run {run_id} failed: {failure.message}", err=True)
    done = {name: spec for name, spec in runs.items() if statuses.get(spec.run_id) == "ok"}
    if done:
        _show_reached(made, {name: opened.get(spec.run_id) for name, spec in done.items()})
    for name, spec in done.items():
        say(f"{name}: {_place(opened, Parent(spec, spec.steps).checkpoint)}")
    if len(done) < len(runs):
        lost = ", ".join(name for name in runs if name not in done)
        say(f"not trained: {lost}; change the template, or --retry-failed.", err=True)
        raise typer.Exit(1)


def export(
    plan: PlanArgument,
    to: Annotated[str, typer.Option(help=f"One of {', '.join(FORMATS)}.")],
    out: Annotated[str, typer.Option(help="Folder to write to; it is made.")],
    paths: Annotated[
        str | None,
        typer.Option(help="domain=prefix,... [default: data/DOMAIN for each]"),
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an optimizer step, for steps.")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a sequence, for sizes in sequences.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the other trainer's data order.")] = 0,
) -> None:
    """Write a plan as the data configuration of another trainer, one set of files a model.

    Example: `rayx export plan.json --to nanotron --batch-tokens 4194304 --out configs`
    """
    made = read_plan(plan)
    named = parse_pairs("--paths", paths, "domain=prefix") if paths else {}
    setting = Setting(paths=named, batch_tokens=batch_tokens, context=context, seed=seed)
    files = export_plan(made, to, setting)
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"Cannot make folder {out!r}: {error}. Give another --out.") from error
    for name, text in files.items():
        write_text(str(Path(out) / name), text)
        say(str(Path(out) / name))


def read_plan(path: str) -> Plan:
    """Read a plan from a file.

    Raises:
        SpecError: There is no such file, or it holds no plan.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SpecError(
            f"Plan {path!r} cannot be read: {error}. Give what `rayx plan` wrote."
        ) from error
    return Plan.from_json(data)


def _show_cost(runs: Mapping[str, TrainSpec], corpus: Corpus) -> None:
    """Print what would be trained, parents before their branches, and the passes over domains."""
    names = {spec.run_id: name for name, spec in runs.items()}
    every = {spec.run_id: spec for final in runs.values() for spec in final.path}
    grid = grid_of("", "run", "params", "steps", "tokens", "FLOPs", "starts from")
    for run_id, spec in every.items():
        parent = spec.parent and f"{spec.parent.spec.run_id} at {spec.parent.steps}"
        numbers = (f"{spec.model.params:,}", f"{spec.steps:,}", f"{spec.tokens:,}",
                   f"{spec.flops:.3g}")  # fmt: skip
        grid.add_row(names.get(run_id, "trunk"), run_id, *numbers, parent or "its seed")
    Console().print(grid)
    total = sum(spec.flops for spec in every.values())
    tokens = sum(spec.tokens for spec in every.values())
    say(f"{len(every)} runs, {tokens:,} tokens, {total:.3g} FLOPs")
    for name, spec in runs.items():
        listed = ", ".join(
            f"{d} {count / corpus.tokens[d]:.2g}" for d, count in spec.domain_tokens.items()
        )
        say(f"epochs of {name}: {listed}")


def _show_reached(plan: Plan, records: Mapping[str, Record]) -> None:
    """Print the losses beside those that the plan's proxies predicted."""
    losses = plan.choice.get("predicted_losses") or {}
    predicted = {target: loss for target, loss in losses.items() if isinstance(loss, float)}
    grid = grid_of("target", *(["predicted"] if predicted else []), *records)
    for target in next(iter(records.values())).losses:
        guess = [f"{predicted[target]:.4f}" if target in predicted else ""] if predicted else []
        reached = (f"{record.losses[target].bpb:.4f}" for record in records.values())
        grid.add_row(target, *guess, *reached)
    Console().print(grid)
    objective: dict[str, Any] | None = plan.choice.get("objective")
    first = next(iter(records.values())).losses
    if objective and set(objective) <= set(first) and len(records) == 1:
        value = sum(w * first[t].bpb for t, w in objective.items()) / sum(objective.values())
        what = "objective"
    elif set(records) <= set(first):
        value = sum(r.losses[name].bpb for name, r in records.items()) / len(records)
        what = "each expert on its own domain, mean,"
    else:
        return
    line = f"{what} reached {value:.4f} bits per byte"
    low, high = plan.choice.get("interval") or (None, None)
    if all(isinstance(value, float) for value in (low, high, plan.choice.get("predicted"))):
        line += f"; predicted {plan.choice['predicted']:.4f} ({low:.4f} to {high:.4f})"
        line += " at the scale of the runs it was chosen on" if predicted else ""
    say(line)


def _place(store: Store, name: str) -> str:
    return f"{store.url.rstrip('/')}/{name}"

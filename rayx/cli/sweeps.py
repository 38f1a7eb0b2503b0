"""`rayx run`, `status` and `query`: a sweep and its records."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from rayx.cli.options import JsonOption, StoreArgument, check_store_place
from rayx.cli.output import printable, say, show_choice, show_split
from rayx.experiment import load_experiment, set_parameters
from rayx.merging import Spec
from rayx.progress import progress, progress_line, state_line
from rayx.split import SplitChoice
from rayx.store import open_store


def run(
    experiment: Annotated[str, typer.Argument(help="An experiment file.", metavar="EXPERIMENT.py")],
    store: Annotated[
        str | None, typer.Option(help="Where records go. [default: runs/EXPERIMENT]")
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray cluster: auto, ray://… [default: a Ray here]")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Change a parameter: name=value.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Run only the first N specs, no analysis.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print runs, tokens, FLOPs and time; run nothing.")
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Run failed runs again.")
    ] = False,
    pack_size: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of a trial; on a GPU together. [default: what pays]"),
    ] = None,
    cpus: Annotated[float, typer.Option(help="CPUs of a trial.")] = 1.0,
    gpus: Annotated[float, typer.Option(help="GPUs of a trial.")] = 0.0,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="Wait for nodes that an autoscaler brings.")
    ] = False,
    keep_checkpoints: Annotated[
        bool,
        typer.Option("--keep-checkpoints", help="Keep trunks and experts, e.g. for `rayx merge`."),
    ] = False,
    log_to: Annotated[
        list[str] | None,
        typer.Option(help="Show runs in tensorboard, mlflow or wandb; may be given twice."),
    ] = None,
) -> None:
    """Run an experiment's sweep: what has no record yet, then its analysis.

    Example: `rayx run experiments/quickstart.py --set proxies=48 --dry-run`
    """
    module = load_experiment(experiment)
    parameters = set_parameters(module, assignments or [])
    url = store or f"runs/{Path(experiment).stem}"
    check_store_place(url)
    corpus = module.corpus(parameters)
    specs = module.specs(parameters, corpus)[:limit]
    # Seconds of imports, after all that can be refused without them.
    from rayx.proxy import set_threads, train_pack
    from rayx.proxy.merge.candidates import Merges
    from rayx.sweep import Placement, drop_checkpoints, estimate, run_sweep

    placement = Placement(
        address=address, pack_size=pack_size, cpus=cpus, gpus=gpus, elastic=elastic
    )
    if dry_run:
        set_threads(max(1, int(cpus)))
        stages = {"sweep": specs}
        if hasattr(module, "follow_up") and limit is None:
            stages["follow-up"] = module.follow_up(parameters, corpus)
        for stage, stage_specs in stages.items():
            cost = estimate(stage_specs, corpus, train_pack, placement)
            typer.echo(
                f"{stage}: {cost.runs} runs, {cost.tokens:.3g} tokens, {cost.flops:.3g} FLOPs, "
                f"about {cost.seconds / 60:.1f} minutes of one trial's device "
                f"({cost.seconds / 120:.1f} with two at a time)"
            )
        return

    opened = open_store(url, create=True)
    statuses: dict[str, str] = {}
    asked: list[Spec] = []

    def propose() -> Sequence[Spec]:
        if limit is not None or not hasattr(module, "propose"):
            return ()
        return module.propose(parameters, corpus, opened)

    def sweep(more: Sequence[Spec], propose: Callable[[], Sequence[Spec]] = lambda: ()) -> None:
        statuses.update(
            run_sweep(
                more,
                corpus,
                opened,
                train_pack,
                merges=Merges(),
                placement=placement,
                retry_failed=retry_failed,
                propose=propose,
                keep_checkpoints=True,
                log_to=log_to or (),
            )
        )
        asked.extend(more)

    sweep(specs, propose)
    if limit is None and hasattr(module, "analyse"):
        conclusion = module.analyse(parameters, corpus, opened, sweep)
        if conclusion:
            if isinstance(conclusion.choice, SplitChoice):
                show_split(conclusion.choice)
            else:
                show_choice(conclusion.choice, corpus)
            if conclusion.verification:
                typer.echo(f"verdict: {conclusion.verification['verdict']}")
            for what, place in conclusion.files.items():
                typer.echo(f"{what}: {place}")
    if not keep_checkpoints:
        drop_checkpoints(asked, opened)
    failed = [run_id for run_id, status in statuses.items() if status == "failed"]
    if failed:
        typer.echo(
            f"{len(failed)} of {len(statuses)} runs failed; see `rayx status {url}`.", err=True
        )
        raise typer.Exit(1)


def status(store: StoreArgument, as_json: JsonOption = False) -> None:
    """Say how far a sweep is, whether it is alive, and what failed.

    Example: `rayx status runs/quickstart`
    """
    opened = open_store(store)
    state = progress(opened)
    failures = {
        record.run_id: record.failure.message
        for record in opened.records(r for r, s in opened.status().items() if s == "failed")
        if record.failure
    }
    damaged = opened.parts.damaged_records()
    if as_json:
        return typer.echo(json.dumps({**state, "failures": failures, "damaged": damaged}))
    typer.echo(f"{progress_line(state)} ({state_line(state)})")
    if damaged:
        say(f"  damaged, and done again by the next run: {', '.join(damaged)}")
    for run_id, message in failures.items():
        say(f"  failed {run_id}: {message}")


def query(
    store: StoreArgument,
    sql: Annotated[
        str, typer.Argument(help="One SELECT over the tables runs and evals.", metavar="SQL")
    ],
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Ask a store in SQL, also while its sweep goes on.

    Example: `rayx query runs/quickstart 'select run_id, "loss/docs" from runs order by 2 limit 5'`
    """
    frame = open_store(store).sql(sql)
    if as_csv:
        typer.echo(printable(frame.to_csv(index=False)), nl=False)
    else:
        say(frame.to_string(index=False))
        typer.echo(f"({len(frame)} rows)")

"""The command's tree and its edge to the shell."""

from __future__ import annotations

import logging
import sys

import typer
from rich.console import Console
from rich.logging import RichHandler

from rayx.cli import (
    choosing,
    clustering,
    corpora,
    decisions,
    evaluating,
    inference,
    labelling,
    laws,
    likelihoods,
    merging,
    splits,
    sweeps,
    training,
)
from rayx.cli.output import say
from rayx.errors import RayxError


def command_tree() -> typer.Typer:
    """Return the `rayx` command with all its subcommands."""
    settings = {"no_args_is_help": True, "add_completion": False, "rich_markup_mode": "markdown"}
    app = typer.Typer(
        name="rayx",
        help="Decide what data a language model is trained on: sweep, fit, choose, plan.",
        pretty_exceptions_enable=False,
        **settings,
    )
    for command in (sweeps.run, sweeps.status, sweeps.query):
        app.command()(command)
    app.command()(laws.law)
    app.command()(splits.split)
    app.command()(merging.merge)
    app.command()(evaluating.evaluate)
    app.command()(likelihoods.lld)
    for command in (decisions.fit, choosing.choose, decisions.plan, decisions.report):
        app.command()(command)
    app.command()(training.train)
    app.command()(training.export)
    corpus = typer.Typer(help="Build and look at corpora.", **settings)
    corpus_commands = (corpora.build, labelling.label, clustering.cluster, corpora.sample)
    for command in (*corpus_commands, corpora.join, corpora.show):
        corpus.command()(command)
    corpus.command("infer-mixture")(inference.infer)
    app.add_typer(corpus, name="corpus")
    return app


def main() -> None:
    """Run the command line; every RayxError is one line on standard error and exit code 2."""
    terminal = sys.stderr.isatty()
    handler = RichHandler(console=Console(stderr=True), show_path=False) if terminal else None
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s" if terminal else "%(asctime)s %(message)s",
        handlers=[handler] if handler else None,
    )
    try:
        command_tree()()
    except RayxError as error:
        say(f"error: {error}", err=True)
        sys.exit(2)

"""Experiment files: Python that says what to run.

An experiment is a file with

    class Parameters          a frozen dataclass; its fields are what --set may change
    corpus(p) -> Corpus       what to train on
    specs(p, corpus)          the runs of the sweep: pure and seeded
    propose(p, corpus, store) optional, for rounds: all runs so far, given the records; asked
                              again when they have ended, until none is new
    analyse(p, corpus, store, sweep)   optional: what follows; sweep(specs) trains further runs;
                              returns a Conclusion, or None
    follow_up(p, corpus)      optional: specs as costly as those that analyse will ask for,
                              so that --dry-run can count them
    final(p, corpus)          for `rayx train`: a TrainSpec with the model, optimizer, evaluation
                              and seeds of the final run; its schedule is the plan's, but with
                              branches the warm-up is a share of its own length
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rayx.choose import Choice
from rayx.errors import SpecError, did_you_mean
from rayx.plan import Plan
from rayx.split import SplitChoice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Conclusion:
    """What an analysis came to.

    Attributes:
        choice: The choice: of a mixture, or of a split point.
        plan: Its plan.
        verification: Plain data with a `verdict` in one sentence, or None.
        files: What was written, e.g. `plan`, `report` -> place.
    """

    choice: Choice | SplitChoice
    plan: Plan
    verification: dict[str, Any] | None
    files: dict[str, str]


def load_experiment(
    path: str | Path, needed: Sequence[str] = ("Parameters", "corpus", "specs")
) -> ModuleType:
    """Import an experiment file.

    Args:
        path: Where it is.
        needed: What it must have.

    Raises:
        SpecError: It is missing, does not import, or lacks what is needed.
    """
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise SpecError(
            f"Experiment {str(path)!r} is not a Python file; give one like those in experiments/."
        )
    name = f"rayx_experiment_{file.stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError, NameError, AttributeError, TypeError, ValueError) as error:
        raise SpecError(f"Experiment {file} does not import: {error!r}.") from error
    for name in needed:
        if not hasattr(module, name):
            functions = ["corpus(p)", *(f"{n}(p, corpus)" for n in needed[2:])]
            raise SpecError(
                f"Experiment {file} has no {name}; expected a dataclass Parameters and functions "
                f"{' and '.join(functions)}."
            )
    return module


def set_parameters(module: ModuleType, assignments: Sequence[str]) -> Any:
    """Return the experiment's Parameters with `name=value` assignments applied.

    Raises:
        SpecError: An assignment has no `=`, names no parameter, or its value is not of the
            parameter's type.
    """
    types = typing.get_type_hints(module.Parameters)
    names = [f.name for f in dataclasses.fields(module.Parameters)]
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise SpecError(f"--set {assignment!r} has no '='; expected name=value.")
        if name not in names:
            raise SpecError(
                f"--set {assignment!r}: {module.__name__.removeprefix('rayx_experiment_')} has no "
                f"parameter {name!r}; it has {', '.join(names)}.{did_you_mean(name, names)}"
            )
        if name in values:
            raise SpecError(f"--set gives {name!r} twice; give it once.")
        values[name] = _parse(name, text, types[name])
    return module.Parameters(**values)


def _parse(name: str, text: str, wanted: type) -> Any:
    try:
        if wanted is bool:
            return {"true": True, "false": False}[text.lower()]
        if wanted is int and text.lower().find("e") > 0:  # 1e6 tokens
            value = float(text)
            if not value.is_integer():
                raise ValueError
            return int(value)
        if wanted in (int, float, str):
            return wanted(text.replace("_", "") if wanted is not str else text)
    except (ValueError, KeyError, OverflowError):
        pass
    else:
        raise SpecError(
            f"Parameter {name!r} has type {wanted}; --set can change int, float, bool and str."
        )
    raise SpecError(f"--set {name}={text}: {text!r} is not of type {wanted.__name__}.")

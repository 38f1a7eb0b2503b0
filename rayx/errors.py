"""Errors that a user can act on.

Every message says what is wrong, the value, what was expected and the fix. User input is checked
at the boundary, before anything expensive starts; `assert` is only for our own invariants.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What code raises that reads data of another form than it expects: JSON that was edited or crafted.
UNREADABLE = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,  # JSON nested thousands deep
)


class RayxError(Exception):
    """Anything that rayx refuses or cannot do; the command line prints it and exits with 2."""


class SpecError(RayxError):
    """A mixture, schedule, spec or experiment parameter is not valid."""


class CorpusError(RayxError):
    """A source, tokenizer or token shard cannot be used."""


class StoreError(RayxError):
    """A store or a record in it cannot be read or written."""


class UnreachableError(StoreError):
    """A store or corpus is away or does not let us in, which says nothing about what it holds."""


class SweepError(RayxError):
    """A sweep cannot be placed or did not finish."""


class FitError(RayxError):
    """A table, regressor or law cannot be fitted or applied."""


class ModelError(RayxError):
    """A model's files cannot be read, merged or evaluated."""


class ChoiceError(RayxError):
    """No mixture satisfies the constraints, or the evidence does not support a choice."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""

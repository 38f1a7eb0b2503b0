"""Keeps credentials of the driver out of what Ray writes down."""

from __future__ import annotations

from ray.tune.execution import class_cache


def forward_no_credentials() -> None:
    """Keep Tune from giving the driver's AWS keys to its actors.

    Tune 2.60 puts them into the runtime environment of each trial, which Ray writes to its logs and
    shows in its dashboard. Nodes bring credentials of their own: a role, a profile, or the
    environment in which `ray start` was run.
    """
    names = [name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")]
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(names)

"""Stage 6, choice: where one general model should become several experts."""

from rayx.split.choose import (
    INPUTS,
    SplitChoice,
    choose_split,
    fit_split_law,
    split_curves,
    split_share_curve,
)
from rayx.split.points import split_points

__all__ = [
    "INPUTS",
    "SplitChoice",
    "choose_split",
    "fit_split_law",
    "split_curves",
    "split_points",
    "split_share_curve",
]

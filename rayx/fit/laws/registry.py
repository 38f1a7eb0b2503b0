"""Laws by name: what `rayx law --law NAME` knows, and what `auto` tries."""

from __future__ import annotations

from rayx.fit.laws.chinchilla import Chinchilla
from rayx.fit.laws.law import Law
from rayx.fit.laws.specialisation import (
    SplitAdditive,
    SplitEffective,
    SplitInteraction,
    SplitTwoStage,
)


def laws() -> dict[str, type[Law]]:
    """Return name -> class of every law."""
    return {
        law.name: law
        for law in (Chinchilla, SplitAdditive, SplitInteraction, SplitEffective, SplitTwoStage)
    }

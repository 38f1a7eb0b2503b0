"""Laws by name: what `rayx law --law NAME` knows, and what `auto` tries."""

from __future__ import annotations

from rayx.fit.laws.capacity import Capacity
from rayx.fit.laws.chinchilla import Chinchilla
from rayx.fit.laws.continued import DCPT, CrossDomainDCPT
from rayx.fit.laws.law import Law
from rayx.fit.laws.mixture import AdditiveMixture, BiMix, Exponential, JointMixture
from rayx.fit.laws.multilingual import Multilingual
from rayx.fit.laws.repetition import Repetition
from rayx.fit.laws.specialisation import (
    SplitAdditive,
    SplitEffective,
    SplitInteraction,
    SplitTwoStage,
)
from rayx.fit.laws.specialisation_by_size import SplitCoupled, SplitProportional


def laws() -> dict[str, type[Law]]:
    """Return name -> class of every law."""
    return {
        law.name: law
        for law in (
            Chinchilla,
            Repetition,
            SplitAdditive,
            SplitInteraction,
            SplitEffective,
            SplitTwoStage,
            SplitProportional,
            SplitCoupled,
            Exponential,
            BiMix,
            AdditiveMixture,
            JointMixture,
            Capacity,
            Multilingual,
            DCPT,
            CrossDomainDCPT,
        )
    }

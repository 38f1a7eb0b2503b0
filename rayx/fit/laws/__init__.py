"""Stage 5, laws: loss as a formula of model size, tokens, mixture and repetition."""

from rayx.fit.laws.chinchilla import Chinchilla
from rayx.fit.laws.extrapolate import Extrapolation, choose_law, extrapolate
from rayx.fit.laws.law import Law, Parameter
from rayx.fit.laws.registry import laws
from rayx.fit.laws.specialisation import (
    SplitAdditive,
    SplitEffective,
    SplitInteraction,
    SplitTwoStage,
)

__all__ = [
    "Chinchilla",
    "Extrapolation",
    "Law",
    "Parameter",
    "SplitAdditive",
    "SplitEffective",
    "SplitInteraction",
    "SplitTwoStage",
    "choose_law",
    "extrapolate",
    "laws",
]

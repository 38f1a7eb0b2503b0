"""Stage 5, laws: loss as a formula of model size, tokens, mixture and repetition."""

from rayx.fit.laws.capacity import Capacity
from rayx.fit.laws.chinchilla import Chinchilla
from rayx.fit.laws.continued import (
    DCPT,
    CrossDomainDCPT,
    optimal_size_at_ratio,
    ratio_of_limited_data,
    ratio_within_tolerance,
)
from rayx.fit.laws.critical_ratio import CriticalRatio, critical_ratio
from rayx.fit.laws.extrapolate import Extrapolation, choose_law, extrapolate
from rayx.fit.laws.frontier import PowerLaw, optimal_size
from rayx.fit.laws.law import Law, Parameter
from rayx.fit.laws.mixture import AdditiveMixture, BiMix, Exponential, JointMixture
from rayx.fit.laws.multilingual import Multilingual, effective_fraction
from rayx.fit.laws.nested import nested_mixture_law
from rayx.fit.laws.registry import laws
from rayx.fit.laws.repetition import Repetition
from rayx.fit.laws.specialisation import (
    SplitAdditive,
    SplitEffective,
    SplitInteraction,
    SplitTwoStage,
)
from rayx.fit.laws.specialisation_by_size import SplitCoupled, SplitProportional
from rayx.fit.laws.table import LawTable

__all__ = [
    "DCPT",
    "AdditiveMixture",
    "BiMix",
    "Capacity",
    "Chinchilla",
    "CriticalRatio",
    "CrossDomainDCPT",
    "Exponential",
    "Extrapolation",
    "JointMixture",
    "Law",
    "LawTable",
    "Multilingual",
    "Parameter",
    "PowerLaw",
    "Repetition",
    "SplitAdditive",
    "SplitEffective",
    "SplitInteraction",
    "SplitProportional",
    "SplitCoupled",
    "SplitTwoStage",
    "choose_law",
    "critical_ratio",
    "effective_fraction",
    "extrapolate",
    "laws",
    "optimal_size",
    "optimal_size_at_ratio",
    "nested_mixture_law",
    "ratio_of_limited_data",
    "ratio_within_tolerance",
]

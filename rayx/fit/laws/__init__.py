"""Stage 5, laws: loss as a formula of model size, tokens, mixture and repetition."""

from rayx.fit.laws.chinchilla import Chinchilla
from rayx.fit.laws.law import Law, Parameter
from rayx.fit.laws.registry import laws

__all__ = ["Chinchilla", "Law", "Parameter", "laws"]

"""Stage 5, laws: loss as a formula of model size, tokens, mixture and repetition."""

from rayx.fit.laws.law import Law, Parameter

__all__ = ["Law", "Parameter"]

"""Distillation: an objective that learns from another model's predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rayx.recipe import is_number, require


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """Training on another model's predictions beside the text's own tokens.

    loss = (1 - share) CE(text) + share CE(teacher), the second the cross-entropy of the model
    against the teacher's distribution over the next token.

    Attributes:
        teacher: Its model has the run's vocabulary and context. A run that distils from its own
            parent keeps what it knew (self-distillation).
        share: In (0, 1].
        swap: Exchange the teacher's logit of the text's own token with its largest one, so that it
            teaches no token that the text refutes.
        domains: Whose text is learnt so; empty for all.

    Source: swap: Mix-CPT, Jiang et al. 2024, arXiv:2407.10804 (abstract only).
    """

    teacher: Any  # a Parent
    share: float = 0.5
    swap: bool = False
    domains: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ok = hasattr(self.teacher, "checkpoint")
        require(ok, "Distillation.teacher", self.teacher, "a Parent")
        ok = is_number(self.share) and 0 < self.share <= 1
        require(ok, "Distillation.share", self.share, "a share in (0, 1]")
        require(isinstance(self.swap, bool), "Distillation.swap", self.swap, "True or False")
        ok = isinstance(self.domains, (tuple, list)) and all(
            isinstance(d, str) and d for d in self.domains
        )
        require(ok, "Distillation.domains", self.domains, "a tuple of domain names")
        object.__setattr__(self, "domains", tuple(self.domains))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON data."""
        return {
            "teacher": self.teacher.to_json(),
            "share": self.share,
            "swap": self.swap,
            "domains": list(self.domains),
        }

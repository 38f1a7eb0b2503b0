"""Constraints: which mixtures may be chosen, and the nearest one that may.

Floors, caps, fixed shares, bounds on the sum over a group of domains (groups may overlap) and caps
from the token supply together are one polytope. One that holds no mixture is refused, and the
message names the fewest bounds that contradict each other.

Shapes: M mixtures, K domains, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from rayx.caps import supply_caps
from rayx.errors import ChoiceError, SpecError, did_you_mean
from rayx.polytope import TOLERANCE, Polytope


@dataclass(frozen=True)
class Group:
    """Bounds on the shares of some domains together.

    Attributes:
        domains: Names, each once.
        low: Least sum of their shares, in [0, 1].
        high: Largest sum; equal to `low` for a fixed sum.
    """

    domains: tuple[str, ...]
    low: float = 0.0
    high: float = 1.0

    @property
    def name(self) -> str:
        return "+".join(self.domains)


@dataclass(frozen=True, eq=False)
class Constraints:
    """Least and largest share of each domain and of each group of domains.

    Args:
        domains: Names, in the order of the arrays.
        floors_K: Least weights, in [0, 1]; equal to the cap for a fixed share.
        caps_K: Largest weights, in [0, 1].
        groups: Bounds on sums of shares.

    Raises:
        ChoiceError: No mixture satisfies them; the message names the conflict.
    """

    domains: tuple[str, ...]
    floors_K: np.ndarray
    caps_K: np.ndarray
    groups: tuple[Group, ...] = ()

    def __post_init__(self) -> None:
        for kind in ("floors", "caps"):
            bound_K = np.array(getattr(self, f"{kind}_K"), dtype=float)
            if bound_K.shape != (len(self.domains),):
                raise ChoiceError(
                    f"The {kind} have shape {bound_K.shape}; expected one for each of "
                    f"{len(self.domains)} domains."
                )
            for domain, bound in zip(self.domains, bound_K, strict=True):
                if not 0.0 <= bound <= 1.0:
                    raise ChoiceError(f"The {kind[:-1]} of {domain!r} is {bound}; expected 0 to 1.")
            object.__setattr__(self, f"{kind}_K", bound_K)
        for group in self.groups:
            self._check_group(group)
        for domain, floor, cap in zip(self.domains, self.floors_K, self.caps_K, strict=True):
            if floor > cap:
                raise ChoiceError(
                    f"The floor of {domain!r} ({floor:.6g}) is above its cap ({cap:.6g}). "
                    f"Lower the floor, or allow more epochs of it."
                )
        if self.caps_K.sum() < 1.0 - TOLERANCE:
            raise ChoiceError(
                f"The caps sum to {self.caps_K.sum():.6g}; a mixture needs 1. "
                f"Raise caps, allow more epochs, or lower the token budget."
            )
        if self.floors_K.sum() > 1.0 + TOLERANCE:
            raise ChoiceError(
                f"The floors sum to {self.floors_K.sum():.6g}; a mixture has 1. Lower floors."
            )
        if self.groups and self.polytope.inside is None:
            raise ChoiceError(
                f"No mixture keeps all of: {self._conflict()}. Without any one of these there "
                f"is one; loosen one."
            )

    @classmethod
    def none(cls, domains: tuple[str, ...]) -> Constraints:
        """All mixtures are allowed."""
        return cls(domains, np.zeros(len(domains)), np.ones(len(domains)))

    @classmethod
    def by_name(
        cls,
        domains: tuple[str, ...],
        floors: Mapping[str, float] | None = None,
        caps: Mapping[str, float] | None = None,
        fixed: Mapping[str, float] | None = None,
        groups: Sequence[Group] = (),
    ) -> Constraints:
        """Bounds of some domains; the others have floor 0 and cap 1.

        Args:
            domains: All names.
            floors: Domain -> least share.
            caps: Domain -> largest share.
            fixed: Domain -> its share; a floor or cap beside it must allow it.
            groups: Bounds on sums of shares.

        Raises:
            ChoiceError: An unknown domain, or no mixture satisfies them.
        """
        for kind, given in (("floors", floors), ("caps", caps), ("fixed shares", fixed)):
            for domain in given or {}:
                if domain not in domains:
                    raise ChoiceError(
                        f"The {kind} have domain {domain!r}, which is not among "
                        f"{', '.join(domains)}.{did_you_mean(domain, domains)}"
                    )
        floors_K = np.array([(floors or {}).get(domain, 0.0) for domain in domains], dtype=float)
        caps_K = np.array([(caps or {}).get(domain, 1.0) for domain in domains], dtype=float)
        for domain, share in (fixed or {}).items():
            k = domains.index(domain)
            if not floors_K[k] <= share <= caps_K[k]:
                raise ChoiceError(
                    f"The share of {domain!r} is fixed at {share:.6g}; expected {floors_K[k]:.6g} "
                    f"to {caps_K[k]:.6g}, its floor and cap."
                )
            floors_K[k] = caps_K[k] = share
        return cls(domains, floors_K, caps_K, tuple(groups))

    @classmethod
    def from_supply(
        cls,
        domain_tokens: Mapping[str, float],
        budget_tokens: float,
        max_epochs: float,
        floors: Mapping[str, float] | None = None,
    ) -> Constraints:
        """Caps from the tokens that there are: cap_k = min(1, max_epochs tokens_k / budget_tokens).

        Args:
            domain_tokens: Domain -> tokens, in the order of the table's domains.
            budget_tokens: Tokens of the run that the mixture is for, > 0.
            max_epochs: How often a token may be seen, > 0.
            floors: Domain -> least weight.

        Raises:
            ChoiceError: All tokens together do not last for the budget, or a floor is above a cap.
        """
        try:
            caps = supply_caps(domain_tokens, budget_tokens, max_epochs)
        except SpecError as error:
            raise ChoiceError(str(error)) from None
        return cls.by_name(tuple(domain_tokens), floors, caps)

    @cached_property
    def polytope(self) -> Polytope:
        """The same as arrays."""
        member = [
            [float(domain in group.domains) for domain in self.domains] for group in self.groups
        ]
        return Polytope(
            floors_K=self.floors_K,
            caps_K=self.caps_K,
            sums_SK=np.array(member).reshape(len(self.groups), len(self.domains)),
            lows_S=np.array([group.low for group in self.groups]),
            highs_S=np.array([group.high for group in self.groups]),
        )

    def nearest(self, weights_MK: np.ndarray) -> np.ndarray:
        """The nearest mixtures that may be chosen, in Kullback-Leibler divergence, shape (M, K).

        Ratios among domains that meet the same bounds are kept. Mixtures that may be chosen are
        returned as they are. With groups, exact within 1e-9 save where bounds leave hardly any
        room: there a mixture near to the nearest, and feasible, is returned.
        """
        return self.polytope.nearest(weights_MK)

    def in_words(self) -> list[str]:
        """Each of `polytope.bounds` in words."""
        floors = zip(self.domains, self.floors_K, strict=True)
        caps = zip(self.domains, self.caps_K, strict=True)
        return [
            *(f"the floor of {domain} ({floor:.4g})" for domain, floor in floors),
            *(f"the cap of {domain} ({cap:.4g})" for domain, cap in caps),
            *(f"at least {group.low:.4g} for {group.name}" for group in self.groups),
            *(f"at most {group.high:.4g} for {group.name}" for group in self.groups),
        ]

    def _conflict(self) -> str:
        words = self.in_words()
        return ", ".join(words[bound] for bound in self.polytope.conflict())

    def _check_group(self, group: Group) -> None:
        if not group.domains or len(set(group.domains)) < len(group.domains):
            raise ChoiceError(
                f"A group has domains {list(group.domains)}; expected at least one, each once."
            )
        for domain in group.domains:
            if domain not in self.domains:
                raise ChoiceError(
                    f"Group {group.name} has domain {domain!r}, which is not among "
                    f"{', '.join(self.domains)}.{did_you_mean(domain, self.domains)}"
                )
        if not 0.0 <= group.low <= group.high <= 1.0:
            raise ChoiceError(
                f"Group {group.name} is bounded by {group.low} and {group.high}; expected "
                f"0 <= low <= high <= 1."
            )

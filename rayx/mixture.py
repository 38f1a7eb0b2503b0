"""Mixtures and schedules: what a model is trained on, and when that changes.

A mixture holds integers, millionths rounded by largest remainder, so that the same ratio gives the
same mixture (and the same run_id) however it was written: {7, 3}, {0.7, 0.3} and {2.1, 0.9} agree.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayx.errors import SpecError, did_you_mean

WHOLE = 1_000_000  # a mixture's weights add up to exactly this


def largest_remainder(weights_K: np.ndarray, total: int) -> np.ndarray:
    """Round non-negative weights to integers that add up to `total`.

    Every result is within 1 of its exact quota; ties go to the earlier entry.

    Args:
        weights_K: Shape (K,), >= 0, any positive sum.
        total: The sum wanted, >= 0.

    Returns:
        Integers, shape (K,), int64.
    """
    # Rounding the quota to 1e-6 of a unit makes ties the same after any rescaling of the weights.
    quota_K = np.round(np.asarray(weights_K, dtype=np.float64) / np.sum(weights_K) * total, 6)
    floor_K = np.floor(quota_K).astype(np.int64)
    order = np.argsort(-(quota_K - floor_K), kind="stable")
    floor_K[order[: total - int(floor_K.sum())]] += 1
    return floor_K


class Mixture(Mapping[str, float]):
    """Weights over domains that add up to 1, kept as integer millionths.

    Reads as a mapping from domain to share; domains of weight zero are left out, order does not
    count, equal mixtures are equal and hash alike.

    Args:
        weights: Domain name -> weight, >= 0 and finite, not all zero, in any unit.

    Raises:
        SpecError: No domain, an empty name, or a weight that is negative, not finite or no number.

    >>> Mixture({"web": 7, "code": 3})
    Mixture({'code': 0.3, 'web': 0.7})
    >>> Mixture({"web": 0.7, "code": 0.3, "math": 0}) == Mixture({"code": 3, "web": 7})
    True
    """

    __slots__ = ("millionths",)
    millionths: dict[str, int]

    def __init__(self, weights: Mapping[str, float]) -> None:
        if not isinstance(weights, Mapping):
            raise SpecError(
                f"Mixture is {weights!r}; expected weights by domain, e.g. {{'web': 1}}."
            )
        if not weights:
            raise SpecError("Mixture has no domains: give at least one, e.g. {'web': 1}.")
        for domain, weight in weights.items():
            if not isinstance(domain, str) or not domain:
                raise SpecError(f"Mixture has domain name {domain!r}; expected a non-empty string.")
            if isinstance(weight, (bool, str)) or not isinstance(
                weight, (int, float, np.integer, np.floating)
            ):
                raise SpecError(f"Mixture weight of {domain!r} is {weight!r}; expected a number.")
            too_large = isinstance(weight, int) and weight.bit_length() > 1000  # for a float
            if too_large or not math.isfinite(weight) or weight < 0:
                raise SpecError(
                    f"Mixture weight of {domain!r} is {weight}; expected a finite number >= 0."
                )
        domains = sorted(weights)
        values = np.array([float(weights[d]) for d in domains])
        if values.sum() <= 0:
            raise SpecError(f"Mixture weights of {domains} are all zero; give one a weight > 0.")
        # Dividing by the largest first keeps huge and tiny units from overflowing.
        parts = largest_remainder(values / values.max(), WHOLE)
        self.millionths = {d: int(n) for d, n in zip(domains, parts, strict=True) if n > 0}

    @classmethod
    def uniform(cls, domains: Sequence[str]) -> Mixture:
        """Return equal weights over `domains`."""
        return cls({domain: 1 for domain in domains})

    @classmethod
    def from_array(cls, weights_K: np.ndarray, domains: Sequence[str]) -> Mixture:
        """Return the mixture with weights in the order of `domains`, shape (K,)."""
        if len(weights_K) != len(domains):
            raise SpecError(f"{len(weights_K)} weights for {len(domains)} domains: give one each.")
        return cls({d: float(w) for d, w in zip(domains, weights_K, strict=True)})

    def to_array(self, domains: Sequence[str]) -> np.ndarray:
        """Return the shares in the order of `domains`, shape (K,), zero where a domain is absent.

        Raises:
            SpecError: The mixture has a domain that is not among `domains`.
        """
        self.check(domains)
        return np.array([self.millionths.get(d, 0) for d in domains]) / WHOLE

    def check(self, domains: Sequence[str], where: str = "the corpus") -> None:
        """Raise SpecError where the mixture has a domain that `domains` lacks."""
        known = set(domains)  # there may be thousands
        for domain in self.millionths:
            if domain not in known:
                raise SpecError(
                    f"Mixture has domain {domain!r}, which is not in {where} "
                    f"({', '.join(domains)}).{did_you_mean(domain, domains)}"
                )

    def __getitem__(self, domain: str) -> float:
        return self.millionths[domain] / WHOLE

    def __iter__(self):
        return iter(self.millionths)

    def __len__(self) -> int:
        return len(self.millionths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mixture) and self.millionths == other.millionths

    def __hash__(self) -> int:
        return hash(tuple(self.millionths.items()))

    def __repr__(self) -> str:
        return f"Mixture({dict(self)!r})"


@dataclass(frozen=True, slots=True)
class Phase:
    """A mixture for a number of tokens."""

    mixture: Mixture
    tokens: int

    def __post_init__(self) -> None:
        if not isinstance(self.mixture, Mixture):
            raise SpecError(f"Phase has mixture {self.mixture!r}; expected a Mixture.")
        if not isinstance(self.tokens, int) or isinstance(self.tokens, bool) or self.tokens <= 0:
            raise SpecError(f"Phase has {self.tokens!r} tokens; expected an integer > 0.")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Phases in order; each change of phase is a split point in time."""

    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "phases", tuple(self.phases))
        if not self.phases:
            raise SpecError("Schedule has no phases; give at least one Phase(mixture, tokens).")
        for phase in self.phases:
            if not isinstance(phase, Phase):
                raise SpecError(f"Schedule has {phase!r}; expected a Phase(mixture, tokens).")

    @classmethod
    def constant(cls, mixture: Mixture, tokens: int) -> Schedule:
        """Return the schedule of one phase."""
        return cls((Phase(mixture, tokens),))

    @property
    def tokens(self) -> int:
        """Tokens of all phases."""
        return sum(phase.tokens for phase in self.phases)

    def domain_tokens(self, tokens: int) -> dict[str, float]:
        """Return domain -> tokens among the first `tokens` of the schedule."""
        read: dict[str, float] = {}
        for phase in self.phases:
            taken = min(tokens, phase.tokens)
            tokens -= taken
            for domain, weight in phase.mixture.items():
                read[domain] = read.get(domain, 0.0) + weight * taken
        return {domain: count for domain, count in read.items() if count > 0}

    def average(self) -> Mixture:
        """Return the mixture of all tokens together (what a regressor at one scale sees)."""
        total: dict[str, float] = {}
        for phase in self.phases:
            for domain, weight in phase.mixture.millionths.items():
                total[domain] = total.get(domain, 0) + weight * phase.tokens
        return Mixture(total)

    def to_json(self) -> list[dict]:
        """Return plain lists and dicts; weights as millionths."""
        return [{"mixture": p.mixture.millionths, "tokens": p.tokens} for p in self.phases]

    @classmethod
    def from_json(cls, data: list[dict]) -> Schedule:
        """Read what `to_json` wrote."""
        return cls(tuple(Phase(Mixture(p["mixture"]), p["tokens"]) for p in data))


def epochs(
    mixture: Mapping[str, float], tokens: int, domain_tokens: Mapping[str, int]
) -> dict[str, float]:
    """Return how often `tokens` of training pass over each domain: w_k * tokens / supply_k."""
    return {d: w * tokens / domain_tokens[d] for d, w in mixture.items()}

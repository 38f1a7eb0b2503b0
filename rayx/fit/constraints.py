"""Stage 6, choice: floors and caps on a mixture, and the nearest mixture that keeps to them.

`rayx.caps` does this for one mixture and rounds to millionths; a choice weighs 100,000 candidates,
so here it is one sort over all of them.

Shapes: M mixtures, K domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayx.caps import supply_caps
from rayx.errors import ChoiceError, SpecError, did_you_mean

SLACK = 1e-9  # caps that miss a sum of 1 by less are taken to reach it
NEGLIGIBLE = 1e-12  # a weight below counts as 0: no factor that keeps ratios can lift it


@dataclass(frozen=True, eq=False)
class Constraints:
    """Least and largest weight of each domain.

    Args:
        domains: Names, in the order of the arrays.
        floors_K: Least weights, in [0, 1].
        caps_K: Largest weights, in [0, 1].

    Raises:
        ChoiceError: No mixture satisfies them; the message names the conflict.
    """

    domains: tuple[str, ...]
    floors_K: np.ndarray
    caps_K: np.ndarray

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
        for domain, floor, cap in zip(self.domains, self.floors_K, self.caps_K, strict=True):
            if floor > cap:
                raise ChoiceError(
                    f"The floor of {domain!r} ({floor:.6g}) is above its cap ({cap:.6g}). "
                    f"Lower the floor, or allow more epochs of it."
                )
        if self.caps_K.sum() < 1.0 - SLACK:
            raise ChoiceError(
                f"The caps sum to {self.caps_K.sum():.6g}; a mixture needs 1. "
                f"Raise caps, allow more epochs, or lower the token budget."
            )
        if self.floors_K.sum() > 1.0 + SLACK:
            raise ChoiceError(
                f"The floors sum to {self.floors_K.sum():.6g}; a mixture has 1. Lower floors."
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
    ) -> Constraints:
        """Floors and caps of some domains; the others have 0 and 1.

        Raises:
            ChoiceError: An unknown domain, or no mixture satisfies them.
        """
        bounds = []
        for kind, given, default in (("floors", floors, 0.0), ("caps", caps, 1.0)):
            for domain in given or {}:
                if domain not in domains:
                    raise ChoiceError(
                        f"The {kind} have domain {domain!r}, which is not among "
                        f"{', '.join(domains)}.{did_you_mean(domain, domains)}"
                    )
            bounds.append(np.array([(given or {}).get(domain, default) for domain in domains]))
        return cls(domains, *bounds)

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

    def nearest(self, weights_MK: np.ndarray) -> np.ndarray:
        """The nearest mixtures that keep to the constraints; see `capped`."""
        return capped(weights_MK, self.caps_K, self.floors_K)


def capped(weights_MK: np.ndarray, caps_K: np.ndarray, floors_K: np.ndarray) -> np.ndarray:
    """Move each mixture between floors and caps, all free domains by one common factor.

    x_k = min(max(t w_k, floor_k), cap_k) with the t that makes x sum to 1. The sum is piecewise
    linear in t, with a corner where a domain leaves its floor and one where it meets its cap; so t
    is found exactly, by sorting the corners. Where all domains of positive weight are at their
    caps, the rest goes to the others in proportion to the room that they have.

    Args:
        weights_MK: Mixtures, >= 0, each with a positive sum.
        caps_K: Largest weights; they sum to 1 or more.
        floors_K: Least weights; they sum to 1 or less, and are at most the caps.

    Returns:
        Shape (M, K): rows sum to 1 within rounding, no weight is outside of its bounds. A mixture
        that is within them already is returned as it is.

    Source: the projection on the simplex with bounds in Kullback-Leibler divergence; corners as in
        Pardalos and Kovoor 1990, Math. Programming 46.
    """
    weights_MK = weights_MK / weights_MK.sum(1, keepdims=True)
    result_MK = weights_MK.copy()
    outside_M = ((weights_MK > caps_K) | (weights_MK < floors_K)).any(1)
    if not outside_M.any():
        return result_MK
    w_MK = weights_MK[outside_M]
    w_MK = np.where(w_MK < NEGLIGIBLE, 0.0, w_MK)
    with np.errstate(divide="ignore", invalid="ignore"):
        leave_MK = np.where(w_MK > 0, floors_K / w_MK, np.inf)
        arrive_MK = np.where(w_MK > 0, caps_K / w_MK, np.inf)
    corner_MJ = np.concatenate([leave_MK, arrive_MK], axis=1)
    slope_MJ = np.concatenate([w_MK, -w_MK], axis=1)
    order_MJ = np.argsort(corner_MJ, axis=1, kind="stable")
    corner_MJ = np.take_along_axis(corner_MJ, order_MJ, axis=1)
    slope_MJ = np.cumsum(np.take_along_axis(slope_MJ, order_MJ, axis=1), axis=1)
    finite_MJ = np.isfinite(corner_MJ)
    last_M = np.where(finite_MJ, corner_MJ, 0.0).max(1, keepdims=True)
    corner_MJ = np.where(finite_MJ, corner_MJ, last_M)  # domains of weight 0 have no corner
    gain_MJ = np.diff(corner_MJ, axis=1) * slope_MJ[:, :-1]
    sum_MJ = floors_K.sum() + np.cumsum(gain_MJ, axis=1)
    segment_M = np.minimum((sum_MJ < 1.0).sum(1), gain_MJ.shape[1] - 1)
    rows = np.arange(len(w_MK))
    sum_M = sum_MJ[rows, segment_M] - gain_MJ[rows, segment_M]
    slope_M = slope_MJ[rows, segment_M]
    step_M = np.where(slope_M > NEGLIGIBLE, (1.0 - sum_M) / np.maximum(slope_M, NEGLIGIBLE), 0.0)
    width_M = corner_MJ[rows, segment_M + 1] - corner_MJ[rows, segment_M]
    factor_M = corner_MJ[rows, segment_M] + np.clip(step_M, 0.0, width_M)
    x_MK = np.clip(factor_M[:, None] * w_MK, floors_K, caps_K)
    # What is missing (weights of 0, or rounding) goes where there is room; what is over, likewise.
    missing_M1 = 1.0 - x_MK.sum(1, keepdims=True)
    room_MK = np.where(missing_M1 > 0, caps_K - x_MK, x_MK - floors_K)
    room_M1 = np.maximum(room_MK.sum(1, keepdims=True), 1e-300)
    result_MK[outside_M] = np.clip(x_MK + missing_M1 * room_MK / room_M1, floors_K, caps_K)
    return result_MK

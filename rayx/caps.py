"""Caps: which mixtures can be afforded, and the nearest affordable one.

A cap is the largest share that a domain may get, mostly because its tokens would be repeated too
often (`supply_caps`). Caps hold exactly, also after weights are rounded to millionths: `Borders`
rounds caps down and floors up first and shares the millionths between them.

Legend: M mixtures, of which L are left to be done, K domains.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from rayx.errors import SpecError, did_you_mean
from rayx.mixture import WHOLE, Mixture, largest_remainder
from rayx.spec import require


def supply_caps(
    domain_tokens: Mapping[str, float], budget_tokens: float, max_epochs: float
) -> dict[str, float]:
    """Return the largest share of each domain: min(1, max_epochs * tokens_k / budget_tokens).

    Args:
        domain_tokens: Domain -> training tokens that there are, >= 0.
        budget_tokens: Tokens of the run that the shares are for (the final run, not the proxy).
        max_epochs: How often a token may be seen, > 0.

    Returns:
        Domain -> cap in [0, 1].

    Raises:
        SpecError: A number is out of range, or all tokens together do not last for the budget.
    """
    check_domains(domain_tokens)
    require_positive("budget_tokens", budget_tokens)
    require_positive("max_epochs", max_epochs)
    for domain, tokens in domain_tokens.items():
        require(is_share(tokens), f"Tokens of {domain!r}", tokens, "a finite number >= 0")
    supply = sum(domain_tokens.values())
    if supply * max_epochs < budget_tokens:
        needed = f"{budget_tokens / supply:.3g}" if supply else "infinitely many"
        raise SpecError(
            f"The {len(domain_tokens)} domains hold {supply:,.0f} tokens; a budget of "
            f"{budget_tokens:,.0f} passes over them {needed} times, max_epochs is {max_epochs:g}. "
            "Lower the budget, raise max_epochs or add data."
        )
    return {d: min(1.0, max_epochs * n / budget_tokens) for d, n in domain_tokens.items()}


def cap_weights(
    weights_K: np.ndarray, caps_K: np.ndarray, floors_K: np.ndarray | None = None
) -> np.ndarray:
    """Bring weights between floors and caps by scaling all that are free by one common factor.

    result_k = min(max(t * w_k, floor_k), cap_k) with t such that the results add up to 1: ratios
    among domains at neither border are kept (of all feasible points, this is the nearest to w in
    Kullback-Leibler divergence). Weights inside the borders are only normalised. Where caps stop
    every domain of positive weight, those of weight 0 share the rest equally.

    One pass of clipping and renormalising is not enough (it pushes earlier domains back over
    their caps), so borders are fixed round by round: exact after at most K rounds of O(K), in
    practice two or three. `fill` does it for many mixtures at once.

    Args:
        weights_K: Shape (K,), >= 0, in any unit; all zero means equal.
        caps_K: Shape (K,), largest shares, >= 0; infinity for none.
        floors_K: Shape (K,), least shares, >= 0 and at most the caps; default 0.

    Returns:
        Shares, shape (K,), that add up to 1 (to float precision), each within its borders.

    Raises:
        SpecError: No shares satisfy the borders, or an array is not valid.
    """
    weights_K = np.asarray(weights_K, dtype=np.float64)
    caps_K = np.asarray(caps_K, dtype=np.float64)
    floors_K = np.zeros_like(caps_K) if floors_K is None else np.asarray(floors_K, np.float64)
    if weights_K.ndim != 1 or not weights_K.shape == caps_K.shape == floors_K.shape:
        raise SpecError(
            f"weights_K, caps_K and floors_K have shapes {weights_K.shape}, {caps_K.shape} and "
            f"{floors_K.shape}; expected (K,) each."
        )
    require(
        bool(((weights_K >= 0) & (weights_K < math.inf)).all()),
        "weights_K",
        weights_K,
        "finite numbers >= 0",
    )
    require(bool((caps_K >= 0).all()), "caps_K", caps_K, "numbers >= 0")
    require(
        bool(((floors_K >= 0) & (floors_K <= caps_K)).all()),
        "floors_K",
        floors_K,
        f"numbers in [0, cap], with caps {caps_K}",
    )
    caps_K = np.minimum(caps_K, 1.0)
    # Borders that miss 1 by a rounding error of theirs are taken as they are.
    if caps_K.sum() < 1 - 1e-9 or floors_K.sum() > 1 + 1e-9:
        raise SpecError(
            f"Caps add up to {caps_K.sum():.6g}, floors to {floors_K.sum():.6g}; expected at "
            "least 1 and at most 1. Raise a cap or lower a floor."
        )
    if not weights_K.any():
        weights_K = np.ones_like(weights_K)
    return fill(weights_K[None], floors_K, caps_K, 1.0)[0]


class Borders:
    """Least and largest shares of domains, as millionths.

    Args:
        domains: Names; kept sorted, so that their order never counts.
        caps: Domain -> largest share, >= 0; a domain left out has none.
        floor: Least share of every domain.
        hint: Added to the error where the caps add up to less than 1.

    Raises:
        SpecError: A name or number is not valid, or no mixture lies inside.
    """

    def __init__(
        self,
        domains: Collection[str],
        caps: Mapping[str, float] | None = None,
        floor: float = 0.0,
        hint: str = "",
    ) -> None:
        self.domains = check_domains(domains)
        check_known(caps or {}, self.domains, "caps")
        for domain, cap in (caps or {}).items():
            require(is_share(cap) or cap == math.inf, f"The cap of {domain!r}", cap, "a share >= 0")
        shares = [min(float((caps or {}).get(d, 1.0)), 1.0) for d in self.domains]
        self.upper_K = np.array([_round_down(share) for share in shares])
        if self.upper_K.sum() < WHOLE:
            listed = ", ".join(
                f"{d} {share:.4g}" for d, share in zip(self.domains[:20], shares, strict=False)
            )
            more = f" and {len(shares) - 20} more" if len(shares) > 20 else ""
            raise SpecError(
                f"Caps ({listed}{more}) add up to {self.upper_K.sum() / WHOLE:.6f} after rounding "
                f"down to millionths; expected at least 1.{hint} Raise a cap, add domains or data, "
                "allow more epochs or train on fewer tokens."
            )
        highest = min(1 / len(shares), *self.upper_K / WHOLE)
        require(
            is_share(floor) and floor <= highest,
            "floor",
            floor,
            f"a share in [0, {highest:.6g}]: floors of {len(shares)} domains add up to at most 1 "
            "and stay under every cap",
        )
        self.lower_K = np.full(len(shares), -_round_down(-floor))

    def round(self, weights_K: np.ndarray) -> np.ndarray:
        """Return the millionths, shape (K,), nearest to `weights_K` in the sense of cap_weights."""
        weights_K = weights_K if weights_K.any() else np.ones(len(weights_K))
        parts_K = fill(weights_K[None], self.lower_K, self.upper_K, WHOLE)[0]
        # Between integer borders, rounding down or up stays between them.
        return largest_remainder(parts_K, WHOLE)

    def mixture(self, weights_K: np.ndarray) -> Mixture:
        """Return the mixture nearest to `weights_K`, shape (K,), in the sense of cap_weights."""
        return Mixture.from_array(self.round(weights_K), self.domains)


def fill(
    weights_MK: np.ndarray, lower_K: np.ndarray, upper_K: np.ndarray, total: float
) -> np.ndarray:
    """Bring many mixtures between bounds; see `cap_weights`, which checks its arguments.

    Args:
        weights_MK: Shape (M, K), >= 0, no row all zero.
        lower_K: Least values; their sum is at most `total`.
        upper_K: Largest values; their sum is at least `total`.
        total: What every row adds up to.

    Returns:
        min(max(t * w, lower), upper), shape (M, K), with the t of each row that gives the total.
    """
    free_MK = weights_MK > 0
    most_M = np.where(free_MK, upper_K, lower_K).sum(1)
    # Where caps stop all that have a weight, those stay there and the others share equally.
    spills_M1 = ((most_M < total) & ~free_MK.all(1))[:, None]
    result_MK = np.where(spills_M1 & free_MK, upper_K, lower_K).astype(np.float64)
    weights_MK = np.where(spills_M1, 1.0, weights_MK)
    free_MK = free_MK ^ spills_M1
    left_M = np.arange(len(weights_MK))
    while len(left_M):
        free_LK = free_MK[left_M]
        w_LK = np.where(free_LK, weights_MK[left_M], 0.0)
        # Relative to the largest, weights as small as 1e-300 neither vanish nor overflow.
        w_LK /= np.maximum(w_LK.max(1, keepdims=True), np.finfo(float).tiny)
        rest_L1 = total - np.where(free_LK, 0.0, result_MK[left_M]).sum(1, keepdims=True)
        share_LK = rest_L1 * w_LK / np.maximum(w_LK.sum(1, keepdims=True), np.finfo(float).tiny)
        over_LK = np.where(free_LK, np.maximum(share_LK - upper_K, 0.0), 0.0)
        under_LK = np.where(free_LK, np.maximum(lower_K - share_LK, 0.0), 0.0)
        # If the caps cut off more than the floors add, t can only rise: what is over stays over.
        rises_L1 = over_LK.sum(1, keepdims=True) >= under_LK.sum(1, keepdims=True)
        fixed_LK = np.where(rises_L1, over_LK, under_LK) > 0
        value_LK = np.where(fixed_LK, np.where(rises_L1, upper_K, lower_K), share_LK)
        result_MK[left_M] = np.where(free_LK, value_LK, result_MK[left_M])
        free_MK[left_M] = free_LK & ~fixed_LK
        left_M = left_M[fixed_LK.any(1)]
    return result_MK


def _round_down(share: float) -> int:
    """Return the most millionths whose share, as a float, is at most `share`."""
    parts = math.floor(share * WHOLE) + 1
    while parts / WHOLE > share:
        parts -= 1
    return parts


def check_domains(domains: Iterable[str]) -> list[str]:
    """Return domain names sorted; SpecError where there are none or one is not valid."""
    names = [] if isinstance(domains, str) else list(domains)
    require(bool(names), "The list of domains", domains, "at least one name")
    for name in names:
        require(isinstance(name, str) and bool(name), "Domain name", name, "a non-empty string")
    require(len(set(names)) == len(names), "The list of domains", names, "each name once")
    return sorted(names)


def check_known(given: Iterable[str], domains: Collection[str], what: str) -> None:
    """Raise SpecError where `what` names a domain that is not among `domains`."""
    for name in given:
        if name not in domains:
            raise SpecError(
                f"{what} has domain {name!r}, which is not among {', '.join(domains)}."
                f"{did_you_mean(str(name), domains)}"
            )


def is_share(value: object) -> bool:
    """Whether `value` is a finite number >= 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        return False
    return bool(0 <= value < math.inf)


def require_positive(what: str, value: object) -> None:
    """Raise SpecError unless `value` is a finite number > 0."""
    require(is_share(value) and value != 0, what, value, "a finite number > 0")

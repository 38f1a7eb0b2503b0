"""Caps: which mixtures can be afforded, and the nearest affordable one.

A cap is the largest share that a domain may get, mostly because its tokens would be repeated too
often (`supply_caps`). Caps hold exactly, also after weights are rounded to millionths: `Borders`
rounds caps down and floors up first and shares the millionths between them.

Legend: K domains.
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
    practice two or three.

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
    return _fill(weights_K, floors_K, caps_K, 1.0)


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
        parts_K = _fill(weights_K, self.lower_K, self.upper_K, WHOLE)
        # Between integer borders, rounding down or up stays between them.
        return largest_remainder(parts_K, WHOLE)

    def mixture(self, weights_K: np.ndarray) -> Mixture:
        """Return the mixture nearest to `weights_K`, shape (K,), in the sense of cap_weights."""
        return Mixture.from_array(self.round(weights_K), self.domains)


def _fill(
    weights_K: np.ndarray, lower_K: np.ndarray, upper_K: np.ndarray, total: float
) -> np.ndarray:
    """Return min(max(t * w, lower), upper) with the t that makes them add up to `total`."""
    result_K = np.array(lower_K, dtype=np.float64)
    free_K = weights_K > 0
    rest = total - result_K[~free_K].sum()
    if upper_K[free_K].sum() < rest and not free_K.all():
        result_K[free_K] = upper_K[free_K]
        zero_K = ~free_K
        result_K[zero_K] = _fill(
            np.ones(zero_K.sum()), lower_K[zero_K], upper_K[zero_K], total - result_K[free_K].sum()
        )
        return result_K
    while free_K.any():
        # Relative to the largest, weights as small as 1e-300 neither vanish nor overflow.
        relative = weights_K[free_K] / weights_K[free_K].max()
        shares = rest * relative / relative.sum()
        lower, upper = lower_K[free_K], upper_K[free_K]
        over, under = shares - upper, lower - shares
        # If the caps cut off more than the floors add, t can only rise: what is over stays over.
        at_border, border = (
            (over > 0, upper)
            if over[over > 0].sum() >= under[under > 0].sum()
            else (under > 0, lower)
        )
        if not at_border.any():
            result_K[free_K] = shares
            break
        fixed = np.flatnonzero(free_K)[at_border]
        result_K[fixed] = border[at_border]
        free_K[fixed] = False
        rest -= border[at_border].sum()
    return result_K


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

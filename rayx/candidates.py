"""Candidates: which mixtures to try.

A sweep learns only about the part of the simplex that its candidates cover, and wastes the runs on
mixtures that the final run could never afford. So every proposer takes `caps`, the largest share
of each domain (see rayx.caps), and its mixtures keep them exactly, rounding included.

The order of domains never counts. Of a longer list the beginning is the shorter list, so a sweep
that is extended keeps the runs that it has.

Legend: K domains, B draws, N mixtures.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.stats import qmc

from rayx.caps import (
    Borders,
    cap_weights,
    check_domains,
    check_known,
    is_share,
    require_positive,
    supply_caps,
)
from rayx.errors import SpecError
from rayx.mixture import WHOLE, Mixture
from rayx.spec import require

__all__ = [
    "cap_weights",
    "proportional_mixture",
    "regmix_mixtures",
    "sobol_mixtures",
    "supply_caps",
    "uniform_mixture",
    "vertex_mixtures",
]

log = logging.getLogger(__name__)


def regmix_mixtures(
    prior: Mapping[str, float],
    num: int,
    *,
    seed: int,
    caps: Mapping[str, float] | None = None,
    temperature: float = 0.5,
    strengths: tuple[float, float] = (0.1, 5.0),
    num_strengths: int = 15,
    min_weight: float = 2e-4,
    max_prior_ratio: float = 15.0,
    min_distance: float = 1e-3,
    multiplier: int = 100,
) -> list[Mixture]:
    """Draw mixtures around the natural distribution, from near one domain to near the prior.

    w ~ Dirichlet(s * prior_T), prior_T proportional to prior^temperature, with s one of
    `num_strengths` strengths spaced evenly in the logarithm; small s gives mixtures near a vertex,
    large s near prior_T. Draws with w_k > min(max_prior_ratio * prior_k, cap_k) are rejected.

    Args:
        prior: Domain -> tokens or share, > 0 in any unit: what the data is by nature.
        num: Mixtures wanted.
        seed: Seed of the draws.
        caps: Domain -> largest share, >= 0; a domain left out has none.
        temperature: Exponent that evens the prior out, > 0; 1 keeps it, near 0 makes it uniform.
        strengths: Smallest and largest concentration s.
        num_strengths: How many strengths between them, the ends included.
        min_weight: Shares below are set to 0 and the others renormalised; a domain whose cap is
            below is left out.
        max_prior_ratio: How many times its prior share a domain may get.
        min_distance: Least L1 distance between any two of the mixtures.
        multiplier: Draws for each mixture; where none satisfies the caps, the one nearest to them
            is pulled inside as by `cap_weights`, and how many there were is logged.

    Returns:
        `num` mixtures, deterministic given the seed; those of num=n are the first n of num=2n.

    Raises:
        SpecError: An argument is out of range, the caps leave no mixture, or fewer than `num`
            mixtures lie `min_distance` apart.

    Source: Liu et al. 2024 (RegMix), arXiv:2407.01492; constants from the authors' code,
        mixture_config/synthesize_mixture.py.
    Differs: each mixture has draws of its own instead of a pick from one pool (this keeps the
        beginning of the list the same); caps beside the ratio to the prior, which hold after
        renormalising and rounding too; weights are multiples of a millionth instead of 2e-4;
        mixtures differ by 1e-3 instead of 1e-5.
    """
    domains = check_domains(prior)
    _check_draws(num, seed)
    for domain in domains:
        require_positive(f"The prior of {domain!r} (leave out what has no tokens)", prior[domain])
    require_positive("temperature", temperature)
    require_positive("max_prior_ratio", max_prior_ratio)
    for strength in strengths:
        require_positive("A strength", strength)
    _check_count("num_strengths", num_strengths)
    _check_count("multiplier", multiplier)
    require(is_share(min_weight) and min_weight < 1, "min_weight", min_weight, "in [0, 1)")
    require(is_share(min_distance) and min_distance < 2, "min_distance", min_distance, "in [0, 2)")

    borders = Borders(domains, caps)  # so that errors in the caller's own caps are told as such
    prior_K = np.array([float(prior[d]) for d in domains])
    prior_K = prior_K / prior_K.max()
    tempered_K = prior_K**temperature / (prior_K**temperature).sum()
    caps_K = np.minimum(borders.upper_K / WHOLE, max_prior_ratio * prior_K / prior_K.sum())
    caps_K[caps_K < min_weight] = 0.0
    borders = Borders(
        domains,
        dict(zip(domains, caps_K, strict=True)),
        hint=f" They include max_prior_ratio={max_prior_ratio:g} times the prior, and are 0 where "
        f"below min_weight={min_weight:g}: raise the one or lower the other.",
    )
    strengths_B = np.geomspace(min(strengths), max(strengths), num_strengths)
    accepted = _Distinct(len(domains), num, min_distance)
    pulled = 0
    for index in range(num):
        rng = np.random.default_rng((seed, index))
        outside: list[np.ndarray] = []
        tries, found = 0, False
        while tries < multiplier and not found:
            concentration_BK = rng.permutation(strengths_B)[:, None] * tempered_K
            weights_BK = _dirichlet(rng, concentration_BK)[: multiplier - tries]
            tries += len(weights_BK)
            kept_BK = np.where(weights_BK >= min_weight, weights_BK, 0.0)
            # Over thousands of domains every share may be below min_weight: keep such a draw.
            weights_BK = np.where(kept_BK.any(axis=1, keepdims=True), kept_BK, weights_BK)
            weights_BK = weights_BK / weights_BK.sum(axis=1, keepdims=True)
            inside_B = (weights_BK <= caps_K).all(axis=1)
            outside.extend(weights_BK[~inside_B])
            found = any(accepted.add(borders.round(w_K)) for w_K in weights_BK[inside_B])
        if not found:
            pulled += 1
            # The draw with the least share over its caps first: it is bent the least.
            outside.sort(key=lambda w_K: np.maximum(w_K - caps_K, 0).sum())
            if not any(accepted.add(borders.round(w_K)) for w_K in outside):
                raise SpecError(
                    f"Found only {index} of {num} mixtures that satisfy the caps and lie "
                    f"min_distance={min_distance:g} apart. Ask for fewer, lower min_distance or "
                    "raise the caps."
                )
    if pulled:
        log.info(
            "%d of %d mixtures pulled inside the caps: no draw of %d was", pulled, num, multiplier
        )
    return [Mixture.from_array(parts_K, domains) for parts_K in accepted.parts_NK]


def sobol_mixtures(
    domains: Sequence[str], num: int, seed: int, caps: Mapping[str, float] | None = None
) -> list[Mixture]:
    """Spread mixtures evenly over the simplex: w_k = e_k / sum(e), e = -log(1 - u), u Sobol.

    Exponentials of uniform points give the uniform distribution on the simplex. Caps squeeze it,
    ray by ray from a point inside them, into what they leave: points that `cap_weights` pulled
    inside would all lie on the border, in tight caps on a few corners.

    Args:
        domains: Names.
        num: Mixtures wanted.
        seed: Seed of the scrambling.
        caps: Domain -> largest share, >= 0; a domain left out has none.

    Returns:
        `num` different mixtures; those of num=n are the first n of num=2n.

    Raises:
        SpecError: An argument is not valid, or the caps leave too few mixtures.
    """
    borders = Borders(domains, caps)
    _check_draws(num, seed)
    sampler = qmc.Sobol(len(borders.domains), scramble=True, rng=np.random.default_rng(seed))
    accepted = _Distinct(len(borders.domains), num, 0.0)
    # Sobol points come in powers of two; twice the first power serves where some are equal.
    for points in (1 << (num - 1).bit_length(),) * 2:
        for point_K in sampler.random(points):
            # On the lower border an exponential is 0; were all of them, there were no mixture.
            weights_K = np.maximum(-np.log1p(-point_K), 1e-12)
            accepted.add(borders.round(_squeeze(weights_K, borders.upper_K / WHOLE)))
            if accepted.count == num:
                return [Mixture.from_array(p_K, borders.domains) for p_K in accepted.parts_NK]
    raise SpecError(
        f"Found only {accepted.count} of {num} different mixtures under the caps. "
        "Ask for fewer or raise the caps."
    )


def vertex_mixtures(
    domains: Sequence[str],
    caps: Mapping[str, float] | None = None,
    floor: float = 0.0,
    rest: Mapping[str, float] | None = None,
) -> list[Mixture]:
    """Give each domain in turn as much as its cap allows: the corners of what can be afforded.

    Args:
        domains: Names.
        caps: Domain -> largest share, >= 0; a domain left out has none.
        floor: Least share of every domain, in [0, 1/K].
        rest: Domain -> weight, > 0, by which the others share what is left (e.g. their tokens);
            default equal.

    Returns:
        Mixtures in the order of sorted names, without domains of cap 0; equal ones appear once.

    Raises:
        SpecError: Caps or floor leave no mixture, or a name or number is not valid.
    """
    borders = Borders(domains, caps, floor)
    check_known(rest or {}, borders.domains, "rest")
    for domain, weight in (rest or {}).items():
        require_positive(f"rest of {domain!r}", weight)
    rest_K = np.array([float((rest or {}).get(d, 0 if rest else 1)) for d in borders.domains])
    lower_K, upper_K = borders.lower_K, borders.upper_K
    found: dict[Mixture, None] = {}
    for k in np.flatnonzero(upper_K):
        top = min(upper_K[k], WHOLE - lower_K.sum() + lower_K[k])
        # Held at the top from below too, the domain takes no part in sharing what is left.
        here_K = np.arange(len(rest_K)) == k
        borders.lower_K, borders.upper_K = np.where(here_K, top, (lower_K, upper_K))
        found[borders.mixture(rest_K)] = None
    return list(found)


def uniform_mixture(domains: Sequence[str], caps: Mapping[str, float] | None = None) -> Mixture:
    """Return equal shares; what caps cut off is shared equally by the other domains.

    Raises:
        SpecError: The caps add up to less than 1, or a name or cap is not valid.
    """
    borders = Borders(domains, caps)
    return borders.mixture(np.ones(len(borders.domains)))


def proportional_mixture(
    tokens: Mapping[str, float], caps: Mapping[str, float] | None = None
) -> Mixture:
    """Return shares in proportion to `tokens`; what caps cut off goes to the others likewise.

    Raises:
        SpecError: The caps of domains with tokens add up to less than 1, or a name, count or cap
            is not valid.
    """
    check_known(caps or {}, tokens, "caps")
    domains = list(Mixture(tokens))  # without those that have no tokens
    borders = Borders(domains, {d: cap for d, cap in (caps or {}).items() if d in domains})
    return borders.mixture(np.array([float(tokens[d]) for d in domains]))


def _squeeze(weights_K: np.ndarray, caps_K: np.ndarray) -> np.ndarray:
    """Map the simplex, one to one, onto the part of it under the caps.

    Along a ray from caps / sum(caps), a point keeps its place between the centre and the border;
    where the ray meets no cap it stays as it is.
    """
    centre_K = caps_K / caps_K.sum()
    weights_K = np.where(caps_K > 0, weights_K, 0.0)
    ray_K = weights_K / weights_K.sum() - centre_K
    with np.errstate(divide="ignore", invalid="ignore"):
        to_zero = np.where(ray_K < 0, -centre_K / ray_K, np.inf).min()
        to_cap = np.where(ray_K > 0, (caps_K - centre_K) / ray_K, np.inf).min()
    scale = 1.0 if to_cap >= to_zero else to_cap / to_zero
    return np.maximum(centre_K + scale * ray_K, 0.0)


class _Distinct:
    """Mixtures, as millionths, that lie at least `min_distance` (L1, as shares) apart."""

    def __init__(self, num_domains: int, num: int, min_distance: float) -> None:
        self.parts_NK = np.zeros((num, num_domains), dtype=np.int64)
        self.count = 0
        self._limit = min_distance * WHOLE
        # |a.x - a.y| <= L1(x, y) for any a in [-1, 1]^K: one number tells most mixtures apart.
        self._direction_K = np.linspace(-1.0, 1.0, num_domains)
        self._position_N = np.zeros(num)

    def add(self, parts_K: np.ndarray) -> bool:
        """Add a mixture and return True, unless it is too near to one that is there."""
        position = float(self._direction_K @ parts_K)
        near_N = np.abs(self._position_N[: self.count] - position) <= self._limit + 1e-3
        distances = np.abs(self.parts_NK[: self.count][near_N] - parts_K).sum(axis=1)
        if (distances < max(self._limit, 1)).any():
            return False
        self.parts_NK[self.count] = parts_K
        self._position_N[self.count] = position
        self.count += 1
        return True


def _dirichlet(rng: np.random.Generator, concentration_BK: np.ndarray) -> np.ndarray:
    """Draw from Dirichlet distributions, also where a concentration is as small as 1e-6."""
    # Gamma(a) is Gamma(a + 1) * U^(1/a); in the logarithm it does not underflow.
    log_BK = np.log(rng.standard_gamma(concentration_BK + 1))
    log_BK += np.log1p(-rng.random(concentration_BK.shape)) / concentration_BK
    weights_BK = np.exp(log_BK - log_BK.max(axis=1, keepdims=True))
    return weights_BK / weights_BK.sum(axis=1, keepdims=True)


def _check_count(what: str, value: object) -> None:
    positive = isinstance(value, int) and not isinstance(value, bool) and value > 0
    require(positive, what, value, "an integer > 0")


def _check_draws(num: int, seed: int) -> None:
    _check_count("num (of mixtures)", num)
    is_int = isinstance(seed, int) and not isinstance(seed, bool)
    require(is_int and seed >= 0, "seed", seed, "an integer >= 0")

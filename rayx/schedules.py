"""Schedules: fixed plans of the mixture over a run, written as phases in order.

Runs whose schedules begin alike share their beginning (`on_trunk`), so that trying many ends costs
little.

Shapes: K domains.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from rayx.branching import make_branch, make_trunk
from rayx.caps import check_domains, is_share, require_positive
from rayx.errors import SpecError
from rayx.mixture import Mixture, Phase, Schedule, epochs, largest_remainder
from rayx.recipe import is_int, require
from rayx.spec import TrainSpec


def tempered(weights_K: np.ndarray, tau: float) -> np.ndarray:
    """Return shares at temperature tau: p_i ∝ w_i^(1/tau), shape (K,), sum 1.

    Args:
        weights_K: Tokens or shares, > 0, in any unit.
        tau: Temperature, > 0: 1 keeps the proportions, infinity makes them equal, less than 1
            makes the largest domain larger.

    Raises:
        SpecError: tau is not above 0.
    """
    ok = isinstance(tau, (int, float)) and not isinstance(tau, bool) and tau > 0
    require(ok, "A temperature tau", tau, "a number > 0, infinity included")
    # The largest weight becomes 1, so that no power overflows.
    powers_K = np.exp((np.log(weights_K) - np.log(np.max(weights_K))) / tau)
    return powers_K / powers_K.sum()


def temperature(tokens_by_domain: Mapping[str, float], tau: float) -> Mixture:
    """Return the mixture of temperature sampling: p(i; tau) = |D_i|^(1/tau) / sum_j |D_j|^(1/tau).

    Args:
        tokens_by_domain: Domain -> tokens that there are, or shares, > 0.
        tau: Temperature, > 0; 1 is proportional, infinity uniform.

    Raises:
        SpecError: Fewer than two domains, or a number that is not above 0.

    Source: Li et al. 2024, arXiv:2410.04579.
    """
    domains = check_domains(tokens_by_domain)
    expected = "two domains or more; with one, a temperature changes nothing"
    require(len(domains) > 1, "The list of domains", domains, expected)
    for domain in domains:
        require_positive(f"Tokens of {domain!r}", tokens_by_domain[domain])
    weights_K = np.array([float(tokens_by_domain[d]) for d in domains])
    return Mixture.from_array(tempered(weights_K, tau), domains)


def in_phases(parts: Sequence[tuple[float, Mixture]], budget_tokens: int) -> Schedule:
    """Return the schedule of any fixed list of (share of the tokens, mixture), in order.

    Tokens are rounded by largest remainder: phases add up to the budget exactly. A share of 0 is
    left out, and neighbours of one mixture are one phase, so that equal plans are equal runs.

    Args:
        parts: Shares >= 0 that add up to 1, each with its mixture.
        budget_tokens: Tokens of the whole run, an integer > 0.

    Raises:
        SpecError: A share is negative, or the shares do not add up to 1; the budget is no count, or
            too small for a phase to get a token.
    """
    shares = [share for share, _ in parts]
    for share in shares:
        require(is_share(share), "The share of a phase", share, "a number in [0, 1]")
    total = math.fsum(shares)
    require(abs(total - 1.0) < 1e-6, "The sum of the phases' shares", total, "1")
    ok = is_int(budget_tokens) and budget_tokens > 0
    require(ok, "budget_tokens", budget_tokens, "an integer > 0")
    tokens = largest_remainder(np.array(shares), budget_tokens).tolist()
    for share, count in zip(shares, tokens, strict=True):
        expected = "at least 1; raise the budget or the share"
        require(count > 0 or share == 0, f"Tokens of a phase with share {share:g}", count, expected)
    kept = [(mixture, n) for (_, mixture), n in zip(parts, tokens, strict=True) if n > 0]
    merged = itertools.groupby(kept, key=lambda part: part[0])
    return Schedule(tuple(Phase(mixture, sum(n for _, n in group)) for mixture, group in merged))


def cooldown(
    tokens_by_domain: Mapping[str, float],
    budget_tokens: int,
    taus: Sequence[float] = (5.0, 1.0),
    shares: Sequence[float] = (0.5, 0.5),
) -> Schedule:
    """Return Cooldown: temperature sampling at tau 5 for the first half, then at tau 1.

    Small domains are read often while the model can still learn from them, and not so long that it
    learns them by heart.

    Args:
        tokens_by_domain: Domain -> tokens that there are, > 0.
        budget_tokens: Tokens of the run.
        taus: Temperature of each phase, > 0; another order gives another control.
        shares: Share of the tokens of each phase; they add up to 1.

    Raises:
        SpecError: As `temperature` and `in_phases`; or taus and shares differ in number.

    Source: Li et al. 2024, arXiv:2410.04579 (tau 5 for half of the steps, then 1).
    """
    expected = f"one for each of the {len(taus)} taus"
    require(len(shares) == len(taus), "The number of shares", len(shares), expected)
    mixtures = [temperature(tokens_by_domain, tau) for tau in taus]
    return in_phases(list(zip(shares, mixtures, strict=True)), budget_tokens)


def upsample_at_end(
    base: Mixture, upsampled: Mixture, budget_tokens: int, share: float
) -> Schedule:
    """Return `base` for the first 1 - share of the tokens and `upsampled` for the last `share`.

    Args:
        base: The usual mixture.
        upsampled: The mixture of the final phase.
        budget_tokens: Tokens of the run.
        share: Of the final phase, in [0, 1]; 0 is the base to the end.

    Raises:
        SpecError: The share is out of range, or as `in_phases`.

    Source: Blakeney et al. 2024, arXiv:2406.03476 (abstract: best at the last 10-20% of training).
    """
    ok = is_share(share) and share <= 1
    require(ok, "The share of the final phase", share, "a number in [0, 1]")
    return in_phases([(1.0 - share, base), (share, upsampled)], budget_tokens)


def switch_points(schedule: Schedule) -> tuple[float, ...]:
    """Return where the mixture changes, as shares of the schedule's tokens; empty for one phase."""
    ends = itertools.accumulate(phase.tokens for phase in schedule.phases[:-1])
    return tuple(end / schedule.tokens for end in ends)


def schedule_epochs(
    schedule: Schedule, tokens_by_domain: Mapping[str, int], max_epochs: float = math.inf
) -> dict[str, float]:
    """Return how often a schedule passes over each domain: sum over phases of `mixture.epochs`.

    Args:
        schedule: Phases.
        tokens_by_domain: Domain -> training tokens that there are, > 0.
        max_epochs: Most passes that are allowed.

    Raises:
        SpecError: A phase has a domain that is not there, or a domain is read more often than
            `max_epochs`.
    """
    require_positive("max_epochs", max_epochs if max_epochs != math.inf else 1)
    passes: dict[str, float] = {}
    for phase in schedule.phases:
        phase.mixture.check(tuple(tokens_by_domain), "the token counts")
        for domain, count in epochs(phase.mixture, phase.tokens, tokens_by_domain).items():
            passes[domain] = passes.get(domain, 0.0) + count
    for domain, count in passes.items():
        if count > max_epochs:
            raise SpecError(
                f"The schedule passes {count:.3g} times over domain {domain!r} "
                f"({tokens_by_domain[domain]:,} tokens); at most {max_epochs:g} are allowed. Lower "
                "its weight, shorten its phase or train on fewer tokens."
            )
    return passes


def on_trunk(template: TrainSpec, schedule: Schedule) -> TrainSpec:
    """Return the run of a schedule as a branch of a trunk on its first mixture.

    Equal, to the bit, to the template on that schedule in one go. Schedules of one template that
    begin with the same mixture have the same trunk, which a sweep trains once.

    Args:
        template: The whole run: its tokens, and a WSD rate with a decay share in (0, 1). Its own
            schedule is replaced.
        schedule: Phases that add up to the template's tokens.

    Raises:
        SpecError: The schedule has other tokens than the template; or as `make_branch`.
    """
    expected = f"those of the template, {template.schedule.tokens:,}"
    ok = schedule.tokens == template.schedule.tokens
    require(ok, "The tokens of a schedule", schedule.tokens, expected)
    first, *rest = schedule.phases
    decay_share = template.optimizer.decay_share
    # Two batches more than where the decay begins: phases are rounded to steps each by itself.
    trunk_tokens = round((1.0 - decay_share) * schedule.tokens) + 2 * template.batch_tokens
    trunk = make_trunk(template, first.mixture, trunk_tokens)
    return make_branch(trunk, first.tokens, tuple(rest), decay_share)


def without(mixture: Mixture, domain: str) -> Mixture:
    """Return the mixture with a domain left out and the others in their old proportions.

    Raises:
        SpecError: The domain is not in the mixture, or alone in it.
    """
    expected = f"one of several in the mixture: {', '.join(mixture)}"
    require(domain in mixture and len(mixture) > 1, "The domain to drop", domain, expected)
    return Mixture({d: weight for d, weight in mixture.items() if d != domain})

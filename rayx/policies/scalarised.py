"""Scalarisation: domains are sampled as they come, and their losses are weighted instead.

Shapes: K domains.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from rayx.caps import is_share
from rayx.mixture import largest_remainder
from rayx.policy import Block, Blocks, Setting
from rayx.recipe import is_number, require
from rayx.schedules import tempered


@dataclass(frozen=True, slots=True, kw_only=True)
class Scalarised:
    """Loss weights w_i = p(i; tau) / p(i; 1) on batches of the run's own mixture p(.; 1).

    The expected gradient is that of sampling at temperature tau. Where all domains have gradients
    of the same mean square s, that of one sequence has a variance larger by
    s chi2(p(.; tau) || p(.; 1)) = s (sum_i p(i; tau)^2 / p(i; 1) - 1), which grows with tau.

    Attributes:
        taus: Temperatures, > 0, in order; (5, 1) is Cooldown's.
        shares: Share of the steps of each; they add up to 1.

    Raises:
        SpecError: A number is out of range.

    Source: Li et al. 2024, arXiv:2410.04579, theorems 1 to 3; the variance's difference: derived.
    """

    name: ClassVar[str] = "scalarised"

    taus: tuple[float, ...] = (5.0,)
    shares: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        for tau in self.taus:
            ok = is_number(tau) and tau > 0
            require(ok, "A temperature in Scalarised.taus", tau, "a finite number > 0")
        for share in self.shares:
            require(is_share(share), "A share in Scalarised.shares", share, "a number in [0, 1]")
        total = sum(self.shares)
        require(abs(total - 1) < 1e-6, "The sum of Scalarised.shares", total, "1")
        expected = f"one for each of the {len(self.taus)} taus"
        ok = len(self.shares) == len(self.taus)
        require(ok, "The number of Scalarised.shares", len(self.shares), expected)
        for name in ("taus", "shares"):  # 5 and 5.0 are one policy
            object.__setattr__(self, name, tuple(float(value) for value in getattr(self, name)))

    def blocks(self, setting: Setting) -> Blocks:
        """Yield one block a temperature; the last goes on to the end."""
        steps = largest_remainder(np.array(self.shares), setting.steps).tolist()
        for tau, count in zip(self.taus, steps, strict=True):
            factor_K = tempered(setting.prior_K, tau) / setting.prior_K
            if count:
                yield Block(weights_K=setting.prior_K, steps=count, loss_weights_K=factor_K)

"""Laws: what a law is, and what comes with it once its formula is written.

A law is a short formula of the loss in model size, tokens, mixture ... with a few parameters. It
follows scikit-learn: settings are constructor arguments, `fit` returns self, learned values end in
`_`. To add one, subclass `Law`, write `parameters`, `loss` (with derivatives) and `natural`, and
name it in `registry.py`; robust fitting from many starts, bootstrap intervals, identifiability
warnings and the extrapolation check come with it.

Shapes: R runs, M runs to predict, K domains, S parameter vectors (starts or bootstrap replicates),
P parameters with those of a domain counted K times, B bootstrap replicates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

Theta = Mapping[str, np.ndarray]  # name -> (S, 1), or (S, 1, K) where there is one a domain
Inputs = Mapping[str, np.ndarray]  # name -> (R,), and "weights" (R, K)
Unit = Mapping[str, float]  # "loss", "params", "tokens" -> what one unit of the scaled data is


@dataclass(frozen=True)
class Parameter:
    """One parameter of a law.

    Args:
        name: As in the formula, "E" or "alpha"; the fitted value is `law.E_`.
        start: Start values in scaled units: the fit divides params and all tokens by their
            geometric mean and the loss by its median, so that E is below 1 and A near .1.
        low: Lower bound; 0 with no upper bound is fitted through exp.
        high: Upper bound; two finite bounds are fitted through the logistic function.
        per_domain: One value a domain, reported as "C/web"; all domains start alike.
    """

    name: str
    start: tuple[float, ...]
    low: float = 0.0
    high: float = math.inf
    per_domain: bool = False


@dataclass(kw_only=True)
class Law(ABC):
    """Base of rayx's laws.

    Args:
        delta: Residual, in log units, at which the Huber loss turns from square to linear, > 0.
        free_scale: Fit the scale of the residuals too (Huber likelihood).
        drop_highest: Runs with the highest losses that are left out, counted in `dropped_`.
        bootstrap: Replicates for intervals; 0 for none.
        seed: Seed of the starts and the bootstrap.
    """

    delta: float = 1e-3
    free_scale: bool = False
    drop_highest: int = 0
    bootstrap: int = 0
    seed: int = 0
    name: ClassVar[str]
    inputs: ClassVar[tuple[str, ...]]
    on_log: ClassVar[bool] = True  # residuals of the log loss; False: of the loss itself

    @abstractmethod
    def parameters(self) -> tuple[Parameter, ...]:
        """The parameters in the order of the formula."""

    @abstractmethod
    def loss(self, theta: Theta, inputs: Inputs) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The formula and its derivatives.

        Returns:
            loss_SR, and for each parameter d loss / d parameter, (S, R) or (S, R, K).
        """

    @abstractmethod
    def natural(self, theta: Theta, unit: Unit) -> dict[str, np.ndarray]:
        """Turn parameters of scaled data into those of the data as given.

        loss(natural(theta, unit), inputs * unit) = unit["loss"] * loss(theta, inputs).
        """

    def check(self, inputs: Inputs) -> None:  # noqa: B027
        """Raise FitError where an input is outside the law's range."""

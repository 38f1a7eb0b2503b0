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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, overload

import numpy as np

from rayx.errors import FitError
from rayx.fit.laws.bootstrap import replicate
from rayx.fit.laws.identify import identifiability
from rayx.fit.laws.problem import Problem

Theta = Mapping[str, np.ndarray]  # name -> (S, 1), or (S, 1, K) where there is one a domain
Inputs = Mapping[str, np.ndarray]  # name -> (R,), and "weights" (R, K)
Unit = Mapping[str, float]  # "loss", "params", "tokens" -> what one unit of the scaled data is
Self = TypeVar("Self", bound="Law")
POSITIVE = ("params", "tokens", "unique_tokens")
INTERVAL = 0.95


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

    def __post_init__(self) -> None:
        if not self.delta > 0.0 or self.bootstrap < 0:
            raise FitError(
                f"delta is {self.delta} and bootstrap {self.bootstrap}; expected a delta above 0 "
                "and 0 or more replicates."
            )

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

    def fit(
        self: Self,
        *columns: np.ndarray,
        domains: Sequence[str] | None = None,
        groups: Sequence | np.ndarray | None = None,
    ) -> Self:
        """Fit by the sum over runs of Huber(log predicted - log loss).

        Args:
            columns: The law's `inputs` in order, then the loss; (R,) each, weights (R, K).
            domains: Names of the columns of the weights; numbers if not given.
            groups: The run of each row where rows are points of curves; the bootstrap draws runs.

        Returns:
            self, with a value `E_` for each parameter E (an array for one a domain), and
            params_, intervals_ (95%), objective_, rows_, dropped_, largest_ and warnings_.

        Raises:
            FitError: A column is missing, not finite, out of range or of another length, or
                there are too few rows.

        Source: Hoffmann et al. 2022, arXiv:2203.15556, section D.2 (Huber on log loss, starts).
        Differs: parameters scaled by the data; taken to the optimum by Newton steps, not L-BFGS.
        """
        if len(columns) != len(self.inputs) + 1:
            raise FitError(
                f"{len(columns)} columns; {self.name} takes {', '.join(self.inputs)}, loss."
            )
        inputs = self._checked(columns[:-1])
        loss_R = self._checked_loss(columns[-1], len(inputs[self.inputs[0]]))
        group_R = np.arange(len(loss_R)) if groups is None else _group_numbers(groups, loss_R)
        # Ties in the loss are broken by the inputs, so that the order of rows does not matter.
        keys = [c for n in self.inputs for c in inputs[n].reshape(len(loss_R), -1).T]
        order = np.lexsort([*keys, loss_R])
        kept = np.sort(order[: len(loss_R) - self.drop_highest])
        inputs = {name: array[kept] for name, array in inputs.items()}
        self.domains_ = self._domain_names(domains, inputs)
        self.problem_ = problem = Problem(self, inputs, loss_R[kept])
        self.rows_, self.dropped_ = len(kept), self.drop_highest
        if self.rows_ < problem.num_parameters + 2:
            raise FitError(
                f"{self.rows_} runs are too few for the {problem.num_parameters} parameters of "
                f"{self.name}; expected at least {problem.num_parameters + 2}."
            )
        self.largest_ = {n: float(inputs[n].max()) for n in self.inputs if n != "weights"}
        optima_SP, objective_S = problem.search()
        if not np.isfinite(objective_S[0]):
            raise FitError(f"{self.name} has no finite fit: its losses are not positive anywhere.")
        self.u_, self.objective_ = optima_SP[0], float(objective_S[0])
        self.theta_ = problem.natural(optima_SP[:1])
        for parameter in self.parameters():
            value = self.theta_[parameter.name][0, 0]
            setattr(self, f"{parameter.name}_", value if parameter.per_domain else float(value))
        self.params_ = dict(self._flat(self.theta_, lambda values_S: float(values_S[0])))
        self.warnings_ = identifiability(problem, self.u_, self.domains_)
        self.residual_R_ = problem.model(optima_SP[:1])[0][0] - problem.target_R
        self.intervals_: dict[str, tuple[float, float]] = {}
        self.replicates_ = None
        if self.bootstrap:
            self._bootstrap(optima_SP, group_R[kept])
        return self

    def _bootstrap(self, optima_SP: np.ndarray, group_R: np.ndarray) -> None:
        drawn_BP = replicate(self.problem_, optima_SP, group_R, self.bootstrap, self.seed)
        if lost := self.bootstrap - len(drawn_BP):
            self.warnings_.append(f"{lost} of {self.bootstrap} replicates have no finite fit")
        self.replicates_ = self.problem_.natural(drawn_BP)
        tails = (0.5 - INTERVAL / 2, 0.5 + INTERVAL / 2)
        for name, (low, high) in self._flat(
            self.replicates_, lambda values_S: np.quantile(values_S, tails)
        ):
            self.intervals_[name] = (float(low), float(high))

    @overload
    def predict(self, *columns: np.ndarray) -> np.ndarray: ...
    @overload
    def predict(
        self, *columns: np.ndarray, std: Literal[True]
    ) -> tuple[np.ndarray, np.ndarray]: ...
    @overload
    def predict(
        self, *columns: np.ndarray, interval: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
    def predict(self, *columns: np.ndarray, std: bool = False, interval: float | None = None):
        """Predict losses, with the uncertainty of one new run where asked.

        The uncertainty is that of the bootstrap's laws and of a residual of the fit together. How
        far a prediction is from the data is `reach`.

        Args:
            columns: The law's `inputs` in order; (M,) each, weights (M, K).
            std: Also return the standard deviation.
            interval: Also return the bounds of an interval of this probability, in (0, 1).

        Returns:
            loss_M; (loss_M, std_M); or (loss_M, low_M, high_M).

        Raises:
            FitError: Not fitted, or uncertainty is asked of a fit without bootstrap.
        """
        if not hasattr(self, "theta_"):
            raise FitError(f"{self.name} is not fitted; call fit({', '.join(self.inputs)}, loss).")
        inputs = self._checked(columns)
        if "weights" in inputs and inputs["weights"].shape[1] != len(self.domains_):
            raise FitError(
                f"The weights have {inputs['weights'].shape[1]} domains; the law was fitted on "
                f"{len(self.domains_)}."
            )
        loss_M = self.loss(self.theta_, inputs)[0][0]
        if not std and interval is None:
            return loss_M
        draws_BM = self._draws(inputs)
        if interval is None:
            return loss_M, draws_BM.std(0)
        if not 0.0 < interval < 1.0:
            raise FitError(f"interval is {interval}; expected a probability between 0 and 1.")
        low_M, high_M = np.quantile(draws_BM, (0.5 - interval / 2, 0.5 + interval / 2), axis=0)
        return loss_M, low_M, high_M

    def reach(self, *columns: np.ndarray) -> np.ndarray:
        """How far beyond the data: the largest of params / largest params seen, and so on, (M,)."""
        inputs = self._checked(columns)
        ratios = [inputs[n] / top for n, top in self.largest_.items() if top > 0]
        return np.max(ratios, axis=0) if ratios else np.ones(len(inputs["weights"]))

    def _draws(self, inputs: Inputs) -> np.ndarray:
        if self.replicates_ is None:
            raise FitError(
                f"No uncertainty without bootstrap; make {self.name} with bootstrap=1000."
            )
        spare = max(1, self.rows_ - self.problem_.num_parameters)
        residual_R = self.residual_R_ * np.sqrt(self.rows_ / spare)
        loss_BM = self.loss(self.replicates_, inputs)[0]
        # The same draw for every column: a band over compute stays smooth.
        residual_B1 = np.random.default_rng(self.seed).choice(residual_R, (len(loss_BM), 1))
        if self.on_log:
            return loss_BM * np.exp(-residual_B1)
        return loss_BM - residual_B1 * self.problem_.unit["loss"]

    def _flat(self, theta: Theta, summary: Any):
        """Yield (name, summary of its S values), a domain's as "C/web"."""
        for parameter in self.parameters():
            values = theta[parameter.name]
            if parameter.per_domain:
                for k, domain in enumerate(self.domains_):
                    yield f"{parameter.name}/{domain}", summary(values[:, 0, k])
            else:
                yield parameter.name, summary(values[:, 0])

    def _domain_names(self, domains: Sequence[str] | None, inputs: Inputs) -> tuple[str, ...]:
        num = inputs["weights"].shape[1] if "weights" in inputs else 0
        names = tuple(map(str, domains)) if domains is not None else tuple(map(str, range(num)))
        if len(names) != num:
            raise FitError(f"{len(names)} domains are named; the weights have {num} columns.")
        return names

    def _checked(self, columns: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        if len(columns) != len(self.inputs):
            raise FitError(
                f"{len(columns)} columns; {self.name} takes {', '.join(self.inputs)} in this order."
            )
        inputs = {n: np.asarray(c, dtype=float) for n, c in zip(self.inputs, columns, strict=True)}
        rows = len(np.atleast_1d(inputs[self.inputs[0]]))
        for name, array in inputs.items():
            if array.ndim != (2 if name == "weights" else 1) or len(array) != rows:
                raise FitError(
                    f"Column {name} has shape {array.shape}; expected ({rows}"
                    f"{', domains' if name == 'weights' else ','})."
                )
            least = "above 0" if name in POSITIVE else "0 or more"
            bad = ~np.isfinite(array) | ((array <= 0) if name in POSITIVE else (array < 0))
            if bad.any():
                at = tuple(np.argwhere(bad)[0])
                raise FitError(
                    f"Column {name}, row {at[0]}: the value is {array[at]:g}; expected {least}."
                )
        self.check(inputs)
        return inputs

    def _checked_loss(self, loss: np.ndarray, rows: int) -> np.ndarray:
        loss_R = np.asarray(loss, dtype=float)
        if loss_R.shape != (rows,):
            raise FitError(f"Losses have shape {loss_R.shape}; expected ({rows},), one a run.")
        bad = ~np.isfinite(loss_R) | ((loss_R <= 0) & self.on_log)
        if bad.any():
            row = int(np.argmax(bad))
            kind = "a finite loss above 0" if self.on_log else "a finite loss"
            raise FitError(f"Loss of row {row} is {loss_R[row]:g}; expected {kind}. Drop the row.")
        if not 0 <= self.drop_highest < rows:
            raise FitError(
                f"drop_highest is {self.drop_highest}; expected 0 to {rows - 1} of {rows} runs."
            )
        return loss_R


def _group_numbers(groups: Sequence | np.ndarray, loss_R: np.ndarray) -> np.ndarray:
    names = np.asarray(groups)
    if names.shape != loss_R.shape:
        raise FitError(f"groups have shape {names.shape}; expected {loss_R.shape}, one a run.")
    return np.unique(names, return_inverse=True)[1]

"""Split points: how many tokens of a budget a general model gets before it becomes experts.

A budget of D_T tokens is spent on a trunk of t tokens of all data and K branches of (D_T - t) / K
tokens of one domain each. A law L(N, D, D') of the mean over domains of the expert's own loss says
what that gives (D trunk tokens, D' tokens of a branch):

    t_S(N, D_T) = argmin over 0 < t <= D_T of L(N, t, (D_T - t) / K)
    D_split(N)  = the least D at which a few more tokens do more in branches than in the trunk
    multiplier  = D_std / D_T, with L(N, D_std, 0) = L(N, t_S, (D_T - t_S) / K)

Source: the question and these three quantities: Seto et al. 2026, arXiv:2603.19149 (abstract and
    captions); the equations are derived, the paper's own were not read.

Shapes: B bootstrap replicates, T trunk lengths tried.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rayx.errors import ChoiceError, FitError, did_you_mean
from rayx.fit.laws import Law, choose_law, laws
from rayx.split.equation import equal_budget, evaluate, split_from

INPUTS = ("params", "tokens", "spec_tokens")
BOOTSTRAP = 1_000
SHARES = 200  # trunk lengths tried, twice


@dataclass(frozen=True, kw_only=True)
class SplitChoice:
    """Where to split, and the evidence.

    Attributes:
        law: Name of the law.
        parameters: Its parameters.
        params: Model size N.
        budget_tokens: D_T, trunk and branches together.
        branches: K.
        trunk_tokens: t_S; the budget itself where no split is best.
        trunk_interval: Its interval.
        branch_tokens: (D_T - t_S) / K.
        predicted: Loss at the split.
        interval: Interval of the loss of one more run there.
        no_split: Predicted loss without a split.
        gain_interval: Interval of no_split less predicted, by the law's uncertainty alone.
        fixed: Share of the trunk -> predicted loss, for splits one might have taken instead.
        multiplier: D_std / D_T; infinite where no budget without a split is as good.
        multiplier_interval: Its interval.
        split_from_tokens: D_split(N); infinite where splitting never pays.
        split_from_interval: Its interval.
        level: Level of all intervals.
        reach: How far beyond the runs fitted this is: the largest ratio in N, D or D'.
        extrapolation_error: Mean relative error of the law on the largest runs, fitted without.
        warnings: What should make one distrust it, in words.
    """

    law: str
    parameters: dict[str, float]
    params: float
    budget_tokens: float
    branches: int
    trunk_tokens: float
    trunk_interval: tuple[float, float]
    branch_tokens: float
    predicted: float
    interval: tuple[float, float]
    no_split: float
    gain_interval: tuple[float, float]
    fixed: dict[str, float]
    multiplier: float
    multiplier_interval: tuple[float, float]
    split_from_tokens: float
    split_from_interval: tuple[float, float]
    level: float
    reach: float
    extrapolation_error: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def fraction(self) -> float:
        """Optimal share of the budget for the trunk, t_S / D_T."""
        return self.trunk_tokens / self.budget_tokens

    def to_json(self) -> str:
        """Return JSON; what is infinite is null."""
        data = {**dataclasses.asdict(self), "fraction": self.fraction}
        return json.dumps(_finite(data), indent=2, allow_nan=False)


def fit_split_law(points: pd.DataFrame, name: str = "auto") -> tuple[Law, float]:
    """Fit a law to what `split_points` returns.

    Args:
        points: Columns params, tokens, spec_tokens, loss.
        name: A law that takes INPUTS, or "auto" for the one that predicts the largest runs best.

    Returns:
        The law with a bootstrap, and its mean relative error on the largest runs.

    Raises:
        FitError: There is no such law, or too few points.
    """
    columns = {n: points[n].to_numpy(dtype=float) for n in (*INPUTS, "loss")}
    known = {n: make() for n, make in laws().items() if tuple(make.inputs) == INPUTS}
    if name not in ("auto", *known):
        raise FitError(
            f"There is no split law {name!r}; expected one of auto, {', '.join(known)}."
            f"{did_you_mean(name, known)}"
        )
    best, found, _ = choose_law(known if name == "auto" else {name: known[name]}, columns)
    law = dataclasses.replace(known[best], bootstrap=BOOTSTRAP)
    return law.fit(*columns.values()), found[best].error


def choose_split(
    law: Law,
    *,
    params: float,
    budget_tokens: float,
    branches: int,
    least_trunk_tokens: float,
    fixed_shares: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    level: float = 0.9,
    extrapolation_error: float | None = None,
) -> SplitChoice:
    """Choose where to split.

    Args:
        law: Fitted on (params, tokens, spec_tokens), with a bootstrap.
        params: Model size of the final run, > 0.
        budget_tokens: Tokens of trunk and branches together, > 0.
        branches: Experts K, at least 2.
        least_trunk_tokens: Shortest trunk to consider: that of the runs fitted, since the forms of
            the law are not made for less.
        fixed_shares: Splits to compare with.
        level: Level of the intervals.
        extrapolation_error: Of the law, kept as evidence.

    Raises:
        ChoiceError: A number is out of range.
        FitError: The law has other inputs, or no bootstrap.
    """
    if tuple(law.inputs) != INPUTS:
        raise FitError(f"{law.name} takes {', '.join(law.inputs)}; expected {', '.join(INPUTS)}.")
    for name, value, least in (
        ("params", params, 1),
        ("branches", branches, 2),
        ("least_trunk_tokens", least_trunk_tokens, 1),
        ("budget_tokens", budget_tokens, least_trunk_tokens),
    ):
        if not (np.isfinite(value) and value >= least):
            raise ChoiceError(f"{name} is {value}; expected a number of at least {least:g}.")
    trunk_T = np.unique(
        np.r_[
            np.geomspace(least_trunk_tokens, budget_tokens, SHARES),
            np.linspace(least_trunk_tokens, budget_tokens, SHARES),
        ]
    )
    branch_T = (budget_tokens - trunk_T) / branches
    loss_BT = evaluate(law, params, trunk_T, branch_T)  # row 0: the fit itself
    best_B = loss_BT.argmin(1)
    rows = np.arange(len(loss_BT))
    trunk_B, best_loss_B = trunk_T[best_B], loss_BT[rows, best_B]
    gain_B = loss_BT[:, -1] - best_loss_B
    standard_B = equal_budget(law, params, budget_tokens, best_loss_B)
    from_B = split_from(law, params, branches, least_trunk_tokens, budget_tokens)
    best = trunk_B[0], (budget_tokens - trunk_B[0]) / branches
    columns = [np.array([value]) for value in (params, *best)]
    _, low_M, high_M = law.predict(*columns, interval=level)
    reach = float(law.reach(*columns)[0])

    def interval(values_B: np.ndarray) -> tuple[float, float]:
        tails = np.array([0.5 - level / 2, 0.5 + level / 2])
        low, high = np.quantile(values_B[1:], tails, method="nearest")
        return float(low), float(high)

    warnings = [*law.warnings_]
    if best_B[0] == 0:
        warnings.append(
            f"the best trunk is the shortest that was considered ({trunk_T[0]:,.0f} tokens): fit "
            "on shorter trunks"
        )
    if reach > 1.0:
        warnings.append(f"extrapolation: {reach:.2g} times beyond the runs fitted")
    low_gain, high_gain = interval(gain_B)
    if low_gain <= 0.0 < gain_B[0]:
        warnings.append(
            f"the predicted gain over no split is {gain_B[0]:.4g}, within its {level:.0%} interval "
            f"({low_gain:.4g} to {high_gain:.4g})"
        )
    fixed = {
        f"{share:g}": float(
            evaluate(
                law,
                params,
                np.array([share * budget_tokens]),
                np.array([(1.0 - share) * budget_tokens / branches]),
            )[0, 0]
        )
        for share in fixed_shares
    }
    return SplitChoice(
        law=law.name,
        parameters=dict(law.params_),
        params=float(params),
        budget_tokens=float(budget_tokens),
        branches=branches,
        trunk_tokens=float(best[0]),
        trunk_interval=interval(trunk_B),
        branch_tokens=float(best[1]),
        predicted=float(best_loss_B[0]),
        interval=(float(low_M[0]), float(high_M[0])),
        no_split=float(loss_BT[0, -1]),
        gain_interval=(low_gain, high_gain),
        fixed=fixed,
        multiplier=float(standard_B[0] / budget_tokens),
        multiplier_interval=interval(standard_B / budget_tokens),
        split_from_tokens=float(from_B[0]),
        split_from_interval=interval(from_B),
        level=level,
        reach=reach,
        extrapolation_error=extrapolation_error,
        warnings=tuple(warnings),
    )


def split_share_curve(law: Law, choice: SplitChoice, num: int = 120) -> pd.DataFrame:
    """Return predicted loss over the trunk's share at the choice's size and budget.

    Returns:
        share, loss, low, high (of one more run, at the choice's level); from the least of 2% and
        the chosen share on.
    """
    share_M = np.linspace(min(0.02, choice.fraction), 1.0, num)
    trunk_M = share_M * choice.budget_tokens
    branch_M = (choice.budget_tokens - trunk_M) / choice.branches
    params_M = np.full(num, choice.params)
    loss_M, low_M, high_M = law.predict(params_M, trunk_M, branch_M, interval=choice.level)
    return pd.DataFrame({"share": share_M, "loss": loss_M, "low": low_M, "high": high_M})


def split_curves(
    law: Law,
    *,
    params: Sequence[float],
    budgets: Sequence[float],
    branches: int,
    least_trunk_tokens: float,
) -> pd.DataFrame:
    """Return how the best split moves with model size and budget.

    Returns:
        One row a size and budget: params, budget_tokens, fraction, multiplier and
        split_from_tokens, the last with `_low` and `_high` like the fraction (90%).
    """
    rows = []
    for size in params:
        for budget in budgets:
            choice = choose_split(
                law,
                params=size,
                budget_tokens=budget,
                branches=branches,
                least_trunk_tokens=least_trunk_tokens,
            )
            rows.append(
                {
                    "params": size,
                    "budget_tokens": budget,
                    "fraction": choice.fraction,
                    "fraction_low": choice.trunk_interval[0] / budget,
                    "fraction_high": choice.trunk_interval[1] / budget,
                    "multiplier": choice.multiplier,
                    "split_from_tokens": choice.split_from_tokens,
                    "split_from_low": choice.split_from_interval[0],
                    "split_from_high": choice.split_from_interval[1],
                }
            )
    return pd.DataFrame(rows)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from rayx.errors import ChoiceError, FitError
from rayx.fit.laws import Law
from rayx.record import Record
from rayx.spec import TrainSpec

INPUTS = ("params", "tokens", "spec_tokens")
SHARES = 400  # trunk lengths tried
MARGIN = 1e-3  # of D: the few more tokens of D_split
BEYOND = 1e4  # times the budget: as far as D_split and D_std are looked for


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


def split_points(records: Iterable[Record], domains: Sequence[str] | None = None) -> pd.DataFrame:
    """Return one row per model size, trunk and branch length, and seed.

    A run belongs here if its path is one mixture (no split) or one mixture and then one domain (an
    expert), and its rate was decayed: a trunk's undecayed loss compares with nothing.

    Args:
        records: Of any runs; those that are neither are left out.
        domains: Whose experts to average over; by default all that have one.

    Returns:
        Columns params, tokens (D), spec_tokens (D'), seed, loss (mean over domains of bits per
        byte), loss/<domain>. Rows that lack an expert are left out.

    Raises:
        FitError: There is no complete row, or the runs have several corpora or general mixtures.
    """
    losses: dict[tuple, dict[str, float]] = {}
    whole: dict[tuple, dict[str, float]] = {}
    kinds = set()
    for record in records:
        spec = record.spec
        stages = _stages(spec)
        if record.status != "ok" or spec.optimizer.decay_share == 0.0 or len(stages) > 2:
            continue
        own = {target: loss.bpb for target, loss in record.losses.items()}
        key = (spec.model.params, stages[0][1], spec.seed)
        if len(stages) == 1:
            whole[(*key, 0)] = own
        elif len(stages[1][0]) == 1 and (domain := next(iter(stages[1][0]))) in own:
            losses.setdefault((*key, stages[1][1]), {})[domain] = own[domain]
        else:
            continue
        kinds.add((spec.corpus, stages[0][0]))
    if len(kinds) > 1:
        raise FitError(
            f"The runs have {len(kinds)} corpora or general mixtures; a split law is of one. "
            "Give the records of one study."
        )
    wanted = sorted({d for own in losses.values() for d in own}) if domains is None else domains
    rows = []
    for key, own in (losses | whole).items():
        if wanted and all(domain in own for domain in wanted):
            by_domain = {f"loss/{domain}": own[domain] for domain in wanted}
            rows.append(
                dict(zip(("params", "tokens", "seed", "spec_tokens"), key, strict=True))
                | {"loss": float(np.mean(list(by_domain.values())))}
                | by_domain
            )
    if not rows:
        raise FitError(
            "No trunk and branch lengths have an expert for every domain; expected runs as "
            "rayx.methods.optimal_split makes them."
        )
    order = ["params", "tokens", "spec_tokens", "seed"]
    return pd.DataFrame(rows).sort_values(order, ignore_index=True)


def _stages(spec: TrainSpec) -> list[tuple[dict[str, int], int]]:
    """The mixtures of the whole path in order, each with its tokens; equal neighbours are one."""
    stages: list[tuple[dict[str, int], int]] = []
    for ancestor, child in zip(spec.path, (*spec.path[1:], None), strict=True):
        steps = child.parent.steps if child is not None and child.parent else ancestor.steps
        left = steps * ancestor.batch_tokens
        for phase in ancestor.schedule.phases:
            taken = min(left, phase.tokens)
            left -= taken
            mixture = phase.mixture.millionths
            if stages and stages[-1][0] == mixture:
                stages[-1] = (mixture, stages[-1][1] + taken)
            elif taken:
                stages.append((mixture, taken))
    return stages


def choose_split(
    law: Law,
    *,
    params: float,
    budget_tokens: float,
    branches: int,
    least_trunk_tokens: float,
    fixed_shares: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    level: float = 0.9,
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
    standard_B = _equal_budget(law, params, budget_tokens, best_loss_B)
    from_B = _split_from(law, params, branches, least_trunk_tokens, budget_tokens)
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
        warnings=tuple(warnings),
    )


def evaluate(law: Law, params: float, trunk_T: np.ndarray, branch_T: np.ndarray) -> np.ndarray:
    """Losses of the fit (row 0) and of its bootstrap replicates, shape (1 + B, T)."""
    if law.replicates_ is None:
        raise FitError(f"No uncertainty without bootstrap; make {law.name} with bootstrap=1000.")
    inputs = {
        "params": np.full(len(trunk_T), float(params)),
        "tokens": trunk_T,
        "spec_tokens": branch_T,
    }
    return np.concatenate([law.loss(theta, inputs)[0] for theta in (law.theta_, law.replicates_)])


def _equal_budget(law: Law, params: float, budget: float, loss_B: np.ndarray) -> np.ndarray:
    """D_std: the least budget without a split that reaches the losses, shape (B,)."""
    tokens_T = np.geomspace(budget, BEYOND * budget, 4_000)
    plain_BT = evaluate(law, params, tokens_T, np.zeros_like(tokens_T))
    reached_BT = plain_BT <= loss_B[:, None]
    return np.where(reached_BT.any(1), tokens_T[reached_BT.argmax(1)], np.inf)


def _split_from(law: Law, params: float, branches: int, least: float, budget: float) -> np.ndarray:
    """D_split: the least D at which MARGIN D more tokens do more in branches, shape (B,)."""
    tokens_T = np.geomspace(least / 100.0, BEYOND * budget, 4_000)
    more_T = MARGIN * tokens_T
    in_branches_BT = evaluate(law, params, tokens_T, more_T / branches)
    in_trunk_BT = evaluate(law, params, tokens_T + more_T, np.zeros_like(tokens_T))
    pays_BT = in_branches_BT < in_trunk_BT
    return np.where(pays_BT.any(1), tokens_T[pays_BT.argmax(1)], np.inf)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value

"""Stage 6, choice: a mixture under constraints, with the evidence for and against it.

`rayx.choice.choosers` finds it; here it is compared with uniform, proportional and the best run
seen, all made feasible, and what should make one distrust it is said. Without signal the choice is
the proportional mixture, and says so.

Shapes: R runs, K domains, M mixtures.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayx.choice.choosers import CHOOSERS, Chooser, Convex, Simulate, Solution
from rayx.choice.outlook import Supply
from rayx.choice.problem import Problem, prepare
from rayx.constraints import Constraints, Group
from rayx.errors import ChoiceError
from rayx.fit.fitted import FittedTable

__all__ = [
    "CHOOSERS",
    "Baseline",
    "Choice",
    "Constraints",
    "Convex",
    "Group",
    "Simulate",
    "Supply",
    "choose",
]

# Share of the best candidates on a bound from which on the bound, not the data, decides.
BINDING_SHARE = 0.5
FAR = 2.0  # times the usual distance between neighbouring runs


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A mixture that the choice is compared with.

    Attributes:
        weights: Domain -> weight, made feasible.
        predicted: Predicted objective.
        std: Its standard deviation for one more run.
        regret: Predicted objective less that of the choice: what this baseline would give up.
        regret_interval: Interval of the expected regret: models err, single runs are not meant.
    """

    weights: dict[str, float]
    predicted: float
    std: float
    regret: float
    regret_interval: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was chosen, and its evidence.

    Attributes:
        weights: Domain -> weight; they sum to 1.
        objective: Target -> weight; they sum to 1.
        predicted: Predicted objective of the choice.
        interval: Interval for the objective of one more run, at `level`.
        level: Level of all intervals.
        predicted_losses: Predicted loss of every target of the table.
        regressors: Target of the objective -> regressor that predicts it.
        baselines: "uniform", "proportional" and "best_seen".
        spread: Domain -> standard deviation over the best candidates; large means undecided.
        distance: L1 distance of the choice to the nearest mixture seen.
        usual_distance: Median L1 distance of a run to its nearest neighbour.
        signal: False if the choice is the proportional mixture for lack of signal.
        method: How the choice was found: its name, settings and what vouches for it.
        binding: Bounds and limits without which the objective would be lower, in words.
        limits: Target -> largest predicted loss that was allowed.
        given_up: Target -> predicted loss less that of the proportional mixture; > 0 is worse.
        repetition: Domain -> epochs in the final run; empty where no supply was given.
        warnings: What should make one distrust the choice, in words.
    """

    weights: dict[str, float]
    objective: dict[str, float]
    predicted: float
    interval: tuple[float, float]
    level: float
    predicted_losses: dict[str, float]
    regressors: dict[str, str]
    baselines: dict[str, Baseline]
    spread: dict[str, float]
    distance: float
    usual_distance: float
    signal: bool
    method: dict[str, Any]
    binding: tuple[str, ...]
    limits: dict[str, float]
    given_up: dict[str, float]
    repetition: dict[str, float]
    warnings: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Choice:
        """Read what `to_json` wrote.

        Raises:
            ChoiceError: The text is not a choice.
        """
        try:
            fields = json.loads(text)
            fields["interval"] = tuple(fields["interval"])
            for name in ("warnings", "binding"):
                fields[name] = tuple(fields[name])
            fields["baselines"] = {
                name: Baseline(**{**entry, "regret_interval": tuple(entry["regret_interval"])})
                for name, entry in fields["baselines"].items()
            }
            return cls(**fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ChoiceError(f"This is not the JSON of a choice: {error!r}.") from None


def choose(
    fitted: FittedTable,
    objective: Mapping[str, float],
    prior: Mapping[str, float],
    constraints: Constraints | None = None,
    *,
    seed: int,
    method: Chooser | None = None,
    limits: Mapping[str, float] | None = None,
    tolerances: Mapping[str, float] | None = None,
    supply: Supply | None = None,
    level: float = 0.9,
) -> Choice:
    """Choose the mixture with the least predicted objective.

    Args:
        fitted: The models, and the table of runs behind them.
        objective: Target -> weight, > 0; normalised.
        prior: Domain -> weight or tokens; normalised. The candidates lie around it, and it is the
            baseline "proportional".
        constraints: Floors, caps, fixed shares and groups; none by default.
        seed: Seed of the candidates.
        method: `Simulate()` by default, or `Convex()`.
        limits: Target -> largest predicted loss.
        tolerances: Target -> by how much its predicted loss may exceed that of proportional.
        supply: Prices the repetition of tokens; caps stay hard limits beside it.
        level: Level of the intervals.

    Raises:
        FitError: The objective is not one for this table.
        ChoiceError: Unknown domain or target, other domains in the constraints than in the table,
            numbers out of range, or limits that no mixture is predicted to keep.
    """
    if not 0.0 < level < 1.0:
        raise ChoiceError(f"The level of the intervals is {level}; expected between 0 and 1.")
    problem = prepare(
        fitted, objective, prior, constraints, limits=limits, tolerances=tolerances, supply=supply
    )
    outlook, constraints, table = problem.outlook, problem.constraints, fitted.table
    proportional_K = constraints.nearest(problem.prior_K[None])[0]
    baselines = {
        "uniform": constraints.nearest(np.full((1, len(table.domains)), 1.0))[0],
        "proportional": proportional_K,
    }
    best_seen_K = _best_seen(fitted, outlook.objective)
    if best_seen_K is not None:
        baselines["best_seen"] = constraints.nearest(best_seen_K[None])[0]

    warnings = list(fitted.warnings)
    silent = [target for target in outlook.objective if target in fitted.no_signal]
    signal = len(silent) < len(outlook.objective)
    if signal:
        if silent:
            warnings.append(f"no signal in {', '.join(silent)}: they have no say in this choice")
        solution = (method or Simulate()).solve(problem, seed)
    else:
        warnings.append(
            "NO SIGNAL: the runs do not show that the mixture matters for this objective; "
            "the choice is the proportional mixture, made feasible, and not an optimum"
        )
        solution = Solution(
            weights_K=proportional_K,
            around_MK=proportional_K[None],
            method={"name": "proportional"},
        )
        if problem.excess(proportional_K[None])[0] > 0:
            # The objective says nothing, so this is the mixture nearest to the prior that keeps
            # the limits.
            solution = Convex().solve(problem, seed)
    weights_K = solution.weights_K
    warnings += solution.warnings
    binding, notes = _binding(solution, problem)
    warnings += notes + _edges(weights_K, table.domains, table.weights_RK)

    distance, usual = _distances(weights_K, table.weights_RK)
    if signal and distance > FAR * usual:
        warnings.append(
            f"extrapolation: the nearest run is at L1 distance {distance:.3f}, "
            f"{distance / usual:.1f} times the usual distance between neighbours"
            if usual > 0
            else f"extrapolation: the nearest run is at L1 distance {distance:.3f}"
        )
    compared = {}
    for name, baseline_K in baselines.items():
        regret, low, high = outlook.difference(baseline_K, weights_K, level)
        predicted, std = outlook.value_and_std(baseline_K)
        compared[name] = Baseline(
            weights=_by_name(table.domains, baseline_K),
            predicted=predicted,
            std=std,
            regret=regret,
            regret_interval=(low, high),
        )
        if signal and low <= 0.0:
            warnings.append(
                f"the predicted gain over {name} is {regret:.4g}, within its {level:.0%} interval "
                f"({low:.4g} to {high:.4g})"
            )
    losses, before = outlook.losses(weights_K), outlook.losses(proportional_K)
    passes_K = supply.epochs(table.domains, weights_K) if supply else None
    return Choice(
        weights=_by_name(table.domains, weights_K),
        objective=dict(outlook.objective),
        predicted=float(outlook.value(weights_K[None])[0]),
        interval=outlook.interval(weights_K, level),
        level=level,
        predicted_losses=losses,
        regressors={target: fitted.regressors[target] for target in outlook.objective},
        baselines=compared,
        spread=_by_name(table.domains, solution.around_MK.std(0)),
        distance=distance,
        usual_distance=usual,
        signal=signal,
        method=dict(solution.method),
        binding=tuple(binding),
        limits=dict(problem.limits),
        given_up={target: losses[target] - before[target] for target in table.targets},
        repetition={} if passes_K is None else _by_name(table.domains, passes_K),
        warnings=tuple(warnings),
    )


def _best_seen(fitted: FittedTable, objective: Mapping[str, float]) -> np.ndarray | None:
    """The mixture with the least observed objective; replicates are averaged first."""
    table = fitted.table
    columns = [table.targets.index(target) for target in objective]
    value_R = table.losses_RM[:, columns] @ np.array(list(objective.values()))
    seen_R = np.isfinite(value_R)
    if not seen_R.any():
        return None
    mixtures_MK, group_R = np.unique(table.weights_RK[seen_R], axis=0, return_inverse=True)
    group_R = group_R.ravel()
    mean_M = np.bincount(group_R, weights=value_R[seen_R]) / np.bincount(group_R)
    return mixtures_MK[np.argmin(mean_M)]


def _binding(solution: Solution, problem: Problem) -> tuple[list[str], list[str]]:
    """What holds the choice back: the bounds in words, and the same as warnings."""
    constraints, limits = problem.constraints, problem.limits
    matrix_BK, limit_B = constraints.polytope.bounds
    on_MB = solution.around_MK @ matrix_BK.T >= limit_B - 1e-6
    # A share of 0 or 1 is no bound of the user's, and a fixed one is not news.
    num_domains, num_groups = len(constraints.domains), len(constraints.groups)
    slack_K = constraints.caps_K > constraints.floors_K
    slack_S = constraints.polytope.highs_S > constraints.polytope.lows_S
    asked_B = np.r_[
        slack_K & (constraints.floors_K > 0),
        slack_K & (constraints.caps_K < 1),
        slack_S & (constraints.polytope.lows_S > 0),
        slack_S & (constraints.polytope.highs_S < 1),
    ]
    words, notes = [], []
    phrases = constraints.in_words()
    for b in np.flatnonzero(asked_B & (on_MB.mean(0) >= BINDING_SHARE)):
        words.append(phrases[b])
        least = b < num_domains or 2 * num_domains <= b < 2 * num_domains + num_groups
        bound, better = abs(limit_B[b]), "less" if least else "more"
        if b < 2 * num_domains:
            kind = "floor" if least else "cap"
            place = f"{constraints.domains[b % num_domains]} is on its {kind} of {bound:.4g}"
        else:
            group = constraints.groups[(b - 2 * num_domains) % num_groups]
            place = f"{group.name} is on its {'least' if least else 'most'} of {bound:.4g}"
        notes.append(f"{place}: {better} of it would be better")
    for target in solution.binding_limits:
        words.append(f"{target} at most {limits[target]:.4g}")
        notes.append(f"the limit of {limits[target]:.4g} on {target} keeps the objective higher")
    return words, notes


def _edges(weights_K: np.ndarray, domains: tuple[str, ...], seen_RK: np.ndarray) -> list[str]:
    """Shares outside of what any run had."""
    warnings = []
    for k, domain in enumerate(domains):
        low, high = seen_RK[:, k].min(), seen_RK[:, k].max()
        if not low - 1e-9 <= weights_K[k] <= high + 1e-9:
            warnings.append(
                f"edge of the data: {domain} is at {weights_K[k]:.4g}; "
                f"the runs have {low:.4g} to {high:.4g}"
            )
    return warnings


def _distances(weights_K: np.ndarray, seen_RK: np.ndarray) -> tuple[float, float]:
    """L1 distance to the nearest run, and the median over runs to their nearest other mixture."""
    mixtures_MK = np.unique(np.round(seen_RK, 9), axis=0)
    distance = float(np.abs(mixtures_MK - weights_K).sum(1).min())
    if len(mixtures_MK) < 2:
        return distance, 0.0
    nearest = []
    for m, mixture_K in enumerate(mixtures_MK):
        distance_M = np.abs(mixtures_MK - mixture_K).sum(1)
        distance_M[m] = np.inf
        nearest.append(distance_M.min())
    return distance, float(np.median(nearest))


def _by_name(names: tuple[str, ...], values: np.ndarray) -> dict[str, float]:
    return {name: float(value) for name, value in zip(names, values, strict=True)}

"""Stage 6, choice: a mixture under constraints, with the evidence for and against it.

RegMix's way: simulate many feasible mixtures around the prior, predict each, and average the best.
An argmin would follow the regressor into whatever corner its error makes look good; the average of
the best hundred does not, and it stays feasible because floors and caps bound a convex set.

A choice is compared with uniform, proportional and the best run seen, all made feasible, and says
what should make one distrust it. Without signal it is the proportional mixture, and says so.

Shapes: R runs, K domains, M mixtures.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayx.errors import ChoiceError, did_you_mean
from rayx.constraints import Constraints, Group
from rayx.fit.fitted import FittedTable, normalised_objective

__all__ = ["Baseline", "Choice", "Constraints", "Group", "choose", "simulate"]

STRENGTHS = np.logspace(np.log10(0.1), np.log10(5.0), 15)
TEMPER = 0.5
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
        regret_interval: Interval of the regret as the difference of two runs.
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
            fields["warnings"] = tuple(fields["warnings"])
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
    num_candidates: int = 100_000,
    top_k: int = 100,
    level: float = 0.9,
) -> Choice:
    """Choose the mixture with the least predicted objective.

    Args:
        fitted: The models, and the table of runs behind them.
        objective: Target -> weight, > 0; normalised.
        prior: Domain -> weight or tokens; normalised. The candidates lie around it, and it is the
            baseline "proportional".
        constraints: Floors and caps; none by default.
        seed: Seed of the candidates.
        num_candidates: Mixtures simulated.
        top_k: Candidates averaged.
        level: Level of the intervals.

    Raises:
        FitError: The objective is not one for this table.
        ChoiceError: Unknown domain, other domains in the constraints than in the table, or numbers
            out of range.

    Source: Liu et al. 2024, arXiv:2407.01492, section 3.3 and the released code.
    Differs: half of the candidates are around the tempered prior, as RegMix draws its proxies;
        mixtures over a bound are moved to it instead of rejected.
    """
    table = fitted.table
    objective = normalised_objective(objective, table.targets)
    prior_K = _checked_prior(prior, table.domains)
    constraints = constraints or Constraints.none(table.domains)
    if constraints.domains != table.domains:
        raise ChoiceError(
            f"The constraints are for domains {', '.join(constraints.domains)}; the table has "
            f"{', '.join(table.domains)}, in this order."
        )
    if not 1 <= top_k <= num_candidates:
        raise ChoiceError(f"top_k is {top_k}; expected 1 to num_candidates ({num_candidates}).")
    if not 0.0 < level < 1.0:
        raise ChoiceError(f"The level of the intervals is {level}; expected between 0 and 1.")

    warnings = list(fitted.warnings)
    proportional_K = constraints.nearest(prior_K[None])[0]
    baselines = {
        "uniform": constraints.nearest(np.full((1, len(prior_K)), 1.0 / len(prior_K)))[0],
        "proportional": proportional_K,
    }
    best_seen_K = _best_seen(fitted, objective)
    if best_seen_K is not None:
        baselines["best_seen"] = constraints.nearest(best_seen_K[None])[0]

    silent = [target for target in objective if target in fitted.no_signal]
    signal = len(silent) < len(objective)
    if signal:
        if silent:
            warnings.append(f"no signal in {', '.join(silent)}: they have no say in this choice")
        candidates_MK = constraints.nearest(
            simulate(prior_K, num_candidates, np.random.default_rng(seed))
        )
        predicted_M = fitted.objective(candidates_MK, objective)
        order_M = np.argsort(predicted_M, kind="stable")
        top_MK = candidates_MK[order_M[:top_k]]
        weights_K = constraints.nearest(top_MK.mean(0, keepdims=True))[0]
        if fitted.objective(weights_K[None], objective)[0] > predicted_M[order_M[top_k - 1]]:
            warnings.append(
                f"the best {top_k} candidates lie apart: their average is predicted to be worse "
                f"than each of them, so the best single one was taken"
            )
            weights_K = top_MK[0]
        spread_K = top_MK.std(0)
        warnings += _bound_warnings(weights_K, top_MK, constraints, table.weights_RK)
    else:
        warnings.append(
            "NO SIGNAL: the runs do not show that the mixture matters for this objective; "
            "the choice is the proportional mixture, made feasible, and not an optimum"
        )
        weights_K, spread_K = proportional_K, np.zeros(len(prior_K))

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
        regret, low, high = fitted.difference(baseline_K, weights_K, objective, level)
        value_M, std_M = fitted.objective(baseline_K[None], objective, std=True)
        compared[name] = Baseline(
            weights=_by_name(table.domains, baseline_K),
            predicted=float(value_M[0]),
            std=float(std_M[0]),
            regret=regret,
            regret_interval=(low, high),
        )
        if signal and low <= 0.0:
            warnings.append(
                f"the predicted gain over {name} is {regret:.4g}, within its {level:.0%} interval "
                f"({low:.4g} to {high:.4g})"
            )
    low_M, high_M = fitted.objective_interval(weights_K[None], objective, level)
    losses_T = fitted.predict(weights_K[None])[0]
    return Choice(
        weights=_by_name(table.domains, weights_K),
        objective=objective,
        predicted=float(fitted.objective(weights_K[None], objective)[0]),
        interval=(float(low_M[0]), float(high_M[0])),
        level=level,
        predicted_losses=_by_name(table.targets, losses_T),
        regressors={target: fitted.regressors[target] for target in objective},
        baselines=compared,
        spread=_by_name(table.domains, spread_K),
        distance=distance,
        usual_distance=usual,
        signal=signal,
        warnings=tuple(warnings),
    )


def simulate(prior_K: np.ndarray, num_mixtures: int, rng: np.random.Generator) -> np.ndarray:
    """Draw mixtures from Dirichlet(strength * centre), strengths log-spaced from .1 to 5.

    The centre is the prior for one half of them and the tempered prior, proportional to
    prior^0.5, for the other.

    Source: sail-sg/regmix, mixture_config/synthesize_mixture.py.
    """
    tempered_K = prior_K**TEMPER / (prior_K**TEMPER).sum()
    concentrations = [
        np.maximum(strength * centre_K, 1e-9)
        for strength in STRENGTHS
        for centre_K in (prior_K, tempered_K)
    ]
    counts = np.diff(np.linspace(0, num_mixtures, len(concentrations) + 1).astype(int))
    return np.concatenate(
        [
            rng.dirichlet(concentration_K, count)
            for concentration_K, count in zip(concentrations, counts, strict=True)
        ]
    )


def _checked_prior(prior: Mapping[str, float], domains: tuple[str, ...]) -> np.ndarray:
    for domain in prior:
        if domain not in domains:
            raise ChoiceError(
                f"The prior has domain {domain!r}; the table has {', '.join(domains)}."
                f"{did_you_mean(domain, domains)}"
            )
    for domain in domains:
        if domain not in prior:
            raise ChoiceError(f"The prior has no domain {domain!r}; give it a weight, 0 if unused.")
    prior_K = np.array([float(prior[domain]) for domain in domains])
    if not np.isfinite(prior_K).all() or (prior_K < 0).any() or prior_K.sum() <= 0:
        raise ChoiceError(f"The prior is {dict(prior)}; expected weights >= 0 that are not all 0.")
    return prior_K / prior_K.sum()


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


def _bound_warnings(
    weights_K: np.ndarray, top_MK: np.ndarray, constraints: Constraints, seen_RK: np.ndarray
) -> list[str]:
    warnings = []
    for k, domain in enumerate(constraints.domains):
        cap, floor = constraints.caps_K[k], constraints.floors_K[k]
        if cap < 1.0 and (top_MK[:, k] >= cap - 1e-9).mean() >= BINDING_SHARE:
            warnings.append(f"{domain} is on its cap of {cap:.4g}: more of it would be better")
        if floor > 0.0 and (top_MK[:, k] <= floor + 1e-9).mean() >= BINDING_SHARE:
            warnings.append(f"{domain} is on its floor of {floor:.4g}: less of it would be better")
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

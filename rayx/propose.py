"""Proposers: which mixtures to train next, given what is fitted; before that, an optimal design.

Later rounds look where the models expect improvement or disagree. A batch is trained at the same
time, so its members must not all be the same guess: each acquisition has a rule for the batch.

Shapes: M mixtures of the pool, K domains, F folds, N proposed, Q features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from scipy.special import ndtr

from rayx.choice.choosers import Simulate
from rayx.choice.outlook import Supply
from rayx.choice.problem import Problem, prepare, simulate
from rayx.constraints import Constraints
from rayx.errors import ChoiceError, did_you_mean
from rayx.fit.fitted import FittedTable
from rayx.mixture import Mixture

POOL = 20_000
TOP_SHARE = 0.1  # of the pool, from which `top` samples
MIN_DISTANCE = 0.02  # L1, between proposed mixtures and to the runs there are

Acquisition = Callable[[Problem, np.ndarray, "_Distinct", np.random.Generator], None]


def next_mixtures(
    fitted: FittedTable,
    objective: Mapping[str, float],
    prior: Mapping[str, float],
    constraints: Constraints | None = None,
    *,
    num: int,
    seed: int,
    acquisition: str = "thompson",
    limits: Mapping[str, float] | None = None,
    supply: Supply | None = None,
) -> list[Mixture]:
    """Propose mixtures for the next round of proxies.

    Args:
        fitted: The models of the rounds so far.
        objective: Target -> weight, > 0.
        prior: Domain -> weight or tokens; the pool lies around it.
        constraints: Which mixtures may be trained.
        num: Mixtures wanted.
        seed: Seed of the pool and of the draws; give each round its own.
        acquisition: "thompson": each member minimises its own draw of the objective.
            "improvement": expected improvement, each member pushing the next ones away.
            "top": a random choice among the best tenth of the pool.
        limits: Target -> largest predicted loss.
        supply: Prices repetition.

    Returns:
        `num` different mixtures that keep the constraints within 1e-6 (millionths are rounded), at
        L1 distance .02 or more from each other and from every run in the table.

    Raises:
        ChoiceError: An unknown acquisition, or too few mixtures are left to try.
    """
    if acquisition not in ACQUISITIONS:
        raise ChoiceError(
            f"There is no acquisition {acquisition!r}; expected one of {', '.join(ACQUISITIONS)}."
            f"{did_you_mean(acquisition, ACQUISITIONS)}"
        )
    if num < 1:
        raise ChoiceError(f"num (of mixtures) is {num}; expected at least 1.")
    problem = prepare(fitted, objective, prior, constraints, limits=limits, supply=supply)
    rng = np.random.default_rng(seed)
    pool_MK = candidate_pool(problem, rng)
    chosen = _Distinct(pool_MK, fitted.table.weights_RK, num)
    ACQUISITIONS[acquisition](problem, pool_MK, chosen, rng)
    if not chosen.full:
        raise ChoiceError(
            f"Only {len(chosen.rows)} of {num} mixtures lie {MIN_DISTANCE} apart from each other "
            f"and from the runs there are. Ask for fewer, or loosen the constraints."
        )
    return [Mixture.from_array(pool_MK[m], fitted.table.domains) for m in chosen.rows]


def d_optimal_mixtures(
    constraints: Constraints, num: int, *, seed: int, order: int = 2, pool_size: int = 2_000
) -> list[Mixture]:
    """Choose mixtures that determine a polynomial of the weights best: max det(X' X).

    The rows of X are the weights (order 1, K features) or the weights and their products in pairs
    (order 2, Scheffé's quadratic, K (K + 1) / 2 features). Mixtures of a pool are exchanged one by
    one for as long as the determinant grows.

    Args:
        constraints: Which mixtures may be trained.
        num: Mixtures wanted; with fewer than features a small ridge keeps the problem defined.
        seed: Seed of the pool and of the start.
        order: 1 or 2.
        pool_size: Mixtures to choose from; corners of the simplex, moved inside, are among them.

    Returns:
        `num` mixtures that keep the constraints within 1e-6; one may occur twice, which is then a
        replicate that the design asks for.

    Raises:
        ChoiceError: `order` or `num` is out of range.

    Source: Fedorov 1972, Theory of Optimal Experiments (exchange); Scheffé 1958.
    """
    if order not in (1, 2) or num < 1:
        raise ChoiceError(f"order is {order}, num is {num}; expected order 1 or 2 and num >= 1.")
    rng = np.random.default_rng(seed)
    num_domains = len(constraints.domains)
    eye_KK = np.eye(num_domains)
    i, j = np.triu_indices(num_domains, k=1)
    drawn_MK = rng.dirichlet(np.ones(num_domains), pool_size)
    pool_MK = constraints.nearest(np.vstack([eye_KK, (eye_KK[i] + eye_KK[j]) / 2, drawn_MK]))
    features_MQ = pool_MK
    if order == 2:
        features_MQ = np.hstack([pool_MK, 4.0 * pool_MK[:, i] * pool_MK[:, j]])
    chosen_N = rng.choice(len(pool_MK), num, replace=num > len(pool_MK))
    ridge_QQ = 1e-6 * np.eye(features_MQ.shape[1])
    for _ in range(20):
        changed = False
        for n in range(num):
            rest_NQ = features_MQ[np.delete(chosen_N, n)]
            inverse_QQ = np.linalg.inv(rest_NQ.T @ rest_NQ + ridge_QQ)
            # det(A + f f') = det(A) (1 + f' A^-1 f)
            gain_M = np.einsum("mq,mq->m", features_MQ @ inverse_QQ, features_MQ)
            best = int(gain_M.argmax())
            if gain_M[best] > gain_M[chosen_N[n]] * (1.0 + 1e-6):
                chosen_N[n], changed = best, True
        if not changed:
            break
    return [Mixture.from_array(pool_MK[m], constraints.domains) for m in chosen_N]


def _thompson(
    problem: Problem, pool_MK: np.ndarray, chosen: _Distinct, rng: np.random.Generator
) -> None:
    """Each member is the best mixture of one draw of the objective.

    draw = prediction + sqrt((F - 1) / F) sum_f z_f (prediction_f - their mean), z standard normal:
    over draws its variance is the jackknife's, and a draw is a smooth function of the mixture.

    Source: Thompson 1933, Biometrika 25; the draw is derived.
    """
    value_M = problem.outlook.value(pool_MK)
    away_FM = _disagreement(problem, pool_MK)
    for _ in range(20 * chosen.num):
        if chosen.full:
            return
        chosen.add(
            int(np.argmin(chosen.open(value_M + rng.standard_normal(len(away_FM)) @ away_FM)))
        )


def _improvement(
    problem: Problem, pool_MK: np.ndarray, chosen: _Distinct, rng: np.random.Generator
) -> None:
    """Expected improvement on the best run's prediction, times a penalty near what is taken.

    EI = s (u Phi(u) + phi(u)), u = (best - m) / s. The penalty of a mixture x by a taken one y is
    Phi((slope |x - y| - (m(y) - least)) / s(y)), slope the steepest of the pool.

    Source: Mockus 1978 (EI); González et al. 2016, arXiv:1505.08052, local penalisation.
    Differs: distances are L1, and the steepest slope is that between random pairs of the pool.
    """
    mean_M = problem.outlook.value(pool_MK)
    sd_M = np.sqrt((_disagreement(problem, pool_MK) ** 2).sum(0)) + 1e-9
    best = float(problem.outlook.value(problem.outlook.fitted.table.weights_RK).min())
    u_M = (best - mean_M) / sd_M
    score_M = sd_M * (u_M * ndtr(u_M) + np.exp(-0.5 * u_M**2) / np.sqrt(2.0 * np.pi))
    # Far from any improvement it underflows; the least mean then comes first.
    score_M = np.maximum(score_M, 1e-300) * np.exp(-1e-6 * (mean_M - mean_M.min()) / sd_M)
    a, b = rng.integers(0, len(pool_MK), (2, 5_000))
    apart = np.abs(pool_MK[a] - pool_MK[b]).sum(1)
    slope = np.quantile(np.abs(mean_M[a] - mean_M[b]) / np.maximum(apart, 1e-3), 0.95) + 1e-12
    log_M = np.log(score_M)
    while not chosen.full and np.isfinite(chosen.open(-log_M)).any():
        m = int(np.argmin(chosen.open(-log_M)))
        chosen.add(m)
        distance_M = np.abs(pool_MK - pool_MK[m]).sum(1)
        reach_M = (slope * distance_M - max(0.0, mean_M[m] - mean_M.min())) / sd_M[m]
        log_M = log_M + np.log(np.maximum(ndtr(reach_M), 1e-300))


def _top(
    problem: Problem, pool_MK: np.ndarray, chosen: _Distinct, rng: np.random.Generator
) -> None:
    """Rank the pool and sample from its best tenth; where that is used up, go on down the rank.

    Source: Diao et al. 2025 (CLIMB), arXiv:2504.13161. Derived: the size of the tenth.
    """
    order_M = np.argsort(problem.outlook.value(pool_MK), kind="stable")
    top = max(chosen.num, int(TOP_SHARE * len(pool_MK)))
    for m in np.concatenate([rng.permutation(order_M[:top]), order_M[top:]]):
        if chosen.full:
            return
        if np.isfinite(chosen.open(np.zeros(len(pool_MK)))[m]):
            chosen.add(int(m))


ACQUISITIONS: dict[str, Acquisition] = {
    "thompson": _thompson,
    "improvement": _improvement,
    "top": _top,
}


def candidate_pool(problem: Problem, rng: np.random.Generator) -> np.ndarray:
    """Feasible mixtures around the prior, evenly on the simplex, and near the models' optimum."""
    table, num_domains = problem.outlook.fitted.table, len(problem.prior_K)
    around_MK = simulate(problem.prior_K, POOL // 2, rng)
    even_MK = rng.dirichlet(np.ones(num_domains), POOL // 4)
    best_K = Simulate(num_candidates=5_000, top_k=20).solve(problem, int(rng.integers(2**31)))
    value_R = problem.outlook.value(table.weights_RK)
    centres_CK = np.vstack([best_K.weights_K, table.weights_RK[np.argsort(value_R)[:4]]])
    shares_M1 = rng.random((POOL // 4, 1)) * 0.5
    near_MK = (1 - shares_M1) * centres_CK[rng.integers(0, len(centres_CK), POOL // 4)]
    near_MK += shares_M1 * rng.dirichlet(np.ones(num_domains), POOL // 4)
    pool_MK = problem.constraints.nearest(np.vstack([around_MK, even_MK, near_MK]))
    if problem.limits:
        pool_MK = pool_MK[problem.excess(pool_MK) <= 0]
    return pool_MK


def _disagreement(problem: Problem, pool_MK: np.ndarray) -> np.ndarray:
    """Deviations of the folds' models whose sum of squares is the jackknife's variance, (F, M)."""
    value_FM = np.stack([fold(pool_MK) for fold in problem.outlook.folds()])
    num_folds = len(value_FM)
    return np.sqrt((num_folds - 1) / num_folds) * (value_FM - value_FM.mean(0))


class _Distinct:
    """Rows of a pool that lie apart from each other and from the runs."""

    def __init__(self, pool_MK: np.ndarray, seen_RK: np.ndarray, num: int) -> None:
        self.rows: list[int] = []
        self.num = num
        self._pool_MK = pool_MK
        self._open_M = np.ones(len(pool_MK), dtype=bool)
        for seen_K in seen_RK:
            self._close(seen_K)

    @property
    def full(self) -> bool:
        return len(self.rows) >= self.num

    def open(self, value_M: np.ndarray) -> np.ndarray:
        """The values, infinite where a mixture is too near to one that is taken or was run."""
        return np.where(self._open_M, value_M, np.inf)

    def add(self, row: int) -> None:
        if self._open_M[row]:
            self.rows.append(row)
            self._close(self._pool_MK[row])

    def _close(self, weights_K: np.ndarray) -> None:
        self._open_M &= np.abs(self._pool_MK - weights_K).sum(1) >= MIN_DISTANCE

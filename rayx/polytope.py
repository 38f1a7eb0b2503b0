"""Polytopes of mixtures: shares within bounds whose sums over groups are within bounds too.

A point inside, the nearest point, and which bounds contradict each other. Without groups the
nearest point is `rayx.caps.fill`, exact and quick; with them it is found in the dual, which has one
number for each group instead of one for each domain.

Shapes: M mixtures, K domains, J sums (the total and each bound of a group), B bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.optimize import linprog

from rayx.caps import fill

TOLERANCE = 1e-9  # bounds missed by less are taken as met
LEAST = 1e-9  # a weight below is taken as this: of 0 no multiple is feasible
MAX_STEPS = 60
MOST_SCALE = 1e6  # room of less than one part in this may be taken as none
ROWS_AT_ONCE = 4096  # so that the arrays of a step stay in the cache


@dataclass(frozen=True, eq=False)
class Polytope:
    """{x: floors <= x <= caps, sum x = 1, lows <= sums_SK x <= highs}.

    Args:
        floors_K: Least shares, >= 0.
        caps_K: Largest shares.
        sums_SK: 1 where a domain is of a group, 0 elsewhere; S may be 0.
        lows_S: Least sum of each group.
        highs_S: Largest sum of each group.
    """

    floors_K: np.ndarray
    caps_K: np.ndarray
    sums_SK: np.ndarray
    lows_S: np.ndarray
    highs_S: np.ndarray

    def excess(self, weights_MK: np.ndarray) -> np.ndarray:
        """How far each mixture is outside, shape (M,): the largest amount over a bound, >= 0."""
        sum_MS = weights_MK @ self.sums_SK.T
        over = [np.abs(weights_MK.sum(1) - 1.0)[:, None]]
        over += [weights_MK - self.caps_K, self.floors_K - weights_MK]
        over += [sum_MS - self.highs_S, self.lows_S - sum_MS]
        return np.maximum(np.hstack(over).max(1), 0.0)

    @cached_property
    def inside(self) -> np.ndarray | None:
        """A point that meets no bound which can be left, shape (K,); None if there is no point.

        max sum_b y_b with bound_b x + y_b <= limit_b s, sum x = s, 0 <= y_b <= 1, s >= 1: then
        x / s is in the relative interior.

        Source: Freund, Roundy and Todd 1985, MIT Sloan working paper 1674-85.
        """
        matrix_BK, limit_B = self.bounds
        num_bounds, num_domains = matrix_BK.shape
        result = linprog(
            np.r_[np.zeros(num_domains + 1), -np.ones(num_bounds)],
            A_ub=np.hstack([matrix_BK, -limit_B[:, None], np.eye(num_bounds)]),
            b_ub=np.zeros(num_bounds),
            A_eq=np.r_[np.ones(num_domains), -1.0, np.zeros(num_bounds)][None],
            b_eq=[0.0],
            bounds=[(0, None)] * num_domains + [(1, MOST_SCALE)] + [(0, 1)] * num_bounds,
        )
        return None if result.x is None else result.x[:num_domains] / result.x[num_domains]

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """All bounds as matrix_BK x <= limit_B: floors, caps, lows, highs."""
        eye_KK = np.eye(len(self.floors_K))
        matrix_BK = np.vstack([-eye_KK, eye_KK, -self.sums_SK, self.sums_SK])
        return matrix_BK, np.r_[-self.floors_K, self.caps_K, -self.lows_S, self.highs_S]

    def conflict(self) -> list[int]:
        """Bounds (indices into `bounds`) that no mixture keeps, though it can keep all but any one.

        Source: Chinneck 2008, Feasibility and Infeasibility in Optimization, deletion filter.
        """
        matrix_BK, limit_B = self.bounds
        num_domains = matrix_BK.shape[1]
        # What every mixture keeps (shares from 0 to 1) is no part of a conflict.
        trivial_B = (matrix_BK.min(1) >= 0) & (limit_B >= 1) | (matrix_BK.max(1) <= 0) & (
            limit_B >= 0
        )
        kept = [int(b) for b in np.flatnonzero(~trivial_B)]
        for bound in list(kept):
            others = [b for b in kept if b != bound]
            result = linprog(
                np.zeros(num_domains),
                A_ub=matrix_BK[others],
                b_ub=limit_B[others] + TOLERANCE,
                A_eq=np.ones((1, num_domains)),
                b_eq=[1.0],
                bounds=(0, None),
            )
            if result.x is None:
                kept = others
        return kept

    def nearest(self, weights_MK: np.ndarray) -> np.ndarray:
        """The nearest mixtures inside, in Kullback-Leibler divergence, shape (M, K).

        Args:
            weights_MK: Mixtures, >= 0, each with a positive sum. Those inside stay as they are.
        """
        result_MK = weights_MK / weights_MK.sum(1, keepdims=True)
        outside = np.flatnonzero(self.excess(result_MK) > 1e-12)
        for rows in np.split(outside, range(ROWS_AT_ONCE, len(outside), ROWS_AT_ONCE)):
            if not len(self.sums_SK):
                result_MK[rows] = fill(result_MK[rows], self.floors_K, self.caps_K, 1.0)
            elif len(rows):
                result_MK[rows] = self._pulled(self._in_dual(result_MK[rows]))
        return result_MK

    def _in_dual(self, weights_MK: np.ndarray) -> np.ndarray:
        """min KL(x || w): x = clip(w exp(sums' m), floors, caps), multipliers m by damped Newton.

        The multipliers maximise a concave function; those of a group's low and high are >= 0.

        Source: Bertsekas 1982, SIAM J. Control Optim. 20(2), projected Newton, on the dual.
        """
        equal_S = self.lows_S >= self.highs_S
        low_S, high_S = ~equal_S & (self.lows_S > 0), ~equal_S & (self.highs_S < 1)
        total_1K = np.ones((1, weights_MK.shape[1]))
        sums = [total_1K, self.sums_SK[equal_S], self.sums_SK[low_S], -self.sums_SK[high_S]]
        sums_JK = np.vstack(sums)
        aim_J = np.r_[1.0, self.lows_S[equal_S], self.lows_S[low_S], -self.highs_S[high_S]]
        free_J = np.arange(len(aim_J)) <= equal_S.sum()
        eye_JJ, j = np.eye(len(aim_J)), np.arange(len(aim_J))

        def evaluate(m_MJ: np.ndarray, log_MK: np.ndarray) -> list[np.ndarray]:
            lifted_MK = log_MK + m_MJ @ sums_JK
            x_MK = np.clip(np.exp(np.minimum(lifted_MK, 50.0)), self.floors_K, self.caps_K)
            gain_MK = x_MK * (1.0 + lifted_MK - np.log(np.maximum(x_MK, 1e-300)))
            return [m_MJ, gain_MK.sum(1) - m_MJ @ aim_J, x_MK, x_MK @ sums_JK.T - aim_J]

        result_MK = weights_MK.copy()
        left_M = np.arange(len(weights_MK))
        log_MK = np.log(np.maximum(weights_MK, LEAST))
        damping_M = np.full(len(left_M), 1e-3)
        # From where floors and caps alone lead: far from it, all is clipped and no slope shows.
        start_MJ = np.zeros((len(left_M), len(aim_J)))
        box_MK = fill(weights_MK, self.floors_K, self.caps_K, 1.0)
        raised_MK = box_MK > self.floors_K * (1.0 + 1e-12)
        lift_MK = np.log(np.maximum(box_MK, LEAST)) - log_MK
        start_MJ[:, 0] = np.where(raised_MK, lift_MK, -np.inf).max(1)
        start_MJ[:, 0] = np.where(np.isfinite(start_MJ[:, 0]), start_MJ[:, 0], 0.0)
        state = evaluate(start_MJ, log_MK)
        for _ in range(MAX_STEPS):
            m_MJ, value_M, x_MK, slope_MJ = state
            held_MJ = ~free_J & (m_MJ <= 0) & (slope_MJ > 0)
            result_MK[left_M] = x_MK
            going_M = (np.abs(np.where(held_MJ, 0.0, slope_MJ)).max(1) > 1e-11) & (damping_M < 1e12)
            if not going_M.any():
                break
            left_M, log_MK, damping_M = left_M[going_M], log_MK[going_M], damping_M[going_M]
            state = m_MJ, value_M, x_MK, slope_MJ = [part[going_M] for part in state]
            moves_MJ = ~held_MJ[going_M]
            between_MK = x_MK * ((x_MK > self.floors_K) & (x_MK < self.caps_K))
            hessian_MJJ = np.matmul(sums_JK * between_MK[:, None, :], sums_JK.T)
            hessian_MJJ *= moves_MJ[:, :, None] & moves_MJ[:, None, :]
            ridge_MJ = damping_M[:, None] * (hessian_MJJ[:, j, j] + 1e-6) + 1e-12
            hessian_MJJ += eye_JJ * np.where(moves_MJ, ridge_MJ, 1.0)[:, :, None]
            step_MJ = np.linalg.solve(hessian_MJJ, (-slope_MJ * moves_MJ)[:, :, None])[:, :, 0]
            next_MJ = m_MJ + np.clip(step_MJ, -5.0, 5.0)
            tried = evaluate(np.where(free_J, next_MJ, np.maximum(next_MJ, 0.0)), log_MK)
            better_M = tried[1] <= value_M + 1e-15 * np.abs(value_M)
            state = [
                np.where(better_M if old.ndim == 1 else better_M[:, None], new, old)
                for new, old in zip(tried, state, strict=True)
            ]
            damping_M = np.where(better_M, np.maximum(damping_M / 8, 1e-12), damping_M * 8)
        return result_MK

    def _pulled(self, x_MK: np.ndarray) -> np.ndarray:
        """Mixtures that are outside by a little, moved towards the inner point until they are not.

        What holds with equality for every feasible mixture is met first, by the least squares step.
        """
        assert self.inside is not None
        far_M = self.excess(x_MK) > 1e-10
        matrix_BK, limit_B = self.bounds
        slack_B = limit_B - matrix_BK @ self.inside
        tight_B = slack_B < 1e-8
        equal_EK = np.vstack([np.ones(x_MK.shape[1]), matrix_BK[tight_B]])
        limit_E = np.r_[1.0, limit_B[tight_B]]
        x_FK = x_MK[far_M]
        x_FK = x_FK - (x_FK @ equal_EK.T - limit_E) @ np.linalg.pinv(equal_EK).T
        over_FB = np.where(tight_B, 0.0, x_FK @ matrix_BK.T - limit_B)
        with np.errstate(divide="ignore", invalid="ignore"):
            share_FB = np.where(over_FB > 0, over_FB / (over_FB + slack_B), 0.0)
        share_F1 = share_FB.max(1, keepdims=True)
        moved_FK = x_FK + share_F1 * (self.inside - x_FK)
        result_MK = x_MK.copy()
        result_MK[far_M] = np.clip(moved_FK, self.floors_K, self.caps_K)
        return result_MK

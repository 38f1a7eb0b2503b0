"""Laws: one fit as a numerical problem in scaled data and unbounded parameters.

Params and tokens are divided by their geometric mean and losses by their median, so that a fit does
not depend on units and the starts fit any data. Bounded parameters are fitted through exp or the
logistic function.

Shapes: see `law.py`. u_SP are the unbounded parameters, a domain's values side by side.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import qmc

from rayx.fit import huber

if TYPE_CHECKING:
    from rayx.fit.laws.law import Law, Parameter

MAX_STARTS = 256
FULL_STARTS = 16  # the best after the first threshold; these are taken to the optimum
SAME = 1e-3  # optima nearer than this in every u are one
MAX_OPTIMA = 3
NEARLY_BEST = 0.05  # of the objective: optima that a bootstrap replicate might prefer


def dimension(name: str) -> str | None:
    """The unit that an input is scaled by: "params", "tokens" or None."""
    return "tokens" if name.endswith("tokens") else "params" if name == "params" else None


class Problem:
    """Scaled data of one law.

    Args:
        law: The law, with its settings.
        inputs: Checked inputs as given.
        loss_R: Losses as given.
    """

    def __init__(self, law: Law, inputs: Mapping[str, np.ndarray], loss_R: np.ndarray) -> None:
        self.law = law
        self.unit = {"loss": float(np.median(np.abs(loss_R))) or 1.0}
        for name in reversed(law.inputs):  # "tokens" before "spec_tokens" in each law: it decides
            if (key := dimension(name)) and (seen_R := inputs[name][inputs[name] > 0]).size:
                self.unit[key] = float(np.exp(np.log(seen_R).mean()))
        self.inputs = self.scaled(inputs)
        scaled_R = loss_R / self.unit["loss"]
        self.target_R = np.log(scaled_R) if law.on_log else scaled_R
        num_domains = inputs["weights"].shape[1] if "weights" in inputs else 0
        self.parameters = law.parameters()
        ends = np.cumsum([num_domains if p.per_domain else 1 for p in self.parameters])
        self.slices = [
            slice(int(start), int(end))
            for start, end in zip(np.r_[0, ends[:-1]], ends, strict=True)
        ]
        self.num_parameters = int(ends[-1])

    def scaled(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Divide params and tokens by the fit's units."""
        return {n: a / self.unit.get(dimension(n) or "", 1.0) for n, a in inputs.items()}

    def theta(self, u_SP: np.ndarray) -> dict[str, np.ndarray]:
        """Bounded parameters of the scaled data: (S, 1), or (S, 1, K) for one a domain."""
        return {
            p.name: _bounded(p, u_SP[:, None, at] if p.per_domain else u_SP[:, at])[0]
            for p, at in zip(self.parameters, self.slices, strict=True)
        }

    def natural(self, u_SP: np.ndarray) -> dict[str, np.ndarray]:
        """Bounded parameters of the data as given."""
        return self.law.natural(self.theta(u_SP), self.unit)

    def model(
        self, u_SP: np.ndarray, inputs: Mapping[str, np.ndarray] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Log loss (loss where the law is not fitted on logs) and its Jacobian: SR, SPR.

        Of the runs fitted, or of other scaled inputs.
        """
        loss_SR, by_parameter = self.law.loss(self.theta(u_SP), inputs or self.inputs)
        jacobian_SPR = np.empty((len(u_SP), self.num_parameters, loss_SR.shape[1]))
        for p, at in zip(self.parameters, self.slices, strict=True):
            _, slope = _bounded(p, u_SP[:, at])
            by = by_parameter[p.name]
            by_SPR = by.transpose(0, 2, 1) if p.per_domain else by[:, None, :]
            jacobian_SPR[:, at] = by_SPR * slope[:, :, None]
        if not self.law.on_log:
            return loss_SR, jacobian_SPR
        return np.log(loss_SR), jacobian_SPR / loss_SR[:, None, :]

    def starts(self) -> np.ndarray:
        """The grid of starts, or a Latin hypercube of it where it has more than 256 points."""
        sizes = [len(p.start) for p in self.parameters]
        if math.prod(sizes) <= MAX_STARTS:
            grid = np.array(list(itertools.product(*map(range, sizes))))
        else:
            cube = qmc.LatinHypercube(len(sizes), rng=self.law.seed).random(MAX_STARTS)
            grid = (cube * sizes).astype(int)
        u_SP = np.empty((len(grid), self.num_parameters))
        for p, at, picked in zip(self.parameters, self.slices, grid.T, strict=True):
            u_SP[:, at] = _unbounded(p, np.array(p.start)[picked])[:, None]
        return u_SP

    def solve(
        self, u_SP: np.ndarray, row_weights_SR: np.ndarray, tolerance: float = 1e-13
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take each start to its optimum; returns u_SP and the objective.

        Source: free scale: Besiroglu et al. 2024, arXiv:2404.10102, the Huber likelihood
            sum huber_delta(r / s) + log s + log Z. Differs: s is solved for between fits.
        """
        law, count = self.law, len(u_SP)
        if not law.free_scale:
            delta_S = np.full(count, law.delta)
            return huber.minimise(
                self.model, u_SP, self.target_R, row_weights_SR, delta_S, tolerance=tolerance
            )
        scale_S, objective_S, first = np.zeros(count), np.full(count, np.inf), None
        for _ in range(20):
            with np.errstate(all="ignore"):
                residual_SR = self.model(u_SP)[0] - self.target_R
            new_S = huber_scale(residual_SR, row_weights_SR, law.delta)
            change = np.max(np.abs(np.log(new_S) - np.log(np.maximum(scale_S, 1e-300))))
            scale_S = new_S
            scaled_SR = residual_SR / scale_S[:, None]
            cost_S = (row_weights_SR * huber.huber(scaled_SR, np.full((1, 1), law.delta))).sum(1)
            total = row_weights_SR.sum(1)
            objective_S = cost_S + total * (np.log(scale_S) + _log_normaliser(law.delta))
            if change < 1e-9:
                break
            u_SP, _ = huber.minimise(
                self.model, u_SP, self.target_R, row_weights_SR, law.delta * scale_S,
                from_delta=first, tolerance=tolerance,
            )  # fmt: skip
            first = float(1e3 * law.delta * scale_S.max())
        return u_SP, np.where(np.isfinite(objective_S), objective_S, np.inf)

    def search(self) -> tuple[np.ndarray, np.ndarray]:
        """Fit from many starts; returns the distinct optima, best first, and their objectives."""
        ones_1R = np.ones((1, len(self.target_R)))
        starts_SP = self.starts()
        if len(starts_SP) > FULL_STARTS:
            rough_S = np.full(len(starts_SP), max(self.law.delta, 1.0))  # least squares
            starts_SP, cost_S = huber.minimise(
                self.model, starts_SP, self.target_R, ones_1R, rough_S,
                max_iterations=40, tolerance=1e-3,
            )  # fmt: skip
            starts_SP = starts_SP[np.argsort(cost_S, kind="stable")[:FULL_STARTS]]
        u_SP, cost_S = self.solve(starts_SP, ones_1R)
        order = np.argsort(cost_S, kind="stable")
        kept = [order[0]]
        for s in order[1:]:
            apart = all(np.abs(u_SP[s] - u_SP[k]).max() > SAME for k in kept)
            near = cost_S[s] <= cost_S[kept[0]] + NEARLY_BEST * abs(cost_S[kept[0]])
            if apart and near and len(kept) < MAX_OPTIMA:
                kept.append(s)
        return u_SP[kept], cost_S[kept]


def huber_scale(residual_SR: np.ndarray, weights_SR: np.ndarray, delta: float) -> np.ndarray:
    """The scale s_S at which sum w psi_delta(r / s) r / s = sum w, by bisection in log s."""
    size_SR = np.nan_to_num(np.abs(residual_SR), nan=1.0, posinf=1.0)
    largest_S = np.maximum(size_SR.max(1), 1e-12)
    low_S, high_S = np.log(largest_S * 1e-12), np.log(largest_S * 10.0)
    for _ in range(60):
        middle_S = 0.5 * (low_S + high_S)
        z_SR = size_SR / np.exp(middle_S)[:, None]
        too_small_S = (weights_SR * np.minimum(z_SR, delta) * z_SR).sum(1) > weights_SR.sum(1)
        low_S = np.where(too_small_S, middle_S, low_S)
        high_S = np.where(too_small_S, high_S, middle_S)
    return np.exp(0.5 * (low_S + high_S))


def _log_normaliser(delta: float) -> float:
    """Log of the integral of exp(-huber_delta)."""
    inside = math.sqrt(2.0 * math.pi) * math.erf(delta / math.sqrt(2.0))
    return math.log(inside + 2.0 * math.exp(-0.5 * delta**2) / delta)


def _bounded(p: Parameter, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The parameter and its derivative by u."""
    if math.isinf(p.low):
        return u, np.ones_like(u)
    if math.isinf(p.high):
        return p.low + np.exp(u), np.exp(u)
    share = 1.0 / (1.0 + np.exp(-u))
    return p.low + (p.high - p.low) * share, (p.high - p.low) * share * (1.0 - share)


def _unbounded(p: Parameter, value: np.ndarray) -> np.ndarray:
    if math.isinf(p.low):
        return value
    if math.isinf(p.high):
        return np.log(value - p.low)
    share = (value - p.low) / (p.high - p.low)
    return np.log(share / (1.0 - share))


def at_bound(p: Parameter, u_K: Sequence[float]) -> list[float | None]:
    """For each value the bound that it is on, or None."""
    found: list[float | None] = []
    for u in u_K:
        if math.isinf(p.low):
            found.append(None)
        elif u < -9.0:  # a share of exp(-9), 1e-4, of the typical loss or of the range
            found.append(p.low)
        else:
            found.append(p.high if u > 9.0 else None)
    return found

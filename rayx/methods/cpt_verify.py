"""Continued pretraining, measured: were the ratios that the laws gave the right ones?

Runs of a larger model over a grid of ratios say, seed by seed, which ratio was the best; the runs
at the predicted ratios stand beside it, beside no replay and beside uniform replay. The critical
ratio of whole curves is measured beside what the critical-ratio law says from their first halves.

Source: Gu et al. 2024, arXiv:2407.17467 (critical mixture ratio); the comparison is ours.

Shapes: C ratios tried, T points of a curve, G grid of ratios.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator

from rayx.errors import FitError
from rayx.fit.laws import critical_ratio
from rayx.methods.cpt_ratio import LOSSES, CptLaws


def once_over(curves: pd.DataFrame, domain_tokens: float = np.inf) -> pd.DataFrame:
    """Return each curve of one seed where its domain tokens end, or at its own end if before.

    Returns:
        ratio (increasing), tokens, domain_loss, general_loss; linear between evaluations.
    """
    rows = []
    for ratio in sorted(set(curves["ratio"])):
        curve = curves.loc[curves["ratio"] == ratio]
        end = float(curve["tokens"].max())
        tokens = end if ratio * end <= domain_tokens else domain_tokens / ratio
        losses = {name: np.interp(tokens, curve["tokens"], curve[name]) for name in LOSSES}
        rows.append({"ratio": ratio, "tokens": tokens, **losses})
    return pd.DataFrame(rows)


def measured_best(points: pd.DataFrame, limit: float = np.inf) -> tuple[float, float]:
    """Return ratio and domain loss of the lowest domain loss with general loss <= limit.

    Both losses are interpolated monotonically (PCHIP) over the ratios trained, as `once_over`
    returns them; nan and nan where no ratio keeps the limit.
    """
    ratio_C = points["ratio"].to_numpy()
    ratio_G = np.linspace(ratio_C[0], ratio_C[-1], 1001)
    domain_G, general_G = (
        PchipInterpolator(ratio_C, points[name].to_numpy())(ratio_G) for name in LOSSES
    )
    allowed_G = general_G <= limit
    if not allowed_G.any():
        return np.nan, np.nan
    best = int(np.argmin(np.where(allowed_G, domain_G, np.inf)))
    return float(ratio_G[best]), float(domain_G[best])


def critical_from_half(curves: pd.DataFrame, rise: float) -> float:
    """Return the critical ratio at the end of one seed's curves as their first halves tell it.

    Args:
        curves: As `CptRatio.curves` returns them, of one seed.
        rise: Rise of the general loss that is allowed, bits per byte, > 0.

    Returns:
        The ratio of the law; nan where fewer than four of the budgets seen have one among the
        ratios tried.
    """
    wide = {name: curves.pivot(index="ratio", columns="tokens", values=name) for name in LOSSES}
    domain, general = (wide[name].sub(wide[name][0], axis=0).drop(columns=0) for name in LOSSES)
    tokens_T = domain.columns.to_numpy(dtype=float)
    half_T = tokens_T <= tokens_T[-1] / 2
    try:
        found = critical_ratio(
            tokens_T[half_T],
            domain.index.to_numpy(),
            general.to_numpy()[:, half_T],
            domain.to_numpy()[:, half_T],
            limit=rise,
        )
    except FitError:
        return np.nan
    return float(found.law.predict(tokens_T[-1:])[0])


def law_errors(laws: CptLaws, curves: pd.DataFrame, seen_tokens: float) -> dict[str, float]:
    """Return the mean of |predicted / measured - 1| of each loss, up to `seen_tokens` and beyond.

    Measured is the mean over seeds at each ratio and length.
    """
    after = curves[curves["tokens"] > 0]
    mean = after.groupby(["params", "tokens", "ratio"], as_index=False)[list(LOSSES)].mean()
    errors = {}
    for (params, tokens), part in mean.groupby(["params", "tokens"]):
        predicted_2C = laws.predict(params, tokens, part["ratio"].to_numpy())
        where = "seen_length" if tokens <= seen_tokens else "beyond"
        for name, predicted_C in zip(LOSSES, predicted_2C, strict=True):
            errors.setdefault(f"{name}_{where}", []).append(predicted_C / part[name] - 1.0)
    return {name: float(np.abs(np.concatenate(parts)).mean()) for name, parts in errors.items()}


def verify(
    grid: pd.DataFrame,
    chosen: Mapping[str, pd.DataFrame],
    tolerance: float,
    domain_tokens: float,
) -> list[dict[str, Any]]:
    """Compare what was predicted with what was measured, seed by seed.

    Args:
        grid: `CptRatio.curves` of the larger model over a grid of ratios.
        chosen: "within" (usage 1) and "few" (usage 2) -> the same at the ratio that was predicted.
        tolerance: T: the general loss may rise to (1 + T) times that before.
        domain_tokens: What there is of the domain in usage 2.

    Returns:
        For each seed: `within` and `few`, each with the predicted ratio, the best ratio measured,
        the domain loss of both, and `arms` (ratio, tokens, losses, general_rise as a share; the
        predicted ratio last); `critical_predicted` and `critical_measured`, nan as None.
    """
    results = []
    for seed in sorted(set(grid["seed"])):
        curves = grid.loc[grid["seed"] == seed]
        base = float(curves.loc[curves["tokens"] == 0, "general_loss"].iloc[0])
        limit = (1.0 + tolerance) * base
        ends = {"within": once_over(curves), "few": once_over(curves, domain_tokens)}
        result: dict[str, Any] = {"seed": int(seed)}
        for usage, points in ends.items():
            own = chosen[usage].loc[chosen[usage]["seed"] == seed]
            run = once_over(own, domain_tokens if usage == "few" else np.inf).iloc[0]
            best, best_loss = measured_best(points, limit if usage == "within" else np.inf)
            result[usage] = {
                "predicted_ratio": float(run["ratio"]),
                "measured_ratio": best,
                "loss_at_predicted": float(run["domain_loss"]),
                "loss_at_measured": best_loss,
                "arms": [
                    {**row, "general_rise": row["general_loss"] / base - 1.0}
                    for row in [*points.to_dict("records"), run.to_dict()]
                ],
            }
        end = ends["within"]
        most = end.assign(domain_loss=-end["ratio"])  # the highest ratio that is allowed
        result["critical_predicted"] = none_if_nan(critical_from_half(curves, limit - base))
        result["critical_measured"] = none_if_nan(measured_best(most, limit)[0])
        results.append(result)
    return results


def none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else value


def mean_arms(seeds: list[dict[str, Any]], usage: str) -> pd.DataFrame:
    """Return the arms of a usage, means over seeds: ratio, tokens, losses, general_rise."""
    arms = pd.DataFrame([arm for seed in seeds for arm in seed[usage]["arms"]])
    return arms.pivot_table(index="ratio").reset_index()  # means

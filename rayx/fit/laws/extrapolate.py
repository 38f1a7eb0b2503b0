"""Laws: does a law hold beyond the runs that it was fitted to, and which one does best?

Shapes: R runs, H runs left out, P parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import mannwhitneyu

from rayx.errors import FitError
from rayx.fit.laws.law import Inputs, Law

SHARE = 0.2  # of the runs: the largest
SIGNIFICANT = 0.01
CLEARLY_WORSE = 1.5  # error on the runs left out over that on the runs fitted
# A fit by absolute deviations varies by pi / 2 more than least squares under normal noise.
VARIANCE_FACTOR = np.pi / 2.0


@dataclass(frozen=True)
class Extrapolation:
    """How a law fitted without the largest runs predicts them.

    Args:
        by: What the largest runs are the largest in: compute, tokens, params, distance.
        rows: Runs left out.
        beyond: Their largest size over the largest size fitted.
        error: Mean relative error |predicted / loss - 1| on the runs left out.
        error_median: Its median.
        bias: Mean of predicted / loss - 1: above 0 where the law predicts too high a loss.
        in_sample: Mean relative error on the runs fitted.
        in_sample_median: Its median.
        p_value: Of errors as large as these, if the runs left out follow the law of the others.
        wrong_form: The error is clearly worse than in sample, and more than noise explains.
    """

    by: str
    rows: int
    beyond: float
    error: float
    error_median: float
    bias: float
    in_sample: float
    in_sample_median: float
    p_value: float
    wrong_form: bool

    @property
    def warnings(self) -> list[str]:
        if not self.wrong_form:
            return []
        return [
            f"the form may be wrong beyond the runs: fitted without the {self.rows} largest by "
            f"{self.by}, its median error on them is {self.error_median:.2%}, on the others "
            f"{self.in_sample_median:.2%}"
        ]


def run_sizes(columns: Inputs) -> tuple[str, np.ndarray]:
    """What there is to extrapolate in, and each run's place in it, (R,).

    Compute 6 N (D + D') where there are both, else tokens or params; at one scale the distance of
    the mixture from the mean mixture, sum_k |w_k - mean_k|.
    """
    tokens_R = columns.get("tokens")
    if tokens_R is not None and "spec_tokens" in columns:
        tokens_R = tokens_R + columns["spec_tokens"]
    if "params" in columns and tokens_R is not None:
        return "compute", 6.0 * columns["params"] * tokens_R
    if tokens_R is not None:
        return "tokens", tokens_R
    if "params" in columns:
        return "params", columns["params"]
    weights_RK = columns["weights"]
    return "distance", np.abs(weights_RK - weights_RK.mean(0)).sum(1)


def extrapolate(
    law: Law,
    *columns: np.ndarray,
    domains: Sequence[str] | None = None,
    sizes: tuple[str, np.ndarray] | None = None,
) -> Extrapolation:
    """Fit without the largest fifth of the runs and predict them.

    Args:
        law: Its settings are used, without the bootstrap; it is not changed.
        columns: The law's inputs in order, then the loss.
        domains: As for `Law.fit`.
        sizes: What the largest runs are the largest in, and each run's size, (R,); by default
            `run_sizes` of the law's inputs. Ties are left out together.

    Raises:
        FitError: As `Law.fit`, or all runs are of one size.

    Source: the test of predictive failure of Chow 1960, Econometrica 28(3): errors of prediction
        are whitened by the covariance that noise and the estimate's variance give them.
    Differs: compared by ranks with the residuals (Mann and Whitney 1947), as an F ratio finds
        nothing beside a few outliers; the estimate's variance counts pi / 2 times.
    """
    inputs = {n: np.asarray(c, dtype=float) for n, c in zip(law.inputs, columns, strict=False)}
    loss_R = np.asarray(columns[-1], dtype=float)
    by, size_R = sizes or run_sizes(inputs)
    ordered_R = np.sort(size_R)
    threshold = ordered_R[int(np.ceil((1.0 - SHARE) * len(size_R)))]
    if (size_R >= threshold).mean() > 2.0 * SHARE:  # many runs of one size: only what is larger
        threshold = np.nextafter(threshold, np.inf)
    large_R = size_R >= threshold
    if not large_R.any():
        raise FitError(f"All runs are of one size by {by}: extrapolation cannot be checked.")
    fitted = dataclasses.replace(law, bootstrap=0)
    fitted.fit(*(np.asarray(c)[~large_R] for c in columns), domains=domains)
    # Differences of losses may be 0: their errors are relative to the typical one.
    scale_R = loss_R if law.on_log else np.full(len(loss_R), fitted.problem_.unit["loss"])
    error_R = (fitted.predict(*(inputs[n] for n in law.inputs)) - loss_R) / scale_R
    # Dropped rows are no part of what the fit says it explains.
    inside_R = np.abs(fitted.residual_R_)
    inside_R = np.expm1(inside_R) if law.on_log else inside_R
    out_H = np.abs(error_R[large_R])
    p_value = _surprise(fitted, {n: a[large_R] for n, a in inputs.items()}, loss_R[large_R])
    median, inside = float(np.median(out_H)), float(np.median(inside_R))
    return Extrapolation(
        by=by,
        rows=int(large_R.sum()),
        beyond=float(ordered_R[-1] / size_R[~large_R].max()),
        error=float(out_H.mean()),
        error_median=median,
        bias=float(error_R[large_R].mean()),
        in_sample=float(inside_R.mean()),
        in_sample_median=inside,
        p_value=p_value,
        wrong_form=p_value < SIGNIFICANT and median > CLEARLY_WORSE * inside,
    )


def _surprise(fitted: Law, inputs_H: Mapping[str, np.ndarray], loss_H: np.ndarray) -> float:
    """p-value of errors as large as those left out, if the law holds."""
    problem = fitted.problem_
    scaled_H = loss_H / problem.unit["loss"]
    target_H = np.log(scaled_H) if fitted.on_log else scaled_H
    value_1H, new_1PH = problem.model(fitted.u_[None], problem.scaled(inputs_H))
    _, old_1PR = problem.model(fitted.u_[None])
    spread_PP = np.linalg.pinv(old_1PR[0] @ old_1PR[0].T, rcond=1e-10, hermitian=True)
    spread_HH = VARIANCE_FACTOR * new_1PH[0].T @ spread_PP @ new_1PH[0]
    spread_HH[np.diag_indices(len(loss_H))] += 1.0
    white_H = np.linalg.solve(np.linalg.cholesky(spread_HH), value_1H[0] - target_H)
    spare = max(1, fitted.rows_ - problem.num_parameters)
    residual_R = fitted.residual_R_ * np.sqrt(fitted.rows_ / spare)
    return float(mannwhitneyu(np.abs(white_H), np.abs(residual_R), alternative="greater").pvalue)


def choose_law(
    candidates: Mapping[str, Law],
    columns: Mapping[str, np.ndarray],
    domains: Sequence[str] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> tuple[str, dict[str, Extrapolation], dict[str, str]]:
    """Choose a law by its mean error on the largest runs, not by its error on the runs fitted.

    Args:
        candidates: Name -> law with its settings.
        columns: Input name -> column, and "loss"; those that a law does not use are left aside.
        domains: As for `Law.fit`.
        progress: Called with done, total and what is next.

    Returns:
        The name of the best; name -> extrapolation; name -> why it could not be fitted.

    Raises:
        FitError: No candidate could be fitted.
    """
    found: dict[str, Extrapolation] = {}
    failed: dict[str, str] = {}
    sizes = run_sizes(columns)  # the same runs are left out for each law
    for done, (name, law) in enumerate(candidates.items()):
        progress(done, len(candidates), name)
        try:
            arrays = [columns[n] for n in (*law.inputs, "loss")]
            named = domains if "weights" in law.inputs else None
            found[name] = extrapolate(law, *arrays, domains=named, sizes=sizes)
        except FitError as error:
            failed[name] = str(error)
    if not found:
        raise FitError(
            "No law could be fitted: " + "; ".join(f"{n}: {e}" for n, e in failed.items())
        )
    return min(found, key=lambda name: found[name].error), found, failed

"""LLD: a fixed mixture that takes a base model towards a target model, as distributions.

Models are points in the space of log-likelihoods of probe texts (`rayx.likelihoods`). A mixture is
wanted whose training moves the base in the direction of the target, or to it:

- `identity_kernel`: only the two vectors, each domain taken to move its own texts alone.
- `aligned`: the direction that training on each domain gives is known, from gradients at the base
  (`rayx.proxy.likelihood.gradient_kernel`) or from short runs (`response_kernel`).

A third way, which inverts a sweep of proxies, is in `rayx.methods.lld_sweep`.

Source: Kishino et al. 2026, arXiv:2603.16622, abstract and figure captions only: domain weights
    from aligning the update direction with the direction to the target in log-likelihood space. The
    estimators are derived.

Legend: K domains, E equations (texts or kinds of text), R runs, M mixtures, S starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize, nnls

from rayx.errors import SpecError
from rayx.likelihoods import Likelihoods, difference, matrix
from rayx.mixture import Mixture
from rayx.recipe import require

LEVELS = ("text", "domain")
TINY = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mixture for getting from a base to a target.

    Attributes:
        mixture: The weights.
        aligned: False where no mixture takes the base any nearer: `mixture` is then the prior.
        cosine: Of the direction that the mixture is predicted to give and the one wanted; NaN from
            a sweep, which predicts places.
        misfit: Squared distance that stays, as a share of the base's; from a sweep in units of the
            noise's variance.
    """

    mixture: Mixture
    aligned: bool
    cosine: float
    misfit: float


def identity_kernel(
    base: Likelihoods,
    target: Likelihoods,
    prior: Mapping[str, float] | None = None,
    temperature: float = 1.0,
    projection: bool = False,
) -> Estimate:
    """Return pi_k ~ prior_k exp(d_k / (temperature sd(d))): domains where the target leads by more.

    d_k is the mean over domain k's texts of the centred difference of the two vectors, nats a text.
    It is argmax_pi <pi, d> - temperature sd(d) KL(pi || prior). No gradients, no training.

    Args:
        base: Where training starts.
        target: Where it should go.
        prior: Weights pi_0 over the domains; uniform by default.
        temperature: > 0.
        projection: Take the nearest point of the simplex to d / (temperature sd(d)) instead.

    Raises:
        SpecError: Base and target are equal on the texts, or on each domain's mean.

    Source: derived.
    """
    require(temperature > 0, "temperature", temperature, "a number > 0")
    d_N = difference(base, target)
    prior_K = prior_array(prior, base.targets)
    d_K = base.per_target(d_N)
    d_K = d_K - d_K.mean()
    require(d_K.std() > TINY, "The difference of target and base, by domain,", d_K.tolist(),
            "one that is not the same for all domains")  # fmt: skip
    scaled_K = d_K / (temperature * d_K.std())
    if projection:
        pi_K = simplex_projection(scaled_K)
    else:
        pi_K = prior_K * np.exp(scaled_K - scaled_K.max())
    pi_K = pi_K / pi_K.sum()
    step_N = (pi_K - pi_K[base.target_N].mean())[base.target_N]  # each text follows its domain
    lengths = float(np.linalg.norm(step_N) * np.linalg.norm(d_N))
    return _estimate(pi_K, base.targets, float(step_N @ d_N) / max(lengths, TINY))


def aligned(
    base: Likelihoods,
    target: Likelihoods,
    kernel_NK: np.ndarray,
    prior: Mapping[str, float] | None = None,
    ridge: float = 0.0,
    level: str = "text",
) -> Estimate:
    """Return the mixture whose direction K pi has the largest cosine with that to the target.

    min over pi, c >= 0 of ||c K pi - d||^2 / ||d||^2 + ridge KL(pi || prior), K and d centred over
    the texts. Without a ridge: u = argmin_{u >= 0} ||K u - d||, pi = u / sum(u). By `domain` the
    rows are first averaged over each domain's texts; the K - 1 differences that are left do not fix
    K weights and a length, so that planted mixtures are found badly.

    Args:
        base: Where training starts.
        target: Where it should go.
        kernel_NK: Change of each text's log-likelihood for training on each domain, any unit.
        prior: Weights pi_0, > 0 where a ridge is asked for; uniform by default.
        ridge: >= 0.
        level: `text` or `domain`.

    Returns:
        The estimate; the prior, flagged, where no domain points to the target.

    Raises:
        SpecError: Shapes differ, a value is not finite, or base and target are equal on the texts.

    Source: derived.
    """
    domains, kernel_EK = base.targets, np.asarray(kernel_NK, float)
    prior_K, wanted_E = prior_array(prior, domains), difference(base, target)
    expected = (len(wanted_E), len(domains))
    require(kernel_EK.shape == expected, "Shape of the kernel", kernel_EK.shape,
            f"{expected} (texts, domains)")  # fmt: skip
    require(bool(np.isfinite(kernel_EK).all()), "The kernel", "not finite", "finite numbers")
    require(ridge >= 0, "ridge", ridge, "a number >= 0")
    require(level in LEVELS, "level", level, f"one of {', '.join(LEVELS)}")
    share_E = np.full(len(wanted_E), 1.0 / len(wanted_E))
    if level == "domain":
        share_E = np.bincount(base.target_N) / len(wanted_E)
        kernel_EK, wanted_E = base.per_target(kernel_EK.T).T, base.per_target(wanted_E)
    root_E = np.sqrt(share_E)
    kernel_EK = (kernel_EK - share_E @ kernel_EK) * root_E[:, None]
    wanted_E = wanted_E * root_E
    unit_E = wanted_E / np.linalg.norm(wanted_E)

    def cosine(pi_MK: np.ndarray) -> np.ndarray:
        step_ME = pi_MK @ kernel_EK.T
        return step_ME @ unit_E / np.maximum(np.linalg.norm(step_ME, axis=1), TINY)

    u_K, _ = nnls(kernel_EK, unit_E)
    if u_K.sum() * np.linalg.norm(kernel_EK) <= TINY:
        return _estimate(prior_K, domains, 0.0, False)
    pi_K = u_K / u_K.sum()
    if ridge > 0:
        pi_K, _ = minimise_on_simplex(
            lambda pi_MK: (
                1.0 - np.maximum(cosine(pi_MK), 0.0) ** 2 + ridge * divergence(pi_MK, prior_K)
            ),
            np.stack([0.9 * pi_K + 0.1 * prior_K, prior_K]),
        )
    return _estimate(pi_K, domains, float(cosine(pi_K[None])[0]))


def response_kernel(
    base: Likelihoods, runs: Sequence[Likelihoods], weights_RK: np.ndarray
) -> np.ndarray:
    """Return the kernel of `aligned` from runs that left the base, shape (N, K).

    The least-squares solution of weights K^T = runs - base: each run's change is taken to be linear
    in its mixture. K runs on mixtures near the corners (one-hot, smoothed) give the response
    matrix; they should be as long as the training that is planned, and share its data order.

    Args:
        base: Where the runs started.
        runs: R >= K, each after training.
        weights_RK: Their mixtures.

    Raises:
        SpecError: Too few runs, mixtures that do not span the domains, or other texts.

    Source: derived.
    """
    weights_RK = np.asarray(weights_RK, float)
    expected = (len(runs), len(base.targets))
    require(weights_RK.shape == expected, "Shape of the mixtures", weights_RK.shape,
            f"{expected} (runs, domains)")  # fmt: skip
    rank = int(np.linalg.matrix_rank(weights_RK, tol=1e-6))
    require(rank == expected[1], "The rank of the runs' mixtures", rank,
            f"the number of domains ({expected[1]}), so that all are told apart")  # fmt: skip
    nats = matrix([base, *runs])
    return np.linalg.lstsq(weights_RK, nats[1:] - nats[0], rcond=None)[0].T


def recovery(true: Mapping[str, float], found: Mapping[str, float]) -> tuple[float, float]:
    """Return KL(true || found) in nats and the L1 distance of two mixtures.

    A domain that is found absent counts as one millionth, the least that a mixture can hold.
    """
    names = sorted({*true, *found})
    p_K, q_K = (np.array([m.get(d, 0.0) for d in names]) for m in (true, found))
    return float(divergence(p_K[None], np.maximum(q_K, 1e-6))[0]), float(np.abs(p_K - q_K).sum())


def simplex_projection(point_K: np.ndarray) -> np.ndarray:
    """Return the nearest point of the simplex in Euclidean distance, shape (K,).

    Source: Duchi et al. 2008, ICML, figure 1.
    """
    sorted_K = np.sort(point_K)[::-1]
    over_K = (np.cumsum(sorted_K) - 1.0) / np.arange(1, len(point_K) + 1)
    return np.maximum(point_K - over_K[np.flatnonzero(sorted_K > over_K)[-1]], 0.0)


def minimise_on_simplex(
    cost: Callable[[np.ndarray], np.ndarray], starts_SK: np.ndarray
) -> tuple[np.ndarray, float]:
    """Return the best point found from the starts, shape (K,), and its cost.

    L-BFGS on logits, with central differences in one call of `cost`, (M, K) -> (M,).
    """
    width = starts_SK.shape[1]
    steps = np.concatenate([1e-4 * np.eye(width), -1e-4 * np.eye(width)])

    def with_slope(logits_K: np.ndarray) -> tuple[float, np.ndarray]:
        found = cost(_softmax(np.vstack([logits_K, logits_K + steps])))
        return float(found[0]), (found[1 : width + 1] - found[width + 1 :]) / 2e-4

    best = min(
        (
            minimize(with_slope, np.log(np.maximum(start, 1e-4)), jac=True, method="L-BFGS-B",
                     bounds=[(-30.0, 30.0)] * width)
            for start in starts_SK
        ),
        key=lambda result: result.fun,
    )  # fmt: skip
    return _softmax(best.x[None])[0], float(best.fun)


def _softmax(logits_MK: np.ndarray) -> np.ndarray:
    raised = np.exp(logits_MK - logits_MK.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


def divergence(p_MK: np.ndarray, q_K: np.ndarray) -> np.ndarray:
    """Return KL(p || q) in nats, shape (M,)."""
    return (p_MK * np.log(np.maximum(p_MK, 1e-300) / np.maximum(q_K, 1e-300))).sum(1)


def prior_array(prior: Mapping[str, float] | None, domains: Sequence[str]) -> np.ndarray:
    """Return a prior's weights in the order of the domains, uniform where there is none.

    Raises:
        SpecError: There is one domain, or the prior has another one.
    """
    if len(domains) < 2:
        raise SpecError(f"There is one domain, {list(domains)}: no mixture to find. Give two.")
    return Mixture(prior or dict.fromkeys(domains, 1.0)).to_array(domains)


def _estimate(
    pi_K: np.ndarray, domains: Sequence[str], cosine: float, is_aligned: bool = True
) -> Estimate:
    return Estimate(
        mixture=Mixture.from_array(pi_K, domains),
        aligned=is_aligned,
        cosine=cosine,
        misfit=1.0 - max(cosine, 0.0) ** 2,
    )

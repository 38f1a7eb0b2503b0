"""Merge operators that trim or weigh the entries of task vectors: TIES, DARE, PCB.

A task vector is an expert less its base, tau_k = theta_k - theta.

Legend: C candidates, K experts, N elements of a tensor, S elements of a slice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from rayx.merge_operator import Operator
from rayx.proxy.merge.source import MASK_BLOCK, Combine, Source, slices

CLAMPED_SHARE = 1e-4  # of PCB's task vector, at either end


def ties(source: Source, operator: Operator) -> Combine:
    """Return theta + scale times the mean of the trimmed task vectors that agree in sign.

    Each task vector keeps its `density` largest entries by magnitude; an entry's sign is that of
    sum_k w_k tau_k; merged = sum w_k tau_k / sum w_k over the experts that have this sign.

    Source: Yadav et al. 2023, arXiv:2306.01708, section 3.
    Differs: trimmed per tensor and weighted, as in mergekit; entries as large as the last one kept
        are kept too, so that the order of elements does not matter.
    """
    trims = float(operator.density or 1.0) < 1.0
    least_K = [
        _nth_largest(_task_vector(source, k).abs_(), _kept(operator, source.numel))
        for k in range(source.experts)
        if trims
    ]

    def combine(experts_KS: Tensor, base_S: Tensor, weights_CK: Tensor, start: int) -> Tensor:
        delta_KS = experts_KS - base_S
        if trims:
            delta_KS *= delta_KS.abs() >= delta_KS.new_tensor(least_K)[:, None]
        return _added(base_S, operator, _elected(delta_KS, weights_CK, mean=True))

    return combine


def dare(source: Source, operator: Operator) -> Combine:
    """Return theta + scale sum_k w_k m_k tau_k r_k: entries dropped at random, the rest rescaled.

    Entries are kept with probability `density`; r_k makes the sum of magnitudes what it was.

    Source: Yu et al. 2024, arXiv:2311.03099, section 3.
    Differs: the paper rescales by 1 / density, of which r_k, as in mergekit, is the realised value.
        Masks follow from the seed, the tensor's name and the expert's values.
    """
    dropped = _dropped(source, operator)
    return lambda experts_KS, base_S, weights_CK, start: _added(
        base_S, operator, weights_CK @ dropped(experts_KS - base_S, start)
    )


def dare_ties(source: Source, operator: Operator) -> Combine:
    """Return `dare` with the sign election of `ties`: theta + scale sum_k w_k m_k tau_k r_k.

    The sum is over the experts that have the elected sign, and is not divided by their weights.

    Source: Yu et al. 2024, arXiv:2311.03099, section 4.1 (DARE before TIES).
    Differs: not divided by the weights, as in mergekit. Masks as in `dare`.
    """
    dropped = _dropped(source, operator)
    return lambda experts_KS, base_S, weights_CK, start: _added(
        base_S, operator, _elected(dropped(experts_KS - base_S, start), weights_CK, mean=False)
    )


def pcb(source: Source, operator: Operator) -> Combine:
    """Return theta + scale sum_k w_k s_k tau_k / sum_k w_k s_k, s_k from parameters' competition.

    score_k = exp(K n_k^2) tanh(tau_k sum_j tau_j), n_k = |tau_k| scaled to [0, 1] after clamping at
    its 1e-4 quantiles; s_k = score_k scaled to [0, 1], 0 below its 1 - density quantile.

    Source: Du et al. 2024 (PCB-Merging), arXiv:2410.02396, section 3.
    Differs: per tensor, where the original flattens the model, so each tensor keeps `density` of
        its own entries; weights in the average (equal ones are the original); quantiles are counted
        from both ends alike, so tensors under 10,000 entries are not clamped. One expert alone is
        itself only where s > 0, at any density.
    """
    count, kept = source.experts, _kept(operator, source.numel)
    clamped = int(CLAMPED_SHARE * source.numel)
    total_N = _task_vector(source, 0)
    for k in range(1, count):
        total_N += _task_vector(source, k)

    def score(delta_S: Tensor, total_S: Tensor, low: float, high: float) -> Tensor:
        share_S = (delta_S.abs().clamp(low, high) - low) / (high - low or 1.0)
        return torch.exp(count * share_S**2) * torch.tanh(delta_S * total_S)

    bounds = []
    for k in range(count):
        delta_N = _task_vector(source, k)
        sizes_N = delta_N.abs()
        low = _nth_largest(sizes_N, source.numel - clamped)
        high = _nth_largest(sizes_N, clamped + 1)
        del sizes_N
        score_N = score(delta_N, total_N, low, high)
        bounds.append((low, high, _nth_largest(score_N, kept), float(score_N.max())))
        del delta_N, score_N
    del total_N

    def combine(experts_KS: Tensor, base_S: Tensor, weights_CK: Tensor, start: int) -> Tensor:
        delta_KS = experts_KS - base_S
        total_S = delta_KS.sum(0)
        scale_KS = torch.empty_like(delta_KS)
        for k, (low, high, least, most) in enumerate(bounds):
            score_S = score(delta_KS[k], total_S, low, high)
            if most > least:
                scale_KS[k] = (score_S.clamp(least, most) - least) / (most - least)
            else:  # one entry is kept, or all are alike
                scale_KS[k] = score_S >= least
            delta_KS[k] = delta_KS[k].sign() * delta_KS[k].abs().clamp(low, high)
        merged_CS = (weights_CK @ (delta_KS * scale_KS)) / (weights_CK @ scale_KS).clamp(min=1e-12)
        return _added(base_S, operator, merged_CS)

    return combine


def _task_vector(source: Source, k: int) -> Tensor:
    return source.expert(k, 0, source.numel) - source.base(0, source.numel)


def _kept(operator: Operator, numel: int) -> int:
    return max(1, int(float(operator.density or 1.0) * numel))


def _nth_largest(values_N: Tensor, n: int) -> float:
    """Return the n-th largest value; on the CPU it reorders the values and takes no memory."""
    values = values_N.cpu().numpy()
    place = len(values) - n
    values.partition(place)
    return float(values[place])


def _added(base_S: Tensor, operator: Operator, merged_CS: Tensor) -> Tensor:
    return merged_CS.mul_(operator.scale).add_(base_S)


def _elected(delta_KS: Tensor, weights_CK: Tensor, mean: bool) -> Tensor:
    """Return the weighted sum (or mean) of the task vectors that have the sign of their sum."""
    merged_CS = delta_KS.new_empty(len(weights_CK), delta_KS.shape[1])
    for c, weights_K in enumerate(weights_CK):
        weighted_KS = delta_KS * weights_K[:, None]
        sign_S = torch.where(weighted_KS.sum(0) >= 0, 1.0, -1.0).to(delta_KS.dtype)
        agrees_KS = weighted_KS.sign() == sign_S
        merged_CS[c] = (weighted_KS * agrees_KS).sum(0)
        if mean:
            total_S = weights_K @ agrees_KS.to(delta_KS.dtype)
            merged_CS[c] /= torch.where(total_S == 0, 1.0, total_S)
    return merged_CS


def _mask(seed: int, start: int, size: int) -> Tensor:
    """Return uniform draws of elements [start, start + size) of a tensor, block by block."""
    draws = []
    for at in range(start, start + size, MASK_BLOCK):
        generator = torch.Generator().manual_seed((seed + at // MASK_BLOCK) % (1 << 63))
        draws.append(torch.rand(MASK_BLOCK, generator=generator))
    return torch.cat(draws)[:size]


def _dropped(source: Source, operator: Operator) -> Callable[[Tensor, int], Tensor]:
    """Return what drops entries of task vectors, shape (K, S), at random and rescales the rest."""
    density = float(operator.density or 1.0)
    if density >= 1.0:
        return lambda delta_KS, start: delta_KS
    seeds, ratios = [], []
    for k in range(source.experts):
        # The seed follows from the expert's values, so masks move with experts, not with places.
        digest = hashlib.blake2b(f"{operator.seed} {source.name}".encode(), digest_size=8)
        for start, stop in slices(source):
            digest.update(source.expert(k, start, stop).cpu().contiguous().numpy().data)
        seeds.append(int.from_bytes(digest.digest(), "little"))
        before, after = 0.0, 0.0
        for start, stop in slices(source):
            sizes_S = (source.expert(k, start, stop) - source.base(start, stop)).abs().double()
            keeps_S = (_mask(seeds[k], start, stop - start) < density).to(sizes_S.device)
            before += float(sizes_S.sum())
            after += float((sizes_S * keeps_S).sum())
        ratios.append(before / after if min(before, after) >= 1e-7 else 1.0)

    def drop(delta_KS: Tensor, start: int) -> Tensor:
        for k, seed in enumerate(seeds):
            keeps_S = _mask(seed, start, delta_KS.shape[1]) < density
            delta_KS[k] *= keeps_S.to(delta_KS) * ratios[k]
        return delta_KS

    return drop

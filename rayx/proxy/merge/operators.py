"""Merge operators: experts of one model become one model, tensor by tensor.

Each operator is one function in two steps. The first looks at whole tensors, one expert at a time,
and returns the second, which merges any slice of the flattened tensors. So an operator that ranks
or normalises over a tensor needs a few copies of one tensor, whatever the number of experts.

All arithmetic is float32 (float64 for float64 experts). mergekit is followed where it has the
operator: what is trimmed, elected or normalised is so per tensor, not over the whole model.

Legend: C candidates, K experts, N elements of a tensor, S elements of a slice, (...) its shape.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from rayx.errors import SpecError
from rayx.merge_operator import Operator
from rayx.proxy.merge.source import Combine, Source, Stacked, gram, work_dtype
from rayx.proxy.merge.task_vectors import dare, dare_ties, pcb, ties

LINEAR_ABOVE = 0.9995  # cosine from which slerp is linear
EPS = 1e-8  # added to norms


def linear(source: Source, operator: Operator) -> Combine:
    """Return sum_k w_k theta_k; weights are taken as they are.

    Source: Wortsman et al. 2022, arXiv:2203.05482 (averages of fine-tuned weights).
    Differs: mergekit divides by the sum of the weights; here a sum other than 1 is refused before.
    """
    return lambda experts_KS, base_S, weights_CK, start: weights_CK @ experts_KS


def soup(source: Source, operator: Operator) -> Combine:
    """Return the mean of the experts.

    Source: Wortsman et al. 2022, arXiv:2203.05482, uniform soup.
    """
    return lambda experts_KS, base_S, weights_CK, start: (
        torch.full_like(weights_CK, 1.0 / source.experts) @ experts_KS
    )


def task_arithmetic(source: Source, operator: Operator) -> Combine:
    """Return theta + scale sum_k w_k (theta_k - theta); weights are never normalised.

    Source: Ilharco et al. 2023, arXiv:2212.04089; Ram et al. 2024 (DEM), arXiv:2406.15570, eq. 2.
    """
    return lambda experts_KS, base_S, weights_CK, start: (
        base_S + operator.scale * (weights_CK @ (experts_KS - base_S))
    )


def slerp(source: Source, operator: Operator) -> Combine:
    """Return sin((1-t) a)/sin(a) theta_1 + sin(t a)/sin(a) theta_2, t = w_2 / (w_1 + w_2).

    a is the angle between the two tensors; where |cos a| > .9995 the merge is linear in t.

    Source: Shoemake 1985, Animating rotation with quaternion curves.
    Differs: per tensor, as in mergekit; cos a is summed in float64.

    Raises:
        SpecError: There are more than two experts.
    """
    if source.experts > 2:
        raise SpecError(f"slerp takes 2 experts and got {source.experts}; use multi_slerp.")
    gram_KK = gram(source)
    norm_K = np.sqrt(np.diag(gram_KK))
    norm_K[norm_K <= EPS] = 1.0
    cosine = float(np.clip(gram_KK[0, -1] / (norm_K[0] * norm_K[-1]), -1.0, 1.0))
    angle = float(np.arccos(cosine))

    def combine(experts_KS: Tensor, base_S: Tensor, weights_CK: Tensor, start: int) -> Tensor:
        share_CK = weights_CK.double() / weights_CK.double().sum(1, keepdim=True)
        if source.experts == 2 and abs(cosine) <= LINEAR_ABOVE:
            # The first expert's share is 1 - t.
            share_CK = torch.sin(share_CK * angle) / np.sin(angle)
        return share_CK.to(experts_KS.dtype) @ experts_KS

    return combine


def multi_slerp(source: Source, operator: Operator) -> Combine:
    """Return r s / |s| with s = sum_k w_k theta_k / |theta_k| and r = sum_k w_k |theta_k|.

    Weights are divided by their sum. It is mergekit's `multislerp` without a base: that goes from
    s along sum_k w_k (u_k - (u_k m) m), u_k = theta_k / |theta_k|, m = s / |s|, which is 0.
    Where s vanishes (|s| < 1e-8, as for a tensor of zeros) the merge is linear.

    Source: Goddard 2024, Multi-SLERP (a note without a paper), as in mergekit.
    Differs: mergekit refuses a vanishing s of more than two experts.
    """
    gram_KK = gram(source)
    norm_K = torch.from_numpy(np.sqrt(np.diag(gram_KK)))

    def combine(experts_KS: Tensor, base_S: Tensor, weights_CK: Tensor, start: int) -> Tensor:
        share_CK = (weights_CK / weights_CK.sum(1, keepdim=True)).double().cpu()
        unit_CK = share_CK / (norm_K + EPS)
        length_C = torch.einsum("ck,kl,cl->c", unit_CK, torch.from_numpy(gram_KK), unit_CK)
        length_C = length_C.clamp(min=0.0).sqrt()
        radius_C = share_CK @ norm_K
        curved_CK = unit_CK * (radius_C / length_C.clamp(min=EPS))[:, None]
        factors_CK = torch.where((length_C < EPS)[:, None], share_CK, curved_CK)
        return factors_CK.to(experts_KS) @ experts_KS

    return combine


PLANS: dict[str, Callable[[Source, Operator], Combine]] = {
    "linear": linear,
    "soup": soup,
    "task_arithmetic": task_arithmetic,
    "slerp": slerp,
    "multi_slerp": multi_slerp,
    "ties": ties,
    "dare": dare,
    "dare_ties": dare_ties,
    "pcb": pcb,
}


def bagged(bags_K: Tensor) -> Tensor:
    """Return the mean of models trained on samples of the data, shape (K, ...) -> (...).

    Source: BOOM, arXiv:2602.05787 (abstract: copies trained on sampled subsets, weights merged).
    Differs: the abstract does not say how copies are merged; here all count the same.
    """
    return bags_K.to(work_dtype(bags_K.dtype)).mean(0).to(bags_K.dtype)


def bagged_update(current: Tensor, new: Tensor, count: int) -> Tensor:
    """Return current + (new - current) / count: the mean with one bag more.

    Updated from the first bag on, it is `bagged` of all of them, in memory of two models.

    Args:
        current: Mean of count - 1 bags, shape (...).
        new: The bag that is added.
        count: Bags with the new one, >= 1.

    Source: BOOM, arXiv:2602.05787 (abstract: incremental mode, merged into the current model).

    Raises:
        SpecError: The count is below 1.
    """
    if count < 1:
        raise SpecError(f"count is {count}; expected the number of bags with the new one, >= 1.")
    mean = current.to(work_dtype(current.dtype))
    return (mean + (new.to(mean.dtype) - mean) / count).to(current.dtype)


def merge_tensor(
    operator: Operator,
    experts_K: Tensor,
    weights_CK: Tensor,
    base: Tensor | None = None,
    name: str = "",
) -> Tensor:
    """Merge one tensor of K experts into C candidates, one a row of weights.

    Integers and bools are not merged: they must be equal in all experts.

    Args:
        operator: How.
        experts_K: Shape (K, ...).
        weights_CK: Shape (C, K); see `Operator.check_weights` for what each operator takes.
        base: Shape (...); only operators on task vectors read it.
        name: The tensor's name, which is part of what draws DARE's masks.

    Returns:
        Shape (C, ...), in the dtype of the base, or of the experts without one, rounded once.

    Raises:
        SpecError: Shapes do not fit, the operator needs a base, or integers differ.
    """
    return prepare_tensor(operator, experts_K, base, name)(weights_CK)


def prepare_tensor(
    operator: Operator, experts_K: Tensor, base: Tensor | None = None, name: str = ""
) -> Callable[[Tensor], Tensor]:
    """Return what turns weights_CK into merged tensors, shape (C, ...), as `merge_tensor` does.

    What does not depend on the weights, such as TIES' trimming and DARE's masks, is found once.

    Raises:
        SpecError: As `merge_tensor`.
    """
    kept = experts_K[0] if base is None else base
    if kept.shape != experts_K.shape[1:]:
        raise SpecError(
            f"The base of {name!r} has shape {tuple(kept.shape)}; the experts have "
            f"{tuple(experts_K.shape[1:])}."
        )
    if operator.needs_base and base is None:
        raise SpecError(f"Operator {operator.name} needs a base: the model all experts start from.")
    merges = kept.dtype.is_floating_point
    if not merges and not bool((experts_K == kept).all()):
        raise SpecError(
            f"Tensor {name!r} is {kept.dtype} and differs between experts; only floating-point "
            "tensors are merged. Merge experts that agree in it."
        )
    if not merges or kept.numel() == 0:
        return lambda weights_CK: kept.expand(len(weights_CK), *kept.shape).clone()
    work = work_dtype(experts_K.dtype)
    base_N = None if base is None else base.to(work).flatten()
    source = Stacked(name, experts_K.to(work).reshape(len(experts_K), -1), base_N)
    combine = PLANS[operator.name](source, operator)

    def merged(weights_CK: Tensor) -> Tensor:
        if weights_CK.ndim != 2 or weights_CK.shape[1] != source.experts:
            raise SpecError(
                f"Weights of {name!r} have shape {tuple(weights_CK.shape)}; expected (candidates, "
                f"{source.experts}), one column an expert."
            )
        weights_CK = weights_CK.to(device=experts_K.device, dtype=work)
        merged_CN = combine(source.experts_KN, source.base(0, source.numel), weights_CK, 0)
        return merged_CN.view(-1, *kept.shape).to(kept.dtype)

    return merged

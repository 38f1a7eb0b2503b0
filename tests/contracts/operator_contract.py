"""What every merge operator does. Use: `@pytest.mark.parametrize("case", CASES)` over OperatorCase.

A case is one line: the operator, what its kind allows, and independent references: a formula in
float64 numpy, and mergekit where it has the operator.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from rayx.errors import SpecError
from rayx.merging import Operator
from rayx.proxy.merge.operators import merge_tensor

TOLERANCE = 1e-6  # of values about 1
SHAPES = ((33, 65), (17,), (4, 5, 6), (1,), ())

# (experts_KN, weights_K, base_N, masks_KN or None) -> merged_N, all float64
Reference = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]


@dataclass(frozen=True)
class OperatorCase:
    operator: Operator
    reference: Reference
    experts: int = 3
    any_sum: bool = True  # takes weights that do not sum to 1
    equal_weights: bool = False  # takes no others
    exact: bool = True  # one expert, or equal ones at density 1, give the expert everywhere
    ignores_zero: bool = True  # an expert of weight 0 changes nothing
    mergekit: tuple[str, dict] | None = None  # its method, and parameters but weight and density

    @property
    def full(self) -> Operator:
        """The operator with nothing trimmed and no scale."""
        density = None if self.operator.density is None else 1.0
        return dataclasses.replace(self.operator, density=density, scale=1.0)


def draw(case: OperatorCase, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return experts near a base, and the base."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator)
    experts_K = base + 0.3 * torch.randn((case.experts, *shape), generator=generator)
    return experts_K, base


def draw_weights(case: OperatorCase, rows: int, seed: int = 0) -> Tensor:
    """Return weights that the operator takes, shape (C, K)."""
    rng = np.random.default_rng(seed)
    weights_CK = rng.dirichlet(np.ones(case.experts), rows)
    if case.any_sum:
        weights_CK *= rng.uniform(0.5, 1.5, (rows, 1))
    if case.equal_weights:
        weights_CK[:] = 1.0 / case.experts
    return torch.from_numpy(weights_CK).float()


def masks_of(operator: Operator, experts_K: Tensor, base: Tensor, name: str) -> np.ndarray | None:
    """Return which entries DARE keeps, seen from outside: each expert merged alone."""
    if not operator.name.startswith("dare") or operator.density == 1.0:
        return None
    alone = dataclasses.replace(operator, name="dare", scale=1.0)
    one = torch.ones(1, 1)
    kept = [merge_tensor(alone, expert[None], one, base, name)[0] != base for expert in experts_K]
    return torch.stack(kept).reshape(len(kept), -1).numpy()


def check_merge_of_one_is_itself(case: OperatorCase) -> None:
    for shape in SHAPES:
        experts_K, base = draw(case, shape)
        merged = merge_tensor(case.full, experts_K[:1], torch.ones(1, 1), base)[0]
        changed = (merged - experts_K[0]).abs() > TOLERANCE
        # Where an operator drops an entry whatever its density, the base's own is left.
        assert not changed.any() or not case.exact
        assert torch.allclose(merged[changed], base[changed], atol=TOLERANCE)


def check_equal_experts_give_the_expert(case: OperatorCase) -> None:
    if not case.exact:
        return
    weights_CK = draw_weights(case, rows=4)
    weights_CK /= weights_CK.sum(1, keepdim=True)
    for shape in SHAPES:
        experts_K, base = draw(case, shape)
        same_K = experts_K[:1].expand_as(experts_K)
        merged_C = merge_tensor(case.full, same_K, weights_CK, base)
        np.testing.assert_allclose(merged_C, experts_K[:1].expand_as(merged_C), atol=TOLERANCE)


def check_permuted_experts_give_the_same(case: OperatorCase) -> None:
    order = list(range(1, case.experts)) + [0]
    weights_CK = draw_weights(case, rows=3)
    for shape in SHAPES:
        experts_K, base = draw(case, shape)
        plain_C = merge_tensor(case.operator, experts_K, weights_CK, base, "name")
        permuted_C = merge_tensor(
            case.operator, experts_K[order], weights_CK[:, order], base, "name"
        )
        np.testing.assert_allclose(permuted_C, plain_C, atol=TOLERANCE)


def check_dtype_is_kept_and_rounded_once(case: OperatorCase) -> None:
    weights_CK = draw_weights(case, rows=2)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        experts_K, base = (t.to(dtype) for t in draw(case, (33, 65)))
        merged_C = merge_tensor(case.operator, experts_K, weights_CK, base, "name")
        assert merged_C.dtype == dtype
        if dtype != torch.float64:
            wide = merge_tensor(case.operator, experts_K.float(), weights_CK, base.float(), "name")
            assert torch.equal(merged_C, wide.to(dtype))


def check_rows_are_candidates_of_their_own(case: OperatorCase) -> None:
    experts_K, base = draw(case, (33, 65))
    weights_CK = draw_weights(case, rows=5)
    together_C = merge_tensor(case.operator, experts_K, weights_CK, base, "name")
    for c in range(5):
        alone = merge_tensor(case.operator, experts_K, weights_CK[c : c + 1], base, "name")[0]
        np.testing.assert_allclose(together_C[c], alone, atol=TOLERANCE)


def check_formula_in_float64_agrees(case: OperatorCase) -> None:
    for number, shape in enumerate(SHAPES):
        experts_K, base = draw(case, shape, seed=number)
        weights_CK = draw_weights(case, rows=3, seed=number)
        masks_KN = masks_of(case.operator, experts_K, base, "name")
        merged_C = merge_tensor(case.operator, experts_K, weights_CK, base, "name")
        for weights_K, merged in zip(weights_CK, merged_C, strict=True):
            expected_N = case.reference(
                experts_K.reshape(case.experts, -1).double().numpy(),
                weights_K.double().numpy(),
                base.flatten().double().numpy(),
                masks_KN,
            )
            np.testing.assert_allclose(merged.flatten(), expected_N, atol=TOLERANCE, rtol=TOLERANCE)


def check_mergekit_agrees(case: OperatorCase) -> None:
    if case.mergekit is None:
        return
    registry = pytest.importorskip("mergekit.merge_methods.registry")
    group_of = pytest.importorskip("mergekit.merge_methods.base").TensorGroup.from_tensors
    method, parameters = case.mergekit
    for number, shape in enumerate(SHAPES[:4]):
        experts_K, base = draw(case, shape, seed=number)
        weights_K = draw_weights(case, rows=1, seed=number)[0]
        merged = merge_tensor(case.operator, experts_K, weights_K[None], base, "name")[0]
        given = dict(parameters)
        if method == "slerp":
            given["t"] = float(weights_K[1] / weights_K.sum())
            group = group_of(list(experts_K.clone()), base_index=0)
        elif case.operator.needs_base:
            given["weight"] = [float(w) for w in weights_K]
            if case.operator.density is not None:
                given["density"] = [case.operator.density] * case.experts
            group = group_of([base.clone(), *experts_K.clone()], base_index=0)
        else:
            given["weight"] = [float(w) for w in weights_K]
            group = group_of(list(experts_K.clone()))
        masks_KN = masks_of(case.operator, experts_K, base, "name")
        with pytest.MonkeyPatch.context() as patch:
            if masks_KN is not None:
                rows = iter(torch.from_numpy(masks_KN).float().view_as(experts_K))
                patch.setattr(torch, "bernoulli", lambda p, rows=rows: next(rows))
            (expected,) = registry.get(method)([group], parameters=given)
        np.testing.assert_allclose(merged, expected, atol=TOLERANCE, rtol=TOLERANCE)


def check_expert_of_weight_0_changes_nothing(case: OperatorCase) -> None:
    if not case.ignores_zero or case.equal_weights:
        return
    experts_K, base = draw(case, (33, 65))
    other_K = experts_K.clone()
    other_K[0] += 1.0
    weights_CK = draw_weights(case, rows=2)
    weights_CK[:, 0] = 0.0
    weights_CK /= weights_CK.sum(1, keepdim=True)
    if case.operator.name == "slerp":  # turns by an angle that both experts decide
        weights_CK[:, 1] = 1.0
    merged_C = merge_tensor(case.operator, experts_K, weights_CK, base)
    other_C = merge_tensor(case.operator, other_K, weights_CK, base)
    np.testing.assert_allclose(other_C, merged_C, atol=TOLERANCE)


def check_scale_is_a_factor_on_the_task_vector(case: OperatorCase) -> None:
    if not case.operator.needs_base:
        return
    experts_K, base = draw(case, (33, 65))
    weights_CK = draw_weights(case, rows=2)
    once, twice = (
        merge_tensor(dataclasses.replace(case.operator, scale=s), experts_K, weights_CK, base)
        for s in (1.0, 2.0)
    )
    np.testing.assert_allclose(twice - base, 2 * (once - base), atol=2 * TOLERANCE)
    with pytest.raises(SpecError, match="needs a base"):
        merge_tensor(case.operator, experts_K, weights_CK)


def check_integers_are_kept_and_must_agree(case: OperatorCase) -> None:
    weights_CK = draw_weights(case, rows=2)
    for dtype in (torch.int64, torch.uint8, torch.bool):
        kept = torch.arange(12).remainder(2).view(3, 4).to(dtype)
        experts_K = kept.expand(case.experts, 3, 4).clone()
        merged_C = merge_tensor(case.operator, experts_K, weights_CK, kept, "positions")
        assert torch.equal(merged_C, kept.expand(2, 3, 4)) and merged_C.dtype == dtype
        experts_K[1, 0, 0] = 1
        with pytest.raises(SpecError, match="'positions' is torch.* differs between experts"):
            merge_tensor(case.operator, experts_K, weights_CK, kept, "positions")


def check_inputs_are_left_alone(case: OperatorCase) -> None:
    experts_K, base = draw(case, (33, 65))
    weights_CK = draw_weights(case, rows=2)
    copies = [t.clone() for t in (experts_K, base, weights_CK)]
    once = merge_tensor(case.operator, experts_K, weights_CK, base, "name")
    assert all(map(torch.equal, copies, (experts_K, base, weights_CK)))
    assert torch.equal(once, merge_tensor(case.operator, experts_K, weights_CK, base, "name"))


def check_zeros_and_no_elements_are_merged(case: OperatorCase) -> None:
    weights_CK = draw_weights(case, rows=2)
    for shape in ((3, 4), (0, 4)):
        zeros = torch.zeros(shape)
        merged_C = merge_tensor(
            case.operator, zeros.expand(case.experts, *shape), weights_CK, zeros
        )
        assert torch.equal(merged_C, torch.zeros(2, *shape))


CHECKS = [value for name, value in sorted(globals().items()) if name.startswith("check_")]

"""Merge operators: the contract for each, and what is particular to one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rayx.errors import SpecError
from rayx.merging import Operator
from rayx.proxy.merge.operators import bagged, bagged_update, merge_tensor, prepare_tensor
from tests.contracts.operator_contract import CHECKS, OperatorCase, draw, draw_weights

# References: the formulas, in float64, over the flattened tensor ----------------------------------


def sum_of(experts_KN, weights_K, base_N, masks_KN):
    return weights_K @ experts_KN


def task_sum(scale):
    def reference(experts_KN, weights_K, base_N, masks_KN):
        total = np.zeros_like(base_N)
        for w, x in zip(weights_K, experts_KN, strict=True):
            total += w * (x - base_N)
        return base_N + scale * total

    return reference


def arc(experts_KN, weights_K, base_N, masks_KN):
    a, b = experts_KN
    t = weights_K[1] / (weights_K[0] + weights_K[1])
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    cosine = a @ b / norms if norms else 0.0
    if abs(cosine) > 0.9995:
        return (1 - t) * a + t * b
    angle = np.arccos(cosine)
    return (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)


def sphere(experts_KN, weights_K, base_N, masks_KN):
    share_K = weights_K / weights_K.sum()
    norm_K = np.linalg.norm(experts_KN, axis=1)
    toward_N = sum(s * x / n for s, x, n in zip(share_K, experts_KN, norm_K, strict=True))
    if np.linalg.norm(toward_N) < 1e-8:
        return share_K @ experts_KN
    return toward_N / np.linalg.norm(toward_N) * (share_K @ norm_K)


def trimmed(tau_KN, density):
    result = np.zeros_like(tau_KN)
    kept = max(1, int(density * tau_KN.shape[1]))
    for k, tau_N in enumerate(tau_KN):
        top = np.argsort(-np.abs(tau_N))[:kept]
        result[k, top] = tau_N[top]
    return result


def elected(tau_KN, weights_K, mean):
    merged_N = np.zeros(tau_KN.shape[1])
    for n in range(tau_KN.shape[1]):
        sign = 1.0 if weights_K @ tau_KN[:, n] >= 0 else -1.0
        agrees_K = np.sign(tau_KN[:, n]) == sign
        total = (weights_K * tau_KN[:, n])[agrees_K].sum()
        share = weights_K[agrees_K].sum()
        merged_N[n] = total / share if mean and share else total
    return merged_N


def ties_of(density, scale):
    def reference(experts_KN, weights_K, base_N, masks_KN):
        tau_KN = trimmed(experts_KN - base_N, density)
        return base_N + scale * elected(tau_KN, weights_K, mean=True)

    return reference


def dare_of(scale, elects):
    def reference(experts_KN, weights_K, base_N, masks_KN):
        tau_KN = experts_KN - base_N
        if masks_KN is not None:
            kept_KN = tau_KN * masks_KN
            before, after = np.abs(tau_KN).sum(1), np.abs(kept_KN).sum(1)
            rates = np.divide(before, after, out=np.ones_like(before), where=after > 0)
            tau_KN = kept_KN * rates[:, None]
        merged_N = elected(tau_KN, weights_K, mean=False) if elects else weights_K @ tau_KN
        return base_N + scale * merged_N

    return reference


def pcb_of(density, scale):
    def to_unit(values, low, high):
        clamped = np.clip(values, low, high)
        return (clamped - low) / (high - low) if high > low else (values >= high).astype(float)

    def reference(experts_KN, weights_K, base_N, masks_KN):
        tau_KN = experts_KN - base_N
        count, size = tau_KN.shape
        cut = int(1e-4 * size)
        up, down = np.zeros(size), np.zeros(size)
        for w, tau_N in zip(weights_K, tau_KN, strict=True):
            ordered = np.sort(np.abs(tau_N))
            low, high = ordered[cut], ordered[size - 1 - cut]
            share_N = to_unit(np.abs(tau_N), low, high) if high > low else np.zeros(size)
            score_N = np.exp(count * share_N**2) * np.tanh(tau_N * tau_KN.sum(0))
            least = np.sort(score_N)[size - max(1, int(density * size))]
            scale_N = to_unit(score_N, least, score_N.max())
            up += w * scale_N * np.sign(tau_N) * np.clip(np.abs(tau_N), low, high)
            down += w * scale_N
        return base_N + scale * up / np.maximum(down, 1e-12)

    return reference


def make(name, **changes) -> Operator:
    return Operator(name=name, **changes)


CASES = [
    OperatorCase(make("linear"), sum_of, any_sum=False, mergekit=("linear", {"normalize": False})),
    OperatorCase(
        make("soup"), lambda x, w, b, m: x.mean(0), equal_weights=True, mergekit=("linear", {})
    ),
    OperatorCase(
        make("task_arithmetic", scale=0.7),
        task_sum(0.7),
        mergekit=("task_arithmetic", {"lambda": 0.7}),
    ),
    OperatorCase(make("slerp"), arc, experts=2, mergekit=("slerp", {})),
    OperatorCase(make("multi_slerp"), sphere, mergekit=("multislerp", {})),
    OperatorCase(make("ties", density=1.0), ties_of(1.0, 1.0), mergekit=("ties", {})),
    OperatorCase(
        make("ties", density=0.3, scale=1.2), ties_of(0.3, 1.2), mergekit=("ties", {"lambda": 1.2})
    ),
    OperatorCase(make("dare", density=1.0), dare_of(1.0, False), mergekit=("dare_linear", {})),
    OperatorCase(
        make("dare", density=0.4, scale=0.8, seed=3), dare_of(0.8, False),
        mergekit=("dare_linear", {"lambda": 0.8}),
    ),
    OperatorCase(
        make("dare_ties", density=0.4, seed=3), dare_of(1.0, True), mergekit=("dare_ties", {})
    ),
    OperatorCase(
        make("pcb", density=0.2, scale=1.1), pcb_of(0.2, 1.1), exact=False, ignores_zero=False
    ),
    OperatorCase(make("pcb", density=1.0), pcb_of(1.0, 1.0), exact=False, ignores_zero=False),
]  # fmt: skip


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__.removeprefix("check_"))
@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{c.operator.name}-{c.operator.density or 'all'}"
)
def test_operator_keeps_the_contract(case, check):
    check(case)


# What is particular to one ----------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=3, max_size=3))
def test_task_arithmetic_is_linear_in_its_weights_and_never_normalises(weights):
    case = CASES[2]
    experts_K, base = draw(case, (7, 5))
    weights_K = torch.tensor(weights)
    rows = torch.stack([weights_K, 2 * weights_K, torch.zeros(3)])
    once, twice, none = merge_tensor(make("task_arithmetic"), experts_K, rows, base)
    assert torch.equal(none, base)
    np.testing.assert_allclose(twice - base, 2 * (once - base), atol=1e-5)


def test_dem_and_linear_are_the_same_where_weights_sum_to_1():
    experts_K, base = draw(CASES[0], (33, 65))
    weights_CK = draw_weights(CASES[0], 4)
    np.testing.assert_allclose(
        merge_tensor(make("task_arithmetic"), experts_K, weights_CK, base),
        merge_tensor(make("linear"), experts_K, weights_CK),
        atol=1e-6,
    )


def test_slerp_keeps_the_norm_and_the_ends():
    first, second = torch.nn.functional.normalize(torch.randn(2, 40), dim=1)
    weights_CK = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.8]])
    merged_C = merge_tensor(make("slerp"), torch.stack([first, second]), weights_CK)
    np.testing.assert_allclose(merged_C[0], first, atol=1e-6)
    np.testing.assert_allclose(merged_C[1], second, atol=1e-6)
    np.testing.assert_allclose(merged_C.norm(dim=1), 1.0, atol=1e-6)
    angles = torch.arccos((merged_C @ first).double().clamp(-1, 1))
    np.testing.assert_allclose(angles[3], 0.8 * angles[1], atol=1e-5)
    with pytest.raises(SpecError, match="slerp takes 2 experts and got 3; use multi_slerp"):
        merge_tensor(make("slerp"), torch.randn(3, 4), torch.ones(1, 3))


def test_opposite_experts_are_merged_linearly_by_multi_slerp():
    first = torch.randn(20)
    merged = merge_tensor(
        make("multi_slerp"), torch.stack([first, -first]), torch.tensor([[0.5, 0.5], [0.8, 0.2]])
    )
    np.testing.assert_allclose(merged[0], np.zeros(20), atol=1e-6)
    np.testing.assert_allclose(merged[1], first, atol=1e-5)  # r s / |s|, |s| = .6


def test_ties_drops_the_loser_of_an_election():
    base = torch.zeros(4)
    experts_K = torch.tensor([[4.0, 1.0, -3.0, 0.1], [-1.0, 1.0, 1.0, 2.0], [2.0, 0.0, 1.0, 0.2]])
    merged = merge_tensor(make("ties", density=0.5), experts_K, torch.full((1, 3), 1 / 3), base)[0]
    # Kept: 4, -3 | all of the second, for ties with the last one kept stay | 2, 1.
    np.testing.assert_allclose(merged, [3.0, 1.0, -3.0, 2.0], atol=1e-6)


def test_dare_masks_follow_seed_tensor_and_expert():
    experts_K, base = torch.randn(2, 70_000), torch.zeros(70_000)  # more than one block of draws
    one = torch.ones(1, 1)

    def kept(expert, seed=0, name="a"):
        operator = make("dare", density=0.25, seed=seed)
        return merge_tensor(operator, expert[None], one, base, name)[0] != 0

    first = kept(experts_K[0])
    assert torch.equal(first, kept(experts_K[0]))
    for other in (kept(experts_K[1]), kept(experts_K[0], seed=1), kept(experts_K[0], name="b")):
        assert abs(float((first & other).float().mean()) - 0.25**2) < 0.005  # independent
    assert abs(float(first.float().mean()) - 0.25) < 0.01
    merged = merge_tensor(make("dare", density=0.25), experts_K[:1], one, base)[0]
    np.testing.assert_allclose(merged.abs().sum(), experts_K[0].abs().sum(), rtol=1e-5)


def test_pcb_of_one_expert_keeps_its_most_important_entries():
    experts_K, base = draw(CASES[-1], (100,))
    merged = merge_tensor(make("pcb", density=0.2), experts_K[:1], torch.ones(1, 1), base)[0]
    changed = merged != base
    assert int(changed.sum()) == 19  # the last one kept has scale 0
    largest = (experts_K[0] - base).abs().topk(19).indices
    assert set(largest.tolist()) == set(changed.nonzero()[:, 0].tolist())
    np.testing.assert_allclose(merged[changed], experts_K[0][changed], atol=1e-6)


def test_what_is_prepared_once_merges_as_if_anew():
    experts_K, base = draw(CASES[0], (33, 65))
    for case in CASES[4:]:
        prepared = prepare_tensor(case.operator, experts_K, base, "name")
        for weights_CK in draw_weights(case, 3)[:, None]:
            anew = merge_tensor(case.operator, experts_K, weights_CK, base, "name")
            assert torch.equal(prepared(weights_CK), anew)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 8), st.sampled_from([torch.float32, torch.float64]))
def test_bags_added_one_by_one_are_their_mean(count, dtype):
    bags_K = torch.randn(count, 6, 4, dtype=dtype)
    current = torch.zeros(6, 4, dtype=dtype)
    for number, bag in enumerate(bags_K, start=1):
        current = bagged_update(current, bag, number)
    assert current.dtype == dtype
    np.testing.assert_allclose(current, bagged(bags_K), atol=1e-6)
    soup = merge_tensor(make("soup"), bags_K, torch.ones(1, count))[0]
    np.testing.assert_allclose(bagged(bags_K), soup, atol=1e-6)


def test_bags_must_be_counted_with_the_new_one():
    with pytest.raises(SpecError, match="count is 0; expected"):
        bagged_update(torch.zeros(2), torch.ones(2), 0)


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(
        SpecError, match=r"Weights of 'w' have shape \(1, 2\); expected .*, 3\), one"
    ):
        merge_tensor(make("linear"), torch.zeros(3, 4), torch.ones(1, 2), None, "w")
    with pytest.raises(SpecError, match=r"The base of 'w' has shape \(5,\); the experts have \(4,"):
        merge_tensor(make("linear"), torch.zeros(3, 4), torch.ones(1, 3), torch.zeros(5), "w")

"""Influence: how a small Newton step on a source's text would change the loss of a probe.

The curvature is the empirical Fisher matrix H = 1/Z sum_z g_z g_z^T of the sources' text, g_z the
gradient of one sequence's mean loss, or an approximation of it that is cheap to invert. One
sequence is one copy of the model along the run axis.

Legend: R runs, S sources, B sequences of a batch, T context, P probes, Z = S B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rayx.proxy.model import Rotary
from rayx.proxy.signals import copies_of, mean_gradients, sequence_parts
from rayx.spec import ModelShape


def influence(
    parameters: Mapping[str, Tensor],
    shape: ModelShape,
    rotary: Rotary,
    probes: Sequence[Tensor],
    tokens_RSBT: Tensor,
    curvature: str,
    damping: float,
) -> np.ndarray:
    """Return the influence of training on each source on each probe, shape (R, P, S), float64.

    I_ps = g_p^T (C + lambda 1)^-1 g_s, lambda = damping trace(C) / parameters; g_p and g_s are
    gradients of mean losses (nats per token). Positive where training on the source lowers the
    probe's loss. The three curvatures have one trace, so lambda does not depend on the choice. A
    run whose gradients are not finite, or all zero, has NaN.

    Cost: one forward and one backward pass of the sources' and the probes' tokens. Memory: the
    gradients of a run's Z sequences, 4 bytes a number.

    Args:
        parameters: Name -> tensor of shape (R, ...).
        shape: The model's shape.
        rotary: Its position tables.
        probes: P tensors of token ids, shape (N, T + 1) each.
        tokens_RSBT: Token ids of the sources, shape (R, S, B, T + 1).
        curvature: C. `fisher`: H itself, inverted by the Woodbury identity, so that only inner
            products of gradients are needed. `diagonal`: H's diagonal. `kronecker`: for each
            matrix of the blocks, H's diagonal in the basis of the eigenvectors of E[x x^T] and
            E[d d^T], x its inputs and d the gradients of its outputs; for embeddings, the output
            matrix and norms H's diagonal. Adds eigenvectors of (in, in) and (out, out) matrices.
        damping: > 0; of the mean eigenvalue of C.

    Source: Koh and Liang 2017, arXiv:1703.04730, eq. 2 (influence); Martens and Grosse 2015,
        arXiv:1503.05671, section 3 (Kronecker factors); George et al. 2018, arXiv:1806.03884,
        section 3 (eigenvalues measured again in their basis); Grosse et al. 2023,
        arXiv:2308.03296, section 2 (these for influence); TiKMiX, arXiv:2508.17677 (influence
        of a group of texts).
    Differs: one lambda for all parameters, not one for each matrix; sampled text, not labels drawn
        from the model.
    """
    runs, sources, batch = tokens_RSBT.shape[:3]
    probe_gradients = [_mean_gradients(parameters, shape, rotary, probe) for probe in probes]
    result_RPS = np.full((runs, len(probes), sources), math.nan)
    for run in range(runs):
        one = {n: p[run : run + 1] for n, p in parameters.items()}
        sequences = tokens_RSBT[run].reshape(1, sources * batch, 1, -1)
        factors: dict[str, list[Tensor]] | None = {} if curvature == "kronecker" else None
        gradients = _sequence_gradients(one, shape, rotary, sequences, factors)
        of_probes = {n: torch.stack([g[n][run] for g in probe_gradients]) for n in gradients}
        traces = [g.double().square().sum() for g in gradients.values()]
        trace = float(torch.stack(traces).sum()) / (sources * batch)
        if not 0 < trace < math.inf:
            continue
        for name, (a, b) in (factors or {}).items():
            inputs, outputs = torch.linalg.eigh(a)[1], torch.linalg.eigh(b)[1]
            for group in (gradients, of_probes):
                group[name] = inputs.T @ group[name].double() @ outputs
        pairs = [(gradients[n].flatten(1), of_probes[n].flatten(1)) for n in gradients]
        inverse = _woodbury if curvature == "fisher" else _diagonal
        value_PS = inverse(pairs, sources, damping * trace / shape.params)
        result_RPS[run] = value_PS.cpu().numpy()
    return result_RPS


Pairs = Sequence[tuple[Tensor, Tensor]]  # gradients of sequences, (Z, n), and of probes, (P, n)


def _diagonal(pairs: Pairs, sources: int, damping: float) -> Tensor:
    """Return g_p^T (diag(mean_z g_z^2) + damping)^-1 g_s, shape (P, S)."""
    parts = []
    for of_sequences, of_probes in pairs:
        g_Zn, probe_Pn = of_sequences.double(), of_probes.double()
        source_Sn = g_Zn.view(sources, -1, g_Zn.shape[1]).mean(1)
        parts.append(probe_Pn / (g_Zn.square().mean(0) + damping) @ source_Sn.T)
    return torch.stack(parts).sum(0)


def _woodbury(pairs: Pairs, sources: int, damping: float) -> Tensor:
    """Return g_p^T (G^T G / Z + damping)^-1 g_s, shape (P, S), G the (Z, n) gradients.

    With g_s = G^T e_s, e_s = 1 / B on the source's sequences, that is
    Z (G g_p)^T (G G^T + Z damping)^-1 e_s.
    """
    doubles = [(g.double(), probe.double()) for g, probe in pairs]
    gram_ZZ = torch.stack([g @ g.T for g, _ in doubles]).sum(0)
    with_probes_PZ = torch.stack([probe @ g.T for g, probe in doubles]).sum(0)
    count = len(gram_ZZ)
    gram_ZZ.diagonal().add_(count * damping)
    source_S = torch.eye(sources, dtype=torch.float64, device=gram_ZZ.device)
    member_ZS = source_S.repeat_interleave(count // sources, dim=0) / (count // sources)
    return count * with_probes_PZ @ torch.linalg.solve(gram_ZZ, member_ZS)


def _mean_gradients(
    parameters: Mapping[str, Tensor], shape: ModelShape, rotary: Rotary, probe: Tensor
) -> dict[str, Tensor]:
    """Return the gradients of each run's mean loss on a probe: name -> shape (R, ...)."""
    total: dict[str, Tensor] = {}
    tokens_RNT = probe.expand(parameters["embedding"].shape[0], -1, -1)
    for part in sequence_parts(shape, tokens_RNT):
        share = part.shape[1] / len(probe)
        for name, gradient in mean_gradients(parameters, shape, rotary, part).items():
            total[name] = total.get(name, 0.0) + share * gradient
    return total


def _sequence_gradients(
    one: Mapping[str, Tensor],
    shape: ModelShape,
    rotary: Rotary,
    tokens: Tensor,
    factors: dict[str, list[Tensor]] | None,
) -> dict[str, Tensor]:
    """Return one run's gradient of each sequence: name -> shape (Z, ...).

    `factors`, if given, is filled for each matrix of the blocks with the sums over tokens of
    x x^T, shape (in, in), and d d^T, shape (out, out), float64.
    """

    def tap(name: str, x: Tensor, gradient: Tensor) -> None:
        if factors is None or name == "head":
            return
        for place, values in enumerate((x, gradient)):
            flat = values.flatten(0, 1).double()
            sums = factors.setdefault(name, [torch.zeros(()), torch.zeros(())])
            sums[place] = sums[place] + flat.T @ flat

    parts = [
        mean_gradients(copies, shape, rotary, text, tap=tap if factors is not None else None)
        for copies, text in copies_of(one, shape, tokens)
    ]
    return {n: torch.cat([part[n] for part in parts]) for n in parts[0]}

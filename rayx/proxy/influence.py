"""Influence: how a small Newton step on a source's text would change the loss of a probe.

The curvature is the empirical Fisher matrix H = 1/Z sum_z g_z g_z^T of the sources' text, g_z the
gradient of one sequence's mean loss, or an approximation of it that is cheap to invert. One
sequence is one copy of the model along the run axis.

Legend: R runs, S sources, B sequences of a batch, T context, P probes, Z = S B sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from rayx.proxy.model import Rotary
from rayx.proxy.signals import copies_of, mean_gradients, sequence_parts
from rayx.spec import ModelShape

Gradients = dict[str, Tensor]  # of some sequences, or of the probes: name -> shape (count, ...)


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

    Cost: one forward and one backward pass of the sources' and the probes' tokens. Memory: S + P
    gradients of each run; except for `diagonal`, also those of one run's Z sequences.

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
        damping: > 0; of the mean eigenvalue of C. H has rank Z at most, so that a value that is
            large for `diagonal` is small for `fisher`.

    Source: Koh and Liang 2017, arXiv:1703.04730, eq. 2 (influence); Martens and Grosse 2015,
        arXiv:1503.05671, section 3 (Kronecker factors); George et al. 2018, arXiv:1806.03884,
        section 3 (eigenvalues measured again in their basis); Grosse et al. 2023,
        arXiv:2308.03296, section 2 (these for influence); TiKMiX, arXiv:2508.17677 (influence
        of a group of texts).
    Differs: one lambda for all parameters, not one for each matrix; sampled text, not labels drawn
        from the model.
    """
    runs, sources, batch = tokens_RSBT.shape[:3]
    of_probes_P = [_mean_gradients(parameters, shape, rotary, probe) for probe in probes]
    values: list[np.ndarray] = []
    for run in range(runs):
        one = {n: p[run : run + 1] for n, p in parameters.items()}
        of_probes = {n: torch.stack([g[n][run] for g in of_probes_P]) for n in one}
        factors = _Factors()
        tap = factors.add if curvature == "kronecker" else None
        sequences = tokens_RSBT[run].reshape(1, sources * batch, 1, -1)
        parts = (
            mean_gradients(copies, shape, rotary, text, tap=tap)
            for copies, text in copies_of(one, shape, sequences)
        )
        if curvature == "fisher":
            value_PS = _whole(list(parts), of_probes, sources, damping)
        elif curvature == "kronecker":
            held = list(parts)  # factors are complete only now
            turn = factors.rotation()
            value_PS = _diagonal(map(turn, held), turn(of_probes), sources, batch, damping)
        else:
            value_PS = _diagonal(parts, of_probes, sources, batch, damping)
        values.append(value_PS.cpu().numpy())
    return np.stack(values)


def _diagonal(
    parts: Iterable[Gradients], of_probes: Gradients, sources: int, batch: int, damping: float
) -> Tensor:
    """Return g_p^T (diag(mean_z g_z^2) + lambda)^-1 g_s, shape (P, S)."""
    empty = {n: torch.zeros_like(p[0].flatten(), dtype=torch.float64) for n, p in of_probes.items()}
    square = {n: zeros.clone() for n, zeros in empty.items()}
    source = {n: zeros.repeat(sources, 1) for n, zeros in empty.items()}
    done, total = 0, sources * batch
    for part in parts:
        count = len(part["norm"])
        of_Z = torch.arange(done, done + count) // batch
        for name, gradients in part.items():
            g_Zn = gradients.flatten(1)
            square[name] += g_Zn.square().sum(0) / total
            for number in of_Z.unique().tolist():  # mostly one
                source[name][number] += g_Zn[of_Z == number].sum(0) / batch
        done += count
    trace = torch.stack([s.sum() for s in square.values()]).sum()
    damped = damping * trace / _size(of_probes)
    values = [
        (probe.flatten(1).double() / (square[name] + damped)) @ source[name].T
        for name, probe in of_probes.items()
    ]
    return torch.stack(values).sum(0)


def _whole(
    parts: Sequence[Gradients], of_probes: Gradients, sources: int, damping: float
) -> Tensor:
    """Return g_p^T (G^T G / Z + lambda)^-1 g_s, shape (P, S), G the (Z, n) gradients.

    With g_s = G^T e_s, e_s = 1 / B on the source's sequences, that is
    Z (G g_p)^T (G G^T + Z lambda)^-1 e_s.
    """
    gram, along = [], []
    for name, probe in of_probes.items():
        g_Zn = torch.cat([part[name] for part in parts]).flatten(1).double()
        gram.append(g_Zn @ g_Zn.T)
        along.append(probe.flatten(1).double() @ g_Zn.T)
    gram_ZZ, along_PZ = torch.stack(gram).sum(0), torch.stack(along).sum(0)
    count, trace = len(gram_ZZ), float(gram_ZZ.trace())
    if not 0 < trace < math.inf:
        return torch.full((len(along_PZ), sources), math.nan)
    gram_ZZ.diagonal().add_(damping * trace / _size(of_probes))
    source_SS = torch.eye(sources).to(gram_ZZ)
    member_ZS = source_SS.repeat_interleave(count // sources, dim=0) / (count // sources)
    return count * along_PZ @ torch.linalg.solve(gram_ZZ, member_ZS)


class _Factors:
    """For each matrix of the blocks the sums over tokens of x x^T and d d^T, float64."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        if name != "head":
            pair = self.sums.setdefault(name, [torch.zeros(()), torch.zeros(())])
            for place, values in enumerate((x, gradient)):
                flat = values.flatten(0, 1).double()
                pair[place] = pair[place] + flat.T @ flat

    def rotation(self) -> Callable[[Gradients], Gradients]:
        """Return what writes the gradients of these matrices in the eigenvectors' basis."""
        bases = {
            name: [torch.linalg.eigh(s)[1] for s in pair]
            for name, pair in self.sums.items()
            if all(s.isfinite().all() for s in pair)  # else the gradients are not, in any basis
        }

        def turn(gradients: Gradients) -> Gradients:
            turned = {n: b[0].T @ gradients[n].double() @ b[1] for n, b in bases.items()}
            return {**gradients, **turned}

        return turn


def _size(gradients: Gradients) -> int:
    return sum(g[0].numel() for g in gradients.values())


def _mean_gradients(
    parameters: Mapping[str, Tensor], shape: ModelShape, rotary: Rotary, probe: Tensor
) -> Gradients:
    """Return the gradients of each run's mean loss on a probe: name -> shape (R, ...)."""
    total: Gradients = {}
    tokens_RNT = probe.expand(parameters["embedding"].shape[0], -1, -1)
    for part in sequence_parts(shape, tokens_RNT):
        share = part.shape[1] / len(probe)
        for name, gradient in mean_gradients(parameters, shape, rotary, part).items():
            total[name] = total.get(name, 0.0) + share * gradient
    return total

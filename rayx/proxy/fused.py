"""Losses and gradients of a run on a CPU, derived by hand: what `token_losses` and autograd give.

On a CPU the matrix products of a proxy take a third of an eager step; memory takes the rest. Here
a batch is done in slices whose activations stay in a core's cache, forward and backward, in buffers
that are made once. Softmaxes are never normalised: rows of exp(score) are used as they are, and
what they are multiplied with, which is narrower, is divided by their sums. Logits live for some
rows at a time, and become their own gradient in place. Gains of norms are multiplied into the
weights behind them. Attention runs with time as the last axis, so that products write and read
heads without copies and rotary positions are long vector operations.

Legend: N tokens of a slice, B its sequences, T context, D width, F width of the feed-forward, H
heads, V vocabulary, R runs. "d" before a name is the loss's gradient by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rayx.proxy.fused_buffers import Buffers, LayerBuffers
from rayx.proxy.model import NORM_EPS, Rotary
from rayx.spec import ModelShape

SLICE_TOKENS = 512  # of a slice: activations of a layer then take about a megabyte
LOGITS = 2**18  # at a time, within the bounds below
LOGIT_ROWS = (128, 512)
LONGEST_CONTEXT = 512
SAFE = (1e-30, 1e30)  # sums of exponentials in which float32 loses nothing


class Fused:
    """Losses and gradients of packs of one shape, run by run.

    Args:
        shape: The model's shape.
        rotary: Its position tables.
        dtype: Of the parameters.
    """

    def __init__(
        self, shape: ModelShape, rotary: Rotary, dtype: torch.dtype = torch.float32
    ) -> None:
        self.shape, self.dtype = shape, dtype
        half = shape.width // shape.heads // 2
        self.cos = rotary.cos[:, :half].t().contiguous().to(dtype)
        self.sin = rotary.sin[:, half:].t().contiguous().to(dtype)
        # Weights behind a norm, and what their columns are used times: queries 1/sqrt(head).
        self.qkv_scale = torch.ones(3 * shape.width, dtype=dtype)
        self.qkv_scale[: shape.width] = (shape.width // shape.heads) ** -0.5
        self.after_norms = [
            (f"layers.{layer}.{weight}", f"layers.{layer}.{norm}", scale)
            for layer in range(shape.layers)
            for weight, norm, scale in (
                ("qkv", "attention_norm", self.qkv_scale),
                ("gate_up", "ffn_norm", None),
            )
        ]
        self.sequences = max(1, SLICE_TOKENS // shape.context)
        rows = min(LOGIT_ROWS[1], max(LOGIT_ROWS[0], LOGITS // shape.vocab_size))
        self.logits = torch.empty(rows, shape.vocab_size, dtype=dtype)
        self.d_head_DV = torch.empty(shape.width, shape.vocab_size, dtype=dtype)
        self.later = torch.ones(shape.context, shape.context, dtype=torch.bool).triu(1)
        self.buffers: dict[int, Buffers] = {}  # by sequences
        self.gradients: dict[str, Tensor] = {}

    @torch.no_grad()
    def losses(
        self, parameters: Mapping[str, Tensor], shape: ModelShape, rotary: Rotary, tokens: Tensor
    ) -> Tensor:
        """Return what `token_losses` does, the loss of each predicted token, shape (R, B, T)."""
        loss_RBT = torch.empty(tokens[:, :, 1:].shape, dtype=self.dtype)
        for run, run_tokens in enumerate(tokens):
            p = self._prepared({n: t[run] for n, t in parameters.items()})
            parts = zip(self._slices(run_tokens), self._slices(loss_RBT[run]), strict=True)
            for part, loss_BT in parts:
                b = self._forward(p, part)
                self._head(p, b, part, None, first=True)
                loss_BT.copy_(b.loss_N1.view(loss_BT.shape))
        return loss_RBT

    @torch.no_grad()
    def backward(
        self, parameters: Mapping[str, Tensor], tokens: Tensor, factor_RB: Tensor | None = None
    ) -> Tensor:
        """Set the gradients of the parameters and return the loss of each run.

        The gradients are the same tensors at every call.

        Args:
            parameters: Name -> tensor of shape (R, ...).
            tokens: Token ids, shape (R, B, T + 1).
            factor_RB: Factors on the losses of the sequences; None: 1.

        Returns:
            The mean loss of each run, nats per token, shape (R,).
        """
        if not self.gradients:
            self.gradients = {n: torch.empty_like(t) for n, t in parameters.items()}
        loss_R = torch.empty(len(tokens), dtype=self.dtype)
        for run, run_tokens in enumerate(tokens):
            factor_B = None if factor_RB is None else factor_RB[run]
            p = {n: t[run] for n, t in parameters.items()}
            g = {n: t[run] for n, t in self.gradients.items()}
            loss_R[run] = self._one_run(p, g, run_tokens, factor_B)
        for name, parameter in parameters.items():
            parameter.grad = self.gradients[name]
        return loss_R

    def _one_run(
        self,
        parameters: dict[str, Tensor],
        g: dict[str, Tensor],
        tokens_BT: Tensor,
        factor_B: Tensor | None,
    ) -> Tensor:
        """Write one run's gradients into `g` and return its loss."""
        shape, p = self.shape, self._prepared(parameters)
        batch, length = tokens_BT.shape[0], shape.context
        share_B = torch.full((batch,), 1 / (batch * length), dtype=self.dtype)
        if factor_B is not None:
            share_B *= factor_B
        d_embedded = torch.empty(batch * length, shape.width, dtype=self.dtype)
        loss = torch.zeros((), dtype=self.dtype)
        done = 0
        for part, share in zip(self._slices(tokens_BT), self._slices(share_B), strict=True):
            b = self._forward(p, part)
            share_N1 = share[:, None, None].expand(-1, length, 1).reshape(-1, 1)
            self._head(p, b, part, share_N1, first=done == 0)
            loss += b.loss_N1.mul_(share_N1).sum()
            self._backward(p, g, b, first=done == 0)
            d_embedded[done : done + len(b.dx)] = b.dx
            done += len(b.dx)
        for weight, gain, scale in self.after_norms:
            d_used = g[weight] if scale is None else g[weight].mul_(scale)
            torch.sum(d_used * parameters[weight], 1, out=g[gain])
            d_used.mul_(parameters[gain][:, None])
        head = g.get("head", g["embedding"])
        head.copy_(self.d_head_DV.t())
        if head is not g["embedding"]:
            g["embedding"].zero_()
        g["embedding"].index_add_(0, tokens_BT[:, :-1].flatten(), d_embedded)
        return loss

    def _slices(self, rows: Tensor) -> Iterator[Tensor]:
        return iter(rows.split(self.sequences))

    def _prepared(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return one run's parameters with the gains of norms multiplied into the weights."""
        p = {n: t.detach() for n, t in parameters.items()}
        for weight, gain, scale in self.after_norms:
            used = p[weight] * p[gain][:, None]
            p[weight] = used if scale is None else used.mul_(scale)
        return p

    def _forward(self, p: dict[str, Tensor], tokens_BT: Tensor) -> Buffers:
        """Run a slice up to the last norm and return the buffers that hold it."""
        sequences, width = len(tokens_BT), self.shape.width
        if sequences not in self.buffers:
            self.buffers[sequences] = Buffers(self.shape, sequences, self.dtype)
        b = self.buffers[sequences]
        torch.index_select(p["embedding"], 0, tokens_BT[:, :-1].reshape(-1), out=b.x)
        x_BTD = b.x.view(sequences, -1, width)
        for number, layer in enumerate(b.layers):
            name = f"layers.{number}."
            qkv_BDD = p[name + "qkv"].t().expand(sequences, -1, -1)
            _normalise(b.x, b.mean_D1, layer.x_ND, layer.rate_N1)
            normed_BDT = layer.x_ND.view(x_BTD.shape).transpose(1, 2)
            torch.bmm(qkv_BDD[:, : 2 * width], normed_BDT, out=b.qk_BDT)
            torch.bmm(qkv_BDD[:, 2 * width :], normed_BDT, out=layer.v_BDT)
            self._turn(b.halves.transpose(0, 1), layer.turned, 1)
            self._weigh(layer)
            torch.bmm(layer.v, layer.weights.transpose(1, 2), out=layer.mixed)
            layer.mixed.div_(layer.sums.view(len(layer.sums), 1, -1))
            out_BDD = p[name + "attention_out"].expand(sequences, -1, -1)
            x_BTD.baddbmm_(layer.mixed_BDT.transpose(1, 2), out_BDD)
            _normalise(b.x, b.mean_D1, layer.ffn_x_ND, layer.ffn_rate_N1)
            torch.mm(layer.ffn_x_ND, p[name + "gate_up"], out=layer.gate_up)
            torch.ops.aten.silu.out(layer.gate, out=layer.silu)
            torch.mul(layer.silu, layer.up, out=layer.hidden)
            b.x.addmm_(layer.hidden, p[name + "down"])
        _normalise(b.x, b.mean_D1, b.normed, b.rate_N1)
        torch.mul(b.normed, p["norm"], out=b.x)
        return b

    def _turn(self, source: Tensor, out: Tensor, sign: int) -> None:
        """Rotate pairs, shape (2, B, H, 2, half of a head, T), by their positions, or back."""
        first, second = source.unbind(3)
        out_first, out_second = out.unbind(3)
        torch.mul(first, self.cos, out=out_first).addcmul_(second, self.sin, value=-sign)
        torch.mul(second, self.cos, out=out_second).addcmul_(first, self.sin, value=sign)

    def _weigh(self, layer: LayerBuffers) -> None:
        """Write exp(score) and its sums over the keys."""
        torch.bmm(layer.q.transpose(1, 2), layer.k, out=layer.weights)
        layer.weights.exp_().tril_()
        torch.sum(layer.weights, 2, keepdim=True, out=layer.sums)
        if not _safe(layer.sums):
            torch.bmm(layer.q.transpose(1, 2), layer.k, out=layer.weights)
            layer.weights.masked_fill_(self.later, -torch.inf)
            layer.weights.sub_(layer.weights.amax(2, keepdim=True)).exp_()
            torch.sum(layer.weights, 2, keepdim=True, out=layer.sums)

    def _head(
        self,
        p: dict[str, Tensor],
        b: Buffers,
        tokens_BT: Tensor,
        share_N1: Tensor | None,
        first: bool,
    ) -> None:
        """Write the losses of a slice and, given their shares in the loss, dnormed and d_head."""
        head_VD = p.get("head", p["embedding"])
        target_N1 = tokens_BT[:, 1:].reshape(-1, 1)
        for start in range(0, len(b.x), len(self.logits)):
            rows = slice(start, min(start + len(self.logits), len(b.x)))
            x, target, logits = b.x[rows], target_N1[rows], self.logits[: rows.stop - start]
            torch.mm(x, head_VD.t(), out=logits)
            wanted = logits.gather(1, target)
            sums = logits.exp_().sum(1, keepdim=True)
            if not _safe(sums):
                torch.mm(x, head_VD.t(), out=logits)
                top = logits.amax(1, keepdim=True)
                wanted -= top
                sums = logits.sub_(top).exp_().sum(1, keepdim=True)
            torch.sub(sums.log(), wanted, out=b.loss_N1[rows])
            if share_N1 is None:
                continue
            logits.scatter_add_(1, target, -sums)
            share = share_N1[rows] / sums
            scaled, dnormed = b.scaled[rows], b.dnormed[rows]
            torch.mul(x, share, out=scaled)
            self.d_head_DV.addmm_(scaled.t(), logits, beta=0 if first and not start else 1)
            torch.mm(logits, head_VD, out=dnormed).mul_(share)

    def _backward(self, p: dict[str, Tensor], g: dict[str, Tensor], b: Buffers, first: bool):
        """Go back from dnormed to dx of the embeddings, adding to the gradients of the weights."""
        keep, width = 0 if first else 1, self.shape.width
        torch.mul(b.dnormed, b.normed, out=b.scratch)
        g["norm"].copy_(b.scratch.sum(0) if first else b.scratch.sum(0) + g["norm"])
        b.dx.zero_()
        _add_through_norm(b, b.dnormed.mul_(p["norm"]), b.normed, b.rate_N1)
        sequences = len(b.qk_BDT)
        dx_BTD = b.dx.view(sequences, -1, width)
        dnormed_BTD = b.dnormed.view(dx_BTD.shape)
        for number, layer in reversed(list(enumerate(b.layers))):
            name = f"layers.{number}."
            g[name + "down"].addmm_(layer.hidden.t(), b.dx, beta=keep)
            torch.mm(b.dx, p[name + "down"].t(), out=b.d_hidden)
            torch.mul(b.d_hidden, layer.silu, out=b.d_up)
            b.d_hidden.mul_(layer.up)
            torch.ops.aten.silu_backward.grad_input(b.d_hidden, layer.gate, grad_input=b.d_gate)
            g[name + "gate_up"].addmm_(layer.ffn_x_ND.t(), b.d_gate_up, beta=keep)
            torch.mm(b.d_gate_up, p[name + "gate_up"].t(), out=b.dnormed)
            _add_through_norm(b, b.dnormed, layer.ffn_x_ND, layer.ffn_rate_N1)

            g[name + "attention_out"].addbmm_(layer.mixed_BDT, dx_BTD, beta=keep)
            out_BDD = p[name + "attention_out"].expand(sequences, -1, -1)
            torch.bmm(out_BDD, dx_BTD.transpose(1, 2), out=b.dmixed_BDT)
            self._through_attention(b, layer)
            qkv_BDD = p[name + "qkv"].t().expand(sequences, -1, -1)
            normed_BDT = layer.x_ND.view(dx_BTD.shape).transpose(1, 2)
            for columns, d_BDT in (
                (slice(2 * width), b.qk_BDT),
                (slice(2 * width, None), b.dv_BDT),
            ):
                g[name + "qkv"][:, columns].addbmm_(normed_BDT, d_BDT.transpose(1, 2), beta=keep)
                dnormed_BTD.baddbmm_(
                    d_BDT.transpose(1, 2), qkv_BDD[:, columns], beta=1 if columns.start else 0
                )
            _add_through_norm(b, b.dnormed, layer.x_ND, layer.rate_N1)

    def _through_attention(self, b: Buffers, layer: LayerBuffers) -> None:
        """Go back from dmixed to dv and, in the room of queries and keys, to their gradients."""
        b.dmixed.div_(layer.sums.view(b.delta.shape))
        torch.mul(b.dmixed, layer.mixed, out=b.product)
        torch.sum(b.product, 1, keepdim=True, out=b.delta)
        torch.bmm(b.dmixed, layer.weights, out=b.dv)
        torch.bmm(b.dmixed.transpose(1, 2), layer.v, out=b.dweights)
        b.dweights.sub_(b.delta.view(layer.sums.shape)).mul_(layer.weights)
        torch.bmm(layer.k, b.dweights.transpose(1, 2), out=b.dq)
        torch.bmm(layer.q, b.dweights, out=b.dk)
        self._turn(b.d_turned, b.halves.transpose(0, 1), -1)


def fits(shape: ModelShape, device: torch.device) -> bool:
    """Whether `Fused` is the faster way: on a CPU, while attention is short enough to write out."""
    return device.type == "cpu" and shape.context <= LONGEST_CONTEXT


def _safe(sums: Tensor) -> bool:
    low, high = torch.aminmax(sums)
    return bool(low > SAFE[0]) and bool(high < SAFE[1])


def _normalise(x_ND: Tensor, mean_D1: Tensor, out_ND: Tensor, rate_N1: Tensor) -> None:
    """Write x times its rate, 1 / sqrt(mean square + eps)."""
    torch.mul(x_ND, x_ND, out=out_ND)
    torch.mm(out_ND, mean_D1, out=rate_N1)
    rate_N1.add_(NORM_EPS).rsqrt_()
    torch.mul(x_ND, rate_N1, out=out_ND)


def _add_through_norm(b: Buffers, d_ND: Tensor, normed_ND: Tensor, rate_N1: Tensor) -> None:
    """Add to dx the gradient by x of the norm whose output has the gradient d (overwritten)."""
    torch.mul(d_ND, normed_ND, out=b.scratch)
    torch.mm(b.scratch, b.mean_D1, out=b.column_N1)
    d_ND.addcmul_(normed_ND, b.column_N1, value=-1)
    b.dx.addcmul_(d_ND, rate_N1)

"""The proxy: one small decoder with a leading run axis.

RoPE, RMSNorm, SwiGLU, causal attention, no biases. A pack of R runs is one model whose parameters
have shape (R, ...): each matrix product is a batched one over the runs, and no operation mixes two
runs. A pack of one is a plain model.

Legend: R runs, B sequences, T context, D width, V vocabulary, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rayx.spec import ModelShape

NORM_EPS = 1e-5
ROPE_BASE = 10_000.0
LAYER_NAMES = ("attention_norm", "qkv", "attention_out", "ffn_norm", "gate_up", "down")

Product = Callable[[Tensor, Tensor, str], Tensor]  # x, weight, its name -> x times weight


def parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of one run's parameters, in the order in which they are drawn."""
    width, ffn = shape.width, shape.ffn_width
    shapes: dict[str, tuple[int, ...]] = {"embedding": (shape.vocab_size, width)}
    for layer in range(shape.layers):
        shapes |= {
            f"layers.{layer}.attention_norm": (width,),
            f"layers.{layer}.qkv": (width, 3 * width),
            f"layers.{layer}.attention_out": (width, width),
            f"layers.{layer}.ffn_norm": (width,),
            f"layers.{layer}.gate_up": (width, 2 * ffn),
            f"layers.{layer}.down": (ffn, width),
        }
    shapes["norm"] = (width,)
    if not shape.tied_embeddings:
        shapes["head"] = (shape.vocab_size, width)
    return shapes


def initial_parameters(shape: ModelShape, seed: int) -> dict[str, Tensor]:
    """Draw one run's parameters on the CPU, so that they do not depend on the device.

    Matrices are normal with sd fan_in^-1/2, those that write into the residual stream smaller by
    (2 layers)^-1/2; embeddings have sd 0.02; norms start at 1.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, size in parameter_shapes(shape).items():
        if name.endswith("norm"):
            parameters[name] = torch.ones(size)
            continue
        std = 0.02 if name in ("embedding", "head") else size[0] ** -0.5
        if name.endswith(("attention_out", "down")):
            std *= (2 * shape.layers) ** -0.5
        parameters[name] = torch.randn(size, generator=generator) * std
    return parameters


def stacked(tensors: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Return the tensors of R runs as one of shape (R, ...) each."""
    return {n: torch.stack([t[n] for t in tensors]).to(device) for n in tensors[0]}


class Rotary:
    """Rotary position tables for one context and head width.

    Source: Su et al. 2021, arXiv:2104.09864, eq. 34.
    """

    def __init__(self, shape: ModelShape, device: torch.device) -> None:
        half = shape.width // shape.heads // 2
        rates = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.arange(shape.context, dtype=torch.float64)[:, None] * rates
        self.cos = torch.cat([angles.cos()] * 2, dim=1).float().to(device)
        self.sin = torch.cat([-angles.sin(), angles.sin()], dim=1).float().to(device)

    def __call__(self, x: Tensor) -> Tensor:
        """Turn queries or keys, shape (..., T, width of a head)."""
        length, half = x.shape[-2], x.shape[-1] // 2
        swapped = torch.cat([x[..., half:], x[..., :half]], dim=-1)
        return x * self.cos[:length] + swapped * self.sin[:length]


def _bmm(x: Tensor, weight: Tensor, name: str) -> Tensor:
    return torch.bmm(x, weight)


def _norm(x: Tensor, gain_RD: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS) * gain_RD[:, None]


# `token_losses`, or the same of a model that is spread over processes.
TokenLosses = Callable[[Mapping[str, Tensor], ModelShape, Rotary, Tensor], Tensor]


def token_losses(
    parameters: Mapping[str, Tensor], shape: ModelShape, rotary: Rotary, tokens: Tensor
) -> Tensor:
    """Return the loss of each predicted token.

    Args:
        parameters: Name -> tensor of shape (R, ...).
        shape: The model's shape.
        rotary: Its position tables.
        tokens: Token ids, shape (R, B, T + 1).

    Returns:
        Cross-entropy in nats, shape (R, B, T), float32.
    """
    logits = token_logits(parameters, shape, rotary, tokens[:, :, :-1])
    return cross_entropies(logits, tokens[:, :, 1:])


def token_logits(
    parameters: Mapping[str, Tensor],
    shape: ModelShape,
    rotary: Rotary,
    inputs: Tensor,
    product: Product = _bmm,
) -> Tensor:
    """Return the next token's logits at each position, shape (R, B, T, V).

    Args:
        parameters: Name -> tensor of shape (R, ...). A `head` is used also where the shape ties it
            to the embedding, so that a signal can tell the two apart.
        shape: The model's shape.
        rotary: Its position tables.
        inputs: Token ids, shape (R, B, T).
        product: Multiplies x, shape (R, B T, in), by the named weight, shape (R, in, out).
    """
    x = embed(parameters["embedding"], inputs)
    for layer in range(shape.layers):

        def times(x: Tensor, weight: Tensor, name: str, layer: int = layer) -> Tensor:
            return product(x, weight, f"layers.{layer}.{name}")

        x = block(x, layer_parameters(parameters, layer), shape, rotary, inputs.shape[1], times)
    head = parameters.get("head", parameters["embedding"])
    logits = unembed(x, parameters["norm"], head, product)
    return logits.view(*inputs.shape, shape.vocab_size)


def embed(embedding: Tensor, inputs: Tensor) -> Tensor:
    """Return the embeddings, shape (R, B T, D), of token ids, shape (R, B, T)."""
    runs, vocab_size, width = embedding.shape
    first_rows = torch.arange(runs, device=inputs.device)[:, None, None] * vocab_size
    x = F.embedding((inputs + first_rows).flatten(), embedding.flatten(0, 1))
    return x.view(runs, -1, width)


def layer_parameters(parameters: Mapping[str, Tensor], layer: int) -> dict[str, Tensor]:
    """Return one layer's parameters under the names that `block` knows."""
    return {name: parameters[f"layers.{layer}.{name}"] for name in LAYER_NAMES}


def block(
    x: Tensor,
    parameters: Mapping[str, Tensor],
    shape: ModelShape,
    rotary: Rotary,
    batch: int,
    product: Product = _bmm,
) -> Tensor:
    """Return the residual stream, shape (R, B T, D), after one layer.

    Args:
        x: The residual stream before it.
        parameters: The layer's own, by LAYER_NAMES, each of shape (R, ...).
        shape: The model's shape.
        rotary: Its position tables.
        batch: Sequences B that x holds.
        product: As in `token_logits`, with names from LAYER_NAMES.
    """
    runs, width, p = x.shape[0], shape.width, parameters
    heads = (runs * batch, -1, 3, shape.heads, width // shape.heads)
    qkv = product(_norm(x, p["attention_norm"]), p["qkv"], "qkv")
    q, k, v = qkv.view(heads).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(rotary(q), rotary(k), v, is_causal=True)
    mixed = mixed.transpose(1, 2).reshape(x.shape)
    x = x + product(mixed, p["attention_out"], "attention_out")
    gate, up = product(_norm(x, p["ffn_norm"]), p["gate_up"], "gate_up").chunk(2, dim=-1)
    return x + product(F.silu(gate) * up, p["down"], "down")


def unembed(x: Tensor, norm_RD: Tensor, head_RVD: Tensor, product: Product = _bmm) -> Tensor:
    """Return the logits, shape (R, B T, V), of the last residual stream, shape (R, B T, D)."""
    return product(_norm(x, norm_RD), head_RVD.transpose(1, 2), "head")


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Return nats, shape (R, B, T), float32, of logits (R, B, T, V) for targets (R, B, T)."""
    losses = F.cross_entropy(logits.float().flatten(0, 2), targets.flatten(), reduction="none")
    return losses.view(targets.shape)

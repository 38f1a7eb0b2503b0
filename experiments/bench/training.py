"""How fast does a proxy train, against an eager loop and against what the machine can do?

    python experiments/bench/training.py [--repeats 5] [--seconds 2] [--shapes quickstart] [--json]

Paired in one process of one thread, the four in turn in every repeat:

  packed  `train_pack` on 8 runs together          single  `train_pack` on one run
  eager   what people write: modules, F.cross_entropy, torch.optim.AdamW, clip_grad_norm_, random
          batches of a memory-mapped file; the same shape, width and batch
  peak    the fastest of a few square float32 matrix products

Seconds are those of the core, so that other work on the machine counts as little as it can.
`train_pack` is timed from call to records, with the evaluation of one sequence per target. FLOPs of
a token are those of its matrix products, forward and backward: 6 N + 6 L T D, with N the parameters
in matrix products (rayx.units.train_flops), L layers, context T, width D; the second part is causal
attention, half of 12 L T D. A run takes about --seconds; medians over the repeats.

With a CUDA device: runs per hour and FLOP share for growing packs, against one process for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayx import Corpus, Evaluation, Mixture, ModelShape, Optimizer, Schedule, TrainSpec
from rayx.corpus import build_sample
from rayx.proxy import set_threads, train_pack
from rayx.units import train_flops

PACK = 8
SHAPES = {
    # name: layers, width, heads, ffn width, vocabulary, context, sequences of a batch
    "quickstart": (1, 64, 4, 192, 1024, 64, 8),
    "verification": (2, 96, 6, 288, 1024, 64, 8),
    "design-1k": (4, 96, 4, 256, 1024, 128, 16),
    "design-4k": (2, 64, 4, 192, 4096, 128, 16),
}


def spec_of(name: str, corpus: Corpus, steps: int) -> TrainSpec:
    """Return the spec of a run of this shape and length."""
    layers, width, heads, ffn_width, vocab_size, context, batch = SHAPES[name]
    return TrainSpec(
        corpus=corpus.fingerprint,
        model=ModelShape(
            layers=layers, width=width, heads=heads, ffn_width=ffn_width,
            vocab_size=vocab_size, context=context,
        ),
        schedule=Schedule.constant(Mixture.uniform(corpus.domains), steps * batch * context),
        optimizer=Optimizer(lr=4e-3, batch_sequences=batch),
        evaluation=Evaluation(points=1, sequences=1),
    )  # fmt: skip


def varied(spec: TrainSpec, count: int, domains: tuple[str, ...]) -> list[TrainSpec]:
    """Return runs of other mixtures and data orders."""
    mixtures = [Mixture({d: 1 + (i + k) % 5 for k, d in enumerate(domains)}) for i in range(count)]
    return [
        dataclasses.replace(
            spec, schedule=Schedule.constant(mixture, spec.schedule.tokens), data_seed=i
        )
        for i, mixture in enumerate(mixtures)
    ]


def token_flops(spec: TrainSpec) -> float:
    """Return the FLOPs of training on one token, causal attention included."""
    m = spec.model
    return train_flops(m.matmul_params, 1) + 6 * m.layers * m.context * m.width


# The eager loop -------------------------------------------------------------------------------


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.qkv = nn.Linear(shape.width, 3 * shape.width, bias=False)
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mix over positions."""
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).split(width, dim=2)
        )
        q, k = (part * cos + rotated(part) * sin for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).contiguous().view(batch, length, width))


def rotated(x: Tensor) -> Tensor:
    """Return the halves of a head's width swapped, the first one negative."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


class SwiGlu(nn.Module):
    """Gated feed-forward."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.ffn_width, bias=False)
        self.up = nn.Linear(shape.width, shape.ffn_width, bias=False)
        self.down = nn.Linear(shape.ffn_width, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each position."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and around a residual."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.attention = Attention(shape)
        self.ffn_norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.ffn = SwiGlu(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the layer."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.ffn(self.ffn_norm(x))


class Decoder(nn.Module):
    """The proxy's decoder as modules."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.head = nn.Linear(shape.width, shape.vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.normal_(self.embedding.weight, std=0.02)
        half = shape.width // shape.heads // 2
        angles = torch.outer(torch.arange(shape.context), 1e4 ** (-torch.arange(half) / half))
        self.register_buffer("cos", torch.cat([angles.cos()] * 2, dim=1))
        self.register_buffer("sin", torch.cat([angles.sin()] * 2, dim=1))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss."""
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1))


def eager(spec: TrainSpec, data: np.ndarray, device: str) -> float:
    """Train with the eager loop and return the last loss."""
    shape, optimizer, steps = spec.model, spec.optimizer, spec.steps
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Decoder(shape).to(device)
    adamw = torch.optim.AdamW(
        model.parameters(), lr=optimizer.lr, betas=(0.9, 0.95), weight_decay=0.1,
        fused=device == "cuda",
    )  # fmt: skip
    loss = torch.zeros(())
    for step in range(steps):
        for group in adamw.param_groups:
            group["lr"] = optimizer.lr * min(1.0, (step + 1) / (0.05 * steps))
        starts = rng.integers(len(data) - shape.context - 1, size=optimizer.batch_sequences)
        rows = [data[s : s + shape.context + 1].astype(np.int64) for s in starts]
        tokens = torch.stack([torch.from_numpy(row) for row in rows]).to(device)
        adamw.zero_grad(set_to_none=True)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
    return loss.item()


# Measuring ------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Return the seconds that one call takes of a CPU core, or on the wall with a GPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    began = clock()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - began


def peak_flops(device: str) -> float:
    """Return FLOP/s of the fastest square float32 matrix product."""
    best = 0.0
    for size in (512, 1024, 1536) if device == "cpu" else (2048, 4096, 8192):
        a, b, out = (torch.randn(size, size, device=device) for _ in range(3))
        times = max(2, int(6e9 / size**3 / 4)) if device == "cpu" else 10

        def multiply(a=a, b=b, out=out, times=times) -> None:
            for _ in range(times):
                torch.mm(a, b, out=out)

        multiply()
        best = max(best, 2 * size**3 * times / seconds_of(multiply, device))
    return best


def on_one_core(name: str, corpus: Corpus, repeats: int, seconds: float) -> dict:
    """Return tokens/s and shares of the peak of a shape, in turn in every repeat."""
    data = np.asarray(corpus.train(corpus.domains[0]))

    def runs(steps: int) -> dict[str, tuple[Callable[[], object], int]]:
        one = spec_of(name, corpus, steps)
        pack = varied(spec_of(name, corpus, max(2, steps // PACK)), PACK, corpus.domains)
        return {
            "packed": (lambda: train_pack(pack, corpus), PACK * pack[0].tokens),
            "single": (lambda: train_pack([one], corpus), one.tokens),
            "eager": (lambda: eager(one, data, "cpu"), one.tokens),
        }

    warm = runs(40)
    for work, _ in warm.values():
        work()
    work, tokens = warm["eager"]
    rate = tokens / seconds_of(work, "cpu")
    spec = spec_of(name, corpus, 2)
    steps = max(40, int(seconds * rate / spec.batch_tokens))
    rates: dict[str, list[float]] = {"packed": [], "single": [], "eager": [], "peak": []}
    for _ in range(repeats):
        for way, (work, tokens) in runs(steps).items():
            rates[way].append(tokens / seconds_of(work, "cpu"))
        rates["peak"].append(peak_flops("cpu"))
    median = {way: statistics.median(values) for way, values in rates.items()}
    flops = token_flops(spec)
    result: dict = {
        "shape": name,
        "params": spec.model.params,
        "flops_per_token": flops,
        "peak_gflops": median.pop("peak") / 1e9,
    }
    for way, rate in median.items():
        result[f"{way}_tokens_per_second"] = rate
    for way in median:
        shares = [r * flops / p for r, p in zip(rates[way], rates["peak"], strict=True)]
        result[f"{way}_share_of_peak"] = statistics.median(shares)
    for way in ("packed", "single"):
        gains = [a / b for a, b in zip(rates[way], rates["eager"], strict=True)]
        result[f"{way}_over_eager"] = statistics.median(gains)
    return result


def alone(name: str, corpus_url: str, steps: int) -> None:
    """Train one run on the GPU: the whole work of a process of its own."""
    corpus = Corpus.load(corpus_url)
    train_pack([spec_of(name, corpus, steps)], corpus, device="cuda")


def on_a_gpu(name: str, corpus: Corpus, steps: int) -> dict:
    """Return runs per hour for growing packs, and for one process each."""
    result: dict = {"shape": name, "steps": steps, "peak_gflops": peak_flops("cuda") / 1e9}
    context = multiprocessing.get_context("spawn")

    def own_processes() -> None:
        for _ in range(2):
            process = context.Process(target=alone, args=(name, corpus.url, steps))
            process.start()
            process.join()

    result["process_each_runs_per_hour"] = 2 * 3600 / seconds_of(own_processes, "cuda")
    data = np.asarray(corpus.train(corpus.domains[0]))
    one = spec_of(name, corpus, steps)
    result["eager_runs_per_hour"] = 3600 / seconds_of(lambda: eager(one, data, "cuda"), "cuda")
    best, size = 0.0, 1
    while True:
        specs = varied(one, size, corpus.domains)
        try:
            train_pack(
                [
                    dataclasses.replace(
                        s, schedule=Schedule.constant(s.mixture, 10 * s.batch_tokens)
                    )
                    for s in specs
                ],
                corpus,
                device="cuda",
            )
            took = seconds_of(lambda s=specs: train_pack(s, corpus, device="cuda"), "cuda")
        except torch.OutOfMemoryError:
            break
        rate = size * 3600 / took
        result[f"pack_{size}_runs_per_hour"] = rate
        share = size * one.tokens * token_flops(one) / took / 1e9 / result["peak_gflops"]
        result[f"pack_{size}_share_of_peak"] = share
        if rate < 1.1 * best:
            break
        best, result["best_pack"], size = rate, size, 4 * size
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--corpus", default="data/sample", help="built there if it is not")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one run of the eager loop")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=200, help="of a run on a GPU")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    corpus = build_sample(Path(arguments.corpus), vocab_size=1024)
    set_threads(1)
    results = []
    for name in arguments.shapes:
        if torch.cuda.is_available():
            results.append(on_a_gpu(name, corpus, arguments.steps))
        else:
            results.append(on_one_core(name, corpus, arguments.repeats, arguments.seconds))
        if not arguments.json:
            for key, value in results[-1].items():
                print(f"{key:28} {value:.4g}" if isinstance(value, float) else f"{key:28} {value}")
            print(flush=True)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()

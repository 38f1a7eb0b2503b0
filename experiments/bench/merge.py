"""How fast are merged candidates evaluated, and how much memory does a merge of files take?

    python experiments/bench/merge.py [--sequences 1 8 64] [--ours 200] [--theirs 5] [--json]
    python experiments/bench/merge.py --memory [--experts 8] [--layers 26] [--dtype F32] [--json]

1. Candidates per second on models of about 1M parameters: (a) rayx, experts in memory, nothing
   written; (b) mergekit in this process, each candidate merged to disk, loaded by transformers and
   evaluated; (c) the same with mergekit's command line. Paired: the three take turns, on the same
   weights (rayx's proxy is converted to a Llama), the same text and the same threads; their losses
   are compared. The ratio depends on how much text is evaluated, so there is one for each amount.
2. Peak memory of `rayx merge` on models of more than 200M parameters with random weights, over the
   bytes of one of them, for each operator; `imports_bytes` is what Python and torch take alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from rayx import ModelShape
from rayx.errors import SpecError
from rayx.merge_operator import OPERATORS, Operator
from rayx.proxy.evaluate import HeldOut
from rayx.proxy.merge.candidates import Stack, merged_losses
from rayx.proxy.merge.tensor_files import TensorWriter
from rayx.proxy.model import initial_parameters

BIN = Path(sys.executable).parent
SHAPE = ModelShape(layers=4, width=128, heads=4, ffn_width=384, vocab_size=1024, context=128)
EXPERTS = 4
DRAWN = 1 << 24  # random numbers of a large model
VOCAB, WIDTH, FFN = 32_000, 768, 2048  # of the large models

log = logging.getLogger(__name__)


def save_as_llama(folder: Path, parameters: dict[str, torch.Tensor], shape: ModelShape) -> None:
    """Write a proxy as a Hugging Face Llama of the same function."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocab_size, hidden_size=shape.width, intermediate_size=shape.ffn_width,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, rms_norm_eps=1e-5,
        max_position_embeddings=shape.context, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    state = {"model.embed_tokens.weight": parameters["embedding"]}
    state |= {"model.norm.weight": parameters["norm"], "lm_head.weight": parameters["embedding"]}
    for layer in range(shape.layers):
        p = {n: parameters[f"layers.{layer}.{n}"] for n in ("qkv", "gate_up", "attention_norm",
             "ffn_norm", "attention_out", "down")}  # fmt: skip
        parts = {
            **dict(zip(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                       p["qkv"].T.chunk(3), strict=True)),
            **dict(zip(("mlp.gate_proj", "mlp.up_proj"), p["gate_up"].T.chunk(2), strict=True)),
            "self_attn.o_proj": p["attention_out"].T,
            "mlp.down_proj": p["down"].T,
            "input_layernorm": p["attention_norm"],
            "post_attention_layernorm": p["ffn_norm"],
        }  # fmt: skip
        state |= {f"model.layers.{layer}.{n}.weight": t for n, t in parts.items()}
    model.load_state_dict(state)
    model.save_pretrained(folder)


def mergekit_config(folders: list[Path], weights: np.ndarray) -> dict:
    """Return mergekit's configuration of a linear merge."""
    models = [
        {"model": str(folder), "parameters": {"weight": float(weight)}}
        for folder, weight in zip(folders, weights, strict=True)
    ]
    return {"merge_method": "linear", "models": models, "dtype": "float32"}


@torch.no_grad()
def evaluate_llama(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Return the mean loss in nats a token."""
    total = 0.0
    for chunk in tokens.split(32):
        logits = model(input_ids=chunk[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum")
        total += float(loss)
    return total / tokens[:, 1:].numel()


def timed(call: Callable[[], Any]) -> tuple[Any, np.ndarray]:
    """Return what a call returns, and its wall and CPU seconds, those of its processes included."""

    def now() -> np.ndarray:
        times = os.times()
        return np.array([times.elapsed, sum(times[:4])])

    began = now()
    result = call()
    return result, now() - began


def measure_speed(sequences: list[int], ours: int, theirs: int, threads: int) -> dict:
    """Measure merged candidates per second, for each amount of text."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(threads)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    rng = np.random.default_rng(0)
    start = initial_parameters(SHAPE, seed=0)
    experts = [
        {n: t + 0.02 * torch.randn_like(t) for n, t in start.items()} for _ in range(EXPERTS)
    ]
    stack = Stack({n: torch.stack([e[n] for e in experts]).numpy() for n in start}, None)
    texts = [torch.from_numpy(rng.integers(0, 1024, (n, SHAPE.context + 1))) for n in sequences]
    zero = np.zeros((2, len(texts)))  # wall and CPU, for each amount
    spent = {name: zero.copy() for name in ("ours", "mergekit", "mergekit_command")}
    worst = 0.0
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / f"expert{k}" for k in range(EXPERTS)]
        for folder, expert in zip(folders, experts, strict=True):
            save_as_llama(folder, expert, SHAPE)
        candidates: list = []
        for turn in range(-1, theirs):  # the first turn warms up and is not counted
            weights_CK = rng.dirichlet(np.ones(EXPERTS), max(1, ours // theirs))
            candidates = [(Operator(), weights_K) for weights_K in weights_CK.tolist()]
            config = mergekit_config(folders, weights_CK[0])
            file, out, other = (Path(place) / f"{turn}{end}" for end in (".yaml", "-a", "-b"))
            file.write_text(json.dumps(config))  # JSON is YAML
            parsed = MergeConfiguration.model_validate(config)
            command = [BIN / "mergekit-yaml", file, other, "--quiet", "--no-copy-tokenizer"]
            _, merge = timed(lambda: run_merge(parsed, str(out), options))  # noqa: B023
            _, merge_command = timed(
                lambda: subprocess.run(command, check=True, capture_output=True, env=environment)  # noqa: B023
            )
            for number, tokens in enumerate(texts):
                targets = {"text": HeldOut(tokens, 1.0)}
                rows, took = timed(
                    lambda: list(merged_losses(SHAPE, candidates, stack, targets))  # noqa: B023
                )
                loss, load_and_evaluate = timed(
                    lambda: evaluate_llama(
                        AutoModelForCausalLM.from_pretrained(out, local_files_only=True),  # noqa: B023
                        tokens,  # noqa: B023
                    )
                )
                worst = max(worst, abs(loss - rows[0]["text"].nats))
                if turn >= 0:
                    spent["ours"][:, number] += took / len(candidates) / theirs
                    spent["mergekit"][:, number] += (merge + load_and_evaluate) / theirs
                    spent["mergekit_command"][:, number] += (
                        merge_command + load_and_evaluate
                    ) / theirs
    result: dict = {"params": SHAPE.params, "experts": EXPERTS, "threads": threads}
    result |= {"candidates": len(candidates) * theirs, "mergekit_candidates": theirs}
    result |= {"largest_difference_nats": worst, "amounts": []}
    for number, tokens in enumerate(texts):
        row: dict = {"tokens": tokens[:, 1:].numel()}
        for clock, name in enumerate(("wall", "cpu")):
            own = spent["ours"][clock, number]
            row |= {f"{who}_per_{name}_second": 1 / s[clock, number] for who, s in spent.items()}
            row[f"ratio_{name}"] = spent["mergekit"][clock, number] / own
            row[f"ratio_command_{name}"] = spent["mergekit_command"][clock, number] / own
        result["amounts"].append(row)
    return result


def write_large(file: Path, layers: int, dtype: str, seed: int) -> int:
    """Write a model of random weights and return its parameters."""
    shapes = {"embed": (VOCAB, WIDTH)}
    for layer in range(layers):
        square = {f"layers.{layer}.{n}": (WIDTH, WIDTH) for n in "qkvo"}
        shapes |= square | {f"layers.{layer}.{n}": (FFN, WIDTH) for n in ("gate", "up", "down")}
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    writer = TensorWriter(file, {n: (dtype, shape) for n, shape in shapes.items()}, {})
    rng = np.random.default_rng(seed)
    drawn = torch.from_numpy(rng.random(DRAWN, np.float32) - 0.5).to(kind)
    for shape in shapes.values():  # each tensor is a window of what was drawn, repeated
        window = drawn[rng.integers(DRAWN // 2) :][: DRAWN // 2]
        for at in range(0, shape[0] * shape[1], len(window)):
            writer.append(window[: shape[0] * shape[1] - at])
    writer.close()
    return sum(rows * columns for rows, columns in shapes.values())


def measure_memory(operators: list[str], experts: int, layers: int, dtype: str) -> dict:
    """Measure the peak memory of `rayx merge` over the bytes of one model, for each operator."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        params = [write_large(folder / f"{k}.safetensors", layers, dtype, k)
                  for k in range(experts + 1)][0]  # fmt: skip
        nbytes = (folder / "0.safetensors").stat().st_size

        def run(operator: str, names: list[int], extra: list[str]) -> dict:
            command = [
                str(BIN / "rayx"),
                "merge",
                "out.safetensors",
                "--operator",
                operator,
                "--json",
            ]
            for name in names:
                command += ["--expert", f"{name}={name}.safetensors"]
            weights = ",".join(f"{name}={1 / len(names)}" for name in names)
            done = subprocess.run(
                [*command, "--weights", weights, *extra], cwd=folder, capture_output=True, text=True
            )
            if done.returncode:
                raise SpecError(f"rayx merge --operator {operator} failed: {done.stderr}")
            (folder / "out.safetensors").unlink()
            found = json.loads(done.stdout)
            return {"peak_bytes": found["peak_bytes"], "seconds": found["seconds"],
                    "ratio": found["peak_bytes"] / nbytes}  # fmt: skip

        names = list(range(1, experts + 1))
        result: dict = {"params": params, "dtype": dtype, "model_bytes": nbytes, "experts": experts}
        idle = subprocess.run(
            [sys.executable, "-c", "import rayx.proxy.merge.files, rayx.cli.merging\n"
             "print(rayx.cli.merging._peak_bytes())"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        result["imports_bytes"] = int(idle.stdout)
        for operator in operators:
            options = ["--density", "0.2"] if OPERATORS[operator][1] else []
            options += ["--base", "0.safetensors"] if OPERATORS[operator][0] else []
            result[operator] = run(operator, names[:2] if operator == "slerp" else names, options)
            log.info("%s: %s", operator, result[operator])
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--ours", type=int, default=200, help="candidates of rayx at each amount")
    parser.add_argument("--theirs", type=int, default=5, help="candidates of mergekit, each way")
    parser.add_argument("--threads", type=int, default=1, help="on both sides")
    parser.add_argument("--memory", action="store_true", help="the second question instead")
    parser.add_argument("--operators", nargs="+", choices=list(OPERATORS), default=list(OPERATORS))
    parser.add_argument("--experts", type=int, default=8, help="of the second question")
    parser.add_argument("--layers", type=int, default=26, help="of the large models")
    parser.add_argument("--dtype", choices=("F32", "BF16"), default="F32")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    log.setLevel(logging.INFO)
    if given.memory:
        result = measure_memory(given.operators, given.experts, given.layers, given.dtype)
    else:
        result = measure_speed(given.sequences, given.ours, given.theirs, given.threads)
    if given.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        for row in value if isinstance(value, list) else [value]:
            cells = row.items() if isinstance(row, dict) else [("", row)]
            shown = (f"{n} {v:.4g}" if isinstance(v, float) else f"{n} {v}" for n, v in cells)
            print(f"{name:16} {', '.join(shown)}")


if __name__ == "__main__":
    main()

"""How fast are merged candidates evaluated, and how much memory does a merge of files take?

    python experiments/bench/merge.py [--sequences 1 8 64] [--ours 200] [--theirs 5] [--json]
    python experiments/bench/merge.py --memory [--experts 8] [--layers 26] [--dtype F32] [--json]

1. Candidates per second on models of about 1M parameters: (a) rayx, experts in memory, nothing
   written; (b) mergekit in this process, each candidate merged to disk, loaded by transformers and
   evaluated; (c) the same with mergekit's command line. Paired: the three take turns, on the same
   weights (rayx's proxy is converted to a Llama), the same text and the same threads; their losses
   are compared. The ratio depends on how much text is evaluated, so there is one for each amount.
2. Peak memory of `rayx merge` on models of more than 200M parameters with random weights, over the
   bytes of one of them, for each operator. A process that merges a tiny model is the least.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from rayx import ModelShape
from rayx.errors import SpecError
from rayx.merging import Operator
from rayx.proxy.evaluate import HeldOut
from rayx.proxy.merge.candidates import Stack, merged_losses
from rayx.proxy.merge.tensor_files import TensorWriter
from rayx.proxy.model import initial_parameters

BIN = Path(sys.executable).parent
SHAPE = ModelShape(layers=4, width=128, heads=4, ffn_width=384, vocab_size=1024, context=128)
EXPERTS = 4
VOCAB, WIDTH, FFN = 32_000, 768, 2048  # of the large models
WITH_BASE = {
    "task_arithmetic": [], "ties": ["--density", "0.2"], "dare": ["--density", "0.2"],
    "dare_ties": ["--density", "0.2"], "pcb": ["--density", "0.2"],
}  # fmt: skip


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
def load_and_evaluate(folder: Path, tokens: torch.Tensor) -> tuple[float, float]:
    """Return the mean loss of a Llama on disk in nats a token, and the seconds of loading it."""
    from transformers import AutoModelForCausalLM

    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    loaded = time.perf_counter() - began
    total = 0.0
    for chunk in tokens.split(32):
        logits = model(input_ids=chunk[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), chunk[:, 1:].flatten(), reduction="sum")
        total += float(loss)
    return total / tokens[:, 1:].numel(), loaded


def measure_speed(sequences: list[int], ours: int, theirs: int) -> dict:
    """Measure merged candidates per second, for each amount of text."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = MergeOptions(quiet=True, write_model_card=False, copy_tokenizer=False)
    rng = np.random.default_rng(0)
    start = initial_parameters(SHAPE, seed=0)
    experts = [
        {n: t + 0.02 * torch.randn_like(t) for n, t in start.items()} for _ in range(EXPERTS)
    ]
    stack = Stack({n: torch.stack([e[n] for e in experts]).numpy() for n in start}, None)
    result: dict = {"params": SHAPE.params, "experts": EXPERTS, "threads": torch.get_num_threads()}
    result["amounts"] = []
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / f"expert{k}" for k in range(EXPERTS)]
        for folder, expert in zip(folders, experts, strict=True):
            save_as_llama(folder, expert, SHAPE)
        for count in sequences:
            tokens = torch.from_numpy(rng.integers(0, 1024, (count, SHAPE.context + 1)))
            targets = {"text": HeldOut(tokens, 1.0)}
            spent = dict.fromkeys(("ours", "in_process", "command"), 0.0)
            parts = dict.fromkeys(("merge", "load"), 0.0)
            worst = 0.0
            for turn in range(-1, theirs):  # the first turn warms up and is not counted
                weights_CK = rng.dirichlet(np.ones(EXPERTS), ours // theirs)
                took = dict.fromkeys(spent, 0.0)
                began = time.perf_counter()
                candidates = [(Operator(), weights_K) for weights_K in weights_CK.tolist()]
                losses = [
                    row["text"].nats for row in merged_losses(SHAPE, candidates, stack, targets)
                ]
                took["ours"] = (time.perf_counter() - began) / len(candidates)
                config = mergekit_config(folders, weights_CK[0])
                file = Path(place) / "config.json"
                file.write_text(json.dumps(config))  # JSON is YAML
                out = Path(place) / f"in-process-{count}-{turn}"
                began = time.perf_counter()
                run_merge(MergeConfiguration.model_validate(config), str(out), options)
                merged = time.perf_counter() - began
                loss, loaded = load_and_evaluate(out, tokens)
                took["in_process"] = time.perf_counter() - began
                worst = max(worst, abs(loss - losses[0]))
                out = Path(place) / f"command-{count}-{turn}"
                began = time.perf_counter()
                command = [BIN / "mergekit-yaml", file, out, "--quiet", "--no-copy-tokenizer"]
                subprocess.run(command, check=True, capture_output=True)
                loss, _ = load_and_evaluate(out, tokens)
                took["command"] = time.perf_counter() - began
                worst = max(worst, abs(loss - losses[0]))
                if turn >= 0:
                    spent = {n: s + took[n] / theirs for n, s in spent.items()}
                    parts["merge"] += merged / theirs
                    parts["load"] += loaded / theirs
            result["amounts"].append(
                {
                    "sequences": count,
                    "tokens": tokens[:, 1:].numel(),
                    "ours_per_second": 1 / spent["ours"],
                    "mergekit_per_second": 1 / spent["in_process"],
                    "mergekit_command_per_second": 1 / spent["command"],
                    "ratio": spent["in_process"] / spent["ours"],
                    "ratio_command": spent["command"] / spent["ours"],
                    "mergekit_merge_seconds": parts["merge"],
                    "mergekit_load_seconds": parts["load"],
                    "largest_difference_nats": worst,
                }
            )
    return result


def write_large(file: Path, layers: int, dtype: str, seed: int) -> int:
    """Write a model of random weights and return its parameters."""
    shapes = {"embed": (VOCAB, WIDTH)}
    for layer in range(layers):
        square = {f"layers.{layer}.{n}": (WIDTH, WIDTH) for n in "qkvo"}
        shapes |= square | {f"layers.{layer}.{n}": (FFN, WIDTH) for n in ("gate", "up", "down")}
    kind = {"F32": torch.float32, "BF16": torch.bfloat16}[dtype]
    writer = TensorWriter(file, {n: (dtype, shape) for n, shape in shapes.items()}, {})
    common, own = (torch.Generator().manual_seed(s) for s in (0, seed))
    for shape in shapes.values():
        values = torch.randn(shape, generator=common)
        if seed:
            values += 0.1 * torch.randn(shape, generator=own)
        writer.append(values.to(kind).flatten())
    writer.close()
    return sum(rows * columns for rows, columns in shapes.values())


def measure_memory(experts: int, layers: int, dtype: str) -> dict:
    """Measure the peak memory of `rayx merge` over the bytes of one model, for each operator."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        params = [write_large(folder / f"{k}.safetensors", layers, dtype, k)
                  for k in range(experts + 1)][0]  # fmt: skip
        write_large(folder / "tiny.safetensors", 0, dtype, 0)
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
        for operator in ("linear", "soup", "multi_slerp"):
            result[operator] = run(operator, names, [])
        result["slerp"] = run("slerp", names[:2], [])
        for operator, extra in WITH_BASE.items():
            result[operator] = run(operator, names, [*extra, "--base", "0.safetensors"])
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--ours", type=int, default=200, help="candidates of rayx at each amount")
    parser.add_argument("--theirs", type=int, default=5, help="candidates of mergekit, each way")
    parser.add_argument("--memory", action="store_true", help="the second question instead")
    parser.add_argument("--experts", type=int, default=8, help="of the second question")
    parser.add_argument("--layers", type=int, default=26, help="of the large models")
    parser.add_argument("--dtype", choices=("F32", "BF16"), default="F32")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if given.memory:
        result = measure_memory(given.experts, given.layers, given.dtype)
    else:
        result = measure_speed(given.sequences, given.ours, given.theirs)
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

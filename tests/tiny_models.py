"""Tiny Hugging Face models that tests make and save, tokenizer included."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedTokenizerFast,
)

from rayx.corpus.tokenizer import EOS, train_tokenizer
from tests.conftest import WORDS, sentences

POSITIONS = 96


@lru_cache
def own_tokenizer_json(vocab_size: int = 350, seed: int = 7) -> str:
    """A tokenizer other than the corpus', with merges of its own."""
    texts = [t for domain in WORDS for t in sentences(domain, 40, seed)]
    return train_tokenizer([t.upper() + t for t in texts], vocab_size).to_str()


def save_tokenizer(folder: Path, tokenizer_json: str, bos: bool = False) -> None:
    tokenizer = Tokenizer.from_str(tokenizer_json)
    names: dict[str, Any] = {"eos_token": EOS}
    if bos:
        tokenizer.add_special_tokens(["<s>"])
        pair = [("<s>", tokenizer.token_to_id("<s>"))]
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=pair
        )
        names["bos_token"] = "<s>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)


def config_of(kind: str, vocab_size: int, **changes: Any) -> Any:
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}
    if kind == "gpt2":
        small = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
        return GPT2Config(vocab_size=vocab_size, **{**small, **ids, **changes})
    small = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS,
    }  # fmt: skip
    if kind == "mixtral":
        small |= {"num_local_experts": 2, "num_experts_per_tok": 1}
        return MixtralConfig(vocab_size=vocab_size, **{**small, **ids, **changes})
    return LlamaConfig(vocab_size=vocab_size, **{**small, **ids, **changes})


def save_model(
    folder: Path,
    tokenizer_json: str,
    *,
    kind: str = "llama",
    seed: int = 0,
    near: Path | None = None,
    dtype: torch.dtype = torch.float32,
    bos: bool = False,
    shard: str = "5GB",
    **changes: Any,
) -> Path:
    """Save a model of random weights; with `near`, that model plus a small random step."""
    vocab_size = Tokenizer.from_str(tokenizer_json).get_vocab_size() + 5
    torch.manual_seed(seed)
    config = config_of(kind, vocab_size, initializer_range=0.2, **changes)
    model = AutoModelForCausalLM.from_config(config)
    if near is not None:
        start = AutoModelForCausalLM.from_pretrained(near, dtype=torch.float32)
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), start.parameters(), strict=True):
                mine.copy_(theirs + 0.3 * theirs.std().nan_to_num() * torch.randn_like(theirs))
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    save_tokenizer(folder, tokenizer_json, bos)
    return folder


def change_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

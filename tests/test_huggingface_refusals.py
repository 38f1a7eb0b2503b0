"""Model folders that cannot be used or merged: each is named, before anything expensive."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

from rayx.errors import RayxError
from rayx.merge_operator import Operator
from rayx.proxy.models import MergedModels, open_model

transformers = pytest.importorskip("transformers")

from tests.test_huggingface import TASK, evaluated, trained  # noqa: E402, F401 (a fixture)
from tests.tiny_models import change_json, own_tokenizer_json, save_model  # noqa: E402


def refused(message, call):
    with pytest.raises(RayxError, match=message):
        call()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("good") / "m", own_tokenizer_json())


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "m")


def without(*names):
    def change(folder):
        for name in names:
            for file in folder.glob(name):
                file.unlink()

    return change


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shard_lost(folder):
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def tensor_lost(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def looks_ahead(folder):
    config = transformers.BertConfig(
        vocab_size=360, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, is_decoder=False, initializer_range=0.5,
    )  # fmt: skip
    transformers.BertLMHeadModel(config).save_pretrained(folder)


BROKEN = {
    "no config": (without("config.json"), "has no config.json"),
    "no weights": (without("*.safetensors"), "has neither model.safetensors nor"),
    "pickled": (pickled, r"pickled \(pytorch_model.bin\)"),
    "truncated": (truncated, "model.safetensors is truncated"),
    "a shard lost": (
        shard_lost,
        "shard model-00001-of-00002.safetensors with 1 tensors is missing",
    ),
    "a tensor lost": (tensor_lost, "1 tensors of the model .*layers.1.mlp.up_proj.weight"),
    "no tokenizer": (without("tokenizer*"), "has no tokenizer"),
    "tokenizer torn": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer cannot be"),
    "no end of text": (
        lambda f: change_json(f / "tokenizer_config.json", eos_token=None),
        "no end-of-text token",
    ),
    "vocabulary": (
        lambda f: change_json(f / "config.json", vocab_size=200),
        "the model embeds 200",
    ),
    "not causal": (
        lambda f: change_json(f / "config.json", model_type="t5", architectures=["T5Model"]),
        "T5Model and not a causal language model",
    ),
    "only the trunk": (
        lambda f: change_json(f / "config.json", architectures=["LlamaModel"]),
        r"LlamaModel and not a causal language model \(LlamaForCausalLM\)",
    ),
    "unknown type": (lambda f: change_json(f / "config.json", model_type="new"), "cannot be read"),
    "remote code": (
        lambda f: change_json(
            f / "config.json", model_type="new", auto_map={"AutoConfig": "code.Config"}
        ),
        "needs code of its own",
    ),
    "looks ahead": (looks_ahead, "sees the tokens that it is to predict"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_cannot_be_used_is_named(name, copy, tiny_corpus):
    change, message = BROKEN[name]
    change(copy)
    refused(message, lambda: evaluated(copy, tiny_corpus))


def test_nothing_there_and_no_checkpoint_are_named(good, trained, tiny_corpus, tmp_path):  # noqa: F811
    refused("neither a folder", lambda: open_model(str(tmp_path / "nothing")))
    refused("neither a folder", lambda: open_model(str(tmp_path / "nothing.safetensors")))
    refused("shape of its model", lambda: open_model(str(good / "model.safetensors")))
    refused("has 96 positions. Give a context", lambda: evaluated(good, tiny_corpus, 200))
    refused("context is 24 tokens; 25", lambda: evaluated(trained[3][0], tiny_corpus, 25))


def test_models_that_differ_are_not_merged(good, tmp_path, trained):  # noqa: F811
    tokens = own_tokenizer_json()

    def merged(other, operator=None, base=None):
        models = [open_model(str(path)) for path in (good, other)]
        return MergedModels(models, operator or Operator(), base)

    wide = save_model(tmp_path / "wide", tokens, intermediate_size=64)
    refused(r"down_proj.weight' has shape \(32, 64\) and \(32, 48\)", lambda: merged(wide))
    gpt2 = save_model(tmp_path / "gpt2", tokens, kind="gpt2")
    refused("model_type 'gpt2' in gpt2 and 'llama' in m", lambda: merged(gpt2))
    other = save_model(tmp_path / "other", own_tokenizer_json(seed=8))
    refused("tokenizers of other and m differ in", lambda: merged(other))
    rope = save_model(tmp_path / "rope", tokens, rms_norm_eps=1e-3)  # no tensor shows it
    assert "rms_norm_eps" in merged(rope).warnings[0]
    refused("give all in one layout", lambda: merged(trained[3][0]))
    refused("needs --base", lambda: merged(good, TASK))


def test_without_transformers_the_error_says_what_to_install(good, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RayxError, match=r"pip install 'rayx-mix\[hf\]'"):
        open_model(str(good))

"""Merging model files: what is written, in which slices, and a catalogue of what is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import rayx
from rayx.errors import RayxError
from rayx.merging import Operator
from rayx.proxy.checkpoint import State, write_checkpoint
from rayx.proxy.merge import files as merge_module
from rayx.proxy.merge import source
from rayx.proxy.merge.files import merge_files
from rayx.proxy.merge.model_files import ModelFiles
from rayx.proxy.merge.operators import merge_tensor
from rayx.proxy.model import initial_parameters
from rayx.spec import Parent
from tests.samples import train_spec

OPERATORS = [
    Operator(),
    Operator(name="soup"),
    Operator(name="task_arithmetic", scale=0.8),
    Operator(name="multi_slerp"),
    Operator(name="ties", density=0.3),
    Operator(name="dare", density=0.3, seed=2),
    Operator(name="dare_ties", density=0.3),
    Operator(name="pcb", density=0.3, scale=1.1),
]
NAMES = ("web", "code", "law")
WEIGHTS = {"web": 0.5, "code": 0.3, "law": 0.2}
CONFIG = {"model_type": "llama", "num_attention_heads": 2, "rms_norm_eps": 1e-5}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}}, "added_tokens": []}


def tensors_of(seed: int, near: float = 0.2, dtype: torch.dtype = torch.float32) -> dict:
    """A small model near one that all seeds share."""
    start, step = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    shapes = {"model.embed_tokens.weight": (40, 8), "layers.0.up": (8, 24), "norm": (8,), "s": ()}
    tensors = {
        n: (torch.randn(s, generator=start) + near * torch.randn(s, generator=step)).to(dtype)
        for n, s in shapes.items()
    }
    return {**tensors, "positions": torch.arange(6)}


def write_folder(path: Path, tensors: dict, shards: int = 1, **config) -> Path:
    """Write a folder in Hugging Face's layout."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps({**CONFIG, **config}))
    (path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (path / "README.md").write_text("of this model alone")
    if shards == 1:
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        return path
    where = {n: f"model-{1 + i % shards}.safetensors" for i, n in enumerate(tensors)}
    for shard in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == shard}, path / shard)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


@pytest.fixture
def world(tmp_path):
    """Three experts and their base, as folders; keyword arguments of a merge that works."""
    for seed, name in enumerate(NAMES, start=1):
        write_folder(tmp_path / name, tensors_of(seed))
    write_folder(tmp_path / "base", tensors_of(0, near=0.0))
    return {
        "experts": {name: tmp_path / name for name in NAMES},
        "weights": dict(WEIGHTS),
        "operator": Operator(),
        "base": tmp_path / "base",
        "out": tmp_path / "out",
    }


def read_folder(path: Path) -> dict[str, torch.Tensor]:
    return {n: t for file in sorted(path.glob("*.safetensors")) for n, t in load_file(file).items()}


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_files_hold_what_the_operator_gives_tensor_by_tensor(world, operator):
    if operator.name == "soup":
        world["weights"] = dict.fromkeys(NAMES, 1.0)
    done = []
    merged = merge_files(**world | {"operator": operator}, on_tensor=lambda *a: done.append(a))
    found, base = read_folder(merged.path), read_folder(world["base"])
    experts = [read_folder(path) for path in world["experts"].values()]
    weights_CK = torch.tensor([list(world["weights"].values())])
    for name, tensor in base.items():
        experts_K = torch.stack([e[name] for e in experts])
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype
        expected = merge_tensor(operator, experts_K, weights_CK, tensor, name)[0]
        np.testing.assert_allclose(found[name], expected, atol=1e-6)
    assert set(found) == set(base) and [d[:2] for d in done] == [(i, 5) for i in range(1, 6)]
    assert merged.params == 40 * 8 + 8 * 24 + 8 + 1 and merged.files == ("model.safetensors",)
    assert merged.copied == ("config.json", "tokenizer.json") and not merged.warnings
    assert sorted(f.name for f in merged.path.iterdir()) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_slices_of_a_large_tensor_give_the_same(tmp_path, monkeypatch, operator):
    monkeypatch.setattr(source, "SLICE", 2 * source.MASK_BLOCK)
    base = {"w": torch.randn(5, 40_000)}  # four slices, the last one short
    experts = {n: {"w": base["w"] + 0.1 * torch.randn(5, 40_000)} for n in NAMES[:2]}
    for name, tensors in {**experts, "base": base}.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    paths = {n: tmp_path / f"{n}.safetensors" for n in experts}
    weights = {"web": 0.5, "code": 0.5}
    out = tmp_path / "out.safetensors"
    merge_files(paths, weights, operator, tmp_path / "base.safetensors", out)
    monkeypatch.setattr(source, "SLICE", 1 << 30)
    experts_K = torch.stack([e["w"] for e in experts.values()])
    expected = merge_tensor(operator, experts_K, torch.tensor([[0.5, 0.5]]), base["w"], "w")[0]
    np.testing.assert_allclose(load_file(out)["w"], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_is_kept(world, tmp_path, dtype):
    for path, seed in zip([*world["experts"].values(), world["base"]], (1, 2, 3, 0), strict=True):
        save_file(tensors_of(seed, dtype=dtype), path / "model.safetensors", {"format": "pt"})
    merge_files(**world)
    found = read_folder(world["out"])
    wide = torch.zeros(8).double()
    for seed, weight in enumerate(WEIGHTS.values(), start=1):
        wide += weight * tensors_of(seed, dtype=dtype)["norm"].double()
    np.testing.assert_allclose(found["norm"].double(), wide.to(dtype).double(), rtol=1e-2)
    assert found["norm"].dtype == dtype and found["positions"].dtype == torch.int64
    with safe_open(world["out"] / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_read_and_written(world, tmp_path):
    merge_files(**world)
    whole = read_folder(world["out"])
    sharded = {
        n: write_folder(tmp_path / f"{n}2", tensors_of(s), 3) for s, n in enumerate(NAMES, 1)
    }
    changed = {"experts": sharded, "base": None, "out": tmp_path / "out2", "max_shard_bytes": 800}
    merged = merge_files(**world | changed)
    found = read_folder(merged.path)
    assert len(merged.files) == 3 and merged.files[0] == "model-00001-of-00003.safetensors"
    for name, tensor in whole.items():
        assert torch.equal(found[name], tensor)
    again = ModelFiles.open(merged.path)
    index = json.loads((merged.path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == again.nbytes == merged.nbytes
    assert set(again.tensors) == set(whole)


def test_checkpoints_of_rayx_are_merged_without_their_moments(tmp_path):
    store = rayx.open(tmp_path / "store", create=True)
    paths, states, spec = {}, {}, train_spec()
    for number, name in enumerate(NAMES, start=1):
        spec = train_spec(web=number)
        states[name] = initial_parameters(spec.model, seed=number)
        first, second = ({n: t + i for n, t in states[name].items()} for i in (1, 2))
        state = State(states[name], first, second, {"web": 7})
        write_checkpoint(store, Parent(spec, spec.steps), state)
        paths[name] = tmp_path / "store" / Parent(spec, spec.steps).checkpoint
    merged = merge_files(paths, WEIGHTS, Operator(), None, tmp_path / "out.safetensors")
    found = load_file(merged.path)
    assert set(found) == set(states["web"]) and merged.params == spec.model.params
    for name, tensor in found.items():
        expected = sum(w * states[n][name] for n, w in WEIGHTS.items())
        np.testing.assert_allclose(tensor, expected, atol=1e-6)
    with safe_open(merged.path, "pt") as file:
        assert json.loads(file.metadata()["model"])["heads"] == 4 and len(file.metadata()) == 1
    assert [f.name for f in tmp_path.iterdir() if f.name != "store"] == ["out.safetensors"]

    other = train_spec(model=dataclasses.replace(spec.model, heads=2))
    write_checkpoint(store, Parent(other, 32), State(states["law"], {}, {}, {}))
    paths["law"] = tmp_path / "store" / Parent(other, 32).checkpoint
    with pytest.raises(RayxError, match="expert 'law' .* is a model of shape .*\"heads\": 2"):
        merge_files(paths, WEIGHTS, Operator(), None, tmp_path / "out2.safetensors")


def test_weights_are_not_normalised_and_may_be_negative_for_task_arithmetic(world):
    operator = Operator(name="task_arithmetic")
    weights = {"web": 1.0, "code": -0.5, "law": 0.0}
    merge_files(**world | {"operator": operator, "weights": weights})
    base, web, code = (tensors_of(s, n)["norm"] for s, n in ((0, 0.0), (1, 0.2), (2, 0.2)))
    expected = base + (web - base) - 0.5 * (code - base)
    np.testing.assert_allclose(read_folder(world["out"])["norm"], expected, atol=1e-6)


def test_what_a_merge_can_bear_is_a_warning(world):
    change_json(world["experts"]["law"] / "config.json", rms_norm_eps=1e-6, use_cache=False)
    change_json(world["experts"]["law"] / "tokenizer.json", truncation={"max_length": 5})
    merged = merge_files(**world)
    assert merged.warnings == (
        "config.json of expert 'law' differs from the base's, which is kept, in rms_norm_eps.",
    )
    assert json.loads((merged.path / "config.json").read_text())["rms_norm_eps"] == 1e-5


# Real models -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """A base and two experts of tied embeddings, saved by transformers, tokenizer included."""
    pytest.importorskip("transformers")
    from tests.tiny_models import own_tokenizer_json, save_model

    place = tmp_path_factory.mktemp("llamas")
    text = own_tokenizer_json()
    base = save_model(place / "base", text, tie_word_embeddings=True)
    experts = {
        name: save_model(place / name, text, seed=s, near=base, tie_word_embeddings=True)
        for s, name in enumerate(NAMES[:2], start=1)
    }
    return base, experts


def test_a_merged_folder_is_loaded_by_transformers_with_tied_weights(llamas, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, experts = llamas
    out, weights = tmp_path / "out", {"web": 0.4, "code": 0.6}
    merge_files(experts, weights, Operator(), base, out, max_shard_bytes=20_000)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(list(out.glob("*.safetensors"))) > 1 and "lm_head.weight" not in read_folder(out)
    parts = [AutoModelForCausalLM.from_pretrained(p).state_dict() for p in experts.values()]
    for name, tensor in model.state_dict().items():
        np.testing.assert_allclose(
            tensor, 0.4 * parts[0][name] + 0.6 * parts[1][name], atol=1e-6, err_msg=name
        )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(out)("return law")["input_ids"]


@pytest.mark.filterwarnings("ignore:numpy.core:DeprecationWarning")
@pytest.mark.parametrize("operator", [Operator(name="ties", density=0.4), Operator()],
                         ids=lambda o: o.name)  # fmt: skip
def test_mergekit_writes_the_same(llamas, tmp_path, operator):
    pytest.importorskip("mergekit")
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    base, experts = llamas
    weights = {"web": 0.4, "code": 0.6}
    parameters = {"density": operator.density} if operator.density else {}
    models = [
        {"model": str(path), "parameters": {"weight": weights[name], **parameters}}
        for name, path in experts.items()
    ]
    config = {"merge_method": operator.name, "models": models, "dtype": "float32"}
    if operator.needs_base:
        config |= {"base_model": str(base)}
    options = MergeOptions(quiet=True, write_model_card=False)
    run_merge(MergeConfiguration.model_validate(config), str(tmp_path / "theirs"), options)
    merge_files(experts, weights, operator, base, tmp_path / "ours")
    theirs = read_folder(tmp_path / "theirs")
    for name, tensor in read_folder(tmp_path / "ours").items():
        np.testing.assert_allclose(tensor, theirs[name], atol=1e-6, err_msg=name)


# What is refused ---------------------------------------------------------------------------------


def change_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def replace_tensors(path: Path, **changes) -> None:
    """Write an expert's tensors again with some changed; None takes one away."""
    tensors = {**tensors_of(3), **{n.replace("__", "."): t for n, t in changes.items()}}
    save_file({n: t for n, t in tensors.items() if t is not None}, path / "model.safetensors")


def cut(file: Path, keep: int) -> None:
    os.truncate(file, keep)


def shard(path: Path) -> Path:
    shutil.rmtree(path)
    return write_folder(path, tensors_of(3), shards=3)


def remap(path: Path, **changes) -> None:
    file = shard(path) / "model.safetensors.index.json"
    where = {**json.loads(file.read_text())["weight_map"], **changes}
    file.write_text(json.dumps({"weight_map": {n: f for n, f in where.items() if f}}))


def change_header(path: Path, **changes) -> None:
    """Change what the header of an expert's file says of its tensor `norm`."""
    file = path / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["norm"] |= changes
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NAN = torch.full((8,), float("nan"))
INF = tensors_of(3)["layers.0.up"].index_fill(1, torch.tensor([5]), float("inf"))
WORDS_ADDED = {"model": {"vocab": {"a": 0, "b": 2}}, "added_tokens": [{"content": "c", "id": 1}]}
TASK = Operator(name="task_arithmetic")
# What is done to the expert "law" (or to the arguments), and what the message names.
CATALOGUE = {
    "missing tensor": (lambda p: replace_tensors(p, norm=None),
                       r"expert 'law' .* cannot be merged with the base .*'norm' is missing"),
    "extra tensor": (lambda p: replace_tensors(p, bias=torch.zeros(3)),
                     r"tensor 'bias' is in it and not in the base"),
    "shape": (lambda p: replace_tensors(p, layers__0__up=torch.zeros(8, 25)),
              r"'layers.0.up' has shape \(8, 25\) and \(8, 24\) in the base"),
    "several at once": (lambda p: replace_tensors(p, norm=None, s=torch.zeros(2)),
                        r"'norm' is missing; tensor 's' has shape \(2,\) and \(\) in"),
    "dtype": (lambda p: replace_tensors(p, norm=torch.zeros(8, dtype=torch.bfloat16)),
              r"'norm' is BF16 and F32 in the base \(save both in one dtype\)"),
    "vocabulary size": (
        lambda p: replace_tensors(p, model__embed_tokens__weight=torch.zeros(48, 8)),
        r"vocabularies differ: 'model.embed_tokens.weight' has 48 rows and 40 in the base"),
    "tokenizer": (lambda p: change_json(p / "tokenizer.json", **WORDS_ADDED),
                  r"of expert 'law' and the base differ in 2 of 3 and 2 tokens: 'b' is 2"),
    "broken tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"),
                         r"expert 'law': .*tokenizer.json is not a tokenizer"),
    "model type": (lambda p: change_json(p / "config.json", model_type="gpt2"),
                   r"model_type 'gpt2' in expert 'law' and 'llama' in the base"),
    "attention heads": (lambda p: change_json(p / "config.json", num_attention_heads=4),
                        r"num_attention_heads 4 in expert 'law' and 2 in the base"),
    "quantized": (lambda p: change_json(p / "config.json", quantization_config={"bits": 4}),
                  r"expert 'law': .* is quantized"),
    "no config": (lambda p: (p / "config.json").unlink(), r"expert 'law': .* has no config.json"),
    "broken config": (lambda p: (p / "config.json").write_text("{"),
                      r"expert 'law': cannot read .*config.json"),
    "no folder": (lambda p: shutil.rmtree(p), r"expert 'law': no model at '.*law'"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(),
                   r"expert 'law': .* has neither model.safetensors nor"),
    "pickled": (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"),
                r"are pickled \(pytorch_model.bin\).* save_pretrained\(safe_serialization=True\)"),
    "pickle renamed": (lambda p: torch.save(tensors_of(3), p / "model.safetensors"),
                       r"law/model.safetensors is a PyTorch pickle, not safetensors"),
    "large file pointer": (
        lambda p: (p / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        r"law/model.safetensors is a Git LFS pointer"),
    "adapter": (lambda p: (p / "adapter_config.json").write_text("{}"), r"holds an adapter"),
    "cut in the tensors": (lambda p: cut(p / "model.safetensors", 900),
                           r"law/model.safetensors is truncated: tensor .* of a file of 900"),
    "cut in the header": (lambda p: cut(p / "model.safetensors", 50),
                          r"\(50 bytes\) is truncated or not a safetensors file"),
    "empty file": (lambda p: cut(p / "model.safetensors", 0), r"\(0 bytes\) is truncated or not"),
    "text": (lambda p: (p / "model.safetensors").write_text("weights of a model, as a poem"),
             r"truncated or not a safetensors file"),
    "header is no JSON": (
        lambda p: (p / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"????"),
        r"its header is not JSON"),
    "header of too few bytes": (lambda p: change_header(p, shape=[9]),
                                r"'norm' of shape \(9,\) has 32 bytes in the header; expected 36"),
    "unknown dtype": (lambda p: change_header(p, dtype="F8_E4M3"),
                      r"tensor 'norm' has dtype F8_E4M3.*Dequantize"),
    "damaged header": (lambda p: change_header(p, data_offsets=None), r"tensor 'norm' is damaged"),
    "missing shard": (lambda p: (shard(p) / "model-2.safetensors").unlink(),
                      r"expert 'law': shard model-2.safetensors with 2 tensors is missing"),
    "index names more": (lambda p: remap(p, ghost="model-1.safetensors"),
                         r"the index has tensor 'ghost' in model-1.safetensors, and it is not"),
    "index names less": (lambda p: remap(p, s=None),
                         r"holds tensor 's', which the index does not name"),
    "index leaves the folder": (lambda p: remap(p, norm="../web/model.safetensors"),
                                r"'../web/model.safetensors', which lies in another folder"),
    "empty index": (
        lambda p: (shard(p) / "model.safetensors.index.json").write_text("{}"), r"no weight_map"),
    "NaN": (lambda p: replace_tensors(p, norm=NAN),
            r"'norm' of expert 'law' \(.*model.safetensors\) is nan at \[0\]"),
    "infinity": (lambda p: replace_tensors(p, layers__0__up=INF),
                 r"'layers.0.up' of expert 'law' .* is inf at \[0, 5\]"),
    "integers differ": (lambda p: replace_tensors(p, positions=torch.arange(6) + 1),
                        r"'positions' is I64 and differs in expert 'law'"),
    "weight of no expert": ({"weights": {**WEIGHTS, "lwa": 0.1}},
                            r"weight for 'lwa', which is not an expert.*mean 'law'"),
    "no weight": ({"weights": {"web": 1.0}}, r"no weight for expert code, law"),
    "NaN weight": ({"weights": {**WEIGHTS, "law": float("nan")}}, r"A merge weight is nan"),
    "negative weight": ({"weights": {"web": 1.5, "code": 0.0, "law": -0.5}},
                        r"A merge weight of linear is -0.5"),
    "weights that do not sum to 1": ({"weights": {**WEIGHTS, "law": 0.5}},
                                     r"sum of linear merge weights is 1.3"),
    "all weights 0": ({"weights": dict.fromkeys(NAMES, 0.0), "operator": TASK}, r"not 0"),
    "unequal soup": ({"operator": Operator(name="soup")}, r"weights of a soup"),
    "no base": ({"operator": TASK, "base": None}, r"base of task_arithmetic is None"),
    "slerp of three": ({"operator": Operator(name="slerp")}, r"experts of slerp is 3"),
    "no experts": ({"experts": {}, "weights": {}}, r"no experts to merge"),
    "base is a file": ({"base": "web/model.safetensors"}, r"is a folder and the base .* a file"),
    "output exists": ({"out": "exists"}, r"Output 'exists' exists"),
    "output is an input": ({"out": "web"}, r"Output 'web' is or lies inside a model"),
    "output in an input": ({"out": "base/merged"}, r"'base/merged' is or lies inside a model"),
    "output nowhere": ({"out": "a/b/c"}, r"'a/b/c' cannot be written: its folder does not exist"),
    "no bytes of a shard": ({"max_shard_bytes": 0}, r"max_shard_bytes is 0"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", CATALOGUE)
def test_bad_input_is_refused_by_name_and_nothing_is_left(world, tmp_path, monkeypatch, wrong):
    spoil, message = CATALOGUE[wrong]
    monkeypatch.chdir(tmp_path)
    Path("exists").mkdir()
    if isinstance(spoil, dict):
        world |= spoil
    else:
        spoil(tmp_path / "law")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RayxError, match=message):
        merge_files(**world)
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_disk_is_found_before_anything_is_written(world, monkeypatch):
    monkeypatch.setattr(
        merge_module.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(9, 9, 5)
    )
    with pytest.raises(RayxError, match=r"takes 0.00 GB and 0.00 GB are free; make room"):
        merge_files(**world)


def test_overflow_of_the_output_is_named(world):
    for path in [*world["experts"].values(), world["base"]]:
        values = {"w": torch.full((4,), 60_000.0 if path != world["base"] else 1.0).half()}
        save_file(values, path / "model.safetensors")
    weights = dict.fromkeys(NAMES, 1.0)
    with pytest.raises(RayxError, match="'w' overflows F16 when merged; take smaller weights"):
        merge_files(**world | {"operator": TASK, "weights": weights})
    assert not world["out"].exists()


def test_an_output_of_files_is_a_file(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(RayxError, match=r"experts are files; give an output \*.safetensors"):
        merge_files({"a": tmp_path / "a.safetensors"}, {"a": 1.0}, Operator(), None, tmp_path / "o")

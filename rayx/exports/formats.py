"""The formats: one writer each, with the rules that its own documentation gives."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from rayx.errors import SpecError
from rayx.exports.stages import Setting, Stage, yaml_text

SLACK = 1.01  # of repetition limits: other tokenizers count a little differently

Files = dict[str, str]  # name -> text
Writer = Callable[[str, Sequence[Stage], Setting], Files]


def megatron(stem: str, stages: Sequence[Stage], setting: Setting) -> Files:
    """A blend a stage, for `--data-args-path`: `weight prefix weight prefix ...`.

    Rules: weights and prefixes alternate, so their number is even; the file is split at white
    space, so no prefix may hold any; weights are positive and divided by their sum.

    Source: Megatron-LM, megatron/core/datasets, get_blend_from_list and normalize.
    """
    files = {}
    for stage in stages:
        for path in stage.shares:
            if re.search(r"\s", path):
                raise SpecError(f"Path {path!r} has white space, at which Megatron splits blends.")
        parts = [f"{share:.6f} {path}" for path, share in stage.shares.items()]
        files[f"{stem}-{stage.number}.txt"] = "\n".join(parts) + "\n"
    return files


def huggingface(stem: str, stages: Sequence[Stage], setting: Setting) -> Files:
    """A module with the `interleave_datasets` call of each stage.

    Rules: probabilities are as many as datasets and sum to 1; the result ends with the source that
    ends first, so each is repeated without end and the stage is cut at its rows. Sources are drawn
    a row at a time, so shares are of tokens where rows are sequences of equal length. A later stage
    goes on about where the earlier ones left each domain.

    Source: Hugging Face datasets, main classes, interleave_datasets and IterableDataset.repeat.
    """
    rows_read: dict[str, int] = {}
    listed = []
    for stage in stages:
        rows = stage.rows(setting)
        sources = {p: (share, rows_read.get(p, 0)) for p, share in stage.shares.items()}
        listed.append({"rows": rows, "sources": sources, "seed": setting.seed + stage.number - 1})
        for path, share in stage.shares.items():
            rows_read[path] = rows_read.get(path, 0) + round(share * rows)
    body = ",\n".join(f"    {entry!r}" for entry in listed)
    text = f'''"""Data of a training plan, written by rayx. A row: {setting.context} tokens."""

from datasets import interleave_datasets, load_dataset

# sources: path -> (probability, rows of it that earlier stages have read)
STAGES = [
{body},
]


def load(path):
    return load_dataset(path, split="train", streaming=True)


def stage(number, load=load):
    """Return the data of one stage, counted from 0, as an IterableDataset."""
    this = STAGES[number]
    sources = [load(path).repeat(None).skip(skip) for path, (_, skip) in this["sources"].items()]
    mixed = interleave_datasets(
        sources,
        probabilities=[share for share, _ in this["sources"].values()],
        seed=this["seed"],
        stopping_strategy="first_exhausted",
    )
    return mixed.take(this["rows"])
'''
    return {f"{stem}.py": text}


def mosaicml(stem: str, stages: Sequence[Stage], setting: Setting) -> Files:
    """Arguments of a StreamingDataset a stage, as YAML: streams with a proportion, and epoch_size.

    Rules: each stream has a remote or a local place; at most one of proportion, repeat and choose;
    proportion for all streams or for none; proportions are relative; epoch_size, in samples, says
    how many are drawn.

    Source: MosaicML Streaming, API reference, Stream; Mixing Datasets.
    """
    files = {}
    for stage in stages:
        streams = [
            {("remote" if "://" in path else "local"): path, "proportion": share}
            for path, share in stage.shares.items()
        ]
        facts = {
            "streams": streams,
            "epoch_size": stage.rows(setting),
            "shuffle": True,
            "shuffle_seed": setting.seed + stage.number - 1,
        }
        files[f"{stem}-{stage.number}.yaml"] = yaml_text(facts)
    return files


def olmo_core(stem: str, stages: Sequence[Stage], setting: Setting) -> Files:
    """A SourceMixtureDatasetConfig a stage, as YAML.

    Rules: target_ratio in (0, 1], together 1; max_source_fraction in (0, 1]; max_repetition_ratio
    at least 1, and with the fraction large enough that the source holds what is asked of it; paths
    not empty; requested_tokens over 0; global_batch_size in tokens.

    Source: OLMo-core, olmo_core.data, source mixture.
    """
    files = {}
    for stage in stages:
        sources = [
            {
                "source_name": path,
                "target_ratio": share,
                "paths": [path if path.endswith((".npy", "*")) else f"{path}/*.npy"],
                "max_repetition_ratio": max(
                    1.0, math.ceil(stage.epochs.get(path, 0.0) * SLACK * 100) / 100
                ),
                "max_source_fraction": 1.0,
            }
            for path, share in stage.shares.items()
        ]
        facts = {
            "source_list": {"sources": sources},
            "requested_tokens": stage.tokens,
            "global_batch_size": setting.batch_tokens,
        }
        files[f"{stem}-{stage.number}.yaml"] = yaml_text(facts)
    return files


def nanotron(stem: str, stages: Sequence[Stage], setting: Setting) -> Files:
    """The `data_stages` and `tokens` of a nanotron configuration, switch points by step, as YAML.

    Rules: one stage starts at training step 1; names and starts are unique and starts rise;
    dataset_weights are as many as dataset_folder.

    Source: nanotron, src/nanotron/config, Config and NanosetDatasetsArgs; docs, Nanosets.
    """
    assert setting.batch_tokens is not None, "export_plan asks for it"
    listed = [
        {
            "name": f"stage {stage.number}",
            "start_training_step": stage.steps(setting.batch_tokens)[0],
            "data": {
                "dataset": {
                    "dataset_folder": list(stage.shares),
                    "dataset_weights": list(stage.shares.values()),
                },
                "num_loading_workers": 1,
                "seed": setting.seed + stage.number - 1,
            },
        }
        for stage in stages
    ]
    steps = stages[-1].steps(setting.batch_tokens)[1]
    return {f"{stem}.yaml": yaml_text({"tokens": {"train_steps": steps}, "data_stages": listed})}


def torchtitan(stem: str, stages: Sequence[Stage], setting: Setting) -> Files:
    """A module with the datasets, weights and seed of an InterleavedDataset a stage.

    Rules: weights are as many as datasets, none negative, their sum positive, and are divided by
    it; a stage ends with the source that ends first, so sources must loop.

    Source: torchtitan, torchtitan/hf_datasets, interleave.
    """
    assert setting.batch_tokens is not None, "export_plan asks for it"
    listed = []
    for stage in stages:
        first, last = stage.steps(setting.batch_tokens)
        listed.append({
            "datasets": list(stage.shares), "weights": list(stage.shares.values()),
            "seed": setting.seed + stage.number - 1, "steps": last - first + 1,
        })  # fmt: skip
    body = ",\n".join(f"    {entry!r}" for entry in listed)
    heading = '"""Data of a training plan, written by rayx: sources loop (infinite=True)."""'
    return {f"{stem}.py": f"{heading}\n\nSTAGES = [\n{body},\n]\n"}


# Name -> its writer, and what of the setting it needs.
FORMATS: dict[str, tuple[Writer, tuple[str, ...]]] = {
    "megatron": (megatron, ()),
    "huggingface": (huggingface, ("context",)),
    "mosaicml": (mosaicml, ("context",)),
    "olmo-core": (olmo_core, ("batch_tokens",)),
    "nanotron": (nanotron, ("batch_tokens",)),
    "torchtitan": (torchtitan, ("batch_tokens",)),
}

"""The files of one model: a safetensors file, or a folder in Hugging Face's layout.

Only headers and JSON are read here; `Entry.read` reads the tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rayx.errors import ModelError
from rayx.proxy.checkpoint import MOMENTS
from rayx.proxy.merge.tensor_files import Entry, read_header

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What belongs to a model beside its weights: configuration, tokenizer, templates, its own code.
COPIED = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk.

    Attributes:
        label: What messages call it.
        path: The file or folder.
        tensors: Name -> where it lies, in the order of the files; an optimizer's moments are left
            out. Tied weights are listed once, as they are stored.
        metadata: Of the first file's header.
        config: config.json; empty for a file alone.
        is_folder: Whether it is a folder.
    """

    label: str
    path: Path
    tensors: Mapping[str, Entry] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    config: Mapping[str, Any] = field(repr=False)
    is_folder: bool

    @classmethod
    def open(cls, path: str | Path, label: str = "the model") -> ModelFiles:
        """Read the headers of a model's files.

        Raises:
            ModelError: There is no such model, a shard is missing, damaged or not safetensors, or
                the index does not fit the shards.
        """
        place = Path(path)
        if place.is_dir():
            return _open_folder(place, label)
        if not place.is_file():
            raise ModelError(
                f"{label}: no model at {str(path)!r}; give a .safetensors file or a folder with "
                f"{WEIGHTS} or {INDEX}."
            )
        tensors, metadata = read_header(place)
        if "drawn" in metadata:  # a checkpoint of rayx
            prefixes = tuple(f"{moment}." for moment in MOMENTS)
            tensors = {n: e for n, e in tensors.items() if not n.startswith(prefixes)}
            metadata = {n: text for n, text in metadata.items() if n != "drawn"}
        return cls(label, place, _some(tensors, label, place), metadata, {}, False)

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def params(self) -> int:
        """Numbers in its floating-point tensors."""
        return sum(entry.numel for entry in self.tensors.values() if entry.floats)

    def other_files(self) -> tuple[Path, ...]:
        """Return the files beside the weights that belong to the model, sorted."""
        if not self.is_folder:
            return ()
        return tuple(
            file
            for file in sorted(self.path.iterdir())
            if file.is_file() and file.suffix in COPIED and not file.name.endswith(".index.json")
        )

    def vocabulary(self) -> dict[str, int] | None:
        """Return token -> id of tokenizer.json, added tokens included; None without that file.

        Raises:
            ModelError: The file cannot be read.
        """
        file = self.path / "tokenizer.json"
        if not self.is_folder or not file.is_file():
            return None
        data = _read_json(file, self.label)
        try:
            found = data["model"]["vocab"]
            pairs = found.items() if isinstance(found, dict) else (
                (piece[0], number) for number, piece in enumerate(found)
            )  # fmt: skip
            added = ((token["content"], token["id"]) for token in data.get("added_tokens") or ())
            return {**dict(pairs), **dict(added)}
        except (KeyError, TypeError, IndexError) as error:
            raise ModelError(f"{self.label}: {file} is not a tokenizer ({error!r}).") from error


def _open_folder(place: Path, label: str) -> ModelFiles:
    config = _read_json(place / "config.json", label) if (place / "config.json").exists() else {}
    if (place / "adapter_config.json").exists():
        raise ModelError(
            f"{label}: {place} holds an adapter and not a model. Merge it into its model first "
            "(peft: merge_and_unload), save that, and give the folder."
        )
    if "quantization_config" in config:
        raise ModelError(
            f"{label}: {place} is quantized (quantization_config in config.json); quantized values "
            "cannot be averaged. Give the model in 16 or 32 bits."
        )
    if (place / WEIGHTS).exists():
        tensors, metadata = read_header(place / WEIGHTS)
    elif (place / INDEX).exists():
        tensors, metadata = _read_shards(place, label)
    else:
        pickled = sorted(
            f.name for pattern in ("*.bin", "*.pt", "*.pth") for f in place.glob(pattern)
        )
        raise ModelError(
            f"{label}: the weights in {place} are pickled ({pickled[0]}), which rayx does not read."
            " Load and save the model with save_pretrained(safe_serialization=True)."
            if pickled
            else f"{label}: {place} has neither {WEIGHTS} nor {INDEX}; give a model's folder."
        )
    if not config:
        raise ModelError(f"{label}: {place} has no config.json; give a whole model's folder.")
    return ModelFiles(label, place, _some(tensors, label, place), metadata, config, True)


def _read_shards(place: Path, label: str) -> tuple[dict[str, Entry], dict[str, str]]:
    weight_map = _read_json(place / INDEX, label).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{label}: {place / INDEX} has no weight_map; save the model again.")
    tensors: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise ModelError(f"{label}: the index names {shard!r}, which lies in another folder.")
        if not (place / shard).is_file():
            count = sum(name == shard for name in weight_map.values())
            raise ModelError(
                f"{label}: shard {shard} with {count} tensors is missing in {place}. Fetch the "
                "model again."
            )
        found, metadata = read_header(place / shard)
        for name, entry in found.items():
            if weight_map.get(name) != shard:
                raise ModelError(
                    f"{label}: {place / shard} holds tensor {name!r}, which the index "
                    f"{'has in ' + weight_map[name] if name in weight_map else 'does not name'}."
                )
            tensors[name] = entry
    for name, shard in weight_map.items():
        if name not in tensors:
            raise ModelError(
                f"{label}: the index has tensor {name!r} in {shard}, and it is not there. Fetch "
                "the model again."
            )
    return tensors, metadata


def _some(tensors: dict[str, Entry], label: str, place: Path) -> dict[str, Entry]:
    if not tensors:
        raise ModelError(f"{label}: {place} has no tensors; give a model.")
    return tensors


def _read_json(file: Path, label: str) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{label}: cannot read {file}: {error}.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{label}: {file} is not a JSON object.")
    return data

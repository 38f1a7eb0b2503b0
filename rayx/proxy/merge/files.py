"""Merge model files: tensor by tensor and slice by slice, never a whole model in memory.

Memory is a slice of each expert, and for operators that look at whole tensors a few copies of the
largest tensor, whatever the number of experts. What is wrong is found in the headers, before
anything is written; the output appears under its name when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rayx.errors import ModelError, SpecError, did_you_mean
from rayx.merge_operator import Operator
from rayx.proxy.merge.compatible import check_compatible
from rayx.proxy.merge.model_files import INDEX, WEIGHTS, ModelFiles
from rayx.proxy.merge.operators import PLANS
from rayx.proxy.merge.source import slices, work_dtype
from rayx.proxy.merge.tensor_files import DTYPES, Entry, TensorWriter

SHARD_BYTES = 5_000_000_000  # of one output file

OnTensor = Callable[[int, int, str], None]  # done, total, name


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge wrote.

    Attributes:
        path: The file or folder.
        files: Names of the files with tensors.
        copied: Names of the files taken over from the base or the first expert.
        tensors: How many.
        params: Numbers in the merged tensors.
        nbytes: Bytes of all tensors.
        seconds: Wall time.
        warnings: Differences between the models that the merge could bear.
    """

    path: Path
    files: tuple[str, ...]
    copied: tuple[str, ...]
    tensors: int
    params: int
    nbytes: int
    seconds: float
    warnings: tuple[str, ...]


def merge_files(
    experts: Mapping[str, str | Path],
    weights: Mapping[str, float],
    operator: Operator,
    base: str | Path | None,
    out: str | Path,
    max_shard_bytes: int = SHARD_BYTES,
    on_tensor: OnTensor | None = None,
) -> Merged:
    """Merge models on disk and write the result.

    The output is laid out as the experts are: a safetensors file, or a folder with the weights and
    the configuration and tokenizer of the base (of the first expert without a base). Its tensors
    have their names, order and dtypes. Integer and bool tensors are not merged and must be equal.

    Args:
        experts: Name -> model.
        weights: Name -> merge weight; see `Operator.check_weights`. Never normalised.
        operator: How.
        base: What the experts start from; only operators on task vectors need it.
        out: What to write; it must not exist.
        max_shard_bytes: Largest file of a folder, unless one tensor is larger.
        on_tensor: Called after each tensor.

    Raises:
        SpecError: Weights or the operator do not fit the experts.
        ModelError: A model cannot be read, models cannot be merged with each other, a value is not
            finite, or the output exists, lies inside a model or does not fit on the disk.
    """
    began = time.perf_counter()
    weights_K = _weights(experts, weights, operator, base)
    if max_shard_bytes < 1:
        raise SpecError(f"max_shard_bytes is {max_shard_bytes}; expected bytes of a file, >= 1.")
    place = Path(out)
    _check_out(place, [*experts.values(), *([base] if base else [])])
    models = [ModelFiles.open(path, f"expert {name!r}") for name, path in experts.items()]
    bases = [ModelFiles.open(base, "the base")] if base else []
    kept, *others = [*bases, *models]
    warnings = check_compatible(kept, others)
    _check_disk(place, kept.nbytes)
    if not kept.is_folder and place.suffix != ".safetensors":
        raise ModelError(f"{str(out)!r}: the experts are files; give an output *.safetensors.")

    shards = _shards(kept, max_shard_bytes) if kept.is_folder else {place.name: list(kept.tensors)}
    partial = place.parent / f".{place.name}.{os.getpid()}.partial"
    partial.mkdir()
    done = 0
    try:
        for file, names in shards.items():
            layout = {n: (kept.tensors[n].dtype, kept.tensors[n].shape) for n in names}
            writer = TensorWriter(partial / file, layout, kept.metadata)
            try:
                for name in names:
                    _merge_one(writer, name, operator, weights_K, models, bases)
                    done += 1
                    if on_tensor:
                        on_tensor(done, len(kept.tensors), name)
            finally:
                writer.close()
            writer.check()
        copied = [shutil.copy(file, partial / file.name) for file in kept.other_files()]
        if len(shards) > 1:
            where = {n: file for file, names in shards.items() for n in names}
            index = {"metadata": {"total_size": kept.nbytes}, "weight_map": where}
            (partial / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
        os.rename(partial if kept.is_folder else partial / place.name, place)
    except OSError as error:
        raise ModelError(f"Cannot write {place}: {error}. Give another output.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Merged(
        path=place,
        files=tuple(shards),
        copied=tuple(Path(file).name for file in copied),
        tensors=len(kept.tensors),
        params=kept.params,
        nbytes=kept.nbytes,
        seconds=time.perf_counter() - began,
        warnings=tuple(warnings),
    )


class _Stored:
    """A tensor of all experts on disk, as a `Source`; every value that is read must be finite."""

    def __init__(
        self, name: str, models: Sequence[ModelFiles], bases: Sequence[ModelFiles]
    ) -> None:
        self.name, self._models, self._bases = name, models, bases
        self.experts = len(models)
        self.numel = models[0].tensors[name].numel

    def expert(self, k: int, start: int, stop: int) -> Tensor:
        return self._read(self._models[k], start, stop)

    def base(self, start: int, stop: int) -> Tensor:
        if not self._bases:
            return torch.zeros(stop - start)
        return self._read(self._bases[0], start, stop)

    def _read(self, model: ModelFiles, start: int, stop: int) -> Tensor:
        entry = model.tensors[self.name]
        values_S = entry.read(start, stop)
        finite_S = values_S.isfinite()
        if not bool(finite_S.all()):
            at = int((~finite_S).nonzero()[0, 0])
            place = torch.unravel_index(torch.tensor(start + at), entry.shape or (1,))
            raise ModelError(
                f"Tensor {self.name!r} of {model.label} ({entry.file}) is {float(values_S[at])} at "
                f"{[int(i) for i in place]}; only finite values are merged. Take an earlier "
                "checkpoint."
            )
        return values_S.to(work_dtype(values_S.dtype))


def _merge_one(
    writer: TensorWriter,
    name: str,
    operator: Operator,
    weights_K: Sequence[float],
    models: Sequence[ModelFiles],
    bases: Sequence[ModelFiles],
) -> None:
    """Merge a tensor and append it."""
    kept = (bases or models)[0].tensors[name]
    if not kept.floats:
        return _copy_one(writer, name, kept, models)
    if not kept.numel:
        return
    # A base that the operator does not read is not read at all.
    source = _Stored(name, models, bases if operator.needs_base else ())
    combine = PLANS[operator.name](source, operator)
    dtype = DTYPES[kept.dtype]
    weights_CK = torch.tensor([weights_K], dtype=work_dtype(dtype))
    for start, stop in slices(source):
        experts_KS = torch.stack([source.expert(k, start, stop) for k in range(source.experts)])
        merged_S = combine(experts_KS, source.base(start, stop), weights_CK, start)[0].to(dtype)
        if not bool(merged_S.isfinite().all()):
            raise ModelError(
                f"Tensor {name!r} overflows {kept.dtype} when merged; take smaller weights or a "
                "smaller scale."
            )
        writer.append(merged_S)


def _copy_one(writer: TensorWriter, name: str, kept: Entry, models: Sequence[ModelFiles]) -> None:
    """Append a tensor of integers or bools, which must be equal in all experts."""
    values = kept.read(0, kept.numel)
    for model in models:
        if not torch.equal(model.tensors[name].read(0, kept.numel), values):
            raise ModelError(
                f"Tensor {name!r} is {kept.dtype} and differs in {model.label}; only "
                "floating-point tensors are merged. Merge models that agree in it."
            )
    writer.append(values)


def _weights(
    experts: Mapping[str, str | Path],
    weights: Mapping[str, float],
    operator: Operator,
    base: str | Path | None,
) -> list[float]:
    """Return the weights in the order of the experts."""
    if not experts:
        raise SpecError("There are no experts to merge; give at least one.")
    for name in weights:
        if name not in experts:
            raise SpecError(
                f"There is a weight for {name!r}, which is not an expert; expected "
                f"{', '.join(experts)}.{did_you_mean(name, experts)}"
            )
    missing = [name for name in experts if name not in weights]
    if missing:
        raise SpecError(f"There is no weight for expert {', '.join(missing)}; give one each.")
    found = [weights[name] for name in experts]
    operator.check_weights(found, base)
    return found


def _check_out(place: Path, inputs: Sequence[str | Path]) -> None:
    target = place.absolute().resolve()
    for path in inputs:
        model = Path(path).absolute().resolve()
        if target == model or model in target.parents:
            raise ModelError(
                f"Output {str(place)!r} is or lies inside a model that is merged ({str(path)!r}); "
                "give another."
            )
    if place.exists() or place.is_symlink():
        raise ModelError(f"Output {str(place)!r} exists; remove it or give another.")
    if not place.absolute().parent.is_dir():
        raise ModelError(f"Output {str(place)!r} cannot be written: its folder does not exist.")


def _check_disk(place: Path, nbytes: int) -> None:
    free = shutil.disk_usage(place.absolute().parent).free
    if nbytes > free:
        raise ModelError(
            f"Output {str(place)!r} takes {nbytes / 1e9:.2f} GB and {free / 1e9:.2f} GB are free; "
            "make room or give another place."
        )


def _shards(model: ModelFiles, max_bytes: int) -> dict[str, list[str]]:
    """Return file -> tensors, filled in order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, entry in model.tensors.items():
        if groups[-1] and filled + entry.nbytes > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += entry.nbytes
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    total = len(groups)
    return {f"model-{i:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(groups, start=1)}

"""Safetensors files read and written in pieces, so that memory does not grow with the model.

Plain reads at offsets rather than a memory map: mapped pages count as memory of the process, and
a merge reads every page of every expert.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rayx.errors import ModelError
from rayx.recipe import is_int

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MOST_HEADER_BYTES = 100_000_000  # as the safetensors library has it
SIGNATURES = {
    b"PK\x03\x04": "a PyTorch pickle",
    b"\x80": "a pickle",
    b"GGUF": "a GGUF file",
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself",
}


class Entry(NamedTuple):
    """Where a tensor lies."""

    file: Path
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def numel(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.numel * DTYPES[self.dtype].itemsize

    @property
    def floats(self) -> bool:
        """Whether it holds floating-point numbers, which are what is merged."""
        return DTYPES[self.dtype].is_floating_point

    def read(self, start: int, stop: int) -> Tensor:
        """Return elements [start, stop) of the flattened tensor, shape (S,).

        Raises:
            ModelError: The file has become shorter, or cannot be read.
        """
        size = DTYPES[self.dtype].itemsize
        data = np.empty((stop - start) * size, np.uint8)
        view, done = data.data, 0
        try:
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.offset + start * size)
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise ModelError(f"{self.file} ended while it was read; was it replaced?")
                    done += count
        except OSError as error:
            raise ModelError(f"Cannot read {self.file}: {error}.") from error
        return torch.from_numpy(data).view(DTYPES[self.dtype])


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors of a safetensors file by name, in file order, and its metadata.

    Raises:
        ModelError: It is missing, truncated, damaged, not safetensors or of an unknown dtype.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            first = file.read(32)
            for signature, what in SIGNATURES.items():
                if first.startswith(signature) and first[8:9] != b"{":  # a length may look so
                    raise ModelError(
                        f"{path} is {what}, not safetensors. Save the model with "
                        "save_pretrained(..., safe_serialization=True) and give that folder."
                    )
            length = int.from_bytes(first[:8], "little")
            if len(first) < 8 or length > min(size - 8, MOST_HEADER_BYTES):
                raise ModelError(
                    f"{path} ({size} bytes) is truncated or not a safetensors file: its header "
                    f"would have {length} bytes. Fetch or write it again."
                )
            file.seek(8)
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not a safetensors file: its header is not JSON.") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} is not a safetensors file: its header is not an object.")
    metadata = header.pop("__metadata__", None) or {}
    texts = isinstance(metadata, dict) and all(isinstance(text, str) for text in metadata.values())
    if not texts:
        raise ModelError(f"{path} is not a safetensors file: its metadata are not texts.")
    entries = {}
    for name, told in header.items():
        entries[name] = _entry(path, name, told, 8 + length, size)
    return dict(sorted(entries.items(), key=lambda item: item[1].offset)), metadata


def _entry(path: Path, name: str, told: dict, data_start: int, size: int) -> Entry:
    try:
        dtype, shape = str(told["dtype"]), tuple(told["shape"])
        begin, end = told["data_offsets"]
        if not all(is_int(n) and n >= 0 for n in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: the header of tensor {name!r} is damaged.") from error
    if dtype not in DTYPES:
        raise ModelError(
            f"{path}: tensor {name!r} has dtype {dtype}, which is not merged; expected one of "
            f"{', '.join(DTYPES)}. Dequantize the model first."
        )
    entry = Entry(path, dtype, shape, data_start + begin)
    if end - begin != entry.nbytes or begin < 0:
        raise ModelError(
            f"{path}: tensor {name!r} of shape {shape} has {end - begin} bytes in the header; "
            f"expected {entry.nbytes}. The file is damaged; fetch or write it again."
        )
    if data_start + end > size:
        raise ModelError(
            f"{path} is truncated: tensor {name!r} ends at byte {data_start + end} of a file of "
            f"{size}. Fetch or write it again."
        )
    return entry


class TensorWriter:
    """Writes one safetensors file whose tensors are known beforehand, element by element.

    Args:
        path: The file.
        tensors: Name -> (dtype, shape), in the order in which they are written.
        metadata: Strings for the header.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, Sequence[int]]],
        metadata: Mapping[str, str],
    ) -> None:
        header: dict = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, (dtype, shape) in tensors.items():
            begin, end = end, end + math.prod(shape) * DTYPES[dtype].itemsize
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
        self.path, self.nbytes = path, 8 + len(text) + end
        self._file: IO[bytes] = open(path, "wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def append(self, values_S: Tensor) -> None:
        """Write the next elements, in the dtype that the header names."""
        self._file.write(values_S.contiguous().view(torch.uint8).numpy().data)

    def close(self) -> None:
        """Close the file, complete or not."""
        self._file.close()

    def check(self) -> None:
        """Refuse a closed file that holds more or less than its header says.

        Raises:
            ModelError: It does.
        """
        written = os.path.getsize(self.path)
        if written != self.nbytes:
            raise ModelError(f"{self.path} has {written} bytes; expected {self.nbytes}.")

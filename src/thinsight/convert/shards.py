"""Writes tensors into safetensors files of bounded size, with the index that transformers reads.

Shapes and dtypes are known beforehand, so every file's header and name are settled before its first tensor
arrives, each tensor is written when it comes, and no more than one is in memory. Knows nothing about where
the tensors come from.

Format: github.com/huggingface/safetensors, README: an 8-byte length, a JSON header, then the tensors' bytes.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPE_BYTES", "TensorSpec", "plan_shards", "write_shards"]

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one number, by safetensors' name of the dtype: the floating-point ones that checkpoints use."""


@dataclass(frozen=True)
class TensorSpec:
    """What a safetensors header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # a key of DTYPE_BYTES

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Tensor names per file, in the order given; a tensor larger than the bound gets a file of its own.

    Args:
        sizes: bytes of every tensor, in the order in which they will be written.
        max_bytes: bound on the tensors of one file.
    """
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], specs: Mapping[str, TensorSpec], folder: Path, max_bytes: int
) -> None:
    """Write the tensors, and an index where they take more than one file.

    Args:
        tensors: names and tensors, in the order of ``specs`` and as those say.
        specs: shape and dtype of every tensor.
        folder: where the files go.
        max_bytes: bound on the tensors of one file.
    """
    sizes = {name: spec.nbytes for name, spec in specs.items()}
    shards = plan_shards(sizes, max_bytes)
    incoming = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = _file_name(number, len(shards))
        _write_file(incoming, {name: specs[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def _file_name(number: int, total: int) -> str:
    return "model.safetensors" if total == 1 else f"model-{number + 1:05}-of-{total:05}.safetensors"


def _write_file(incoming: Iterator[tuple[str, Tensor]], specs: Mapping[str, TensorSpec], path: Path) -> None:
    places = _places(specs)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, spec in specs.items():
        start = places[name]
        end = start + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of eight
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for expected in specs:
            name, tensor = next(incoming)
            if name != expected or tuple(tensor.shape) != specs[name].shape:
                raise AssertionError(f"{name} {tuple(tensor.shape)} came instead of {expected}")
            file.seek(8 + len(text) + places[name])
            file.write(_bytes_of(tensor))


def _places(specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Where every tensor begins: wide numbers first, so that all begin at a multiple of their width."""
    places: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: -DTYPE_BYTES[specs[name].dtype]):
        places[name] = end
        end += specs[name].nbytes
    return places


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy())

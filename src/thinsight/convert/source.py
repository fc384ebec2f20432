"""Safetensors files of a checkpoint: opening the original's, and writing the converted one's, tensor by tensor.

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
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BadInput, StorageError, ThinsightError
from ..loading import locate_model
from ..records import read_object

DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Bytes of one number, by safetensors' name of the dtype: the floating-point ones that checkpoints use."""
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class TensorSpec:
    """What a safetensors header says of a tensor."""

    shape: tuple[int, ...]
    dtype: str  # a key of DTYPE_BYTES

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Tensor names per file, in the order of their ``sizes`` in bytes; one larger than the bound has its own file."""
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
    """Write the tensors, which come in the order of ``specs``, and an index where they take more than one file."""
    sizes = {name: spec.nbytes for name, spec in specs.items()}
    shards = plan_shards(sizes, max_bytes)
    incoming = iter(tensors)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = _SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_file(incoming, {name: specs[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_file(incoming: Iterator[tuple[str, Tensor]], specs: Mapping[str, TensorSpec], path: Path) -> None:
    places: dict[str, int] = {}  # wide numbers first, so that all begin at a multiple of their width
    end = 0
    for name in sorted(specs, key=lambda name: -DTYPE_BYTES[specs[name].dtype]):
        places[name], end = end, end + specs[name].nbytes
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, spec in specs.items():
        offsets = [places[name], places[name] + spec.nbytes]
        header[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of eight
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for expected in specs:
            name, tensor = next(incoming)
            if name != expected or tuple(tensor.shape) != specs[name].shape:
                raise AssertionError(f"{name} {tuple(tensor.shape)} came instead of {expected}")
            file.seek(8 + len(text) + places[name])
            file.write(memoryview(tensor.contiguous().flatten().view(torch.uint8).numpy()))


_WANTED_FILES = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt")
_READ_ERRORS = (SafetensorError, OSError, RuntimeError)  # the last: a file that cannot be mapped


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint: the file that holds it, and what that file's header says of it."""

    file: str
    spec: TensorSpec


@dataclass(frozen=True)
class Source:
    """An original checkpoint on this machine."""

    name: str  # as the caller gave it
    folder: Path
    config: dict[str, Any]  # config.json
    tensors: dict[str, StoredTensor]  # in the order in which `read` yields them

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, shard by shard and one at a time; StorageError where a file broke since its header was read."""
        for file in dict.fromkeys(tensor.file for tensor in self.tensors.values()):
            names = [name for name, tensor in self.tensors.items() if tensor.file == file]
            try:
                with safe_open(str(self.folder / file), framework="pt") as shard:
                    for name in names:
                        yield name, shard.get_tensor(name)
            except _READ_ERRORS as error:
                raise _unreadable(self.name, file, error) from error


def open_source(name: str | Path) -> Source:
    """Open a folder, or download a hub repository's weights, configs and tokenizer files and open those. Refused:
    weights that are missing, pickled, quantized or broken; a shard that the index names and the folder lacks."""
    where, local = locate_model(name)
    folder, name = Path(where) if local else _download(where), str(name)
    config = read_json(folder / "config.json")
    tensors: dict[str, StoredTensor] = {}
    for file in _shard_files(folder, name):
        for key, tensor in _read_header(folder, file, name):
            if key in tensors:
                raise BadInput(f"model {name!r} has {key} twice, in {tensors[key].file} and in {file}")
            tensors[key] = tensor
    return Source(name, folder, config, tensors)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object; refused if the file is missing or holds something else."""
    return read_object(path, "download the checkpoint anew")


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(_WANTED_FILES)))
    except Exception as error:  # every transport has its own kinds: httpx, requests, OSError ...
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise StorageError(
            f"model {repo_id!r} could not be downloaded ({reason}): check the network and the disk, and run "
            "the same command again; what has arrived is kept"
        ) from error


def _shard_files(folder: Path, name: str) -> list[str]:
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadInput(f"{folder / _INDEX} has no weight_map: download the checkpoint anew")
        for file in (files := sorted({str(file) for file in weight_map.values()})):
            if Path(file).name != file:
                raise BadInput(f"{_INDEX} names {file!r}, which is not a file of the checkpoint's folder")
            if not (folder / file).is_file():
                raise BadInput(f"model {name!r} lacks {file}, which {_INDEX} names: download the checkpoint anew")
        return files
    if (folder / _SINGLE).is_file():
        return [_SINGLE]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise BadInput(
            f"model {name!r} has its weights as pickles (.bin), which may run code when read: use a copy "
            "with safetensors, or save one from an environment that you trust"
        )
    raise BadInput(f"model {name!r} has neither {_INDEX} nor {_SINGLE}: download the checkpoint anew")


def _read_header(folder: Path, file: str, name: str) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(str(folder / file), framework="pt") as shard:
            for key in sorted(shard.keys()):
                view = shard.get_slice(key)
                dtype = str(view.get_dtype())
                if dtype not in DTYPE_BYTES:
                    raise BadInput(
                        f"model {name!r} stores {key} as {dtype}, so it is quantized: convert the original "
                        "floating-point checkpoint"
                    )
                yield key, StoredTensor(file, TensorSpec(tuple(view.get_shape()), dtype))
    except _READ_ERRORS as error:
        raise _unreadable(name, file, error) from error


def _unreadable(name: str, file: str, error: Exception) -> ThinsightError:
    return StorageError(f"model {name!r}: {file} cannot be read ({error}): download it anew")

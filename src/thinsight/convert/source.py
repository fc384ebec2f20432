"""The original checkpoint: where it lies, what its JSON files say, and which tensors its headers list.

Knows safetensors headers and the hub's download. Knows nothing about what a tensor means or becomes, reads no
tensor's values, and neither downloads nor runs any of the checkpoint's code.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import BadInput, StorageError, ThinsightError
from ..loading import locate_model
from ..records import read_object
from .shards import DTYPE_BYTES, TensorSpec

__all__ = ["Source", "StoredTensor", "open_source", "read_json"]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
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
        """Every tensor, shard by shard and one at a time, so that only one is in memory.

        Raises:
            ThinsightError: a file changed or broke since its header was read.
        """
        for file in dict.fromkeys(tensor.file for tensor in self.tensors.values()):
            names = [name for name, tensor in self.tensors.items() if tensor.file == file]
            try:
                with safe_open(str(self.folder / file), framework="pt") as shard:
                    for name in names:
                        yield name, shard.get_tensor(name)
            except _READ_ERRORS as error:
                raise _unreadable(self.name, file, error) from error


def open_source(name: str | Path) -> Source:
    """Open a folder, or download a hub repository's weights, configs and tokenizer files and open those.

    Raises:
        ThinsightError: neither a folder nor a reachable hub id; weights that are missing, pickled, quantized
            or broken; a shard that the index names and the folder lacks.
    """
    where, local = locate_model(name)
    folder = Path(where) if local else _download(where)
    config = read_json(folder / "config.json")
    return Source(str(name), folder, config, _read_headers(folder, str(name)))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        ThinsightError: the file is missing, is not JSON, or is not an object.
    """
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


def _read_headers(folder: Path, name: str) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in _shard_files(folder, name):
        for key, tensor in _read_header(folder, file, name):
            if key in tensors:
                raise BadInput(f"model {name!r} has {key} twice, in {tensors[key].file} and in {file}")
            tensors[key] = tensor
    return tensors


def _shard_files(folder: Path, name: str) -> list[str]:
    if (folder / _INDEX).is_file():
        weight_map = read_json(folder / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadInput(f"{folder / _INDEX} has no weight_map: download the checkpoint anew")
        files = sorted({str(file) for file in weight_map.values()})
        for file in files:
            if Path(file).name != file:
                raise BadInput(f"{_INDEX} names {file!r}, which is not a file of the checkpoint's folder")
            if not (folder / file).is_file():
                raise BadInput(
                    f"model {name!r} lacks {file}, which {_INDEX} names: download the checkpoint anew"
                )
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

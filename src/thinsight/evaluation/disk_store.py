"""A folder that keeps results from one run to the next: tensors as safetensors, other values as JSON.

Files appear whole or not at all, so several processes may share the folder. A file is only ever a copy of
what can be computed: one that is damaged is passed over, and a disk that is full ends the keeping, each with
a warning. Knows nothing about what is kept, nor what a name means.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from ..errors import BadInput, StorageError
from ..records import probe, replace_file, user_path

__all__ = ["DiskStore"]

T = TypeVar("T")


class DiskStore:
    """Keeps what is put under a name until somebody deletes the file.

    Args:
        cache_dir: the folder; it is made where needed.

    Raises:
        ThinsightError: ``cache_dir`` is no path, or not a folder that can be written.
    """

    def __init__(self, cache_dir: str | os.PathLike[str]) -> None:
        if not isinstance(cache_dir, (str, os.PathLike)) or not os.fspath(cache_dir):
            raise BadInput(f"cache_dir is {cache_dir!r}: give the path of a folder")
        self._folder = user_path(cache_dir, "cache_dir")
        self._writable = True
        try:
            probe(self._folder)
        except OSError as error:
            raise StorageError(
                f"cache_dir {self._folder} cannot be written ({error.strerror or error}): "
                "give a folder you may write"
            ) from None

    def tensors(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """What `keep_tensors` kept: tensors on the CPU, and the value about them. None: nothing usable."""
        return self._read(f"{name}.safetensors", _parse_tensors)

    def keep_tensors(self, name: str, tensors: Mapping[str, Tensor], about: Any) -> None:
        """Keep tensors on the CPU that share no memory, and a JSON value about them."""
        said = json.dumps(about)
        metadata = {"about": said, "sha256": _hash_tensors(tensors, said)}
        self._keep(f"{name}.safetensors", save(dict(tensors), metadata))

    def value(self, name: str) -> Any | None:
        """What `keep_value` kept. None: nothing usable."""
        return self._read(f"{name}.json", _parse_value)

    def keep_value(self, name: str, value: Any) -> None:
        """Keep a JSON value other than None; floating point numbers come back to the bit."""
        self._keep(f"{name}.json", json.dumps({"sha256": _hash_value(value), "value": value}).encode())

    def _read(self, file: str, parse: Callable[[bytes], T]) -> T | None:
        path = self._folder / file
        try:
            return parse(path.read_bytes())
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            warnings.warn(f"{path} cannot be used ({reason}): what it held is computed again", stacklevel=3)
            return None

    def _keep(self, file: str, data: bytes) -> None:
        if not self._writable:
            return
        try:
            replace_file(self._folder / file, data, durable=False)  # one that is lost is computed again
        except OSError as error:
            self._writable = False
            warnings.warn(
                f"cache_dir {self._folder} cannot be written any more ({error.strerror or error}): "
                "nothing further is kept there",
                stacklevel=3,
            )


def _parse_tensors(data: bytes) -> tuple[dict[str, Tensor], Any]:
    tensors = load(data)
    header = 8 + int.from_bytes(data[:8], "little")  # safetensors: eight bytes of length, then JSON
    metadata = json.loads(data[8:header])["__metadata__"]
    _check(metadata["sha256"], _hash_tensors(tensors, metadata["about"]))
    return tensors, json.loads(metadata["about"])


def _parse_value(data: bytes) -> Any:
    held = json.loads(data)
    _check(held["sha256"], _hash_value(held["value"]))
    return held["value"]


def _check(expected: str, found: str) -> None:
    if expected != found:
        raise ValueError("its checksum differs")


def _hash_tensors(tensors: Mapping[str, Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_value(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

"""Where tensors wait: main memory, temporary files behind it, and a folder that later runs read.

Knows nothing about what the tensors are, or about models.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from ..errors import BadInput, StorageError
from ..records import probe, replace_file, user_path

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
                f"cache_dir {self._folder} cannot be written ({error.strerror or error}): give a folder you may write"
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


DEFAULT_CACHE_GIB = 4.0


class Stored(Protocol):
    """What can be kept: a value whose numbers are tensors with names."""

    @property
    def num_bytes(self) -> int:
        """Size of the numbers."""

    def mapped(self, function: Callable[[str, Tensor], Tensor]) -> Any:
        """The value with every tensor replaced by ``function(name, tensor)``; names are unique."""

    def to(self, device: str) -> Any:
        """The value on another device."""


S = TypeVar("S", bound=Stored)


@dataclass(frozen=True)
class _Filed(Generic[S]):
    """An entry whose tensors are in a file."""

    hollow: S  # on the meta device: all but the numbers
    path: Path

    def read(self) -> S:
        tensors = load_file(self.path)
        entry: S = self.hollow.mapped(lambda name, _: tensors[name])
        return entry


class FeatureStore(Generic[S]):
    """What is put first stays in memory: a search reads everything in turn, so nothing is worth evicting.

    Args:
        cache_gib: how much may stay in main memory, in GiB.
        share: of that, how much this store may take.

    Raises:
        ThinsightError: ``cache_gib`` is no number of at least 0.
    """

    def __init__(self, cache_gib: float = DEFAULT_CACHE_GIB, share: float = 1.0) -> None:
        number = isinstance(cache_gib, (int, float)) and not isinstance(cache_gib, bool)
        if not number or not math.isfinite(cache_gib) or cache_gib < 0:
            raise BadInput(f"cache_gib is {cache_gib!r}: it must be a number of at least 0, such as 4")
        self._room = cache_gib * share * 2**30  # bytes
        self._held: dict[Hashable, S] = {}
        self._filed: dict[Hashable, _Filed[S]] = {}
        self._folder: TemporaryDirectory[str] | None = None
        self._files = 0

    def get(self, key: Hashable) -> S | None:
        """The entry on the CPU, or None."""
        if key in self._filed:
            return self._filed[key].read()
        return self._held.get(key)

    def outline(self, key: Hashable) -> S | None:
        """The entry, or None; its numbers may be missing (on the meta device), so that no file is read."""
        return self._filed[key].hollow if key in self._filed else self._held.get(key)

    def put(self, key: Hashable, entry: S) -> None:
        """Keep an entry on the CPU, in place of an earlier one.

        Raises:
            ThinsightError: it has to go into a file, which cannot be written.
        """
        earlier = self._held.pop(key, None)
        self._forget_file(key)
        self._room += earlier.num_bytes if earlier is not None else 0
        if entry.num_bytes <= self._room:
            self._room -= entry.num_bytes
            self._held[key] = entry
        else:
            self._filed[key] = self._file(entry)

    def clear(self) -> None:
        """Forget everything."""
        self._room += sum(entry.num_bytes for entry in self._held.values())
        self._held.clear()
        for key in list(self._filed):
            self._forget_file(key)

    def _forget_file(self, key: Hashable) -> None:
        filed = self._filed.pop(key, None)
        if filed is not None:
            with suppress(OSError):  # where a file in use cannot go, it goes with the folder
                filed.path.unlink()

    def _file(self, entry: S) -> _Filed[S]:
        try:
            if self._folder is None:
                self._folder = TemporaryDirectory(prefix="thinsight-", ignore_cleanup_errors=True)
            # never onto an earlier file, whose tensors may still be in use
            path = Path(self._folder.name) / f"{self._files}.safetensors"
            save_file(separate_tensors(entry), path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"a cache entry of {entry.num_bytes} bytes cannot be written to a temporary file "
                f"({error}): free some space, set TMPDIR to another folder, or raise cache_gib"
            ) from error
        self._files += 1
        return _Filed(entry.to("meta"), path)


def separate_tensors(entry: Stored) -> dict[str, Tensor]:
    """An entry's tensors by name, contiguous and without shared memory, which files cannot hold."""
    tensors: dict[str, Tensor] = {}
    memory: set[int] = set()

    def gather(name: str, tensor: Tensor) -> Tensor:
        own = tensor.untyped_storage().data_ptr() not in memory
        tensors[name] = tensor.contiguous() if own else tensor.clone(memory_format=torch.contiguous_format)
        memory.add(tensors[name].untyped_storage().data_ptr())
        return tensor

    entry.mapped(gather)
    return tensors

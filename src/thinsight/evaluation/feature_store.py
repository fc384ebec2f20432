"""Encoded images, or anything else made of tensors, by key: in main memory up to a bound, beyond it in files.

Files are safetensors in a temporary folder of its own, memory-mapped when they are read, and gone with the
store or with the process. Knows nothing about encoders, prompts or what a key means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, Protocol, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import BadInput, StorageError

__all__ = ["DEFAULT_CACHE_GIB", "FeatureStore", "Stored", "separate_tensors"]

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

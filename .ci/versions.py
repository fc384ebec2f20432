"""Prints the releases that a test run is on; with --newest, also whether there is a newer transformers."""

from __future__ import annotations

import argparse
import platform
import re
import subprocess
import sys
from importlib.metadata import requires, version

from packaging.requirements import Requirement

PACKAGES = (
    "torch",
    "transformers",
    "numpy",
    "optuna",
    "typer",
    "rich",
    "pydantic",
    "pillow",
    "huggingface_hub",
    "peft",
)


def newest(package: str) -> str | None:
    """The newest release that pip can find, or None where it finds none, as without a network."""
    command = [sys.executable, "-m", "pip", "index", "versions", package]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.match(rf"{package} \((\S+)\)", said)
    return None if found is None else found[1]


def allowed(package: str, release: str) -> bool:
    """Whether thinsight may be installed beside a release of a package."""
    stated = [Requirement(each) for each in requires("thinsight") or ()]
    return all(each.specifier.contains(release) for each in stated if each.name == package)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--newest", action="store_true", help="ask the index for a newer transformers")
    asked = parser.parse_args()
    installed = version("transformers")
    print(", ".join([f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in PACKAGES)]))
    latest = newest("transformers") if asked.newest else installed
    if latest is None or latest == installed:
        return
    print(f"warning: the newest transformers on the index is {latest}, not tested yet: ", end="")
    if allowed("transformers", latest):
        print(f"{installed} is installed; remove the environment's folder to get {latest}")
    else:
        print("pyproject.toml stops before it; raise the bound on purpose, and see whether the tests pass")


if __name__ == "__main__":
    main()

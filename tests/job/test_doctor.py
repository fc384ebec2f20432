"""What `thinsight doctor` finds: versions, devices, and what is missing, wrong or broken."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from typer.testing import CliRunner

from thinsight import __version__, loading
from thinsight.cli import app
from thinsight.job import doctor
from thinsight.job.doctor import Package, diagnose

ROOT = Path(__file__).resolve().parents[2]
HERE = {"torch": "2.13.0", "transformers": "5.23.0", "torchvision": "0.28.0", "num2words": "0.5.14", "timm": "1.0.31"}
WANTED = [
    "torch>=2.4",
    "transformers<5.25,>=5.18",
    'torchvision>=0.19; extra == "vision"',
    'ruff>=0.6; extra == "dev"',
    'peft>=0.15; extra == "dev"',
]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The packages that are taken to be installed, to be changed by a test, in place of the real ones."""
    versions = {**HERE, "matplotlib": "3.11.2"}

    def version(name: str) -> str:
        if name in versions:
            return versions[name]
        raise metadata.PackageNotFoundError(name)

    stand_in = SimpleNamespace(
        PackageNotFoundError=metadata.PackageNotFoundError, version=version, requires=lambda _: WANTED
    )
    monkeypatch.setattr(doctor, "metadata", stand_in)
    stock = doctor.import_module
    monkeypatch.setattr(doctor, "import_module", lambda name: None if name == "torchvision" else stock(name))
    return versions


def test_of_this_very_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one, without a network."""

    def refuse(*_: Any) -> None:
        raise AssertionError("doctor asked a network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    result = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert result.exit_code == int(bool(found["problems"]))
    assert found["thinsight"] == __version__
    versions = {package["name"]: package["version"] for package in found["packages"]}
    assert versions["torch"] == metadata.version("torch")
    assert versions["transformers"] == transformers.__version__
    assert {"accelerate", "pillow", "safetensors", "optuna"} <= set(versions)
    assert found["devices"][0].startswith(f"cpu: {torch.get_num_threads()} threads on {os.cpu_count()} cores")
    assert found["attention"]["sdpa"] == found["attention"]["eager"] == ""
    text = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert text.exit_code == result.exit_code
    assert f"torch             {versions['torch']}" in text.stdout
    assert "attention: eager, sdpa" in text.stdout


def test_nothing_is_wrong(installed: dict[str, str]) -> None:
    found = diagnose()
    assert (found.problems, found.missing) == ((), ())
    names = [package.name for package in found.packages]
    assert names == ["torch", "transformers", "torchvision"]  # what is for work on thinsight itself is not shown
    installed["peft"] = "0.21.0"
    assert diagnose().packages[-1] == Package("peft", "0.21.0", extra=None)


@pytest.mark.parametrize(
    ("name", "version", "words"),
    [
        ("transformers", "5.25.0", "transformers is 5.25.0, thinsight was tested with <5.25,>=5.18: pip install"),
        ("transformers", "5.26.0.dev0", "transformers is 5.26.0.dev0, thinsight was tested with"),
        ("transformers", "5.9.1", "transformers is 5.9.1, thinsight was tested with"),
        ("torch", "2.3.1+cpu", "torch is 2.3.1+cpu, thinsight was tested with >=2.4: pip install 'torch>=2.4'"),
        ("torchvision", "0.15.2", "torchvision is 0.15.2, thinsight was tested with >=0.19"),
    ],
)
def test_versions_that_do_not_fit(name: str, version: str, words: str, installed: dict[str, str]) -> None:
    installed[name] = version
    assert [line for line in diagnose().problems if words in line]
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 1
    assert f"problem: {words}" in result.stdout


def test_versions_of_other_builds_fit() -> None:
    assert Package("torch", "2.13.0+cpu", ">=2.4").fits
    assert Package("torch", "2.15.0.dev20261101+cu130", ">=2.4").fits
    assert not Package("torch", "", ">=2.4").fits


@pytest.mark.parametrize("name", ["torch", "transformers"])
def test_a_package_that_every_model_needs_is_missing(name: str, installed: dict[str, str]) -> None:
    del installed[name]
    found = diagnose()
    assert [line for line in found.problems if line.startswith(f"{name} is not installed")]
    assert found.attention == {}
    assert CliRunner().invoke(app, ["doctor"], catch_exceptions=False).exit_code == 1


def test_packages_that_some_models_need_are_missing(installed: dict[str, str]) -> None:
    del installed["torchvision"], installed["num2words"], installed["matplotlib"]
    found = diagnose()
    assert found.problems == ()
    vision, words, figures = found.missing
    for name in ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "InternVL", "SmolVLM", "LLaVA-OneVision"):
        assert name in vision
    assert "LLaVA-1.5" not in vision
    assert "pip install 'thinsight[vision]'" in vision
    assert words.startswith("num2words, for the processors of SmolVLM 1 and 2: pip install")
    assert figures.startswith("matplotlib")
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert result.exit_code == 0
    assert f"not installed: {vision}" in result.stdout


def test_many_families_are_counted(installed: dict[str, str]) -> None:
    del installed["torchvision"]
    (line,) = diagnose().missing
    from thinsight.families import models

    needing = [model.name for model in models() if "torchvision" in model.needs]
    assert f"for the processors of {len(needing)} families, such as Qwen2-VL" in line
    assert len(line) < 300
    assert "`thinsight models` lists all" in line
    told = CliRunner().invoke(app, ["models"], catch_exceptions=False).stdout
    assert all(name in told for name in needing)


def test_extras_stand_with_what_installs_them(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    more = ['ray>=2.50; extra == "ray"', 'lmms-eval<0.8; extra == "lmms-eval"', 'filelock<4; extra == "lmms-eval"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: [*WANTED, *more])
    installed |= {"filelock": "4.2.0"}  # as another package brings it
    found = diagnose()
    assert (found.problems, found.doubts) == ((), ())
    told = CliRunner().invoke(app, ["doctor"], catch_exceptions=False).stdout
    assert re.search(r"^  ray +- +>=2.50 +thinsight\[ray\]$", told, re.M)
    assert re.search(r"^  filelock +4.2.0 +<4 +thinsight\[lmms-eval\]$", told, re.M)
    assert told.endswith("thinsight works here.\n")
    installed["lmms-eval"] = "0.7.3"
    assert diagnose().doubts == ("filelock is 4.2.0, thinsight was tested with <4: pip install 'filelock<4'",)
    result = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    assert "not tried: filelock is 4.2.0" in result.stdout
    assert result.exit_code == 0


def test_the_last_line_fits_what_stands_above_it(installed: dict[str, str]) -> None:
    assert diagnose().verdict == "thinsight works here."
    del installed["timm"]
    assert diagnose().verdict.startswith("thinsight works here. What is not installed concerns the models")
    installed["torch"] = "2.3.1"
    assert diagnose().verdict == ""


def test_every_extra_of_users_is_looked_for() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8").split("[project.optional-dependencies]")[1].split("\n[")[0]
    named = set(re.findall(r"^([a-z0-9-]+) = ", text, re.M))
    assert {*doctor._EXTRAS, "train", "dev"} == named


def test_a_package_of_towers_is_missing(installed: dict[str, str]) -> None:
    del installed["timm"]
    (said,) = diagnose().missing
    assert said == "timm, for the vision towers of FastVLM, Gemma 3n, PerceptionLM: pip install timm"


def test_a_torchvision_for_another_torch_is_told_by_name(tmp_path: Path) -> None:
    """As a process: a package that raises while it is imported, as a real one does beside another torch."""
    (tmp_path / "torchvision").mkdir()
    said = "operator torchvision::nms does not exist"
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise RuntimeError({said!r})\n")
    about = tmp_path / "torchvision-0.28.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "thinsight", *arguments],
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    found = run("doctor")
    assert found.returncode == 1
    words = f"problem: torchvision 0.28.0 does not fit torch {torch.__version__} ({said})"
    assert words in found.stdout
    assert "Traceback" not in found.stderr
    other = run("evaluate")
    assert other.returncode == 2
    last = other.stderr.strip().split("\n")[-1]
    assert last.startswith("error: a package cannot be loaded (")
    assert last.endswith("see `thinsight doctor`")
    assert "Traceback" not in other.stderr


def test_devices_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = SimpleNamespace(name="H200", total_memory=140 * 2**30, major=9, minor=0)
    stand_in = SimpleNamespace(
        get_num_threads=lambda: 3,
        version=SimpleNamespace(cuda="13.0"),
        cuda=SimpleNamespace(is_available=lambda: True, device_count=lambda: 2, get_device_properties=lambda _: gpu),
        backends=SimpleNamespace(mps=SimpleNamespace(is_available=lambda: True)),
    )
    monkeypatch.setattr(loading, "computes_bfloat16", lambda: False)
    cpu, *gpus, mps = doctor._devices(stand_in)
    assert cpu.endswith("bfloat16 not in hardware, float32 is likely faster")
    assert gpus == [f"cuda:{number}: H200, 140 GiB, compute capability 9.0" for number in (0, 1)]
    assert mps.startswith("mps: there is one")
    stand_in.cuda.is_available = lambda: False
    assert list(doctor._devices(stand_in))[1] == "cuda: none found by torch, which is built for CUDA 13.0"


def test_where_thinsight_was_never_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", requires)
    assert {package.extra for package in diagnose().packages} <= {None}


def test_the_extra_brings_what_processors_need() -> None:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    line = next(line for line in text.splitlines() if line.startswith("vision = "))
    names = {Requirement(each.strip(' "')).name for each in line.partition("[")[2].strip("]").split(",")}
    from thinsight.families import models

    assert names == {name for model in models() for name in model.needs}

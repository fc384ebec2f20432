"""A ranker, a metric and a search from a package of somebody else, written as CONTRIBUTING says: installed, named, and
held to the contracts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from small_run import SmallRun

import thinsight

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's folder, installed into an environment of its own, `env` in it, that has all that this one has."""
    folder = tmp_path_factory.mktemp("garden")
    for file, code in re.findall(r"```\w+\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        with (folder / file).open("a", encoding="utf-8") as written:
            written.write(code)
    venv.create(folder / "env", with_pip=False, symlinks=os.name != "nt")
    python = interpreter(folder)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip())
    here = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (packages / "here.pth").write_text("".join(f"import site; site.addsitedir({each!r})\n" for each in here))
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    run([*pip, "--no-index", "--no-build-isolation", "--no-deps", "--editable", str(folder)], folder)
    return folder


def interpreter(folder: Path) -> str:
    return str(folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def run(command: list[str], folder: Path) -> str:
    """What a process prints, which ends well; it has this checkout of thinsight."""
    environment = {**os.environ, "PYTHONPATH": str(Path(thinsight.__file__).parents[1]), "COLUMNS": "120"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def options(small: SmallRun) -> list[str]:
    on_it = ["--model", small.model, "--data", small.calibration, "--test-data", small.test, "--device", "cpu"]
    return [*on_it, "--metric", "first-letter", "--max-new-tokens", "2", "--limit", "8", "--budget", "0.5"]


def test_the_shipped_contracts_run_on_it(garden: Path) -> None:
    told = run([interpreter(garden), "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_garden.py"], garden)
    assert " passed" in told


def test_a_search_takes_its_search_ranker_and_metric(garden: Path, small: SmallRun) -> None:
    command = [interpreter(garden), "-m", "thinsight", "search", *options(small), "--out", "found"]
    told = run([*command, "--method", "steps", "--ranker", "corner:weight=0.5", "--n-trials", "3"], garden)
    assert "Steps of a garden" in told
    found = json.loads((garden / "found" / "reduction_config.json").read_text())
    assert found["ranker"] == {"name": "corner", "weight": 0.5}
    assert found["search"]["method"] == "steps"
    assert found["search"]["evaluations"] == 3
    assert "first-letter" in (garden / "found" / "report.html").read_text()


def test_a_comparison_takes_its_search(garden: Path, small: SmallRun) -> None:
    command = [interpreter(garden), "-m", "thinsight", "compare", *options(small), "--out", "compared"]
    told = run([*command, "--methods", "search-steps,random", "--ranker", "corner", "--n-trials", "3"], garden)
    assert "Steps of a garden" in told
    runs = json.loads((garden / "compared" / "comparison.json").read_text())["runs"]
    assert {each["method"]: each["ranker"]["name"] for each in runs} == {"steps": "corner", "random": "random"}

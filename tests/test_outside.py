"""A ranker, a metric and a search from a package of somebody else: installed, named, and held to the contracts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from small_run import SmallRun, make_small_run

import thinsight

PROJECT = """
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "garden"
version = "1.0"

[project.entry-points."thinsight.rankers"]
corner = "garden:Corner"

[project.entry-points."thinsight.metrics"]
first-letter = "garden:FIRST_LETTER"

[project.entry-points."thinsight.searches"]
steps = "garden:STEPS"

[tool.setuptools]
py-modules = ["garden"]
"""

MODULE = '''
from thinsight import Metric, Ranker, Schedule, Search
from thinsight.budget import fit
from thinsight.searches.run import Run, check_count


class Corner(Ranker):
    """The tokens nearest to the corner of the image."""

    name = "corner"

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.weight = weight

    def score(self, context):
        return -self.weight * context.index.float()


def first_letter(prediction, answers):
    return float(prediction[:1] in {answer[:1] for answer in answers})


FIRST_LETTER = Metric("first-letter", first_letter, needs_answers=False)


def steps(evaluator, budget, *, n_trials=4, seed=0, study=None, resume=False, observer=None):
    """One step at each of the first layers."""
    check_count(n_trials, "n_trials", 1)
    first, layers = evaluator.first_layer, budget.num_layers
    settings = {"method": "steps", "n_trials": n_trials, "seed": seed, "first_layer": first}
    run = Run(evaluator, settings, budget=budget, expected=n_trials, study=study, resume=resume, observer=observer)
    trials = []
    for layer in range(first, layers):
        step = Schedule.step(layers, layer, 0.0)
        if len(trials) < n_trials and budget.holds(step):
            rate = fit(budget, lambda rate: Schedule.step(layers, layer, rate), 0.0, 1.0, "steps")
            trials.append(run.run(rate, f"step at {layer}"))
    return run.finish_with(max(trials, key=lambda trial: trial.merit))


STEPS = Search("steps", steps, "Steps of a garden")
'''

TESTS = """
import pytest
from garden import FIRST_LETTER, STEPS, Corner
from thinsight.testing import MetricContract, RankerContract, SearchContract


class TestCorner(RankerContract):
    @pytest.fixture
    def ranker(self):
        return Corner(weight=0.5)


class TestFirstLetter(MetricContract):
    @pytest.fixture
    def metric(self):
        return FIRST_LETTER


class TestSteps(SearchContract):
    @pytest.fixture
    def search(self):
        return STEPS
"""


@pytest.fixture(scope="module")
def garden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's folder, installed into an environment of its own, `env` in it, that has all that this one has."""
    folder = tmp_path_factory.mktemp("garden")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "garden.py").write_text(MODULE)
    (folder / "test_garden.py").write_text(TESTS)
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


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    return make_small_run(tmp_path_factory.mktemp("small"))


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

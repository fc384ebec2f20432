"""docs/tutorial.md, walked: its commands in their order, and its Python, on the demo.

What the page names lies under that name where it is walked: the demo is the checkpoint llava-hf/llava-1.5-7b-hf, the
first of its questions are the parquet files textvqa and the table pope.tsv, one of its images is photo.jpg. So lines
run as they stand there, but for these substitutions.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_standin import running
from PIL import Image
from walking import as_textvqa, blocks, demo_questions, environment, lines, make_checkpoint, write_parquet

import thinsight as ts
from thinsight.cli import app

pytest.importorskip("datasets", reason="thinsight[datasets] is not installed")

INSTEAD = {
    "--max-drop 0.01 --out": "--max-drop 0.2 --step 36 --batch-size 2 --out",  # what so few questions can certify
    "--out textvqa-quarter": "--n-trials 8 --batch-size 2 --out textvqa-quarter",
    "--out textvqa-compare": "--methods search-random,fastv --n-trials 1 --out textvqa-compare",  # two of all
    "--batch-size 1": "--batch-size 1 --runs 1",
    'device_map="cuda"': 'device_map="cpu"',
}
ELSEWHERE = {"pip": "installs", "vllm": "is run by make test-vllm"}

PAGE = "docs/tutorial.md"
MODEL = "llava-hf/llava-1.5-7b-hf"
QUESTIONS = 32
YES_NO = 8
STEPS = "doctor check analyze data plan search search compare evaluate bench show push"


def substituted(block: str) -> str:
    for here, there in INSTEAD.items():
        block = block.replace(here, there)
    return block


def commands() -> list[list[str]]:
    """The words of the page's commands, as they are run here."""
    found = []
    for line in (line for block in blocks(PAGE) for line in lines(block)):
        program, *words = shlex.split(substituted(line))
        if program == "thinsight":
            found.append(words)
        else:
            assert program in ELSEWHERE
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, in which this process is, with all that the page names."""
    make_checkpoint(tmp_path / MODEL)
    questions = demo_questions(QUESTIONS)
    write_parquet(tmp_path / "textvqa", [as_textvqa(each) for each in questions])
    table = ["index\timage_path\tquestion\tanswer\tcategory"]
    for row, each in enumerate(questions[:YES_NO]):
        table.append(f"{row}\t{each['path']}\t{each['question']}\t{('yes', 'no')[row % 2]}\trandom")
    (tmp_path / "pope.tsv").write_text("\n".join(table) + "\n", encoding="utf-8")
    with Image.open(questions[0]["path"]) as image:
        image.convert("RGB").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THINSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


def push(words: list[str], place: Path) -> dict[str, bytes]:
    """What arrives at the Hub, whose address a process reads once: so in one of its own."""
    with running() as hub:
        command = [sys.executable, "-m", "thinsight", *words]
        names = environment(hub, place / "home")
        done = subprocess.run(command, env=names, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        files: dict[str, bytes] = hub.repos[words[-1]]
        return files


def run_python() -> dict[str, Any]:
    """The names of the page's Python, once it has run."""
    (code,) = blocks(PAGE, "python")
    used: dict[str, Any] = {}
    exec(substituted(code), used)
    return used


def test_every_substitution_is_of_something_on_the_page() -> None:
    page = " ".join(line for language in ("sh", "python") for block in blocks(PAGE, language) for line in lines(block))
    assert [text for text in INSTEAD if text not in page] == []


def test_the_tutorial_is_walked(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = commands()
    assert [words[0] for words in asked] == STEPS.split()
    told: dict[str, str] = {}
    for words in asked:
        if words[0] == "push":
            pushed = push(words, place)
            continue
        with pytest.raises(SystemExit) as ended:
            app(words)
        out = capsys.readouterr()
        assert ended.value.code == 0, (words, out)
        told[words[0]] = out.out
    assert re.search(rf"questions +{QUESTIONS}\b", told["data"])
    assert "F1" in told["evaluate"]
    assert "Picture:" in told["show"]
    reduction = ts.Reduction.from_pretrained("textvqa-reduction")
    assert reduction.certificate is not None
    assert reduction.certificate.schedule is not None  # something was certified
    assert not reduction.schedule.is_full
    assert ts.Reduction.from_pretrained("textvqa-quarter").schedule.mean_keep_rate <= 0.25
    for file in ("analysis.html", "textvqa-reduction/report.html", "kept.png", "textvqa-compare/comparison.csv"):
        assert (place / file).stat().st_size > 0
    card = yaml.safe_load(pushed["README.md"].decode().split("---\n")[1])
    assert card["pipeline_tag"] == "image-text-to-text"
    assert str(place) not in pushed["README.md"].decode() + pushed["reduction_config.json"].decode()
    used = run_python()
    assert used["output"].shape[0] == 1
    assert used["output"].shape[1] > used["inputs"]["input_ids"].shape[1]
    assert capsys.readouterr().out.strip()  # an answer

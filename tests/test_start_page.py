"""docs/start.md, walked: its commands run as they stand there, on the demo as a user's checkpoint and parquet files."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hub_standin import running
from walking import as_textvqa, blocks, demo_questions, environment, image_of, make_checkpoint, write_parquet

from thinsight import Reduction

for package, extra in (("datasets", "datasets"), ("starlette", "serve"), ("uvicorn", "serve")):
    pytest.importorskip(package, reason=f"thinsight[{extra}] is not installed")

QUESTIONS = 48
YES_NO = 8
REPO = "someone/llava-reduction"


def with_values(block: str, values: dict[str, str]) -> str:
    """The block at the page's head, with other values; the page has these variables and no others."""
    assert re.findall(r"^(\w+)=", block, re.MULTILINE) == list(values)
    return "".join(f"{name}={value}\n" for name, value in values.items())


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a checkpoint, data, two benchmarks, and the command `thinsight`."""
    make_checkpoint(tmp_path / "llava-1.5-7b-hf")
    questions = demo_questions(QUESTIONS)
    rows = [{"img": image_of(each), "q": each["question"], "a": each["answer"]} for each in questions]
    write_parquet(tmp_path / "my-data", rows)
    asked = [as_textvqa(each) for each in questions[:YES_NO]]
    write_parquet(tmp_path / "textvqa", asked)
    write_parquet(tmp_path / "pope", [{**row, "answers": [("yes", "no")[i % 2]]} for i, row in enumerate(asked)])
    command = tmp_path / "bin" / "thinsight"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m thinsight "$@"\n')
    command.chmod(0o755)
    return tmp_path


@pytest.mark.skipif(os.name == "nt", reason="the page is for a POSIX shell")
def test_the_page_is_walked(place: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    install, head, *steps = blocks("docs/start.md")
    assert install.startswith("pip install 'thinsight[")
    values = {
        "MODEL": "llava-1.5-7b-hf",
        "DATA": "my-data",
        "FIELDS": "image=img,question=q,answers=a",
        "MAX_DROP": "0.2",
        "LIMIT": "36",
        "BENCHMARKS": "textvqa=textvqa,pope=pope",
        "REPO": REPO,
        "PORT": str(port),
    }
    script = "set -e\n" + with_values(head, values) + "".join(f"echo '== {i}'\n{each}" for i, each in enumerate(steps))
    with running() as hub:
        names = {**environment(hub, place / "home"), "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], cwd=place, env=names, capture_output=True, text=True, check=False)
        print(done.stdout)  # shown where what follows fails
        assert done.returncode == 0, done.stderr
        assert sorted(hub.repos[REPO]) == ["README.md", "reduction_config.json"]
    looked, searched, measured, pushed, served = re.split(r"^== \d\n", done.stdout, flags=re.MULTILINE)[1:]
    certificate = Reduction.from_pretrained(place / "reduction").certificate
    assert certificate is not None
    assert certificate.schedule is not None  # something was certified
    assert (place / "reduction" / "report.html").is_file()
    assert re.search(rf"questions +{QUESTIONS}\b", looked)
    assert "At most 20 points of the score are lost on data like these, with 95 % confidence" in searched
    assert "TextVQA" in measured
    assert "F1" in measured
    assert "Decoder FLOPs of the median prompt" in measured
    assert f"Pushed: {hub.url}/{REPO}/commit/" in pushed
    assert "model llava" in served
    assert "drop" in served

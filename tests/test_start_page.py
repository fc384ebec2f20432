"""docs/start.md, walked: its commands run as they stand there, on the demo as a user's checkpoint and parquet files."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hub_standin import TOKEN, running

import thinsight
from thinsight import Reduction, loading

for package, extra in (("datasets", "datasets"), ("starlette", "serve"), ("uvicorn", "serve")):
    pytest.importorskip(package, reason=f"thinsight[{extra}] is not installed")

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path(thinsight.__file__).parent / "demo"
QUESTIONS = 48
YES_NO = 8
REPO = "someone/llava-reduction"


def blocks() -> list[str]:
    """The page's commands, without those that install."""
    found = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "start.md").read_text(encoding="utf-8"), re.DOTALL)
    install, *rest = found
    assert install.startswith("pip install 'thinsight[")
    return rest


def with_values(block: str, values: dict[str, str]) -> str:
    """The block at the page's head, with other values; the page has these variables and no others."""
    assert re.findall(r"^(\w+)=", block, re.MULTILINE) == list(values)
    return "".join(f"{name}={value}\n" for name, value in values.items())


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Two files with images inside."""
    from pyarrow import Table, parquet

    folder.mkdir()
    for part in range(2):
        parquet.write_table(Table.from_pylist(rows[part::2]), folder / f"part-{part}.parquet")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a checkpoint, data, two benchmarks, and the command `thinsight`."""
    shutil.copytree(loading.DEMOS["demo"], tmp_path / "llava-1.5-7b-hf")
    lines = (DEMO / "test.jsonl").read_text(encoding="utf-8").splitlines()[:QUESTIONS]
    examples = [json.loads(line) for line in lines]
    images = [{"bytes": (DEMO / each["image"]).read_bytes(), "path": None} for each in examples]
    pairs = list(zip(examples, images, strict=True))
    write_parquet(tmp_path / "my-data", [{"img": image, "q": e["question"], "a": e["answer"]} for e, image in pairs])
    asked = [
        {"image": image, "question": e["question"], "answers": [e["answer"]] * 10, "question_id": e["id"]}
        for e, image in pairs[:YES_NO]
    ]
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
    head, *steps = blocks()
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
    source = str(Path(thinsight.__file__).parents[1])
    with running() as hub:
        names = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "0"}
        environment = {
            **os.environ,
            **names,
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "COLUMNS": "160",
            "PATH": f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
            "CUDA_VISIBLE_DEVICES": "",
        }
        done = subprocess.run(
            ["bash", "-c", script], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
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

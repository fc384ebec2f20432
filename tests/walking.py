"""A page of the docs as commands, and what a user of it has: the demo as a checkpoint, its questions as parquet files.

Knows nothing about which page is walked. Shared by the tests that run the pages' own commands.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from hub_standin import TOKEN, Hub

import thinsight
from thinsight import loading

ROOT = Path(__file__).resolve().parents[1]
DEMO = Path(thinsight.__file__).parent / "demo"


def blocks(page: str, language: str = "sh") -> list[str]:
    """The fenced blocks of a page, named from the repository's root."""
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def lines(block: str) -> list[str]:
    """The commands of a block; those that go on over a line's end are joined."""
    return [line for line in re.sub(r"\\\n\s*", " ", block).splitlines() if line]


def make_checkpoint(folder: Path) -> None:
    """The demo's model, as a user's folder."""
    shutil.copytree(loading.DEMOS["demo"], folder)


def demo_questions(count: int) -> list[dict[str, Any]]:
    """The first ones of the demo's test set: id, image, question, answer, and the image's path."""
    written = (DEMO / "test.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [{**(each := json.loads(line)), "path": DEMO / each["image"]} for line in written]


def image_of(question: dict[str, Any]) -> dict[str, Any]:
    """Its image as `datasets` stores one in a table."""
    return {"bytes": question["path"].read_bytes(), "path": None}


def as_textvqa(question: dict[str, Any]) -> dict[str, Any]:
    """In the columns of TextVQA, all of whose ten people answer alike."""
    rest = {"question_id": question["id"], "question": question["question"], "answers": [question["answer"]] * 10}
    return {"image": image_of(question), **rest}


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Two files with images inside."""
    from pyarrow import Table, parquet

    folder.mkdir()
    for part in range(2):
        parquet.write_table(Table.from_pylist(rows[part::2]), folder / f"part-{part}.parquet")


def environment(hub: Hub, home: Path) -> dict[str, str]:
    """Of a process that runs this thinsight, whose Hub is a stand-in."""
    source = str(Path(thinsight.__file__).parents[1])
    return {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "COLUMNS": "160",
        "PYTHONPATH": os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH")))),
        "CUDA_VISIBLE_DEVICES": "",
    }

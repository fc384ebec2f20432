"""Offline answers on two nodes: each question once, whatever is killed; Ray Data with the class for it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet
import pytest
import ray
from drivers import Driver, left, lines, workers_of

import thinsight as ts
from thinsight.job.answering import answer
from thinsight.job.options import AnswerOptions

COUNT = 48
SETTINGS = {"limit": COUNT, "batch_size": 2, "max_new_tokens": 8, "kept": True}


@pytest.fixture(scope="module")
def reduction(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reduction")
    ts.Reduction(ts.Schedule.step(12, 2, 0.5)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected(reduction: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("alone") / "a.jsonl"
    answer(AnswerOptions(out=out, reduction=reduction, **SETTINGS))
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_driver_that_is_interrupted_and_killed_answers_each_once(
    address: str, reduction: str, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    """And one of its workers is killed at the end."""
    out = tmp_path / "a.parquet"
    journal = out.with_name("a.parquet.part.jsonl")
    settings = ["--limit", str(COUNT), "--batch-size", "2", "--max-new-tokens", "8", "--kept", "--reduction", reduction]

    def begun() -> Driver:
        return Driver("answer", *settings, "--workers", "2", "--ray", address, "--out", str(out))

    for end, code in ((Driver.interrupt, 130), (Driver.terminate, 143), (Driver.kill, -signal.SIGKILL)):
        before = lines(journal)
        driver = begun()
        driver.wait_for(lambda before=before: lines(journal) > max(1, before))  # the first line says what of
        workers = actors()
        assert end(driver)[0] == code
        assert not left(workers)
        assert 1 < lines(journal) < 1 + COUNT // 2
    before = lines(journal)
    driver = begun()
    driver.wait_for(lambda: lines(journal) > before)
    actors()[0].kill()
    assert driver.end(300)[0] == 0
    rows = pyarrow.parquet.read_table(out).to_pylist()
    assert [{**row, "kept": json.loads(row["kept"])} for row in rows] == expected
    assert len({row["id"] for row in rows}) == len(rows) == COUNT
    assert not journal.exists()


def actors() -> list[psutil.Process]:
    """Processes of workers, whichever node began them."""
    found = workers_of(psutil.process_iter())
    assert len(found) == 2
    return found


@pytest.fixture
def connected(address: str) -> Iterator[None]:
    ray.init(address=address, log_to_driver=False, logging_level="error")
    yield
    ray.shutdown()


def test_ray_data_gives_what_the_command_gives(
    connected: None, reduction: str, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    examples = ts.load_examples("demo:test", COUNT)
    rows = [{"id": each.id, "question": each.question, "image": str(each.images[0])} for each in examples]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"model": "demo", "reduction": reduction, "max_new_tokens": 8, "kept": True}
    data = ray.data.read_json(str(questions), override_num_blocks=4).map_batches(
        ts.Answerer, fn_constructor_kwargs=told, batch_size=2, concurrency=2, num_cpus=0
    )
    found = {row["id"]: row for row in data.take_all()}
    assert sorted(found) == sorted(row["id"] for row in expected)
    for row in expected:
        assert found[row["id"]]["answer"] == row["answer"]
        assert json.loads(found[row["id"]]["kept"]) == row["kept"]

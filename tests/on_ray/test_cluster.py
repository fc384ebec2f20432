"""Workers on a real Ray of two nodes on this machine, with token authentication: `make test-ray`."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import thinsight as ts
from thinsight.job.answering import answer
from thinsight.job.options import AnswerOptions, SearchOptions
from thinsight.job.pipeline import search_and_report

os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # read when Ray is loaded
ray = pytest.importorskip("ray")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")
pytest.importorskip("ray.data")

SECONDS = 30  # of patience, for a slow machine; an idle one takes three


def demo() -> Any:
    return ts.Evaluator(*ts.load_demo(), ts.load_examples("demo:calibration", 32), batch_size=4)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # this file is not on the workers' path
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def test_two_nodes_find_what_one_device_finds_though_both_workers_are_killed(address: str) -> None:
    said: list[str] = []
    ids: list[int] = []

    def note(text: str) -> None:  # when the first one is missed, the second one goes
        said.append(text)
        if ids:
            os.kill(ids.pop(), signal.SIGKILL)

    with ts.Pool(demo, 2, address=address, note=note) as pool:
        assert pool.full_score > 0
        actors = pool._shared.dispatcher.transport._actors
        ids += [ray.get(each.__ray_call__.remote(lambda self: os.getpid())) for each in actors.values()]
        nodes = {each["NodeID"] for each in ray.nodes() if each["Alive"]}
        assert len(nodes) == len(set(ids)) == 2
        os.kill(ids.pop(0), signal.SIGKILL)
        found = ts.gsearch(pool, 0.02, step=32)
    assert said == [f"worker {number} is lost, another one begins in its place" for number in (1, 2)]
    assert found.reduction == ts.gsearch(demo(), 0.02, step=32).reduction


def test_search_on_two_workers_writes_the_reduction_of_one(address: str, tmp_path: Path) -> None:
    def searched(name: str, **given: Any) -> ts.Reduction:
        options = SearchOptions(limit=24, max_drop=0.05, step=64, no_certify=True, out=tmp_path / name, **given)
        return ts.Reduction.from_pretrained(search_and_report(options).folder)

    together, alone = searched("two", workers=2, ray=address), searched("one", workers=1)
    assert not alone.schedule.is_full
    assert together == alone


def test_a_driver_that_is_interrupted_and_then_killed_goes_on(address: str, tmp_path: Path) -> None:
    """Ctrl-C ends it and its workers within seconds; no answer is lost or written twice."""
    given = ["--limit", "48", "--batch-size", "2", "--max-new-tokens", "8", "--out"]
    command = [sys.executable, "-m", "thinsight", "answer", "--workers", "2", "--ray", address, *given]
    out = tmp_path / "a.parquet"
    for sign, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        before = kept(out)
        driver = subprocess.Popen([*command, str(out)], stderr=subprocess.PIPE, text=True)
        until(lambda before=before: kept(out) > before, driver)
        driver.send_signal(sign)
        assert driver.wait(SECONDS) == code
        assert 0 < kept(out) < 24
    assert subprocess.run([*command, str(out)], check=True, timeout=10 * SECONDS).returncode == 0
    done = answer(AnswerOptions(limit=48, batch_size=2, max_new_tokens=8, out=tmp_path / "b.jsonl"))
    rows = [json.loads(line) for line in done.path.read_text().splitlines()]
    assert pyarrow.parquet.read_table(out).to_pylist() == rows
    assert len({row["id"] for row in rows}) == len(rows) == 48


def kept(out: Path) -> int:
    """Batches of answers that are on disk."""
    journal = out.with_name(f"{out.name}.part.jsonl")
    return max(0, journal.read_text().count("\n") - 1) if journal.exists() else 0


def until(true: Callable[[], bool], driver: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 10 * SECONDS
    while not true():
        assert driver.poll() is None, driver.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


def test_ray_data_answers_with_its_class(address: str, tmp_path: Path) -> None:
    ts.Reduction(ts.Schedule.step(12, 2, 0.5)).save_pretrained(tmp_path)
    examples = ts.load_examples("demo:test", 8)
    rows = [{"id": each.id, "question": each.question, "image": str(each.images[0])} for each in examples]
    answerer = {"model": "demo", "reduction": str(tmp_path), "max_new_tokens": 8}
    data = ray.data.from_items(rows).map_batches(
        ts.Answerer, fn_constructor_kwargs=answerer, batch_size=8, concurrency=1
    )
    found = {row["id"]: row["answer"] for row in data.take_all()}
    expected = ts.Answerer(**answerer).answers(examples)
    assert found == {each.id: each.text for each in expected}

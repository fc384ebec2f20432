"""Workers on two nodes: killed, given several devices each, or unable to begin."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import ray
from drivers import SECONDS, Driver

import thinsight as ts
from thinsight.errors import BadInput
from thinsight.evaluation.dispatch import WorkerFailed
from thinsight.evaluation.ray_workers import check_address

ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # this file is not on the workers' path


def demo() -> Any:
    return ts.Evaluator(*ts.load_demo(), ts.load_examples("demo:calibration", 32), batch_size=4)


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


def test_what_a_lost_node_was_doing_is_done_elsewhere(cluster: Any) -> None:
    """Whether Ray notices at once, or when the search has long given its work to others."""
    node = cluster.add_node(num_cpus=1)
    nodes, said = [node], []

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("reduced model") and nodes:  # others are under way
            cluster.remove_node(nodes.pop(), allow_graceful=False)

    with ts.Pool(demo, 3, address=cluster.address, progress=progress, note=said.append) as pool:
        found = ts.gsearch(pool, 0.02, step=32)
        end = time.monotonic() + 4 * SECONDS
        while sum(each["Alive"] for each in ray.nodes()) > 2:
            assert time.monotonic() < end
            time.sleep(0.1)
    assert not nodes
    assert set(said) <= {f"worker {number} is lost, another one begins in its place" for number in (1, 2, 3)}
    assert found.reduction == ts.gsearch(demo(), 0.02, step=32).reduction


def no_model() -> Any:
    return ts.load_model("/no/such/model")


def no_data() -> Any:
    return ts.load_examples("/no/such/questions.jsonl")


def no_memory() -> Any:
    raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("make", "kind", "why"),
    [
        (no_model, BadInput, "worker [12] could not begin: .*/no/such/model"),
        (
            no_data,
            BadInput,
            f"worker [12] could not begin: .*/no/such/questions.jsonl.* \\(on {socket.gethostname()}\\)",
        ),
        (no_memory, WorkerFailed, "worker [12] could not begin: RuntimeError: out of memory"),
    ],
)
def test_a_worker_that_cannot_begin_says_why(
    make: Callable[[], Any], kind: type[Exception], why: str, address: str
) -> None:
    with ts.Pool(make, 2, address=address) as pool, pytest.raises(kind, match=why):
        pool.full_score  # noqa: B018
    assert not ray.is_initialized()


def test_more_workers_than_there_is_room_for_are_refused(address: str) -> None:
    with ts.Pool(demo, 3, address=address) as pool, pytest.raises(ts.Unsupported, match="Ray has 2: give at most 2"):
        pool.workers  # noqa: B018
    with (
        ts.Pool(demo, 1, address=address, gpus_per_worker=2) as pool,
        pytest.raises(ts.Unsupported, match="has 0 GPUs"),
    ):
        pool.workers  # noqa: B018


def test_an_address_where_no_cluster_answers_is_refused_in_seconds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{free.getsockname()[1]}"
    begun = time.monotonic()
    code, said = Driver("search", "--workers", "2", "--ray", where).end()
    assert time.monotonic() - begun < 30  # most of which is spent on loading torch
    assert (code, said.count("\n")) == (2, 1)
    assert f"error: ray is '{where}', and no cluster answers there (Connection refused)" in said


def test_without_its_token_a_cluster_lets_nobody_in(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_address(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(BadInput, match="its token is missing here or is another one"):
        check_address(address)


ALONE = """
import os, psutil, ray, thinsight as ts

class Stub:
    num_layers, num_vision_tokens, full_score = 4, 64, 1.0
    devices = property(lambda self: os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    threads = property(lambda self: os.environ["OMP_NUM_THREADS"])
"""

OWN = (
    ALONE
    + """
with ts.Pool(Stub, 2) as pool, ts.Pool(Stub, 1) as other:
    assert (pool.num_layers, other.num_layers, pool.workers) == (4, 4, 2)
    assert pool._shared.dispatcher.ask("thinsight_look", "threads", None)[1] == str(max(1, os.cpu_count() // 2))
    below = psutil.Process().children(recursive=True)
    heard = [each.laddr.ip for one in below for each in one.net_connections("inet") if each.status == "LISTEN"]
    assert len(heard) > 3
    assert {each.removeprefix("::ffff:") for each in heard} == {"127.0.0.1"}, heard
    assert os.environ["RAY_AUTH_MODE"] == "token"
    other.close()
    assert pool.num_vision_tokens == 64  # which a worker is asked only now
assert not ray.is_initialized()
"""
)

USERS = (
    ALONE
    + """
ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
with ts.Pool(Stub, gpus_per_worker=2) as pool:
    assert pool.workers == 2
    seen = {pool._shared.dispatcher.ask("thinsight_look", "devices", None)[1] for _ in range(4)}
    assert {len(each.split(",")) for each in seen} == {2}, seen
assert ray.is_initialized()
try:
    ts.Pool(Stub, 1, address="127.0.0.1:1").workers
except ts.BadInput as error:
    assert "this process is connected to" in str(error)
else:
    raise AssertionError("another cluster than the one that was asked for")
assert ray.get(ray.remote(num_cpus=0)(lambda: 1).remote()) == 1
"""
)


@pytest.mark.parametrize("script", [OWN, USERS], ids=["its own", "the user's"])
def test_a_ray_on_this_machine(script: str) -> None:
    """Its own one listens on the loopback, asks for a token and ends with the last pool; the user's stays."""
    names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "OMP_NUM_THREADS")
    bare = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", script], env=bare, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_two_commands_at_once_on_one_machine() -> None:
    drivers = [Driver("evaluate", "--limit", "8", "--max-new-tokens", "4", "--workers", "2") for _ in range(2)]
    assert [each.end(300)[0] for each in drivers] == [0, 0]

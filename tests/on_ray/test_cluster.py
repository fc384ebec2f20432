"""Workers on a real Ray of two nodes on this machine, with token authentication: `make test-ray`."""

from __future__ import annotations

import os
import secrets
import signal
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import thinsight as ts

os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # read when Ray is loaded
ray = pytest.importorskip("ray")


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

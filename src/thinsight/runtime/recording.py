"""Ways to record a piece of work on fixed tensors and to run it again, and the check that it can be recorded.

A job takes nothing and reads tensors that keep their place; recorded, it is run again on what they hold then.
Knows nothing about models, caches or reductions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import BadInput

__all__ = ["CudaGraphs", "EagerReplay", "NeverWaiting", "Recorder"]

WARM_UP = 3  # passes before a capture, as torch's documentation asks
T = TypeVar("T")

# what makes the host wait for the device: a number read, or a shape that depends on numbers
_READING = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
_COPYING = {"aten::_to_copy", "aten::copy_"}


class Recorder(Protocol):
    """How jobs are recorded."""

    def record(self, job: Callable[[], T]) -> Callable[[], T]:
        """What runs the job again, on what its tensors hold by then. What it returns may be one object that
        each run overwrites."""


class EagerReplay:
    """No recording: the job itself is called again. Runs on any device and gains no time."""

    def record(self, job: Callable[[], T]) -> Callable[[], T]:
        return job


class CudaGraphs:
    """CUDA graphs, one of its own memory for each job."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def record(self, job: Callable[[], T]) -> Callable[[], T]:
        with torch.cuda.device(self.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    job()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = job()

        def replay() -> T:
            graph.replay()
            return result

        return replay


class NeverWaiting(TorchDispatchMode):
    """Refuses operations that a recording cannot hold: those for which the host waits for the device, and
    those that bring numbers of the host to it.

    Raises:
        ThinsightError: from inside the operation, with its name.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().split(".")[0]
        result = function(*args, **(kwargs or {}))
        if _waits(name, args, result):
            raise BadInput(
                f"a pass cannot be recorded: its ranker or its model waits for the device ({name}); run it "
                "without CapturedPrefill, or rank by text-attention"
            )
        return result


def _waits(name: str, args: Any, result: Any) -> bool:
    if name in _READING:
        return True
    if name in _INDEXING:
        return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
    if name == "aten::lift_fresh":  # a tensor made of Python's numbers
        return bool(args[0].numel())
    if name not in _COPYING:
        return False
    source = args[1] if name == "aten::copy_" else args[0]
    return bool(source.numel()) and source.device != result.device

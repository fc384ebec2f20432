"""What a pass takes beside its time: peak memory, and how much of it is spent in hooks and scoring.

Measured in passes of their own, never in timed ones. Knows nothing about models or schedules. The parts of
the library that are watched are its private ones, which is why they are named here and nowhere else.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch

from thinsight.runtime.reducer import Hook
from thinsight.runtime.scoring import TextRows

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Share:
    """Shares of a reduced pass, 0 to 1."""

    scoring: float  # rows of attention computed for the ranking
    hooks: float  # ranking, choosing and gathering tokens, masks, putting outputs in place


def share_of(job: Callable[[], Any], device: torch.device, passes: int) -> Share:
    """Where the time of ``job``, which runs under a reduction, goes: medians over some passes.

    The device is waited for around every part, so on a GPU both shares are upper bounds.
    """
    found = [_shares(job, device) for _ in range(passes)]
    return Share(median(each.scoring for each in found), median(each.hooks for each in found))


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_of(job: Callable[[], Any], device: torch.device) -> tuple[Any, int | None]:
    """What ``job`` returns, and the most bytes that it held at a time beyond what was there before it.

    On a GPU: of torch's allocator. Otherwise: of the process's resident set, so a little more or less than
    the tensors; None where the system does not tell.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = job()
        synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    _return_free_memory()
    try:
        _RESET.write_text("5")  # from here on, the peak counts anew
    except OSError:  # not Linux, or not allowed
        return job(), None
    resident = _status_bytes("VmRSS")
    result = job()
    return result, max(0, _status_bytes("VmHWM") - resident)


def _shares(job: Callable[[], Any], device: torch.device) -> Share:
    with _stopwatch(TextRows, "read", device) as scoring, _stopwatch(Hook, "__call__", device) as hooks:
        synchronize(device)
        start = time.perf_counter()
        job()
        synchronize(device)
        whole = time.perf_counter() - start
    return Share(sum(scoring) / whole, sum(hooks) / whole)


@contextmanager
def _stopwatch(owner: type, name: str, device: torch.device) -> Iterator[list[float]]:
    """Seconds of each call of a class's method, as a list that grows."""
    original, taken = getattr(owner, name), []

    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronize(device)
        start = time.perf_counter()
        result = original(*args, **kwargs)
        synchronize(device)
        taken.append(time.perf_counter() - start)
        return result

    with mock.patch.object(owner, name, timed):
        yield taken


def _return_free_memory() -> None:
    """Give the system what the allocator keeps for later; a pass that reuses it would look too small."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])

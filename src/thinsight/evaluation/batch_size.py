"""How many prompts go through the model at once: a number, the fastest one, or half of what did not fit.

Knows tokens, seconds and bytes. Knows nothing about prompts, reductions or scores: what is timed is given.
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from ..cost import DecoderShape
from ..errors import BadInput

T = TypeVar("T")

AUTO = "auto"
_WORTH_A_DOUBLING = 1.05  # times the tokens per second
_RUNS = 2  # of each size; the first one warms up


def check_batch_size(wanted: Any) -> None:
    """Check a batch size.

    Raises:
        ThinsightError: it is neither a whole number of at least 1 nor "auto".
    """
    whole = isinstance(wanted, int) and not isinstance(wanted, bool)
    if wanted != AUTO and (not whole or wanted < 1):
        raise BadInput(f"batch_size is {wanted!r}: it must be a whole number of at least 1, or 'auto'")


def chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    """The items in lists of ``size``, the last one of what is left."""
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


class BatchSize:
    """The batch size of all that must run in the same batches.

    Args:
        wanted: a whole number of at least 1, or "auto".

    Attributes:
        size: None as long as it is still to be found.

    Raises:
        ThinsightError: ``wanted`` is neither.
    """

    def __init__(self, wanted: int | str) -> None:
        check_batch_size(wanted)
        self.size = None if isinstance(wanted, str) else wanted

    def settle(self, find: Callable[[], int]) -> int:
        """The size, by ``find`` if it is still open."""
        if self.size is None:
            self.size = find()
        return self.size

    def first_pass(self, run: Callable[[], T], halved: Callable[[int], object]) -> T:
        """What ``run`` returns, which goes through all prompts in batches of the settled size.

        As long as it runs out of the device's memory the size is halved, with a warning, ``halved`` is told,
        and it is run again from the start, so that the outcome is that of the size it ends with.

        Raises:
            ThinsightError: single prompts do not fit either.
        """
        while True:
            try:
                return run()
            except torch.OutOfMemoryError:
                half = self._half()
            warnings.warn(f"batch_size {self.size} does not fit into memory, now it is {half}", stacklevel=2)
            self.size = half
            halved(half)
            _release()  # here the error is gone, and with it the tensors of its frames

    def _half(self) -> int:
        assert self.size is not None
        if self.size == 1:
            raise BadInput(
                "batch_size is 1, and the device's memory does not hold the pass of one prompt: load the "
                "model with dtype bfloat16, spread it with device_map, or use smaller images"
            ) from None
        return self.size // 2


def fastest(
    tokens: Sequence[int],
    run: Callable[[int], object],
    fits: Callable[[int], bool] = lambda size: True,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """The batch size, a power of two, that takes the most tokens per second.

    Sizes are doubled until that brings less than 5 %, the prompts end, or memory does.

    Args:
        tokens: how long each prompt is, in the order in which ``run`` takes them.
        run: one pass over the first so many prompts, done when it returns; may raise
            ``torch.OutOfMemoryError``.
        fits: whether a pass of this size may be tried.
        clock: seconds.
    """
    best, rate, size = 1, 0.0, 1
    while size <= len(tokens) and fits(size):
        try:
            seconds = min(_timed(run, size, clock) for _ in range(_RUNS))
        except torch.OutOfMemoryError:
            break
        found = sum(tokens[:size]) / seconds
        if found > rate:
            best = size
        if found < _WORTH_A_DOUBLING * rate:
            break
        rate, size = found, 2 * size
    _release()
    return best


def pass_bytes(shape: DecoderShape, rows: int, tokens: int, answer: int, dtype_bytes: int) -> float:
    """About what one pass of ``rows`` prompts of ``tokens`` positions adds to the memory in use, on the safe
    side.

    Keys and values of all layers, one layer's activations and the logits of the answer; twice, for the copies
    and the attention weights that some implementations make.
    """
    per_layer = shape.num_layers * shape.kv_bytes_per_token(dtype_bytes)
    activations = (4 * shape.hidden + 3 * shape.intermediate) * dtype_bytes
    return 2.0 * rows * (tokens * (per_layer + activations) + answer * shape.vocab * dtype_bytes)


def free_bytes() -> float:
    """Main memory that no process uses; infinite where the system does not tell."""
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf, macOS not this name
        return float("inf")


def _timed(run: Callable[[int], object], size: int, clock: Callable[[], float]) -> float:
    start = clock()
    run(size)
    return clock() - start


def _release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Measured time: the full model and the reduced one side by side in one run, alternating, medians.

Three things are measured, because the gain is in the first and thins out towards the last: *prefill* (the decoder over
a prompt whose images are encoded already, what the FLOPs figures count), *prefill with images* (the vision encoder
included), and the *whole answer* of a fixed number of new tokens.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .budget import LatencyModel
from .errors import BadInput, whole
from .evaluation.result import ANSWER, PREFILL, PREFILL_WITH_IMAGES, Measurement, Timing
from .reduction import Reduction
from .runtime import apply, encode_images, num_layers, vision_token_mask
from .runtime.anatomy import MODALITIES, unwrapped
from .runtime.cache import CACHE, fresh_cache
from .runtime.encoding import has_pixels, on_device
from .schedule import Schedule

__all__ = ["Measurement", "Timing", "alternate", "cache_bytes", "measure", "on_device", "profile"]


@torch.inference_mode()
def measure(
    model: Any,
    inputs: Mapping[str, Any],
    reduction: Reduction | Schedule,
    *,
    runs: int = 7,
    warmup: int = 2,
    new_tokens: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Measurement:
    """Time ``model`` on one batch with and without ``reduction``.

    Args:
        model: a loaded model without a reduction in force; of a wrapper, the model inside is timed.
        inputs: what the processor gives for a batch, left-padded, pixels included; moved to the model's
            device before any clock starts.
        reduction: what is compared with the full model.
        runs: measured runs of each side.
        warmup: runs of each side before the measured ones.
        new_tokens: length of the whole answer, the same for both sides (end-of-sequence tokens do not end
            it).
        progress: called with (runs done, runs in all).

    Raises:
        ThinsightError: counts below 1, inputs without images, or a reduction that does not fit the model.
    """
    for name, value in {"runs": runs, "new_tokens": new_tokens, "warmup + 1": warmup + 1}.items():
        whole(value, name)
    model = unwrapped(model)
    if not any(has_pixels(model, inputs, modality) for modality in MODALITIES):
        raise BadInput("the inputs to time hold no pixel_values: give prompts with images")
    if isinstance(reduction, Schedule):
        reduction = Reduction(reduction)
    batch = on_device(model, inputs)
    size = int(batch["input_ids"].shape[0])
    jobs = _jobs(model, batch, reduction, new_tokens)
    done, in_all = itertools.count(1), 2 * len(jobs) * (runs + warmup)

    def tick() -> None:
        if progress is not None:
            progress(next(done), in_all)

    timings = []
    for what, job in jobs.items():
        full, reduced = alternate(
            functools.partial(_clock, model, job), lambda: apply(model, reduction), runs=runs, warmup=warmup, tick=tick
        )
        timings.append(Timing(what, full, reduced, size))
    kv_full = cache_bytes(jobs[PREFILL]()[CACHE])
    with apply(model, reduction):
        kv_reduced = cache_bytes(jobs[PREFILL]()[CACHE])
    return Measurement(
        timings=tuple(timings),
        kv_full=kv_full,
        kv_reduced=kv_reduced,
        batch=size,
        new_tokens=new_tokens,
        **_machine(model),
        threads=torch.get_num_threads(),
    )


@torch.inference_mode()
def profile(
    model: Any,
    inputs: Mapping[str, Any],
    *,
    rates: Sequence[float] = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0),
    runs: int = 5,
    warmup: int = 1,
) -> LatencyModel:
    """Fit a latency model of the decoder's prefill on this device: the whole model at a few keep rates.

    The same rate in every layer, the median of alternating runs; a layer's time is its share of the whole, so
    what does not depend on the layers is spread over them. Never falls where tokens rise.

    Args:
        model: a loaded model without a reduction in force; of a wrapper, the model inside is timed.
        inputs: what the processor gives for a batch, left-padded, pixels included.
        rates: keep rates to time, rising; of those that keep equal counts, the first.
        runs: measured runs of each.
        warmup: runs of each before those.

    Raises:
        ThinsightError: inputs without images, or a model that is not supported.
    """
    model = unwrapped(model)
    batch = on_device(model, inputs)
    vision = int(vision_token_mask(model, batch["input_ids"]).sum(1).median())
    text = batch["attention_mask"].sum(1).median().item() - vision
    layers = num_layers(model)
    by_count: dict[int, Schedule] = {}
    for rate in rates:
        schedule = Schedule([rate] * layers)
        by_count.setdefault(schedule.counts(vision)[0], schedule)
    if len(by_count) < 2:
        raise BadInput(
            f"rates {list(rates)} all keep the same count of {vision} vision tokens: give at least two that "
            "differ, and inputs with images"
        )
    schedules = list(by_count.values())
    job = _jobs(model, batch, Reduction(schedules[0], "uniform"), 1)[PREFILL]
    times: list[list[float]] = [[] for _ in schedules]
    for _ in range(warmup + runs):
        for schedule, taken in zip(schedules, times, strict=True):
            with apply(model, Reduction(schedule, "uniform")):
                taken.append(_clock(model, job) / 1e3)
    medians = [statistics.median(taken[warmup:]) / layers for taken in times]
    return LatencyModel(
        **_machine(model),
        batch=int(batch["input_ids"].shape[0]),
        constant=0.0,
        tokens=tuple(text + count for count in by_count),
        seconds=tuple(itertools.accumulate(medians, max)),
    )


def alternate(
    clock: Callable[[], float],
    reduced: Callable[[], AbstractContextManager[Any]],
    *,
    runs: int,
    warmup: int,
    tick: Callable[[], None] = lambda: None,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Times of both sides, (full, reduced), ``runs`` each, in the unit that ``clock`` returns.

    They swap who goes first in every round, so that a machine that warms up or slows down treats both alike.
    ``reduced`` puts the reduction in force; putting it on and off is not timed.
    """
    times: dict[bool, list[float]] = {False: [], True: []}  # by whether it is reduced
    for i in range(warmup + runs):
        for side in (False, True) if i % 2 == 0 else (True, False):
            with reduced() if side else nullcontext():
                times[side].append(clock())
            tick()
    return tuple(times[False][warmup:]), tuple(times[True][warmup:])


def cache_bytes(cache: Any) -> int:
    """Bytes of all keys and values that a transformers cache holds."""
    kept = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))  # a state has neither
    held = [tensor for tensor in kept if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def _jobs(model: Any, batch: dict[str, Any], reduction: Reduction, new_tokens: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name."""
    text = {name: value for name, value in batch.items() if not name.startswith("pixel_")}
    vision = encode_images(model, batch, reduction).model_inputs()
    return {
        PREFILL: lambda: model(**text, **vision, **fresh_cache(model), use_cache=True, logits_to_keep=1),
        PREFILL_WITH_IMAGES: lambda: model(**batch, **fresh_cache(model), use_cache=True, logits_to_keep=1),
        ANSWER: lambda: model.generate(
            **batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, num_beams=1
        ),
    }


def _clock(model: Any, job: Callable[[], Any]) -> float:
    """Milliseconds that ``job`` takes, the device's queued work included."""
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda _: None
    synchronize(model.device)
    start = time.perf_counter()
    job()
    synchronize(model.device)
    return 1000 * (time.perf_counter() - start)


def _machine(model: Any) -> dict[str, str]:
    """What times belong to."""
    on_gpu = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if on_gpu else str(model.device)
    return {"device": device, "dtype": str(model.dtype).removeprefix("torch.")}

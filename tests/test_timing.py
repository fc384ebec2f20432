"""Timing: both sides run alternately, the reduction is on exactly where it should be, and bytes are
measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from tiny import VISION_TOKENS, tiny_images, tiny_llava, tiny_processor

from thinsight import cost
from thinsight.errors import ThinsightError
from thinsight.evaluation.examples import Example
from thinsight.evaluation.prompts import PromptReader
from thinsight.reduction import Reduction
from thinsight.schedule import Schedule
from thinsight.timing import ANSWER, PREFILL, PREFILL_WITH_IMAGES, Timing, alternate, cache_bytes, measure, profile


def inputs(rows: int = 2) -> dict[str, torch.Tensor]:
    examples = [Example(str(i), (image,), "what color ?") for i, image in enumerate(tiny_images(rows))]
    return PromptReader(tiny_llava(), tiny_processor()).typical_batch(examples, rows)


def test_rates_that_keep_equal_counts_are_timed_once() -> None:
    """Of 16 vision tokens, 1/64 keeps as many as 1/32: a latency model has one time for a count."""
    latency = profile(tiny_llava(), inputs(), rates=(1 / 64, 1 / 32, 0.5, 1.0), runs=1, warmup=0)
    assert [high - low for low, high in itertools.pairwise(latency.tokens)] == [7, 8]
    assert len(latency.seconds) == 3
    for rates in ((0.5,), (1 / 64, 1 / 32)):
        with pytest.raises(ThinsightError, match="all keep the same count of 16 vision tokens"):
            profile(tiny_llava(), inputs(), rates=rates)


def test_sides_alternate_and_swap_who_is_first() -> None:
    log: list[str] = []
    on = False

    def clock() -> float:
        log.append("reduced" if on else "full")
        return float(len(log))

    @contextmanager
    def reduced() -> Iterator[None]:
        nonlocal on
        on = True
        yield
        on = False

    full_times, reduced_times = alternate(clock, reduced, runs=3, warmup=1)
    assert log == ["full", "reduced", "reduced", "full", "full", "reduced", "reduced", "full"]
    assert full_times == (4.0, 5.0, 8.0)  # the warm-up round is not in them
    assert reduced_times == (3.0, 6.0, 7.0)


def test_medians_and_ratio() -> None:
    timing = Timing("prefill", full=(30.0, 10.0, 20.0), reduced=(5.0, 50.0, 10.0), batch=1)
    assert (timing.full_ms, timing.reduced_ms, timing.ratio, timing.runs) == (20.0, 10.0, 2.0, 3)


def test_everything_is_measured_on_a_real_model() -> None:
    model = tiny_llava()
    steps: list[tuple[int, int]] = []
    schedule = Schedule([1.0, 1.0, 0.25, 0.0])
    found = measure(model, inputs(), schedule, runs=3, new_tokens=3, progress=lambda done, of: steps.append((done, of)))
    assert [timing.what for timing in found.timings] == [PREFILL, PREFILL_WITH_IMAGES, ANSWER]
    assert all(len(t.full) == len(t.reduced) == 3 for t in found.timings)
    assert all(min(t.full + t.reduced) > 0 for t in found.timings)
    assert steps == [(i + 1, 30) for i in range(30)]  # 3 things, 2 sides, 3 runs and 2 warm-ups
    assert (found.batch, found.new_tokens, found.device, found.dtype) == (2, 3, "cpu", "float32")


def test_the_measured_cache_is_the_computed_one() -> None:
    model, batch = tiny_llava(), inputs()
    schedule = Schedule([1.0, 1.0, 0.25, 0.0])
    found = measure(model, batch, Reduction(schedule, "uniform"), runs=1, new_tokens=1)
    n_text = batch["input_ids"].shape[1] - VISION_TOKENS
    for measured, counted in ((found.kv_full, None), (found.kv_reduced, schedule)):
        assert measured == 2 * cost.kv_bytes(model.config, VISION_TOKENS, n_text, counted, 4)
    assert found.kv_ratio > 1


def test_prefill_runs_without_the_vision_tower() -> None:
    model = tiny_llava()
    calls: list[int] = []
    model.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    measure(model, inputs(), Schedule.full(4), runs=2, warmup=0, new_tokens=1)
    assert len(calls) == 1 + 2 * 2 + 2 * 2  # once to encode; then prefill with images and whole answer


def test_the_model_is_left_as_it_was() -> None:
    model, batch = tiny_llava(), inputs()
    before = model(**batch).logits
    measure(model, batch, Schedule([1.0, 1.0, 0.25, 0.0]), runs=1, new_tokens=1)
    assert torch.equal(model(**batch).logits, before)


def test_cache_bytes_counts_keys_and_values() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 3), torch.zeros(1, 2, 5, 3), 0)
    assert cache_bytes(cache) == 2 * 30 * 4


def test_a_small_set_fills_the_batch_and_prefers_the_median_length() -> None:
    image = tiny_images(1)[0]
    questions = ["what", "what color is the circle ?", "what color is the red circle on the left of the square ?"]
    examples = [Example(str(i), (image,), question) for i, question in enumerate(questions)]
    reader = PromptReader(tiny_llava(), tiny_processor())
    batch = reader.typical_batch(examples, 1)
    alone = tiny_processor()(text=[f"USER: <image>\n{questions[1]} ASSISTANT:"], images=[image], return_tensors="pt")
    assert torch.equal(batch["input_ids"], alone["input_ids"])
    assert reader.typical_batch(examples[:1], 4)["input_ids"].shape[0] == 4


@pytest.mark.parametrize("counts", [{"runs": 0}, {"new_tokens": 0}, {"warmup": -1}])
def test_bad_counts(counts: dict[str, int]) -> None:
    with pytest.raises(ThinsightError, match="at least 1"):
        measure(tiny_llava(), inputs(), Schedule.full(4), **counts)


def test_inputs_without_images() -> None:
    batch = {name: value for name, value in inputs().items() if name != "pixel_values"}
    with pytest.raises(ThinsightError, match="no pixel_values"):
        measure(tiny_llava(), batch, Schedule.full(4))


def test_a_schedule_of_another_depth() -> None:
    with pytest.raises(ThinsightError, match="decoder layers"):
        measure(tiny_llava(), inputs(), Schedule.full(7))

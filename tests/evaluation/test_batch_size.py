"""The batch size: found with a clock that is told what to show, halved where memory is said to end."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import tiny_images, tiny_llava, tiny_processor

from thinsight import cost
from thinsight.errors import ThinsightError
from thinsight.evaluation import Evaluator, Example, evaluator, full_model
from thinsight.evaluation.full_model import BatchSize, fastest, free_bytes, pass_bytes
from thinsight.schedule import Schedule

STAIRS = Schedule([1, 1, 0.6, 0.3])
QUESTIONS = ("what color is the circle ?", "how many ?", "which ?", "what number is written in the chart ?")


class Machine:
    """A clock, and passes that move it: seconds by size."""

    def __init__(self, seconds: dict[int, float], memory: int = 1_000) -> None:
        self.seconds = seconds
        self.memory = memory
        self.now = 0.0
        self.tried: list[int] = []

    def clock(self) -> float:
        return self.now

    def run(self, size: int) -> None:
        self.tried.append(size)
        if size > self.memory:
            raise torch.OutOfMemoryError
        self.now += self.seconds[size]


def found_on(machine: Machine, tokens: list[int], **more: Any) -> int:
    return fastest(tokens, machine.run, clock=machine.clock, **more)


def test_sizes_are_doubled_until_it_is_not_worth_it() -> None:
    machine = Machine({1: 1.0, 2: 1.1, 4: 1.5, 8: 2.9, 16: 5.8})
    assert found_on(machine, [100] * 50) == 8  # 3 % more than 4, and the best
    assert machine.tried == [1, 1, 2, 2, 4, 4, 8, 8]
    assert found_on(Machine({1: 1.0, 2: 1.1, 4: 2.3}), [100] * 50) == 2


def test_tokens_count_not_prompts() -> None:
    seconds = {1: 1.0, 2: 1.6, 4: 2.8}
    assert found_on(Machine(seconds), [100, 100, 100, 100]) == 4
    assert found_on(Machine(seconds), [100, 50, 10, 10]) == 1


def test_the_first_run_of_a_size_may_be_slow() -> None:
    class Cold(Machine):
        def run(self, size: int) -> None:
            self.now += 0.0 if size in self.tried else 10.0
            super().run(size)

    assert found_on(Cold({1: 1.0, 2: 1.1, 4: 2.3}), [100] * 50) == 2


def test_the_end_of_memory_or_of_the_prompts_ends_it() -> None:
    halving = {1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}
    assert found_on(Machine(halving, memory=2), [100] * 50) == 2
    assert found_on(Machine(halving, memory=0), [100] * 50) == 1
    assert found_on(Machine(halving), [100] * 5) == 4
    machine = Machine(halving)
    assert found_on(machine, [100] * 50, fits=lambda size: size < 4) == 2
    assert max(machine.tried) == 2


def test_memory_is_estimated_on_the_safe_side() -> None:
    shape = cost.decoder_shape(tiny_llava().config)
    small, large = pass_bytes(shape, 1, 100, 4, 4), pass_bytes(shape, 8, 100, 4, 4)
    assert large == 8 * small
    assert small > shape.num_layers * 100 * shape.kv_bytes_per_token(4)
    assert free_bytes() > 0


def test_halving_is_told_and_begins_anew() -> None:
    size, seen = BatchSize(8), []

    def run() -> int:
        here = size.settle(lambda: 0)
        seen.append(here)
        if here > 2:
            raise torch.OutOfMemoryError
        return here

    halved: list[int] = []
    with pytest.warns(UserWarning, match="does not fit") as told:
        assert size.first_pass(run, halved.append) == 2
    assert seen == [8, 4, 2]
    assert halved == [4, 2]
    assert [str(each.message) for each in told] == [
        "batch_size 8 does not fit into memory, now it is 4",
        "batch_size 4 does not fit into memory, now it is 2",
    ]


def test_one_prompt_that_does_not_fit_is_an_error() -> None:
    def run() -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(ThinsightError, match="batch_size is 1, and"):
        BatchSize(1).first_pass(run, lambda half: None)


@pytest.mark.parametrize("wanted", [0, -1, True, 2.0, "many", None])
def test_what_is_no_batch_size(wanted: Any) -> None:
    with pytest.raises(ThinsightError, match=r"batch_size is .*'auto'"):
        BatchSize(wanted)


# -- in the evaluator ----------------------------------------------------------------------------------------


def make_evaluator(size: int | str) -> Evaluator:
    images = tiny_images(5)
    examples = [Example(f"e{i}", (images[i % 5],), QUESTIONS[i % 4], ("red",)) for i in range(22)]
    model = tiny_llava(layers=4)
    model.generation_config.eos_token_id = [3, *range(40, 52)]  # so that answers end at various lengths
    return Evaluator(model, tiny_processor(), examples, "anls", batch_size=size, max_new_tokens=4)


def same(one: Evaluator, other: Evaluator) -> bool:
    found, expected = one(STAIRS), other(STAIRS)
    assert one._batches == other._batches
    assert one.full.agreement == other.full.agreement
    return bool(found.agreement == expected.agreement and found.score == expected.score)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The passes really run; the seconds are made up, so that 4 is the fastest size."""
    sizes: list[int] = []

    def fake(run: Callable[[int], object], size: int, clock: object) -> float:
        run(size)
        sizes.append(size)
        return {1: 1.0, 2: 1.2, 4: 1.8, 8: 4.0}[size]

    monkeypatch.setattr(full_model, "_timed", fake)
    return sizes


@pytest.mark.parametrize("first", ["batch_size", "full_score", "with_ranker"])
def test_auto_is_found_once_and_then_like_a_number(timed: list[int], first: str) -> None:
    found = make_evaluator("auto")
    assert timed == []
    if first == "with_ranker":
        other = found.with_ranker("random")
        assert other.batch_size == 4
    else:
        getattr(found, first)
    assert found.batch_size == 4
    assert same(found, make_evaluator(4))
    assert timed == [1, 1, 2, 2, 4, 4, 8, 8]


def test_a_kept_size_is_not_measured_again(timed: list[int]) -> None:
    resumed = make_evaluator("auto")
    assert resumed.fix_batch_size(2) == 2
    assert same(resumed, make_evaluator(2))
    assert timed == []
    with pytest.raises(ThinsightError, match="batch_size is 0"):
        resumed.fix_batch_size(0)


def test_the_first_pass_is_halved_and_then_like_the_half(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = full_model.decode

    def small(model: Any, prompts: Any, *rest: Any, **more: Any) -> Any:
        if prompts.input_ids.shape[0] > 2:
            raise torch.OutOfMemoryError("no more")
        return decode(model, prompts, *rest, **more)

    expected = make_evaluator(2)
    monkeypatch.setattr(full_model, "decode", small)
    halved = make_evaluator(8)
    with pytest.warns(UserWarning, match="does not fit into memory") as told:
        assert halved.fix_batch_size() == 2
    assert len([each for each in told if "does not fit" in str(each.message)]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(halved, expected)


def test_later_passes_are_not_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their batches are fixed: a score may not depend on when memory ran out."""
    found = make_evaluator(4)
    _ = found.full

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(evaluator, "decode", full)
    with pytest.raises(torch.OutOfMemoryError):
        found(STAIRS)
    assert found.batch_size == 4

"""An adaptive reduction gives each prompt the schedule that its own attention picks, in a batch as alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from reference import unpadded
from tiny import tiny_inputs, tiny_llava

from thinsight.errors import ThinsightError
from thinsight.ranking import get_statistic
from thinsight.reduction import Reduction
from thinsight.runtime import apply
from thinsight.schedule import Adaptive, Schedule

ROWS = [[3, 5], [2, 3, 9], [7], [1, 2], [4, 4, 6]]
MANY, FEW = Schedule([1, 0.75, 0.75, 0.5]), Schedule([1, 0.75, 0.25, 0.125])
PLAIN = Schedule([1, 0.75, 0.5, 0.3])
N = 16


def family(edge: float | None, layer: int = 2, many: Schedule = MANY, few: Schedule = FEW) -> Reduction:
    if edge is None:
        adaptive = Adaptive("concentration", layer, (), (PLAIN,), (1.0,))
    else:
        adaptive = Adaptive("concentration", layer, (edge,), (many, few), (0.5, 0.5))
    return Reduction(adaptive.mean(), adaptive=adaptive)


def values_of(model: Any, batch: dict[str, torch.Tensor], layer: int = 2) -> list[float]:
    with apply(model, family(None, layer)) as handle:
        model(**batch)
        return handle.statistic()


def middle(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[1] + ordered[2]) / 2


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_each_row_gets_its_schedule(attn: str) -> None:
    model, batch = tiny_llava(attn), tiny_inputs(ROWS, seed=11)
    values = values_of(model, batch)
    assert len(set(values)) == len(ROWS)
    edge = middle(values)
    with apply(model, family(edge)) as handle:
        model(**batch)
        for layer in range(4):
            wanted = [(FEW if value >= edge else MANY).counts(N)[layer] for value in values]
            images = [int((row == 4).sum()) // N for row in batch["input_ids"]]
            counts = [len(row) for row in handle.kept(layer)]
            assert counts == [want * count for want, count in zip(wanted, images, strict=True)]


@pytest.mark.parametrize("new", [1, 6])
def test_batch_equals_one_by_one(new: int) -> None:
    model, batch = tiny_llava(), tiny_inputs(ROWS, seed=12)
    values = values_of(model, batch)
    edge, width = middle(values), batch["input_ids"].shape[1]
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": 10_000}
    with apply(model, family(edge)) as handle:
        together = model.generate(**batch, **options)[:, width:]
        for row in range(len(ROWS)):
            ids, pixels = unpadded(batch, row)
            given = {} if pixels is None else {"pixel_values": pixels}
            alone = model.generate(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **given, **options)
            assert together[row].tolist() == alone[0, len(ids) :].tolist()
            if pixels is not None:
                assert handle.statistic()[0] == pytest.approx(values[row], abs=1e-5)
    for plain, wanted in ((MANY, [v < edge for v in values]), (FEW, [v >= edge for v in values])):
        with apply(model, plain):
            stock = model.generate(**batch, **options)[:, width:]
        for row, same in enumerate(wanted):
            if same:
                assert together[row].tolist() == stock[row].tolist()


def test_the_statistic_is_of_the_layer_before() -> None:
    """Read from a full attention matrix."""
    model, batch = tiny_llava("eager"), tiny_inputs(ROWS[:1], seed=11)
    given = dict(batch)
    values = values_of(model, given, layer=1)
    attention = model(**given, output_attentions=True).attentions[0]
    vision = batch["input_ids"][0] == 4
    end = int(vision.nonzero().max())
    rows = attention[:, :, end + 1 :][..., vision]
    real = torch.ones(1, rows.shape[2], dtype=torch.bool)
    wanted = get_statistic("concentration")(rows, real, torch.ones(1, rows.shape[3], dtype=torch.bool))
    assert values[0] == pytest.approx(wanted.item(), abs=1e-5)


def test_one_schedule_for_all_is_that_schedule() -> None:
    model, batch = tiny_llava(), tiny_inputs(ROWS, seed=13)
    with apply(model, PLAIN):
        plain = model(**batch).logits
    with apply(model, family(None)):
        torch.testing.assert_close(model(**batch).logits, plain)


def test_a_ranker_without_attention_and_a_decision_behind_the_first_drop() -> None:
    model, batch = tiny_llava(), tiny_inputs(ROWS, seed=14)
    many, few = Schedule([0.75, 0.75, 0.75, 0.5]), Schedule([0.75, 0.75, 0.75, 0.125])
    edge = middle(values_of(model, batch, 3))
    adaptive = Adaptive("mutual-information", 3, (edge,), (many, few), (0.5, 0.5))
    with apply(model, Reduction(adaptive.mean(), "uniform", adaptive=adaptive)) as handle:
        model(**batch)
        levels = [adaptive.level(value) for value in handle.statistic()]
        images = [int((row == 4).sum()) // N for row in batch["input_ids"]]
        wanted = [adaptive.schedules[level].counts(N)[3] * n for level, n in zip(levels, images, strict=True)]
        assert [len(row) for row in handle.kept(3)] == wanted


def test_unknown_statistics_and_plain_reductions_are_refused() -> None:
    model = tiny_llava()
    unknown = Adaptive("entropy", 2, (), (PLAIN,), (1.0,))
    with pytest.raises(ThinsightError, match="statistic is 'entropy'"):
        apply(model, Reduction(PLAIN, adaptive=unknown))
    with apply(model, PLAIN) as handle, pytest.raises(ThinsightError, match="no statistic is recorded"):
        handle.statistic()
    model(**tiny_inputs(ROWS[:1]))  # nothing is left on the model

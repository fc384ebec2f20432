"""When tokens are ranked anew: by each prompt's own counts, and nothing is read where none is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from reference import unpadded
from tiny import tiny_inputs, tiny_llava

from thinsight.errors import ThinsightError
from thinsight.reduction import Reduction
from thinsight.runtime import apply
from thinsight.runtime.scoring import TextRows
from thinsight.schedule import Adaptive, Schedule

N = 16  # tokens of an image
SCHEDULE = Schedule([1, 0.75, 0.625, 0.5, 0.25, 0.125])  # 16 12 10 8 4 2
ROWS = [[3, 5], [2, 3, 9], [7], [4, 4, 6]]  # with images: 1, 2, 0, 2


@contextmanager
def reads() -> Iterator[list[int]]:
    """How many keys each reading of attention saw, in order."""
    seen: list[int] = []
    original = TextRows.read

    def read(self: TextRows, rows_of: Any, query: Any, key: Any) -> None:
        seen.append(key.shape[2])
        original(self, rows_of, query, key)

    with mock.patch.object(TextRows, "read", read):
        yield seen


def kept_by(model: Any, batch: dict[str, torch.Tensor], *reduction: Any, **options: Any) -> list[list[Any]]:
    """Per layer and row, which tokens entered it."""
    with apply(model, *reduction, **options) as handle:
        model(**batch)
        return [[row.tolist() for row in handle.kept(layer)] for layer in range(len(SCHEDULE.keep_rates))]


@pytest.mark.parametrize(
    ("rerank", "layers"),
    [
        (True, [1, 2, 3, 4, 5]),
        (0.9, [1, 2, 3, 4, 5]),
        (0.83, [1, 3, 4, 5]),  # 10 are not fewer than 0.83 of 12
        (0.75, [1, 3, 4, 5]),
        (0.6, [1, 4, 5]),  # 10 and 8 are not fewer than 0.6 of 12, 4 are; 2 are fewer than 0.6 of 4
        (0.5, [1, 4]),  # 2 are not fewer than half of 4
        (False, [1]),
    ],
)
def test_attention_is_read_only_where_a_ranking_is_due(rerank: Any, layers: list[int]) -> None:
    model, batch = tiny_llava(layers=6), tiny_inputs([[3, 5]], seed=1)
    text = batch["input_ids"].shape[1] - N
    counts = SCHEDULE.counts(N)
    with reads() as seen:
        kept_by(model, batch, SCHEDULE, rerank=rerank)
    assert seen == [text + counts[layer - 1] for layer in layers]


@pytest.mark.parametrize("per", ["image", "prompt"])
@pytest.mark.parametrize("rerank", [True, 0.7, 0.5, False])
@pytest.mark.parametrize("rates", [SCHEDULE.keep_rates, (1, 0.97, 0.95, 0.5, 0.45, 0.1)])
def test_a_batch_ranks_as_its_rows_alone(rates: Any, rerank: Any, per: str) -> None:
    """In the second schedule a row of two images drops tokens, competing together, where one image drops
    none: 32 x 0.95 is 31 and 16 x 0.95 is 16."""
    model, batch = tiny_llava(layers=6), tiny_inputs(ROWS, seed=2)
    together = kept_by(model, batch, Schedule(rates), rerank=rerank, per=per)
    for row in (0, 1, 3):
        ids, pixels = unpadded(batch, row)
        single = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "pixel_values": pixels}
        alone = kept_by(model, single, Schedule(rates), rerank=rerank, per=per)
        assert [layer[row] for layer in together] == [layer[0] for layer in alone]


def test_rankings_differ_where_they_are_reused() -> None:
    model, batch = tiny_llava(layers=6), tiny_inputs(ROWS, seed=3)
    found = [kept_by(model, batch, SCHEDULE, rerank=rerank) for rerank in (True, 0.6, False)]
    assert found[0] != found[1] != found[2] != found[0]
    assert found[0][1] == found[1][1] == found[2][1]


@pytest.mark.parametrize("rerank", [True, 0.5, False])
def test_adaptive_rows_go_by_their_own_schedule(rerank: Any) -> None:
    model, batch = tiny_llava(layers=6), tiny_inputs([[3, 5], [2, 3], [7, 8], [4, 6]], seed=4)
    many, few = Schedule([1, 0.75, 0.75, 0.625, 0.625, 0.5]), Schedule([1, 0.75, 0.375, 0.375, 0.25, 0.125])
    plain = Adaptive("concentration", 2, (), (many,), (1.0,))
    with apply(model, Reduction(plain.mean(), adaptive=plain)) as handle:
        model(**batch)
        values = handle.statistic()
    edge = sum(sorted(values)[1:3]) / 2
    family = Adaptive("concentration", 2, (edge,), (many, few), (0.5, 0.5))
    together = kept_by(model, batch, Reduction(family.mean(), adaptive=family, rerank=rerank))
    for row, value in enumerate(values):
        wanted = kept_by(model, batch, few if value >= edge else many, rerank=rerank)
        assert [layer[row] for layer in together] == [layer[row] for layer in wanted]


def test_a_reduction_says_it_and_an_argument_overrules_it() -> None:
    model, batch = tiny_llava(layers=6), tiny_inputs(ROWS, seed=5)
    once = kept_by(model, batch, SCHEDULE, rerank=False)
    assert kept_by(model, batch, Reduction(SCHEDULE, rerank=False)) == once
    always = kept_by(model, batch, SCHEDULE)
    assert always != once
    assert kept_by(model, batch, Reduction(SCHEDULE, rerank=False), rerank=True) == always


def test_a_merging_ranker_merges_where_it_does_not_rank() -> None:
    """VisionZip's scores are those of the vision tower, at every layer alike."""
    model, batch = tiny_llava(layers=6), tiny_inputs([[3, 5]], seed=6)
    ranker = {"name": "visionzip"}
    with apply(model, SCHEDULE, ranker=ranker, rerank=True):
        always = model(**batch).logits
    with apply(model, SCHEDULE, ranker=ranker, rerank=False):
        once = model(**batch).logits
    with (
        mock.patch("thinsight.ranking.VisionZip.merge", return_value=None),
        apply(model, SCHEDULE, ranker=ranker, rerank=False),
    ):
        unmerged = model(**batch).logits
    torch.testing.assert_close(once, always)
    assert not torch.allclose(unmerged, always)


@pytest.mark.parametrize("rerank", [0, 1, 0.0, 1.0, 1.5, -0.1, float("nan"), "yes"])
def test_bad_values(rerank: Any) -> None:
    with pytest.raises(ThinsightError, match=r"rerank is .*number in \(0, 1\)"):
        apply(tiny_llava(), Schedule([1, 1, 1, 1]), rerank=rerank)
    with pytest.raises(ThinsightError, match="rerank is"):
        Reduction(SCHEDULE, rerank=rerank)

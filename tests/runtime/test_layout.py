"""The two token spaces: what a pass consists of, and the way back and forth between its columns."""

from __future__ import annotations

import pytest
import torch

from thinsight.runtime.cache import Kept, append
from thinsight.runtime.call import Vision, build_layout, query_columns
from thinsight.runtime.reducer import shrink
from thinsight.runtime.tensors import Columns, causal, gather_tokens, reduce_mask, scatter_tokens

# row 0: pad pad t v v v t t; row 1: t v v v v v t t (images of 2 and 3); row 2: text and padding
VISION = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 0, 0], [0] * 8]).bool()
REAL = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8, [0, 0, 0, 0, 0, 1, 1, 1]]).bool()


def layout(lengths: list[int] | None = None):
    made = build_layout([Vision(VISION, [3, 2, 3] if lengths is None else lengths)], REAL)
    assert made is not None
    return made


def test_layout_reads_images_from_their_lengths() -> None:
    made = layout()
    assert made.sizes == ((3,), (2, 3), ())
    assert made.text == (3, 3, 3)
    assert made.column.tolist() == [[3, 4, 5, 0, 0], [1, 2, 3, 4, 5], [0] * 5]
    assert made.valid.sum(1).tolist() == [3, 5, 0]
    assert made.image[1].tolist() == [0, 0, 1, 1, 1]
    assert made.index[1].tolist() == [0, 1, 0, 1, 2]
    assert made.size[1].tolist() == [2, 2, 3, 3, 3]
    assert torch.equal(made.vision, VISION)


@pytest.mark.parametrize("lengths", [[8], [3, 5, 1], [2, 2, 4]])
def test_lengths_that_do_not_fit_fall_back_to_unbroken_runs(lengths: list[int]) -> None:
    assert layout(lengths).sizes == ((3,), (5,), ())


def test_unbroken_runs() -> None:
    made = build_layout([Vision(torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1]]).bool())], torch.ones(1, 8).bool())
    assert made is not None
    assert made.sizes == ((2, 1, 2),)


def test_no_vision_no_layout() -> None:
    assert build_layout([Vision(VISION & False)], REAL) is None


def test_queries() -> None:
    columns, real = query_columns(layout(), REAL, "instruction")
    assert [c[r].tolist() for c, r in zip(columns, real, strict=True)] == [[6, 7], [6, 7], [7]]
    columns, real = query_columns(layout(), REAL, "last")
    assert columns.tolist() == [[7], [7], [7]]
    assert real.all()
    # only the prompt asks: column 7 is an answer; row 0 then has one instruction token
    prompt = REAL & (torch.arange(8) < 7)
    columns, real = query_columns(layout(), prompt, "instruction")
    assert [c[r].tolist() for c, r in zip(columns, real, strict=True)] == [[6], [6], [6]]
    # nothing after the image: the last prompt token, which is a vision token
    prompt = REAL & (torch.arange(8) < 6)
    columns, real = query_columns(layout(), prompt, "instruction")
    assert [c[r].tolist() for c, r in zip(columns, real, strict=True)] == [[5], [5], [5]]


@pytest.mark.parametrize(
    ("most", "wanted"),
    [(None, [2, 3, 4, 5, 6, 7]), (9, [2, 3, 4, 5, 6, 7]), (6, [2, 3, 4, 5, 6, 7]), (3, [3, 5, 7]), (1, [7])],
)
def test_of_many_queries_some_evenly_spaced(most: int | None, wanted: list[int]) -> None:
    """The last one is always among them, and a shorter row beside it asks as it does alone."""
    vision = torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0]]).bool()
    prompt = torch.ones(2, 8).bool()
    made = build_layout([Vision(vision)], prompt)
    assert made is not None
    columns, real = query_columns(made, prompt, "instruction", most)
    short = [7] if most == 1 else [6, 7]
    assert [c[r].tolist() for c, r in zip(columns, real, strict=True)] == [wanted, short]


def test_shrinking_twice() -> None:
    made = layout()
    alive = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 1, 1, 1], [0] * 5]).bool()
    take, columns = shrink(made, alive, [2, 4, 0], None)
    assert columns.length == 7
    assert columns.valid is not None
    real = [c[v].tolist() for c, v in zip(columns.index, columns.valid, strict=True)]
    assert real == [[2, 3, 5, 6, 7], [0, 2, 3, 4, 5, 6, 7], [5, 6, 7]]
    assert torch.equal(take, columns.index)
    states = torch.arange(24.0).view(3, 8, 1)
    first = gather_tokens(states, take)
    alive = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0] * 5]).bool()
    take, later = shrink(made, alive, [1, 0, 0], columns)
    assert later.length == 4
    assert later.valid is not None
    assert [c[v].tolist() for c, v in zip(later.index, later.valid, strict=True)] == [
        [2, 5, 6, 7],
        [0, 6, 7],
        [5, 6, 7],
    ]
    second = gather_tokens(first, take)
    assert torch.equal(second, gather_tokens(states, later.index))
    back = scatter_tokens(second, later, 8)[:, :, 0]
    wanted = torch.zeros(3, 8)
    for row, columns_ in enumerate([[2, 5, 6, 7], [0, 6, 7], [5, 6, 7]]):
        wanted[row, columns_] = states[row, columns_, 0]
    assert torch.equal(back, wanted)


def test_shrinking_rows_of_one_length_needs_no_filling() -> None:
    made = build_layout([Vision(VISION[:1].expand(2, -1))], REAL[:1].expand(2, -1))
    assert made is not None
    alive = torch.tensor([[True, False, True], [False, True, True]])
    take, columns = shrink(made, alive, [2, 2], None)
    assert take.tolist() == [[2, 3, 5, 6, 7], [2, 4, 5, 6, 7]]
    assert columns.valid is None
    alive = torch.tensor([[False, False, True], [False, True, False]])
    take, columns = shrink(made, alive, [1, 1], columns)
    assert take.tolist() == [[0, 2, 3, 4], [0, 1, 3, 4]]
    assert columns.index.tolist() == [[2, 5, 6, 7], [2, 4, 6, 7]]


def test_physical_place_of_logical_columns() -> None:
    columns = Columns(torch.tensor([[0, 2, 5, 7]]), None)
    (places,) = columns.physical(8, torch.tensor([[7, 2]]))
    assert places.tolist() == [[3, 1]]


def test_gather_tokens_broadcasts_rotary_tables() -> None:
    table = torch.arange(5.0)[None, :, None].expand(1, 5, 2)
    index = torch.tensor([[0, 4], [1, 2]])
    assert gather_tokens(table, index)[:, :, 0].tolist() == [[0, 4], [1, 2]]
    three = table[None].expand(3, 1, 5, 2)  # as multimodal rotary tables
    assert gather_tokens(three, index).shape == (3, 2, 2, 2)


@pytest.mark.parametrize("kind", ["bool", "float", "flash"])
def test_masks_are_reduced_column_by_column(kind: str) -> None:
    past = Kept(Columns(torch.tensor([[0, 3], [1, 2]]), torch.tensor([[True, True], [False, True]])), 4)
    new = Columns(torch.tensor([[0, 2], [1, 2]]), None)
    seen = causal(3, 9, "sdpa", torch.device("cpu")).expand(2, 1, 3, 9).clone()  # 4 + 2 cached columns, 3 new
    seen[0, :, :, 5] = False
    mask = {
        "bool": seen,
        "float": torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min),
        "flash": seen[:, 0, -1].long(),
    }[kind]
    got = reduce_mask(mask, append(past, 6, new, 3).columns, new)
    keys = torch.tensor([[0, 3, 4, 5, 6, 8], [1, 2, 4, 5, 7, 8]])
    hidden = torch.tensor([[0] * 6, [1, 0, 0, 0, 0, 0]]).bool()
    for row in range(2):
        wanted = seen[row, 0][:, keys[row]] & ~hidden[row]
        if kind == "flash":
            assert torch.equal(got[row].bool(), wanted[-1])
        else:
            part = got[row, 0] if kind == "bool" else got[row, 0] == 0
            assert torch.equal(part, wanted[new.index[row]])


def test_records_of_two_reduced_passes() -> None:
    first = append(None, 0, Columns(torch.tensor([[0, 2], [1, 2]]), None), 3)
    assert first.covered == 3
    second = append(first, 5, Columns(torch.tensor([[1], [0]]), torch.tensor([[True], [False]])), 2)
    assert second.covered == 7
    assert second.columns.index.tolist() == [[0, 2, 3, 4, 6], [1, 2, 3, 4, 5]]
    assert second.columns.valid is not None
    assert second.columns.valid.tolist() == [[True] * 5, [True] * 4 + [False]]

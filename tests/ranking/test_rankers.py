"""The contract, held to by every ranker that is registered."""

from __future__ import annotations

import pytest
import torch

from thinsight.errors import ThinsightError
from thinsight.ranking import STATES, Context, Ranker, best, choose, get_ranker, list_rankers, register

HIDDEN = 12
SIZES = [[16], [16, 9], [], [1]]  # per row, N of each image


def context(sizes: list[list[int]] = SIZES, seed: int = 0, alive: torch.Tensor | None = None) -> Context:
    """A context with random attention, rows of different lengths padded at the end."""
    draw = torch.Generator().manual_seed(seed)
    tokens = max(1, *(sum(row) for row in sizes))
    image, index, size = (torch.zeros(len(sizes), tokens, dtype=torch.long) for _ in range(3))
    valid = torch.zeros(len(sizes), tokens, dtype=torch.bool)
    for row, row_sizes in enumerate(sizes):
        place = 0
        for number, n in enumerate(row_sizes):
            here = slice(place, place + n)
            image[row, here], size[row, here], valid[row, here] = number, n, True
            index[row, here] = torch.arange(n)
            place += n
    valid = valid if alive is None else alive
    queries = torch.rand(len(sizes), 5, generator=draw) < 0.7
    queries[:, 0] = True
    attention = torch.rand(len(sizes), 3, 5, tokens, generator=draw) * valid[:, None, None]
    return Context(
        layer=2,
        valid=valid,
        image=image,
        index=index,
        size=size,
        attention=attention,
        queries=queries,
        vision_attention=torch.rand(len(sizes), tokens, generator=draw),
        states=torch.randn(len(sizes), tokens, HIDDEN, generator=draw),
        text_states=torch.randn(len(sizes), 5, HIDDEN, generator=draw),
    )


def changed(given: Context, **what: torch.Tensor | None) -> Context:
    return Context(**{**vars(given), **what})


def where_true(mask: torch.Tensor, tensor: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """`tensor` (batch, tokens, ...) with `other` where `mask` (batch, tokens) is True."""
    return torch.where(mask.view(*mask.shape, *(1,) * (tensor.ndim - 2)), other, tensor)


def kept(ranker: Ranker, given: Context, rate: float) -> torch.Tensor:
    return choose(ranker.score(given), given.valid, given.image, (given.size * rate).ceil().long())


@pytest.fixture(params=list_rankers())
def ranker(request: pytest.FixtureRequest) -> Ranker:
    return get_ranker(request.param)


def test_all_rankers_of_the_design_are_there() -> None:
    assert set(list_rankers()) == {
        "cdpruner",
        "dart",
        "divprune",
        "downsample",
        "random",
        "sparsevlm",
        "staged",
        "text-attention",
        "uniform",
        "vision-attention",
        "visionzip",
        "vispruner",
    }


def test_scores_are_finite_float32_and_deterministic(ranker: Ranker) -> None:
    given = context()
    scores = ranker.score(given)
    assert scores.shape == given.valid.shape
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(scores, ranker.score(given))
    assert torch.equal(scores, get_ranker(ranker.to_dict()).score(given))


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_exactly_the_count_of_each_image_is_kept(ranker: Ranker, rate: float) -> None:
    given = context()
    chosen = kept(ranker, given, rate)
    for row, sizes in enumerate(SIZES):
        for image, n in enumerate(sizes):
            assert int((chosen & given.valid & (given.image == image))[row].sum()) == -(-n * rate // 1)
    assert not (chosen & ~given.valid).any()


def test_one_token_and_no_token(ranker: Ranker) -> None:
    assert kept(ranker, context([[1]]), 0.5).tolist() == [[True]]
    assert not kept(ranker, context([[]]), 0.5).any()


def test_fewer_tokens_are_a_subset_of_more(ranker: Ranker) -> None:
    given = context()
    before = given.valid
    for rate in (0.9, 0.6, 0.3, 0.1, 0.0):
        after = kept(ranker, given, rate)
        assert not (after & ~before).any()
        before = after


def test_a_row_is_ranked_alike_alone_and_in_a_batch(ranker: Ranker) -> None:
    given = context([[16, 9], [16]])
    row = {
        name: None if value is None else value[:1] if isinstance(value, torch.Tensor) else value
        for name, value in vars(given).items()
    }
    torch.testing.assert_close(ranker.score(Context(**row))[0], ranker.score(given)[0])


def test_half_dropped_is_scored_like_whole(ranker: Ranker) -> None:
    """What was dropped before does not disturb the ranking of what is left."""
    if STATES in ranker.needs and ranker.name != "downsample":
        pytest.skip("compares tokens with each other, so its ranking depends on which ones there are")
    whole = context([[16]])
    left = torch.arange(16)[None] % 2 == 0
    part = changed(whole, valid=left)
    assert torch.equal(ranker.score(part)[left], ranker.score(whole)[left])


def test_what_dropped_tokens_hold_is_not_looked_at(ranker: Ranker) -> None:
    whole = context([[16, 9], [16]])
    left = whole.valid & (whole.index % 3 != 0)
    given, noise = changed(whole, valid=left), context([[16, 9], [16]], seed=1)
    other = changed(
        given,
        states=where_true(~left, whole.states, noise.states * 100),
        vision_attention=where_true(~left, whole.vision_attention, noise.vision_attention + 5),
    )
    torch.testing.assert_close(ranker.score(other)[left], ranker.score(given)[left])


def test_rows_do_not_depend_on_their_place(ranker: Ranker) -> None:
    given = context()
    order = torch.tensor([2, 0, 3, 1])
    turned = Context(**{name: v[order] if isinstance(v, torch.Tensor) else v for name, v in vars(given).items()})
    valid = turned.valid
    torch.testing.assert_close(ranker.score(turned)[valid], ranker.score(given)[order][valid])
    whole, part = (ranker.merge(each, kept(ranker, each, 0.4)) for each in (turned, given))
    if whole is not None and part is not None:
        chosen = kept(ranker, turned, 0.4)
        torch.testing.assert_close(whole[chosen], part[order][chosen])


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.4, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_states_are_finite_and_stay_where_nothing_is_dropped(
    ranker: Ranker, rate: float, dtype: torch.dtype
) -> None:
    whole = context()
    given = changed(whole, states=whole.states.to(dtype), text_states=whole.text_states.to(dtype))
    chosen = kept(ranker, given, rate) & given.valid
    merged = ranker.merge(given, chosen)
    if type(ranker).merge is Ranker.merge or merged is None:
        assert merged is None
        return
    assert merged.shape == given.states.shape
    assert merged.dtype == dtype
    assert merged[chosen].isfinite().all()
    if rate == 1.0:
        assert torch.equal(merged[given.valid], given.states[given.valid])
    noise = context(seed=1).states.to(dtype) * 100
    padded = ranker.merge(changed(given, states=where_true(~given.valid, given.states, noise)), chosen)
    assert torch.equal(padded[chosen], merged[chosen])


def test_text_attention_is_the_mean_over_heads_and_real_queries() -> None:
    given = context()
    scores = get_ranker("text-attention").score(given)
    for row in range(len(SIZES)):
        wanted = given.attention[row][:, given.queries[row]].mean(dim=(0, 1))
        torch.testing.assert_close(scores[row], wanted)


@pytest.mark.parametrize(
    ("name", "missing", "need"),
    [
        ("text-attention", "attention", "attention"),
        ("vision-attention", "vision_attention", "attention"),
        ("sparsevlm", "attention", "attention"),
        ("sparsevlm", "states", "hidden states"),
        ("divprune", "states", "hidden states"),
        ("cdpruner", "states", "hidden states"),
        ("cdpruner", "text_states", "hidden states of the text"),
        ("dart", "states", "hidden states"),
        ("dart", "text_states", "hidden states of the text"),
        ("vispruner", "states", "hidden states"),
        ("vispruner", "vision_attention", "attention"),
        ("visionzip", "vision_attention", "attention"),
    ],
)
def test_a_missing_need_is_named(name: str, missing: str, need: str) -> None:
    with pytest.raises(ThinsightError, match=f"{name} needs {need}"):
        get_ranker(name).score(changed(context(), **{missing: None}))


@pytest.mark.parametrize("name", ["downsample", "visionzip"])
def test_merging_needs_states(name: str) -> None:
    given = changed(context(), states=None)
    with pytest.raises(ThinsightError, match=f"{name} needs hidden states"):
        get_ranker(name).merge(given, given.valid)


def test_random_depends_on_seed_and_image() -> None:
    given = context([[16, 16]])
    first, other = (get_ranker({"name": "random", "seed": seed}).score(given)[0] for seed in (0, 1))
    assert not torch.equal(first, other)
    assert not torch.equal(first[:16], first[16:])
    assert sorted(first[:16].tolist()) == list(range(16))


@pytest.mark.parametrize(("side", "count", "cell"), [(24, 144, 4), (24, 36, 8), (16, 64, 4), (8, 16, 4)])
def test_uniform_covers_the_image(side: int, count: int, cell: int) -> None:
    """Every square of the grid holds about its share of the kept tokens."""
    scores = get_ranker("uniform").score(context([[side * side]]))
    chosen = torch.zeros(side * side).scatter(0, scores[0].topk(count).indices, 1.0).view(side, side)
    squares = chosen.unfold(0, cell, cell).unfold(1, cell, cell).sum(dim=(2, 3))
    share = count * cell * cell / side**2
    assert squares.min() >= share / 2
    assert squares.max() <= share * 2


def test_uniform_spreads_along_a_sequence_that_is_no_grid() -> None:
    scores = get_ranker("uniform").score(context([[31]]))[0]  # a prime
    gaps = scores.topk(8).indices.sort().values.diff()
    assert int(gaps.max()) <= 7


def test_ties_fall_to_the_earlier_token() -> None:
    ones = torch.ones(1, 6)
    chosen = choose(ones, ones.bool(), ones.long(), torch.full((1, 6), 2))
    assert chosen[0].tolist() == [True, True, False, False, False, False]


def test_nan_loses_to_numbers_but_not_to_dropped_tokens() -> None:
    scores = torch.tensor([[float("nan"), -5.0, 3.0, 9.0]])
    valid = torch.tensor([[True, True, True, False]])
    group = torch.zeros(1, 4, dtype=torch.long)
    assert choose(scores, valid, group, group + 2)[0].tolist() == [False, True, True, False]
    assert choose(scores, valid, group, group + 3)[0].tolist() == [True, True, True, False]


def test_the_best_of_a_row_are_what_is_chosen_of_one_group() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (4, 20), generator=draw).float()  # many ties
    scores[1, ::3], scores[2, 5] = float("nan"), float("inf")
    valid = torch.rand(4, 20, generator=draw) < 0.8
    group = torch.zeros(4, 20, dtype=torch.long)
    for count in (0, 1, 7, 19, 20):
        wanted = choose(scores, valid, group, torch.full_like(group, count))
        assert torch.equal(best(scores, valid, count), wanted)


def test_groups_compete_apart() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 1.0, 2.0, 3.0]])
    group = torch.tensor([[0, 0, 0, 1, 1, 1]])
    count = torch.tensor([[1, 1, 1, 2, 2, 2]])
    assert choose(scores, group >= 0, group, count)[0].tolist() == [True, False, False, False, True, True]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nope", "ranker is 'nope'; choose one of"),
        ({"seed": 1}, "give a name"),
        (7, "give a name"),
        ({"name": "random", "sed": 1}, "no setting 'sed'; it has seed"),
        ({"name": "uniform", "seed": 1}, "it has none"),
        ({"name": "random", "seed": -1}, "seed is -1"),
        ({"name": "random", "seed": 1.5}, "seed is 1.5"),
        ({"name": "text-attention", "queries": "first"}, "choose one of last, instruction"),
        ({"name": "text-attention", "rows": 0}, "rows is 0; it must be a whole number of at least 1, or null"),
        ({"name": "dart", "vision_pivots": -1}, "vision_pivots is -1"),
        ({"name": "dart", "vision_pivots": 0, "text_pivots": 0}, "there must be a pivot"),
        ({"name": "vispruner", "keep": 1.5}, "keep is 1.5"),
        ({"name": "vispruner", "important": "half"}, "important is 'half'"),
        ({"name": "visionzip", "contextual": -0.1}, "contextual is -0.1"),
        ({"name": "cdpruner", "invert": 1}, "invert is 1"),
    ],
)
def test_bad_specifications(spec, message: str) -> None:
    with pytest.raises(ThinsightError, match=message):
        get_ranker(spec)


def test_specifications_round_trip() -> None:
    ranker = get_ranker({"name": "text-attention", "queries": "last"})
    assert ranker.to_dict() == {"name": "text-attention", "queries": "last"}
    assert get_ranker(ranker) is ranker
    assert get_ranker(ranker.to_dict()) == ranker
    assert hash(get_ranker(ranker.to_dict())) == hash(ranker)
    assert get_ranker("text-attention") != ranker
    assert repr(ranker) == "TextAttention(queries='last')"
    every_row = get_ranker({"name": "text-attention", "rows": None})
    assert every_row.to_dict() == {"name": "text-attention", "queries": "instruction", "rows": None}
    assert every_row.rows is None
    assert get_ranker("text-attention").rows == 16


def test_a_name_cannot_be_taken_twice() -> None:
    class Impostor(Ranker):
        name = "random"

        def score(self, context: Context) -> torch.Tensor:
            return context.valid.float()

    with pytest.raises(ThinsightError, match="'random' is taken by Random"):
        register(Impostor)

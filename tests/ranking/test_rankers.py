"""The contract, held to by every ranker that is registered, and what each one is for."""

from __future__ import annotations

import pytest
import torch

from thinsight.errors import ThinsightError
from thinsight.ranking import STATES, Context, Ranker, best, choose, get_ranker, list_rankers, register
from thinsight.testing import SIZES, RankerContract
from thinsight.testing import ranking_context as context


def changed(given: Context, **what: torch.Tensor | None) -> Context:
    return Context(**{**vars(given), **what})


class TestEveryRanker(RankerContract):
    @pytest.fixture(params=list_rankers())
    def ranker(self, request: pytest.FixtureRequest) -> Ranker:
        return get_ranker(request.param)

    def compares_tokens(self, ranker: Ranker) -> bool:
        return STATES in ranker.needs and ranker.name != "downsample"  # which goes by places alone


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

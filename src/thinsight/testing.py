"""What a ranker, a metric, a reader of data and a search are held to, as test classes for pytest.

An author outside of thinsight subclasses one in a test file and says what is to be tested; pytest runs the rest::

    class TestMine(RankerContract):
        @pytest.fixture def ranker(self):
            return get_ranker("mine")

The package holds its own to the same classes. Needs pytest; no model, no file, a second of the CPU.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from .budget import KeepBudget
from .errors import BadInput
from .evaluation.examples import check_examples, read_examples, stream_examples
from .evaluation.metrics import Metric, get_metric
from .evaluation.readers import READERS, Reader, Source
from .evaluation.result import Evaluation
from .ranking import STATES, Context, Ranker, choose, get_ranker
from .reduction import Reduction
from .schedule import Schedule
from .searches import SEARCHES, Search, SearchEvaluator, SearchResult

SIZES = ((16,), (16, 9), (), (1,))  # per row of a batch, N of each image


def ranking_context(sizes: Sequence[Sequence[int]] = SIZES, seed: int = 0) -> Context:
    """What a ranker may see, drawn at random; rows of different lengths are padded at the end."""
    draw = torch.Generator().manual_seed(seed)
    rows, tokens = len(sizes), max(1, *(sum(row) for row in sizes))
    known = [[(number, place, n) for number, n in enumerate(row) for place in range(n)] for row in sizes]
    padded = torch.tensor([row + [(0, 0, 0)] * (tokens - len(row)) for row in known])  # (rows, tokens, 3)
    image, index, size = padded.permute(2, 0, 1).contiguous()
    queries = torch.rand(rows, 5, generator=draw) < 0.7
    queries[:, 0] = True
    attention = torch.rand(rows, 3, 5, tokens, generator=draw) * (size > 0)[:, None, None]
    received = torch.rand(rows, tokens, generator=draw)
    states, text = (torch.randn(rows, each, 12, generator=draw) for each in (tokens, 5))
    return Context(2, size > 0, image, index, size, attention, queries, received, states, text)


def _where(mask: Tensor, then: Any, other: Any) -> Tensor:
    """`then` where `mask` (batch, tokens) is True, else `other`; both (batch, tokens, ...)."""
    return torch.where(mask.view(*mask.shape, *(1,) * (then.ndim - 2)), then, other)


def _rows(context: Context, rows: Any) -> Context:
    return Context(**{name: each[rows] if isinstance(each, Tensor) else each for name, each in vars(context).items()})


def _kept(ranker: Ranker, context: Context, rate: float) -> Tensor:
    return choose(ranker.score(context), context.valid, context.image, (context.size * rate).ceil().long())


class RankerContract:
    """Scores are finite and depend on nothing but the context and the settings. Give the fixture `ranker`."""

    def compares_tokens(self, ranker: Ranker) -> bool:
        """Whether a token's rank depends on which others are left."""
        return STATES in ranker.needs

    def test_scores_are_finite_float32_and_deterministic(self, ranker: Ranker) -> None:
        context = ranking_context()
        scores = ranker.score(context)
        assert (scores.shape, scores.dtype) == (context.valid.shape, torch.float32)
        assert scores.isfinite().all()
        assert torch.equal(scores, ranker.score(context))
        assert torch.equal(scores, get_ranker(ranker.to_dict()).score(context))  # by name, with its settings

    @pytest.mark.parametrize("rate", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
    def test_exactly_the_count_of_each_image_is_kept(self, ranker: Ranker, rate: float) -> None:
        context = ranking_context()
        chosen = _kept(ranker, context, rate)
        for row, sizes in enumerate(SIZES):
            for image, n in enumerate(sizes):
                assert int((chosen & context.valid & (context.image == image))[row].sum()) == math.ceil(n * rate)
        assert not (chosen & ~context.valid).any()

    def test_one_token_and_no_token(self, ranker: Ranker) -> None:
        assert _kept(ranker, ranking_context([[1]]), 0.5).tolist() == [[True]]
        assert not _kept(ranker, ranking_context([[]]), 0.5).any()

    def test_fewer_tokens_are_a_subset_of_more(self, ranker: Ranker) -> None:
        context = ranking_context()
        nested = [context.valid, *(_kept(ranker, context, rate) for rate in (0.9, 0.6, 0.3, 0.1, 0.0))]
        assert not any((after & ~before).any() for before, after in itertools.pairwise(nested))

    def test_a_row_is_ranked_alike_alone_and_in_a_batch(self, ranker: Ranker) -> None:
        context = ranking_context([[16, 9], [16]])
        torch.testing.assert_close(ranker.score(_rows(context, slice(1)))[0], ranker.score(context)[0])

    def test_half_dropped_is_scored_like_whole(self, ranker: Ranker) -> None:
        if self.compares_tokens(ranker):
            pytest.skip("compares tokens with each other, so its ranking depends on which ones there are")
        whole = ranking_context([[16]])
        left = torch.arange(16)[None] % 2 == 0
        assert torch.equal(ranker.score(replace(whole, valid=left))[left], ranker.score(whole)[left])

    def test_what_dropped_tokens_hold_is_not_looked_at(self, ranker: Ranker) -> None:
        whole, noise = ranking_context([[16, 9], [16]]), vars(ranking_context([[16, 9], [16]], seed=1))
        left = whole.valid & (whole.index % 3 != 0)
        context = replace(whole, valid=left)
        states = _where(left, whole.states, noise["states"] * 100)
        received = _where(left, whole.vision_attention, noise["vision_attention"] + 5)
        other = replace(context, states=states, vision_attention=received)
        torch.testing.assert_close(ranker.score(other)[left], ranker.score(context)[left])

    def test_rows_do_not_depend_on_their_place(self, ranker: Ranker) -> None:
        context, order = ranking_context(), torch.tensor([2, 0, 3, 1])
        turned = _rows(context, order)
        torch.testing.assert_close(ranker.score(turned)[turned.valid], ranker.score(context)[order][turned.valid])
        whole, part = (ranker.merge(each, _kept(ranker, each, 0.4)) for each in (turned, context))
        if whole is not None and part is not None:
            chosen = _kept(ranker, turned, 0.4)
            torch.testing.assert_close(whole[chosen], part[order][chosen])

    @pytest.mark.parametrize("rate", [0.0, 0.01, 0.4, 1.0])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_merged_states_are_finite_and_stay_where_nothing_is_dropped(
        self, ranker: Ranker, rate: float, dtype: torch.dtype
    ) -> None:
        whole, noise = vars(ranking_context()), vars(ranking_context(seed=1))["states"].to(dtype)
        states = whole["states"].to(dtype)
        context = replace(ranking_context(), states=states, text_states=whole["text_states"].to(dtype))
        chosen = _kept(ranker, context, rate) & context.valid
        merged = ranker.merge(context, chosen)
        if type(ranker).merge is Ranker.merge or merged is None:
            assert merged is None
            return
        assert (merged.shape, merged.dtype) == (states.shape, dtype)
        assert merged[chosen].isfinite().all()
        if rate == 1.0:
            assert torch.equal(merged[context.valid], states[context.valid])
        padded: Any = ranker.merge(replace(context, states=_where(context.valid, states, noise * 100)), chosen)
        assert torch.equal(padded[chosen], merged[chosen])


class MetricContract:
    """Scores are shares; what `Metric.ceiling` and `Metric.lost` promise is true. Give the fixture `metric`."""

    @pytest.fixture
    def cases(self) -> list[tuple[str, list[str]]]:
        """Texts with the answers that count as right; every second text is one of these, told otherwise."""
        draw, letters = random.Random(0), "abA1 .,%5\u00e9\u0301\u00df\u3002"
        cases = []
        for number in range(200):
            answers = ["".join(draw.choices(letters, k=draw.randint(1, 6))) for _ in range(draw.randint(1, 4))]
            answer = draw.choice(answers)
            told = draw.choice([answer, answer.upper(), answer.lower()]) + draw.choice(["", ".", " "])
            cases.append((told if number % 2 else "".join(draw.choices(letters, k=4)), answers))
        return cases

    def test_it_is_known_by_its_name_and_needs_an_answer(self, metric: Metric) -> None:
        assert get_metric(metric.name) is metric
        with pytest.raises(BadInput, match="needs at least one answer"):
            metric("a", [])

    def test_a_score_is_a_share_that_an_answer_may_reach(self, metric: Metric, cases: Any) -> None:
        for text, answers in cases:
            score = metric(text, answers)
            assert 0.0 <= score <= metric.ceiling(answers) <= 1.0
            assert score == metric(text, answers) == metric(text, answers[::-1])  # in any order of the answers

    def test_no_beginning_of_what_scores_is_lost(self, metric: Metric, cases: Any) -> None:
        for text, answers in cases:
            if metric(text, answers) > 0:
                for end in range(len(text) + 1):
                    assert not metric.lost(text[:end], answers)
                    assert not metric.lost(text[:end] + "\ufffd", answers)  # in the middle of a character

    def test_what_is_lost_scores_nothing_however_it_goes_on(self, metric: Metric, cases: Any) -> None:
        for (text, answers), (rest, _) in zip(cases, cases[::-1], strict=True):
            if metric.lost(text, answers):
                assert metric(text, answers) == metric(text + rest, answers) == 0


class ReaderContract:
    """Rows become examples, one at a time and the same ones again; what is wrong is one line. Give the fixtures
    `reader`, and `data`: the path of data of at least two good examples, which is known for what it is."""

    def test_it_is_known_by_its_name(self, reader: Reader, data: Path) -> None:
        assert READERS[reader.name] is reader
        assert reader.form.isprintable()
        assert reader.reads(Source(str(data), str(data)))

    def test_its_rows_become_good_examples(self, reader: Reader, data: Path) -> None:
        examples = read_examples(f"{reader.name}:{data}")
        assert len(examples) > 1
        check_examples(examples)

    def test_it_reads_the_same_again(self, reader: Reader, data: Path) -> None:
        assert read_examples(data) == read_examples(f"{reader.name}:{data}")

    def test_rows_come_one_at_a_time(self, reader: Reader, data: Path) -> None:
        whole = read_examples(data)
        assert read_examples(data, 1) == whole[:1]
        one, other = (iter(stream_examples(data)) for _ in range(2))
        assert [next(one), next(other), next(one)] == [whole[0], whole[0], whole[1]]

    def test_a_row_says_where_it_is(self, reader: Reader, data: Path) -> None:
        places = [row.where for row in reader.rows(Source(str(data), str(data)))]
        assert len(set(places)) == len(places)
        assert all(place.isprintable() for place in places)

    def test_what_is_not_there_is_refused_in_one_line(self, reader: Reader, data: Path) -> None:
        gone = data.with_name(f"gone{data.suffix}")
        with pytest.raises(BadInput) as caught:
            read_examples(f"{reader.name}:{gone}")
        assert gone.name in str(caught.value)


class Oracle(SearchEvaluator):
    """An evaluator without a model: 6 layers, 16 tokens, 24 examples, each hurt by tokens that leave before layer 4. It
    is interrupted, as by Ctrl-C, after ``left`` evaluations."""

    num_layers, num_vision_tokens, full_score, samples = 6, 16, 1.0, True

    def __init__(self, left: float = math.inf) -> None:
        self.left = left

    def reduction(self, schedule: Schedule) -> Reduction:
        return Reduction(schedule, "uniform")

    def statistics(self, reduction: Reduction) -> np.ndarray:
        return np.linspace(0, 1, 24)

    def sample(self, candidate: Schedule | Reduction, /, share: float) -> Evaluation:
        if self.left <= 0:
            raise KeyboardInterrupt
        self.left -= 1
        reduction = self.bind(candidate)
        family, likely = reduction.adaptive, []
        for place in np.linspace(0, 1, 24)[: max(1, round(24 * share))]:
            own = reduction.schedule if family is None else family.schedules[family.level(float(place))]
            likely.append(math.exp(-0.06 * (0.2 + place) * sum(16 - count for count in own.counts(16)[1:4])))
        score = float(np.mean([each > 0.5 for each in likely]))
        return Evaluation(score=score, agreement=float(np.mean(likely)), share=len(likely) / 24)

    def __call__(self, candidate: Schedule | Reduction, /) -> Evaluation:
        return self.sample(candidate, 1.0)


class SearchContract:
    """What is found holds its goal, was run, and is decided by the seed, also where the search was interrupted. Give
    the fixture `search`."""

    def run(self, search: Search, goal: Any = None, left: float = math.inf, **told: Any) -> SearchResult:
        """What it finds under a budget, or a tolerance, with three trials more than it needs."""
        if search.under == "budget":
            return search(Oracle(left), goal or KeepBudget(6, 16, 0.5), n_trials=search.least_trials + 3, **told)
        return search(Oracle(left), 0.25 if goal is None else goal, **told)

    def test_it_is_known_by_its_name(self, search: Search) -> None:
        assert SEARCHES[search.name] is search
        assert search.title

    def test_what_is_found_holds_its_goal_and_was_run(self, search: Search) -> None:
        for share in (0.5, 0.25, 0.0 if search.under == "max_drop" else 0.2):
            budget = KeepBudget(6, 16, share) if search.under == "budget" else None
            found = self.run(search, share if budget is None else budget)
            assert found.score == Oracle()(found.reduction).score
            if budget is None:
                assert found.score >= 1 - share - 1e-9
            else:
                assert found.reduction.average(budget.spent) <= budget.limit * (1 + 1e-9)
                assert "n_trials" not in search.parameters or found.evaluations <= search.least_trials + 3

    def test_a_seed_decides(self, search: Search) -> None:
        one, two = self.run(search, seed=3), self.run(search, seed=3)
        assert (one.reduction, one.score) == (two.reduction, two.score)
        assert [trial.schedule for trial in one.trials] == [trial.schedule for trial in two.trials]

    def test_options_are_heard(self, search: Search) -> None:
        if "first_layer" in search.parameters:
            assert self.run(search, first_layer=2).schedule.keep_rates[:2] == (1.0, 1.0)
        if "n_trials" in search.parameters:
            with pytest.raises(BadInput, match="n_trials is 0"):
                search(Oracle(), KeepBudget(6, 16, 0.5) if search.under == "budget" else 0.1, n_trials=0)

    @pytest.mark.parametrize("left", [1, 3, 6])
    def test_resumed_equals_straight(self, search: Search, left: int, tmp_path: Path) -> None:
        if "study" not in search.parameters:
            pytest.skip("keeps no journal")
        with suppress(KeyboardInterrupt):  # or it was done by then
            self.run(search, left=left, study=tmp_path / "study")
        straight, resumed = self.run(search), self.run(search, study=tmp_path / "study", resume=True)
        assert (resumed.reduction, resumed.score) == (straight.reduction, straight.score)
        assert [trial.schedule for trial in resumed.trials] == [trial.schedule for trial in straight.trials]

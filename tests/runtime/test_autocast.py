"""Autocast changes what the model computes, not how vision tokens are scored and ranked by it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conformance.checks import generate
from test_captured import Tape
from tiny import tiny_inputs, tiny_llava
from torch import Tensor

import thinsight.runtime.scoring as scoring
from thinsight.evaluation.examples import load_examples
from thinsight.evaluation.prompts import PromptReader
from thinsight.experimental.captured import CapturedPrefill
from thinsight.loading import load_demo
from thinsight.ranking import (
    STATISTICS,
    Context,
    Ranker,
    get_ranker,
    list_rankers,
    mean_rows,
    row_weights,
    weighted_rows,
)
from thinsight.reduction import Reduction
from thinsight.runtime import apply, layer_scores
from thinsight.runtime.anatomy import attention_of, decoder_layers
from thinsight.runtime.scoring import Probe, TextRows, attention_rows
from thinsight.schedule import Adaptive, Schedule

DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
UNEQUAL = [[3, 9], [2, 3, 1], [7], [1, 2]]  # rows that rank stand beside filling
SCHEDULE = Schedule([1, 0.5, 0.25, 0.25])


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", dtype)


@DTYPES
@pytest.mark.parametrize("ranker", ["text-attention", "sparsevlm"])
def test_the_demo_keeps_the_tokens_that_it_keeps_without(dtype: torch.dtype, ranker: str) -> None:
    """Of four questions whose texts differ in length, 64 tokens each; all but two at most."""
    examples, (model, processor) = load_examples("demo:test"), load_demo()
    inputs = PromptReader(model, processor).batch([examples[number] for number in (0, 40, 80, 120)])
    assert len(set(inputs["attention_mask"].sum(1).tolist())) > 1
    with apply(model, Schedule([1.0] * 3 + [0.25] * 9), ranker=ranker) as handle, torch.no_grad():
        model(**inputs, logits_to_keep=1)
        wanted = handle.kept(11)
        with autocast(dtype):
            model(**inputs, logits_to_keep=1)
        for got, kept in zip(handle.kept(11), wanted, strict=True):
            assert len(set(got.tolist()) & set(kept.tolist())) >= 62


@contextmanager
def seen_by_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor, float]]]:
    """Queries, keys and scalings that an armed module computes with."""
    calls: list[tuple[Tensor, Tensor, float]] = []
    real = scoring._real_attention

    def watched(module: Any) -> Any:
        def attention(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **more: Any) -> Any:
            calls.append((query, key, more["scaling"]))
            return real(module)(module, query, key, value, mask, **more)

        return attention

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_real_attention", watched)
        yield calls


@DTYPES
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_rows_are_the_softmax_of_what_attention_sees(
    dtype: torch.dtype, attn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, of queries and keys that autocast has rounded; rows of filling are numbers, too."""
    model, batch = tiny_llava(attn), tiny_inputs(UNEQUAL, seed=5)
    width = batch["input_ids"].shape[1]
    every = torch.arange(width).expand(len(UNEQUAL), -1)
    request = TextRows(every, every, torch.ones_like(every, dtype=torch.bool))
    probe = Probe(attention_of(decoder_layers(model)[1]))
    with seen_by_attention(monkeypatch) as calls, autocast(dtype), torch.no_grad():
        probe.arm(request)
        model(**batch)
        probe.disarm()
    ((query, key, scaling),) = calls
    logits = query.double() @ key.double().repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scaling
    real = batch["attention_mask"].bool()
    seen = torch.ones(width, width, dtype=torch.bool).tril() & real[:, None, None]
    wanted = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    assert request.result is not None
    assert request.result.dtype == torch.float32
    assert request.result.isfinite().all()
    asked = real[:, None, :, None].expand_as(wanted)
    torch.testing.assert_close(request.result[asked].double(), wanted[asked], atol=1e-6, rtol=1e-5)


def watched(name: str) -> tuple[Ranker, list[tuple[Context, Tensor, Tensor | None]]]:
    """A ranker, and what it is asked and answers: scores, and what it merges."""
    ranker = get_ranker(name)
    score, merge, asked = ranker.score, ranker.merge, []

    def watched_score(context: Context) -> Tensor:
        found = score(context)
        asked.append((context, found, None))
        return found

    def watched_merge(context: Context, kept: Tensor) -> Tensor | None:
        found = merge(context, kept)
        assert torch.equal(asked[-1][0].valid, context.valid)
        asked[-1] = (*asked[-1][:2], None if found is None else torch.where(kept[..., None], found, 0))
        return found

    ranker.score = watched_score  # type: ignore[method-assign]
    ranker.merge = watched_merge  # type: ignore[method-assign]
    return ranker, asked


@DTYPES
@pytest.mark.parametrize("name", list_rankers())
def test_a_ranker_says_what_it_says_without_autocast(name: str, dtype: torch.dtype) -> None:
    """To the bit, of the same context; and no score is NaN."""
    model, batch = tiny_llava(), tiny_inputs(UNEQUAL, seed=6)
    ranker, asked = watched(name)
    with apply(model, SCHEDULE, ranker=ranker) as handle, autocast(dtype), torch.no_grad():
        model(**batch)
        kept = [handle.kept(layer) for layer in (1, 2)]
    assert len(asked) == 2
    plain = get_ranker(name)
    for (context, scores, merged), layer in zip(asked, kept, strict=True):
        assert torch.equal(scores, plain.score(context))
        assert scores[context.valid].isfinite().all()
        if merged is not None:
            mask = torch.zeros_like(context.valid)
            for row, places in enumerate(layer):
                mask[row, places] = True
            again = plain.merge(context, mask)
            assert again is not None
            assert torch.equal(merged, torch.where(mask[..., None], again, 0))


@DTYPES
@pytest.mark.parametrize("name", ["text-attention", "vision-attention"])
def test_scores_of_the_full_model_are_read_without_autocast(name: str, dtype: torch.dtype) -> None:
    model, batch = tiny_llava(), tiny_inputs(UNEQUAL, seed=7)
    ranker, asked = watched(name)
    with autocast(dtype):
        found = layer_scores(model, batch, ranker)
    assert len(asked) == 4
    for (context, _, _), scores in zip(asked, found.scores, strict=True):
        assert torch.equal(scores, get_ranker(name).score(context))
    assert found.scores.isfinite().all()


@DTYPES
@pytest.mark.parametrize("name", STATISTICS)
def test_a_prompts_statistic_is_computed_without_autocast(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, asked = STATISTICS[name], []
    monkeypatch.setitem(STATISTICS._items, name, lambda *given: asked.append(given) or plain(*given))
    model, batch = tiny_llava(), tiny_inputs(UNEQUAL, seed=8)
    adaptive = Adaptive(name, 1, (), (SCHEDULE,), (1.0,))
    with apply(model, Reduction(SCHEDULE, adaptive=adaptive)) as handle, autocast(dtype), torch.no_grad():
        model(**batch)
        found = handle.statistic()
    (given,) = asked
    assert found == plain(*given).tolist()
    assert torch.tensor(found).isfinite().all()


@DTYPES
def test_nothing_is_recorded_under_autocast(dtype: torch.dtype) -> None:
    """Weights that it has cast live no longer than its context; and a recording made without it knows of no
    casts."""
    model, batch = tiny_llava(), tiny_inputs(UNEQUAL, seed=9)
    with apply(model, SCHEDULE) as handle:
        with autocast(dtype):
            wanted = torch.stack(generate(model, batch, 3).logits)
        with CapturedPrefill(model, handle, recorder=Tape()) as fast:
            generate(model, batch, 3)
            assert fast.replayed == 1
            with autocast(dtype):
                assert torch.equal(torch.stack(generate(model, batch, 3).logits), wanted)
            assert fast.replayed == 1


def test_rows_without_weight_have_no_part_in_a_mean() -> None:
    """A model may leave anything at padding."""
    attention = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    queries = torch.tensor([[True, True, True, True], [False, True, False, True]])
    wanted = torch.stack([attention[0].mean((0, 1)), attention[1][:, [1, 3]].mean((0, 1))])
    attention[1, :, [0, 2]] = torch.nan
    torch.testing.assert_close(mean_rows(attention, queries), wanted)
    torch.testing.assert_close(weighted_rows(attention, row_weights(queries)), wanted)


def test_a_mask_of_minus_infinity_gives_numbers() -> None:
    """A user's own mask may hide a row's every key so."""
    draw = torch.Generator().manual_seed(2)
    query, key = torch.randn(1, 2, 3, 8, generator=draw), torch.randn(1, 2, 3, 8, generator=draw)
    seen = torch.tensor([[0, 0, 0], [0, 1, 0], [0, 1, 1]]).bool()
    mask = torch.zeros(3, 3).masked_fill(~seen, -torch.inf)[None, None]
    rows = torch.tensor([[0, 1, 2]])
    got = attention_rows(query, key, mask, 1.0, rows, is_causal=True)
    assert got.isfinite().all()
    wanted = (query @ key.mT + mask).softmax(-1)
    torch.testing.assert_close(got[:, :, 1:], wanted[:, :, 1:])

"""Attention rows read beside any implementation are the rows that eager attention would return."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tiny import IMAGE, tiny_inputs, tiny_llava
from torch.utils._python_dispatch import TorchDispatchMode

from thinsight.errors import Unsupported
from thinsight.ranking import weighted_rows
from thinsight.runtime import apply, encode_images, layer_scores, scoring
from thinsight.runtime.anatomy import attention_of, decoder_layers
from thinsight.runtime.scoring import Probe, TextRows, attention_rows
from thinsight.schedule import Schedule

ROWS = [[3, 5], [2, 3, 9], [7], [1, 2]]


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("queries", ["last", "instruction"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_layer_scores_equal_eager_attentions(attn: str, queries: str, kv_heads: int) -> None:
    batch = tiny_inputs(ROWS, seed=21)
    scores = layer_scores(tiny_llava(attn, kv_heads=kv_heads), batch, {"name": "text-attention", "queries": queries})
    with torch.no_grad():
        attentions = tiny_llava("eager", kv_heads=kv_heads)(**batch, output_attentions=True).attentions
    for row, ids in enumerate(batch["input_ids"]):
        vision = (ids == IMAGE).nonzero().flatten()
        got = scores.row(row)
        assert got.shape == (4, len(vision))
        if len(vision) == 0:
            continue
        asked = slice(-1, None) if queries == "last" else slice(int(vision[-1]) + 1, None)
        for layer, attention in enumerate(attentions):
            wanted = attention[row, :, asked][:, :, vision].mean(dim=(0, 1))
            torch.testing.assert_close(got[layer], wanted, atol=1e-6, rtol=1e-4)


def test_layer_scores_leave_no_trace() -> None:
    model = tiny_llava()
    configs = [attention_of(layer).config for layer in decoder_layers(model)]
    layer_scores(model, tiny_inputs(ROWS))
    assert all(attention_of(x).config is c for x, c in zip(decoder_layers(model), configs, strict=True))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_the_softmax(is_causal: bool, masked: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=draw)
    key = torch.randn(2, 2, 9, 8, generator=draw)  # 4 cached columns before the 5 new ones
    mask = None
    seen = torch.ones(2, 5, 9, dtype=torch.bool)
    if is_causal:
        seen = seen.tril(diagonal=4)
    if masked:
        padding = torch.tensor([[1] * 9, [0, 0] + [1] * 7]).bool()
        seen = seen & padding[:, None]
        mask = padding
    logits = query @ key.repeat_interleave(2, dim=1).transpose(2, 3) * 0.3
    wanted = logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    rows = torch.tensor([[4, 1], [3, 3]])
    got = attention_rows(query, key, mask, 0.3, rows, is_causal=is_causal)
    for batch in range(2):
        torch.testing.assert_close(got[batch], wanted[batch][:, rows[batch]])
    four = seen[:, None]
    torch.testing.assert_close(attention_rows(query, key, four, 0.3, rows, is_causal=True), got)
    added = torch.zeros(four.shape).masked_fill(~four, torch.finfo(torch.float32).min)
    torch.testing.assert_close(attention_rows(query, key, added, 0.3, rows, is_causal=True), got)
    for row in range(2):  # alone, and laid out as heads are before attention transposes them
        one = [each[row : row + 1].transpose(1, 2).contiguous().transpose(1, 2) for each in (query, key)]
        some = None if mask is None else mask[row : row + 1]
        alone = attention_rows(*one, some, 0.3, rows[row : row + 1], is_causal=is_causal)
        torch.testing.assert_close(alone, got[row : row + 1])


def test_a_row_that_sees_nothing_has_a_softmax_all_the_same() -> None:
    """A padding row under left padding: whatever it gives, it may not be NaN, for it is weighted with 0."""
    draw = torch.Generator().manual_seed(1)
    query, key = torch.randn(1, 2, 4, 8, generator=draw), torch.randn(1, 2, 4, 8, generator=draw)
    padding = torch.tensor([[False, False, True, True]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril() & padding
    for mask in (padding, causal[None, None]):
        got = attention_rows(query, key, mask, 1.0, torch.tensor([[0, 3]]), is_causal=True)
        assert got.isfinite().all()
        torch.testing.assert_close(got.sum(-1), torch.ones(1, 2, 2))


def test_vision_attention_is_what_the_class_token_gives() -> None:
    batch = tiny_inputs(ROWS, seed=22)
    encoded = encode_images(tiny_llava("sdpa"), batch, "vision-attention")
    tower = tiny_llava("eager").model.vision_tower
    with torch.no_grad():
        attentions = tower(batch["pixel_values"], output_attentions=True).attentions
    # feature layer -2 of 3 layers is the output of layer 1
    wanted = attentions[1][:, :, 0, 1:].mean(dim=1)
    assert encoded.received is not None
    torch.testing.assert_close(torch.stack(encoded.received), wanted)
    assert [len(feature) for feature in encoded.features] == [16] * 4


def test_without_a_class_token_the_average_row_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    import thinsight.runtime.encoding as encoding

    batch = tiny_inputs(ROWS, seed=22)
    source = encoding.vision_source
    monkeypatch.setattr(
        encoding, "vision_source", lambda m: type(source(m))(**{**vars(source(m)), "has_class_token": False})
    )
    encoded = encode_images(tiny_llava("sdpa"), batch, "vision-attention")
    with torch.no_grad():
        attentions = tiny_llava("eager").model.vision_tower(batch["pixel_values"], output_attentions=True).attentions
    assert encoded.received is not None
    torch.testing.assert_close(torch.stack(encoded.received), attentions[1].mean(dim=(1, 2))[:, 1:])


def test_a_tower_whose_layers_are_not_as_many_as_its_config_says_is_refused() -> None:
    model = tiny_llava()
    model.model.vision_tower.config.num_hidden_layers = 5
    with pytest.raises(Unsupported, match="has no list of the 5 layers"):
        apply(model, Schedule([1, 0.5, 0.5, 0.5]), ranker="vision-attention")


def test_two_probes_on_one_module_both_read() -> None:
    model = tiny_llava("eager")
    attention = attention_of(decoder_layers(model)[1])
    config = attention.config
    first, second = Probe(attention), Probe(attention)
    rows = torch.tensor([[5]])
    requests = [TextRows(rows, torch.tensor([c]), torch.ones(1, len(c)).bool()) for c in ([1, 2], [3])]
    first.arm(requests[0])
    second.arm(requests[1])
    with torch.no_grad():
        wanted = model(**tiny_inputs([[8]]), output_attentions=True).attentions[1]
    assert first.disarm() is requests[0]
    assert attention.config is not config
    assert second.disarm() is requests[1]
    assert attention.config is config
    for request, columns in zip(requests, ([1, 2], [3]), strict=True):
        assert request.result is not None
        torch.testing.assert_close(request.result[:, :, 0], wanted[:, :, 5, columns])


class Counted(int):
    """A number that is only counted under a lock."""

    lock: threading.Lock

    def _changed(self, by: int) -> Counted:
        assert self.lock.locked()
        changed = Counted(int(self) + by)
        changed.lock = self.lock
        return changed

    def __add__(self, other: int) -> Counted:
        return self._changed(other)

    def __sub__(self, other: int) -> Counted:
        return self._changed(-other)


def test_calls_of_all_threads_are_counted_under_the_lock() -> None:
    """An update that two threads make at once may be lost, which would leave the module armed for ever."""
    attention = attention_of(decoder_layers(tiny_llava())[1])
    config, probe = attention.config, Probe(attention)
    start = Counted(0)
    start.lock = probe._arming.lock
    probe._arming.calls[probe] = start
    rows = torch.tensor([[1]])
    request = TextRows(rows, rows, torch.ones_like(rows, dtype=torch.bool))
    threads = [threading.Thread(target=probe.arm, args=(request,)) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    assert probe._arming.calls[probe] == 3
    assert attention.config is not config
    probe.restore()
    assert attention.config is config


def test_ranking_in_a_reduced_layer_sees_what_is_left() -> None:
    """Weights of later rankings are a softmax over what is still there, not over the dropped tokens too."""
    from thinsight.ranking import get_ranker

    model = tiny_llava()
    ranker = get_ranker("text-attention")
    ranker.pools = False  # so that whole rows are read
    contexts = []
    score = ranker.score
    ranker.score = lambda context: contexts.append(context) or score(context)  # type: ignore[method-assign]
    batch = tiny_inputs([[3, 1]])
    with apply(model, Schedule([1, 0.5, 0.25, 0.25]), ranker=ranker), torch.no_grad():
        model(**batch)
    assert [context.layer for context in contexts] == [1, 2]
    assert [int(context.valid.sum()) for context in contexts] == [16, 8]
    attention = contexts[1].attention
    assert attention.dtype == torch.float32
    assert (attention[:, :, :, ~contexts[1].valid[0]] == 0).all()
    assert (attention.sum(-1) < 1).all()


def test_pooled_rows_are_the_mean_of_whole_ones() -> None:
    """Over heads and real rows, in a batch whose prompts have different numbers of them."""
    from thinsight.ranking import get_ranker

    model, batch = tiny_llava(), tiny_inputs([[3, 1], [2, 6], [1, 2, 2]])
    found = {}
    for pools in (True, False):
        ranker = get_ranker("text-attention")
        ranker.pools = pools
        score, found[pools] = ranker.score, []

        def keep(context, to=found[pools], score=score):
            to.append(score(context).masked_fill(~context.valid, 0))
            assert (context.attention is None) == (context.pooled is not None)
            return to[-1]

        ranker.score = keep  # type: ignore[method-assign]
        with apply(model, Schedule([1, 0.5, 0.25, 0.25]), ranker=ranker), torch.no_grad():
            model(**batch)
    assert len(found[True]) == 2
    for pooled, whole in zip(found[True], found[False], strict=True):
        torch.testing.assert_close(pooled, whole)


@pytest.mark.parametrize("causal_mask", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_few_heads_at_a_time_are_all_of_them(
    kv_heads: int, causal_mask: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(3)
    query, key = torch.randn(3, 4, 9, 8, generator=draw), torch.randn(3, kv_heads, 9, 8, generator=draw)
    mask = torch.ones(9, 9, dtype=torch.bool).tril()[None, None].expand(3, 4, 9, 9) if causal_mask else None
    rows = torch.tensor([[8, 1], [3, 8], [5, 8]])
    weights = torch.tensor([[0.5, 0.5], [0.0, 1.0], [0.25, 0.75]])
    whole = attention_rows(query, key, mask, 0.3, rows, is_causal=True)
    pooled = weighted_rows(whole, weights)
    assert torch.equal(attention_rows(query, key, mask, 0.3, rows, is_causal=True, weights=weights), pooled)
    for numbers in (1, 9 * 8, 2 * 9 * 8, 5 * 9 * 8):
        monkeypatch.setattr(scoring, "_NUMBERS_AT_ONCE", numbers)
        torch.testing.assert_close(attention_rows(query, key, mask, 0.3, rows, is_causal=True), whole)
        got = attention_rows(query, key, mask, 0.3, rows, is_causal=True, weights=weights)
        torch.testing.assert_close(got, pooled)
        one = [each[:1] for each in (query, key)]
        some = None if mask is None else mask[:1]
        alone = attention_rows(*one, some, 0.3, rows[:1], is_causal=True, weights=weights[:1])
        torch.testing.assert_close(alone, got[:1])


class _Largest(TorchDispatchMode):
    """The most bytes that any one tensor made meanwhile has."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, torch.Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return made


def test_memory_is_bounded_where_prompts_are_long() -> None:
    """16,384 vision tokens and 64 rows of text, two prompts of 16 heads: 128 MiB of softmax, never there at once."""
    query, key = torch.zeros(2, 16, 64, 16, dtype=torch.bfloat16), torch.zeros(2, 4, 16_448, 16, dtype=torch.bfloat16)
    rows = torch.arange(64).expand(2, -1)
    with _Largest() as largest:
        got = attention_rows(query, key, None, 1.0, rows, is_causal=True, weights=torch.full((2, 64), 1 / 64))
    assert got.shape == (2, 16_448)
    torch.testing.assert_close(got.sum(1), torch.ones(2))
    assert largest.bytes <= 4 * scoring._NUMBERS_AT_ONCE < 4 * 2 * 16 * 64 * 16_448

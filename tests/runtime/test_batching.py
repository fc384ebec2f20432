"""A batch answers as its rows do one by one, and beams, samples and copies of a cache find their tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from reference import unpadded
from tiny import EOS, PAD, tiny_inputs, tiny_llava
from transformers import StaticCache
from transformers.cache_utils import StaticLayer

from thinsight.errors import ThinsightError
from thinsight.runtime import apply, encode_images
from thinsight.runtime.cache import CACHE
from thinsight.schedule import Schedule

ROWS = [[3, 5], [2, 3, 9], [7], [1, 2]]
SCHEDULE = Schedule([1, 0.7, 0.7, 0.2])
NEW = 8


def alone(model, batch: dict[str, torch.Tensor], row: int, **options) -> torch.Tensor:
    ids, pixels = unpadded(batch, row)
    given = {} if pixels is None else {"pixel_values": pixels}
    out = model.generate(
        input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **given, max_new_tokens=NEW, **options
    )
    return out[:, len(ids) :]


def trimmed(tokens: torch.Tensor) -> list[int]:
    """Generated tokens without what follows the end, which batches pad."""
    listed = tokens.tolist()
    listed = listed[: listed.index(EOS)] if EOS in listed else listed
    while listed and listed[-1] == PAD:
        listed.pop()
    return listed


@pytest.mark.parametrize("ranker", ["text-attention", "vision-attention", "random", "uniform"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_batch_equals_one_by_one(attn: str, beams: int, ranker: str) -> None:
    model = tiny_llava(attn)
    batch = tiny_inputs(ROWS, seed=11)
    width = batch["input_ids"].shape[1]
    with apply(model, SCHEDULE, ranker=ranker):
        together = model.generate(**batch, max_new_tokens=NEW, do_sample=False, num_beams=beams)[:, width:]
        for row in range(len(ROWS)):
            one = alone(model, batch, row, do_sample=False, num_beams=beams)
            assert trimmed(together[row]) == trimmed(one[0])


def test_the_reduction_changes_answers() -> None:
    """Guards the other tests here: with these weights, dropping tokens is visible."""
    model = tiny_llava()
    batch = tiny_inputs(ROWS, seed=11)
    stock = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    with apply(model, SCHEDULE):
        assert not torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False), stock)


@pytest.mark.parametrize("sequences", [1, 3])
def test_sampling_is_reproducible_and_expands_rows(sequences: int) -> None:
    model = tiny_llava()
    batch = tiny_inputs(ROWS, seed=12)
    encoded = encode_images(model, batch, "vision-attention")
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": NEW, "do_sample": True, "num_return_sequences": sequences}
    with apply(model, SCHEDULE, ranker="vision-attention") as handle:
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            runs.append(model.generate(**text, **encoded.model_inputs(), **options))
        kept = handle.kept(3)
    assert torch.equal(*runs)
    assert runs[0].shape[0] == len(ROWS) * sequences
    for row in range(len(kept)):
        assert torch.equal(kept[row], kept[row - row % sequences])


def test_copied_cache_continues_alike() -> None:
    model = tiny_llava()
    batch = tiny_inputs(ROWS, seed=13)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(ROWS), 1).long()], dim=1)
    with apply(model, SCHEDULE), torch.no_grad():
        out = model(**batch, use_cache=True)
        cache = out[CACHE]
        copied = copy.deepcopy(cache)
        token = out.logits[:, -1:].argmax(-1)
        straight = model(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits
        again = model(input_ids=token, attention_mask=mask, **{CACHE: copied}).logits
    assert torch.equal(straight, again)


def test_cache_rows_can_be_selected_and_repeated() -> None:
    model = tiny_llava()
    batch = tiny_inputs(ROWS, seed=13)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(ROWS), 1).long()], dim=1)
    order, around = torch.tensor([2, 0]), torch.tensor([3, 2, 1, 0])
    with apply(model, SCHEDULE), torch.no_grad():
        out = model(**batch, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        picked, doubled, turned = (copy.deepcopy(out[CACHE]) for _ in range(3))
        turned.reorder_cache(around)
        picked.batch_select_indices(order)
        doubled.batch_repeat_interleave(2)
        plain = model(input_ids=token, attention_mask=mask, **{CACHE: out[CACHE]}).logits
        round_ = model(input_ids=token[around], attention_mask=mask[around], **{CACHE: turned}).logits
        some = model(input_ids=token[order], attention_mask=mask[order], **{CACHE: picked}).logits
        twice = model(
            input_ids=token.repeat_interleave(2, 0), attention_mask=mask.repeat_interleave(2, 0), **{CACHE: doubled}
        ).logits
    torch.testing.assert_close(round_, plain[around])
    torch.testing.assert_close(some, plain[order])
    torch.testing.assert_close(twice, plain.repeat_interleave(2, 0))


def test_cache_is_shorter_and_reports_logical_length() -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5]], seed=14)
    seq = batch["input_ids"].shape[1]
    with apply(model, Schedule([0.5, 0.5, 0.25, 0]), ranker="uniform"), torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE]
    assert [layer.keys.shape[2] for layer in cache.layers] == [seq - 8, seq - 8, seq - 12, seq - 16]
    assert [cache.get_seq_length(layer) for layer in range(4)] == [seq] * 4


def test_running_twice_gives_the_same() -> None:
    model = tiny_llava()
    batch = tiny_inputs(ROWS, seed=15)
    with apply(model, SCHEDULE):
        first = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        assert torch.equal(first, model.generate(**batch, max_new_tokens=NEW, do_sample=False))


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("ranker", ["text-attention", "vision-attention"])
def test_encoded_images_answer_as_pixels_do(ranker: str, beams: int) -> None:
    model = tiny_llava()
    batch = tiny_inputs(ROWS, seed=16)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": beams}
    with apply(model, SCHEDULE, ranker=ranker):
        encoded = encode_images(model, batch, ranker)
        given = model.generate(**text, **encoded.model_inputs(), **options)
        assert torch.equal(given, model.generate(**batch, **options))


@pytest.mark.parametrize("length", [4, 10, 22])
def test_a_cache_can_be_cropped_to_any_place(length: int) -> None:
    """In front of the image (columns 4 to 19), inside it, behind it."""
    model = tiny_llava()
    batch = tiny_inputs([[3, 5]], seed=14)
    tokens = torch.tensor([[7, 8, 9]])
    with apply(model, SCHEDULE) as handle, torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE]
        held = copy.deepcopy(cache)
        cache.crop(length - cache.get_seq_length())
        for layer in range(4):
            assert cache.get_seq_length(layer) == length
            before = sum(4 + token < length for token in handle.kept(layer)[0].tolist())
            width = min(4, length) + before + max(0, length - 20)
            assert torch.equal(cache.layers[layer].keys, held.layers[layer].keys[..., :width, :])
        assert model(input_ids=tokens, **{CACHE: cache}).logits.isfinite().all()


def test_cropping_behind_an_answer_undoes_it() -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5]], seed=14)
    tokens = torch.tensor([[7, 8, 9]])
    with apply(model, SCHEDULE), torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE]
        straight = model(input_ids=tokens, **{CACHE: copy.deepcopy(cache)}).logits
        model(input_ids=tokens.flip(1), **{CACHE: cache})
        cache.crop(-3)
        torch.testing.assert_close(model(input_ids=tokens, **{CACHE: cache}).logits, straight)


def static_cache(model, length: int = 40) -> StaticCache:
    return StaticCache(config=model.config.get_text_config(), max_cache_len=length)


@pytest.mark.parametrize("left", [25, 23, 20])
def test_a_static_cache_can_be_cropped_behind_its_image(left: int) -> None:
    """Of 25 tokens the image has columns 4 to 19; what is cropped away and read again changes nothing."""
    model = tiny_llava()
    batch, gone = tiny_inputs([[3, 5]], seed=14), 25 - left
    tokens = torch.cat([batch["input_ids"][:, left:], torch.tensor([[7, 8, 9]])], dim=1)
    with apply(model, Schedule([0.7, 0.7, 0.7, 0.2]), ranker="uniform"), torch.no_grad():
        straight, cut = static_cache(model), static_cache(model)
        model(**batch, **{CACHE: straight})
        model(**batch, **{CACHE: cut})
        wanted = model(input_ids=tokens[:, gone:], **{CACHE: straight}).logits
        model(input_ids=tokens.flip(1), **{CACHE: cut})
        cut.crop(-3 - 2 * gone)
        assert [int(cut.get_seq_length(layer)) for layer in range(4)] == [left] * 4
        torch.testing.assert_close(model(input_ids=tokens, **{CACHE: cut}).logits[:, gone:], wanted)


def test_a_static_cache_is_not_cropped_into_its_image() -> None:
    model = tiny_llava()
    with apply(model, Schedule([0.7, 0.7, 0.7, 0.2]), ranker="uniform"), torch.no_grad():
        cache = static_cache(model)
        model(**tiny_inputs([[3, 5]], seed=14), **{CACHE: cache})
        with pytest.raises(ThinsightError, match="crop a static cache to 4 tokens"):
            cache.crop(-21)


@pytest.mark.skipif(not hasattr(StaticLayer, "crop"), reason="needs transformers 5.24")
def test_prompt_lookup_on_a_static_cache_equals_greedy_decoding() -> None:
    """With room for proposals behind the last token, which transformers does not leave itself."""
    model = tiny_llava()
    batch = tiny_inputs([[3, 15]], seed=0)
    batch["input_ids"][0, -6:] = batch["input_ids"][0, -12:-6]
    options = {"max_new_tokens": NEW, "do_sample": False}
    with apply(model, SCHEDULE):
        greedy = model.generate(**batch, **options)
        options[CACHE] = static_cache(model, 60)
        assert torch.equal(model.generate(**batch, **options, prompt_lookup_num_tokens=3), greedy)


def test_a_crop_that_rows_do_not_share_is_refused() -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5], [2, 3, 1]], seed=14)
    with apply(model, SCHEDULE), torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE]
        with pytest.raises(ThinsightError, match="rows kept different numbers"):
            cache.crop(-3)


def test_prompt_lookup_equals_greedy_decoding() -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 15]], seed=0)
    batch["input_ids"][0, -6:] = batch["input_ids"][0, -12:-6]  # so that there is something to look up
    with apply(model, SCHEDULE):
        greedy = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        looked_up = model.generate(**batch, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, greedy)


def test_a_reset_cache_starts_anew() -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5]], seed=14)
    other = tiny_inputs([[2, 4, 1]], seed=15)
    with apply(model, SCHEDULE), torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE]
        cache.reset()
        again = model(**other, **{CACHE: cache}).logits
        assert torch.equal(again, model(**other).logits)


def test_bfloat16_keeps_all_exactly_and_reduces() -> None:
    model = tiny_llava().bfloat16()
    batch = tiny_inputs(ROWS, seed=17)
    stock = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    with apply(model, Schedule([1, 0.99, 0.97, 0.95])):
        assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False), stock)
    with apply(model, SCHEDULE) as handle:
        out = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        assert [len(row) for row in handle.kept(3)] == [4, 8, 0, 4]
    assert out.shape == stock.shape

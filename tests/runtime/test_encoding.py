"""Vision features computed once and passed in: a store that can be cut, joined and moved."""

from __future__ import annotations

import pytest
import torch
from conformance.families import FAMILIES
from tiny import tiny_inputs, tiny_llava

from thinsight.errors import ThinsightError
from thinsight.reduction import Reduction
from thinsight.runtime import EncodedImages, encode_images
from thinsight.runtime.anatomy import writes_vision_after
from thinsight.schedule import Schedule

ROWS = [[3, 5], [2, 3, 9], [7]]


@pytest.mark.parametrize("reduction", [None, "vision-attention", Reduction(Schedule.full(4), "vision-attention")])
def test_features_give_the_logits_that_pixels_give(reduction) -> None:
    model = tiny_llava()
    batch = tiny_inputs(ROWS, seed=41)
    encoded = encode_images(model, batch, reduction)
    assert len(encoded) == 3
    assert (encoded.received is None) == (reduction is None)
    assert not any(feature.requires_grad for feature in encoded.features)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(model(**text, **encoded.model_inputs()).logits, model(**batch).logits)
    stock = model.generate(**batch, max_new_tokens=4, do_sample=False)
    given = model.generate(**text, **encoded.model_inputs(), max_new_tokens=4, do_sample=False)
    assert torch.equal(given, stock)


def test_parts_and_their_join() -> None:
    encoded = encode_images(tiny_llava(), tiny_inputs(ROWS, seed=41), "vision-attention")
    one, rest = encoded.rows(0), encoded.rows(slice(1, None))
    assert (len(one), len(rest)) == (1, 2)
    joined = EncodedImages.concat([one, rest])
    assert all(torch.equal(a, b) for a, b in zip(joined.features, encoded.features, strict=True))
    assert joined.received is not None
    assert encoded.received is not None
    assert all(torch.equal(a, b) for a, b in zip(joined.received, encoded.received, strict=True))
    assert torch.equal(encoded.rows([2, 0]).features[0], encoded.features[2])
    bare = EncodedImages(one.features)
    assert EncodedImages.concat([bare, rest]).received is None
    assert encoded.to("cpu").num_bytes == encoded.num_bytes == 3 * 16 * (32 + 1) * 4


def test_a_part_does_not_hold_its_whole_batch_in_memory() -> None:
    encoded = encode_images(tiny_llava(), tiny_inputs(ROWS, seed=41), "vision-attention")
    assert encoded.received is not None
    for tensor in (*encoded.features, *encoded.received):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4


def test_features_for_decoder_layers_that_the_encoder_names() -> None:
    """Granite Vision's, which stand nowhere else: cut, joined, and read as the pixels are."""
    family = FAMILIES["granite4-vision"]
    model, batch = family.model(), family.inputs([[3, 5], [2, 3, 9]])
    encoded = encode_images(model, batch)
    assert encoded.into == (2, 0, 1, 3)
    assert all(torch.equal(entry, layers[0]) for entry, layers in zip(encoded.features, encoded.deepstack, strict=True))
    assert writes_vision_after(model) == {0, 1, 2}
    joined = EncodedImages.concat([encoded.rows(0), encoded.rows([1, 2])])
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(model(**text, **joined.model_inputs()).logits, model(**batch).logits)


def test_a_video_goes_through_the_encoder_of_images_where_there_is_no_other() -> None:
    family = FAMILIES["perception-lm"]
    model, batch = family.model(), family.inputs([[3, "video", 5]])
    encoded = encode_images(model, batch)
    assert encoded.modalities == ("video", "video")  # frames
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        assert torch.equal(model(**text, **encoded.model_inputs()).logits, model(**batch).logits)


def test_no_image_no_features() -> None:
    encoded = encode_images(tiny_llava(), tiny_inputs([[4]]))
    assert len(encoded) == 0
    assert encoded.model_inputs() == {}
    assert len(EncodedImages.concat([encoded, encoded])) == 0


def test_hooks_on_the_tower_are_gone() -> None:
    model = tiny_llava()
    encode_images(model, tiny_inputs(ROWS), "vision-attention")
    assert not model.model.vision_tower._forward_pre_hooks
    with pytest.raises(ThinsightError, match="ranker is 'nope'"):
        encode_images(model, tiny_inputs(ROWS), "nope")


def test_a_projector_that_reads_no_attention_is_refused() -> None:
    model = tiny_llava()
    model.config.vision_feature_layer = 0
    with pytest.raises(ThinsightError, match="vision_feature_layer is the tower's input"):
        encode_images(model, tiny_inputs(ROWS), "vision-attention")

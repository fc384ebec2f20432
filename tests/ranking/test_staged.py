"""A staged ranker is one ranker before layer 0 and another one after it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from thinsight.errors import ThinsightError
from thinsight.ranking import TEXT_ATTENTION, VISION_ATTENTION, Staged, get_ranker
from thinsight.testing import ranking_context as context


def test_each_ranks_in_its_place() -> None:
    given = context()
    ranker = Staged("uniform", {"name": "text-attention", "queries": "last"})
    early = dataclasses.replace(given, layer=0, attention=None)
    assert torch.equal(ranker.score(early), get_ranker("uniform").score(early))
    last = get_ranker({"name": "text-attention", "queries": "last"})
    assert torch.equal(ranker.score(given), last.score(given))
    assert ranker.queries == "last"


def test_it_needs_what_both_need_and_ranks_at_layer_0() -> None:
    ranker = get_ranker("staged")
    assert ranker.needs == {TEXT_ATTENTION, VISION_ATTENTION}
    assert ranker.ranks_at_layer_0
    assert not get_ranker("text-attention").ranks_at_layer_0
    assert get_ranker(ranker.to_dict()) == ranker
    assert hash(get_ranker(ranker.to_dict())) == hash(ranker)


def test_text_attention_cannot_come_first() -> None:
    with pytest.raises(ThinsightError, match="first is 'text-attention', which reads the layer before"):
        Staged("text-attention")

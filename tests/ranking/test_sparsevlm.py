"""SparseVLM against its rule written out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from thinsight.ranking import get_ranker
from thinsight.ranking.sparsevlm import raters
from thinsight.testing import SIZES
from thinsight.testing import ranking_context as context


def published(tokens, text) -> list[int]:
    """The text tokens whose mean softmax share over the vision tokens is above average."""
    shares = np.zeros(len(text))
    for token in tokens:
        power = np.exp([token @ word - max(token @ other for other in text) for word in text])
        shares += power / power.sum() / len(tokens)
    return [i for i, part in enumerate(shares) if part > shares.mean()]


@pytest.mark.parametrize("seed", range(5))
def test_scores_are_the_mean_over_the_raters(seed: int) -> None:
    given = context(SIZES, seed)
    scores = get_ranker("sparsevlm").score(given)
    for row, sizes in enumerate(SIZES):
        if not sizes:
            continue
        real = given.queries[row].nonzero().flatten().tolist()
        tokens = given.states[row][given.valid[row]].double().numpy()
        chosen = published(tokens, given.text_states[row, real].double().numpy())
        rows = [real[i] for i in chosen] or real
        assert (
            raters(given.states, given.valid, given.text_states, given.queries)[row].nonzero().flatten().tolist()
            == rows
        )
        for token in range(sum(sizes)):
            wanted = np.mean([[float(head[query, token]) for query in rows] for head in given.attention[row]])
            assert float(scores[row, token]) == pytest.approx(wanted, rel=1e-5)


def test_all_text_rates_where_none_stands_out() -> None:
    given = context()
    same = dataclasses.replace(given, text_states=torch.ones_like(given.text_states))
    chosen = raters(same.states, same.valid, same.text_states, same.queries)
    assert torch.equal(chosen, same.queries)
    expected = get_ranker("text-attention").score(same)
    torch.testing.assert_close(get_ranker("sparsevlm").score(same), expected)


def test_it_cannot_rank_before_layer_0() -> None:
    assert not get_ranker("sparsevlm").ranks_at_layer_0

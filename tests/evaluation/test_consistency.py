"""Rank consistency: statistics against scipy, scores against eager attention, words against the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau
from tiny import tiny_images, tiny_llava, tiny_processor

import thinsight.evaluation.consistency as ranks
from thinsight.errors import ThinsightError
from thinsight.evaluation import Example, RankConsistency, rank_consistency
from thinsight.evaluation.consistency import kendall_tau_b, tied_share, top_k_overlap
from thinsight.runtime import apply
from thinsight.schedule import Schedule

LAYERS = 4


def make_examples(count=5):
    images = tiny_images(count)
    questions = ("what color is the circle ?", "how many ?", "which number is written in the chart ?")
    return [Example(f"e{i}", (images[i],), questions[i % 3]) for i in range(count)]


@pytest.mark.parametrize("levels", [4, 30, 10_000])
@pytest.mark.parametrize("chunk", [7, 1 << 21])
def test_tau_is_scipys(levels, chunk, monkeypatch):
    monkeypatch.setattr(ranks, "_CHUNK", chunk)
    scores = np.random.default_rng(levels).integers(0, levels, size=(5, 40)).astype(float)
    tau = kendall_tau_b(scores)
    for i in range(5):
        for j in range(5):
            assert tau[i, j] == pytest.approx(kendalltau(scores[i], scores[j]).statistic, abs=1e-12)


def test_tau_of_a_constant_row_is_zero():
    assert kendall_tau_b(np.array([[1.0, 1, 1], [1, 2, 3], [3, 2, 1]])).tolist() == [[0, 0, 0], [0, 1, -1], [0, -1, 1]]


def test_top_k_overlap():
    scores = np.array([[4.0, 3, 2, 1], [3, 4, 1, 2], [1, 1, 1, 1], [1, 2, 3, 4]])
    assert top_k_overlap(scores, 2).tolist() == [1.0, 1.0, 0.0]  # of equal scores the earlier token is taken
    assert top_k_overlap(scores, 3).tolist() == [2 / 3, 2 / 3, 2 / 3]


def test_tied_share():
    scores = np.array([[1.0, 2, 3, 4], [0, 0, 1, 2], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert tied_share(scores).tolist() == [0, 0.5, 1, 1]


def eager_scores(example):
    """(layers, N): mean attention from the question's tokens, out of the full attention matrices."""
    processor = tiny_processor()
    inputs = processor(
        text=f"USER: <image>\n{example.question} ASSISTANT:", images=[example.images[0]], return_tensors="pt"
    )
    with torch.no_grad():
        attentions = tiny_llava("eager", LAYERS)(**inputs, output_attentions=True).attentions
    vision = (inputs["input_ids"][0] == 4).nonzero().flatten()
    matrix = torch.stack(attentions)[:, 0].mean(1)  # (layers, seq, seq)
    return matrix[:, vision[-1] + 1 :, vision].mean(1).double().numpy()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_it_is_the_mean_over_examples_of_taus_between_layers(attn, batch_size):
    examples = make_examples()
    found = rank_consistency(tiny_llava(attn, LAYERS), tiny_processor(), examples, batch_size=batch_size)
    expected = [kendall_tau_b(eager_scores(example)) for example in examples]
    np.testing.assert_allclose(found.tau_matrix, np.mean(expected, axis=0), atol=0.02)
    np.testing.assert_allclose(found.tau, np.diag(found.tau_matrix, k=1))
    overlap = np.mean([top_k_overlap(eager_scores(example), 4) for example in examples], axis=0)
    np.testing.assert_allclose(found.topk_overlap, overlap, atol=0.11)
    assert found.tau.shape == found.topk_overlap.shape == (LAYERS - 1,)
    assert found.tied_share.tolist() == [0] * LAYERS
    assert found.examples == len(examples)
    assert np.diag(found.tau_matrix).tolist() == pytest.approx([1] * LAYERS)
    assert np.abs(expected[0] - expected[1]).max() > 0.1


def test_a_ranker_that_ranks_alike_everywhere_has_tau_one():
    found = rank_consistency(tiny_llava(), tiny_processor(), make_examples(2), ranker="vision-attention")
    assert found.tau.tolist() == pytest.approx([1] * 3)
    assert found.topk_overlap.tolist() == [1] * 3


def test_a_model_without_structure_gets_a_warning():
    """Random layers rank at random: tau about 0."""
    found = rank_consistency(tiny_llava(layers=6), tiny_processor(), make_examples(8))
    assert abs(found.typical_tau) < 0.15
    assert found.is_low
    assert found.summary().startswith("Warning: the layers hardly agree")


def result(tau, ties=0.0):
    layers = len(tau) + 1
    matrix = np.eye(layers)
    return RankConsistency(
        tau=np.array(tau, dtype=float),
        tau_matrix=matrix,
        topk_overlap=np.full(layers - 1, 0.6),
        tied_share=np.full(layers, ties),
        top_rate=0.25,
        examples=3,
    )


def test_the_first_layer_does_not_count_in_the_words():
    good = result([0.05, 0.7, 0.75, 0.8])
    assert good.typical_tau == 0.75
    assert not good.is_low
    assert good.summary().startswith("The layers agree on which")
    assert "0.75" in good.summary()
    assert "first layer, which has 0.05" in good.summary()
    assert "60% of their best 25%" in good.summary()
    assert "tied" not in good.summary()
    assert result([0.9, 0.1, 0.1]).summary().startswith("Warning")
    assert "moderately" in result([0.1, 0.3, 0.3]).summary()
    assert result([0.5]).typical_tau == 0.5


def test_ties_are_mentioned():
    assert "30% of the scores of layer 0 are tied" in result([0.1, 0.7], ties=0.3).summary()


def test_progress_is_reported():
    seen = []
    rank_consistency(tiny_llava(), tiny_processor(), make_examples(3), batch_size=2, progress=lambda *a: seen.append(a))
    images = [("images", n, 3) for n in (1, 2, 3)]
    assert seen == [*images, ("rank consistency", 2, 3), ("rank consistency", 3, 3)]


def test_bad_input_is_one_line():
    model, processor = tiny_llava(), tiny_processor()
    with pytest.raises(ThinsightError, match="has no examples"):
        rank_consistency(model, processor, [])
    with pytest.raises(ThinsightError, match="batch_size is 0"):
        rank_consistency(model, processor, make_examples(1), batch_size=0)
    with pytest.raises(ThinsightError, match="one decoder layer"):
        rank_consistency(tiny_llava(layers=1), processor, make_examples(1))
    with apply(model, Schedule.step(4, 2, 0.5)), pytest.raises(ThinsightError, match="a reduction on already"):
        rank_consistency(model, processor, make_examples(1))

"""Candidates that share the layers above the one where they differ get the same answers, to the bit."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance.behaviours import for_each
from conformance.families import FAMILIES
from conformance.inputs import EOS
from family_processor import RowProcessor
from tiny import tiny_images, tiny_llava, tiny_processor

from thinsight.errors import ThinsightError
from thinsight.evaluation import Evaluator, Example, prefix_cache
from thinsight.evaluation import store as feature_store
from thinsight.evaluation.store import Store
from thinsight.families import FAMILIES as ROWS
from thinsight.reduction import Reduction
from thinsight.runtime import apply, can_share, resuming, snapshotting
from thinsight.runtime.anatomy import sliding_layers, state_layers
from thinsight.schedule import Schedule
from thinsight.searches import gsearch, random_search, sensitivity_search
from thinsight.searches.run import budget_of

HELD = [family for family in FAMILIES.values() if family.model_type in ROWS]
QUESTIONS = ("what color is the circle ?", "how many ?", "which ?", "what number is written in the chart ?")
LAYERS, NEW_TOKENS = 6, 4


@pytest.fixture(scope="module")
def model() -> Any:
    model = tiny_llava(layers=LAYERS)
    model.generation_config.eos_token_id = [3, *range(40, 52)]  # so that answers end at various lengths
    return model


def evaluator_of(
    model: Any, answers: Sequence[str] = ("blue", "3", "seven", "red", "two"), **settings: Any
) -> Evaluator:
    images = tiny_images(5)
    examples = [Example(f"e{i}", (images[i % 5],), QUESTIONS[i % 4], (answers[i % len(answers)],)) for i in range(16)]
    settings = {"batch_size": 4, "max_new_tokens": NEW_TOKENS, "metric": "anls", **settings}
    return Evaluator(model, tiny_processor(), examples, **settings)


def layers_run(model: Any, work: Any) -> list[int]:
    """How often each decoder layer's attention ran."""
    counts = [0] * LAYERS
    hooks = []
    for index, layer in enumerate(model.get_decoder().layers):

        def count(*_: Any, index: int = index) -> None:
            counts[index] += 1

        hooks.append(layer.self_attn.register_forward_hook(count))
    try:
        work()
    finally:
        for hook in hooks:
            hook.remove()
    return counts


def same(one: Any, two: Any) -> None:
    np.testing.assert_array_equal(one.per_example, two.per_example)
    assert (one.score, one.agreement) == (two.score, two.agreement)


@for_each(HELD)
def test_every_family_gives_the_same_logits(family: Any) -> None:
    """A pass that begins at a layer, behind one that reduced before it, padded rows and several images."""
    model = family.build()
    model.generation_config.eos_token_id = [EOS]
    processor = RowProcessor(family)
    plain, reused = (
        Evaluator(model, processor, processor.examples, batch_size=2, max_new_tokens=4, reuse=reuse)
        for reuse in (False, True)
    )
    first = Schedule([1, 0.7, 0.4, 0.2])
    for shared, layer in ((Schedule.full(4), 1), (first, 2), (first, 3)):
        reused.share(shared, layer)
        for rate in (0.3, 0.1, 0.0):
            candidate = shared.with_tail(layer, rate)
            same(reused(candidate), plain(candidate))
            assert reused.predictions(candidate) == plain.predictions(candidate)
            for one, two in zip(
                reused._answers(reused._bind(candidate), reused._batches),
                plain._answers(plain._bind(candidate), plain._batches),
                strict=True,
            ):
                assert one == two
    began = set(reused._began.values())
    assert began == ({0} if sliding_layers(model) or state_layers(model) else {3})


@pytest.mark.parametrize("ranker", ["text-attention", "uniform", "staged", "dart"])
def test_only_the_layers_that_differ_run(model: Any, ranker: str) -> None:
    evaluator = evaluator_of(model, ranker=ranker, metric="agreement")
    plain = evaluator_of(model, ranker=ranker, metric="agreement", reuse=False)
    _ = evaluator.full, plain.full
    head = Schedule([1, 1, 0.8, 0.6, 0.6, 0.6])
    evaluator.share(head, 3)
    batches = len(evaluator._batches)
    for number, rate in enumerate((0.5, 0.3, 0.1)):
        candidate = head.with_tail(3, rate)
        found = []
        counts = layers_run(model, lambda at=candidate, to=found: to.append(evaluator(at)))
        assert counts == [0 if number else batches] * 3 + [batches] * 3
        whole = plain(candidate)
        same(found[0], whole)
        if number:
            assert found[0].cost < whole.cost
        else:
            assert found[0].cost == whole.cost
    evaluator.share(head.with_tail(3, 0.1), 5)  # goes on from what there is
    for number, rate in enumerate((0.05, 0.0)):
        candidate = head.with_tail(3, 0.1).with_tail(5, rate)
        counts = layers_run(model, lambda at=candidate: evaluator(at))
        assert counts == [0] * 3 + [0 if number else batches] * 2 + [batches]
        same(evaluator(candidate), plain(candidate))


def test_what_does_not_fit_runs_whole(model: Any) -> None:
    evaluator, plain = evaluator_of(model), evaluator_of(model, reuse=False)
    head = Schedule([1, 1, 0.8, 0.6, 0.6, 0.6])
    evaluator.share(head, 3)
    evaluator(head.with_tail(3, 0.5))
    other = Schedule([1, 0.9, 0.8, 0.5, 0.2, 0.1])
    last = Reduction(head.with_tail(3, 0.2), {"name": "text-attention", "queries": "last"})
    flat = head.with_tail(4, 0.3)  # does not fall at the layer, but may begin there
    candidates = (other, head.with_tail(3, 0.1), flat, last, head.with_tail(3, 0.15))
    for candidate, began in zip(candidates, (0, 3, 3, 0, 0), strict=True):
        same(evaluator(candidate), plain(candidate))
        # another ranker leaves a snapshot of its own in the place of the first
        assert evaluator._began[0] == began
    evaluator.share(head, 0)
    assert evaluator._prefixes.start(plain._bind(head.with_tail(3, 0.2)), evaluator._batches[0], True) == 0


def test_snapshots_in_files_are_the_same_and_do_not_pile_up(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    evaluator, plain = evaluator_of(model, cache_gib=0), evaluator_of(model, reuse=False)
    head = Schedule([1, 0.8, 0.6, 0.6, 0.6, 0.6])
    batches = len(evaluator._batches)
    before = len(list(tmp_path.rglob("*.safetensors")))
    for layer in (2, 3, 4):
        evaluator.share(head, layer)
        for rate in (0.5, 0.2):
            same(evaluator(head.with_tail(layer, rate)), plain(head.with_tail(layer, rate)))
        assert evaluator._began[0] == layer
        assert len(list(tmp_path.rglob("*.safetensors"))) - before == batches
    evaluator.share(head, 0)
    assert len(list(tmp_path.rglob("*.safetensors"))) == before
    del evaluator
    gc.collect()


def test_sharing_that_does_not_pay_is_given_up(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only goes on while snapshots are read: nothing is saved."""
    now = [0.0]
    read = Store.get

    def slow(self: Any, key: Any) -> Any:
        now[0] += 1
        return read(self, key)

    monkeypatch.setattr(prefix_cache, "_clock", lambda: now[0])
    monkeypatch.setattr(Store, "get", slow)
    evaluator, plain = evaluator_of(model), evaluator_of(model, reuse=False)
    head, batches = Schedule([1, 1, 0.8, 0.6, 0.6, 0.6]), len(plain._batches)
    evaluator.share(head, 3)
    uses = 3
    monkeypatch.setattr(prefix_cache, "_PROBATION", uses * batches)
    for number in range(uses + 3):
        candidate = head.with_tail(3, (9 - number) / 16)
        same(evaluator(candidate), plain(candidate))
        assert evaluator._began[0] == (3 if 0 < number <= uses else 0)


def test_a_full_disk_ends_sharing_and_nothing_else(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluator, plain = evaluator_of(model, cache_gib=0), evaluator_of(model, reuse=False)
    head = Schedule([1, 1, 0.8, 0.6, 0.6, 0.6])
    _ = evaluator.full
    evaluator.share(head, 3)

    def no_room(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(feature_store, "save_file", no_room)
    for rate in (0.5, 0.3):
        same(evaluator(head.with_tail(3, rate)), plain(head.with_tail(3, rate)))
        assert evaluator._began[0] == 0


def test_a_model_on_several_devices_runs_whole() -> None:
    model = tiny_llava()
    assert can_share(model)
    model.hf_device_map = {"model.vision_tower": 0, "model.language_model": 1}
    assert not can_share(model)


def test_searches_find_the_same(model: Any) -> None:
    said = [answer.text for answer in evaluator_of(model).full_answers]
    labels = [text if i % 4 else "seven" for i, text in enumerate(said)]  # three in four are right
    for search in (gsearch, random_search, sensitivity_search):
        results = []
        for reuse in (True, False):
            evaluator = evaluator_of(model, labels, reuse=reuse)
            if search is gsearch:
                results.append(search(evaluator, 0.2, step=2))
            else:
                results.append(search(evaluator, budget_of(evaluator, 0.5), n_trials=10))
        shared, whole = results
        assert shared.schedule == whole.schedule
        assert len({trial.score for trial in shared.trials}) > 1
        assert [(t.schedule, t.score, t.complete) for t in shared.trials] == [
            (t.schedule, t.score, t.complete) for t in whole.trials
        ]
        assert shared.full_forwards < whole.full_forwards
        assert shared.full_forwards == pytest.approx(shared.cost / evaluator.full_cost)


def test_an_interrupted_pass_leaves_the_model_as_it_was(model: Any) -> None:
    evaluator = evaluator_of(model)
    head = Schedule([1, 1, 0.8, 0.6, 0.6, 0.6])
    evaluator.share(head, 3)
    evaluator(head.with_tail(3, 0.5))
    layer = model.get_decoder().layers[4]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = layer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        evaluator(head.with_tail(3, 0.3))
    hook.remove()
    assert not any("forward" in each.__dict__ for each in model.get_decoder().layers)
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.get_decoder().layers)
    plain = evaluator_of(model, reuse=False)
    same(evaluator(head.with_tail(3, 0.3)), plain(head.with_tail(3, 0.3)))


def test_a_forward_of_the_layers_own_comes_back(model: Any) -> None:
    """Device maps put one on each module."""
    layer = model.get_decoder().layers[0]
    own = layer.forward
    layer.forward = own
    try:
        with apply(model, Schedule([1, 1, 0.5, 0.5, 0.5, 0.5])) as handle:
            inputs = tiny_processor()(text="<image> which ?", images=tiny_images(1), return_tensors="pt")
            with snapshotting(handle, 2) as taken:
                wanted = model(**inputs).logits
            with resuming(handle, taken[0]):
                assert torch.equal(model(**inputs).logits, wanted)
            assert layer.forward is own
            with pytest.raises(ThinsightError, match="layer is 0; it must be from 1 to 5"), snapshotting(handle, 0):
                pass
    finally:
        del layer.__dict__["forward"]


def test_candidates_are_told_apart_by_when_they_rank(model: Any) -> None:
    """Answers and snapshots of one are not taken for another's, and reuse changes none."""
    plain, reused = evaluator_of(model, reuse=False), evaluator_of(model)
    shared = Schedule([1, 0.8, 0.6, 0.5, 0.5, 0.5])
    reused.share(shared, 4)
    given = {}
    for rerank in (True, 0.7, False, 0.9, True):
        for rate in (0.4, 0.1):
            candidate = Reduction(shared.with_tail(4, rate), rerank=rerank)
            same(reused(candidate), plain(candidate))
            fresh = evaluator_of(model, reuse=False)
            same(plain(candidate), fresh(candidate))
            given[rerank, rate] = plain.predictions(candidate)
    assert given[True, 0.1] != given[False, 0.1]

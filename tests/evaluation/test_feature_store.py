"""Encoded images beyond the bound come back from files as they were, and the files go with the store."""

from __future__ import annotations

import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance.behaviours import for_each
from conformance.families import FAMILIES
from conformance.family import Family
from family_processor import RowProcessor

from thinsight.errors import ThinsightError
from thinsight.evaluation import Evaluator
from thinsight.evaluation.features import VisionCache
from thinsight.evaluation.prompts import PromptReader
from thinsight.evaluation.store import Store
from thinsight.families import FAMILIES as ROWS
from thinsight.reduction import Reduction
from thinsight.runtime import EncodedImages
from thinsight.schedule import Schedule

SCHEDULES = [Schedule([1, 0.7, 0.4, 0]), Schedule([1, 1, 0.5, 0.25])]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def an_entry(seed: int = 0, *, received: bool = False, dtype: torch.dtype = torch.float32) -> EncodedImages:
    draw = torch.Generator().manual_seed(seed)
    features = tuple(torch.randn(n, 8, generator=draw).to(dtype) for n in (4, 6))
    return EncodedImages(
        features,
        tuple(torch.rand(len(f), generator=draw) for f in features) if received else None,
        tuple((feature + 1, feature.T.contiguous().T * 2) for feature in features),
        ("image", "video"),
        frozenset(["video"]),
        torch.randn(2, 8, generator=draw).to(dtype),
        (3, 1),
    )


def tensors(entry: EncodedImages) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    entry.mapped(lambda name, tensor: found.setdefault(name, tensor))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("received", [False, True])
def test_an_entry_from_a_file_is_the_one_that_was_put(received: bool, dtype: torch.dtype, folder: Path) -> None:
    store, entry = Store(0), an_entry(received=received, dtype=dtype)
    store.put("a", entry)
    found = store.get("a")
    assert found is not None
    expected, given = tensors(entry), tensors(found)
    assert list(given) == list(expected)
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())
    assert all(given[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert (found.modalities, found.stacked, found.into) == (entry.modalities, entry.stacked, (3, 1))
    assert (found.received is None) == (not received)
    assert len(list(folder.rglob("*.safetensors"))) == 1


def test_memory_holds_what_fits_and_files_the_rest(folder: Path) -> None:
    entries = [an_entry(i) for i in range(5)]
    store = Store(2.5 * entries[0].num_bytes / 2**30)
    for i, entry in enumerate(entries):
        store.put(i, entry)
    assert len(list(folder.rglob("*.safetensors"))) == 3
    assert [store.get(i) is entry for i, entry in enumerate(entries)] == [True, True, False, False, False]
    store.put(0, an_entry(9))  # in the place of the first
    assert len(list(folder.rglob("*.safetensors"))) == 3
    assert store.get("unknown") is None


def test_replacing_leaves_what_was_read_alone(folder: Path) -> None:
    store = Store(0)
    store.put("a", an_entry(0))
    assert store.outline("a").received is None
    old = store.get("a")
    store.put("a", an_entry(1, received=True))
    assert store.outline("a").received is not None
    assert len(list(folder.rglob("*.safetensors"))) == 1
    new = store.get("a")
    assert old is not None
    assert new is not None
    assert torch.equal(old.features[0], an_entry(0).features[0])
    assert torch.equal(new.features[0], an_entry(1, received=True).features[0])


def test_files_go_with_the_store(folder: Path) -> None:
    store = Store(0)
    assert list(folder.iterdir()) == []  # none before it is needed
    store.put("a", an_entry())
    assert len(list(folder.iterdir())) == 1
    del store
    gc.collect()
    assert list(folder.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "gone"))
    with pytest.raises(ThinsightError, match=r"cannot be written to a temporary file .* raise cache_gib"):
        Store(0).put("a", an_entry())


@pytest.mark.parametrize("bad", [-1, float("nan"), float("inf"), True, "4"])
def test_bad_bounds(bad: Any) -> None:
    with pytest.raises(ThinsightError, match="cache_gib is"):
        Store(bad)


@for_each(family for family in FAMILIES.values() if family.model_type in ROWS)
def test_no_score_depends_on_the_bound(family: Family, folder: Path) -> None:
    model, processor = family.model(), RowProcessor(family, ([3, 5], [2, 3, 9], [1, 1]))
    results = []
    for bound in (4.0, 0):
        evaluator = Evaluator(model, processor, processor.examples, batch_size=2, max_new_tokens=3, cache_gib=bound)
        found = [evaluator(schedule) for schedule in SCHEDULES]
        answers = [answer.tokens for answer in evaluator.full_answers]
        texts = evaluator.predictions(SCHEDULES[0])
        results.append((answers, texts, [e.per_example for e in found], evaluator.fingerprint))
        assert bool(list(folder.rglob("*.safetensors"))) == (bound == 0)
    assert results[0][:2] == results[1][:2]
    assert np.array_equal(results[0][2], results[1][2])
    assert results[0][3] == results[1][3]


def test_features_from_files_are_bit_identical_in_the_forward_pass(folder: Path) -> None:
    """Also after a ranker has asked for attention inside the tower, which replaces them."""
    family = FAMILIES["internvl-qwen2"]
    model, processor = family.model(), RowProcessor(family, ([3, 5], [2, 3, 9]))
    outputs = []
    for bound in (4.0, 0):
        cache = VisionCache(PromptReader(model, processor), Store(bound))
        cache.inputs(processor.examples)
        ranker = Reduction(SCHEDULES[0], "vision-attention").ranker
        vision = cache.inputs(processor.examples, ranker)
        outputs.append(vision["mm_encoder_outputs"]["image"])
    features, filed = (output.pooler_output for output in outputs)
    assert all(torch.equal(a, b) for a, b in zip(features, filed, strict=True))
    received, filed = (output.thinsight_received for output in outputs)
    assert all(torch.equal(a, b) for a, b in zip(received, filed, strict=True))

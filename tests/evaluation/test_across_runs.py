"""With a folder, a later run reads what an earlier one computed, and every number is the same to the bit."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance.behaviours import for_each
from conformance.families import FAMILIES
from conformance.family import Family
from family_processor import RowProcessor
from PIL import Image
from tiny import tiny_images, tiny_llava, tiny_processor

from thinsight import records
from thinsight.errors import ThinsightError
from thinsight.evaluation import Evaluator, Example
from thinsight.evaluation.features import VisionCache
from thinsight.evaluation.prompts import PromptReader
from thinsight.evaluation.store import Store
from thinsight.families import FAMILIES as ROWS
from thinsight.reduction import Reduction
from thinsight.schedule import Schedule

STAIRS, LATE = Schedule([1, 1, 0.6, 0.3]), Schedule([1, 1, 1, 0.4])
REDUCTIONS = [Reduction(STAIRS, "text-attention"), Reduction(LATE, "vision-attention")]
QUESTIONS = ("what color is the circle ?", "how many ?")


def make_examples(count: int = 6) -> list[Example]:
    """Two questions about each of half as many images."""
    images = tiny_images(count // 2)
    return [Example(f"e{i}", (images[i // 2],), QUESTIONS[i % 2] + " red" * (i % 3), ("red",)) for i in range(count)]


def evaluator_of(cache_dir: Path | None, model: Any = None, **options: Any) -> Evaluator:
    given = {"processor": tiny_processor(), "examples": make_examples(), "batch_size": 2, **options}
    return Evaluator(model or tiny_llava(), max_new_tokens=4, cache_dir=cache_dir, **given)


def numbers_of(evaluator: Evaluator) -> list[Any]:
    """All that a run comes to."""
    found = [evaluator(reduction) for reduction in REDUCTIONS]
    return [
        evaluator._full,
        evaluator._batches,
        evaluator.full.agreement,
        [evaluator.predictions(reduction) for reduction in REDUCTIONS],
        [(each.per_example.tolist(), each.score, each.agreement, each.cost) for each in found],
    ]


@contextmanager
def counted(module: torch.nn.Module) -> Iterator[list[int]]:
    """One entry for every time that the module runs."""
    runs: list[int] = []
    hook = module.register_forward_hook(lambda *_: runs.append(1))
    try:
        yield runs
    finally:
        hook.remove()


@contextmanager
def batches_of(tower: torch.nn.Module) -> Iterator[list[float]]:
    """The sum of each batch of pixels that the tower sees."""
    sums: list[float] = []

    def note(_: torch.nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        sums.append((*given, *named.values())[0].double().sum().item())

    hook = tower.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield sums
    finally:
        hook.remove()


def runs_of(evaluator: Evaluator) -> tuple[int, int]:
    """How often the tower and the decoder run for the full model's answers."""
    model = evaluator.model
    with counted(model.model.vision_tower) as tower, counted(model.model.language_model) as decoder:
        assert len(evaluator.full_answers) == len(evaluator.examples)
        evaluator._full_model.vision.inputs(evaluator.examples)
    return len(tower), len(decoder)


def test_a_later_run_computes_neither_features_nor_answers(tmp_path: Path) -> None:
    expected = numbers_of(evaluator_of(None))
    assert numbers_of(evaluator_of(tmp_path)) == expected
    later = evaluator_of(tmp_path)
    model = later.model
    with counted(model.model.vision_tower) as tower, counted(model.model.language_model) as decoder:
        assert later._full == expected[0]
        assert (len(tower), len(decoder)) == (0, 0)
        assert numbers_of(later) == expected
        assert len(tower) == 0
        assert len(decoder) > 0  # the reduced model's passes
    assert later.fingerprint == evaluator_of(None).fingerprint
    kinds = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert kinds == ["answers", *["vision"] * 4]  # 3 images in 2 groups, without and with attention


def test_a_folder_is_used_whatever_is_held_in_memory(tmp_path: Path) -> None:
    expected = numbers_of(evaluator_of(None))
    assert numbers_of(evaluator_of(tmp_path, cache_gib=0)) == expected
    assert runs_of(evaluator_of(tmp_path, cache_gib=0)) == (0, 0)


def test_more_examples_need_only_their_own_features(tmp_path: Path) -> None:
    runs_of(evaluator_of(tmp_path, examples=make_examples(8)))
    more = evaluator_of(tmp_path, examples=make_examples(12))
    tower, decoder = runs_of(more)
    assert tower == 1  # the two new images
    assert decoder > 0


def test_other_questions_need_only_their_own_answers(tmp_path: Path) -> None:
    runs_of(evaluator_of(tmp_path))
    others = [replace(example, question="which ?") for example in make_examples()]
    tower, decoder = runs_of(evaluator_of(tmp_path, examples=others))
    assert tower == 0
    assert decoder > 0


def change_weight(part: str) -> Any:
    def change(options: dict[str, Any]) -> None:
        with torch.no_grad():
            parameter = dict(options["model"].named_parameters())[part]
            parameter.view(-1)[0] += 1e-3

    return change


def change_image(options: dict[str, Any]) -> None:
    for i, example in enumerate(options["examples"]):
        image = example.images[0].copy()
        image.putpixel((5, 5), (1, 2, 3))
        options["examples"][i] = replace(example, images=(image,))


def change_processor(options: dict[str, Any]) -> None:
    options["processor"].image_processor.image_mean = (0.4, 0.4, 0.4)


CHANGES = {
    "a tower's weight": change_weight("model.vision_tower.encoder.layers.1.mlp.fc1.weight"),
    "a projector's weight": change_weight("model.multi_modal_projector.linear_1.weight"),
    "an image": change_image,
    "a processor's setting": change_processor,
    "the dtype": lambda options: options["model"].bfloat16(),
    "the kernels": lambda options: options.update(model=tiny_llava("eager")),
    "the vision config": lambda options: setattr(options["model"].config, "vision_feature_layer", -1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_features_depend_on_makes_them_anew(name: str, tmp_path: Path) -> None:
    assert runs_of(evaluator_of(tmp_path))[0] == 2
    options = {"model": tiny_llava(), "processor": tiny_processor(), "examples": make_examples()}
    CHANGES[name](options)
    tower, decoder = runs_of(evaluator_of(tmp_path, **options))
    assert tower == 2
    assert decoder > 0


@pytest.mark.parametrize(
    "change",
    [
        change_weight("model.language_model.layers.1.mlp.up_proj.weight"),
        change_weight("lm_head.weight"),
        lambda options: setattr(options["model"].generation_config, "repetition_penalty", 1.5),
        lambda options: options.update(max_new_tokens=3),
        lambda options: options.update(reuse=False),
    ],
)
def test_whatever_only_answers_depend_on_leaves_features(change: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "processor": tiny_processor(),
        "examples": make_examples(),
        "batch_size": 2,
        "max_new_tokens": 4,
        "cache_dir": tmp_path,
    }
    first = Evaluator(tiny_llava(), **options)
    assert len(first.full_answers) == 6
    options["model"] = tiny_llava()
    change(options)
    tower, decoder = runs_of(Evaluator(**options))
    assert tower == 0
    assert decoder > 0


def test_an_image_file_counts_by_its_bytes(tmp_path: Path) -> None:
    tiny_images(1)[0].save(tmp_path / "a.png")
    tiny_images(1)[0].save(tmp_path / "b.png")
    folder = tmp_path / "kept"
    for name, expected in (("a.png", 1), ("b.png", 0), ("a.png", 0)):
        example = Example("e", (tmp_path / name,), "how many ?", ("red",))
        assert runs_of(evaluator_of(folder, examples=[example]))[0] == expected
    tiny_images(1, seed=1)[0].save(tmp_path / "a.png")
    assert runs_of(evaluator_of(folder, examples=[example]))[0] == 1


def test_images_that_differ_in_their_palette_only_are_two(tmp_path: Path) -> None:
    plain = Image.new("P", (28, 28))
    plain.putpalette([255, 0, 0])
    other = plain.copy()
    other.putpalette([0, 255, 0])
    for image in (plain, other):
        example = Example("e", (image,), "how many ?", ("red",))
        assert runs_of(evaluator_of(tmp_path, examples=[example])) == (1, 1 + runs_of_steps(example))


def runs_of_steps(example: Example) -> int:
    """The decoder's passes after the first one for an answer to the example."""
    return len(evaluator_of(None, examples=[example]).full_answers[0].tokens) - 1


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: data[:-3] + b"\1\1\1"])
def test_damaged_files_are_computed_again(damage: Any, tmp_path: Path) -> None:
    expected = numbers_of(evaluator_of(tmp_path))
    files = sorted(tmp_path.iterdir())
    for path in files:
        path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="cannot be used") as said:
        assert numbers_of(evaluator_of(tmp_path)) == expected
    assert sum("cannot be used" in str(each.message) for each in said) == len(files)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert runs_of(evaluator_of(tmp_path)) == (0, 0)  # they were written anew
    assert sorted(tmp_path.iterdir()) == files


def test_a_full_disk_ends_the_keeping_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = numbers_of(evaluator_of(None))
    evaluator = evaluator_of(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(records, "_write_all", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        assert numbers_of(evaluator) == expected
    assert list(tmp_path.iterdir()) == []


def test_two_runs_at_once_share_the_folder(tmp_path: Path) -> None:
    one, two = evaluator_of(tmp_path), evaluator_of(tmp_path)
    name, disk = one._full_model._name(one._hash(None)), Store(cache_dir=tmp_path)
    assert runs_of(one)[0] == 2
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    Store(cache_dir=tmp_path).keep_value(name, disk.value(name))
    assert two._full_model._answer_all() == one._full
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert runs_of(evaluator_of(tmp_path)) == (0, 0)


def test_images_always_have_the_same_company() -> None:
    """Whatever is asked for first, the encoder sees the same batches."""
    examples = make_examples(20)
    seen = []
    for order in (examples, examples[::-1], examples[7:8] + examples):
        model = tiny_llava()
        cache = VisionCache(PromptReader(model, tiny_processor()))
        cache.arrange(examples, 4)
        with batches_of(model.model.vision_tower) as batches:
            for example in order:
                cache.inputs([example])
        seen.append(sorted(batches))
    assert len(seen[0]) == 3  # 10 images
    assert seen[0] == seen[1] == seen[2]


class TellingProcessor(RowProcessor):
    """With settings, as a processor of transformers has."""

    def to_dict(self) -> dict[str, Any]:
        return {"family": self.family.model_type}


@for_each(family for family in FAMILIES.values() if family.model_type in ROWS)
def test_features_of_every_family_come_back_to_the_bit(family: Family, tmp_path: Path) -> None:
    model, processor = family.model(), TellingProcessor(family, ([3, 5], [2, 3, 9], [1, 1]))
    entries: list[list[tuple[str, torch.Tensor]]] = []
    shapes = []
    for store in (Store(), Store(cache_dir=tmp_path), Store(cache_dir=tmp_path)):
        cache = VisionCache(PromptReader(model, processor), store)
        cache.inputs(processor.examples)
        found: list[tuple[str, torch.Tensor]] = []
        for example in processor.examples:
            entry = cache.store.get(example.image_keys)
            assert entry is not None
            entry.mapped(lambda name, tensor, found=found: found.append((name, tensor)) or tensor)
            shapes.append((entry.modalities, entry.stacked))
        entries.append(found)
    plain, written, read = entries
    together = 1 if family.name != "molmo2" else 3  # which encodes one example at a time
    assert len(list(tmp_path.glob("vision-*.safetensors"))) == together
    assert shapes[:3] == shapes[3:6] == shapes[6:]
    assert [name for name, _ in plain] == [name for name, _ in written] == [name for name, _ in read]
    assert all(
        torch.equal(a, b) and torch.equal(a, c) and a.dtype == c.dtype
        for (_, a), (_, b), (_, c) in zip(plain, written, read, strict=True)
    )


def test_a_processor_without_settings_is_refused(tmp_path: Path) -> None:
    family = FAMILIES["llava"]
    processor = RowProcessor(family)
    with pytest.raises(ThinsightError, match=r"RowProcessor has no to_dict.*leave cache_dir out"):
        Evaluator(family.model(), processor, processor.examples, cache_dir=tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ThinsightError, match=r"cache_dir .*file cannot be written"):
        evaluator_of(tmp_path / "file", examples=[])

"""Draws the gallery of kept tokens from the embedded models, and writes its page: `make gallery`.

Examples are the first ones of the frozen test set, not the prettiest. Only those that go wrong are looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import thinsight as ts
from thinsight.job.findings import picture_of, varied
from thinsight.report.data import Picture
from thinsight.report.pictures import save_contact_strip

PAGE = Path(__file__).resolve().parents[1] / "gallery.md"
PICTURES = "images/gallery"
FRONT = PAGE.parent / "images/kept.png"  # on the first page
ASKED = "test-0012"  # there
RATES = {2: 0.25, 4: 0.125, 7: 0.0625}  # from these layers on
RANKERS: dict[str, Any] = {
    "text-attention": "attention from the question",
    "vision-attention": "attention inside the vision tower: whatever is asked",
    "divprune": "tokens unlike each other",
    "uniform": "evenly spread, a yardstick",
    "random": "by lot, a yardstick",
}
LOOKED_AT = 90  # test questions among which wrong answers are looked for
WRONG = 3

_HEAD = """\
# Gallery of kept tokens

What a reduction keeps of an image: patches that stay are outlined, those that were dropped are dim. Drawn by
`make gallery` from the embedded models, which were trained so that [attention ranks
well](../src/thinsight/demo/model/README.md); `thinsight show` draws the same of your model and image.

Unless it says otherwise a quarter of the tokens enters layers {0} and {1}, an eighth layers {2} to {3}, a sixteenth the
layers from {4} on, and the question's attention ranks. That is a hard schedule: there is to be something to see.
"""
_SECTIONS = {
    "questions": (
        "One image, three questions",
        "The first image of the test set. The question decides what stays, so a reduced image cannot be cached for "
        "the next question.",
    ),
    "tasks": ("Ten tasks", "The first question of each task, each about another image."),
    "rankers": ("Five rankers", "One question, and an eighth of the tokens from layer {4} on, chosen in five ways."),
    "wrong": (
        "Where it goes wrong",
        "Of the first {5} questions of the test set those that the full model answers rightly and the reduced one does "
        "not: each about another image, and {6} at most.",
    ),
    "internvl": (
        "Fewer tokens to begin with",
        "`demo-internvl` has 64 tokens of 2 x 2 patches each, so that each holds more, and less can go.",
    ),
}


@dataclass(frozen=True)
class Drawing:
    """One picture of a section, and the line above it."""

    section: str
    name: str
    picture: Picture
    words: str = ""


def draw(drawings: Iterator[Drawing], page: Path = PAGE) -> None:
    """Write the pictures beside the page, and the page."""
    folder = page.parent / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.webp"):
        old.unlink()
    layers = list(RATES)
    told = [layers[0], layers[1] - 1, layers[1], layers[2] - 1, layers[2], LOOKED_AT, WRONG]
    lines, section = [_HEAD.format(*told)], ""
    for each in drawings:
        if each.section != section:
            section = each.section
            title, words = _SECTIONS[section]
            lines += [f"## {title}", "", words.format(*told), ""]
        file = f"{section}-{each.name}.webp"
        save_contact_strip(folder / file, each.picture, side=240, columns=2, text=19)  # to be read on a phone
        picture = f"![{described(each.picture)}]({PICTURES}/{file})"
        if each.words or not lines[-2].startswith("!["):
            lines += [*([each.words, ""] if each.words else []), picture, ""]
        else:
            lines[-1:] = [picture, ""]  # in one paragraph, so that they stand beside each other where there is room
    page.write_text("\n".join(lines), encoding="utf-8")


def described(picture: Picture) -> str:
    """A picture in words, for those who do not see it."""
    counts = ", ".join(
        f"{len(kept)} of {picture.num_tokens} at layer {layer}"
        for kept, layer in zip(picture.kept, picture.layers, strict=True)
    )
    return f"{picture.question} Full model: {picture.answer_full}; reduced: {picture.answer_reduced}. Kept: {counts}"


def drawings() -> Iterator[Drawing]:
    """All of the gallery, in the order of the page."""
    examples = ts.load_examples("demo:test")
    tasks = len({example.task for example in examples})
    loaded = ts.load_demo()
    shown = shower(*loaded, ranker="text-attention")
    for place, example in enumerate(each for each in examples if each.group == examples[0].group):
        yield Drawing("questions", str(place), shown(example))
    for example in varied(examples, tasks):
        assert example.task is not None
        yield Drawing("tasks", example.task.replace(" ", "-"), shown(example))
    step = ts.Schedule.step(loaded[0].config.text_config.num_hidden_layers, max(RATES), 0.125)
    for ranker, words in RANKERS.items():
        picture = shower(*loaded, ranker=ranker, schedule=step)(examples[0])
        yield Drawing("rankers", ranker, picture, f"`{ranker}`: {words}.")
    for place, example in enumerate(gone_wrong(*loaded, examples[:LOOKED_AT])):
        yield Drawing("wrong", str(place), shown(example))
    internvl = shower(*ts.load_demo(name="demo-internvl"), ranker="text-attention")
    for place, example in enumerate(each for each in examples if each.group == examples[0].group):
        yield Drawing("internvl", str(place), internvl(example))


def front() -> Picture:
    """One question of the first page, and two layers."""
    model, processor = ts.load_demo()
    schedule = ts.Schedule.stages(model.config.text_config.num_hidden_layers, {2: 0.25, 3: 0.125})
    (asked,) = [example for example in ts.load_examples("demo:test") if example.id == ASKED]
    return shower(model, processor, "text-attention", schedule)(asked)


def stages(model: Any) -> ts.Schedule:
    """The gallery's schedule for a model."""
    return ts.Schedule.stages(model.config.text_config.num_hidden_layers, RATES)


def shower(
    model: Any, processor: Any, ranker: str, schedule: ts.Schedule | None = None
) -> Callable[[ts.Example], Picture]:
    """What draws an example under a ranker and a schedule."""
    reduction = ts.Reduction(schedule or stages(model), ranker=ranker)

    def shown(example: ts.Example) -> Picture:
        picture = picture_of(model, processor, example, reduction, max_new_tokens=8)
        return replace(picture, question=picture.question.replace(" ?", "?"))

    return shown


def gone_wrong(model: Any, processor: Any, examples: Sequence[ts.Example]) -> list[ts.Example]:
    """The first examples, on different images, that only the full model answers rightly."""
    scored = []
    for schedule in (ts.Schedule.full(stages(model).num_layers), stages(model)):
        evaluation = ts.Evaluator(model, processor, examples, ranker="text-attention")(schedule)
        assert evaluation.per_example is not None
        scored.append(evaluation.per_example)
    lost = [example for example, full, reduced in zip(examples, *scored, strict=True) if full > reduced]
    return list({example.group: example for example in reversed(lost)}.values())[::-1][:WRONG]


if __name__ == "__main__":
    draw(drawings())
    save_contact_strip(FRONT, front(), side=240, columns=3, text=20)

"""What `thinsight data` tells about data: how it was read, counts, kinds of questions, and a few examples.

Knows nothing about models but how a processor writes a prompt.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .. import notebook, shown, texts
from ..evaluation.benchmarks import benchmark_of
from ..evaluation.evaluator import check_metric
from ..evaluation.examples import Example, load_examples, reader_of
from ..evaluation.metrics import options_of
from ..evaluation.prompts import prompt_text
from ..loading import load_processor
from ..progress import Watcher
from .findings import varied
from .options import DataOptions

RENDERED = 3
_NUMBER = re.compile(r"[-+]?[\d.,]+\s*%?")
_EITHER = ({"yes", "no"}, {"true", "false"})
_SHORT = 3  # words
_MOST_TASKS = 20


@dataclass(frozen=True)
class Rendered:
    """An example as it is asked: the prompt, or the question where no model is known."""

    id: str
    text: str
    images: int
    answers: tuple[str, ...]
    metric: str


@dataclass(frozen=True)
class Understood(shown.Shown):
    """What was understood of a set of examples.

    Attributes:
        data: its name; ``reader`` and ``form`` say as what it was read.
        examples: how many questions, about so many different ``images``.
        most_images: of one question.
        kinds: how many questions of each kind, by the form of their answers.
        tasks: how many of each task, where examples name theirs.
        metrics: how many are scored by each metric.
        rendered: a few of them.
        benchmarks: what is reported of each benchmark among them.
    """

    data: str
    reader: str
    form: str
    examples: int
    images: int
    most_images: int
    kinds: tuple[tuple[str, int], ...]
    tasks: tuple[tuple[str, int], ...]
    metrics: tuple[tuple[str, int], ...]
    rendered: tuple[Rendered, ...]
    benchmarks: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def _tables(self) -> Iterable[shown.Table]:
        facts = {
            "read as": f"{self.reader}: {self.form}",
            "questions": shown.count(self.examples),
            "images": shown.count(self.images),
            "images of a question": "1" if self.most_images == 1 else f"up to {self.most_images}",
            "kinds of questions": _counted(self.kinds),
            "tasks": _counted(self.tasks),
            "metric": _counted(self.metrics),
            **{title: ", ".join(measures) for title, measures in self.benchmarks},
        }
        return [shown.facts_table(self.data, facts.items())]

    def lines(self) -> list[str]:
        """The rendered examples as lines of text."""
        found: list[str] = []
        for each in self.rendered:
            images = texts.counted(each.images, "image")
            answers = " | ".join(each.answers) if each.answers else "none: the full model's own answer is taken"
            found += ["", f"Example {each.id}, {images}:", *(f"    {line}" for line in each.text.split("\n"))]
            found += [f"  answers: {answers} ({each.metric})"]
        return found[1:]


def look(options: DataOptions, watcher: Watcher | None = None) -> Understood:
    """Read data as a search would, and say what it is.

    Raises:
        ThinsightError: data that cannot be read, or an example that cannot be right.
    """
    watcher = watcher or notebook.watcher()
    options.check()
    watcher.on_stage("Reading the data")
    reader, _ = reader_of(options.data_name, **options.reading)
    examples = load_examples(options.data_name, options.limit, progress=watcher.on_progress, **options.reading)
    metrics = check_metric(examples, options.metric)
    processor = None if options.model is None else load_processor(options.model)
    named = {example.id: metric.name for example, metric in zip(examples, metrics, strict=True)}
    rendered = tuple(
        Rendered(
            each.id,
            each.question if processor is None else prompt_text(processor, each),
            len(each.images),
            each.answers,
            named[each.id],
        )
        for each in varied(examples, RENDERED)
    )
    return Understood(
        data=options.data_name,
        reader=reader.name,
        form=reader.form,
        examples=len(examples),
        images=len({key for each in examples for key in each.image_keys}),
        most_images=max(len(each.images) for each in examples),
        kinds=_most_common([kind_of(each) for each in examples]),
        tasks=_most_common([each.task for each in examples if each.task is not None]),
        metrics=_most_common(list(named.values())),
        rendered=rendered,
        benchmarks=_reported(examples),
    )


def kind_of(example: Example) -> str:
    """What kind of question it is, by its options and the form of its answers."""
    if options := options_of(example.question):
        return f"{len(options)} options"
    said = {answer.strip().rstrip(".").lower() for answer in example.answers}
    if not said:
        return "no label"
    if any(said <= pair for pair in _EITHER):
        return "yes or no"
    if all(_NUMBER.fullmatch(answer) for answer in said):
        return "number"
    return "short text" if max(len(answer.split()) for answer in said) <= _SHORT else "text"


def _reported(examples: Sequence[Example]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    found = {each.title: each for example in examples if (each := benchmark_of(example)) is not None}
    return tuple((title, tuple(measure.name for measure in each.measures)) for title, each in found.items())


def _most_common(values: Sequence[str]) -> tuple[tuple[str, int], ...]:
    return tuple(Counter(values).most_common())


def _counted(counts: Sequence[tuple[str, int]]) -> str:
    told = [f"{name} ({shown.count(number)})" for name, number in counts[:_MOST_TASKS]]
    rest = len(counts) - _MOST_TASKS
    return ", ".join([*told, *([f"and {rest} others"] if rest > 0 else [])])

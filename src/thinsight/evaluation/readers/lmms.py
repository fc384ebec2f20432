"""Tasks of lmms-eval as data: ``lmms-eval:TASK``, ``lmms-eval:TASK:SPLIT``, ``lmms-eval:TASK:SPLIT:METRIC``; of a task
of one's own ``lmms-eval:FOLDER/TASK``. Its documents are asked as the task asks and scored by the task's own code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import ImageFile

from ...errors import BadInput, MissingPackage, ThinsightError
from ..metrics import METRICS, Metric
from .base import READERS, Reader, Source, home
from .rows import Row

_FORM = "lmms-eval:TASK, lmms-eval:TASK:SPLIT or lmms-eval:TASK:SPLIT:METRIC"


class Asked(str):
    """A question that knows which document of its task it is of, for the task's scoring reads more than the answer."""

    __slots__ = ("document",)
    document: int

    def __new__(cls, text: str, document: int) -> Asked:
        made = super().__new__(cls, text)
        made.document = document
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Asked, (str(self), self.document)


class Scoring:
    """One number that a task gives an answer, as the rule of a metric."""

    def __init__(self, task: Any, split: str, key: str) -> None:
        self._task, self._documents, self._key = task, task.dataset_no_image[split], key

    def __call__(self, prediction: str, answers: Sequence[str], question: str) -> float:
        if not isinstance(question, Asked):
            raise BadInput(
                f"question {question!r} is none of the task {self._task.config.task!r}: score it by a metric"
            )
        found = self._task.process_results(self._documents[question.document], [prediction])
        score = found.get(self._key)
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not 0 <= score <= 1:
            raise BadInput(
                f"task {self._task.config.task!r} scores document {question.document} with {score!r} as "
                f"{self._key!r}: only numbers from 0 to 1 have a mean that can be searched by"
            )
        return float(score)


class LmmsEval(Reader):
    """A task of lmms-eval whose score is a mean over its documents."""

    name = "lmms-eval"
    form = f"a task of lmms-eval: {_FORM}"

    def reads(self, source: Source) -> bool:
        """Never: a task is named."""
        return False

    def rows(self, source: Source) -> Iterator[Row]:
        """The documents in their order."""
        told = source.told
        if source.columns or source.annotations or source.image_folder:
            raise BadInput(
                f"data {told!r}: a task knows its columns, images and answers itself: leave options for them out"
            )
        name, *more = source.rest.rsplit("/", 1)[-1].split(":")
        folder = source.rest.rpartition("/")[0]
        if not name or len(more) > 2 or not all(more):
            raise BadInput(f"data is {told!r}: write {_FORM}")
        task = _task(told, name, folder)
        split = _split(told, task, more[0] if more else None)
        key = _key(told, task, more[1] if len(more) > 1 else None)
        metric = METRICS.register(
            Metric(f"lmms-eval/{name}/{split}/{key}", Scoring(task, split, key), reads_question=True)
        )
        for number, document in enumerate(task.dataset[split]):
            where = f"{told}, document {number}"
            try:
                images, question = task.doc_to_visual(document), str(task.doc_to_text(document))
                target = task.doc_to_target(document)
            except Exception as error:  # a task's own code
                raise BadInput(
                    f"{where} cannot be asked ({type(error).__name__}: {error}): choose another task"
                ) from None
            fields = {
                "id": str(number),
                "images": list(images or ()) or None,
                "question": Asked(question, number),
                "answers": [str(each) for each in (target if isinstance(target, (list, tuple)) else [target])],
                "metric": metric.name,
                "task": name,
            }
            yield Row(where, fields, Path(), _FORM)


@lru_cache(maxsize=4)
def _task(told: str, name: str, folder: str) -> Any:
    """The task, its data read; refused where it is no single task of answers that are scored one by one."""
    try:
        version("lmms_eval")
    except PackageNotFoundError:
        raise MissingPackage(f"data {told!r} needs lmms-eval: pip install 'thinsight[lmms-eval]'") from None
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        from lmms_eval.tasks import TaskManager, get_task_dict

        manager = TaskManager(include_path=str(home(folder)) if folder else None)
        if name not in manager.all_tasks:
            raise BadInput(f"data {told!r}: lmms-eval has no task {name!r}: `lmms-eval tasks list` lists them")
        found = get_task_dict([name], manager, "simple").get(name)
    except ThinsightError:
        raise
    except Exception as error:  # a task's own code, and what loads its data
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise BadInput(f"data {told!r}: lmms-eval cannot load the task ({reason}): see docs/harnesses.md") from None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated  # its import has PIL show half images
    config = getattr(found, "config", None)
    why = (
        "it is a group: name one of its tasks"
        if config is None
        else f"its output_type is {config.output_type!r}: only generate_until is answered in words"
        if config.output_type != "generate_until"
        else "it filters answers before they are scored"
        if config.filter_list
        else "it shows solved examples in its prompts (num_fewshot)"
        if config.num_fewshot
        else ""
    )
    if why:
        raise BadInput(f"data {told!r} cannot be used: {why}")
    return found


def _split(told: str, task: Any, split: str | None) -> str:
    known = list(task.dataset)
    chosen = split or task.config.test_split or task.config.validation_split
    if chosen not in known:
        raise BadInput(f"data {told!r} has no split {chosen!r}, but {', '.join(known)}: name one of them")
    return str(chosen)


def _key(told: str, task: Any, key: str | None) -> str:
    """What the task calls the score: the first whose aggregation is the mean, where none is named."""
    from lmms_eval.api.registry import get_aggregation

    ways, better = task.aggregation(), task.higher_is_better()
    means = [name for name, way in ways.items() if way is get_aggregation("mean") and better.get(name, True)]
    chosen = means[0] if key is None and means else key
    if chosen not in means:
        others = ", ".join(f"{name} by {getattr(way, '__name__', way)}" for name, way in ways.items())
        raise BadInput(
            f"data {told!r} cannot be used: a search needs a score that is a mean over documents, higher for better "
            f"answers; the task has {others}"
        )
    return str(chosen)


READERS.register(LmmsEval())

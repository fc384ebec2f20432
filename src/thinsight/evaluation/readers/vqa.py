"""Question files of VQA and of its kin on COCO and other images: a list of questions with the number of an image each,
the answers among them or in a file of annotations.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import BadInput
from .base import READERS, Reader, Source
from .rows import Row
from .stream import read_text

_FORM = (
    '{"questions": [{"question_id", "image_id", "question"}, ...]} with {"annotations": [{"question_id", "answers"}]}'
)
_LISTS = ("questions", "data", "annotations")
_OF_QUESTIONS = re.compile(r"(?i)(?:openended_|multiplechoice_)|questions$")
_SUFFIXES = (".jpg", ".png", ".jpeg", ".webp")


class Questions(Reader):
    """A file of questions. Its annotations stand beside it under the name that VQA gives them, or are named."""

    name = "vqa"
    form = _FORM

    def reads(self, source: Source) -> bool:
        """A JSON object of several lines, or one that begins with what these files have."""
        if source.path.suffix.lower() != ".json":
            return False
        head = source.head()
        return head.lstrip()[:1] == "{" and any(f'"{name}"' in head for name in (*_LISTS, "info", "images", "imageId"))

    def rows(self, source: Source) -> Iterator[Row]:
        """A row for each question; the files are read whole, for answers stand in any order."""
        path = source.check_file()
        content = _object(path)
        questions = next((content[name] for name in _LISTS if isinstance(content.get(name), list)), None)
        if questions is None and content and all(_is_gqa(each) for each in content.values()):
            questions = [{"question_id": name, **each} for name, each in content.items()]
        if questions is None:
            raise BadInput(f"{path} has no list 'questions': {_FORM}")
        answers = _annotated(source, questions)
        files = {
            str(each.get("id")): each.get("file_name") for each in content.get("images") or () if isinstance(each, dict)
        }
        subset = str(content.get("data_subtype") or "")
        for number, entry in enumerate(questions, start=1):
            where = f"{path}, question {number}"
            if not isinstance(entry, dict):
                raise BadInput(f"{where} is not a JSON object: {_FORM}")
            yield _row(entry, where, number, source, answers, files, subset)


def _is_gqa(entry: Any) -> bool:
    """Whether it is a question of GQA, whose file has them by number."""
    return isinstance(entry, dict) and {"imageId", "question"} <= set(entry)


def _row(
    entry: Mapping[str, Any],
    where: str,
    number: int,
    source: Source,
    answers: Mapping[str, Any] | None,
    files: Mapping[str, Any],
    subset: str,
) -> Row:
    columns = source.columns
    identity = entry.get(columns.get("id", "question_id"), entry.get("id", number))
    found = entry.get(columns.get("answers", "answers"), entry.get("answer"))
    if answers is not None:
        if str(identity) not in answers:
            raise BadInput(
                f"{where}: question_id {identity!r} has no annotation: give the annotations of these questions"
            )
        found = answers[str(identity)]
    values = found if isinstance(found, list) else [] if found is None else [found]
    texts = [each.get("answer") if isinstance(each, Mapping) else each for each in values]
    question = entry.get(columns.get("question", "question"))
    extra = {name: value for name, value in entry.items() if isinstance(value, (str, int, float, bool))}
    fields = {
        **{name: value for name, value in extra.items() if name not in ("id", "question", "image", "answer", "metric")},
        "id": identity,
        "image": _image(entry, where, source, files, subset),
        "question": question,
        "answers": texts or None,
        "metric": "vqa_accuracy" if len(texts) > 1 else None,
    }
    return Row(where, fields, source.folder, _FORM, {"id": "question_id"})


def _image(entry: Mapping[str, Any], where: str, source: Source, files: Mapping[str, Any], subset: str) -> Any:
    """The image of a question: its file where one is named, else the file of its number that is there."""
    for name in (source.columns.get("image", "image"), "file_name", "image_path"):
        if entry.get(name) is not None:
            return entry[name]
    identity = entry.get("image_id", entry.get("imageId"))
    if identity is None:
        raise BadInput(f"{where} has no field 'image_id' (or 'image'): {_FORM}")
    if named := files.get(str(identity)):
        return named
    numbered = f"{int(identity):012d}" if re.fullmatch(r"\d{1,12}", str(identity)) else str(identity)
    stems = [f"COCO_{subset}_{numbered}"] * bool(subset) + [numbered, str(identity)]
    tried = [f"{stem}{suffix}" for stem in stems for suffix in _SUFFIXES]
    for name in tried:
        if (source.folder / name).is_file():
            return name
    raise BadInput(
        f"{where}: image_id {identity!r} has no file in {str(source.folder)!r}, such as {tried[0]}: name the folder of "
        "the images with --image-folder"
    )


def _annotated(source: Source, questions: list[Any]) -> dict[str, Any] | None:
    """The answers by question, from the file that is named or stands beside; None where questions have their own."""
    path = source.annotations
    if path is None:
        if any(isinstance(each, dict) and ("answers" in each or "answer" in each) for each in questions[:1]):
            return None
        path = _beside(source.path)
        if path is None:
            return None
    listed = _object(path).get("annotations")
    if not isinstance(listed, list):
        raise BadInput(f"{path} has no list 'annotations': {_FORM}")
    found = {}
    for number, entry in enumerate(listed, start=1):
        if not isinstance(entry, dict) or "question_id" not in entry:
            raise BadInput(f"{path}, annotation {number} has no field 'question_id': {_FORM}")
        found[str(entry["question_id"])] = entry.get(
            "answers", entry.get("answer", entry.get("multiple_choice_answer"))
        )
    return found


def _beside(path: Path) -> Path | None:
    """v2_OpenEnded_mscoco_val2014_questions.json has v2_mscoco_val2014_annotations.json beside it."""
    stem = _OF_QUESTIONS.sub("", path.stem)
    if stem == path.stem:
        return None
    found = path.with_name(f"{stem.rstrip('_')}_annotations.json".lstrip("_"))
    return found if found.is_file() else None


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads("".join(read_text(path)))
    except RecursionError:
        raise BadInput(f"{path} is not JSON (nested too deep): {_FORM}") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}, line {error.lineno} is not JSON ({error.msg}): {_FORM}") from None
    except ValueError as error:
        raise BadInput(f"{path} cannot be read ({error}): write the number as a text") from None
    if not isinstance(found, dict):
        raise BadInput(f"{path} is not a JSON object: {_FORM}")
    return found


READERS.register(Questions())

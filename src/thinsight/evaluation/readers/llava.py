"""LLaVA's training data: a JSON list of conversations about images, ``<image>`` where one stands."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ...errors import BadInput
from .base import READERS, Reader, Source
from .rows import Row
from .stream import objects

_FORM = 'a list of {"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}, ...]}'
_HUMAN, _MODEL = ("human", "user"), ("gpt", "assistant")
_PLACE = "<image>"


class Conversations(Reader):
    """Every question with its answer is one example, asked without the turns before it."""

    name = "llava"
    form = _FORM

    def reads(self, source: Source) -> bool:
        """A list whose beginning has conversations."""
        head = source.head()
        return head.lstrip()[:1] == "[" and '"conversations"' in head

    def rows(self, source: Source) -> Iterator[Row]:
        """A row for each turn; entries without an image are left out, and counted in a warning at the end."""
        without = 0
        path = source.check_file()
        for number, (where, entry) in enumerate(objects(path, _FORM)):
            image = entry.get(source.columns.get("image", "image"))
            if image is None:
                without += 1
                continue
            turns = entry.get("conversations")
            if not isinstance(turns, list) or not all(isinstance(each, Mapping) for each in turns):
                raise BadInput(f"{where}: field 'conversations' is no list of turns: {_FORM}")
            yield from _rows(entry, turns, image, where, number, source)
        if without:
            warnings.warn(f"{path}: {without} entries without an image were left out", stacklevel=2)


def _rows(
    entry: Mapping[str, Any], turns: Sequence[Any], image: Any, where: str, number: int, source: Source
) -> Iterator[Row]:
    identity = entry.get("id", entry.get("question_id", number))
    images = image if isinstance(image, list) else [image]
    extra = {name: value for name, value in entry.items() if isinstance(value, (str, int, float, bool))}
    pairs = list(zip(turns[::2], turns[1::2], strict=False))
    if not pairs:
        raise BadInput(f"{where}: field 'conversations' has no question with its answer: {_FORM}")
    for turn, (asked, answered) in enumerate(pairs):
        place = f"{where}, turn {2 * turn + 1}"
        if asked.get("from") not in _HUMAN or answered.get("from") not in _MODEL:
            said = f"{asked.get('from')!r} and {answered.get('from')!r}"
            raise BadInput(f"{place} is from {said}: a question from 'human' comes before its answer from 'gpt'")
        question = asked.get("value")
        if isinstance(question, str) and question.count(_PLACE) != len(images):
            question = question.replace(_PLACE, "").strip()  # the images come first
        fields = {
            **extra,
            "id": identity if len(pairs) == 1 else f"{identity}#{turn + 1}",
            "image": None,
            "images": images,
            "question": question,
            "answer": answered.get("value"),
        }
        yield Row(place, fields, source.folder, _FORM, {"images": "image", "question": "value", "answer": "value"})


READERS.register(Conversations())

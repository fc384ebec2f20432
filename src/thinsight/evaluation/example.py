"""An example: images, a question about them, and the answers that count as right."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import BadInput
from ..texts import brief, counted
from .images import ImageSource, OpenedImages, image_key


@dataclass(frozen=True)
class Example:
    """One question about one or more images.

    Attributes:
        id: unique in its set.
        images: paths or PIL images, in the order in which the prompt shows them.
        question: the text. ``<image>``, or ``<image 1>``, ``<image 2>`` ..., or the model's own image token
            stand where an image belongs, one for each; without any, images come first.
        answers: the texts that count as right; empty where there are no labels (metric "agreement").
        metric: name of this example's own metric, or None.
        group: what examples about the same image share; a confidence interval resamples groups. Made from the
            images when left empty.
        extra: any further fields of the line, such as "task".
        opened: image files that were decoded when the set was checked, for whoever processes them.
    """

    id: str
    images: tuple[ImageSource, ...]
    question: str
    answers: tuple[str, ...] = ()
    metric: str | None = None
    group: str = ""
    extra: dict[str, Any] = field(default_factory=dict, compare=False)
    opened: OpenedImages | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.images, (tuple, list)):
            raise BadInput(f"example {self.id!r}: images must be a tuple of paths or PIL images")
        images = tuple(Path(image) if isinstance(image, str) else image for image in self.images)
        object.__setattr__(self, "images", images)
        if isinstance(self.answers, str):
            raise BadInput(f"example {self.id!r}: answers is a text; pass a tuple of texts, ({self.answers!r},)")
        object.__setattr__(self, "answers", tuple(self.answers or ()))
        for name, texts in (("question", (self.question,)), ("answers", self.answers)):
            wrong = [text for text in texts if not isinstance(text, str)]
            if wrong:
                raise BadInput(f"example {self.id!r}: {name} holds {wrong[0]!r}; it must be a text")
        if not self.group:
            names = (each.as_posix() if isinstance(each, Path) else image_key(each, self._where) for each in images)
            object.__setattr__(self, "group", "+".join(names))

    def __repr__(self) -> str:
        images = counted(len(self.images), "image")
        question, answers = (brief(repr(each), 100) for each in (self.question, self.answers))
        return f"Example({brief(repr(self.id), 60)}, {images}, {question}, answers={answers})"

    @property
    def task(self) -> str | None:
        """The line's "task" field, if it has one."""
        task = self.extra.get("task")
        return None if task is None else str(task)

    @cached_property
    def image_keys(self) -> tuple[str, ...]:
        """One key per image; two images with one key are the same image."""
        return tuple(image_key(image, self._where) for image in self.images)

    def open_images(self) -> list[Image.Image]:
        """The images as RGB, in their order; see `open_image`.

        Raises:
            ThinsightError: one is missing, truncated or too large.
        """
        opened = self.opened or OpenedImages()
        sources = dict(zip(self.image_keys, self.images, strict=True))
        found = {key: opened.take(key, image, self._where) for key, image in sources.items()}
        return [found[key] for key in self.image_keys]

    @property
    def _where(self) -> str:
        return f"example {self.id!r}"

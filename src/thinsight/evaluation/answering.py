"""Answers to questions about images under a reduction, a batch at a time: what offline inference is made of.

Needs no full model beside the reduced one, and knows nothing of scores.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..errors import BadInput, whole
from ..reduction import Reduction
from ..runtime import apply, vision_token_mask
from ..runtime.encoding import on_device
from ..runtime.handle import Handle
from ..schedule import Schedule
from .example import Example
from .prompts import PromptReader, chunks, counts_patches, tokenizer_of

LONGEST = 64  # tokens of an answer unless told otherwise


@dataclass(frozen=True)
class Answer:
    """What a model says to an example.

    Attributes:
        id: the example's.
        text: the greedy answer.
        kept: where asked for, the vision tokens that entered each layer which received fewer than the one above:
            numbers in 0..N-1 over the prompt's vision tokens, ascending.
    """

    id: str
    text: str
    kept: dict[int, list[int]] | None = field(default=None, compare=False)


class Answerer:
    """Answers questions about images with one loaded model, a batch at a time.

    A class for ``map_batches`` of Ray Data, which builds one in each of its workers, and for loops of your own:

        answered = ray.data.read_json("questions.jsonl").map_batches(
            ts.Answerer, fn_constructor_kwargs={"model": "llava-hf/llava-1.5-7b-hf", "reduction": "mine"},
            batch_size=8, concurrency=4, num_gpus=1)

    Args:
        model: a name for `thinsight.load_model`, or a loaded model.
        processor: of a loaded model.
        reduction: a folder or hub id, a Reduction or a Schedule; None: the full model.
        max_new_tokens: longest answer.
        kept: whether to tell which vision tokens were kept, too.
        loading: further arguments of `thinsight.load_model`.

    Raises:
        ThinsightError: a bad argument, or a reduction that is not for this model.
    """

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        reduction: str | Path | Reduction | Schedule | None = None,
        *,
        max_new_tokens: int = LONGEST,
        kept: bool = False,
        **loading: Any,
    ) -> None:
        self._most = whole(max_new_tokens, "max_new_tokens")
        self._reduction = Reduction.from_pretrained(reduction) if isinstance(reduction, (str, Path)) else reduction
        self._tells_kept = kept
        if isinstance(model, (str, Path)):
            from ..loading import load_model

            model, processor = load_model(model, **loading)
        elif processor is None or loading:
            wrong = next(iter(loading), "processor")
            raise BadInput(f"{wrong} is {loading.get(wrong)!r}: a loaded model comes with its processor, and is loaded")
        self.model, self.processor = model, processor
        with self._applied():
            pass  # what cannot be applied is refused now

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch of rows by column, as Ray Data's ``batch_format="numpy"`` has it, with the column "answer", and
        "kept" where asked for: `Answer.kept` as JSON text.

        The column "question" holds texts; "image" paths, encoded images (bytes), PIL images or arrays of (height,
        width, 3) uint8; or "images" several of these a row.

        Raises:
            ThinsightError: a missing column, an image that cannot be read.
        """
        name = next((each for each in ("images", "image") if each in batch), None)
        if name is None or "question" not in batch:
            raise BadInput(f"the batch has the columns {sorted(batch)}: it must have question, and image or images")
        rows = zip(batch["question"], batch[name], strict=True)
        examples = [
            Example(str(place), tuple(map(_image, value if name == "images" else [value])), str(question))
            for place, (question, value) in enumerate(rows)
        ]
        answers = self.answers(examples)
        found = {**batch, "answer": [each.text for each in answers]}
        return {**found, "kept": [json.dumps(each.kept) for each in answers]} if self._tells_kept else found

    def answers(self, examples: Sequence[Example]) -> list[Answer]:
        """The greedy answers to a batch of examples, in their order.

        Raises:
            ThinsightError: an image that cannot be read, a prompt that the model cannot take.
        """
        size = 1 if counts_patches(self.model) else max(1, len(examples))
        with self._applied() as handle, torch.no_grad():
            return [answer for batch in chunks(examples, size) for answer in self._answers(batch, handle)]

    def _applied(self) -> Any:
        return nullcontext() if self._reduction is None else apply(self.model, self._reduction)

    def _answers(self, examples: Sequence[Example], handle: Handle | None) -> list[Answer]:
        inputs = on_device(self.model, PromptReader(self.model, self.processor).batch(examples))
        tokens = self.model.generate(**inputs, max_new_tokens=self._most, do_sample=False, num_beams=1)
        tokenizer = tokenizer_of(self.processor)
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        kept: list[Any] = [None] * len(examples)
        if self._tells_kept:
            kept = self._kept(handle, vision_token_mask(self.model, inputs["input_ids"]).sum(dim=1).tolist())
        return [
            Answer(example.id, str(text).strip(), each)
            for example, text, each in zip(examples, texts, kept, strict=True)
        ]

    def _kept(self, handle: Handle | None, before: list[int]) -> list[dict[int, list[int]]]:
        """See `Answer.kept`, of each row; ``before`` are the vision tokens that each has."""
        found: list[dict[int, list[int]]] = [{} for _ in before]
        if handle is None or handle.schedule.is_full:
            return found
        for layer in range(handle.schedule.num_layers):
            for row, kept in enumerate(handle.kept(layer)):
                if len(kept) < before[row]:
                    before[row], found[row][layer] = len(kept), kept.tolist()
        return found


def _image(value: Any) -> Any:
    """An image of a batch as an example takes it."""
    if isinstance(value, (str, Path, Image.Image)):
        return value
    try:
        if isinstance(value, bytes):
            return Image.open(io.BytesIO(value)).convert("RGB")
        return Image.fromarray(value).convert("RGB")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise BadInput(
            f"image is a {type(value).__name__} that is none ({error}): give a path, bytes or pixels"
        ) from None

"""A processor for the conformance table's families: a prompt names its row, and the row's tensors come back.

The real processors need files, and some of them torchvision. Knows nothing about evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from conformance.family import Family
from conformance.inputs import Row
from tiny import tiny_images
from torch import Tensor

from thinsight.evaluation import Example

SPECS = ([3, 5], [2, 3, 9], [4, 1, 2, 2], [1, 1], [6, 7])


class Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    padding_side = "left"

    def __call__(self, texts: str | Sequence[str], **options: Any) -> dict[str, list[Any]]:
        if isinstance(texts, str):
            return {"input_ids": [int(word) for word in re.findall(r"\d+", texts)]}
        return {"input_ids": [self(text)["input_ids"] for text in texts]}

    def decode(self, tokens: Sequence[int], **options: Any) -> str:
        return " ".join(str(int(token)) for token in tokens)


class RowProcessor:
    """Takes the texts of `examples` and gives the family's inputs for their rows."""

    image_token = "<image>"

    def __init__(self, family: Family, specs: Sequence[Any] = SPECS) -> None:
        self.family = family
        self.rows: list[Row] = family.rows(list(specs))
        self.tokenizer = Numbers()
        pictures = iter(tiny_images(sum(len(spec) - 1 for spec in specs)))
        self.examples = [
            Example(f"e{i}", tuple(next(pictures) for _ in spec[1:]), f"row {i}", ("1 2 3 4 5 6",))
            for i, spec in enumerate(specs)
        ]

    def __call__(self, text: Sequence[str], images: Sequence[Any], **options: Any) -> dict[str, Tensor]:
        numbers = [int(re.findall(r"row (\d+)", one)[0]) for one in text]
        assert [len(mine) for mine in images] == [len(self.examples[i].images) for i in numbers]
        return self.family.batch([self.rows[i] for i in numbers]).inputs

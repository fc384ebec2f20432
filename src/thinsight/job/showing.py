"""`thinsight.show`: which tokens a question keeps, as a figure, of a model that is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, MissingPackage, whole
from ..evaluation.example import Example
from ..evaluation.examples import validate_examples
from ..reduction import Reduction
from ..runtime.anatomy import unwrapped
from ..schedule import Schedule
from .findings import picture_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image


def show(
    model: Any,
    processor: Any,
    image: Image.Image | str | Path,
    question: str,
    reduction: Reduction | Schedule | str | Path,
    *,
    layers: Sequence[int] | None = None,
    max_new_tokens: int = 32,
) -> Figure:
    """Draw which vision tokens a question about an image keeps, layer by layer, with both greedy answers.

    A notebook shows the figure where it is the last value of a cell; ``figure.savefig("kept.png")`` writes it.

    Args:
        model: a loaded multimodal ``transformers`` model without a reduction on it.
        processor: its processor.
        image: a PIL image, or the path of an image file.
        question: what is asked about it.
        reduction: what is applied; a schedule ranks by text attention; or what `Reduction.from_pretrained` takes.
        layers: the decoder layers to draw, numbered from 0. None: those at which tokens are dropped, seven at most.
        max_new_tokens: longest answer.

    Raises:
        ThinsightError: an image that cannot be read, one whose tokens form no grid, a reduction or layers that do not
            fit the model; or matplotlib is not installed.
    """
    try:
        from ..report.figure import kept_figure
    except ImportError:
        raise MissingPackage("a figure needs matplotlib: pip install 'thinsight[figures]'") from None
    if isinstance(reduction, (str, Path)):
        reduction = Reduction.from_pretrained(reduction)
    if isinstance(reduction, Schedule):
        reduction = Reduction(reduction)
    if not isinstance(reduction, Reduction):
        raise BadInput(f"reduction is {reduction!r}; pass a thinsight.Reduction, a Schedule, a folder or a Hub id")
    last = reduction.schedule.num_layers - 1
    chosen = None if layers is None else [whole(layer, "layers", 0, last) for layer in layers]
    if chosen == []:
        raise BadInput("layers is empty; give at least one layer, or None")
    asked = Example("question", (Path(image) if isinstance(image, str) else image,), question)
    validate_examples([asked], "show")
    longest = whole(max_new_tokens, "max_new_tokens")
    picture = picture_of(unwrapped(model), processor, asked, reduction, max_new_tokens=longest, layers=chosen)
    return kept_figure(picture)

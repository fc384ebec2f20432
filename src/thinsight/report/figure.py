"""A picture of kept tokens as a matplotlib figure; loaded only where matplotlib is wanted."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from ..shown import percent, tokens
from ..texts import terminal
from .data import Picture
from .pictures import draw_kept, even_columns

_INCHES = 2.6  # of a drawing's longer side
_DPI = 100


class KeptFigure(Figure):
    """A figure that a notebook shows though pyplot was never loaded."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def kept_figure(picture: Picture) -> Figure:
    """The image and a drawing for each of the picture's layers, under the question and both answers."""
    total, side = picture.num_tokens, round(_INCHES * _DPI)
    drawings = [("the image", draw_kept(picture.image, picture.grid, range(total), side=side))]
    for layer, kept in zip(picture.layers, picture.kept, strict=True):
        told = f"layer {layer}: {tokens(len(kept))} ({percent(len(kept) / total)})"
        drawings.append((told, draw_kept(picture.image, picture.grid, kept, side=side)))
    columns = even_columns(len(drawings))
    lines = -(-len(drawings) // columns)
    wide, tall = drawings[0][1].size
    size = columns * (wide / _DPI + 0.15), lines * (tall / _DPI + 0.35) + 0.8
    figure = KeptFigure(figsize=size, dpi=_DPI, layout="constrained", facecolor="white")
    named = (("full model", picture.answer_full), ("reduced", picture.answer_reduced), ("expected", picture.truth))
    answers = "   ".join(f"{name}: {terminal(text)}" for name, text in named if text)
    # the texts are a user's: a dollar in them is no formula
    figure.suptitle(f"{terminal(picture.question)}\n{answers}", fontsize=10, parse_math=False, wrap=True)
    for place, (told, drawing) in enumerate(drawings, start=1):
        axes = figure.add_subplot(lines, columns, place)
        axes.imshow(drawing)
        axes.set_title(told, fontsize=9, parse_math=False)
        axes.set_axis_off()
    return figure

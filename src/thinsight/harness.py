"""A reduction inside an evaluation harness: which one, put onto the harness's own model, and a run that ends where
something fails, for harnesses take an exception for an empty answer and go on.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .errors import BadInput, ThinsightError
from .job.options import ranker_of
from .reduction import Reduction
from .runtime import Handle, apply, num_layers
from .runtime.anatomy import unwrapped
from .schedule import Schedule

FIRST_LAYER = 2
"""From where on ``keep`` holds, where no layer is said."""


class RunFailed(SystemExit):
    """The end of a harness's run. No `Exception`: one would be caught, the answer left empty, the run a success."""


@contextmanager
def loud(what: str) -> Iterator[None]:
    """Whatever fails inside ends the run, with one line; of other errors than ours with their trace before it."""
    try:
        yield
    except Exception as error:  # a harness or a model may raise anything
        kind = "" if isinstance(error, ThinsightError) else f"{type(error).__name__}: "
        if kind:
            traceback.print_exc()
        raise RunFailed(f"thinsight: {what}: {kind}{' '.join(str(error).split())}") from error


class Watch:
    """Ends a run in which a harness's model fails to answer; ``answered`` counts what its ``generate`` gave, in rows.

    Args:
        model: the transformers model, or a wrapper that only calls it. Its ``generate`` is watched from now on.
    """

    def __init__(self, model: Any) -> None:
        self.answered = 0
        inner: Any = unwrapped(model)
        generate = inner.generate

        def watched(*args: Any, **kwargs: Any) -> Any:
            with loud("generate() failed"):
                found = generate(*args, **kwargs)
            self.answered += len(getattr(found, "sequences", found))
            return found

        inner.generate = watched

    @contextmanager
    def answering(self, questions: int) -> Iterator[None]:
        """So many questions are being answered by the harness's code: each by the model, or the run ends."""
        before = self.answered
        with loud("the harness's model class failed"):
            yield
        if (reached := self.answered - before) < questions:
            raise RunFailed(
                f"thinsight: {questions - reached} of {questions} questions never reached generate() of the model: "
                "see the harness's log above for what stopped them"
            )


def put_on(
    model: Any,
    reduction: str | None = None,
    keep: float | None = None,
    layer: int | None = None,
    ranker: str | None = None,
) -> Handle:
    """Put the reduction that a harness's arguments say on its model.

    Args:
        model: the transformers model, or a wrapper that only calls it.
        reduction: a folder or a Hub id.
        keep: instead, the share of vision tokens that stay from ``layer`` on, chosen by ``ranker``.
        layer: see ``keep``; 2 if not said.
        ranker: its name, or name:key=value; text-attention if not said.

    Raises:
        ThinsightError: neither or both were said, the reduction cannot be read, or not be put on this model.
    """
    check_told(reduction, keep, layer, ranker)
    if reduction is not None:
        return apply(model, Reduction.from_pretrained(reduction))
    assert keep is not None
    first = FIRST_LAYER if layer is None else layer
    schedule = Schedule.step(num_layers(unwrapped(model)), first, keep)
    return apply(model, schedule, ranker=None if ranker is None else ranker_of(ranker))


def check_told(reduction: Any, keep: Any, layer: Any, ranker: Any) -> None:
    """Refuse what does not say one reduction."""
    if (reduction is None) == (keep is None):
        said = "both" if keep is not None else "neither"
        raise BadInput(
            f"reduction and keep: {said} given; give reduction=FOLDER or reduction=HUB_ID, or keep=0.25 (with layer=, "
            "ranker=), or run the harness's own model for the full one"
        )
    if reduction is not None and not (layer is None and ranker is None):
        raise BadInput("layer and ranker go with keep: a reduction has its own, leave them out")

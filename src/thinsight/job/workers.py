"""The workers of a command, where it was given some: what they build, and evaluators that stand for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from ..evaluation.dispatch import Channel, Dispatcher
from ..evaluation.evaluator import Evaluator
from ..evaluation.examples import load_examples
from ..evaluation.shards import Pool
from ..loading import DEMOS
from ..progress import Watcher
from .opening import Opened, Prepared, make_evaluator, open_model, prepare, sets_of
from .options import JobOptions, RunOptions, ScoringOptions, WorkerOptions

Options = TypeVar("Options", bound=JobOptions)
_PATHS = ("data", "test_data", "image_folder", "annotations", "cache_dir")


class Workers:
    """The workers of a command, begun when they are first needed; none where none were asked for.

    Attributes:
        dispatcher: gives them work.
    """

    def __init__(self, options: WorkerOptions, make: Callable[[], Any], watcher: Watcher) -> None:
        self.dispatcher: Dispatcher | None = None
        if options.has_workers:
            from ..evaluation.ray_workers import RayTransport

            transport = RayTransport(
                make, options.workers or "auto", address=options.ray, gpus_per_worker=options.gpus_per_worker
            )
            self.dispatcher = Dispatcher(transport, watcher.on_note, watcher.on_workers)

    def stand_for(self, name: str, evaluator: Evaluator) -> Evaluator:
        """What scores on a set: all workers, which score as the evaluator does, or the evaluator itself."""
        if self.dispatcher is None:
            return evaluator
        return cast(Evaluator, Pool(transport=Channel(self.dispatcher, name), inner=evaluator))

    def close(self) -> None:
        """End them."""
        if self.dispatcher is not None:
            self.dispatcher.stop()


@contextmanager
def prepared_run(options: RunOptions, ranker: Any, watcher: Watcher) -> Iterator[Prepared]:
    """As `prepare`, with workers where the options ask for some; they are ended at the end."""
    run = prepare(options, ranker, watcher)
    workers = Workers(options, functools.partial(_evaluators_of_run, anywhere(options), ranker), watcher)
    try:
        calibration, test = (
            workers.stand_for(name, each) for name, each in (("calibration", run.calibration), ("test", run.test))
        )
        yield replace(run, calibration=calibration, test=test)
    finally:
        workers.close()


@contextmanager
def scoring(options: ScoringOptions, evaluator: Evaluator, watcher: Watcher) -> Iterator[Evaluator]:
    """The evaluator, or workers in its place, which are ended at the end."""
    workers = Workers(options, functools.partial(_evaluator_of_set, anywhere(options)), watcher)
    try:
        yield workers.stand_for("test", evaluator)
    finally:
        workers.close()


def anywhere(options: Options) -> Options:
    """The options with whole paths, for a process in another folder."""
    whole = {name: _whole(getattr(options, name, None)) for name in _PATHS}
    given = {name: value for name, value in whole.items() if value is not None}
    model = options.model.model if options.model.model in DEMOS else _whole(options.model.model)
    return replace(options, model=replace(options.model, model=model), **given)


def _whole(path: Any) -> Any:
    if path is None:
        return None
    found = Path(path).expanduser()
    return type(path)(str(found.resolve())) if isinstance(path, Path) or found.exists() else path


# -- in a worker ---------------------------------------------------------------------------------------------


def _evaluators_of_run(options: RunOptions, ranker: Any) -> dict[str, Callable[[], Any]]:
    sets, opened = sets_of(options), _opened(options)
    return {
        name: functools.partial(make_evaluator, options, opened, examples, Watcher(), ranker=ranker, sets=2)
        for name, examples in (("calibration", sets.calibration), ("test", sets.test))
    }


def _evaluator_of_set(options: ScoringOptions) -> dict[str, Callable[[], Any]]:
    examples = load_examples(options.data_name, options.limit, **options.reading)
    return {"test": functools.partial(make_evaluator, options, _opened(options), examples, Watcher())}


def _opened(options: ScoringOptions) -> Opened:
    return open_model(options.model, device_map=device_map_of(options))


def device_map_of(options: WorkerOptions) -> str | None:
    """How a worker's model is spread over its GPUs."""
    return "auto" if options.gpus_per_worker is not None and options.gpus_per_worker > 1 else None

"""The smaller jobs behind the commands: evaluate, analyze, bench and show, each one function.

Each opens model and data in the order that finds mistakes soonest, and returns what a report shows. Knows
nothing about terminals; the main job is pipeline.py's.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path

from .. import words
from ..errors import BadInput
from ..evaluation.consistency import rank_consistency
from ..evaluation.evaluator import check_metric
from ..evaluation.examples import Example, Progress, check_exists, load_examples, read_examples, validate_examples
from ..evaluation.full_model import AUTO
from ..evaluation.prompts import PromptReader, typical_batch
from ..progress import Watcher
from ..report.data import DatasetInfo, Headline, Picture, ReportData
from ..schedule import Schedule
from ..timing import Measurement, measure
from .opening import (
    DEMO_TEST,
    ModelOptions,
    Opened,
    ScoringOptions,
    Sourced,
    content_hash,
    environment,
    find_reduction,
    fit_reduction,
    make_evaluator,
    open_model,
)
from .pictures import picture_of, varied
from .results import MedianPrompt, drop_of, method_row, metric_words, ranker_words, task_rows


@dataclass(frozen=True)
class JobOptions:
    """What all four jobs are told. ``data`` None is the demo's test set; see `session.find_reduction` for
    None there."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: str | None = None
    limit: int | None = None
    reduction: str | None = None

    @property
    def data_name(self) -> str:
        return DEMO_TEST if self.data is None else self.data


@dataclass(frozen=True)
class BenchResult:
    """What was timed, with the FLOPs of the median prompt and where the reduction came from."""

    data: ReportData
    measurement: Measurement
    flops_full: float
    flops: float
    reduction: Sourced

    def lines(self) -> list[str]:
        """What is no time: FLOPs and the KV cache, as text."""
        measured = self.measurement
        return [
            f"Decoder FLOPs of the median prompt: {words.flops(self.flops_full)} full, "
            f"{words.flops(self.flops)} reduced, {words.ratio(self.flops_full / self.flops)}",
            f"KV cache after prefill, measured: {measured.kv_full / 1e6:.2f} MB full, "
            f"{measured.kv_reduced / 1e6:.2f} MB reduced, {words.ratio(measured.kv_ratio)}",
            f"On {measured.device}, {measured.dtype}, {measured.threads} CPU threads; "
            f"reduction: {self.reduction.where}",
        ]


@dataclass(frozen=True)
class ShowResult:
    """A question's kept tokens, and where the reduction came from."""

    picture: Picture
    reduction: Sourced


def evaluate(
    options: JobOptions, *, scoring: ScoringOptions | None = None, watcher: Watcher | None = None
) -> ReportData:
    """Full against reduced on a set of examples, with the drop's interval.

    Args:
        options: model, data and reduction.
        scoring: how the examples are scored; None is the default in all of it.
        watcher: told what is being done.

    Returns:
        The scores, and the cost of the median prompt, as a report shows them.

    Raises:
        ThinsightError: bad input, before any answer is decoded.
    """
    watcher, scoring = watcher or Watcher(), scoring or ScoringOptions()
    scoring.check()
    metric = scoring.metric
    examples, opened, found = _open(options, watcher, metric)
    watcher.on_stage("Processing the images")
    evaluator = make_evaluator(scoring, opened, examples, watcher)
    watcher.on_stage("Full model")
    full = evaluator.full
    if scoring.batch_size == AUTO:
        watcher.on_note(f"The examples run in batches of {evaluator.batch_size} prompts")
    watcher.on_stage("Reduced model")
    reduced = evaluator(found.reduction)
    drop = drop_of(full, reduced, examples)
    prompt = MedianPrompt.of(opened.model.config, evaluator.prompt_sizes)
    schedule = found.reduction.schedule
    rows = (
        method_row("Full model", "full", Schedule.full(schedule.num_layers), full, None, prompt),
        method_row("Reduced", "found", schedule, reduced, drop, prompt, found.where),
    )
    dataset = replace(_dataset(options, examples), metric=metric or metric_words(examples))
    return replace(
        _about(f"{options.model.model} under {found.where}", opened, prompt),
        dataset=dataset,
        headline=Headline(
            full_score=full.score,
            score=reduced.score,
            drop=drop,
            mean_keep_rate=schedule.mean_keep_rate,
            flops_ratio=rows[1].flops_ratio,
            flops_full=rows[0].flops,
            flops=rows[1].flops,
            vision_flops=prompt.vision_flops(),
        ),
        keep_rates=schedule.keep_rates,
        methods=rows,
        per_task=task_rows(full, reduced, examples),
        doubts=(evaluator.doubt,) if evaluator.doubt else (),
    )


def analyze(options: JobOptions, *, watcher: Watcher | None = None) -> ReportData:
    """Rank consistency (the paper's Figure 1) of a model on a set of examples.

    Raises:
        ThinsightError: bad input.
    """
    watcher = watcher or Watcher()
    options.model.check()
    examples = _examples(options, watcher)
    opened = _opened(options, watcher)
    watcher.on_stage("Measuring rank consistency")
    reader = PromptReader(opened.model, opened.processor)
    found = rank_consistency(opened.model, opened.processor, examples, progress=watcher.on_progress, reader=reader)
    report = _about(f"Rank consistency of {options.model.model}", opened, _median(opened, reader, examples))
    return replace(report, dataset=_dataset(options, examples), consistency=found)


def bench(
    options: JobOptions, *, batch_size: int = 8, runs: int = 7, new_tokens: int = 16, watcher: Watcher | None = None
) -> BenchResult:
    """Measured time, KV cache and FLOPs, full against reduced in one run.

    Args:
        options: model, data and reduction.
        batch_size: prompts that are timed together, a number: a size found by "auto" would change what the
            times are of from machine to machine.
        runs: measured runs of each side.
        new_tokens: length of the whole answer.
        watcher: told what is being done.

    Raises:
        ThinsightError: bad input.
    """
    watcher = watcher or Watcher()
    for name, value in (("batch_size", batch_size), ("runs", runs), ("new_tokens", new_tokens)):
        if value < 1:
            raise BadInput(f"{name} is {value}: it must be a whole number of at least 1")
    examples, opened, found = _open(options, watcher)
    watcher.on_stage("Processing the images")
    reader = PromptReader(opened.model, opened.processor)
    prompt = _median(opened, reader, examples, watcher.on_progress)
    inputs = typical_batch(opened.processor, examples, batch_size, reader)
    watcher.on_stage("Timing full against reduced")
    progress = functools.partial(watcher.on_progress, "timing")
    measurement = measure(opened.model, inputs, found.reduction, runs=runs, new_tokens=new_tokens, progress=progress)
    data = replace(
        _about(f"{options.model.model} under {found.where}, timed", opened, prompt),
        keep_rates=found.reduction.schedule.keep_rates,
        timing=measurement.named,
    )
    return BenchResult(data, measurement, prompt.flops(), prompt.flops(found.reduction.schedule), found)


def show(
    options: JobOptions,
    image: str | None,
    question: str | None,
    *,
    max_new_tokens: int = 32,
    watcher: Watcher | None = None,
) -> ShowResult:
    """The kept tokens of one question about one image, and both answers; of a demo question when none is
    given.

    Raises:
        ThinsightError: bad input, or an image without a question.
    """
    watcher = watcher or Watcher()
    if max_new_tokens < 1:
        raise BadInput(f"max_new_tokens is {max_new_tokens}: it must be a whole number of at least 1")
    if image is not None and question is None:
        raise BadInput(f"image {image!r} comes without a question: thinsight show IMAGE QUESTION")
    fitted = _fitted(options)
    if image is None:
        examples, source = varied(read_examples(options.data_name)[: options.limit], 1), options.data_name
    else:
        examples, source = [_asked(image, question)], "show"
    validate_examples(examples, source)
    opened = _opened(options, watcher)
    watcher.on_stage("Looking at kept tokens")
    picture = picture_of(opened.model, opened.processor, examples[0], fitted.reduction, max_new_tokens=max_new_tokens)
    return ShowResult(picture, fitted)


def _asked(image: str, question: str | None) -> Example:
    path = Path(os.path.expanduser(image))
    check_exists(path, "show", "give the path of an image file")
    return Example(id="question", images=(path,), question=question or "")


def _open(options: JobOptions, watcher: Watcher, metric: str | None = None) -> tuple[list[Example], Opened, Sourced]:
    """Everything a job runs on, checked cheapest first."""
    fitted = _fitted(options)
    examples = _examples(options, watcher)
    check_metric(examples, metric)
    opened = _opened(options, watcher)
    watcher.on_note(f"Reduction: {fitted.where}, ranker {ranker_words(fitted.reduction.ranker)}")
    return examples, opened, fitted


def _fitted(options: JobOptions) -> Sourced:
    """The reduction to run, checked against the model's config: no weights are loaded."""
    found = find_reduction(options.reduction, options.model.model)
    return fit_reduction(found, options.model.model, options.model.check())


def _examples(options: JobOptions, watcher: Watcher) -> list[Example]:
    watcher.on_stage("Reading the data")
    return load_examples(options.data_name, options.limit, progress=watcher.on_progress)


def _opened(options: JobOptions, watcher: Watcher) -> Opened:
    watcher.on_stage("Loading the model")
    return open_model(options.model)


def _median(
    opened: Opened, reader: PromptReader, examples: list[Example], progress: Progress | None = None
) -> MedianPrompt:
    prompts = reader.prompts(examples, progress)
    return MedianPrompt.of(opened.model.config, [(prompt.n_vision, prompt.n_text) for prompt in prompts])


def _dataset(options: JobOptions, examples: list[Example]) -> DatasetInfo:
    return DatasetInfo(test_name=options.data_name, test_size=len(examples), test_hash=content_hash(examples))


def _about(title: str, opened: Opened, prompt: MedianPrompt) -> ReportData:
    return ReportData(
        title=title,
        model=replace(opened.info, num_vision_tokens=prompt.n_vision),
        environment=environment(opened),
        created=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    )

"""The smaller jobs behind the commands: check, evaluate, analyze, bench and show, each one function.

Each opens model and data in the order that finds mistakes soonest, and returns what a report shows. Knows
nothing about terminals; the main job is pipeline.py's.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from .. import notebook, shown
from ..certificate import Plan
from ..checked import CheckResult
from ..checking import check as check_model
from ..errors import BadInput
from ..evaluation.consistency import rank_consistency
from ..evaluation.evaluator import Evaluator, check_metric
from ..evaluation.examples import Example, Progress, check_exists, load_examples, read_examples, validate_examples
from ..evaluation.full_model import AUTO
from ..evaluation.prompts import PromptReader
from ..progress import Watcher
from ..reduction import Reduction
from ..report.data import DatasetInfo, Picture, ReportData
from ..report.pictures import check_picture_name
from ..schedule import Schedule
from ..searches.certify import check_promise
from ..texts import counted
from ..timing import Measurement, measure
from .findings import (
    MedianPrompt,
    drop_of,
    headline_of,
    measures_of,
    method_row,
    metric_words,
    picture_of,
    ranker_words,
    task_rows,
    varied,
)
from .opening import (
    Opened,
    Sourced,
    check_writable_file,
    content_hash,
    environment,
    make_evaluator,
    open_model,
    open_to_check,
    reduction_for,
)
from .options import AnalyzeOptions, BenchOptions, CheckOptions, EvaluateOptions, JobOptions, PlanOptions, ShowOptions
from .workers import scoring


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
            f"Decoder FLOPs of the median prompt: {shown.flops(self.flops_full)} full, "
            f"{shown.flops(self.flops)} reduced, {shown.ratio(self.flops_full / self.flops)}",
            f"KV cache after prefill, measured: {measured.kv_full / 1e6:.2f} MB full, "
            f"{measured.kv_reduced / 1e6:.2f} MB reduced, {shown.ratio(measured.kv_ratio)}",
            f"On {measured.device}, {measured.dtype}, {measured.threads} CPU threads; "
            f"reduction: {self.reduction.where}",
        ]


@dataclass(frozen=True)
class ShowResult:
    """A question's kept tokens, and where the reduction came from."""

    picture: Picture
    reduction: Sourced


def check(options: CheckOptions, watcher: Watcher | None = None) -> CheckResult:
    """Check that reductions run rightly on a model, listed or not; a result that passed is stored for `apply`.

    Raises:
        ThinsightError: bad input, before the model is loaded; or no inputs can be made for it.
    """
    watcher = watcher or notebook.watcher()
    if options.out is not None:
        check_writable_file(options.out)
    watcher.on_stage("Loading the model")
    result = check_model(*open_to_check(options), watcher=watcher)
    if options.out is not None:
        result.save(options.out)
    if result.passed:
        result.store()
    return result


def evaluate(options: EvaluateOptions, watcher: Watcher | None = None) -> ReportData:
    """Full against reduced on a set of examples: scores with the drop's interval, and the median prompt's cost.

    Raises:
        ThinsightError: bad input, before any answer is decoded.
    """
    watcher = watcher or notebook.watcher()
    examples, opened, found = _open(options, options.reduction, watcher, options.metric)
    watcher.on_stage("Processing the images")
    with scoring(options, make_evaluator(options, opened, examples, watcher), watcher) as evaluator:
        return _evaluated(options, opened, found, evaluator, watcher)


def _evaluated(
    options: EvaluateOptions, opened: Opened, found: Sourced, evaluator: Evaluator, watcher: Watcher
) -> ReportData:
    examples = list(evaluator.examples)
    watcher.on_stage("Full model")
    full = evaluator.full
    if options.batch_size == AUTO:
        watcher.on_note(f"The examples run in batches of {counted(evaluator.batch_size, 'prompt')}")
    watcher.on_stage("Reduced model")
    reduced = evaluator(found.reduction)
    drop = drop_of(full, reduced, examples)
    prompt = MedianPrompt.of(opened.model.config, evaluator.prompt_sizes)
    schedule = found.reduction.schedule
    rows = (
        method_row("Full model", "full", Schedule.full(schedule.num_layers), full, None, prompt),
        method_row("Reduced", "found", schedule, reduced, drop, prompt, found.where),
    )
    dataset = replace(_dataset(options, examples), metric=options.metric or metric_words(examples))
    return replace(
        _about(f"{options.model.model} under {found.where}", opened, prompt),
        dataset=dataset,
        headline=headline_of(*rows, prompt),
        keep_rates=schedule.keep_rates,
        methods=rows,
        per_task=task_rows(full, reduced, examples),
        measures=() if options.metric else measures_of(full, reduced, examples),
        doubts=(evaluator.doubt,) if evaluator.doubt else (),
    )


def analyze(options: AnalyzeOptions, watcher: Watcher | None = None) -> ReportData:
    """Rank consistency (the paper's Figure 1) of a model on a set of examples.

    Raises:
        ThinsightError: bad input.
    """
    watcher = watcher or notebook.watcher()
    check_writable_file(options.out)
    options.check()
    examples = _examples(options, watcher)
    opened = _opened(options, watcher)
    watcher.on_stage("Measuring rank consistency")
    reader = PromptReader(opened.model, opened.processor)
    found = rank_consistency(opened.model, opened.processor, examples, progress=watcher.on_progress, reader=reader)
    report = _about(f"Rank consistency of {options.model.model}", opened, _median(opened, reader, examples))
    return replace(report, dataset=_dataset(options, examples), consistency=found)


def bench(options: BenchOptions, watcher: Watcher | None = None) -> BenchResult:
    """Measured time, KV cache and FLOPs, full against reduced in one run.

    Raises:
        ThinsightError: bad input.
    """
    watcher = watcher or notebook.watcher()
    examples, opened, found = _open(options, options.reduction, watcher)
    watcher.on_stage("Processing the images")
    reader = PromptReader(opened.model, opened.processor)
    prompt = _median(opened, reader, examples, watcher.on_progress)
    inputs = reader.typical_batch(examples, options.batch_size)
    watcher.on_stage("Timing full against reduced")
    measurement = measure(
        opened.model,
        inputs,
        found.reduction,
        runs=options.runs,
        new_tokens=options.new_tokens,
        progress=functools.partial(watcher.on_progress, "timing"),
    )
    data = replace(
        _about(f"{options.model.model} under {found.where}, timed", opened, prompt),
        keep_rates=found.reduction.schedule.keep_rates,
        timing=measurement.named,
    )
    return BenchResult(data, measurement, prompt.flops(), prompt.flops(found.reduction.schedule), found)


def show(options: ShowOptions, watcher: Watcher | None = None) -> ShowResult:
    """The kept tokens of one question about one image, and both answers; of a demo question when none is given.

    Raises:
        ThinsightError: bad input, or an image without a question.
    """
    watcher = watcher or notebook.watcher()
    check_writable_file(options.out)
    check_picture_name(options.out)
    image, question = options.image, options.question
    if image is not None and question is None:
        raise BadInput(f"image {image!r} comes without a question: thinsight show IMAGE QUESTION")
    found = reduction_for(options.reduction, options.model.model, options.check())
    if image is None:
        examples, source = (
            varied(read_examples(options.data_name, options.limit, **options.reading), 1),
            options.data_name,
        )
    else:
        path = Path(os.path.expanduser(image))
        check_exists(path, "show", "give the path of an image file")
        examples, source = [Example(id="question", images=(path,), question=question or "")], "show"
    validate_examples(examples, source)
    opened = _opened(options, watcher)
    watcher.on_stage("Looking at kept tokens")
    longest = options.max_new_tokens
    picture = picture_of(opened.model, opened.processor, examples[0], found.reduction, max_new_tokens=longest)
    return ShowResult(picture, found)


def plan(options: PlanOptions) -> Plan:
    """How many examples certify what, by the agreement that is given or that a certified reduction showed.

    Raises:
        ThinsightError: bad input, or a reduction that has nothing to say about it.
    """
    check_promise(options.max_drop, options.confidence)
    agreement = options.agreement
    if options.reduction is not None:
        if agreement is not None:
            raise BadInput(f"agreement is {agreement!r}, and reduction {options.reduction!r} has one: leave one out")
        certificate = Reduction.from_pretrained(options.reduction).certificate
        agreement = None if certificate is None else certificate.agreement
        if agreement is None:
            raise BadInput(f"reduction {options.reduction!r} has no certificate with an agreement: give --agreement")
    n = None if options.data is None else len(read_examples(options.data))
    if n == 0:
        raise BadInput(f"data {options.data!r} holds no examples: give another file")
    return Plan(float(options.max_drop), float(options.confidence), agreement, n)


def _open(
    options: JobOptions, reduction: str | None, watcher: Watcher, metric: str | None = None
) -> tuple[list[Example], Opened, Sourced]:
    """Everything a job runs on, checked cheapest first."""
    found = reduction_for(reduction, options.model.model, options.check())
    examples = _examples(options, watcher)
    check_metric(examples, metric)
    opened = _opened(options, watcher)
    watcher.on_note(f"Reduction: {found.where}, ranker {ranker_words(found.reduction.ranker)}")
    return examples, opened, found


def _examples(options: JobOptions, watcher: Watcher) -> list[Example]:
    watcher.on_stage("Reading the data")
    return load_examples(options.data_name, options.limit, progress=watcher.on_progress, **options.reading)


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

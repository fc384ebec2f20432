"""The command `thinsight`: parses, calls one function, prints. No logic.

Everything heavy is imported inside the commands, so that `--help` and a misspelt option answer at once. Bad
input ends in one line on standard error and exit code 2, Ctrl-C in one line and 130, SIGTERM in one and 143;
all are dealt with in `_Group.main` alone, but for signals before the work begins (interrupts.py).
"""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from .errors import BadInput, ThinsightError
from .interrupts import INTERRUPTED, exit_code, leave_on_interrupt, raise_on_interrupt, what_came
from .texts import capped, shell, terminal
from .version import __version__

if TYPE_CHECKING:
    from .job.opening import ModelOptions


BAD_INPUT = 2
_DEFAULT_OUT = "thinsight-out"


class _Group(TyperGroup):
    """Turns what may end a command early into one line and an exit code."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *rest: Any, **extra: Any) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        extra |= {"standalone_mode": False, "obj": given}
        try:
            code = super().main(given, "thinsight", *rest, **extra)
        except (KeyboardInterrupt, typer.Abort):
            code = INTERRUPTED
        except ThinsightError as error:
            code = _fail(str(error))
        except BrokenPipeError:  # the reader of our output left, as `head` does: nobody is there to be told
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except OSError as error:  # a name that is too long, a full disk, a folder taken away meanwhile
            place = "" if error.filename is None else f"{str(error.filename)[:200]}: "
            code = _fail(f"{place}{error.strerror or error}; check the path and the disk")
        except ImportError as error:
            code = _fail(f"a package cannot be loaded ({error}): see `thinsight doctor`")
        except Exception as error:
            if not hasattr(error, "format_message"):  # a usage error of typer's, whichever package it lives in
                raise
            code = _fail(f"{error.format_message()} See `thinsight --help`.")
        leave_on_interrupt()
        if code == INTERRUPTED:  # also what typer makes of a KeyboardInterrupt
            _tell(f"{what_came()}{self._how_to_resume(given)}")
            code = exit_code()
        sys.exit(code if isinstance(code, int) else 0)

    def _how_to_resume(self, given: Sequence[str]) -> str:
        command = self.commands.get(given[0]) if given else None
        if command is None or all(parameter.name != "resume" for parameter in command.params):
            return ""
        again = [*given, *([] if "--resume" in given else ["--resume"])]
        return f": what is done is kept; continue with `{shell(['thinsight', *again])}`"


class _Command(TyperCommand):
    """Refuses a value that is empty, as an unset shell variable leaves it behind."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given, *_ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in self.params:
            value = given.get(parameter.name)
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, str) and not each.strip():
                    name = parameter.opts[0]
                    raise BadInput(f"{name} is {each!r}, which is empty: give a value, or leave it out")
        return super().parse_args(ctx, args)


def _fail(message: str) -> int:
    _tell(f"error: {capped(terminal(message).strip())}")
    return BAD_INPUT


def _tell(line: str) -> None:
    with suppress(OSError):  # the terminal is gone, with whoever was to read this
        print(line, file=sys.stderr, flush=True)


app = typer.Typer(
    cls=_Group,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Search the fewest vision tokens a multimodal LLM needs, layer by layer, and run the model with "
    "just those. Every command but convert runs without arguments, on the embedded demo model and data.",
)


def main() -> None:
    """Entry point of the installed command."""
    app()


# -- options that several commands share -----------------------------------------------------------------

Model = Annotated[str, typer.Option("--model", help="demo, a local folder, or a hub id.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Attn = Annotated[str, typer.Option("--attn", help="Attention implementation: sdpa, eager, flash_attention_2 ...")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the checkpoint run its own code. Never unless you say so.")
]
Data = Annotated[str | None, typer.Option("--data", help="JSON-lines file, demo:calibration or demo:test.")]
Calibration = Annotated[
    str | None, typer.Option("--data", help="Calibration examples: JSON-lines file. Default: demo:calibration.")
]
Test = Annotated[
    str | None,
    typer.Option("--test-data", help="Test examples. Default: the demo's, or half of --data, split by image."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use only so many examples of each set.")]
Metric = Annotated[str | None, typer.Option("--metric", help="One metric for all examples, such as agreement.")]
BatchSize = Annotated[
    str, typer.Option("--batch-size", help="Prompts per forward pass, or auto: the fastest, measured first.")
]
CacheGib = Annotated[
    float, typer.Option("--cache-gib", help="Vision features kept in memory, in GiB; more go into temporary files.")
]
CacheDir = Annotated[
    Path | None,
    typer.Option(
        "--cache-dir",
        help="Folder that keeps vision features and the full model's answers for later runs. Default: none.",
    ),
]
MaxNewTokens = Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")]
BudgetUnit = Annotated[
    str | None,
    typer.Option(
        "--budget-unit",
        help="Of --budget: keep (mean keep rate, the default), flops (up to 1 a fraction of the full decoder's) or ms.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what was begun in --out.")]
ReductionSource = Annotated[
    str | None,
    typer.Option("--reduction", help=f"Folder or hub id of a reduction. Default: {_DEFAULT_OUT}, else FastV at 50 %."),
]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        print(f"thinsight {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit


# -- commands --------------------------------------------------------------------------------------------


@app.command(cls=_Command)
def search(
    context: typer.Context,
    model: Model = "demo",
    data: Calibration = None,
    test_data: Test = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop", help="Largest drop of the calibration score; 0.01, one point, if no budget is given."
        ),
    ] = None,
    budget: Annotated[
        float | None, typer.Option("--budget", help="What a prefill may cost, in place of --max-drop; 0.25 keeps 25 %.")
    ] = None,
    budget_unit: BudgetUnit = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="gsearch; for a budget sensitivity (the default), adaptive, psigmoid or random."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the reduction and the report.")] = Path(_DEFAULT_OUT),
    resume: Resume = False,
    ranker: Annotated[
        str | None,
        typer.Option(
            "--ranker",
            help="text-attention, vision-attention, random ...; settings as name:key=value,... "
            "with JSON values. Default: chosen by the search (auto) where it can, else text-attention.",
        ),
    ] = None,
    solver: Annotated[
        str | None, typer.Option("--solver", help="G-Search: bisect (the default), or bayes (the paper's).")
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier", help="Find a schedule for every cost from 5 to 80 % in one run; --max-drop or --budget picks."
        ),
    ] = False,
    start: Annotated[
        str | None,
        typer.Option("--start", help="A reduction (folder or Hub id), such as G-Search's, tried first under a budget."),
    ] = None,
    first_layer: Annotated[
        int | None, typer.Option("--first-layer", min=0, help="The first layer that may see fewer tokens, from 0.")
    ] = None,
    step: Annotated[int | None, typer.Option("--step", min=1, help="bisect: counts are multiples of this (1).")] = None,
    trade_off: Annotated[
        float | None, typer.Option("--trade-off", help="bayes: weight of the cost, lambda (0.1).")
    ] = None,
    n_trials: Annotated[
        int | None,
        typer.Option(
            "--n-trials", min=1, help="Evaluations under a budget (16); bayes: per layer (8); frontier: per cost (4)."
        ),
    ] = None,
    confidence: Annotated[
        float | None,
        typer.Option(
            "--confidence",
            help="bisect: leave a candidate that fails with this confidence, such as 0.99. "
            "Default: one that fails for certain.",
        ),
    ] = None,
    limit: Limit = None,
    metric: Metric = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = "8",
    cache_gib: CacheGib = 4.0,
    cache_dir: CacheDir = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
) -> None:
    """Search a reduction, prove it on test data, write the report."""
    from .job.pipeline import SearchOptions, search_and_report

    options = SearchOptions(
        model=_model_options(model, dtype, device, attn, trust_remote_code),
        data=data,
        test_data=test_data,
        limit=limit,
        metric=metric,
        max_new_tokens=max_new_tokens,
        max_drop=max_drop,
        budget=budget,
        budget_unit=budget_unit,
        method=method,
        frontier=frontier,
        ranker=None if ranker is None else _ranker(ranker),
        solver=solver,
        first_layer=first_layer,
        step=step,
        trade_off=trade_off,
        n_trials=n_trials,
        confidence=confidence,
        start=start,
        seed=seed,
        batch_size=_batch_size(batch_size),
        cache_gib=cache_gib,
        cache_dir=cache_dir,
        out=out,
        resume=resume,
        command=shell(["thinsight", *context.obj]),
    )
    outcome = _watched(lambda watcher: search_and_report(options, watcher))
    Console().print(outcome.data)
    _print(f"Reduction: {outcome.folder}", f"Report:    {outcome.report}")


@app.command(cls=_Command)
def evaluate(
    reduction: ReductionSource = None,
    model: Model = "demo",
    data: Data = None,
    limit: Limit = None,
    metric: Metric = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = "8",
    cache_gib: CacheGib = 4.0,
    cache_dir: CacheDir = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
) -> None:
    """Score full against reduced on a set of examples (default: demo:test)."""
    from .job import commands
    from .job.opening import ScoringOptions

    options = commands.JobOptions(_model_options(model, dtype, device, attn, trust_remote_code), data, limit, reduction)
    scoring = ScoringOptions(
        metric=metric,
        max_new_tokens=max_new_tokens,
        batch_size=_batch_size(batch_size),
        cache_gib=cache_gib,
        cache_dir=cache_dir,
    )
    report = _watched(lambda watcher: commands.evaluate(options, scoring=scoring, watcher=watcher))
    Console().print(report)


@app.command(cls=_Command)
def compare(
    budget: Annotated[
        list[float] | None, typer.Option("--budget", help="May be repeated. Default: 0.5 0.25 0.125 0.0625.")
    ] = None,
    budget_unit: BudgetUnit = None,
    methods: Annotated[
        str, typer.Option("--methods", help="all, or names with commas, such as search-sensitivity,fastv.")
    ] = "all",
    model: Model = "demo",
    data: Calibration = None,
    test_data: Test = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for tables and figure.")] = Path("thinsight-compare"),
    resume: Resume = False,
    ranker: Annotated[
        str | None, typer.Option("--ranker", help="Of the searches that do not choose it. Default: text-attention.")
    ] = None,
    n_trials: Annotated[int | None, typer.Option("--n-trials", min=1, help="Evaluations of each search (16).")] = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, help="Runs of what is random, seeds from 0.")] = 1,
    limit: Limit = None,
    metric: Metric = None,
    max_new_tokens: MaxNewTokens = None,
    batch_size: BatchSize = "8",
    cache_gib: CacheGib = 4.0,
    cache_dir: CacheDir = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
) -> None:
    """Searches and published methods side by side at equal cost, scored on test data."""
    from .job.compare import BUDGETS, CompareOptions
    from .job.compare import compare as run

    options = CompareOptions(
        model=_model_options(model, dtype, device, attn, trust_remote_code),
        data=data,
        test_data=test_data,
        limit=limit,
        metric=metric,
        max_new_tokens=max_new_tokens,
        budgets=tuple(budget) if budget else BUDGETS,
        budget_unit="keep" if budget_unit is None else budget_unit,
        methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
        seeds=tuple(range(seeds)),
        n_trials=n_trials,
        ranker=None if ranker is None else _ranker(ranker),
        batch_size=_batch_size(batch_size),
        cache_gib=cache_gib,
        cache_dir=cache_dir,
        out=out,
        resume=resume,
    )
    outcome = _watched(lambda watcher: run(options, watcher))
    Console().print(outcome.comparison)
    _print(*(f"Written: {path}" for path in outcome.files), *filter(None, [outcome.note]))


@app.command(cls=_Command)
def analyze(
    model: Model = "demo",
    data: Data = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Use only so many examples.")] = 64,
    out: Annotated[Path, typer.Option("--out", help="Where the plot goes, an HTML file.")] = Path(
        "thinsight-analysis.html"
    ),
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
) -> None:
    """How alike the layers rank the vision tokens (rank consistency), as a table and a plot."""
    from .job import commands
    from .job.run_folder import check_writable_file
    from .report import write_report

    check_writable_file(out)
    options = commands.JobOptions(_model_options(model, dtype, device, attn, trust_remote_code), data, limit)
    report = _watched(lambda watcher: commands.analyze(options, watcher=watcher))
    Console().print(report)
    _print(f"Plot: {write_report(out, report)}")


@app.command(cls=_Command)
def bench(
    reduction: ReductionSource = None,
    model: Model = "demo",
    data: Data = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Choose prompts among so many examples.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts that are timed together.")] = 8,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Measured runs of each side.")] = 7,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Length of the whole answer.")] = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
) -> None:
    """Measure time, KV cache and FLOPs, full against reduced, in one run."""
    from .job import commands

    options = commands.JobOptions(_model_options(model, dtype, device, attn, trust_remote_code), data, limit, reduction)
    result = _watched(
        lambda watcher: commands.bench(
            options, batch_size=batch_size, runs=runs, new_tokens=new_tokens, watcher=watcher
        )
    )
    Console().print(result.data)
    _print(*result.lines())


@app.command(cls=_Command)
def show(
    image: Annotated[str | None, typer.Argument(help="An image file. Default: a demo question's.")] = None,
    question: Annotated[str | None, typer.Argument(help="A question about it.")] = None,
    reduction: ReductionSource = None,
    model: Model = "demo",
    out: Annotated[Path, typer.Option("--out", help="The picture to write.")] = Path("thinsight-kept.png"),
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 32,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn: Attn = "sdpa",
    trust_remote_code: Trust = False,
) -> None:
    """Draw which vision tokens a question keeps, layer by layer, and print both answers."""
    from .job import commands
    from .job.run_folder import check_writable_file
    from .report import check_picture_name, save_contact_strip

    check_writable_file(out)
    check_picture_name(out)
    options = commands.JobOptions(_model_options(model, dtype, device, attn, trust_remote_code), reduction=reduction)
    result = _watched(
        lambda watcher: commands.show(options, image, question, max_new_tokens=max_new_tokens, watcher=watcher)
    )
    _print(
        f"Question:      {result.picture.question}",
        f"Full model:    {result.picture.answer_full}",
        f"Reduced model: {result.picture.answer_reduced}",
        *([f"Expected:      {result.picture.truth}"] if result.picture.truth else []),
        f"Reduction:     {result.reduction.where}",
        f"Picture:       {save_contact_strip(out, result.picture)}",
    )


@app.command(cls=_Command)
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `thinsight search` wrote.")] = Path(_DEFAULT_OUT),
) -> None:
    """Write the HTML report of a finished search anew, and print its tables."""
    from .report import load_report_data, write_report

    data = load_report_data(folder)
    path = write_report(folder / "report.html", data)
    Console().print(data)
    _print(f"Report: {path}")


@app.command(cls=_Command)
def convert(
    source: Annotated[
        str, typer.Argument(help="An original InternVL 2, 2.5 or 3 checkpoint: a local folder, or a hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The folder to make.")],
) -> None:
    """Convert an original InternVL checkpoint for stock transformers, running none of its code."""
    from .convert import convert as convert_checkpoint

    folder = _watched(lambda watcher: convert_checkpoint(source, out, watcher=watcher))
    _print(f"Model: {folder}", f"Use it with: {shell(['thinsight', 'search', '--model', str(folder)])}")


@app.command("models", cls=_Command)
def list_models() -> None:
    """List the families of models that run under a reduction."""
    from .families import models

    table = Table(title="Models that run under a reduction", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("model", "transformers class", "takes"):
        table.add_column(column, no_wrap=column != "model")
    for each in models():
        table.add_row(*map(Text, (each.name, each.model_class, ", ".join(each.modalities))))
    Console().print(table)
    _print(*(f"{each.name}: {each.notes}" for each in models() if each.notes))
    needing = [each.name for each in models() if each.needs]
    _print(f"Processors that need `pip install 'thinsight[vision]'`: {', '.join(needing)}")


@app.command(cls=_Command)
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for scripts and bug reports.")] = False,
) -> None:
    """Print versions, devices and attention implementations, and what is missing for which models.

    Exit code 1 where something is missing or wrong that every model needs."""
    from .job.doctor import diagnose

    found = diagnose()
    usable = [name for name, why in found.attention.items() if not why]
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        _print(
            f"thinsight {found.thinsight}, Python {found.python}, {found.system}",
            *(f"  {each.name:17} {each.version or '-':13} {each.wanted}".rstrip() for each in found.packages),
            *found.devices,
            *([f"attention: {', '.join(usable)}"] if usable else []),
            *(why for why in found.attention.values() if why),
            *(f"not installed: {line}" for line in found.missing),
            *(f"problem: {line}" for line in found.problems),
            *([] if found.problems else ["All that every model needs is here."]),
        )
    raise typer.Exit(int(bool(found.problems)))


# -- helpers ---------------------------------------------------------------------------------------------


def _watched(job: Callable[[Any], Any]) -> Any:
    """Run a job with its progress on standard error, warnings as lines of it, and transformers' own bars and
    warnings off."""
    from transformers.utils import logging

    from .console import ConsoleWatcher

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    raise_on_interrupt()  # all is loaded, and what is done from here on is kept
    with ConsoleWatcher(Console(stderr=True)) as watcher, warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: watcher.on_note(f"warning: {message}")
        return job(watcher)


def _model_options(model: str, dtype: str, device: str, attn: str, trust_remote_code: bool) -> ModelOptions:
    from .job.opening import ModelOptions

    return ModelOptions(model, dtype, device, attn, trust_remote_code)


def _batch_size(text: str) -> int | str:
    """A whole number as such; any other word is left to the check of the options."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text


def _ranker(text: str) -> dict[str, Any]:
    """ "name" or "name:key=value,key=value" as a ranker's dict; a value is JSON, or else taken as text."""
    name, _, rest = text.partition(":")
    ranker: dict[str, Any] = {"name": name}
    while rest:
        key, equals, rest = rest.partition("=")
        if not equals or not key.strip() or key.strip() in ranker:
            raise BadInput(f"ranker is {text!r}: write settings as name:key=value,key=value, each key once")
        ranker[key.strip()], rest = _value(rest)
    return ranker


def _value(text: str) -> tuple[Any, str]:
    """The value that a text begins with, and what follows its comma. JSON may have commas of its own."""
    word, _, rest = text.partition(",")
    text = text.lstrip()
    try:
        value, end = _JSON.raw_decode(text)
    except (ValueError, RecursionError):  # a word, a number that is none, brackets without end
        return word.strip(), rest
    behind = text[end:].lstrip()
    return (value, behind[1:]) if behind[:1] in ("", ",") else (word.strip(), rest)


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


_JSON = json.JSONDecoder(parse_constant=_no_number)


def _print(*lines: str) -> None:
    console = Console()
    for line in lines:
        console.print(Text(terminal(line)), soft_wrap=True)

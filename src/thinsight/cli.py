"""The command `thinsight`: parses, calls one function, prints. No logic.

Everything heavy is imported inside the commands, so that `--help` and a misspelt option answer at once. Bad
input ends in one line on standard error and exit code 2, Ctrl-C in one line and 130, SIGTERM in one and 143;
all are dealt with in `_Group.main` alone, but for signals before the work begins (interrupts.py).
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import Field, asdict, fields, is_dataclass, replace
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup

from .errors import BadInput, ThinsightError
from .interrupts import INTERRUPTED, exit_code, leave_on_interrupt, raise_on_interrupt, what_came
from .job.options import (
    DEFAULT_OUT,
    AnalyzeOptions,
    AnswerOptions,
    BenchOptions,
    CheckOptions,
    CompareOptions,
    DataOptions,
    EvaluateOptions,
    PlanOptions,
    SearchOptions,
    ServeOptions,
    ShowOptions,
    Told,
)
from .texts import capped, counted, shell, terminal
from .version import __version__

BAD_INPUT = 2

_GROUPS = {
    "Model": ("model", "dtype", "device", "attn", "trust_remote_code", "unlisted"),
    "Data": ("data", "test_data", "benchmark", "columns", "image_folder", "annotations", "limit"),
    "What is asked for": ("max_drop", "budget", "budget_unit", "frontier", "confidence", "no_certify"),
    "Search": (
        "method", "ranker", "solver", "start", "first_layer", "step", "trade_off", "n_trials", "early_stop", "seed",
    ),
    "Scoring": ("metric", "max_new_tokens", "batch_size", "cache_gib", "cache_dir"),
    "More than one device": ("workers", "ray", "gpus_per_worker"),
    "Server": ("name", "host", "port"),
    "Limits": ("max_tokens", "max_images", "max_image_mib", "max_image_pixels", "max_waiting"),
    "Images by address": ("allow_url_images", "image_hosts"),
    "A server in place of a model": ("server", "against", "served_model", "against_model", "concurrency", "answers"),
}  # fmt: skip
"""Options under one heading in the help, where a command has many; the others come first."""
_MANY = 8

_EXAMPLES = {
    "search": (
        "thinsight search",
        "thinsight search --model llava-hf/llava-1.5-7b-hf --data calibration.jsonl --max-drop 0.01 --out mine",
        "thinsight search --model MODEL --data calibration.jsonl --test-data test.jsonl --budget 0.25",
        "thinsight search --model MODEL --data calibration.jsonl --workers auto",
        "thinsight search --model MODEL --benchmark textvqa,docvqa*2,pope=pope.tsv --max-drop 0.01",
    ),
    "compare": (
        "thinsight compare --budget 0.25",
        "thinsight compare --model MODEL --data calibration.jsonl --test-data test.jsonl --max-drop 0.01",
    ),
    "evaluate": (
        "thinsight evaluate --model MODEL --reduction mine --data test.jsonl",
        "thinsight evaluate --server http://127.0.0.1:8000/v1 --data test.jsonl --answers answers.jsonl",
    ),
    "answer": (
        "thinsight answer --model MODEL --reduction mine --data questions.jsonl --out answers.jsonl",
        "thinsight answer --model MODEL --reduction mine --data questions.jsonl --out answers.parquet --workers auto",
    ),
    "data": (
        "thinsight data questions.tsv --model MODEL",
        "thinsight data hf:owner/name:validation --columns image=img,question=q,answers=a",
        "thinsight data --benchmark pope pope.tsv",
    ),
    "check": (
        "thinsight check --model Qwen/Qwen2.5-VL-3B-Instruct --dtype bfloat16",
        "thinsight check --model MODEL --trust-remote-code --out check.json",
    ),
    "plan": ("thinsight plan --max-drop 0.01", "thinsight plan --data test.jsonl --agreement 0.98"),
    "analyze": ("thinsight analyze --model MODEL --data calibration.jsonl",),
    "bench": ("thinsight bench --model MODEL --reduction mine --batch-size 1",),
    "show": ('thinsight show photo.jpg "What is on the sign?" --model MODEL --reduction mine',),
    "serve": (
        "thinsight serve --model MODEL --reduction mine",
        "thinsight serve --model MODEL --reduction owner/name --host 0.0.0.0 --image-hosts images.example.com",
    ),
    "convert": ("thinsight convert OpenGVLab/InternVL3-8B --out internvl3-8b",),
    "push": ("thinsight push mine owner/name",),
}


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

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """With the searches that there are, whose names are loaded for this alone."""
        parameter: Any
        for parameter in self.params:
            if "{methods}" in (getattr(parameter, "help", None) or ""):
                from .searches import SEARCHES

                parameter.help = parameter.help.replace("{methods}", ", ".join(SEARCHES))
        super().format_help(ctx, formatter)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Under headings where they are many; what is given by place stands above them."""
        parameters: list[Any] = self.get_params(ctx)
        group_of = {name: group for group, names in _GROUPS.items() for name in names}
        places = {name: place for place, name in enumerate(group_of)}
        if len(parameters) > _MANY:
            parameters.sort(key=lambda each: places.get(each.name, 0))
        else:
            group_of.clear()
        sections: dict[str, list[tuple[str, str]]] = {group: [] for group in ("Arguments", "Options", *_GROUPS)}
        for parameter in parameters:
            record = parameter.get_help_record(ctx)
            if record is not None:
                given_by_place = parameter.param_type_name == "argument"
                sections["Arguments" if given_by_place else group_of.get(parameter.name, "Options")].append(record)
        for group, records in sections.items():
            if records:
                with formatter.section(group):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Examples, which are not broken over lines: they are there to be copied."""
        examples = _EXAMPLES.get(self.name or "", ())
        if examples:
            with formatter.section("Examples"):
                for line in examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def _fail(message: str) -> int:
    _tell(f"error: {capped(terminal(message).strip())}")
    return BAD_INPUT


def _tell(line: str) -> None:
    with suppress(OSError):  # the terminal is gone, with whoever was to read this
        print(line, file=sys.stderr, flush=True)


app = typer.Typer(
    cls=_Group,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Search the fewest vision tokens a multimodal LLM needs, layer by layer, and run the model with "
    "just those. Every command but convert and push runs without arguments, on the embedded demo model and data.",
)


def main() -> None:
    """Entry point of the installed command."""
    app()


# -- options: those of a dataclass ----------------------------------------------------------------------------


def _asked(options: Any) -> Iterator[tuple[Field[Any], Told, Parameter]]:
    """The fields of a dataclass, and of one within it, that the command line asks for, and how."""
    hints = get_type_hints(options)
    for each in fields(options):
        kind, about = hints[each.name], each.metadata.get("told", Told())
        if is_dataclass(kind):
            yield from _asked(kind)
        elif about.help:
            name = about.flag or f"--{each.name.replace('_', '-')}"
            bounds = {"min": about.least, "max": about.most}
            asked = typer.Argument(help=about.help) if about.argument else typer.Option(name, help=about.help, **bounds)
            default = each.default if about.said is ... else about.said
            hint: Any = Annotated[about.kind or kind, asked]
            parameter = name.lstrip("-").replace("-", "_")
            yield each, about, Parameter(parameter, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _filled(options: Any, given: dict[str, Any]) -> Any:
    """The dataclass from what was given on the command line."""
    asked = {each: (about.read, given[parameter.name]) for each, about, parameter in _asked(options)}
    hints = get_type_hints(options)
    values = {}
    for each in fields(options):
        if is_dataclass(hints[each.name]):
            values[each.name] = _filled(hints[each.name], given)
        elif each in asked:
            read, value = asked[each]
            if value is not None:
                values[each.name] = value if read is None else read(value)
    return options(**values)


def _command(options: Any) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Makes a command of a function that takes these options."""

    def register(run: Callable[[Any], None]) -> Callable[[Any], None]:
        def command(context: typer.Context, **given: Any) -> None:
            made = _filled(options, given)
            run(replace(made, command=shell(["thinsight", *context.obj])) if hasattr(made, "command") else made)

        asked = sorted(_asked(options), key=lambda each: each[1].place)
        parameters = [Parameter("context", Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
        parameters += [parameter for _, _, parameter in asked]
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # what typer makes options of
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        app.command(cls=_Command)(command)
        return run

    return register


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


@_command(SearchOptions)
def search(options: SearchOptions) -> None:
    """Search a reduction, prove it on test data, write the report."""
    from .job.pipeline import search_and_report

    outcome = _watched(lambda watcher: search_and_report(options, watcher))
    Console().print(outcome.data)
    _print(f"Reduction: {outcome.folder}", f"Report:    {outcome.report}")


@_command(EvaluateOptions)
def evaluate(options: EvaluateOptions) -> None:
    """Score full against reduced on a set of examples (default: demo:test), or a running server."""
    from .job import commands, server

    run = commands.evaluate if options.server is None else server.evaluate_server
    Console().print(_watched(lambda watcher: run(options, watcher)))


@_command(AnswerOptions)
def answer(options: AnswerOptions) -> None:
    """Answer every question of a set under a reduction, into one file; the same command goes on where it stopped."""
    from .job.answering import answer as run

    done = _watched(lambda watcher: run(options, watcher))
    _print(f"Reduction: {done.reduction}", f"Answers:   {done.path}, {counted(done.count, 'question')}")


@_command(CompareOptions)
def compare(options: CompareOptions) -> None:
    """Searches and published methods side by side at equal cost, scored on test data."""
    from .job.compare import compare as run

    outcome = _watched(lambda watcher: run(options, watcher))
    Console().print(outcome.comparison)
    _print(*(f"Written: {path}" for path in outcome.files), *filter(None, [outcome.note]))


@_command(CheckOptions)
def check(options: CheckOptions) -> None:
    """Check that reductions run rightly on a model, whether its type is listed or not.

    Takes minutes. Exit code 1 where something fails."""
    from .job import commands

    result = _watched(lambda watcher: commands.check(options, watcher))
    if options.json:
        print(json.dumps(result.as_json(), indent=1))
    else:
        Console().print(result)
    raise typer.Exit(int(not result.passed))


@_command(DataOptions)
def data(options: DataOptions) -> None:
    """What is understood of data: counts, kinds of questions, metrics, and three examples."""
    from .job.data import look

    found = _watched(lambda watcher: look(options, watcher))
    Console().print(found)
    _print("", *found.lines())


@_command(PlanOptions)
def plan(options: PlanOptions) -> None:
    """How many examples certify which drop of the score."""
    from .job import commands

    Console().print(commands.plan(options))


@_command(AnalyzeOptions)
def analyze(options: AnalyzeOptions) -> None:
    """How alike the layers rank the vision tokens (rank consistency), as a table and a plot."""
    from .job import commands
    from .report.html import write_report

    report = _watched(lambda watcher: commands.analyze(options, watcher))
    Console().print(report)
    _print(f"Plot: {write_report(options.out, report)}")


@_command(BenchOptions)
def bench(options: BenchOptions) -> None:
    """Measure time, KV cache and FLOPs, full against reduced, in one run."""
    from .job import commands

    result = _watched(lambda watcher: commands.bench(options, watcher))
    Console().print(result.data)
    _print(*result.lines())


@_command(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Serve a model under a reduction to clients of the OpenAI API, until Ctrl-C.

    NAME answers with the reduction, NAME-full without. A key that clients must send is read from THINSIGHT_API_KEY."""
    from .serving import open_service

    service = _watched(lambda watcher: open_service(options, watcher, ready=_print))
    service.run()


@_command(ShowOptions)
def show(options: ShowOptions) -> None:
    """Draw which vision tokens a question keeps, layer by layer, and print both answers."""
    from .job import commands
    from .report.pictures import save_contact_strip

    result = _watched(lambda watcher: commands.show(options, watcher))
    _print(
        f"Question:      {result.picture.question}",
        f"Full model:    {result.picture.answer_full}",
        f"Reduced model: {result.picture.answer_reduced}",
        *([f"Expected:      {result.picture.truth}"] if result.picture.truth else []),
        f"Reduction:     {result.reduction.where}",
        f"Picture:       {save_contact_strip(options.out, result.picture)}",
    )


@app.command(cls=_Command)
def report(
    folder: Annotated[Path, typer.Argument(help="A folder that `thinsight search` wrote.")] = DEFAULT_OUT,
) -> None:
    """Write the HTML report of a finished search anew, and print its tables."""
    from .report.data import load_report_data
    from .report.html import write_report

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


@app.command(cls=_Command)
def push(
    folder: Annotated[Path, typer.Argument(help="A folder that `thinsight search` wrote.")],
    repo: Annotated[str, typer.Argument(help="owner/name on the Hub, made where needed.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is made.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch to push to. Default: main.")] = None,
) -> None:
    """Put a reduction and its card on the Hugging Face Hub, with the token that `hf auth login` stored."""
    from .reduction import Reduction

    reduction = Reduction.from_pretrained(folder)
    done = _watched(lambda watcher: reduction.push_to_hub(repo, private=private or None, revision=revision))
    _print(f"Pushed: {done}", f"Use it with: {shell(['thinsight', 'evaluate', '--reduction', repo])}")


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
            *(_package_line(each) for each in found.packages if not each.extra),
            "optional:",
            *(f"{_package_line(each):53} thinsight[{each.extra}]" for each in found.packages if each.extra),
            *found.devices,
            *([f"attention: {', '.join(usable)}"] if usable else []),
            *(why for why in found.attention.values() if why),
            *(f"not installed: {line}" for line in found.missing),
            *(f"not tried: {line}" for line in found.doubts),
            *(f"problem: {line}" for line in found.problems),
            *filter(None, [found.verdict]),
        )
    raise typer.Exit(int(bool(found.problems)))


def _package_line(package: Any) -> str:
    return f"  {package.name:17} {package.version or '-':13} {package.wanted}".rstrip()


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


def _print(*lines: str) -> None:
    console = Console()
    for line in lines:
        console.print(Text(terminal(line)), soft_wrap=True)

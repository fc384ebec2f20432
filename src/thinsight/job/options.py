"""What each command is told: a dataclass a command, whose fields are its options on the command line too.

Light to import, so that `--help` and a misspelt option answer at once: what a check needs is loaded when it is made.
Knows nothing about how anything is run, nor what comes of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BadInput, whole

if TYPE_CHECKING:
    from ..schedule import Schedule
    from ..searches.gsearch import Solver
    from ..searches.search import Search

DEFAULT_OUT = Path("thinsight-out")
DEMO_TEST = "demo:test"
DEMO_CERTIFICATION = "demo:certification"
_PARAMETERS = {"start": "warm_start", "early_stop": "confidence"}  # where a search calls it otherwise
BUDGETS = (0.5, 0.25, 0.125, 0.0625)
SEARCH_PREFIX = "search-"  # "random" is a baseline and a search
_NOT_OF_ALL = ("early_stop", "first_layer", "n_trials", "solver", "start", "step", "trade_off")  # searches
_LARGE_DROP = 0.2


@dataclass(frozen=True)
class Told:
    """How the command line asks for a field."""

    help: str = ""  # none: it does not ask
    flag: str = ""  # its name there, where that is not the field's
    argument: bool = False  # by place, not by name
    least: int | None = None
    most: int | None = None
    kind: Any = None  # of the value there, where that is not the field's
    said: Any = ...  # the default there, likewise
    read: Callable[[Any], Any] | None = None  # makes the field of the value
    place: int = 0  # options of a higher place come later in the help


def told(default: Any, help: str = "", flag: str = "", **about: Any) -> Any:
    """A field of a command's options, see `Told`."""
    return field(default=default, metadata={"told": Told(help, flag, **about)})


# -- texts of the command line as values ---------------------------------------------------------------------


def batch_size_of(text: str) -> int | str:
    """A whole number as such; any other word is left to the check of the options."""
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text) else text


def ranker_of(text: str) -> dict[str, Any]:
    """ "name" or "name:key=value,key=value" as a ranker's dict; a value is JSON, or else taken as text."""
    name, _, rest = text.partition(":")
    ranker: dict[str, Any] = {"name": name}
    while rest:
        key, equals, rest = rest.partition("=")
        if not equals or not key.strip() or key.strip() in ranker:
            raise BadInput(f"ranker is {text!r}: write settings as name:key=value,key=value, each key once")
        ranker[key.strip()], rest = _value(rest)
    return ranker


def columns_from(text: str) -> dict[str, str]:
    """ "image=img,question=q" as the data's own names of the fields."""
    columns: dict[str, str] = {}
    for part in text.split(","):
        name, equals, column = (each.strip() for each in part.partition("="))
        if not equals or not name or not column or name in columns:
            raise BadInput(f"columns is {text!r}: write image=NAME,question=NAME,answers=NAME, each field once")
        columns[name] = column
    return columns


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


# -- what commands share -------------------------------------------------------------------------------------

_BENCHMARK = "benchmark:"
_DATA = (
    "JSON lines, VLMEvalKit TSV, LLaVA or VQA JSON, hf:ID:SPLIT, lmms-eval:TASK:SPLIT, a folder or file of parquet: "
    "docs/data.md."
)
_REDUCTION = f"Folder or hub id of a reduction. Default: {DEFAULT_OUT}, else FastV at 50 %."
_LONGEST = "Longest answer in tokens."


def _check_bounds(options: Any) -> None:
    """Refuse a number of the options that is out of its bounds."""
    for each in fields(options):
        about, value = each.metadata.get("told", Told()), getattr(options, each.name)
        if about.least is not None and about.read is None and value is not None:
            whole(value, each.name, about.least, about.most)


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is to run; see `thinsight.loading.load_model`."""

    model: str = told("demo", "demo, a local folder, or a hub id.")
    dtype: str = told("auto", "auto, float32, bfloat16 or float16.", place=2)
    device: str = told("auto", "auto, cpu, cuda or cuda:N.", place=2)
    attn: str = told("sdpa", "Attention implementation: sdpa, eager, flash_attention_2 ...", place=2)
    trust_remote_code: bool = told(False, "Let the checkpoint run its own code. Never unless you say so.", place=2)
    unlisted: bool = told(
        False, "Take a model whose type is not listed, once `thinsight check` has passed, which is run first.", place=2
    )


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How data is to be read; see `thinsight.load_examples`."""

    benchmark: str | None = told(
        None,
        "Benchmarks by name, asked and scored as the literature does: pope, mme ...; --data is then its file. "
        "Several: textvqa,docvqa*2,pope=FILE, each with its weight.",
        place=1,
    )
    columns: dict[str, str] | None = told(
        None,
        "What the data calls the fields: image=NAME,question=NAME,answers=NAME; also id, options, hint, task.",
        kind=str | None,
        read=columns_from,
        place=1,
    )
    image_folder: Path | None = told(None, "Folder of the images that the data names. Default: its own.", place=1)
    annotations: Path | None = told(None, "File of the answers, of data that has them in another one.", place=1)

    @property
    def reading(self) -> dict[str, Any]:
        """As `load_examples` takes them."""
        return {"columns": self.columns, "image_folder": self.image_folder, "annotations": self.annotations}

    def named(self, data: str | None) -> str | None:
        """The data's name, that of a benchmark where one is asked for."""
        if self.benchmark is None:
            return data
        return f"{_BENCHMARK}{self.benchmark}" if data is None else f"{_BENCHMARK}{self.benchmark}={data}"

    def check_reading(self, data: str | None) -> None:
        """Refuse what cannot be right, or says something about data that nobody gave."""
        from ..evaluation.readers import columns_of

        columns_of(self.columns or {})
        if self.benchmark is not None:
            from ..evaluation.readers.benchmark import parts_of

            if data is not None and ("," in self.benchmark or "=" in self.benchmark):
                raise BadInput(f"benchmark is {self.benchmark!r}, and data is of one: write NAME=FILE for each instead")
            data = self.named(data)
            parts_of(str(data).removeprefix(_BENCHMARK))
        given = [name for name, value in self.reading.items() if value is not None]
        if given and (data is None or data.startswith("demo:")):
            raise BadInput(f"{given[0]} is of data of your own: give it with --data, or leave {given[0]} out")


@dataclass(frozen=True)
class JobOptions(ReadingOptions):
    """What every command is told. ``data`` None is the demo's."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: str | None = told(None, f"{_DATA} Default: demo:test.")
    limit: int | None = told(None, "Use only so many examples of each set.", least=1, place=1)

    def check(self) -> Any:
        """Refuse the first option that cannot be right, as far as that takes no data and no weights.

        Returns the model's config.
        """
        from ..loading import check_options, load_config

        _check_bounds(self)
        self.check_reading(self.data)
        model = self.model
        check_options(model.dtype, model.device, model.attn)
        return load_config(model.model, model.trust_remote_code, model.unlisted)

    @property
    def data_name(self) -> str:
        """Of the one set of a command that has one."""
        return self.named(self.data) or DEMO_TEST


@dataclass(frozen=True, kw_only=True)
class WorkerOptions:
    """Who does it: this process, or workers on Ray; see `thinsight.Pool`."""

    workers: int | str | None = told(
        None,
        "Use so many workers at once, or auto: one for each GPU. Takes thinsight[ray]. Default: in this process.",
        kind=str | None,
        read=batch_size_of,
        place=2,
    )
    ray: str | None = told(
        None, "Address of a Ray cluster for the workers: auto, HOST:PORT. Default: this machine.", place=2
    )
    gpus_per_worker: float | None = told(
        None, "GPUs of each worker; above 1 the model is spread over them. Default: 1 where there are any.", place=2
    )

    @property
    def has_workers(self) -> bool:
        """Whether others score than this process."""
        return self.workers not in (None, 1) or self.ray is not None

    def check_workers(self) -> None:
        """Refuse what cannot be right."""
        from ..evaluation.ray_workers import check_address, check_workers, import_ray

        check_workers("auto" if self.workers is None else self.workers, self.gpus_per_worker)
        if self.has_workers:
            import_ray()
            check_address(self.ray)
        elif self.gpus_per_worker is not None:
            raise BadInput(f"gpus_per_worker is {self.gpus_per_worker:g} without workers: give --workers too")


@dataclass(frozen=True)
class ScoringOptions(JobOptions, WorkerOptions):
    """And how examples are scored; see `thinsight.Evaluator`. ``cache_gib`` is for all sets together."""

    metric: str | None = told(None, "One metric for all examples, such as agreement.", place=1)
    max_new_tokens: int | None = told(None, _LONGEST, least=1, place=1)
    batch_size: int | str = told(
        8,
        "Prompts per forward pass, or auto: the fastest, measured first.",
        kind=str,
        said="8",
        read=batch_size_of,
        place=1,
    )
    cache_gib: float = told(4.0, "Vision features kept in memory, in GiB; more go into temporary files.", place=1)
    cache_dir: Path | None = told(
        None, "Folder that keeps vision features and the full model's answers for later runs. Default: none.", place=1
    )

    def check(self) -> Any:
        """As above."""
        from ..evaluation.full_model import check_batch_size
        from ..evaluation.metrics import get_metric
        from ..evaluation.store import Store

        self.check_workers()
        if self.metric is not None:
            get_metric(self.metric)
        check_batch_size(self.batch_size)
        Store(self.cache_gib, cache_dir=self.cache_dir)
        return super().check()


_OF_A_SERVER = ("against", "against_model", "served_model", "answers")


@dataclass(frozen=True)
class EvaluateOptions(ScoringOptions):
    """What `thinsight evaluate` is told. With a ``server``, what is of a model here is not read."""

    reduction: str | None = told(None, _REDUCTION)
    server: str | None = told(
        None, "Score a running OpenAI-compatible server in place of a model: http://127.0.0.1:8000/v1.", place=3
    )
    against: str | None = told(None, "--server: another one, such as the full model's, for the drop.", place=3)
    served_model: str | None = told(None, "--server: its model. Default: the only one it has.", place=3)
    against_model: str | None = told(None, "--against: its model. Default: that of --served-model.", place=3)
    concurrency: int = told(8, "--server: questions asked at once.", least=1, place=3)
    answers: Path | None = told(
        None, "--server: file that keeps the answers; the same command goes on where it stopped.", place=3
    )

    def check(self) -> Any:
        """As above."""
        given = [name for name in _OF_A_SERVER if getattr(self, name) is not None]
        if given:
            raise BadInput(f"{given[0]} is of a server: name one with --server, or leave it out")
        return super().check()


@dataclass(frozen=True)
class AnswerOptions(JobOptions, WorkerOptions):
    """What `thinsight answer` is told."""

    reduction: str | None = told(None, _REDUCTION)
    out: Path = told(Path("thinsight-answers.jsonl"), "The file to write: .jsonl, or .parquet (thinsight[parquet]).")
    max_new_tokens: int = told(64, _LONGEST, least=1, place=1)
    batch_size: int = told(8, "Prompts per forward pass.", least=1, place=1)
    kept: bool = told(False, "Write which vision tokens each layer kept, too.", place=1)

    def check(self) -> Any:
        """As above."""
        self.check_workers()
        return super().check()


@dataclass(frozen=True)
class AnalyzeOptions(JobOptions):
    """What `thinsight analyze` is told."""

    limit: int | None = told(64, "Use only so many examples.", least=1)
    out: Path = told(Path("thinsight-analysis.html"), "Where the plot goes, an HTML file.")


@dataclass(frozen=True)
class BenchOptions(JobOptions):
    """What `thinsight bench` is told. ``batch_size`` is a number: a size found by "auto" would change what the
    times are of from machine to machine."""

    limit: int | None = told(64, "Choose prompts among so many examples.", least=1)
    reduction: str | None = told(None, _REDUCTION)
    batch_size: int = told(8, "Prompts that are timed together.", least=1)
    runs: int = told(7, "Measured runs of each side.", least=1)
    new_tokens: int = told(16, "Length of the whole answer.", least=1)


@dataclass(frozen=True)
class ShowOptions(JobOptions):
    """What `thinsight show` is told; without an image it draws a question of ``data``."""

    data: str | None = None
    limit: int | None = None
    image: str | None = told(None, "An image file. Default: a demo question's.", argument=True)
    question: str | None = told(None, "A question about it.", argument=True)
    reduction: str | None = told(None, _REDUCTION)
    out: Path = told(Path("thinsight-kept.png"), "The picture to write.")
    max_new_tokens: int = told(32, _LONGEST, least=1)


@dataclass(frozen=True)
class ServeOptions:
    """What `thinsight serve` is told."""

    model: ModelOptions = field(default_factory=ModelOptions)
    reduction: str | None = told(None, _REDUCTION)
    name: str | None = told(
        None, "What clients call the model; NAME-full is the one without the reduction. Default: the model's own."
    )
    host: str = told("127.0.0.1", "Address to listen on; 0.0.0.0 is all of this machine's.")
    port: int = told(8000, "Port to listen on; 0 is any that is free.", least=0, most=65535)
    max_tokens: int = told(1024, "Longest answer in tokens that a request may ask for.", least=1, place=1)
    max_images: int = told(8, "Images of one request.", least=0, place=1)
    max_image_mib: int = told(10, "Size of one image as it is stored, in MiB.", least=1, most=1024, place=1)
    max_image_pixels: int = told(36_000_000, "Pixels of one image.", least=1, place=1)
    max_waiting: int = told(32, "Requests that are answered or wait; more are told to come back.", least=1, place=1)
    allow_url_images: bool = told(
        False, "Open http and https addresses of images, on public hosts. Default: only images in the request.", place=1
    )
    image_hosts: tuple[str, ...] = told(
        (),
        "Open addresses on these hosts alone, which may be private ones: images.example.com,10.0.0.5.",
        kind=str | None,
        said=None,
        read=lambda names: tuple(name.strip().lower() for name in names.split(",") if name.strip()),
        place=1,
    )

    def check(self) -> Any:
        """As `JobOptions.check`."""
        from ipaddress import ip_address

        from ..loading import check_options, load_config

        _check_bounds(self)
        try:
            ip_address(self.host)
        except ValueError:
            raise BadInput(
                f"host is {self.host!r}: give an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them"
            ) from None
        model = self.model
        check_options(model.dtype, model.device, model.attn)
        return load_config(model.model, model.trust_remote_code, model.unlisted)


# -- runs on two sets ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunOptions(ScoringOptions):
    """What `thinsight search` and `thinsight compare` are both told; for the sets see `opening.load_sets`."""

    data: str | None = told(None, f"Calibration examples: {_DATA} Default: demo:calibration.")
    test_data: str | None = told(
        None,
        "Test examples. Default: the demo's, or a part of --data, split by image: half; to certify on, three quarters.",
    )
    out: Path = DEFAULT_OUT
    resume: bool = told(False, "Continue what was begun in --out.")
    budget_unit: str | None = told(
        None, "Of --budget: keep (mean keep rate, the default), flops (up to 1 a fraction of the full decoder's) or ms."
    )

    @property
    def tested(self) -> str | None:
        """The test data's name."""
        return None if self.test_data is None else self.named(self.test_data)

    @property
    def split(self) -> tuple[float, str]:
        """The share of one file that is calibrated on, and the demo's set that goes with its calibration set."""
        return 0.5, DEMO_TEST

    def doubts(self, tested: int) -> str:
        """What so many test examples are too few for; "" if nothing."""
        return ""

    @property
    def unit(self) -> str:
        """Of the budget."""
        return "keep" if self.budget_unit is None else self.budget_unit

    def check(self) -> Any:
        """As above."""
        if self.data is None and self.benchmark is None and self.test_data is not None:
            raise BadInput("--test-data needs --data: give the calibration set too")
        if self.test_data is not None:
            self.check_reading(self.test_data)
        return super().check()


@dataclass(frozen=True)
class SearchOptions(RunOptions):
    """What `thinsight search` is told."""

    max_drop: float | None = told(
        None, "Largest drop of the calibration score; 0.01, one point, if no budget is given."
    )
    budget: float | None = told(None, "What a prefill may cost, in place of --max-drop; 0.25 keeps 25 %.")
    method: str | None = told(None, "{methods}. Default: gsearch, for a budget sensitivity.")
    out: Path = told(DEFAULT_OUT, "Folder for the reduction and the report.")
    ranker: str | dict[str, Any] | None = told(
        None,
        "text-attention, vision-attention, random ...; settings as name:key=value,... "
        "with JSON values. Default: chosen by the search (auto) where it can, else text-attention.",
        kind=str | None,
        read=ranker_of,
    )
    solver: str | None = told(None, "G-Search: bisect (the default), or bayes (the paper's).")
    frontier: bool = told(
        False, "Find a schedule for every cost from 5 to 80 % in one run; --max-drop or --budget picks."
    )
    start: str | None = told(None, "A reduction (folder or Hub id), such as G-Search's, tried first under a budget.")
    first_layer: int | None = told(None, "The first layer that may see fewer tokens, from 0.", least=0)
    step: int | None = told(None, "bisect: counts are multiples of this (1).", least=1)
    trade_off: float | None = told(None, "bayes: weight of the cost, lambda (0.1).")
    n_trials: int | None = told(
        None, "Evaluations under a budget (16); bayes: per layer (8); frontier: per cost (4).", least=1
    )
    confidence: float | None = told(
        None, "Of the certificate (0.95): how sure --max-drop is held on data like the test set."
    )
    certify: bool = told(
        True,
        "Only estimate the drop: what is cheapest within --max-drop on the calibration set, without a certificate.",
        "--no-certify",
        kind=bool,
        said=False,
        read=lambda without: not without,
    )
    early_stop: float | None = told(
        None,
        "bisect: leave a candidate that fails with this confidence, such as 0.99. Default: one that fails for certain.",
    )
    seed: int = told(0, "Seed of everything random.", least=0)
    timing_runs: int = told(5, least=1)
    new_tokens: int = told(16, least=1)
    pictures: int = told(6, least=0)
    command: str = ""

    def check(self) -> Any:
        """As above."""
        from ..ranking import get_ranker
        from ..searches.gsearch import check_early_stop

        self._check_method()
        self._check_taken()
        self._check_numbers()
        check_early_stop(self.layer_solver, self.early_stop, "early_stop")
        config = super().check()
        layers = layers_of(config)
        self.start_schedule(layers)
        if self.first_layer is None and not self.searches_layers:
            return config
        first, ranker = self.gsearch_layer, get_ranker(self.first_ranker)
        if first >= layers:
            raise BadInput(f"first_layer is {first} but the model has layers 0 to {layers - 1}: choose one of them")
        if first == 0 and not ranker.ranks_at_layer_0:
            raise BadInput(
                f"first_layer is 0, but ranker {ranker.name!r} reads the layer before, which layer 0 has not: "
                "choose 1 or more, or rank by vision-attention, random or uniform"
            )
        return config

    def _check_method(self) -> None:
        """The search that is chosen can do what it is asked."""
        from ..ranking import get_ranker
        from ..searches.search import choosing

        search = self.search
        if self.budget_unit is not None and self.budget is None:
            raise BadInput(f"budget_unit is {self.budget_unit!r} without a budget: leave it out, or give budget too")
        if self.frontier and (self.method is not None or self.unit != "keep"):
            raise BadInput("frontier has its own search and counts mean keep rates: leave out method and budget_unit")
        if self.frontier and self.chooses_ranker:
            raise BadInput("ranker 'auto' is chosen for one budget: name a ranker for a frontier")
        if self.chooses_ranker and not search.chooses_ranker:
            raise BadInput(f"ranker 'auto' needs a budget and a search that chooses it: {' or '.join(choosing())}")
        if self.chooses_ranker and isinstance(self.ranker, dict) and len(self.ranker) > 1:
            raise BadInput(f"ranker is {self.ranker!r}, but 'auto' has no settings: leave them out")
        get_ranker(self.first_ranker)

    def _check_taken(self) -> None:
        """The search takes every option that was given."""
        from ..searches.search import FRONTIER, SEARCHES

        for option in _NOT_OF_ALL:
            value, parameter = getattr(self, option), _PARAMETERS.get(option, option)
            if value is not None and parameter not in self.search.parameters:
                takers = [each.title for each in (*SEARCHES.values(), FRONTIER) if parameter in each.parameters]
                raise BadInput(
                    f"{option} is {value!r}, which {self.search.title} does not take, but {', '.join(takers)}: "
                    "leave it out, or choose another search"
                )

    def _check_numbers(self) -> None:
        from ..budget import check_budget_value
        from ..ranking import get_ranker
        from ..searches.search import check_score_drop
        from ..searches.sensitivity import SHARES

        if self.budget is not None:
            check_budget_value(self.budget, self.unit)
            if self.frontier and self.budget < SHARES[0]:
                raise BadInput(f"budget is {self.budget}: a frontier begins at a mean keep rate of {SHARES[0]}")
        check_score_drop(self.tolerance)
        self._check_promise()
        if self.n_trials is not None:
            _check_trials(self.n_trials, self.search)
        get_ranker({"name": "random", "seed": self.seed})  # the yardstick of the report, which has bounds

    def _check_promise(self) -> None:
        from ..searches.certify import check_promise

        if self.certified:
            check_promise(self.tolerance, self.certainty)
        elif self.confidence is not None:
            why = "with --no-certify" if self.budget is None else "under a budget"
            raise BadInput(f"confidence is {self.confidence!r}, but nothing is promised {why}: leave it out")

    @property
    def certified(self) -> bool:
        """Whether the search ends with a certificate: it was not told to do without, and there is a drop to promise."""
        return self.certify and self.budget is None

    @property
    def certainty(self) -> float:
        """The certificate's confidence."""
        return 0.95 if self.confidence is None else self.confidence

    @property
    def split(self) -> tuple[float, str]:
        """As above; a certificate needs more of the examples than the search."""
        return (0.25, DEMO_CERTIFICATION) if self.certified else super().split

    def doubts(self, tested: int) -> str:
        """As above: for a certificate, before any work."""
        from ..certificate import too_few

        return too_few(tested, self.tolerance, self.certainty) if self.certified else ""

    def start_schedule(self, num_layers: int) -> Schedule | None:
        """The schedule that the search starts from, at the model's depth."""
        from ..reduction import Reduction

        if self.start is None:
            return None
        return Reduction.from_pretrained(self.start).schedule.resample(num_layers)

    @property
    def warning(self) -> str:
        """What is odd about the options, though it can be meant; "" if nothing."""
        if self.max_drop is None or self.max_drop <= _LARGE_DROP:
            return ""
        return (
            f"max_drop {self.max_drop:g} lets the score fall by {100 * self.max_drop:g} points; "
            f"{self.max_drop / 100:g} is {self.max_drop:g} points"
        )

    @property
    def search(self) -> Search:
        """The search that runs: a method, or the frontier."""
        from ..searches.search import FRONTIER, SEARCHES, choose_method

        chosen = choose_method(self.method, self.max_drop, self.budget)
        return FRONTIER if self.frontier else SEARCHES[chosen]

    @property
    def searches_layers(self) -> bool:
        """Whether the search goes layer by layer, under a tolerance."""
        return self.search.name == "gsearch"

    @property
    def chooses_ranker(self) -> bool:
        """Whether the search is to choose the ranker: asked to, or able to where none was named."""
        from ..searches.search import AUTO

        if self.ranker is None:
            return self.search.chooses_ranker
        return (self.ranker if isinstance(self.ranker, str) else self.ranker.get("name")) == AUTO

    @property
    def first_ranker(self) -> str | dict[str, Any]:
        """The ranker that was asked for, or the first of those to choose from."""
        from ..searches.search import FIRST_CHOICE

        return FIRST_CHOICE if self.ranker is None or self.chooses_ranker else self.ranker

    @property
    def tolerance(self) -> float:
        """The drop that a search without a budget allows."""
        from ..searches.search import DEFAULT_MAX_DROP

        return DEFAULT_MAX_DROP if self.max_drop is None else self.max_drop

    @property
    def gsearch_layer(self) -> int:
        """The first layer that may see fewer tokens; the paper's where none is given."""
        return 2 if self.first_layer is None else self.first_layer

    @property
    def solver_name(self) -> str:
        """Of the solver of G-Search."""
        return "bisect" if self.solver is None else self.solver

    @property
    def layer_solver(self) -> Solver:
        """How one layer is searched, where the search goes layer by layer."""
        from ..searches.gsearch import get_solver

        settings = ("step", "trade_off", "n_trials") if self.searches_layers else ()
        return get_solver(self.solver_name, **{name: getattr(self, name) for name in settings})


@dataclass(frozen=True)
class CheckOptions:
    """What `thinsight check` is told."""

    model: str = told("demo", "demo, a local folder, or a hub id.")
    dtype: str = told("auto", "auto, float32, bfloat16 or float16.")
    device: str = told("auto", "auto, cpu, cuda or cuda:N.")
    attn: str = told("sdpa", "Attention implementation: sdpa, eager, flash_attention_2 ...")
    trust_remote_code: bool = told(False, "Let the checkpoint run its own code. Never unless you say so.")
    processor: bool = told(
        True,
        "Make inputs from the config alone, as where the model has no processor.",
        "--no-processor",
        kind=bool,
        said=False,
        read=lambda without: not without,
    )
    out: Path | None = told(None, "File for the result, too. What passed is stored in the cache folder in any case.")
    json: bool = told(False, "Print the result as JSON.")


@dataclass(frozen=True)
class PlanOptions:
    """What `thinsight plan` is told."""

    max_drop: float = told(0.01, "The drop of the score to be promised, 0.01 for one point.")
    confidence: float = told(0.95, "Of the promise.")
    agreement: float | None = told(None, "Share of examples whose score stays the same, such as 0.98.")
    reduction: str | None = told(None, "Folder or hub id of a certified reduction, for the agreement that it showed.")
    data: str | None = told(None, "Data: what its examples certify. Only their number is looked at.")


@dataclass(frozen=True)
class DataOptions(ReadingOptions):
    """What `thinsight data` is told."""

    data: str | None = told(None, f"{_DATA} Default: demo:calibration.", argument=True)
    model: str | None = told(None, "Show prompts as this model gets them: demo, a folder, or a hub id.")
    metric: str | None = told(None, "One metric for all examples, such as agreement.")
    limit: int | None = told(None, "Look at so many examples only.", least=1)

    def check(self) -> None:
        """Refuse the first option that cannot be right, before any data is read."""
        from ..evaluation.metrics import get_metric

        self.check_reading(self.data)
        if self.limit is not None:
            whole(self.limit, "limit")
        if self.metric is not None:
            get_metric(self.metric)

    @property
    def data_name(self) -> str:
        """Of the data."""
        return self.named(self.data) or "demo:calibration"


@dataclass(frozen=True)
class CompareOptions(RunOptions):
    """What `thinsight compare` is told."""

    budgets: tuple[float, ...] = told(
        BUDGETS,
        "May be repeated. Default: 0.5 0.25 0.125 0.0625.",
        "--budget",
        kind=list[float] | None,
        said=None,
        read=lambda given: tuple(given) or BUDGETS,
    )
    methods: tuple[str, ...] = told(
        ("all",),
        "all, or names with commas, such as search-sensitivity,fastv.",
        kind=str,
        said="all",
        read=lambda names: tuple(name.strip() for name in names.split(",") if name.strip()),
    )
    out: Path = told(Path("thinsight-compare"), "Folder for tables and figure.")
    ranker: str | dict[str, Any] | None = told(
        None, "Of the searches that do not choose it. Default: text-attention.", kind=str | None, read=ranker_of
    )
    max_drop: float | None = told(
        None, "Say too what each method costs at this drop of the score, certified on the test set, 0.01 for one point."
    )
    confidence: float | None = told(None, "Of that (0.95).")
    n_trials: int | None = told(None, "Evaluations of each search (16).", least=1)
    seeds: tuple[int, ...] = told(
        (0,),
        "Runs of what is random, seeds from 0.",
        least=1,
        most=1000,
        kind=int,
        said=1,
        read=lambda number: tuple(range(number)),
    )

    @property
    def trials(self) -> int:
        """Evaluations of each search."""
        return 16 if self.n_trials is None else self.n_trials

    @property
    def certainty(self) -> float:
        """The certificates' confidence."""
        return 0.95 if self.confidence is None else self.confidence

    @property
    def own_ranker(self) -> str | dict[str, Any]:
        """Of the searches that do not choose theirs."""
        return "text-attention" if self.ranker is None else self.ranker

    @property
    def chosen(self) -> list[str]:
        """The methods, in their order."""
        known = method_names()
        return known if "all" in self.methods else [name for name in known if name in self.methods]

    def check(self) -> Any:
        """As above."""
        from ..budget import check_budget_value
        from ..ranking import get_ranker
        from ..searches.certify import check_promise

        for budget in self.budgets:
            check_budget_value(budget, self.unit)
        for name, values in (("budgets", self.budgets), ("methods", self.methods), ("seeds", self.seeds)):
            if not values or len(set(values)) < len(values):
                raise BadInput(f"{name} is {values!r}: give at least one, and none twice")
        for method in self.methods:
            if method not in ("all", *method_names()):
                raise BadInput(f"method is {method!r}; choose all, or some of {', '.join(method_names())}")
        self._check_taken()
        if self.max_drop is not None:
            check_promise(self.max_drop, self.certainty)
        elif self.confidence is not None:
            raise BadInput(
                f"confidence is {self.confidence!r}, but no max_drop is to be certified: give it, or neither"
            )
        get_ranker(self.own_ranker)
        return super().check()

    def _check_taken(self) -> None:
        """Some of the methods take every option that was given."""
        from ..searches.search import SEARCHES, choosing, under_budget

        if self.unit == "ms" and self.budgets == BUDGETS:
            raise BadInput("budget_unit is 'ms', and the default budgets are shares: give budgets in ms too")
        searches = [name.removeprefix(SEARCH_PREFIX) for name in self.chosen if name.startswith(SEARCH_PREFIX)]
        if self.n_trials is not None and not searches:
            raise BadInput(f"n_trials is {self.n_trials}, which only searches take: leave it out, or compare one")
        for name in searches:
            _check_trials(self.trials, SEARCHES[name])
        if self.ranker is not None and not set(searches) - set(choosing()):
            takers = [SEARCH_PREFIX + name for name in under_budget() if name not in choosing()]
            raise BadInput(
                f"ranker is {self.ranker!r}, which only {', '.join(takers)} takes, as other methods have or "
                "choose their own: leave it out, or compare that one"
            )
        if len(self.seeds) > 1 and not any(map(seeded, self.chosen)):
            raise BadInput(f"seeds are {self.seeds}, but nothing random is compared: leave them out")


def method_names() -> list[str]:
    """All methods that can be compared: baselines, and searches as "search-..."."""
    from ..baselines import BASELINES
    from ..searches.search import under_budget

    return [*(SEARCH_PREFIX + name for name in under_budget()), *BASELINES]


def seeded(method: str) -> bool:
    """Whether a compared method is another one with another seed."""
    return method.startswith(SEARCH_PREFIX) or method == "random"


def layers_of(config: Any) -> int:
    """How many decoder layers a model of this config has."""
    return int(config.get_text_config().num_hidden_layers)


def _check_trials(number: int, search: Search) -> None:
    if number < search.least_trials:
        raise BadInput(f"n_trials is {number}: {search.title} needs at least {search.least_trials}")

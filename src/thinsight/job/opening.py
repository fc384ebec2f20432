"""What every command opens before it works, cheapest checks first: options, model, examples, evaluators.

Calibration and test are kept apart by image. Knows where models and data come from, how examples are scored
and what a budget is counted on. Knows nothing about searches, reports or terminals.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
import torch
import transformers

from ..baselines import fastv
from ..budget import Budget, LatencyModel, TimeBudget, make_budget
from ..errors import BadInput, StorageError
from ..evaluation.evaluator import Evaluator, check_metric
from ..evaluation.examples import Example, Progress, check_examples, load_examples, read_examples, validate_examples
from ..evaluation.full_model import AUTO, check_batch_size
from ..evaluation.metrics import get_metric
from ..evaluation.result import Evaluation
from ..evaluation.store import DEFAULT_CACHE_GIB, Store
from ..loading import DEMO, base_name, check_options, checkpoint_hash, load_config, load_model
from ..progress import Watcher
from ..ranking import get_ranker
from ..reduction import CONFIG_NAME, Reduction
from ..report.data import ModelInfo
from ..runtime import check_rankable, num_layers
from ..searches.run import budget_of
from ..searches.study import searchable_score
from ..version import __version__
from .results import MedianPrompt
from .run_folder import RunFolder


def split_by_image(examples: Sequence[Example], share: float = 0.5) -> tuple[list[Example], list[Example]]:
    """(calibration, test), in file order; examples that share an image, directly or through others, stay
    together.

    Deterministic: which side a group goes to depends on the contents of its images alone, not on the order of
    the file or on a seed. About ``share`` of the examples become calibration.

    Raises:
        ThinsightError: all examples hang together by their images, so that nothing is left for the test.
    """
    members = _connected(examples)
    if len(members) < 2:
        raise BadInput(
            "all examples share one image, so they cannot be split in calibration and test: give --test-data"
        )
    order = sorted(members.values(), key=lambda group: _group_hash(examples, group))
    calibration: set[int] = set(order[0])
    for group in order[1:-1]:  # the last group is always test
        if len(calibration) + len(group) / 2 <= share * len(examples):
            calibration.update(group)
    first = [example for i, example in enumerate(examples) if i in calibration]
    return first, [example for i, example in enumerate(examples) if i not in calibration]


def check_disjoint(calibration: Sequence[Example], test: Sequence[Example]) -> None:
    """Refuse a test set that shows an image of the calibration set, also as a copy under another name.

    Raises:
        ThinsightError: naming the first such test example and how many there are.
    """
    seen = {key for example in calibration for key in _image_hashes(example)}
    shared = [example.id for example in test if seen & set(_image_hashes(example))]
    if shared:
        raise BadInput(
            f"{len(shared)} test examples show an image of the calibration set, the first is {shared[0]!r}: "
            "a score on them would flatter the search; take them out of one of the sets"
        )


def content_hash(examples: Sequence[Example]) -> str:
    """Hash of a set: its questions, answers and metrics and the contents of its images, in order; 16 hex
    digits."""
    digest = hashlib.sha256()
    for example in examples:
        fields = (example.id, example.question, example.answers, example.metric, _image_hashes(example))
        digest.update(repr(fields).encode())
    return digest.hexdigest()[:16]


def _connected(examples: Sequence[Example]) -> dict[int, list[int]]:
    """Indices of the examples by connected component, two being connected when they share an image."""
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[str, int] = {}
    for i, example in enumerate(examples):
        for key in _image_hashes(example):
            parent[root(i)] = root(first_with.setdefault(key, i))
    members: dict[int, list[int]] = {}
    for i in range(len(examples)):
        members.setdefault(root(i), []).append(i)
    return members


def _group_hash(examples: Sequence[Example], group: Sequence[int]) -> str:
    keys = sorted({key for i in group for key in _image_hashes(examples[i])})
    return hashlib.sha256("".join(keys).encode()).hexdigest()


def _image_hashes(example: Example) -> tuple[str, ...]:
    """One hash per image, of the file's bytes (or the pixels of an image in memory)."""
    return tuple(
        _file_hash(image) if isinstance(image, Path) else key
        for image, key in zip(example.images, example.image_keys, strict=True)
    )


_known: dict[tuple[str, int, int], str] = {}


def _file_hash(path: Path) -> str:
    """Hash of a file's bytes; each file is read once per process as long as it does not change."""
    try:
        state = path.stat()
        key = (str(path), state.st_size, state.st_mtime_ns)
        if key not in _known:
            _known[key] = hashlib.sha256(path.read_bytes()).hexdigest()[:24]
    except OSError as error:
        raise StorageError(f"cannot read image {path}: {error.strerror or error}; check the file") from None
    return _known[key]


DEFAULT_OUT = Path("thinsight-out")

DEMO_CALIBRATION = "demo:calibration"
DEMO_TEST = "demo:test"


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is to run; see `thinsight.loading.load_model`."""

    model: str = DEMO
    dtype: str = "auto"
    device: str = "auto"
    attn: str = "sdpa"
    trust_remote_code: bool = False

    def check(self) -> Any:
        """Check what can be checked without loading weights; returns the model's config.

        Raises ThinsightError.
        """
        check_options(self.dtype, self.device, self.attn)
        return load_config(self.model, self.trust_remote_code)


@dataclass(frozen=True)
class Opened:
    """A loaded model, its processor, and what a report says about it."""

    model: Any
    processor: Any
    info: ModelInfo


@dataclass(frozen=True)
class Sourced:
    """A reduction and where it comes from."""

    reduction: Reduction
    where: str


@dataclass(frozen=True)
class Sets:
    """The two sets of examples and what they are called; ``note`` says so when one file was split in two."""

    calibration: list[Example]
    test: list[Example]
    calibration_name: str
    test_name: str
    note: str = ""


def open_model(options: ModelOptions) -> Opened:
    """Load the model.

    Raises ThinsightError as `thinsight.loading.load_model` does.
    """
    model, processor = load_model(options.model, options.dtype, options.device, options.attn, options.trust_remote_code)
    info = ModelInfo(
        name=options.model,
        model_type=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        device=_device(model.device),
        attention=options.attn,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=num_layers(model),
    )
    return Opened(model, processor, info)


def load_sets(data: str | None, test_data: str | None, limit: int | None, progress: Progress | None = None) -> Sets:
    """Calibration and test examples that share no image.

    Both given: as they are. Only ``data``: it is split by image, half and half; the demo's calibration set
    has a test set of its own. None given: the demo's two sets. ``limit`` applies to each set, and
    only images of examples within it are decoded, of which ``progress("images", done, total)`` tells.

    Raises:
        ThinsightError: bad data, or sets that show a common image.
    """
    check_sources(data, test_data)
    name = DEMO_CALIBRATION if data is None else data
    if test_data is None and name == DEMO_CALIBRATION:
        test_data = DEMO_TEST
    if test_data is not None:
        calibration, test = (load_examples(source, limit, progress=progress) for source in (name, test_data))
        check_disjoint(calibration, test)
        return Sets(calibration, test, name, test_data)
    examples = read_examples(name)
    check_examples(examples, name)
    calibration, test = (side[:limit] for side in split_by_image(examples))
    validate_examples([*calibration, *test], name, progress)
    note = (
        f"{name} was split by image: {len(calibration)} examples to calibrate on, {len(test)} to test on "
        "(give --test-data to choose the test set yourself)"
    )
    return Sets(calibration, test, f"{name} (one half)", f"{name} (the other half)", note)


def check_sources(data: str | None, test_data: str | None) -> None:
    """Refuse a test set without a calibration set.

    Raises:
        ThinsightError: as said.
    """
    if data is None and test_data is not None:
        raise BadInput("--test-data needs --data: give the calibration set too")


def find_reduction(source: str | None, model: str, default: Path = DEFAULT_OUT) -> Sourced | None:
    """The reduction that is asked for, or the one in the ``default`` folder if it was searched for ``model``.

    Raises:
        ThinsightError: no reduction at ``source``, or a damaged one.
    """
    if source is not None:
        return Sourced(Reduction.from_pretrained(source), source)
    if (default / CONFIG_NAME).is_file():
        reduction = Reduction.from_pretrained(default)
        if _is_for(reduction, model):
            return Sourced(reduction, str(default))
    return None


def _is_for(reduction: Reduction, model: str) -> bool:
    """Whether a reduction was searched for a model, which may have moved or be one of several of its name."""
    here, searched = checkpoint_hash(model), (reduction.search or {}).get("checkpoint")
    if here is not None and searched is not None:
        return bool(here == searched)
    return reduction.base_model_name_or_path == base_name(model)


def layers_of(config: Any) -> int:
    """How many decoder layers a model of this config has."""
    return int(config.get_text_config().num_hidden_layers)


def fit_reduction(found: Sourced | None, model: str, config: Any) -> Sourced:
    """The found reduction, checked against the model's config; without one FastV's published 50 % step.

    So a command has something to run on a model that nobody has searched yet, and says so.

    Raises:
        ThinsightError: a reduction for another number of layers or another model family, or whose ranker is
            unknown or cannot rank where tokens are dropped.
    """
    layers, model_type = layers_of(config), config.model_type
    if found is None:
        return Sourced(fastv(layers), "FastV at 50 % (no --reduction given, none in the default folder)")
    has = found.reduction.schedule.num_layers
    if has != layers:
        raise BadInput(
            f"the reduction {found.where} has {has} layers but model {model!r} has {layers}: "
            "give the model that it was searched for"
        )
    if found.reduction.model_type not in (None, model_type):
        raise BadInput(
            f"the reduction {found.where} is for model type {found.reduction.model_type!r}, "
            f"model {model!r} is {model_type!r}: give the model that it was searched for"
        )
    try:
        check_rankable(found.reduction.schedule, get_ranker(found.reduction.ranker))
    except BadInput as error:
        raise BadInput(f"the reduction {found.where}: {error}") from None
    return found


def environment(opened: Opened) -> dict[str, str]:
    """Versions and hardware, for the record."""
    return {
        "thinsight": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "CPU threads": str(torch.get_num_threads()),
        "device": opened.info.device,
    }


def _device(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


@dataclass(frozen=True)
class ScoringOptions:
    """How examples are scored; see `thinsight.Evaluator`. ``cache_gib`` is for all sets together."""

    metric: str | None = None
    max_new_tokens: int | None = None
    batch_size: int | str = 8
    cache_gib: float = DEFAULT_CACHE_GIB
    cache_dir: Path | None = None

    def check(self) -> None:
        """Check everything that needs no data and no weights.

        Raises:
            ThinsightError: naming the first option that cannot be right.
        """
        if self.metric is not None:
            get_metric(self.metric)
        check_batch_size(self.batch_size)
        Store(self.cache_gib, cache_dir=self.cache_dir)


@dataclass(frozen=True)
class Scores:
    """An evaluation of all examples as a run folder keeps it; ``doubt`` is `Evaluator.doubt` of the full
    model's."""

    score: float
    per_example: tuple[float, ...]
    doubt: str = ""

    def __post_init__(self) -> None:
        if not all(0 <= score <= 1 for score in (self.score, *self.per_example)):
            raise BadInput("a score is not from 0 to 1, as every metric's is")

    @classmethod
    def of(cls, evaluation: Evaluation, doubt: str = "") -> Scores:
        """What is kept of a complete evaluation."""
        assert evaluation.per_example is not None
        return cls(evaluation.score, tuple(evaluation.per_example.tolist()), doubt)

    def evaluation(self) -> Evaluation:
        """The evaluation, without what is not kept."""
        return Evaluation(score=self.score, per_example=np.array(self.per_example))


def make_evaluator(
    options: ScoringOptions,
    opened: Opened,
    examples: Sequence[Example],
    watcher: Watcher,
    *,
    ranker: Any = "text-attention",
    sets: int = 1,
) -> Evaluator:
    """The evaluator of one set of examples.

    Args:
        options: how to score.
        opened: the model and its processor.
        examples: the set.
        watcher: told the progress.
        ranker: which tokens a bare schedule keeps.
        sets: how many evaluators share ``options.cache_gib``.

    Raises:
        ThinsightError: as `thinsight.Evaluator` does.
    """
    return Evaluator(
        opened.model,
        opened.processor,
        examples,
        metric=options.metric,
        batch_size=options.batch_size,
        ranker=ranker,
        max_new_tokens=options.max_new_tokens,
        progress=watcher.on_progress,
        cache_gib=options.cache_gib / sets,
        cache_dir=options.cache_dir,
    )


@dataclass(frozen=True)
class Limits:
    """The prompt of a budget, and the device's latency where budgets are in ms."""

    n_vision: int
    n_text: int
    latency: LatencyModel | None

    def budget(self, config: Any, value: float, unit: str) -> Budget:
        """The budget of ``value`` for a model of this config.

        Raises:
            ThinsightError: an unknown unit, or a value out of range.
        """
        return make_budget(value, unit, config=config, n_vision=self.n_vision, n_text=self.n_text, latency=self.latency)


def limits_of(evaluator: Evaluator, value: float, unit: str) -> Limits:
    """The limits of an evaluator's median prompt; "ms" is profiled on the spot.

    Raises:
        ThinsightError: an unknown unit, or a value out of range.
    """
    budget = budget_of(evaluator, value, unit)
    latency = budget.latency if isinstance(budget, TimeBudget) else None
    n_text = median_low(text for _, text in evaluator.prompt_sizes)
    return Limits(evaluator.num_vision_tokens, n_text, latency)


@dataclass(frozen=True)
class RunOptions(ScoringOptions):
    """What `thinsight search` and `thinsight compare` are both told. ``data`` None is the demo's; see
    `session.load_sets` for the sets."""

    model: ModelOptions = field(default_factory=ModelOptions)
    data: str | None = None
    test_data: str | None = None
    limit: int | None = None
    out: Path = DEFAULT_OUT
    resume: bool = False

    def check(self) -> None:
        """Check everything that needs no data and no weights.

        Raises:
            ThinsightError: naming the first option that cannot be right.
        """
        super().check()
        check_sources(self.data, self.test_data)


@dataclass(frozen=True)
class _BatchSize:
    """How many prompts of a set fit into memory at once, as the run folder keeps it."""

    size: int


@dataclass(frozen=True)
class Prepared:
    """A run's folder, data, model and evaluators, opened and checked."""

    batch_size: int | str
    watcher: Watcher
    folder: RunFolder
    sets: Sets
    opened: Opened
    calibration: Evaluator
    test: Evaluator

    @property
    def prompt(self) -> MedianPrompt:
        """The prompt whose cost stands for the test set."""
        return MedianPrompt.of(self.opened.model.config, self.test.prompt_sizes)

    def check_full_score(self, *evaluators: Evaluator) -> None:
        """Refuse a full model that scores 0 while the folder is not yet bound to its labels and metric.

        A run that is continued is checked where its search begins.

        Raises:
            ThinsightError: it does; the message has an answer beside its label.
        """
        if not self.folder.begun:
            self.watcher.on_stage("Scoring the full model")
            for evaluator in evaluators:
                searchable_score(evaluator)

    def fix_batch_size(self, which: str) -> int:
        """The batch size of a set, found or halved once, so that a resumed run has the same batches.

        To be called before anything is evaluated on the set.

        Args:
            which: "calibration" or "test".
        """
        evaluator = {"calibration": self.calibration, "test": self.test}[which]

        def find() -> _BatchSize:
            found = _BatchSize(evaluator.fix_batch_size())
            if self.batch_size == AUTO:
                self.watcher.on_note(f"The {which} set runs in batches of {found.size} prompts")
            return found

        kept = self.folder.once(f"batches-{self.batch_size}-{which}", _BatchSize, find)
        return evaluator.fix_batch_size(kept.size)

    def test_scores(self, stage: str, reduction: Reduction | None) -> Scores:
        """Scores on the test set, computed once per stage of the folder; None is the full model."""

        def run() -> Scores:
            self.fix_batch_size("test")
            if reduction is None:
                return Scores.of(self.test.full, self.test.doubt)
            return Scores.of(self.test(reduction))

        return self.folder.once(stage, Scores, run)


def prepare(options: RunOptions, ranker: Any, watcher: Watcher) -> Prepared:
    """Open everything a run on two sets needs, cheapest first.

    Args:
        options: of the run.
        ranker: which tokens a bare schedule keeps.
        watcher: told what is being done.

    Raises:
        ThinsightError: bad options or data, a model that cannot be run, or a folder that holds another run.
    """
    options.check()
    folder = RunFolder(options.out, resume=options.resume)
    watcher.on_stage("Reading the data")
    sets = load_sets(options.data, options.test_data, options.limit, watcher.on_progress)
    if sets.note:
        watcher.on_note(sets.note)
    check_metric([*sets.calibration, *sets.test], options.metric)
    watcher.on_stage("Loading the model")
    opened = open_model(options.model)
    watcher.on_stage("Processing the images")
    calibration, test = (
        make_evaluator(options, opened, examples, watcher, ranker=ranker, sets=2)
        for examples in (sets.calibration, sets.test)
    )
    return Prepared(options.batch_size, watcher, folder, sets, opened, calibration, test)

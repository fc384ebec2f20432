"""What every command opens before it works, cheapest checks first: model, examples, evaluators, the run's folder.

Calibration and test are kept apart by image. The folder keeps the result of every stage that is done, each whole or not
at all and with a checksum, so that whatever was finished before an interruption is there to be continued. Knows nothing
about searches, reports or terminals.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median_low
from typing import Any, TypeVar

import numpy as np
import torch
import transformers

from ..baselines import fastv
from ..budget import Budget, LatencyModel, TimeBudget, make_budget
from ..checking import check
from ..errors import BadInput, StorageError, Unsupported
from ..evaluation.benchmarks import benchmark_of, longest_answer, taken
from ..evaluation.evaluator import Evaluator, check_metric
from ..evaluation.examples import Example, Progress, check_examples, load_examples, read_examples, validate_examples
from ..evaluation.full_model import AUTO
from ..evaluation.result import Evaluation
from ..loading import base_name, checkpoint_hash, load_model
from ..progress import Watcher
from ..ranking import get_ranker
from ..records import decode, encode, probe, read_sealed, seal, sweep, user_path, write_atomically
from ..reduction import CONFIG_NAME, Reduction
from ..report.data import ModelInfo
from ..runtime import check_rankable, num_layers
from ..runtime.anatomy import is_cleared, refusal, unwrapped
from ..searches.run import budget_of
from ..searches.study import searchable_score
from ..texts import counted
from ..version import __version__
from .findings import MedianPrompt
from .options import DEFAULT_OUT, DEMO_TEST, CheckOptions, ModelOptions, RunOptions, ScoringOptions, layers_of

T = TypeVar("T")

# -- the run's folder ----------------------------------------------------------------------------------------

_RUN_FILE = "run.json"
_STAGES = "stages"
_VERSION = 3
_REMEDY = "free the disk, then resume"


def check_writable_file(path: Path) -> None:
    """Refuse now a file that could not be written later; its folder is made where needed."""
    path = user_path(path, "out")
    if path.is_dir():
        raise BadInput(f"out {path} is a folder: give the name of a file")
    _probe(path, path.parent, "a file in a folder you may write")


def _probe(path: Path, folder: Path, remedy: str) -> None:
    try:
        probe(folder)
    except OSError as error:
        raise StorageError(f"out {path} cannot be written ({error.strerror or error}): give {remedy}") from None


class RunFolder:
    """A run's folder, made where needed and open for writing; one that holds a run is refused without ``resume``."""

    def __init__(self, path: str | os.PathLike[str], *, resume: bool) -> None:
        self.path = user_path(path, "out")
        if self.path.exists() and not self.path.is_dir():
            raise BadInput(f"out {self.path} is a file: give a folder")
        if self.begun and not resume:
            raise BadInput(f"out {self.path} holds a search already: continue it with --resume, or give another --out")
        _probe(self.path, self.path / _STAGES, "a folder you may write")
        sweep(self.path)

    def bind(self, settings: dict[str, Any]) -> None:
        """Say what the run is made of (JSON values); refuse to go on with a run that was begun with something else."""
        wanted = json.loads(json.dumps({"version": _VERSION, **settings}))
        path = self.path / _RUN_FILE
        if not path.exists():
            if any((self.path / _STAGES).glob("*.json")):
                raise StorageError(
                    f"out {self.path} holds results but no {_RUN_FILE}, which says of what: restore it, or "
                    "give another --out"
                )
            self._write(path, wanted)
            return
        found = read_sealed(path, "restore it, or give another --out")
        for key in sorted(found.keys() | wanted.keys()):
            if found.get(key) != wanted.get(key):
                raise BadInput(
                    f"out {self.path} was made with {key} {found.get(key)!r}, this run "
                    f"has {wanted.get(key)!r}: resume with the same settings and data, or give another --out"
                )

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run, finished or not."""
        return (self.path / _RUN_FILE).exists()

    def once(self, stage: str, kind: type[T], compute: Callable[[], T]) -> T:
        """A stage's result, a plain dataclass of type ``kind``: read if it is done, else computed and kept."""
        found = self.find(stage, kind)
        return self.keep(stage, compute()) if found is None else found

    def find(self, stage: str, kind: type[T]) -> T | None:
        """A stage's result, where it is done."""
        path, remedy = self._stage(stage), "remove it, then resume"
        if not path.exists():
            return None
        result: T = decode(kind, read_sealed(path, remedy), str(path), remedy)
        return result

    def keep(self, stage: str, result: T) -> T:
        """Write a stage's result."""
        self._write(self._stage(stage), encode(result))
        return result

    def _stage(self, stage: str) -> Path:
        return self.path / _STAGES / f"{stage}.json"

    def _write(self, path: Path, value: dict[str, Any]) -> None:
        write_atomically(path, json.dumps(seal(value), indent=1, allow_nan=False), _REMEDY)


# -- calibration and test ------------------------------------------------------------------------------------


def split_by_image(examples: Sequence[Example], share: float = 0.5) -> tuple[list[Example], list[Example]]:
    """(calibration, test), in file order; examples that share an image, directly or through others, stay together.

    Deterministic: which side a group goes to depends on the contents of its images alone, not on the order of
    the file or on a seed. About ``share`` of the examples become calibration.
    """
    hashes = [(*_image_hashes(example), *_unit_of(example)) for example in examples]
    groups = _connected(hashes)
    if len(groups) < 2:
        raise BadInput(
            "all examples share one image, so they cannot be split in calibration and test: give --test-data"
        )
    # the order of the hash of all the group's images
    groups.sort(key=lambda group: _hash("".join(sorted({key for i in group for key in hashes[i]})).encode()))
    calibration: set[int] = set(groups[0])
    for group in groups[1:-1]:  # the last group is always test
        if len(calibration) + len(group) / 2 <= share * len(examples):
            calibration.update(group)
    first = [example for i, example in enumerate(examples) if i in calibration]
    return first, [example for i, example in enumerate(examples) if i not in calibration]


def _unit_of(example: Example) -> list[str]:
    """What its benchmark never splits, which counts like an image that is shared."""
    benchmark = benchmark_of(example)
    if benchmark is None or benchmark.together is None:
        return []
    return [f"unit {benchmark.name} {benchmark.together(example)}"]


def _connected(hashes: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Indices of the examples by connected component, two being connected when they share an image's hash."""
    parent = list(range(len(hashes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first_with: dict[str, int] = {}
    for i, keys in enumerate(hashes):
        for key in keys:
            parent[root(i)] = root(first_with.setdefault(key, i))
    members: dict[int, list[int]] = {}
    for i in range(len(hashes)):
        members.setdefault(root(i), []).append(i)
    return list(members.values())


def check_disjoint(calibration: Sequence[Example], test: Sequence[Example]) -> None:
    """Refuse a test set that shows an image of the calibration set, also as a copy under another name."""
    seen = {key for example in calibration for key in _image_hashes(example)}
    shared = [example.id for example in test if seen & set(_image_hashes(example))]
    if shared:
        raise BadInput(
            f"{len(shared)} test examples show an image of the calibration set, the first is {shared[0]!r}: "
            "a score on them would flatter the search; take them out of one of the sets"
        )


def content_hash(examples: Sequence[Example]) -> str:
    """Of a set's questions, answers and metrics and the contents of its images, in order; 16 hex digits."""
    digest = hashlib.sha256()
    for example in examples:
        fields = (example.id, example.question, example.answers, example.metric, _image_hashes(example))
        digest.update(repr(fields).encode())
    return digest.hexdigest()[:16]


def _image_hashes(example: Example) -> tuple[str, ...]:
    """One hash per image, of the file's bytes (or the pixels of an image in memory)."""
    return tuple(
        _file_hash(image) if isinstance(image, Path) else key
        for image, key in zip(example.images, example.image_keys, strict=True)
    )


def _file_hash(path: Path) -> str:
    try:
        state = path.stat()
        return _hash_once(path, state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise StorageError(f"cannot read image {path}: {error.strerror or error}; check the file") from None


@cache
def _hash_once(path: Path, size: int, changed: int) -> str:
    """Each file is read once per process as long as it does not change."""
    return _hash(path.read_bytes())[:24]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# -- model, sets and reduction -------------------------------------------------------------------------------

DEMO_CALIBRATION = "demo:calibration"


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


def open_model(options: ModelOptions, device_map: str | None = None) -> Opened:
    """Load the model; one whose type is not listed is checked, where it may run but no check of it has passed yet."""
    asked = (options.model, options.dtype, options.device, options.attn, options.trust_remote_code)
    model, processor = load_model(*asked, device_map, unlisted=options.unlisted)
    if options.unlisted:
        check_unlisted(model, processor)
    device = str(model.device)
    info = ModelInfo(
        name=options.model,
        model_type=model.config.model_type,
        dtype=str(model.dtype).removeprefix("torch."),
        device=f"{device} ({torch.cuda.get_device_name(device)})" if model.device.type == "cuda" else device,
        attention=options.attn,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_layers=num_layers(model),
    )
    return Opened(model, processor, info)


def open_to_check(options: CheckOptions) -> tuple[Any, Any]:
    """Load a model of any type, and its processor where it has one that is wanted."""
    model, processor = load_model(
        options.model,
        options.dtype,
        options.device,
        options.attn,
        options.trust_remote_code,
        unlisted=True,
        needs_processor=False,
    )
    return model, processor if options.processor else None


def check_unlisted(model: Any, processor: Any) -> None:
    """Check a model whose type is not listed, where no stored check lets it run; refused where it fails."""
    if refusal(unwrapped(model).config) is None or is_cleared(model):
        return
    result = check(model, processor)
    if not result.passed:
        first = result.failures[0]
        raise Unsupported(
            f"{type(unwrapped(model)).__name__} fails its check: {first.name}"
            f"{first.note and f' ({first.note})'}; `thinsight check` shows all of it"
        )
    result.store()
    is_cleared(model)


def load_sets(
    data: str | None,
    test_data: str | None,
    limit: int | None,
    progress: Progress | None = None,
    split: tuple[float, str] = (0.5, DEMO_TEST),
    **reading: Any,
) -> Sets:
    """Calibration and test examples that share no image.

    Both given: as they are. Only ``data``: it is split by image; the demo's calibration set has a test set of its own.
    None given: the demo's two sets. ``split`` is the share to calibrate on and that test set, see `RunOptions.split`.
    ``limit`` applies to each set, and only images of examples within it are decoded, of which
    ``progress("images", done, total)`` tells; ``reading`` is how all data is read, see `load_examples`.
    """
    share, demo_test = split
    name = DEMO_CALIBRATION if data is None else data
    if test_data is None and name == DEMO_CALIBRATION:
        test_data = demo_test
    if test_data is not None:
        calibration, test = (load_examples(source, limit, progress=progress, **reading) for source in (name, test_data))
        check_disjoint(calibration, test)
        return Sets(calibration, test, name, test_data)
    examples = read_examples(name, **reading)
    check_examples(examples, name)
    calibration, test = (taken(side, limit) for side in split_by_image(examples, share))
    validate_examples([*calibration, *test], name, progress)
    note = (
        f"{name} was split by image: {counted(len(calibration), 'example')} to calibrate on, {len(test)} to test "
        "on (give --test-data to choose the test set yourself)"
    )
    parts = {0.5: ("one half", "the other half"), 0.25: ("a quarter", "the other three quarters")}[share]
    return Sets(calibration, test, f"{name} ({parts[0]})", f"{name} ({parts[1]})", note)


def reduction_for(source: str | None, model: str, config: Any) -> Sourced:
    """The reduction that is asked for; or the one in the default folder if it was searched for ``model``, which may
    have moved or be one of several of its name; or FastV's published 50 % step, so that a command has something to run
    on a model that nobody has searched yet, and says so. Refused if it is not for a model of this config."""
    layers, where, found = layers_of(config), str(DEFAULT_OUT) if source is None else source, None
    if source is not None or (DEFAULT_OUT / CONFIG_NAME).is_file():
        found = Reduction.from_pretrained(where)
    if found is not None and source is None:
        here, searched = checkpoint_hash(model), (found.search or {}).get("checkpoint")
        if here is None or searched is None:
            here, searched = base_name(model), found.base_model_name_or_path
        found = found if here == searched else None
    if found is None:
        return Sourced(fastv(layers), "FastV at 50 % (no --reduction given, none in the default folder)")
    has = found.schedule.num_layers
    if has != layers:
        raise BadInput(
            f"the reduction {where} has {has} layers but model {model!r} has {layers}: "
            "give the model that it was searched for"
        )
    if found.model_type not in (None, config.model_type):
        raise BadInput(
            f"the reduction {where} is for model type {found.model_type!r}, "
            f"model {model!r} is {config.model_type!r}: give the model that it was searched for"
        )
    try:
        check_rankable(found.schedule, get_ranker(found.ranker))
    except BadInput as error:
        raise BadInput(f"the reduction {where}: {error}") from None
    return Sourced(found, where)


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


# -- scores and costs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """An evaluation of all examples as a run folder keeps it; ``doubt`` is `Evaluator.doubt` of the full model's."""

    score: float
    per_example: tuple[float, ...]
    doubt: str = ""

    def __post_init__(self) -> None:
        if not all(0 <= score <= 1 for score in (self.score, *self.per_example)):
            raise BadInput("a score is not from 0 to 1, as every metric's is")

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
    """The evaluator of one set of examples; so many ``sets`` share ``options.cache_gib``."""
    return Evaluator(
        opened.model,
        opened.processor,
        examples,
        metric=options.metric,
        batch_size=options.batch_size,
        ranker=ranker,
        max_new_tokens=options.max_new_tokens or longest_answer(examples),
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
        """The budget of ``value`` for a model of this config."""
        return make_budget(value, unit, config=config, n_vision=self.n_vision, n_text=self.n_text, latency=self.latency)


def limits_of(evaluator: Evaluator, value: float, unit: str) -> Limits:
    """The limits of an evaluator's median prompt; "ms" is profiled on the spot."""
    budget = budget_of(evaluator, value, unit)
    latency = budget.latency if isinstance(budget, TimeBudget) else None
    n_text = median_low(text for _, text in evaluator.prompt_sizes)
    return Limits(evaluator.num_vision_tokens, n_text, latency)


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
        """Refuse a full model that scores 0 while the folder is not yet bound to its labels and metric; a run that is
        continued is checked where its search begins."""
        if not self.folder.begun:
            self.watcher.on_stage("Scoring the full model")
            for evaluator in evaluators:
                searchable_score(evaluator)

    def fix_batch_size(self, which: str) -> int:
        """The batch size of the set "calibration" or "test", found or halved once, so that a resumed run has the same
        batches. To be called before anything is evaluated on the set."""
        evaluator = {"calibration": self.calibration, "test": self.test}[which]

        def find() -> _BatchSize:
            size = evaluator.fix_batch_size()
            if self.batch_size == AUTO:
                self.watcher.on_note(f"The {which} set runs in batches of {counted(size, 'prompt')}")
            return _BatchSize(size)

        kept = self.folder.once(f"batches-{self.batch_size}-{which}", _BatchSize, find)
        return evaluator.fix_batch_size(kept.size)

    def test_scores(self, stage: str, reduction: Reduction | None) -> Scores:
        """Scores on the test set, computed once per stage of the folder; None is the full model."""

        def run() -> Scores:
            self.fix_batch_size("test")
            found, doubt = (self.test.full, self.test.doubt) if reduction is None else (self.test(reduction), "")
            assert found.per_example is not None
            return Scores(found.score, tuple(found.per_example.tolist()), doubt)

        return self.folder.once(stage, Scores, run)

    def test_scores_ahead(self, wanted: Mapping[str, Reduction], title: str) -> None:
        """What `test_scores` will be asked for, by stage, where several workers can do it without waiting for the end
        of each; nothing happens where there are none."""
        stages = [stage for stage in wanted if self.folder.find(stage, Scores) is None]
        if self.test.workers < 2 or not stages:
            return
        self.watcher.on_stage(title)
        self.fix_batch_size("test")

        def keep(place: int, found: Evaluation) -> None:
            assert found.per_example is not None
            self.folder.keep(stages[place], Scores(found.score, tuple(found.per_example.tolist()), ""))

        self.test.several([wanted[stage] for stage in stages], None, keep)


def sets_of(options: RunOptions, progress: Progress | None = None) -> Sets:
    """The two sets of a run."""
    data = options.named(options.data)
    return load_sets(data, options.tested, options.limit, progress, options.split, **options.reading)


def prepare(options: RunOptions, ranker: Any, watcher: Watcher) -> Prepared:
    """Open everything a run on two sets needs, cheapest first; ``ranker`` keeps the tokens of a bare schedule."""
    options.check()
    folder = RunFolder(options.out, resume=options.resume)
    watcher.on_stage("Reading the data")
    sets = sets_of(options, watcher.on_progress)
    if sets.note:
        watcher.on_note(sets.note)
    if doubts := options.doubts(len(sets.test)):
        watcher.on_note(f"warning: {doubts}")
    check_metric([*sets.calibration, *sets.test], options.metric)
    watcher.on_stage("Loading the model")
    opened = open_model(options.model)
    watcher.on_stage("Processing the images")
    calibration, test = (
        make_evaluator(options, opened, examples, watcher, ranker=ranker, sets=2)
        for examples in (sets.calibration, sets.test)
    )
    return Prepared(options.batch_size, watcher, folder, sets, opened, calibration, test)

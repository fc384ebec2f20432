"""What a report says, as plain dataclasses, and its file: `report.json` with a folder of pictures beside it.

Knows nothing about models, tensors, or how a report looks. Scores and rates are fractions (0.94, not 94), FLOPs are
plain counts, times are milliseconds unless the field's name says otherwise. A report.json is the old one or the new
one: pictures are named by what is in them, so that a new report never writes over those of an old one.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from markupsafe import Markup
from PIL import Image
from pydantic import PlainValidator, ValidationInfo

from .. import shown, texts
from ..certificate import Certificate, steps_table
from ..drawing import tag
from ..errors import BadInput, StorageError
from ..evaluation.benchmarks import Measured
from ..evaluation.result import Interval, RankConsistency, Timing, consistency_table, timing_table
from ..records import decode, encode, read_sealed, seal, user_path, write_atomically
from ..schedule import Schedule
from ..searches.run import Trial
from . import tables, words
from .pictures import data_uri, draw_kept

SCHEMA_VERSION = 3
DATA_FILE = "report.json"
PICTURE_FOLDER = "report_pictures"
_REMEDY = "write the report anew"
METHOD_KINDS = ("full", "found", "baseline")
OUTCOMES = ("", "worse", "better", "same")
_SHOWN_PICTURES = 3  # in a notebook, where each stands beside the others
MOST_CHANGED = 50  # rows of changed answers


def _check_finite(owner: Any, kind: str) -> None:
    """Refuses NaN and infinity in the numbers of a row, which would make plots and sentences nonsense."""
    for entry in fields(owner):
        value = getattr(owner, entry.name)
        if isinstance(value, Interval):
            _check_finite(value, f"{kind}.{entry.name}")
        elif isinstance(value, float) and not math.isfinite(value):
            raise BadInput(f"{kind}.{entry.name} is {value}; give a finite number or leave the row out")


@dataclass(frozen=True)
class ModelInfo:
    """The model a report is about; `parameters` is a count, `num_vision_tokens` is N of one prompt."""

    name: str
    model_type: str = ""
    dtype: str = ""
    device: str = ""
    attention: str = ""
    parameters: int | None = None
    num_layers: int | None = None
    num_vision_tokens: int | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """The examples a search saw (calibration) and the ones its scores come from (test)."""

    test_name: str
    test_size: int
    calibration_name: str = ""
    calibration_size: int | None = None
    metric: str = ""
    test_hash: str = ""
    calibration_hash: str = ""
    fingerprint: str = ""  # of the test set, as certificates name their examples


@dataclass(frozen=True)
class Headline:
    """Full against reduced on the test set. Every ratio is full / reduced: above 1 is cheaper.

    `flops_full` and `flops` are decoder prefill FLOPs of one prompt; `vision_flops` is the vision encoder,
    which stands apart.
    """

    full_score: float
    score: float
    drop: Interval
    mean_keep_rate: float
    flops_ratio: float
    kv_ratio: float | None = None
    prefill_ratio: float | None = None
    answer_ratio: float | None = None
    flops_full: float | None = None
    flops: float | None = None
    vision_flops: float | None = None

    def __post_init__(self) -> None:
        _check_finite(self, "headline")


@dataclass(frozen=True)
class SearchInfo:
    """How the schedule was found; the two scores are the calibration set's."""

    method: str
    max_drop: float | None = None
    solver: str = ""
    ranker: str = ""
    seed: int | None = None
    evaluations: int | None = None
    full_forwards: float | None = None  # its FLOPs in those of the full model over the calibration set
    seconds: float | None = None
    calibration_full_score: float | None = None
    calibration_score: float | None = None
    budget: str = ""


@dataclass(frozen=True)
class FrontierRow:
    """One point of a frontier; the score is the calibration set's, `chosen` says which point was taken."""

    keep_rates: tuple[float, ...]
    mean_keep_rate: float
    flops_ratio: float
    score: float
    chosen: bool


@dataclass(frozen=True)
class MethodRow:
    """One way to run the model. `kind` is "full", "found" (by the search) or "baseline".

    `keep_rates` may be empty where a method has no schedule (image downsampling); `drop` is None for the
    full model.
    """

    name: str
    keep_rates: tuple[float, ...]
    score: float
    drop: Interval | None
    mean_keep_rate: float
    flops: float
    flops_ratio: float
    note: str = ""
    kind: str = "baseline"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_rates", tuple(float(rate) for rate in self.keep_rates))
        _check_finite(self, f"method {self.name!r}")
        if self.kind not in METHOD_KINDS:
            raise BadInput(f"method kind {self.kind!r} is unknown; use one of {', '.join(METHOD_KINDS)}")


@dataclass(frozen=True)
class TaskRow:
    """The score of one task of the test set (`n` questions), full and reduced."""

    task: str
    n: int
    full: float
    reduced: float

    def __post_init__(self) -> None:
        _check_finite(self, "per_task")


@dataclass(frozen=True)
class ChangedAnswer:
    """A test example whose score changed; `full` and `reduced` are its scores, `expected` is empty without labels."""

    id: str
    question: str
    expected: str
    answer_full: str
    answer_reduced: str
    full: float
    reduced: float
    task: str = ""

    def __post_init__(self) -> None:
        _check_finite(self, f"changed answer {self.id!r}")


@dataclass(frozen=True)
class Changes:
    """How many of the test examples score worse and better under the reduction, and the first `MOST_CHANGED` of them:
    the worse ones before the better ones, the largest change first."""

    examples: int
    worse: int
    better: int
    rows: tuple[ChangedAnswer, ...] = ()

    def __post_init__(self) -> None:
        if min(self.worse, self.better) < 0 or self.worse + self.better > self.examples:
            raise BadInput(f"changes are {self.worse} worse and {self.better} better of {self.examples}; count again")
        if len(self.rows) > min(MOST_CHANGED, self.worse + self.better):
            raise BadInput(f"changes show {len(self.rows)} rows; give each changed one at most, {MOST_CHANGED} in all")


def _load_image(name: Any, info: ValidationInfo) -> Image.Image:
    """The image of a name in JSON, by the function that `load_report_data` gives."""
    load: Callable[[Any], Image.Image] = info.context  # type: ignore[assignment]
    return load(name)


@dataclass(frozen=True)
class Picture(shown.Shown):
    """The vision tokens one question kept, layer by layer.

    `image` is the image as the model saw it (after its crop), `grid` its (rows, columns) of vision tokens in
    reading order, `kept[j]` the indices (0 .. rows * columns - 1) that entered decoder layer `layers[j]`.
    `outcome` says what the reduction did to the question's score: "worse", "better", "same", or "" where unknown.
    """

    image: Annotated[Image.Image, PlainValidator(_load_image)]
    grid: tuple[int, int]
    kept: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    question: str
    answer_full: str = ""
    answer_reduced: str = ""
    truth: str = ""
    outcome: str = ""

    def __post_init__(self) -> None:
        if self.outcome not in OUTCOMES:
            raise BadInput(
                f"picture outcome {self.outcome!r} is unknown; use one of {', '.join(OUTCOMES[1:])}, or none"
            )
        rows, columns = (int(v) for v in self.grid)
        kept = tuple(tuple(sorted(int(i) for i in indices)) for indices in self.kept)
        object.__setattr__(self, "grid", (rows, columns))
        object.__setattr__(self, "kept", kept)
        object.__setattr__(self, "layers", tuple(int(layer) for layer in self.layers))
        if rows < 1 or columns < 1:
            raise BadInput(f"picture grid {rows} x {columns} is empty; give rows and columns of at least 1")
        if len(kept) != len(self.layers):
            raise BadInput(f"picture has {len(kept)} kept lists for {len(self.layers)} layers; give one each")
        for layer, indices in zip(self.layers, kept, strict=True):
            if indices and not 0 <= indices[0] <= indices[-1] < rows * columns:
                worst = indices[0] if indices[0] < 0 else indices[-1]
                raise BadInput(f"picture, layer {layer}: token {worst} is outside the {rows} x {columns} grid")

    def __repr__(self) -> str:
        rows, columns = self.grid
        kept = ", ".join(f"layer {layer}: {len(kept)}" for layer, kept in zip(self.layers, self.kept, strict=True))
        return texts.brief(f"Picture({self.question!r}, {rows} x {columns} tokens, kept at {kept})")

    def _tables(self) -> Iterable[shown.Table]:
        known = {
            "question": self.question,
            "full model": self.answer_full,
            "reduced": self.answer_reduced,
            "expected": self.truth,
            "score": self.outcome,
        }
        return [shown.facts_table("Kept vision tokens", known.items())]

    def _drawings(self) -> Iterable[Markup]:
        """The image, and what is left of it at each layer."""
        total = self.num_tokens
        stops = [("the image", tuple(range(total))), *zip(map("layer {}".format, self.layers), self.kept, strict=True)]
        for name, kept in stops:
            told = f"{name}: {shown.tokens(len(kept))}" + (f", {shown.percent(len(kept) / total)}" if kept else "")
            image = draw_kept(self.image, self.grid, kept, side=168)
            drawn = tag("img", src=data_uri(image), width=image.width, height=image.height, alt=told)
            yield tag("figure", drawn, tag("figcaption", told), class_="kept")

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ReportData(shown.Shown):
    """Everything one report shows. Parts that are left out leave out their section."""

    title: str
    model: ModelInfo
    dataset: DatasetInfo | None = None
    headline: Headline | None = None
    search: SearchInfo | None = None
    keep_rates: tuple[float, ...] = ()
    methods: tuple[MethodRow, ...] = ()
    per_task: tuple[TaskRow, ...] = ()
    measures: tuple[Measured, ...] = ()
    timing: tuple[Timing, ...] = ()
    trials: tuple[Trial, ...] = ()
    frontier: tuple[FrontierRow, ...] = ()
    consistency: RankConsistency | None = None
    changes: Changes | None = None
    pictures: tuple[Picture, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    created: str = ""
    doubts: tuple[str, ...] = ()  # why the full model's scores are too low to tell much
    certificate: Certificate | None = None
    path_ratios: tuple[float, ...] = ()  # full model's decoder FLOPs over those of each schedule that it names

    def __post_init__(self) -> None:
        for each in fields(self):
            if isinstance(value := getattr(self, each.name), list):
                object.__setattr__(self, each.name, tuple(value))
        if self.keep_rates:
            object.__setattr__(self, "keep_rates", Schedule(self.keep_rates).keep_rates)
        layers = self.model.num_layers
        if self.keep_rates and layers is not None and len(self.keep_rates) != layers:
            raise BadInput(f"the schedule has {len(self.keep_rates)} layers but the model has {layers}")
        self._check_certificate()

    def _check_certificate(self) -> None:
        path = () if self.certificate is None else self.certificate.path
        if self.path_ratios and len(self.path_ratios) != len(path):
            raise BadInput(f"path_ratios has {len(self.path_ratios)} ratios for a path of {len(path)}; give one each")
        if not all(math.isfinite(ratio) for ratio in self.path_ratios):
            raise BadInput(f"path_ratios is {self.path_ratios}; give finite numbers or leave them out")
        if self.certificate is None or not self.keep_rates:
            return
        schedule, promised = Schedule(self.keep_rates), self.certificate.schedule
        if promised != schedule and not (promised is None and schedule.is_full):
            raise BadInput(f"certificate is of {promised or 'the full model'!r}, and keep_rates are {schedule!r}'s")

    def __repr__(self) -> str:
        said = "" if self.headline is None else f", {words.headline(self.headline)}"
        return texts.brief(f"ReportData({self.title!r}{said})")

    def _sentences(self) -> Iterable[str]:
        yield self.title
        if self.headline is not None:
            yield words.headline(self.headline)
            yield from (f"Warning: {doubt}" for doubt in self.doubts)
            yield words.meaning(self)
        if self.certificate is not None:
            yield from words.certified(self.certificate)

    def _drawings(self) -> Iterable[Markup]:
        if self.keep_rates:
            yield from Schedule(self.keep_rates)._drawings()
        for picture in self.pictures[:_SHOWN_PICTURES]:
            yield from picture._drawings()

    def __rich__(self) -> Any:
        from rich.console import Group

        return Group(*shown.spaced(self._parts()), "")

    def _tables(self) -> Iterable[shown.Table]:
        return (part for part in self._parts() if isinstance(part, shown.Table))

    def _parts(self) -> Iterable[Any]:
        """All of it that a terminal can show, top to bottom."""
        title = shown.line(self.title, "bold")
        if self.headline is None:
            yield title
        else:
            yield title.append("\n").append_text(shown.line(words.headline(self.headline), "bold green"))
            yield from (shown.line(f"Warning: {doubt}", "bold red") for doubt in self.doubts)
            yield tables.headline_table(self.headline, self.dataset)
            yield shown.line(words.meaning(self))
        if self.changes is not None:
            yield shown.line(words.changes(self.changes))
        if self.certificate is not None:
            told = words.certified(self.certificate)
            yield shown.line(told[0], "bold green" if self.certificate.schedule else "bold")
            yield shown.line(" ".join(told[1:]))
            yield steps_table(self.certificate, self.path_ratios)
        if self.keep_rates:
            yield shown.schedule_bars(self.keep_rates)
        several: tuple[tuple[Any, Callable[[Any], shown.Table]], ...] = (
            (self.methods, tables.methods_table),
            (self.frontier, lambda rows: tables.frontier_table(rows, self.certificate)),
            (self.per_task, tables.tasks_table),
            (self.measures, tables.measures_table),
            (self.timing, timing_table),
        )
        yield from (table(rows) for rows, table in several if rows)
        if self.consistency is not None:
            yield consistency_table(self.consistency)


def save_report_data(folder: str | Path, data: ReportData) -> Path:
    """Writes `report.json` and its pictures (lossless PNG) into `folder`; returns the JSON's path.

    Raises:
        ThinsightError: the folder or a file cannot be written.
    """
    folder = user_path(folder, "folder")
    pictures = folder / PICTURE_FOLDER
    names: list[str] = []

    def save_image(image: Image.Image) -> str:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "PNG")
        names.append(f"picture-{len(names):03d}-{_digest(buffer.getvalue())}.png")
        write_atomically(pictures / names[-1], buffer.getvalue())
        return names[-1]

    record = seal({"schema_version": SCHEMA_VERSION, **encode(data, {Image.Image: save_image})})
    write_atomically(folder / DATA_FILE, json.dumps(record, indent=1, allow_nan=False) + "\n")
    for old in pictures.glob("picture-*.png"):
        if old.name not in names:
            with suppress(OSError):  # it does no harm
                old.unlink()
    return folder / DATA_FILE


def load_report_data(folder: str | Path) -> ReportData:
    """Reads what `save_report_data` wrote.

    Raises:
        ThinsightError: no report.json there, one that is no JSON, was changed, breaks the schema or is of another
            version, or a picture file that is missing or was changed.
    """
    folder = user_path(folder, "folder")
    path = folder / DATA_FILE
    if not path.exists():
        raise BadInput(f"no {DATA_FILE} in {folder}; name a folder that `thinsight search` wrote")

    def load_image(name: Any) -> Image.Image:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
            raise StorageError(f"{path}: picture name {name!r} is not a plain file name; {_REMEDY}")
        file = folder / PICTURE_FOLDER / name
        try:
            data = file.read_bytes()
            if not name.endswith(f"-{_digest(data)}.png"):
                raise ValueError
            with Image.open(io.BytesIO(data)) as image:
                return image.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError):
            raise StorageError(f"cannot read picture {file}: missing or damaged; {_REMEDY}") from None

    record = read_sealed(path, _REMEDY)
    version = record.pop("schema_version", None)
    if version != SCHEMA_VERSION:
        raise BadInput(
            f"{path}: schema_version {version!r} is unknown, this thinsight reads {SCHEMA_VERSION}; {_REMEDY}"
        )
    report: ReportData = decode(ReportData, record, str(path), _REMEDY, context=load_image)
    return report


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]

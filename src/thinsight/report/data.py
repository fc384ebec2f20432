"""What a report says, as plain dataclasses: numbers, texts and images, with every unit named.

Knows nothing about models, tensors, HTML or terminals. Scores and rates are fractions (0.94, not 94),
FLOPs are plain counts, times are milliseconds unless the field's name says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from PIL import Image
from pydantic import PlainValidator, ValidationInfo

from ..errors import BadInput
from ..evaluation.result import Interval
from ..records import Undefined, decode, encode
from ..schedule import Schedule

SCHEMA_VERSION = 2
METHOD_KINDS = ("full", "found", "baseline")


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
class TimingRow:
    """A measured time, full and reduced, medians of `runs` alternating runs; `ratio` is full / reduced."""

    what: str
    full_ms: float
    reduced_ms: float
    ratio: float
    batch: int
    runs: int

    def __post_init__(self) -> None:
        _check_finite(self, "timing")


@dataclass(frozen=True)
class TrialRow:
    """One evaluation of the search: `complete` is False where it stopped early, its score then being
    an upper bound. `layer` is None where a whole schedule was tried, `why` saying how it came about; `share`
    of the examples it was run on.
    """

    layer: int | None
    keep_rate: float
    count: int
    score: float
    complete: bool
    accepted: bool
    seconds: float
    share: float = 1.0
    why: str = ""


@dataclass(frozen=True)
class Consistency:
    """How alike the layers rank the vision tokens (paper, Figure 1).

    `tau` and `topk_overlap` hold L - 1 values: element i compares layers i and i + 1. `tau_matrix` is L x L,
    `tied_share` has L values. NaN marks a comparison that is not defined.
    """

    tau: tuple[Undefined, ...]
    tau_matrix: tuple[tuple[Undefined, ...], ...] = ()
    topk_overlap: tuple[Undefined, ...] = ()
    tied_share: tuple[Undefined, ...] = ()
    words: str = ""

    def __post_init__(self) -> None:
        layers = len(self.tau) + 1
        for name in ("tau", "topk_overlap", "tied_share"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        matrix = tuple(tuple(float(v) for v in row) for row in self.tau_matrix)
        object.__setattr__(self, "tau_matrix", matrix)
        if matrix and {len(matrix), *map(len, matrix)} != {layers}:
            raise BadInput(f"tau_matrix must be {layers} x {layers} to go with {layers - 1} values of tau")
        if self.topk_overlap and len(self.topk_overlap) != layers - 1:
            raise BadInput(f"topk_overlap has {len(self.topk_overlap)} values; it needs {layers - 1}, as tau")
        if self.tied_share and len(self.tied_share) != layers:
            raise BadInput(f"tied_share has {len(self.tied_share)} values; it needs {layers}, one per layer")


def _load_image(name: Any, info: ValidationInfo) -> Image.Image:
    """The image of a name in JSON, by the function that `ReportData.from_dict` was given."""
    load: Callable[[Any], Image.Image] = info.context  # type: ignore[assignment]
    return load(name)


@dataclass(frozen=True)
class Picture:
    """The vision tokens one question kept, layer by layer.

    `image` is the image as the model saw it (after its crop), `grid` its (rows, columns) of vision tokens in
    reading order, `kept[j]` the indices (0 .. rows * columns - 1) that entered decoder layer `layers[j]`.
    """

    image: Annotated[Image.Image, PlainValidator(_load_image)]
    grid: tuple[int, int]
    kept: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    question: str
    answer_full: str = ""
    answer_reduced: str = ""
    truth: str = ""

    def __post_init__(self) -> None:
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

    @property
    def num_tokens(self) -> int:
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class ReportData:
    """Everything one report shows. Parts that are left out leave out their section."""

    title: str
    model: ModelInfo
    dataset: DatasetInfo | None = None
    headline: Headline | None = None
    search: SearchInfo | None = None
    keep_rates: tuple[float, ...] = ()
    methods: tuple[MethodRow, ...] = ()
    per_task: tuple[TaskRow, ...] = ()
    timing: tuple[TimingRow, ...] = ()
    trials: tuple[TrialRow, ...] = ()
    frontier: tuple[FrontierRow, ...] = ()
    consistency: Consistency | None = None
    pictures: tuple[Picture, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()
    created: str = ""
    doubts: tuple[str, ...] = ()  # why the full model's scores are too low to tell much

    def __post_init__(self) -> None:
        for name in (
            "keep_rates",
            "methods",
            "per_task",
            "timing",
            "trials",
            "frontier",
            "pictures",
            "commands",
            "doubts",
        ):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.keep_rates:
            object.__setattr__(self, "keep_rates", Schedule(self.keep_rates).keep_rates)
        layers = self.model.num_layers
        if self.keep_rates and layers is not None and len(self.keep_rates) != layers:
            raise BadInput(f"the schedule has {len(self.keep_rates)} layers but the model has {layers}")

    def to_dict(self, save_image: Callable[[Image.Image], str]) -> dict[str, Any]:
        """The report as a JSON object; `save_image` puts an image somewhere and returns its name."""
        return {"schema_version": SCHEMA_VERSION, **encode(self, {Image.Image: save_image})}

    @classmethod
    def from_dict(
        cls, value: dict[str, Any], load_image: Callable[[Any], Image.Image], where: str, remedy: str
    ) -> ReportData:
        """The report in a JSON object.

        Args:
            value: from `to_dict`.
            load_image: turns a name from there into the image.
            where: the file, for messages.
            remedy: what to do about damage, for messages.

        Raises:
            ThinsightError: another schema version, an unknown or missing key, a value of the wrong type.
        """
        version = value.get("schema_version")
        if version != SCHEMA_VERSION:
            raise BadInput(
                f"{where}: schema_version {version!r} is unknown, this thinsight reads {SCHEMA_VERSION}; {remedy}"
            )
        rest = {key: item for key, item in value.items() if key != "schema_version"}
        report: ReportData = decode(cls, rest, where, remedy, context=load_image)
        return report

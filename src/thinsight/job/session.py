"""What every command opens before it works: the model, and the examples that it calibrates or tests on.

Knows where models and data come from and in which order to check them, cheapest first. Knows nothing about
searches, reports or terminals.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from ..baselines import fastv
from ..errors import BadInput
from ..evaluation.examples import (
    Example,
    Progress,
    check_examples,
    load_examples,
    read_examples,
    validate_examples,
)
from ..loading import DEMO, base_name, check_options, checkpoint_hash, load_config, load_model
from ..ranking import get_ranker
from ..reduction import CONFIG_NAME, Reduction
from ..report.data import ModelInfo
from ..runtime import check_rankable, num_layers
from ..version import __version__
from .splits import check_disjoint, split_by_image

__all__ = [
    "DEFAULT_OUT",
    "DEMO_CALIBRATION",
    "DEMO_TEST",
    "ModelOptions",
    "Opened",
    "Sets",
    "Sourced",
    "check_sources",
    "environment",
    "find_reduction",
    "fit_reduction",
    "layers_of",
    "load_sets",
    "open_model",
]

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
    model, processor = load_model(
        options.model, options.dtype, options.device, options.attn, options.trust_remote_code
    )
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


def load_sets(
    data: str | None, test_data: str | None, limit: int | None, progress: Progress | None = None
) -> Sets:
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

"""The model card that is saved beside a reduction: Markdown with the schedule drawn as text.

Knows nothing about files, and nothing about what the measured figures mean: it prints what it is given.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from .adaptive import Adaptive
from .schedule import Schedule
from .texts import code, markdown, python, yaml

__all__ = ["is_hub_id", "is_model_card", "model_card"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# the hash is of all above it: a card that was changed is its user's
_MARK = re.compile(r"\n<!-- thinsight card ([0-9a-f]{64}): replaced as long as nothing is changed -->\n\Z")
_BAR = 40  # characters for a keep rate of 1
_DEMOS = ("demo", "demo-internvl")


def model_card(
    schedule: Schedule,
    ranker: Mapping[str, Any],
    *,
    base_model: str | None,
    search: Mapping[str, Any] | None,
    measured: Mapping[str, Any] | None,
    adaptive: Adaptive | None = None,
) -> str:
    """The README.md of a reduction."""
    parts = [
        _front_matter(base_model),
        f"# Vision-token reduction for {code(base_model) if base_model else 'a multimodal model'}",
        "Found or made with thinsight: how many of a prompt's vision tokens enter each decoder layer, "
        "and which ones. The model's weights are unchanged; its prefill is what gets cheaper.",
        _schedule_section(schedule),
        *(_adaptive_section(adaptive) if adaptive else ()),
        f"## Which tokens are kept\n\nRanker {_value(dict(ranker))}.",
    ]
    if search:
        parts.append(_table("## How it was found", search))
    if measured:
        parts.append(_table("## Measured", measured))
    parts.append(_usage(base_model))
    text = "\n\n".join(parts) + "\n"
    return f"{text}\n<!-- thinsight card {_hash(text)}: replaced as long as nothing is changed -->\n"


def is_model_card(text: str) -> bool:
    """Whether a README.md is what `model_card` wrote, to the letter, and so may be replaced by a new one."""
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _hash(text[: mark.start()])


def is_hub_id(text: str) -> bool:
    """Whether a text can be ``owner/name`` on the Hub."""
    return _HUB_ID.fullmatch(text) is not None


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _front_matter(base_model: str | None) -> str:
    values: dict[str, Any] = {"library_name": "thinsight", "tags": ["vision-token-reduction"]}
    if base_model and is_hub_id(base_model):  # the Hub takes nothing else here
        values["base_model"] = base_model
    return f"---\n{yaml(values)}---"


def _schedule_section(schedule: Schedule) -> str:
    rows = []
    for first, last, rate in schedule.runs():
        layers = f"{first}" if first == last else f"{first}-{last}"
        rows.append(f"{layers:>7}  {rate:7.2%}  {'#' * round(rate * _BAR)}".rstrip())
    return (
        f"## Schedule\n\n{schedule.num_layers} layers, numbered from 0; mean keep rate "
        f"{schedule.mean_keep_rate:.2%} of the vision tokens.\n\n```text\n layers     kept\n"
        + "\n".join(rows)
        + "\n```"
    )


def _adaptive_section(adaptive: Adaptive) -> list[str]:
    """How the prompts differ, under the schedule that they get on average."""
    statistic = markdown(adaptive.statistic)
    spans = [f"below {adaptive.edges[0]:.4g}"] if adaptive.edges else ["any"]
    spans += [f"from {edge:.4g}" for edge in adaptive.edges]
    rows = [
        f"| {span} | {share:.1%} | {schedule.mean_keep_rate:.2%} |"
        for span, share, schedule in zip(spans, adaptive.shares, adaptive.schedules, strict=True)
    ]
    return [
        f"That is the mean: from layer {adaptive.layer} on, each prompt goes by the {statistic} of its "
        f"text's attention in layer {adaptive.layer - 1}.",
        "\n".join([f"| {statistic} | prompts | mean keep rate |", "|---|---|---|", *rows]),
    ]


def _table(heading: str, values: Mapping[str, Any]) -> str:
    rows = [f"| {markdown(name)} | {_value(value)} |" for name, value in _flat(values)]
    return "\n".join([heading, "", "| what | value |", "|---|---|", *rows])


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested values as rows with readable names."""
    for key, value in values.items():
        name = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}: ")
        elif value is not None:
            yield name, value


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(item) for item in value)
    if isinstance(value, Mapping):
        rest = ", ".join(f"{markdown(key)} {_value(item)}" for key, item in value.items() if key != "name")
        if "name" not in value:
            return rest
        return code(value["name"]) + (f" ({rest})" if rest else "")
    return markdown(value)


def _usage(base_model: str | None) -> str:
    base_model = base_model or "the-model"
    if base_model in _DEMOS:
        imports, load = "", f"model, processor = ts.load_demo(name={python(base_model)})"
    else:
        name = python(base_model if is_hub_id(base_model) else f"path/to/{base_model}")
        imports = "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        load = (
            f"model = AutoModelForImageTextToText.from_pretrained({name})\n"
            f"processor = AutoProcessor.from_pretrained({name})"
        )
    return (
        "## How to use it\n\n```python\nimport thinsight as ts\n"
        f"{imports}{load}\n"
        'reduction = ts.Reduction.from_pretrained("this/folder")\n'
        "with ts.apply(model, reduction):\n"
        "    output = model.generate(**inputs)  # inputs as always, from the processor\n```"
    )

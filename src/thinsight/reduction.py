"""Reduction: a schedule and a ranker, saved as a folder of one JSON file and a model card, and read back strictly.

Knows nothing about how a reduction is found or run, and not which rankers exist: a ranker is a name and settings here.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from markupsafe import Markup

from . import shown
from .certificate import ASSUMES, ESTIMATED, Certificate
from .errors import BadInput, StorageError
from .records import MAX_DEPTH, parse_json, read_object, user_path, write_atomically
from .schedule import Adaptive, Schedule, real, schedule_table
from .texts import brief, code, markdown, python, yaml
from .version import __version__

_FIGURES = {"full_score": "full model", "score": "reduced", "drop": "drop"}  # of `measured`, in the Hub's table
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# the hash is of all above it: a changed card is its user's
_MARK = re.compile(r"\n<!-- thinsight card ([0-9a-f]{64}): replaced as long as nothing is changed -->\n\Z")


def _card(reduction: Reduction) -> str:
    """The README.md of a reduction."""
    base_model = reduction.base_model_name_or_path
    front: dict[str, Any] = {"library_name": "thinsight", "pipeline_tag": "image-text-to-text"}
    front["tags"] = ["vision-token-reduction"]
    if base_model and _HUB_ID.fullmatch(base_model):  # the Hub takes nothing else here
        # of the Hub's relations the one for a small file that is put onto a model's own weights
        front |= {"base_model": base_model, "base_model_relation": "adapter"}
    if figures := _index(reduction):
        front["model-index"] = figures
    parts = [
        f"---\n{yaml(front)}---",
        f"# Vision-token reduction for {code(base_model) if base_model else 'a multimodal model'}",
        "Found or made with thinsight: how many of a prompt's vision tokens enter each decoder layer, "
        "and which ones. The model's weights are unchanged; its prefill is what gets cheaper.",
        _schedule_section(reduction.schedule),
        *(_adaptive_section(reduction.adaptive) if reduction.adaptive else ()),
        f"## Which tokens are kept\n\nRanker {_value(dict(reduction.ranker))}.",
        *(_table("## How it was found", reduction.search) if reduction.search else ()),
        *(_table("## Measured", reduction.measured) if reduction.measured else ()),
        *_promise_section(reduction.certificate),
        _usage(base_model),
    ]
    text = "\n\n".join(parts) + "\n"
    return f"{text}\n<!-- thinsight card {_hash(text)}: replaced as long as nothing is changed -->\n"


def _index(reduction: Reduction) -> list[dict[str, Any]]:
    """What the Hub shows as evaluation results: scores on the test set, and the drop that is promised."""
    measured, promise = reduction.measured or {}, reduction.certificate
    test = measured.get("test")
    if promise is not None and promise.schedule is not None:
        figures = [(f"largest drop, certified with {promise.confidence:.0%} confidence", promise.max_drop)]
    else:
        figures = []
    figures += [(words, measured[key]) for key, words in _FIGURES.items() if isinstance(measured.get(key), float)]
    if not figures or not isinstance(test, Mapping) or not {"name", "hash"} <= test.keys():
        return []
    metric = str(measured.get("metric") or "score")
    source = {"type": "custom", "name": str(test["name"]), "revision": str(test["hash"])}
    values = [{"type": metric, "name": f"{metric}, {words}", "value": value} for words, value in figures]
    result = {"task": {"type": "image-text-to-text"}, "dataset": source, "metrics": values}
    return [{"name": f"{reduction.base_model_name_or_path or 'model'}, vision tokens reduced", "results": [result]}]


def _is_ours(card: Path) -> bool:
    """Whether a model card may be written here: there is none, or one that `_card` wrote, to the letter."""
    if not card.exists():
        return True
    text = card.read_text(encoding="utf-8", errors="replace")
    return (mark := _MARK.search(text)) is not None and mark[1] == _hash(text[: mark.start()])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def _schedule_section(schedule: Schedule) -> str:
    rows = [
        f"{str(first) if first == last else f'{first}-{last}':>7}  {rate:7.2%}  {'#' * round(40 * rate)}".rstrip()
        for first, last, rate in schedule.runs()
    ]
    about = f"{schedule.num_layers} layers, numbered from 0; mean keep rate {schedule.mean_keep_rate:.2%}"
    return "\n".join(["## Schedule\n", f"{about} of the vision tokens.\n", "```text", " layers     kept", *rows, "```"])


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


def _promise_section(certificate: Certificate | None) -> list[str]:
    heading = "## What is promised"
    if certificate is None:
        return [heading, f"Nothing: what is lost is {ESTIMATED}."]
    tested = f"Schedules tested, costly ones first: {len(certificate.steps)} of {len(certificate.path)}"
    end = f"; {certificate.reason}" if certificate.reason else ", all of them certified"
    on = f"Fingerprint of the examples: {code(certificate.fingerprint)}"
    metric = f"; metric: {code(certificate.metric)}" if certificate.metric else ""
    said = [certificate.promise, certificate.evidence, *certificate.caveats, f"{tested}{end}.", ASSUMES]
    return [heading, " ".join(map(markdown, said[:2])), *map(markdown, said[2:]), f"{on}{metric}."]


def _table(heading: str, values: Mapping[str, Any]) -> list[str]:
    rows = [f"| {markdown(name)} | {_value(value)} |" for name, value in _flat(values)]
    return [heading, "\n".join(["| what | value |", "|---|---|", *rows])]


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
        return rest if "name" not in value else code(value["name"]) + (f" ({rest})" if rest else "")
    return markdown(value)


def _usage(base_model: str | None) -> str:
    if base_model in ("demo", "demo-internvl", "demo-smollm2"):
        load = [f"model, processor = ts.load_demo(name={python(base_model)})"]
    else:
        base_model = base_model or "the-model"
        name = python(base_model if _HUB_ID.fullmatch(base_model) else f"path/to/{base_model}")
        load = ["from transformers import AutoModelForImageTextToText, AutoProcessor", ""]
        load += [f"model = AutoModelForImageTextToText.from_pretrained({name})"]
        load += [f"processor = AutoProcessor.from_pretrained({name})"]
    use = [
        'reduction = ts.Reduction.from_pretrained("this/folder")',
        "with ts.apply(model, reduction):",
        "    output = model.generate(**inputs)  # inputs as always, from the processor",
    ]
    return "\n".join(["## How to use it\n", "```python", "import thinsight as ts", *load, *use, "```"])


CONFIG_NAME = "reduction_config.json"
CARD_NAME = "README.md"
_LEFT_ALONE = "was not written by thinsight, or was changed since, and is left as it is"
SCHEMA_VERSION = 1
_KEYS: tuple[str, ...] = ("schema_version", "thinsight_version", "base_model_name_or_path", "model_type", "num_layers")
_KEYS += ("keep_rates", "ranker", "search", "measured")
_OPTIONAL_KEYS = ("adaptive", "rerank", "certificate", "weights")  # written only where they say something
_SNAPSHOT = re.compile(r"models--([^/\\]+)[/\\]snapshots[/\\]")  # in the Hub's cache
_DRIVE = re.compile(r"[A-Za-z]:[/\\]")


def _refuse(self: Any, *_: Any, **__: Any) -> Any:
    raise TypeError("this is not changed after it is made; change a copy, dict(...), and make a new object")


class ReadOnlyDict(dict[str, Any]):
    """A dict that cannot be changed, and so has a hash; to everything else it is a dict."""

    __setitem__ = __delitem__ = __ior__ = clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


class ReadOnlyList(list[Any]):
    """Likewise, a list."""

    __setitem__ = __delitem__ = __iadd__ = __imul__ = append = clear = _refuse
    extend = insert = pop = remove = reverse = sort = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self),)


def read_only(value: Any, levels: int = MAX_DEPTH) -> Any:
    """JSON values with dicts and lists that cannot be changed, at every level; too deep a nest is refused."""
    if not isinstance(value, (Mapping, list, tuple)):
        return value
    if levels == 0:
        raise BadInput(f"a record nested more than {MAX_DEPTH} levels deep cannot be saved as JSON; make it flatter")
    if isinstance(value, Mapping):
        return ReadOnlyDict({key: read_only(item, levels - 1) for key, item in value.items()})
    return ReadOnlyList([read_only(item, levels - 1) for item in value])


@dataclass(frozen=True, init=False)
class Reduction(shown.Shown):
    """How many tokens (a schedule) and which ones (a ranker), bound to a model family.

    Args:
        schedule: keep rates of all decoder layers.
        ranker: a ranker's name, a dict ``{"name": ..., **settings}``, or an object with ``name`` and
            ``settings``.
        base_model_name_or_path: the model it was searched for, as given to ``from_pretrained``. Of a path
            only the folder's name is kept (see `public_name`), for a reduction is made to be passed on.
        model_type: the model family, ``model.config.model_type``; None fits any.
        search: how it was found (method, tolerance, seed, evaluations ...), JSON values; None if not
            searched.
        measured: what it was measured to do (scores, ratios, device ...), JSON values; None if not measured.
        adaptive: schedules among which each prompt gets its own; ``schedule`` is then their mean
            (``adaptive.mean()``), for figures and costs.
        rerank: True: tokens are ranked anew at every reduction; a number in (0, 1): only once fewer than this
            share of the tokens are to be kept that the prompt's last ranking kept; False: once.
        certificate: what is promised of its loss. It is bound to the schedule, ranker, ``adaptive`` and ``rerank``
            that it is first held with, and refused with any other: ``dataclasses.replace(reduction, ranker=...,
            certificate=None)`` lets go of it.
        weights: what the weights that it was searched on are known by (`thinsight.runtime.weights_of`); `apply` warns
            on others. None: it fits any.

    A reduction is not changed after it is made, nor are the dicts and lists that it holds, so it has a hash, and two
    of equal content are equal. ``dataclasses.replace(reduction, measured={...})`` makes a new one.

    Raises:
        ThinsightError: an argument of the wrong kind.
    """

    schedule: Schedule
    ranker: Mapping[str, Any]
    base_model_name_or_path: str | None
    model_type: str | None
    search: Mapping[str, Any] | None
    measured: Mapping[str, Any] | None
    adaptive: Adaptive | None
    rerank: bool | float
    certificate: Certificate | None
    weights: Mapping[str, Any] | None

    def __init__(
        self,
        schedule: Schedule,
        ranker: Any = "text-attention",
        *,
        base_model_name_or_path: str | None = None,
        model_type: str | None = None,
        search: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
        adaptive: Adaptive | None = None,
        rerank: bool | float = True,
        certificate: Certificate | None = None,
        weights: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(schedule, Schedule):
            raise BadInput(f"schedule is {schedule!r}; pass a thinsight.Schedule")
        if adaptive is not None and adaptive.num_layers != schedule.num_layers:
            raise BadInput(
                f"adaptive has {adaptive.num_layers} layers but the schedule {schedule.num_layers}; "
                "pass adaptive.mean() as the schedule"
            )
        name, texts = base_model_name_or_path, ("base_model_name_or_path", "model_type")
        for field, value in zip((*texts, "search", "measured"), (name, model_type, search, measured), strict=True):
            kind, word = (str, "text") if field in texts else (Mapping, "dict")
            if value is not None and not isinstance(value, kind):
                raise BadInput(f"{field} is {value!r}; it must be a {word} or None")
        object.__setattr__(self, "schedule", schedule)
        object.__setattr__(self, "ranker", _ranker_dict(ranker))
        object.__setattr__(self, "base_model_name_or_path", None if name is None else public_name(name))
        object.__setattr__(self, "model_type", model_type)
        object.__setattr__(self, "search", read_only(search))
        object.__setattr__(self, "measured", read_only(measured))
        object.__setattr__(self, "adaptive", adaptive)
        object.__setattr__(self, "rerank", check_rerank(rerank))
        object.__setattr__(self, "weights", None if weights is None else _weights(weights))
        object.__setattr__(self, "certificate", None if certificate is None else self._bound(certificate))

    def _bound(self, certificate: Any) -> Certificate:
        """The certificate as this reduction's own; refused where it is of another one."""
        if not isinstance(certificate, Certificate):
            raise BadInput(f"certificate is {certificate!r}; pass what thinsight.certify gave, or None")
        promised, without = certificate.schedule, "pass the reduction it was made for, or certificate=None"
        if promised is None and not self.schedule.is_full:
            raise BadInput(
                f"certificate promises nothing but the full model, and schedule is {self.schedule!r}; {without}"
            )
        if promised is not None and promised != self.schedule:
            raise BadInput(f"certificate is of {promised!r}, and schedule is {self.schedule!r}; {without}")
        adaptive = None if self.adaptive is None else self.adaptive.to_dict()
        told = json.dumps([_plain(self.ranker), adaptive, self.rerank], sort_keys=True, default=repr)
        subject = _hash(told)[:16]
        if certificate.subject not in ("", subject):
            raise BadInput(f"certificate is of another ranker, adaptive or rerank than this reduction's; {without}")
        return replace(certificate, subject=subject)

    def __repr__(self) -> str:
        facts = [repr(self.schedule), f"ranker {self.ranker['name']!r}"]
        facts += [f"{key}={value!r}" for key, value in self.ranker.items() if key != "name"]
        facts += [] if self.adaptive is None else ["adaptive"]
        facts += [] if self.rerank is True else [f"rerank={self.rerank}"]
        facts += [f"for {name!r}" for name in (self.model_type, self.base_model_name_or_path) if name]
        records = (("searched", self.search), ("measured", self.measured), ("certified", self.certificate))
        facts += [word for word, record in records if record]
        return brief(f"Reduction({', '.join(facts)})")

    def _tables(self) -> Iterable[shown.Table]:
        settings = [f"{key} {value}" for key, value in self.ranker.items() if key != "name"]
        anew = "always" if self.rerank is True else f"once fewer than {self.rerank} of the ranked are to stay"
        known = {
            "ranker": ", ".join([self.ranker["name"], *settings]),
            "ranked anew": anew if self.rerank else "never",
            "for": " ".join(filter(None, (self.model_type, self.base_model_name_or_path))),
            "adaptive": "" if self.adaptive is None else repr(self.adaptive),
        }
        own = [shown.facts_table("Reduction", known.items()), schedule_table(self.schedule)]
        return own if self.certificate is None else [*own, *self.certificate._tables()]

    def _drawings(self) -> Iterable[Markup]:
        return self.schedule._drawings() if self.adaptive is None else self.adaptive._drawings()

    def average(self, of: Callable[[Schedule], float]) -> float:
        """A function of a prompt's schedule, such as its cost, for the average prompt."""
        return of(self.schedule) if self.adaptive is None else self.adaptive.average(of)

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write ``reduction_config.json`` and a model card into a folder, made where needed, each whole or not at all.

        A README.md that was not written here, or was changed since, is left alone, with a warning.

        Raises:
            ThinsightError: a value that JSON cannot hold, or a folder that cannot be written.
        """
        folder, remedy = user_path(save_directory, "folder"), "pass a writable folder"
        config, card = self._encoded(), folder / CARD_NAME
        try:
            mine = _is_ours(card)
        except OSError as error:
            raise StorageError(f"{card} cannot be read ({error.strerror or error}); {remedy}") from None
        if mine:
            write_atomically(card, _card(self), remedy)
        else:
            warnings.warn(f"{card} {_LEFT_ALONE}", stacklevel=2)
        write_atomically(folder / CONFIG_NAME, config, remedy)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> Reduction:
        """Read a reduction from a folder, or from the Hugging Face Hub when there is no such folder.

        Args:
            pretrained_model_name_or_path: a folder, or ``owner/name`` on the Hub.
            revision: Hub only: branch, tag or commit.
            token: Hub only: access token; None uses the one stored by ``hf auth login``.

        Raises:
            ThinsightError: nothing there, or a config that is not exactly what this version writes.
        """
        name = os.fspath(pretrained_model_name_or_path)
        folder = user_path(name, "reduction")
        if folder.is_dir():
            path = folder / CONFIG_NAME
            if not path.is_file():
                raise BadInput(f"folder {folder} has no {CONFIG_NAME}; pass a folder that a search wrote")
        elif folder.exists():
            raise BadInput(f"{folder} is a file; pass the folder that holds {CONFIG_NAME}")
        elif _HUB_ID.fullmatch(name):
            path = _download(name, revision, token)
        else:
            raise BadInput(f"there is no folder {folder}; pass a folder with {CONFIG_NAME} or a Hub id owner/name")
        return cls.from_dict(read_object(path, "search again or restore the file"), str(path))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload thinsight reduction",
    ) -> str:
        """Upload config and model card to a Hub repository, made where needed; gives the commit's URL.

        A README.md there that was not written here, or was changed since, is left alone, with a warning.

        Raises:
            ThinsightError: the Hub refused or could not be reached.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, RemoteEntryNotFoundError, RevisionNotFoundError

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            try:
                target = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
                try:
                    ours = _is_ours(Path(api.hf_hub_download(target, CARD_NAME, revision=revision)))
                except (RemoteEntryNotFoundError, RevisionNotFoundError):
                    ours = True
                commit = api.upload_folder(
                    repo_id=target,
                    folder_path=folder,
                    revision=revision,
                    commit_message=commit_message,
                    ignore_patterns=None if ours else CARD_NAME,
                )
            except (HfHubHTTPError, OSError, ValueError) as error:  # the last: a name, or a card, that is refused
                raise StorageError(f"repo_id {repo_id!r} could not be pushed to: {error}") from None
        if not ours:
            warnings.warn(f"{CARD_NAME} of {target} {_LEFT_ALONE}", stacklevel=2)
        return str(commit.commit_url)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, which may be changed: what ``reduction_config.json`` holds."""
        config = {
            "schema_version": SCHEMA_VERSION,
            "thinsight_version": __version__,
            "base_model_name_or_path": self.base_model_name_or_path,
            "model_type": self.model_type,
            "num_layers": self.schedule.num_layers,
            "keep_rates": list(self.schedule.keep_rates),
            "ranker": _plain(self.ranker),
            "search": _plain(self.search),
            "measured": _plain(self.measured),
        }
        if self.adaptive is not None:
            config["adaptive"] = self.adaptive.to_dict()
        if self.rerank is not True:
            config["rerank"] = self.rerank
        if self.certificate is not None:
            config["certificate"] = self.certificate.to_dict()
        if self.weights is not None:
            config["weights"] = _plain(self.weights)
        return config

    @classmethod
    def from_dict(cls, config: dict[str, Any], where: str = CONFIG_NAME) -> Reduction:
        """Back from `to_dict`; ``where`` names it in messages.

        Raises:
            ThinsightError: it is not exactly what this version writes.
        """
        version = config.get("schema_version")
        if isinstance(version, bool) or version != SCHEMA_VERSION:
            raise BadInput(
                f"{where}: schema_version is {version!r}, this thinsight reads {SCHEMA_VERSION}; "
                "upgrade thinsight or search again"
            )
        unknown = sorted(config.keys() - {*_KEYS, *_OPTIONAL_KEYS})
        if unknown:
            raise BadInput(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_KEYS)}")
        missing = [key for key in _KEYS if key not in config]
        if missing:
            raise StorageError(f"{where}: {missing[0]!r} is missing; search again or restore the file")
        for key, kind, words in (("thinsight_version", str, "a text"), ("ranker", dict, "an object with a name")):
            if not isinstance(config[key], kind):
                raise BadInput(f"{where}: {key} is {config[key]!r}; it must be {words}")
        try:
            return cls(
                _schedule(config["keep_rates"], config["num_layers"]),
                config["ranker"],
                adaptive=Adaptive.from_dict(config["adaptive"]) if "adaptive" in config else None,
                rerank=config.get("rerank", True),
                certificate=_certificate(config["certificate"]) if "certificate" in config else None,
                weights=config.get("weights"),
                **{key: config[key] for key in ("base_model_name_or_path", "model_type", "search", "measured")},
            )
        except (BadInput, StorageError) as error:
            raise type(error)(f"{where}: {error}") from None

    def _encoded(self) -> str:
        try:
            text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
            parse_json(text)  # what could not be read back is not written
        except (TypeError, ValueError, RecursionError) as error:
            raise BadInput(
                f"reduction cannot be saved as JSON ({error}); "
                "ranker settings, search and measured may hold texts, finite numbers, lists and dicts"
            ) from None
        return text


def public_name(name: str) -> str:
    """What others may see of a model's or a data set's name: of a path its last part alone.

    Hub ids and names without a place stay as they are. A snapshot in the Hub's cache is the id it came from.
    """
    if (snapshot := _SNAPSHOT.search(name)) is not None:
        return snapshot[1].replace("--", "/")
    if name[:1] in ("/", ".", "~") or "\\" in name or name.count("/") > 1 or _DRIVE.match(name):
        return PureWindowsPath(name).name or name
    return name


def _plain(value: Any) -> Any:
    """What `read_only` was made of."""
    if isinstance(value, ReadOnlyDict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, ReadOnlyList) else value


def check_rerank(rerank: Any) -> bool | float:
    """`rerank` as it is kept: True, False, or a number in (0, 1); anything else is refused."""
    if isinstance(rerank, bool):
        return rerank
    if not 0 < real(rerank) < 1:
        raise BadInput(
            f"rerank is {rerank!r}; it must be True (rank at every reduction), False (only at the first) or "
            "a number in (0, 1)"
        )
    return float(rerank)


def _certificate(stored: Any) -> Certificate:
    certificate = Certificate.from_dict(stored)
    if not certificate.subject:
        raise BadInput("certificate.subject is empty; search again or restore the file")
    return certificate


def _weights(told: Any) -> Mapping[str, Any]:
    """What `thinsight.runtime.weights_of` gives, as it is kept; anything else is refused."""
    asked = "it must be what thinsight.runtime.weights_of gives, or None"
    if not isinstance(told, Mapping) or set(told) != {"revision", "dtype", "numbers"}:
        raise BadInput(f"weights is {told!r}; {asked}")
    revision, dtype, numbers = told["revision"], told["dtype"], told["numbers"]
    if not isinstance(dtype, str) or not (revision is None or isinstance(revision, str)):
        raise BadInput(f"weights has revision {revision!r} and dtype {dtype!r}; {asked}")
    lists = numbers.values() if isinstance(numbers, Mapping) else [None]
    if any(not isinstance(own, (list, tuple)) or not own or not all(map(_is_number, own)) for own in lists):
        raise BadInput(f"weights.numbers is {numbers!r}; {asked}")
    found: Mapping[str, Any] = read_only(told)
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _schedule(keep_rates: Any, num_layers: Any) -> Schedule:
    if not isinstance(keep_rates, list):
        raise BadInput(f"keep_rates is {keep_rates!r}; it must be a list of numbers in [0, 1]")
    if isinstance(num_layers, bool) or not isinstance(num_layers, int) or num_layers != len(keep_rates):
        raise BadInput(f"num_layers is {num_layers!r} but there are {len(keep_rates)} keep_rates; they must agree")
    return Schedule(keep_rates)


def _ranker_dict(ranker: Any) -> Mapping[str, Any]:
    if isinstance(ranker, str):
        found: dict[str, Any] = {"name": ranker}
    elif isinstance(ranker, Mapping):
        found = dict(ranker)
    elif hasattr(ranker, "name") and isinstance(getattr(ranker, "settings", None), Mapping):
        found = {"name": ranker.name, **ranker.settings}
    else:
        raise BadInput(f"ranker is {ranker!r}; pass a name, a dict with a name, or a ranker object")
    if not isinstance(found.get("name"), str) or not found["name"]:
        raise BadInput(f"ranker is {ranker!r}; its name must be a text, such as 'text-attention'")
    return ReadOnlyDict(read_only(found))


def _download(repo_id: str, revision: str | None, token: str | bool | None) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(repo_id, CONFIG_NAME, revision=revision, token=token))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise BadInput(
            f"there is no folder {repo_id!r}, and the Hugging Face Hub gave no {CONFIG_NAME} for it "
            f"({type(error).__name__}); check the name and the connection"
        ) from None

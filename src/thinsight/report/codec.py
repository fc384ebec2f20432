"""Turns a tree of plain dataclasses into JSON values and back, strictly.

Knows nothing about reports: it reads the type hints of whatever dataclass it is given. Types that JSON
has no word for (an image, say) are left to the hooks of the caller.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..errors import BadInput, StorageError, ThinsightError

Hooks = Mapping[type, Callable[[Any], Any]]


def encode(value: Any, hooks: Hooks | None = None) -> Any:
    """The JSON value of a dataclass tree; NaN becomes null, infinity is refused.

    Raises:
        ThinsightError: a value that JSON cannot hold and no hook covers.
    """
    for kind, hook in (hooks or {}).items():
        if isinstance(value, kind):
            return hook(value)
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if math.isinf(value):
            raise BadInput("a report cannot hold an infinite number; give a finite one or leave it out")
        return None if math.isnan(value) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name), hooks) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [encode(item, hooks) for item in value]
    if isinstance(value, Mapping):
        return {str(key): encode(item, hooks) for key, item in value.items()}
    raise BadInput(f"a report cannot hold a {type(value).__name__}; convert it to plain numbers or text")


def decode(kind: Any, value: Any, where: str, hooks: Hooks | None = None) -> Any:
    """The value of type `kind` that a JSON value stands for; `where` names it in errors.

    Raises:
        ThinsightError: an unknown or missing key, or a value of another type.
    """
    if isinstance(kind, type) and kind in (hooks or {}):
        return (hooks or {})[kind](value)
    if get_origin(kind) in (Union, types.UnionType):
        return _decode_optional(kind, value, where, hooks)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, value, where, hooks)
    if get_origin(kind) is tuple:
        return _decode_tuple(kind, value, where, hooks)
    if get_origin(kind) is dict:
        if not isinstance(value, dict):
            raise _wrong(where, "an object", value)
        return {key: decode(get_args(kind)[1], item, f"{where}.{key}", hooks) for key, item in value.items()}
    return _decode_scalar(kind, value, where)


def _decode_optional(kind: Any, value: Any, where: str, hooks: Hooks | None) -> Any:
    if value is None:
        return None
    (inner,) = [arg for arg in get_args(kind) if arg is not type(None)]
    return decode(inner, value, where, hooks)


def _decode_dataclass(kind: Any, value: Any, where: str, hooks: Hooks | None) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    hints = get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise StorageError(f"{where}: unknown key {unknown[0]!r}; known keys are {', '.join(fields)}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in value:
            raise StorageError(f"{where}: key {name!r} is missing; write the report anew")
    return kind(**{k: decode(hints[k], v, f"{where}.{k}", hooks) for k, v in value.items()})


def _decode_tuple(kind: Any, value: Any, where: str, hooks: Hooks | None) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _wrong(where, "a list", value)
    args = get_args(kind)
    inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else list(args)
    if len(inner) != len(value):
        raise _wrong(where, f"a list of {len(inner)}", value)
    return tuple(
        decode(one, item, f"{where}[{i}]", hooks)
        for i, (one, item) in enumerate(zip(inner, value, strict=True))
    )


def _decode_scalar(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:  # JSON values as they are, such as a ranker's settings
        return value
    if kind is float:
        if value is None:
            return math.nan
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        raise _wrong(where, "a finite number", value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    raise _wrong(where, {bool: "true or false", str: "text", int: "a whole number"}[kind], value)


def _wrong(where: str, expected: str, value: Any) -> ThinsightError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return StorageError(f"{where}: expected {expected}, got {shown}; write the report anew")

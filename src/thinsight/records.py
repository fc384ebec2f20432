"""Records on disk: JSON read strictly, dataclasses as JSON values, files that appear whole or not at all.

A checksum tells a damaged record, and a hostile one cannot nest or count without end.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, TypeAdapter, ValidationError

from .errors import BadInput, StorageError

MAX_DEPTH = 64  # lists and objects within each other
MAX_DIGITS = 308  # of a whole number: a longer one is beyond what a float can hold
CHECKSUM = "checksum"
_PART = ".thinsight-*.part"

Hooks = Mapping[type, Callable[[Any], Any]]
Undefined = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number of a record that may be NaN, which JSON writes as null."""


# -- JSON --------------------------------------------------------------------------------------------------


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text: no NaN or infinity, no key twice, bounded nesting and digits; else ValueError."""
    try:
        value = json.loads(
            text.decode("utf-8") if isinstance(text, bytes) else text,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=_no_constant,
            object_pairs_hook=_no_repeats,
        )
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)]
    return value


def read_json(path: Path, remedy: str) -> Any:
    """The value of a JSON file, see `parse_json`; StorageError ends with ``remedy``."""
    try:
        return parse_json(path.read_bytes())
    except FileNotFoundError:
        raise StorageError(f"{path} is missing; {remedy}") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read ({error.strerror or error}); check the file") from None
    except ValueError as error:
        raise StorageError(f"{path} is not valid JSON ({error}); {remedy}") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """As `read_json`, of a file that must hold an object."""
    value = read_json(path, remedy)
    if not isinstance(value, dict):
        raise StorageError(f"{path} holds no JSON object; {remedy}")
    return value


def seal(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with a checksum of its JSON text, by which `unseal` tells a change of any value."""
    return {**record, CHECKSUM: _checksum(record)}


def unseal(record: Any) -> dict[str, Any]:
    """The record without its checksum; ValueError where it has none, or another one than its values give."""
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    bare = {key: value for key, value in record.items() if key != CHECKSUM}
    if len(bare) == len(record):
        raise ValueError("it has no checksum: it was changed, or an older thinsight wrote it")
    if record[CHECKSUM] != _checksum(bare):
        raise ValueError("its checksum differs: it was changed after it was written")
    return bare


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """As `read_object`, of a file whose record was sealed."""
    record = read_json(path, remedy)
    try:
        return unseal(record)
    except ValueError as error:
        raise StorageError(f"{path} is damaged ({error}); {remedy}") from None


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, allow_nan=False).encode()).hexdigest()[:16]


def _whole(digits: str) -> int:
    if (length := len(digits.lstrip("-"))) > MAX_DIGITS:
        raise ValueError(f"a whole number of {length} digits is too long")
    return int(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"{digits[:20]} is too large a number")
    return number


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"a key is repeated, {key[:60]!r}")
        found[key] = value
    return found


# -- dataclasses -------------------------------------------------------------------------------------------


def encode(value: Any, hooks: Hooks | None = None) -> Any:
    """The JSON value of a tree of dataclasses; NaN becomes null, half of a surrogate pair its escape.

    Args:
        value: dataclasses, lists, mappings and plain values.
        hooks: how values of types that JSON has no word for are put, such as an image by its file's name.

    Raises:
        ThinsightError: an infinite number, or a value that JSON cannot hold and no hook covers.
    """
    for kind, hook in (hooks or {}).items():
        if isinstance(value, kind):
            return hook(value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return writable(value)
    if isinstance(value, float):
        if math.isinf(value):
            raise BadInput("a record cannot hold an infinite number; give a finite one or leave it out")
        return None if math.isnan(value) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name), hooks) for f in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [encode(item, hooks) for item in value]
    if isinstance(value, Mapping):
        return {writable(str(key)): encode(item, hooks) for key, item in value.items()}
    if hasattr(value, "tolist"):  # an array, or a number of one
        return encode(value.tolist(), hooks)
    raise BadInput(f"a record cannot hold a {type(value).__name__}; convert it to plain numbers or text")


def decode(kind: Any, value: Any, where: str, remedy: str, context: Any = None) -> Any:
    """The dataclass of type ``kind`` that a value from `parse_json` stands for, every field strictly of its type.

    Messages name ``where`` it was read and the ``remedy``; ``context`` is for validators in the annotations.

    Raises:
        ThinsightError: an unknown or missing key, or a value of another type or out of its range.
    """
    try:
        # as text, since only there is a list what a tuple is written as
        return _adapter(kind).validate_json(json.dumps(value), strict=True, extra="forbid", context=context)
    except ValidationError as error:
        first: Any = error.errors(include_url=False)[0]
        place = where + "".join(f"[{at}]" if isinstance(at, int) else f".{at}" for at in first["loc"])
        raise StorageError(f"{_complaint(first, place, where)}; {remedy}") from None


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


_EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "an object",
    "dict_type": "an object",
    "float_type": "a finite number",
    "int_type": "a whole number",
    "string_type": "text",
    "tuple_type": "a list",
}
_ABOUT_KEYS = {"missing": "key {} is missing", "unexpected_keyword_argument": "unknown key {}"}


def _complaint(error: Any, place: str, where: str) -> str:
    """What is wrong, from one of pydantic's errors."""
    kind, name = error["type"], error["loc"][-1] if error["loc"] else ""
    if kind == "value_error":
        cause = error["ctx"]["error"]
        return str(cause) if where in str(cause) else f"{place}: {cause}"
    if kind in _ABOUT_KEYS and isinstance(name, str):
        return f"{place.removesuffix(f'.{name}')}: {_ABOUT_KEYS[kind].format(repr(name[:60]))}"
    shown = repr(error["input"])
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if kind in _EXPECTED:
        return f"{place}: expected {_EXPECTED[kind]}, got {shown}"
    return f"{place}: {error['msg'][:200]}, got {shown}"


# -- files -------------------------------------------------------------------------------------------------


def user_path(path: str | os.PathLike[str], name: str) -> Path:
    """A path that a user gave by the option or argument ``name``, its ``~`` or ``~user`` replaced by that home.

    Raises:
        ThinsightError: it holds a NUL character, or begins with a user who has no home here and is no file either.
    """
    given = os.fspath(path)
    if "\0" in given:
        raise BadInput(f"{name} {given!r} holds a NUL character, which no path may: leave it out")
    found = os.path.expanduser(given)
    if found.startswith("~") and not os.path.lexists(found.split(os.sep)[0]):
        raise BadInput(f"{name} {given!r} begins with a user who has no home here: write the whole path")
    return Path(found)


def writable(text: str) -> str:
    """The text, any half of a surrogate pair in it (an odd byte of a file name, say) as its escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_atomically(
    path: Path, content: str | bytes, remedy: str = "free the disk, or choose a folder you may write"
) -> None:
    """Write a file whole or not at all, as `replace_file` does; its folder is made where needed. Half of a surrogate
    pair in a text is written as its escape. StorageError ends with ``remedy``."""
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, data)
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror or error}); {remedy}") from None


def replace_file(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a file in a folder that exists under a name of its own, which follows no link, and then put it in its place
    in one step; ``durable`` waits until the disk has it. Whatever ends that early, a full disk or Ctrl-C, leaves the
    old file and no other. Raises OSError."""
    with _part_of(path.parent) as part:
        with open(part, "xb", buffering=0) as file:
            _write_all(file, data)
            if durable:
                os.fsync(file.fileno())
        os.replace(part, path)


def append_line(path: Path, line: str, remedy: str) -> None:
    """Append a line to a file that exists; it is on disk when this returns. Where that fails, the file is cut back to
    what it was, so that the next line does not continue half of this one. StorageError ends with ``remedy``."""
    try:
        with open(path, "r+b", buffering=0) as file:
            size, content = file.seek(0, os.SEEK_END), line.encode() + b"\n"
            try:
                _write_all(file, content)
                os.fsync(file.fileno())
            except BaseException as error:
                with suppress(OSError):
                    # a line that was whole when Ctrl-C came is kept: it is finished work
                    if isinstance(error, OSError) or file.seek(0, os.SEEK_END) < size + len(content):
                        file.truncate(size)
                raise
    except OSError as error:
        raise StorageError(f"{path} cannot be written ({error.strerror or error}); {remedy}") from None


def probe(folder: Path) -> None:
    """Make a folder, and find out now whether files can be made in it; OSError if not."""
    folder.mkdir(parents=True, exist_ok=True)
    with _part_of(folder) as part:
        open(part, "xb").close()


def sweep(folder: Path) -> None:
    """Remove what killed processes left in a folder and the folders in it, where no other one writes."""
    for part in (*folder.glob(_PART), *folder.glob(f"*/{_PART}")):
        with suppress(OSError):
            part.unlink()


@contextmanager
def _part_of(folder: Path) -> Iterator[Path]:
    """A name that no other process uses; what is left under it in the end goes."""
    part = folder / _PART.replace("*", secrets.token_hex(8))
    try:
        yield part
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _write_all(file: FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]

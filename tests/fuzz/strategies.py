"""Hostile input: JSON values, texts, file damage and command lines, as hypothesis strategies.

Knows nothing about what reads them.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# Numbers that JSON allows and arithmetic does not like, as they are written.
HOSTILE_NUMBERS = (
    "0", "-0.0", "1", "-1", "0.5", "1.0000000001", "1e-320", "1e308", "1e400", "-1e400",
    "NaN", "Infinity", "-Infinity", "9007199254740993", "1" + "0" * 400, "-" + "9" * 400, "7" * 5000,
)  # fmt: skip

HOSTILE_TEXTS = (
    "", " ", "\t", "\x00", "\x1b[31mred\x1b[0m", "\x1b]0;title\x07", "\ud800", "a\nb: c", "---\n", "\u2028",
    "\u202etxt.exe", "<script>alert(1)</script>", "{{ 7 * 7 }}", "| a | b |", "`rm -rf /`", "$(id)", "'; --",
    "~", "~nouser/x", "/dev/null", "..", ".", "nan", "inf", "-1", "1e400", "0.5", "true", "null", "demo",
    "demo:", "demo:calibration", "auto", "text-attention", "text-attention:rows=null", "random:seed=-1",
    "visionzip:keep=0.25", "gsearch", "psigmoid", "flops", "a" * 5000, "é" * 300, "<image>", "<image 2>",
)  # fmt: skip

texts = st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text(max_size=40))


class Raw(str):
    """A JSON number as it is written, where Python's own writer could not write it."""


def _dump(value: Any) -> str:
    """JSON text of a value that may hold `Raw` numbers and lone surrogates."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {_dump(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_dump, value)) + "]"
    return json.dumps(value)


def nested(depth: int, kind: str) -> Raw:
    """A list or object that is so deep."""
    return Raw("[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "0" + "}" * depth)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(HOSTILE_NUMBERS).map(Raw),
        st.floats(allow_nan=False, allow_infinity=False),
        st.integers(-(10**6), 10**6),
        texts,
        st.builds(nested, st.sampled_from([50, 900, 20_000]), st.sampled_from(["list", "object"])),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the parts of a JSON value are."""
    inner: list[tuple[Any, ...]] = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        inner += _paths(each, (*path, key))
    return inner


@st.composite
def changed_json(draw: st.DrawFn, value: Any) -> str:
    """The text of a JSON value in which up to three parts are replaced or taken out, or a key is added."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_paths(value)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return _dump(draw(json_values))
            if isinstance(value, dict):
                value[draw(texts)] = draw(json_values)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        if isinstance(holder, dict) and draw(st.integers(0, 3)) == 0:
            del holder[path[-1]]
        else:
            holder[path[-1]] = draw(json_values)
    return _dump(value)


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Bytes of a file after one or two accidents: a changed byte or digit, a hole, a cut, lines twice or in
    another order."""
    for _ in range(draw(st.integers(1, 2))):
        if not content:
            break
        accident = draw(st.sampled_from(_ACCIDENTS))
        content = accident(content, draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 255)))
    return content


def _change_byte(content: bytes, place: int, value: int) -> bytes:
    return content[:place] + bytes([value]) + content[place + 1 :]


def _change_digit(content: bytes, place: int, value: int) -> bytes:
    digits = [i for i, each in enumerate(content) if 48 <= each <= 57]
    return _change_byte(content, digits[place % len(digits)], 48 + value % 10) if digits else content


def _hole(content: bytes, place: int, value: int) -> bytes:
    return content[:place] + content[place + 1 + value % 16 :]


def _cut(content: bytes, place: int, value: int) -> bytes:
    return content[:place]


def _repeat_line(content: bytes, place: int, value: int) -> bytes:
    lines = content.splitlines(keepends=True)
    return b"".join([*lines, lines[place % len(lines)]])


def _swap_lines(content: bytes, place: int, value: int) -> bytes:
    lines = content.splitlines(keepends=True)
    first, second = place % len(lines), value % len(lines)
    lines[first], lines[second] = lines[second], lines[first]
    return b"".join(lines)


_ACCIDENTS: tuple[Callable[[bytes, int, int], bytes], ...] = (
    _change_byte,
    _change_digit,
    _hole,
    _cut,
    _repeat_line,
    _swap_lines,
)

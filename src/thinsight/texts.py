"""Texts of users, files and models, made safe for where they go: one function for each place.

They may hold anything: control characters that move a terminal's cursor, line breaks that add a line to a YAML block,
quotes that end a shell word. What is not plain text is shown as its escape (``\\x1b``), never dropped.
"""

from __future__ import annotations

import html as _html
import json
import re
import shlex
from collections.abc import Iterable, Mapping
from typing import Any

import yaml as _yaml

MESSAGE = 1000  # characters of an error or a note
BRIEF = 280  # characters of an object in one line

# controls, line and paragraph separators, what overrides the reading direction, halves of characters
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SPACE = re.compile(r"\s+")
_MARKDOWN = re.compile(r"([\\`*\[\]<>|~&$#]|(?<![^\W_])_|_(?![^\W_]))")
_CODE = re.compile(r"[\w./:@+,=%~ -]+")
_ELLIPSIS = " ... "


def terminal(value: object) -> str:
    """One line for a terminal: nothing in it moves the cursor, and line breaks and tabs are spaces."""
    return _visible(_SPACE.sub(lambda found: " " if _UNSAFE.search(found[0]) else found[0], str(value)))


def html(value: object) -> str:
    """For an HTML page, as text or as an attribute's value; line breaks and tabs stay."""
    return _html.escape(_visible(str(value), but="\n\t"), quote=True)


def markdown(value: object) -> str:
    """For Markdown, as one line of a paragraph or one cell of a table."""
    return _MARKDOWN.sub(r"\\\1", terminal(value).strip())


def code(value: object) -> str:
    """Likewise, as a code span where the text is plain enough to be one."""
    text = terminal(value).strip()
    return f"`{text}`" if _CODE.fullmatch(text) else markdown(text)


def yaml(values: Mapping[str, Any]) -> str:
    """Lines of a YAML block, such as a model card begins with."""
    return _yaml.safe_dump(dict(values), sort_keys=False, width=2**16)


def shell(words: Iterable[str]) -> str:
    """A command that bash, zsh and ksh read back as these very words, on one line."""
    return " ".join(_octal(word) if _UNSAFE.search(word) else shlex.quote(word) for word in words)


def python(value: str) -> str:
    """A Python literal."""
    return json.dumps(value, ensure_ascii=False) if value.isprintable() else repr(value)


def capped(text: str, limit: int = MESSAGE) -> str:
    """At most ``limit`` characters; the middle goes, for a message names the field first and the remedy last."""
    if len(text) <= limit:
        return text
    kept = limit - len(_ELLIPSIS)
    return f"{text[: kept - kept // 2]}{_ELLIPSIS}{text[-(kept // 2) :]}"


def counted(number: float, noun: str) -> str:
    """A number with what it is of, in the plural but for one: "1 loss", "2,048 losses"."""
    many = noun if number == 1 else f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number:,.6g} {many}" if isinstance(number, float) else f"{number:,} {many}"


def brief(value: object, limit: int = BRIEF) -> str:
    """One short line, as objects are shown by ``repr``."""
    return capped(terminal(value), limit)


def _visible(text: str, but: str = "") -> str:
    return _UNSAFE.sub(lambda found: found[0] if found[0] in but else ascii(found[0])[1:-1], text)


def _octal(word: str) -> str:
    """What is not plain in octal, as the operating system hands it over; half a character that it cannot is "?"."""

    def escaped(found: re.Match[str]) -> str:
        try:
            return "".join(f"\\{byte:03o}" for byte in found[0].encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            return "\\077"

    quoted = re.sub(r"([\\'])", r"\\\1", word)
    return f"$'{_UNSAFE.sub(escaped, quoted)}'"

"""Text files read piece by piece, so that the first examples of a large file are there at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import BadInput

_PIECE = 2**20  # characters
_SPACE = " \t\r\n"


def read_text(path: Path, newline: str | None = None) -> Iterator[str]:
    """The lines of a UTF-8 file; what cannot be read is refused."""
    try:
        # one that splits at U+2028 would break texts that JSON allows
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield from file
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"cannot read {path} as UTF-8 text: {error}") from error


def objects(path: Path, form: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file that holds one JSON list, each with its place: "data.json, entry 3 (line 12)"."""
    decoder = json.JSONDecoder()
    text = _Text(path)
    text.skip(_SPACE)
    if text.take(1) != "[":
        raise BadInput(f"{path} is no JSON list: {form}")
    number = 0
    while True:
        text.skip(_SPACE + ("," if number else ""))
        if text.look() == "]":
            return
        number += 1
        where = f"{path}, entry {number} (line {text.line})"
        found = text.decode(decoder, where, form)
        if not isinstance(found, dict):
            raise BadInput(f"{where} is not a JSON object: {form}")
        yield where, found


class _Text:
    """A file's text from where it was read up to."""

    def __init__(self, path: Path) -> None:
        self._pieces = self._read(path)
        self._held, self._at = "", 0
        self.line = 1

    def look(self) -> str:
        """The next character; "" at the end."""
        while self._at >= len(self._held) and self._more():
            pass
        return self._held[self._at : self._at + 1]

    def skip(self, characters: str) -> None:
        """Go on to what is none of these characters."""
        while (found := self.look()) and found in characters:
            self.take(1)

    def take(self, count: int) -> str:
        """The next characters, which are then behind."""
        taken = self._held[self._at : self._at + count]
        self._at += len(taken)
        self.line += taken.count("\n")
        return taken

    def decode(self, decoder: json.JSONDecoder, where: str, form: str) -> Any:
        """The JSON value that begins here."""
        while True:
            try:
                found, end = decoder.raw_decode(self._held, self._at)
            except RecursionError:
                raise BadInput(f"{where} is not JSON (nested too deep): {form}") from None
            except json.JSONDecodeError as error:
                if self._more():  # it may go on in the next piece
                    continue
                line = self.line + self._held.count("\n", self._at, error.pos)
                raise BadInput(f"{where} is not JSON ({error.msg}, line {line}): {form}") from None
            except ValueError as error:
                raise BadInput(f"{where} cannot be read ({error}): write the number as a text") from None
            if end < len(self._held) or not self._more():  # a number may go on
                self.take(end - self._at)
                return found

    def _more(self) -> bool:
        """Read the next piece; False where there is none."""
        piece = next(self._pieces, "")
        self._held, self._at = self._held[self._at :] + piece, 0
        return bool(piece)

    @staticmethod
    def _read(path: Path) -> Iterator[str]:
        try:
            with path.open(encoding="utf-8-sig") as file:
                while piece := file.read(_PIECE):
                    yield piece
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(f"cannot read {path} as UTF-8 text: {error}") from error

"""What a client is told that asks for something that cannot be done."""

from __future__ import annotations

from typing import Any

from ..errors import BadInput


class BadRequest(BadInput):
    """A request that cannot be answered as it is.

    Args:
        field: the field of the request that is to be mended, such as messages[0].content[1].image_url.url.
        status: of HTTP.
        code: a word for programs.
    """

    def __init__(self, message: str, field: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        self.status = status
        self.code = code


def as_json(message: str, kind: str, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as the OpenAI API writes it."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}

"""The one error that thinsight raises for bad input.

Knows nothing about where the input came from; the command turns it into one line and exit code 2.
"""

from __future__ import annotations

__all__ = ["ThinsightError"]


class ThinsightError(ValueError):
    """Bad input. The message is one line that names the field, its value and what to do about it.

    Line breaks inside a quoted value (a file's content, another library's message) are folded into
    spaces, so a caller may print the message as it is.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))

"""Ctrl-C, SIGTERM and SIGHUP: one line and an exit code, where Python shows a traceback or leaves files.

Loading torch and transformers takes seconds, and what they make of a KeyboardInterrupt in the middle of an import is up
to them: until the work begins a signal ends the process at once, from then on it raises, so that whatever is open is
closed and removed. Imports as little as it can, as Python's own answer stands until it is loaded.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False  # typing takes longer to load than all that stands here
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any


_SIGNALS = [number for number in signal.Signals if number.name in ("SIGINT", "SIGTERM", "SIGHUP")]
INTERRUPTED = 130  # exit code: 128 and the number of SIGINT
_came: int = signal.SIGINT


def end_on_interrupt() -> None:
    """From here on a signal ends the process at once: there is nothing yet to clean up. One that the process was told
    to ignore, or that it handles, goes on doing so."""
    _replace({signal.default_int_handler, signal.SIG_DFL}, _end)


def raise_on_interrupt() -> None:
    """From here on a signal raises KeyboardInterrupt, if `end_on_interrupt` has changed that."""
    _replace({_end}, _raise)


def leave_on_interrupt() -> None:
    """When all is said, Ctrl-C ends the process without another word; other signals ask for what is under way."""
    _replace({_end, _raise}, _leave)


def exit_code() -> int:
    """128 and the number of the signal that came."""
    return 128 + _came


def what_came() -> str:
    """The signal that came, in words."""
    return "interrupted" if _came == signal.SIGINT else f"ended by {signal.Signals(_came).name}"


def _replace(known: set[Any], handler: Callable[[int, FrameType | None], None]) -> None:
    for number in _SIGNALS:
        if signal.getsignal(number) in known:
            try:
                signal.signal(number, handler)
            except ValueError:  # not the main thread, which alone may say
                return


def _end(number: int, frame: FrameType | None) -> None:
    global _came
    _came = number
    try:
        os.write(2, f"{what_came()}\n".encode())
    finally:  # also where nobody is left to read it
        os._exit(exit_code())


def _raise(number: int, frame: FrameType | None) -> None:
    global _came
    _came = number
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    if number == signal.SIGINT:
        os._exit(128 + number)

"""Ctrl-C while the command starts: one line and exit code 130, where Python would show a traceback.

Loading torch and transformers takes seconds, and what they make of a KeyboardInterrupt in the middle of an
import is up to them. Imports nothing but the standard library. Knows nothing about commands.
"""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

__all__ = ["INTERRUPTED", "end_on_interrupt", "raise_on_interrupt"]

INTERRUPTED = 130  # exit code: 128 and the number of SIGINT


def end_on_interrupt() -> None:
    """From here on Ctrl-C ends the process at once: there is nothing yet to clean up.

    A process that was told to ignore Ctrl-C, or that handles it, goes on doing so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler and _in_main_thread():
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt again, if `end_on_interrupt` has changed that."""
    if signal.getsignal(signal.SIGINT) is _end and _in_main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()

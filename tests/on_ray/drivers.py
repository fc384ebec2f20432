"""Commands as processes of their own, to be interrupted and killed. Knows nothing about Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

SECONDS = 30  # of patience with what ends, for a slow machine; an idle one takes three


class Driver:
    """`thinsight` with these arguments, in a session of its own as in a terminal."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "thinsight", *arguments]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it is ignored
        )

    def wait_for(self, true: Callable[[], bool]) -> list[psutil.Process]:
        """All processes below it, once something holds while it runs."""
        end = time.monotonic() + 10 * SECONDS
        while not true():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.01)
        return psutil.Process(self.process.pid).children(recursive=True)

    def interrupt(self) -> tuple[int, str]:
        """Ctrl-C: all processes in front of the terminal get it. Exit code and standard error."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.end()

    def terminate(self) -> tuple[int, str]:
        """As a batch system does when time is up."""
        self.process.terminate()
        return self.end()

    def kill(self) -> tuple[int, str]:
        """As when memory runs out."""
        self.process.kill()
        return self.end()

    def end(self, seconds: float = SECONDS) -> tuple[int, str]:
        """Exit code and standard error, when it has ended."""
        said = self.process.communicate(timeout=seconds)[1]
        return self.process.returncode, said


def left(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Which of them are still there after some seconds."""
    _, alive = psutil.wait_procs(processes, timeout=SECONDS)
    return [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def workers_of(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those of them that are workers."""
    found = []
    for each in processes:
        with suppress(psutil.Error):  # it has ended
            if "ray::_Actor" in " ".join(each.cmdline()):
                found.append(each)
    return found


def lines(path: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return path.read_text().count("\n") if path.exists() else 0

"""Ctrl-C, SIGTERM and SIGHUP as a process gets them: one line, its exit code, and nothing left behind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import SmallRun
from typer.testing import CliRunner

from thinsight.cli import app

ROOT = Path(__file__).resolve().parent.parent
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def started(*arguments: str, folder: Path, path: str = str(ROOT / "src")) -> subprocess.Popen[str]:
    """A Python that answers to all signals, whatever the shell that runs the tests told it to ignore."""
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: [signal.signal(number, signal.SIG_DFL) for number in SIGNALS],
    )


def result(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    out, error = process.communicate(timeout=120)
    return process.returncode, out, error


# The command itself, but that the stage which is patched says so and waits there for the signal.
WORK = """
import signal, sys
from thinsight import cli, interrupts
from thinsight.job import {module}

def wait(*_, **__):
    print("waiting", flush=True)
    while True:
        signal.pause()

{module}.{name} = wait
interrupts.end_on_interrupt()
cli.app(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "module", "name", "number", "code", "words"),
    [
        ("search", "pipeline", "measure", signal.SIGINT, 130, "interrupted"),
        ("search", "pipeline", "measure", signal.SIGTERM, 143, "ended by SIGTERM"),
        ("compare", "compare", "draw", signal.SIGINT, 130, "interrupted"),
        ("compare", "compare", "draw", signal.SIGHUP, 129, "ended by SIGHUP"),
    ],
)
def test_a_signal_in_the_work_leaves_no_temporary_files_and_says_how_to_go_on(
    command: str,
    module: str,
    name: str,
    number: signal.Signals,
    code: int,
    words: str,
    small: SmallRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = ["--model", small.model, "--data", small.calibration, "--test-data", small.test]
    options = ["--device", "cpu", "--max-new-tokens", "2", "--cache-gib", "0", "--out", "my run"]
    own = {"search": ["--max-drop", "0.7"], "compare": ["--budget", "0.5", "--methods", "fastv"]}
    given = [command, *data, *options, *own[command]]
    process = started("-c", WORK.format(module=module, name=name), *given, folder=tmp_path)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    assert list(tmp_path.glob("thinsight-*")), "the features that do not fit into memory are in files"
    process.send_signal(number)
    returned, out, error = result(process)
    again = shlex.join(["thinsight", *given, "--resume"])
    last = error.strip().split("\n")[-1]
    assert (returned, out) == (code, "")
    assert last == f"{words}: what is done is kept; continue with `{again}`"
    assert "Traceback" not in error
    assert not list(tmp_path.glob("thinsight-*"))
    assert not list(tmp_path.rglob("*.part"))
    monkeypatch.chdir(tmp_path)
    resumed = CliRunner().invoke(app, shlex.split(last.split("`")[1])[1:], catch_exceptions=False)
    assert resumed.exit_code == 0, resumed.output


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "ended by SIGTERM"),
        (signal.SIGHUP, 129, "ended by SIGHUP"),
    ],
)
@pytest.mark.parametrize("module", ["typer", "torch"])
def test_a_signal_during_an_import_is_quiet(
    module: str, number: signal.Signals, code: int, words: str, tmp_path: Path
) -> None:
    """In place of the package stands one that is interrupted while it is imported."""
    (tmp_path / f"{module}.py").write_text(
        "import os, signal\n"
        "try:\n"
        f"    os.kill(os.getpid(), signal.{number.name})\n"
        "    for _ in range(10**6): pass\n"
        "except KeyboardInterrupt:\n"
        "    raise ImportError('no traceback is worse than this one') from None\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT / "src")])
    process = started("-m", "thinsight", "search", folder=tmp_path, path=path)
    assert result(process) == (code, "", f"{words}\n")


def test_little_is_loaded_before_signals_are_dealt_with(tmp_path: Path) -> None:
    """What is loaded before has Python's own answer to Ctrl-C, a traceback."""
    code = "import sys; known = set(sys.modules); import thinsight.__main__\nprint(*sorted(set(sys.modules) - known))"
    out = result(started("-S", "-c", code, folder=tmp_path))[1]
    ours = {"thinsight", "thinsight.__main__", "thinsight.interrupts", "thinsight.version"}
    assert set(out.split()) >= ours
    assert not {"typing", "re", "threading", "pathlib", "typer", "torch"} & set(out.split())


def test_a_signal_in_the_work_is_an_exception_again(tmp_path: Path) -> None:
    code = (
        "import os, signal; from thinsight.interrupts import end_on_interrupt, raise_on_interrupt\n"
        "end_on_interrupt(); raise_on_interrupt()\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):\n"
        "    try: os.kill(os.getpid(), number); [None for _ in range(10**6)]\n"
        "    except KeyboardInterrupt: print('raised')"
    )
    assert result(started("-c", code, folder=tmp_path))[1] == "raised\n" * 3


def test_signals_that_are_ignored_stay_ignored(tmp_path: Path) -> None:
    code = (
        "import os, signal; from thinsight.interrupts import end_on_interrupt, raise_on_interrupt\n"
        "numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)\n"
        "for number in numbers: signal.signal(number, signal.SIG_IGN)\n"
        "end_on_interrupt(); raise_on_interrupt()\n"
        "for number in numbers: os.kill(os.getpid(), number)\n"
        "print('went on')"
    )
    assert result(started("-c", code, folder=tmp_path))[1] == "went on\n"


def test_a_second_signal_says_nothing_more(tmp_path: Path) -> None:
    """While the process ends, SIGTERM changes nothing and Ctrl-C ends it on the spot."""
    code = (
        "import os, signal; from thinsight.interrupts import *\n"
        "end_on_interrupt(); raise_on_interrupt(); leave_on_interrupt()\n"
        "os.kill(os.getpid(), signal.SIGTERM); print('goes on', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGINT); [None for _ in range(10**6)]; print('never')"
    )
    assert result(started("-c", code, folder=tmp_path)) == (130, "goes on\n", "")

"""Reports in Chromium, where there is one: what `make look` looks for, and that it sees what is wrong."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from report.conftest import make_report
from report.look import BROWSERS

from thinsight.report.html import write_report

pytestmark = [
    pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="there is no Chromium"),
    pytest.mark.skipif(os.name == "nt", reason="the browser is spoken to through pipes of a POSIX shell"),
]
LONGEST = 300  # seconds, of a browser that hangs


def looked_at(folder: Path, *pages: Path) -> tuple[int, str]:
    """Exit code and output of a look at the made-up reports and at these pages."""
    command = [sys.executable, "-m", "report.look", str(folder), *map(str, pages)]
    source = os.pathsep.join(path for path in sys.path if path)
    names = {**os.environ, "PYTHONPATH": source}
    with subprocess.Popen(command, env=names, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            told, _ = process.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the browser, too
            raise
    return process.returncode, told


def test_reports_in_a_browser(tmp_path: Path) -> None:
    """Slider by keyboard and mouse, larger view, light and dark, downloads, no script, no network, nothing cut off."""
    page = write_report(tmp_path / "broken.html", make_report())
    text = page.read_text(encoding="utf-8")
    stuck = re.sub(r'<input type="radio"', '<input type="radio" disabled', text)
    stuck = re.sub(r"prefers-color-scheme: ?dark", "prefers-color-scheme: no", stuck)
    wide = '<p style="width: 3000px">wide</p><img src="http://127.0.0.1:9/x.png" alt=""><script>1</script>'
    page.write_text(stuck.replace("</main>", f"{wide}</main>"), encoding="utf-8")
    code, told = looked_at(tmp_path / "look", page)
    for name in ("typical", "extreme"):
        assert len(re.findall(rf"{name}.html, .*: nothing wrong$", told, re.M)) == 4, told
    assert code == 1
    wrong = told[told.index("broken.html") :]
    for fault in (
        "the page is wider than its window",
        "http://127.0.0.1:9/x.png is asked for",
        "it holds a script",
        "a click on stop 0 does not choose it",
        "arrows stop",
        "is as light in the dark",
    ):
        assert fault in wrong, wrong

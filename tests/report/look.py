"""Looks at reports in a real browser, on a desktop and on a phone, light and dark: `make look`.

Draws the made-up report of this folder, and one of extremes, beside the reports that it is given; takes a
screenshot of each, and fails where something is cut off, overlaps, or makes the page wider than its window.
Needs Chromium, so it is no test of the suite. Knows nothing about what a report says.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from report.conftest import make_report

from thinsight.report import data as d
from thinsight.report.html import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WINDOWS = ((1366, 768), (390, 844))
SCHEMES = ("light", "dark")

# Each finding is a line; 1 px of tolerance for rounding. What scrolls in a box of its own may be wide.
FINDINGS = """
(() => {
  const found = [], name = e => e.id || e.className || e.tagName;
  const shown = e => e.getClientRects().length > 0;
  if (document.scrollingElement.scrollWidth > innerWidth + 1) found.push('the page is wider than its window');
  for (const e of document.querySelectorAll('main *, header *')) {
    if (!(e instanceof HTMLElement) || !shown(e) || e.closest('.scroll, pre')) continue;
    const text = e.innerText.replace(/\\s+/g, ' ');
    if (e.clientWidth && e.scrollWidth > e.clientWidth + 1) found.push(`${name(e)} overflows: ${text}`);
  }
  for (const e of document.querySelectorAll('.key .value')) {
    const range = document.createRange();
    range.selectNodeContents(e);
    const card = e.closest('.key').getBoundingClientRect();
    if (range.getBoundingClientRect().right > card.right - 8) found.push(`${e.innerText} leaves its card`);
  }
  for (const svg of document.querySelectorAll('svg[role=img]')) {
    if (!shown(svg)) continue;
    const title = svg.querySelector('title').id, frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll('text')].map(e => [e.textContent, e.getBoundingClientRect()]);
    texts.forEach(([text, box], i) => {
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1)
        found.push(`${title}: "${text}" is cut off`);
      for (const [other, next] of texts.slice(i + 1))
        if (Math.min(box.right, next.right) - Math.max(box.left, next.left) > 1 &&
            Math.min(box.bottom, next.bottom) - Math.max(box.top, next.top) > 3)
          found.push(`${title}: "${text}" and "${other}" overlap`);
    });
  }
  const least = innerWidth < 500 ? 140 : 220;
  for (const e of document.querySelectorAll('.thumbs img'))
    if (e.getBoundingClientRect().width < least) found.push(`${e.alt}: narrower than ${least} px`);
  return found;
})()
"""


def extreme(report: d.ReportData) -> d.ReportData:
    """The report with numbers and names as long as they get."""
    assert report.headline is not None
    wide = d.Interval(-1.0, -1.0, 1.0)
    head = replace(report.headline, score=1.0, full_score=1.0, flops_ratio=123.45, drop=wide, kv_ratio=100.25)
    methods = [
        replace(
            row,
            name=f"{row.name} with quite a long name, as some have" if place % 2 else row.name,
            score=0.99 + 0.002 * place,
            drop=row.drop and (wide if place > 3 else row.drop),
        )
        for place, row in enumerate(report.methods)
    ]
    return replace(report, headline=head, methods=tuple(methods))


class Browser:
    """A browser without a window, spoken to through two pipes: its file descriptors 3 and 4."""

    def __init__(self, program: str, profile: str) -> None:
        heard, self._say = os.pipe()
        self._hear, said = os.pipe()
        # the shell moves the ends onto 3 and 4, whatever their numbers are
        line = f'exec "$0" "$@" 3<&{heard} 4>&{said}'
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        self._process = subprocess.Popen(
            ["bash", "-c", line, program, *options, f"--user-data-dir={profile}"],
            pass_fds=(heard, said),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(heard)
        os.close(said)
        self._buffer, self._number, self._session = b"", 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> Any:
        """What a command of the DevTools protocol answers."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._say, json.dumps(message).encode() + b"\0")
        answer = self._until("id", self._number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, page: Path, width: int, height: int, scheme: str) -> None:
        """Load a page in a window of this size, in pixels."""
        phone = width < 500
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._until("method", "Page.loadEventFired")

    def findings(self) -> list[str]:
        """What is wrong with the page that is open."""
        answer = self.call("Runtime.evaluate", expression=FINDINGS, returnByValue=True)
        found: list[str] = answer["result"]["value"]
        return found

    def save(self, path: Path, width: int) -> None:
        """A screenshot of the whole page as a PNG file."""
        height = self.call("Page.getLayoutMetrics")["cssContentSize"]["height"]
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the browser."""
        self.call("Browser.close")
        self._process.wait()
        os.close(self._say)
        os.close(self._hear)

    def _until(self, key: str, value: Any) -> Any:
        while True:
            while b"\0" not in self._buffer:
                more = os.read(self._hear, 1 << 20)
                if not more:
                    raise EOFError("the browser ended")
                self._buffer += more
            text, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(text)
            if message.get(key) == value:
                return message


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser that is closed again."""
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        sys.exit(f"none of {', '.join(BROWSERS)} is installed: install Chromium to look at reports")
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        started = Browser(program, profile)
        try:
            yield started
        finally:
            started.close()


def main(out: str, *reports: str) -> int:
    """Look at the two made-up reports and at those given (HTML files); screenshots go into ``out``."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    made_up = make_report()
    pages = {"typical": made_up, "extreme": extreme(made_up)}
    paths = [write_report(folder / f"{name}.html", report) for name, report in pages.items()]
    wrong = 0
    with browser() as window:
        for path in [*paths, *map(Path, reports)]:
            for width, height in WINDOWS:
                for scheme in SCHEMES:
                    window.open(path, width, height, scheme)
                    window.save(folder / f"{path.stem}-{width}-{scheme}.png", width)
                    found = window.findings()
                    wrong += len(found)
                    print(f"{path}, {width} x {height}, {scheme}: {len(found) or 'nothing'} wrong")
                    print("".join(f"  {line}\n" for line in found), end="")
    print(f"Screenshots: {folder}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["out/look"])))

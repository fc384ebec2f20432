"""Looks at reports in a real browser, on a desktop and on a phone, light and dark: `make look`.

Draws the made-up report of this folder, and one of extremes, beside the reports that it is given; takes a
screenshot of each, and fails where something is cut off, overlaps, or makes the page wider than its window, where the
slider over a picture's layers does not follow keyboard and mouse, a download is broken, or anything is asked of a
network. The suite runs it where there is Chromium. Knows nothing about what a report says.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

from report.conftest import make_report, with_changes

from thinsight.evaluation.benchmarks import BENCHMARKS
from thinsight.evaluation.benchmarks.measures import Measured
from thinsight.evaluation.result import Interval
from thinsight.report import data as d
from thinsight.report.html import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WINDOWS = ((1366, 768), (390, 844))
SCHEMES = ("light", "dark")
DOWNLOADS = 10  # that a browser takes in a row from one page without asking

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
  for (const e of document.querySelectorAll('.viewer > img'))
    if (e.getBoundingClientRect().width < least) found.push(`${e.alt}: narrower than ${least} px`);
  for (const e of document.querySelectorAll('.viewer .kept')) {
    if (!shown(e)) continue;
    const [over, under] = [e, e.closest('.viewer').querySelector('img')].map(e => e.getBoundingClientRect());
    if (['left', 'top', 'right', 'bottom'].some(side => Math.abs(over[side] - under[side]) > 1))
      found.push(`${e.alt}: not where its image is`);
  }
  for (const e of document.querySelectorAll('.stop input'))
    if (shown(e) && e.getBoundingClientRect().width < 20) found.push(`${e.ariaLabel}: a stop of less than 20 px`);
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


# What the first viewer shows: its checked stop, the overlays and lines that are visible, and how wide its image is.
VIEWER = """
(() => {
  const viewer = document.querySelector('.viewer'), seen = e => e.getClientRects().length > 0;
  const texts = [...viewer.querySelectorAll('.told')].filter(seen).map(e => e.textContent);
  return {
    checked: [...viewer.querySelectorAll('input')].findIndex(e => e.checked),
    focused: [...viewer.querySelectorAll('input')].indexOf(document.activeElement),
    overlays: [...viewer.querySelectorAll('.kept')].filter(seen).map(e => e.alt),
    told: texts, width: viewer.querySelector('img').getBoundingClientRect().width,
    ring: getComputedStyle(document.activeElement).outlineStyle,
  };
})()
"""


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
        self.asked_for: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Network.enable")

    def call(self, method: str, /, browser: bool = False, **parameters: Any) -> Any:
        """What a command of the DevTools protocol answers, of the page or of the ``browser`` as a whole."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session and not browser else {}
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
        self.asked_for.clear()
        self.call("Page.navigate", url=page.resolve().as_uri())
        self._until("method", "Page.loadEventFired")

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is in the page that is open."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def findings(self) -> list[str]:
        """What is wrong with the page that is open."""
        found: list[str] = self.value(FINDINGS)
        return found

    def press(self, key: str) -> None:
        """Press and release a key, as a hand does."""
        code = {"ArrowRight": 39, "ArrowLeft": 37, "Tab": 9, " ": 32, "Enter": 13}[key]
        text = {" ": {"text": " "}, "Enter": {"text": "\r"}}.get(key, {})
        told = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **told)
        if text:
            self.call("Input.dispatchKeyEvent", type="char", **told, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **told)

    def click(self, element: str) -> None:
        """Click into the middle of an element, given as a JavaScript expression."""
        self.value(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        middle = f"(box => [box.x + box.width / 2, box.y + box.height / 2])({element}.getBoundingClientRect())"
        x, y = self.value(middle)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def download(self, place: int, folder: Path) -> bytes:
        """What the page's download link of this number, by keyboard, puts into an empty folder."""
        self.call("Browser.setDownloadBehavior", True, behavior="allow", downloadPath=str(folder.resolve()))
        link = f"document.querySelectorAll('a[download]')[{place}]"
        self.value(f"{link}.closest('details')?.setAttribute('open', '')")
        self.value(f"{link}.focus()")
        self.press("Enter")
        file, until = folder / str(self.value(f"{link}.download")), time.monotonic() + 10
        while not file.exists() or file.with_name(f"{file.name}.crdownload").exists():
            if time.monotonic() > until:
                raise RuntimeError(
                    f"{file.name} does not come; there is {sorted(each.name for each in folder.iterdir())}"
                )
            time.sleep(0.02)
        content = file.read_bytes()
        file.unlink()
        return content

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
            if message.get("method") == "Network.requestWillBeSent":
                self.asked_for.append(message["params"]["request"]["url"])
            if message.get(key) == value:
                return message


def handled(window: Browser, desktop: bool) -> Iterator[str]:
    """What is wrong with the first viewer of the page that is open, handled by keyboard alone, and then by mouse."""
    if not window.value("document.querySelectorAll('.viewer').length"):
        return
    stops = window.value("document.querySelector('.viewer').querySelectorAll('input').length")
    window.value("document.querySelector('.enlarge').focus()")
    before = window.value(VIEWER)
    if desktop:
        window.press(" ")
        large = window.value(VIEWER)["width"]
        window.press(" ")
        if not large > 1.2 * before["width"]:
            yield f"the larger view is {large} px wide, the other one {before['width']} px"
        if window.value(VIEWER)["width"] != before["width"]:
            yield "the larger view does not go away"
        window.press("Tab")
    else:
        window.value("document.querySelector('.viewer input:checked').focus()")
    for step in range(stops + 1):  # once round
        found, place = window.value(VIEWER), (before["checked"] + step) % stops
        if (found["checked"], found["focused"]) != (place, place):
            yield f"after {step} arrows stop {found['checked']} is chosen and {found['focused']} has the focus"
        if len(found["told"]) != 1 or len(found["overlays"]) != (place > 0):
            yield f"stop {place} shows {found['told']} and {found['overlays']}"
        if found["ring"] == "none":
            yield f"stop {place} does not show that it has the focus"
        window.press("ArrowRight")
    window.press("ArrowLeft")
    if window.value(VIEWER)["checked"] != (before["checked"] + stops) % stops:
        yield "the left arrow does not go back"
    for place in (0, stops - 1):
        window.click(f"document.querySelector('.viewer').querySelectorAll('input')[{place}]")
        if window.value(VIEWER)["checked"] != place:
            yield f"a click on stop {place} does not choose it"


def downloads(page: Path) -> Iterator[str]:
    """The files that a page offers."""
    done, total = 0, 1
    while done < total:
        with browser() as window, TemporaryDirectory() as folder:
            window.open(page, *WINDOWS[0], SCHEMES[0])
            total = window.value("document.querySelectorAll('a[download]').length")
            some = range(done, min(total, done + DOWNLOADS))
            yield from (window.download(place, Path(folder)).decode() for place in some)
        done = some.stop


def downloaded(page: Path) -> Iterator[str]:
    """What is wrong with the files that a page offers."""
    for place, text in enumerate(downloads(page)):
        if text.startswith("<?xml"):
            drawing = ElementTree.fromstring(text)
            if not drawing.tag.endswith("}svg") or "http" in text.replace("http://www.w3.org/2000/svg", ""):
                yield f"download {place} is no drawing that stands alone"
        elif len({len(row) for row in csv.reader(io.StringIO(text))}) != 1:
            yield f"download {place} is no table"


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


def outside(url: str, page: Path) -> bool:
    """Whether an address is neither the page nor in it."""
    return not url.startswith("data:") and url != page.resolve().as_uri()


def with_benchmarks(report: d.ReportData, names: Sequence[str]) -> d.ReportData:
    """With every measure that these benchmarks report, and made-up figures."""
    rows = [(BENCHMARKS[name].title, measure.name) for name in names for measure in BENCHMARKS[name].measures]
    measures = [
        Measured(title, name, 1000 + 7 * i, 0.8 - i / 100, 0.795 - i / 100, Interval(0.005, -0.1025, 0.125))
        for i, (title, name) in enumerate(rows)
    ]
    return replace(report, measures=tuple(measures))


def main(out: str, *reports: str) -> int:
    """Look at the two made-up reports and at those given (HTML files); screenshots go into ``out``."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    large = extreme(with_changes(make_report(layers=40, side=48), 60, 40))
    pages = {
        "typical": with_benchmarks(with_changes(make_report()), ["pope", "textvqa"]),
        "extreme": with_benchmarks(large, list(BENCHMARKS)),
    }
    paths = [write_report(folder / f"{name}.html", report) for name, report in pages.items()]
    wrong = 0
    with browser() as window:
        for path in [*paths, *map(Path, reports)]:
            ground: dict[str, str] = {}
            for width, height in WINDOWS:
                for scheme in SCHEMES:
                    window.open(path, width, height, scheme)
                    window.save(folder / f"{path.stem}-{width}-{scheme}.png", width)
                    found = [*window.findings(), *handled(window, width > 500)]
                    if (width, scheme) == (WINDOWS[0][0], SCHEMES[0]):
                        found += downloaded(path)
                    ground[scheme] = window.value("getComputedStyle(document.body).backgroundColor")
                    found += [f"{url[:80]} is asked for" for url in window.asked_for if outside(url, path)]
                    if window.value("document.scripts.length"):
                        found.append("it holds a script")
                    wrong += len(found)
                    print(f"{path}, {width} x {height}, {scheme}: {len(found) or 'nothing'} wrong")
                    print("".join(f"  {line}\n" for line in found), end="")
            if len(set(ground.values())) < len(SCHEMES):
                wrong += 1
                print(f"{path} is as light in the dark")
    print(f"Screenshots: {folder}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["out/look"])))

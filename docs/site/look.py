"""Opens every page of the built site in Chromium, at two window sizes, light and dark: `make look-docs`.

Fails where a page is wider than its window, something is cut off, a picture is missing, dark is as light, the search
finds nothing, or anything is asked of a network. Screenshots to look at are kept. The browser is that of `make look`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from report.look import SCHEMES, WINDOWS, browser

FINDINGS = """
(() => {
  const found = [], shown = e => e.getClientRects().length > 0;
  if (document.scrollingElement.scrollWidth > innerWidth + 1) found.push('the page is wider than its window');
  for (const e of document.querySelectorAll('article *')) {
    if (!(e instanceof HTMLElement) || !shown(e)) continue;
    if (e.closest('pre, .md-typeset__scrollwrap, .highlight, .headerlink, .scroll')) continue;
    if (getComputedStyle(e).display != 'inline' && e.clientWidth && e.scrollWidth > e.clientWidth + 1)
      found.push(`${e.tagName} overflows: ${e.innerText.slice(0, 60)}`);
  }
  for (const e of document.querySelectorAll('article img'))
    if (e.complete && !e.naturalWidth) found.push(`no picture: ${e.src}`);
  return found;
})()
"""
RESULTS = """
(() => {
  const roots = [document];
  for (const root of roots) for (const e of root.querySelectorAll('*')) if (e.shadowRoot) roots.push(e.shadowRoot);
  return roots.slice(1).reduce((n, root) => n + root.querySelectorAll('a[href]').length, 0);
})()
"""


def searched(window: Any, words: str) -> int:
    """How many results the open page's search has for some words."""
    window.value("document.querySelector('.md-search__button').click()")
    time.sleep(0.5)
    for letter in words:
        window.call("Input.insertText", text=letter)
    until = time.monotonic() + 10
    while not window.value(RESULTS) and time.monotonic() < until:
        time.sleep(0.1)
    return int(window.value(RESULTS))


def main(site: str, out: str) -> int:
    """Look at the site in a folder; screenshots go into another one."""
    folder, wrong = Path(out), 0
    pages = sorted(page for page in Path(site).rglob("*.html") if page.name != "404.html")
    folder.mkdir(parents=True, exist_ok=True)
    with browser() as window:
        for page in pages:
            name = page.relative_to(site).with_suffix("").as_posix().replace("/", "-")
            grounds = set()
            for width, height in WINDOWS:
                for scheme in SCHEMES:
                    window.open(page, width, height, scheme)
                    window.save(folder / f"{name}-{width}-{scheme}.png", width)
                    found = list(window.value(FINDINGS))
                    found += [f"{url[:80]} is asked for" for url in window.asked_for if url.startswith("http")]
                    grounds.add(window.value("getComputedStyle(document.body).backgroundColor"))
                    wrong += len(found)
                    print("".join(f"{name}, {width} x {height}, {scheme}: {line}\n" for line in found), end="")
            if len(grounds) < len(SCHEMES):
                wrong += 1
                print(f"{name} is as light in the dark")
        window.open(Path(site) / "howto/vllm.html", *WINDOWS[0], SCHEMES[0])
        if not searched(window, "divprune"):
            wrong += 1
            print("the search finds nothing")
    print(f"{len(pages)} pages, {wrong or 'nothing'} wrong. Screenshots: {folder}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

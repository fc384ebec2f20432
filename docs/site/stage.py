"""Lays out what the documentation site is built from: `make docs`.

The pages lie where GitHub shows them, in docs/, benchmarks/results/ and beside what they are about; a site needs them
in one folder. So they are copied into one, and links between them are turned to where their targets went. What is
linked and is no page is copied too, so that the site is complete without a network. Notebooks become pages with the
outputs that they hold, and every command's help becomes one. Knows nothing about how a page looks.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "docs/site/zensical.toml"
ASSETS = ("docs/site/site.css", "docs/site/iframe-worker.js")
COMMANDS = "reference/commands.md"
NOTEBOOKS, OTHERS = "# notebooks come here", "# pages that are not listed come here"

# A target in Markdown or in HTML; and code, fenced or within a line, in which what looks like one is none.
_CODE = re.compile(r"^(?P<fence>`{3,}).*?^(?P=fence)`*[ \t]*$|(?P<span>`+)(?!`).*?(?<!`)(?P=span)(?!`)", re.M | re.S)
_LINK = re.compile(r"(?<=\]\()(?P<markdown>[^()\s]+)|(?<=(?:src|ref)=\")(?P<html>[^\"]+)")


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """A page in pieces, each with whether it is code."""
    last = 0
    for code in _CODE.finditer(text):
        yield text[last : code.start()], False
        yield code[0], True
        last = code.end()
    yield text[last:], False


def outward(target: str) -> bool:
    """Whether a link leads to a network or within its page, and so to no file."""
    return target.startswith(("#", "data:", "mailto:")) or "://" in target


def links(text: str) -> list[str]:
    """The targets of a page's links and images that are files, with their anchors."""
    found = [link[0] for part, code in _parts(text) if not code for link in _LINK.finditer(part)]
    return [target for target in found if not outward(target)]


def relinked(text: str, turn: Callable[[str], str]) -> str:
    """The page with every target that is a file replaced by what ``turn`` gives for it."""

    def replaced(link: re.Match[str]) -> str:
        return link[0] if outward(link[0]) else turn(link[0])

    return "".join(part if code else _LINK.sub(replaced, part) for part, code in _parts(text))


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links, as GitHub and the site name them."""
    bare = "".join(part for part, code in _parts(text) if not (code and part.startswith("```")))
    headings = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", bare, re.M)
    found: set[str] = set()
    for heading in headings:
        plain = re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading).lower()
        slug = re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", plain))
        name, again = slug, 1
        while name in found:
            name, again = f"{slug}-{again}", again + 1
        found.add(name)
    return found


def pages(root: Path = ROOT) -> dict[Path, PurePosixPath]:
    """Every page's file, with its place on the site."""
    found = {root / "docs" / name: PurePosixPath(name) for name in _below(root / "docs", "*.md")}
    for name in _below(root / "docs" / "notebooks", "*.ipynb"):
        found[root / "docs/notebooks" / name] = PurePosixPath("notebooks", name).with_suffix(".md")
    for path in sorted((root / "benchmarks/results").glob("*.md")):
        found[path] = PurePosixPath("results", "index.md" if path.name == "README.md" else path.name)
    for path in sorted((root / "src/thinsight/demo").glob("*/README.md")):
        found[path] = PurePosixPath("demo", path.parent.name + ".md")
    found[root / "training/README.md"] = PurePosixPath("demo/training.md")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md"):
        found[root / name] = PurePosixPath(name.lower())
    return found


def _below(folder: Path, pattern: str) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob(pattern) if "checkpoint" not in path.parent.name
    )


def target_of(page: Path, target: str, root: Path = ROOT) -> Path:
    """The file that a link on a page leads to.

    Raises:
        ValueError: it leads to no file, or out of the repository.
    """
    path = Path(os.path.normpath(page.parent / target.partition("#")[0]))
    path = path / "README.md" if path.is_dir() else path
    if not path.is_file() or not path.is_relative_to(root):
        raise ValueError(f"{page.relative_to(root)} links to {target}, which is no file of the repository")
    return path


def _place_of(path: Path, root: Path) -> PurePosixPath:
    """Where what is no page goes: pictures beside the pages that show them, sources as texts that a browser shows."""
    for folder, place in (("docs", ""), ("benchmarks/results", "results")):
        if path.is_relative_to(root / folder) and path.suffix != ".py":
            return PurePosixPath(place, path.relative_to(root / folder).as_posix())
    return PurePosixPath("source", path.relative_to(root).as_posix() + ".txt")


def lay_out(folder: Path, root: Path = ROOT, notebooks: bool = True) -> None:
    """Write the site's pages and settings into ``folder``, which is emptied first; notebooks need nbconvert."""
    shutil.rmtree(folder, ignore_errors=True)
    sources = folder / "src"
    places = {page: place for page, place in pages(root).items() if notebooks or page.suffix != ".ipynb"}
    for page, place in places.items():
        out = sources / place
        out.parent.mkdir(parents=True, exist_ok=True)
        text = _read_notebook(page, out) if page.suffix == ".ipynb" else page.read_text(encoding="utf-8")
        turned = relinked(_without_metadata(text), partial(_turned, page, places, sources, root))
        out.write_text(turned, encoding="utf-8")
    (sources / COMMANDS).write_text(commands(), encoding="utf-8")
    for asset in ASSETS:
        shutil.copy(root / asset, sources)
    settings = navigated((root / CONFIG).read_text(encoding="utf-8"), places.values())
    (folder / "zensical.toml").write_text(settings, encoding="utf-8")


def listed(settings: str) -> list[str]:
    """The pages that the settings put into the navigation by name."""
    return re.findall(r'= "([\w/-]+\.md)"', settings)


def navigated(settings: str, places: Iterable[PurePosixPath]) -> str:
    """The settings with the other pages in the navigation, too."""
    others = [str(place) for place in places if str(place) not in listed(settings)]
    notebooks = [f'"{place}"' for place in others if place.startswith("notebooks/")]
    line = f'{{ "Notebooks" = [{", ".join(notebooks)}] }},' if notebooks else ""
    rest = " ".join(f'"{place}",' for place in others if not place.startswith("notebooks/"))
    return settings.replace(NOTEBOOKS, line).replace(OTHERS, rest)


def _turned(page: Path, places: Mapping[Path, PurePosixPath], sources: Path, root: Path, target: str) -> str:
    """A page's link, as it is to be on the site; what it leads to is copied if it is no page."""
    place = places[page]
    if (sources / place.parent / target).is_file() and page.suffix == ".ipynb":  # a picture that it drew
        return target
    path, anchor = target_of(page, target, root), target.partition("#")[2]
    went = PurePosixPath("index.md") if path == root / "README.md" else places.get(path)
    if went is None:
        went = _place_of(path, root)
        (sources / went).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, sources / went)
    return os.path.relpath(went, place.parent) + (f"#{anchor}" if anchor else "")


def _without_metadata(text: str) -> str:
    """A model card without what the Hub reads at its head."""
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.S)


def _read_notebook(path: Path, out: Path) -> str:
    """A notebook as Markdown; its pictures are written beside the page."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(path))
    folder = out.with_suffix("")
    renamed = {}
    for name, data in resources["outputs"].items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
        renamed[name] = f"{folder.name}/{name}"
    return relinked(text, lambda target: renamed.get(target, target))


def commands() -> str:
    """A page with every command's help."""
    from typer.main import get_command

    from thinsight.cli import app

    group: Any = get_command(app)
    lines = ["# Commands", "", "What `thinsight COMMAND --help` prints.", ""]
    for name, command in group.commands.items():
        context = command.make_context(name, [], resilient_parsing=True, terminal_width=100, max_content_width=100)
        context.info_name = f"thinsight {name}"
        lines += [f"## thinsight {name}", "", "```text", command.get_help(context).rstrip(), "```", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    lay_out(Path(sys.argv[1] if len(sys.argv) > 1 else "out/docs"))

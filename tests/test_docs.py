"""The documentation: links lead somewhere, names and commands are right, and the site lies out whole."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import typer.main
from PIL import Image
from tiny import tiny_images, tiny_llava, tiny_processor
from walking import blocks, lines

import thinsight as ts
from docs.site import gallery, stage
from thinsight import vlmevalkit
from thinsight.cli import _filled, app
from thinsight.evaluation.benchmarks import BENCHMARKS
from thinsight.job import options as job_options
from thinsight.job.server import check_server_options
from thinsight.searches import SEARCHES

ROOT = Path(__file__).parents[1]
PAGES = [
    page
    for page in [ROOT / "README.md", *stage.pages(ROOT)]
    if page.suffix == ".md"  # notebooks hold outputs
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings(page: Path) -> None:
    wrong = []
    for target in stage.links(page.read_text(encoding="utf-8")):
        path, anchor = stage.target_of(page, target, ROOT), target.partition("#")[2]
        if anchor and anchor not in stage.anchors(path.read_text(encoding="utf-8")):
            wrong.append(target)
    own = re.findall(r"\]\(#([^)]+)\)", page.read_text(encoding="utf-8"))
    wrong += [f"#{anchor}" for anchor in own if anchor not in stage.anchors(page.read_text(encoding="utf-8"))]
    assert wrong == []


def test_what_is_code_holds_no_links() -> None:
    text = '[a](b.md#c) `[x](y)` ![p](q.png)\n```\n[u](v)\n```\n[w](https://z) [s](#here)\n<img src="r.png">\n'
    assert stage.links(text) == ["b.md#c", "q.png", "r.png"]
    turned = stage.relinked(text, lambda target: f"../{target}")
    assert "[a](../b.md#c) `[x](y)` ![p](../q.png)" in turned
    assert '[u](v)\n```\n[w](https://z) [s](#here)\n<img src="../r.png">' in turned


def test_a_link_that_leads_nowhere_is_told_with_its_page(tmp_path: Path) -> None:
    page = tmp_path / "a.md"
    for target in ("gone.md", "../outside.md"):
        with pytest.raises(ValueError, match=f"a.md links to {target}, which is no file"):
            stage.target_of(page, target, tmp_path)


def test_headings_are_named_as_github_names_them() -> None:
    text = "# A task, as `data`\n## It's 3.5 %\n```\n# none\n```\n## Twice\n## Twice\n### [Link](x.md) here\n"
    assert stage.anchors(text) == {"a-task-as-data", "its-35-", "twice", "twice-1", "link-here"}


def documented() -> set[str]:
    found = set()
    for page in (ROOT / "docs/reference").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        found |= set(re.findall(r"^::: thinsight\.(\w+)$", text, re.M))
        found |= set(re.findall(r"`thinsight\.(__version__)`", text))
    return found


def test_the_reference_has_every_public_name() -> None:
    errors = {name for name in ts.__all__ if getattr(getattr(ts, name), "__module__", "") == "thinsight.errors"}
    assert documented() | errors == set(ts.__all__)  # errors stand under their module
    assert "errors" in documented()


def command_lines() -> Iterator[tuple[str, str]]:
    """Every use of the command in a fenced block, with its page; lines that go on are joined."""
    for page in PAGES:
        for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in lines(block):
                if line.startswith("thinsight ") and "COMMAND" not in line and not line.startswith("thinsight:"):
                    yield page.relative_to(ROOT).as_posix(), line


def commands_in_texts() -> Iterator[tuple[str, str]]:
    """Every use of a command within a line, but for those of earlier releases."""
    for page in PAGES:
        spans = re.findall(r"(?<!`)`(thinsight [a-z][^`]*)`(?!`)", page.read_text(encoding="utf-8"))
        for span in spans if page.name != "CHANGELOG.md" else ():
            yield page.relative_to(ROOT).as_posix(), " ".join(span.split())


def command_of(line: str) -> tuple[Any, list[str]]:
    """The command of a line, and its words; what stands for words of one's own is left out."""
    _, name, *words = shlex.split(line.removesuffix(" &"), comments=True)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert name in commands
    return commands[name], words


@pytest.mark.parametrize(("page", "line"), sorted({*command_lines(), *commands_in_texts()}))
def test_commands_and_options_exist(page: str, line: str) -> None:
    command, words = command_of(line)
    options = {option: each for each in command.params for option in each.opts}
    places = sum(each.param_type_name == "argument" for each in command.params)
    given = iter(words)
    for word in given:
        if word.startswith("-"):
            assert word in options, f"{page}: {command.name} has no {word}"
            if not options[word].is_flag:
                next(given)
        elif word != "...":
            places -= 1
    assert places >= 0, f"{page}: {line}"


def variables(page: str) -> dict[str, str]:
    """What a page's shell variables are set to."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return {name: value.strip('"') for name, value in re.findall(r"^([A-Z_]+)=(\S+)", text, re.M)}


HERE = {
    **{"model": "demo", "dtype": "auto", "device": "auto", "attn": "sdpa", "start": None},
    **{"workers": None, "ray": None, "gpus_per_worker": None},
}
"""Values of options that are about a machine or a file, in place of the pages'."""


@pytest.mark.parametrize(("page", "line"), sorted(set(command_lines())))
def test_options_have_values_that_their_command_takes(page: str, line: str) -> None:
    """All that a command refuses before it works, on the demo in place of the page's model, without workers."""
    said = re.sub(r"\$([A-Z_]+)", lambda name: variables(page).get(name[1], name[0]), line)
    command, words = command_of(said)
    with command.make_context(command.name, words) as context:
        given = context.params
    options = getattr(job_options, f"{command.name.capitalize()}Options", None)
    if options is None:  # a command of few words, which typer has read
        return
    made = _filled(options, {name: HERE.get(name, value) for name, value in given.items()})
    if getattr(made, "server", None) is not None:
        check_server_options(made)
    elif hasattr(made, "check"):
        made.check()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("search --method gsaerch", "method is 'gsaerch'"),
        ("search --budget 0.25 --solver bayes", "solver is 'bayes'"),
        ("analyze --limit 0", "greater than or equal to 1|0 is not in the range"),
        ("data x --columns a", "columns is 'a'"),
    ],
)
def test_a_value_that_a_command_refuses_is_found(line: str, words: str) -> None:
    with pytest.raises(Exception, match=words):
        test_options_have_values_that_their_command_takes("README.md", f"thinsight {line}")


def test_tables_have_what_there_is() -> None:
    """Rankers, searches and benchmarks, each of them where its table is."""
    tables = {
        "docs/concepts/ranker.md": ("ranker", set(ts.list_rankers())),
        "docs/search.md": ("search", {*SEARCHES, "frontier"}),
        "docs/data.md": ("name", set(BENCHMARKS)),
    }
    for page, (heading, names) in tables.items():
        rows = (ROOT / page).read_text(encoding="utf-8").split(f"| {heading} |")[1].split("\n\n")[0].splitlines()[2:]
        assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])} == names, page


def test_the_runner_of_vlmevalkit_is_asked_for_what_it_takes() -> None:
    text = (ROOT / "docs/harnesses.md").read_text(encoding="utf-8")
    found = re.findall(r"^(?:\w+=\S+ )?python -m thinsight.vlmevalkit (.*)$", text, re.M)
    assert found
    for line in found:
        told, rest = vlmevalkit._parser().parse_known_args(shlex.split(line, comments=True))
        assert told.model
        assert {word for word in rest if word.startswith("-")} <= {"--data", "--mode"}  # which are the harness's


def pythons() -> Iterator[tuple[str, str]]:
    """Every block of Python that stands on a page of ours, but for results of earlier releases."""
    for page in PAGES:
        for block in blocks(page.relative_to(ROOT).as_posix(), "python"):
            yield page.relative_to(ROOT).as_posix(), block


@pytest.mark.parametrize(("page", "code"), list(pythons()))
def test_python_uses_what_there_is(page: str, code: str) -> None:
    """Names of the package, and arguments of its functions; blocks that are run elsewhere are looked at, too."""
    known: dict[str, Any] = {"ts": ts, "thinsight": ts}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "thinsight":
            module = importlib.import_module(node.module or "")
            for each in node.names:
                known[each.asname or each.name] = getattr(module, each.name)
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            found(node, known)
        if isinstance(node, ast.Call) and (called := found(node.func, known)) is not None:
            takes = inspect.signature(called).parameters.values()
            if all(each.kind is not each.VAR_KEYWORD for each in takes):
                assert {each.arg for each in node.keywords} - {None} <= {each.name for each in takes}, ast.unparse(node)


def found(node: ast.expr, known: dict[str, Any]) -> Any:
    """What an expression of names and attributes is in the package; None where it is something else."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        of = found(node.value, known)
        if of is not None:
            assert hasattr(of, node.attr), ast.unparse(node)
            return getattr(of, node.attr)
    return None


def test_the_navigation_has_every_page_once() -> None:
    places = [*map(PurePosixPath, ("notebooks/a.md", "notebooks/b.md", "new.md")), *stage.pages(ROOT).values()]
    settings = (ROOT / stage.CONFIG).read_text(encoding="utf-8")
    assert set(stage.listed(settings)) <= {*map(str, places), stage.COMMANDS}
    done = stage.navigated(settings, places)
    assert '{ "Notebooks" = ["notebooks/a.md", "notebooks/b.md"' in done
    assert sorted(re.findall(r'"([\w/.-]+\.md)"', done)) == sorted([*map(str, places), stage.COMMANDS])


def test_every_page_is_at_most_two_links_from_the_first() -> None:
    first = ROOT / "docs/index.md"
    near = {first}
    for _ in range(2):
        texts = [(page, page.read_text(encoding="utf-8")) for page in near if page.suffix == ".md"]
        near |= {stage.target_of(page, target, ROOT) for page, text in texts for target in stage.links(text)}
    own = {page for page in stage.pages(ROOT) if page.is_relative_to(ROOT / "docs")}
    assert own - near == set()


def test_the_pages_that_users_ask_for_are_there() -> None:
    places = {str(place) for place in stage.pages(ROOT).values()}
    wanted = {
        "tutorial.md",
        "gallery.md",
        *(f"howto/{name}.md" for name in ("certify", "vllm", "lmms-eval", "own-ranker")),
        *(f"concepts/{name}.md" for name in ("schedule", "ranker", "certificate", "costs")),
    }
    assert wanted <= places
    results = {path.name for path in (ROOT / "benchmarks/results").glob("*.md")}
    assert {f"results/{name}".replace("README", "index") for name in results} <= places


def test_the_site_lies_out_with_all_that_it_shows(tmp_path: Path) -> None:
    stage.lay_out(tmp_path / "site", ROOT, notebooks=False)  # which take nbconvert; `make docs` has it
    sources = tmp_path / "site/src"
    for page in sources.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert not text.startswith("---\n")  # a model card's metadata
        for target in stage.links(text):
            path = (page.parent / target.partition("#")[0]).resolve()
            assert path.is_file(), f"{page.relative_to(sources)}: {target}"
            assert path.is_relative_to(sources)
    told = (sources / stage.COMMANDS).read_text(encoding="utf-8")
    assert "## thinsight search" in told
    assert "--max-drop" in told


def test_the_ranker_that_is_shown_holds_its_contract_and_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs/howto/own-ranker.md").read_text(encoding="utf-8")
    files = re.findall(r"```python\n# (\w+\.py)\n(.*?)```", text, re.S)
    assert [name for name, _ in files] == ["middle.py", "attentive.py", "test_middle.py"]
    for name, code in files:
        (tmp_path / name).write_text(code, encoding="utf-8")
    (tmp_path / "test_attentive.py").write_text(
        (tmp_path / "test_middle.py").read_text().replace("middle", "attentive").replace("Middle", "Attentive")
    )
    (entry,) = re.findall(r"^middle = \"(middle:Middle)\"$", text, re.M)
    installed = tmp_path / "middle-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: middle\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(
        f"[thinsight.rankers]\nmiddle = {entry}\nattentive = attentive:Attentive\n"
    )
    (tried,) = re.findall(r"```python\n(from middle import .*?)```", text, re.S)
    (tmp_path / "tried.py").write_text(tried, encoding="utf-8")
    for words in (["-m", "pytest", "-q", "-p", "no:cacheprovider", "."], ["tried.py"]):
        environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert 0 <= float(done.stdout) <= 1


def test_the_gallery_is_drawn_with_its_page(tmp_path: Path) -> None:
    image = tmp_path / "image.png"
    tiny_images(1)[0].save(image)
    shown = gallery.shower(tiny_llava(), tiny_processor(), "uniform", ts.Schedule([1.0, 0.5, 0.25, 0.25]))
    picture = shown(ts.Example(id="one", images=(image,), question="what color is it ?", answers=("red",)))
    page = tmp_path / "gallery.md"
    places = [("questions", "0"), ("rankers", "uniform"), ("rankers", "random")]
    gallery.draw((gallery.Drawing(*place, picture, "In words.") for place in places), page)
    text = page.read_text(encoding="utf-8")
    assert stage.links(text)[1:] == [f"images/gallery/{section}-{name}.webp" for section, name in places]
    assert text.count("## One image") == text.count("## Five rankers") == 1
    assert "what color is it? Full model:" in text
    assert "Kept: 8 of 16 at layer 1, 4 of 16 at layer 2](" in text
    assert "{" not in text  # layers are filled in
    with Image.open(page.parent / stage.links(text)[1]) as drawn:
        assert drawn.width > 2 * 240


def test_the_gallery_shows_all_of_its_pictures() -> None:
    linked = {ROOT / "docs" / each for each in stage.links(gallery.PAGE.read_text(encoding="utf-8"))}
    assert {path for path in linked if path.suffix == ".webp"} == set((ROOT / "docs/images/gallery").glob("*"))
    assert len(linked) > 20

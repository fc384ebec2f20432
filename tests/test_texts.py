"""Texts of users and models stay what they are on a terminal, in YAML, Markdown, HTML, a shell and Python."""

from __future__ import annotations

import ast
import re
import subprocess
from html.parser import HTMLParser

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from thinsight import errors, texts

HOSTILE = (
    "\x1b[2J\x1b]0;owned\x07",
    "a\nlicense: mit\n---\n# heading",
    "\x9b31m c1",
    "a | b `c` *d* _e_ <img src=x onerror=1> [f](javascript:g) \\| &amp; ~~h~~",
    'it\'s "quoted" $(rm -rf /) `id` ; \\ end',
    "\u202egnp.exe \u2028 \u2066x",
    "half \ud800 a character",
    "\udc80\udcff",
    "two words  and   more",
    "",
    "- item",
    "null",
    "Farbe: grün 色 \U0001f600 \u200d",
)
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
ANY = st.text(st.characters(exclude_categories=()), max_size=60)


def hostile(function):  # type: ignore[no-untyped-def]
    """Run a test on generated texts and on all of the above."""
    for text in HOSTILE:
        function = example(text)(function)
    return settings(max_examples=200, deadline=None)(given(ANY)(function))


@hostile
def test_a_terminal_gets_one_line_without_controls(text: str) -> None:
    shown = texts.terminal(text)
    assert not CONTROLS.search(shown)
    if not CONTROLS.search(text):
        assert shown == text


def test_what_cannot_be_shown_is_seen() -> None:
    assert texts.terminal("red\x1b[31m \ud800 \u202eb") == "red\\x1b[31m \\ud800 \\u202eb"
    assert texts.terminal("two\n  lines,\tone  gap") == "two lines, one  gap"


@hostile
def test_yaml_reads_back_the_same(text: str) -> None:
    block = texts.yaml({"base_model": text, "tags": [text, "b"]})
    if not re.search("[\ud800-\udfff]", text):
        assert yaml.safe_load(block) == {"base_model": text, "tags": [text, "b"]}
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\ud800-\udfff]", block)
    assert "---" not in block.splitlines()


@hostile
def test_html_holds_the_text_and_no_element(text: str) -> None:
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_data(self, data: str) -> None:
            found.append(data)

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert (tag, list(attrs)) == ("b", [("title", visible)])

    visible = CONTROLS.sub(lambda c: c[0] if c[0] in "\n\t" else ascii(c[0])[1:-1], text)
    page = f'<b title="{texts.html(text)}">{texts.html(text)}</b>'
    page.encode()
    reader = Reader(convert_charrefs=True)
    reader.feed(page)
    reader.close()
    assert "".join(found) == visible


@hostile
def test_a_markdown_cell_stays_one_cell(text: str) -> None:
    for shown in (texts.markdown(text), texts.code(text)):
        bare = re.sub(r"^`[^`|<>]*`$|\\.", "", shown)
        assert not re.search(r"[`|<>\[\]*~]", bare)
        assert not CONTROLS.search(shown)


def test_markdown_leaves_plain_names_alone() -> None:
    assert texts.markdown("max_drop of llava-1.5, 3.5 %") == "max_drop of llava-1.5, 3.5 %"
    assert texts.code("llava-hf/llava-1.5-7b_hf") == "`llava-hf/llava-1.5-7b_hf`"
    assert texts.markdown("_x_ | `y`") == "\\_x\\_ \\| \\`y\\`"


def test_bash_reads_back_the_same_words() -> None:
    words = [*HOSTILE, "--out", "a'b\x1b\n\\n", "\\", "a b"]
    words.remove("half \ud800 a character")  # no argument of a process can hold it
    line = texts.shell(words)
    assert not CONTROLS.search(line)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout.decode("utf-8", "surrogateescape").split("\0")[:-1] == words


def test_shell_leaves_plain_words_alone() -> None:
    assert texts.shell(["thinsight", "search", "--out", "my run"]) == "thinsight search --out 'my run'"
    assert texts.shell(["half \ud800"]) == "$'half \\077'"  # a question mark


@hostile
def test_python_reads_back_the_same(text: str) -> None:
    literal = texts.python(text)
    assert ast.literal_eval(literal) == text
    assert not CONTROLS.search(literal)


@hostile
def test_brief_is_short(text: str) -> None:
    assert len(texts.brief(text * 50)) <= texts.BRIEF


@pytest.mark.parametrize("size", [999, 1000, 1001, 500_000])
def test_a_long_message_keeps_both_ends(size: int) -> None:
    message = "metric is '" + "x" * (size - 30) + "': choose another x"
    assert len(message) == size
    shown = str(errors.BadInput(message))
    assert len(shown) == min(size, 1000)
    assert shown.startswith("metric is 'x")
    assert shown.endswith("x': choose another x")
    assert (shown == message) == (size <= 1000)


@hostile
def test_an_error_can_be_printed_as_it_is(text: str) -> None:
    assert not CONTROLS.search(str(errors.BadInput(f"out {text}: choose another")))


@pytest.mark.parametrize(
    ("number", "noun", "said"),
    [
        (0, "win", "0 wins"),
        (1, "loss", "1 loss"),
        (2048, "loss", "2,048 losses"),
        (1.0, "point", "1 point"),
        (0.5, "point", "0.5 points"),
        (12.0, "evaluation", "12 evaluations"),
    ],
)
def test_a_number_with_what_it_is_of(number: float, noun: str, said: str) -> None:
    assert texts.counted(number, noun) == said

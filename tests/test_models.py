"""The list of supported models, the command that prints it, and the page that documents it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from conformance.families import FAMILIES
from conformance.states import BEGIN as REFUSED_BEGIN
from conformance.states import END as REFUSED_END
from conformance.states import NOT_TRIED, reason, states, unlisted
from conformance.table import BEGIN, END, compact, full, main, read_cells, replace_between_markers
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from typer.testing import CliRunner

import thinsight as ts
from thinsight.cli import app
from thinsight.errors import Unsupported
from thinsight.families import FAMILIES as ROWS
from thinsight.families import LAYERS, REFUSED
from thinsight.runtime.anatomy import refusal

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"


def behaviours() -> set[str]:
    """Of all tests of the suite."""
    found = set()
    for path in (ROOT / "tests" / "conformance").glob("test_*.py"):
        module = importlib.import_module(f"conformance.{path.stem}")
        for test in vars(module).values():
            marks = getattr(test, "pytestmark", [])
            found |= {mark.args[0] for mark in marks if mark.name == "behaviour"}
    return found


def between_markers(path: Path) -> list[list[str]]:
    """Cells of the table that the suite wrote into a page."""
    text = path.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines]


def test_every_supported_model_type_is_listed_once_with_its_stock_class() -> None:
    listed = ts.models()
    assert ts.models() == listed  # a second time too: a module of that name would shadow it
    assert [model.model_type for model in listed] == sorted(ROWS)
    assert all(hasattr(transformers, model.model_class) for model in listed)


def test_the_list_says_what_the_suite_says() -> None:
    by_type = {model.model_type: model for model in ts.models()}
    for family in FAMILIES.values():
        model = by_type[family.model_type]
        assert model.model_class == family.model_class
        if family.video is not None:
            assert "video" in model.modalities
        assert not family.refuses or model.notes
    for model in by_type.values():
        mine = [family for family in FAMILIES.values() if family.model_type == model.model_type]
        assert ("video" in model.modalities) == any(family.video is not None for family in mine)


def source_of_processor(model_type: str) -> str:
    """Of transformers' class, read and not run: it may need what is not installed."""
    # by the checkpoint, not the type
    shared = {"glm_ocr": "Glm46VProcessor", "glmga": "Glm46VProcessor", "fast_vlm": "LlavaProcessor"}
    whole = model_type.removesuffix("_thinker")
    processor = getattr(transformers, shared.get(model_type) or PROCESSOR_MAPPING_NAMES[whole])
    spec = importlib.util.find_spec(processor.__module__)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text("utf-8")


def test_packages_that_processors_need_are_those_of_transformers() -> None:
    for model in ts.models():
        source = source_of_processor(model.model_type)
        images = IMAGE_PROCESSOR_MAPPING_NAMES.get(model.model_type.removesuffix("_thinker")) or {"pil": ""}
        video = re.search(r"def __init__\([^)]*\bvideo_processor\b", source) is not None
        decorated = re.search(r'@requires\(backends=\([^)]*"torchvision"', source) is not None
        assert ("torchvision" in model.needs) == (video or decorated or "pil" not in images), model
        assert ("num2words" in model.needs) == ("num2words" in source), model


def test_the_command_prints_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(app, ["models"], catch_exceptions=False)
    assert result.exit_code == 0
    for model in ts.models():
        first = re.escape(model.name.split()[0])  # a long name goes on in the next line
        assert re.search(rf"^ *{first}.* {model.model_class} +{', '.join(model.modalities)}", result.stdout, re.M)
        assert not model.notes or f"{model.name}: {model.notes}" in result.stdout


def test_the_page_lists_exactly_the_families_and_behaviours_of_the_suite() -> None:
    head, _, *lines = between_markers(PAGE)
    assert [line[0] for line in lines] == list(FAMILIES)
    assert set(head[2:]) == behaviours()
    below = PAGE.read_text("utf-8").partition(END)[2].partition("<!-- refused:begin -->")[0]
    explained = set(re.findall(r"^\| ([\w -]+) \|", below, re.M))
    assert explained - {"behaviour"} == behaviours()


def test_the_readme_lists_the_families_of_the_suite() -> None:
    _, _, *lines = between_markers(ROOT / "README.md")
    listed = [family for _, families in lines for family in families.split(", ")]
    assert sorted(listed) == sorted(FAMILIES)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("glmga", "which runs as Glm46VForConditionalGeneration like 'glm46v', but has not been tried"),
        ("shieldgemma2", "which runs as Gemma3ForConditionalGeneration like 'gemma3', but has not been tried"),
        ("nemotron_h_omni", r"whose decoder has layers \(mlp, moe\) that neither attend nor carry a state"),
        ("aria", "which is not on the list yet: nobody has tried AriaForConditionalGeneration"),
        ("unlimited_ocr", r"layers \(reference_sliding_attention\) that keep the prompt and a window"),
        ("pi0", "'pi0' moves a robot"),
        ("mistral_large4", r"layers \(indexed_attention\) that choose the keys"),
        ("florence2", "'florence2' is an encoder-decoder"),
        ("mllama", "'mllama' reads images by cross-attention"),
        ("llama", r"which transformers [\d.]+ does not load as a model that answers questions about images"),
    ],
)
def test_a_model_that_is_not_listed_gets_a_reason(
    model_type: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(ROWS._items, model_type, raising=False)  # as before it was
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not know {model_type}")
    message = refusal(transformers.CONFIG_MAPPING[model_type]())
    assert message is not None
    assert re.search(reason, message)
    assert len(str(Unsupported(message))) == len(message)  # not cut


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_type_that_cannot_run_is_refused_by_what_holds_for_it(model_type: str) -> None:
    message = refusal(SimpleNamespace(model_type=model_type))
    assert message is not None
    assert message.startswith(f"'{model_type}' {REFUSED[model_type]}")
    assert len(str(Unsupported(message))) == len(message)
    assert model_type not in ROWS


@pytest.mark.parametrize("kind", LAYERS)
def test_layers_that_cannot_leave_tokens_out_are_refused_by_what_they_do(kind: str) -> None:
    text = SimpleNamespace(layer_types=["full_attention", kind])
    config = SimpleNamespace(model_type="glm5_next", get_text_config=lambda: text)
    assert f"layers ({kind}) that {LAYERS[kind]}" in str(refusal(config))


def test_no_refusal_lists_names_only() -> None:
    """Whatever transformers loads as a model that answers questions about images."""
    for model_type in CLASSES:
        message = refusal(SimpleNamespace(model_type=model_type))
        assert model_type in ROWS or re.search(r"^'|, which runs as|nobody has tried", str(message)), model_type


@pytest.mark.skipif(not transformers.__version__.startswith("5.23."), reason="the page is of transformers 5.23")
def test_the_page_says_of_every_other_type_what_its_users_are_told() -> None:
    text = PAGE.read_text("utf-8").partition(REFUSED_BEGIN)[2].partition(REFUSED_END)[0]
    assert text.strip() == states(), "write it again: python -m conformance.states docs/models.md"
    assert {*CLASSES} <= {*ROWS, *unlisted()}


def test_what_is_refused_for_good_is_told_from_what_has_not_been_tried() -> None:
    assert reason("florence2").startswith("is an encoder-decoder: its vision tokens are in the encoder")
    assert reason("blip") == REFUSED["blip"]
    assert reason("nemotron_h_omni") == reason("fuyu") == NOT_TRIED


def test_every_model_that_is_listed_is_taken() -> None:
    assert [kind for kind in ROWS if refusal(transformers.CONFIG_MAPPING[kind]()) is not None] == []


# --- how the tables are made


def report(path: Path, **failed: str) -> Path:
    """What pytest writes for two cells, one refused."""
    cases = "".join(
        f'<testcase name="{behaviour}"><properties><property name="family" value="llava"/>'
        f'<property name="behaviour" value="{behaviour}"/><property name="refused" value="{refused}"/>'
        f"</properties>{failed.get(behaviour, '')}</testcase>"
        for behaviour, refused in (("beams", "false"), ("beams", "false"), ("video", "true"))
    )
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return path


def test_tables_are_made_of_reports(tmp_path: Path) -> None:
    cells = read_cells([report(tmp_path / "a.xml")])
    line = "| llava | `LlavaForConditionalGeneration` |"
    assert full(cells).splitlines()[2] == f"{line} yes | refused |"
    assert compact(cells).splitlines()[2] == "| all behaviours that the class has (1) | llava |"
    assert compact(cells).splitlines()[-1] == "Refused for every family: video."
    other = {("llava-next", "beams"): "refused", ("llava-next", "video"): "yes"}
    wanted = ["| all but: beams (1) | llava-next |", "| all but: video (1) | llava |"]
    assert compact({**cells, **other}).splitlines()[2:] == wanted


def test_tables_are_written_between_the_markers_unless_a_cell_fails(tmp_path: Path) -> None:
    page, good = tmp_path / "models.md", report(tmp_path / "good.xml")
    page.write_text(f"before {BEGIN} old {END} after")
    bad = report(tmp_path / "bad.xml", beams="<failure/>")
    assert main([str(bad), "--write", str(page)]) == 1
    assert page.read_text() == f"before {BEGIN} old {END} after"
    assert main([str(good), "--write", str(page)]) == 0
    written = page.read_text()
    assert written.startswith(f"before {BEGIN}\n\n| family |")
    assert written.endswith(f"|\n\n{END} after")
    assert replace_between_markers(written, "x") == f"before {BEGIN}\n\nx\n\n{END} after"

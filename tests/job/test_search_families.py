"""`thinsight search` from a model folder to the report, on families other than LLaVA.

The processor is a stand-in: the real ones need files, and some of them torchvision.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conformance.families import FAMILIES
from conformance.inputs import EOS
from tiny import tiny_images
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "evaluation"))
from family_processor import RowProcessor
from test_grid import SETTINGS

from thinsight import Evaluator, Reduction, loading
from thinsight.cli import app
from thinsight.evaluation import load_examples
from thinsight.report.data import load_report_data
from thinsight.runtime import apply

CALIBRATION, TEST = [[3, 5], [2, 9], [6, 1], [1, 1]], [[4, 4], [2, 3, 9], [5, 2]]
TWO_IMAGES = 5  # the row of both sets together that has two


def write_data(folder: Path) -> tuple[Path, Path]:
    """Two sets of questions "row 0" to "row 6", the numbers that the stand-in processor knows."""
    pictures, number = iter(tiny_images(8)), 0
    paths = []
    for name, specs in (("calibration", CALIBRATION), ("test", TEST)):
        lines = []
        for spec in specs:
            images = [f"{name}-{number}-{i}.png" for i in range(len(spec) - 1)]
            for image in images:
                next(pictures).save(folder / image)
            lines.append(json.dumps({"id": f"e{number}", "images": images, "question": f"row {number}"}))
            number += 1
        path = folder / f"{name}.jsonl"
        path.write_text("\n".join(lines))
        paths.append(path)
    return paths[0], paths[1]


@pytest.mark.parametrize("name", ["internvl-qwen2", "qwen2.5-vl"])
def test_search_and_report(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES[name]
    processor = RowProcessor(family, [*CALIBRATION, *TEST])
    processor.image_processor = SETTINGS
    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", lambda *_, **__: processor)
    built = family.build()
    built.generation_config.eos_token_id = [EOS, *range(60, 70)]
    built.save_pretrained(tmp_path / "model")
    calibration, test = write_data(tmp_path)
    out = tmp_path / "out"
    arguments = ["search", "--model", tmp_path / "model", "--data", calibration, "--test-data", test]
    settings = [
        "--out",
        out,
        "--max-drop",
        0.5,
        "--no-certify",
        "--max-new-tokens",
        2,
        "--batch-size",
        3,
        "--device",
        "cpu",
    ]
    bounded = ["--cache-gib", 0]
    result = CliRunner().invoke(app, [str(word) for word in (*arguments, *settings, *bounded)])
    assert result.exit_code == 0, result.output

    found = Reduction.from_pretrained(out)
    assert found.model_type == family.model_type
    assert not found.schedule.is_full
    data = load_report_data(out)
    assert data.headline is not None
    assert data.headline.flops_ratio > 1
    assert data.headline.vision_flops is not None
    assert data.headline.vision_flops > 0
    model, _ = loading.load_model(tmp_path / "model", device="cpu")
    examples = load_examples(str(test))
    evaluator = Evaluator(model, processor, examples, max_new_tokens=2, batch_size=3)
    assert data.headline.score == evaluator(found).score

    inputs = family.batch(processor.rows[len(CALIBRATION) :]).inputs
    options = {"max_new_tokens": 2, "do_sample": False}
    full = model.generate(**inputs, **options)
    with apply(model, found):
        reduced = model.generate(**inputs, **options)
    same = [bool((a == b).all()) for a, b in zip(full, reduced, strict=True)]
    assert data.headline.score == pytest.approx(sum(same) / len(same))

    shown = [picture.question for picture in data.pictures]
    if name == "qwen2.5-vl":
        assert shown == ["row 4", "row 5", "row 6"]
    else:  # the tiles of two images form no grid: said, and the report goes on without that picture
        assert shown == ["row 4", "row 6"]
        assert "No picture of example 'e5': 2 images are cut into" in result.stderr.replace("\n", " ")
    assert (out / "report.html").read_text().count('class="picture"') == len(shown)

"""The tutorial's commands, in its order, on a small random model of the class that it is about.

The model lies in a folder of the name that the page gives to `--model`, so that the lines run as they stand there; only
the drop that is promised is wider, since there are 32 questions. What is left out is named below.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_standin import TOKEN, running
from tiny import VOCABULARY, tiny_images, tiny_inputs, tiny_llava, tiny_processor

import thinsight as ts
from thinsight.cli import app
from thinsight.evaluation.prompts import PromptReader

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/tutorial.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.M | re.S)
LINES = [line for block in BLOCKS for line in re.sub(r"\\\n\s*", " ", block).splitlines()]
MODEL = "llava-hf/llava-1.5-7b-hf"
ELSEWHERE = {"pip", "vllm"}  # what this environment has, or cannot run: `make test-vllm` does


def make_what_a_user_has(folder: Path) -> None:
    """A checkpoint, a folder of parquet, a table and a photograph under the page's names."""
    import datasets

    model, processor = tiny_llava(), tiny_processor()
    model.generation_config.eos_token_id = list(range(VOCABULARY))  # answers of one word, which a reduction may leave
    model.save_pretrained(folder / MODEL)
    processor.save_pretrained(folder / MODEL)
    images = tiny_images(16)
    images[0].save(folder / "photo.jpg")
    rows = [
        {"question_id": str(2 * place + turn), "image": image, "question": question, "answers": ["?"] * 10}
        for place, image in enumerate(images)
        for turn, question in enumerate(("what number is written", "which color is the circle"))
    ]
    write(rows, folder, datasets)
    examples = ts.load_examples(f"benchmark:textvqa={folder / 'textvqa'}")
    reader = PromptReader(model, processor)
    for row, example in zip(rows, examples, strict=True):  # labels that the full model gets right
        inputs = reader.batch([example])
        tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        row["answers"] = [processor.tokenizer.decode(tokens, skip_special_tokens=True).strip() or "?"] * 10
    write(rows, folder, datasets)
    lines = ["index\timage_path\tquestion\tanswer\tcategory"]
    for place, image in enumerate(images[:4]):
        image.save(folder / f"pope{place}.png")
        lines.append(f"{place}\tpope{place}.png\tis the circle red ?\t{'yes' if place % 2 else 'no'}\trandom")
    (folder / "pope.tsv").write_text("\n".join(lines) + "\n")


def write(rows: list[dict[str, object]], folder: Path, datasets: object) -> None:
    path = folder / "textvqa/validation-00000-of-00001.parquet"
    path.parent.mkdir(exist_ok=True)
    table = datasets.Dataset.from_list(rows)  # type: ignore[attr-defined]
    table.cast_column("image", datasets.Image()).to_parquet(path)  # type: ignore[attr-defined]


def test_the_tutorial_from_a_checkpoint_to_a_pushed_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("THINSIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    make_what_a_user_has(tmp_path)
    names = []
    for line in LINES:
        program, *words = shlex.split(line)
        if program != "thinsight":
            assert program in ELSEWHERE
            continue
        names.append(words[0])
        if words[0] == "push":
            pushed = push(words)
            continue
        words = ["0.5" if before == "--max-drop" else word for before, word in zip(["", *words], words, strict=False)]
        with pytest.raises(SystemExit) as ended:
            app(words)
        assert ended.value.code == 0, (line, capsys.readouterr())
        told = capsys.readouterr().out
        if words[0] == "data":
            assert "32" in told
    asked = "doctor check analyze data plan search search compare evaluate bench show push"
    assert names == asked.split()

    reduction = ts.Reduction.from_pretrained("textvqa-reduction")
    assert reduction.certificate is not None
    assert reduction.certificate.schedule is not None
    assert not reduction.schedule.is_full
    assert ts.Reduction.from_pretrained("textvqa-quarter").schedule.mean_keep_rate <= 0.25
    for file in ("analysis.html", "textvqa-reduction/report.html", "kept.png", "textvqa-compare/comparison.csv"):
        assert (tmp_path / file).stat().st_size > 0
    card = yaml.safe_load(pushed["README.md"].decode().split("---\n")[1])
    assert card["base_model"].endswith("llava-1.5-7b-hf")
    assert str(tmp_path) not in pushed["README.md"].decode() + pushed["reduction_config.json"].decode()

    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    used: dict[str, object] = {"inputs": tiny_inputs([[3, 5]])}
    exec(code.replace('device_map="cuda"', 'device_map="cpu"'), used)
    assert used["output"].shape[0] == 1  # type: ignore[attr-defined]


def push(words: list[str]) -> dict[str, bytes]:
    """What arrives at a stand-in of the Hub."""
    with running() as hub:
        names = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HOME": "hub", "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **names, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-m", "thinsight", *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return hub.repos[words[-1]]

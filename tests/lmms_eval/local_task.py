"""A task of lmms-eval made of the demo's questions: YAML, a table of JSON lines, images beside it; no network."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import thinsight

DEMO = Path(thinsight.__file__).parent / "demo"
YAML = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {table}
test_split: test
output_type: generate_until
doc_to_visual: !function {name}_utils.images
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
process_results: !function {name}_utils.score
generation_kwargs:
  max_new_tokens: 8
  temperature: 0
  do_sample: false
metric_list:
  - metric: right
    aggregation: {aggregation}
    higher_is_better: true
metadata:
  version: 0.0
"""
UTILS = """\
from pathlib import Path

from PIL import Image


def images(doc):
    return [Image.open(doc["image"]).convert("RGB")]


def score(doc, results):
    return {"right": float(results[0].strip().rstrip(".").lower() == doc["answer"])}


def spread(values):
    return max(values) - min(values)
"""


def write_task(folder: Path, count: int, name: str = "thinsight_demo", aggregation: str = "mean") -> Path:
    """The folder for ``--include_path``, with a file ``questions.jsonl`` of thinsight's own of the same questions."""
    folder.mkdir(parents=True)
    with (DEMO / "test.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    for row in rows:
        image = folder / Path(row["image"]).name
        shutil.copyfile(DEMO / row["image"], image)
        row["image"] = str(image)
    for file in (f"{name}.jsonl", "questions.jsonl"):
        (folder / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    told = YAML.format(name=name, table=folder / f"{name}.jsonl", aggregation=aggregation)
    (folder / f"{name}.yaml").write_text(told, encoding="utf-8")
    (folder / f"{name}_utils.py").write_text(UTILS, encoding="utf-8")
    return folder

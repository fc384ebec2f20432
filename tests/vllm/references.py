"""What thinsight answers on transformers, as JSON: `python references.py FOLDER`, in the main environment.

FOLDER holds what checkpoints.py made. Writes the reductions beside it and references.json into it.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from cases import CASES, SPECIAL_IDS, Case, inputs_file, prompts_of, reduction_folder
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import thinsight as ts


@torch.no_grad()
def answer(model: Any, inputs: dict[str, torch.Tensor], tokens: int) -> dict[str, Any]:
    """Greedy ids, and the log-probability of each before any token is suppressed."""
    output = model.generate(
        **inputs,
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=SPECIAL_IDS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = output.sequences[0, inputs["input_ids"].shape[1] :].tolist()
    rows = zip(output.logits, ids, strict=True)
    logps = [round(float(logits[0].log_softmax(-1)[token]), 6) for logits, token in rows]
    return {"prompt": inputs["input_ids"][0].tolist(), "ids": ids, "logps": logps}


def run(model: Any, folder: Path, case: Case) -> list[dict[str, Any]]:
    answers = []
    reduction = None if case.rates is None else ts.Reduction.from_pretrained(reduction_folder(folder.parent, case))
    for prompt in prompts_of(folder.name):
        inputs = load_file(inputs_file(folder.parent, folder.name, prompt))
        with nullcontext() if reduction is None else ts.apply(model, reduction, per=case.per):
            answers.append(answer(model, inputs, prompt.answer))
    return answers


def main(root: Path, only: list[str]) -> None:
    for case in {case for cases in CASES.values() for case in cases if case.rates is not None}:
        reduction = ts.Reduction(ts.Schedule(list(case.rates or ())), dict(case.ranker), rerank=case.rerank)
        reduction.save_pretrained(reduction_folder(root, case))
    path = root / "references.json"
    references = json.loads(path.read_text()) if path.exists() and only else {}
    for name, cases in CASES.items():
        if only and name not in only:
            continue
        model = AutoModelForImageTextToText.from_pretrained(root / name, dtype=torch.float32).eval()
        references[name] = {case.name: run(model, root / name, case) for case in cases}
    path.write_text(json.dumps(references))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), sys.argv[2:])

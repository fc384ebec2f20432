"""Writes what `training/smollm2.py` trained: projector and LoRA, small enough for a repository.

`python -m training.smollm2_export --run runs/smollm2 --adapter FOLDER`; with `--model FOLDER` also the whole
stock model, which `thinsight.smollm2_model` makes of it and the pretrained weights. Knows nothing about how it was
trained.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from thinsight import smollm2
from thinsight.errors import MissingPackage
from thinsight.smollm2 import ADAPTER
from thinsight.smollm2_model import SPARE_TOKEN, build_processor, load_pretrained, merge, write_model

__all__ = ["ADAPTER", "SPARE_TOKEN", "build_processor", "export", "load_pretrained", "merge", "pretrained_file"]


def pretrained_file() -> Path:
    """The package's weights."""
    try:
        return smollm2.pretrained_file()
    except MissingPackage as error:
        raise SystemExit(str(error)) from None


def export(checkpoint: Path, folder: Path) -> int:
    """Writes what was trained as float16 safetensors with its recipe; returns the file's size in bytes."""
    state = torch.load(checkpoint, weights_only=True)
    lora = {name: x for name, x in state["parameters"].items() if not name.startswith("projector.")}
    projector = {f"projector.{name}": x for name, x in state["stock_projector"].items()}
    tensors = {name: x.half().contiguous() for name, x in {**projector, **lora}.items()}
    about = {"recipe": state["recipe"], "replanned": state["replanned"], "decay": state["decay"]}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
    (folder / "recipe.json").write_text(json.dumps({"step": state["step"], **about}, indent=2) + "\n")
    return (folder / ADAPTER).stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--adapter", type=Path, required=True, help="folder for what was trained")
    parser.add_argument("--model", type=Path, help="folder for the whole model")
    given = parser.parse_args()
    size = export(given.run / "checkpoint.pt", given.adapter)
    print(f"{given.adapter / ADAPTER}: {size / 1e6:.1f} MB")
    if given.model:
        write_model(pretrained_file(), given.adapter / ADAPTER, given.model)


if __name__ == "__main__":
    main()

"""How close measured prefill comes to what the FLOPs promise, on random-weight LLaVA models.

`python -m benchmarks.prefill` (or `make bench`): full and reduced side by side in one run, alternating,
medians. The schedule is the one the paper's G-Search found for LLaVA-1.5-7B, resampled to the benchmark's
depth. Weights do not matter for time, so no checkpoint is needed. Writes JSON beside the table.
"""

from __future__ import annotations

import argparse
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from thinsight import Reduction, Schedule
from thinsight.cost import flops
from thinsight.timing import measure

# Keep rates that G-Search found for LLaVA-1.5-7B (arXiv 2412.00556, figure of the searched strategies).
PAPER_GSEARCH = Schedule(
    [1, 1, .649, .64, .62, .62, .618, .503, .499, .498, .498, .486, .238, .237, .237, .237, .182, .182, .18,
     .078, .075, .074, .071, .07, .07, .061, .041, .041, .038, .033, .032, .032]
)  # fmt: skip
TEXT_TOKENS = 64
IMAGE_TOKEN = 31_999


@dataclass(frozen=True)
class Shape:
    """Sizes of one model; the defaults are small enough for two CPU cores."""

    hidden: int = 512
    layers: int = 16
    side: int = 24  # patches a side: N = side squared

    @property
    def vision_tokens(self) -> int:
        return self.side**2


def build(shape: Shape, dtype: torch.dtype, device: str) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights; its vision tower is tiny, since only the decoder is measured here."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=1,
            image_size=14 * shape.side, patch_size=14, projection_dim=64,
        ),
        text_config=LlamaConfig(
            hidden_size=shape.hidden, intermediate_size=int(2.75 * shape.hidden),
            num_hidden_layers=shape.layers, num_attention_heads=shape.hidden // 64, vocab_size=32_000,
            max_position_embeddings=4096,
        ),
        vision_feature_layer=-1,
        image_token_index=IMAGE_TOKEN,
        image_seq_length=shape.vision_tokens,
    )  # fmt: skip
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(config).to(device=device, dtype=dtype).eval()


def prompt(shape: Shape, batch: int) -> dict[str, torch.Tensor]:
    """Ids, mask and pixels of ``batch`` prompts of one image and 64 text tokens."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(3, 1000, (batch, TEXT_TOKENS), generator=generator)
    image = torch.full((batch, shape.vision_tokens), IMAGE_TOKEN)
    ids = torch.cat((text[:, :4], image, text[:, 4:]), 1)
    pixels = torch.randn(batch, 3, 14 * shape.side, 14 * shape.side, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def run(shape: Shape, batch: int, runs: int, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """One row: measured ratio, FLOPs ratio and their quotient."""
    model = build(shape, dtype, device)
    # Layer 0 keeps all at any depth: text attention cannot rank before it.
    schedule = Schedule([1.0, *PAPER_GSEARCH.resample(shape.layers).keep_rates[1:]])
    measured = measure(model, prompt(shape, batch), Reduction(schedule), runs=runs, new_tokens=8)
    config, n = model.config, shape.vision_tokens
    full, reduced = (flops(config, n_vision=n, n_text=TEXT_TOKENS, schedule=s) for s in (None, schedule))
    prefill = measured.timing("prefill")
    return {
        **asdict(shape), "N": shape.vision_tokens, "batch": batch, "runs": runs, "dtype": measured.dtype,
        "device": measured.device, "threads": measured.threads, "full_ms": prefill.full_ms,
        "reduced_ms": prefill.reduced_ms, "measured_ratio": prefill.ratio, "flops_ratio": full / reduced,
        "closeness": prefill.ratio * reduced / full, "answer_ratio": measured.timing("whole answer").ratio,
        "kv_ratio": measured.kv_ratio,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=Shape.hidden)
    parser.add_argument("--layers", type=int, default=Shape.layers)
    parser.add_argument("--side", type=int, default=Shape.side, help="patches a side; N is its square")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prefill.json"))
    arguments = parser.parse_args()
    shape = Shape(arguments.hidden, arguments.layers, arguments.side)
    dtype = getattr(torch, arguments.dtype)
    rows = [run(shape, batch, arguments.runs, dtype, arguments.device) for batch in arguments.batch]
    table = Table(title=f"Prefill, hidden {shape.hidden}, {shape.layers} layers, N = {shape.vision_tokens}")
    for column in (
        "batch",
        "full ms",
        "reduced ms",
        "measured",
        "FLOPs",
        "closeness",
        "whole answer",
        "KV bytes",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        times = [f"{row['full_ms']:.1f}", f"{row['reduced_ms']:.1f}"]
        ratios = ("measured_ratio", "flops_ratio", "closeness", "answer_ratio", "kv_ratio")
        table.add_row(str(row["batch"]), *times, *(f"{row[name]:.2f}" for name in ratios))
    Console().print(table)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": platform.machine(), "torch": torch.__version__, "rows": rows}
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()

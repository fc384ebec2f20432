"""What the hooks cost where nothing is dropped: a keep-all reduction against the stock model.

`python -m benchmarks.overhead` (or `make overhead`): both in one run, alternating, medians of paired
differences. The keep-all schedule lowers its rate at every layer by too little to lose a token, so every hook
is installed and every count computed. Prefill is measured on the shape of benchmarks/prefill.py; decoding on
a narrow model of the same depth, where the arithmetic does not drown what the hooks take. Writes JSON beside
the table.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration

from benchmarks.prefill import Shape, build, prompt
from thinsight import Schedule, apply

PREFILL_LIMIT, TOKEN_LIMIT = 0.02, 20e-6  # share of prefill; seconds per layer and decoded token
NARROW = Shape(hidden=64, side=8)
WARM_UP = 2


def keep_all(layers: int, tokens: int) -> Schedule:
    """Rates that fall at every layer and keep every one of `tokens`."""
    schedule = Schedule([1 - 0.5 * layer / (layers * tokens) for layer in range(layers)])
    assert set(schedule.counts(tokens)) == {tokens}
    return schedule


@torch.inference_mode()
def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(
    model: LlavaForConditionalGeneration, stock: Callable[[], Any], hooked: Callable[[], Any], pairs: int
) -> tuple[float, float]:
    """Median time of `stock`, and median of (`hooked` under keep-all) - `stock`, over pairs in which each
    goes first in turn. Putting the reduction on and off is not timed."""
    schedule = keep_all(model.config.text_config.num_hidden_layers, model.config.image_seq_length)
    base, extra = [], []
    for number in range(pairs + WARM_UP):
        before = seconds(stock) if number % 2 else 0.0
        with apply(model, schedule):
            after = seconds(hooked)
        before = before or seconds(stock)
        if number >= WARM_UP:
            base.append(before)
            extra.append(after - before)
    return median(base), median(extra)


def prefill_overhead(shape: Shape, pairs: int) -> dict[str, float]:
    """Prefill of one prompt, pixels to first logits."""
    model, inputs = build(shape, torch.float32, "cpu"), prompt(shape, 1)

    def work() -> Any:
        return model(**inputs, logits_to_keep=1)

    stock, extra = measured(model, work, work, pairs)
    return {"stock_ms": 1e3 * stock, "extra_ms": 1e3 * extra, "share": extra / stock}


@torch.inference_mode()
def decode_overhead(shape: Shape, pairs: int) -> dict[str, float]:
    """One more token behind a prompt, each side on a dynamic cache of its own."""
    torch.set_num_threads(1)  # threads for operations this small only add noise
    model, inputs = build(shape, torch.float32, "cpu"), prompt(shape, 1)
    layers, token = shape.layers, inputs["input_ids"][:, -1:]
    plain = model(**inputs, use_cache=True).past_key_values
    with apply(model, keep_all(layers, shape.vision_tokens)):
        ours = model(**inputs, use_cache=True).past_key_values
    stock, extra = measured(
        model,
        lambda: model(input_ids=token, past_key_values=plain, use_cache=True),
        lambda: model(input_ids=token, past_key_values=ours, use_cache=True),
        pairs,
    )
    return {"stock_us": 1e6 * stock / layers, "extra_us": 1e6 * extra / layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="of prefills")
    parser.add_argument("--tokens", type=int, default=600, help="pairs of decoded tokens")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    arguments = parser.parse_args()
    prefill = prefill_overhead(Shape(), arguments.pairs)
    decode = decode_overhead(NARROW, arguments.tokens)
    table = Table(title="Hooks of a keep-all reduction")
    for column in ("", "stock", "extra", "limit"):
        table.add_column(column)
    share = f"{prefill['extra_ms']:.2f} ms = {100 * prefill['share']:.2f} %"
    table.add_row("prefill", f"{prefill['stock_ms']:.1f} ms", share, f"{100 * PREFILL_LIMIT:.0f} %")
    per_token = f"{decode['stock_us']:.1f} us", f"{decode['extra_us']:.1f} us", f"{1e6 * TOKEN_LIMIT:.0f} us"
    table.add_row("decoding, per layer and token", *per_token)
    Console().print(table)
    result = {
        "prefill": prefill,
        "decode": decode,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if prefill["share"] > PREFILL_LIMIT or decode["extra_us"] > 1e6 * TOKEN_LIMIT:
        raise SystemExit("above the limit")


if __name__ == "__main__":
    main()

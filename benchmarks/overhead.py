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


def paired(model: LlavaForConditionalGeneration, work: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Median time of the stock model, and median of (under keep-all) - (stock), over alternating runs."""
    config = model.config
    schedule = keep_all(config.text_config.num_hidden_layers, config.image_seq_length)
    stock, difference = [], []
    for run in range(runs + 1):
        before = seconds(work) if run % 2 else 0.0  # who goes first takes turns
        with apply(model, schedule):
            hooked = seconds(work)
        before = before or seconds(work)
        if run:  # the first pair warms up
            stock.append(before)
            difference.append(hooked - before)
    return median(stock), median(difference)


def prefill_overhead(shape: Shape, runs: int) -> dict[str, float]:
    """Prefill of one prompt, pixels to first logits."""
    model, inputs = build(shape, torch.float32, "cpu"), prompt(shape, 1)
    stock, extra = paired(model, lambda: model(**inputs, logits_to_keep=1), runs)
    return {"stock_ms": 1e3 * stock, "extra_ms": 1e3 * extra, "share": extra / stock}


def decode_overhead(shape: Shape, runs: int, tokens: int) -> dict[str, float]:
    """Decoding with a dynamic cache, per layer and token: the difference between two answer lengths."""
    torch.set_num_threads(1)  # threads for operations this small only add noise
    model, inputs = build(shape, torch.float32, "cpu"), prompt(shape, 1)

    def answer(length: int) -> Callable[[], Any]:
        options = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
        return lambda: model.generate(**inputs, **options)

    short, extra_short = paired(model, answer(1), runs)
    long, extra_long = paired(model, answer(1 + tokens), runs)
    steps = tokens * shape.layers
    return {
        "stock_us": 1e6 * (long - short) / steps,
        "extra_us": 1e6 * (extra_long - extra_short) / steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    arguments = parser.parse_args()
    prefill = prefill_overhead(Shape(), arguments.runs)
    decode = decode_overhead(NARROW, arguments.runs, arguments.tokens)
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

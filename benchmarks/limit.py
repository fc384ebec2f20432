"""What a reduced prefill could take at best on this device: the stock decoder's own layers on as many tokens.

`python -m benchmarks.limit`. FLOPs promise a ratio that no device keeps for few tokens: weights have to be
read however few there are, and small matrix products are slower per FLOP. Here the stock decoder, without any
reduction, runs prompts as long as each layer of a schedule sees, and a layer's share of those times is added
up. What a measured row is short of that limit is the cost of reducing; what the limit is short of the FLOPs
ratio is the device's. Lengths and reduced passes take turns in one run, and medians are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch

from benchmarks.prefill import (
    SCHEDULES,
    TEXT_TOKENS,
    Shape,
    add_options,
    add_shape_options,
    flops_ratios,
    milliseconds,
    prompt,
    random_models,
    workload,
)
from benchmarks.table import RESULTS, Columns, Results, Row, about, number, setting
from thinsight import Reduction

COLUMNS: Columns = {
    **{name: setting(name) for name in ("N", "batch", "schedule")},
    "FLOPs": number("flops_ratio", "{:.2f}"),
    "limit": number("limit_ratio", "{:.2f}"),
    "measured": number("ratio", "{:.2f}"),
    "limit / FLOPs": number("limit_closeness", "{:.2f}"),
    "measured / limit": number("closeness", "{:.2f}"),
}


@torch.inference_mode()
def limit(model: Any, shape: Shape, reduction: Reduction, batch: int, runs: int) -> Row:
    """Times of one row: a stock decoder on each length that the schedule's layers see, and a reduced prefill.

    Args:
        model: of `build`.
        shape: of the model.
        reduction: what is measured.
        batch: prompts.
        runs: timed passes of each length and of the reduced prefill.
    """
    work = workload(model, prompt(shape, batch))
    counts = reduction.schedule.counts(shape.vision_tokens)
    lengths = sorted({shape.vision_tokens, *counts}, reverse=True)
    decoder = model.get_decoder()
    stock: dict[int, list[float]] = {n: [] for n in lengths}
    reduced: list[float] = []
    for _ in range(runs + 1):
        for n in lengths:
            states = torch.randn(batch, n + TEXT_TOKENS, shape.hidden).to(model.device, model.dtype)
            job = partial(decoder, inputs_embeds=states, use_cache=True)
            stock[n].append(milliseconds(job, work.device))
        with work.under(reduction):
            reduced.append(milliseconds(work.prefill, work.device))
    typical = {n: median(times[1:]) for n, times in stock.items()}  # the first round warms up
    full, taken = typical[shape.vision_tokens], median(reduced[1:])
    best = sum(typical[n] for n in counts) / shape.layers
    flops = flops_ratios(work, reduction.schedule)
    return {
        **flops,
        "full_ms": full,
        "limit_ms": best,
        "reduced_ms": taken,
        "limit_ratio": full / best,
        "ratio": full / taken,
        "limit_closeness": full / best / flops["flops_ratio"],
        "closeness": best / taken,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape_options(parser, batch=[1])
    add_options(parser, RESULTS / "limit.json")
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    arguments = parser.parse_args(argv)
    results = Results(arguments.out, about(torch.device(arguments.device)), COLUMNS, arguments.resume)
    for shape, model in random_models(arguments):
        for batch in arguments.batch:
            for name in arguments.schedules:
                settings = {
                    "hidden": shape.hidden,
                    "layers": shape.layers,
                    "N": shape.vision_tokens,
                    "batch": batch,
                    "dtype": arguments.dtype,
                    "schedule": name,
                }
                if not results.has(settings):
                    reduction = SCHEDULES[name](shape.layers, shape.vision_tokens)
                    results.add({**settings, **limit(model, shape, reduction, batch, arguments.runs)})
    results.print("Prefill against the stock layers on as many tokens")


if __name__ == "__main__":
    main()

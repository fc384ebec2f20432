"""What a linear layer does per second with few tokens: weights read from memory, and weights in the cache.

`python -m benchmarks.products` (part of `make limit`). A decoder's weights are larger than any cache, so each
layer reads them anew. The more tokens share a reading, the less it matters; this says how much it does for as
few as a reduced model's deep layers see. Weights lie as oneDNN reads
them, so that nothing but the product is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.prefill import Shape, build, milliseconds
from benchmarks.table import RESULTS, Columns, Results, Row, about, number, setting

COLUMNS: Columns = {
    "tokens": setting("tokens"),
    "from memory, GFLOP/s": number("memory", "{:.0f}"),
    "from cache, GFLOP/s": number("cache", "{:.0f}"),
    "memory / cache": number("ratio", "{:.2f}"),
    "of the most tokens' rate": number("of_most", "{:.2f}"),
}
CPU = torch.device("cpu")


@torch.inference_mode()
def products(hidden: int, layers: int, tokens: Sequence[int], runs: int) -> list[Row]:
    """One row per number of tokens; they take turns, and so do memory and cache.

    Args:
        hidden: of a random LLaVA, whose attention's output projections are the layers.
        layers: how many it has; together their weights should exceed the cache.
        tokens: of each product, ascending.
        runs: timed rounds.
    """
    model = build(Shape(hidden, layers, side=2), torch.float32, "cpu")
    plain = [layer.self_attn.o_proj.weight for layer in model.get_decoder().layers]
    weights = [torch.ops.mkldnn._reorder_linear_weight(weight.detach()) for weight in plain]
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(runs + 1):
        for count in tokens:
            states = torch.randn(count, hidden)
            for name, chosen in (("memory", weights), ("cache", weights[:1] * layers)):
                job = partial(_all, states, chosen)
                times.setdefault((count, name), []).append(milliseconds(job, CPU))
    rates = {
        (count, name): 2e-6 * count * hidden**2 * layers / median(taken[1:])  # the first round warms up
        for (count, name), taken in times.items()
    }
    most = rates[tokens[-1], "memory"]
    return [
        {
            "hidden": hidden,
            "tokens": count,
            "memory": rates[count, "memory"],
            "cache": rates[count, "cache"],
            "ratio": rates[count, "memory"] / rates[count, "cache"],
            "of_most": rates[count, "memory"] / most,
        }
        for count in tokens
    ]


def _all(states: Tensor, weights: Sequence[Tensor]) -> None:
    for weight in weights:
        torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24, help="gone through in turn")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 72, 96, 128, 256, 640])
    parser.add_argument("--runs", type=int, default=25, help="timed rounds")
    parser.add_argument("--out", type=Path, default=RESULTS / "products.json")
    arguments = parser.parse_args(argv)
    results = Results(arguments.out, about(CPU), COLUMNS, resume=False)
    results.add(*products(arguments.hidden, arguments.layers, sorted(arguments.tokens), arguments.runs))
    results.print("A linear layer with few tokens")


if __name__ == "__main__":
    main()

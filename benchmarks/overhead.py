"""What the hooks cost where nothing is dropped: a keep-all reduction against the stock model.

`python -m benchmarks.overhead` (or `make overhead`): both in one run, taking turns, the best runs compared.
The keep-all schedule lowers its rate at every layer by too little to lose a token, so every hook
is installed and every count computed. Prefill is measured on the shape of benchmarks/prefill.py; decoding on
a narrow model of the same depth, where the arithmetic does not drown what the hooks take. Writes JSON beside
the table.

A share of one or two percent drowns in what the machine does beside, so the time inside the hooks is also
added up within the very pass whose share it is: of prefill and of decoding, on the larger shape.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration

from benchmarks.prefill import Shape, build, prompt, workload
from benchmarks.share import share_of
from thinsight import Schedule, apply
from thinsight.runtime.cache import CACHE

PREFILL_LIMIT, TOKEN_LIMIT = 0.02, 20e-6  # share of prefill; seconds per layer and decoded token
INSIDE_LIMIT = 0.01  # share of a pass inside hooks
LARGE = Shape(hidden=1024, layers=24)
NARROW = Shape(hidden=64, side=8)
WARM_UP = 2
TOKENS = 8  # decoded in a row


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


@dataclass(frozen=True)
class Overhead:
    """Seconds: of the stock model's median run, what hooks add to the best run, and what a second stock side
    adds to the first one's best run, which is nothing but noise."""

    stock: float
    extra: float
    noise: float


def measured(
    model: LlavaForConditionalGeneration, sides: Sequence[Callable[[], Any]], runs: int, in_a_row: int = 1
) -> Overhead:
    """Times of three sides that take turns: stock, stock again, and under keep-all.

    Best runs are compared, since whatever else a machine does only ever adds to a time. Putting the reduction
    on and off is not timed.
    """
    schedule = keep_all(model.config.text_config.num_hidden_layers, model.config.image_seq_length)
    times: list[list[float]] = [[], [], []]
    for number in range(runs + WARM_UP):
        for place in range(3):
            side = (number + place) % 3
            with apply(model, schedule) if side == 2 else nullcontext():
                taken = [seconds(sides[side]) for _ in range(in_a_row)]
            if number >= WARM_UP:
                times[side] += taken
    stock, again, hooked = map(min, times)
    return Overhead(median(times[0]), hooked - stock, abs(again - stock))


def prefill_overhead(shape: Shape, runs: int) -> Overhead:
    """Prefill of one prompt, pixels to first logits."""
    model, inputs = build(shape, torch.float32, "cpu"), prompt(shape, 1)

    def work() -> None:
        model(**inputs, logits_to_keep=1)

    return measured(model, [work] * 3, runs)


@torch.inference_mode()
def decode_overhead(shape: Shape, runs: int) -> Overhead:
    """Per layer and token: more tokens behind a prompt, each side on a dynamic cache of its own."""
    torch.set_num_threads(1)  # threads for operations this small only add noise
    model, inputs = build(shape, torch.float32, "cpu"), prompt(shape, 1)
    token = inputs["input_ids"][:, -1:]

    def side(reduced: bool) -> Callable[[], None]:
        schedule = keep_all(shape.layers, shape.vision_tokens)
        with apply(model, schedule) if reduced else nullcontext():
            cache = model(**inputs, use_cache=True)[CACHE]

        def decode() -> None:
            model(input_ids=token, use_cache=True, **{CACHE: cache})

        return decode

    found = measured(model, [side(False), side(False), side(True)], runs, TOKENS)
    layers = shape.layers
    return Overhead(found.stock / layers, found.extra / layers, found.noise / layers)


@dataclass(frozen=True)
class Inside:
    """Shares of a pass that are spent inside hooks, 0 to 1."""

    prefill: float
    decode: float


@torch.inference_mode()
def inside(shape: Shape, passes: int) -> Inside:
    """Of a prefill from encoded images, and of one more token behind it."""
    model, inputs = build(shape, torch.float32, "cpu"), prompt(shape, 1)
    work = workload(model, inputs)
    token = inputs["input_ids"][:, -1:]
    with apply(model, keep_all(shape.layers, shape.vision_tokens)):
        cache = work.prefill()[CACHE]

        def decode() -> None:
            model(input_ids=token, use_cache=True, **{CACHE: cache})

        decode()
        found = (share_of(work.prefill, work.device, passes), share_of(decode, work.device, 4 * passes))
    return Inside(*(each.hooks + each.scoring for each in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prefills", type=int, default=20)
    parser.add_argument("--decodings", type=int, default=150, help=f"runs of {TOKENS} tokens")
    parser.add_argument("--inside", type=int, default=5, help="passes whose hooks are timed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overhead.json"))
    arguments = parser.parse_args()
    prefill = prefill_overhead(Shape(), arguments.prefills)
    threads = torch.get_num_threads()
    spent = inside(LARGE, arguments.inside)
    decode = decode_overhead(NARROW, arguments.decodings)
    table = Table(title="Hooks of a keep-all reduction: best runs of sides that take turns")
    for column in ("", "stock, median", "hooks add", "a second stock adds", "limit"):
        table.add_column(column)
    share, noise = prefill.extra / prefill.stock, prefill.noise / prefill.stock
    table.add_row(
        "prefill", f"{1e3 * prefill.stock:.1f} ms", f"{100 * share:.2f} %", f"{100 * noise:.2f} %",
        f"{100 * PREFILL_LIMIT:.0f} %",
    )  # fmt: skip
    per_token = [f"{1e6 * value:.1f} us" for value in (decode.stock, decode.extra, decode.noise, TOKEN_LIMIT)]
    table.add_row("decoding, per layer and token", *per_token)
    Console().print(table)
    Console().print(
        f"Inside hooks, hidden {LARGE.hidden}: {spent.prefill:.2%} of prefill, {spent.decode:.2%} of decoding"
    )
    result = {
        "prefill_seconds": asdict(prefill),
        "decode_seconds_per_layer_and_token": asdict(decode),
        "shares_inside_hooks": asdict(spent),
        "torch": torch.__version__,
        "threads": threads,
        "machine": platform.machine(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if share > PREFILL_LIMIT or decode.extra > TOKEN_LIMIT or max(astuple(spent)) > INSIDE_LIMIT:
        raise SystemExit("above the limit")


if __name__ == "__main__":
    main()

"""FastV as thinsight runs it against other ways to run it, on the same random model and prompts.

`python -m benchmarks.peers` (or `make peers`): half of the vision tokens from layer 2 on, ranked by the last
token's attention in layer 1. All ways take turns in one run; medians are compared.

- stock: nothing is dropped.
- thinsight: one row of attention is computed for the ranking, sdpa everywhere.
- full matrix: tokens are dropped, but layer 1's whole attention matrix is made for the ranking, all heads and
  rows, as `output_attentions` does. Eager attention in every layer, as that option asks for.
- full matrix, one layer: the same with eager attention in layer 1 alone, which is kinder than that option.
- mask only: ranked as the last one; dropped tokens stay and an additive mask hides them.

Before the clock starts, the ways that drop must have cached the same number of tokens in every layer, and all
must keep equally many of the vision tokens. Writes JSON and Markdown beside the table.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.prefill import Workload, add_options, add_shape_options, milliseconds, prompt, random_models, workload
from benchmarks.share import peak_of
from benchmarks.table import MIB, RESULTS, Columns, Results, Row, about, number, setting
from thinsight import apply
from thinsight.baselines import fastv
from thinsight.runtime import vision_token_mask
from thinsight.runtime.cache import CACHE

LAYER, RATE = 2, 0.5  # FastV's own
STOCK, THINSIGHT = "stock", "thinsight"
MATRIX, ONE_MATRIX, MASK = "full matrix", "full matrix, one layer", "mask only"
METHODS = (STOCK, THINSIGHT, MATRIX, ONE_MATRIX, MASK)
DROPPING = (THINSIGHT, MATRIX, ONE_MATRIX)
COLUMNS: Columns = {
    **{name: setting(name) for name in ("method", "N", "batch", "kept", "tokens")},
    "ms": number("ms", "{:.1f}"),
    "stock over this": number("ratio", "{:.2f}"),
    "peak MiB": number("peak_bytes", "{:.0f}", MIB),
    "same tokens as thinsight": number("same_tokens", "{:.1f} %", 100),
}


# --- the peers


class FullMatrix:
    """FastV from a whole attention matrix, by hooks on a Llama decoder. On inside its `with` block.

    Args:
        layers: the decoder layers.
        vision: (batch, seq) bool, the same number in every row.
        keep: how many vision tokens go on.
    """

    def __init__(self, layers: Sequence[nn.Module], vision: Tensor, keep: int) -> None:
        self.layers, self.vision, self.keep = layers, vision, keep
        self.kept: Tensor | None = None  # (batch, seq) bool: what goes on, text included
        self._attention: nn.Module = layers[LAYER - 1].self_attn
        self._config: Any = self._attention.config
        self._made: dict[str, Any] = {}  # by the first layer behind the ranking, for the others
        self._hooks: list[Any] = []

    def __enter__(self) -> FullMatrix:
        self._attention.config = copy.copy(self._config)
        self._attention.config._attn_implementation_internal = "eager"
        self._hooks = [
            self.layers[LAYER - 1].register_forward_pre_hook(self._show_causality, with_kwargs=True),
            self._attention.register_forward_hook(self._rank),
            *(layer.register_forward_pre_hook(self._continue, with_kwargs=True) for layer in self.layers[LAYER:]),
        ]
        return self

    def __exit__(self, *exception: Any) -> None:
        self._attention.config = self._config
        for hook in self._hooks:
            hook.remove()

    def _show_causality(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Eager attention needs a mask where sdpa goes without."""
        self._made = {}
        if kwargs.get("attention_mask") is None:
            kwargs = {**kwargs, "attention_mask": additive(causal(args[0]), args[0].dtype)}
        return args, kwargs

    def _rank(self, module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        """(batch, heads, seq, seq) -> which columns go on."""
        scores = output[1].mean(1)[:, -1].masked_fill(~self.vision, -1.0)  # (batch, seq)
        best = scores.topk(self.keep).indices
        self.kept = (~self.vision).scatter(1, best, True)

    def _continue(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a layer behind the ranking gets: fewer tokens, and what belongs to them."""
        assert self.kept is not None
        states, *rest = args
        if not self._made:
            index = self.kept.nonzero()[:, 1].view(states.shape[0], -1)  # (batch, tokens that go on)
            states = gather(states, index)
            mask = kwargs.get("attention_mask")
            if mask is not None:
                rows = mask.expand(len(index), -1, -1, -1)
                rows = rows.gather(2, index[:, None, :, None].expand(-1, 1, -1, rows.shape[3]))
                mask = rows.gather(3, index[:, None, None, :].expand(-1, 1, index.shape[1], -1))
            embeddings = tuple(gather(each, index) for each in kwargs["position_embeddings"])
            self._made = {"attention_mask": mask, "position_embeddings": embeddings, "position_ids": None}
        return (states, *rest), {**kwargs, **self._made}


class MaskOnly(FullMatrix):
    """The same ranking, but all tokens stay: a mask hides those that FastV drops."""

    def _continue(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self.kept is not None
        if not self._made:
            seen = causal(args[0]) & self.kept[:, None, None, :]
            self._made = {"attention_mask": additive(seen, args[0].dtype)}
        return args, {**kwargs, **self._made}


def causal(states: Tensor) -> Tensor:
    """Which keys (last axis) a query (the axis before) sees: (1, 1, seq, seq) bool."""
    seq = states.shape[1]
    return torch.ones(1, 1, seq, seq, dtype=torch.bool, device=states.device).tril()


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to be added to logits."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def gather(states: Tensor, index: Tensor) -> Tensor:
    """Columns of (batch or 1, seq, dim) by (batch, columns)."""
    wanted = index[:, :, None].expand(-1, -1, states.shape[2])
    return states.expand(len(index), -1, -1).gather(1, wanted)


@contextmanager
def eager(model: Any, peer: FullMatrix) -> Iterator[FullMatrix]:
    """Eager attention in all layers, and a peer on top."""
    before = model.get_decoder().config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with peer:
            yield peer
    finally:
        model.set_attn_implementation(before)


# --- measuring


@dataclass(frozen=True)
class Kept:
    """What a pass left: positions in each layer's cache, and which vision tokens go on (None: all)."""

    lengths: tuple[int, ...]
    vision: tuple[frozenset[int], ...] | None  # per row, numbers over its vision tokens
    peak: int | None

    @property
    def count(self) -> int | None:
        return None if self.vision is None else len(self.vision[0])

    def shared(self, other: Kept) -> float:
        """The share of another pass's vision tokens that this one kept too."""
        assert self.vision is not None
        assert other.vision is not None
        rows = zip(self.vision, other.vision, strict=True)
        return sum(len(one & two) for one, two in rows) / sum(map(len, other.vision))


Sides = Mapping[str, Callable[[], AbstractContextManager[Any]]]


def sides(work: Workload, vision: Tensor) -> Sides:
    """Each method, as what puts it on the model."""
    model = work.model
    layers = list(model.get_decoder().layers)
    reduction = fastv(len(layers), layer=LAYER, rate=RATE)
    keep = reduction.schedule.counts(work.n_vision)[LAYER]
    return {
        STOCK: nullcontext,
        THINSIGHT: lambda: apply(model, reduction),
        MATRIX: lambda: eager(model, FullMatrix(layers, vision, keep)),
        ONE_MATRIX: lambda: FullMatrix(layers, vision, keep),
        MASK: lambda: MaskOnly(layers, vision, keep),
    }


def look(work: Workload, under: Callable[[], AbstractContextManager[Any]], vision: Tensor) -> Kept:
    """One pass of a side, not timed."""
    with under() as on:
        output, peak = peak_of(work.prefill, work.device)
        lengths = tuple(layer.keys.shape[2] for layer in output[CACHE].layers)
        if isinstance(on, FullMatrix):
            assert on.kept is not None
            rows = [kept[real].nonzero().flatten() for kept, real in zip(on.kept, vision, strict=True)]
        else:
            rows = [] if on is None else on.kept(LAYER)
    return Kept(lengths, tuple(frozenset(row.tolist()) for row in rows) or None, peak)


def check_counts(found: Mapping[str, Kept]) -> None:
    """Refuse to compare methods that keep different numbers of tokens."""
    reference = found[THINSIGHT]
    for method, kept in found.items():
        same_lengths = method not in DROPPING or kept.lengths == reference.lengths
        if not same_lengths or kept.count not in (None, reference.count):
            raise SystemExit(
                f"{method} keeps {kept.count} vision tokens and caches {kept.lengths}, {THINSIGHT} "
                f"{reference.count} and {reference.lengths}"
            )


def take_turns(work: Workload, found: Sides, runs: int) -> dict[str, list[float]]:
    """Milliseconds of every side's runs; each round begins with another side."""
    times: dict[str, list[float]] = {name: [] for name in found}
    names = list(found)
    for turn in range(runs):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            with found[name]():
                times[name].append(milliseconds(work.prefill, work.device))
    return times


@torch.inference_mode()
def compare(work: Workload, vision: Tensor, runs: int) -> list[Row]:
    """What is measured of each method, in the order of `METHODS`."""
    on = sides(work, vision)
    kept = {name: look(work, under, vision) for name, under in on.items()}
    check_counts(kept)
    times = take_turns(work, on, runs)
    stock = median(times[STOCK])
    return [
        {
            "method": name,
            "kept": work.n_vision if kept[name].count is None else kept[name].count,
            "tokens": kept[name].lengths[-1],
            "cached": kept[name].lengths,
            "ms": median(times[name]),
            "ratio": stock / median(times[name]),
            "runs_ms": times[name],
            "peak_bytes": kept[name].peak,
            "same_tokens": None if name == STOCK else kept[name].shared(kept[THINSIGHT]),
        }
        for name in METHODS
    ]


def run(arguments: argparse.Namespace, results: Results) -> None:
    """Measure the shapes and batches that are not there yet."""
    for shape, model in random_models(arguments):
        for batch in arguments.batch:
            settings = {
                **asdict(shape),
                "N": shape.vision_tokens,
                "batch": batch,
                "dtype": arguments.dtype,
                "runs": arguments.runs,
            }
            if not results.has(settings):
                inputs = prompt(shape, batch)
                work = workload(model, inputs)
                vision = vision_token_mask(model, inputs["input_ids"]).to(work.device)
                results.add(*({**settings, **row} for row in compare(work, vision, arguments.runs)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape_options(parser, batch=[1])
    add_options(parser, RESULTS / "peers.json")
    arguments = parser.parse_args(argv)
    results = Results(arguments.out, about(torch.device(arguments.device)), COLUMNS, arguments.resume)
    run(arguments, results)
    results.print("FastV in several ways, prefill")


if __name__ == "__main__":
    main()

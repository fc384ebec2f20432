"""How close measured prefill comes to what the FLOPs promise, on the CPU or on one GPU.

`python -m benchmarks.prefill` (or `make bench`): random-weight LLaVA models and the embedded demo models
under three schedules. Full and reduced take turns in one run, and medians are compared. Weights do not matter
for time, so no checkpoint is needed. Writes JSON and Markdown after every row; `--resume` goes on where a run
was interrupted.

What is timed is the decoder over a prompt whose images are encoded already, to the logits of its last
position. FLOPs count just that: the layers as thinsight.cost counts them, and the head at one position.
cost.py counts attention as the full square, as the field does; a causal kernel does half of it, which
`flops_ratio_causal` in the JSON and the column "causal" go by. Also measured, in passes that are not timed:
bytes of the KV cache, the peak memory of a pass beyond the weights, and the share of a reduced pass that goes
to scoring and hooks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks.share import peak_of, share_of, synchronize
from benchmarks.table import MIB, RESULTS, Columns, Results, Row, about, number, setting
from thinsight import Reduction, Schedule, apply, load_examples
from thinsight.baselines import fastv
from thinsight.budget import KeepBudget
from thinsight.cost import breakdown
from thinsight.evaluation.prompts import PromptReader
from thinsight.loading import DEMOS, load_demo
from thinsight.runtime import encode_images, num_layers, vision_token_mask
from thinsight.runtime.cache import CACHE
from thinsight.searches.shapes import sigmoid
from thinsight.timing import alternate, cache_bytes, on_device

# Keep rates that G-Search found for LLaVA-1.5-7B (arXiv 2412.00556, figure of the searched strategies).
PAPER_GSEARCH = Schedule(
    [1, 1, .649, .64, .62, .62, .618, .503, .499, .498, .498, .486, .238, .237, .237, .237, .182, .182, .18,
     .078, .075, .074, .071, .07, .07, .061, .041, .041, .038, .033, .032, .032]
)  # fmt: skip
PAPER_STEEPNESS = 0.6  # P-Sigmoid's k for 32 layers: the paper's best ones are .36 to .93
TEXT_TOKENS = 64
IMAGE_TOKEN = 31_999
RANDOM = "random LLaVA"


# --- what is run


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


def gsearch_of_paper(layers: int, n_vision: int) -> Reduction:
    """The paper's searched schedule at another depth; layer 0 keeps all, as text attention cannot rank it."""
    return Reduction(Schedule([1.0, *PAPER_GSEARCH.resample(layers).keep_rates[1:]]))


def sigmoid_of_an_eighth(layers: int, n_vision: int) -> Reduction:
    """P-Sigmoid at a mean keep rate of 12.5 %, the full layer 0 included."""
    budget = KeepBudget(layers, n_vision, 0.125)
    return Reduction(sigmoid(budget, PAPER_STEEPNESS * 32 / layers, first_layer=1))


def fastv_half(layers: int, n_vision: int) -> Reduction:
    """FastV with its own constants."""
    return fastv(layers, layer=2, rate=0.5)


SCHEDULES: dict[str, Callable[[int, int], Reduction]] = {
    "gsearch": gsearch_of_paper,
    "psigmoid-12.5": sigmoid_of_an_eighth,
    "fastv-50": fastv_half,
}


@dataclass(frozen=True)
class Workload:
    """One batch on one model, ready to be timed with and without a reduction."""

    model: Any
    batch: int
    n_vision: int  # per prompt
    n_text: int
    prefill: Callable[[], Any]
    answer: Callable[[int], Any]  # generates so many tokens
    under: Callable[[Reduction], AbstractContextManager[Any]]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device


def workload(model: Any, inputs: Mapping[str, Any]) -> Workload:
    """A processor's batch of prompts with one image each; the images are encoded here, before any clock
    starts."""
    batch = on_device(model, inputs)
    text = {name: value for name, value in batch.items() if not name.startswith("pixel_")}
    vision = encode_images(model, batch).model_inputs()
    ids = batch["input_ids"]
    n_vision = int(vision_token_mask(model, ids).sum(1).max())
    return Workload(
        model=model,
        batch=ids.shape[0],
        n_vision=n_vision,
        n_text=ids.shape[1] - n_vision,  # padding included: the model runs on it too
        prefill=lambda: model(**text, **vision, use_cache=True, logits_to_keep=1),
        answer=lambda tokens: model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False),
        under=lambda reduction: apply(model, reduction),
    )


# --- measuring


@dataclass(frozen=True)
class Runs:
    """How often a row's parts are run."""

    prefills: int = 5
    answers: int = 3  # 0: not measured
    tokens: int = 16  # of an answer
    shares: int = 3  # passes for the share of scoring; 0: not measured


def milliseconds(job: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock time of one call, the device's queued work included."""
    synchronize(device)
    start = time.perf_counter()
    job()
    synchronize(device)
    return 1000 * (time.perf_counter() - start)


@torch.inference_mode()
def compare(work: Workload, reduction: Reduction, runs: Runs) -> Row:
    """All that is measured of one row. The passes that measure memory come first and serve as warm-up."""
    row = {
        **flops_ratios(work, reduction.schedule),
        **sizes(work, reduction),
        **times(work, reduction, runs),
        **shares(work, reduction, runs.shares),
    }
    return {
        **row,
        "closeness": row["ratio"] / row["flops_ratio"],
        "closeness_causal": row["ratio"] / row["flops_ratio_causal"],
    }


def flops_ratios(work: Workload, schedule: Schedule) -> Row:
    """FLOPs of the timed call, full over reduced: with attention as a whole square, and as half of it."""
    full, reduced = (
        breakdown(work.model.config, n_vision=work.n_vision, n_text=work.n_text, schedule=each)
        for each in (None, schedule)
    )
    square, causal = (
        tuple(part.total + part.lm_head - unseen * part.attention for part in (full, reduced)) for unseen in (0.0, 0.5)
    )
    return {"flops_ratio": square[0] / square[1], "flops_ratio_causal": causal[0] / causal[1]}


def sizes(work: Workload, reduction: Reduction) -> Row:
    """Bytes of the weights, and on each side of the KV cache and of the peak beyond the weights."""
    full, full_peak = _cached(work)
    with work.under(reduction):
        reduced, reduced_peak = _cached(work)
    return {
        "weight_bytes": weight_bytes(work.model),
        "full_kv_bytes": full,
        "reduced_kv_bytes": reduced,
        "kv_ratio": full / reduced,
        "full_peak_bytes": full_peak,
        "reduced_peak_bytes": reduced_peak,
    }


def weight_bytes(model: Any) -> int:
    """Bytes of the weights."""
    return sum(weight.nbytes for weight in model.parameters())


def _cached(work: Workload) -> tuple[int, int | None]:
    """Bytes of the cache after prefill, and of the peak on the way."""
    output, peak = peak_of(work.prefill, work.device)
    return cache_bytes(output[CACHE]), peak


def times(work: Workload, reduction: Reduction, runs: Runs) -> Row:
    """Times of prefill and of the whole answer."""
    row = _alternating(work, reduction, work.prefill, runs.prefills)
    if runs.answers:
        answers = _alternating(work, reduction, lambda: work.answer(runs.tokens), runs.answers)
        row |= {f"answer_{name}": value for name, value in answers.items()}
    return row


def _alternating(work: Workload, reduction: Reduction, job: Callable[[], Any], runs: int) -> Row:
    full, reduced = alternate(
        lambda: milliseconds(job, work.device), lambda: work.under(reduction), runs=runs, warmup=0
    )
    return {
        "full_ms": median(full),
        "reduced_ms": median(reduced),
        "ratio": median(full) / median(reduced),
        "full_runs_ms": full,
        "reduced_runs_ms": reduced,
    }


def shares(work: Workload, reduction: Reduction, passes: int) -> Row:
    """The shares of a reduced prefill that go to scoring and to hooks."""
    if not passes:
        return {}
    with work.under(reduction):
        found = share_of(work.prefill, work.device, passes)
    return {"scoring_share": found.scoring, "hooks_share": found.hooks}


# --- the table's columns


MEASURED: Columns = {
    "full ms": number("full_ms", "{:.1f}"),
    "reduced ms": number("reduced_ms", "{:.1f}"),
    "measured": number("ratio", "{:.2f}"),
    "FLOPs": number("flops_ratio", "{:.2f}"),
    "closeness": number("closeness", "{:.2f}"),
    "causal": number("closeness_causal", "{:.2f}"),
    "answer": number("answer_ratio", "{:.2f}"),
    "KV": number("kv_ratio", "{:.2f}"),
    "full peak MiB": number("full_peak_bytes", "{:.0f}", MIB),
    "reduced peak MiB": number("reduced_peak_bytes", "{:.0f}", MIB),
    "scoring": number("scoring_share", "{:.2f} %", 100),
    "hooks": number("hooks_share", "{:.2f} %", 100),
}
COLUMNS: Columns = {**{name: setting(name) for name in ("model", "N", "batch", "schedule")}, **MEASURED}


# --- rows


def settings_of(name: str, work: Workload, schedule: str, runs: Runs) -> Row:
    """What tells a row from another."""
    text = work.model.config.text_config
    return {
        "model": name,
        "hidden": text.hidden_size,
        "layers": num_layers(work.model),
        "N": work.n_vision,
        "text": work.n_text,
        "batch": work.batch,
        "schedule": schedule,
        "dtype": str(work.model.dtype).removeprefix("torch."),
        **asdict(runs),
    }


def workloads(arguments: argparse.Namespace) -> Iterator[tuple[str, Workload]]:
    """The models with their batches, one at a time, small before large."""
    for name in DEMOS if arguments.demos else ():
        model, processor = load_demo(arguments.dtype, name=name, device=arguments.device)
        examples = load_examples("demo:test")
        for batch in arguments.batch:
            yield name, workload(model, PromptReader(model, processor).typical_batch(examples, batch))
    for shape, model in random_models(arguments):
        for batch in arguments.batch:
            yield RANDOM, workload(model, prompt(shape, batch))


def random_models(arguments: argparse.Namespace) -> Iterator[tuple[Shape, Any]]:
    """The models that the options of `add_shape_options` ask for, one at a time."""
    for side in arguments.side:
        shape = Shape(arguments.hidden, arguments.layers, side)
        model = build(shape, getattr(torch, arguments.dtype), arguments.device)
        yield shape, model


def run(found: Iterable[tuple[str, Workload]], schedules: Iterable[str], runs: Runs, results: Results) -> None:
    """Measure the rows that are not there yet."""
    for name, work in found:
        for schedule in schedules:
            settings = settings_of(name, work, schedule, runs)
            if not results.has(settings):
                reduction = SCHEDULES[schedule](num_layers(work.model), work.n_vision)
                results.add({**settings, **compare(work, reduction, runs)})


def add_options(parser: argparse.ArgumentParser, out: Path) -> None:
    """The options that all speed benchmarks have."""
    parser.add_argument("--runs", type=int, default=Runs.prefills, help="timed prefills of each side")
    parser.add_argument("--resume", action="store_true", help="keep the rows that --out holds")
    parser.add_argument("--out", type=Path, default=out, help="JSON; a .md is written beside it")


def add_shape_options(parser: argparse.ArgumentParser, batch: list[int]) -> None:
    """The options that say which random models are run."""
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--side", type=int, nargs="*", default=[24, 48], help="patches a side; N is its square")
    parser.add_argument("--batch", type=int, nargs="+", default=batch)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_shape_options(parser, batch=[1, 8])
    add_options(parser, RESULTS / "prefill.json")
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--answers", type=int, default=Runs.answers, help="timed answers of each side")
    parser.add_argument("--tokens", type=int, default=Runs.tokens, help="length of an answer")
    parser.add_argument("--shares", type=int, default=Runs.shares, help="passes whose shares are measured")
    parser.add_argument("--demos", action=argparse.BooleanOptionalAction, default=True, help="demo models too")
    arguments = parser.parse_args(argv)
    runs = Runs(arguments.runs, arguments.answers, arguments.tokens, arguments.shares)
    results = Results(arguments.out, about(torch.device(arguments.device)), COLUMNS, arguments.resume)
    run(workloads(arguments), arguments.schedules, runs, results)
    results.print("Prefill, full over reduced")


if __name__ == "__main__":
    main()

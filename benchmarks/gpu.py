"""How close measured prefill comes to what the FLOPs promise, on one GPU, at the sizes of published models.

`python -m benchmarks.gpu` (or `make bench-gpu`): models built on the device from configs, with random weights
in bfloat16, so that neither a checkpoint nor host memory is needed. Rows: model and vision tokens x batch x
attention implementation x mode x schedule; the options choose among them.

Only the decoder is measured: every vision tower is tiny and never runs, and the prompts are random embeddings
of which N are said to be vision tokens. Modes:

- eager: the model as it is; shares of scoring and hooks are measured here alone;
- compiled: torch.compile of the decoder's forward, without whole answers;
- captured: the decoder's prefill recorded as a CUDA graph, for each side, and replayed (`CapturedPrefill`).
  Positions of vision tokens are read once, before any clock starts. Where there is no GPU, the recording is
  an eager call, and the row says so.

A row that cannot run says why in the place of its figures: a mode or an attention implementation that raises,
or memory that does not suffice. Nothing is assumed to work: a row whose cache does not hold what the schedule
says is refused as well. Figures are committed with their date and device, and only where a GPU gave them.
`--tiny` runs every model class at toy size on the CPU, eager and captured, in seconds: its times mean
nothing, it shows that the script runs.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from benchmarks.prefill import MEASURED, SCHEDULES, TEXT_TOKENS, Runs, Workload, add_options, compare
from benchmarks.table import RESULTS, Columns, Results, Row, about, setting
from thinsight import Reduction, apply
from thinsight.cost import kv_bytes
from thinsight.experimental.captured import CapturedPrefill, EagerReplay
from thinsight.runtime import Handle, num_layers

IMAGE_TOKEN = 5
BEFORE_IMAGE = 4  # text tokens
EAGER, COMPILED, CAPTURED = "eager", "compiled", "captured"
WARM_UP = 3  # passes of each side that compile it
GRAPH, REPLAY = "CUDA graph", "eager replay"  # how a prefill was captured
COMPILER = {
    # by default what was compiled without hooks would also serve the model that has them
    "skip_nnmodule_hook_guards": False,
    # hooks make each layer a graph of its own; by default from the ninth on they would be eager
    "recompile_limit": 1024,
    "accumulated_recompile_limit": 8192,
}
LONGEST_REASON, LONGEST_CELL = 300, 60  # characters of it in the JSON and in a table


# --- models

CLIP = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, "projection_dim": 32}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWERS: Mapping[str, dict[str, Any]] = {
    "llava": {**CLIP, **TOWER},
    "llava_next": {**CLIP, **TOWER},
    "internvl": {"model_type": "internvl_vision", "image_size": [28, 28], "patch_size": [14, 14], **TOWER},
    "qwen2_5_vl": {
        "model_type": "qwen2_5_vl", "depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2,
        "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [0],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """Sizes of a published model's decoder, and how many vision tokens its prompts have."""

    family: str  # model_type of the whole
    text: str  # model_type of the decoder
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    vision_tokens: tuple[int, ...]

    def tiny(self) -> Decoder:
        """The same class at a size for tests: deep enough for a mean keep rate of 12.5 %."""
        kv_heads = 2 if self.kv_heads < self.heads else 4
        counts = tuple(n // 64 for n in self.vision_tokens)
        return Decoder(self.family, self.text, 64, 10, 4, kv_heads, 96, 256, counts)


VICUNA_7B = Decoder("llava", "llama", 4096, 32, 32, 32, 11008, 32064, (576,))
MODELS: dict[str, Decoder] = {
    "InternVL2-1B": Decoder("internvl", "qwen2", 896, 24, 14, 2, 4864, 151655, (1792, 3328)),
    "LLaVA-1.5-7B": VICUNA_7B,
    "LLaVA-NeXT-7B": replace(VICUNA_7B, family="llava_next", vision_tokens=(2880,)),
    "Qwen2.5-VL-7B": Decoder("qwen2_5_vl", "qwen2_5_vl_text", 3584, 28, 28, 4, 18944, 152064, (1200,)),
    "InternVL2-8B": Decoder("internvl", "llama", 4096, 32, 32, 8, 14336, 92553, (1792, 3328)),
    "LLaVA-1.5-13B": Decoder("llava", "llama", 5120, 40, 40, 40, 13824, 32064, (576,)),
}


def config_of(decoder: Decoder) -> Any:
    """A config of the published decoder behind a tiny vision tower."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
    tower = TOWERS[decoder.family]
    head_dim = decoder.hidden // decoder.heads
    if decoder.family == "qwen2_5_vl":
        quarter = head_dim // 8  # time; height and width have 3 / 8 of a head's half each
        rope["mrope_section"] = [quarter, (head_dim // 2 - quarter) // 2, (head_dim // 2 - quarter) // 2]
        tower = {**tower, "out_hidden_size": decoder.hidden}
    text = {
        "model_type": decoder.text,
        "hidden_size": decoder.hidden,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "intermediate_size": decoder.intermediate,
        "vocab_size": decoder.vocabulary,
        "max_position_embeddings": 8192,
        "rope_parameters": rope,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return CONFIG_MAPPING[decoder.family](
        text_config=text, vision_config=tower, image_token_id=IMAGE_TOKEN, tie_word_embeddings=False
    )


def build(decoder: Decoder, dtype: torch.dtype, device: torch.device) -> Any:
    """A model whose random weights come into being on the device."""
    torch.manual_seed(0)
    with device:
        return AutoModelForImageTextToText.from_config(config_of(decoder), dtype=dtype).eval()


@dataclass(frozen=True)
class Prompts(Workload):
    """A workload that tells what its prefill is given."""

    inputs: Mapping[str, Any]


def workload(model: Any, n_vision: int, batch: int) -> Prompts:
    """Prompts as embeddings, with one image in the midst of the text."""
    seq, hidden = n_vision + TEXT_TOKENS, model.config.text_config.hidden_size
    generator = torch.Generator(model.device).manual_seed(0)
    embeddings = torch.randn(batch, seq, hidden, generator=generator, device=model.device, dtype=model.dtype)
    vision = torch.zeros(batch, seq, dtype=torch.bool, device=model.device)
    vision[:, BEFORE_IMAGE : BEFORE_IMAGE + n_vision] = True

    def answer(tokens: int) -> Any:
        mask = torch.ones_like(vision, dtype=torch.long)
        return model.generate(
            inputs_embeds=embeddings, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens,
            do_sample=False,
        )  # fmt: skip

    @contextmanager
    def under(reduction: Reduction) -> Iterator[Handle]:
        with apply(model, reduction) as handle, handle.vision(vision):
            yield handle

    # without a mask: stock asks the device about it, and that cannot be captured
    inputs = {"inputs_embeds": embeddings, "use_cache": True, "logits_to_keep": 1}
    return Prompts(
        model=model,
        batch=batch,
        n_vision=n_vision,
        n_text=TEXT_TOKENS,
        prefill=lambda: model(**inputs),
        answer=answer,
        under=under,
        inputs=inputs,
    )


# --- modes


@contextmanager
def as_it_is(work: Workload, reduction: Reduction) -> Iterator[Workload]:
    """The eager model."""
    yield work


@contextmanager
def compiled(work: Workload, reduction: Reduction) -> Iterator[Workload]:
    """The decoder compiled, once with the reduction's hooks and once without."""
    decoder = work.model.get_decoder()
    torch._dynamo.reset()
    decoder.forward = torch.compile(decoder.forward)
    try:
        with torch._dynamo.config.patch(**COMPILER):
            for _ in range(WARM_UP):
                work.prefill()
                with work.under(reduction):
                    work.prefill()
            yield work
    finally:
        del decoder.forward
        torch._dynamo.reset()


@contextmanager
def captured(work: Prompts, reduction: Reduction) -> Iterator[Workload]:
    """Each side recorded for this very prompt length when its turn comes, before it is timed."""
    stock = ExitStack()

    @contextmanager
    def record(*handle: Handle) -> Iterator[None]:
        recorder = None if work.device.type == "cuda" else EagerReplay()
        with CapturedPrefill(work.model, *handle, recorder=recorder):
            work.prefill()
            yield

    @contextmanager
    def under(which: Reduction) -> Iterator[None]:
        stock.close()
        with work.under(which) as handle, handle.planned(handle.plan(**work.inputs)), record(handle):
            yield
        stock.enter_context(record())

    with stock:
        stock.enter_context(record())
        yield replace(work, under=under)


MODES = {EAGER: as_it_is, COMPILED: compiled, CAPTURED: captured}


# --- rows


@torch.inference_mode()
def measure(work: Prompts, schedule: str, attention: str, mode: str, runs: Runs) -> Row:
    """One row's figures, or why there are none."""
    reduction = SCHEDULES[schedule](num_layers(work.model), work.n_vision)
    if mode != EAGER:
        runs = replace(runs, answers=runs.answers if mode == CAPTURED else 0, shares=0)
    try:
        with ExitStack() as stack:
            stack.enter_context(attending(work.model, attention))
            row = compare(stack.enter_context(MODES[mode](work, reduction)), reduction, runs)
    except torch.cuda.OutOfMemoryError:
        return {"skipped": "out of memory"}
    except Exception as error:  # whatever torch, its compiler or a kernel cannot do
        return {"skipped": reason(error)}
    if not caches_right(work, reduction, row):
        return {"skipped": "the cache is not the schedule's"}
    if mode == CAPTURED:  # a graph has its memory from the capture on: a replay takes none
        recorder = GRAPH if work.device.type == "cuda" else REPLAY
        row |= {"full_peak_bytes": None, "reduced_peak_bytes": None, "recorder": recorder}
    return row


def caches_right(work: Workload, reduction: Reduction, row: Row) -> bool:
    """Whether both sides cached what they should: a compiler might leave hooks out, or in."""
    full, reduced = (
        work.batch * kv_bytes(work.model.config, work.n_vision, work.n_text, schedule, work.model.dtype.itemsize)
        for schedule in (None, reduction.schedule)
    )
    return (row["full_kv_bytes"], row["reduced_kv_bytes"]) == (full, reduced)


@contextmanager
def attending(model: Any, implementation: str) -> Iterator[None]:
    """Another attention implementation for a while."""
    before = model.get_decoder().config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def reason(error: Exception) -> str:
    """An exception in one line that fits a table's cell."""
    return shorten(f"{type(error).__name__}: {error}".replace("|", "/"), LONGEST_REASON)


def shown_mode(row: Row) -> str:
    """A cell with the mode, and how it was captured if not as it should be."""
    return f"{row['mode']} ({REPLAY})" if row.get("recorder") == REPLAY else str(row["mode"])


def skipped(row: Row) -> str:
    """A cell that says why a row has no figures."""
    return shorten(row.get("skipped", ""), LONGEST_CELL)


COLUMNS: Columns = {
    **{name: setting(name) for name in ("model", "N", "batch", "attention")},
    "mode": shown_mode,
    "schedule": setting("schedule"),
    **MEASURED,
    "not measured": skipped,
}


def run(arguments: argparse.Namespace, results: Results) -> None:
    """Measure the rows that are not there yet; one model is held at a time."""
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    runs = Runs(arguments.runs, arguments.answers, arguments.tokens, 1 if arguments.tiny else Runs.shares)
    for name in arguments.models:
        decoder = MODELS[name].tiny() if arguments.tiny else MODELS[name]
        missing = [row for row in settings_of(name, decoder, arguments, runs) if not results.has(row)]
        if missing:
            measure_model(partial(build, decoder, dtype, device), missing, runs, results)
        release(device)


def settings_of(name: str, decoder: Decoder, arguments: argparse.Namespace, runs: Runs) -> Iterator[Row]:
    """What tells a model's rows apart; the modes that may break something come last."""
    modes = [mode for mode in MODES if mode in arguments.modes]
    choices = (modes, arguments.attention, decoder.vision_tokens, arguments.batch, arguments.schedules)
    for mode, attention, n_vision, batch, schedule in product(*choices):
        yield {
            "model": name,
            "hidden": decoder.hidden,
            "layers": decoder.layers,
            "N": n_vision,
            "batch": batch,
            "attention": attention,
            "mode": mode,
            "schedule": schedule,
            "dtype": arguments.dtype,
            **asdict(runs),
        }


def measure_model(make: Callable[[], Any], rows: Sequence[Row], runs: Runs, results: Results) -> None:
    """Measure the rows of one model."""
    try:
        model = make()
    except torch.cuda.OutOfMemoryError:
        results.add(*({**row, "skipped": "out of memory: the weights"} for row in rows))
        return
    for row in rows:
        work = workload(model, row["N"], row["batch"])
        results.add({**row, **measure(work, row["schedule"], row["attention"], row["mode"], runs)})
        release(model.device)


def release(device: torch.device) -> None:
    """Give back the device memory that nothing refers to any more."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `--tiny` changes what is not given."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, RESULTS / "gpu.json")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--attention", nargs="+", default=["sdpa", "flash_attention_2"])
    parser.add_argument("--modes", nargs="+", choices=list(MODES), default=list(MODES))
    parser.add_argument("--schedules", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--answers", type=int, default=Runs.answers, help="timed answers of each side")
    parser.add_argument("--tokens", type=int, default=Runs.tokens, help="length of an answer")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on the CPU")
    if parser.parse_known_args(argv)[0].tiny:
        parser.set_defaults(
            batch=[1, 2], attention=["sdpa"], modes=[EAGER, CAPTURED], runs=1, answers=1, tokens=2,
            dtype="float32", device="cpu", out=Path("out/gpu-tiny.json"),
        )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = options(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device is here: run this where one is, or --tiny to see that it runs")
    results = Results(arguments.out, about(device), COLUMNS, arguments.resume)
    run(arguments, results)
    results.print("Prefill at the sizes of published models, full over reduced")


if __name__ == "__main__":
    main()

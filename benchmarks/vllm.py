"""What a reduction gains inside vLLM: stock, one ratio before the decoder at equal FLOPs, and a schedule, in one run.

`.venv-vllm/bin/python -m benchmarks.vllm` (`make bench-vllm`): random LLaVA weights, three engines in one process that
take turns round by round; medians over rounds, ratios of rounds. Three kinds of rows:

- prefill: a batch of prompts with one token each; the time of the decoder's forward pass (ranking included) and of the
  whole call (scheduling, image processing and the vision tower included).
- decode: the time of a step of so many requests with long contexts; the engines take turns step by step, and the ratio
  is the median over pairs of steps.
- load: requests that arrive at random times (one seed for all engines), to the time of their first token and the
  throughput; `--rate inf` has all of them there at once, which is what an engine can do at most.

Ratios are of the wall clock. On a CPU prefill and decode also have those of processor time, which others that use the
machine do not stretch.

"one ratio" is one keep rate for all layers from layer 0, chosen by a fixed order: what an engine does that drops before
the decoder. Its FLOPs are the schedule's. "thin stages" loses one token at each of 6 stages: what bookkeeping costs;
"stock again" is a second stock engine: how far two engines that do the same are apart.
`--size 7b --device cuda` is LLaVA-1.5-7B's shape in bfloat16; `--size tiny` shows that the script runs.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.table import RESULTS, Columns, Results, about, number, setting
from thinsight import Reduction, Schedule, cost

TEXT = 64  # tokens of a prompt's text
WORDS = 512


@dataclass(frozen=True)
class Size:
    """A model's shape."""

    hidden: int
    layers: int
    heads: int
    middle: int
    dtype: str = "float32"


SIZES = {"tiny": Size(64, 6, 2, 128), "small": Size(1024, 24, 16, 2816), "7b": Size(4096, 32, 32, 11008, "bfloat16")}
ENGINES = ("stock", "one ratio", "schedule")
COLUMNS: Columns = {
    "kind": lambda row: f"{row['kind']}, {row['requests']} at {row['rate']}/s" if "rate" in row else str(row["kind"]),
    "N": setting("N"),
    "batch": setting("batch"),
    "engine": setting("engine"),
    "stock, ms": lambda row: f"{row.get('stock_ms', row.get('stock_ttft_ms')):,.0f}",
    "this, ms": lambda row: f"{row.get('reduced_ms', row.get('reduced_ttft_ms')):,.0f}",
    "FLOPs": number("flops_ratio", "{:.2f}"),
    "decoder": number("decoder_ratio", "{:.2f}"),
    "of FLOPs": number("of_flops", "{:.2f}"),
    "of FLOPs, processor": number("of_flops_cpu", "{:.2f}"),
    "whole call": number("call_ratio", "{:.2f}"),
    "decode step": number("step_ratio", "{:.3f}"),
    "decode step, processor": number("step_ratio_cpu", "{:.3f}"),
    "first token": number("ttft_ratio", "{:.2f}"),
    "throughput": number("throughput_ratio", "{:.2f}"),
}
CLOCK = "ratios of stock to this engine by the wall clock, those of processor time in columns that say so"


def stairs(layers: int) -> Schedule:
    """1, then 0.5 from an eighth of the layers on, 0.25 from a third, 0.125 from a half, 0.05 from three quarters."""
    falls = {layers // 8: 0.5, layers // 3: 0.25, layers // 2: 0.125, layers * 3 // 4: 0.05}
    return Schedule.stages(layers, {max(1, layer): rate for layer, rate in falls.items()})


def thin_stages(layers: int, n: int) -> Schedule:
    """Six stages, each of which loses one token of n."""
    return Schedule.stages(layers, {1 + i * (layers - 1) // 6: 1 - (i + 1) / n for i in range(6)})


def one_ratio(config: Any, schedule: Schedule, n: int) -> Schedule:
    """The keep rate for all layers whose FLOPs come nearest to the schedule's."""
    wanted = cost.flops(config, n_vision=n, n_text=TEXT, schedule=schedule)
    layers = schedule.num_layers

    def away(kept: int) -> float:
        flat = Schedule([kept / n] * layers)
        return abs(cost.flops(config, n_vision=n, n_text=TEXT, schedule=flat) - wanted)

    return Schedule([min(range(1, n + 1), key=away) / n] * layers)


def write_model(folder: Path, size: Size, side: int) -> Any:
    """A LLaVA's config, tokenizer and processor, without weights; its vision tower is tiny, for only the decoder is
    compared. Gives the config."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=14 * side,
        patch_size=14,
        projection_dim=64,
    )
    text = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.middle,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        vocab_size=32_000,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )
    text.architectures = ["LlamaForCausalLM"]
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=4, image_seq_length=side**2, tie_word_embeddings=False
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    names = ["<pad>", "<unk>", "<s>", "</s>", "<image>", *(f"w{i}" for i in range(WORDS))]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
    )
    pixels = {"height": 14 * side, "width": 14 * side}
    images = CLIPImageProcessor(size={"shortest_edge": 14 * side}, crop_size=pixels)
    LlavaProcessor(
        images, fast, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    ).save_pretrained(folder)
    return config


def prompts(count: int, side: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of `TEXT` tokens around one image each, none like another, so that no cache serves them."""
    from PIL import Image

    draw = random.Random(seed)
    made = []
    for _ in range(count):
        before = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(4))
        behind = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(TEXT - 5))
        image = Image.new("RGB", (14 * side, 14 * side), tuple(draw.randrange(256) for _ in range(3)))
        image.putpixel((0, 0), tuple(draw.randrange(256) for _ in range(3)))
        made.append({"prompt": f"<s> {before} <image> {behind}", "multi_modal_data": {"image": image}})
    return made


@dataclass(frozen=True)
class Seconds:
    """By the wall clock, and of the processor: all threads of this process."""

    wall: float = 0.0
    cpu: float = 0.0

    @classmethod
    def now(cls) -> Seconds:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.process_time())

    def since(self) -> Seconds:
        """How long ago it was."""
        now = self.now()
        return Seconds(now.wall - self.wall, now.cpu - self.cpu)

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(self.wall + other.wall, self.cpu + other.cpu)


class Engine:
    """vLLM in this process."""

    def __init__(
        self, model: Path, size: Size, reduction: Path | None, batch: int, n: int, more: dict[str, Any]
    ) -> None:
        from vllm import LLM

        longest = n + TEXT + 160
        self.llm = LLM(
            str(model),
            load_format="dummy",
            dtype=size.dtype,
            max_model_len=longest,
            max_num_seqs=max(batch, 8),
            max_num_batched_tokens=max(batch, 8) * longest,
            enable_chunked_prefill=False,
            enable_prefix_caching=False,
            limit_mm_per_prompt={"image": 1},
            mm_processor_cache_gb=0,
            disable_log_stats=True,
            additional_config={} if reduction is None else {"thinsight": str(reduction)},
            **more,
        )
        self.inner = self.llm.llm_engine
        runner = self.inner.model_executor.driver_worker.worker.model_runner
        self.model = runner.get_model()
        self.forward = Seconds()
        stock = self.model.forward

        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = Seconds.now()
            result = stock(*args, **kwargs)
            self.forward += begun.since()
            return result

        self.model.forward = timed

    def prefill(self, given: list[dict[str, Any]]) -> tuple[Seconds, Seconds]:
        """Of the decoder's forward pass, and of the whole call."""
        from vllm import SamplingParams

        self.forward = Seconds()
        begun = Seconds.now()
        self.llm.generate(given, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
        return self.forward, begun.since()

    def begin(self, given: list[dict[str, Any]], tokens: int) -> None:
        """Read prompts, and decode their first tokens."""
        for i, prompt in enumerate(given):
            self._add(f"{i}", prompt, tokens)
        for _ in range(3):
            self.step()

    def step(self) -> Seconds:
        """Of one step."""
        begun = Seconds.now()
        self.inner.step()
        return begun.since()

    def load(self, given: list[dict[str, Any]], arrivals: list[float], tokens: int) -> tuple[list[float], float]:
        """Seconds to the first token of each request, and of all of it."""
        first: dict[str, float] = {}
        waiting = list(enumerate(zip(given, arrivals, strict=True)))
        begun = Seconds.now()
        while waiting or self.inner.has_unfinished_requests():
            while waiting and begun.since().wall >= waiting[0][1][1]:
                number, (prompt, _) = waiting.pop(0)
                self._add(f"{number}", prompt, tokens)
            if not self.inner.has_unfinished_requests():
                time.sleep(0.001)
                continue
            for output in self.inner.step():
                if output.outputs and output.outputs[0].token_ids:
                    first.setdefault(output.request_id, begun.since().wall)
        return [first[f"{number}"] - at for number, at in enumerate(arrivals)], begun.since().wall

    def _add(self, name: str, prompt: dict[str, Any], tokens: int) -> None:
        from vllm import SamplingParams

        self.inner.add_request(name, prompt, SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))


@contextmanager
def engines(
    model: Path, size: Size, reductions: dict[str, Path | None], batch: int, n: int, more: dict[str, Any]
) -> Iterator[dict[str, Engine]]:
    """One engine for each, at once."""
    from vllm.distributed import cleanup_dist_env_and_memory

    made: dict[str, Engine] = {}
    try:
        for name, reduction in reductions.items():
            made[name] = Engine(model, size, reduction, batch, n, more)
        yield made
    finally:
        for each in made.values():
            each.inner.engine_core.shutdown()
        made.clear()
        cleanup_dist_env_and_memory()
        gc.collect()


def turns(made: dict[str, Engine], rounds: int, measured: Callable[[Engine, int], Any]) -> dict[str, list[Any]]:
    """What each engine gives in each round; one more round warms up. Every other round goes backwards."""
    found: dict[str, list[Any]] = {name: [] for name in made}
    for each in range(rounds + 1):
        order = list(made) if each % 2 else list(made)[::-1]
        for name in order:
            value = measured(made[name], each)
            if each:
                found[name].append(value)
    return found


def ratio(slow: list[float], fast: list[float]) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def ratios(name: str, slow: list[Seconds], fast: list[Seconds]) -> dict[str, float]:
    """The same by the wall clock, and of processor time where the processor does the work."""
    import torch

    found = {name: ratio([each.wall for each in slow], [each.wall for each in fast])}
    if not torch.cuda.is_available():
        found[f"{name}_cpu"] = ratio([each.cpu for each in slow], [each.cpu for each in fast])
    return found


def milliseconds(found: list[Seconds]) -> float:
    return 1e3 * median(each.wall for each in found)


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    size = SIZES[options.size]
    more: dict[str, Any] = {"enforce_eager": not options.compile}
    with tempfile.TemporaryDirectory() as place:
        for side in options.side:
            n, folder = side**2, Path(place) / f"model-{side}"
            config = write_model(folder, size, side)
            schedule = stairs(size.layers)
            kinds = {
                "one ratio": (one_ratio(config, schedule, n), "uniform"),
                "schedule": (schedule, "text-attention"),
                "thin stages": (thin_stages(size.layers, n), "text-attention"),
            }
            paths: dict[str, Path | None] = {"stock": None, "stock again": None}
            for name, (rates, ranker) in kinds.items():
                paths[name] = path = Path(place) / f"{name} {side}"
                Reduction(rates, ranker).save_pretrained(path)
            for batch in options.batch:
                common = {"size": options.size, "N": n, "batch": batch, "rounds": options.rounds}
                chosen = {name: paths[name] for name in ("stock", *options.engine)}
                with engines(folder, size, chosen, batch, n, more) as made:
                    if "prefill" in options.kind:
                        yield from _prefill_rows(made, options, common, side, config, kinds)
                    if "load" in options.kind:
                        yield from _load_rows(made, options, common, side)
                if "decode" in options.kind:
                    chosen = {name: paths[name] for name in ("stock", "stock again", "thin stages", "schedule")}
                    with engines(folder, size, chosen, batch, n, more) as made:
                        yield from _decode_rows(made, options, common, side)


def _prefill_rows(
    made: dict[str, Engine], options: Any, common: Any, side: int, config: Any, kinds: Any
) -> Iterator[Any]:
    batch, n = common["batch"], common["N"]
    found = turns(made, options.rounds, lambda engine, number: engine.prefill(prompts(batch, side, number)))
    full = cost.flops(config, n_vision=n, n_text=TEXT, schedule=Schedule.full(SIZES[options.size].layers))
    for name in list(made)[1:]:
        flops = full / cost.flops(config, n_vision=n, n_text=TEXT, schedule=kinds[name][0])
        decoder = ratios("decoder_ratio", [a for a, _ in found["stock"]], [a for a, _ in found[name]])
        yield {
            "kind": "prefill",
            **common,
            "engine": name,
            "flops_ratio": flops,
            **decoder,
            **{key.replace("decoder_ratio", "of_flops"): value / flops for key, value in decoder.items()},
            **ratios("call_ratio", [b for _, b in found["stock"]], [b for _, b in found[name]]),
            "stock_ms": milliseconds([a for a, _ in found["stock"]]),
            "reduced_ms": milliseconds([a for a, _ in found[name]]),
        }


def _decode_rows(made: dict[str, Engine], options: Any, common: Any, side: int) -> Iterator[Any]:
    batch = common["batch"]
    found: dict[str, list[Seconds]] = {name: [] for name in made}
    for seed in range(options.rounds):
        for engine in made.values():
            engine.begin(prompts(batch, side, seed), options.tokens)
        for turn in range(options.tokens - 4):
            for name in list(made) if turn % 2 else list(made)[::-1]:
                found[name].append(made[name].step())
        for engine in made.values():
            while engine.inner.has_unfinished_requests():
                engine.step()
    for name in list(made)[1:]:
        yield {
            "kind": "decode",
            **common,
            "engine": name,
            "tokens": options.tokens,
            **ratios("step_ratio", found["stock"], found[name]),
            "stock_ms": milliseconds(found["stock"]),
            "reduced_ms": milliseconds(found[name]),
        }


def _load_rows(made: dict[str, Engine], options: Any, common: Any, side: int) -> Iterator[Any]:
    count = options.requests

    def measured(engine: Engine, number: int) -> tuple[float, float]:
        draw, at, arrivals = random.Random(number), 0.0, []
        for _ in range(count):
            arrivals.append(at)
            at += draw.expovariate(options.rate) if options.rate < inf else 0.0
        first, seconds = engine.load(prompts(count, side, number), arrivals, options.tokens)
        return median(first), seconds

    found = turns(made, options.rounds, measured)
    for name in list(made)[1:]:
        yield {
            "kind": "load",
            **common,
            "engine": name,
            "requests": count,
            "rate": f"{options.rate:g}",
            "tokens": options.tokens,
            "ttft_ratio": ratio([a for a, _ in found["stock"]], [a for a, _ in found[name]]),
            "throughput_ratio": ratio([b for _, b in found["stock"]], [b for _, b in found[name]]),
            "stock_ttft_ms": 1e3 * median(a for a, _ in found["stock"]),
            "reduced_ttft_ms": 1e3 * median(a for a, _ in found[name]),
            "stock_tokens_per_s": count * options.tokens / median(b for _, b in found["stock"]),
            "reduced_tokens_per_s": count * options.tokens / median(b for _, b in found[name]),
        }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--side", type=int, nargs="+", default=[24, 48], help="patches a side: N is its square")
    parser.add_argument("--batch", type=int, nargs="+", default=[4])
    parser.add_argument("--kind", nargs="+", default=["prefill"], choices=["prefill", "decode", "load"])
    parser.add_argument("--engine", nargs="+", default=list(ENGINES[1:]), choices=ENGINES[1:], help="against stock")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, for decode and load")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2.0, help="requests a second; inf: all at once")
    parser.add_argument("--compile", action="store_true", help="steps without images run compiled")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--resume", action="store_true", help="add to the rows that are in --out")
    parser.add_argument("--out", type=Path, default=RESULTS / "vllm.json")
    options = parser.parse_args(arguments)
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    import torch
    from vllm import __version__

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here: leave out --device cuda")
    where = {**about(torch.device(options.device)), "vllm": __version__, "note": CLOCK}
    results = Results(options.out, where, COLUMNS, options.resume)
    for row in rows(options):
        results.add(row)
    results.print("vLLM")


if __name__ == "__main__":
    main()

"""Every transformers that pyproject.toml allows: what it calls a cache, and what is said of all others."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from conformance.checks import paged_cache
from stock_faults import faults
from tiny import tiny_images, tiny_inputs, tiny_llava, tiny_processor
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

import thinsight
from thinsight.errors import MissingPackage, Unsupported
from thinsight.evaluation import Evaluator, Example
from thinsight.experimental.captured import CapturedPrefill, EagerReplay
from thinsight.families import OLDEST, UNTESTED
from thinsight.loading import load_config
from thinsight.runtime import apply, encode_images, resuming, snapshotting
from thinsight.runtime.anatomy import check_version
from thinsight.runtime.cache import CACHE, cache_of, is_paged
from thinsight.schedule import Schedule
from thinsight.timing import measure

SCHEDULE = Schedule([1, 0.7, 0.7, 0.2])
TOKEN = torch.tensor([[7]])
RENAMED = CACHE == "cache"  # by transformers 5.24, which takes the old name too
OLD_NAME = "past_key_values"
QUESTIONS = ("what color is the circle ?", "how many", "what shape is above the star ?", "yes or no")
NAMES = (OLD_NAME, "cache") if RENAMED else (OLD_NAME,)

# --- the name of a cache


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_a_cache_is_found_by_every_name_that_the_model_takes(name: str) -> None:
    """Were it not, layers would see the keys of other columns, or the cache be refused as one of another
    reduction."""
    model, batch = tiny_llava(), tiny_inputs([[3, 5]], seed=14)
    both = torch.cat([batch["input_ids"], TOKEN], dim=1)
    with apply(model, SCHEDULE, ranker="uniform"), torch.no_grad():
        once = model(input_ids=both, pixel_values=batch["pixel_values"]).logits[:, -1]
        cache = DynamicCache(config=model.config.get_text_config())
        out = model(**batch, **{name: cache})
        assert out[CACHE] is cache
        assert cache.layers[3].keys.shape[2] < cache.get_seq_length()
        torch.testing.assert_close(model(input_ids=TOKEN, **{name: cache}).logits[:, -1], once)
        turn = model.generate(**batch, max_new_tokens=3, do_sample=False)
        again = model.generate(
            **batch, max_new_tokens=3, do_sample=False, **{name: DynamicCache(config=model.config.get_text_config())}
        )
    assert torch.equal(turn, again)


def test_the_name_is_the_one_of_the_outputs() -> None:
    output = BaseModelOutputWithPast(last_hidden_state=TOKEN, **{CACHE: DynamicCache()})
    assert list(output) == ["last_hidden_state", CACHE]


def test_a_paged_cache_is_told_by_its_type() -> None:
    plain, paged = DynamicCache(), paged_cache()
    for name in NAMES:
        assert cache_of({name: plain}) is plain
        assert not is_paged({name: plain})
    assert not is_paged({"cache": object()})
    for name in ("cache", OLD_NAME):
        assert is_paged({name: paged})
        assert cache_of({name: paged}) is None
    assert is_paged({OLD_NAME: None, "cache": paged})
    assert cache_of({CACHE: None, OLD_NAME: plain}) is (None if RENAMED else plain)  # as the model reads it
    assert cache_of({}) is None


def test_a_paged_cache_is_refused_where_there_is_an_image_and_let_through_where_there_is_none() -> None:
    model, batch = tiny_llava(), tiny_inputs([[3, 5]])
    seen: list[bool] = []
    with apply(model, SCHEDULE):
        with pytest.raises(Unsupported, match="on a paged cache: continuous batching keeps its own"):
            model(**batch, use_cache=False, cache=paged_cache())
        decoder = model.get_decoder()
        hook = decoder.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(is_paged(kwargs)) or (args, {**kwargs, "cache": None}),
            with_kwargs=True,
        )
        model(input_ids=TOKEN, use_cache=False, cache=paged_cache())
        hook.remove()
    assert seen == [True]


def test_a_prefill_on_a_paged_cache_is_not_recorded() -> None:
    model = tiny_llava()
    embeds = model.get_input_embeddings()(TOKEN.repeat(1, 4))
    with CapturedPrefill(model, recorder=EagerReplay()) as fast, torch.no_grad():
        arguments = {"inputs_embeds": embeds, "use_cache": True}
        assert fast._recordable(arguments, None)
        assert not fast._recordable({**arguments, "cache": paged_cache()}, None)


def test_our_own_calls_use_no_deprecated_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that calls a model itself, or reads its output: decoding, images read once, prefixes that
    reductions share, recorded prefills, timing."""
    model, processor, batch = tiny_llava(), tiny_processor(), tiny_inputs([[3, 5]])
    image, said = tiny_images(1)[0], []
    examples = [Example(str(i), (image,), question, ("red",)) for i, question in enumerate(QUESTIONS)]
    generic = logging.getLogger("transformers.utils.generic")
    monkeypatch.setattr(generic, "warning_once", said.append, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        Evaluator(model, processor, examples, batch_size=2)(SCHEDULE)
        with apply(model, SCHEDULE) as handle, torch.no_grad():
            with snapshotting(handle, 2) as taken:
                model(**batch)
            with resuming(handle, taken[0]):
                model(**batch)
            with CapturedPrefill(model, handle, recorder=EagerReplay()):
                model.generate(**batch, max_new_tokens=2)
            encode_images(model, batch)
        measure(model, batch, SCHEDULE, runs=1, warmup=0, new_tokens=2)
    assert not [text for text in said if OLD_NAME in text]


def test_only_one_file_knows_both_names() -> None:
    source = Path(thinsight.__file__).parent
    knowing = [path for path in source.rglob("*.py") if OLD_NAME in path.read_text("utf-8")]
    assert [path.relative_to(source).as_posix() for path in knowing] == ["runtime/cache.py"]


# --- other versions


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    check_version.cache_clear()
    yield lambda version: monkeypatch.setattr(transformers, "__version__", version)
    check_version.cache_clear()


@pytest.mark.parametrize("version", ["4.57.1", "5.6.0", "5.18.0", "5.18.0.dev0"])
def test_a_transformers_that_is_too_old_is_refused_at_use(installed: Callable[[str], None], version: str) -> None:
    model = tiny_llava()
    installed(version)
    message = f"transformers {re.escape(version)} is installed, and thinsight needs 5.19 or later: pip install"
    with pytest.raises(MissingPackage, match=message):
        apply(model, SCHEDULE)
    with pytest.raises(MissingPackage, match=message):
        load_config("demo")


@pytest.mark.parametrize("version", ["5.19.0", "5.20.2", "5.24.0", "5.24.1"])
def test_a_transformers_that_is_tested_is_taken_in_silence(
    installed: Callable[[str], None], version: str, recwarn: pytest.WarningsRecorder
) -> None:
    installed(version)
    load_config("demo")
    assert not [str(said.message) for said in recwarn if "transformers" in str(said.message)]


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.0.0"])
def test_a_transformers_that_nobody_tested_is_said_once(installed: Callable[[str], None], version: str) -> None:
    installed(version)
    with pytest.warns(UserWarning, match=r"not tested from 5\.25 on") as said:
        load_config("demo")
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(tiny_llava(), SCHEDULE).remove()


@pytest.mark.parametrize("version", [(5, 23), UNTESTED])
def test_nothing_is_left_out_of_the_suite_on_what_ci_runs(version: tuple[int, int]) -> None:
    assert not faults(version)
    assert faults(OLDEST)


def test_on_the_newest_release_one_stock_class_is_left_out() -> None:
    """Llama 4's, which fails on every call there, and a fault of the stock Kimi that is mended there."""
    assert [fault.tests for fault in faults((5, 24))] == [r"\[llama4", "fail_in_the_stock_kimi"]


def test_the_bounds_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    stated = re.findall(r'"transformers>=(\d+)\.(\d+),<(\d+)\.(\d+)"', text)
    assert [tuple(map(int, bounds)) for bounds in stated] == [(*OLDEST, *UNTESTED)]

"""A recorded prefill gives what the model gives, and hangs on nothing but the tensors that are copied in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import pytest
import torch
from conformance.behaviours import for_each
from conformance.checks import close, generate
from conformance.families import FAMILIES
from conformance.family import IMAGES, PADDED, Family
from conformance.inputs import Spec
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thinsight import Adaptive
from thinsight.errors import ThinsightError
from thinsight.experimental.captured import CapturedPrefill, EagerReplay
from thinsight.ranking import Context, Ranker
from thinsight.reduction import Reduction
from thinsight.runtime import Handle, apply
from thinsight.runtime.cache import CACHE
from thinsight.schedule import Schedule

SCHEDULE = Schedule([1, 0.7, 0.4, 0.2])
SINGLE: tuple[Spec, ...] = ([3, 5],)
LONGER: tuple[Spec, ...] = ([3, 9],)  # mostly in the same bucket
WINDOWS = (
    *("llava-mistral", "gemma3", "aya-vision", "paligemma2", "cohere2-vision", "shieldgemma2"),
    *("exaone4.5", "muse-glimmer", "gemma4", "gemma4-moe", "gemma4-unified", "llama4", "step3.7", "gemma3n"),
)
# vision features are added inside the decoder
WRITTEN = ("qwen3-vl", "qwen3-vl-moe", "qwen3-omni", "granite-docling", "granite4-vision")
STATES = (  # carried along the tokens
    *("qwen3.5", "qwen3.5-moe", "lfm2-vl", "lfm3-vl", "minicpm-v-4.6", "minicpm-v-4.7", "minicpm-ocr"),
)
SORTED = ("ernie4.5-vl",)  # vision tokens have experts of their own
REFUSED = [FAMILIES[name] for name in (*WINDOWS, *WRITTEN, *STATES, *SORTED) if name in FAMILIES]
# finished by the model, which cannot be bucketed
OWN_MASK = [FAMILIES[name] for name in ("paligemma", "molmo2") if name in FAMILIES]
RECORDED = [family for family in FAMILIES.values() if family not in REFUSED + OWN_MASK]
LLAVA = FAMILIES["llava"]
T = TypeVar("T")


class Tape:
    """A CUDA graph's stand-in for the CPU: operations are noted once and run again on the very tensors that
    they had, results written to where they were. No Python of the job runs a second time."""

    def record(self, job: Callable[[], T]) -> Callable[[], T]:
        with Noting() as noting:
            result = job()

        def replay() -> T:
            for function, args, kwargs, before in noting.noted:
                after = function(*args, **kwargs)
                for old, new in zip(tree_leaves(before), tree_leaves(after), strict=True):
                    if isinstance(old, Tensor) and not same_memory(old, new):
                        old.copy_(new)
            return result

        return replay


def same_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


class Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.noted.append((function, args, kwargs or {}, result))
        return result


def steps(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Tokens and logits (steps, batch, vocab) of a greedy answer."""
    out = generate(model, inputs, 4)
    return out.sequences, torch.stack(out.logits)


def kept(handle: Handle) -> list[list[list[int]]]:
    return [[row.tolist() for row in handle.kept(layer)] for layer in range(4)]


def shapes(prompts: list[dict[str, Any]]) -> int:
    """How many there are among prompts of equal images: batch and bucket."""
    return len({(ids.shape[0], (ids.shape[1] + 15) // 16) for ids in (p["input_ids"] for p in prompts)})


def check(family: Family, attn: str | None = None, **options: Any) -> None:
    """Batches with padding and single prompts of two lengths: as many shapes are recorded as there are."""
    model = family.build(attn)
    prompts = [family.inputs(specs, seed=i) for i, specs in enumerate((PADDED, PADDED, SINGLE, LONGER))]
    with apply(model, SCHEDULE, **options) as handle:
        wanted = [(*steps(model, inputs), kept(handle)) for inputs in prompts]
        with CapturedPrefill(model, handle, recorder=Tape()) as fast:
            for inputs, (tokens, logits, which) in zip(prompts, wanted, strict=True):
                found = steps(model, inputs)
                assert torch.equal(found[0], tokens)
                close(found[1], logits)
                assert kept(handle) == which
            assert (fast.recorded, fast.replayed) == (shapes(prompts), 4)
        assert "forward" not in vars(model.get_decoder())


@for_each(RECORDED)
def test_replayed_answers_are_the_reduced_models(family: Family) -> None:
    check(family)


@pytest.mark.parametrize(
    "options",
    [
        {"per": "prompt"},
        {"rerank": False},
        {"ranker": {"name": "text-attention", "queries": "last"}},
        {"ranker": "vision-attention"},
    ],
    ids=str,
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_replayed_answers_under_other_settings(attn: str, options: dict[str, Any]) -> None:
    check(LLAVA, attn, **options)


@for_each(OWN_MASK)
def test_a_finished_mask_is_recorded_where_nothing_is_added_to_it(family: Family) -> None:
    model, inputs = family.build(), family.inputs(PADDED)
    with apply(model, SCHEDULE) as handle:
        tokens, logits = steps(model, inputs)
        for multiple, replayed in ((16, 0), (1, 1)):
            with CapturedPrefill(model, handle, multiple=multiple, recorder=Tape()) as fast:
                found = steps(model, inputs)
                assert fast.replayed == replayed
            assert torch.equal(found[0], tokens)
            close(found[1], logits)


@pytest.mark.parametrize("full", [True, False], ids=["no reduction", "a full schedule"])
def test_the_full_model_is_recorded_too(full: bool) -> None:
    model = LLAVA.build()
    prompts = [LLAVA.inputs(specs, seed=i) for i, specs in enumerate((PADDED, PADDED, SINGLE, LONGER))]
    with ExitStack() as stack:
        handle = None if full else stack.enter_context(apply(model, Schedule.full(4)))
        wanted = [steps(model, inputs) for inputs in prompts]
        fast = stack.enter_context(CapturedPrefill(model, handle, recorder=Tape()))
        for inputs, (tokens, logits) in zip(prompts, wanted, strict=True):
            found = steps(model, inputs)
            assert torch.equal(found[0], tokens)
            close(found[1], logits)
        assert (fast.recorded, fast.replayed) == (2, 4)


def test_what_was_replayed_before_stays_as_it_is() -> None:
    model = LLAVA.build()
    first, second = (LLAVA.inputs(SINGLE, seed=seed) for seed in (1, 2))
    with apply(model, SCHEDULE) as handle, torch.no_grad():
        with CapturedPrefill(model, handle, recorder=Tape()):
            outputs = [model(**inputs) for inputs in (first, second)]
        for inputs, output in zip((first, second), outputs, strict=True):
            wanted = model(**inputs)
            close(output.logits, wanted.logits)
            for mine, layer in zip(output[CACHE].layers, wanted[CACHE].layers, strict=True):
                assert mine.get_seq_length() == layer.get_seq_length()
                close(mine.keys, layer.keys)
                close(mine.values, layer.values)


def test_a_plan_serves_prompts_of_its_shape() -> None:
    """And is copied in once."""
    model = LLAVA.build()
    first, second = (LLAVA.inputs(SINGLE, seed=seed) for seed in (1, 2))
    with apply(model, SCHEDULE) as handle, torch.no_grad():
        wanted = [model(**inputs).logits for inputs in (first, second, LLAVA.inputs(PADDED))]
        plan = handle.plan(**first)
        with CapturedPrefill(model, handle, recorder=Tape()) as fast, handle.planned(plan):
            for inputs, logits in zip((first, second), wanted, strict=False):
                close(model(**inputs).logits, logits)
            assert fast.replayed == 2
            with pytest.raises(ThinsightError, match=r"plan is for 1 rows of 25 tokens.*3 rows of 47"):
                model(**LLAVA.inputs(PADDED))
        close(model(**LLAVA.inputs(PADDED)).logits, wanted[2])


def test_a_plan_without_a_reduction_or_an_image_is_none() -> None:
    model = LLAVA.build()
    with apply(model, Schedule.full(4)) as handle:
        assert handle.plan(**LLAVA.inputs(SINGLE)) is None
    with apply(model, SCHEDULE) as handle, torch.no_grad():
        assert handle.plan(**LLAVA.inputs(([4],))) is None
        with handle.planned(None):
            model(**LLAVA.inputs(SINGLE))
        assert len(handle.kept(3)[0]) < len(handle.kept(0)[0])


def test_passes_that_are_no_plain_prefill_run_as_ever() -> None:
    model, inputs = LLAVA.build(), LLAVA.inputs(SINGLE)
    text = LLAVA.inputs(([6],))
    with apply(model, SCHEDULE) as handle, CapturedPrefill(model, handle, recorder=Tape()) as fast:
        assert model(**inputs).logits.requires_grad
        with torch.no_grad():
            assert len(model(**inputs, output_hidden_states=True).hidden_states) == 5
            assert model(**inputs, use_cache=False).get(CACHE) is None
            model(**text)
        generate(model, inputs, 2, cache_implementation="static")
        assert fast.replayed == 0
        handle.remove()
        generate(model, inputs, 2)
        with apply(model, SCHEDULE):
            generate(model, inputs, 2)
        assert fast.replayed == 0


def test_sampling_and_beams_start_from_a_replay() -> None:
    model, inputs = LLAVA.build(), LLAVA.inputs(PADDED)
    ways: list[dict[str, Any]] = [{"num_beams": 3}, {"do_sample": True}, {"prompt_lookup_num_tokens": 2}]
    with apply(model, SCHEDULE) as handle:
        for number, options in enumerate(ways):
            rows = LLAVA.inputs(SINGLE) if "prompt_lookup_num_tokens" in options else inputs
            torch.manual_seed(3)
            wanted = generate(model, rows, 6, **options).sequences
            with CapturedPrefill(model, handle, recorder=Tape()) as fast:
                torch.manual_seed(3)
                assert torch.equal(generate(model, rows, 6, **options).sequences, wanted), number
                assert fast.replayed >= 1


def test_shapes_used_longest_ago_are_forgotten() -> None:
    model = LLAVA.build()
    prompts = [LLAVA.inputs(specs) for specs in (SINGLE, PADDED, IMAGES)]
    recorded = []

    class Counting(EagerReplay):
        def record(self, job: Callable[[], T]) -> Callable[[], T]:
            recorded.append(job)
            return job

    with CapturedPrefill(model, recorder=Counting(), most=2) as fast, torch.no_grad():
        for number in (0, 1, 0, 2, 0, 1):
            model(**prompts[number])
        assert fast.recorded == 2
        assert len(recorded) == 4  # the second prompt's shape twice


class Curious(Ranker):
    """Looks at numbers."""

    name = "curious"

    def score(self, context: Context) -> Tensor:
        return context.index * float(context.size.max())


def test_a_ranker_that_waits_is_refused_and_the_model_goes_on() -> None:
    model, inputs = LLAVA.build(), LLAVA.inputs(SINGLE)
    with apply(model, SCHEDULE, ranker=Curious()) as handle, torch.no_grad():
        wanted = model(**inputs).logits
        with (
            CapturedPrefill(model, handle, recorder=EagerReplay()),
            pytest.raises(ThinsightError, match=r"waits for the device.*_local_scalar_dense"),
        ):
            model(**inputs)
        assert torch.equal(model(**inputs).logits, wanted)


@for_each(REFUSED)
def test_families_that_cannot_be_recorded_say_so(family: Family) -> None:
    model = family.build()
    with apply(model, Schedule.full(4)) as handle, pytest.raises(ThinsightError, match="cannot be recorded"):
        CapturedPrefill(model, handle, recorder=EagerReplay())
    assert "forward" not in vars(model.get_decoder())


def test_without_cuda_it_says_so() -> None:
    with pytest.raises(ThinsightError, match=r"model is on cpu.*CUDA"):
        CapturedPrefill(LLAVA.build())


def test_what_cannot_be_recorded_is_refused_at_once() -> None:
    model, recorder = LLAVA.build(), EagerReplay()
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"multiple": 0}, "multiple is 0"),
        ({"most": 1.5}, r"most is 1\.5"),
        ({"handle": SCHEDULE}, "handle is a Schedule"),
    ]
    for options, message in wrong:
        with pytest.raises(ThinsightError, match=message):
            CapturedPrefill(model, recorder=recorder, **options)
    with pytest.raises(ThinsightError, match="'flex_attention'"):
        CapturedPrefill(LLAVA.build("flex_attention"), recorder=recorder)
    with apply(model, SCHEDULE) as handle:
        with pytest.raises(ThinsightError, match="pass its handle"):
            CapturedPrefill(model, recorder=recorder)
        with pytest.raises(ThinsightError, match="of another model"):
            CapturedPrefill(LLAVA.build(), handle, recorder=recorder)
    adaptive = Adaptive("concentration", 2, (), (SCHEDULE,), (1.0,))
    with (
        apply(model, Reduction(SCHEDULE, adaptive=adaptive)) as handle,
        pytest.raises(ThinsightError, match="adaptive"),
    ):
        CapturedPrefill(model, handle, recorder=recorder)

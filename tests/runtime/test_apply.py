"""Putting a reduction on and taking it off: refusals, restoration, threads, and what the handle tells."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import IMAGE, tiny_inputs, tiny_llava
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_layers import GradientCheckpointingLayer

from thinsight.errors import ThinsightError, Unsupported
from thinsight.ranking import Ranker
from thinsight.reduction import Reduction
from thinsight.runtime import apply, decoder_layers, encode_images, num_layers, remove, vision_token_mask
from thinsight.runtime.anatomy import attention_of
from thinsight.runtime.cache import CACHE
from thinsight.schedule import Schedule

SCHEDULE = Schedule([1, 0.7, 0.7, 0.2])


def state(model) -> list[tuple]:
    """Everything that `apply` may touch."""
    return [
        (
            name,
            dict(module._forward_pre_hooks),
            dict(module._forward_hooks),
            dict(module._forward_hooks_always_called),
            getattr(module, "config", None),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
        )
        for name, module in model.named_modules()
    ]


def generate(model, batch, **options) -> torch.Tensor:
    return model.generate(**batch, max_new_tokens=4, do_sample=False, **options)


def test_parts_of_a_model() -> None:
    model = tiny_llava()
    assert num_layers(model) == len(decoder_layers(model)) == 4
    ids = tiny_inputs([[1, 1]])["input_ids"]
    assert torch.equal(vision_token_mask(model, ids), ids == IMAGE)


@pytest.mark.parametrize("ranker", ["text-attention", "vision-attention"])
def test_remove_restores_the_model(ranker: str) -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5], [2, 7]])
    stock = generate(model, batch)
    before, weights = state(model), {k: v.clone() for k, v in model.state_dict().items()}
    handle = apply(model, SCHEDULE, ranker=ranker)
    assert state(model) != before
    generate(model, batch)
    handle.remove()
    handle.remove()
    assert state(model) == before
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)
    assert torch.equal(generate(model, batch), stock)


class Failing(Ranker):
    name = "failing"
    needs = frozenset({"text-attention", "vision-attention"})

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.error = error

    def score(self, context):
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["ranker", "attention", "tower", "layer"])
def test_an_exception_leaves_no_trace(error: type[BaseException], where: str) -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5]])
    generate(model, batch)  # transformers puts hooks of its own on the tower, once

    def fail(*_):
        raise error

    module = {
        "attention": attention_of(decoder_layers(model)[0]),
        "tower": model.model.vision_tower.encoder.layers[1].self_attn,
        "layer": decoder_layers(model)[2],
    }.get(where)
    watch = module.register_forward_hook(fail) if module is not None else None
    before = state(model)
    ranker = Failing(error)
    if where != "ranker":
        ranker.score = lambda context: context.vision_attention  # type: ignore[method-assign]
    with pytest.raises(error), apply(model, SCHEDULE, ranker=ranker):
        generate(model, batch)
    assert state(model) == before
    if watch is not None:
        watch.remove()
    with apply(model, SCHEDULE):
        after = generate(model, batch)
    other = tiny_llava()
    with apply(other, SCHEDULE):
        assert torch.equal(after, generate(other, batch))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_handle_survives_an_exception(error: type[BaseException]) -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5], [1, 2]])
    with apply(model, SCHEDULE):
        wanted = generate(model, batch)
        calls = []

        def fail(*_):
            calls.append(1)
            raise error

        watch = attention_of(decoder_layers(model)[0]).register_forward_hook(fail)
        with pytest.raises(error):
            generate(model, batch)
        watch.remove()
        assert calls
        assert torch.equal(generate(model, batch), wanted)


def test_apply_twice_is_refused_and_apply_after_remove_is_not() -> None:
    model = tiny_llava()
    with apply(model, SCHEDULE), pytest.raises(ThinsightError, match="has a reduction on already"):
        apply(model, SCHEDULE)
    with apply(model, SCHEDULE) as handle:
        generate(model, tiny_inputs([[3, 5]]))
        assert len(handle.kept(3)[0]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reduction": Schedule([1, 0.5])}, r"2 keep rates but the model has 4 .*; use schedule.resample"),
        ({"reduction": Schedule([0.5] * 4)}, "layer 0 has none"),
        ({"reduction": [1, 1, 1, 0.5]}, "pass a Reduction or a Schedule"),
        ({"ranker": "nonsense"}, "choose one of .*cdpruner, dart"),
        ({"ranker": {"name": "random", "sed": 1}}, "no setting 'sed'"),
        ({"ranker": {"name": "text-attention", "queries": "all"}}, "queries is 'all'"),
        ({"per": "pixel"}, "per is 'pixel'"),
    ],
)
def test_refusals(arguments: dict, message: str) -> None:
    model = tiny_llava()
    before = state(model)
    with pytest.raises(ThinsightError, match=message):
        apply(model, **{"reduction": SCHEDULE, **arguments})
    assert state(model) == before
    apply(model, SCHEDULE).remove()


def test_models_that_are_not_supported_are_refused_with_the_reason() -> None:
    with pytest.raises(ThinsightError, match="model is a str"):
        apply("llava", SCHEDULE)
    model = tiny_llava()
    with pytest.raises(ThinsightError, match="model_type is 'llama'"):
        apply(model.model.language_model, SCHEDULE)
    model.model.language_model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ThinsightError, match="continuous batching"):
        apply(model, SCHEDULE)


def test_a_reduction_brings_its_ranker_and_family() -> None:
    model = tiny_llava()
    with apply(model, Reduction(SCHEDULE, {"name": "random", "seed": 4}, model_type="llava")) as handle:
        assert handle.ranker.to_dict() == {"name": "random", "seed": 4}
    with pytest.raises(ThinsightError, match="for model_type 'qwen2_vl'"):
        apply(model, Reduction(SCHEDULE, "random", model_type="qwen2_vl"))
    with pytest.raises(ThinsightError, match="given twice"):
        apply(model, Reduction(SCHEDULE, "random"), ranker="uniform")


def test_kept_tokens_are_nested_and_counted() -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5], [2, 3, 9], [7]])
    schedule = Schedule([1, 0.7, 0.3, 0.1])
    with apply(model, schedule) as handle:
        with pytest.raises(ThinsightError, match="run a prompt with an image first"):
            handle.kept(0)
        generate(model, batch)
        kept = [handle.kept(layer) for layer in range(4)]
        with pytest.raises(ThinsightError, match="layer is 4"):
            handle.kept(4)
    for layer, count in enumerate(schedule.counts(16)):
        assert [len(row) for row in kept[layer]] == [count, 2 * count, 0]
        assert sum(kept[layer][1] < 16) == count  # the rate holds for each image
        for row in range(3):
            assert set(kept[layer][row].tolist()) <= set(kept[max(layer - 1, 0)][row].tolist())
    with apply(model, Schedule.full(4)) as handle:
        generate(model, batch)
        with pytest.raises(ThinsightError, match="the schedule keeps every token"):
            handle.kept(0)


def test_layers_run_on_fewer_tokens() -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5]])
    seq = batch["input_ids"].shape[1]
    lengths: list[int] = []
    watches = [
        layer.self_attn.q_proj.register_forward_hook(lambda m, a, out: lengths.append(out.shape[1]))
        for layer in decoder_layers(model)
    ]
    with apply(model, Schedule([1, 0.5, 0.25, 0])), torch.no_grad():
        model(**batch)
    for watch in watches:
        watch.remove()
    assert lengths == [seq, seq - 8, seq - 12, seq - 16]


def test_padding_goes_where_the_batch_gets_shorter() -> None:
    """A text-only row beside an image row must not hold the image row's length up."""
    model = tiny_llava()
    batch = tiny_inputs([[3, 5], [4]])
    lengths: list[int] = []
    watch = decoder_layers(model)[3].self_attn.q_proj.register_forward_hook(
        lambda m, a, out: lengths.append(out.shape[1])
    )
    with apply(model, Schedule([1, 1, 1, 0])), torch.no_grad():
        model(**batch)
    watch.remove()
    assert lengths == [9]  # BOS and 8 words


@pytest.mark.parametrize("queries", ["instruction", "last"])
def test_teacher_forcing_ranks_by_the_prompt_alone(queries: str) -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5], [2, 3, 9], [7]], seed=31)
    ranker = {"name": "text-attention", "queries": queries}
    width = batch["input_ids"].shape[1]
    with apply(model, SCHEDULE, ranker=ranker) as handle, torch.no_grad():
        out = model.generate(
            **batch,
            max_new_tokens=5,
            min_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        kept = handle.kept(3)
        mask = torch.cat([batch["attention_mask"], torch.ones(3, 5).long()], dim=1)
        forced = {"input_ids": out.sequences, "attention_mask": mask, "pixel_values": batch["pixel_values"]}
        prompt = torch.arange(width + 5).expand(3, -1) < width
        with handle.prompt(prompt):
            logits = model(**forced).logits
        assert [row.tolist() for row in handle.kept(3)] == [row.tolist() for row in kept]
        torch.testing.assert_close(logits[:, width - 1 : -1], torch.stack(out.logits, 1), atol=1e-4, rtol=1e-4)
        loose = model(**forced).logits
        assert not torch.allclose(loose[:, width - 1 : -1], torch.stack(out.logits, 1), atol=1e-4, rtol=1e-4)
        with pytest.raises(ThinsightError, match="prompt mask has shape"), handle.prompt(prompt[:, 1:]):
            model(**forced)


def test_two_threads_each_keep_their_own() -> None:
    model = tiny_llava(layers=6)
    batches = [tiny_inputs(rows, seed=s) for s, rows in enumerate([[[3, 5], [1, 2]], [[2, 3, 9], [7]]])]
    results: dict[int, list] = {0: [], 1: []}
    configs = [attention_of(layer).config for layer in decoder_layers(model)]
    with apply(model, Schedule([1, 0.8, 0.6, 0.4, 0.2, 0.1])) as handle:
        wanted = []
        for batch in batches:
            wanted.append((generate(model, batch), [row.tolist() for row in handle.kept(4)]))

        def work(number: int) -> None:
            for _ in range(6):
                tokens = generate(model, batches[number])
                results[number].append((tokens, [row.tolist() for row in handle.kept(4)]))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(attention_of(x).config is c for x, c in zip(decoder_layers(model), configs, strict=True))
    for number, (tokens, kept) in enumerate(wanted):
        assert len(results[number]) == 6
        for got, got_kept in results[number]:
            assert torch.equal(got, tokens)
            assert got_kept == kept


def test_a_cache_does_not_outlive_its_reduction() -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5]])
    token = torch.tensor([[7]])
    with apply(model, SCHEDULE), torch.no_grad():
        cache = model(**batch, use_cache=True)[CACHE]
    with torch.no_grad(), pytest.raises(ThinsightError, match="not applied now"):
        model(input_ids=token, **{CACHE: cache})
    with (
        apply(model, Schedule([1, 0.5, 0.5, 0.5])),
        torch.no_grad(),
        pytest.raises(ThinsightError, match="another schedule"),
    ):
        model(input_ids=token, **{CACHE: cache})


class Hoarder(DynamicLayer):
    """A cache layer of a kind that the runtime does not know."""


def test_caches_that_cannot_be_thinned_are_refused() -> None:
    model = tiny_llava()
    cache = DynamicCache(config=model.config)
    cache.layers = [Hoarder() for _ in cache.layers]
    with apply(model, SCHEDULE), pytest.raises(ThinsightError, match="is a Hoarder, from which tokens"):
        generate(model, tiny_inputs([[3, 5]]), **{CACHE: cache})


def test_embeddings_without_ids_are_refused() -> None:
    model = tiny_llava()
    with apply(model, SCHEDULE), torch.no_grad(), pytest.raises(ThinsightError, match="pass input_ids"):
        model(inputs_embeds=torch.randn(1, 5, 32))


def test_vision_features_without_attention_are_refused_by_name() -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5]])
    encoded = encode_images(model, batch)
    with apply(model, SCHEDULE, ranker="vision-attention"), pytest.raises(ThinsightError, match="encode_images"):
        model(input_ids=batch["input_ids"], **encoded.model_inputs())


HOOKS_INSIDE = "__call__" in vars(GradientCheckpointingLayer)  # transformers before 5.23


@pytest.mark.skipif(not HOOKS_INSIDE, reason="this transformers checkpoints a layer without its hooks")
def test_gradient_checkpointing_that_runs_hooks_twice_is_refused() -> None:
    model = tiny_llava().train()
    model.gradient_checkpointing_enable()
    batch = tiny_inputs([[3, 5]])
    with apply(model, SCHEDULE), pytest.raises(ThinsightError, match=r"needs transformers 5\.23"):
        model(**batch)


@pytest.mark.parametrize(
    "checkpointing",
    [False, pytest.param(True, marks=pytest.mark.skipif(HOOKS_INSIDE, reason="needs transformers 5.23"))],
)
def test_gradients_flow_through_what_is_kept(checkpointing: bool) -> None:
    model = tiny_llava()
    batch = tiny_inputs([[3, 5], [1, 2]])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] <= IMAGE, -100)
    gradients = []
    for on in (False, checkpointing):
        model.train()
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        with apply(model, SCHEDULE):
            loss = model(**batch, labels=labels).loss
            loss.backward()
        weight = decoder_layers(model)[0].mlp.up_proj.weight
        assert weight.grad is not None
        assert float(weight.grad.abs().sum()) > 0
        gradients.append((loss.item(), weight.grad.clone()))
    assert gradients[0][0] == pytest.approx(gradients[1][0])
    torch.testing.assert_close(gradients[0][1], gradients[1][1])


# --- taken off without the handle, from other threads, out of the middle of a pass


def test_a_reduction_whose_handle_was_not_kept_can_be_taken_off() -> None:
    model, batch = tiny_llava(), tiny_inputs([[3, 5], [1, 2]])
    stock = generate(model, batch)
    before = state(model)
    remove(model)  # nothing is on
    apply(model, SCHEDULE, ranker="vision-attention")
    gc.collect()
    with pytest.raises(ThinsightError, match=r"handle.remove\(\), or thinsight.remove\(model\)"):
        apply(model, SCHEDULE)
    remove(model)
    remove(model)
    assert state(model) == before
    assert torch.equal(generate(model, batch), stock)
    handle = apply(model, SCHEDULE)
    remove(model)
    assert not handle.on
    with pytest.raises(ThinsightError, match="model is a Linear"):
        remove(torch.nn.Linear(1, 1))


def test_a_full_schedule_whose_handle_was_not_kept_is_not_in_the_way() -> None:
    model = tiny_llava()
    handle = apply(model, Schedule.full(4))
    with pytest.raises(ThinsightError, match="has a reduction on already"):
        apply(model, SCHEDULE)
    del handle
    gc.collect()
    apply(model, SCHEDULE).remove()


class Halted:
    """A pass of another thread that stands still inside a layer's attention, or before the tower has seen its
    images."""

    def __init__(self, model, run, module) -> None:
        self.result: list = []
        self._inside, self._go_on = threading.Event(), threading.Event()
        self._hook = module.register_forward_pre_hook(self._halt)
        self.thread = threading.Thread(target=self._work, args=(run,))

    def _halt(self, *_) -> None:
        if threading.current_thread() is self.thread and not self._inside.is_set():
            self._inside.set()
            assert self._go_on.wait(60)

    def _work(self, run) -> None:
        try:
            self.result.append(run())
        except Exception as error:
            self.result.append(error)

    def __enter__(self) -> Halted:
        self.thread.start()
        assert self._inside.wait(60)
        self._hook.remove()
        return self

    def end(self):
        self._go_on.set()
        self.thread.join()
        return self.result[0]

    def __exit__(self, *_) -> None:
        self.end()


@pytest.mark.parametrize("ranker", ["text-attention", "vision-attention"])
@pytest.mark.parametrize("where", ["tower", 0, 1, 2, 3])
def test_a_pass_under_way_in_another_thread_ends_as_it_began(ranker: str, where: int | str) -> None:
    """Those that begin after the removal are not reduced; and the last one leaves the model as it was."""
    model, batch = tiny_llava(), tiny_inputs([[3, 5], [1, 2]], seed=3)

    @torch.no_grad()
    def run() -> torch.Tensor:
        return model(**batch).logits

    stock = run()
    module = (
        model.model.vision_tower.encoder.layers[0].self_attn
        if where == "tower"
        else attention_of(decoder_layers(model)[where])
    )
    before = state(model)
    with apply(model, SCHEDULE, ranker=ranker):
        reduced = run()
    handle = apply(model, SCHEDULE, ranker=ranker)
    with Halted(model, run, module) as halted:
        handle.remove()
        assert not handle.on
        assert torch.equal(run(), stock)
        with pytest.raises(ThinsightError, match="apply the next one when it has ended"):
            apply(model, SCHEDULE)
        assert torch.equal(halted.end(), reduced)
    assert state(model) == before
    with apply(model, SCHEDULE, ranker=ranker):
        assert torch.equal(run(), reduced)


def test_an_answer_under_way_in_another_thread_is_refused_in_words() -> None:
    """Its cache lacks what the reduction dropped, and no layer is told of that any more."""
    model, batch = tiny_llava(), tiny_inputs([[3, 5], [1, 2]], seed=3)
    before = state(model) if generate(model, batch) is not None else []
    handle = apply(model, SCHEDULE)
    layer = attention_of(decoder_layers(model)[2])
    with Halted(model, lambda: generate(model, batch), layer) as halted:
        handle.remove()
        error = halted.end()
    assert isinstance(error, ThinsightError)
    assert "filled under a reduction that is not applied now" in str(error)
    assert state(model) == before


def test_passes_of_threads_that_are_gone_do_not_hold_the_model() -> None:
    """An interrupt leaves no time to end a pass."""
    model, batch = tiny_llava(), tiny_inputs([[3, 5]])
    generate(model, batch)
    before = state(model)

    def fail(*_) -> None:
        raise SystemExit

    handle = apply(model, SCHEDULE)
    hook = attention_of(decoder_layers(model)[2]).register_forward_hook(fail)
    thread = threading.Thread(target=lambda: model(**batch))
    thread.start()
    thread.join()
    hook.remove()
    handle.remove()
    assert state(model) == before


def test_a_start_inside_a_start_gives_way_to_the_outer_one() -> None:
    model, batch = tiny_llava(), tiny_inputs([[3, 5]])
    with apply(model, SCHEDULE) as handle, torch.no_grad():
        with handle.local.having(first=2):
            with handle.local.having(first=3):
                pass
            model(**batch)
            assert [len(handle.kept(layer)[0]) for layer in (1, 3)] == [16, 4]  # nothing fell at layer 1
        model(**batch)
        assert [len(handle.kept(layer)[0]) for layer in (1, 3)] == [12, 4]


@pytest.mark.parametrize(
    "record",
    [
        lambda model, batch: torch.export.export(model, (), kwargs=batch, strict=False),
        lambda model, batch: torch.jit.trace(model, example_kwarg_inputs=batch, strict=False),
    ],
    ids=["export", "trace"],
)
def test_a_reduction_is_not_recorded(record: Callable[..., Any]) -> None:
    model, batch = tiny_llava(), tiny_inputs([[3, 5]])
    with apply(model, SCHEDULE), torch.no_grad():
        wanted = model(**batch).logits
        with pytest.raises(Unsupported, match=r"^torch.export and torch.jit.trace record one path"):
            record(model, dict(batch))
        assert torch.equal(model(**batch).logits, wanted)

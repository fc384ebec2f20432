"""What `generate` can do, under a reduction: ways to decode, caches, later turns, compiled decoding.

Each test runs for every family of families.py and holds what comes out to the reference, step by step. Knows
nothing about any one family.
"""

from __future__ import annotations

import copy
import inspect
import threading
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StaticCache,
    StoppingCriteria,
)
from transformers.cache_utils import QuantizedLayer
from transformers.generation.streamers import BaseStreamer

from thinsight.errors import ThinsightError
from thinsight.runtime import apply
from thinsight.runtime.cache import CACHE
from thinsight.schedule import Schedule

from .behaviours import behaviour
from .checks import NEARLY_FULL, Case, check_steps, close, generate
from .families import FAMILIES, text
from .family import Family, decoder_of, draw_weights
from .inputs import Batch, Row, Spec, answer
from .inputs import text as words
from .offloading import offloading_on_cpu

SINGLE: Spec = [2, 3, 9]
PADDED: tuple[Spec, ...] = ([3, 5], [2, 3, 9], [7])
CASE = Case(Schedule([1, 0.8, 0.5, 0.1]))

# PaliGemma's prompt sees all of itself: what comes after a cached prefix was not seen by it, what is cropped
# away was, and transformers reads an assistant's first proposals as prompt
causal = [family for family in FAMILIES.values() if family.types is None or not family.types.answer]
# GLM-4V and Granite Vision in transformers mix up the images of a row that has several when rows are repeated
croppable = [family for family in causal if not family.stateful]
assisted = [family for family in croppable if family.assisted]
STATES = ("conv", "linear_attention")  # layers without keys, values and attention weights
one_image_per_row = ("glm4v", "glm4v_moe", "glm46v", "glm_ocr", "glmga", "granite4_vision")
encoding_ahead = [family for family in FAMILIES.values() if family.encodes_ahead]
with_static = [family for family in FAMILIES.values() if family.static_cache]
untyped = [family for family in FAMILIES.values() if family.types is None]
# transformers hands positions on to an assistant, and a text model has no use for three axes of them
three_axes = ("qwen2_5_omni_thinker", "qwen3_omni_moe_thinker")


def repeatable(family: Family, seed: int = 0) -> list[Row]:
    """Prompts of different length whose rows may be repeated."""
    return family.rows(([3, 5], [2, 9], [7]) if family.model_type in one_image_per_row else PADDED, seed)


def follow(family: Family, case: Case, row: Row, tokens: Tensor, logits: list[Tensor]) -> None:
    """Hold the logits of each step (vocab,) to the reference that is given the same tokens."""
    reference = case.reference(family, row)
    wanted = reference.read(row)[-1]
    for step, token in enumerate(tokens.tolist()):
        close(logits[step], wanted)
        if step + 1 < len(tokens):
            wanted = reference.answer(token)


# --- ways to decode


@behaviour("sampling", encoding_ahead)
def test_samples_are_drawn_from_the_logits_of_the_reference(family: Family) -> None:
    """Two samples of each prompt; a seed reproduces them."""
    model, batch, steps = family.model(), family.batch(repeatable(family)), 3
    options = {"do_sample": True, "temperature": 1.5, "top_k": 0, "num_return_sequences": 2}
    with CASE.apply(model):
        torch.manual_seed(0)
        out = generate(model, batch.inputs, steps, **options)
        torch.manual_seed(0)
        again = generate(model, batch.inputs, steps, **options)
    assert torch.equal(again.sequences, out.sequences)
    answers = out.sequences[:, -steps:]
    assert not torch.equal(answers[::2], answers[1::2])
    for number, tokens in enumerate(answers):
        follow(family, CASE, batch.rows[number // 2], tokens, [step[number] for step in out.logits])


@behaviour("sampling")
def test_the_most_likely_sample_is_the_greedy_answer(family: Family) -> None:
    model, inputs = family.model(), family.inputs(PADDED)
    with CASE.apply(model):
        greedy = generate(model, inputs, 3)
        sampled = generate(model, inputs, 3, do_sample=True, top_k=1)
    assert torch.equal(sampled.sequences, greedy.sequences)


@behaviour("beams", encoding_ahead)
def test_sampled_beams_have_the_scores_of_the_reference(family: Family) -> None:
    model, batch, steps = family.model(), family.batch(repeatable(family, 2)), 3
    torch.manual_seed(0)
    with CASE.apply(model):
        out = generate(model, batch.inputs, steps, do_sample=True, num_beams=2, output_scores=True, top_k=0)
    for row, sequence, score in zip(batch.rows, out.sequences, out.sequences_scores, strict=True):
        reference = CASE.reference(family, row)
        logits, total = reference.read(row)[-1], 0.0
        for token in sequence[-steps:].tolist():
            total += float(logits.log_softmax(-1)[token])
            logits = reference.answer(token)
        assert float(score) == pytest.approx(total / steps, abs=2e-4)


class Periodic(LogitsProcessor):
    """Makes most of the answer repeat what stands three tokens back, so that proposals are accepted."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] % 5 == 0:
            return scores
        return scores.scatter_add(1, input_ids[:, -3:-2], scores.new_full((len(scores), 1), 100.0))


class Passes:
    """While it lasts, the numbers of tokens that each forward pass of a model was given."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.tokens: list[int] = []

    def __enter__(self) -> Passes:
        hook = decoder_of(self.model).layers[0]
        self._hook = hook.register_forward_pre_hook(self._count, with_kwargs=True)
        return self

    def __exit__(self, *exception: Any) -> None:
        self._hook.remove()

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        self.tokens.append(states.shape[-2])


def repeating(family: Family) -> Row:
    """A prompt that ends in three words, three times."""
    row = family.rows([[2, 3, 1]], 4)[0]
    return row + Row([words([20, 30, 40] * 3)])


@behaviour("assisted", [family for family in assisted if family.takes_processors])
def test_prompt_lookup_equals_the_reference(family: Family) -> None:
    """Candidates are proposed from the first pass on, of which some are accepted and some are not."""
    model, row, steps = family.model(), repeating(family), 9
    inputs = family.batch([row]).inputs
    processors = LogitsProcessorList([Periodic()])
    with CASE.apply(model):
        greedy = generate(model, inputs, steps, logits_processor=processors)
        with Passes(model) as passes:
            out = generate(
                model, inputs, steps, logits_processor=processors, prompt_lookup_num_tokens=4, max_matching_ngram_size=2
            )
    assert passes.tokens[0] > len(row.ids)
    assert len(passes.tokens) < steps
    assert torch.equal(out.sequences, greedy.sequences)
    follow(family, CASE, row, out.sequences[0, -steps:], [step[0] for step in out.logits])


@pytest.mark.parametrize("seed", [0, 3], ids=["same weights", "other weights"])
@behaviour("assisted", assisted)
def test_an_assistant_of_the_family_leaves_the_answer_as_it_is(family: Family, seed: int) -> None:
    """The assistant sees the whole prompt, the model a reduced one."""
    model, row, steps = family.model(), family.rows([SINGLE], 5)[0], 6
    inputs = family.batch([row]).inputs
    with CASE.apply(model):
        out = generate(model, inputs, steps, assistant_model=family.build(seed=seed))
    follow(family, CASE, row, out.sequences[0, -steps:], [step[0] for step in out.logits])


def text_assistant() -> PreTrainedModel:
    """A text model with the vocabulary of the families."""
    model = LlamaForCausalLM(LlamaConfig(**text("llama", num_hidden_layers=1)))
    draw_weights(model, 0)
    return model.eval()


@behaviour("assisted", [family for family in untyped if family in assisted and family.model_type not in three_axes])
def test_a_text_only_assistant_leaves_the_answer_as_it_is(family: Family) -> None:
    model, row, steps = family.model(), family.rows([SINGLE], 5)[0], 6
    with CASE.apply(model):
        out = generate(model, family.batch([row]).inputs, steps, assistant_model=text_assistant())
    follow(family, CASE, row, out.sequences[0, -steps:], [step[0] for step in out.logits])


class Heard(BaseStreamer):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


class StopsAt(StoppingCriteria):
    """Stops when the whole sequence has a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


@behaviour("streaming")
def test_a_stopping_criterion_and_a_streamer_see_every_token(family: Family) -> None:
    model, row = family.model(), family.rows([SINGLE], 5)[0]
    inputs, heard = family.batch([row]).inputs, Heard()
    with CASE.apply(model):
        whole = generate(model, inputs, 5).sequences[0].tolist()
        options = {"stopping_criteria": [StopsAt(len(row.ids) + 3)], "streamer": heard}
        out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)
    assert out[0].tolist() == whole[:-2]
    assert heard.tokens == out[0].tolist()
    assert heard.ended


@behaviour("outputs")
def test_scores_hidden_states_and_attentions_come_out(family: Family) -> None:
    """Hidden states of a layer's input and attentions are as long as what entered the layer."""
    model, row, steps = family.model("eager"), family.rows([SINGLE], 5)[0], 3
    inputs, seq, seen = family.batch([row]).inputs, len(row.ids), len(row.vision)
    asked = {"output_scores": True, "output_hidden_states": True, "output_attentions": True}
    with CASE.apply(model) as handle:
        plain = generate(model, inputs, steps)
        out = generate(model, inputs, steps, **asked)
        kept = [len(handle.kept(family.keys_of.get(layer, layer))[0]) for layer in range(4)]
    if family.keys_of:  # what is asked for has layers that read another's keys run on more than the last token
        close(torch.stack(out.logits), torch.stack(plain.logits))
    else:
        assert torch.equal(torch.stack(out.logits), torch.stack(plain.logits))
    finite = torch.stack(out.scores).isfinite()
    close(torch.stack(out.scores)[finite], torch.stack(out.logits)[finite])
    for step in range(steps):
        new = 1 if step else seq
        assert out.hidden_states[step][-1].shape[-2] == new
        attending = [each for each in zip(family.layer_types, kept, strict=True) if each[0] not in STATES]
        for (kind, count), weights in zip(attending, out.attentions[step], strict=True):
            length = seq - seen + count + step
            assert weights.shape[-1] == length or (
                kind in ("sliding_attention", "chunked_attention") and weights.shape[-1] < length
            )


# --- embeddings in place of tokens


def embeddings(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the stock model's decoder reads: (batch, seq, hidden), and per layer where it has such inputs."""
    read: list[dict[str, Tensor]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        names = ("inputs_embeds", "per_layer_inputs")
        read.append({name: kwargs[name].clone() for name in names if kwargs.get(name) is not None})

    hook = decoder_of(model).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return read[0]


def vision_mask(batch: Batch) -> Tensor:
    """(batch, seq) int64: the image of each vision token of a batch padded on the left, from 1; 0 at text."""
    mask = torch.zeros(batch.inputs["input_ids"].shape, dtype=torch.long)
    for number, row in enumerate(batch.rows):
        for image, group in enumerate(row.groups):
            mask[number, mask.shape[1] - len(row.ids) + torch.tensor(group)] = image + 1
    return mask


def takes_embeddings(family: Family) -> bool:
    """Whether the stock class generates from embeddings; Gemma 3n hands per-layer inputs on, and then refuses them."""
    prepare = getattr(transformers, family.model_class).prepare_inputs_for_generation
    return "inputs_embeds" in inspect.signature(prepare).parameters and family.model_type != "gemma3n"


def is_plain(family: Family) -> bool:
    """Whether embeddings say all that ids and token types do: no positions in space, no blocks, no stack."""
    return family.types is None and not family.in_space and not family.stacked


def given_embeddings(family: Family, batch: Batch) -> dict[str, Tensor]:
    """A batch without its ids."""
    return {**embeddings(family.model(), batch.inputs), "attention_mask": batch.inputs["attention_mask"]}


@behaviour("inputs_embeds")
def test_embeddings_with_a_vision_mask_keep_all(family: Family) -> None:
    model, batch = family.model(), family.batch(family.rows(PADDED, 6))
    given = given_embeddings(family, batch)
    with torch.no_grad():
        stock = model(**given).logits
        with apply(model, NEARLY_FULL) as handle, handle.vision(vision_mask(batch) > 0):
            assert torch.equal(model(**given).logits, stock)


@behaviour("inputs_embeds")
def test_embeddings_with_a_vision_mask_are_reduced(family: Family) -> None:
    """As the ids are where embeddings say it all; by the same counts where they do not."""
    model, batch = family.model(), family.batch(family.rows(PADDED, 6))
    given = given_embeddings(family, batch)
    with CASE.apply(model) as handle, torch.no_grad():
        wanted = model(**batch.inputs).logits
        counts = [[len(row) for row in handle.kept(layer)] for layer in range(4)]
        with handle.vision(vision_mask(batch)):
            logits = model(**given).logits
        assert [[len(row) for row in handle.kept(layer)] for layer in range(4)] == counts
    if is_plain(family):
        close(logits, wanted)


@behaviour("inputs_embeds", [family for family in untyped if is_plain(family) and takes_embeddings(family)])
def test_generating_from_embeddings_equals_generating_from_ids(family: Family) -> None:
    model, batch = family.model(), family.batch(family.rows(PADDED, 6))
    given = given_embeddings(family, batch)
    with CASE.apply(model) as handle:
        wanted = generate(model, batch.inputs, 3)
        with handle.vision(vision_mask(batch)):
            out = generate(model, given, 3)
    close(torch.stack(out.logits), torch.stack(wanted.logits))


@behaviour("inputs_embeds")
def test_embeddings_without_a_vision_mask_are_refused(family: Family) -> None:
    given = given_embeddings(family, family.batch(family.rows([SINGLE], 6)))
    with CASE.apply(family.model()), pytest.raises(ThinsightError, match="does not say where vision tokens"):
        family.model()(**given)


# --- later turns on the same cache


def positions(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The position ids that the stock decoder is given, where they are places in time, height and width."""
    read: list[Any] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        read.append(kwargs.get("position_ids"))

    hook = decoder_of(model).register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    if read[0] is None or read[0].ndim < 3:
        return {}
    return {"position_ids": read[0]}


def next_turn(family: Family, rows: list[Row], later: list[Row]) -> dict[str, Any]:
    """Inputs of `generate` for later turns behind `rows`: every token, but the pixels of the turns alone."""
    whole = [row + turn for row, turn in zip(rows, later, strict=True)]
    inputs, new = family.batch(whole).inputs, family.batch(later).inputs
    shape = inputs["input_ids"].shape
    tokens = {name: value for name, value in inputs.items() if value.shape == shape}
    pixels = {name: value for name, value in new.items() if name not in tokens}
    return {**tokens, **pixels, **positions(family.model(), inputs)}


def answered(rows: list[Row], out: Any, steps: int) -> list[Row]:
    """Rows with the answers that were generated to them."""
    answers = out.sequences[:, -steps:].tolist()
    return [row + Row([answer(tokens)]) for row, tokens in zip(rows, answers, strict=True)]


TURNS: dict[str, Spec] = {"text": [4], "new image": [2, 5]}


@pytest.mark.parametrize("spec", TURNS.values(), ids=TURNS)
@behaviour("second turn")
def test_a_second_turn_on_the_same_cache_equals_the_reference(family: Family, spec: Spec) -> None:
    if len(spec) > 1 and not family.images_later:
        spec = [5]
    model, rows, steps = family.model(), family.rows([[3, 5], [2, 3, 9]], 11), 3
    later = [family.later_turn(spec, seed) for seed in (1, 2)]
    with CASE.apply(model):
        one = generate(model, family.batch(rows).inputs, steps)
        inputs = next_turn(family, answered(rows, one, steps), later)
        two = generate(model, inputs, steps, **{CACHE: one[CACHE]})
    for number, row in enumerate(rows):
        reference = CASE.reference(family, row)
        reference.read(row)
        *before, last = one.sequences[number, -steps:].tolist()
        for token in before:
            reference.answer(token)
        wanted = reference.read(Row([answer([last])]) + later[number])[-1]
        for step, token in enumerate(two.sequences[number, -steps:].tolist()):
            close(two.logits[step][number], wanted)
            wanted = reference.answer(token)


@behaviour("cache copies")
def test_a_copied_cache_continues_as_the_cache_does(family: Family) -> None:
    """The copy is continued first, and the cache knows nothing of it."""
    model, rows = family.model(), family.rows([[3, 5], [2, 3, 9]], 12)
    with CASE.apply(model):
        one = generate(model, family.batch(rows).inputs, 2)
        copied = copy.deepcopy(one[CACHE])
        later = [family.later_turn([4], seed) for seed in (1, 2)]
        inputs = next_turn(family, answered(rows, one, 2), later)
        two, again = (generate(model, inputs, 3, **{CACHE: cache}) for cache in (copied, one[CACHE]))
    assert torch.equal(torch.stack(two.logits), torch.stack(again.logits))


@behaviour("cache copies", causal)
def test_a_cached_prefix_serves_several_prompts(family: Family) -> None:
    """A system prompt is read once; each prompt with images continues a copy of its cache."""
    model, prefix = family.model(), family.rows([[6]], 13)[0]
    turns = [family.later_turn(spec) for spec in ([1, 4], [0, 2, 5])]
    with CASE.apply(model), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))  # Granite Vision makes none itself
        model(**family.batch([prefix]).inputs, **{CACHE: cache})
        inputs = [next_turn(family, [prefix], [later]) for later in turns]
        found = [generate(model, each, 3, **{CACHE: copy.deepcopy(cache)}) for each in inputs]
    for later, out in zip(turns, found, strict=True):
        tokens, logits = out.sequences[0, -3:], [step[0] for step in out.logits]
        follow(family, CASE, prefix + later, tokens, logits)


@behaviour("cache copies", croppable)
def test_a_cropped_cache_continues_like_a_new_one(family: Family) -> None:
    """Behind the image: another question to it. In front of it, if no window has moved on: another prompt."""
    model, prefix = family.model(), family.rows([[6]], 13)[0]
    image, question, other = family.later_turn([1, 1]), family.later_turn([4], 2), family.later_turn([4], 3)
    whole, found = prefix + image + question, []
    with CASE.apply(model), torch.no_grad():
        cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        cache.activate_past_recording()
        generate(model, family.batch([whole]).inputs, 1, **{CACHE: cache})
        windowed = any(cache.is_sliding) or any(cache.is_linear)  # a convolution holds no more than the last crop left
        for kept in [prefix + image] if windowed else [prefix + image, prefix]:
            cache.crop(len(kept.ids) - cache.get_seq_length())
            if hasattr(model.base_model, "rope_deltas"):
                model.base_model.rope_deltas = None  # of what was cropped away
            inputs = next_turn(family, [kept], [other])
            found.append((kept, generate(model, inputs, 2, **{CACHE: cache})))
    for kept, out in found:
        reference = CASE.reference(family, whole)
        reference.read(whole)
        reference.row = kept
        reference.hidden = [{place for place in layer if place < len(kept.ids)} for layer in reference.hidden]
        wanted = reference.read(other)[-1]
        close(out.logits[0][0], wanted)
        close(out.logits[1][0], reference.answer(int(out.sequences[0, -2])))


@behaviour("two at once")
def test_two_threads_each_with_its_own_generation(family: Family) -> None:
    model = family.model()
    prompts = [family.inputs(PADDED, seed=14), family.inputs([SINGLE], seed=15)]
    with CASE.apply(model):
        alone = [generate(model, inputs, 4).logits for inputs in prompts]
        together: list[Any] = [None, None]

        def run(number: int) -> None:
            together[number] = generate(model, prompts[number], 4).logits

        threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(torch.stack(one), torch.stack(two))


@behaviour("two at once")
def test_two_generations_in_a_row_are_alike(family: Family) -> None:
    model, inputs, other = family.model(), family.inputs(PADDED, seed=14), family.inputs([SINGLE], seed=15)
    with CASE.apply(model):
        one = generate(model, inputs, 3)
        generate(model, other, 2)
        two = generate(model, inputs, 3)
    assert torch.equal(torch.stack(one.logits), torch.stack(two.logits))


# --- which tokens


@pytest.mark.parametrize("rerank", [False, 0.6])  # 0.6: at layers 1 and 3 of 1, 2 and 3
@behaviour("one ranking")
def test_a_ranking_reused_equals_the_reference(family: Family, rerank: bool | float) -> None:
    case = Case(CASE.schedule, rerank=rerank)
    check_steps(family, case, family.batch(family.rows(PADDED, 16)), steps=2)


# --- caches


def kv_bytes(cache: Any) -> list[int]:
    """Memory of each layer's keys and values, of those that have some."""
    return [layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if hasattr(layer, "keys")]


@behaviour("static cache", with_static)
def test_a_static_cache_equals_the_reference_and_is_smaller(family: Family) -> None:
    """Padded and single; what the prompt drops has no room in the reduced layers' buffers."""
    model, rows, steps = family.model(), family.rows(([3, 5], SINGLE), 17), 3
    for some in (rows, rows[1:]):
        batch = family.batch(some)
        stock = generate(model, batch.inputs, steps, cache_implementation="static")
        with CASE.apply(model) as handle:
            out = generate(model, batch.inputs, steps, cache_implementation="static")
            kept = [[len(row) for row in handle.kept(layer)] for layer in range(4)]
        for number, row in enumerate(some):
            tokens, logits = out.sequences[number, -steps:], [step[number] for step in out.logits]
            follow(family, CASE, row, tokens, logits)
        width = max(len(row.ids) for row in some)
        lengths = [
            max(len(row.ids) - len(row.vision) + count for row, count in zip(some, counts, strict=True))
            for counts, kind in zip(kept, family.layer_types, strict=True)
            if kind not in STATES
        ]
        layer = stock[CACHE].layers[0]
        per_column = layer.keys[:, :, :1].nbytes + layer.values[:, :, :1].nbytes
        saved = [full - reduced for full, reduced in zip(kv_bytes(stock[CACHE]), kv_bytes(out[CACHE]), strict=True)]
        assert saved == [per_column * (width - length) for length in lengths]


@pytest.mark.parametrize("spec", TURNS.values(), ids=TURNS)
@behaviour("static cache", with_static)
def test_a_second_turn_on_a_static_cache_equals_the_reference(family: Family, spec: Spec) -> None:
    if len(spec) > 1 and not family.images_later:
        spec = [5]
    model, row, steps = family.model(), family.rows([SINGLE], 18)[0], 2
    later = family.later_turn(spec)
    length = len((row + later).ids) + 2 * steps
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=length)
    with CASE.apply(model):
        one = generate(model, family.batch([row]).inputs, steps, **{CACHE: cache})
        inputs = next_turn(family, answered([row], one, steps), [later])
        two = generate(model, inputs, steps, **{CACHE: cache})
    reference = CASE.reference(family, row)
    reference.read(row)
    first, last = one.sequences[0, -steps:].tolist()
    reference.answer(first)
    close(two.logits[0][0], reference.read(Row([answer([last])]) + later)[-1])
    close(two.logits[1][0], reference.answer(int(two.sequences[0, -2])))


def check_offloading(family: Family, offloaded: str, resident: str) -> None:
    """A cache that offloads gives what one that does not gives, and thinned layers are offloaded too."""
    model, inputs = family.model(), family.inputs(PADDED, seed=19)
    with CASE.apply(model), offloading_on_cpu() as seen:
        wanted = generate(model, inputs, 3, cache_implementation=resident)
        assert not seen
        out = generate(model, inputs, 3, cache_implementation=offloaded)
    assert any("Thinned" in layer for layer in seen)
    assert torch.equal(torch.stack(out.logits), torch.stack(wanted.logits))


@behaviour("offloaded cache")
def test_an_offloaded_cache_equals_a_resident_one(family: Family) -> None:
    check_offloading(family, "offloaded", "dynamic")


@behaviour("static cache", with_static)
def test_an_offloaded_static_cache_equals_a_resident_one(family: Family) -> None:
    check_offloading(family, "offloaded_static", "static")


class Rounded(QuantizedLayer):
    """A quantized layer whose backend only rounds to bfloat16."""

    def __init__(self) -> None:
        super().__init__(nbits=4, axis_key=0, axis_value=0, q_group_size=16, residual_length=8)

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.bfloat16()

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor.float()


@behaviour("quantized cache", refused=True)
def test_a_quantized_cache_is_refused_before_it_is_filled(family: Family) -> None:
    """Its layers keep tokens in a form that crops, copies and later turns cannot thin."""
    model, inputs = family.model(), family.inputs([SINGLE])
    cache = Cache(layers=[Rounded() for _ in range(4)])
    with CASE.apply(model), pytest.raises(ThinsightError, match="is a Rounded, from which tokens cannot"):
        generate(model, inputs, 2, **{CACHE: cache})

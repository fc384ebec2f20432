"""The model under a reduction stays the user's own: on and off, copies, dtypes, devices, replaced layers.

Knows nothing about any one family.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedModel,
    ShieldGemma2ForImageClassification,
    StoppingCriteria,
    StoppingCriteriaList,
)

from thinsight.errors import ThinsightError
from thinsight.runtime import apply, layer_scores
from thinsight.schedule import Schedule

from .behaviours import behaviour
from .checks import NEARLY_FULL, Case, check_steps, close, generate, paged_cache
from .families import FAMILIES
from .family import PADDED, Family, decoder_of
from .inputs import Row, Spec

CASE = Case(Schedule([1, 0.8, 0.5, 0.1]))
SINGLE: Spec = [2, 3, 9]

# of others the prompt sees all of itself, or counts its positions from the start, which in chunks it cannot;
# transformers joins the tiles of a chunk (Aya Vision), loses Ovis2's markers and all of Granite Vision's features, and
# fails on what timm's towers give
unchunked = ("aya_vision", "ovis2", "granite4_vision", "fast_vlm", "perception_lm", "gemma3n")
causal = [f for f in FAMILIES.values() if f.types is None and f.encodes_ahead and f.model_type not in unchunked]


def logits_of(model: PreTrainedModel, inputs: dict[str, Tensor], steps: int = 2) -> Tensor:
    """(steps, batch, vocab) of greedy decoding."""
    return torch.stack(generate(model, inputs, steps).logits)


def insides(model: PreTrainedModel) -> list[Any]:
    """Hooks, attributes and attention implementation of every module."""
    return [
        (list(m._forward_pre_hooks), list(m._forward_hooks), sorted(vars(m)), id(getattr(m, "config", None)))
        for m in model.modules()
    ]


# --- on and off


@behaviour("on and off")
def test_a_model_is_restored_and_can_be_reduced_again(family: Family) -> None:
    model, inputs = family.build(), family.inputs(PADDED, seed=26)
    stock, before, weights = logits_of(model, inputs), insides(model), copy.deepcopy(model.state_dict())
    with CASE.apply(model) as handle:
        reduced = logits_of(model, inputs)
        with pytest.raises(ThinsightError, match="has a reduction on already"):
            CASE.apply(model)
    handle.remove()
    assert insides(model) == before
    assert torch.equal(logits_of(model, inputs), stock)
    with CASE.apply(model):
        assert torch.equal(logits_of(model, inputs), reduced)
    assert insides(model) == before
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(model.state_dict()[name], weights[name]) for name in weights)


class Breaks(StoppingCriteria):
    """Raises at the second step."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor, **options: Any) -> Tensor:
        self.calls += 1
        if self.calls == 2:
            raise InterruptedError
        return torch.zeros(len(input_ids), dtype=torch.bool)


@behaviour("on and off")
def test_an_exception_leaves_the_model_usable_and_restorable(family: Family) -> None:
    """Between two steps, and in the middle of a pass: inside the layer whose attention was to be read."""
    model, inputs = family.build(), family.inputs(PADDED, seed=27)
    stock, before = logits_of(model, inputs), insides(model)

    def fail(*args: Any) -> None:
        raise InterruptedError

    with CASE.apply(model):
        reduced = logits_of(model, inputs)
        with pytest.raises(InterruptedError):
            generate(model, inputs, 3, stopping_criteria=StoppingCriteriaList([Breaks()]))
        for layer in decoder_of(model).layers:
            mixers = (getattr(layer, name, None) for name in ("self_attn", "linear_attn", "conv"))
            hook = next(mixer for mixer in mixers if mixer is not None).register_forward_hook(fail)
            with pytest.raises(InterruptedError):
                generate(model, inputs, 2)
            hook.remove()
        assert torch.equal(logits_of(model, inputs), reduced)
    assert insides(model) == before
    assert torch.equal(logits_of(model, inputs), stock)


# --- copies


def saved_and_loaded(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """What `save_pretrained` wrote, read again."""
    if model.config.model_type == "shieldgemma2":  # transformers reads its weights as those of the classifier around it
        held = ShieldGemma2ForImageClassification(model.config)
        held.model = model
        held.save_pretrained(folder)
        return ShieldGemma2ForImageClassification.from_pretrained(folder).model.eval()
    model.save_pretrained(folder)
    told = {"config": AutoConfig.from_pretrained(folder), "attn_implementation": model.config._attn_implementation}
    loaded = type(model).from_pretrained(folder, **told).eval()
    for parameter in loaded.parameters():  # which lie in memory as in the file: a product may round otherwise there
        parameter.data = parameter.data.clone()
    return loaded


COPIES: dict[str, Callable[[PreTrainedModel, Path], PreTrainedModel]] = {
    "deepcopy": lambda model, folder: copy.deepcopy(model),
    "pickle": lambda model, folder: pickle.loads(pickle.dumps(model)),
    "save_pretrained": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
@behaviour("copies")
def test_a_copy_is_a_plain_model(family: Family, way: str, tmp_path: Path) -> None:
    model, inputs = family.build(), family.inputs(PADDED, seed=28)
    with CASE.apply(model):
        if way != "pickle":  # which a stock model that has run may not: transformers hangs hooks on it
            logits_of(model, inputs)
        twin = COPIES[way](model, tmp_path)
    stock = logits_of(model, inputs)
    wanted, got = model.state_dict(), twin.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    twin.generation_config = model.generation_config
    assert torch.equal(logits_of(twin, inputs), stock)


# --- dtypes, devices, replaced layers


@behaviour("bfloat16")
def test_bfloat16_keeps_all_bit_for_bit_and_reduces(family: Family) -> None:
    """Logits under a reduction are as near to float32's as the stock model's are: within three times that."""
    inputs = family.inputs(PADDED, seed=29)
    model, exact = family.build().bfloat16(), family.model()
    inputs16 = {n: v.bfloat16() if v.is_floating_point() else v for n, v in inputs.items()}
    stock = logits_of(model, inputs16, 1)
    with apply(model, NEARLY_FULL):
        assert torch.equal(logits_of(model, inputs16, 1), stock)
    rounding = float((stock.float() - logits_of(exact, inputs, 1)).abs().max())
    # a ranking by attention may turn on rounding, which fixed scores do not
    case = Case(CASE.schedule, fixed=True)
    with case.apply(exact) as handle:
        wanted, kept = logits_of(exact, inputs, 1), handle.kept(3)
    with case.apply(model) as handle:
        got = logits_of(model, inputs16, 1)
        assert all(torch.equal(*pair) for pair in zip(handle.kept(3), kept, strict=True))
    assert float((got.float() - wanted).abs().max()) < 3 * rounding
    with CASE.apply(model) as handle:
        assert logits_of(model, inputs16).isfinite().all()
        assert [len(row) for row in handle.kept(3)] == [len(row) for row in kept]


def near_ties(wrong: float, scores: Tensor, kept: Tensor) -> bool:
    """Whether tokens (n,) bool are the best ones by scores (n,), but for scores that differ by a share."""
    if kept.all() or not kept.any():
        return True
    return bool(scores[kept].min() >= (1 - wrong) * scores[~kept].max())


@pytest.mark.parametrize(("dtype", "wrong"), [(torch.bfloat16, 0.2), (torch.float16, 0.05)], ids=str)
@behaviour("autocast")
def test_autocast_keeps_all_bit_for_bit_and_reduces(family: Family, dtype: torch.dtype, wrong: float) -> None:
    """As with bfloat16 weights; and what ranks is what ranks without autocast, but for near ties: under left
    padding, too, where rows of unequal text leave filling among the rows that rank."""
    model, inputs = family.model(), family.inputs(PADDED, seed=34)
    exact, scores = logits_of(model, inputs, 1), layer_scores(model, family.placed(inputs))
    with torch.autocast("cpu", dtype):
        stock = logits_of(model, inputs)
        with apply(model, NEARLY_FULL):
            assert torch.equal(logits_of(model, inputs), stock)
    rounding = float((stock[0].float() - exact[0]).abs().max())
    case = Case(CASE.schedule, fixed=True)
    with case.apply(model) as handle:
        wanted, kept = logits_of(model, inputs, 1), handle.kept(3)
        with torch.autocast("cpu", dtype):
            got = logits_of(model, inputs, 1)
        assert all(torch.equal(*pair) for pair in zip(handle.kept(3), kept, strict=True))
    assert float((got.float() - wanted).abs().max()) < 3 * rounding
    with torch.autocast("cpu", dtype), torch.no_grad():
        found = layer_scores(model, family.placed(inputs)).scores
        with apply(model, Schedule([1, 0.3, 0.3, 0.3])) as handle:
            assert logits_of(model, inputs).isfinite().all()
            generated = handle.kept(1)
            model(**family.placed(inputs))
            assert all(torch.equal(*pair) for pair in zip(handle.kept(1), generated, strict=True))
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    for row, places in enumerate(generated):
        before = scores.row(row)[0]
        chosen = torch.zeros(len(before), dtype=torch.bool)
        chosen[places] = True
        images = family.batch(family.rows(PADDED, 34)).rows[row].groups
        start = 0
        for image in images:
            here = slice(start, start + len(image))
            assert near_ties(wrong, before[here], chosen[here])
            start += len(image)


def device_map(model: PreTrainedModel) -> dict[str, str]:
    """Every decoder layer by itself on one of two devices: the CPU, and the CPU with weights offloaded."""
    found: dict[str, str] = {}
    layers = {id(layer): number for number, layer in enumerate(decoder_of(model).layers)}

    def place(module: nn.Module, name: str) -> None:
        if id(module) in layers:
            found[name] = "disk" if layers[id(module)] % 2 else "cpu"
        elif any(id(inner) in layers for inner in module.modules()):
            for key, child in module.named_children():
                place(child, f"{name}.{key}" if name else key)
            for key, _ in module.named_parameters(recurse=False):
                found[f"{name}.{key}" if name else key] = "cpu"
        else:
            found[name] = "cpu"

    place(model, "")
    return found


@behaviour("device map")
def test_a_dispatched_model_gives_the_same_answers(family: Family, tmp_path: Path) -> None:
    """accelerate's hooks bring the weights of every second layer from disk; ours go on beside them."""
    inputs, whole = family.inputs(PADDED, seed=30), family.model()
    spread = dispatch_model(
        family.build(), device_map(whole), main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    layers = decoder_of(spread).layers
    assert all(weight.is_meta for weight in layers[1].parameters())
    with CASE.apply(whole):
        wanted = logits_of(whole, inputs, 3)
    hooks = [layer._hf_hook for layer in layers]
    with CASE.apply(spread):
        assert torch.equal(logits_of(spread, inputs, 3), wanted)
    assert [layer._hf_hook for layer in layers] == hooks
    assert torch.equal(logits_of(spread, inputs), logits_of(whole, inputs))


class Quantized(nn.Linear):
    """A linear layer as quantizers make it: int8 weights, a scale per row, read through `forward` only."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Quantized:
        """The same layer, quantized."""
        made = cls(1, 1, bias=False)
        made.in_features, made.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        made.weight, made.bias = nn.Parameter(codes, requires_grad=False), linear.bias
        made.register_buffer("scale", scale)
        return made

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight * self.scale, self.bias)


def quantize(model: PreTrainedModel) -> list[Quantized]:
    """Replace the linear layers of a decoder, as bitsandbytes and torchao do on loading."""
    made = []
    for module, name, child in linears(model):
        made.append(Quantized.of(child))
        setattr(module, name, made[-1])
    return made


def linears(model: PreTrainedModel) -> list[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers of a decoder's layers, in one order, each with the module that holds it and its name there."""
    parents = list(decoder_of(model).layers.modules())
    return [
        (each, name, child) for each in parents for name, child in each.named_children() if type(child) is nn.Linear
    ]


@behaviour("quantized layers")
def test_quantized_linear_layers_are_left_alone(family: Family) -> None:
    """Reduced as the model with the rounded weights written out is."""
    inputs, model, plain = family.inputs(PADDED, seed=31), family.build(), family.build()
    layers = quantize(model)
    rounded = iter(layers)
    with torch.no_grad():
        for _, _, linear in linears(plain):
            twin = next(rounded)
            linear.weight.copy_(twin.weight * twin.scale)
    assert len(layers) > 4
    with CASE.apply(plain):
        wanted = logits_of(plain, inputs)
    with CASE.apply(model):
        assert torch.equal(logits_of(model, inputs), wanted)
    assert all(layer.weight.dtype == torch.int8 and not layer._forward_hooks for layer in layers)


# --- prompts in chunks, batches that run on


@behaviour("chunked prefill", causal)
def test_each_chunk_of_a_prompt_is_ranked_as_a_turn_of_its_own(family: Family) -> None:
    """A chunk has seen nothing of the next one: `prefill_chunk_size` is read as turns are."""
    model, row = family.model(), family.rows([[2, 5]], 33)[0]
    image, question = Row(row.parts[:-1]), Row(row.parts[-1:])
    inputs = family.batch([row]).inputs
    with CASE.apply(model):
        out = generate(model, inputs, 3, prefill_chunk_size=len(image.ids))
    reference = CASE.reference(family, row)
    reference.read(image)
    wanted = reference.read(question)[-1]
    for step, token in enumerate(out.sequences[0, -3:].tolist()):
        close(out.logits[step][0], wanted)
        wanted = reference.answer(token)


@behaviour("continuous batching", refused=True)
def test_continuous_batching_is_refused(family: Family) -> None:
    """At `apply`, or where it comes later, when a prompt has an image: its cache is paged, not of layers."""
    model, inputs = family.build(), family.inputs([SINGLE])
    before, message = insides(model), "on a paged cache: continuous batching keeps its own"
    with CASE.apply(model), pytest.raises(ThinsightError, match=message):
        model(**inputs, use_cache=False, cache=paged_cache())  # as `generate_batch` passes it
    model.set_attn_implementation("paged|eager")
    with pytest.raises(ThinsightError, match=message):
        CASE.apply(model)
    assert [hooks for hooks, *_ in insides(model)] == [hooks for hooks, *_ in before]


# --- projectors that cut tokens themselves


@behaviour("cut projector", [FAMILIES[n] for n in ("internvl-qwen2", "smolvlm", "mistral3") if n in FAMILIES])
def test_a_reduction_on_top_of_a_projector_that_cuts(family: Family) -> None:
    """Keep rates are of what the projector leaves: a quarter of the patches, of which half are kept (Table 2
    of arXiv 2412.00556)."""
    row = family.rows([SINGLE], 32)[0]
    model, batch, half = family.model(), family.batch([row]), Schedule([1, 0.5, 0.5, 0.5])
    patches: list[int] = []
    base = model.base_model
    tower = getattr(base, "vision_tower", None) or base.vision_model
    hook = tower.register_forward_hook(lambda m, a, out: patches.append(out.last_hidden_state[..., 0].numel()))
    with Case(half).apply(model) as handle:
        generate(model, batch.inputs, 1)
        kept = len(handle.kept(3)[0])
    hook.remove()
    assert 4 * len(row.vision) <= patches[0]
    assert kept == sum(half.counts(len(group))[3] for group in row.groups)
    check_steps(family, Case(half), batch, steps=3)

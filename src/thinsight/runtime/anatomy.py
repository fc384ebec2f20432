"""Where a multimodal model's parts are, and which models, wrappers and attention implementations are refused.

A family's row in `thinsight.families` says what is known of it; of one without a row, its attributes.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import secrets
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as CLASSES

from ..checked import CheckResult, Identity, cache_folder, stored, stored_for
from ..cost import STATE_LAYERS, shared_keys_of, states_of, windows_of
from ..errors import BadInput, MissingPackage, Unsupported
from ..families import FAMILIES, LAYERS, OLDEST, REFUSED, UNTESTED, family_of, tower_of
from ..version import __version__

ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")

HOW_TO_CHECK = "`thinsight check --model ...` (thinsight.check) says whether it runs all the same"

MODALITIES = {"image": "pixel_values", "video": "pixel_values_videos"}
"""What a vision encoder reads, by modality."""

# Of `layer_types`: layers in which a token that is left out leaves nothing behind.
_ATTENTION_LAYERS = frozenset({"attention", "chunked_attention", "full_attention", "sliding_attention"})
_REDUCIBLE = _ATTENTION_LAYERS | STATE_LAYERS


@dataclass(frozen=True)
class VisionSource:
    """Where the vision tower's attention is read, for rankers that need it."""

    tower: nn.Module
    attention: nn.Module  # of the tower's layer whose output the projector reads
    has_class_token: bool  # row 0 is a CLS token
    drops_first: bool  # the projector does not see row 0


_REPLICAS = (
    "DataParallel copies the model to each of its devices in every pass, and a reduction is on none of the "
    "copies; use DistributedDataParallel, or one device: DataParallel(model, device_ids=[0])"
)


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside wrappers of torch.compile, PEFT and data parallelism, or itself.

    What is put on it counts for its wrappers too, which only call it.

    Raises:
        ThinsightError: no transformers model, or a wrapper that does more than call one.
    """
    peft = sys.modules.get("peft")  # where it was not imported, no model is one of its own
    while not isinstance(model, PreTrainedModel):
        if isinstance(model, OptimizedModule):
            model = model._orig_mod
        elif isinstance(model, (DataParallel, DistributedDataParallel)):
            if isinstance(model, DataParallel) and len(model.device_ids) > 1:
                raise Unsupported(_REPLICAS)
            model = model.module
        elif peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
            model = _inside_peft(model)
        else:
            inner = model.modules() if isinstance(model, nn.Module) else ()
            held = [f", such as the {type(each).__name__} in it" for each in inner if isinstance(each, PreTrainedModel)]
            raise BadInput(f"model is a {type(model).__name__}; pass a loaded transformers model{(held or [''])[0]}")
    return model


def _inside_peft(model: Any) -> Any:
    """The model whose layers hold the adapters of a `PeftModel`."""
    from peft.tuners.tuners_utils import BaseTuner

    for config in model.peft_config.values():
        # an "activated" LoRA looks for its tokens in the wrapper's own call
        alone = not config.is_prompt_learning and not config.to_dict().get("alora_invocation_tokens")
        if not alone or type(model.base_model).forward is not BaseTuner.forward:
            raise Unsupported(
                f"{type(model).__name__} with {config.peft_type.value}: it does more than change the model's "
                "layers, which a reduction cannot see; use adapters that live in the layers, such as LoRA"
            )
    return model.base_model.model


def check_replica(module: nn.Module, original: nn.Module) -> None:
    """Refuse a pass through a copy of a module that DataParallel made."""
    if module is not original:
        raise Unsupported(_REPLICAS)


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """The multimodal model without its language-model head: what every forward pass goes through."""
    return model.base_model


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The text model."""
    text = model.get_decoder()
    return text if hasattr(text, "layers") else text.model  # Llama 4 hands it out together with its head


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder layers, layer 0 first."""
    text = decoder(model)
    return list(text.layers)[: text.config.num_hidden_layers]


def num_layers(model: PreTrainedModel) -> int:
    """L, the number of decoder layers."""
    return len(decoder_layers(model))


def attention_of(layer: nn.Module) -> nn.Module:
    """The self-attention module of a transformer layer."""
    for name in ("self_attn", "attention", "attn"):
        module = getattr(layer, name, None)
        if isinstance(module, nn.Module):
            return module
    raise Unsupported(f"layer {type(layer).__name__} has no self-attention that thinsight knows; use another model")


def attention_implementation(model: PreTrainedModel) -> str:
    """Which attention the decoder runs: "sdpa", "eager", ..."""
    return str(decoder(model).config._attn_implementation)


def vision_placeholders(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    """Which positions of a prompt are vision tokens, by modality: (batch, seq) int64 -> (batch, seq) bool."""
    family = family_of(model.config)
    fields = {"image": family.image_placeholder, "video": family.video_placeholder}
    ids = {name: getattr(model.config, field, None) for name, field in fields.items() if field is not None}
    if ids.get("video") == ids.get("image"):  # both stand behind one token, which is not to be counted twice
        ids.pop("video", None)
    return {name: input_ids == token for name, token in ids.items() if token is not None}


def vision_token_mask(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Which positions of a prompt are vision tokens: (batch, seq) int64 -> (batch, seq) bool."""
    return torch.stack(list(vision_placeholders(model, input_ids).values())).any(0)


def reads_prompt_both_ways(model: PreTrainedModel) -> bool:
    """Whether a prompt's tokens see those behind them, so that its images' states depend on its question."""
    return family_of(model.config).both_ways


def writes_vision_after(model: PreTrainedModel) -> frozenset[int]:
    """After which decoder layers the decoder itself adds vision features to all vision positions (DeepStack,
    arXiv 2406.04334)."""
    config: Any = model.config
    into = {layer for _, layer in getattr(config, "deepstack_layer_map", None) or ()}  # Granite Vision names them
    if into:
        return frozenset(layer - 1 for layer in into | set(config.spatial_target_layers) if layer)
    if not hasattr(decoder(model), "_deepstack_process"):
        return frozenset()
    return frozenset(range(len(getattr(config.vision_config, "deepstack_visual_indexes", ()))))


def sorts_by_kind(model: PreTrainedModel) -> bool:
    """Whether layers send vision tokens and text to different experts (ERNIE 4.5 VL)."""
    return "moe_mm_token_type_ids" in inspect.signature(decoder(model).forward).parameters


def scales_by_position(model: PreTrainedModel) -> bool:
    """Whether layers scale their queries by the position that they are told of each token (Ministral 3, Mistral 4)."""
    rope = getattr(decoder(model).config, "rope_parameters", None) or {}
    return rope.get("llama_4_scaling_beta") is not None


def sliding_layers(model: PreTrainedModel) -> frozenset[int]:
    """The decoder layers whose attention sees a window only."""
    return frozenset(windows_of(decoder(model).config, num_layers(model)))


def shared_keys(model: PreTrainedModel) -> dict[int, int]:
    """The decoder layers that have no keys and values of their own, each with the layer whose keys it reads."""
    return shared_keys_of(decoder(model).config, num_layers(model))


def state_layers(model: PreTrainedModel) -> frozenset[int]:
    """The decoder layers that carry a state along the tokens and do not attend: convolutions, linear attention."""
    return states_of(decoder(model).config, num_layers(model))


def attending_before(model: PreTrainedModel, layer: int) -> int | None:
    """The last decoder layer before this one that attends, whose attention ranks there; None where there is none."""
    states = state_layers(model)
    return next((before for before in reversed(range(layer)) if before not in states), None)


def first_attending(model: PreTrainedModel) -> int:
    """The first decoder layer that attends."""
    return min(set(range(num_layers(model))) - state_layers(model))


def vision_source(model: PreTrainedModel) -> VisionSource:
    """Where to read attention inside the vision tower; refused if the tower packs its images into one sequence, or the
    projector reads the tower's embeddings, which no attention made."""
    config: Any = model.config
    tower = getattr(base_model(model), "vision_tower", None)
    tower = getattr(base_model(model), "vision_model", None) if tower is None else tower
    depth = getattr(getattr(tower, "config", None), "num_hidden_layers", None)
    if tower_of(config).unread:
        why = tower_of(config).unread
        raise Unsupported(f"{config.model_type!r}: {why}; rank by text-attention, random or uniform")
    if tower is None or depth is None or tower_of(config).images == "any":
        raise Unsupported(
            f"the vision tower of {config.model_type!r} runs all images as one sequence, so its attention "
            "cannot be told per image; rank by text-attention, random or uniform"
        )
    if tower_of(config).relative:
        raise Unsupported(
            f"the vision tower of {config.model_type!r} adds relative positions to its attention, which can then not "
            "be read; rank by text-attention, random or uniform"
        )
    layers = next((m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
    if layers is None:
        raise Unsupported(
            f"{type(tower).__name__} has no list of the {depth} layers that its config's num_hidden_layers "
            "says, so its attention cannot be found; rank by text-attention, random or uniform"
        )
    selected = getattr(config, "vision_feature_layer", -1)
    deepest = max(i % (depth + 1) for i in (selected if isinstance(selected, (list, tuple)) else [selected]))
    if deepest == 0:
        raise Unsupported("vision_feature_layer is the tower's input, which has no attention; rank by text-attention")
    class_token = any(hasattr(m, "class_embedding") or hasattr(m, "cls_token") for m in tower.modules())
    strategy = getattr(config, "vision_feature_select_strategy", "default" if class_token else "full")
    return VisionSource(
        tower=tower,
        attention=attention_of(layers[deepest - 1]),  # hidden state i is the output of layer i - 1
        has_class_token=class_token,
        drops_first=strategy == "default",
    )


def impossible(config: Any) -> str | None:
    """Why no model of this config can ever run under a reduction, whatever a check of it would say; None: it might."""
    kind, text = config.model_type, config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "is_encoder_decoder", False):
        return (
            f"{kind!r} is an encoder-decoder: its vision tokens are in the encoder, and the "
            "decoder reads them by cross-attention; use a decoder-only model"
        )
    if getattr(text, "cross_attention_layers", None):
        return (
            f"{kind!r} reads images by cross-attention: its decoder's input has no vision "
            "tokens to drop; use a decoder-only model"
        )
    known = sorted(LAYERS.keys() & _layer_kinds(text))
    if known:
        return f"{kind!r} has layers ({', '.join(known)}) that {LAYERS[known[0]]}; use a model that attends to all keys"
    return None


def _layer_kinds(text: Any) -> set[str]:
    """What kinds of layers a text config names, if it does."""
    return set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())


def refusal(config: Any) -> str | None:
    """Why a model of this config cannot run under a reduction; None when it can."""
    never = impossible(config)
    kind, text = config.model_type, config.get_text_config() if hasattr(config, "get_text_config") else config
    if never is not None or kind in FAMILIES:
        return never
    if kind in REFUSED:
        return f"{kind!r} {REFUSED[kind]}; `thinsight models` lists those that can run under a reduction"
    kinds = _layer_kinds(text)
    name = CLASSES.get(kind)
    alike = sorted(row.model_type for row in FAMILIES.values() if row.model_class == name)
    other = sorted(set(kinds) - _REDUCIBLE)
    if name is None:
        why = (
            f", which transformers {transformers.__version__} does not load as a model that answers questions about "
            "images"
        )
    elif alike:
        why = f", which runs as {name} like {alike[0]!r}, but has not been tried under this name yet"
    elif other:
        why = (
            f", whose decoder has layers ({', '.join(other)}) that neither attend nor carry a state of a kind known "
            "here: what leaving tokens out of them would mean has not been worked out"
        )
    else:
        why = f", which is not on the list yet: nobody has tried {name}"
    return f"model_type is {kind!r}{why}; {HOW_TO_CHECK}; `thinsight models` lists the {len(FAMILIES)} that are"


def check_supported(model: Any, unlisted: bool | str | os.PathLike[str] = False) -> PreTrainedModel:
    """The model without wrappers (see `unwrapped`); refused, with the reason, if it cannot run under a reduction.

    `unlisted`: as for `apply`, of a model whose type is not listed.
    """
    check_version()
    model = unwrapped(model)
    reason = refusal(model.config)
    if reason is not None and (impossible(model.config) is not None or not _cleared(model, unlisted)):
        raise Unsupported(f"{type(model).__name__}: {reason}")
    if not hasattr(model, "get_image_features") and not hasattr(base_model(model), "get_image_features"):
        raise Unsupported(f"{type(model).__name__} has no vision encoder; pass the whole model, not its text part")
    check_attention(model)
    return model


# --- models whose type is not listed: they run where a check of them has passed

_admitted: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # base models that a check, or a caller, has let in
_passed: set[Identity] = set()  # what has passed in this process


_THIS_PROCESS = secrets.token_hex(8)


def identity_of(model: PreTrainedModel, *, parts: bool = True) -> Identity:
    """What the result of a check of a model holds for; `parts`: whether they are where they are looked for."""
    kind = type(model)
    module = sys.modules.get(kind.__module__)
    foreign = not kind.__module__.startswith("transformers.")
    try:
        code = inspect.getsource(kind if module is None else module) if foreign else ""
    except (OSError, TypeError):  # typed in by hand: nobody can say later whether it is still the same
        code = _THIS_PROCESS
    return Identity(
        model_class=f"{kind.__module__}.{kind.__qualname__}",
        code=hashlib.sha256(code.encode()).hexdigest()[:16] if foreign else "",
        model_type=str(model.config.model_type),
        layers=_kinds_of_layers(model) if parts else (),
        attention=attention_implementation(model) if parts else str(model.config._attn_implementation),
        transformers=transformers.__version__,
        thinsight=__version__,
    )


def _kinds_of_layers(model: PreTrainedModel) -> tuple[str, ...]:
    text = decoder(model).config
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if not kinds:
        windows = sliding_layers(model)
        kinds = [f"{'sliding' if layer in windows else 'full'}_attention" for layer in range(num_layers(model))]
    return tuple(sorted(set(kinds)))


def _cleared(model: PreTrainedModel, unlisted: bool | str | os.PathLike[str]) -> bool:
    """Whether a check has passed on a model whose type is not listed."""
    base = base_model(model)
    if base in _admitted:
        return True
    if unlisted is False and not stored_for(type(model).__name__):
        return False
    check_parts(model)
    identity = identity_of(model)
    if isinstance(unlisted, bool):
        found = stored(identity)
        good = (found is not None and found.passed) or (unlisted and identity in _passed)
        if unlisted and not good:
            raise Unsupported(
                f"{type(model).__name__}: model_type {identity.model_type!r} is not listed, and no check of it has "
                f"passed under {identity.attention} with transformers {identity.transformers} and thinsight "
                f"{identity.thinsight}, here or in {cache_folder()}: {HOW_TO_CHECK}"
            )
    else:
        found = CheckResult.load(unlisted)
        if why := identity.differs(found.identity):
            raise Unsupported(f"check result {os.fspath(unlisted)} is of another model: {why}; {HOW_TO_CHECK}")
        if not found.passed:
            raise Unsupported(
                f"check result {os.fspath(unlisted)} says that this model fails: {found.failures[0].name}"
                f"{found.failures[0].note and ', '}{found.failures[0].note}; use another model"
            )
        good = True
    if good:
        _admitted.add(base)
    return good


def is_cleared(model: Any) -> bool:
    """Whether a stored check lets a model run whose type is not listed; from here on it may, if so."""
    return _cleared(unwrapped(model), False)


@contextmanager
def admitted(model: PreTrainedModel) -> Iterator[None]:
    """The model may run while it lasts, whatever its type: it is being checked."""
    base = base_model(model)
    before = base in _admitted
    _admitted.add(base)
    try:
        yield
    finally:
        if not before:
            _admitted.discard(base)


def remember(result: CheckResult) -> None:
    """Let models of the result's identity be asked for as `unlisted` in this process, if it has passed."""
    if result.passed:
        _passed.add(result.identity)
    else:
        _passed.discard(result.identity)


def check_parts(model: PreTrainedModel) -> None:
    """Refuse a model whose parts are not where this room looks for them. Of listed families their tests say so."""
    name, text = type(model).__name__, decoder(model)
    layers = getattr(text, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise Unsupported(
            f"{name}: get_decoder() gives a {type(text).__name__}, which has no list `layers` of decoder layers; "
            "have it give the text model without its head"
        )
    count = getattr(text.config, "num_hidden_layers", None)
    if not isinstance(count, int) or not 1 <= count <= len(layers):
        raise Unsupported(f"{name}: its decoder has {len(layers)} layers, but num_hidden_layers is {count!r}")
    if not any(module is text for module in base_model(model).modules()):
        raise Unsupported(f"{name}: get_decoder() gives a {type(text).__name__} that is no part of its base model")
    family = family_of(model.config)
    fields = (family.image_placeholder, family.video_placeholder)
    ids = {field: getattr(model.config, field, None) for field in fields if field is not None}
    if ids[family.image_placeholder] is None:
        raise Unsupported(f"{name}: its config has no {family.image_placeholder}, so vision tokens cannot be told")
    for field, token in ids.items():
        if token is not None and (isinstance(token, bool) or not isinstance(token, int)):
            raise Unsupported(f"{name}: its config's {field} is {token!r}; vision tokens must stand behind one id")
    if len(set(ids.values())) < len(ids):
        raise Unsupported(
            f"{name}: {' and '.join(ids)} are both {next(iter(ids.values()))}, so each vision token would be counted "
            "twice; give its family a row (docs/models.md) that names one of them"
        )


@functools.cache
def check_version() -> None:
    """Refuse a transformers that is too old, and say it once of one that is too new to be known."""
    found = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    oldest, untested = (".".join(map(str, version)) for version in (OLDEST, UNTESTED))
    if found < OLDEST:
        raise MissingPackage(
            f"transformers {transformers.__version__} is installed, and thinsight needs {oldest} or later: "
            f'pip install "transformers>={oldest},<{untested}"'
        )
    if found >= UNTESTED:
        warnings.warn(
            f"transformers {transformers.__version__} is installed, and thinsight is not tested from "
            f'{untested} on; if something fails, pip install "transformers>={oldest},<{untested}"',
            stacklevel=2,
        )


def check_attention(model: PreTrainedModel, paged: bool = False) -> None:
    """Refuse a decoder's attention that cannot run on fewer tokens than it was told of, or a ``paged`` cache, that of
    continuous batching."""
    implementation = attention_implementation(model)
    if paged or implementation.startswith("paged"):
        raise Unsupported(
            f"attn_implementation is {implementation!r} on a paged cache: continuous batching keeps its own, "
            "from which tokens cannot be left out; call generate() with a padded batch instead"
        )
    if implementation not in ATTENTION:
        raise Unsupported(
            f"attn_implementation is {implementation!r}; load the model with one of {', '.join(ATTENTION)}"
        )
    if implementation.startswith("flash") and scales_by_position(model):
        raise Unsupported(
            f"attn_implementation is {implementation!r}, which takes positions with gaps for packed sequences, and "
            "this model's layers scale attention by them; load the model with sdpa"
        )


def check_positions(model: PreTrainedModel, tokens: int) -> None:
    """Refuse a prompt of so many tokens where layers scale attention by place, and count places in tokens that are
    there: Llama 4, from a number of tokens on."""
    text = decoder(model).config
    limit = getattr(text, "floor_scale", None) if getattr(text, "attn_temperature_tuning", False) else None
    if limit is not None and tokens >= limit:
        raise Unsupported(
            f"the prompt has {tokens} tokens, and from {limit} on this model's layers scale attention by a token's "
            "place, which they count in tokens that are there; shorten the prompt"
        )


def model_device(model: PreTrainedModel) -> torch.device:
    """The device that holds the decoder's first weights."""
    return next(decoder(model).parameters()).device


def check_recomputation(model: PreTrainedModel) -> None:
    """Refuse gradient checkpointing where the backward pass would run the hooks a second time: transformers before
    5.23, which checkpoints a layer together with its hooks."""
    last = decoder_layers(model)[-1]
    recomputes = last.training and getattr(last, "gradient_checkpointing", False)
    if recomputes and "__call__" in vars(GradientCheckpointingLayer):
        raise Unsupported(
            "gradient checkpointing under a reduction needs transformers 5.23 or later; upgrade it, or call "
            "model.gradient_checkpointing_disable()"
        )

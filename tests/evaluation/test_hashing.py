"""What a hash calls the model: all that its numbers come from, adapters and autocast too; and its cost."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from stock_faults import takes_adapters
from test_across_runs import evaluator_of, numbers_of
from tiny import tiny_llava
from torch import nn

from thinsight.evaluation.features import hash_model
from thinsight.runtime.anatomy import decoder


def hash_of(model: Any, without: tuple[Any, ...] = ()) -> str:
    digest = hashlib.sha256()
    hash_model(digest, model, without)
    return digest.hexdigest()


def lora(where: str = "language_model", **more: Any) -> LoraConfig:
    return LoraConfig(target_modules=rf".*{where}.*\.[qv]_proj", init_lora_weights=False, **more)


def two_adapters(where: str = "language_model", **more: Any) -> Any:
    """PEFT's wrapper of a tiny model with adapters "default" and "second", of which the first is active."""
    torch.manual_seed(0)
    wrapper = get_peft_model(tiny_llava(), lora(where, **more))
    wrapper.add_adapter("second", lora(where, **more))
    wrapper.set_adapter("default")
    return wrapper.eval()


def inside(wrapper: Any) -> Any:
    return wrapper.get_base_model()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "as it was": lambda wrapper: None,
    "the other one": lambda wrapper: wrapper.set_adapter("second"),
    "both": lambda wrapper: wrapper.base_model.set_adapter(["default", "second"]),
    "none": lambda wrapper: wrapper.base_model.disable_adapter_layers(),
    "scaled": lambda wrapper: [
        module.set_scale("default", 2.0) for module in wrapper.modules() if hasattr(module, "set_scale")
    ],
    "merged": lambda wrapper: wrapper.merge_adapter(),
}


@pytest.mark.parametrize(
    ("settings", "left_out"),
    [({}, ()), ({"modules_to_save": ["lm_head"]}, ("both",))],  # which of two heads would it be
    ids=["layers", "with a head"],
)
def test_every_state_of_the_adapters_has_a_hash_of_its_own(settings: dict[str, Any], left_out: tuple[str, ...]) -> None:
    found = {}
    changes = {name: change for name, change in CHANGES.items() if name not in left_out}
    for name, change in changes.items():
        wrapper = two_adapters(**settings)
        change(wrapper)
        found[name] = hash_of(inside(wrapper))
    assert len(set(found.values())) == len(changes)
    assert hash_of(tiny_llava()) not in found.values()
    assert hash_of(inside(two_adapters(**settings))) == found["as it was"]


@pytest.mark.skipif(not takes_adapters(), reason="transformers asks for a later PEFT")
def test_adapters_of_transformers_own_have_hashes_of_their_own() -> None:
    torch.manual_seed(0)
    model = tiny_llava()
    found = [hash_of(model)]
    for name in ("one", "two"):
        model.add_adapter(lora(), adapter_name=name)
        found.append(hash_of(model))
    model.set_adapter("one")
    found.append(hash_of(model))
    model.disable_adapters()
    found.append(hash_of(model))
    assert len(set(found)) == 5
    model.enable_adapters()
    assert hash_of(model) == found[3]


def test_what_a_hash_leaves_out_takes_its_adapters_along() -> None:
    """Features of images do not depend on the decoder's adapters, but on the tower's."""
    for where, alike in (("language_model", True), ("vision_tower", False)):
        wrapper = two_adapters(where)
        model = inside(wrapper)
        before = hash_of(model, (decoder(model), model.lm_head))
        wrapper.set_adapter("second")
        assert (hash_of(model, (decoder(model), model.lm_head)) == before) is alike


@pytest.mark.parametrize("where", ["language_model", "vision_tower"])
def test_a_cache_folder_gives_each_adapter_its_own_answers(where: str, tmp_path: Path) -> None:
    """Without one, each gives what it gives; with one, that stays so, first and later."""
    states: dict[str, Callable[[Any], Any]] = {name: CHANGES[name] for name in ("as it was", "the other one", "none")}

    def answers(cache_dir: Path | None) -> dict[str, Any]:
        found, wrapper = {}, two_adapters(where)
        for name, change in states.items():
            change(wrapper)
            found[name] = numbers_of(evaluator_of(cache_dir, wrapper))
        return found

    right = answers(None)
    assert right["as it was"] != right["the other one"] != right["none"] != right["as it was"]
    assert answers(tmp_path) == right
    assert answers(tmp_path) == right


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_has_a_hash_of_its_own(dtype: torch.dtype) -> None:
    model = tiny_llava()
    plain = hash_of(model)
    with torch.autocast("cpu", dtype):
        cast = hash_of(model)
        with torch.autocast("cpu", enabled=False):
            assert hash_of(model) == plain
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    with torch.autocast("cpu", other):
        assert len({plain, cast, hash_of(model)}) == 3


def test_weights_that_are_made_anew_are_there_one_at_a_time() -> None:
    """As those of layers that hold them in another form."""
    model = tiny_llava()
    plain = hash_of(model)
    copies, most = [], 0

    class Made(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
            nonlocal most
            super()._save_to_state_dict(destination, prefix, keep_vars)
            copies.append(weakref.ref(made := self.weight.detach().clone()))
            destination[f"{prefix}weight"] = made
            most = max(most, sum(each() is not None for each in copies))

    for layer in [*model.get_decoder().layers.modules(), model.lm_head]:
        if type(layer) is nn.Linear:
            layer.__class__ = Made
    assert hash_of(model) == plain
    assert len(copies) == 4 * 7 + 1
    assert most <= 2  # the next one is made before the last one is forgotten


def test_weights_that_wait_on_a_disk_are_hashed_as_they_are(tmp_path: Path) -> None:
    model = tiny_llava()
    plain = hash_of(model)
    places = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "lm_head": "cpu"}
    spread = dispatch_model(model, {**places, "model.language_model": "disk"}, main_device="cpu", offload_dir=tmp_path)
    assert spread.get_decoder().layers[0].self_attn.q_proj.weight.is_meta
    assert hash_of(spread) == plain
    assert spread.get_decoder().layers[0].self_attn.q_proj.weight.is_meta

"""Loading through from_pretrained: what comes back, and that every bad input is one line that says what to
do."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import tiny_inputs, tiny_llava, tiny_processor
from transformers import LlamaConfig, LlamaForCausalLM, LlavaForConditionalGeneration

from thinsight import loading
from thinsight.errors import StorageError, ThinsightError
from thinsight.loading import base_name, checkpoint_hash


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_llava().half().save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


def test_local_folder(folder: Path) -> None:
    model, processor = loading.load_model(folder, device="cpu")
    assert isinstance(model, LlavaForConditionalGeneration)
    assert not model.training
    assert model.dtype == torch.float32  # float16 on disk
    assert model.config._attn_implementation == "sdpa"
    assert processor.tokenizer.padding_side == "left"


def test_dtype_and_attention_are_taken(folder: Path) -> None:
    model, _ = loading.load_model(str(folder), dtype="bfloat16", device="cpu", attn="eager")
    assert model.dtype == torch.bfloat16
    assert model.config.text_config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("found", "warned"),
    [
        ({"architecture": "x86_64", "avx2": True}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
    ],
)
def test_a_cpu_without_bfloat16_is_a_warning(
    folder: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], warned: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        loading.load_model(folder, dtype="bfloat16", device="cpu")
        said = [str(each.message) for each in told]
        told.clear()
        loading.load_model(folder, dtype="float32", device="cpu")
        assert not any("bfloat16" in str(each.message) for each in told)
    assert any("neither AVX512-BF16 nor AMX" in each for each in said) == warned


def test_demo_is_read_from_the_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.DEMOS, "demo", folder)
    model, _ = loading.load_demo()
    assert model.dtype == torch.float32
    assert loading.load_demo("bfloat16")[0].dtype == torch.bfloat16


def test_missing_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.DEMOS, "demo", tmp_path)
    with pytest.raises(ThinsightError, match="demo model 'demo' is not part"):
        loading.load_demo()


def load_error(name: str | Path, **options: Any) -> str:
    with pytest.raises(ThinsightError) as caught:
        loading.load_model(name, **{"device": "cpu", **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float8"}, "dtype is 'float8': choose one of auto, float32"),
        ({"attn": "magic"}, "attn is 'magic': choose one of eager, sdpa"),
        ({"device": "abacus"}, "device is 'abacus': choose auto, cpu"),
        ({"device": "cuda:99"}, "CUDA devices"),
    ],
)
def test_bad_options(folder: Path, options: dict[str, str], words: str) -> None:
    assert words in load_error(folder, **options)


def test_unknown_paths(tmp_path: Path) -> None:
    assert "neither a folder that exists nor a hub id" in load_error(tmp_path / "nowhere" / "at all")
    assert "has no config.json" in load_error(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_text("")
    assert "is a file" in load_error(file)


def test_hub_id_while_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in load_error("someone/some-model-that-is-not-cached")


def _hub_answers(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def model_info(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)


def _hub_error(kind: str) -> Exception:
    import huggingface_hub.errors as errors

    error = getattr(errors, kind).__new__(getattr(errors, kind))
    Exception.__init__(error, "the server's words\nand more")
    return error


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConnectionError("no route\nto host"), "the hub cannot be reached (no route)"),
        (lambda: _hub_error("RepositoryNotFoundError"), "nor a public model on the hub"),
        (lambda: _hub_error("GatedRepoError"), "is gated"),
        (lambda: _hub_error("HfHubHTTPError"), "the hub refused"),
    ],
)
def test_what_the_hub_may_answer(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Exception], words: str) -> None:
    _hub_answers(monkeypatch, make())
    assert words in load_error("someone/some-model-that-is-not-cached")


def test_unsupported_family(tmp_path: Path) -> None:
    config = LlamaConfig(vocab_size=10, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert "cannot run under a reduction: model_type is 'llama', which transformers" in load_error(tmp_path)


def test_a_family_that_cannot_work_gets_its_reason_before_weights_are_read(tmp_path: Path) -> None:
    from transformers import MllamaConfig

    MllamaConfig().save_pretrained(tmp_path)
    assert "reads images by cross-attention" in load_error(tmp_path)


def test_a_config_with_fewer_layers_than_the_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = load_error(tmp_path)
    assert "the checkpoint has 2 layers that its config.json does not count" in message
    config["text_config"]["num_nextn_predict_layers"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert loading.load_model(tmp_path, device="cpu")[0].config.text_config.num_hidden_layers == 2


def test_a_processor_that_needs_torchvision_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Exception] = []

    def from_pretrained(*_: Any, **__: Any) -> None:
        raise said[-1]

    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    monkeypatch.setattr(loading.torch, "__version__", "2.13.0")
    for package, error in (
        ("torchvision", ImportError("VideoProcessor requires the Torchvision library but it was not found.")),
        ("torchvision", ValueError("./x requires `torchvision` to be installed. Please install\nand try again")),
        ("num2words", ImportError("Package `num2words` is required to run SmolVLM processor.")),
    ):
        said.append(error)
        message = load_error(folder)
        remedy = {"torchvision": "'thinsight[vision]'"}.get(package, package)
        assert message.endswith(f"needs {package}, which is not installed: pip install {remedy}")
        assert "\n" not in message
    monkeypatch.setattr(loading.torch, "__version__", "2.13.0+cpu")
    said.append(ValueError("requires `torchvision`"))
    assert load_error(folder).endswith("to keep torch 2.13.0+cpu, the torchvision from where that one came from")
    monkeypatch.setattr(loading, "find_spec", lambda _: object())  # it is there: something else is wrong
    assert "cannot load its processor" in load_error(folder)


def test_device_map_is_handed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    stock = loading.AutoModelForImageTextToText.from_pretrained

    def from_pretrained(source: Any, *, device_map: Any, **options: Any) -> Any:
        seen["device_map"] = device_map
        return stock(source, **options)

    monkeypatch.setattr(loading.AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    monkeypatch.setattr(loading, "is_accelerate_available", lambda: True)
    loading.load_model(folder, device="cpu", device_map="auto")
    assert seen == {"device_map": "auto"}
    monkeypatch.setattr(loading, "is_accelerate_available", lambda: False)
    assert load_error(folder, device_map="auto").endswith("pip install accelerate")


def test_model_type_nobody_knows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "made-up"}))
    assert "cannot load its config" in load_error(tmp_path)


def test_broken_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    assert "cannot load its config" in load_error(tmp_path)


def test_missing_and_broken_weights(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    assert "cannot load its weights" in load_error(tmp_path)
    weights.unlink()
    assert "cannot load its weights" in load_error(tmp_path)


def test_incomplete_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    dropped = next(key for key in weights if "q_proj" in key)
    del weights[dropped]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights are missing" in load_error(tmp_path)


def test_weights_of_another_shape_are_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["intermediate_size"] *= 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = load_error(tmp_path)
    assert "weights are mismatched, such as model.language_model.layers.0.mlp" in message
    assert "does not fit its config.json" in message


def test_long_words_of_other_libraries_are_cut_after_a_sentence() -> None:
    long = RuntimeError("The file is bad. " + "It may be anything, really. " * 20 + "\nsecond line")
    assert loading._first_line(long) == "The file is bad"
    assert loading._first_line(RuntimeError("one of:\nthis")) == "one of"
    assert loading._first_line(RuntimeError()) == "RuntimeError"


# --- adapters


def saved_adapter(base: str, path: Path, **more: Any) -> Any:
    """A drawn LoRA of the tiny model, written as training leaves it: without a model. Returns its model."""
    torch.manual_seed(0)
    config = LoraConfig(target_modules=r".*\.[qv]_proj", init_lora_weights=False, **more)
    model = get_peft_model(tiny_llava(), config)
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(path)
    assert not (path / "config.json").exists()
    return model.eval()


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(**tiny_inputs([[3, 5], [2, 9]])).logits
    return logits


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("base")
    tiny_llava().save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return str(path)


def test_an_adapters_folder_is_loaded_onto_its_base_model(base: str, tmp_path: Path) -> None:
    trained = saved_adapter(base, tmp_path)
    model, processor = loading.load_model(tmp_path, device="cpu")
    assert isinstance(model, LlavaForConditionalGeneration)
    assert not model.training
    assert torch.equal(logits_of(model), logits_of(trained))
    assert (logits_of(model) - logits_of(tiny_llava())).abs().max() > 1e-2
    assert processor.tokenizer.padding_side == "left"
    assert loading.load_config(tmp_path).get_text_config().num_hidden_layers == 4


def test_an_adapters_own_processor_goes_before_its_bases(base: str, tmp_path: Path) -> None:
    saved_adapter(base, tmp_path)
    own = tiny_processor()
    own.tokenizer.add_tokens(["brightness"])
    own.save_pretrained(tmp_path)
    _, processor = loading.load_model(tmp_path, device="cpu")
    assert "brightness" in processor.tokenizer.get_vocab()
    assert processor.tokenizer.padding_side == "left"


def test_adapters_that_cannot_be_loaded(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_adapter(base, tmp_path / "whole")
    saved_adapter(str(tmp_path / "whole"), tmp_path / "second")
    assert "is an adapter, too; merge that one" in load_error(tmp_path / "second")
    saved_adapter(str(tmp_path / "nowhere"), tmp_path / "lost")
    assert "nowhere" in load_error(tmp_path / "lost")

    saved_adapter(base, tmp_path / "cut")
    weights = tmp_path / "cut" / "adapter_model.safetensors"
    kept = dict(list(load_file(weights).items())[1:])
    save_file(kept, weights)
    assert "cannot load its adapter (Found missing adapter keys" in load_error(tmp_path / "cut")

    config = tmp_path / "whole" / "adapter_config.json"
    for name in (None, "", 3):
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_name_or_path": name}))
        assert f"has {name!r} as base_model_name_or_path; write" in load_error(tmp_path / "whole")
    config.write_text("[]")
    assert "cannot load its adapter_config.json" in load_error(tmp_path / "whole")
    monkeypatch.setattr(loading, "is_peft_available", lambda: False)
    assert "needs PEFT: pip install peft" in load_error(tmp_path / "cut")


def test_an_adapter_that_is_more_than_layers_is_refused(base: str, tmp_path: Path) -> None:
    saved_adapter(base, tmp_path, alora_invocation_tokens=[3], task_type="CAUSAL_LM")
    assert "use adapters that live in the layers" in load_error(tmp_path)


def test_an_adapter_on_the_hub_is_to_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    files = [SimpleNamespace(rfilename=name) for name in ("README.md", "adapter_config.json")]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    assert "is an adapter: download it (hf download someone/lora" in load_error("someone/lora")


def test_config_alone(folder: Path) -> None:
    assert loading.load_config(folder).get_text_config().num_hidden_layers == 4


def test_remote_code_needs_a_word(tmp_path: Path) -> None:
    config = {"model_type": "their-own", "auto_map": {"AutoConfig": "their.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "their.py").write_text("raise SystemExit('remote code was run')")
    assert "--trust-remote-code" in load_error(tmp_path)


# -- what a reduction says of it -----------------------------------------------------------------------------


def test_a_local_folder_goes_by_its_own_name(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "models" / "my-llava"
    shutil.copytree(folder, place)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (place, f"{place}/", "models/my-llava", "./models/my-llava", "~/models/my-llava"):
        assert base_name(name) == "my-llava"
    monkeypatch.chdir(place)
    for name in (".", "./", "../my-llava", "../../models/my-llava"):
        assert base_name(name) == "my-llava"
    (place / "inside").mkdir()
    monkeypatch.chdir(place / "inside")
    assert base_name("..") == "my-llava"


def test_other_names_stay_what_they_are() -> None:
    for name in ("demo", "demo-internvl", "llava-hf/llava-1.5-7b-hf", "gpt2"):
        assert base_name(name) == name
    for name, place in loading.DEMOS.items():
        assert base_name(place) == base_name(str(place)) == name
        assert checkpoint_hash(place) is checkpoint_hash(name) is None
    assert checkpoint_hash("llava-hf/llava-1.5-7b-hf") is None


def test_a_snapshot_in_the_cache_goes_by_its_id(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "hub" / "models--llava-hf--llava-1.5-7b-hf" / "snapshots" / "8c85e9a4d626b7b"
    shutil.copytree(folder, place)
    assert base_name(place) == "llava-hf/llava-1.5-7b-hf"


def test_a_checkpoint_is_known_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    before = checkpoint_hash(folder)
    assert before == checkpoint_hash(other) == checkpoint_hash(str(other))
    (other / "README.md").write_text("notes")
    assert checkpoint_hash(other) == before
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    assert checkpoint_hash(other) != before
    shutil.copytree(folder, other, dirs_exist_ok=True)
    assert checkpoint_hash(other) == before
    with open(other / "model.safetensors", "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x55")
    assert checkpoint_hash(other) != before
    (other / "model.safetensors").unlink()
    (other / "model.safetensors").mkdir()
    with pytest.raises(StorageError, match="other' cannot be read"):
        checkpoint_hash(other)
    (other / "model.safetensors").rmdir()
    (other / "model.safetensors").write_bytes(b"")
    assert checkpoint_hash(other) not in (before, None)


def test_an_adapter_is_told_from_its_base_model_and_from_another(base: str, tmp_path: Path) -> None:
    """Its weights are what differs, and its name is its folder's."""
    saved_adapter(base, tmp_path / "mine")
    shutil.copytree(tmp_path / "mine", tmp_path / "moved")
    saved_adapter(base, tmp_path / "other")
    assert base_name(tmp_path / "mine") == "mine"
    mine = checkpoint_hash(tmp_path / "mine")
    assert mine == checkpoint_hash(tmp_path / "moved")
    with open(tmp_path / "other" / "adapter_model.safetensors", "r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x55")
    assert mine not in (None, checkpoint_hash(base), checkpoint_hash(tmp_path / "other"))

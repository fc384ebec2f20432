"""What conversion writes and what it refuses: shards, dtypes, broken and foreign files, interruptions."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import full_disk
from original_checkpoints import CHECKPOINTS, write_checkpoint, write_json, write_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from thinsight import ThinsightError, load_model
from thinsight.convert import convert
from thinsight.convert.source import TensorSpec, plan_shards, write_shards
from thinsight.errors import StorageError
from thinsight.progress import Watcher


def read_weights(folder: Path) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    return weights


def assert_equal(some: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert some.keys() == other.keys()
    assert all(torch.equal(some[name], other[name]) for name in some)


# -- what is written -------------------------------------------------------------------------------------


def test_shards_and_index(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "original", "InternVL2-2B", shards=3)
    whole = convert(tmp_path / "original", tmp_path / "whole")
    assert [path.name for path in whole.glob("model*")] == ["model.safetensors"]

    parts = convert(tmp_path / "original", tmp_path / "parts", max_shard_bytes=60_000)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{n + 1:05}-of-{len(files):05}.safetensors" for n in range(len(files))]
    for file in files:
        weights = load_file(parts / file)
        assert sum(tensor.nbytes for tensor in weights.values()) <= 60_000
        assert {name for name, where in index["weight_map"].items() if where == file} == weights.keys()
        with safe_open(parts / file, framework="pt") as shard:
            assert shard.metadata() == {"format": "pt"}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in read_weights(whole).values())
    assert_equal(read_weights(parts), read_weights(whole))
    _, info = AutoModelForImageTextToText.from_pretrained(parts, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_plan_of_shards() -> None:
    sizes = {"a": 4, "b": 4, "c": 1, "d": 20, "e": 2, "f": 9}
    assert plan_shards(sizes, 9) == [["a", "b", "c"], ["d"], ["e"], ["f"]]
    assert plan_shards(sizes, 100) == [list(sizes)]


def test_dtypes_side_by_side(tmp_path: Path) -> None:
    """An odd number of 2-byte numbers before 4-byte ones must not shift those off their alignment."""
    tensors = {
        "a": torch.randn(3).bfloat16(),
        "b": torch.randn(2, 3),
        "c": torch.randn(()).half(),
        "d": torch.randn(5, dtype=torch.float64),
        "e": torch.randn(4, 6).t(),
    }
    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16", torch.float64: "F64"}
    specs = {name: TensorSpec(tuple(t.shape), names[t.dtype]) for name, t in tensors.items()}
    write_shards(tensors.items(), specs, tmp_path, 10**6)
    assert_equal(load_file(tmp_path / "model.safetensors"), tensors)


def test_a_source_of_one_file(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "split", "InternVL2-1B", shards=3)
    write_checkpoint(tmp_path / "single", "InternVL2-1B", shards=1)
    assert_equal(
        read_weights(convert(tmp_path / "split", tmp_path / "a")),
        read_weights(convert(tmp_path / "single", tmp_path / "b")),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_keeps_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "original", "InternVL2-2B", dtype=dtype)
    out = convert(tmp_path / "original", tmp_path / "converted")
    assert {tensor.dtype for tensor in read_weights(out).values()} == {dtype}
    assert AutoModelForImageTextToText.from_pretrained(out, dtype="auto").dtype == dtype


def test_every_weight_once(tmp_path: Path) -> None:
    """Packed or not, as many numbers come out as went in, apart from rotary buffers and unused layers."""
    for size in CHECKPOINTS:
        _, weights = write_checkpoint(tmp_path / size, size)
        out = read_weights(convert(tmp_path / size, tmp_path / f"{size}-hf"))
        assert sum(t.numel() for t in out.values()) == sum(t.numel() for t in weights.values())


def test_drops_what_is_not_needed(tmp_path: Path) -> None:
    folder = tmp_path / "original"
    _, weights = write_checkpoint(folder, "InternVL2-40B", top={"select_layer": -3}, shards=1)
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_weights(folder, weights, 1)
    out = read_weights(convert(folder, tmp_path / "converted"))
    layers = {name.split(".")[4] for name in out if name.startswith("model.vision_tower.encoder.layer.")}
    assert layers == {"0"}
    assert not any("inv_freq" in name for name in out)


def test_original_defaults(tmp_path: Path) -> None:
    """Fields that a saved config leaves out have the original class's defaults: qk-norm, RMS norm, biases."""
    folder = tmp_path / "original"
    config, _ = write_checkpoint(folder, "InternVL2-26B", text={"bias": True})
    for name in ("qkv_bias", "qk_normalization", "norm_type", "layer_norm_eps"):
        del config["vision_config"][name]
    del config["llm_config"]["bias"]
    write_json(folder / "config.json", config)
    made = json.loads((convert(folder, tmp_path / "converted") / "config.json").read_text())
    assert made["vision_config"]["use_qk_norm"] is True
    assert made["vision_config"]["norm_type"] == "rms_norm"
    assert made["vision_config"]["attention_bias"] is False
    assert made["text_config"]["attention_bias"] is True


def test_window_that_never_bites_is_left_out(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "long", "InternVL2-4B")
    write_checkpoint(tmp_path / "short", "InternVL2-4B", text={"sliding_window": 100})
    windows = [
        json.loads((convert(tmp_path / name, tmp_path / f"{name}-hf") / "config.json").read_text())
        for name in ("long", "short")
    ]
    assert [config["text_config"]["sliding_window"] for config in windows] == [None, 100]


def test_reports_progress(tmp_path: Path) -> None:
    class Recorder(Watcher):
        def __init__(self) -> None:
            self.stages: list[str] = []
            self.last = (0, 0)

        def on_stage(self, title: str) -> None:
            self.stages.append(title)

        def on_progress(self, what: str, done: int, total: int) -> None:
            assert done == self.last[0] + 1
            self.last = (done, total)

    _, weights = write_checkpoint(tmp_path / "original", "InternVL2-1B")
    recorder = Recorder()
    convert(tmp_path / "original", tmp_path / "converted", watcher=recorder)
    assert len(recorder.stages) == 2
    assert recorder.last == (len(weights), len(weights))


# -- interruptions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), full_disk()], ids=["interrupted", "full"])
def test_interruption_leaves_nothing(error: BaseException, tmp_path: Path) -> None:
    class Stops(Watcher):
        def on_progress(self, what: str, done: int, total: int) -> None:
            if done == total // 2:
                assert any(tmp_path.glob(".converted.unfinished-*/*.safetensors"))
                raise error

    write_checkpoint(tmp_path / "original", "InternVL2-1B")
    with pytest.raises((KeyboardInterrupt, StorageError)) as caught:
        convert(tmp_path / "original", tmp_path / "converted", max_shard_bytes=20_000, watcher=Stops())
    if caught.type is StorageError:
        assert "converted cannot be written (No space left on device): make room" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["original"]
    convert(tmp_path / "original", tmp_path / "converted")


def test_out_may_be_an_empty_folder(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "original", "InternVL2-1B")
    out = tmp_path / "made" / "converted"
    out.mkdir(parents=True)
    assert convert(tmp_path / "original", out) == out
    assert (out / "config.json").is_file()


# -- refusals --------------------------------------------------------------------------------------------


def refusal(source: Path, out: Path) -> str:
    """The message; nothing may have been written."""
    with pytest.raises(ThinsightError) as error:
        convert(source, out)
    assert not (out / "config.json").exists()
    assert not list(out.parent.glob(f".{out.name}.unfinished-*"))
    return str(error.value)


def test_refuses_an_out_in_use(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "original", "InternVL2-1B")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert "is not empty" in refusal(tmp_path / "original", tmp_path / "full")
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refusal(tmp_path / "original", tmp_path / "file")


def test_refuses_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "original", "InternVL2-1B")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    assert "make room" in refusal(tmp_path / "original", tmp_path / "converted")


def test_refuses_what_is_converted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "original", "InternVL2-1B")
    out = convert(tmp_path / "original", tmp_path / "converted")
    assert "is converted already" in refusal(out, tmp_path / "twice")


CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another family": ({"model_type": "llava"}, {}, "model_type 'llava'"),
    "pixel shuffle v1": ({"ps_version": "v1"}, {}, "ps_version 'v1'"),
    "LoRA": ({"use_llm_lora": 16}, {}, "use_llm_lora 16"),
    "template": ({"template": "internvl_zh"}, {}, "template is 'internvl_zh'"),
    "no thumbnail": ({"use_thumbnail": False}, {}, "use_thumbnail false with 12 tiles"),
    "padding": ({"pad2square": True}, {}, "pad2square"),
    "select_layer": ({"select_layer": 9}, {}, "select_layer is 9"),
    "vision_config": ({"vision_config": None}, {}, "no vision_config"),
    "text model": ({}, {"architectures": ["InternLM3ForCausalLM"]}, "llm_config.architectures"),
    "quantized": ({}, {"quantization_config": {"bits": 4}}, "is quantized"),
    "rope": ({}, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling is of type 'yarn'"),
    "kind of field": ({}, {"hidden_size": "wide"}, "valid InternVLConfig"),
    "heads": ({}, {"num_key_value_heads": 3}, "config.json"),
    "width": ({}, {"intermediate_size": 50}, "has shape (32, 48)"),
    "layers": ({}, {"num_hidden_layers": 3}, "missing tensors"),
    "fewer layers": ({}, {"num_hidden_layers": 1}, "unknown tensors"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_refuses_configs(name: str, tmp_path: Path) -> None:
    top, text, expected = CONFIGS[name]
    config, _ = write_checkpoint(tmp_path / "original", "InternVL2-2B")
    config["llm_config"] |= text
    write_json(tmp_path / "original" / "config.json", {**config, **top})
    assert expected in refusal(tmp_path / "original", tmp_path / "converted")


HOSTILE = {
    "nested": ("[" * 100_000, "nested too deep"),
    "nested less": ('{"a":' * 500 + "0" + "}" * 500, "nested more than 64 deep"),
    "digits": ("1" * 5000, "a whole number of 5000 digits"),
    "large": ("1" + "0" * 400, "a whole number of 401 digits"),
    "constant": ("NaN", "NaN is not a JSON number"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_refuses_hostile_json(file: str, name: str, tmp_path: Path) -> None:
    text, expected = HOSTILE[name]
    write_checkpoint(tmp_path / "original", "InternVL2-2B", shards=2)
    path = tmp_path / "original" / file
    path.write_text(f'{{"hostile": {text}, {path.read_text().lstrip()[1:]}')
    said = refusal(tmp_path / "original", tmp_path / "converted")
    assert f"{file} is not valid JSON (" in said
    assert expected in said
    assert "download the checkpoint anew" in said


@pytest.mark.parametrize("value", [None, "many", [], {}, -1, 10**9, 10**300, 1e300, True])
@pytest.mark.parametrize(
    "field",
    [
        "max_dynamic_patch",
        "force_image_size",
        "select_layer",
        "downsample_ratio",
        "template",
        "vision_config.num_hidden_layers",
        "vision_config.patch_size",
        "llm_config.num_hidden_layers",
        "llm_config.rope_scaling",
        "llm_config.architectures",
    ],
)
def test_a_value_that_cannot_be_right_is_one_line(field: str, value: Any, tmp_path: Path) -> None:
    """Converted as it stands, or refused in a line of ours: any other error fails, as would 10**9 layers."""
    config, _ = write_checkpoint(tmp_path / "original", "InternVL2-2B")
    *above, name = field.split(".")
    part = config[above[0]] if above else config
    part[name] = value
    write_json(tmp_path / "original" / "config.json", config)
    with suppress(ThinsightError):
        convert(tmp_path / "original", tmp_path / "converted")


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": []},
        {"added_tokens_decoder": {"x": {}}},
        {"added_tokens_decoder": {"3": {"lstrip": 1}}},
        {"added_tokens_decoder": {"3": None}},
        {"additional_special_tokens": 3},
        {"eos_token": {}},
        {"eos_token": 7},
        {"model_max_length": []},
    ],
)
def test_a_tokenizer_whose_settings_cannot_be_right_is_one_line(settings: dict[str, Any], tmp_path: Path) -> None:
    """Likewise."""
    write_checkpoint(tmp_path / "original", "InternVL2-2B")
    path = tmp_path / "original" / "tokenizer_config.json"
    write_json(path, {**json.loads(path.read_text()), **settings})
    with suppress(ThinsightError):
        convert(tmp_path / "original", tmp_path / "converted")


def test_refuses_a_norm_that_transformers_fixes(tmp_path: Path) -> None:
    config, _ = write_checkpoint(tmp_path / "original", "InternVL2-26B")
    config["vision_config"]["layer_norm_eps"] = 1e-5
    write_json(tmp_path / "original" / "config.json", config)
    assert "layer_norm_eps is 1e-05" in refusal(tmp_path / "original", tmp_path / "converted")


WRONG = "language_model.model.layers.1.attention.wqkv.weight"
WEIGHTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda w: w.pop(WRONG), "missing tensors that the model needs: model.language_model.layers.1"),
    "unknown": (lambda w: w.update({"mlp1.5.weight": torch.ones(2)}), "unknown tensors that no rule knows: mlp1.5"),
    "misshapen": (lambda w: w.update({WRONG: w[WRONG][:-8]}), f"{WRONG} has shape (56, 32)"),
    "not divisible": (lambda w: w.update({WRONG: w[WRONG][:-1]}), "does not divide into the heads"),
    "transposed": (
        lambda w: w.update({"mlp1.1.weight": w["mlp1.1.weight"].T.contiguous()}),
        "mlp1.1.weight has shape (96, 32)",
    ),
    "quantized": (
        lambda w: w.update({"mlp1.3.weight": torch.ones((32, 32), dtype=torch.int8)}),
        "stores mlp1.3.weight as I8",
    ),
    "no embeddings": (lambda w: w.pop("language_model.model.tok_embeddings.weight"), "tok_embeddings"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_refuses_weights(name: str, tmp_path: Path) -> None:
    change, expected = WEIGHTS[name]
    _, weights = write_checkpoint(tmp_path / "original", "InternVL2-2B", shards=1)
    change(weights)
    write_weights(tmp_path / "original", weights, 1)
    assert expected in refusal(tmp_path / "original", tmp_path / "converted")


def test_refuses_files(tmp_path: Path) -> None:
    folder, out = tmp_path / "original", tmp_path / "converted"
    write_checkpoint(folder, "InternVL2-2B", shards=2)
    second = folder / "model-00002-of-00002.safetensors"
    content = second.read_bytes()
    second.write_bytes(content[:-100])
    assert "model-00002-of-00002.safetensors cannot be read" in refusal(folder, out)
    second.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "model-00002-of-00002.safetensors cannot be read" in refusal(folder, out)
    second.unlink()
    assert "lacks model-00002-of-00002.safetensors" in refusal(folder, out)
    save_file(load_file(folder / "model-00001-of-00002.safetensors"), second)
    assert "twice" in refusal(folder, out)
    write_json(folder / "model.safetensors.index.json", {"weight_map": {"a": "../secret.safetensors"}})
    assert "not a file of the checkpoint's folder" in refusal(folder, out)
    write_json(folder / "model.safetensors.index.json", {})
    assert "has no weight_map" in refusal(folder, out)
    (folder / "model.safetensors.index.json").unlink()
    assert "has neither" in refusal(folder, out)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickles" in refusal(folder, out)
    (folder / "config.json").write_text("[]")
    assert "holds no JSON object" in refusal(folder, out)


def test_refuses_places_without_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "has no config.json" in refusal(tmp_path, tmp_path / "converted")
    assert "HF_HUB_OFFLINE" in refusal(Path("OpenGVLab/InternVL2-1B-nowhere"), tmp_path / "converted")


def test_a_hub_id_brings_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of the hub, and that the snapshot is converted."""
    write_checkpoint(tmp_path / "original", "InternVL2-1B")
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, allow_patterns: list[str]) -> str:
        asked.update(repo_id=repo_id, patterns=allow_patterns)
        return str(tmp_path / "original")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("thinsight.convert.source.locate_model", lambda name: (str(name), False))
    out = convert("OpenGVLab/InternVL2-1B", tmp_path / "converted")
    assert (out / "config.json").is_file()
    assert asked["repo_id"] == "OpenGVLab/InternVL2-1B"
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["patterns"])


def test_original_is_not_a_supported_model(tmp_path: Path) -> None:
    """`load_model` on the original still says what it is instead of running it."""
    write_checkpoint(tmp_path / "original", "InternVL2-1B")
    with pytest.raises(ThinsightError, match=r"internvl_chat|its own code"):
        load_model(tmp_path / "original")

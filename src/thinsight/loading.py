"""Loads a model and its processor through transformers' own ``from_pretrained``; mistakes become one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import (
    is_accelerate_available,
    is_flash_attn_2_available,
    is_flash_attn_3_available,
    is_peft_available,
)

from . import smollm2
from .checked import stored_for
from .errors import BadInput, MissingPackage, StorageError, ThinsightError
from .reduction import public_name
from .runtime.anatomy import ATTENTION, check_version, impossible, refusal, unwrapped

DEMO = "demo"
_EMBEDDED = Path(__file__).resolve().parent / "demo"
DEMOS = {DEMO: _EMBEDDED / "model", "demo-internvl": _EMBEDDED / "model-internvl"}
"""The embedded models, and where they lie: a LLaVA, and an InternVL that answers the same questions. A third,
`demo-smollm2`, is put together on first use: `smollm2.py`."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LONGEST_REASON = 160  # characters of another library's message that a line of ours quotes
_FLASH = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
_OPTIONAL = ("torchvision", "num2words", "timm")  # what some processors and towers need, as transformers calls it
_LAYER = re.compile(r"\b(layers?|blocks)\.\d+\.")  # in a weight's name
_ADAPTER = "adapter_config.json"  # what PEFT writes beside an adapter's weights
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_SAMPLES, _SAMPLE = 16, 4096  # of each file of weights: how many, and bytes of each
_HUB_TIMEOUT = 10.0  # seconds for the one question "is it there?"


def load_demo(
    dtype: str | None = None, *, name: str = DEMO, device: str = "cpu", attn: str = "sdpa"
) -> tuple[Any, Any]:
    """An embedded demo model and its processor, read from the package without a network.

    ``name`` is "demo" (LLaVA, 256 vision tokens), "demo-internvl" (InternVL, 64) or "demo-smollm2" (LLaVA on
    SmolLM2-135M-Instruct, 256; needs ``thinsight[smollm2]`` and is put together on first use). Its weights are
    stored in float16 and run in float32 unless ``dtype`` says otherwise.

    Raises:
        ThinsightError: a name that is not an embedded model's; otherwise as `load_model`.
    """
    if name not in (*DEMOS, smollm2.NAME):
        raise BadInput(f"name is {name!r}: the embedded models are {', '.join((*DEMOS, smollm2.NAME))}")
    return load_model(name, "float32" if dtype is None else dtype, device, attn)


def load_model(
    name: str | Path,
    dtype: str = "auto",
    device: str = "auto",
    attn: str = "sdpa",
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    unlisted: bool = False,
    needs_processor: bool = True,
) -> tuple[Any, Any]:
    """A model in eval mode and its processor (left padding).

    Args:
        name: "demo", "demo-internvl" or "demo-smollm2", a folder written by ``save_pretrained``, or a hub id.
            A folder of a PEFT adapter is loaded onto its base model, as its adapter_config.json names it, and
            needs PEFT; the processor is the base model's where the folder has none.
        dtype: "float32", "bfloat16", "float16", or "auto": as stored, but float32 instead of float16 on a
            CPU. A warning says so where a CPU has no instructions for bfloat16 (AVX512-BF16, AMX).
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1" ...
        attn: attention implementation, "sdpa", "eager", "flash_attention_2" ...
        trust_remote_code: let the checkpoint bring its own Python code. Off unless asked for.
        device_map: spread a model that is larger than one device, "auto" or a dict, as in transformers; then
            ``device`` says nothing. Needs the package accelerate.
        unlisted: load also a model whose type is not listed; it runs once `thinsight.check` has passed on it, see
            `thinsight.apply`.
        needs_processor: refuse a model without a processor; otherwise the processor is None then.

    Raises:
        ThinsightError: an unknown path or hub id, no network, a family that is not supported, weights that
            are missing, broken or more than the config says, or an unknown dtype, device or attention.
    """
    target = check_options(dtype, device, attn)
    base = _base_of(name)
    if base is not None:
        model, processor = load_model(
            base, dtype, device, attn, trust_remote_code, device_map, unlisted, needs_processor
        )
        folder = Path(os.path.expanduser(name))
        if any((folder / each).is_file() for each in _PROCESSORS):  # saved beside it: it may have learned tokens
            options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
            processor = _load_processor(str(folder), name, options, needs_processor)
        from peft import PeftModel

        with _one_line(name, "its adapter"), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # random ones would stand there
            wrapped = PeftModel.from_pretrained(model, os.path.expanduser(name))
        return unwrapped(wrapped).eval(), processor
    if device_map is not None and not is_accelerate_available():
        raise MissingPackage("device_map needs the package accelerate: pip install accelerate")
    source, local = locate_model(name)
    options = {"local_files_only": local, "trust_remote_code": trust_remote_code}
    config = load_config(name, trust_remote_code, unlisted)
    processor = _load_processor(source, name, options, needs_processor)
    wanted = DTYPES.get(dtype, "auto")
    if dtype == "auto" and target.type == "cpu" and (config.dtype or config.get_text_config().dtype) == torch.float16:
        wanted = torch.float32
    with _one_line(name, "its weights"):
        model, info = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=wanted,
            attn_implementation=attn,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # `_check_weights` refuses them and says which
            device_map=device_map,
            **options,
        )
    _check_weights(info, config, name)
    if device_map is None:
        with _one_line(name, f"it onto {target}"):
            model = model.to(target)
    if model.dtype == torch.bfloat16 and model.device.type == "cpu" and not computes_bfloat16():
        warnings.warn(
            "this CPU has neither AVX512-BF16 nor AMX, so bfloat16 saves memory but is likely slower than "
            "float32 (--dtype float32)",
            stacklevel=2,
        )
    return model.eval(), processor


def load_processor(name: str | Path, trust_remote_code: bool = False) -> Any:
    """A model's processor without the model, an adapter's base model's; arguments and errors as for `load_model`."""
    base = _base_of(name)
    if base is not None:
        return load_processor(base, trust_remote_code)
    source, local = locate_model(name)
    return _load_processor(source, name, {"local_files_only": local, "trust_remote_code": trust_remote_code}, True)


def _load_processor(source: str, name: str | Path, options: dict[str, Any], needed: bool) -> Any:
    try:
        with _one_line(name, "its processor"):
            processor = AutoProcessor.from_pretrained(source, **options)
    except (BadInput, MissingPackage):
        if needed:
            raise
        return None
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        if not needed:
            return None
        raise BadInput(f"model {str(name)!r} has no processor with a tokenizer: save its processor beside it")
    tokenizer.padding_side = "left"  # generation continues a row at its right end
    return processor


def _base_of(name: str | Path) -> str | None:
    """The model that a folder's adapter is for; None where the folder holds a model, or there is none."""
    folder = Path(os.path.expanduser(name))
    if not (folder / _ADAPTER).is_file():
        return None
    if not is_peft_available():
        raise MissingPackage(f"model {str(name)!r} has an adapter, which needs PEFT: pip install peft")
    if (folder / "config.json").is_file():
        return None  # the model itself with the adapter beside it: transformers reads both
    with _one_line(name, f"its {_ADAPTER}"):
        base = json.loads((folder / _ADAPTER).read_text("utf-8"))["base_model_name_or_path"]
    if not isinstance(base, str) or not base:
        raise BadInput(
            f"model {str(name)!r}: its {_ADAPTER} has {base!r} as base_model_name_or_path; write the folder "
            "or hub id of the model there that the adapter was trained on"
        )
    if (Path(base) / _ADAPTER).is_file() and not (Path(base) / "config.json").is_file():
        raise BadInput(
            f"model {str(name)!r}: its base model {base!r} is an adapter, too; merge that one into its own "
            "first (merge_and_unload) and name the merged model"
        )
    return base


def how_to_install(package: str) -> str:
    """How to get a package that some processors need, in words."""
    if package != "torchvision":
        return f"pip install {package}"
    keep = f", or, to keep torch {torch.__version__}, the torchvision from where that one came from"
    return "pip install 'thinsight[vision]'" + (keep if torch.__version__.endswith("+cpu") else "")


def load_config(name: str | Path, trust_remote_code: bool = False, unlisted: bool = False) -> Any:
    """A model's config, without its weights, an adapter's base model's; arguments and errors as for `load_model`.

    A type that is not listed passes here also where a check of the class that its config names is stored: whether that
    one holds for the model is seen when a reduction is put on."""
    check_version()
    base = _base_of(name)
    if base is not None:
        return load_config(base, trust_remote_code, unlisted)
    source, local = locate_model(name)
    with _one_line(name, "its config"):
        config = AutoConfig.from_pretrained(source, local_files_only=local, trust_remote_code=trust_remote_code)
    let_in = unlisted or any(stored_for(each) for each in config.architectures or ())
    reason = impossible(config) if let_in else refusal(config)
    if reason is not None:
        raise BadInput(f"model {str(name)!r} cannot run under a reduction: {reason}")
    return config


def check_options(dtype: str, device: str, attn: str) -> torch.device:
    """Check the three options without loading anything; returns the device meant, or says which there are."""
    if dtype != "auto" and dtype not in DTYPES:
        raise BadInput(f"dtype is {dtype!r}: choose one of auto, {', '.join(DTYPES)}")
    if attn not in ATTENTION:
        raise BadInput(f"attn is {attn!r}: choose one of {', '.join(ATTENTION)}")
    if attn in _FLASH and not _FLASH[attn]():
        raise BadInput(
            f"attn is {attn!r}, whose package is not installed or finds no GPU: install it, or use --attn sdpa"
        )
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
    except RuntimeError:
        target = None
    if target is None or target.type not in ("cpu", "cuda"):
        raise BadInput(f"device is {device!r}: choose auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if target.type == "cuda" and (target.index or 0) >= count:
        raise BadInput(f"device is {device!r}, but torch sees {count} CUDA devices: use --device cpu")
    return target


def locate_model(name: str | Path) -> tuple[str, bool]:
    """What to hand to ``from_pretrained``, and whether it is a folder on this machine; refused if it is neither a
    folder with a config.json nor the id of a reachable hub repository."""
    if (embedded := DEMOS.get(str(name))) is not None:
        if not (embedded / "config.json").is_file():
            raise BadInput(
                f"the demo model {str(name)!r} is not part of this installation: reinstall thinsight, or give --model"
            )
        return str(embedded), True
    if str(name) == smollm2.NAME:
        with _one_line(name, "what it is made of"):
            return str(smollm2.model_folder()), True
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BadInput(f"model {str(name)!r} has no config.json: give a folder written by save_pretrained")
        return str(path), True
    if path.exists():
        raise BadInput(f"model {str(name)!r} is a file: give the folder that holds its config.json")
    _check_hub_id(str(name))
    return str(name), False


def base_name(name: str | Path) -> str:
    """What a reduction says it was searched for: a demo's name, a Hub id, or a local folder's own name, without where
    it lies. Never the id in a folder's config.json, which a fine-tuned model goes on naming."""
    demo = next((demo for demo, embedded in DEMOS.items() if str(name) in (demo, str(embedded))), None)
    if _is_smollm2(name):
        return smollm2.NAME
    return demo or public_name(str(_folder(name) or name))


def checkpoint_hash(name: str | Path) -> str | None:
    """What a checkpoint in a local folder is known by wherever it lies; None: it is not in one. Covers its config, an
    adapter's too, and size and an even sample of each file of weights."""
    folder = _folder(name)
    if folder is None:
        return None
    digest = hashlib.sha256()
    try:
        for path in filter(Path.is_file, (folder / "config.json", folder / _ADAPTER)):
            digest.update(path.read_bytes())
        for path in sorted(each for each in folder.iterdir() if each.suffix in _WEIGHTS):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode(errors="surrogateescape"))
            with open(path, "rb") as file:
                for number in range(_SAMPLES):
                    file.seek(max(0, size - _SAMPLE) * number // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE))
    except OSError as error:
        raise StorageError(
            f"model {str(name)!r} cannot be read ({error.strerror or error}): check the checkpoint's files"
        ) from None
    return digest.hexdigest()


def _folder(name: str | Path) -> Path | None:
    """Where a model or an adapter lies if it is a local folder that is no embedded model."""
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if str(name) in DEMOS or path in DEMOS.values() or _is_smollm2(name):
        return None
    return path if any((path / config).is_file() for config in ("config.json", _ADAPTER)) else None


def _is_smollm2(name: str | Path) -> bool:
    """Whether that names `demo-smollm2`, or is the folder in the cache where it lies."""
    if Path(name).name.startswith(f"{smollm2.NAME}-"):
        return Path(os.path.abspath(os.path.expanduser(name))) == smollm2.cached_folder()
    return str(name) == smollm2.NAME


def _check_hub_id(name: str) -> None:
    """Ask the hub once, with a short timeout, unless the config is already in the local cache."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
    except HFValidationError:
        raise BadInput(f"model {name!r} is neither a folder that exists nor a hub id (owner/name)") from None
    if constants.HF_HUB_OFFLINE:
        raise BadInput(
            f"model {name!r} is not a folder, not in the local cache, and HF_HUB_OFFLINE forbids asking the "
            "hub: unset it, or give a local folder"
        )
    try:
        found = HfApi().model_info(name, timeout=_HUB_TIMEOUT)
    except GatedRepoError:
        raise StorageError(f"model {name!r} is gated: accept its terms on the hub and run `hf auth login`") from None
    except RepositoryNotFoundError:
        raise BadInput(
            f"model {name!r} is neither a folder here nor a public model on the hub: check the spelling, "
            "or run `hf auth login` if it is private"
        ) from None
    except HfHubHTTPError as error:
        raise StorageError(f"the hub refused model {name!r} ({_first_line(error)}): try again later") from None
    except Exception as error:  # every transport has its own kinds: httpx, requests, OSError ...
        raise StorageError(
            f"model {name!r} is not a local folder and the hub cannot be reached ({_first_line(error)}): "
            "check the network, or give a local folder"
        ) from None
    files = {file.rfilename for file in found.siblings or ()}
    if _ADAPTER in files and "config.json" not in files:
        raise BadInput(
            f"model {name!r} is an adapter: download it (hf download {name} --local-dir adapter) and give its folder"
        )


def computes_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16; taken for granted where torch does not tell."""
    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch has none
    return found.get("architecture") != "x86_64" or bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def _check_weights(info: dict[str, Any], config: Any, name: str | Path) -> None:
    """Refuse a checkpoint that does not fit its config: transformers fills missing weights at random and only warns,
    and it cuts a model of more layers than its config counts short without a word."""
    for what in ("missing_keys", "mismatched_keys"):
        # a mismatched weight comes as (name, shape on disk, shape in the model)
        bad = sorted(key if isinstance(key, str) else str(key[0]) for key in info.get(what) or ())
        if bad:
            raise BadInput(
                f"model {str(name)!r}: {len(bad)} weights are {what.removesuffix('_keys')}, "
                f"such as {bad[0]}: the checkpoint does not fit its config.json, download or save it anew"
            )
    found = {key: match.group() for key in info.get("unexpected_keys") or () if (match := _LAYER.search(key))}
    # layers for predicting several tokens at once are no part of the model
    ahead = getattr(config.get_text_config(), "num_nextn_predict_layers", 0) or 0
    if len(set(found.values())) > ahead:
        raise BadInput(
            f"model {str(name)!r}: the checkpoint has {len(set(found.values()))} layers that its config.json does not "
            f"count, such as {min(found)}: restore num_hidden_layers, download or save it anew"
        )


@contextmanager
def _one_line(name: str | Path, what: str) -> Iterator[None]:
    try:
        yield
    except ThinsightError:
        raise
    except torch.cuda.OutOfMemoryError:
        raise BadInput(
            f"model {str(name)!r} does not fit on the device: use --dtype bfloat16 or --device cpu"
        ) from None
    except Exception as error:  # from_pretrained raises OSError, ValueError, SafetensorError and more
        if "trust_remote_code" in str(error):
            raise BadInput(
                f"model {str(name)!r} brings its own code, which runs only if you say --trust-remote-code"
            ) from error
        package = next((each for each in _OPTIONAL if each in str(error).lower()), None)
        if package is not None and find_spec(package) is None:
            said = f"model {str(name)!r}: {what} needs {package}, which is not installed: {how_to_install(package)}"
            raise MissingPackage(said) from error
        raise BadInput(
            f"model {str(name)!r}: cannot load {what} ({_first_line(error)}): "
            "check the checkpoint's files, or download or save it anew"
        ) from error


def _first_line(error: BaseException) -> str:
    """The first line of what an error says, and only its first sentence where the line is long."""
    text = str(error).strip().split("\n")[0].rstrip(".:; ")
    if len(text) > _LONGEST_REASON:
        text = shorten(text.split(". ")[0], _LONGEST_REASON, placeholder=" ...")
    return text or type(error).__name__

"""The original checkpoint's tokenizer as one that stock transformers loads, with every token at its old id.

From the slow tokenizer's files, as in the original's own examples, or a tokenizer.json where there is nothing else.
Source: Kudo and Richardson, SentencePiece, arXiv:1808.06226.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ..errors import BadInput, MissingPackage, StorageError
from .config import IMAGE_TOKEN, VIDEO_TOKEN
from .source import read_json

_SPACE = "▁"
_NORMAL, _USER_DEFINED = 1, 4  # SentencePiece.Type
_BPE_MODEL = 2  # TrainerSpec.ModelType


def read_model(path: Path) -> Any:
    """A `tokenizer.model` as SentencePiece's own `ModelProto`; refused if it is broken, or no BPE model."""
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError:
        raise MissingPackage(
            f"{path} is read with sentencepiece and protobuf: pip install 'thinsight[convert]'"
        ) from None
    model = ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError is another class in each of its implementations
        raise BadInput(f"{path} is not a SentencePiece model ({error}): download it anew") from error
    if not model.pieces:
        raise BadInput(f"{path} is not a SentencePiece model (it has no pieces): download it anew")
    trained = model.trainer_spec
    suffixes = trained.treat_whitespace_as_suffix or not model.normalizer_spec.escape_whitespaces
    if trained.model_type != _BPE_MODEL or suffixes:
        raise BadInput(
            f"{path} is not a BPE model that writes spaces as prefixes, as InternVL's text models have: "
            "put a tokenizer.json in its place"
        )
    return model


def build_tokenizer(model: Any, *, prefix: str, renamed: dict[int, str]) -> Tokenizer:
    """The tokenizer of what `read_model` gives, without special tokens around a text.

    Args:
        model: as `read_model` gives it.
        prefix: where a space goes in front: "always" (every stretch of text between added tokens), "first"
            (the text's beginning alone), or "never".
        renamed: pieces, by id, that added tokens take the place of.
    """
    own = [(piece.piece, piece.score, piece.type) for piece in model.pieces]
    unknown = model.trainer_spec.unk_piece
    unknown_id = next((number for number, (text, _, _) in enumerate(own) if text == unknown), -1)
    kept = [(number, *piece) for number, piece in enumerate(own) if number not in renamed]
    tokenizer = Tokenizer(
        BPE(
            vocab={renamed.get(number, text): number for number, (text, _, _) in enumerate(own)},
            merges=_merges({text: (-score, number) for number, text, score, kind in kept if kind == _NORMAL}),
            unk_token=renamed.get(unknown_id, unknown),
            fuse_unk=True,
            byte_fallback=model.trainer_spec.byte_fallback,
        )
    )
    cleaning = model.normalizer_spec
    steps: list[Any] = []
    if cleaning.precompiled_charsmap:
        steps += [normalizers.Precompiled(cleaning.precompiled_charsmap)]
    if cleaning.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    else:
        steps += [normalizers.Prepend(_SPACE)] if prefix == "always" else []
        steps += [normalizers.Replace(" ", _SPACE)]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    decoding: list[Any] = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(decoding + ([decoders.Strip(" ", left=1)] if prefix != "never" else []))
    # Pieces that are cut out of the text whole; those with a space exist only in normalized text. A space in front of
    # every stretch of text would come after each of them too, which SentencePiece does not do.
    whole = [text for _, text, _, kind in kept if kind == _USER_DEFINED]
    if (prefix == "always" and whole) or (prefix == "first" and any(_SPACE in text for text in whole)):
        raise BadInput(
            f"tokenizer.model has user-defined pieces such as {whole[0]!r} and a dummy prefix, which a "
            "tokenizer.json cannot say: put the checkpoint's own tokenizer.json in its place"
        )
    tokenizer.add_tokens([AddedToken(text, normalized=_SPACE in text, special=False) for text in whole])
    return tokenizer


def _merges(normal: Mapping[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """Every way to make a normal piece out of two, best piece first, as SentencePiece joins neighbours; ``normal``:
    their negative scores, and ids."""
    merges: list[tuple[str, str]] = []
    for text in sorted(normal, key=lambda text: normal[text]):
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [(left, right) for left, right in halves if left in normal and right in normal]
        merges += sorted(known, key=lambda pair: (normal[pair[0]][1], normal[pair[1]][1]))
    return merges


_ROLES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE_TOKEN,
    "video_token": VIDEO_TOKEN,
}
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "InternLM2Tokenizer": {**_LLAMA, "pad_token": "</s>"},
    "LlamaTokenizer": _LLAMA,
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # what Qwen2 splits text by before BPE: part of the model, as its vocabulary is


def convert_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer of the original in a folder, padding on the left, with the names that `InternVLProcessor` asks for.
    Refused: files that are missing or broken, and an image token without a row in the ``vocab_size`` embeddings."""
    settings = _read_settings(folder)
    backend = _read_backend(folder, settings)
    for number, token in settings["added"].items():  # in the order of their ids, and held to those
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != number:
            raise BadInput(
                f"added token {token.content!r} has id {number} in the original tokenizer but would get "
                f"{backend.token_to_id(token.content)}: its vocabulary has a gap or lacks a file"
            )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        padding_side="left",
        model_max_length=settings.get("model_max_length"),
        clean_up_tokenization_spaces=bool(settings.get("clean_up_tokenization_spaces", False)),
        extra_special_tokens=_ROLES,
        **_named_tokens(settings),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for text in ("<img>", "</img>", IMAGE_TOKEN):
        number = backend.token_to_id(text)
        if number is None:
            raise BadInput(f"the tokenizer has no {text!r}: it is not an InternVL checkpoint's")
        if number >= vocab_size:
            raise BadInput(
                f"token {text!r} has id {number}, but the text model has {vocab_size} embeddings: the "
                "tokenizer belongs to another checkpoint"
            )
    return tokenizer


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over the class's defaults, with ``added`` as AddedToken by id."""
    own = read_json(folder / "tokenizer_config.json")
    special_map, own_added = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("special_tokens_map.json", "added_tokens.json")
    )
    kind = str(own.get("tokenizer_class", "")).removesuffix("Fast")
    settings = {**_DEFAULTS.get(kind, {}), **special_map, **own, "tokenizer_class": kind}
    special = {_content(token) for token in settings.get("additional_special_tokens") or ()}
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    added = {
        int(number): AddedToken(_content(token), **{flag: bool(token.get(flag, False)) for flag in flags})
        for number, token in own.get("added_tokens_decoder", {}).items()
    }
    for text, number in own_added.items():
        added.setdefault(int(number), AddedToken(text, normalized=False, special=text in special))
    return {**settings, "added": dict(sorted(added.items()))}


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: _content(settings[name]) for name in _NAMED if settings.get(name) is not None}


def _read_backend(folder: Path, settings: Mapping[str, Any]) -> Tokenizer:
    kind = settings["tokenizer_class"]
    if kind in ("InternLM2Tokenizer", "LlamaTokenizer") and (folder / "tokenizer.model").is_file():
        return _from_sentencepiece(folder / "tokenizer.model", settings)
    if kind == "Qwen2Tokenizer" and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _from_byte_pairs(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise BadInput(
            f"tokenizer_class is {kind!r} in {folder / 'tokenizer_config.json'}, and the folder has no "
            "vocabulary that goes with it: tokenizer.model, vocab.json and merges.txt, or tokenizer.json"
        )
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise StorageError(f"{path} cannot be read ({error}): download it anew") from error


def _from_sentencepiece(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    """SentencePiece's vocabulary, with bos before and eos after a text as far as the settings say so."""
    model = read_model(path)
    # Llama's tokenizer leaves the prefix to SentencePiece only if it is "legacy", which is the default.
    if settings["tokenizer_class"] == "LlamaTokenizer" and settings.get("legacy") is False:
        prefix = "never" if settings.get("add_prefix_space") is False else "first"
    else:
        prefix = "always" if model.normalizer_spec.add_dummy_prefix else "never"
    renamed = {n: token.content for n, token in settings["added"].items() if n < len(model.pieces)}
    backend = build_tokenizer(model, prefix=prefix, renamed=renamed)
    named = _named_tokens(settings)
    before = [named["bos_token"]] if settings.get("add_bos_token") else []
    after = [named["eos_token"]] if settings.get("add_eos_token") else []
    for token in (*before, *after):
        if backend.token_to_id(token) is None:
            raise BadInput(f"tokenizer_config.json names {token!r}, which tokenizer.model does not have")
    single = [*before, "$A", *after]
    second = [*(f"{token}:1" for token in before), "$B:1", *(f"{token}:1" for token in after)]
    backend.post_processor = TemplateProcessing(
        single=" ".join(single),
        pair=" ".join([*single, *second]),
        special_tokens=[(token, backend.token_to_id(token)) for token in {*before, *after}],
    )
    return backend


def _from_byte_pairs(folder: Path) -> Tokenizer:
    """Qwen2's byte-level BPE from vocab.json and merges.txt."""
    vocab = read_json(folder / "vocab.json")
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = [line.partition(" ") for line in lines if line and not line.startswith("#version")]
    try:
        backend = Tokenizer(BPE(vocab=vocab, merges=[(left, right) for left, _, right in pairs]))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise BadInput(f"{folder / 'merges.txt'} does not fit vocab.json ({error})") from error
    backend.normalizer = normalizers.NFC()
    splits = pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend

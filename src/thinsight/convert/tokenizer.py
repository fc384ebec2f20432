"""The original checkpoint's tokenizer as one that stock transformers loads, with every token at its old id.

Reads the slow tokenizer's files, as the original's own examples do (``use_fast=False``), and a tokenizer.json
only where there is nothing else. A SentencePiece model is read with that library's own description of its
file. Knows nothing about weights or images; runs none of the checkpoint's code.

Source: Kudo and Richardson, SentencePiece, arXiv:1808.06226.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its position."""

    text: str
    score: float
    kind: int  # SentencePiece.Type


@dataclass(frozen=True)
class SentencePieceModel:
    """What a model file says, as far as encoding and decoding need it."""

    pieces: list[Piece]
    model_type: int
    unknown_piece: str
    byte_fallback: bool
    space_is_suffix: bool
    charsmap: bytes
    adds_dummy_prefix: bool
    removes_extra_spaces: bool
    escapes_spaces: bool


def read_model(path: Path) -> SentencePieceModel:
    """Read a `tokenizer.model`.

    Raises:
        ThinsightError: the file is broken, or is not a BPE model.
    """
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError:
        raise MissingPackage(
            f"{path} is read with sentencepiece and protobuf: pip install 'thinsight[convert]'"
        ) from None
    proto = ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError is another class in each of its implementations
        raise BadInput(f"{path} is not a SentencePiece model ({error}): download it anew") from error
    trained, normalizer = proto.trainer_spec, proto.normalizer_spec
    model = SentencePieceModel(
        pieces=[Piece(piece.piece, piece.score, piece.type) for piece in proto.pieces],
        model_type=trained.model_type,
        unknown_piece=trained.unk_piece,
        byte_fallback=trained.byte_fallback,
        space_is_suffix=trained.treat_whitespace_as_suffix,
        charsmap=normalizer.precompiled_charsmap,
        adds_dummy_prefix=normalizer.add_dummy_prefix,
        removes_extra_spaces=normalizer.remove_extra_whitespaces,
        escapes_spaces=normalizer.escape_whitespaces,
    )
    if not model.pieces:
        raise BadInput(f"{path} is not a SentencePiece model (it has no pieces): download it anew")
    if model.model_type != _BPE_MODEL or model.space_is_suffix or not model.escapes_spaces:
        raise BadInput(
            f"{path} is not a BPE model that writes spaces as prefixes, as InternVL's text models have: "
            "put a tokenizer.json in its place"
        )
    return model


def build_tokenizer(model: SentencePieceModel, *, prefix: str, renamed: dict[int, str]) -> Tokenizer:
    """The tokenizer, without special tokens around a text.

    Args:
        model: the model file's content.
        prefix: where a space goes in front: "always" (every stretch of text between added tokens), "first"
            (the text's beginning alone), or "never".
        renamed: pieces, by id, that added tokens take the place of.

    Raises:
        ThinsightError: user-defined pieces that cannot go together with ``prefix``.
    """
    texts = [renamed.get(number, piece.text) for number, piece in enumerate(model.pieces)]
    tokenizer = Tokenizer(
        BPE(
            vocab={text: number for number, text in enumerate(texts)},
            merges=_merges(model, renamed),
            unk_token=renamed.get(_unknown_id(model), model.unknown_piece),
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
        )
    )
    steps = _cleaning(model)
    if prefix == "first":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    else:
        steps += [normalizers.Prepend(_SPACE)] if prefix == "always" else []
        steps += [normalizers.Replace(" ", _SPACE)]
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = _decoder(strips=prefix != "never")
    tokenizer.add_tokens(_user_defined(model, renamed, prefix))
    return tokenizer


def _unknown_id(model: SentencePieceModel) -> int:
    return next((n for n, piece in enumerate(model.pieces) if piece.text == model.unknown_piece), -1)


def _merges(model: SentencePieceModel, renamed: dict[int, str]) -> list[tuple[str, str]]:
    """Every way to make a normal piece out of two, best piece first.

    SentencePiece joins the neighbours whose joined piece has the highest score, whichever two they are.
    """
    normal = {
        piece.text: number
        for number, piece in enumerate(model.pieces)
        if piece.kind == _NORMAL and number not in renamed
    }
    by_score = sorted(normal.items(), key=lambda item: (-model.pieces[item[1]].score, item[1]))
    merges: list[tuple[str, str]] = []
    for text, _ in by_score:
        halves = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
        known = [(left, right) for left, right in halves if left in normal and right in normal]
        merges += sorted(known, key=lambda pair: (normal[pair[0]], normal[pair[1]]))
    return merges


def _cleaning(model: SentencePieceModel) -> list[Any]:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.removes_extra_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    return steps


def _decoder(*, strips: bool) -> Any:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *([decoders.Strip(" ", left=1)] if strips else [])])


def _user_defined(model: SentencePieceModel, renamed: dict[int, str], prefix: str) -> list[AddedToken]:
    """Pieces that are cut out of the text whole. Those with a space exist only in normalized text.

    A space in front of every stretch of text would come after each of them too, which SentencePiece does
    not do.
    """
    found = [
        piece.text for number, piece in enumerate(model.pieces) if piece.kind == _USER_DEFINED and number not in renamed
    ]
    if (prefix == "always" and found) or (prefix == "first" and any(_SPACE in text for text in found)):
        raise BadInput(
            f"tokenizer.model has user-defined pieces such as {found[0]!r} and a dummy prefix, which a "
            "tokenizer.json cannot say: put the checkpoint's own tokenizer.json in its place"
        )
    return [AddedToken(text, normalized=_SPACE in text, special=False) for text in found]


_ROLES = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": IMAGE_TOKEN,
    "video_token": VIDEO_TOKEN,
}
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_DEFAULTS: dict[str, dict[str, Any]] = {
    "InternLM2Tokenizer": {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "</s>",
        "add_bos_token": True,
    },
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True},
    "Qwen2Tokenizer": {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
}
_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # what Qwen2 splits text by before BPE: part of the model, as its vocabulary is


def convert_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """The tokenizer, padding on the left, with the names that `InternVLProcessor` asks for.

    Args:
        folder: the original checkpoint's.
        vocab_size: rows of the text model's embeddings.

    Raises:
        ThinsightError: files that are missing or broken, a tokenizer class that is not known, an image token
            that is missing or has no embedding.
    """
    settings = _read_settings(folder)
    backend = _read_backend(folder, settings)
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
    _check_image_tokens(backend, vocab_size)
    return tokenizer


# -- settings --------------------------------------------------------------------------------------------


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json over the class's defaults, with ``added`` as AddedToken by id."""
    own = read_json(folder / "tokenizer_config.json")
    kind = str(own.get("tokenizer_class", "")).removesuffix("Fast")
    special_map = _read_optional(folder / "special_tokens_map.json")
    settings = {**_DEFAULTS.get(kind, {}), **special_map, **own, "tokenizer_class": kind}
    special = {_content(token) for token in settings.get("additional_special_tokens") or ()}
    added = {int(number): _added_token(token) for number, token in own.get("added_tokens_decoder", {}).items()}
    for text, number in _read_optional(folder / "added_tokens.json").items():
        added.setdefault(int(number), AddedToken(text, normalized=False, special=text in special))
    return {**settings, "added": dict(sorted(added.items()))}


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, Mapping) else token)


def _added_token(token: Mapping[str, Any]) -> AddedToken:
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return AddedToken(_content(token), **{flag: bool(token.get(flag, False)) for flag in flags})


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    return {name: _content(settings[name]) for name in _NAMED if settings.get(name) is not None}


# -- the tokenizer itself --------------------------------------------------------------------------------


def _read_backend(folder: Path, settings: dict[str, Any]) -> Tokenizer:
    kind = settings["tokenizer_class"]
    if kind in ("InternLM2Tokenizer", "LlamaTokenizer") and (folder / "tokenizer.model").is_file():
        backend = _from_sentencepiece(folder / "tokenizer.model", settings)
    elif kind == "Qwen2Tokenizer" and (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        backend = _from_byte_pairs(folder)
    elif (folder / "tokenizer.json").is_file():
        backend = _from_json(folder / "tokenizer.json")
    else:
        raise BadInput(
            f"tokenizer_class is {kind!r} in {folder / 'tokenizer_config.json'}, and the folder has no "
            "vocabulary that goes with it: tokenizer.model, vocab.json and merges.txt, or tokenizer.json"
        )
    _add_tokens(backend, settings["added"])
    return backend


def _from_sentencepiece(path: Path, settings: Mapping[str, Any]) -> Tokenizer:
    model = read_model(path)
    renamed = {n: token.content for n, token in settings["added"].items() if n < len(model.pieces)}
    backend = build_tokenizer(model, prefix=_prefix(settings, model.adds_dummy_prefix), renamed=renamed)
    _surround(backend, settings)
    return backend


def _prefix(settings: Mapping[str, Any], adds_dummy_prefix: bool) -> str:
    """Llama's tokenizer leaves the prefix to SentencePiece only if it is "legacy", which is the default."""
    if settings["tokenizer_class"] == "LlamaTokenizer" and settings.get("legacy") is False:
        return "never" if settings.get("add_prefix_space") is False else "first"
    return "always" if adds_dummy_prefix else "never"


def _surround(backend: Tokenizer, settings: Mapping[str, Any]) -> None:
    """Put bos before and eos after a text, as far as the settings say so."""
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
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _from_json(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise StorageError(f"{path} cannot be read ({error}): download it anew") from error


def _add_tokens(backend: Tokenizer, added: Mapping[int, AddedToken]) -> None:
    """Add the tokens in the order of their ids, and hold them to those."""
    for number, token in added.items():
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != number:
            raise BadInput(
                f"added token {token.content!r} has id {number} in the original tokenizer but would get "
                f"{backend.token_to_id(token.content)}: its vocabulary has a gap or lacks a file"
            )


def _check_image_tokens(backend: Tokenizer, vocab_size: int) -> None:
    for token in ("<img>", "</img>", IMAGE_TOKEN):
        number = backend.token_to_id(token)
        if number is None:
            raise BadInput(f"the tokenizer has no {token!r}: it is not an InternVL checkpoint's")
        if number >= vocab_size:
            raise BadInput(
                f"token {token!r} has id {number}, but the text model has {vocab_size} embeddings: the "
                "tokenizer belongs to another checkpoint"
            )

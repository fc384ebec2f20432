"""A SentencePiece BPE model file (`tokenizer.model`) as a `tokenizers.Tokenizer` that gives the same ids.

Reads the file's protocol buffer itself (field numbers from sentencepiece_model.proto), so neither
sentencepiece nor protobuf need be installed. Knows nothing about added tokens, chat or models.

Source: Kudo and Richardson, SentencePiece, arXiv:1808.06226.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from ..errors import BadInput

__all__ = ["Piece", "SentencePieceModel", "build_tokenizer", "read_model"]

_SPACE = "▁"
_NORMAL, _USER_DEFINED = 1, 4  # SentencePiece.Type
_BPE_MODEL = 2  # TrainerSpec.ModelType
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


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
        model = _parse(path.read_bytes())
    except (OSError, ValueError, IndexError, struct.error) as error:
        raise BadInput(f"{path} is not a SentencePiece model ({error}): download it anew") from error
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
        piece.text
        for number, piece in enumerate(model.pieces)
        if piece.kind == _USER_DEFINED and number not in renamed
    ]
    if (prefix == "always" and found) or (prefix == "first" and any(_SPACE in text for text in found)):
        raise BadInput(
            f"tokenizer.model has user-defined pieces such as {found[0]!r} and a dummy prefix, which a "
            "tokenizer.json cannot say: put the checkpoint's own tokenizer.json in its place"
        )
    return [AddedToken(text, normalized=_SPACE in text, special=False) for text in found]


# -- protocol buffer -------------------------------------------------------------------------------------


def _parse(data: bytes) -> SentencePieceModel:
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    for number, value in _fields(data):
        if number == 1:
            piece = dict(_fields(value))
            score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
            pieces.append(Piece(piece.get(1, b"").decode("utf-8"), score, piece.get(3, _NORMAL)))
        elif number == 2:
            trainer |= dict(_fields(value))
        elif number == 3:
            normalizer |= dict(_fields(value))
    return SentencePieceModel(
        pieces=pieces,
        model_type=trainer.get(3, 1),
        unknown_piece=trainer.get(45, b"<unk>").decode("utf-8"),
        byte_fallback=bool(trainer.get(35, 0)),
        space_is_suffix=bool(trainer.get(24, 0)),
        charsmap=normalizer.get(2, b""),
        adds_dummy_prefix=bool(normalizer.get(3, 1)),
        removes_extra_spaces=bool(normalizer.get(4, 1)),
        escapes_spaces=bool(normalizer.get(5, 1)),
    )


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field numbers and values of a message: int for varints, bytes for everything else."""
    place = 0
    while place < len(data):
        tag, place = _varint(data, place)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, place = _varint(data, place)
            yield number, value
            continue
        if wire == _BYTES:
            length, place = _varint(data, place)
        elif wire in (_FIXED32, _FIXED64):
            length = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire} at byte {place}")
        if place + length > len(data):
            raise ValueError("it ends within a field")
        yield number, data[place : place + length]
        place += length


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7

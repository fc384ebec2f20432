"""Converted tokenizers give the ids of the original slow ones, piece for piece, and reload as they were."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from original_checkpoints import SENTENCES, sentencepiece_model, write_json, write_tokenizer
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from thinsight import ThinsightError
from thinsight.convert.tokenizer import build_tokenizer, convert_tokenizer, read_model

SIZES = {"InternVL2-1B": 2, "InternVL2-2B": 1, "InternVL2-4B": 1, "InternVL2-40B": 0}
CHARACTERS = "abcdeT  \n\t.,!?'0123é三图片😀▁<|>"


def texts() -> list[str]:
    """The training sentences, prompts, and strings of random characters."""
    draw = random.Random(0)
    noise = ["".join(draw.choices(CHARACTERS, k=draw.randint(1, 40))) for _ in range(150)]
    prompts = [
        "<|im_start|>user\n<img><IMG_CONTEXT><IMG_CONTEXT></img>\nIs  it?<|im_end|><|im_start|>assistant\n",
        "<|user|>\n<img><IMG_CONTEXT></img>\n hello <|end|>\n\n<|assistant|> \n",
        "a<box>b</box> c",
        "<0x41>",
        "[UNUSED_TOKEN_1] x",
    ]
    return [*SENTENCES, *prompts, *noise]


def slow_ids(folder: Path, text: str) -> list[int]:
    """What transformers' slow tokenizers do: added tokens are cut out, SentencePiece encodes the rest."""
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    added = {
        token["content"]: (int(n), token["rstrip"]) for n, token in settings.get("added_tokens_decoder", {}).items()
    }
    if (folder / "added_tokens.json").exists():
        more = json.loads((folder / "added_tokens.json").read_text())
        added |= {token: (n, False) for token, n in more.items() if token not in added}
    added |= {token: (n, False) for n, token in enumerate(("<unk>", "<s>", "</s>")) if token not in added}
    pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    anew = settings.get("legacy") is False  # such a tokenizer puts the one space in front by itself
    if anew:
        text = "▁" + text.replace("▁", " ")
    longest_first = sorted(added, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    ids = [1] if settings.get("add_bos_token", settings["tokenizer_class"] == "InternLM2Tokenizer") else []
    for place, part in enumerate(parts):
        if part in added:
            ids.append(added[part][0])
            continue
        if place and added[parts[place - 1]][1]:
            part = part.lstrip()
        if anew and place == 0 and part == "▁" and len(parts) > 1:
            continue
        ids += _without_prefix(pieces, part) if anew else pieces.encode(part)
    return ids


def _without_prefix(pieces: SentencePieceProcessor, text: str) -> list[int]:
    """Encode behind an emoji, which joins with nothing and becomes four bytes after the prefix."""
    return pieces.encode("😀" + text)[5:]


@pytest.mark.parametrize("size", ["InternVL2-2B", "InternVL2-4B", "InternVL2-40B"])
def test_ids_of_the_slow_tokenizer(size: str, tmp_path: Path) -> None:
    tokenizer = convert_tokenizer(tmp_path, write_tokenizer(tmp_path, size))
    own_space = size == "InternVL2-4B"
    for text in texts():
        if own_space and text.startswith((" ", "▁")):
            continue  # a fast tokenizer does not put a space before a space; no prompt begins with one
        assert tokenizer(text)["input_ids"] == slow_ids(tmp_path, text), repr(text)


def test_ids_of_qwen2(tmp_path: Path) -> None:
    """Transformers' own Qwen2 tokenizer from the same vocabulary files."""
    tokenizer = convert_tokenizer(tmp_path, write_tokenizer(tmp_path, "InternVL2-1B"))
    stock = Qwen2Tokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    for text in SENTENCES + texts()[-150:]:
        assert tokenizer(text)["input_ids"] == stock(text)["input_ids"], repr(text)
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    assert tokenizer.convert_tokens_to_ids(list(added)) == list(added.values())
    prompt = "<|im_start|>user\n<img><IMG_CONTEXT></img>"
    expected = [added["<|im_start|>"], *stock("user\n")["input_ids"]]
    expected += [added[token] for token in ("<img>", "<IMG_CONTEXT>", "</img>")]
    assert tokenizer(prompt)["input_ids"] == expected


@pytest.mark.parametrize("size", SIZES)
def test_reloads_the_same(size: str, tmp_path: Path) -> None:
    """Also beside a config of model type internvl, whose registered tokenizer class is another one."""
    original = tmp_path / "original"
    original.mkdir()
    tokenizer = convert_tokenizer(original, write_tokenizer(original, size))
    saved = tmp_path / "saved"
    tokenizer.save_pretrained(saved)
    write_json(saved / "config.json", {"model_type": "internvl"})
    reloaded = AutoTokenizer.from_pretrained(saved)
    for text in texts():
        ids = tokenizer(text)["input_ids"]
        assert reloaded(text)["input_ids"] == ids
        assert reloaded.decode(ids) == tokenizer.decode(ids)
    assert reloaded.padding_side == "left"
    assert reloaded.context_image_token == "<IMG_CONTEXT>"
    assert reloaded.start_image_token_id == tokenizer.convert_tokens_to_ids("<img>")
    assert reloaded.pad_token_id is not None
    assert reloaded.eos_token == tokenizer.eos_token


@pytest.mark.parametrize("size", SIZES)
def test_decodes_what_it_encoded(size: str, tmp_path: Path) -> None:
    tokenizer = convert_tokenizer(tmp_path, write_tokenizer(tmp_path, size))
    for text in SENTENCES:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text
    answer = tokenizer("Two circles.<box>", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "Two circles."


PREFIXES = {
    "no prefix": {"dummy_prefix": False},
    "prefix": {"dummy_prefix": True},
    "user-defined pieces": {"dummy_prefix": False, "extra": ("<sep>", "[X]")},
    "user-defined spaces": {"dummy_prefix": False, "extra": ("▁▁▁", "<sep>")},
    "extra spaces removed": {"dummy_prefix": True, "remove_extra_whitespaces": True},
    "unicode normalized": {"dummy_prefix": True, "normalization_rule_name": "nmt_nfkc"},
}


@pytest.mark.parametrize("name", PREFIXES)
def test_sentencepiece_itself(name: str, tmp_path: Path) -> None:
    """One stretch of text, without added tokens, against the sentencepiece library."""
    written = sentencepiece_model(**PREFIXES[name])
    (tmp_path / "tokenizer.model").write_bytes(written)
    pieces = SentencePieceProcessor(model_proto=written)
    model = read_model(tmp_path / "tokenizer.model")
    assert [piece.piece for piece in model.pieces] == [pieces.id_to_piece(n) for n in range(len(pieces))]
    cleaning = model.normalizer_spec
    assert cleaning.add_dummy_prefix is PREFIXES[name]["dummy_prefix"]
    tokenizer = build_tokenizer(model, prefix="always" if cleaning.add_dummy_prefix else "never", renamed={})
    for text in [*texts(), "a   b    c", "x<sep> y [X]z", "\ufb01ne \uff21\u3000b"]:
        if cleaning.remove_extra_whitespaces and "▁" in text:
            continue  # the character that stands for a space, written out, counts as one at a text's end
        assert tokenizer.encode(text).ids == pieces.encode(text), repr(text)


def test_tokenizer_json_alone(tmp_path: Path) -> None:
    """InternVL2-Llama3-76B has nothing else: it is taken as it is."""
    original = tmp_path / "original"
    original.mkdir()
    vocabulary = write_tokenizer(original, "InternVL2-1B")
    convert_tokenizer(original, vocabulary).backend_tokenizer.save(str(original / "tokenizer.json"))
    expected = convert_tokenizer(original, vocabulary)
    (original / "vocab.json").unlink()
    settings = json.loads((original / "tokenizer_config.json").read_text())
    write_json(original / "tokenizer_config.json", {**settings, "tokenizer_class": "PreTrainedTokenizerFast"})
    tokenizer = convert_tokenizer(original, vocabulary)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    for text in texts():
        assert tokenizer(text)["input_ids"] == expected(text)["input_ids"]


def error_of(folder: Path, vocabulary: int) -> str:
    with pytest.raises(ThinsightError) as error:
        convert_tokenizer(folder, vocabulary)
    return str(error.value)


def change_settings(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    write_json(folder / "tokenizer_config.json", {**settings, **changes})


def test_refuses_broken_files(tmp_path: Path) -> None:
    vocabulary = write_tokenizer(tmp_path, "InternVL2-2B")
    whole = (tmp_path / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(whole[:-3])
    assert "is not a SentencePiece model" in error_of(tmp_path, vocabulary)
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "is not a SentencePiece model" in error_of(tmp_path, vocabulary)
    (tmp_path / "tokenizer.model").unlink()
    assert "the folder has no vocabulary" in error_of(tmp_path, vocabulary)
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json is not valid JSON" in error_of(tmp_path, vocabulary)


def test_says_which_extra_a_sentencepiece_model_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = write_tokenizer(tmp_path, "InternVL2-2B")
    monkeypatch.setitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", None)
    assert "pip install 'thinsight[convert]'" in error_of(tmp_path, vocabulary)


def test_refuses_other_kinds_of_model(tmp_path: Path) -> None:
    vocabulary = write_tokenizer(tmp_path, "InternVL2-40B")
    (tmp_path / "tokenizer.model").write_bytes(
        sentencepiece_model(dummy_prefix=False, model_type="unigram", vocab_size=330)
    )
    assert "is not a BPE model" in error_of(tmp_path, vocabulary)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model(dummy_prefix=True, extra=("<sep>",)))
    assert "has user-defined pieces such as '<sep>' and a dummy prefix" in error_of(tmp_path, vocabulary)


def test_refuses_a_gap_and_missing_image_tokens(tmp_path: Path) -> None:
    vocabulary = write_tokenizer(tmp_path, "InternVL2-40B")
    assert "'<img>' has id 422, but the text model has 100 embeddings" in error_of(tmp_path, 100)
    added = json.loads((tmp_path / "added_tokens.json").read_text())
    write_json(tmp_path / "added_tokens.json", {token: n for token, n in added.items() if n != 421})
    assert "'<img>' has id 422 in the original tokenizer but would get 421" in error_of(tmp_path, vocabulary)
    (tmp_path / "added_tokens.json").unlink()
    assert "has no '<img>'" in error_of(tmp_path, vocabulary)


def test_reads_no_code(tmp_path: Path) -> None:
    """Code beside the vocabulary is not looked at."""
    vocabulary = write_tokenizer(tmp_path, "InternVL2-2B")
    (tmp_path / "tokenization_internlm2.py").write_text("raise SystemExit('this code was run')\n")
    change_settings(tmp_path, tokenizer_class="InternLM2TokenizerFast")
    tokenizer = convert_tokenizer(tmp_path, vocabulary)
    assert Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()).token_to_id("<|im_end|>") == 7
